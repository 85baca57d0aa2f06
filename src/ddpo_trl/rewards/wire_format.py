"""Encoding of a request to a reward server."""

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

from ddpo_trl.rewards.model import as_pictures


FORMATS = ("png", "fp16")


def pack(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any], image_format: str) -> bytes:
    """
    Encode a request as a safetensors file, which runs no code when it is read.

    Its tensors are `images` in float16, or the bytes of a PNG file for each image or frame, named `0`, `1`, ... Its
    header contains `image_format`, and `shape`, `prompts` and `metadata` as JSON.

    Args:
        images, prompts, metadata:
            Arguments of a [`~ddpo_trl.rewards.function.RewardFunction`].
        image_format (`str`):
            `"png"` or `"fp16"`.

    Raises:
        `TypeError`: If the metadata can't be written as JSON.
    """
    header = {
        "image_format": image_format,
        "shape": json.dumps(list(images.shape)),
        "prompts": json.dumps(list(prompts)),
        "metadata": f"[{', '.join(map(_as_json, metadata, prompts))}]",
    }
    if image_format == "fp16":
        return save({"images": images.detach().half().cpu().contiguous()}, header)
    frames = images.detach().flatten(0, -4)
    return save({str(index): _as_png(picture) for index, picture in enumerate(as_pictures(frames))}, header)


def unpack(body: bytes) -> tuple[Tensor, tuple[str, ...], tuple[Any, ...]]:
    """
    Decode a request from an untrusted client: images as float32 in [0, 1] on the CPU, prompts and metadata.

    Raises:
        `ValueError`: If the request is malformed.
    """
    try:
        tensors = load(body)
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])["__metadata__"]
        shape, prompts, metadata = (json.loads(header[name]) for name in ("shape", "prompts", "metadata"))
        if header["image_format"] == "fp16":
            images = tensors["images"].float()
        else:
            images = torch.stack([_from_png(tensors[str(index)]) for index in range(len(tensors))])
        images = images.view(shape)
    except Exception as error:  # from safetensors, JSON, PIL or torch
        raise ValueError(f"The request is malformed ({type(error).__name__}: {error}).") from error
    _check_request(images, prompts, metadata)
    return images, tuple(prompts), tuple(metadata)


def _check_request(images: Tensor, prompts: Any, metadata: Any) -> None:
    if images.ndim not in (4, 5) or images.shape[-3] != 3 or not images.numel():
        raise ValueError(f"The request is malformed: its images have the shape {tuple(images.shape)}.")
    if not (isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)):
        raise ValueError("The request is malformed: its prompts are not a list of strings.")
    if not (isinstance(metadata, list) and len(prompts) == len(metadata) == len(images)):
        raise ValueError("The request is malformed: it must have one prompt and one metadata entry per image.")


def _as_json(metadata: Any, prompt: str) -> str:
    try:
        return json.dumps(metadata)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"The metadata of prompt {prompt!r} can't be sent to a reward server: {error}. It must be JSON: None, "
            "numbers, strings, lists, dicts. Remove the rest in a function that calls the RemoteReward."
        ) from error


def _as_png(picture: Image.Image) -> Tensor:
    buffer = io.BytesIO()
    # Compression type 3 is run-length encoding: same size, half the time.
    picture.save(buffer, format="PNG", compress_level=1, compress_type=3)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _from_png(data: Tensor) -> Tensor:
    with Image.open(io.BytesIO(data.numpy().tobytes()), formats=["PNG"]) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
