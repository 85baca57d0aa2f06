"""Reward functions without a model: JPEG size, brightness, colors. None of them uses prompts or metadata."""

import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ddpo_trl.rewards.model import as_pictures


def jpeg_compressibility(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> list[float]:
    """
    Minus the size of an image as a JPEG of quality 95, in kilobytes of 1000 bytes.

    The compressibility task of https://huggingface.co/papers/2305.13301. Long training ends in blank images.

    Returns:
        `list[float]` of length B, kB, < 0; of a video, the mean of its frames.
    """
    return [-size for size in jpeg_incompressibility(images, prompts, metadata)]


def jpeg_incompressibility(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> list[float]:
    """
    Size of an image as a JPEG of quality 95, in kilobytes of 1000 bytes.

    The incompressibility task of https://huggingface.co/papers/2305.13301.

    Returns:
        `list[float]` of length B, kB, > 0; of a video, the mean of its frames.
    """
    sizes = [_jpeg_bytes(image) / 1000 for image in as_pictures(images.flatten(0, -4))]
    return _mean_over_frames(torch.tensor(sizes, dtype=torch.float64), images).tolist()


def brightness(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
    """
    Mean of all pixels and channels.

    Returns:
        `torch.Tensor` of shape `(B,)`, in [0, 1].
    """
    return images.flatten(1).mean(1)


def redness(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
    """
    Mean of red minus the mean of green and blue.

    Returns:
        `torch.Tensor` of shape `(B,)`, in [-1, 1]: 0 for gray, 1 for pure red.
    """
    channels = images.movedim(-3, 1).flatten(2).mean(2)
    return channels[:, 0] - channels[:, 1:].mean(1)


def colorfulness(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
    """
    Colorfulness M3 of Hasler and Süsstrunk, "Measuring colourfulness in natural images" (2003), of 8-bit values.

    With rg = R − G and yb = (R + G) / 2 − B: √(σ_rg² + σ_yb²) + 0.3 √(μ_rg² + μ_yb²).

    Returns:
        `torch.Tensor` of shape `(B,)`: 0 for gray, about 15 for slightly and 109 for extremely colorful images; of a
        video, the mean of its frames.
    """
    red, green, blue = (images.float().flatten(0, -4).movedim(-3, 0).flatten(2) * 255).unbind(0)
    opponents = torch.stack([red - green, (red + green) / 2 - blue])
    colorfulness = opponents.std(-1, correction=0).norm(dim=0) + 0.3 * opponents.mean(-1).norm(dim=0)
    return _mean_over_frames(colorfulness, images)


def _mean_over_frames(values: Tensor, images: Tensor) -> Tensor:
    """Return the mean of the values of each image's or video's frames: `(B,)`."""
    return values.view(len(images), -1).mean(1)


def _jpeg_bytes(image: Image.Image) -> int:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    return buffer.tell()
