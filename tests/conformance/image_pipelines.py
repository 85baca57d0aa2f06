"""Tiny random text-to-image pipelines, one for each family: stock classes, the releases' schedulers, no download.

Every pipeline runs prompts through its real chain (tokenizers, text encoders, denoiser, scheduler, VAE) in fp32 on the
CPU. Shapes are a few channels wide; what decides how a pipeline calls its parts (scheduler configuration, guidance,
added conditions, latent packing, learned variance) is as in the released checkpoints.
"""

import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from conftest import tiny_tokenizer


LETTERS = string.ascii_lowercase + string.digits
IMAGE_SIZE = 16
MAX_SEQUENCE_LENGTH = 16  # of the T5 and Gemma encoders: longer than the tests' prompts, so that these are padded

# Sizes that two parts of a pipeline must agree on.
TEXT_SIZE = 16  # hidden size of each CLIP encoder, and of its projection
T5_SIZE = 32  # at least the two CLIP encoders of Stable Diffusion 3 side by side
GEMMA_SIZE = 24

STABLE_DIFFUSION_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PIXART_BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


@dataclass(frozen=True)
class Case:
    """A pipeline to test: how to build it, and what its `__call__` needs beyond prompts, steps and guidance.

    `inputs` names the arguments that take one image for each prompt; `make_inputs` makes that many of them.
    `one_by_one` says that the pipeline itself has to be called for each sample, with the image and not a list of it;
    `draws` that it takes random numbers from torch's global generator, so that its own samples can't be repeated.
    """

    name: str
    build: Callable[[int], DiffusionPipeline]
    pipeline_kwargs: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    make_inputs: Callable[[int], dict[str, list[Any]]] | None = None
    guidance_scale: float | None = 3.0
    one_by_one: bool = False
    draws: bool = False


def ready(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline as `from_pretrained` gives it (T5 has dropout), without a progress bar."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Text


def openclip_tokenizer() -> CLIPTokenizer:
    """The same letters; OpenCLIP pads with the token of index 0, `!`, not with the end of text."""
    tokenizer = tiny_tokenizer()
    tokens = ["!", *tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token="!", model_max_length=tokenizer.model_max_length)


def clip_config(tokenizer: CLIPTokenizer, hidden_act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_SIZE,
        intermediate_size=TEXT_SIZE,
        projection_dim=TEXT_SIZE,
        num_hidden_layers=2,  # SDXL and SD3 read the last layer but one
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act=hidden_act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def clip() -> dict[str, Any]:
    """OpenAI's CLIP, as in Stable Diffusion 1.x, SDXL's first encoder and FLUX."""
    tokenizer = tiny_tokenizer()
    return {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(clip_config(tokenizer, "quick_gelu"))}


def openclip() -> dict[str, Any]:
    """OpenCLIP, as in Stable Diffusion 2.x."""
    tokenizer = openclip_tokenizer()
    return {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(clip_config(tokenizer, "gelu"))}


def openclip_with_projection() -> dict[str, Any]:
    """OpenCLIP with pooled output, the second encoder of SDXL and SD3."""
    tokenizer = openclip_tokenizer()
    encoder = CLIPTextModelWithProjection(clip_config(tokenizer, "gelu"))
    return {"tokenizer_2": tokenizer, "text_encoder_2": encoder}


def t5(suffix: str = "") -> dict[str, Any]:
    """One token per letter, ended by `</s>`; `suffix` is that of the components' names."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    tokenizer = T5Tokenizer(vocab=[*special, *((letter, -1.0) for letter in "▁" + LETTERS)], extra_ids=0)
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=T5_SIZE,
            d_ff=T5_SIZE,
            d_kv=8,
            num_heads=2,
            num_layers=1,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    return {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": encoder}


def gemma() -> dict[str, Any]:
    """One token per letter, begun by `<bos>`, padded on the left as in the release (the pipeline turns it round)."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    tokenizer = GemmaTokenizer(vocab={token: index for index, token in enumerate(tokens)}, add_bos_token=True)
    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=GEMMA_SIZE,
            intermediate_size=GEMMA_SIZE,
            num_hidden_layers=2,  # one with a sliding window, one without
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            query_pre_attn_scalar=8,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    return {"tokenizer": tokenizer, "text_encoder": encoder}


# Images


def kl_autoencoder(latent_channels: int = 4, **config: Any) -> AutoencoderKL:
    """Images of twice the latents' size."""
    return AutoencoderKL(
        **{
            "block_out_channels": (4, 8),
            "layers_per_block": 1,
            "latent_channels": latent_channels,
            "norm_num_groups": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "scaling_factor": 0.18215,
            **config,
        }
    )


def sixteen_channel_autoencoder(scaling_factor: float, shift_factor: float) -> AutoencoderKL:
    """The form that SD3 and FLUX share: shifted latents, no quantization layers."""
    return kl_autoencoder(
        latent_channels=16,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def deep_compression_autoencoder() -> AutoencoderDC:
    """Images of four times the latents' size."""
    blocks, channels = ("ResBlock", "ResBlock", "EfficientViTBlock"), (4, 8, 8)
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )


def images(count: int) -> list[Image.Image]:
    """Different noise in each."""
    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    return [Image.fromarray(np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)) for i in range(count)]


def masks(count: int) -> list[Image.Image]:
    """Masks of the area to repaint (white), which begins at a different column for each."""
    columns = np.arange(IMAGE_SIZE)[None].repeat(IMAGE_SIZE, axis=0)
    return [Image.fromarray((columns >= IMAGE_SIZE // 2 - 2 * (i % 4)).astype(np.uint8) * 255) for i in range(count)]


def image_inputs(count: int) -> dict[str, list[Any]]:
    return {"image": images(count)}


def inpainting_inputs(count: int) -> dict[str, list[Any]]:
    return {"image": images(count), "mask_image": masks(count)}


# Stable Diffusion 1.x, 2.x and XL


def unet(**config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            "sample_size": IMAGE_SIZE // 2,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": TEXT_SIZE,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            **config,
        }
    )


def pndm_scheduler() -> PNDMScheduler:
    return PNDMScheduler(**STABLE_DIFFUSION_BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)


def stable_diffusion_parts(**unet_config: Any) -> dict[str, Any]:
    return {
        **clip(),
        "unet": unet(**unet_config),
        "vae": kl_autoencoder(),
        "scheduler": pndm_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def stable_diffusion(seed: int) -> StableDiffusionPipeline:
    torch.manual_seed(seed)
    return ready(StableDiffusionPipeline(**stable_diffusion_parts()))


def stable_diffusion_2(seed: int) -> StableDiffusionPipeline:
    """The v-prediction model, on the schedule that ends in pure noise."""
    torch.manual_seed(seed)
    parts = stable_diffusion_parts(use_linear_projection=True, upcast_attention=True, attention_head_dim=(1, 2))
    scheduler = DDIMScheduler(
        **STABLE_DIFFUSION_BETAS,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return ready(StableDiffusionPipeline(**{**parts, **openclip(), "scheduler": scheduler}))


def stable_diffusion_img2img(seed: int) -> StableDiffusionImg2ImgPipeline:
    torch.manual_seed(seed)
    return ready(StableDiffusionImg2ImgPipeline(**stable_diffusion_parts()))


def stable_diffusion_inpainting(seed: int) -> StableDiffusionInpaintPipeline:
    """The UNet of the inpainting release: it also reads the mask (1 channel) and the masked image (4)."""
    torch.manual_seed(seed)
    return ready(StableDiffusionInpaintPipeline(**stable_diffusion_parts(in_channels=9)))


def stable_diffusion_controlnet(seed: int) -> StableDiffusionControlNetPipeline:
    torch.manual_seed(seed)
    parts = stable_diffusion_parts()
    # One stride for each channel count but the last, as many as the VAE has.
    controlnet = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 8))
    # These are zero before training: the image would not matter.
    outputs = [controlnet.controlnet_cond_embedding.conv_out, controlnet.controlnet_mid_block]
    for layer in [*outputs, *controlnet.controlnet_down_blocks]:
        torch.nn.init.normal_(layer.weight)
    return ready(StableDiffusionControlNetPipeline(**parts, controlnet=controlnet))


def stable_diffusion_xl_parts() -> dict[str, Any]:
    time_ids, time_size = 6, 8
    return {
        **clip(),
        **openclip_with_projection(),
        "unet": unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(1, 2),
            use_linear_projection=True,
            cross_attention_dim=2 * TEXT_SIZE,
            addition_embed_type="text_time",
            addition_time_embed_dim=time_size,
            projection_class_embeddings_input_dim=time_ids * time_size + TEXT_SIZE,
        ),
        "vae": kl_autoencoder(scaling_factor=0.13025),
        "scheduler": EulerDiscreteScheduler(**STABLE_DIFFUSION_BETAS, timestep_spacing="leading", steps_offset=1),
        "add_watermarker": False,
    }


def stable_diffusion_xl(seed: int) -> StableDiffusionXLPipeline:
    torch.manual_seed(seed)
    return ready(StableDiffusionXLPipeline(**stable_diffusion_xl_parts()))


def stable_diffusion_xl_img2img(seed: int) -> StableDiffusionXLImg2ImgPipeline:
    torch.manual_seed(seed)
    return ready(StableDiffusionXLImg2ImgPipeline(**stable_diffusion_xl_parts()))


# PixArt and Sana


def pixart_parts(scaling_factor: float, **transformer_config: Any) -> dict[str, Any]:
    return {
        **t5(),
        "transformer": PixArtTransformer2DModel(
            sample_size=128,  # only here does the pipeline of PixArt-alpha give the image's size to the model
            num_layers=2,
            num_attention_heads=3,
            attention_head_dim=8,
            cross_attention_dim=24,
            out_channels=8,  # the noise, and a variance that the pipeline drops
            caption_channels=T5_SIZE,
            **transformer_config,
        ),
        "vae": kl_autoencoder(scaling_factor=scaling_factor),
        "scheduler": DPMSolverMultistepScheduler(**PIXART_BETAS),
    }


def pixart_alpha(seed: int) -> PixArtAlphaPipeline:
    torch.manual_seed(seed)
    return ready(PixArtAlphaPipeline(**pixart_parts(0.18215, use_additional_conditions=True)))


def pixart_sigma(seed: int) -> PixArtSigmaPipeline:
    torch.manual_seed(seed)
    return ready(PixArtSigmaPipeline(**pixart_parts(0.13025, use_additional_conditions=False)))


def sana(seed: int) -> SanaPipeline:
    torch.manual_seed(seed)
    return ready(
        SanaPipeline(
            **gemma(),
            transformer=SanaTransformer2DModel(
                in_channels=4,
                out_channels=4,
                num_layers=2,
                num_attention_heads=4,
                attention_head_dim=4,
                num_cross_attention_heads=2,
                cross_attention_head_dim=8,
                cross_attention_dim=16,
                caption_channels=GEMMA_SIZE,
            ),
            vae=deep_compression_autoencoder(),
            scheduler=DPMSolverMultistepScheduler(
                **PIXART_BETAS, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        )
    )


# Stable Diffusion 3 and FLUX


def stable_diffusion_3_parts() -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": CLIPTextModelWithProjection(clip_config(tokenizer, "quick_gelu")),
        **openclip_with_projection(),
        "transformer": SD3Transformer2DModel(
            sample_size=IMAGE_SIZE // 2,
            pos_embed_max_size=IMAGE_SIZE // 2,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            caption_projection_dim=16,
            joint_attention_dim=T5_SIZE,
            pooled_projection_dim=2 * TEXT_SIZE,
        ),
        "vae": sixteen_channel_autoencoder(1.5305, 0.0609),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def stable_diffusion_3(seed: int) -> StableDiffusion3Pipeline:
    torch.manual_seed(seed)
    return ready(StableDiffusion3Pipeline(**stable_diffusion_3_parts(), **t5("_3")))


def stable_diffusion_3_without_t5(seed: int) -> StableDiffusion3Pipeline:
    torch.manual_seed(seed)
    return ready(StableDiffusion3Pipeline(**stable_diffusion_3_parts(), tokenizer_3=None, text_encoder_3=None))


def flux_parts() -> dict[str, Any]:
    return {
        **clip(),
        **t5("_2"),
        "transformer": FluxTransformer2DModel(
            in_channels=64,  # 2x2 packed latents of 16 channels
            num_layers=1,
            num_single_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            axes_dims_rope=(2, 2, 4),
            joint_attention_dim=T5_SIZE,
            pooled_projection_dim=TEXT_SIZE,
            guidance_embeds=True,
        ),
        "vae": sixteen_channel_autoencoder(0.3611, 0.1159),
        "scheduler": FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
    }


def flux(seed: int) -> FluxPipeline:
    torch.manual_seed(seed)
    return ready(FluxPipeline(**flux_parts()))


def flux_img2img(seed: int) -> FluxImg2ImgPipeline:
    torch.manual_seed(seed)
    return ready(FluxImg2ImgPipeline(**flux_parts()))


IMAGE_SIZES = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
LENGTH = {"max_sequence_length": MAX_SEQUENCE_LENGTH}
# Cleaning needs packages that the pipelines otherwise warn about.
PIXART_KWARGS = {**IMAGE_SIZES, **LENGTH, "use_resolution_binning": False, "clean_caption": False}
SANA_KWARGS = {"height": 32, "width": 32, **LENGTH, "use_resolution_binning": False}

IMAGE_CASES = (
    Case("Stable Diffusion 1.x", stable_diffusion),
    Case("Stable Diffusion 2.x, v-prediction", stable_diffusion_2),
    Case("Stable Diffusion XL", stable_diffusion_xl),
    Case("Stable Diffusion XL, guidance rescale", stable_diffusion_xl, {"guidance_rescale": 0.7}),
    Case("PixArt-alpha", pixart_alpha, PIXART_KWARGS),
    Case("PixArt-Sigma", pixart_sigma, PIXART_KWARGS),
    Case("Sana", sana, SANA_KWARGS),
    Case("Stable Diffusion 3", stable_diffusion_3, LENGTH),
    Case("Stable Diffusion 3 without T5", stable_diffusion_3_without_t5, LENGTH),
    Case("FLUX.1", flux, {**IMAGE_SIZES, **LENGTH}),
    # Strengths such that of 3 steps 2 run, of 4 steps 3: the families round differently.
    Case("Stable Diffusion image-to-image", stable_diffusion_img2img, {"strength": 0.75}, ("image",), image_inputs),
    Case("Stable Diffusion inpainting", stable_diffusion_inpainting, {}, ("image", "mask_image"), inpainting_inputs),
    Case("Stable Diffusion ControlNet", stable_diffusion_controlnet, {}, ("image",), image_inputs),
    Case(
        "Stable Diffusion XL image-to-image", stable_diffusion_xl_img2img, {"strength": 0.75}, ("image",), image_inputs
    ),
    Case(
        "FLUX.1 image-to-image",
        flux_img2img,
        {**IMAGE_SIZES, **LENGTH, "strength": 0.6},
        ("image",),
        image_inputs,
    ),
)
