"""The settings of TRL 0.23's DDPOConfig, and their conversion to ours."""

import dataclasses
import difflib
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import is_torch_tf32_available

from ddpo_trl.config import DDPOConfig


MIXED_PRECISION: dict[str, dict[str, bool]] = {"no": {}, "fp16": {"fp16": True}, "bf16": {"bf16": True}}

# Names that nothing corresponds to, and what to do instead.
NO_COUNTERPART = {
    "exp_name": "TRL never read it either; run_name names a run",
    "logdir": "TRL never read it either; everything goes to output_dir",
    "accelerator_kwargs": "use `accelerate launch` with a config file, or accelerator_config",
    "tracker_kwargs": "set the tracker's environment variables, such as WANDB_ENTITY",
}


@dataclass
class TRLConfig:
    """
    TRL 0.23's `DDPOConfig`: the same names and defaults, for [`~transformers.HfArgumentParser`] and for scripts that
    set its attributes. `docs/migration.md` lists the counterpart of each.

    Args:
        output_dir (`str`, *optional*):
            The one field that TRL's did not have, though its example script read it. By default the `project_dir` in
            `project_kwargs`, or else `"trainer_output"`.
    """

    output_dir: str | None = None
    exp_name: str = ""
    run_name: str = ""
    seed: int = 0
    log_with: str | None = None
    tracker_kwargs: dict = field(default_factory=dict)
    accelerator_kwargs: dict = field(default_factory=dict)
    project_kwargs: dict = field(default_factory=dict)
    tracker_project_name: str = "trl"
    logdir: str = "logs"
    num_epochs: int = 100
    save_freq: int = 1
    num_checkpoint_limit: int = 5
    mixed_precision: str = "fp16"
    allow_tf32: bool = True
    resume_from: str = ""
    sample_num_steps: int = 50
    sample_eta: float = 1.0
    sample_guidance_scale: float = 5.0
    sample_batch_size: int = 1
    sample_num_batches_per_epoch: int = 2
    train_batch_size: int = 1
    train_use_8bit_adam: bool = False
    train_learning_rate: float = 3e-4
    train_adam_beta1: float = 0.9
    train_adam_beta2: float = 0.999
    train_adam_weight_decay: float = 1e-4
    train_adam_epsilon: float = 1e-8
    train_gradient_accumulation_steps: int = 1
    train_max_grad_norm: float = 1.0
    train_num_inner_epochs: int = 1
    train_cfg: bool = True
    train_adv_clip_max: float = 5.0
    train_clip_range: float = 1e-4
    train_timestep_fraction: float = 1.0
    per_prompt_stat_tracking: bool = False
    per_prompt_stat_tracking_buffer_size: int = 16
    per_prompt_stat_tracking_min_count: int = 16
    async_reward_computation: bool = False
    max_workers: int = 2
    negative_prompts: str = ""
    push_to_hub: bool = False

    def given(self) -> dict[str, Any]:
        """Return the fields whose value is not TRL's default."""
        default = TRLConfig()
        return {name: value for name, value in vars(self).items() if value != vars(default)[name]}


NAMES = frozenset(field.name for field in dataclasses.fields(TRLConfig)) - {"output_dir"}


def convert_config(**old: Any) -> DDPOConfig:
    """
    Convert the settings of TRL 0.23's `DDPOConfig(**old)` to ours.

    TRL's names have TRL's meanings, and TRL's defaults where they are left out: among them fp16, one image at a time
    and seed 0. `docs/migration.md` has all of them. A name that has no counterpart gives a warning.

    Args:
        old:
            Fields of TRL's config, and of ours that TRL's did not have (`output_dir`, `use_lora`, ...). The latter
            win where they mean the same.

    Returns:
        [`DDPOConfig`]

    Raises:
        `ValueError`: For names that are neither, and for values that TRL refused as well.

    Example:

    ```python
    from ddpo_trl.trl_0_23 import convert_config

    config = convert_config(
        sample_batch_size=6, sample_num_batches_per_epoch=4, train_batch_size=3, mixed_precision="no"
    )
    assert config.num_mini_batches == 8  # 24 images per round, an optimizer step for every 3
    ```
    """
    check_names(old, [field.name for field in dataclasses.fields(DDPOConfig)])
    theirs = {name: value for name, value in old.items() if name in NAMES}
    ours = {name: value for name, value in old.items() if name not in NAMES}
    for name, remedy in without_counterpart(theirs):
        warnings.warn(f"TRL's {name} has no counterpart: {remedy}.", stacklevel=2)
    return DDPOConfig(**{**converted(TRLConfig(**theirs)), **ours})


def check_names(names: Collection[str], ours: Collection[str]) -> None:
    """Raise a `ValueError` for the first name that is neither TRL's nor among `ours`, with the most similar name."""
    for name in names:
        if name in NAMES or name in ours:
            continue
        near = difflib.get_close_matches(name, NAMES, 1) or difflib.get_close_matches(name, ours, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"{name} is a field neither of TRL's DDPOConfig nor of ours.{hint}")


def converted(old: TRLConfig) -> dict[str, Any]:
    """
    Return the keyword arguments of our `DDPOConfig` that do what TRL's did.

    Raises:
        `ValueError`: If `mixed_precision` is unknown, or the batch sizes do not divide, which TRL refused as well.
    """
    if old.mixed_precision not in MIXED_PRECISION:
        raise ValueError(f"mixed_precision is {old.mixed_precision!r}; give one of {', '.join(MIXED_PRECISION)}.")
    arguments = {
        "run_name": old.run_name or None,
        "seed": old.seed,
        "report_to": old.log_with or "none",
        "project": old.tracker_project_name,
        "num_train_epochs": old.num_epochs,
        # TRL saved after the epochs save_freq, 2 save_freq, ..., counted from 0.
        "save_strategy": "no" if old.save_freq >= old.num_epochs else "epoch",
        "save_rounds": 1 if old.save_freq >= old.num_epochs else old.save_freq,
        "save_total_limit": old.project_kwargs.get("total_limit", old.num_checkpoint_limit),
        "tf32": old.allow_tf32 and is_torch_tf32_available(),
        "resume_from_checkpoint": old.resume_from or None,
        "num_inference_steps": old.sample_num_steps,
        "eta": old.sample_eta,
        "guidance_scale": old.sample_guidance_scale,
        "per_device_sample_batch_size": old.sample_batch_size,
        "num_sample_batches": old.sample_num_batches_per_epoch,
        "per_device_train_batch_size": old.train_batch_size,
        "num_mini_batches": updates_per_inner_epoch(old),
        "num_ppo_epochs": old.train_num_inner_epochs,
        "learning_rate": old.train_learning_rate,
        "adam_beta1": old.train_adam_beta1,
        "adam_beta2": old.train_adam_beta2,
        "weight_decay": old.train_adam_weight_decay,
        "adam_epsilon": old.train_adam_epsilon,
        "max_grad_norm": old.train_max_grad_norm,
        "advantage_clip": old.train_adv_clip_max,
        "cliprange": old.train_clip_range,
        "timestep_fraction": whole_steps(old.train_timestep_fraction, old.sample_num_steps),
        "max_workers": old.max_workers if old.async_reward_computation else 1,  # one call at a time, as in TRL
        "push_to_hub": old.push_to_hub,
        **MIXED_PRECISION[old.mixed_precision],
    }
    if output_dir := old.output_dir or old.project_kwargs.get("project_dir"):
        arguments["output_dir"] = output_dir
    if old.train_use_8bit_adam:
        arguments["optim"] = "adamw_bnb_8bit"
    arguments["advantage_normalization"] = "prompt" if old.per_prompt_stat_tracking else "batch"
    if old.per_prompt_stat_tracking:
        arguments["per_prompt_stat_tracking_buffer_size"] = old.per_prompt_stat_tracking_buffer_size
        arguments["per_prompt_stat_tracking_min_count"] = old.per_prompt_stat_tracking_min_count
    if old.negative_prompts:
        arguments["pipeline_kwargs"] = {"negative_prompt": old.negative_prompts}
    return arguments


def updates_per_inner_epoch(old: TRLConfig) -> int:
    """
    Return the number of optimizer steps of one pass over the samples of an epoch.

    TRL accumulated gradients over `train_gradient_accumulation_steps` micro-batches times all trained timesteps, so it
    made one step for every `train_batch_size` · `train_gradient_accumulation_steps` samples of a process.
    """
    samples = old.sample_batch_size * old.sample_num_batches_per_epoch
    samples_per_update = old.train_batch_size * old.train_gradient_accumulation_steps
    if samples % samples_per_update:
        raise ValueError(
            f"sample_batch_size x sample_num_batches_per_epoch = {samples} samples don't divide into train_batch_size "
            f"x train_gradient_accumulation_steps = {samples_per_update}, as TRL asked for. Change one of the four."
        )
    return samples // samples_per_update


def whole_steps(fraction: float, steps: int) -> float:
    """
    Return the fraction that trains on as many timesteps as TRL, which rounded down where we round to the nearest.
    """
    return int(steps * fraction) / steps or fraction


def without_counterpart(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the given names whose value has no effect here, each with a remedy."""
    old = TRLConfig(**given)
    for name, remedy in NO_COUNTERPART.items():
        if name in given:
            yield name, remedy
    if "tracker_project_name" in given and old.log_with == "wandb":
        yield "tracker_project_name", "set the environment variable WANDB_PROJECT"
    if not old.train_cfg and old.sample_guidance_scale > 1:
        yield "train_cfg", "guidance is the same in training as in sampling; otherwise another policy would be trained"
    if "logging_dir" in old.project_kwargs:
        yield "project_kwargs['logging_dir']", "set the environment variable TENSORBOARD_LOGGING_DIR"
