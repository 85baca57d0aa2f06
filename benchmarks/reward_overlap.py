"""
Overlap of rewards and sampling: `python benchmarks/reward_overlap.py`.

The reward sleeps for as long as it takes to sample a batch, like a reward on another GPU or behind a network. The
reward functions of a batch run in parallel, while the next batch is sampled. Prints the time from the first sample to
the last reward, divided by the longer of sampling alone and rewards alone.
"""

import argparse
import statistics
import time
from typing import Any

from torch import Tensor

from ddpo_trl import DDPOTrainer
from rounds import emoji_trainer, log_of_a_round


class Waiting:
    """Reward that sleeps for `seconds`."""

    seconds = 0.0

    def __call__(self, images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
        time.sleep(self.seconds)
        return images.flatten(1).mean(1)


def make_trainer(rewards: list[Waiting], batches: int) -> DDPOTrainer:
    return emoji_trainer(
        rewards,
        num_inference_steps=10,
        sde_window_size=1,  # little training: only sampling is measured
        num_sample_batches=batches,
        max_workers=len(rewards),
    )


def sampling_and_waiting(trainer: DDPOTrainer) -> tuple[float, float]:
    """Run a round, and return the seconds of sampling and of waiting for rewards."""
    log = log_of_a_round(trainer)
    return log["time/sampling"], log["time/waiting_for_rewards"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--functions", type=int, nargs="+", default=[1, 3])
    arguments = parser.parse_args()
    for functions in arguments.functions:
        rewards = [Waiting() for _ in range(functions)]
        ratios = []
        trainer = make_trainer(rewards, arguments.batches)
        for repeat in range(arguments.repeats + 1):
            Waiting.seconds = 0.0
            alone, _ = sampling_and_waiting(trainer)
            Waiting.seconds = alone / arguments.batches
            sampling, waiting = sampling_and_waiting(trainer)
            if repeat > 0:  # the first is warm-up
                ratios.append((sampling + waiting) / max(alone, Waiting.seconds * arguments.batches))
        print(
            f"{functions} reward function(s) that take as long as sampling: {statistics.median(ratios):.2f} of the "
            f"longer of the two alone (from {min(ratios):.2f} to {max(ratios):.2f}); without overlap it would be "
            f"{1 + functions:.2f}"
        )


if __name__ == "__main__":
    main()
