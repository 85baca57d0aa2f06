"""Checkpoints between rounds: complete or absent, and honest about what a resumed run can't repeat."""

import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from transformers.trainer_utils import get_last_checkpoint


# Beside the checkpoints; a name that is not theirs, so that no one takes what is in it for one. Trainer leaves names
# that begin so out of what it pushes to the Hub.
STAGING_NAME = "_unfinished"

CONFIG_NAME = "ddpo_config.json"  # the settings, beside the weights

# Parts of the batch plan that may change on resume, with what then is no longer equal to the bit.
HARMLESS_CHANGES = {
    "num_processes": "images, by the rounding of other batches, and the composition of mini-batches",
    "per_device_sample_batch_size": "images, by the rounding of other batches",
    "num_sample_batches": "the composition of mini-batches",
    "per_device_train_batch_size": "gradients, by the rounding of other batches and another order",
    "one_pass": "gradients, by the rounding of their sums",
}

# What follows from the others, from the first prompt, or from the memory that is free.
NOT_COMPARED = {"two_passes_because", "gradient_bytes", "image_bytes", "embedding_bytes"}


def last_checkpoint(directory: str) -> str | None:
    """The checkpoint with the highest step in a folder; `None` if there is none, or no folder."""
    return get_last_checkpoint(directory) if os.path.isdir(directory) else None


def what_is_left(directory: str) -> str:
    """Return the sentence that goes with the error of a run that ended early: where it can be resumed."""
    checkpoint = last_checkpoint(directory)
    if checkpoint is None:
        return f"No round was saved: there is no checkpoint in {directory}."
    return f"{checkpoint} is intact: train(resume_from_checkpoint=True) continues from there."


def clear(directory: str) -> None:
    """Makes an empty folder, without what a killed run left there."""
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(directory)


def publish(staged: str, final: str) -> None:
    """
    Gives a finished checkpoint its name, in one step that a crash can't interrupt half-way.

    Args:
        staged (`str`):
            The folder in which it was written, on the same file system. Its contents reach the disk first: a name
            that survives a power failure must not stand for files that don't.
        final (`str`):
            Where it goes. A checkpoint that is there already makes way.
    """
    for directory, _, files in os.walk(staged):
        for name in files:
            synchronise(os.path.join(directory, name))
        synchronise(directory)
    parent = os.path.dirname(final)
    if os.path.isdir(final):
        os.rename(final, f"{staged}.replaced")
    os.rename(staged, final)
    synchronise(parent)
    shutil.rmtree(f"{staged}.replaced", ignore_errors=True)


def synchronise(path: str) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Iterator[str]:
    """
    What a resumed run does otherwise than the one that wrote the checkpoint, a sentence each.

    Args:
        saved, current (`Mapping[str, Any]`):
            The fields of both batch plans.

    Raises:
        `ValueError`: If the rounds have another number of optimizer steps, by which a checkpoint's round is found.
    """
    for name in ("num_ppo_epochs", "num_mini_batches"):
        if saved.get(name, current[name]) != current[name]:
            raise ValueError(
                f"{name} is {current[name]}, but the checkpoint was written with {saved[name]}: its number of "
                f"optimizer steps says nothing about this run's rounds. Set {name}={saved[name]} to resume."
            )
    for name, value in current.items():
        before = saved.get(name, value)
        if before == value or name in NOT_COMPARED:
            continue
        if name in HARMLESS_CHANGES:
            yield f"{name} is {value} and was {before}: no longer equal to the bit are {HARMLESS_CHANGES[name]}."
        else:
            yield f"{name} is {value} and was {before}: from here on this is another run."
