"""Weights that a reward model reads itself, from a file or the Hub; nothing is unpickled but tensors."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file


SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def check_weights(argument: str, source: str) -> None:
    """
    Finds a misspelt file when it is named, not when it is needed.

    Args:
        argument (`str`):
            What the source was given as, for the message.
        source (`str`):
            A file whose name ends in one of `SUFFIXES`, or an id of the Hub, about which nothing is asked.

    Raises:
        `ValueError`: If it is a file that does not exist.
    """
    if source.endswith(SUFFIXES) and not Path(source).is_file():
        raise ValueError(
            f"{argument} is {source!r}, and there is no such file; give a file that exists, or the id of a Hub "
            "repository."
        )


def read_weights(source: str, filename: str) -> dict[str, Any]:
    """
    Reads weights to the CPU.

    Args:
        source (`str`):
            A file whose name ends in one of `SUFFIXES`, or else a Hub repository, whose file is downloaded once.
        filename (`str`):
            The file in that repository.

    Returns:
        `dict[str, Any]`: What the file holds: tensors by name, or containers of them.

    Raises:
        `pickle.UnpicklingError`: If a PyTorch file holds something besides tensors and containers; none of it is run.
    """
    path = source if source.endswith(SUFFIXES) else hf_hub_download(source, filename)
    if path.endswith(".safetensors"):
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
