"""
Speed and memory of a round, compared with TRL 0.23.1's DDPOTrainer and with the denoiser alone: `make bench`.

Each side runs in its own process and waits for its turn: rounds are interleaved, so that other load on the machine
affects all sides equally, and ratios are those of neighboring rounds. All sides train a LoRA adapter of rank 4 on the
same pipeline, with the same number of images, denoising steps and samples per micro-batch, guidance in sampling and
training, one update per round, float32, and the same version of torch and number of threads. TRL 0.23.1, the last
release with this trainer, gets its own virtual environment, with transformers 4 and a diffusers release of the same
age (benchmarks/trl-0.23.1.txt). The floor is the denoiser alone: as many forward passes as sampling needs, and as many
forward and backward passes as training needs.

Before timing, both sides must have the same prompt embeddings, images, log-probabilities and gradients on the same
trajectories; every timed round must have the expected number of denoised samples and updates. Otherwise the command
fails. Writes outputs/bench.json; a dated copy is in benchmarks/.
"""

import argparse
import contextlib
import io
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from agreement import CHECKED, Disagreement, check_sides
from environments import LOCK_FILES, TRL, install, locked, python_of
from rounds import PROMPTS, ROOT, Child, machine, resident_bytes
from sides import CASES, Case, load, our_trainer, their_trainer


SESSIONS = 2  # number of times that the processes of all sides are started


# ---- Process of a side: one round per request ----


class Turns:
    """
    Connection of a side to `measure`: waits for a request, and answers with the figures of a round.

    Args:
        answers (`TextIO`):
            Stream for the answers.
    """

    def __init__(self, answers: TextIO):
        self.answers = answers
        self.resident = self.denoised = self.updates = 0

    def ready(self, denoiser: torch.nn.Module) -> None:
        """Start counting denoised samples and optimizer steps, and report that the side is ready."""

        def count_samples(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            self.denoised += len(inputs[0])

        def count_update(*args: Any) -> None:
            self.updates += 1

        denoiser.register_forward_pre_hook(count_samples)
        register_optimizer_step_post_hook(count_update)
        self.resident = resident_bytes()
        self.answer({})

    def wait(self) -> None:
        """Wait for the next request; exit at the end of the input."""
        if not sys.stdin.readline():
            raise SystemExit
        self.denoised = self.updates = 0

    def answer(self, seconds: dict[str, float]) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        work = {"denoised": self.denoised, "updates": self.updates}
        print(json.dumps({**seconds, **work, "MiB": (peak - self.resident) / 2**20}), file=self.answers, flush=True)


def run_ours(case: str, sizes: Case, one_pass: bool, rounds: int, turns: Turns) -> None:
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.wait()
            self.start = time.perf_counter()

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            total = time.perf_counter() - self.start
            metrics = trainer.rollout.metrics
            sampling = metrics["time/sampling"] + metrics["time/waiting_for_rewards"]
            turns.answer({"sampling": sampling, "training": total - sampling, "round": total})

    trainer = our_trainer(case, sizes, rounds, [Stopwatch()], one_pass=one_pass)
    turns.ready(trainer.pipeline.unet)
    trainer.train()


def run_theirs(case: str, sizes: Case, rounds: int, turns: Turns) -> None:
    trainer = their_trainer(case, sizes)
    generate, seconds = trainer._generate_samples, {}

    def timed(**sizes: int) -> Any:
        start = time.perf_counter()
        samples = generate(**sizes)
        seconds["sampling"] = time.perf_counter() - start
        return samples

    trainer._generate_samples = timed
    turns.ready(trainer.sd_pipeline.unet)
    for round in range(rounds):
        turns.wait()
        start = time.perf_counter()
        trainer.step(round, round)
        total = time.perf_counter() - start
        turns.answer({"sampling": seconds["sampling"], "training": total - seconds["sampling"], "round": total})


def run_floor(case: str, sizes: Case, rounds: int, turns: Turns) -> None:
    """Run only the denoiser with its adapter, on batches doubled by guidance."""
    from ddpo_trl.policy.lora import add_adapter

    pipeline = load(case)
    add_adapter(pipeline, None)
    with torch.no_grad():
        prompts = [PROMPTS[0]] * sizes.batch_size
        embeds = torch.cat(pipeline.encode_prompt(prompts, "cpu", 1, True)[::-1])
    config = pipeline.unet.config
    latents = torch.randn(2 * sizes.batch_size, config.in_channels, config.sample_size, config.sample_size)
    calls = sizes.batches * sizes.steps
    turns.ready(pipeline.unet)
    for _ in range(rounds):
        turns.wait()
        start = time.perf_counter()
        with torch.no_grad():
            for _ in range(calls):
                pipeline.unet(latents, 500, embeds)
        sampled = time.perf_counter()
        for _ in range(calls):
            pipeline.unet(latents, 500, embeds).sample.square().mean().backward()
        end = time.perf_counter()
        turns.answer({"sampling": sampled - start, "training": end - sampled, "round": end - start})


RUNS: dict[str, Callable[[str, Case, int, Turns], None]] = {
    "TRL 0.23.1": run_theirs,
    "two passes": lambda case, sizes, rounds, turns: run_ours(case, sizes, False, rounds, turns),
    "one pass": lambda case, sizes, rounds, turns: run_ours(case, sizes, True, rounds, turns),
    "floor": run_floor,
}


def work_of_a_round(run: str, sizes: Case) -> dict[str, int]:
    """Compute the expected number of denoised samples (doubled by guidance) and of optimizer steps per round."""
    passes = 1 if run == "one pass" else 2
    samples = 2 * sizes.batch_size * sizes.batches * sizes.steps
    return {"denoised": passes * samples, "updates": 0 if run == "floor" else 1}


def require_work(run: str, sizes: Case, answer: dict[str, float]) -> None:
    """
    Remove the counts from an answer, and check them.

    Raises:
        [`~agreement.Disagreement`]: If the round did not do the expected work.
    """
    for name, count in work_of_a_round(run, sizes).items():
        if (found := answer.pop(name)) != count:
            raise Disagreement(f"The comparison is not valid: a round of {run} had {name}={found}, not {count}.")


def command(case: str, sizes: Case, run: str, rounds: int) -> list[str]:
    """Command line for the process of a side."""
    python = python_of(TRL) if run == "TRL 0.23.1" else sys.executable
    return [python, __file__, "--case", case, "--sizes", json.dumps(sizes), "--run", run, "--rounds", str(rounds)]


# ---- The table ----


def measure(case: str, sizes: Case, repeats: int) -> dict[str, dict[str, list[float]]]:
    """
    Time interleaved rounds of all sides.

    Args:
        case (`str`):
            Key of `CASES`.
        sizes ([`~sides.Case`]):
            Size of each round.
        repeats (`int`):
            Timed rounds per process. Processes are started more than once, because some are slower than others.

    Returns:
        `dict`: Figures of all timed rounds, by side and name.

    Raises:
        [`~agreement.Disagreement`]: If a round does not do the expected work.
    """
    figures: dict[str, dict[str, list[float]]] = {run: {} for run in RUNS}
    for session in range(SESSIONS):
        children = {run: Child(command(case, sizes, run, repeats + 1)) for run in RUNS}
        for child in children.values():
            child.answer()  # when it is ready
        for repeat in range(repeats + 1):
            turns = list(children.items())
            for run, child in turns if (session + repeat) % 2 else reversed(turns):
                child.ask()
                answer = child.answer()
                require_work(run, sizes, answer)
                for name, value in answer.items() if repeat else ():  # the first is warm-up
                    figures[run].setdefault(name, []).append(value)
        for child in children.values():
            child.end()
    return figures


def ratios(figures: dict[str, dict[str, list[float]]]) -> dict[str, list[float]]:
    """Compute one time ratio per repeat, of neighboring rounds, and one ratio of peak memory per comparison."""
    rounds = {run: values["round"] for run, values in figures.items()}
    peaks = {run: max(values["MiB"]) for run, values in figures.items()}

    def of(one: list[float], other: list[float]) -> list[float]:
        return [value / base for value, base in zip(one, other, strict=True)]

    return {
        "round_speedup_vs_trl": of(rounds["TRL 0.23.1"], rounds["two passes"]),
        "one_pass_speedup": of(rounds["two passes"], rounds["one pass"]),
        "one_pass_speedup_vs_trl": of(rounds["TRL 0.23.1"], rounds["one pass"]),
        "overhead_over_floor": of(rounds["two passes"], rounds["floor"]),
        # One pass needs one forward and one backward pass per step, like the training phase of the floor.
        "one_pass_overhead_over_floor": of(rounds["one pass"], figures["floor"]["training"]),
        "memory_vs_trl": [peaks["two passes"] / peaks["TRL 0.23.1"]],
        "one_pass_memory_vs_trl": [peaks["one pass"] / peaks["TRL 0.23.1"]],
    }


def show(sizes: Case, figures: dict[str, dict[str, list[float]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    samples = sizes.batch_size * sizes.batches
    base = figures["TRL 0.23.1"]["round"]
    table = Table(title=f"{sizes.title}: {sizes.batches} batches of {sizes.batch_size}, {sizes.steps} steps")
    headings = ["", "sampling", "training", "round, samples/s", "spread", "round, TRL = 1", "peak MiB"]
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for run, values in figures.items():
        rates = {what: samples / statistics.median(values[what]) for what in ("sampling", "training", "round")}
        spread = f"{samples / max(values['round']):.2f}..{samples / min(values['round']):.2f}"
        relative = statistics.median(own / theirs for own, theirs in zip(values["round"], base, strict=True))
        training = "-" if run == "one pass" else f"{rates['training']:.2f}"
        table.add_row(
            run, f"{rates['sampling']:.2f}", training, f"{rates['round']:.2f}", spread,
            f"{relative:.2f}", f"{max(values['MiB']):.0f}",
        )  # fmt: skip
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=2, help="timed rounds per process")
    parser.add_argument("--small", action="store_true", help="8 images and 3 steps per round, to try this command")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "bench.json")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--run", choices=list(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        torch.manual_seed(0)
        turns = Turns(sys.stdout)
        with contextlib.redirect_stdout(io.StringIO()):  # Trainer prints its logs
            return RUNS[arguments.run](arguments.case, Case(*arguments.sizes), arguments.rounds, turns)
    try:
        results = compare(
            {case: (CHECKED if arguments.small else CASES)[case] for case in arguments.cases}, arguments.repeats
        )
    except (Disagreement, RuntimeError) as error:
        raise SystemExit(str(error)) from error
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")


def compare(cases: dict[str, Case], repeats: int) -> dict[str, Any]:
    """Measure all cases; the medians of the first one are also at the top level."""
    install(TRL)
    versions = locked(LOCK_FILES / f"{TRL}.txt")
    theirs = " ".join(f"{name}=={versions[name]}" for name in ("torch", "transformers", "diffusers", "peft"))
    results = {case: run_case(case, sizes, repeats) for case, sizes in cases.items()}
    first = {name: value for name, value in next(iter(results.values())).items() if isinstance(value, float)}
    return {**first, "machine": {**machine(), "TRL's environment": theirs}, "cases": results}


def run_case(case: str, sizes: Case, repeats: int) -> dict[str, Any]:
    """Check, measure and print a case, and return its entry of the JSON file."""
    medians = check_sides(case)
    for name, value in medians.items():
        print(f"{name:<30} {value:.1e}", flush=True)
    figures = measure(case, sizes, repeats)
    show(sizes, figures)
    spreads = {}
    for name, values in ratios(figures).items():
        medians[name], spreads[name] = statistics.median(values), [min(values), max(values)]
        print(f"{name:<30} {medians[name]:.3f}  ({min(values):.3f} to {max(values):.3f})", flush=True)
    return {**medians, "from_to": spreads, "size": sizes._asdict(), "figures": figures}


if __name__ == "__main__":
    main()
