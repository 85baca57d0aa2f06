"""Progress bars with the running reward, and the time spent in training."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ddpo_trl.transfers import wait_for


class RoundProgress(TrainerCallback):
    """
    Progress bars: images of the round sampled, micro-batches of the run trained on, images of an evaluation. A line
    per round stays.

    It replaces Trainer's own progress bar. The rollout loader drives the sampling bar, because Trainer has no event
    for sampling, and the evaluator that of an evaluation.
    """

    def __init__(self, disable: bool):
        self.disable = disable
        self._sampling: tqdm | None = None
        self._training: tqdm | None = None

    def sampling_begins(self, round: int, samples: int) -> None:
        """Show that `samples` images of a round are going to be sampled on this process."""
        if self._sampling is None:
            self._sampling = tqdm(total=samples, unit="image", position=1, leave=False, disable=self.disable)
        self._sampling.reset(samples)
        self._sampling.set_description(f"Sampling, round {round + 1}")

    def sampled(self, samples: int, rewards: Sequence[Tensor]) -> None:
        """Show `samples` more images; `rewards` are those of the whole round that are known by now."""
        if self._sampling is None:
            return
        if rewards:
            self._sampling.set_postfix(reward=f"{torch.cat(list(rewards)).nanmean():.4g}", refresh=False)
        self._sampling.update(samples)

    def evaluation(self, images: int) -> tqdm:
        """Return a bar, to be used as a context, for an evaluation of `images` images on this process."""
        return tqdm(total=images, unit="image", desc="Evaluation", leave=False, disable=self.disable)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training = tqdm(
            total=state.max_steps * args.gradient_accumulation_steps,
            initial=state.global_step * args.gradient_accumulation_steps,
            unit="micro-batch",
            desc="Training",
            position=0,
            disable=self.disable,
        )

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._training is not None:
            self._training.update()

    # The last micro-batch of an optimizer step ends a step, not a substep.
    on_step_end = on_substep_end

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._training is None or logs is None or "reward" not in logs:
            return
        reward = f"{logs['reward']:.4g} ± {logs['reward_std']:.2g}"
        self._training.set_postfix(reward=reward)
        if not self.disable:
            self._training.write(
                f"round {logs['epoch']:>4.0f}   {logs['episode']:>7.0f} reward queries   reward {reward}"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for bar in (self._sampling, self._training):
            if bar is not None:
                bar.close()
        self._sampling = self._training = None


class TrainingClock(TrainerCallback):
    """
    Clock of the time that rounds spend in training on `device`, without sampling, evaluation and saving.

    Attributes:
        first_step (`int`):
            Optimizer steps before this call of `train`: those of the checkpoint if the run was resumed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.first_step = 0
        self._since: float | None = None
        self._seconds = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.first_step = state.global_step

    def start(self) -> None:
        """Start the clock when the images of a round are scored."""
        self._since = time.perf_counter()

    def take(self) -> float:
        """Return the seconds since the last call."""
        self._count()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._count()
        self._since = None

    def _count(self) -> None:
        if self._since is not None:
            wait_for(self._device)
            now = time.perf_counter()
            self._seconds += now - self._since
            self._since = now
