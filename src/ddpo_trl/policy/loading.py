"""Loading of pipelines."""

import os
from typing import Literal

import torch
from diffusers import DiffusionPipeline

from ddpo_trl.emoji import load_emoji_pipeline
from ddpo_trl.suggestions import did_you_mean
from ddpo_trl.versions import DTYPE


Dtype = Literal["float32", "bfloat16", "float16"]

DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(source: str | os.PathLike[str], dtype: Dtype = "float32") -> DiffusionPipeline:
    """
    Load a pipeline from safetensors files. Other formats may be pickles, which can run any code.

    Args:
        source (`str` or `os.PathLike`):
            A folder, a Hub id, or `emoji`, the embedded pipeline.
        dtype (`str`, *optional*, defaults to `"float32"`):
            `"float32"`, `"bfloat16"` or `"float16"`.

    Raises:
        `ValueError`: If `source` is neither a folder nor has the form of a Hub id.
        `OSError`: If there is no such repository, or no safetensors file in it.
    """
    source = os.fspath(source)
    if source == "emoji":
        return load_emoji_pipeline(DTYPES[dtype])
    if not os.path.isdir(source) and "/" not in source:
        meant = did_you_mean(source, ["emoji"])
        raise ValueError(f"There is no folder {source!r}, and a Hub id has the form owner/name.{meant}")
    return DiffusionPipeline.from_pretrained(source, use_safetensors=True, **{DTYPE: DTYPES[dtype]})
