"""`ddpo-trl train`."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from diffusers import DiffusionPipeline
from peft import LoraConfig
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ddpo_trl.artifacts import checkpoints
from ddpo_trl.cli.arguments import CommandParser, Gather
from ddpo_trl.cli.errors import usage_errors
from ddpo_trl.cli.launch import LAUNCHED, launch, launch_flags
from ddpo_trl.cli.sources import load_model, load_prompt_source, load_reward
from ddpo_trl.config import DDPOConfig
from ddpo_trl.policy.denoiser import denoiser_name
from ddpo_trl.policy.lora import attention_projections, default_lora_config
from ddpo_trl.trainer import DDPOTrainer


# The settings of a run, for `--config` to repeat it.
SETTINGS_NAME = "train.yaml"

# Settings that say how a run was started, and those that may be secret: the folder may go to the Hub.
NOT_KEPT = {"resume_from_checkpoint", "launched", "hub_token", "env"}

# By the groups of DDPOConfig; `tests/cli/test_cli.py` holds it to a screen.
HELP = {
    "what is trained, on which prompts, for which reward": [
        "model", "dtype", "prompts", "reward", "reward_weights", "eval_prompts", "eval_reward", "lora_r", "lora_alpha",
        "lora_target_modules",
    ],
    "length of the run": ["total_episodes", "num_train_epochs", "resume"],
    "sampling": [
        "num_inference_steps", "guidance_scale", "pipeline_kwargs", "per_device_sample_batch_size",
        "num_sample_batches", "num_images_per_prompt",
    ],
    "rewards and advantages": ["advantage_normalization", "on_invalid_reward"],
    "objective": ["loss_type", "cliprange", "kl_coef", "train_timestep_range"],
    "optimization": ["learning_rate", "num_mini_batches", "per_device_train_batch_size", "bf16", "use_cpu", "seed"],
    "evaluation, logging and saving": ["output_dir", "eval_strategy", "report_to", "push_to_hub"],
    "several processes": ["accelerate_config"],
}  # fmt: skip


@dataclass
class TrainArguments:
    """
    What `ddpo-trl train` takes beside the fields of [`DDPOConfig`].

    Args:
        model (`str`):
            A folder, the id of a Hub repository, or `emoji`, the embedded pipeline.
        prompts (`str`):
            A file, a dataset, `module:function` or the name of a list; see
            [`~ddpo_trl.cli.sources.load_prompt_source`].
        reward (`list[str]`):
            Reward functions, see [`~ddpo_trl.cli.sources.load_reward`].
        dtype (`str`, *optional*, defaults to `"float32"`):
            In which the pipeline is loaded.
        prompt_column (`str`, *optional*):
            The column of a file or dataset with the prompts, `"prompt"` by default.
        prompt_split (`str`, *optional*, defaults to `"train"`):
            The split of a dataset.
        eval_prompts (`str`, *optional*):
            Prompts of the evaluation, as `prompts`.
        eval_reward (`list[str]`, *optional*):
            Held-out reward functions, which evaluation logs and training does not see.
        lora_r (`int`, *optional*):
            Rank of the adapter, 4 by default.
        lora_alpha (`int`, *optional*):
            Its scale in units of 1 / rank; as the rank by default.
        lora_target_modules (`list[str]`, *optional*):
            Layers that get it; all attention projections by default.
        accelerate_config (`str`, *optional*):
            Config of `accelerate launch`: a file, or `multi_gpu`, `fsdp2` or `deepspeed_zero2`.
    """

    model: str = field(metadata={"help": "A folder, a Hub id, or emoji: the embedded pipeline."})
    prompts: str = field(metadata={"help": "A file, dataset, module:function, emoji, common_animals, ..."})
    reward: list[str] = field(
        metadata={"help": "Built-in reward, module:function or URL; may be repeated.", "action": Gather}
    )
    dtype: str = field(default="float32", metadata={"help": "In which the pipeline is loaded: bfloat16, float16."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column with the prompts, if not `prompt`."})
    prompt_split: str = field(default="train", metadata={"help": "Split of a dataset."})
    eval_prompts: str | None = field(default=None, metadata={"help": "Prompts of the evaluation, as --prompts."})
    eval_reward: list[str] | None = field(
        default=None, metadata={"help": "Rewards that evaluation logs and training does not see.", "action": Gather}
    )
    lora_r: int | None = field(default=None, metadata={"help": "Rank of the adapter. [4]"})
    lora_alpha: int | None = field(default=None, metadata={"help": "Its scale; as the rank if not given."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers that get it; all attention projections if not given."}
    )
    accelerate_config: str | None = field(
        default=None, metadata={"help": "For accelerate launch: a file, multi_gpu, fsdp2, deepspeed_zero2."}
    )

    def __post_init__(self) -> None:
        self.reward = [self.reward] if isinstance(self.reward, str) else self.reward  # from a file
        self.eval_reward = [self.eval_reward] if isinstance(self.eval_reward, str) else self.eval_reward


def make_parser() -> CommandParser:
    """The parser of `ddpo-trl train`."""
    parser = CommandParser(
        [TrainArguments, DDPOConfig],
        "ddpo-trl train",
        "Fine-tune a pipeline on a reward. Every field of DDPOConfig and of TrainingArguments is a flag, and so is "
        "every flag of accelerate launch, such as --num_processes. In a --config file they stand without dashes.",
        shown=HELP,
        example="--model emoji --prompts emoji --reward jpeg_compressibility --total_episodes 512",
    )
    parser.add_argument(
        "--resume",
        dest="resume_from_checkpoint",
        nargs="?",
        const=True,
        metavar="[FOLDER]",
        help="Go on from a checkpoint, the last one if none is named.",
    )
    parser.add_argument(LAUNCHED, action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str]) -> int:
    """Trains, in this process or in those of `accelerate launch`."""
    parser = make_parser()
    (arguments, config, more), unknown = parser.parse_known(argv, launch_flags)
    if more.launched:  # what is unknown here was meant for the launcher
        return train(arguments, config, parser.given(argv))
    if not unknown and arguments.accelerate_config is None:
        return train(arguments, config, parser.given(argv))
    parser.refuse(unknown, launch_flags() if unknown else ())
    return launch(["train", *argv], arguments.accelerate_config, unknown, config.use_cpu)


def train(arguments: TrainArguments, config: DDPOConfig, settings: Mapping[str, Any]) -> int:
    """
    Trains, saves and says where everything is.

    Args:
        arguments ([`TrainArguments`]), config ([`DDPOConfig`]):
            The run.
        settings (`Mapping[str, Any]`):
            What of them was given, to be kept beside the results.
    """
    with usage_errors():
        checkpoints.to_resume(config.resume_from_checkpoint, config.output_dir)  # before minutes of loading
        rewards = [load_reward(name) for name in arguments.reward]
        held_out = [load_reward(name) for name in arguments.eval_reward or ()]
        where = (arguments.prompt_column, arguments.prompt_split)
        prompts = load_prompt_source(arguments.prompts, *where)
        eval_prompts = arguments.eval_prompts and load_prompt_source(arguments.eval_prompts, *where)
        pipeline = load_model(arguments.model, arguments.dtype)  # last: it may take minutes
        trainer = DDPOTrainer(
            config,
            rewards,
            prompts,
            pipeline,
            peft_config=lora_config(arguments, pipeline),
            eval_prompts=eval_prompts,
            eval_reward_fn=held_out or None,
        )
        trainer.checkpoint_to_resume(config.resume_from_checkpoint)
    trainer.add_callback(SettingsFile({name: settings[name] for name in settings if name not in NOT_KEPT}))
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.create_model_card()
    trainer.save_model()
    if trainer.is_world_process_zero():
        print_places(config.output_dir)
    trainer.accelerator.end_training()  # closes the process group, whose threads may else be cut off at the exit
    return 0


class SettingsFile(TrainerCallback):
    """
    Writes what was given to `train.yaml` when training begins: that of an earlier run has been moved aside then.

    Args:
        settings (`Mapping[str, Any]`):
            What was given.
    """

    def __init__(self, settings: Mapping[str, Any]):
        self.settings = dict(settings)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            Path(str(args.output_dir), SETTINGS_NAME).write_text(yaml.safe_dump(self.settings, sort_keys=False))


def lora_config(arguments: TrainArguments, pipeline: DiffusionPipeline) -> LoraConfig | None:
    """The adapter that the flags ask for; `None`, for the trainer's own, if they ask for none."""
    if arguments.lora_r is arguments.lora_alpha is arguments.lora_target_modules is None:
        return None
    denoiser = pipeline.components[denoiser_name(pipeline)]
    rank = default_lora_config(denoiser).r if arguments.lora_r is None else arguments.lora_r
    return LoraConfig(
        r=rank,
        lora_alpha=rank if arguments.lora_alpha is None else arguments.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=arguments.lora_target_modules or attention_projections(denoiser),
    )


def print_places(output_dir: str) -> None:
    """Describe the files of a finished run, and how to use them."""
    names = sorted(name for name in os.listdir(output_dir) if not name.startswith(("_", ".")))
    print(f"Saved in {output_dir}: {', '.join(names)}")
    print(f"Look at it: ddpo-trl sample {output_dir}, ddpo-trl report {output_dir}")
    print(f"Repeat it: ddpo-trl train --config {os.path.join(output_dir, SETTINGS_NAME)} --output_dir ANOTHER")
