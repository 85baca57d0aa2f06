"""`ddpo-trl train`."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from ddpo_trl.cli.sources import PROMPT_LISTS, load_prompt_source, load_reward
from ddpo_trl.config import DDPOConfig
from ddpo_trl.policy.denoiser import denoiser_name
from ddpo_trl.policy.loading import Dtype, load_pipeline
from ddpo_trl.policy.lora import attention_projections, default_lora_config
from ddpo_trl.settings import REQUIRED, documented, setting
from ddpo_trl.trainer import DDPOTrainer


# File with the settings of a run, for `--config`.
SETTINGS_NAME = "train.yaml"

# Settings that are not part of the run, and a secret: the folder may be pushed to the Hub.
NOT_KEPT = {"resume_from_checkpoint", "launched", "hub_token"}

# Fields of DDPOConfig in `--help`.
SHOWN = [
    "output_dir", "total_episodes", "num_inference_steps", "guidance_scale", "per_device_sample_batch_size",
    "num_sample_batches", "learning_rate", "bf16", "use_cpu",
]  # fmt: skip


@documented()
@dataclass
class TrainArguments:
    """
    Arguments of `ddpo-trl train` in addition to the fields of [`DDPOConfig`].
    """

    model: str = setting(REQUIRED, "Pipeline to train: a folder, a Hub id, or emoji, the embedded pipeline.")
    prompts: str = setting(
        REQUIRED,
        f"""Prompts: a file, a dataset of the Hub, module:function, or one of the lists {", ".join(PROMPT_LISTS)}.""",
    )
    reward: list[str] = setting(
        REQUIRED, "Reward functions: built-in rewards, module:function or URLs of reward servers.", action=Gather
    )
    dtype: Dtype = setting("float32", "Precision in which the pipeline is loaded.")
    prompt_column: str | None = setting(None, "Column of the prompts in a file or dataset; `prompt` by default.")
    prompt_split: str = setting("train", "Split of a dataset.")
    eval_prompts: str | None = setting(None, "Prompts of the evaluation, as --prompts.")
    eval_reward: list[str] | None = setting(
        None, "Held-out reward functions, which are logged by evaluations and not trained on.", action=Gather
    )
    lora_r: int | None = setting(None, "Rank of the adapter; 4 by default.")
    lora_alpha: int | None = setting(None, "LoRA alpha: the adapter is scaled by alpha / rank. The rank by default.")
    lora_target_modules: list[str] | None = setting(
        None, "Layers that get the adapter; all attention projections by default."
    )
    accelerate_config: str | None = setting(
        None, "Config of accelerate launch: a file, multi_gpu, fsdp2 or deepspeed_zero2."
    )

    def __post_init__(self) -> None:
        self.reward = [self.reward] if isinstance(self.reward, str) else self.reward  # from a file
        self.eval_reward = [self.eval_reward] if isinstance(self.eval_reward, str) else self.eval_reward


def make_parser() -> CommandParser:
    """Return the parser of `ddpo-trl train`."""
    parser = CommandParser(
        [TrainArguments, DDPOConfig],
        "ddpo-trl train",
        "Fine-tune a pipeline on a reward. Every field of DDPOConfig and of TrainingArguments is a flag, and so is "
        "every flag of accelerate launch, such as --num_processes.",
        example="--model emoji --prompts emoji --reward jpeg_compressibility --total_episodes 512",
        shown=SHOWN,
        launcher_flags=launch_flags(),
    )
    parser.add_argument(
        "--resume",
        dest="resume_from_checkpoint",
        nargs="?",
        const=True,
        metavar="FOLDER",
        help="Resume from a checkpoint, the last one by default.",
    )
    parser.add_argument(LAUNCHED, action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str]) -> int:
    """Train in this process or in those of `accelerate launch`."""
    parser = make_parser()
    (arguments, config, more), for_launcher = parser.parse(argv)
    if more.launched or not (for_launcher or arguments.accelerate_config):
        return train(arguments, config, parser.given(argv))
    return launch(["train", *argv], arguments.accelerate_config, for_launcher, config.use_cpu)


def train(arguments: TrainArguments, config: DDPOConfig, settings: Mapping[str, Any]) -> int:
    """Train, save the results and the given settings, and print where they are."""
    with usage_errors():
        checkpoints.to_resume(config.resume_from_checkpoint, config.output_dir)  # before minutes of loading
        rewards = [load_reward(name) for name in arguments.reward]
        held_out = [load_reward(name) for name in arguments.eval_reward or ()]
        where = (arguments.prompt_column, arguments.prompt_split)
        prompts = load_prompt_source(arguments.prompts, *where)
        eval_prompts = arguments.eval_prompts and load_prompt_source(arguments.eval_prompts, *where)
        pipeline = load_pipeline(arguments.model, arguments.dtype)  # last: it may take minutes
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
    trainer.accelerator.end_training()  # closes the process group before the interpreter exits
    return 0


class SettingsFile(TrainerCallback):
    """Write the given settings when training begins, after the files of an earlier run were moved aside."""

    def __init__(self, settings: Mapping[str, Any]):
        self.settings = dict(settings)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            Path(str(args.output_dir), SETTINGS_NAME).write_text(yaml.safe_dump(self.settings, sort_keys=False))


def lora_config(arguments: TrainArguments, pipeline: DiffusionPipeline) -> LoraConfig | None:
    """Return the config of the adapter, `None` for the trainer's default if no flag is given."""
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
    """Print the files of a finished run, and how to use them."""
    names = sorted(name for name in os.listdir(output_dir) if not name.startswith(("_", ".")))
    print(f"Saved in {output_dir}: {', '.join(names)}")
    print(f"Look at it: ddpo-trl sample {output_dir}, ddpo-trl report {output_dir}")
    print(f"Repeat it: ddpo-trl train --config {os.path.join(output_dir, SETTINGS_NAME)} --output_dir ANOTHER")
