"""Tiny random pipelines that treat their scheduler or their latents in another way than most.

Inpainting under flow matching, schedules that are sliced, latents that are unpacked, permuted or kept in part, further
arguments and outputs of a scheduler, two denoisers.
"""

from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    BriaPipeline,
    BriaTransformer2DModel,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    KandinskyV22Img2ImgCombinedPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    MotionAdapter,
    StableDiffusion3InpaintPipeline,
    TextToVideoSDPipeline,
    UNet3DConditionModel,
    WanPipeline,
    WanVideoToVideoPipeline,
    ZImageInpaintPipeline,
)
from PIL import Image

from conformance.image_pipelines import (
    IMAGE_SIZE,
    IMAGE_SIZES,
    LENGTH,
    STABLE_DIFFUSION_BETAS,
    TEXT_SIZE,
    Case,
    clip,
    flux_parts,
    image_inputs,
    images,
    inpainting_inputs,
    kl_autoencoder,
    masks,
    ready,
    stable_diffusion_3_parts,
    stable_diffusion_parts,
    t5,
    unet,
)
from conformance.newer_pipelines import (
    IMAGE,
    WIDTH,
    kandinsky,
    ltx_video,
    t5_text_encoder,
    tiny_vae,
    wan,
    z_image,
)


def wide_images(count: int) -> list[Image.Image]:
    return [image.resize((IMAGE["width"], IMAGE["height"])) for image in images(count)]


def wide_image_inputs(count: int) -> dict[str, list[Any]]:
    return {"image": wide_images(count)}


def wide_inpainting_inputs(count: int) -> dict[str, list[Any]]:
    size = IMAGE["width"], IMAGE["height"]
    return {"image": wide_images(count), "mask_image": [mask.resize(size) for mask in masks(count)]}


def videos(count: int) -> dict[str, list[Any]]:
    """Five frames for each sample."""
    frames = wide_images(5 * count)
    return {"video": [frames[5 * row : 5 * row + 5] for row in range(count)]}


def flux_inpainting(seed: int) -> DiffusionPipeline:
    torch.manual_seed(seed)
    return ready(FluxInpaintPipeline(**flux_parts()))


def flux_kontext(seed: int) -> DiffusionPipeline:
    torch.manual_seed(seed)
    return ready(FluxKontextPipeline(**flux_parts()))


def stable_diffusion_3_inpainting(seed: int) -> DiffusionPipeline:
    torch.manual_seed(seed)
    return ready(StableDiffusion3InpaintPipeline(**stable_diffusion_3_parts(), **t5("_3")))


def z_image_inpainting(seed: int) -> DiffusionPipeline:
    return ready(ZImageInpaintPipeline(**z_image(seed).components))


def wan_video_to_video(seed: int) -> DiffusionPipeline:
    return ready(WanVideoToVideoPipeline(**parts_of(wan(seed), WanVideoToVideoPipeline)))


def parts_of(pipeline: DiffusionPipeline, other: type[DiffusionPipeline]) -> dict[str, Any]:
    """Those components that the other class takes."""
    wanted, _ = other._get_signature_keys(other)
    return {name: part for name, part in pipeline.components.items() if name in wanted}


def wan_2_2(seed: int) -> DiffusionPipeline:
    """Two transformers, one for the noisy steps and one for the others."""
    first, second = wan(seed), wan(seed + 100)
    parts = {**first.components, "transformer_2": second.components["transformer"]}
    return ready(WanPipeline(**parts, boundary_ratio=0.875))


def kandinsky_img2img(seed: int) -> DiffusionPipeline:
    return ready(KandinskyV22Img2ImgCombinedPipeline(**kandinsky(seed).components))


def ltx_image_to_video(seed: int) -> DiffusionPipeline:
    return ready(LTXImageToVideoPipeline(**ltx_video(seed).components))


def ltx_condition(seed: int) -> DiffusionPipeline:
    """The scheduler of LTX-Video 0.9.5, the first release for this pipeline."""
    scheduler = FlowMatchEulerDiscreteScheduler()  # its timesteps are the pipeline's own
    return ready(LTXConditionPipeline(**{**ltx_video(seed).components, "scheduler": scheduler}))


def bria(seed: int) -> DiffusionPipeline:
    torch.manual_seed(seed)
    pipeline = BriaPipeline(
        **t5_text_encoder(),
        transformer=BriaTransformer2DModel(
            in_channels=16,  # 2x2 packed latents of 4 channels
            num_layers=1,
            num_single_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            axes_dims_rope=[2, 2, 4],
            joint_attention_dim=WIDTH,
            pooled_projection_dim=None,
        ),
        vae=tiny_vae(4, scaling_factor=0.13025, shift_factor=0.0),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return ready(pipeline)


def latent_consistency(seed: int) -> DiffusionPipeline:
    torch.manual_seed(seed)
    scheduler = LCMScheduler(**STABLE_DIFFUSION_BETAS, original_inference_steps=50)
    parts = {**stable_diffusion_parts(time_cond_proj_dim=8), "scheduler": scheduler}
    return ready(LatentConsistencyModelPipeline(**parts))


def text_to_video(seed: int) -> DiffusionPipeline:
    """ModelScope's: the scheduler steps frames, not videos."""
    torch.manual_seed(seed)
    pipeline = TextToVideoSDPipeline(
        **clip(),
        unet=UNet3DConditionModel(
            sample_size=IMAGE_SIZE // 2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            cross_attention_dim=TEXT_SIZE,
            attention_head_dim=4,
            norm_num_groups=4,
        ),
        vae=kl_autoencoder(),
        scheduler=DDIMScheduler(**STABLE_DIFFUSION_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    )
    # Zero before training: the frames would not matter to each other.
    for name, weight in pipeline.components["unet"].named_parameters():
        if "temp_conv" in name and "conv4" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return ready(pipeline)


def animate_diff(seed: int) -> DiffusionPipeline:
    """Image layers see a row per frame, motion layers one per position; with activation checkpointing too."""
    torch.manual_seed(seed)
    motion = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
        use_motion_mid_block=False,
    )
    scheduler = DDIMScheduler(**STABLE_DIFFUSION_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    parts = {**clip(), "unet": unet(), "vae": kl_autoencoder(), "motion_adapter": motion, "scheduler": scheduler}
    return ready(AnimateDiffPipeline(**parts))


VIDEO = {**IMAGE, "num_frames": 9, "max_sequence_length": 32}
STRENGTH = {"strength": 0.8}
FLUX_INPUTS = ("image", "mask_image")
# Only its first steps run the denoiser that is trained, so not all checks hold.
WAN_2_2 = Case("Wan 2.2", wan_2_2, {**IMAGE, "num_frames": 5, "max_sequence_length": 32})
MORE_CASES = (
    Case("FLUX.1 inpainting", flux_inpainting, {**IMAGE_SIZES, **LENGTH, **STRENGTH}, FLUX_INPUTS, inpainting_inputs),
    Case(
        "FLUX.1 Kontext",
        flux_kontext,
        {**IMAGE_SIZES, **LENGTH, "max_area": 256, "_auto_resize": False},
        ("image",),
        image_inputs,
    ),
    Case(
        "Stable Diffusion 3 inpainting",
        stable_diffusion_3_inpainting,
        {**IMAGE_SIZES, **LENGTH, **STRENGTH},
        FLUX_INPUTS,
        inpainting_inputs,
    ),
    Case(
        "Z-Image inpainting",
        z_image_inpainting,
        {**IMAGE, "max_sequence_length": 48, **STRENGTH},
        FLUX_INPUTS,
        wide_inpainting_inputs,
    ),
    Case(
        "Wan video-to-video", wan_video_to_video, {**IMAGE, "max_sequence_length": 32, **STRENGTH}, ("video",), videos
    ),
    Case(
        "Kandinsky 2.2 image-to-image",
        kandinsky_img2img,
        {"height": 16, "width": 32, "prior_num_inference_steps": 2, **STRENGTH},
        ("image",),
        image_inputs,
    ),
    Case("LTX-Video image-to-video", ltx_image_to_video, VIDEO, ("image",), wide_image_inputs),
    Case("LTX-Video condition", ltx_condition, VIDEO),
    Case("Bria", bria, {**IMAGE, "max_sequence_length": 32}),
    Case("Latent Consistency", latent_consistency),
    Case("ModelScope text-to-video", text_to_video, {**IMAGE_SIZES, "num_frames": 3}),
    Case("AnimateDiff", animate_diff, {**IMAGE_SIZES, "num_frames": 3}),
)
