"""
Memory of one training step, counted on networks without weights: `python benchmarks/activations.py`.

Denoisers of the published sizes are created on PyTorch's meta device, in bfloat16 with a float32 adapter, and run one
forward pass. The tensors that autograd saves for the backward pass are summed up. Attention saves what a fused kernel
would: queries, keys, values and the result.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from ddpo_trl.policy.lora import attention_projections


SDXL = {
    "sample_size": 128, "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


def stable_diffusion_inputs(batch: int) -> dict[str, Any]:
    return {
        "sample": torch.empty(batch, 4, 64, 64),
        "timestep": torch.empty(1),
        "encoder_hidden_states": torch.empty(batch, 77, 768),
    }


def sdxl_inputs(batch: int) -> dict[str, Any]:
    return {
        "sample": torch.empty(batch, 4, 128, 128),
        "timestep": torch.empty(1),
        "encoder_hidden_states": torch.empty(batch, 77, 2048),
        "added_cond_kwargs": {"text_embeds": torch.empty(batch, 1280), "time_ids": torch.empty(batch, 6)},
    }


def flux_inputs(batch: int) -> dict[str, Any]:
    """Inputs for 512 x 512 images: 32 x 32 packed latents and 512 text tokens."""
    return {
        "hidden_states": torch.empty(batch, 1024, 64),
        "encoder_hidden_states": torch.empty(batch, 512, 4096),
        "pooled_projections": torch.empty(batch, 768),
        "timestep": torch.empty(batch),
        "guidance": torch.empty(batch),
        "img_ids": torch.empty(1024, 3),
        "txt_ids": torch.empty(512, 3),
    }


NETWORKS: dict[str, tuple[Callable[[], Any], Callable[[int], dict[str, Any]], int]] = {
    "Stable Diffusion 1.5, 512": (lambda: UNet2DConditionModel(cross_attention_dim=768), stable_diffusion_inputs, 4),
    "SDXL, 1024": (lambda: UNet2DConditionModel(**SDXL), sdxl_inputs, 4),
    "FLUX.1-dev, 512": (lambda: FluxTransformer2DModel(guidance_embeds=True), flux_inputs, 32),
}


class FusedAttention(torch.autograd.Function):
    """Compute nothing, and save what fused attention saves."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients * 3


def add_adapter(network: nn.Module, rank: int) -> int:
    """Add a float32 adapter to the frozen network, and return its number of parameters."""
    network.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, target_modules=attention_projections(network)), network)
    count = 0
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                module.register_parameter(name, nn.Parameter(parameter.detach().float()))
                count += parameter.numel()
    return count


def kept_bytes(network: nn.Module, inputs: dict[str, Any]) -> int:
    """Return the bytes that autograd saves in a forward pass, each storage counted once, without the weights."""
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(**inputs)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


def main() -> None:
    F.scaled_dot_product_attention = lambda query, key, value, *rest, **options: FusedAttention.apply(
        query, key, value
    )
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    print(f"{'':<27}{'parameters':>12}{'adapter':>10}{'kept per sample':>18}{'with checkpointing':>20}")
    for name, (make, inputs, rank) in NETWORKS.items():
        network = make().train()
        parameters = sum(parameter.numel() for parameter in network.parameters())
        adapter = add_adapter(network, rank)
        plain = kept_bytes(network, inputs(1)) / 2**30
        network.enable_gradient_checkpointing()
        checkpointed = kept_bytes(network, inputs(1)) / 2**30
        print(
            f"{name:<27}{parameters / 1e6:>10,.0f} M{adapter / 1e6:>8.1f} M{plain:>14.2f} GiB{checkpointed:>16.2f} GiB"
        )


if __name__ == "__main__":
    main()
