"""The main job, for real: DDPO with LoRA on the embedded pipeline, in a few minutes on two cores."""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ddpo_trl import rewards
from ddpo_trl.config import DDPOConfig
from ddpo_trl.emoji import load_emoji_pipeline, recognized_share
from ddpo_trl.evaluation.evaluator import Samples
from ddpo_trl.rewards.function import RewardFunction
from ddpo_trl.rollout.advantages import shuffled
from ddpo_trl.seeding import Stream, generator
from ddpo_trl.trainer import DDPOTrainer


# Captions whose two drawings differ in complexity: there is something to choose without losing the subject.
PROMPTS = [
    "mushroom", "squid", "hamburger", "blossom", "snake", "taco", "spider", "strawberry",
    "tropical fish", "pancakes", "evergreen tree", "candy", "honeybee", "potted plant", "sushi", "lollipop",
]  # fmt: skip

# The pipeline learned from bare captions. With an article before them, these are drawn right now and then: in one to
# three of four images with other seeds than the demo's.
NOW_AND_THEN = [
    "sandwich", "takeout box", "cup with straw", "spouting whale", "taco", "kissing face with smiling eyes",
    "beer mug", "birthday cake", "hedgehog", "roasted sweet potato", "t-rex", "sad but relieved face", "pretzel",
    "mouse face", "rooster", "blowfish",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Task:
    """
    What the demo can train for.

    Args:
        reward (`Callable`):
            The reward function.
        unit (`str`):
            Of the reward, for headings.
        captions (`list[str]`):
            What the images should show.
        article (`str`, *optional*, defaults to `""`):
            What stands before a caption in its prompt.
        eval_seeds (`int`, *optional*, defaults to `2`):
            The evaluation repeats every prompt this often, each time with another seed.
        defaults (`dict[str, Any]`, *optional*):
            What differs from [`DEFAULTS`] and the defaults of [`DemoArguments`].
    """

    reward: RewardFunction
    unit: str
    captions: list[str]
    article: str = ""
    eval_seeds: int = 2
    defaults: dict[str, Any] = field(default_factory=dict)

    def prompts(self) -> list[str]:
        """One for each caption."""
        return [f"{self.article}{caption}" for caption in self.captions]


TASKS = {
    "jpeg_compressibility": Task(reward=rewards.jpeg_compressibility, unit="kB", captions=PROMPTS),
    "jpeg_incompressibility": Task(reward=rewards.jpeg_incompressibility, unit="kB", captions=PROMPTS),
    "emoji_alignment": Task(
        reward=rewards.EmojiAlignment(),
        unit="nats",
        captions=NOW_AND_THEN,
        article="a ",
        eval_seeds=16,  # a share of so few images as 32 would be uncertain by 9 %
        # No guidance, which makes up for part of what is to be learned. At a learning rate of 1e-3 shuffled rewards
        # cost half of the subjects. The reward, a log-probability, ends at 0.
        defaults={"guidance_scale": 1.0, "learning_rate": 3e-4, "stop_at_gain": 1.0},
    ),
}

# Guidance above 1 keeps what belongs to the caption: at 1 the whole image fades, which compresses well too. The last
# two of five steps have a tiny σ, and their gradient would outweigh the others'.
DEFAULTS: dict[str, Any] = {
    "output_dir": "outputs/demo",
    "num_train_epochs": 14,
    "num_inference_steps": 5,
    "guidance_scale": 2.5,
    "train_timestep_range": [0.0, 0.6],
    "per_device_sample_batch_size": 16,
    "num_sample_batches": 8,
    "num_images_per_prompt": 8,
    "per_device_train_batch_size": 16,
    "num_mini_batches": 4,
    "advantage_normalization": "group",
    "learning_rate": 1e-3,
    "cliprange": 5e-3,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": False,
    "num_logged_images": 10,
    "seed": 0,
}

# By how much the steps of the score function, one a round in place of four, are larger.
SCORE_FUNCTION_RATE = 2.0


@dataclass
class DemoArguments:
    """
    What `ddpo-trl demo` takes beside the fields of [`DDPOConfig`].

    Args:
        reward (`str`, *optional*, defaults to `"jpeg_compressibility"`):
            What the images are trained for: that, `"jpeg_incompressibility"`, or `"emoji_alignment"`, for which the
            prompts are other than the captions that the pipeline knows: "a hedgehog" in place of "hedgehog".
        lora_rank (`int`, *optional*, defaults to `16`):
            Rank of the adapter. The higher it is, the smaller the steps may be, and the less the weights wander at
            random: with rank 4 and larger steps shuffled rewards moved the evaluation by up to 7 %.
        shuffle_rewards (`bool`, *optional*, defaults to `False`):
            Whether to shuffle the rewards of each round among its images: the control, which must not learn.
        stop_at_gain (`float`, *optional*, defaults to `0.18`):
            Training stops when the reward of a round is better than the first round's by this share of its magnitude.
            Left to run, compressibility ends in blank images. `emoji_alignment` has no need of it: its default is 1.
    """

    reward: Literal["jpeg_compressibility", "jpeg_incompressibility", "emoji_alignment"] = field(
        default="jpeg_compressibility", metadata={"help": "What the images are trained for."}
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapter."})
    shuffle_rewards: bool = field(
        default=False, metadata={"help": "Shuffle the rewards among the images: the control, which must not learn."}
    )
    stop_at_gain: float = field(
        default=0.18, metadata={"help": "Stop when the reward has improved by this share of the first round's."}
    )


class StopAtGain(TrainerCallback):
    """
    Ends training once a round's mean reward has improved on the first round's by a share of its magnitude.

    Args:
        share (`float`):
            0.18 for 18 %.
    """

    def __init__(self, share: float):
        self.share = share
        self.first: float | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "reward" not in logs:
            return
        self.first = logs["reward"] if self.first is None else self.first
        if logs["reward"] - self.first >= self.share * abs(self.first):
            control.should_training_stop = True


def demo_lora_config(rank: int) -> LoraConfig:
    """An adapter on all that carries the drawing: attention, feed-forward, convolutions and time projections."""
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        init_lora_weights="gaussian",
        target_modules=[
            *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
            *("proj_in", "proj_out", "conv1", "conv2", "time_emb_proj"),
        ],
    )


def demo_trainer(
    arguments: DemoArguments, config: DDPOConfig, callbacks: list[TrainerCallback] | None = None
) -> DDPOTrainer:
    """
    The trainer of the demo.

    Args:
        arguments ([`DemoArguments`]):
            The task and the adapter.
        config ([`DDPOConfig`]):
            Everything else.
        callbacks (`list[~transformers.TrainerCallback]`, *optional*):
            Those of [`DDPOTrainer`].
    """
    task = TASKS[arguments.reward]
    pipeline = load_emoji_pipeline()
    pipeline.unet.set_attn_processor(AttnProcessor())  # fused attention is slower on a CPU, backwards above all
    return DDPOTrainer(
        config,
        task.reward,
        task.prompts(),
        pipeline,
        peft_config=demo_lora_config(arguments.lora_rank) if config.use_lora else None,
        eval_prompts=task.prompts() * task.eval_seeds,
        callbacks=callbacks,
    )


def run_demo(arguments: DemoArguments, config: DDPOConfig) -> dict[str, Any]:
    """
    Trains, compares before and after on fixed prompts and seeds, and saves weights and `summary.json`.

    Args:
        arguments ([`DemoArguments`]):
            The reward and the adapter.
        config ([`DDPOConfig`]):
            Everything else.

    Returns:
        `dict`: What `summary.json` holds.
    """
    task = TASKS[arguments.reward]
    trainer = demo_trainer(arguments, config, [StopAtGain(arguments.stop_at_gain)])
    if arguments.shuffle_rewards:
        trainer.advantages.normalize = shuffled(trainer.advantages.normalize, generator(config.seed, Stream.CONTROL))
    before = trainer.generate_samples()
    start, start_cpu = time.perf_counter(), time.process_time()
    trainer.train()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    after = trainer.generate_samples()

    trainer.save_model()
    summary = summarise(trainer, task, before, after, seconds, cpu_seconds)
    Path(config.output_dir, "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def mean_and_stderr(gains: Tensor) -> tuple[float, float]:
    """Of `(N,)` paired gains."""
    return gains.mean().item(), gains.std(correction=1).item() / math.sqrt(len(gains))


def recognised(samples: Samples, captions: list[str]) -> Tensor:
    """1 for each image that is nearest to its own subject, else 0: `(N,)`. The captions may be fewer and recur."""
    subjects = captions * (len(samples.images) // len(captions))
    pairs = zip(samples.images, subjects, strict=True)
    return torch.tensor([recognized_share(image[None], [caption]) for image, caption in pairs])


def summarise(
    trainer: DDPOTrainer, task: Task, before: Samples, after: Samples, seconds: float, cpu_seconds: float
) -> dict[str, Any]:
    """The figures of a run; the standard errors are those of the means of the paired gains."""
    gain, stderr = mean_and_stderr((after.rewards - before.rewards)[:, 0])
    hits = [recognised(samples, task.captions) for samples in (before, after)]
    recognised_gain, recognised_stderr = mean_and_stderr(hits[1] - hits[0])
    logs = [log for log in trainer.state.log_history if "reward" in log]
    sampling = sum(log["time/sampling"] for log in logs)
    waiting = sum(log["time/waiting_for_rewards"] for log in logs)
    return {
        "reward": trainer.scorer.names[0],
        "reward_queries": int(logs[-1]["episode"]) if logs else 0,
        "eval_reward_before": before.rewards.mean().item(),
        "eval_reward_after": after.rewards.mean().item(),
        "eval_reward_gain": gain,
        "eval_reward_gain_stderr": stderr,
        "recognised_before": hits[0].mean().item(),
        "recognised_after": hits[1].mean().item(),
        "recognised_gain": recognised_gain,
        "recognised_gain_stderr": recognised_stderr,
        "seconds": {
            "sampling": sampling,
            "scoring": sum(log["time/scoring"] for log in logs),  # in worker threads, while sampling goes on
            "training": seconds - sampling - waiting,
            "total": seconds,
            "training_cpu": cpu_seconds,  # of all threads
        },
        "config": trainer.args.to_dict(),
    }


def print_summary(summary: dict[str, Any], unit: str, output_dir: str) -> None:
    """Shows the figures as a table."""
    table = Table(title=f"{summary['reward']}: {summary['reward_queries']} reward queries")
    for heading in ("", "before", "after", "gain"):
        table.add_column(heading, justify="left" if heading == "" else "right")
    table.add_row(
        f"evaluation reward, {unit}",
        f"{summary['eval_reward_before']:.3f}",
        f"{summary['eval_reward_after']:.3f}",
        f"{summary['eval_reward_gain']:+.3f} ± {summary['eval_reward_gain_stderr']:.3f}",
    )
    table.add_row(
        "subjects recognised",
        f"{summary['recognised_before']:.0%}",
        f"{summary['recognised_after']:.0%}",
        f"{summary['recognised_gain']:+.0%} ± {summary['recognised_gain_stderr']:.0%}",
    )
    seconds = summary["seconds"]
    console = Console()
    console.print(table)
    console.print(
        f"{seconds['total']:.0f} s: sampling {seconds['sampling']:.0f} s, training {seconds['training']:.0f} s "
        f"(scoring {seconds['scoring']:.1f} s meanwhile). Saved in {output_dir}: the weights, reward.png, "
        "before_after.png, summary.json"
    )
