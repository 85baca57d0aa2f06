"""Checks and decisions at construction, before time is spent."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from transformers import TrainerCallback

from ddpo_trl.checks.gradients import check_checkpointing
from ddpo_trl.checks.quantization import check_quantized_layers
from ddpo_trl.config import DDPOConfig
from ddpo_trl.policy.denoiser import compile_in_place
from ddpo_trl.policy.per_sample_gradients import TrainedLayer
from ddpo_trl.policy.pipeline import move
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.records import Context
from ddpo_trl.prompts import PromptPair, PromptSource, ShuffledPrompts, check_inputs
from ddpo_trl.rollout.forecast import forecast_or_reason
from ddpo_trl.rollout.plan import BatchPlan, plan_batches
from ddpo_trl.rollout.trial import TRIAL_SAMPLES, known_prompts, trial_samples
from ddpo_trl.update.one_pass import autocast, choose_passes


def check_arguments(config: Any, callbacks: Any) -> None:
    """
    Refuse arguments of the wrong type before anything is made from them.

    Raises:
        `TypeError`: With the argument, its type and the remedy.
        `ValueError`: If `output_dir` can't be created.
    """
    if not isinstance(config, DDPOConfig):
        raise TypeError(
            f"config is {type(config).__name__}; give a DDPOConfig, which has the fields of TrainingArguments and "
            "those of DDPO."
        )
    if not isinstance(callbacks, list | tuple | None):
        raise TypeError(f"callbacks is {type(callbacks).__name__}; give a list of callbacks.")
    for index, callback in enumerate(callbacks or ()):
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise TypeError(f"callbacks[{index}] is {callback!r}; give a `transformers.TrainerCallback`.")
    try:
        os.makedirs(config.output_dir, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output_dir is {config.output_dir!r}, which can't be created ({error}). Set a writable folder."
        ) from error


class PlannedRound(NamedTuple):
    """
    Sizes of a round, and the samples from which they were determined.

    Args:
        plan ([`~ddpo_trl.rollout.plan.BatchPlan`]):
            The sizes.
        layers (`dict[torch.nn.Module, int]`):
            Layers to watch in one pass; empty for two passes.
        trial ([`~ddpo_trl.policy.records.Context`]):
            Samples of the trial.
    """

    plan: BatchPlan
    layers: dict[TrainedLayer, int]
    trial: Context


def plan_round(
    policy: Policy,
    pipeline: DiffusionPipeline,
    config: DDPOConfig,
    prompts: PromptSource,
    eval_prompts: Sequence[PromptPair] | None,
) -> PlannedRound:
    """
    Move the pipeline to its device, try it, and set the sizes of a round. All processes have to call this function.

    Args:
        policy ([`~ddpo_trl.policy.policy.Policy`]), pipeline ([`~diffusers.DiffusionPipeline`]):
            The policy and the pipeline it was made from.
        config ([`DDPOConfig`]):
            Settings. Those that depend on the plan are set.
        prompts ([`~ddpo_trl.prompts.PromptSource`]), eval_prompts (`Sequence[tuple[str, Any]]`, *optional*):
            Prompts, with the entries named in `pipeline_inputs`.

    Raises:
        `ValueError`: If the prompts lack an input, or the pipeline can't be trained with these settings.
    """
    if isinstance(prompts, ShuffledPrompts):
        check_inputs(prompts.pairs, policy.input_names, "prompt_fn")
    if eval_prompts is not None:
        check_inputs(eval_prompts, policy.input_names, "eval_prompts")
    if config.offload_text_encoders:  # before the denoiser is on the same device
        with autocast(config):
            policy.runner.encode(known_prompts(policy, prompts, eval_prompts or ()), config.device)
    move(pipeline, config.device, config)
    check_quantized_layers(policy.denoiser, policy.denoiser_name)
    if config.torch_compile:
        compile_in_place(policy.denoiser, config.torch_compile_backend, config.torch_compile_mode)
    batches = trial_samples(policy, prompts)
    trial = batches.rows(range(min(TRIAL_SAMPLES, config.per_device_sample_batch_size)))
    with autocast(config):
        plan = plan_batches(config, *policy.probe_schedule(batches))
        if config.gradient_checkpointing:  # the Trainer enables it too late for one pass to be tried with it
            policy.activation_checkpointing_enable()
            check_checkpointing(policy, trial.rows([0]))
        plan, layers = choose_passes(config, policy, trial, plan)
        if config.device.type != "cpu":
            alone = isinstance(prompts, ShuffledPrompts) and not policy.input_names
            plan = dataclasses.replace(plan, forecast=forecast_or_reason(policy, batches, config, alone))
    config.gradient_accumulation_steps = plan.micro_batches_per_update
    if config.save_total_limit == 1 and config.metric_for_best_model is not None:
        config.save_total_limit = 2  # at the end Trainer would delete the last one, from which a stopped run resumes
    if config.total_episodes is not None:
        config.num_train_epochs = plan.rounds_for(config.total_episodes)
    return PlannedRound(plan, layers, trial)
