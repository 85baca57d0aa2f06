"""Under which conditions a batch was sampled: what training has to share with it, told apart at next to no cost.

Sums stand for tensors, since a copy of weights or embeddings would cost memory in every round. They are left on the
device: nothing waits for them unless they are compared.
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ddpo_trl.config import DDPOConfig
from ddpo_trl.policy.denoiser import adapter_layers
from ddpo_trl.policy.values import is_setting


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """
    Under which conditions a batch was sampled. They are looked at if a replay turns out to be another policy.

    Args:
        autocast (`torch.dtype`, *optional*):
            The dtype of autocast, `None` if it was off.
        settings (`Mapping[str, Mapping]`):
            The sampler's settings by owner and name.
        denoiser_dtype (`torch.dtype`):
            In which the denoiser was.
        adapter (`tuple`):
            How each adapter layer was switched.
        weights (`Mapping[str, torch.Tensor]`):
            The sum of each trained parameter.
        embeddings (`tuple[torch.Tensor, ...]`):
            Weighted sums over the prompt embeddings of all calls of the pipeline; empty if they are not known.
        stochastic (`Collection[int]`, *optional*):
            Indices of the steps that got noise, `None` for all.
    """

    autocast: torch.dtype | None
    settings: Mapping[str, Mapping[str, Any]]
    denoiser_dtype: torch.dtype
    adapter: tuple[Any, ...]
    weights: Mapping[str, Tensor]
    embeddings: tuple[Tensor, ...]
    stochastic: Collection[int] | None


# Fields of DDPOConfig that are read in every run of the pipeline. Others, like eta, are read once.
LIVE_FIELDS = ("guidance_scale", "num_inference_steps", "log_prob_reduction")

# By whom settings are held: the config, the further arguments of the pipeline, the policy scheduler.
SettingOwners = Mapping[str, dict[str, Any]]


def conditions(
    settings: Mapping[str, Mapping[str, Any]],
    denoiser: ModelMixin,
    embeddings: Any,
    stochastic: Collection[int] | None,
) -> Conditions:
    """
    The conditions that hold now.

    Args:
        settings (`Mapping[str, Mapping]`):
            [`settings_in_use`].
        denoiser ([`~diffusers.ModelMixin`]):
            The network that is trained.
        embeddings:
            What `encode_prompt` returned; empty if it is not known.
        stochastic (`Collection[int]`, *optional*):
            Indices of the steps that get noise, `None` for all.
    """
    device = denoiser.device.type
    return Conditions(
        autocast=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        settings=settings,
        denoiser_dtype=denoiser.dtype,
        adapter=adapter_switches(denoiser),
        weights=weight_sums(denoiser),
        embeddings=tuple(row_sums(tensor) for tensor in tensors_in(embeddings)),
        stochastic=stochastic,
    )


def setting_owners(config: DDPOConfig, pipeline_kwargs: dict[str, Any], scheduler: Any) -> SettingOwners:
    """Where the sampler's settings live; to write there changes the sampler."""
    return {"config": vars(config), "pipeline_kwargs": pipeline_kwargs, "scheduler": vars(scheduler)}


def settings_in_use(owners: SettingOwners) -> dict[str, dict[str, Any]]:
    """The values of all settings that a run of the pipeline reads, by owner and name."""
    return {
        "config": {name: owners["config"][name] for name in LIVE_FIELDS},
        # Copied where it can be told whether somebody wrote into it.
        "pipeline_kwargs": {
            name: copy.deepcopy(value) if is_setting(value) else value
            for name, value in owners["pipeline_kwargs"].items()
        },
        # What begins with _ counts the steps, and the rest are tensors that follow from the numbers.
        "scheduler": {
            name: value
            for name, value in owners["scheduler"].items()
            if is_setting(value) and not name.startswith("_")
        },
    }


def adapter_switches(denoiser: nn.Module) -> tuple[tuple[Any, ...], ...]:
    """Of each adapter layer: whether it is off or merged into the weights, which adapters count, and their scales."""
    return tuple(
        (
            layer.disable_adapters,
            layer.merged,
            tuple(layer.active_adapters),
            tuple(layer.scaling.items()) if isinstance(layer, LoraLayer) else (),
        )
        for layer in adapter_layers(denoiser)
    )


def weight_sums(denoiser: nn.Module) -> Mapping[str, Tensor]:
    """The sum of each trained parameter; of this process's part of it where it is sharded."""
    return {
        name: (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach().sum()
        for name, parameter in denoiser.named_parameters()
        if parameter.requires_grad
    }


def changed_weights(denoiser: nn.Module, before: Conditions | None) -> list[str]:
    """Names of the trained parameters whose sum has changed since the conditions were recorded."""
    sums = {} if before is None else before.weights
    now = weight_sums(denoiser)
    return [name for name, value in sums.items() if name not in now or now[name] != value]


def row_sums(tensor: Tensor) -> Tensor:
    """Weighted sums over all dimensions but the first: exchanged rows show. (Plain ones are 0 after a LayerNorm.)"""
    if tensor.ndim < 2:
        return tensor.float()
    rows = tensor.flatten(1).float()
    return (rows * torch.arange(rows.shape[1], device=rows.device).sin()).sum(1)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    match value:
        case Tensor():
            yield value
        case tuple() | list():
            for part in value:
                yield from tensors_in(part)
        case dict():
            yield from tensors_in(list(value.values()))
