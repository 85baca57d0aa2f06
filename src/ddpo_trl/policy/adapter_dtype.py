"""Products of a LoRA adapter in the dtype of the denoiser, from float32 weights."""

from typing import Literal

import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ddpo_trl.policy.denoiser import adapter_layers


class InputDtypeLinear(nn.Linear):
    """Linear layer that computes in the dtype of its inputs."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class InputDtypeConv2d(nn.Conv2d):
    """Convolution that computes in the dtype of its inputs, padded with zeros as peft's are."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        weight = self.weight.to(input.dtype)
        return F.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


INPUT_DTYPE: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: InputDtypeLinear, nn.Conv2d: InputDtypeConv2d}
WEIGHT_DTYPE = {own: stock for stock, own in INPUT_DTYPE.items()}


def set_compute_dtype(denoiser: nn.Module, adapter: str, dtype: Literal["float32", "denoiser"]) -> None:
    """
    Set the dtype in which the products with an adapter's weights are computed.

    By default, peft casts the inputs of each layer to the dtype of the adapter's weights, which are float32: queries,
    keys and values of an attention keep a copy each for the backward pass, of twice the size in a bfloat16 denoiser.
    The weights, and files of them, stay float32 either way. Layers other than linear ones and convolutions, and
    variants such as DoRA, stay as they are.

    Args:
        denoiser (`torch.nn.Module`):
            Network with the adapter.
        adapter (`str`):
            Name of the adapter.
        dtype (`"float32"` or `"denoiser"`):
            The dtype of the weights, or that of the inputs.
    """
    classes = INPUT_DTYPE if dtype == "denoiser" else WEIGHT_DTYPE
    for layer in adapter_layers(denoiser):
        if not isinstance(layer, LoraLayer) or adapter in layer.lora_variant or adapter not in layer.lora_A:
            continue
        factors = (layer.lora_A[adapter], layer.lora_B[adapter])
        if all(type(factor) in classes for factor in factors):
            layer.cast_input_dtype_enabled = dtype == "float32"
            for factor in factors:  # the same module: optimizers, hooks and state dicts keep what they have of it
                factor.__class__ = classes[type(factor)]
