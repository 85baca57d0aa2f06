"""Tiny random pipelines that can't be policies, each with the cause that has to be named when it is refused."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    Cosmos2VideoToWorldPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    StableDiffusionLatentUpscalePipeline,
    StableDiffusionPanoramaPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from conformance.image_pipelines import (
    STABLE_DIFFUSION_BETAS,
    TEXT_SIZE,
    Case,
    image_inputs,
    ready,
    stable_diffusion_parts,
)
from conformance.image_prompt_pipelines import FRAMEPACK, framepack
from conformance.input_pipelines import cosmos_2, cosmos_transformer
from conformance.more_pipelines import VIDEO, ltx_condition, wide_image_inputs
from conformance.newer_pipelines import IMAGE, LANGUAGE_MODEL, WIDTH, character_tokenizer


@dataclass(frozen=True)
class Refusal:
    """A pipeline that works for its users, and words of the message: of the cause, of the way out if there is one."""

    case: Case
    words: tuple[str, ...]


def panorama(seed: int) -> DiffusionPipeline:
    """Every view has its own copy of the scheduler's state."""
    torch.manual_seed(seed)
    scheduler = DDIMScheduler(**STABLE_DIFFUSION_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return ready(StableDiffusionPanoramaPipeline(**{**stable_diffusion_parts(), "scheduler": scheduler}))


def latent_upscaler(seed: int) -> DiffusionPipeline:
    """A model with EDM's preconditioning, for which the pipeline reads the scheduler's sigmas."""
    torch.manual_seed(seed)
    parts = stable_diffusion_parts()
    noise_level = 64 + 64  # of the image, as ones and zeros
    pipeline = StableDiffusionLatentUpscalePipeline(
        **{name: parts[name] for name in ("vae", "text_encoder", "tokenizer")},
        unet=UNet2DConditionModel(
            sample_size=8,
            in_channels=8,
            out_channels=5,
            block_out_channels=(32, 32, 64, 64),  # the norms have a group for every 32
            layers_per_block=1,
            down_block_types=("KDownBlock2D", *["KCrossAttnDownBlock2D"] * 3),
            mid_block_type=None,
            up_block_types=(*["KCrossAttnUpBlock2D"] * 3, "KUpBlock2D"),
            cross_attention_dim=TEXT_SIZE,
            attention_head_dim=8,
            norm_num_groups=None,
            act_fn="gelu",
            resnet_time_scale_shift="scale_shift",
            time_embedding_type="fourier",
            timestep_post_act="gelu",
            time_cond_proj_dim=noise_level + TEXT_SIZE,
            conv_in_kernel=1,
            conv_out_kernel=1,
        ),
        scheduler=EulerDiscreteScheduler(**STABLE_DIFFUSION_BETAS, prediction_type="sample"),
    )
    return ready(pipeline)


def cosmos_2_video(seed: int) -> DiffusionPipeline:
    parts = cosmos_2(seed).components
    return ready(Cosmos2VideoToWorldPipeline(**{**parts, "transformer": cosmos_transformer(in_channels=17)}))


def ltx_2(seed: int) -> DiffusionPipeline:
    """A video and its audio, each with a scheduler."""
    torch.manual_seed(seed)
    layers = LANGUAGE_MODEL["num_hidden_layers"]
    connector = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        mid_block_add_attention=False,
        mel_bins=8,
    )
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        decoder_causal=False,
    )
    pipeline = LTX2Pipeline(
        tokenizer=character_tokenizer("<bos> $A"),
        text_encoder=Gemma3ForCausalLM(Gemma3TextConfig(**LANGUAGE_MODEL, head_dim=WIDTH // 2)),
        connectors=LTX2TextConnectors(
            caption_channels=WIDTH,
            text_proj_in_factor=layers + 1,
            **{f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in connector.items()},
            connector_rope_base_seq_len=32,
            rope_double_precision=False,
            causal_temporal_positioning=False,
            rope_type="split",
        ),
        transformer=LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            num_layers=1,
            caption_channels=WIDTH,
            rope_double_precision=False,
            rope_type="split",
        ),
        vae=vae,
        audio_vae=audio_vae,
        vocoder=LTX2Vocoder(
            in_channels=audio_vae.config.output_channels * audio_vae.config.mel_bins,
            hidden_channels=8,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
            output_sampling_rate=16000,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    return ready(pipeline)


# What the guidance of the released models turns on, and this small one does not need.
LTX_2: dict[str, Any] = {
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "max_sequence_length": 16,
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0,
    "spatio_temporal_guidance_blocks": None,
    "use_cross_timestep": False,
}
COSMOS = {**IMAGE, "max_sequence_length": 32}
COPIES = "copies its scheduler within its __call__", "steps a single trajectory"
EDM = "sigmas from 0 to 80", "trained on EDM's noise levels"

REFUSALS = (
    Refusal(Case("LTX-2", ltx_2, LTX_2), COPIES),
    Refusal(Case("Stable Diffusion panorama", panorama, {"height": 16, "width": 16}), COPIES),
    Refusal(
        Case(
            "FramePack, two sections",
            framepack,
            {**FRAMEPACK, "num_frames": 18},
            ("image",),
            wide_image_inputs,
        ),
        ("starts another schedule in the same __call__", "give it fewer frames"),
    ),
    Refusal(
        Case(
            "LTX-Video condition with noise on its image",
            ltx_condition,
            VIDEO,
            ("image",),
            wide_image_inputs,
            one_by_one=True,
        ),
        ("computed from those that `prepare_latents` returned", "adds noise to some of them (image_cond_noise_scale"),
    ),
    Refusal(
        Case("Stable Diffusion latent upscaler", latent_upscaler, {}, ("image",), image_inputs),
        ("computes with the noise levels of its scheduler (`scheduler.sigmas`)", "whose states have another scale"),
    ),
    Refusal(Case("Cosmos 2 text-to-image", cosmos_2, COSMOS), EDM),
    Refusal(
        Case("Cosmos 2 video-to-world", cosmos_2_video, {**COSMOS, "num_frames": 5}, ("image",), wide_image_inputs),
        EDM,
    ),
)
