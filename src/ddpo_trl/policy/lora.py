"""The LoRA adapter of the denoiser: where it goes, put it on, save it for diffusers or peft, load it back."""

import copy
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from diffusers.training_utils import cast_training_params
from diffusers.utils import logging
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ddpo_trl.distributed import sharded_like, whole
from ddpo_trl.finite import check_weights
from ddpo_trl.policy.adapter_checks import (
    check_config,
    check_copies,
    check_initialization,
    check_projections,
    check_use,
    first_difference,
    in_a_line,
    in_words,
    without_dropout,
)


ADAPTER_NAME = "default"
LORA_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # where `pipeline.load_lora_weights(directory)` looks
PEFT_WEIGHTS_NAME = "adapter_model.safetensors"  # where `PeftModel.from_pretrained(denoiser, directory)` looks
PEFT_PREFIX = "base_model.model."  # of the names in that file


def default_lora_config(denoiser: nn.Module) -> LoraConfig:
    """r = 4 on the attention projections, as TRL ≤ 0.23 and ddpo-pytorch had it."""
    return LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=attention_projections(denoiser))


def attention_projections(denoiser: nn.Module) -> list[str]:
    """
    LoRA targets that select all linear layers of all attentions of a denoiser: queries, keys, values and outputs, of
    the text stream as well where there are two.

    Returns:
        Names within an attention (`["to_k", "to_out.0", ...]`) if these select the same layers, else full names.

    Raises:
        `ValueError`: If there is no attention.
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
            f"{type(denoiser).__name__} has no attention layers to put the default adapter on. Give `peft_config` "
            "with the target_modules of your choice."
        )
    selected = {name for name in modules if any(f".{name}".endswith(f".{target}") for target in targets)}
    return sorted(targets if selected == layers else layers)


def _name_within_attention(modules: dict[str, nn.Module], name: str) -> str | None:
    """`"to_out.0"` for `"blocks.3.attn.to_out.0"`; `None` for a layer that belongs to no attention."""
    owner = name
    while owner:
        owner = owner.rpartition(".")[0]
        if not isinstance(modules[owner], nn.ModuleList | nn.ModuleDict | nn.Sequential):
            break
    return name.removeprefix(f"{owner}.") if _is_attention(modules[owner]) else None


def _is_attention(module: nn.Module) -> bool:
    # Most attentions of diffusers are of these types; the others are named so.
    return isinstance(module, Attention | AttentionModuleMixin) or type(module).__name__.endswith("Attention")


def denoiser_name(pipeline: DiffusionPipeline) -> str:
    """
    The name of the component that is trained, `"unet"` or `"transformer"`.

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
    """The layers of a denoiser that carry adapters. Through peft, because not all denoisers know diffusers' mixin."""
    return [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]


def active_adapters(denoiser: nn.Module) -> list[str]:
    """Names of the adapters that are switched on."""
    return sorted({name for layer in adapter_layers(denoiser) for name in layer.active_adapters})


@contextmanager
def adapters_off(denoiser: nn.Module) -> Iterator[None]:
    """The denoiser without its adapters, while the context is open."""
    layers = adapter_layers(denoiser)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def add_adapter(pipeline: DiffusionPipeline, peft_config: PeftConfig | None) -> str:
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
        `ValueError`: If `peft_config` is given and the denoiser has an adapter, or several are active; if the adapter
            changes the base model, or would not be loaded from its file as it was trained.
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
    _check_other_networks(pipeline)
    check_projections(denoiser, name)
    check_use(denoiser, name, active)
    if active:
        denoiser.peft_config[active[0]] = config = without_dropout(denoiser.peft_config[active[0]])
        owner = f"The adapter {active[0]} of pipeline.{name}"
        check_config(config, owner)
        check_copies(denoiser, owner)
        _train_only(denoiser, active[0])
        _check_files(pipeline, active[0], owner)
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
        _check_files(pipeline, ADAPTER_NAME, "peft_config")
    except ValueError:
        remove_adapters(denoiser)  # as much of it as there is
        raise
    return ADAPTER_NAME


def _check_other_networks(pipeline: DiffusionPipeline) -> None:
    name = denoiser_name(pipeline)
    for other, component in pipeline.components.items():
        if other != name and isinstance(component, nn.Module) and adapter_layers(component):
            raise ValueError(
                f"pipeline.{other} carries an adapter, which would act in training and be missing from what is saved. "
                f"Load the weights of pipeline.{name} only, or merge the others into pipeline.{other} for good."
            )


def _train_only(denoiser: nn.Module, adapter: str) -> None:
    for layer in adapter_layers(denoiser):
        layer.set_adapter(adapter)  # lets its weights require gradients again
        for module in layer.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    cast_training_params(denoiser, torch.float32)


def _check_files(pipeline: DiffusionPipeline, adapter: str, owner: str) -> None:
    """
    Saves an adapter, loads it as its users will into a copy of the denoiser, and compares.

    Raises:
        `ValueError`: If it can't be loaded, or is another one then.
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
                twin.load_lora_weights(directory, adapter_name=adapter)
            else:
                PeftModel.from_pretrained(fresh, directory, adapter_name=adapter, low_cpu_mem_usage=True)
        unsaved = [f"{name} is not in the file" for name in trained_but_not_saved(denoiser, adapter)]
        problem = unsaved[0] if unsaved else first_difference(denoiser, fresh, adapter)
    except Exception as error:  # whatever the loaders of diffusers and peft raise here, they will raise for users too
        problem = in_a_line(error)
    if problem is None:
        return
    raise ValueError(
        f"{owner} is {in_words(denoiser.peft_config[adapter])}, and {loader} does not load what would be saved of it: "
        f"{problem}. Use a LoraConfig with r, lora_alpha and target_modules only."
    )


def trained_but_not_saved(denoiser: nn.Module, adapter: str) -> list[str]:
    """Names of the weights that require gradients and are not among those of an adapter."""
    saved = {value.data_ptr() for value in get_peft_model_state_dict(denoiser, adapter_name=adapter).values()}
    return [
        name for name, value in denoiser.named_parameters() if value.requires_grad and value.data_ptr() not in saved
    ]


def sharing_weights(denoiser: nn.Module) -> nn.Module:
    """A copy of a denoiser without its adapters, which takes no memory: it has the same weights."""
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


@contextmanager
def quiet() -> Iterator[None]:
    """Without what loaders say of parts that an adapter does not have."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _add_adapter(denoiser: nn.Module, peft_config: PeftConfig) -> None:
    try:
        if isinstance(denoiser, PeftAdapterMixin):
            denoiser.add_adapter(peft_config, ADAPTER_NAME)  # as below, and diffusers' methods know of it
        else:
            inject_adapter_in_model(peft_config, denoiser, ADAPTER_NAME)
    except Exception as error:  # peft's are of any type where a config does not suit a model
        raise ValueError(
            f"peft_config can't be put on {type(denoiser).__name__} ({in_a_line(error)}). Give it target_modules that "
            "are linear layers or convolutions there."
        ) from error


def remove_adapters(denoiser: nn.Module) -> None:
    """Removes all adapters, and the layers that held them."""
    recurse_remove_peft_layers(denoiser)
    for name, module in list(denoiser.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            parent, _, child = name.rpartition(".")
            denoiser.get_submodule(parent).register_module(child, module.original_module)
    vars(denoiser).pop("peft_config", None)
    if isinstance(denoiser, PeftAdapterMixin):
        denoiser._hf_peft_config_loaded = False


def adapter_scales(denoiser: nn.Module, adapter: str) -> list[float]:
    """What the products of an adapter's weights are multiplied by (`lora_alpha / r`), every value once."""
    return sorted({layer.scaling[adapter] for layer in adapter_layers(denoiser) if isinstance(layer, LoraLayer)})


def describe_adapter(denoiser: Any, adapter: str) -> str:
    """One line about an adapter: its layers and the number of its weights."""
    layers = len(adapter_layers(denoiser))
    weights = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
    targets = denoiser.peft_config[adapter].target_modules
    named = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    return f"{weights:,} weights on {layers} layers: {named if len(named) < 200 else named[:200] + ' ...'}"


def freeze_all_but_denoiser(pipeline: DiffusionPipeline, peft_config: PeftConfig | None) -> None:
    """
    Prepares a pipeline for training the denoiser's own weights, those of them that require gradients.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Without adapter, its denoiser in float32.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Must be `None` here.

    Raises:
        `ValueError`: If there is an adapter or a `peft_config`, the weights are in half precision, or the denoiser has
            weights that would not be loaded again.
    """
    name = denoiser_name(pipeline)
    denoiser = pipeline.components[name]
    if peft_config is not None or adapter_layers(denoiser):
        what = "peft_config is given" if peft_config is not None else "the pipeline carries a LoRA adapter"
        raise ValueError(f"use_lora is False, but {what}. Set use_lora=True to train the adapter, or take it away.")
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
            "they would not be loaded again. Take away what was added to it, such as an IP-Adapter with "
            "`pipeline.unload_ip_adapter()`, or train a LoRA adapter."
        )
    for component_name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and component_name != name:
            component.requires_grad_(False).eval()


def has_lora_loader(pipeline: DiffusionPipeline) -> bool:
    """Whether `pipeline.load_lora_weights` exists and loads adapters of the denoiser."""
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
    Writes `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(directory)` of diffusers loads.

    Where the pipeline has no such loader (PixArt, Kandinsky) it writes peft's files instead, for
    `PeftModel.from_pretrained(denoiser, directory)`. The adapter's config goes with the weights: without it a
    `lora_alpha` other than the rank would be lost.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline with the adapter on its denoiser.
        adapter (`str`):
            The adapter's name.
        directory (`str` or `os.PathLike`):
            Where to; made if absent.
        write (`bool`, *optional*, defaults to `True`):
            `False` on all processes but one: they only have a share in gathering sharded weights.
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
    Loads what [`save_adapter`] wrote *into* the existing adapter, whose parameters stay the optimizer's.

    (`load_lora_weights` would add a second adapter beside it: TRL's trainer lost its weights on resume that way.)

    Args:
        pipeline, adapter, directory:
            As for [`save_adapter`].

    Raises:
        `ValueError`: If the file can't be read, or has not exactly the adapter's weights.
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
