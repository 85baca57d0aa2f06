"""
Peak memory of one round, compared with TRL 0.23.1's DDPOTrainer: `python benchmarks/memory_vs_trl.py`.

Both train a LoRA adapter of rank 4 on the embedded pipeline, with the same number of images, denoising steps and
samples per micro-batch, guidance in sampling and training, and float32 on the CPU. Each run has its own process, whose
memory before training (libraries and weights) is subtracted. TRL 0.23.1, the last release with this trainer, runs in
the environment of `make bench`, after the same checks.
"""

import argparse
import contextlib
import io
import json
import resource
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

from agreement import Disagreement, check_sides
from environments import TRL, install, python_of
from rounds import Child, resident_bytes
from sides import CASES, Case, our_trainer, their_trainer


def two_pass_trainer(sizes: Case, **options: Any) -> Any:
    return our_trainer("emoji", sizes, rounds=1, one_pass=False, **options)  # `make bench` measures one pass too


TRAINERS: dict[str, Callable[[Case], Any]] = {
    "TRL 0.23.1": lambda sizes: their_trainer("emoji", sizes),
    "ddpo_trl": two_pass_trainer,
    "ddpo_trl, gradient checkpointing": lambda sizes: two_pass_trainer(sizes, gradient_checkpointing=True),
}


def growth_of(run: str, sizes: Case) -> float:
    """Measure the peak resident MiB of a run in its own process, minus those before training."""
    python = python_of(TRL) if run == "TRL 0.23.1" else sys.executable
    flags = ["--batch_size", str(sizes.batch_size), "--batches", str(sizes.batches)]
    child = Child([python, __file__, "--run", run, *flags])
    growth = child.answer()
    child.end()
    return growth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", choices=list(TRAINERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = CASES["emoji"]._replace(batch_size=arguments.batch_size, batches=arguments.batches)
    if arguments.run:
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = TRAINERS[arguments.run](sizes)
            before = resident_bytes()
            trainer.train()
        return print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20))
    try:
        install(TRL)
        check_sides("emoji")
    except (Disagreement, RuntimeError) as error:
        raise SystemExit(str(error)) from error
    growth: dict[str, list[float]] = {run: [] for run in TRAINERS}
    for _ in range(arguments.repeats):
        for run, values in growth.items():
            values.append(growth_of(run, sizes))
    base = statistics.median(growth["TRL 0.23.1"])
    print(f"{sizes.batches} batches of {sizes.batch_size} images, {sizes.steps} steps; growth during training")
    for run, values in growth.items():
        median = statistics.median(values)
        print(f"{run:<34} {median:7.0f} MiB  {median / base:5.2f}  (from {min(values):.0f} to {max(values):.0f})")


if __name__ == "__main__":
    main()
