"""`make torture`: kills runs of one pass and of two again and again; the last line is `survived N/N`."""

import argparse
import itertools
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress


sys.path.insert(0, str(Path(__file__).parent))  # tests import each other from there

import kill_a_run


ROUNDS = 6

# How often each event happens in a run of so many rounds, about: counts are drawn up to there. A round of one pass has
# a single micro-batch.
OFTEN = {
    "sampling": 12,
    "scoring": 12,
    "training": 48,
    "saving weights": 6,
    "saving the rest": 6,
    "publishing": 6,
    "synchronising": 66,
    "rotating": 6,
}
OFTEN_IN_ONE_PASS = {**OFTEN, "training": 6}


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
        kinds = [(OFTEN_IN_ONE_PASS, kill_a_run.ONE_PASS), (OFTEN, {})]
        wholes = [finished(Path(folder) / f"whole-{index}", settings) for index, (_, settings) in enumerate(kinds)]
        for run, (whole, (often, settings)) in enumerate(itertools.cycle(zip(wholes, kinds, strict=True))):
            if kills >= arguments.kills:
                break
            planned = [draw(moments, often) for _ in range(min(8, arguments.kills - kills))]
            directory = Path(folder) / f"run-{run}"
            happened = kill_a_run.run_until_done(directory, ROUNDS, planned, **settings)
            result = finished(directory, settings)
            lost = [name for name in whole if not kill_a_run.equal(whole[name], result[name])]
            kills += happened
            survived += 0 if lost else happened
            progress.update(task, completed=kills)
            if lost:
                progress.console.print(f"{settings} {planned[: happened + 1]} lost {', '.join(lost)}")
    print(f"survived {survived}/{kills}")
    return int(survived < kills)


def draw(moments: random.Random, often: dict[str, int]) -> tuple[str, int]:
    """A moment soon after the start, so that a run can be killed several times before it is through."""
    event = moments.choice(list(often))
    return event, moments.randint(1, max(1, often[event] // 3))


def finished(directory: Path, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a run ends with; it is finished if it isn't yet."""
    if not (directory / kill_a_run.RESULT).is_file():
        kill_a_run.run_until_done(directory, ROUNDS, [], **settings)
    return torch.load(directory / kill_a_run.RESULT, weights_only=False)


if __name__ == "__main__":
    raise SystemExit(main())
