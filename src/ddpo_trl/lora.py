"""The LoRA adapter of the denoiser: put it on, save it in diffusers' format, load it back."""

import os
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file


ADAPTER_NAME = "default"
LORA_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # where `pipeline.load_lora_weights(directory)` looks


def default_lora_config() -> LoraConfig:
    """r = 4 on the attention projections, as TRL ≤ 0.23 and ddpo-pytorch had it."""
    return LoraConfig(
        r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"]
    )


def denoiser_name(pipeline: DiffusionPipeline) -> str:
    """
    The name of the component that is trained, `"unet"` or `"transformer"`.

    Raises:
        `ValueError`: If the pipeline has neither.
    """
    for name in ("unet", "transformer"):
        if isinstance(pipeline.components.get(name), ModelMixin):
            return name
    raise ValueError(
        f"pipeline is a {type(pipeline).__name__} with the components {', '.join(pipeline.components)}; it needs a "
        "denoiser named 'unet' or 'transformer'."
    )


def put_on_adapter(pipeline: DiffusionPipeline, peft_config: PeftConfig | None) -> str:
    """
    Freezes everything in the pipeline but a LoRA adapter of its denoiser, whose weights become float32.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            With one active adapter on the denoiser already, or without any.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to add; [`default_lora_config`] if there is none yet.

    Returns:
        The adapter's name.

    Raises:
        `ValueError`: If `peft_config` is given and the denoiser has an adapter, or several are active.
    """
    denoiser = pipeline.components[denoiser_name(pipeline)]
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    active = denoiser.active_adapters() if denoiser._hf_peft_config_loaded else []
    if active and peft_config is not None:
        raise ValueError(
            f"peft_config is given, but the pipeline carries the adapter {', '.join(active)} already. Leave "
            "peft_config out to go on training it, or call `pipeline.unload_lora_weights()` first."
        )
    if len(active) > 1:
        raise ValueError(
            f"The pipeline has several active adapters ({', '.join(active)}), and one is trained. Choose it with "
            "`pipeline.set_adapters(name)`."
        )
    if not active:
        denoiser.add_adapter(peft_config or default_lora_config(), ADAPTER_NAME)
        active = [ADAPTER_NAME]
    denoiser.set_adapter(active[0])  # lets its weights require gradients again
    cast_training_params(denoiser, torch.float32)
    return active[0]


def freeze_all_but_denoiser(pipeline: DiffusionPipeline, peft_config: PeftConfig | None) -> None:
    """
    Prepares a pipeline for training the denoiser's own weights, those of them that require gradients.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Without adapter, its denoiser in float32.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Must be `None` here.

    Raises:
        `ValueError`: If there is an adapter or a `peft_config`, or the weights are in half precision.
    """
    name = denoiser_name(pipeline)
    denoiser = pipeline.components[name]
    if peft_config is not None or denoiser._hf_peft_config_loaded:
        what = "peft_config is given" if peft_config is not None else "the pipeline carries a LoRA adapter"
        raise ValueError(f"use_lora is False, but {what}. Set use_lora=True to train the adapter, or take it away.")
    if denoiser.dtype != torch.float32:
        raise ValueError(
            f"use_lora is False, which trains pipeline.{name} itself, but its weights are {denoiser.dtype}. Load the "
            "pipeline with torch_dtype=torch.float32, and set bf16=True or fp16=True for mixed precision."
        )
    for component_name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module) and component_name != name:
            component.requires_grad_(False).eval()


def save_adapter(pipeline: DiffusionPipeline, adapter: str, directory: str | os.PathLike[str]) -> None:
    """
    Writes `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(directory)` of diffusers loads.

    The adapter's config goes into the file's metadata: without it a `lora_alpha` other than the rank would be lost.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline with the adapter on its denoiser.
        adapter (`str`):
            The adapter's name.
        directory (`str` or `os.PathLike`):
            Where to; made if absent.
    """
    name = denoiser_name(pipeline)
    denoiser = pipeline.components[name]
    layers: dict[str, Any] = {
        f"{name}_lora_layers": get_peft_model_state_dict(denoiser, adapter_name=adapter),
        f"{name}_lora_adapter_metadata": denoiser.peft_config[adapter].to_dict(),
    }
    pipeline.save_lora_weights(save_directory=directory, **layers)


def load_adapter(pipeline: DiffusionPipeline, adapter: str, directory: str | os.PathLike[str]) -> None:
    """
    Loads what [`save_adapter`] wrote *into* the existing adapter, whose parameters stay the optimizer's.

    (`load_lora_weights` would add a second adapter beside it: TRL's trainer lost its weights on resume that way.)

    Args:
        pipeline, adapter, directory:
            As for [`save_adapter`].

    Raises:
        `ValueError`: If the file has not exactly the adapter's weights.
    """
    name = denoiser_name(pipeline)
    path = os.path.join(directory, LORA_WEIGHTS_NAME)
    prefix = f"{name}."
    weights = {key.removeprefix(prefix): value for key, value in load_file(path).items() if key.startswith(prefix)}
    denoiser = pipeline.components[name]
    expected = get_peft_model_state_dict(denoiser, adapter_name=adapter).keys()
    if weights.keys() != expected:
        raise ValueError(
            f"{path} holds {len(weights)} LoRA weights of the {name}, of which {len(weights.keys() & expected)} are "
            f"among the {len(expected)} of adapter {adapter!r}. Resume with the LoRA config the run was started with."
        )
    set_peft_model_state_dict(denoiser, weights, adapter_name=adapter)
