"""The model card that goes to the Hub beside the weights."""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import numpy as np
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL.Image import Image
from transformers.utils import logging
from yaml import YAMLError

from ddpo_trl.artifacts import record
from ddpo_trl.artifacts.environment import PACKAGES
from ddpo_trl.config import DDPOConfig
from ddpo_trl.emoji import EMOJI_PATH
from ddpo_trl.policy.adapter_files import has_lora_loader
from ddpo_trl.policy.pipeline import makes_video
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.schedulers.flow_match import FlowMatchPolicyScheduler


logger = logging.get_logger(__name__)

# The page of a LoRA on the Hub shows the pictures of its widget if it has this tag.
LORA_TEMPLATE_TAG = "template:diffusion-lora"

# The single images that the Hub shows are here, and are of so many prompts.
GALLERY_FOLDER = "images"
GALLERY_PROMPTS = 4

# The pipeline's own may have been replaced since it was loaded, and images depend on it.
SCHEDULER_FOLDER = "scheduler"

# Settings that are shown; all of them are in ddpo_config.json.
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
    A line of the table of rewards.

    Args:
        name (`str`):
            The reward function's.
        weight (`float`, *optional*):
            In the sum that was trained for; `None` for a function that only measured.
        values (`list[float | None]`):
            Means: of the first and last round, and of the first and last evaluation if there were any.
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
    Writes `README.md`, with the pictures that are there, and the config of the scheduler that evaluation runs with.

    Args:
        directory (`str` or `os.PathLike`):
            Of the run, see [`~ddpo_trl.artifacts.record`].
        model_name (`str`):
            Heading.
        repo_id (`str`):
            The name it is loaded by.
        policy ([`~ddpo_trl.policy.policy.Policy`]):
            What was trained.
        config ([`DDPOConfig`]):
            Settings of the run.
        prompt (`str`):
            The prompt of the example.
        inputs (`Mapping[str, Any]`):
            What `config.pipeline_inputs` names, of that prompt.
        tags (`Sequence[str]`):
            Tags of the metadata, beside those that follow from the pipeline.
        dataset_name (`str`, *optional*):
            Hub id of the prompts' dataset.
        rewards (`Mapping[str, float | None]`):
            Weight of each reward function; `None` for those that training did not see.
        log_history (`Sequence[dict]`):
            The Trainer's logs.
        paper (`Mapping[str, str]`):
            Title, id and citation.
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
    The pictures of a run, by their paths in its folder.

    Args:
        reward (`str`, *optional*):
            The reward curve.
        before_after (`str`, *optional*):
            Images before and after training.
        gallery (`list[tuple[str, str]]`):
            Caption and path of single images, for the Hub to show first.
    """

    reward: str | None
    before_after: str | None
    gallery: list[tuple[str, str]]

    @classmethod
    def of(cls, directory: Path) -> "Pictures":
        """Those that are there."""
        reward, before_after = (
            name if (directory / name).is_file() else None
            for name in (record.REWARD_CURVE_NAME, record.BEFORE_AFTER_NAME)
        )
        return cls(reward, before_after, take_gallery(directory))


def take_gallery(directory: Path) -> list[tuple[str, str]]:
    """
    Copies images of the first fixed prompts, before training and now, to where later ones take their place: the Hub
    gets no images of single rounds.

    Args:
        directory (`Path`):
            Of the run.

    Returns:
        `list[tuple[str, str]]`: Captions, which are prompts, and paths in the directory.
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


def hub_name(pipeline: DiffusionPipeline) -> str | None:
    """The Hub id that a pipeline was loaded by. A path on this machine means nothing to others."""
    name = str(pipeline.name_or_path or "")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if "/" in name and not os.path.exists(name) else None


@cache
def license_of(base_model: str | None) -> dict[str, Any]:
    """The metadata that say what the base model allows, which goes for its adapters as well; empty if not known."""
    if base_model is None:
        return {}
    try:
        data = ModelCard.load(base_model, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, YAMLError, httpx2.RequestError) as error:  # no network, no card, no metadata
        logger.info(f"The licence of {base_model} is not in the model card, because its card can't be read: {error}")
        return {}
    fields = {name: data[name] for name in ("license", "license_name", "license_link") if name in data}
    link = fields.get("license_link")
    if link is not None and "://" not in link:  # a file beside that card
        fields["license_link"] = f"https://huggingface.co/{base_model}/blob/main/{link}"
    return fields


def pipeline_tag(pipeline: DiffusionPipeline, config: DDPOConfig) -> str:
    """The Hub's name for what a pipeline makes out of what."""
    given = {*(config.pipeline_inputs or ()), *(config.pipeline_kwargs or ())}
    source = "image" if "image" in given else "text"
    return f"{source}-to-{'video' if makes_video(pipeline) else 'image'}"


def example(
    policy: Policy, config: DDPOConfig, repo_id: str, prompt: str, task: str, inputs: Mapping[str, Any]
) -> str:
    """Python that loads the model and makes an image with it, as evaluation does."""
    pipeline, component = policy.pipeline, policy.denoiser_name
    pipeline_class, scheduler_class = type(pipeline).__name__, type(pipeline.scheduler).__name__
    where = f'"{repo_id}"' + (f', revision="{config.hub_revision}"' if config.hub_revision else "")
    imports, arguments = [], ""
    classes = [pipeline_class, scheduler_class]
    after = [f'pipeline.scheduler = {scheduler_class}.from_pretrained({where}, subfolder="{SCHEDULER_FOLDER}")']
    if policy.adapter is None:
        model_class = type(policy.denoiser).__name__
        classes.append(model_class)
        arguments = f', {component}={model_class}.from_pretrained({where}, subfolder="{component}")'
    elif has_lora_loader(pipeline):
        after.append(f"pipeline.load_lora_weights({where})")
    else:
        imports.append("from peft import PeftModel")
        after.append(f"PeftModel.from_pretrained(pipeline.{component}, {where})  # adds the adapter in place")
    base = f'"{hub_name(pipeline) or "path/to/the/base/pipeline"}"'
    if str(pipeline.name_or_path) == str(EMOJI_PATH):
        imports.append("from ddpo_trl.emoji import EMOJI_PATH")
        base = "EMOJI_PATH"
    dtype = next(policy.denoiser.parameters()).dtype  # of the adapter it may be another
    if dtype in (torch.float16, torch.bfloat16):
        imports.insert(0, "import torch")
        arguments += f", dtype={dtype}"
    written, defined = written_arguments(config, inputs)
    if any("load_image(" in line for line in defined):
        imports.append("from diffusers.utils import load_image")
    imports.insert(imports[:1] == ["import torch"], f"from diffusers import {', '.join(classes)}")
    load = f"pipeline = {pipeline_class}.from_pretrained({base}{arguments})"
    result, field = ("video", "frames") if task.endswith("video") else ("image", "images")
    call = f"{result} = pipeline({', '.join([literal(prompt), *written])}).{field}[0]"
    return "\n".join([*imports, "", load, *after, *defined, call])


def written_arguments(config: DDPOConfig, inputs: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """
    The arguments of the pipeline's call, as evaluation gives them.

    Args:
        config ([`DDPOConfig`]):
            Settings of the run.
        inputs (`Mapping[str, Any]`):
            What `config.pipeline_inputs` names, of the prompt.

    Returns:
        The arguments in Python, and the lines before the call that define those that can't be written there.
    """
    assert not isinstance(config.pipeline_kwargs, str), "DDPOConfig parses strings"
    values: dict[str, Any] = {"num_inference_steps": config.num_inference_steps}
    if config.guidance_scale is not None:
        values["guidance_scale"] = config.guidance_scale
    values |= {**(config.pipeline_kwargs or {}), **{name: inputs.get(name) for name in config.pipeline_inputs or ()}}
    written, defined = [], []
    for name, value in values.items():
        value = value.item() if isinstance(value, np.generic) else value
        is_picture = isinstance(value, Image) or (value is None and name.endswith("image"))
        if is_literal(value) and not is_picture:
            written.append(f"{name}={literal(value)}")
            continue
        written.append(f"{name}={name}")
        source = f'load_image("{name}.png")' if is_picture else f"...  # the {type(value).__name__} of the run"
        defined.append(f"{name} = {source}")
    return written, defined


def is_literal(value: Any) -> bool:
    """Whether Python reads a value back from what `repr` writes."""
    if isinstance(value, dict):
        return all(is_literal(part) for item in value.items() for part in item)
    if isinstance(value, list | tuple):
        return all(is_literal(part) for part in value)
    return value is None or type(value) in (str, int, bool) or (type(value) is float and math.isfinite(value))


def literal(value: Any) -> str:
    """A value in Python, texts in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def reward_rows(
    rewards: Mapping[str, float | None], rounds: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]
) -> list[RewardRow]:
    """A line for each reward function, if there was a round."""
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
    """The papers of what flow matching steps by."""
    window = [MIX_GRPO] if config.sde_window_size is not None else []
    return [FLOW_CPS if config.sde_type == "cps" else FLOW_GRPO, *window]
