"""Calls of a pipeline's `encode_prompt`: split by sample, and identified by what they encode."""

import copy
import inspect
from collections.abc import Hashable

from ddpo_trl.policy.values import by_value, is_setting


# Prefixes of arguments of `encode_prompt` that hold one value per sample if they are lists; others are settings.
PER_SAMPLE_PREFIXES = ("prompt", "negative_prompt")


def split_by_sample(call: inspect.BoundArguments) -> list[inspect.BoundArguments] | None:
    """Return one call per prompt; `None` for a call without a list of prompts, or with one image for all of them."""
    prompts = call.arguments.get("prompt")
    if not isinstance(prompts, list) or not is_known_by_value(call):
        return None
    per_sample = per_sample_arguments(call)
    if not all(name in per_sample or is_setting(value) for name, value in call.arguments.items()):
        return None
    calls = [copy.copy(call) for _ in prompts]
    for index, one in enumerate(calls):
        one.arguments = {
            name: [value[index]] if name in per_sample else value for name, value in call.arguments.items()
        }
    return calls


def per_sample_arguments(call: inspect.BoundArguments) -> set[str]:
    """
    Return the names of the arguments of a call with a list of prompts that hold one value per prompt.

    Texts are recognized by the argument's name. Other lists may hold several images of every sample instead, so their
    embeddings are later compared with those of a batch.
    """
    count = len(call.arguments["prompt"])
    return {
        name
        for name, value in call.arguments.items()
        if isinstance(value, list)
        and (name.startswith(PER_SAMPLE_PREFIXES) or (len(value) == count and not is_setting(value)))
    }


def is_about_texts(call: inspect.BoundArguments) -> bool:
    """Return `True` if a call has only texts and settings as arguments."""
    return all(is_setting(value) for value in call.arguments.values())


def is_known_by_value(call: inspect.BoundArguments) -> bool:
    """Return `True` if all arguments of a call can be compared by value, and none is an embedding already."""
    return not any(
        "embeds" in name and value is not None or by_value(value) is None for name, value in call.arguments.items()
    )


def call_key(call: inspect.BoundArguments) -> Hashable:
    """Return a key that identifies a call."""
    return tuple((name, by_value(value)) for name, value in call.arguments.items())


def images_key(call: inspect.BoundArguments) -> Hashable:
    """Return a key that identifies a call except for texts and settings."""
    return tuple(by_value(value) for value in call.arguments.values() if not is_setting(value))


def settings_key(call: inspect.BoundArguments) -> Hashable:
    """Return a key that identifies a call except for its samples."""
    per_sample = per_sample_arguments(call)
    return repr({name: "" if name in per_sample else value for name, value in call.arguments.items()})
