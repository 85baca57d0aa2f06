"""The LoRA adapter of the denoiser: its default config, and adding it to a pipeline."""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from diffusers.training_utils import cast_training_params
from peft import (
    LoraConfig,
    PeftConfig,
    inject_adapter_in_model,
)
from peft.tuners.lora import LoraLayer
from torch import nn

from ddpo_trl.descriptions import in_a_line
from ddpo_trl.policy.adapter_checks import (
    check_config,
    check_copies,
    check_initialization,
    check_projections,
    check_storage,
    check_use,
    without_dropout,
)
from ddpo_trl.policy.adapter_files import check_files
from ddpo_trl.policy.denoiser import active_adapters, adapter_layers, denoiser_name, remove_adapters


ADAPTER_NAME = "default"

# Hook of layerwise casting by which an adapter does not cast its inputs. A float32 adapter has to.
UNCAST_INPUTS = "peft_autocast_disable"


def default_lora_config(denoiser: nn.Module) -> LoraConfig:
    """Return a config with r = 4 on the attention projections, as in TRL ≤ 0.23 and ddpo-pytorch."""
    return LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=attention_projections(denoiser))


def attention_projections(denoiser: nn.Module) -> list[str]:
    """
    Return LoRA targets that select all linear layers of all attentions of a denoiser: queries, keys, values and
    outputs, including those of a separate text stream.

    Returns:
        `list[str]`: Names within an attention (`["to_k", "to_out.0", ...]`) if these select the same layers, else
        full names.

    Raises:
        `ValueError`: If there are no attention layers.
    """
    modules = dict(denoiser.named_modules())
    layers: set[str] = set()
    targets: set[str] = set()
    for name, module in modules.items():
        if isinstance(module, nn.Linear) and (inner := _name_within_attention(modules, name)):
            layers.add(name)
            targets.add(inner)
    if not layers:
        raise ValueError(
            f"{type(denoiser).__name__} has no attention layers for the default adapter. Give `peft_config` "
            "with the target_modules of your choice."
        )
    selected = {name for name in modules if any(f".{name}".endswith(f".{target}") for target in targets)}
    return sorted(targets if selected == layers else layers)


def _name_within_attention(modules: dict[str, nn.Module], name: str) -> str | None:
    """Return `"to_out.0"` for `"blocks.3.attn.to_out.0"`; `None` for a layer outside of an attention."""
    owner = name
    while owner:
        owner = owner.rpartition(".")[0]
        if not isinstance(modules[owner], nn.ModuleList | nn.ModuleDict | nn.Sequential):
            break
    return name.removeprefix(f"{owner}.") if _is_attention(modules[owner]) else None


def _is_attention(module: nn.Module) -> bool:
    # Most attentions of diffusers are of these types; the others are named so.
    return isinstance(module, Attention | AttentionModuleMixin) or type(module).__name__.endswith("Attention")


def add_adapter(pipeline: DiffusionPipeline, peft_config: PeftConfig | None) -> str:
    """
    Freeze everything in the pipeline except a LoRA adapter of its denoiser, whose weights become float32.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            A pipeline with one active adapter on its denoiser, or with none.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to add; defaults to [`default_lora_config`] if the denoiser has none.

    Returns:
        `str`: Name of the adapter.

    Raises:
        `ValueError`: If `peft_config` is given although the denoiser has an adapter, or several are active; if the
            adapter changes the base model, or would not be loaded from its file as it was trained.
    """
    name = denoiser_name(pipeline)
    denoiser = pipeline.components[name]
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    active = active_adapters(denoiser)
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
    _check_other_networks(pipeline, name)
    check_projections(denoiser, name)
    check_storage(denoiser, name)
    check_use(denoiser, name, active)
    if active:
        denoiser.peft_config[active[0]] = config = without_dropout(denoiser.peft_config[active[0]])
        owner = f"The adapter {active[0]} of pipeline.{name}"
        check_config(config, owner)
        check_copies(denoiser, owner)
        _train_only(denoiser, active[0])
        check_files(pipeline, active[0], owner)
        return active[0]
    if peft_config is None:  # is known to be loaded as it was saved
        _add_adapter(denoiser, default_lora_config(denoiser))
        _train_only(denoiser, ADAPTER_NAME)
        return ADAPTER_NAME
    config = without_dropout(peft_config)
    check_initialization(config)
    check_config(config, "peft_config")
    try:
        _add_adapter(denoiser, config)
        check_copies(denoiser, "peft_config")
        _train_only(denoiser, ADAPTER_NAME)
        check_files(pipeline, ADAPTER_NAME, "peft_config")
    except ValueError:
        remove_adapters(denoiser)  # as much of it as there is
        raise
    return ADAPTER_NAME


def _check_other_networks(pipeline: DiffusionPipeline, name: str) -> None:
    for other, component in pipeline.components.items():
        if other != name and isinstance(component, nn.Module) and adapter_layers(component):
            raise ValueError(
                f"pipeline.{other} carries an adapter, which would act in training and be missing from what is saved. "
                f"Load the weights of pipeline.{name} only, or merge the others into pipeline.{other} for good."
            )


def _train_only(denoiser: nn.Module, adapter: str) -> None:
    for layer in adapter_layers(denoiser):
        layer.set_adapter(adapter)  # lets its weights require gradients again
        if "_diffusers_hook" in vars(layer):  # layerwise casting was enabled after the adapter had been added
            HookRegistry.check_if_exists_or_initialize(layer).remove_hook(UNCAST_INPUTS, recurse=False)
        for module in layer.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    cast_training_params(denoiser, torch.float32)


def _add_adapter(denoiser: nn.Module, peft_config: PeftConfig) -> None:
    try:
        if isinstance(denoiser, PeftAdapterMixin):
            denoiser.add_adapter(peft_config, ADAPTER_NAME)  # as below, and diffusers' methods know of it
        else:
            inject_adapter_in_model(peft_config, denoiser, ADAPTER_NAME)
    except torch.OutOfMemoryError:  # says what is wrong by itself
        raise
    except Exception as error:  # peft's are of any type where a config does not suit a model
        raise ValueError(
            f"peft_config can't be added to {type(denoiser).__name__} ({in_a_line(error)}). Give it target_modules "
            "that are linear layers or convolutions there."
        ) from error


def adapter_scales(denoiser: nn.Module, adapter: str) -> list[float]:
    """Return the distinct factors of an adapter's layers (`lora_alpha / r`)."""
    return sorted({layer.scaling[adapter] for layer in adapter_layers(denoiser) if isinstance(layer, LoraLayer)})


def describe_adapter(denoiser: Any, adapter: str) -> str:
    """Return one line about an adapter: its layers and the number of its weights."""
    layers = len(adapter_layers(denoiser))
    weights = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
    targets = denoiser.peft_config[adapter].target_modules
    named = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    return f"{weights:,} weights on {layers} layers: {named if len(named) < 200 else named[:200] + ' ...'}"
