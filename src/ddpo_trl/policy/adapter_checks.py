"""Checks that an adapter only adds to the base model: disabled it has no effect, and files contain all of it."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.utils import logging

from ddpo_trl.descriptions import in_a_line
from ddpo_trl.settings import default_of


logger = logging.get_logger(__name__)

# A single layer represents all that a config targets. It is wide enough for the default sizes of configs.
STAND_IN = "stand_in"
STAND_IN_WIDTH = 256
PLACES = {"exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "target_parameters",
          "trainable_token_indices", "layer_replication"}  # fmt: skip
PATTERNS = {"rank_pattern", "alpha_pattern"}

# Values of init_lora_weights that peft completes in a separate call, and the input of that call.
DATA_DRIVEN = {"eva": "activations of the model", "lora_ga": "gradients of the model"}

# Fields of every config, which do not affect what an adapter computes.
BOOKKEEPING = {field.name for field in dataclasses.fields(PeftConfig)}


def without_dropout(config: PeftConfig) -> PeftConfig:
    """Return a copy of an adapter's config without dropout, with a warning if it had any."""
    config = copy.deepcopy(config)
    for field in dataclasses.fields(config):
        if field.name.endswith("dropout") and (value := vars(config)[field.name]):
            vars(config)[field.name] = 0.0
            logger.warning(
                f"{field.name} is {value}, and is set to 0: sampling and training run the denoiser in evaluation "
                "mode, where dropout never acts, and the saved adapter must not drop anything in training mode either."
            )
    return config


def check_initialization(config: PeftConfig) -> None:
    """Raise a `ValueError` for an initialization from data, which adding the adapter does not perform."""
    how = vars(config).get("init_lora_weights")
    if how in DATA_DRIVEN:
        raise ValueError(
            f"peft_config has init_lora_weights={how!r}, which needs {DATA_DRIVEN[how]} that the trainer does not "
            "collect: the adapter would start from random weights. Leave out init_lora_weights, or add the adapter to "
            "the pipeline and initialize it before it is given to the trainer."
        )


def check_config(config: PeftConfig, owner: str) -> None:
    """
    Try an adapter's config on a single layer.

    Args:
        config ([`~peft.PeftConfig`]):
            The config.
        owner (`str`):
            Name of the object that has it, for the message.

    Raises:
        `ValueError`: If the layer with the disabled adapter differs from the layer without it: the KL divergence would
            be to another model than the base, and the saved adapter would be applied to another one.
    """
    unusual = changed_fields(config)
    try:
        if _leaves_base_alone(config):
            return
    except torch.OutOfMemoryError:  # says what is wrong by itself
        raise
    except Exception as error:  # any of peft's methods may come, with its own requirements
        raise ValueError(
            f"{owner} is {in_words(config)}, which can't be added to a linear layer of a diffusers model "
            f"({in_a_line(error)}). Use a LoraConfig with r, lora_alpha and target_modules."
        ) from error
    causes = [name for name in unusual if _leaves_base_alone(_with_default(config, name))] or list(unusual)
    given = ", ".join(f"{name}={unusual[name]!r}" for name in causes)
    raise ValueError(
        f"{owner} has {given or type(config).__name__}, which changes weights of the base model itself: with the "
        "adapter switched off it would not be the base model any more, so the KL divergence would be to another one, "
        f"and the saved adapter would act on another one. Leave out {', '.join(causes) or 'this kind of adapter'}."
    )


def in_words(config: PeftConfig) -> str:
    """Return a config as text, without the settings that are its class's defaults."""
    return (
        f"{type(config).__name__}({', '.join(f'{name}={value!r}' for name, value in changed_fields(config).items())})"
    )


def changed_fields(config: PeftConfig) -> dict[str, Any]:
    """Return the settings of a config that differ from its class's defaults, except those of every config."""
    return {
        field.name: value
        for field in dataclasses.fields(config)
        if field.name not in BOOKKEEPING and (value := vars(config)[field.name]) != default_of(field)
    }


def _with_default(config: PeftConfig, name: str) -> PeftConfig:
    changed = copy.deepcopy(config)
    vars(changed)[name] = next(default_of(field) for field in dataclasses.fields(config) if field.name == name)
    return changed


def _leaves_base_alone(config: PeftConfig) -> bool:
    """Return whether a layer whose adapter was trained and switched off computes what it did before it had one."""
    config = copy.deepcopy(config)
    vars(config).update(dict.fromkeys(PLACES & vars(config).keys()))
    vars(config).update({name: {} for name in PATTERNS & vars(config).keys()})
    vars(config)["target_modules"] = {STAND_IN}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = nn.ModuleDict({STAND_IN: nn.Linear(STAND_IN_WIDTH, STAND_IN_WIDTH)})
        inputs = torch.randn(2, STAND_IN_WIDTH)
        expected = model[STAND_IN](inputs)
        inject_adapter_in_model(config, model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        if torch.equal(model[STAND_IN](inputs), expected):
            raise ValueError("trained or not, it has no effect on what the layer computes")
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(False)
        return torch.equal(model[STAND_IN](inputs), expected)


def check_projections(denoiser: nn.Module, name: str) -> None:
    """Raise a `ValueError` for fused attention projections."""
    for module in denoiser.modules():
        if isinstance(module, Attention):  # its `fused_projections` stays True after unfusing
            fused = "Fused" in type(module.processor).__name__
        else:
            fused = isinstance(module, AttentionModuleMixin) and module.fused_projections
        if fused:
            raise ValueError(
                f"The attention projections of pipeline.{name} are fused, and the pipelines that load what is "
                f"saved have them apart. Call `pipeline.{name}.unfuse_qkv_projections()` first."
            )


def check_storage(denoiser: nn.Module, name: str) -> None:
    """
    Raise a `ValueError` for convolutions under layerwise casting: their backward pass reads the weight, which has been
    cast back to its storage dtype by then.
    """
    for key, module in denoiser.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.weight.dtype.itemsize == 1:
            kind = type(module).__name__
            raise ValueError(
                f"pipeline.{name}.{key} is a {kind} stored as {module.weight.dtype} by layerwise casting, which has "
                "no gradient. Load the pipeline again and leave convolutions out: "
                f"`pipeline.{name}.enable_layerwise_casting(..., skip_modules_classes=(torch.nn.{kind},))`."
            )


def check_copies(denoiser: nn.Module, owner: str) -> None:
    """Raise a `ValueError` for an adapter that trains copies of layers."""
    for name, module in denoiser.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(
                f"{owner} trains a copy of the layer {name}, which stays when the adapter is switched off. Leave out "
                "modules_to_save and trainable_token_indices, and name such layers in target_modules."
            )


def check_use(denoiser: Any, name: str, active: list[str]) -> None:
    """Raise a `ValueError` for adapters whose use differs from what would be saved."""
    for layer in denoiser.modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if layer.merged:
            raise ValueError(
                f"The adapter {', '.join(layer.merged_adapters)} of pipeline.{name} is fused into the weights of the "
                "base model, where it can't be trained or switched off. Take it out again with "
                "`pipeline.unfuse_lora()`."
            )
        if layer.disable_adapters:
            raise ValueError(
                f"The adapter {', '.join(active)} of pipeline.{name} is switched off. Switch it on with "
                "`pipeline.enable_lora()`, or take it away with `pipeline.unload_lora_weights()`."
            )
        for adapter in active if isinstance(layer, LoraLayer) else []:
            if adapter not in layer.scaling:
                continue
            rank = layer.r[adapter]
            rank_in_scaling = rank**0.5 if denoiser.peft_config[adapter].use_rslora else rank
            weight = layer.scaling[adapter] * rank_in_scaling / layer.lora_alpha[adapter]
            if abs(weight - 1) > 1e-6:
                raise ValueError(
                    f"The adapter {adapter} has the weight {weight:g}, which the saved file would not have. Set it to "
                    f"1 with `pipeline.set_adapters({adapter!r})`."
                )


def first_difference(ours: nn.Module, loaded: nn.Module, adapter: str) -> str | None:
    """
    Describe the first difference between a loaded adapter and the saved one; `None` if there is none.

    Args:
        ours, loaded (`torch.nn.Module`):
            The denoiser with the adapter that was saved, and another one with the adapter that was loaded.
        adapter (`str`):
            Name of the adapter in both.
    """
    expected, found = (dict(_parts(denoiser, adapter)) for denoiser in (ours, loaded))
    for name, value in expected.items():
        if name not in found:
            return f"{name} is not in it"
        other = found[name]
        if isinstance(value, torch.Tensor):
            if not torch.equal(value.to(other), other):  # loaders take the dtype of the base model
                return f"{name} is not as it was trained"
        elif value != other:
            return f"{name} is {other!r} and not {value!r}"
    return f"it adds {extra[0]}" if (extra := sorted(found.keys() - expected.keys())) else None


def _parts(denoiser: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """Return tensors and settings of an adapter by name."""
    for name, layer in denoiser.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        for key, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if not key.startswith("base_layer.") and adapter in key.split("."):
                yield f"{name}.{key}", tensor.detach()
        for key, values in vars(layer).items():
            if isinstance(values, dict) and isinstance(values.get(adapter), int | float | str):
                yield f"{name}.{key}", values[adapter]
