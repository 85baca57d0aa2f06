"""Fingerprint of the state that training must share with sampling: settings, weights, adapter and embeddings.

Tensors are represented by sums, since copies of weights or embeddings would cost memory in every round. The sums stay
on the device, so that there is no synchronization unless they are compared.
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
class Fingerprint:
    """
    State in which a batch was sampled. It is compared with the current one if a replay differs from sampling.

    Args:
        autocast (`torch.dtype`, *optional*):
            Dtype of autocast, `None` if it was disabled.
        settings (`Mapping[str, Mapping]`):
            Settings of the sampler by owner and name.
        denoiser_dtype (`torch.dtype`):
            Dtype of the denoiser.
        adapter (`tuple`):
            State of each adapter layer, see [`adapter_switches`].
        weights (`Mapping[str, torch.Tensor]`):
            Sum of each trained parameter.
        embeddings (`tuple[torch.Tensor, ...]`):
            Weighted sums over the prompt embeddings of all pipeline calls; empty if they are unknown.
        stochastic (`Collection[int]`, *optional*):
            Indices of the stochastic steps, `None` for all.
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

# Settings by their owner: the config, the `pipeline_kwargs`, the policy scheduler.
SettingOwners = Mapping[str, dict[str, Any]]


def fingerprint(
    settings: Mapping[str, Mapping[str, Any]],
    denoiser: ModelMixin,
    embeddings: Any,
    stochastic: Collection[int] | None,
) -> Fingerprint:
    """
    Return the fingerprint of the current state.

    Args:
        settings (`Mapping[str, Mapping]`):
            Settings of the sampler, see [`settings_in_use`].
        denoiser ([`~diffusers.ModelMixin`]):
            The trained network.
        embeddings:
            Return values of `encode_prompt`; empty if they are unknown.
        stochastic (`Collection[int]`, *optional*):
            Indices of the stochastic steps, `None` for all.
    """
    device = denoiser.device.type
    return Fingerprint(
        autocast=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        settings=settings,
        denoiser_dtype=denoiser.dtype,
        adapter=adapter_switches(denoiser),
        weights=weight_sums(denoiser),
        embeddings=tuple(row_sums(tensor) for tensor in tensors_in(embeddings)),
        stochastic=stochastic,
    )


def setting_owners(config: DDPOConfig, pipeline_kwargs: dict[str, Any], scheduler: Any) -> SettingOwners:
    """Return the dictionaries that hold the sampler's settings. Changes to them change the sampler."""
    return {"config": vars(config), "pipeline_kwargs": pipeline_kwargs, "scheduler": vars(scheduler)}


def settings_in_use(owners: SettingOwners) -> dict[str, dict[str, Any]]:
    """Return the values of all settings that a call of the pipeline reads, by owner and name."""
    return {
        "config": {name: owners["config"][name] for name in LIVE_FIELDS},
        # Copied where a later change in place can be detected by comparison.
        "pipeline_kwargs": {
            name: copy.deepcopy(value) if is_setting(value) else value
            for name, value in owners["pipeline_kwargs"].items()
        },
        # Names with _ are step counters, and the remaining values are tensors computed from these numbers.
        "scheduler": {
            name: value
            for name, value in owners["scheduler"].items()
            if is_setting(value) and not name.startswith("_")
        },
    }


def adapter_switches(denoiser: nn.Module) -> tuple[tuple[Any, ...], ...]:
    """Return for each adapter layer if it is disabled or merged, its active adapters, and their scales."""
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
    """Return the sum of each trained parameter, or of this process's shard of it."""
    return {
        name: (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach().sum()
        for name, parameter in denoiser.named_parameters()
        if parameter.requires_grad
    }


def changed_weights(denoiser: nn.Module, before: Fingerprint | None) -> list[str]:
    """Return the names of the trained parameters whose sum has changed since the fingerprint was taken."""
    sums = {} if before is None else before.weights
    now = weight_sums(denoiser)
    return [name for name, value in sums.items() if name not in now or now[name] != value]


def row_sums(tensor: Tensor) -> Tensor:
    """Return weighted sums over all dimensions except the first. (Unweighted ones are 0 after a LayerNorm.)"""
    if tensor.ndim < 2:
        return tensor.float()
    rows = tensor.flatten(1).float()
    return (rows * torch.arange(rows.shape[1], device=rows.device).sin()).sum(1)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Iterate over all tensors in nested tuples, lists and dictionaries."""
    match value:
        case Tensor():
            yield value
        case tuple() | list():
            for part in value:
                yield from tensors_in(part)
        case dict():
            yield from tensors_in(list(value.values()))
