"""Is it the run that wrote the checkpoint? What differs is named, what can't be continued is refused."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerState

from ddpo_trl.artifacts.checkpoints import CONFIG_NAME, PLAN_NAME, moved_best, read_json


RUN_NAME = "run.json"  # what the settings don't tell: rewards, prompts, the optimizer

# Settings that change a result by rounding only, with what then is no longer bitwise identical.
ROUNDING = {
    "num_processes": "images, by the rounding of other batches, and the composition of mini-batches",
    "per_device_sample_batch_size": "images, by the rounding of other batches",
    "num_sample_batches": "the composition of mini-batches",
    "per_device_train_batch_size": "gradients, by the rounding of other batches and another order",
    "one_pass": "gradients, by the rounding of their sums",
    **dict.fromkeys(
        ("gradient_checkpointing", "activation_checkpointing", "torch_compile", "tf32"), "gradients, by rounding"
    ),
    **dict.fromkeys(("vae_slicing", "vae_tiling"), "images"),
    **dict.fromkeys(("metric_for_best_model", "greater_is_better"), "the best checkpoint, which is chosen again"),
}

# Settings that say where something goes, how fast it is made, when it is shown or saved, or that follow from others.
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

# Settings of the run's length. With a constant learning rate what was trained does not depend on them.
LENGTH = {"num_train_epochs", "max_steps", "total_episodes"}

# Settings from which Trainer makes the optimizer, if it is not given one.
OF_THE_OPTIMIZER = {
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args",
    "optim_target_modules",
}  # fmt: skip

# What can't be continued, and why.
REFUSED = {
    "num_ppo_epochs": "its number of optimizer steps says nothing about this run's rounds",
    "num_mini_batches": "its number of optimizer steps says nothing about this run's rounds",
    "optim": "another optimizer can't go on with its state",
    "use_lora": "it holds other weights",
}


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """
    The run that wrote a checkpoint.

    Args:
        settings (`dict[str, Any]`):
            See [`with_plan`].
        run (`dict[str, Any]`, *optional*):
            What its `run.json` holds; `None` if an earlier version of this package wrote it.
    """

    settings: dict[str, Any]
    run: dict[str, Any] | None


def read(checkpoint: str) -> SavedRun:
    """Reads what a checkpoint says of its run."""
    config, plan, run = (Path(checkpoint, name) for name in (CONFIG_NAME, PLAN_NAME, RUN_NAME))
    settings = read_json(config) if config.is_file() else {}
    return SavedRun(
        settings=with_plan(settings, read_json(plan)),
        run=read_json(run) if run.is_file() else None,
    )


def with_plan(settings: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the config, and what the batch plan adds to them; `one_pass` as it was decided."""
    stds = plan.get("stds", [])
    added = {name: plan[name] for name in ("num_processes", "one_pass", "state_bytes") if name in plan}
    if stds:
        added["the sampler"] = f"{len(stds)} steps of σ {stds[0]:.6g} to {stds[-1]:.6g}, {sum(stds):.6g} in all"
    return {**settings, **added}


def setting_changes(
    saved: Mapping[str, Any], current: Mapping[str, Any], own_optimizer: bool = False
) -> Iterator[str]:
    """
    What a resumed run does otherwise than the one that wrote the checkpoint, a sentence each.

    Args:
        saved, current (`Mapping[str, Any]`):
            [`with_plan`] of both, as they are read from JSON. What is missing in one of them is not compared.
        own_optimizer (`bool`, *optional*, defaults to `False`):
            Whether the user gave the optimizer, so that the settings of Trainer's have no part in it.

    Raises:
        `ValueError`: If the run can't be continued with them.
    """
    differing = {name: (value, saved[name]) for name, value in current.items() if saved.get(name, value) != value}
    for name, why in REFUSED.items():
        if name in differing and not (own_optimizer and name in OF_THE_OPTIMIZER):
            value, before = differing[name]
            raise ValueError(
                f"{name} is {value!r}, but the checkpoint was written with {before!r}: {why}. Set {name}={before!r} "
                "to resume, or begin another run from its weights (`pipeline.load_lora_weights(checkpoint)`)."
            )
    is_constant = saved.get("lr_scheduler_type") == current.get("lr_scheduler_type") == "constant"
    for name, (value, before) in differing.items():
        if name in HARMLESS or name.startswith(HARMLESS_PREFIXES) or (own_optimizer and name in OF_THE_OPTIMIZER):
            continue
        if name in ROUNDING:
            yield f"{name} is {value!r} and was {before!r}: no longer bitwise identical are {ROUNDING[name]}."
        elif name in LENGTH:
            if not is_constant:
                yield f"{name} is {value!r} and was {before!r}: the learning rate follows the schedule of this length."
        else:
            yield f"{name} is {value!r} and was {before!r}: from here on this is another run."


def run_changes(saved: Mapping[str, Any], current: Mapping[str, Any], new_rewards: bool) -> Iterator[str]:
    """
    As [`setting_changes`] for what `run.json` holds.

    Args:
        saved, current (`Mapping[str, Any]`):
            `rewards`: names and weights; `prompts` and `eval_prompts`: their fingerprints; `ingredients`: the rest
            that images and rewards depend on, by name.
        new_rewards (`bool`):
            Whether other reward functions are meant (`resume_with_new_rewards`).

    Raises:
        `ValueError`: If there are other reward functions that are not meant.
    """
    rewards, before = current["rewards"], saved["rewards"]
    if rewards.keys() != before.keys():
        change = f"reward_fn is {', '.join(rewards)}, but the checkpoint was written with {', '.join(before)}"
        if not new_rewards:
            raise ValueError(
                f"{change}: this is another run. Give it another output_dir, or set resume_with_new_rewards=True if "
                "the run is to go on with the new reward."
            )
        yield f"{change}: from here on this is another run."
    elif rewards != before:
        yield f"The weights of the rewards are {rewards} and were {before}: from here on this is another run."
    for name in ("prompts", "eval_prompts"):
        if current[name] != saved[name]:
            yield f"The {name} are {current[name]} and were {saved[name]}: from here on this is another run."
    recorded = saved.get("ingredients", {})  # an earlier version of this package recorded none
    for name, value in current["ingredients"].items():
        if recorded.get(name, value) != value:
            yield f"{name} is {value!r} and was {recorded[name]!r}: from here on this is another run."


def find_best(state: TrainerState, checkpoint: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """
    Corrects what a resumed run takes for its best checkpoint: a folder beside the one that is resumed, wherever both
    were when they were written; none yet if another figure decides now.

    Args:
        state ([`~transformers.TrainerState`]):
            As it was read from the checkpoint.
        checkpoint (`str`):
            Its folder.
        saved, current (`Mapping[str, Any]`):
            The settings of both runs.
    """
    if any(saved.get(name, current[name]) != current[name] for name in ("metric_for_best_model", "greater_is_better")):
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
    elif moved := moved_best(checkpoint, state.best_global_step):
        state.best_model_checkpoint = moved
