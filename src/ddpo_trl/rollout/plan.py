"""The batch plan: all arithmetic of a round in one place, printed at the start of a run and in its errors."""

import math
from dataclasses import dataclass

import torch

from ddpo_trl.config import DDPOConfig, TransitionWeighting, WindowStrategy
from ddpo_trl.policy.embedding_cache import MAX_CACHED_BYTES
from ddpo_trl.rollout.forecast import MemoryForecast
from ddpo_trl.seeding import Stream, generator


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """
    Number of samples, micro-batches and optimizer steps of a round.

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
        trainable_steps (`tuple[int, ...]`):
            Indices of the denoising steps that may be trained on.
        window_size (`int`, *optional*):
            Number of them, in a row, that get noise and are trained on in a round: the SDE window. `None` for all,
            and noise in every step.
        window_strategy (`"fixed"`, `"progressive"` or `"random"`):
            Position of the window: at the first of them; moving on by one every `window_interval` rounds, and from the
            last position back to the first; or anywhere, drawn again in each round.
        window_interval (`int`):
            Rounds between two moves of a progressive window.
        timestep_fraction (`float`):
            Share of them that each sample is trained on.
        stds (`tuple[float, ...]`):
            σ_t of every step of the sampler; the weights of `"std"`.
        transition_weighting (`"uniform"` or `"std"`):
            Whether all transitions have the same weight in the objective, or one in proportion to σ_t.
        state_bytes (`int`):
            Memory of one sample's state x_t.
        one_pass (`bool`):
            Whether gradients are taken while sampling.
        one_pass_disabled_reason (`str`, *optional*):
            Reason for two passes.
        samples_per_part (`int`, *optional*):
            In one pass, the number of samples that are sampled together at most, where memory does not hold the
            activations of a whole batch.
        gradient_bytes (`int`):
            Memory of one sample's gradient.
        image_bytes, embedding_bytes (`int`):
            Memory of one sample's image, and of what its prompts are encoded to.
        offload_rollout, gradient_checkpointing (`bool`):
            Whether the rollout is kept in CPU memory, and the settings of activation checkpointing.
        forecast ([`~ddpo_trl.rollout.forecast.MemoryForecast`] or `str`, *optional*):
            Forecast of GPU memory, or the reason why there is none; `None` on the CPU.

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
    trainable_steps: tuple[int, ...]
    window_size: int | None = None
    window_strategy: WindowStrategy = "fixed"
    window_interval: int = 25
    timestep_fraction: float
    stds: tuple[float, ...] = ()
    transition_weighting: TransitionWeighting = "uniform"
    state_bytes: int = 0
    one_pass: bool = False
    one_pass_disabled_reason: str | None = None
    samples_per_part: int | None = None
    gradient_bytes: int = 0
    image_bytes: int = 0
    embedding_bytes: int = 0
    offload_rollout: bool = False
    gradient_checkpointing: bool = False
    forecast: MemoryForecast | str | None = None

    def __post_init__(self):
        unit = self.num_mini_batches * self.per_device_train_batch_size
        if self.samples_per_process % unit:
            raise ValueError(
                f"A process samples {self.samples_per_process} images per round (per_device_sample_batch_size x "
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
        steps = self.window_size or len(self.trainable_steps)
        return max(1, round(steps * self.timestep_fraction))

    def weights(self, round: int, seed: int) -> dict[int, float]:
        """Return the weight in the objective of each step that a round trains on, see [`BatchPlan.weight`]."""
        return {step: self.weight(step) for step in self.trained_steps(round, seed)}

    def weight(self, step: int) -> float:
        """Weight of a transition in the objective; 1 on average over the steps that may be trained on."""
        if self.transition_weighting == "uniform":
            return 1.0
        return self.stds[step] * len(self.trainable_steps) / sum(self.stds[index] for index in self.trainable_steps)

    def noisy_steps(self, round: int, seed: int) -> tuple[int, ...] | None:
        """Indices of the denoising steps that get noise in a round; `None` for all of them, without a window."""
        return None if self.window_size is None else self.trained_steps(round, seed)

    def trained_steps(self, round: int, seed: int) -> tuple[int, ...]:
        """
        Indices of the denoising steps that round `round` of a run with seed `seed` may train on, on every process.

        A window as in https://huggingface.co/papers/2507.21802: its steps get noise, the others are deterministic.
        """
        if self.window_size is None:
            return self.trainable_steps
        positions = len(self.trainable_steps) - self.window_size + 1
        match self.window_strategy:
            case "fixed":
                first = 0
            case "progressive":
                first = round // self.window_interval % positions
            case "random":
                first = int(torch.randint(positions, (), generator=generator(seed, Stream.WINDOW, round)))
        return self.trainable_steps[first : first + self.window_size]

    @property
    def samples_per_mini_batch(self) -> int:
        """Samples of an optimizer step on one process."""
        return self.samples_per_process // self.num_mini_batches

    @property
    def micro_batches_per_update(self) -> int:
        """
        Micro-batches that accumulate into one optimizer step: the derived `gradient_accumulation_steps`. In one pass
        the whole round counts as one.
        """
        if self.one_pass:
            return 1
        return self.samples_per_mini_batch // self.per_device_train_batch_size * self.transitions_per_sample

    @property
    def updates_per_round(self) -> int:
        """Optimizer steps of a round."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def micro_batches_per_round(self) -> int:
        """Micro-batches of a round on one process: the length of the loader."""
        return self.updates_per_round * self.micro_batches_per_update

    @property
    def rollout_bytes(self) -> int:
        """
        Memory of a round on one process: of its gradients in one pass, else of its recorded states: those of the steps
        trained on, and one more.
        """
        if self.one_pass:
            return self.samples_per_process * self.gradient_bytes
        steps = self.window_size or len(self.trainable_steps)
        return self.samples_per_process * (steps + 1) * self.state_bytes

    @property
    def images_bytes(self) -> int:
        """CPU memory of a round's images on one process."""
        return self.samples_per_process * self.image_bytes

    @property
    def embeddings_bytes(self) -> int:
        """CPU memory, at most, of what the prompts of a round are encoded to on one process."""
        prompts = min(self.samples_per_process, self.prompts_per_round)
        return min(prompts * self.embedding_bytes, MAX_CACHED_BYTES)

    @property
    def forecast_peaks(self) -> dict[str, int]:
        """
        Forecast of the most bytes that live on the GPU in each part of a round, without reward functions and CUDA
        itself; empty if there is no forecast.
        """
        if not isinstance(self.forecast, MemoryForecast):
            return {}
        kept = self.per_device_sample_batch_size * self.image_bytes + (
            0 if self.offload_rollout else self.rollout_bytes
        )
        trained = None if self.one_pass else self.per_device_train_batch_size
        return self.forecast.peaks(self.per_device_sample_batch_size, trained, self.gradient_checkpointing, kept)

    def _rows_of_forecast(self) -> list[tuple[str, str]]:
        if self.forecast is None:
            return []
        if isinstance(self.forecast, str):
            return [("forecast of GPU memory", f"none: {self.forecast}")]
        peaks = ", ".join(f"{name} {size / 2**30:.3g} GiB" for name, size in self.forecast_peaks.items() if size)
        return [("forecast of GPU memory", f"{peaks}; without reward functions and CUDA itself")]

    def rounds_for(self, total_episodes: int) -> int:
        """Rounds that hold at least `total_episodes` reward queries."""
        return math.ceil(total_episodes / self.samples_per_round)

    def rows(self) -> list[tuple[str, str]]:
        """Return the plan as `(name, description)` lines."""
        return [
            (
                "reward queries per round",
                f"{self.samples_per_round} = {self.num_processes} processes x {self.num_sample_batches} batches x "
                f"{self.per_device_sample_batch_size} images",
            ),
            (
                "prompts per round",
                f"{self.samples_per_round / self.num_images_per_prompt:g} x {self.num_images_per_prompt} images each",
            ),
            (
                "transitions trained",
                f"{self.transitions_per_sample} per sample, of {len(self.trainable_steps)} that may be (steps "
                f"{self.trainable_steps[0]} to {self.trainable_steps[-1]})",
            ),
            ("weights of the transitions", self._weights_in_words),
            (
                "steps with noise",
                "all" if self.window_size is None else f"{self.window_size} in a row, {self.window_strategy}",
            ),
            (
                "optimizer steps per round",
                f"{self.updates_per_round} = {self.num_ppo_epochs} passes x {self.num_mini_batches} mini-batches",
            ),
            (
                "samples per optimizer step",
                f"{self.samples_per_process / self.num_mini_batches * self.num_processes:g}, in micro-batches of "
                f"{self._samples_at_once} on each process",
            ),
            *self._rows_of_passes(),
            (
                "CPU memory of images, prompts",
                f"{self.images_bytes / 2**20:.3g} MiB and up to {self.embeddings_bytes / 2**20:.3g} MiB of embeddings",
            ),
            *self._rows_of_forecast(),
        ]

    @property
    def _samples_at_once(self) -> int:
        """Number of samples per backward pass."""
        if self.one_pass:
            return self.samples_per_part or self.per_device_sample_batch_size
        return self.per_device_train_batch_size

    def _rows_of_passes(self) -> list[tuple[str, str]]:
        memory = f"{self.rollout_bytes / 2**20:.3g} MiB on each process"
        if self.one_pass:
            each = f"{self.samples_per_process} x {self.gradient_bytes / 2**20:.3g} MiB"
            parts = f", in parts of {self.samples_per_part} samples" if self.samples_per_part else ""
            return [
                ("passes", f"one: gradients are taken while sampling{parts}"),
                ("memory of the samples' gradients", f"{memory} = {each}"),
            ]
        because = f", because {self.one_pass_disabled_reason}" if self.one_pass_disabled_reason else ""
        return [
            ("passes", f"two: sampling and training{because}"),
            (
                "micro-batches per optimizer step",
                f"{self.micro_batches_per_update} (the derived gradient_accumulation_steps)",
            ),
            ("memory of the recorded steps", memory),
        ]

    @property
    def _weights_in_words(self) -> str:
        if self.transition_weighting == "uniform":
            return "all equal"
        first, last = (self.weight(step) for step in (self.trainable_steps[0], self.trainable_steps[-1]))
        return f"by σ, {first:.3g} for the first to {last:.3g} for the last"

    def __str__(self) -> str:
        return "\n".join(f"  {name:<32} {description}" for name, description in self.rows())

    def __repr__(self) -> str:
        return f"Batch plan\n{self}"


def plan_batches(config: DDPOConfig, stds: list[float], state_bytes: int = 0, embedding_bytes: int = 0) -> BatchPlan:
    """
    Make the plan of a run.

    Args:
        config ([`DDPOConfig`]):
            Settings.
        stds (`list[float]`):
            σ_t of each step of the sampler, from noise to image. Steps with σ_t = 0 are deterministic and never
            trained on.
        state_bytes, embedding_bytes (`int`, *optional*, default to `0`):
            Memory of one sample's state x_t, and of the embeddings of its prompts.

    Raises:
        `ValueError`: If no step can be trained on, or the sizes do not divide.
    """
    trainable_steps = tuple(index for index in config.steps_in_range(len(stds)) if stds[index] > 0)
    if not trainable_steps:
        raise ValueError(
            f"train_timestep_range is {config.train_timestep_range}, which holds no stochastic step of the "
            f"{len(stds)} denoising steps. Widen it or raise num_inference_steps."
        )
    if config.sde_window_size is not None and config.sde_window_size > len(trainable_steps):
        raise ValueError(
            f"sde_window_size is {config.sde_window_size}, more than the {len(trainable_steps)} stochastic steps in "
            f"train_timestep_range={config.train_timestep_range}. Lower it, or raise num_inference_steps."
        )
    assert config.num_mini_batches is not None, "DDPOConfig sets it"
    return BatchPlan(
        num_processes=config.world_size,
        per_device_sample_batch_size=config.per_device_sample_batch_size,
        num_sample_batches=config.num_sample_batches,
        num_images_per_prompt=config.num_images_per_prompt,
        per_device_train_batch_size=config.per_device_train_batch_size,
        num_mini_batches=config.num_mini_batches,
        num_ppo_epochs=config.num_ppo_epochs,
        trainable_steps=trainable_steps,
        window_size=config.sde_window_size,
        window_strategy=config.sde_window_strategy,
        window_interval=config.sde_window_interval,
        timestep_fraction=config.timestep_fraction,
        stds=tuple(stds),
        transition_weighting=config.transition_weighting,
        state_bytes=state_bytes,
        embedding_bytes=embedding_bytes,
        offload_rollout=config.offload_rollout,
        gradient_checkpointing=config.gradient_checkpointing,
    )
