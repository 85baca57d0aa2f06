"""Model card: `README.md` with metadata, example code, results and pictures, pushed to the Hub with the weights."""

import os
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

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

# Pictures in the card, with their text alternatives.
PICTURES = {
    "Mean reward of each round against reward queries": record.REWARD_CURVE_NAME,
    "The same prompts and seeds before and after training": record.BEFORE_AFTER_NAME,
}

# Settings shown in the card; ddpo_config.json contains all of them.
SETTINGS = [
    "loss_type", "learning_rate", "num_inference_steps", "guidance_scale", "train_timestep_range", "cliprange",
    "log_prob_reduction", "advantage_normalization", "kl_coef", "seed",
]  # fmt: skip
DIFFUSION_SETTINGS = ["eta"]
FLOW_SETTINGS = ["sde_type", "noise_level"]


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
        model_name, repo_id (`str`):
            Heading of the card; Hub id or path to load the model from.
        prompt (`str`), inputs (`Mapping[str, Any]`):
            Prompt of the example, with its values of `config.pipeline_inputs`.
        tags (`Sequence[str]`):
            Tags of the metadata, in addition to those derived from the pipeline.
        rewards (`Mapping[str, float | None]`):
            Weight of each reward function; `None` for those used in evaluation only.
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
    gallery = fill_gallery(Path(directory))
    card_data = ModelCardData(
        library_name="diffusers",
        base_model=base_model,
        base_model_relation=("adapter" if is_lora else "finetune") if base_model else None,
        pipeline_tag=task,
        tags=[*tags, task, *([LORA_TEMPLATE_TAG] if is_lora else [])],
        datasets=dataset_name,
        widget=gallery or None,
        **license_of(base_model),
    )
    rounds = [log for log in log_history if "reward" in log]
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
        gallery=gallery,
        pictures=[picture for picture in PICTURES.items() if Path(directory, picture[1]).is_file()],
        dataset_name=dataset_name,
        reward_table=reward_table(rewards, log_history),
        reward_queries=int(rounds[-1]["episode"]) if rounds else 0,
        settings={name: vars(config)[name] for name in settings},
        loss_type=config.loss_type,
        versions={package: version(package) for package in PACKAGES},
        paper=paper,
        sde_type=config.sde_type if is_flow else None,
        has_window=is_flow and config.sde_window_size is not None,
    ).save(Path(directory) / "README.md")


def fill_gallery(directory: Path) -> list[dict[str, Any]]:
    """
    Copy images of the first fixed prompts, before training and now, to a folder where later ones overwrite them.
    Return the entries of the card's widget: prompts, and paths relative to the directory.
    """
    folders = sorted(path.parent for path in directory.glob(f"{record.SAMPLES_FOLDER}/*/{record.SAMPLES_NAME}"))
    if len(folders) < 2:
        return []
    before, after = (record.fixed_images(folder) for folder in (folders[0], folders[-1]))
    first_of_prompt = {key[0]: key for key in reversed(after) if key in before}
    shared = [key for key in after if key in first_of_prompt.values()][:GALLERY_PROMPTS]
    (directory / GALLERY_FOLDER).mkdir(exist_ok=True)
    gallery = []
    for index, key in enumerate(shared):
        for moment, folder, entry in (("after", folders[-1], after[key]), ("before", folders[0], before[key])):
            film = (folder / entry["file"]).with_suffix(".gif")
            source = film if film.is_file() else folder / entry["file"]
            target = f"{GALLERY_FOLDER}/{index}-{moment}{source.suffix}"
            shutil.copyfile(source, directory / target)
            caption = key[0] if moment == "after" else f"{key[0]} (before training)"
            gallery.append({"text": caption, "output": {"url": target}})
    return gallery


def reward_table(rewards: Mapping[str, float | None], log_history: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the cells of the table of mean rewards, with its heading; empty before the first round."""
    rounds, evaluations = ([log for log in log_history if name in log] for name in ("reward", "eval_reward"))
    if not rounds:
        return []
    columns = [("first round", "", rounds[0]), ("last round", "", rounds[-1])]
    if evaluations:
        columns += [("first evaluation", "eval_", evaluations[0]), ("last evaluation", "eval_", evaluations[-1])]
    headings = ["mean reward", "weight", *(heading for heading, _, _ in columns)]
    rows = [headings, ["---"] * len(headings)]
    for name, weight in rewards.items():
        means = [log.get(f"{prefix}rewards/{name}/mean") for _, prefix, log in columns]
        shown = ["–" if mean is None else f"{mean:.4g}" for mean in means]
        rows.append([f"`{name}`", "not trained for" if weight is None else f"{weight:g}", *shown])
    return rows
