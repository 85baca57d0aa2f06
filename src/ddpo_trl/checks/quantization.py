"""Check of quantized layers: a gradient has to come through them, because the adapters before them are trained too."""

import torch
from diffusers import ModelMixin
from torch import nn

from ddpo_trl.descriptions import in_a_line


# Difference of a quantized layer's gradient from that of its weights, in the direction of an input. Rounding is below
# a percent (int8 activations in bfloat16); layers that round their inputs without a gradient are off by half or more.
TOLERANCE = 0.1

REMEDY = (
    "Quantize weights only, for example with `TorchAoConfig(Int8WeightOnlyConfig(version=2))` or "
    "`BitsAndBytesConfig(load_in_4bit=True)`."
)


def check_quantized_layers(denoiser: ModelMixin, name: str) -> None:
    """
    Try a quantized layer of each kind: its output is linear in its input, so the gradient is known from outputs.

    Args:
        denoiser ([`~diffusers.ModelMixin`]):
            The denoiser, on the device on which it is trained.
        name (`str`):
            Its name in the pipeline.

    Raises:
        `ValueError`: If a layer has no gradient, or another one than that of its weights. The gradient of the adapters
            would be wrong, and nothing else would show it.
    """
    kinds = {
        (type(layer), type(layer.weight)): (key, layer)
        for key, layer in denoiser.named_modules()
        if isinstance(layer, nn.Linear) and type(layer.weight) is not nn.Parameter
    }
    for key, layer in kinds.values():
        kind = f"pipeline.{name}.{key} is a {type(layer).__name__} with a weight of {type(layer.weight).__name__}"
        try:
            error = gradient_error(layer, denoiser.dtype)
        except (RuntimeError, NotImplementedError, AssertionError) as problem:
            raise ValueError(f"{kind}, which has no gradient here ({in_a_line(problem)}). {REMEDY}") from problem
        if not error <= TOLERANCE:
            raise ValueError(
                f"{kind}, whose gradient is not that of its weights: they differ by {error:.0%} for a random input, "
                f"so the adapters' gradients would be wrong. {REMEDY}"
            )


@torch.enable_grad()
def gradient_error(layer: nn.Linear, dtype: torch.dtype) -> float:
    """Return the relative difference of (Wᵀ W x)·x by a layer's gradient from ‖W x‖² by its outputs."""
    drawn = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))
    inputs = drawn.to(layer.weight.device, dtype).requires_grad_()
    with torch.no_grad():
        product = layer(inputs) - layer(torch.zeros_like(inputs))
    (gradient,) = torch.autograd.grad((layer(inputs).float() * product.float()).sum(), inputs)
    expected = product.float().square().sum()
    if not expected:  # all weights are 0
        return 0.0
    return ((gradient.float() * inputs.float()).sum() / expected - 1).abs().item()
