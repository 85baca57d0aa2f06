"""The network that is trained: its name in a pipeline, and the adapter layers inside it."""

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


def denoiser_name(pipeline: DiffusionPipeline) -> str:
    """
    Return the name of the component that is trained, `"unet"` or `"transformer"`.

    Raises:
        `ValueError`: If the pipeline has neither.
    """
    for name in ("unet", "transformer"):
        if isinstance(pipeline.components.get(name), ModelMixin):
            return name
    for name in ("unet", "transformer"):
        if isinstance(pipeline.components.get(name), nn.Module):
            raise ValueError(
                f"pipeline.{name} is a {type(pipeline.components[name]).__name__}, which wraps a diffusers model. "
                f"Leave the model itself in the pipeline; to compile it, call `pipeline.{name}.compile()`."
            )
    raise ValueError(
        f"pipeline is a {type(pipeline).__name__} with the components {', '.join(pipeline.components)}; it needs a "
        "denoiser named 'unet' or 'transformer'."
    )


def adapter_layers(denoiser: nn.Module) -> list[BaseTunerLayer]:
    """Return the layers that carry adapters. Through peft, because not all denoisers have diffusers' mixin."""
    return [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]


def active_adapters(denoiser: nn.Module) -> list[str]:
    """Return the names of the active adapters."""
    return sorted({name for layer in adapter_layers(denoiser) for name in layer.active_adapters})


@contextmanager
def adapters_off(denoiser: nn.Module) -> Iterator[None]:
    """Switch the adapters of a denoiser off while the context is open."""
    layers = adapter_layers(denoiser)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def remove_adapters(denoiser: nn.Module) -> None:
    """Remove all adapters, and the layers that held them."""
    recurse_remove_peft_layers(denoiser)
    for name, module in list(denoiser.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            parent, _, child = name.rpartition(".")
            denoiser.get_submodule(parent).register_module(child, module.original_module)
    vars(denoiser).pop("peft_config", None)
    if isinstance(denoiser, PeftAdapterMixin):
        denoiser._hf_peft_config_loaded = False


def sharing_weights(denoiser: nn.Module) -> nn.Module:
    """Return a copy of a denoiser without its adapters. It takes no memory, because it shares the weights."""
    shared: dict[int, Any] = {}
    for parameter in denoiser.parameters():
        # Quantized weights are of other types, which have to stay what they are.
        plain = type(parameter) is nn.Parameter
        shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
    shared |= {id(buffer): buffer for buffer in denoiser.buffers()}
    copied = copy.deepcopy(denoiser, shared)
    if adapter_layers(copied):
        remove_adapters(copied)
    return copied


def compile_in_place(denoiser: ModelMixin, backend: str | None, mode: str | None) -> None:
    """
    Compile the blocks that a denoiser repeats, or all of it if it has none. The pipeline calls the same module as
    before, with the same weights and names.
    """
    try:
        denoiser.compile_repeated_blocks(backend=backend, mode=mode)
    except ValueError:  # its class names no blocks
        denoiser.compile(backend=backend, mode=mode)


def is_compiled(denoiser: nn.Module) -> bool:
    """Return whether a denoiser, or a part of it, was compiled in place."""
    return any(module._compiled_call_impl is not None for module in denoiser.modules())


def present_classes(module: nn.Module, names: Collection[str]) -> list[str]:
    """Return the class names among `names` that occur in a module."""
    return sorted({type(part).__name__ for part in module.modules()} & set(names))
