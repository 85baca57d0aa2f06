"""Checkpoints between rounds: complete or absent, of one run in one folder, and checked before anything is loaded."""

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint


# Beside the checkpoints; a name that is not theirs, so that no one takes what is in it for one. Trainer leaves names
# that begin so out of what it pushes to the Hub.
STAGING_NAME = "_unfinished"

CONFIG_NAME = "ddpo_config.json"  # the settings, beside the weights

PLAN_NAME = "batch_plan.json"

# What a checkpoint holds beside weights, and its files: DeepSpeed's, FSDP's and those of one process.
STATES = {
    "random states": ["rng_state*.pth"],
    "optimizer": ["optimizer*", "global_step*"],
    "learning rate schedule": ["scheduler.pt", "global_step*"],
}

# Where the record of earlier runs goes, with a number. Not pushed to the Hub either.
ASIDE = "_earlier"


def last_checkpoint(directory: str) -> str | None:
    """The checkpoint with the highest step in a folder; `None` if there is none, or no folder."""
    return get_last_checkpoint(directory) if os.path.isdir(directory) else None


def what_is_left(directory: str, resumed: str | None = None) -> str:
    """
    Return the sentence that goes with the error of a run that ended early: where it can be resumed.

    Args:
        directory (`str`):
            Of the run.
        resumed (`str`, *optional*):
            The checkpoint that it went on from. It may be what the error is about, so nothing is said in its favor.
    """
    checkpoint = last_checkpoint(directory)
    if resumed is not None and checkpoint == resumed:
        return f"No round was saved since {checkpoint}, which was resumed."
    if checkpoint is None:
        return f"No round was saved: there is no checkpoint in {directory}."
    return f"{checkpoint} is intact: train(resume_from_checkpoint=True) continues from there."


def to_resume(asked: str | os.PathLike[str] | bool | None, output_dir: str, own_folder: bool = False) -> str | None:
    """
    The checkpoint that a run goes on from, by what was asked for; `None` if it begins.

    Args:
        asked (`str`, `os.PathLike` or `bool`, *optional*):
            A checkpoint's folder, or `True` for the last one in `output_dir`, if there is one.
        output_dir (`str`):
            Of the run.
        own_folder (`bool`, *optional*, defaults to `False`):
            Whether checkpoints in it are the caller's own.

    Raises:
        `ValueError`: If it is no checkpoint, or none that can be resumed, or if `output_dir` holds another run.
    """
    checkpoint = last_checkpoint(output_dir) if asked is True else os.fspath(asked) if asked else None
    if checkpoint is not None:
        check_is_checkpoint(checkpoint)
        checkpoint = as_in(output_dir, checkpoint)
        check_is_resumable(Path(checkpoint))
    if not own_folder:
        check_is_free(output_dir, checkpoint)
    return checkpoint


def as_in(output_dir: str, checkpoint: str) -> str:
    """
    A checkpoint's path without links or a slash at its end, so that its parent is where the others are. One in
    `output_dir` gets the path that Trainer gives it there, by which it is known when old checkpoints are removed.
    """
    real = os.path.realpath(checkpoint)
    own = os.path.join(output_dir, os.path.basename(real))
    return own if os.path.realpath(own) == real else real


def check_is_checkpoint(folder: str) -> None:
    """Raises a `ValueError` that says what is meant instead."""
    argument = f"resume_from_checkpoint is {folder!r}"
    if not os.path.isdir(folder):
        if folder.lower() in ("true", "false", "none"):
            raise ValueError(
                f"{argument}, a text. Give True, False or None without quotes (on the command line `--resume` without "
                "a value), or the folder of a checkpoint."
            )
        there = last_checkpoint(os.path.dirname(os.path.abspath(folder)))
        hint = f" The last one beside it is {there}." if there else ""
        raise ValueError(f"{argument}, which is no folder. Give that of a checkpoint.{hint}")
    if os.path.isfile(os.path.join(folder, TRAINER_STATE_NAME)):
        return
    if inside := last_checkpoint(folder):
        raise ValueError(
            f"{argument}, a folder that holds checkpoints and is none. Give one of them, such as {inside}, or "
            "resume_from_checkpoint=True for the last one in output_dir."
        )
    raise ValueError(f"{argument}, which is no checkpoint: it has no {TRAINER_STATE_NAME}. Give the folder of one.")


def check_is_resumable(checkpoint: Path) -> None:
    """Raises a `ValueError` if a checkpoint lacks a part that goes on, or lies inside a round."""
    weights = "its weights can start another run (`pipeline.load_lora_weights(checkpoint)`), but can't go on with this"
    if not (checkpoint / PLAN_NAME).is_file():
        raise ValueError(f"{checkpoint} was not written by DDPOTrainer: it has no {PLAN_NAME}; {weights}.")
    for what, patterns in STATES.items():  # Trainer would go on without a word, with a new one
        if not any(list(checkpoint.glob(pattern)) for pattern in patterns):
            raise ValueError(f"{checkpoint} holds no {what} (as with save_only_model=True): {weights}.")
    plan = read_json(checkpoint / PLAN_NAME)
    step = read_json(checkpoint / TRAINER_STATE_NAME)["global_step"]
    if step % (updates := plan["num_ppo_epochs"] * plan["num_mini_batches"]):
        raise ValueError(
            f"{checkpoint} lies inside a round of {updates} optimizer steps, whose samples are not part of it. Resume "
            f"from one whose number is a multiple of {updates}; {weights}."
        )


def read_json(path: Path) -> Any:
    """
    Read a file of a checkpoint.

    Raises:
        `ValueError`: If it is damaged, with its path.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Resume from an earlier checkpoint.") from error


def check_is_free(output_dir: str, checkpoint: str | None) -> None:
    """Raises a `ValueError` if a run that goes on from `checkpoint`, or begins, would be mixed with another one."""
    last = last_checkpoint(output_dir)
    if last is None or (checkpoint is not None and os.path.samefile(os.path.dirname(checkpoint) or ".", output_dir)):
        return
    raise ValueError(
        f"output_dir is {output_dir!r}, which holds another run ({os.path.basename(last)} is its last checkpoint): "
        "resume that one with resume_from_checkpoint=True (`--resume`), set another output_dir, or move the folder "
        "away."
    )


def checkpoints_after(directory: str, step: int) -> list[str]:
    """Names of the checkpoints in a folder whose number is above `step`."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    numbers = {name: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", name) for name in names}
    return sorted(name for name, number in numbers.items() if number and int(number[1]) > step)


def set_aside(directory: str, names: Iterable[str]) -> str | None:
    """
    Moves what an earlier run left in a folder into one of its own inside.

    Args:
        directory (`str`):
            The folder.
        names (`Iterable[str]`):
            Files and folders in it; those that are missing are left out.

    Returns:
        `str`: Where they are now; `None` if there was nothing.
    """
    there = [name for name in names if os.path.exists(os.path.join(directory, name))]
    if not there:
        return None
    candidates = (os.path.join(directory, f"{ASIDE}-{number}") for number in itertools.count(1))
    aside = next(path for path in candidates if not os.path.exists(path))
    os.makedirs(aside)
    for name in there:
        os.rename(os.path.join(directory, name), os.path.join(aside, name))
    return aside


def make_room(output_dir: str, checkpoint: str | None, record: Iterable[str]) -> str | None:
    """
    Moves aside what a run that begins, or goes on from a checkpoint, would mix with its own or write over.

    Args:
        output_dir (`str`):
            Of the run.
        checkpoint (`str`, *optional*):
            Checkpoints after this one are of a run that went on otherwise. Without it all are.
        record (`Iterable[str]`):
            Names of further files and folders of a run that is over.

    Returns:
        `str`: What was done, in words; `None` if there was nothing to do.
    """
    step = -1 if checkpoint is None else read_json(Path(checkpoint, TRAINER_STATE_NAME))["global_step"]
    names = [*checkpoints_after(output_dir, step), *record]
    aside = set_aside(output_dir, names)
    return aside and f"What an earlier run left in {output_dir} ({', '.join(os.listdir(aside))}) is now in {aside}."


def moved_best(checkpoint: str, best_step: int | None) -> str | None:
    """The best checkpoint beside the one that is resumed, whatever path was written down; `None` if it isn't there."""
    path = os.path.join(os.path.dirname(checkpoint), f"{PREFIX_CHECKPOINT_DIR}-{best_step}")
    return path if os.path.isdir(path) else None


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
            synchronize(os.path.join(directory, name))
        synchronize(directory)
    parent = os.path.dirname(final)
    if os.path.isdir(final):
        os.rename(final, f"{staged}.replaced")
    os.rename(staged, final)
    synchronize(parent)
    shutil.rmtree(f"{staged}.replaced", ignore_errors=True)


def synchronize(path: str) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
