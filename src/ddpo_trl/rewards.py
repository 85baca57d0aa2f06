"""Reward functions that need no model. Each takes `(images, prompts, metadata)` and returns one number per image."""

import io
from typing import Any

from PIL import Image
from torch import Tensor


def jpeg_compressibility(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> list[float]:
    """
    How small an image gets as a JPEG: minus its size in kilobytes of 1000 bytes, at quality 95.

    The compressibility task of https://huggingface.co/papers/2305.13301. Left to run, it ends in blank images.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`):
            Values in [0, 1].
        prompts, metadata (`tuple`):
            Not used.

    Returns:
        `list[float]` of length B, kB, < 0.
    """
    return [-size for size in jpeg_incompressibility(images, prompts, metadata)]


def jpeg_incompressibility(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> list[float]:
    """
    The size of an image as a JPEG of quality 95, in kilobytes of 1000 bytes.

    The incompressibility task of https://huggingface.co/papers/2305.13301.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`):
            Values in [0, 1].
        prompts, metadata (`tuple`):
            Not used.

    Returns:
        `list[float]` of length B, kB, > 0.
    """
    pixels = (images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [_jpeg_bytes(Image.fromarray(image)) / 1000 for image in pixels]


def _jpeg_bytes(image: Image.Image) -> int:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    return buffer.tell()
