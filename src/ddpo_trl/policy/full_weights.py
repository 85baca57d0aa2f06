"""Training the denoiser's own weights instead of an adapter: preparing them, saving them, loading them."""

import os

import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import PeftConfig
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from ddpo_trl.distributed import is_sharded
from ddpo_trl.finite import check_weights
from ddpo_trl.policy.adapter_checks import check_projections
from ddpo_trl.policy.denoiser import adapter_layers, denoiser_name


def freeze_all_but_denoiser(pipeline: DiffusionPipeline, peft_config: PeftConfig | None) -> None:
    """
    Prepare a pipeline for training the denoiser's own weights, as far as they require gradients.

    Raises:
        `ValueError`: If there is an adapter or a `peft_config`, the weights are in half precision, or the denoiser has
            weights that would not be loaded again.
    """
    name = denoiser_name(pipeline)
    denoiser = pipeline.components[name]
    if peft_config is not None or adapter_layers(denoiser):
        what = "peft_config is given" if peft_config is not None else "the pipeline carries a LoRA adapter"
        raise ValueError(f"use_lora is False, but {what}. Set use_lora=True to train the adapter, or remove it.")
    check_not_quantized(denoiser, name)
    if denoiser.dtype != torch.float32:
        raise ValueError(
            f"use_lora is False, which trains pipeline.{name} itself, but its weights are {denoiser.dtype}. Load the "
            "pipeline with dtype=torch.float32, and set bf16=True or fp16=True for mixed precision."
        )
    check_projections(denoiser, name)
    with torch.device("meta"):
        known = type(denoiser).from_config(denoiser.config).state_dict().keys()
    if unknown := [key for key in denoiser.state_dict() if key not in known]:
        raise ValueError(
            f"use_lora is False, but pipeline.{name} has weights that its config does not have, such as {unknown[0]}: "
            "they would not be loaded again. Remove what was added to it, such as an IP-Adapter with "
            "`pipeline.unload_ip_adapter()`, or train a LoRA adapter."
        )
    for component_name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and component_name != name:
            component.requires_grad_(False).eval()


def check_not_quantized(denoiser: ModelMixin, name: str) -> None:
    """Raise a `ValueError` for weights that have no gradient: quantized ones, or those that are stored in 8 bits."""
    for key, parameter in denoiser.named_parameters():
        is_quantized = type(parameter) is not nn.Parameter
        if is_quantized or parameter.dtype.itemsize == 1:
            kind = f"quantized ({type(parameter).__name__})" if is_quantized else f"stored as {parameter.dtype}"
            raise ValueError(
                f"use_lora is False, which trains pipeline.{name} itself, but {key} is {kind} and can't be updated. "
                "Set use_lora=True to train an adapter on it (QLoRA), or load the pipeline without "
                "quantization_config and without layerwise casting."
            )


def save_denoiser(denoiser: ModelMixin, directory: str, write: bool = True) -> None:
    """
    Call `denoiser.save_pretrained(directory)`, with the whole weights if they are sharded.

    `write` is `False` on all processes except one: they only take part in gathering sharded weights.
    """
    check_weights(dict(denoiser.named_parameters()), directory)
    if is_sharded(denoiser):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(denoiser, options=options)  # on one process, the others get none
        with torch.device("meta"):
            denoiser = type(denoiser).from_config(denoiser.config)
        denoiser.load_state_dict(weights, strict=write, assign=True)
    if write:
        denoiser.save_pretrained(directory)


def load_denoiser(denoiser: ModelMixin, directory: str | os.PathLike[str], subfolder: str) -> None:
    """Load what [`save_denoiser`] wrote into the existing parameters, also if they are sharded."""
    saved = type(denoiser).from_pretrained(directory, subfolder=subfolder, use_safetensors=True)
    set_model_state_dict(denoiser, saved.state_dict(), options=StateDictOptions(full_state_dict=True))
