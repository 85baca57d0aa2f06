"""Suggestions for names that do not exist: words of other tools, and misspellings."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar


F = TypeVar("F", bound=Callable[..., Any])

# Words of TRL, ddpo-pytorch, diffusers' scripts or habit, by what they are called here.
OTHER_WORDS = {
    # settings
    "learning_rate": "lr train_learning_rate",
    "num_train_epochs": "epochs num_epochs n_epochs rounds num_rounds iterations",
    "max_steps": "steps train_steps max_train_steps num_train_steps",
    "per_device_train_batch_size": "batch_size train_batch_size bs micro_batch_size",
    "per_device_sample_batch_size": "sample_batch_size rollout_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "num_sample_batches": "sample_num_batches_per_epoch num_batches_per_epoch num_batches",
    "num_inference_steps": "sample_num_steps num_steps inference_steps sampling_steps denoising_steps",
    "num_images_per_prompt": "num_generations group_size num_samples_per_prompt images_per_prompt",
    "guidance_scale": "sample_guidance_scale guidance cfg cfg_scale",
    "eta": "sample_eta",
    "num_ppo_epochs": "train_num_inner_epochs num_inner_epochs inner_epochs ppo_epochs num_iterations",
    "num_mini_batches": "gradient_steps num_minibatches",
    "cliprange": "clip_range train_clip_range epsilon clip_epsilon",
    "advantage_clip": "train_adv_clip_max adv_clip_max adv_clip",
    "kl_coef": "beta kl kl_weight kl_beta kl_ratio",
    "timestep_fraction": "train_timestep_fraction",
    "advantage_normalization": "per_prompt_stat_tracking advantages scale_rewards normalization",
    "weight_decay": "train_adam_weight_decay wd",
    "max_grad_norm": "train_max_grad_norm grad_clip clip_grad_norm gradient_clipping",
    "output_dir": "out output save_dir logdir logging_dir out_dir",
    "report_to": "log_with tracker logger",
    "run_name": "exp_name name",
    "save_total_limit": "num_checkpoint_limit",
    "save_rounds": "save_freq save_every checkpoint_every",
    "eval_rounds": "eval_freq eval_every",
    "log_images_rounds": "image_every log_images_every",
    "resume_from_checkpoint": "resume_from checkpoint",
    "total_episodes": "episodes num_episodes num_samples total_samples",
    "max_workers": "num_workers reward_workers",
    "lr_scheduler_type": "lr_scheduler scheduler_type",
    "warmup_steps": "lr_warmup_steps warmup warmup_ratio",
    "gradient_checkpointing": "grad_checkpointing checkpointing",
    "use_cpu": "no_cuda cpu",
    "bf16": "mixed_precision precision amp",
    "pipeline_kwargs": "negative_prompts negative_prompt height width resolution image_size",
    "noise_level": "noise sigma",
    # flags of the command line
    "model": "pretrained_model pretrained_model_name_or_path model_name_or_path model_id model_name pipeline",
    "prompts": "prompt prompt_file prompt_fn prompt_function dataset dataset_name train_data train_file data",
    "reward": "rewards reward_fn reward_function reward_funcs reward_model",
    "eval_reward": "eval_rewards eval_reward_fn eval_reward_fns eval_reward_function",
    "lora_r": "rank lora_rank r",
    "lora_alpha": "alpha",
    "lora_target_modules": "target_modules",
    "accelerate_config": "config_file",
    "num_processes": "gpus num_gpus n_gpus nproc_per_node nproc",
    # arguments of the trainer
    "config": "args ddpo_config training_args",
    "reward_fn": "reward_function reward_functions reward_fns reward_funcs rewards reward scorer",
    "prompt_fn": "prompt_function prompts train_dataset dataset prompt_fns train_prompts",
    "pipeline": "sd_pipeline model pipe ddpo_pipeline",
    "eval_prompts": "eval_dataset eval_prompt_fn validation_prompts",
    "eval_reward_fn": "eval_reward_functions eval_reward_fns",
    "peft_config": "lora_config",
    "optimizers": "optimizer",
    "prompt_key_fn": "prompt_key key_fn",
    # commands
    "train": "finetune fine-tune run fit start",
    "sample": "generate eval evaluate inference images",
    "doctor": "check diagnose test inspect",
    "report": "plot html show",
    "serve-reward": "serve server reward-server",
    "env": "version info environment",
}

# For what is none of our names, by the name: what to do.
ELSEWHERE = {
    "image_samples_hook": "Use log_images_rounds; `ddpo_trl.trl_0_23.DDPOTrainer` takes the hook.",
    "tokenizer": "The pipeline brings its own.",
    "processing_class": "The pipeline brings its own.",
    "data_collator": "There is no data loader to collate for.",
    "compute_metrics": "An evaluation measures rewards: give eval_reward_fn.",
    "ref_model": "The reference is the pipeline without its adapter.",
    "reward_processing_classes": "A reward function prepares its inputs itself.",
    "value_model": "DDPO has no value model.",
    **dict.fromkeys(
        ("tracker_kwargs", "accelerator_kwargs", "project_kwargs", "train_cfg", "async_reward_computation"),
        "It is TRL 0.23's: `ddpo_trl.trl_0_23.convert_config` takes all of its settings.",
    ),
}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """
    A question to put behind a sentence, or nothing if nothing known is like the word.

    Args:
        word (`str`):
            What was written; of a flag, with its dashes.
        known (`Iterable[str]`):
            What there is.
    """
    names = sorted(known)
    by_plain_name = {plain(name): name for name in names}  # `--a_b` comes after its twin `--a-b`
    for meant, others in OTHER_WORDS.items():
        if plain(word) in map(plain, others.split()) and plain(meant) in by_plain_name:
            return f" Did you mean {by_plain_name[plain(meant)]}?"
    similar = difflib.get_close_matches(word, names, n=1)
    return f" Did you mean {similar[0]}?" if similar else ""


def plain(name: str) -> str:
    """A name in lower case, without the dashes of a flag."""
    return name.lstrip("-").replace("-", "_").lower()


def checks_names(owner: str) -> Callable[[F], F]:
    """
    Decorator of an `__init__` that answers an unknown keyword argument with what was probably meant.

    Args:
        owner (`str`):
            What it makes, for the message.

    Returns:
        `Callable`: A decorator. What it gives raises a `TypeError` for names that are not the function's.
    """

    def decorate(function: F) -> F:
        names = [name for name in inspect.signature(function).parameters if name != "self"]

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs:
                if name not in names:
                    remedy = f" {ELSEWHERE[name]}" if name in ELSEWHERE else did_you_mean(name, names)
                    raise TypeError(f"{owner} has no {name}.{remedy}")
            return function(*args, **kwargs)

        return checked  # type: ignore[return-value]

    return decorate
