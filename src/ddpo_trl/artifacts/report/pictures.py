"""Images in the page: small copies, as data URIs."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence


# Pixels of all images together, about 4 MB of WebP, and the bounds of the longest side of one. A video weighs as much
# as so many images.
MAX_PIXELS = 24_000_000
SMALLEST_SIDE, LARGEST_SIDE = 128, 512
VIDEO_WEIGHT = 16


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A data URI, and the size of its image in pixels."""

    uri: str
    width: int
    height: int


def longest_side(paths: Sequence[Path]) -> int:
    """Return the longest side in pixels at which all images together have at most [`MAX_PIXELS`]."""
    weight = sum(VIDEO_WEIGHT if path.suffix == ".gif" else 1 for path in paths)
    return max(SMALLEST_SIDE, min(LARGEST_SIDE, math.isqrt(MAX_PIXELS // max(1, weight))))


def picture(path: Path, side: int) -> Picture | None:
    """A WebP copy with at most `side` pixels on the longest side; `None` if the file is no image, or not there."""
    try:
        with Image.open(path) as image:
            milliseconds = image.info.get("duration", 100)
            frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
    except OSError:  # which UnidentifiedImageError is too
        return None
    for frame in frames:
        frame.thumbnail((side, side))
    first, *others = frames
    options: dict[str, Any] = {"quality": 85}
    if others:
        options |= {"save_all": True, "append_images": others, "duration": milliseconds, "loop": 0}
    elif max(first.size) <= SMALLEST_SIDE:
        options["lossless"] = True  # else colors have half the resolution, which shows in a small image
    buffer = io.BytesIO()
    first.save(buffer, "WEBP", **options)
    uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(uri=uri, width=first.width, height=first.height)
