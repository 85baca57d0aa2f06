"""Stable Diffusion 1.5 and SDXL with their published configurations and random weights, made on the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from activations import SDXL
from conformance import image_pipelines
from conftest import tiny_tokenizer
from gpu.setting import is_rehearsal


DTYPE = torch.bfloat16  # of all networks; the adapter is in float32


class Network(NamedTuple):
    """
    A pipeline and the size of a round with it.

    Args:
        build (`Callable[[str], DiffusionPipeline]`):
            Makes the pipeline on a device.
        tiny (`Callable[[int], DiffusionPipeline]`):
            Makes the one that stands for it in a rehearsal, from a seed.
        batch_size, steps (`int`):
            Images per round, which are one batch and one micro-batch, and denoising steps.
        image_size (`int`):
            Height and width in pixels.
    """

    build: Callable[[str], Any]
    tiny: Callable[[int], Any]
    batch_size: int
    steps: int
    image_size: int

    def pipeline(self, device: str) -> Any:
        """Return a pipeline of its own, the same for each caller."""
        torch.manual_seed(0)
        pipeline = self.tiny(0).to(device, DTYPE) if is_rehearsal(device) else self.build(device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def sized(self, device: str) -> "Network":
        """Return the network with the sizes of a rehearsal, if this is one."""
        tiny = image_pipelines.IMAGE_SIZE
        return self._replace(batch_size=2, steps=3, image_size=tiny) if is_rehearsal(device) else self


@contextmanager
def made_on(device: str) -> Iterator[None]:
    """Weights are made on a device in bfloat16 while the context is open: on a CPU that would take minutes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


def clip() -> Any:
    """Make OpenAI's CLIP ViT-L/14."""
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
        )
    )


def openclip() -> Any:
    """Make OpenCLIP ViT-bigG/14."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            projection_dim=1280,
            hidden_act="gelu",
        )
    )


def autoencoder(**config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        **config,
    )


def of_length(tokenizer: Any, length: int) -> Any:
    tokenizer.model_max_length = length
    return tokenizer


def stable_diffusion(device: str) -> StableDiffusionPipeline:
    with made_on(device):
        networks = {
            "text_encoder": clip(),
            "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
            "vae": autoencoder(sample_size=512, scaling_factor=0.18215),
        }
    return StableDiffusionPipeline(
        **networks,
        tokenizer=of_length(tiny_tokenizer(), 77),
        scheduler=image_pipelines.pndm_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(device: str) -> StableDiffusionXLPipeline:
    with made_on(device):
        networks = {
            "text_encoder": clip(),
            "text_encoder_2": openclip(),
            "unet": UNet2DConditionModel(**SDXL),
            "vae": autoencoder(sample_size=1024, scaling_factor=0.13025, force_upcast=True),
        }
    betas = image_pipelines.STABLE_DIFFUSION_BETAS
    return StableDiffusionXLPipeline(
        **networks,
        tokenizer=of_length(tiny_tokenizer(), 77),
        tokenizer_2=of_length(image_pipelines.openclip_tokenizer(), 77),
        scheduler=EulerDiscreteScheduler(**betas, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


NETWORKS = {
    "SD 1.5": Network(stable_diffusion, image_pipelines.stable_diffusion, batch_size=4, steps=5, image_size=512),
    "SDXL": Network(stable_diffusion_xl, image_pipelines.stable_diffusion_xl, batch_size=1, steps=5, image_size=1024),
}
