"""The prompts of https://huggingface.co/papers/2305.13301, and templates to make one's own."""

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
    """
    The 45 common animals on which the paper trains for aesthetic quality and alignment.

    Returns:
        `list[str]` of length 45: `["cat", "dog", ...]`.
    """
    return list(COMMON_ANIMALS)


def imagenet_animals() -> list[str]:
    """
    The 398 animals of ImageNet, on which the paper trains for (in)compressibility.

    Returns:
        `list[str]` of length 398: `["tench", "goldfish", ...]`, in the order of ImageNet's classes.
    """
    text = files("ddpo_trl").joinpath("assets/prompts/imagenet_animals.txt").read_text()
    return [line for line in text.splitlines() if not line.startswith("#")]


def animal_activities() -> list[PromptPair]:
    """
    The prompts of the paper's alignment task: every common animal with each of three activities.

    Returns:
        `list[tuple[str, dict]]` of length 135: `("a cat washing dishes", {"animal": "cat", "activity": "washing
        dishes"})` and so on.
    """
    pairs = fill_template("{animal} {activity}", animal=COMMON_ANIMALS, activity=ACTIVITIES)
    return [(f"{'an' if prompt[0] in 'aeiou' else 'a'} {prompt}", metadata) for prompt, metadata in pairs]


def fill_template(template: str, **words: Sequence[str]) -> list[PromptPair]:
    """
    All prompts of a template, with the words that made each as its metadata.

    ```python
    >>> from ddpo_trl.prompts import fill_template
    >>> fill_template("a {colour} {thing}", colour=["red", "blue"], thing=["car"])
    [('a red car', {'colour': 'red', 'thing': 'car'}), ('a blue car', {'colour': 'blue', 'thing': 'car'})]
    ```

    Args:
        template (`str`):
            With names in braces.
        **words (`Sequence[str]`):
            What each name is replaced by.

    Returns:
        `list[tuple[str, dict[str, str]]]`, one per combination; the last name changes fastest.

    Raises:
        `ValueError`: If the names of the template are not those of the words, or there are no words for one.
        `TypeError`: If a string is given where several are meant.
    """
    names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    if names != words.keys():
        raise ValueError(
            f"template is {template!r} with the names {sorted(names)}, but words are given for {sorted(words)}; give "
            "words for each of its names and no others."
        )
    for name, choices in words.items():
        if isinstance(choices, str):
            raise TypeError(f"{name} is {choices!r}; give a list of words, even if it is only one.")
        if not choices:
            raise ValueError(f"{name} is empty; give at least one word.")
    combinations = (dict(zip(words, choice, strict=True)) for choice in itertools.product(*words.values()))
    return [(template.format(**chosen), chosen) for chosen in combinations]
