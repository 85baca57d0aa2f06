"""DDPOConfig and DDPOTrainer with the arguments that they had in TRL 0.23: scripts of that time run as they are."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.tracking import GeneralTracker, filter_trackers
from accelerate.utils import ProjectConfiguration
from diffusers import DiffusionPipeline

from ddpo_trl import trainer
from ddpo_trl.artifacts import checkpoints
from ddpo_trl.config import DDPOConfig as OurConfig
from ddpo_trl.prompts import PromptFunction
from ddpo_trl.rewards.function import RewardFunction, reward_name
from ddpo_trl.rollout.records import Rollout
from ddpo_trl.trl_0_23.config import TRLConfig as DDPOConfig
from ddpo_trl.trl_0_23.config import convert_config


# [images, prompts, metadata, rewards, info of the reward function] of each batch of an epoch; the number of optimizer
# steps made; an accelerate tracker.
ImageSamplesHook = Callable[[list[list[Any]], int, GeneralTracker], Any]


def our_settings(config: DDPOConfig, use_lora: bool, with_hook: bool) -> OurConfig:
    """Convert the settings, except those of the trackers, which the trainer below starts as TRL did."""
    own: dict[str, Any] = {"use_lora": use_lora}
    if with_hook:
        own["log_images_rounds"] = 0  # wandb refuses the hook's steps once other images have been logged in between
    given = {name: value for name, value in config.given().items() if not name.startswith("tracker_")}
    project = {name: value for name, value in config.project_kwargs.items() if name != "logging_dir"}
    return convert_config(**{**given, "project_kwargs": project}, **own)


class DDPOTrainer(trainer.DDPOTrainer):
    """
    [`~ddpo_trl.DDPOTrainer`] behind TRL 0.23's arguments.

    ```python
    # from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
    from ddpo_trl.trl_0_23 import DDPOConfig, DDPOTrainer
    ```

    Args:
        config ([`~ddpo_trl.trl_0_23.config.TRLConfig`]):
            Settings under their old names. Those that have no counterpart give a warning.
        reward_function (`Callable`):
            Returns `(rewards, info)` for `(images, prompts, metadata)`.
        prompt_function (`Callable`):
            Returns `(prompt, metadata)`.
        sd_pipeline ([`~diffusers.DiffusionPipeline`]):
            A pipeline of diffusers, instead of TRL's `DefaultDDPOStableDiffusionPipeline`.
        image_samples_hook (`Callable`, *optional*):
            Called on the first process in every round, after scoring, with the batches as `[images, prompts, metadata,
            rewards, info]`, the number of optimizer steps made, and accelerate's tracker for `log_with`. It takes the
            place of our own sample images (`log_images_rounds`).
        use_lora (`bool`, *optional*, defaults to `True`):
            Whether to train a LoRA adapter. In TRL it was the pipeline's argument.

    Raises:
        `ValueError`: As [`~ddpo_trl.DDPOTrainer`] does, and for a hook without a tracker.
    """

    def __init__(
        self,
        config: DDPOConfig,
        reward_function: RewardFunction,
        prompt_function: PromptFunction,
        sd_pipeline: DiffusionPipeline,
        image_samples_hook: ImageSamplesHook | None = None,
        *,
        use_lora: bool = True,
    ):
        self.image_samples_hook = image_samples_hook
        self._scored: list[list[Any]] = []  # what the reward function was called with since the last round, and said
        if image_samples_hook is not None:
            if config.log_with is None:
                raise ValueError(
                    "image_samples_hook is given with log_with=None, but a tracker is what it is called with. Set "
                    "log_with to 'wandb' or 'tensorboard', or leave the hook out."
                )
            reward_function = self._recording(reward_function)
        settings = our_settings(config, use_lora, with_hook=image_samples_hook is not None)
        super().__init__(settings, reward_function, prompt_function, sd_pipeline)
        if config.log_with is not None:
            self._start_trackers(config)

    def train(self, epochs: int | None = None) -> Any:  # type: ignore[override]
        """
        Train, from the checkpoint in `config.resume_from` if it is set.

        Args:
            epochs (`int`, *optional*):
                Number of rounds in total, `config.num_epochs` by default.
        """
        if epochs is not None:
            self.args.num_train_epochs = epochs
        resume = self.args.resume_from_checkpoint
        return super().train(resume and (checkpoints.last_checkpoint(resume) or resume))

    def _recording(self, reward_function: RewardFunction) -> RewardFunction:
        """Return the function, recording its arguments and results for the hook."""

        def recorded(images: torch.Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Any:
            rewards, info = reward_function(images.clone(), prompts, metadata)
            self._scored.append([images, prompts, metadata, torch.as_tensor(rewards), info])
            return rewards, info

        recorded.__name__ = reward_name(reward_function)
        return recorded

    def _start_trackers(self, config: DDPOConfig) -> None:
        """Start accelerate's trackers, as TRL did. Trainer's own callback for wandb continues the open run."""
        project = {"project_dir": self.args.output_dir, **config.project_kwargs}
        self.accelerator.project_configuration = ProjectConfiguration(**project)
        self.accelerator.log_with = filter_trackers(config.log_with, self.accelerator.logging_dir)
        self.accelerator.init_trackers(config.tracker_project_name, init_kwargs=config.tracker_kwargs)

    def _start_updates(self, rollout: Rollout) -> None:
        super()._start_updates(rollout)
        # Including calls at construction and those of an evaluation.
        scored = {id(row[1]): row for row in self._scored}  # by the very prompts, since images are on the CPU by now
        self._scored.clear()
        if self.image_samples_hook is not None and self.is_world_process_zero():
            image_data = [scored[id(batch.context.prompts)] for batch in rollout.batches]
            self.image_samples_hook(image_data, self.state.global_step, self.accelerator.trackers[0])
