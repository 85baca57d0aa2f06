"""Comparison of a resumed run with the one that wrote the checkpoint: differences are named, or refused."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ddpo_trl.artifacts.checkpoints import CONFIG_NAME, PLAN_NAME, RUN_NAME, read_json


CODE = "The code of"  # a function: how the names of their entries in `run.json` begin
ANOTHER_RUN = "from here on this is another run."

# Settings that change results only by rounding, with the results that are no longer bitwise identical.
ROUNDING = {
    "num_processes": "images, by the rounding of other batches, and the composition of mini-batches",
    "per_device_sample_batch_size": "images, by the rounding of other batches",
    "num_sample_batches": "the composition of mini-batches",
    "per_device_train_batch_size": "gradients, by the rounding of other batches and another order",
    "one_pass": "gradients, by the rounding of their sums",
    "samples_per_part": "images and gradients, by the rounding of other batches",
    "adapter_compute_dtype": "images and gradients, by the rounding of the adapter's products",
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing", "tf32"), "gradients, by rounding"),
    "torch_compile": "images and gradients, by the rounding of other kernels",
    **dict.fromkeys(("vae_slicing", "vae_tiling"), "images"),
    **dict.fromkeys(("metric_for_best_model", "greater_is_better"), "the best checkpoint, which is chosen again"),
}

# Settings of paths, speed, logging and saving, and those that follow from others.
HARMLESS = {
    "output_dir", "run_name", "project", "report_to", "disable_tqdm", "debug", "skip_memory_metrics", "local_rank",
    "resume_from_checkpoint", "resume_with_new_rewards", "restore_callback_states_from_checkpoint", "ignore_data_skip",
    "do_train", "do_eval", "do_predict", "load_best_model_at_end", "stop_on_signal", "enable_jit_checkpoint",
    "log_images_rounds", "num_logged_images", "use_cpu", "max_workers", "reward_timeout", "torch_empty_cache_steps",
    "gradient_accumulation_steps", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs",
    "torch_compile_backend", "torch_compile_mode", "accelerator_config", "parallelism_config", "deepspeed", "fsdp",
    "fsdp_config", "ddp_backend", "ddp_timeout", "full_determinism", "remove_unused_columns", "label_names",
    "use_cache", "prediction_loss_only", "per_device_eval_batch_size", "batch_eval_metrics", "data_seed",
}  # fmt: skip
HARMLESS_PREFIXES = (
    "logging_", "log_level", "log_on", "trackio_", "hub_", "push_to_hub", "dataloader_", "save_", "eval_", "include_",
    "offload_", "ddp_",
)  # fmt: skip

# Settings of the length of the run, which has no effect on the rounds with a constant learning rate.
LENGTH = {"num_train_epochs", "max_steps", "total_episodes"}

# Settings from which Trainer makes the optimizer, unless the user gives one.
OF_THE_OPTIMIZER = {
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args",
    "optim_target_modules",
}  # fmt: skip

# Settings that must not change, with the reason.
REFUSED = {
    "num_ppo_epochs": "rounds have another number of optimizer steps",
    "num_mini_batches": "rounds have another number of optimizer steps",
    "optim": "another optimizer can't use its state",
    "use_lora": "it has other weights",
}


class SavedRun(NamedTuple):
    """Run that wrote a checkpoint: its settings [`with_plan`], and the content of its `run.json`."""

    settings: dict[str, Any]
    run: dict[str, Any]


def read(checkpoint: str) -> SavedRun:
    """Read the description of the run that wrote a checkpoint."""
    settings, plan, run = (read_json(Path(checkpoint, name)) for name in (CONFIG_NAME, PLAN_NAME, RUN_NAME))
    return SavedRun(with_plan(settings, plan), run)


def with_plan(settings: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the config and what the batch plan adds to them; `one_pass` as it was decided."""
    stds = plan["stds"]
    added = {
        name: plan[name] for name in ("num_processes", "one_pass", "samples_per_part", "state_bytes") if name in plan
    }
    if stds:
        added["the sampler"] = f"{len(stds)} steps of σ {stds[0]:.6g} to {stds[-1]:.6g}, {sum(stds):.6g} in all"
    return {**settings, **added}


def setting_changes(
    saved: Mapping[str, Any], current: Mapping[str, Any], own_optimizer: bool = False
) -> Iterator[str]:
    """
    Yield a sentence per setting that differs from the run that wrote the checkpoint.

    Args:
        saved, current (`Mapping[str, Any]`):
            [`with_plan`] of both, as read from JSON. Settings that one of them lacks are not compared.
        own_optimizer (`bool`, *optional*, defaults to `False`):
            Whether the user gave the optimizer, so that the settings of Trainer's have no effect.

    Raises:
        `ValueError`: If the run can't be continued with them.
    """
    differing = {name: (value, saved[name]) for name, value in current.items() if saved.get(name, value) != value}
    if own_optimizer:
        differing = {name: values for name, values in differing.items() if name not in OF_THE_OPTIMIZER}
    for name, reason in REFUSED.items():
        if name in differing:
            value, before = differing[name]
            raise ValueError(
                f"{name} is {value!r}, but the checkpoint was written with {before!r}: {reason}. Set "
                f"{name}={before!r} to resume, or start another run from its weights "
                "(`pipeline.load_lora_weights(checkpoint)`)."
            )
    is_constant = saved.get("lr_scheduler_type") == current.get("lr_scheduler_type") == "constant"
    for name, (value, before) in differing.items():
        if name in HARMLESS or name.startswith(HARMLESS_PREFIXES) or (name in LENGTH and is_constant):
            continue
        effect = ANOTHER_RUN
        if name in ROUNDING:
            effect = f"no longer bitwise identical are {ROUNDING[name]}."
        elif name in LENGTH:
            effect = "the learning rate follows the schedule of this length."
        yield f"{name} is {value!r} and was {before!r}: {effect}"


def run_changes(saved: Mapping[str, Any], current: Mapping[str, Any], new_rewards: bool) -> Iterator[str]:
    """
    Yield a sentence per difference in `run.json`, as [`setting_changes`].

    Raises:
        `ValueError`: If the reward functions have changed without `new_rewards` (`resume_with_new_rewards`).
    """
    rewards, before = current["rewards"], saved["rewards"]
    if rewards.keys() != before.keys():
        change = f"reward_fn is {', '.join(rewards)}, but the checkpoint was written with {', '.join(before)}"
        if not new_rewards:
            raise ValueError(
                f"{change}: this is another run. Set another output_dir, or resume_with_new_rewards=True to continue "
                "this run with the new reward."
            )
        yield f"{change}: {ANOTHER_RUN}"
    elif rewards != before:
        yield f"The weights of the rewards are {rewards} and were {before}: {ANOTHER_RUN}"
    for name in ("prompts", "eval_prompts"):
        if current[name] != saved[name]:
            yield f"The {name} are {current[name]} and were {saved[name]}: {ANOTHER_RUN}"
    yield from _ingredient_changes(saved, current)


def _ingredient_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Iterator[str]:
    versions, saved_versions = current["versions"], saved.get("versions", current["versions"])
    for name, value in versions.items():
        if value != (before := saved_versions[name]):
            yield f"{name} is {value} and was {before}: no longer bitwise identical are images and gradients."
    for name, value in current["ingredients"].items():
        if name.startswith(CODE) and versions["python"] != saved_versions["python"]:
            continue  # each version has its own bytecode
        saved_value = saved["ingredients"].get(name, value)
        if saved_value != value:
            yield f"{name} is {value!r} and was {saved_value!r}: {ANOTHER_RUN}"


def find_best(state: TrainerState, checkpoint: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """
    Correct the best checkpoint of a resumed run: a folder next to the resumed one, even if both were moved; none if
    another metric decides now.
    """
    if any(saved[name] != current[name] for name in ("metric_for_best_model", "greater_is_better")):
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
    moved = os.path.join(os.path.dirname(checkpoint), f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
    if os.path.isdir(moved):
        state.best_model_checkpoint = moved
