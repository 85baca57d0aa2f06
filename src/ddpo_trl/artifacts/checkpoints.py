"""Checkpoints between rounds: complete or absent, of one run per folder, and checked before anything is loaded."""

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


# Folder in which a checkpoint is written. The name is not a checkpoint's, so that a partial one is never resumed;
# Trainer does not push names that begin with an underscore to the Hub.
STAGING_NAME = "_unfinished"

# Folder for the files of earlier runs, with a number. Not pushed to the Hub either.
EARLIER_NAME = "_earlier"

CONFIG_NAME = "ddpo_config.json"  # the settings
PLAN_NAME = "batch_plan.json"  # the sizes of a round
RUN_NAME = "run.json"  # rewards, prompts and the optimizer

# Parts of a checkpoint in addition to weights, with their files for DeepSpeed, FSDP and one process.
STATES = {
    "random states": ["rng_state*.pth"],
    "optimizer": ["optimizer*", "global_step*"],
    "learning rate schedule": ["scheduler.pt", "global_step*"],
}


def last_checkpoint(directory: str) -> str | None:
    """Return the checkpoint with the highest step in a folder; `None` if there is none, or no folder."""
    return get_last_checkpoint(directory) if os.path.isdir(directory) else None


def what_is_left(directory: str, resumed: str | None = None) -> str:
    """
    Return the sentence that goes with the error of a run that ended early: from where it can be resumed.

    `resumed` is the checkpoint that the run was resumed from. The error may be about it, so it is not called intact.
    """
    checkpoint = last_checkpoint(directory)
    if resumed is not None and checkpoint == resumed:
        return f"No round was saved since {checkpoint}, which was resumed."
    if checkpoint is None:
        return f"No round was saved: there is no checkpoint in {directory}."
    return f"{checkpoint} is intact: train(resume_from_checkpoint=True) continues from there."


def to_resume(asked: str | os.PathLike[str] | bool | None, output_dir: str, own_folder: bool = False) -> str | None:
    """
    Return the checkpoint to resume from; `None` for a new run.

    Args:
        asked (`str`, `os.PathLike` or `bool`, *optional*):
            Folder of a checkpoint, or `True` for the last one in `output_dir`, if there is one.
        output_dir (`str`), own_folder (`bool`, *optional*, defaults to `False`):
            Directory of the run, and whether the checkpoints in it are the caller's own.

    Raises:
        `ValueError`: If it is not a checkpoint that can be resumed, or if `output_dir` contains another run.
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
    Return a checkpoint's path without links and trailing slash. A checkpoint in `output_dir` gets the path that
    Trainer gives it, by which the best one is recognized when old ones are removed.
    """
    real = os.path.realpath(checkpoint)
    own = os.path.join(output_dir, os.path.basename(real))
    return own if os.path.realpath(own) == real else real


def check_is_checkpoint(folder: str) -> None:
    """Raise a `ValueError` if a folder is not a checkpoint; name one that is in it or next to it."""
    if os.path.isfile(os.path.join(folder, TRAINER_STATE_NAME)):
        return
    near = last_checkpoint(folder) or last_checkpoint(os.path.dirname(os.path.abspath(folder)))
    example = f", such as {near}" if near else ""
    raise ValueError(
        f"resume_from_checkpoint is {folder!r}, which is not a checkpoint: it has no {TRAINER_STATE_NAME}. Give the "
        f"folder of a checkpoint{example}; or True (on the command line `--resume` without a value) for the last one "
        "in output_dir."
    )


def check_is_resumable(checkpoint: Path) -> None:
    """Raise a `ValueError` if a checkpoint lacks a part, or lies inside a round."""
    weights = "its weights can only start another run (`pipeline.load_lora_weights(checkpoint)`)"
    for name in (CONFIG_NAME, PLAN_NAME, RUN_NAME):
        if not (checkpoint / name).is_file():
            raise ValueError(f"{checkpoint} was not written by DDPOTrainer: it has no {name}; {weights}.")
    for part, patterns in STATES.items():  # Trainer would continue with a new one, without a warning
        if not any(list(checkpoint.glob(pattern)) for pattern in patterns):
            raise ValueError(f"{checkpoint} has no {part} (as with save_only_model=True): {weights}.")
    plan = read_json(checkpoint / PLAN_NAME)
    step = read_json(checkpoint / TRAINER_STATE_NAME)["global_step"]
    if step % (updates := plan["num_ppo_epochs"] * plan["num_mini_batches"]):
        raise ValueError(
            f"{checkpoint} lies inside a round of {updates} optimizer steps, whose samples are not part of it. Resume "
            f"from one whose number is a multiple of {updates}; {weights}."
        )


def read_json(path: Path) -> Any:
    """Read a file of a checkpoint; raise a `ValueError` with its path if it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Resume from an earlier checkpoint.") from error


def check_is_free(output_dir: str, checkpoint: str | None) -> None:
    """Raise a `ValueError` if a new run, or one that is resumed from elsewhere, would be mixed with another run."""
    last = last_checkpoint(output_dir)
    if last is None or (checkpoint is not None and os.path.samefile(os.path.dirname(checkpoint) or ".", output_dir)):
        return
    raise ValueError(
        f"output_dir is {output_dir!r}, which contains another run ({os.path.basename(last)} is its last checkpoint): "
        "resume that one with resume_from_checkpoint=True (`--resume`), set another output_dir, or move the folder "
        "away."
    )


def make_room(output_dir: str, checkpoint: str | None, names: Iterable[str]) -> str | None:
    """
    Move the files of an earlier run that would be mixed with a new or resumed one to a subfolder.

    These are the checkpoints after the one to resume from (all, without one), since the run continues differently, and
    other files and folders by their `names`. Return the sentence that reports it; `None` if there was nothing to move.
    """
    step = -1 if checkpoint is None else read_json(Path(checkpoint, TRAINER_STATE_NAME))["global_step"]
    names = [*checkpoints_after(output_dir, step), *names]
    present = [name for name in names if os.path.exists(os.path.join(output_dir, name))]
    if not present:
        return None
    candidates = (os.path.join(output_dir, f"{EARLIER_NAME}-{number}") for number in itertools.count(1))
    target = next(path for path in candidates if not os.path.exists(path))
    os.makedirs(target)
    for name in present:
        os.rename(os.path.join(output_dir, name), os.path.join(target, name))
    return f"Files of an earlier run in {output_dir} ({', '.join(present)}) were moved to {target}."


def checkpoints_after(directory: str, step: int) -> list[str]:
    """Return the names of the checkpoints in a folder whose number is above `step`."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    numbers = {name: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", name) for name in names}
    return sorted(name for name, number in numbers.items() if number and int(number[1]) > step)


def publish(staged: str, final: str) -> None:
    """
    Rename a complete checkpoint to its final name, which a crash can't interrupt halfway.

    Both paths are on the same file system; an existing checkpoint is replaced. The contents are synchronized to disk
    first: a name that survives a power failure must not stand for files that don't.
    """
    for directory, _, files in os.walk(staged):
        for name in files:
            synchronize(os.path.join(directory, name))
        synchronize(directory)
    if os.path.isdir(final):
        os.rename(final, f"{staged}.replaced")
    os.rename(staged, final)
    synchronize(os.path.dirname(final))
    shutil.rmtree(f"{staged}.replaced", ignore_errors=True)


def synchronize(path: str) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
