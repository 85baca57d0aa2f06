"""Prompts of https://huggingface.co/papers/2305.13301, and templates."""

import itertools
import string
from collections.abc import Sequence
from importlib.resources import files

from ddpo_trl.prompts.sources import PromptPair


COMMON_ANIMALS = (
    "cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep", "deer", "cow", "goat", "lion",
    "tiger", "bear", "raccoon", "fox", "wolf", "lizard", "beetle", "ant", "butterfly", "fish", "shark", "whale",
    "dolphin", "squirrel", "mouse", "rat", "snake", "turtle", "frog", "chicken", "duck", "goose", "bee", "pig",
    "turkey", "fly", "llama", "camel", "bat", "gorilla", "hedgehog", "kangaroo",
)  # fmt: skip

ACTIVITIES = ("washing dishes", "riding a bike", "playing chess")


def common_animals() -> list[str]:
    """Return the 45 common animals that the paper trains on for aesthetic quality and alignment."""
    return list(COMMON_ANIMALS)


def imagenet_animals() -> list[str]:
    """Return the 398 animals of ImageNet, in its order, that the paper trains on for (in)compressibility."""
    text = files("ddpo_trl").joinpath("assets/prompts/imagenet_animals.txt").read_text()
    return [line for line in text.splitlines() if not line.startswith("#")]


def animal_activities() -> list[PromptPair]:
    """
    Return the 135 prompts of the paper's alignment task, each common animal with each of three activities, with their
    words as metadata: `("a cat washing dishes", {"animal": "cat", "activity": "washing dishes"})`.
    """
    pairs = fill_template("{animal} {activity}", animal=COMMON_ANIMALS, activity=ACTIVITIES)
    return [(f"{'an' if prompt[0] in 'aeiou' else 'a'} {prompt}", metadata) for prompt, metadata in pairs]


def fill_template(template: str, **words: Sequence[str]) -> list[PromptPair]:
    """
    Return all prompts of a template, with the words of each as its metadata.

    ```python
    >>> from ddpo_trl.prompts import fill_template
    >>> fill_template("a {color} {thing}", color=["red", "blue"], thing=["car"])
    [('a red car', {'color': 'red', 'thing': 'car'}), ('a blue car', {'color': 'blue', 'thing': 'car'})]
    ```

    Args:
        template (`str`):
            Text with names in braces.
        **words (`Sequence[str]`):
            Words for each name.

    Returns:
        `list[tuple[str, dict[str, str]]]`, one per combination; the last name changes fastest.

    Raises:
        `ValueError`: If the template has other names, or there are no words for one.
        `TypeError`: If a string is passed instead of a list.
    """
    names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    if names != words.keys():
        raise ValueError(
            f"template is {template!r} with the names {sorted(names)}, but words are given for {sorted(words)}; pass "
            "words for each of its names and no others."
        )
    for name, choices in words.items():
        if isinstance(choices, str):
            raise TypeError(f"{name} is {choices!r}; pass a list of words, even if it is only one.")
        if not choices:
            raise ValueError(f"{name} is empty; pass at least one word.")
    combinations = (dict(zip(words, choice, strict=True)) for choice in itertools.product(*words.values()))
    return [(template.format(**chosen), chosen) for chosen in combinations]
