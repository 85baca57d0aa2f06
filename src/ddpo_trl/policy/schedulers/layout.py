"""Position of the policy's state in the tensor that a pipeline's `prepare_latents` returns.

As a rule it is that tensor. But image-to-video pipelines keep the frames that they are given, others unpack or permute
the latents before each step: a recorded state has to be written back into the elements it came from.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


BASE = 256  # integers up to here are exact in bfloat16


@dataclass(frozen=True, kw_only=True)
class StateLayout:
    """
    Origin of the elements of a state.

    Args:
        source (`torch.Tensor` of shape `(n,)`, *optional*):
            Indices into the elements of one sample, as `prepare_latents` returns them. `None` if they are the state.
        state (`torch.Tensor` of shape `(n,)`, *optional*):
            Indices into the elements of one sample's state.
    """

    source: Tensor | None = None
    state: Tensor | None = None

    def put(self, prepared: Tensor, state: Tensor) -> Tensor:
        """
        Return the latents that lead to a recorded state, `(B, ...)`. Elements of `prepared` that the state does not
        hold are kept.
        """
        if self.source is None or self.state is None:
            return state
        latents = prepared.to(torch.promote_types(prepared.dtype, state.dtype), copy=True).contiguous()
        source, position = self.source.to(state.device), self.state.to(state.device)
        latents.view(len(state), -1)[:, source] = state.flatten(1)[:, position].to(latents.dtype)
        return latents


WHOLE = StateLayout()


def is_whole(prepared: Tensor, state: Tensor) -> bool:
    """Return whether the first latents arrive at the first step as they are."""
    return prepared.shape == state.shape and torch.equal(prepared.to(state.dtype), state)


def numbered(prepared: Tensor) -> Iterator[Tensor]:
    """Yield tensors like `prepared` that number its elements from 1: each holds one digit, the lowest first."""
    numbers = torch.arange(1, prepared.numel() + 1, device=prepared.device)
    for _ in range(max(1, math.ceil(math.log(prepared.numel() + 1, BASE)))):
        yield (numbers % BASE).view(prepared.shape).to(prepared.dtype)
        numbers = numbers // BASE


def learn_layout(batch_size: int, elements: int, first: Tensor, digits: Sequence[Tensor]) -> StateLayout:
    """
    Find out which elements of the first latents a state consists of.

    Args:
        batch_size (`int`):
            B.
        elements (`int`):
            Number of elements of the first latents, all samples together.
        first (`torch.Tensor`):
            State of the first step.
        digits (`Sequence[torch.Tensor]`):
            State of the first step when the pipeline starts from each tensor of [`numbered`].

    Raises:
        `ValueError`: If some elements are neither those of the first latents nor independent of them.
    """
    first = first.cpu()  # not every device has float64
    seen = torch.stack([digit.cpu().double() for digit in digits])
    constant = (seen == first.double()).all(0).flatten()  # the pipeline's own, put there before every step
    numbers = (
        seen * torch.tensor([float(BASE**place) for place in range(len(digits))]).to(seen).view(-1, *[1] * first.ndim)
    ).sum(0)
    numbers = numbers.flatten() - 1
    valid = ((seen == seen.round()) & (seen >= 0) & (seen < BASE)).all(0).flatten() & (numbers >= 0)
    moved = valid & (numbers < elements) & ~constant
    if not bool((moved | constant).all()) or not bool(moved.any()):
        raise ValueError(
            f"Of the {first.numel()} numbers that the pipeline hands to its scheduler in the first step, "
            f"{int((~moved & ~constant).sum())} are computed from those that `prepare_latents` returned, and "
            f"{int(moved.sum())} are among them: the state of a step can't be handed to the pipeline to be replayed. "
            "Look for what scales or mixes the latents before the step, or adds noise to some of them "
            "(image_cond_noise_scale and the like): switch it off in pipeline_kwargs. Load the whole pipeline in one "
            "dtype."
        )
    size, rows = elements // batch_size, numbers.long().view(batch_size, -1)
    offsets = torch.arange(batch_size).unsqueeze(1) * size
    kept = moved.view(batch_size, -1)
    sources = rows - offsets
    position = kept[0].nonzero().flatten()
    source = sources[0, position]
    alike = bool((kept == kept[0]).all()) and bool((sources[:, position] == source).all())
    if not alike or len(source.unique()) < len(source):
        raise ValueError(
            "The pipeline rearranges its latents between `prepare_latents` and the first step in another way for each "
            "sample, or copies some of them: the state of a step can't be handed to it to be replayed. Sample one "
            "image at a time with per_device_sample_batch_size=1 and per_device_train_batch_size=1."
        )
    return StateLayout(source=source, state=position)
