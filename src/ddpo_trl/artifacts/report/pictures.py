"""Images in the page: small copies as data URIs."""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageSequence


# Pixels of all images together, about 4 MB of WebP, and bounds of an image's longest side. A video counts as many.
MAX_PIXELS = 24_000_000
SMALLEST_SIDE, LARGEST_SIDE = 128, 512
IMAGES_PER_VIDEO = 16


class Picture(NamedTuple):
    """Data URI and size in pixels of an image."""

    uri: str
    width: int
    height: int


def longest_side(paths: Sequence[Path]) -> int:
    """Return the longest side in pixels at which all images together have at most [`MAX_PIXELS`]."""
    count = sum(IMAGES_PER_VIDEO if path.suffix == ".gif" else 1 for path in paths)
    return max(SMALLEST_SIDE, min(LARGEST_SIDE, math.isqrt(MAX_PIXELS // max(1, count))))


def picture(path: Path, side: int) -> Picture | None:
    """Return a WebP copy with at most `side` pixels on the longest side; `None` if the file is not an image."""
    try:
        with Image.open(path) as image:
            milliseconds = image.info.get("duration", 100)
            frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
    except OSError:  # missing, or damaged
        return None
    for frame in frames:
        frame.thumbnail((side, side))
    first, *others = frames
    options: dict[str, Any] = {"quality": 85}
    if others:
        options |= {"save_all": True, "append_images": others, "duration": milliseconds, "loop": 0}
    elif max(first.size) <= SMALLEST_SIDE:
        options["lossless"] = True  # otherwise colors have half the resolution, which shows in a small image
    buffer = io.BytesIO()
    first.save(buffer, "WEBP", **options)
    return Picture(f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", *first.size)
