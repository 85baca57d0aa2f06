"""Suggestions for unknown names: words of other tools, and misspellings."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar


F = TypeVar("F", bound=Callable[..., Any])

# Words of TRL, ddpo-pytorch, diffusers' scripts or habit that are not similar to our name for the same thing.
OTHER_WORDS = {
    # settings
    "learning_rate": "lr",
    "num_train_epochs": "epochs num_epochs n_epochs rounds num_rounds iterations",
    "max_steps": "num_train_steps",
    "per_device_train_batch_size": "batch_size train_batch_size bs micro_batch_size",
    "per_device_sample_batch_size": "rollout_batch_size",
    "num_sample_batches": "num_batches_per_epoch num_batches",
    "num_inference_steps": "sample_num_steps num_steps sampling_steps denoising_steps",
    "num_images_per_prompt": "num_generations group_size",
    "guidance_scale": "cfg",
    "eta": "sample_eta",
    "num_ppo_epochs": "train_num_inner_epochs num_inner_epochs inner_epochs num_iterations",
    "num_mini_batches": "gradient_steps",
    "cliprange": "train_clip_range epsilon clip_epsilon",
    "advantage_clip": "train_adv_clip_max",
    "kl_coef": "beta kl kl_weight kl_beta kl_ratio",
    "advantage_normalization": "per_prompt_stat_tracking advantages scale_rewards",
    "weight_decay": "wd",
    "max_grad_norm": "grad_clip gradient_clipping",
    "output_dir": "out save_dir logdir logging_dir",
    "report_to": "log_with tracker logger",
    "run_name": "exp_name",
    "save_total_limit": "num_checkpoint_limit",
    "save_rounds": "save_freq save_every checkpoint_every",
    "eval_rounds": "eval_freq eval_every",
    "log_images_rounds": "image_every",
    "resume_from_checkpoint": "resume_from checkpoint",
    "total_episodes": "num_samples",
    "use_cpu": "no_cuda cpu",
    "bf16": "mixed_precision precision amp",
    "pipeline_kwargs": "negative_prompts negative_prompt height width resolution image_size",
    "noise_level": "sigma",
    # flags of the command line
    "model": "pretrained_model pretrained_model_name_or_path model_name_or_path model_id pipeline",
    "prompts": "prompt_file prompt_function dataset dataset_name train_data train_file data",
    "reward": "reward_function reward_model",
    "lora_r": "rank lora_rank r",
    "accelerate_config": "config_file",
    "num_processes": "gpus num_gpus n_gpus nproc_per_node nproc",
    # arguments of the trainer
    "config": "args ddpo_config training_args",
    "reward_fn": "scorer",
    "prompt_fn": "train_dataset dataset train_prompts",
    "pipeline": "model",
    "eval_prompts": "eval_dataset",
    "peft_config": "lora_config",
    # commands
    "train": "finetune fine-tune run fit start",
    "sample": "generate eval evaluate inference images",
    "doctor": "check diagnose test inspect",
    "report": "html show",
    "serve-reward": "serve reward-server",
    "env": "version info environment",
}

# Remedies for names without a counterpart here.
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
    """Return a question to append to an error about an unknown word, or `""` if none of the known ones is similar."""
    names = sorted(known)
    by_plain_name = {plain(name): name for name in names}
    for meant, others in OTHER_WORDS.items():
        if plain(word) in map(plain, others.split()) and plain(meant) in by_plain_name:
            return f" Did you mean {by_plain_name[plain(meant)]}?"
    similar = difflib.get_close_matches(word, names, n=1)
    return f" Did you mean {similar[0]}?" if similar else ""


def plain(name: str) -> str:
    """Return a name in lower case, without the dashes of a flag."""
    return name.lstrip("-").replace("-", "_").lower()


def checks_names(owner: str) -> Callable[[F], F]:
    """Decorate the `__init__` of `owner`: unknown keyword arguments raise a `TypeError` with a suggestion."""

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
