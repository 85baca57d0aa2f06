"""`make torture`: kills runs in one pass and in two at random moments; the last line is `survived N/N`."""

import argparse
import itertools
import random
import sys
import tempfile
from pathlib import Path

import torch
from rich.progress import Progress


sys.path.insert(0, str(Path(__file__).parent))  # tests import each other from there

import kill_a_run


ROUNDS = 6

# How often each event happens in a run of so many rounds, about: counts are drawn up to there.
SAVING = {"saving weights": 6, "saving the rest": 6, "publishing": 6, "synchronising": 66, "rotating": 6}
OFTEN = {
    "one pass": {"sampling with gradients": 12, "scoring": 12, "weighting gradients": 6, **SAVING},
    "two passes": {"sampling": 12, "scoring": 12, "training": 48, **SAVING},
}


def main() -> int:
    """The exit status is 0 if every run that was killed ended as one that never was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    kills = survived = 0
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        task = progress.add_task("kills", total=arguments.kills)
        whole = {passes: finished(Path(folder) / passes, passes) for passes in OFTEN}
        for run, passes in enumerate(itertools.cycle(OFTEN)):  # in turns
            if kills >= arguments.kills:
                break
            planned = [draw(moments, passes) for _ in range(min(8, -(-arguments.kills // 2), arguments.kills - kills))]
            directory = Path(folder) / f"run-{run}"
            happened = kill_a_run.run_until_done(directory, ROUNDS, planned, passes)
            result = finished(directory, passes)
            lost = [name for name, value in whole[passes].items() if not kill_a_run.equal(value, result[name])]
            kills += happened
            survived += 0 if lost else happened
            progress.update(task, completed=kills)
            if lost:
                progress.console.print(f"{passes}, {planned[: happened + 1]} lost {', '.join(lost)}")
    print(f"survived {survived}/{kills}")
    return int(survived < kills)


def draw(moments: random.Random, passes: str) -> tuple[str, int]:
    """A moment soon after the start, so that a run can be killed several times before it is through."""
    event, often = moments.choice(list(OFTEN[passes].items()))
    return event, moments.randint(1, max(1, often // 3))


def finished(directory: Path, passes: str) -> dict[str, torch.Tensor]:
    """What a run ends with; it is finished if it isn't yet."""
    if not (directory / kill_a_run.RESULT).is_file():
        kill_a_run.run_until_done(directory, ROUNDS, [], passes)
    return torch.load(directory / kill_a_run.RESULT, weights_only=False)


if __name__ == "__main__":
    raise SystemExit(main())
