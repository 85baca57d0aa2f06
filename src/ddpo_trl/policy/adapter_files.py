"""The files of an adapter: written for diffusers or peft, read back, and checked before training starts."""

import copy
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import logging
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ddpo_trl.descriptions import in_a_line
from ddpo_trl.distributed import sharded_like, whole
from ddpo_trl.finite import check_weights
from ddpo_trl.policy.adapter_checks import first_difference, in_words
from ddpo_trl.policy.denoiser import denoiser_name, sharing_weights


LORA_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # where `pipeline.load_lora_weights(directory)` looks
PEFT_WEIGHTS_NAME = "adapter_model.safetensors"  # where `PeftModel.from_pretrained(denoiser, directory)` looks
PEFT_PREFIX = "base_model.model."  # of the names in that file


def has_lora_loader(pipeline: DiffusionPipeline) -> bool:
    """Return `True` if `pipeline.load_lora_weights` exists and loads adapters of the denoiser."""
    name = denoiser_name(pipeline)
    return (
        isinstance(pipeline, LoraBaseMixin)
        and isinstance(pipeline.components[name], PeftAdapterMixin)
        and name in pipeline._lora_loadable_modules
    )


def save_adapter(
    pipeline: DiffusionPipeline, adapter: str, directory: str | os.PathLike[str], write: bool = True
) -> None:
    """
    Write `pytorch_lora_weights.safetensors` for `pipeline.load_lora_weights(directory)` of diffusers.

    If the pipeline has no such loader (PixArt, Kandinsky), write peft's files instead, for
    `PeftModel.from_pretrained(denoiser, directory)`. The adapter's config is saved with the weights: without it, a
    `lora_alpha` other than the rank would be lost.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline with the adapter on its denoiser.
        adapter (`str`):
            Name of the adapter.
        directory (`str` or `os.PathLike`):
            Target directory; created if missing.
        write (`bool`, *optional*, defaults to `True`):
            `False` on all processes except one: they only take part in gathering sharded weights.
    """
    name = denoiser_name(pipeline)
    denoiser = pipeline.components[name]
    weights = whole(get_peft_model_state_dict(denoiser, adapter_name=adapter))
    check_weights(weights, directory)
    if not write:
        return
    config: PeftConfig = denoiser.peft_config[adapter]
    if has_lora_loader(pipeline):
        layers: dict[str, Any] = {f"{name}_lora_layers": weights, f"{name}_lora_adapter_metadata": config.to_dict()}
        pipeline.save_lora_weights(save_directory=directory, **layers)
        return
    os.makedirs(directory, exist_ok=True)
    config.save_pretrained(str(directory))
    prefixed = {f"{PEFT_PREFIX}{key}": value.contiguous() for key, value in weights.items()}
    save_file(prefixed, os.path.join(directory, PEFT_WEIGHTS_NAME), metadata={"format": "pt"})


def load_adapter(pipeline: DiffusionPipeline, adapter: str, directory: str | os.PathLike[str]) -> None:
    """
    Load what [`save_adapter`] wrote *into* the existing adapter, whose parameters stay the optimizer's.

    (`load_lora_weights` would add a second adapter: TRL's trainer lost its weights on resume that way.)

    Args:
        pipeline, adapter, directory:
            As for [`save_adapter`].

    Raises:
        `ValueError`: If the file can't be read, or its weights are not exactly the adapter's.
    """
    name = denoiser_name(pipeline)
    denoiser = pipeline.components[name]
    if has_lora_loader(pipeline):
        path, prefix = os.path.join(directory, LORA_WEIGHTS_NAME), f"{name}."
    else:
        path, prefix = os.path.join(directory, PEFT_WEIGHTS_NAME), PEFT_PREFIX
    try:
        loaded = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read ({error}). Use another checkpoint.") from error
    weights = {key.removeprefix(prefix): value for key, value in loaded.items() if key.startswith(prefix)}
    expected = get_peft_model_state_dict(denoiser, adapter_name=adapter)
    if weights.keys() != expected.keys():
        common = len(weights.keys() & expected.keys())
        raise ValueError(
            f"{path} holds {len(weights)} LoRA weights of the {name}, of which {common} are "
            f"among the {len(expected)} of adapter {adapter!r}. Resume with the LoRA config the run was started with."
        )
    set_peft_model_state_dict(denoiser, sharded_like(weights, expected), adapter_name=adapter)


def check_files(pipeline: DiffusionPipeline, adapter: str, owner: str) -> None:
    """
    Save an adapter, load it into a copy of the denoiser as its users will, and compare. `owner` names the origin of
    the adapter in the message.

    Raises:
        `ValueError`: If it can't be loaded, or the loaded adapter differs.
    """
    name = denoiser_name(pipeline)
    denoiser: Any = pipeline.components[name]
    twin = copy.copy(pipeline)
    fresh = sharing_weights(denoiser)
    twin.register_modules(**{name: fresh})
    loader = "PeftModel.from_pretrained"
    try:
        with tempfile.TemporaryDirectory() as directory, quiet():
            save_adapter(pipeline, adapter, directory)
            if has_lora_loader(pipeline):
                loader = f"{type(pipeline).__name__}.load_lora_weights"
                twin.load_lora_weights(directory, weight_name=LORA_WEIGHTS_NAME, adapter_name=adapter)
            else:
                PeftModel.from_pretrained(fresh, directory, adapter_name=adapter, low_cpu_mem_usage=True)
        saved = {value.data_ptr() for value in get_peft_model_state_dict(denoiser, adapter_name=adapter).values()}
        trained = {weight: value for weight, value in denoiser.named_parameters() if value.requires_grad}
        unsaved = [
            f"{weight} is not in the file" for weight, value in trained.items() if value.data_ptr() not in saved
        ]
        problem = unsaved[0] if unsaved else first_difference(denoiser, fresh, adapter)
    except torch.OutOfMemoryError:  # says what is wrong by itself
        raise
    except Exception as error:  # whatever the loaders of diffusers and peft raise here, they will raise for users too
        problem = in_a_line(error)
    if problem is None:
        return
    raise ValueError(
        f"{owner} is {in_words(denoiser.peft_config[adapter])}, and {loader} does not load what would be saved of it: "
        f"{problem}. Use a LoraConfig with r, lora_alpha and target_modules only."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of loaders about components that an adapter does not have."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
