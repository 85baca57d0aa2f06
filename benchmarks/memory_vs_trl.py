"""
Peak memory of one round, next to TRL 0.23.1's DDPOTrainer on the same work: `python benchmarks/memory_vs_trl.py`.

Both train a LoRA adapter of rank 4 on the embedded pipeline: the same number of images, denoising steps and samples
per micro-batch, guidance in sampling and training, float32 on the CPU. Each run has a process of its own, whose memory
before training (libraries and weights) is subtracted. TRL 0.23.1, the last release with this trainer, has the
environment of `make bench`, and the same checks come first.
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


def train_ours(sizes: Case, **options: Any) -> int:
    """Resident bytes before training."""
    trainer = our_trainer("emoji", sizes, rounds=1, one_pass=False, **options)  # `make bench` measures one pass too
    before = resident_bytes()
    trainer.train()
    return before


def train_theirs(sizes: Case) -> int:
    """Resident bytes before training."""
    trainer = their_trainer("emoji", sizes)
    before = resident_bytes()
    trainer.train()
    return before


RUNS: dict[str, Callable[[Case], int]] = {
    "TRL 0.23.1": train_theirs,
    "ddpo_trl": train_ours,
    "ddpo_trl, gradient checkpointing": lambda sizes: train_ours(sizes, gradient_checkpointing=True),
}


def growth_of(run: str, sizes: Case) -> float:
    """Peak resident MiB of a run in a process of its own, less those before training."""
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
    parser.add_argument("--run", choices=list(RUNS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = CASES["emoji"]._replace(batch_size=arguments.batch_size, batches=arguments.batches)
    if arguments.run:
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):
            before = RUNS[arguments.run](sizes)
        return print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20))
    try:
        install(TRL)
        check_sides("emoji")
    except (Disagreement, RuntimeError) as error:
        raise SystemExit(str(error)) from error
    growth: dict[str, list[float]] = {run: [] for run in RUNS}
    for _ in range(arguments.repeats):
        for run, values in growth.items():
            values.append(growth_of(run, sizes))
    base = statistics.median(growth["TRL 0.23.1"])
    print(f"{sizes.batches} batches of {sizes.batch_size} images, {sizes.steps} steps; peak above the start")
    for run, values in growth.items():
        median = statistics.median(values)
        print(f"{run:<34} {median:7.0f} MiB  {median / base:5.2f}  (from {min(values):.0f} to {max(values):.0f})")


if __name__ == "__main__":
    main()
