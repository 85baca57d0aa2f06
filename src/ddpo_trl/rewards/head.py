"""The head of a predictor: linear layers that rate an embedding, float32, without activations in between."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear


# Weight and bias of each layer.
Head = list[tuple[Tensor, Tensor]]


def head_of(weights: Mapping[str, Tensor], layers: Sequence[str], device: torch.device) -> Head:
    """
    The layers of these names, in this order.

    Args:
        weights (`Mapping[str, torch.Tensor]`):
            With `{layer}.weight` and `{layer}.bias`.
        layers (`Sequence[str]`):
            Names of the linear layers.
        device (`torch.device`):
            Where to.
    """
    return [
        (weights[f"{layer}.weight"].to(device).float(), weights[f"{layer}.bias"].to(device).float())
        for layer in layers
    ]


def check_head(weights: Mapping[str, Tensor], layers: Sequence[str], source: str) -> None:
    """
    Refuses weights that are not exactly those of a head.

    Args:
        weights, layers:
            As for [`head_of`].
        source (`str`):
            What they were read from, the argument `head`.

    Raises:
        `ValueError`: If there are others, or one is missing.
    """
    expected = sorted(f"{layer}.{part}" for layer in layers for part in ("weight", "bias"))
    if sorted(weights) != expected:
        raise ValueError(
            f"head is {source!r}, which holds {sorted(weights)}; a head of this predictor holds {expected}."
        )


def rate(head: Head, embeddings: Tensor) -> Tensor:
    """`(B,)` ratings of `(B, D)` embeddings."""
    for weight, bias in head:
        embeddings = linear(embeddings, weight, bias)
    return embeddings.squeeze(1)
