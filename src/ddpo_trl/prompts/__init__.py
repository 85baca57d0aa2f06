"""Prompts: lists of the paper, templates, files and Hub datasets, and the sources that a trainer draws from."""

from ddpo_trl.prompts.lists import animal_activities, common_animals, fill_template, imagenet_animals
from ddpo_trl.prompts.loading import load_prompts
from ddpo_trl.prompts.sources import (
    FunctionPrompts,
    PromptFunction,
    PromptKeyFunction,
    PromptPair,
    PromptSource,
    ShuffledPrompts,
    check_inputs,
    default_prompt_key,
    fingerprint,
    prompt_keys,
    prompt_pairs,
    prompt_source,
)


__all__ = [
    "FunctionPrompts",
    "PromptFunction",
    "PromptKeyFunction",
    "PromptPair",
    "PromptSource",
    "ShuffledPrompts",
    "animal_activities",
    "check_inputs",
    "common_animals",
    "default_prompt_key",
    "fill_template",
    "fingerprint",
    "imagenet_animals",
    "load_prompts",
    "prompt_keys",
    "prompt_pairs",
    "prompt_source",
]
