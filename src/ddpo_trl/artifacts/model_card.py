"""Model card: `README.md` with metadata, example code, results and pictures, pushed to the Hub with the weights."""

import os
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData

from ddpo_trl.artifacts import record
from ddpo_trl.artifacts.code_example import SCHEDULER_FOLDER, example
from ddpo_trl.artifacts.environment import PACKAGES
from ddpo_trl.artifacts.hub_metadata import hub_name, license_of, pipeline_tag
from ddpo_trl.config import DDPOConfig
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.schedulers.flow_match import FlowMatchPolicyScheduler


# With this tag, the Hub shows the pictures of the widget on the page of a LoRA.
LORA_TEMPLATE_TAG = "template:diffusion-lora"

# Folder of the pictures in the widget, and the number of prompts they are taken from.
GALLERY_FOLDER = "images"
GALLERY_PROMPTS = 4

# Settings shown in the card; ddpo_config.json contains all of them.
SETTINGS = [
    "loss_type", "learning_rate", "num_inference_steps", "guidance_scale", "train_timestep_range", "cliprange",
    "log_prob_reduction", "advantage_normalization", "kl_coef", "seed",
]  # fmt: skip
DIFFUSION_SETTINGS = ["eta"]
FLOW_SETTINGS = ["sde_type", "noise_level"]

FLOW_GRPO = """\
@article{liu2025flowgrpo,
    title   = {Flow-GRPO: Training Flow Matching Models via Online RL},
    author  = {Jie Liu and Gongye Liu and Jiajun Liang and Yangguang Li and Jiaheng Liu and Xintao Wang and
               Pengfei Wan and Di Zhang and Wanli Ouyang},
    journal = {arXiv preprint arXiv:2505.05470},
    year    = 2025,
}"""

FLOW_CPS = """\
@article{wang2025coefficients,
    title   = {Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching},
    author  = {Feng Wang and Zihao Yu},
    journal = {arXiv preprint arXiv:2509.05952},
    year    = 2025,
}"""

MIX_GRPO = """\
@article{li2025mixgrpo,
    title   = {MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed ODE-SDE},
    author  = {Junzhe Li and Yutao Cui and Tao Huang and Yinping Ma and Chun Fan and Miles Yang and Zhao Zhong},
    journal = {arXiv preprint arXiv:2507.21802},
    year    = 2025,
}"""


class RewardRow(NamedTuple):
    """
    Row of the table of rewards.

    Args:
        name (`str`):
            Name of the reward function.
        weight (`float`, *optional*):
            Weight in the training reward; `None` for a function that is used in evaluation only.
        values (`list[float | None]`):
            Mean rewards of the first and last round, and of the first and last evaluation if there were any.
    """

    name: str
    weight: float | None
    values: list[float | None]


def write_model_card(
    directory: str | os.PathLike[str],
    *,
    model_name: str,
    repo_id: str,
    policy: Policy,
    config: DDPOConfig,
    prompt: str,
    inputs: Mapping[str, Any],
    tags: Sequence[str],
    dataset_name: str | None,
    rewards: Mapping[str, float | None],
    log_history: Sequence[dict[str, Any]],
    paper: Mapping[str, str],
) -> None:
    """
    Write `README.md`, the pictures it shows, and the config of the scheduler used in evaluation.

    Args:
        directory (`str` or `os.PathLike`):
            Directory of the run, see [`~ddpo_trl.artifacts.record`].
        model_name (`str`):
            Heading of the card.
        repo_id (`str`):
            Hub id or path to load the model from.
        policy ([`~ddpo_trl.policy.policy.Policy`]):
            The trained policy.
        config ([`DDPOConfig`]):
            Settings of the run.
        prompt (`str`):
            Prompt of the example.
        inputs (`Mapping[str, Any]`):
            Values of `config.pipeline_inputs` for this prompt.
        tags (`Sequence[str]`):
            Tags of the metadata, in addition to those derived from the pipeline.
        dataset_name (`str`, *optional*):
            Hub id of the prompts' dataset.
        rewards (`Mapping[str, float | None]`):
            Weight of each reward function; `None` for those used in evaluation only.
        log_history (`Sequence[dict]`):
            Logs of the Trainer.
        paper (`Mapping[str, str]`):
            Title, id and citation of the paper.
    """
    pipeline = policy.pipeline
    pipeline.scheduler.save_pretrained(Path(directory) / SCHEDULER_FOLDER)
    base_model = hub_name(pipeline)
    task = pipeline_tag(pipeline, config)
    is_lora = policy.adapter is not None
    if not is_lora:
        tags = [tag for tag in tags if tag != "lora"]
    pictures = Pictures.of(Path(directory))
    card_data = ModelCardData(
        library_name="diffusers",
        base_model=base_model,
        base_model_relation=("adapter" if is_lora else "finetune") if base_model else None,
        pipeline_tag=task,
        tags=[*tags, task, *([LORA_TEMPLATE_TAG] if is_lora else [])],
        datasets=dataset_name,
        widget=[{"text": text, "output": {"url": url}} for text, url in pictures.gallery] or None,
        **license_of(base_model),
    )
    rounds = [log for log in log_history if "reward" in log]
    evaluations = [log for log in log_history if "eval_reward" in log]
    is_flow = isinstance(policy.scheduler, FlowMatchPolicyScheduler)
    settings = [*SETTINGS, *(FLOW_SETTINGS if is_flow else DIFFUSION_SETTINGS)]
    ModelCard.from_template(
        card_data,
        template_path=str(files("ddpo_trl") / "assets" / "model_card.md"),
        model_name=model_name,
        base_model=base_model,
        pipeline_class=type(pipeline).__name__,
        trained=policy.describe(),
        is_lora=is_lora,
        example=example(policy, config, repo_id, prompt, task, inputs),
        pictures=pictures,
        dataset_name=dataset_name,
        reward_rows=reward_rows(rewards, rounds, evaluations),
        reward_queries=int(rounds[-1]["episode"]) if rounds else 0,
        evaluated=bool(evaluations),
        settings={name: vars(config)[name] for name in settings},
        loss_type=config.loss_type,
        versions={package: version(package) for package in PACKAGES},
        paper=paper,
        citations=[paper["citation"], *(flow_citations(config) if is_flow else [])],
    ).save(Path(directory) / "README.md")


class Pictures(NamedTuple):
    """
    Pictures of a run, by their paths in its directory.

    Args:
        reward (`str`, *optional*):
            Reward curve.
        before_after (`str`, *optional*):
            Images before and after training.
        gallery (`list[tuple[str, str]]`):
            Captions and paths of single images, for the widget.
    """

    reward: str | None
    before_after: str | None
    gallery: list[tuple[str, str]]

    @classmethod
    def of(cls, directory: Path) -> "Pictures":
        """Collect the pictures that exist."""
        reward, before_after = (
            name if (directory / name).is_file() else None
            for name in (record.REWARD_CURVE_NAME, record.BEFORE_AFTER_NAME)
        )
        return cls(reward, before_after, copy_gallery(directory))


def copy_gallery(directory: Path) -> list[tuple[str, str]]:
    """
    Copy images of the first fixed prompts, before training and now, to a folder where later ones overwrite them. The
    folders of single rounds are not pushed to the Hub.

    Args:
        directory (`Path`):
            Directory of the run.

    Returns:
        `list[tuple[str, str]]`: Captions (the prompts) and paths relative to the directory.
    """
    folders = sorted(path.parent for path in directory.glob(f"{record.SAMPLES_FOLDER}/*/{record.SAMPLES_NAME}"))
    if len(folders) < 2:
        return []
    before, after = (dict(record.fixed_images(folder)) for folder in (folders[0], folders[-1]))
    first_of_prompt = {of[0]: of for of in reversed(after) if of in before}
    shared = [of for of in after if of in first_of_prompt.values()][:GALLERY_PROMPTS]
    (directory / GALLERY_FOLDER).mkdir(exist_ok=True)
    gallery = []
    for index, of in enumerate(shared):
        for moment, folder, entry in (("after", folders[-1], after[of]), ("before", folders[0], before[of])):
            film = (folder / entry["file"]).with_suffix(".gif")
            source = film if film.is_file() else folder / entry["file"]
            target = f"{GALLERY_FOLDER}/{index}-{moment}{source.suffix}"
            shutil.copyfile(source, directory / target)
            gallery.append((f"{of[0]} (before training)" if moment == "before" else of[0], target))
    return gallery


def reward_rows(
    rewards: Mapping[str, float | None], rounds: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]
) -> list[RewardRow]:
    """Return one row per reward function; none before the first round."""
    if not rounds:
        return []
    ends = [("", rounds[0]), ("", rounds[-1])]
    if evaluations:
        ends += [("eval_", evaluations[0]), ("eval_", evaluations[-1])]
    return [
        RewardRow(name, weight, [log.get(f"{prefix}rewards/{name}/mean") for prefix, log in ends])
        for name, weight in rewards.items()
    ]


def flow_citations(config: DDPOConfig) -> list[str]:
    """Return the citations of the SDE and the window that flow matching steps use."""
    window = [MIX_GRPO] if config.sde_window_size is not None else []
    return [FLOW_CPS if config.sde_type == "cps" else FLOW_GRPO, *window]
