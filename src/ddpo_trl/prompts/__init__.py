"""Prompts: the paper's lists, files and Hub datasets, templates; and where a trainer draws them from."""

from ddpo_trl.prompts.lists import animal_activities, common_animals, fill_template, imagenet_animals
from ddpo_trl.prompts.loading import load_prompts
from ddpo_trl.prompts.sources import (
    PromptFunction,
    PromptPair,
    PromptSource,
    fingerprint,
    prompt_pairs,
    prompt_source,
)


__all__ = [
    "PromptFunction",
    "PromptPair",
    "PromptSource",
    "animal_activities",
    "common_animals",
    "fill_template",
    "fingerprint",
    "imagenet_animals",
    "load_prompts",
    "prompt_pairs",
    "prompt_source",
]
