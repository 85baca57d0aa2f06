"""Pipelines, rewards and prompts by their names on a command line."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline

from ddpo_trl import rewards
from ddpo_trl.cli.importing import import_object
from ddpo_trl.emoji import emoji_captions, load_emoji_pipeline
from ddpo_trl.prompts import (
    PromptFunction,
    PromptPair,
    animal_activities,
    common_animals,
    imagenet_animals,
    load_prompts,
    prompt_pairs,
)
from ddpo_trl.rewards import RemoteReward
from ddpo_trl.rewards.function import RewardFunction
from ddpo_trl.suggestions import did_you_mean


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Their base class is no reward, and the other two take an argument: the one is named by its URL.
BUILT_IN_REWARDS = sorted({*rewards.__all__} - {"RewardModel", "RemoteReward", "VLMJudge"})

PROMPT_LISTS: dict[str, Callable[[], Sequence[str] | Sequence[PromptPair]]] = {
    "emoji": emoji_captions,
    "common_animals": common_animals,
    "imagenet_animals": imagenet_animals,
    "animal_activities": animal_activities,
}


def load_model(model: str, dtype: str = "float32") -> DiffusionPipeline:
    """
    Loads a pipeline, from safetensors only: other formats may be pickles, which run what code they like.

    Args:
        model (`str`):
            A folder, the id of a Hub repository, or `emoji`, the embedded pipeline.
        dtype (`str`, *optional*, defaults to `"float32"`):
            `"float32"`, `"bfloat16"` or `"float16"`.

    Raises:
        `ValueError`: For another dtype, and for what is neither a folder nor looks like an id.
        `OSError`: If there is no such repository, or no safetensors in it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; give float32, bfloat16 or float16.")
    if model == "emoji":
        return load_emoji_pipeline(DTYPES[dtype])
    if not os.path.isdir(model) and "/" not in model:
        raise ValueError(
            f"There is no folder {model!r}, and the id of a Hub repository has the form owner/name."
            + did_you_mean(model, ["emoji"])
        )
    return DiffusionPipeline.from_pretrained(model, dtype=DTYPES[dtype], use_safetensors=True)


def reward_spec(name: str) -> str:
    """
    `module:function` of a reward, that of a built-in one by its name.

    Raises:
        `ValueError`: If it is neither.
    """
    if name in BUILT_IN_REWARDS:
        return f"{rewards.__name__}:{name}"
    if ":" not in name:
        meant = did_you_mean(name, BUILT_IN_REWARDS) or f" Built in are {', '.join(BUILT_IN_REWARDS)}."
        raise ValueError(f"{name!r} is no module:function, no URL of a reward server and no built-in reward.{meant}")
    return name


def load_reward(name: str) -> RewardFunction:
    """
    Loads a reward function.

    Args:
        name (`str`):
            One of [`BUILT_IN_REWARDS`], the URL of a `ddpo-trl serve-reward`, or `module:function`; classes are made
            without arguments.

    Raises:
        `ValueError`: If there is no such function.
        `RuntimeError`: If its module raises an error when it is imported.
    """
    if name.startswith(("http://", "https://")):
        return RemoteReward(name)
    function: RewardFunction = import_object(reward_spec(name))
    return function


def load_prompt_source(
    name: str, column: str | None = None, split: str = "train"
) -> PromptFunction | Dataset | Sequence[Any]:
    """
    Loads prompts, as [`DDPOTrainer`] takes them.

    Args:
        name (`str`):
            One of [`PROMPT_LISTS`]; `module:name` of a function that returns `(prompt, metadata)`, of a list or of a
            dataset; or what [`~ddpo_trl.prompts.load_prompts`] takes.
        column, split:
            See [`~ddpo_trl.prompts.load_prompts`].

    Raises:
        `ValueError` or `OSError`: If there is nothing of that name.
        `RuntimeError`: If its module raises an error when it is imported.
    """
    if name in PROMPT_LISTS:
        return PROMPT_LISTS[name]()
    if ":" in name and not os.path.exists(name):
        source: PromptFunction | Dataset | Sequence[Any] = import_object(name)
        return source
    if "/" not in name and not os.path.splitext(name)[1] and not os.path.isdir(name):
        meant = did_you_mean(name, PROMPT_LISTS) or f" Lists are {', '.join(PROMPT_LISTS)}."
        raise ValueError(f"{name!r} is no file, no dataset (owner/name), no module:function and no list.{meant}")
    return load_prompts(name, column, split)


def first_prompts(source: PromptFunction | Dataset | Sequence[Any], count: int) -> list[PromptPair]:
    """The first prompts of what [`load_prompt_source`] gives, with their metadata; fewer if it has no more."""
    if callable(source):
        return [source() for _ in range(count)]
    pairs = prompt_pairs(source, "prompts")
    return [pairs[index] for index in range(min(count, len(pairs)))]
