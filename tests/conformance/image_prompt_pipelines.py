"""Tiny random pipelines for which an image is a part of the prompt: editing, and videos that an image begins.

Some scale every image to a megapixel, whatever size is asked for. Here the constants of their modules are small.
"""

import functools
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextInpaintPipeline,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoTransformer3DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from conformance.image_pipelines import (
    IMAGE_SIZES,
    LENGTH,
    Case,
    clip_config,
    flux_parts,
    inpainting_inputs,
    ready,
)
from conformance.input_pipelines import resized
from conformance.more_pipelines import STRENGTH, VIDEO, ltx_condition, wide_image_inputs
from conformance.newer_pipelines import (
    IMAGE,
    LANGUAGE_MODEL,
    WIDTH,
    character_tokenizer,
    qwen_image,
    umt5_text_encoder,
)
from conftest import tiny_tokenizer


AREA = 64 * 64  # pixels of the images that Qwen reads
vars(pipeline_qwenimage_edit)["calculate_dimensions"] = lambda target_area, ratio: (64, 64, None)
vars(pipeline_qwenimage_edit_plus).update(CONDITION_IMAGE_SIZE=AREA, VAE_IMAGE_SIZE=AREA)


def kontext_inpainting(seed: int) -> DiffusionPipeline:
    torch.manual_seed(seed)
    return ready(FluxKontextInpaintPipeline(**flux_parts()))


def vision_config(layers: int = 1, **config: Any) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        **config,
    )


def clip_image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)


def wan_image_to_video(seed: int) -> DiffusionPipeline:
    """Wan 2.1: the first frame goes into the latents' channels, and through CLIP."""
    torch.manual_seed(seed)
    heads, size, channels = 2, 12, 16
    pipeline = WanImageToVideoPipeline(
        **umt5_text_encoder(),
        image_encoder=CLIPVisionModel(vision_config()),
        image_processor=clip_image_processor(),
        transformer=WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=size,
            in_channels=2 * channels + 4,  # the latents, a mask, and the encoded frames
            out_channels=channels,
            text_dim=WIDTH,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
            image_dim=WIDTH,
            added_kv_proj_dim=heads * size,
        ),
        vae=AutoencoderKLWan(base_dim=4, num_res_blocks=1),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    )
    return ready(pipeline)


# ---- Qwen-Image-Edit ----

QWEN_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
QWEN_INSTRUCTION = "<|im_start|>user\n"


class ImagesOnly(Qwen2_5_VLProcessor):
    """Without the processor of videos, which needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any):
        super().__init__(image_processor, tokenizer)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)


def qwen_edit_parts(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    tokenizer = character_tokenizer(text="user Picture", special=QWEN_TOKENS)
    start, image, end = tokenizer.convert_tokens_to_ids(list(QWEN_TOKENS))
    rotary = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLConfig(
        text_config={**LANGUAGE_MODEL, "rope_parameters": rotary},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        vision_start_token_id=start,
        image_token_id=image,
        vision_end_token_id=end,
    )
    return {
        **{name: part for name, part in qwen_image(seed).components.items() if name in ("vae", "scheduler")},
        "text_encoder": Qwen2_5_VLForConditionalGeneration(config),
        "tokenizer": tokenizer,
        "processor": ImagesOnly(Qwen2VLImageProcessor(), tokenizer),
        "transformer": QwenImageTransformer2DModel(
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(2, 2, 4),
        ),
    }


def with_short_template(pipeline: Any, image: str) -> DiffusionPipeline:
    """The template without its instruction, whose words would have to be tokens, and where the prompt begins in it."""
    pipeline.prompt_template_encode = f"{QWEN_INSTRUCTION}{image}{{}}<|im_end|>\n"
    pipeline.prompt_template_encode_start_idx = len(pipeline.tokenizer(QWEN_INSTRUCTION).input_ids)
    return ready(pipeline)


def qwen_image_edit(seed: int) -> DiffusionPipeline:
    return with_short_template(QwenImageEditPipeline(**qwen_edit_parts(seed)), "".join(QWEN_TOKENS))


def qwen_image_edit_plus(seed: int) -> DiffusionPipeline:
    """It takes several images of one sample, and one sample per call."""
    return with_short_template(QwenImageEditPlusPipeline(**qwen_edit_parts(seed)), "")


# ---- HunyuanVideo ----

LLAMA_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>")
SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\n"
USER = "<|eot_id|>\n\n<|start_header_id|>user<|end_header_id|>\n\n"
ASSISTANT = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
IMAGE_TOKENS = (16 // 8) ** 2


def llama_tokenizer() -> Any:
    return character_tokenizer(text="system user assistant", special=LLAMA_TOKENS)


def token_count(text: str) -> int:
    return len(llama_tokenizer()(text).input_ids)


def llama_config() -> LlamaConfig:
    """One layer more: the pipelines read the last but two."""
    return LlamaConfig(**{**LANGUAGE_MODEL, "num_hidden_layers": 3})


def long_clip() -> dict[str, Any]:
    """CLIP with the 77 tokens that HunyuanVideo counts on."""
    tokenizer = CLIPTokenizer(vocab=tiny_tokenizer().get_vocab(), merges=[], model_max_length=77)
    config: CLIPTextConfig = clip_config(tokenizer, "quick_gelu")
    return {"tokenizer_2": tokenizer, "text_encoder_2": CLIPTextModel(config)}


def hunyuan_video_parts() -> dict[str, Any]:
    return {
        "tokenizer": llama_tokenizer(),
        **long_clip(),
        "vae": AutoencoderKLHunyuanVideo(
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            layers_per_block=1,
            norm_num_groups=2,
            mid_block_add_attention=False,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
    }


HUNYUAN_TRANSFORMER = {
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size_t": 1,
    "text_embed_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "rope_axes_dim": (2, 2, 4),
}


def hunyuan_image_to_video(seed: int, condition: str) -> DiffusionPipeline:
    torch.manual_seed(seed)
    tokens = llama_tokenizer()
    llava = LlavaConfig(
        vision_config=vision_config(layers=2),
        text_config=llama_config(),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        pad_token_id=tokens.pad_token_id,
    )
    pipeline = HunyuanVideoImageToVideoPipeline(
        **hunyuan_video_parts(),
        text_encoder=LlavaForConditionalGeneration(llava),
        image_processor=clip_image_processor(),
        transformer=HunyuanVideoTransformer3DModel(
            **HUNYUAN_TRANSFORMER,
            patch_size=2,
            in_channels=4 if condition == "token_replace" else 2 * 4 + 1,
            guidance_embeds=condition == "token_replace",
            image_condition_type=condition,
        ),
    )
    return ready(pipeline)


def framepack(seed: int) -> DiffusionPipeline:
    torch.manual_seed(seed)
    vision = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    pipeline = HunyuanVideoFramepackPipeline(
        **hunyuan_video_parts(),
        text_encoder=LlamaModel(llama_config()),
        image_encoder=SiglipVisionModel(vision),
        feature_extractor=SiglipImageProcessor(size={"height": 16, "width": 16}),
        transformer=HunyuanVideoFramepackTransformer3DModel(
            **HUNYUAN_TRANSFORMER,
            in_channels=4,
            patch_size=2,
            guidance_embeds=True,
            image_condition_type=None,
            has_image_proj=True,
            image_proj_dim=WIDTH,
            has_clean_x_embedder=True,
        ),
    )
    return ready(pipeline)


HUNYUAN_IMAGE_TEMPLATE = {
    "template": f"{SYSTEM}<image>\n{USER}{{}}{ASSISTANT}",
    "crop_start": token_count(f"{SYSTEM}<image>\n{USER}"),
    "image_emb_len": IMAGE_TOKENS,
    "image_emb_start": token_count(SYSTEM),
    "image_emb_end": token_count(SYSTEM) + IMAGE_TOKENS,
}
FRAMEPACK_TEMPLATE = {"template": f"{SYSTEM}{USER}{{}}<|eot_id|>", "crop_start": token_count(SYSTEM + USER)}
HUNYUAN = {**IMAGE, "num_frames": 9, "max_sequence_length": 32}
# One section of three latent frames; more frames would take further sections.
FRAMEPACK = {**HUNYUAN, "prompt_template": FRAMEPACK_TEMPLATE, "latent_window_size": 3}
QWEN_EDIT = {**IMAGE, "true_cfg_scale": 4.0, "negative_prompt": " "}

IMAGE_PROMPT_CASES = (
    Case(
        "FLUX.1 Kontext inpainting",
        kontext_inpainting,
        {**IMAGE_SIZES, **LENGTH, **STRENGTH, "max_area": 256, "_auto_resize": False},
        ("image", "mask_image"),
        inpainting_inputs,
    ),
    Case(
        "Wan image-to-video",
        wan_image_to_video,
        {**IMAGE, "num_frames": 5},  # the transformer takes the first 512 tokens for text, those behind for the image
        ("image",),
        wide_image_inputs,
        one_by_one=True,
    ),
    Case(
        "Qwen-Image-Edit",
        qwen_image_edit,
        QWEN_EDIT,
        ("image",),
        lambda count: resized(count, "image", 64, 64),
        guidance_scale=None,
    ),
    Case(
        "Qwen-Image-Edit-Plus",
        qwen_image_edit_plus,
        QWEN_EDIT,
        ("image",),
        lambda count: resized(count, "image", 64, 64),
        guidance_scale=None,
        one_by_one=True,
    ),
    Case(
        "HunyuanVideo image-to-video",
        functools.partial(hunyuan_image_to_video, condition="token_replace"),
        {**HUNYUAN, "prompt_template": HUNYUAN_IMAGE_TEMPLATE},
        ("image",),
        wide_image_inputs,
    ),
    Case(
        "HunyuanVideo image-to-video, 33 channels",
        functools.partial(hunyuan_image_to_video, condition="latent_concat"),
        {**HUNYUAN, "prompt_template": HUNYUAN_IMAGE_TEMPLATE},
        ("image",),
        wide_image_inputs,
        guidance_scale=1.0,
    ),
    Case(
        "LTX-Video condition with an image",
        ltx_condition,
        {**VIDEO, "image_cond_noise_scale": 0.0, "frame_index": 4, "strength": 0.6},
        ("image",),
        wide_image_inputs,
        one_by_one=True,
    ),
    Case("FramePack, one section", framepack, FRAMEPACK, ("image",), wide_image_inputs),
)
