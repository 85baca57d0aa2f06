"""Arguments of any kind, written as JSON: as they are where JSON has them, or else as a description."""

import hashlib
import json
import types
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


# Enough to tell two images apart, and short enough to be read.
DIGITS = 12


def described(value: Any) -> Any:
    """
    Return a value in JSON's types. Two runs with the same arguments give equal ones.

    Args:
        value (`Any`):
            Numbers, strings and containers of them stay, also those of NumPy. Images, arrays and tensors become a
            string with their type, shape and a hash of their content; functions and classes, their name; other
            objects, their type.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.generic):
        return value.item() if isinstance(value, np.number | np.bool_) else str(value)
    if isinstance(value, Enum):
        return described(value.value)
    if isinstance(value, str | int | float):  # of a subclass
        return json.loads(json.dumps(value))
    if isinstance(value, np.ndarray) and value.dtype == object:  # its bytes are addresses
        return described(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): described(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [described(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted((described(entry) for entry in value), key=str)
    return f"<{_object(value)}>"


def digest(value: Image.Image | np.ndarray | Tensor) -> str:
    """Return the SHA-256 of the pixels or numbers, in hexadecimal; mode, shape and dtype are not part of it."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(value.tobytes()).hexdigest()


def _object(value: Any) -> str:
    if isinstance(value, Image.Image):
        return f"{value.mode} image of {value.width}x{value.height} pixels, hash {digest(value)[:DIGITS]}"
    if isinstance(value, np.ndarray):
        return f"array of shape {value.shape}, {value.dtype}, hash {digest(value)[:DIGITS]}"
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}, {value.dtype}, hash {digest(value)[:DIGITS]}"
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    named = isinstance(value, type | types.FunctionType | types.BuiltinFunctionType | types.MethodType)
    return (
        f"{value.__module__}.{value.__qualname__}" if named else f"{type(value).__module__}.{type(value).__qualname__}"
    )
