"""The embedded text-to-image pipeline, the captions it was trained on, and a measure of what its images show."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

from ddpo_trl.versions import DTYPE


EMOJI_PATH = Path(__file__).parent / "assets" / "emoji"

# Each training image is stored, and each image compared, as the average over tiles of this many pixels a side.
_TILE_SIZE = 32


class _Concept(TypedDict):
    caption: str
    keywords: list[str]
    group: str
    tiles: dict[str, int]


@cache
def _concepts() -> list[_Concept]:
    concepts: list[_Concept] = json.loads((EMOJI_PATH / "concepts.json").read_text(encoding="utf-8"))
    return concepts


@cache
def _training_tiles() -> torch.Tensor:
    """Cuts the contact sheet into all the training images, `(N, 3, 32, 32)` in [0, 1], by tile index."""
    with Image.open(EMOJI_PATH / "contact_sheet.png") as image:
        sheet = torch.from_numpy(np.array(image.convert("RGB")))
    tiles = sheet.unflatten(0, (-1, _TILE_SIZE)).unflatten(2, (-1, _TILE_SIZE)).permute(0, 2, 4, 1, 3).flatten(0, 1)
    return tiles[: len(_styled_captions())].float() / 255


@cache
def _styled_captions() -> list[str]:
    """Names every training image by its style and caption, in the order of the tiles.

    Two concepts may share a drawing, which then goes by the first one's name.
    """
    names: dict[int, str] = {}
    for concept in _concepts():
        for style, tile in concept["tiles"].items():
            names.setdefault(tile, f"{style} {concept['caption']}")
    return [names[tile] for tile in range(len(names))]


@cache
def _meanings() -> dict[str, frozenset[int]]:
    """Maps every text of the training set, with and without a style word, to the tiles it stands for."""
    meanings = {}
    for concept in _concepts():
        for words in (concept["caption"], *concept["keywords"]):
            meanings[words] = frozenset(concept["tiles"].values())
            for style, tile in concept["tiles"].items():
                meanings[f"{style} {words}"] = frozenset([tile])
    return meanings


def load_emoji_pipeline(torch_dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """
    Loads the embedded pipeline: a small Stable Diffusion trained from scratch on emoji, with no download.

    It draws 64x64 images of the animals, plants, foods and faces of [`emoji_captions`]. Each was trained in two
    styles, which the words "flat" and "3d" ask for, as in `"3d dog face"`; without such a word either may come out.
    30 steps at a guidance scale of 4 suit it. `StableDiffusionPipeline.from_pretrained(EMOJI_PATH)` does the same.

    Args:
        torch_dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Precision of the weights, which are stored in half precision.

    Returns:
        `StableDiffusionPipeline`: A new pipeline on the CPU, in evaluation mode.

    Example:

    ```python
    >>> from ddpo_trl import load_emoji_pipeline

    >>> pipeline = load_emoji_pipeline()
    >>> image = pipeline("3d dog face", num_inference_steps=30, guidance_scale=4).images[0]
    >>> image.size
    (64, 64)
    ```
    """
    # Two progress bars for what takes a second would be the first thing a user sees.
    loud = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in loud:
        log.disable_progress_bar()
    try:
        pipeline: StableDiffusionPipeline = StableDiffusionPipeline.from_pretrained(
            EMOJI_PATH, local_files_only=True, use_safetensors=True, **{DTYPE: torch_dtype}
        )
    finally:
        for log in loud:
            log.enable_progress_bar()
    return pipeline


def emoji_captions(group: str | None = None) -> list[str]:
    """
    Lists the captions the embedded pipeline was trained on, without style words.

    Args:
        group (`str`, *optional*):
            One of `"animal"`, `"plant"`, `"food"` and `"face"`; all of them if left out.

    Returns:
        `list[str]`: Captions such as `"dog face"`, sorted.

    Raises:
        ValueError: If there is no such group.
    """
    groups = {concept["group"] for concept in _concepts()}
    if group is not None and group not in groups:
        raise ValueError(f"There is no group {group!r} of captions: choose one of {sorted(groups)}, or None for all.")
    return sorted(concept["caption"] for concept in _concepts() if group in (None, concept["group"]))


def _nearest_tiles(images: torch.Tensor) -> torch.Tensor:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"`images` must have the shape (B, 3, H, W), got {tuple(images.shape)}.")
    if min(images.shape[-2:]) < _TILE_SIZE:
        raise ValueError(f"`images` must measure {_TILE_SIZE}x{_TILE_SIZE} or more, got {tuple(images.shape)}.")
    images = images.detach().float().cpu()
    # Not `min < 0 or max > 1`: a NaN is out of range too.
    if images.numel() > 0 and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"`images` must lie in [0, 1], got values from {images.min():.3g} to {images.max():.3g}: clamp them, or "
            "call the pipeline with `output_type='pt'`, which returns such images."
        )
    tiles = F.adaptive_avg_pool2d(images, _TILE_SIZE)
    # By differences: the faster way through a matrix product rounds away those between two yellow faces.
    distances = torch.cdist(
        tiles.flatten(1), _training_tiles().flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
    )
    return distances.argmin(dim=1)


def nearest_captions(images: torch.Tensor) -> list[str]:
    """
    Names each image by the training image that is nearest to it.

    The distance is L2 on pixels averaged to 32x32.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`):
            RGB in [0, 1], at least 32x32, as a pipeline called with `output_type="pt"` returns them.

    Returns:
        `list[str]`: `B` captions with their style word, such as `"3d dog face"`.

    Raises:
        ValueError: If `images` has another shape, or values outside [0, 1].
    """
    return [_styled_captions()[tile] for tile in _nearest_tiles(images).tolist()]


def recognized_share(images: torch.Tensor, captions: Sequence[str]) -> float:
    """
    Measures how many images show what their captions say.

    An image is recognized if the training image nearest to it (see [`nearest_captions`]) has its caption; where the
    caption begins with a style word, that drawing's style must be the same too.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`):
            RGB in [0, 1], at least 32x32.
        captions (`Sequence[str]` of length `B`):
            One of [`emoji_captions`] for each image, or one of its keywords; "flat" or "3d" may stand before it.

    Returns:
        `float`: The recognized share of the images, from 0 to 1.

    Raises:
        ValueError: If there are no images, their number is not that of the captions, a caption is not among the
            training captions, or `images` has another shape or values outside [0, 1].
    """
    if len(images) != len(captions) or len(images) == 0:
        raise ValueError(f"Give one caption to each image, got {len(images)} images and {len(captions)} captions.")
    unknown = sorted({caption for caption in captions if caption not in _meanings()})
    if unknown:
        raise ValueError(
            f"No training image is called {unknown[0]!r}: take captions from `emoji_captions()`, with 'flat' or '3d' "
            "before them if the style matters."
        )
    tiles = _nearest_tiles(images).tolist()
    return sum(tile in _meanings()[caption] for tile, caption in zip(tiles, captions, strict=True)) / len(captions)
