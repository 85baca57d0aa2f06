"""Arguments compared by value: settings, images, arrays and tensors."""

from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddpo_trl.descriptions import digest


SETTING_TYPES = (str, int, float, bool, type(None), torch.device, torch.dtype)


def is_setting(value: Any) -> bool:
    """Return `True` for a text, a number or the like, or a container of these: they can be compared with `==`."""
    match value:
        case list() | tuple():
            return all(is_setting(part) for part in value)
        case dict():
            return all(is_setting(part) for part in value.values())
        case _:
            return isinstance(value, SETTING_TYPES)


def by_value(value: Any) -> Hashable | None:
    """Return a key that identifies a setting, an image, an array or a tensor; `None` for any other value."""
    match value:
        case Tensor():
            return ("tensor", value.dtype, value.shape, digest(value))
        case np.ndarray() if value.dtype == object:
            return by_value(value.tolist())
        case np.ndarray():
            return ("array", value.dtype.str, value.shape, digest(value))
        case Image.Image():
            return ("image", value.mode, value.size, digest(value))
        case list() | tuple():
            parts = tuple(by_value(part) for part in value)
            return None if None in parts else (type(value).__name__, parts)
        case _:
            return repr(value) if is_setting(value) else None
