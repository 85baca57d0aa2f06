"""Settings that contradict each other or have no effect: each is refused with argument, value and remedy."""

import dataclasses
import math
import signal
from collections.abc import Iterator
from typing import Any

from accelerate.utils import get_int_from_env, parse_flag_from_env
from transformers import TrainingArguments

from ddpo_trl.settings import default_of, out_of_bounds, wrong_types


# Environment variables with the number of processes that a launcher started, as accelerate reads them.
PROCESS_COUNTS = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]

# What the trainer hands to the pipeline's `__call__` itself, in sampling or in replay.
OWN_PIPELINE_ARGUMENTS = {
    "prompt", "num_inference_steps", "guidance_scale", "eta", "generator", "latents", "num_images_per_prompt",
    "output_type", "return_dict",
}  # fmt: skip

# Fields of TrainingArguments that would do nothing here, each with what to do instead. A value other than the default
# is refused, unless it is False: to switch off what is not there asks for nothing. `tests/test_config.py` says what
# becomes of all other fields.
WITHOUT_EFFECT = {
    "auto_find_batch_size": "the batch plan is made once, for all processes alike: set per_device_sample_batch_size "
    "and per_device_train_batch_size",
    "average_tokens_across_devices": "there are no tokens to count",
    "batch_eval_metrics": "an evaluation measures rewards: give eval_reward_fn",
    "bf16_full_eval": "images are made in the dtype of the pipeline: load it in bfloat16, or set bf16",
    "data_seed": "the order of prompts follows seed",
    "dataloader_drop_last": "there is no data loader: a round has per_device_sample_batch_size x num_sample_batches "
    "samples on each process",
    "dataloader_in_order": "there is no data loader",
    "dataloader_multiprocessing_context": "there is no data loader",
    "dataloader_num_workers": "there is no data loader: max_workers is the number of threads for rewards",
    "dataloader_persistent_workers": "there is no data loader",
    "dataloader_prefetch_factor": "there is no data loader",
    "eval_accumulation_steps": "images of an evaluation are kept in CPU memory anyway",
    "eval_do_concat_batches": "an evaluation has no predictions to join",
    "eval_use_gather_object": "an evaluation has no predictions to gather",
    "fp16_full_eval": "images are made in the dtype of the pipeline: load it in float16, or set fp16",
    "include_for_metrics": "an evaluation measures rewards: give eval_reward_fn",
    "include_num_input_tokens_seen": "there are no tokens to count: logs have episode, the reward queries so far",
    "label_names": "there are no labels",
    "label_smoothing_factor": "there are no labels",
    "length_column_name": "prompts are not grouped by length",
    "liger_kernel_config": "its kernels are of language models",
    "neftune_noise_alpha": "it is noise on a language model's embeddings: eta and noise_level are the noise here",
    "parallelism_config": "every process runs the whole pipeline: use FSDP2 or DeepSpeed by accelerate's config",
    "prediction_loss_only": "an evaluation has no loss",
    "train_sampling_strategy": "a list of prompts is shuffled in every pass: give a prompt function for another order",
    "use_cache": "a denoiser has no cache of keys and values",
    "use_liger_kernel": "its kernels are of language models",
}


def check_given(config: Any) -> None:
    """
    Refuse single values that are out of their bounds or have no effect, before others are derived from them.

    Raises:
        `ValueError`: With the argument, its value and the remedy.
        `TypeError`: If a single value is given instead of a list.
    """
    for problem in wrong_types(config):
        raise TypeError(problem)
    for name in ("pipeline_inputs", "reward_weights", "train_timestep_range"):
        value = vars(config)[name]
        if value is not None and not isinstance(value, list | tuple):  # a string would be taken for its letters
            raise TypeError(f"{name} is {value!r}; give a list, such as {[value]!r}.")
    raise_first(without_effect(config))
    raise_first(noise(config))
    raise_first(out_of_bounds(config))


def check_relations(config: Any) -> None:
    """Raise a `ValueError` for values that contradict each other, with the argument, its value and the remedy."""
    for check in (processes, ranges, objective, target_kl, pipeline_arguments, boundaries, saving):
        raise_first(check(config))


def raise_first(problems: Iterator[str]) -> None:
    """Raise a `ValueError` with the first problem."""
    for problem in problems:
        raise ValueError(problem)


def without_effect(config: Any) -> Iterator[str]:
    """Check for settings of the Trainer that would do nothing."""
    defaults = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    for name, remedy in WITHOUT_EFFECT.items():
        if name not in defaults:
            continue  # a field of later versions
        value = vars(config)[name]
        if value != default_of(defaults[name]) and value is not None and value is not False:
            yield f"{name} is {value!r}, which would do nothing here: {remedy}. Leave it out."
    for what, remedy in (
        ("logging", "set logging_strategy='steps'"),
        ("eval", "a run is evaluated between rounds: set eval_rounds"),
        ("save", "a run is saved between rounds: set save_rounds"),
    ):
        steps, strategy = vars(config)[f"{what}_steps"], vars(config)[f"{what}_strategy"]
        if steps != defaults[f"{what}_steps"].default and strategy != "steps":
            yield (
                f"{what}_steps is {steps}, which does nothing with {what}_strategy={str(strategy)!r}: {remedy}, "
                "or leave it out."
            )


def processes(config: Any) -> Iterator[str]:
    """Check that the processes of a launcher can join."""
    started = get_int_from_env(PROCESS_COUNTS, 1)
    if started > 1 and config.world_size == 1:
        yield (
            f"{started} processes were started, but there is no accelerator for each to join over: every one would "
            "train a run of its own. Set use_cpu=True for one run on their CPUs, or start a single process."
        )


def noise(config: Any) -> Iterator[str]:
    """Check that steps are stochastic."""
    if not config.eta > 0:
        yield f"eta is {config.eta}: a step without noise is not a policy. Set eta above 0 (1.0 is DDPM's noise)."
    if not config.noise_level > 0:
        yield (f"noise_level is {config.noise_level}: a step without noise is not a policy. Set noise_level above 0.")
    if config.sde_type == "cps" and config.noise_level > 1:
        yield (
            f"noise_level is {config.noise_level} with sde_type='cps', where 1.0 already replaces all noise. Set it "
            "to 1.0 or below."
        )


def ranges(config: Any) -> Iterator[str]:
    """Check numbers whose bounds depend on others, and those of the Trainer."""
    if config.guidance_scale is not None and not math.isfinite(config.guidance_scale):
        yield f"guidance_scale is {config.guidance_scale}; it must be finite or None."
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon", "warmup_steps", "eval_delay"):
        if (value := vars(config)[name]) is not None and not 0 <= value < math.inf:
            yield f"{name} is {value}; it must be at least 0, finite."
    bounds = config.train_timestep_range
    if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1] <= 1:
        yield (
            f"train_timestep_range is {bounds}; it must be two numbers with 0 <= first < second <= 1, such as "
            "[0.0, 0.8] for the first 80% of the steps."
        )
    if config.per_prompt_stat_tracking_min_count > config.per_prompt_stat_tracking_buffer_size:
        yield (
            f"per_prompt_stat_tracking_min_count is {config.per_prompt_stat_tracking_min_count}, more than the "
            f"{config.per_prompt_stat_tracking_buffer_size} rewards remembered: a prompt's own statistics would never "
            "be used. Raise per_prompt_stat_tracking_buffer_size or lower the count."
        )
    if config.max_grad_norm is not None and not config.max_grad_norm >= 0:
        yield f"max_grad_norm is {config.max_grad_norm}; it must be above 0, or 0 for no clipping."


def objective(config: Any) -> Iterator[str]:
    """Check the estimator, its advantages, and the number of passes."""
    if config.loss_type == "sf" and config.updates_per_round > 1:
        yield (
            f"loss_type is 'sf' with num_ppo_epochs={config.num_ppo_epochs} and num_mini_batches="
            f"{config.num_mini_batches}: after the first update the samples no longer come from the current policy, "
            "and the score-function gradient is biased. Set both to 1, or loss_type='is'."
        )
    if config.advantage_normalization == "group" and config.num_images_per_prompt < 2:
        yield (
            "advantage_normalization is 'group' with num_images_per_prompt=1: a group of one image has no advantage. "
            "Set num_images_per_prompt to 2 or more."
        )
    if config.multi_objective_aggregation == "normalize_then_sum" and config.advantage_normalization == "none":
        yield (
            "multi_objective_aggregation is 'normalize_then_sum', but advantage_normalization='none' turns "
            "normalization off. Set it to 'batch', 'prompt' or 'group'."
        )
    if config.one_pass and (reason := one_pass_disabled_reason(config)):
        yield f"one_pass is True, but {reason}. Change that, or leave one_pass out to take two passes."


def one_pass_disabled_reason(config: Any) -> str | None:
    """
    Return the reason why the settings need every step replayed in training; `None` if they don't.

    One pass is exact if the whole gradient of a round is taken by the policy that sampled it.
    """
    reasons = {
        f"a round has {config.updates_per_round} updates": config.updates_per_round > 1,
        f"kl_coef is {config.kl_coef:g}": config.kl_coef > 0,
        f"timestep_fraction is {config.timestep_fraction:g}": config.timestep_fraction < 1,
        "fp16 scales the loss": config.fp16,
        "the weights are sharded": bool(config.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP"),
        "DeepSpeed takes the gradients": config.deepspeed_plugin is not None,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def target_kl(config: Any) -> Iterator[str]:
    """Check that a limit of the divergence can take effect."""
    if config.target_kl is None:
        return
    if config.loss_type == "sf":
        yield (
            "target_kl is set with loss_type='sf', whose one update per round starts from the sampling policy: there "
            "is no divergence to limit. Leave it out, or set loss_type='is'."
        )
    if config.updates_per_round == 1:
        yield (
            "target_kl is set with one update per round, which is always made: it would do nothing. Raise "
            "num_ppo_epochs or num_mini_batches, or leave it out."
        )
    if config.fp16 or config.deepspeed_plugin is not None:
        what = "the loss scaler of fp16 counts" if config.fp16 else "DeepSpeed makes"
        yield (
            f"target_kl is set, but {what} the optimizer step before it is known whether the update is skipped. Use "
            "bf16 or float32, with DDP or FSDP; or leave target_kl out."
        )


def pipeline_arguments(config: Any) -> Iterator[str]:
    """Check that each argument of the pipeline is set in one place."""
    inputs, kwargs = set(config.pipeline_inputs or ()), config.pipeline_kwargs
    if kwargs is not None and not isinstance(kwargs, dict):
        yield (
            f"pipeline_kwargs is {kwargs!r}; give a dict, or on the command line a JSON object such as "
            "'{\"height\": 512}'."
        )
    kwargs = kwargs or {}
    if taken := OWN_PIPELINE_ARGUMENTS & inputs:
        yield f"pipeline_inputs holds {', '.join(sorted(taken))}, which the trainer sets itself. Leave it out."
    if taken := OWN_PIPELINE_ARGUMENTS & kwargs.keys():
        yield (
            f"pipeline_kwargs holds {', '.join(sorted(taken))}, which the trainer sets itself. Use the config's field "
            "of that name if there is one."
        )
    if both := inputs & kwargs.keys():
        yield (
            f"{', '.join(sorted(both))} is in pipeline_kwargs and in pipeline_inputs; it is either the same for all "
            "samples or comes from their metadata. Leave it out of one."
        )


def boundaries(config: Any) -> Iterator[str]:
    """Check for settings that would end a round in the middle."""
    if config.gradient_accumulation_steps != 1:
        yield (
            f"gradient_accumulation_steps is {config.gradient_accumulation_steps}, but it is derived: gradients "
            "accumulate over all trained timesteps of all samples of a mini-batch. Leave it at 1 and choose "
            "per_device_train_batch_size (memory) and num_mini_batches (optimizer steps) instead."
        )
    if config.max_steps > 0 and config.max_steps % config.updates_per_round:
        yield (
            f"max_steps is {config.max_steps}, which ends inside a round of {config.updates_per_round} optimizer "
            "steps (num_ppo_epochs x num_mini_batches). Set a multiple, or use num_train_epochs or total_episodes."
        )
    if not math.isfinite(config.num_train_epochs) or config.num_train_epochs % 1:
        yield f"num_train_epochs is {config.num_train_epochs}; a run has a whole number of rounds."
    for name, strategy in (("eval_rounds", "eval_strategy"), ("save_rounds", "save_strategy")):
        if (value := vars(config)[name]) > 1 and vars(config)[strategy] != "epoch":
            yield (
                f"{name} is {value}, but {strategy} is not 'epoch': it would do nothing. Set {strategy}='epoch', or "
                f"leave {name} out."
            )
    for name in config.stop_on_signal:
        if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
            yield (
                f"stop_on_signal holds {name!r}, which is not a signal that can be waited for. Give names such as "
                "'SIGTERM' or 'SIGUSR1'."
            )


def saving(config: Any) -> Iterator[str]:
    """Check that checkpoints and evaluations fall between rounds, and that no failure is hidden."""
    if config.save_strategy == "steps":
        yield (
            "save_strategy is 'steps': a checkpoint inside a round can't be resumed, because the rollout is not part "
            "of it. Set save_strategy='epoch' (one epoch is one round), 'best' or 'no'."
        )
    if config.save_strategy == "best" and config.eval_strategy != "epoch":
        yield (
            f"save_strategy is 'best' with eval_strategy={str(config.eval_strategy)!r}: the best checkpoint must fall "
            "between rounds. Set eval_strategy='epoch'."
        )
    if config.eval_strategy == "steps":
        yield (
            "eval_strategy is 'steps', but a run is evaluated, saved and stopped only between rounds. Set "
            "eval_strategy='epoch', and eval_rounds if not every round is to be evaluated."
        )
    if config.enable_jit_checkpoint:
        yield (
            "enable_jit_checkpoint is True: it would save inside a round, and such a checkpoint can't be resumed. "
            "Leave it out: after a SIGTERM the round is finished and saved anyway (stop_on_signal)."
        )
    if config.logging_nan_inf_filter:
        yield (
            "logging_nan_inf_filter is True, which would hide a loss that is not finite. Leave it at False, so that "
            "such a loss ends the run."
        )
