"""The batch plan: all arithmetic of a round in one place, printed at the start of a run and in its errors."""

import math
from dataclasses import dataclass

from ddpo_trl.config import DDPOConfig


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """
    How many samples, micro-batches and optimizer steps a round has.

    Args:
        num_processes (`int`):
            Processes of the run.
        per_device_sample_batch_size, num_sample_batches (`int`):
            Samples drawn at once, and how often, on each process.
        num_images_per_prompt (`int`):
            Samples of a round that share a drawn prompt.
        per_device_train_batch_size (`int`):
            Samples of a micro-batch.
        num_mini_batches, num_ppo_epochs (`int`):
            Optimizer steps in a pass over the rollout, and passes.
        recorded_steps (`tuple[int, ...]`):
            Indices of the denoising steps that may be trained on.
        timestep_fraction (`float`):
            Share of them that each sample is trained on.

    Raises:
        `ValueError`: If the sizes do not divide. The message holds the whole plan.
    """

    num_processes: int
    per_device_sample_batch_size: int
    num_sample_batches: int
    num_images_per_prompt: int
    per_device_train_batch_size: int
    num_mini_batches: int
    num_ppo_epochs: int
    recorded_steps: tuple[int, ...]
    timestep_fraction: float

    def __post_init__(self):
        unit = self.num_mini_batches * self.per_device_train_batch_size
        if self.samples_per_process % unit:
            raise ValueError(
                f"A process samples {self.samples_per_process} images a round (per_device_sample_batch_size x "
                f"num_sample_batches), which don't divide into num_mini_batches x per_device_train_batch_size = "
                f"{unit}. Change one of the four so that they do.\n{self}"
            )
        if self.samples_per_round % self.num_images_per_prompt:
            raise ValueError(
                f"A round has {self.samples_per_round} images, which don't divide into groups of "
                f"num_images_per_prompt = {self.num_images_per_prompt}. Change it so that they do.\n{self}"
            )

    @property
    def samples_per_process(self) -> int:
        """Samples of a round on one process."""
        return self.per_device_sample_batch_size * self.num_sample_batches

    @property
    def samples_per_round(self) -> int:
        """Samples (= reward queries) of a round over all processes."""
        return self.samples_per_process * self.num_processes

    @property
    def prompts_per_round(self) -> int:
        """Prompts drawn for a round."""
        return self.samples_per_round // self.num_images_per_prompt

    @property
    def transitions_per_sample(self) -> int:
        """Transitions of a sample that are trained on in a pass."""
        return max(1, round(len(self.recorded_steps) * self.timestep_fraction))

    @property
    def samples_per_mini_batch(self) -> int:
        """Samples of an optimizer step on one process."""
        return self.samples_per_process // self.num_mini_batches

    @property
    def micro_batches_per_update(self) -> int:
        """Micro-batches that accumulate into one optimizer step: the derived `gradient_accumulation_steps`."""
        return self.samples_per_mini_batch // self.per_device_train_batch_size * self.transitions_per_sample

    @property
    def updates_per_round(self) -> int:
        """Optimizer steps of a round."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def micro_batches_per_round(self) -> int:
        """Micro-batches of a round on one process: the length of the loader."""
        return self.updates_per_round * self.micro_batches_per_update

    def rounds_for(self, total_episodes: int) -> int:
        """Rounds that hold at least `total_episodes` reward queries."""
        return math.ceil(total_episodes / self.samples_per_round)

    def rows(self) -> list[tuple[str, str]]:
        """The plan as `(what, how)` lines."""
        return [
            (
                "reward queries a round",
                f"{self.samples_per_round} = {self.num_processes} processes x {self.num_sample_batches} batches x "
                f"{self.per_device_sample_batch_size} images",
            ),
            (
                "prompts a round",
                f"{self.samples_per_round / self.num_images_per_prompt:g} x {self.num_images_per_prompt} images each",
            ),
            (
                "transitions trained",
                f"{self.transitions_per_sample} a sample, of {len(self.recorded_steps)} recorded (steps "
                f"{self.recorded_steps[0]} to {self.recorded_steps[-1]})",
            ),
            (
                "optimizer steps a round",
                f"{self.updates_per_round} = {self.num_ppo_epochs} passes x {self.num_mini_batches} mini-batches",
            ),
            (
                "samples an optimizer step",
                f"{self.samples_per_process / self.num_mini_batches * self.num_processes:g}, in micro-batches of "
                f"{self.per_device_train_batch_size} on each process",
            ),
            (
                "micro-batches an optimizer step",
                f"{self.micro_batches_per_update} (the derived gradient_accumulation_steps)",
            ),
        ]

    def __str__(self) -> str:
        return "\n".join(f"  {what:<32} {how}" for what, how in self.rows())


def plan_batches(config: DDPOConfig, stds: list[float]) -> BatchPlan:
    """
    The plan of a run.

    Args:
        config ([`DDPOConfig`]):
            Its settings.
        stds (`list[float]`):
            σ_t of each step of the sampler, from noise to image. Steps with σ_t = 0 are deterministic and never
            trained on.

    Raises:
        `ValueError`: If no step can be trained on, or the sizes do not divide.
    """
    first, last = (round(bound * len(stds)) for bound in config.train_timestep_range)
    recorded_steps = tuple(index for index in range(first, last) if stds[index] > 0)
    if not recorded_steps:
        raise ValueError(
            f"train_timestep_range is {config.train_timestep_range}, which holds no stochastic step of the "
            f"{len(stds)} denoising steps. Widen it or raise num_inference_steps."
        )
    return BatchPlan(
        num_processes=config.world_size,
        per_device_sample_batch_size=config.per_device_sample_batch_size,
        num_sample_batches=config.num_sample_batches,
        num_images_per_prompt=config.num_images_per_prompt,
        per_device_train_batch_size=config.per_device_train_batch_size,
        num_mini_batches=config.num_mini_batches,
        num_ppo_epochs=config.num_ppo_epochs,
        recorded_steps=recorded_steps,
        timestep_fraction=config.timestep_fraction,
    )
