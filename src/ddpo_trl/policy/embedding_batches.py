"""Embeddings of single prompts joined to a batch: the dimension of the samples in each, padding, and masks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class NotJoinable(Exception):
    """The embeddings of single prompts don't make up that of a batch in any supported way."""


def batch_dimensions(single: Any, pair: Any) -> Any:
    """
    Return the dimension of the samples for each tensor of an embedding; -1 if it has none.

    Args:
        single:
            Output of `encode_prompt` for a prompt.
        pair:
            Its output for the same prompt twice.

    Raises:
        [`NotJoinable`]: If a tensor does not grow from 1 to 2 in exactly one dimension.
    """
    match single, pair:
        case (tuple(), tuple()) if len(single) == len(pair):
            return tuple(batch_dimensions(*parts) for parts in zip(single, pair, strict=True))
        case (dict(), dict()) if single.keys() == pair.keys():
            return {name: batch_dimensions(single[name], pair[name]) for name in single}
        case (list(), list()) if len(pair) == 2 * len(single):
            return None
        case (Tensor(), Tensor()) if single.ndim == pair.ndim:
            grown = [dim for dim in range(single.ndim) if single.shape[dim] != pair.shape[dim]]
            if not grown:
                return -1
            if len(grown) == 1 and (single.shape[grown[0]], pair.shape[grown[0]]) == (1, 2):
                return grown[0]
        case _ if not isinstance(single, Tensor | list | tuple | dict):
            return None
    raise NotJoinable


def check_close(joined: Any, together: Any) -> None:
    """
    Compare embeddings up to rounding.

    Args:
        joined:
            Embeddings of single prompts, joined.
        together:
            Output of `encode_prompt` for all prompts at once.

    Raises:
        [`NotJoinable`]: If they differ.
    """
    match joined, together:
        case (tuple() | list(), tuple() | list()) if len(joined) == len(together):
            for parts in zip(joined, together, strict=True):
                check_close(*parts)
        case (dict(), dict()) if joined.keys() == together.keys():
            check_close(list(joined.values()), [together[name] for name in joined])
        case (Tensor(), Tensor()) if joined.shape == together.shape:
            digits = torch.finfo(together.dtype).eps ** 0.5 if together.is_floating_point() else 0.0
            if (joined.float() - together.float()).norm() > digits * together.float().norm():
                raise NotJoinable
        case _ if isinstance(together, Tensor | tuple | list | dict) or joined != together:
            raise NotJoinable


def join(values: Sequence[Any], ragged_example: Any = None, layout: Any = 0) -> Any:
    """
    Join the embeddings of single prompts to those of a batch.

    Tensors are concatenated, padded with zeros at the end of the dimension after that of the samples; lists are
    joined. Tensors without a sample's dimension must be equal for all prompts (FLUX's text ids), and stay as they are.

    Args:
        values (`Sequence`):
            Output of `encode_prompt` for each prompt.
        ragged_example (*optional*):
            Its output for two prompts of different lengths at once. Masks that it has and the single prompts don't
            are filled with ones.
        layout (*optional*):
            Output of [`batch_dimensions`]; samples are in the first dimension by default.

    Raises:
        `ValueError`: If a value differs between prompts and does not have one row per prompt.
    """
    first = values[0]
    match first:
        case tuple():
            columns = list(zip(*with_masks(values, ragged_example), strict=True))
            layouts = layout if isinstance(layout, tuple) else [0] * len(columns)
            return tuple(join(column, layout=own) for column, own in zip(columns, layouts, strict=True))
        case list():
            return [part for value in values for part in value]
        case dict():
            own_layout = layout if isinstance(layout, dict) else dict.fromkeys(first, 0)
            return {name: join([value[name] for value in values], layout=own_layout[name]) for name in first}
        case Tensor() if layout != -1 and first.ndim and all(value.shape[layout or 0] == 1 for value in values):
            return torch.cat(padded(values, layout or 0), dim=layout or 0)
        case Tensor() if all(torch.equal(value, first) for value in values):
            return first
        case _ if not isinstance(first, Tensor) and all(value == first for value in values):
            return first
    raise ValueError(
        f"encode_prompt returned {type(first).__name__} for single prompts that can't be joined to a batch: they "
        "differ and have not one row each."
    )


def padded(rows: Sequence[Tensor], dim: int = 0) -> list[Tensor]:
    """
    Pad the tokens of single samples with zeros at the end, up to the longest.

    Args:
        rows (`Sequence[torch.Tensor]` of shape `(1, L, ...)`):
            One sample each.
        dim (`int`):
            Dimension of the samples; that of the tokens is the next. 1 for `(layers, 1, L, ...)`.
    """
    if rows[0].ndim < dim + 2:
        return list(rows)
    longest = max(row.shape[dim + 1] for row in rows)
    if all(row.shape[dim + 1] == longest for row in rows):
        return list(rows)
    return [
        torch.cat(
            [row, row.new_zeros(*row.shape[: dim + 1], longest - row.shape[dim + 1], *row.shape[dim + 2 :])],
            dim=dim + 1,
        )
        for row in rows
    ]


def text_length(embeddings: Any) -> int:
    """Return the number of tokens of a single prompt's embedding."""
    first = embeddings[0] if isinstance(embeddings, tuple) else embeddings
    return first.shape[1] if isinstance(first, Tensor) and first.ndim > 1 else 0


def with_masks(embeddings: Sequence[tuple[Any, ...]], ragged_example: Any) -> Sequence[tuple[Any, ...]]:
    """Fill in masks of ones for single prompts where the example of different lengths has masks."""
    lengths = [text_length(embedding) for embedding in embeddings]
    if ragged_example is None or len(set(lengths)) == 1:
        return embeddings
    return [
        tuple(
            torch.ones(1, length, dtype=example.dtype, device=example.device)
            if value is None and isinstance(example, Tensor)
            else value
            for value, example in zip(embedding, ragged_example, strict=True)
        )
        for embedding, length in zip(embeddings, lengths, strict=True)
    ]


def check_mask(embeddings: Any, length: int) -> None:
    """
    Raise a `ValueError` if no mask marks the padding: a sample would depend on the longest prompt of its batch.

    Args:
        embeddings:
            Output of `encode_prompt` for prompts of different lengths.
        length (`int`):
            Tokens of the longest.
    """
    values = embeddings if isinstance(embeddings, tuple) else (embeddings,)
    if not any(isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == length for value in values):
        raise ValueError(
            "The pipeline's prompt embeddings have different lengths and no mask, so a sample would depend on the "
            "longest prompt in its batch. Set per_device_sample_batch_size and per_device_train_batch_size to 1."
        )
