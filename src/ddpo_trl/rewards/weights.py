"""Weights that transformers does not load itself: files in other formats, and the heads of predictors."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear


SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")

# Weight and bias of each layer of a head: linear layers that rate an embedding, without activations in between.
Head = list[tuple[Tensor, Tensor]]


def check_weights(argument: str, source: str) -> None:
    """
    Raise at construction if a file of weights does not exist. The Hub is not asked.

    Args:
        argument (`str`):
            Name of the argument, for the error message.
        source (`str`):
            File, whose name ends in one of `SUFFIXES`, or Hub id.

    Raises:
        `ValueError`: If it is a file that does not exist.
    """
    if source.endswith(SUFFIXES) and not Path(source).is_file():
        raise ValueError(
            f"{argument} is {source!r}, and there is no such file; pass a file that exists, or the id of a Hub "
            "repository."
        )


def read_weights(source: str, filename: str) -> dict[str, Any]:
    """
    Read weights to the CPU.

    Args:
        source (`str`):
            File, whose name ends in one of `SUFFIXES`, or Hub id.
        filename (`str`):
            Name of the file in the Hub repository.

    Raises:
        `pickle.UnpicklingError`: If a PyTorch file contains other objects than tensors and containers; none of their
            code is run.
    """
    path = source if source.endswith(SUFFIXES) else hf_hub_download(source, filename)
    if path.endswith(".safetensors"):
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def renamed(name: str, names: Mapping[str, str]) -> str:
    """Return a name after all replacements of `names`, by regular expression, in order."""
    for pattern, replacement in names.items():
        name = re.sub(pattern, replacement, name)
    return name


def head_of(weights: Mapping[str, Tensor], layers: Sequence[str], device: torch.device) -> Head:
    """Return the head with these linear layers, in float32, from `{layer}.weight` and `{layer}.bias` of each."""
    return [
        (weights[f"{layer}.weight"].to(device).float(), weights[f"{layer}.bias"].to(device).float())
        for layer in layers
    ]


def predictor_head(
    weights: Mapping[str, Tensor], layers: Sequence[str], device: torch.device, head: str, model: str, width: int
) -> Head:
    """
    Return the head of a predictor.

    Args:
        weights, layers, device:
            See [`head_of`].
        head, model (`str`):
            Sources of the head and of its model, for error messages.
        width (`int`):
            Width of the model's embeddings.

    Raises:
        `ValueError`: If the weights are not exactly those of the layers, or the width is different.
    """
    expected = sorted(f"{layer}.{part}" for layer in layers for part in ("weight", "bias"))
    if sorted(weights) != expected:
        raise ValueError(
            f"head is {head!r}, which holds {sorted(weights)}; a head of this predictor holds {expected}."
        )
    own_width = weights[f"{layers[0]}.weight"].shape[1]
    if own_width != width:
        raise ValueError(
            f"head is {head!r} and takes {own_width} numbers per image, but model, {model!r}, gives {width}; pass the "
            "model that the head was trained on."
        )
    return head_of(weights, layers, device)


def rate(head: Head, embeddings: Tensor) -> Tensor:
    """Return the ratings `(B,)` of `(B, D)` embeddings."""
    for weight, bias in head:
        embeddings = linear(embeddings, weight, bias)
    return embeddings.squeeze(1)
