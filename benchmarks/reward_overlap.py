"""
How much of the time of a reward is hidden behind sampling: `python benchmarks/reward_overlap.py`.

The reward waits for as long as a batch took to sample, as one that runs on another GPU or behind a network. Reward
functions of a batch are computed while the next one is sampled, and several of them at the same time. Printed is the
time from the first sample to the last reward, divided by the longer of sampling and rewards alone.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from typing import Any

from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from ddpo_trl import DDPOConfig, DDPOTrainer, load_emoji_pipeline


PROMPTS = ["cat face", "pizza", "tulip", "octopus"]


class Waiting:
    """A reward that takes as long as it is told."""

    seconds = 0.0

    def __call__(self, images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
        time.sleep(self.seconds)
        return images.flatten(1).mean(1)


def make_trainer(rewards: list[Waiting], batches: int, directory: str) -> DDPOTrainer:
    config = DDPOConfig(
        output_dir=directory,
        num_train_epochs=1,
        num_inference_steps=10,
        guidance_scale=2.5,
        sde_window_size=1,  # little to train on: this is about sampling
        per_device_sample_batch_size=8,
        num_sample_batches=batches,
        per_device_train_batch_size=8,
        max_workers=len(rewards),
        one_pass=False,  # the figures are those of sampling and of training
        log_images_rounds=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    pipeline = load_emoji_pipeline()
    pipeline.unet.set_attn_processor(AttnProcessor())  # as in the demo: faster on a CPU
    return DDPOTrainer(config, rewards, PROMPTS, pipeline)


def sampling_and_waiting(trainer: DDPOTrainer) -> tuple[float, float]:
    """Seconds of a round."""
    with contextlib.redirect_stdout(io.StringIO()):  # Trainer prints its logs
        trainer.train()
    log = next(log for log in trainer.state.log_history if "reward" in log)
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
        with tempfile.TemporaryDirectory() as directory:
            trainer = make_trainer(rewards, arguments.batches, directory)
            for repeat in range(arguments.repeats + 1):
                Waiting.seconds = 0.0
                alone, _ = sampling_and_waiting(trainer)
                Waiting.seconds = alone / arguments.batches
                sampling, waiting = sampling_and_waiting(trainer)
                if repeat > 0:  # the first one warms up
                    ratios.append((sampling + waiting) / max(alone, Waiting.seconds * arguments.batches))
        print(
            f"{functions} reward function(s) that take as long as sampling: {statistics.median(ratios):.2f} of the "
            f"longer of the two alone (from {min(ratios):.2f} to {max(ratios):.2f}); one after the other would be "
            f"{1 + functions:.2f}"
        )


if __name__ == "__main__":
    main()
