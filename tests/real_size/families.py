"""Pipelines of published sizes without weights: stock classes with the published configurations."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from conformance import image_pipelines, newer_pipelines
from conftest import tiny_tokenizer


if TYPE_CHECKING:  # benchmarks/gpu runs these on a real GPU
    from real_size.simulated_gpu import SimulatedGPU


@dataclass(frozen=True, kw_only=True)
class Family:
    """
    A model.

    Args:
        build (`Callable[[], DiffusionPipeline]`):
            Makes the pipeline with its networks on "meta".
        weights (`float`):
            Published number of the denoiser's weights, in millions.
        guidance_scale (`float`, *optional*), pipeline_kwargs (`dict`):
            Arguments of the pipeline.
        exact (`tuple[str, ...]`):
            Components in float32 instead of bfloat16.
    """

    build: Callable[[], DiffusionPipeline]
    weights: float
    guidance_scale: float | None = 5.0
    pipeline_kwargs: dict[str, Any] = field(default_factory=dict)
    exact: tuple[str, ...] = ()

    def pipeline(self, gpu: "SimulatedGPU") -> DiffusionPipeline:
        """Make the pipeline in CPU memory, in bfloat16."""
        pipeline = self.build()
        for name, network in pipeline.components.items():
            if isinstance(network, nn.Module):
                gpu.without_values(network, torch.float32 if name in self.exact else torch.bfloat16)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def network(name: str, **config: Any) -> Any:
    """Make a network of diffusers without memory; what is not given is its class's default."""
    with torch.device("meta"):
        return getattr(diffusers, name)(**config)


def text_encoder(name: str, config: transformers.PretrainedConfig) -> Any:
    """Make a network of transformers without memory."""
    with torch.device("meta"):
        return getattr(transformers, name)(config)


# ---- Text ----


def clip(name: str = "CLIPTextModel") -> dict[str, Any]:
    """OpenAI's CLIP ViT-L/14."""
    config = transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    return {"text_encoder": text_encoder(name, config), "tokenizer": of_length(tiny_tokenizer(), 77)}


def openclip() -> dict[str, Any]:
    """OpenCLIP ViT-bigG/14."""
    config = transformers.CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
        hidden_act="gelu",
    )
    return {
        "text_encoder_2": text_encoder("CLIPTextModelWithProjection", config),
        "tokenizer_2": of_length(image_pipelines.openclip_tokenizer(), 77),
    }


def t5(suffix: str = "", name: str = "T5", vocabulary: int = 32128) -> dict[str, Any]:
    """The encoder of T5 v1.1 XXL, or of UMT5 XXL."""
    config = getattr(transformers, f"{name}Config")(
        vocab_size=vocabulary,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    return {
        f"text_encoder{suffix}": text_encoder(f"{name}EncoderModel", config),
        f"tokenizer{suffix}": of_length(newer_pipelines.character_tokenizer("$A </s>"), 512),
    }


def of_length(tokenizer: Any, length: int) -> Any:
    tokenizer.model_max_length = length
    return tokenizer


def qwen3() -> dict[str, Any]:
    """Qwen3 4B."""
    config = transformers.Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    return {"text_encoder": text_encoder("Qwen3Model", config), "tokenizer": newer_pipelines.qwen3_tokenizer()}


def qwen2_5_vl() -> Any:
    """Qwen2.5-VL 7B."""
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    return text_encoder(
        "Qwen2_5_VLForConditionalGeneration", transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )


# ---- Pipelines ----


def autoencoder(sample_size: int, scaling_factor: float, **config: Any) -> Any:
    """The autoencoder of Stable Diffusion, SDXL, SD 3 and FLUX."""
    return network(
        "AutoencoderKL",
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=sample_size,
        scaling_factor=scaling_factor,
        **config,
    )


def sixteen_channels(scaling_factor: float, shift_factor: float) -> Any:
    own = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
    return autoencoder(1024, scaling_factor, shift_factor=shift_factor, **own)


def stable_diffusion() -> DiffusionPipeline:
    return diffusers.StableDiffusionPipeline(
        **clip(),
        unet=network("UNet2DConditionModel", sample_size=64, cross_attention_dim=768),
        vae=autoencoder(512, 0.18215),
        scheduler=image_pipelines.pndm_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> DiffusionPipeline:
    unet = network(
        "UNet2DConditionModel",
        sample_size=128,
        cross_attention_dim=2048,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    betas = image_pipelines.STABLE_DIFFUSION_BETAS
    return diffusers.StableDiffusionXLPipeline(
        **clip(),
        **openclip(),
        unet=unet,
        vae=autoencoder(1024, 0.13025, force_upcast=True),
        scheduler=diffusers.EulerDiscreteScheduler(**betas, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def stable_diffusion_3_5_medium() -> DiffusionPipeline:
    transformer = network(
        "SD3Transformer2DModel",
        sample_size=128,
        num_layers=24,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        **clip("CLIPTextModelWithProjection"),
        **openclip(),
        **t5("_3"),
        transformer=transformer,
        vae=sixteen_channels(1.5305, 0.0609),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux() -> DiffusionPipeline:
    return diffusers.FluxPipeline(
        **clip(),
        **t5("_2"),
        transformer=network("FluxTransformer2DModel", guidance_embeds=True),
        vae=sixteen_channels(0.3611, 0.1159),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=256, max_image_seq_len=4096, shift=3.0
        ),
    )


def qwen_image() -> DiffusionPipeline:
    tiny = newer_pipelines.qwen_image(0)
    return diffusers.QwenImagePipeline(
        text_encoder=qwen2_5_vl(),
        tokenizer=tiny.tokenizer,
        transformer=network("QwenImageTransformer2DModel"),
        vae=network("AutoencoderKLQwenImage"),
        scheduler=tiny.scheduler,
    )


def z_image() -> DiffusionPipeline:
    return diffusers.ZImagePipeline(
        **qwen3(),
        transformer=network("ZImageTransformer2DModel"),
        vae=sixteen_channels(0.3611, 0.1159),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def wan() -> DiffusionPipeline:
    transformer = network(
        "WanTransformer3DModel",
        num_attention_heads=12,
        attention_head_dim=128,
        ffn_dim=8960,
        num_layers=30,
        text_dim=4096,
    )
    return diffusers.WanPipeline(
        **t5(name="UMT5", vocabulary=256384),
        transformer=transformer,
        vae=network("AutoencoderKLWan"),
        scheduler=newer_pipelines.wan(0).scheduler,
    )


SQUARE = {"height": 512, "width": 512}
FAMILIES = {
    "SD 1.5": Family(build=stable_diffusion, weights=859.5),
    "SDXL": Family(build=stable_diffusion_xl, weights=2567.5),
    "SD 3.5 medium": Family(build=stable_diffusion_3_5_medium, weights=2243.2),
    "FLUX.1-dev": Family(build=flux, weights=11901.4, guidance_scale=3.5, pipeline_kwargs=SQUARE),
    "Qwen-Image": Family(
        build=qwen_image,
        weights=20430.4,
        guidance_scale=None,
        pipeline_kwargs={**SQUARE, "true_cfg_scale": 4.0, "negative_prompt": " "},
    ),
    "Z-Image": Family(build=z_image, weights=6154.9, pipeline_kwargs=SQUARE),
    "Wan 2.1 1.3B": Family(
        build=wan,
        weights=1419.0,
        pipeline_kwargs={"height": 480, "width": 832, "num_frames": 9},
        exact=("vae",),
    ),
}
