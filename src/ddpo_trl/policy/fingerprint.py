"""Fingerprint of the state that training must share with sampling: settings, trained weights and adapter.

A weight is represented by its sum, since copies would cost memory in every round. The sums stay on the device, so that
nothing waits for them unless they are compared.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ddpo_trl.config import DDPOConfig
from ddpo_trl.policy.denoiser import adapter_layers
from ddpo_trl.policy.values import is_setting


# Fields of DDPOConfig that are read in every run of the pipeline. Others, like eta, are read once.
LIVE_FIELDS = ("guidance_scale", "num_inference_steps", "log_prob_reduction")


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """
    State in which a batch was sampled. It is compared with the current one if a replay differs from sampling.

    Args:
        settings (`Mapping[str, Any]`):
            Settings of the sampler, by the name that the user knows.
        adapter (`tuple`):
            State of each adapter layer, see [`adapter_switches`].
        weights (`Mapping[str, torch.Tensor]`):
            Sum of each trained parameter.
    """

    settings: Mapping[str, Any]
    adapter: tuple[Any, ...]
    weights: Mapping[str, Tensor]


def settings_in_use(config: DDPOConfig, pipeline_kwargs: Mapping[str, Any], scheduler: Any) -> dict[str, Any]:
    """Return the values of all settings that a call of the pipeline reads."""
    return {
        **{name: vars(config)[name] for name in LIVE_FIELDS},
        # Copied where a later change in place can be detected by comparison.
        **{
            f"pipeline_kwargs[{name!r}]": copy.deepcopy(value) if is_setting(value) else value
            for name, value in pipeline_kwargs.items()
        },
        # Names with _ are step counters, and the remaining values are tensors computed from these numbers.
        **{
            f"scheduler.{name}": value
            for name, value in vars(scheduler).items()
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
    differs = [now[name] != value for name, value in sums.items() if name in now]
    read = iter(torch.stack(differs).int().tolist() if differs else ())  # the one wait for the device
    return [name for name in sums if name not in now or next(read)]
