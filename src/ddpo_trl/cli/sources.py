"""Rewards and prompts by their names on a command line."""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from datasets import Dataset

from ddpo_trl import rewards
from ddpo_trl.cli.importing import import_object
from ddpo_trl.emoji import emoji_captions
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


Prompts: TypeAlias = PromptFunction | Dataset | Sequence[Any]

# Without the base class and those that need an argument.
BUILT_IN_REWARDS = sorted({*rewards.__all__} - {"RewardModel", "RemoteReward", "VLMJudge"})

PROMPT_LISTS: dict[str, Callable[[], Sequence[str] | Sequence[PromptPair]]] = {
    "emoji": emoji_captions,
    "common_animals": common_animals,
    "imagenet_animals": imagenet_animals,
    "animal_activities": animal_activities,
}


def reward_spec(name: str) -> str:
    """Return `module:function` of a reward, including the built-in ones by name."""
    if name in BUILT_IN_REWARDS:
        return f"{rewards.__name__}:{name}"
    if ":" not in name:
        meant = did_you_mean(name, BUILT_IN_REWARDS) or f" Built-in rewards are {', '.join(BUILT_IN_REWARDS)}."
        raise ValueError(f"{name!r} is not a built-in reward, module:function or the URL of a reward server.{meant}")
    return name


def load_reward(name: str) -> RewardFunction:
    """Load a built-in reward, the client of a `ddpo-trl serve-reward` by its URL, or `module:function`."""
    if name.startswith(("http://", "https://")):
        return RemoteReward(name)
    function: RewardFunction = import_object(reward_spec(name))
    return function


def load_prompt_source(name: str, column: str | None = None, split: str = "train") -> Prompts:
    """
    Load prompts for [`DDPOTrainer`]: one of [`PROMPT_LISTS`]; `module:name` of a function that returns `(prompt,
    metadata)`, of a list or of a dataset; or a file or dataset, see [`~ddpo_trl.prompts.load_prompts`].
    """
    if name in PROMPT_LISTS:
        return PROMPT_LISTS[name]()
    if ":" in name and not os.path.exists(name):
        source: Prompts = import_object(name)
        return source
    if "/" not in name and not os.path.splitext(name)[1] and not os.path.isdir(name):
        meant = did_you_mean(name, PROMPT_LISTS) or f" Lists are {', '.join(PROMPT_LISTS)}."
        raise ValueError(f"{name!r} is not a file, a dataset (owner/name), module:function or a list.{meant}")
    return load_prompts(name, column, split)


def first_prompts(source: Prompts, count: int) -> list[PromptPair]:
    """Return the first prompts of a source with their metadata, or all if there are fewer."""
    if callable(source):
        return [source() for _ in range(count)]
    pairs = prompt_pairs(source, "prompts")
    return [pairs[index] for index in range(min(count, len(pairs)))]
