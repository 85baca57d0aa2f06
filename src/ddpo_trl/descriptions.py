"""JSON descriptions and hashes of arguments of any type."""

import functools
import hashlib
import json
import types
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


# Hexadecimal digits of a hash that people read.
DIGITS = 12

# Longest `repr` of an object that is shown; longer ones are hashed.
LONGEST = 80


def described(value: Any) -> Any:
    """
    Return a value in JSON's types, equal in two runs with the same arguments.

    Numbers, strings and containers stay, including NumPy's. Images, arrays and tensors become a string with type,
    shape and a hash of their content; functions and classes, their name; objects whose `repr` shows their value
    (dates, decimals, dataclasses), that; other objects, their type.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.generic):
        return value.item() if isinstance(value, np.number | np.bool_) else str(value)
    if isinstance(value, Enum):
        return described(value.value)
    if isinstance(value, str | int | float):  # of a subclass
        return json.loads(json.dumps(value))
    if isinstance(value, np.ndarray) and value.dtype == object:  # whose bytes are addresses
        return described(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): described(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [described(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted((described(entry) for entry in value), key=str)
    return f"<{_object(value)}>"


def digest(value: Image.Image | np.ndarray | Tensor) -> str:
    """Return the SHA-256 of the pixels or numbers in hexadecimal, without mode, shape and dtype."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().reshape(-1).view(torch.uint8).numpy()
    if isinstance(value, np.ndarray) and value.dtype == object:  # whose bytes are addresses
        return text_digest(json.dumps(described(value.tolist()), sort_keys=True))
    return hashlib.sha256(value.tobytes()).hexdigest()


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def code_digest(function: Callable[..., Any]) -> str:
    """
    Return the SHA-256 of the code of a function or callable object: its bytecode or that of its class, and the
    numbers, texts and lists of them among its defaults, enclosed values, arguments of a `partial` and attributes.
    Comments, line numbers and called functions are ignored.
    """
    return text_digest(json.dumps(_parts(function)))


def _parts(value: Any) -> Any:
    match value:
        case functools.partial():
            return [_parts(value.func), _visible(value.args), _visible(value.keywords)]
        case types.MethodType():
            return [_parts(value.__func__), _attributes(value.__self__)]
        case types.FunctionType():
            empty = types.CellType()  # whose cell_contents raises
            enclosed = [cell.cell_contents for cell in value.__closure__ or () if cell != empty]
            return [_parts(value.__code__), *map(_visible, [value.__defaults__, value.__kwdefaults__, *enclosed])]
        case types.CodeType():
            nested = [_parts(each) for each in value.co_consts if isinstance(each, types.CodeType)]
            return [value.co_code.hex(), value.co_names, [described(each) for each in value.co_consts], nested]
        case type() | types.BuiltinFunctionType():
            return described(value)
        case _:
            methods = [own for own in vars(type(value)).values() if isinstance(own, types.FunctionType)]
            return [[_parts(method.__code__) for method in methods], _attributes(value)]


def _attributes(value: Any) -> Any:
    try:
        return {name: _visible(own) for name, own in vars(value).items()}
    except TypeError:  # it has only slots
        return None


def _visible(value: Any) -> Any:
    """Reduce a value to JSON's types: a function to its code, since it may enclose itself, others to their type."""
    if isinstance(value, types.FunctionType):
        return _parts(value.__code__)
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError):
        return type(value).__qualname__


def _object(value: Any) -> str:
    if isinstance(value, Image.Image):
        return f"{value.mode} image of {value.width}x{value.height} pixels, hash {digest(value)[:DIGITS]}"
    if isinstance(value, np.ndarray):
        return f"array of shape {value.shape}, {value.dtype}, hash {digest(value)[:DIGITS]}"
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}, {value.dtype}, hash {digest(value)[:DIGITS]}"
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if isinstance(value, bytes):
        return f"{len(value)} bytes, hash {hashlib.sha256(value).hexdigest()[:DIGITS]}"
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType | types.MethodType):
        return f"{value.__module__}.{value.__qualname__}"
    kind, text = f"{type(value).__module__}.{type(value).__qualname__}", repr(value)
    if " at 0x" in text:  # an address differs between runs
        return kind
    return text if len(text) <= LONGEST else f"{kind}, hash {text_digest(text)[:DIGITS]}"


def own_copy(value: Any) -> Any:
    """Copy dicts, lists, tuples, tensors, arrays and images, recursively. Other objects stay the same."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray | Image.Image):
        return value.copy()
    if type(value) is dict:
        return {key: own_copy(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(own_copy, value))
    return value


def in_a_line(error: BaseException) -> str:
    """Describe an error by its type and message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": .")
