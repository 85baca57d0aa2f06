"""Tiny random pipelines that need more than a prompt, or do more than run their networks.

What they have in common is that a batch is not just a longer list: reference images of all samples at once, one image
per call, noise from torch's global generator, attention processors that change while the pipeline runs.
"""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    ConfigMixin,
    Cosmos2TextToImagePipeline,
    CosmosTransformer3DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DControlNetModel,
    HunyuanDiTControlNetPipeline,
    ModelMixin,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    T2IAdapter,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers import transformer_cosmos
from PIL import Image
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
)

from conformance.image_pipelines import (
    IMAGE_SIZE,
    IMAGE_SIZES,
    LENGTH,
    TEXT_SIZE,
    Case,
    clip_config,
    image_inputs,
    images,
    ready,
    stable_diffusion,
    stable_diffusion_3_parts,
    stable_diffusion_parts,
    t5,
)
from conformance.newer_pipelines import (
    IMAGE,
    LANGUAGE_MODEL,
    WIDTH,
    character_tokenizer,
    flux2_klein,
    flux_vae,
    hunyuan_dit,
    t5_text_encoder,
)
from conftest import tiny_tokenizer


def resized(count: int, name: str, width: int, height: int) -> dict[str, list[Image.Image]]:
    return {name: [image.resize((width, height)) for image in images(count)]}


def randomized(layers: list[nn.Module]) -> None:
    """Weights that are zero before training: with zeros the image would not matter."""
    for layer in layers:
        for weight in layer.parameters():
            nn.init.normal_(weight, std=0.3)


def perturbed_attention(seed: int) -> DiffusionPipeline:
    torch.manual_seed(seed)
    return ready(StableDiffusionPAGPipeline(**stable_diffusion_parts(), pag_applied_layers="mid"))


def t2i_adapter(seed: int) -> DiffusionPipeline:
    torch.manual_seed(seed)
    adapter = T2IAdapter(
        in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"
    )
    return ready(StableDiffusionAdapterPipeline(**stable_diffusion_parts(), adapter=adapter))


def ip_adapter(seed: int) -> DiffusionPipeline:
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=TEXT_SIZE,
        intermediate_size=TEXT_SIZE,
        projection_dim=TEXT_SIZE,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    parts = {
        **stable_diffusion_parts(),
        "feature_extractor": CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE),
    }
    pipeline = StableDiffusionPipeline(**parts, image_encoder=CLIPVisionModelWithProjection(vision))
    unet = pipeline.unet
    # In the file format of a release: weights of cross-attention are numbered 1, 3, 5, ... in the order of the layers.
    cross_attention = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    attention = {
        f"{2 * index + 1}.to_{letter}_ip.weight": torch.randn(module.to_k.out_features, TEXT_SIZE)
        for index, module in enumerate(cross_attention)
        for letter in "kv"
    }
    tokens = 4
    projection = {
        "proj.weight": torch.randn(tokens * TEXT_SIZE, TEXT_SIZE),
        "proj.bias": torch.zeros(tokens * TEXT_SIZE),
        "norm.weight": torch.ones(TEXT_SIZE),
        "norm.bias": torch.zeros(TEXT_SIZE),
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": attention}])
    return ready(pipeline)


def hidream(seed: int) -> DiffusionPipeline:
    """The embeddings of its Llama are those of several layers, before the samples: `(layers, B, L, D)`."""
    # With other seeds, gradients of one pass differ by 2 to 3e-5 of the largest from those of two. It is rounding: in
    # float64 they differ by 4e-8 to 1e-7 with each of four seeds, which is that of the log-probabilities, in float32.
    torch.manual_seed(seed + 1)
    tokenizer = tiny_tokenizer()
    config = clip_config(tokenizer, "gelu")
    t5 = t5_text_encoder()
    pipeline = HiDreamImagePipeline(
        tokenizer=tokenizer,
        text_encoder=CLIPTextModelWithProjection(config),
        tokenizer_2=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_3=t5["tokenizer"],
        text_encoder_3=t5["text_encoder"],
        tokenizer_4=character_tokenizer("<bos> $A"),
        text_encoder_4=LlamaForCausalLM(LlamaConfig(**LANGUAGE_MODEL)),
        transformer=HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=(WIDTH, WIDTH),
            text_emb_dim=2 * TEXT_SIZE,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(32, 32),
            llama_layers=(0, 1),
        ),
        vae=flux_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.default_sample_size = 4  # the pipeline scales all sizes to the area of this one, squared
    return ready(pipeline)


def stable_diffusion_3_controlnet(seed: int) -> DiffusionPipeline:
    torch.manual_seed(seed)
    parts = stable_diffusion_3_parts()
    controlnet = SD3ControlNetModel.from_transformer(
        parts["transformer"], num_layers=2, num_extra_conditioning_channels=0, load_weights_from_transformer=False
    )
    randomized([controlnet.pos_embed_input, *controlnet.controlnet_blocks])
    return ready(StableDiffusion3ControlNetPipeline(**parts, **t5("_3"), controlnet=controlnet))


def hunyuan_dit_controlnet(seed: int) -> DiffusionPipeline:
    parts = hunyuan_dit(seed).components
    own = parts["transformer"].config
    controlnet = HunyuanDiT2DControlNetModel(
        transformer_num_layers=own["num_layers"],
        **{
            name: own[name]
            for name in (
                "num_attention_heads",
                "attention_head_dim",
                "in_channels",
                "patch_size",
                "sample_size",
                "hidden_size",
                "mlp_ratio",
                "cross_attention_dim",
                "cross_attention_dim_t5",
                "pooled_projection_dim",
            )
        },
    )
    randomized([controlnet.input_block, *controlnet.controlnet_blocks])
    return ready(HunyuanDiTControlNetPipeline(**parts, controlnet=controlnet, requires_safety_checker=False))


class Harmless(ModelMixin, ConfigMixin):
    """A safety checker that finds nothing; the real one has billions of weights."""

    config_name = "config.json"

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))  # gives it a device and dtype

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


# Without torchvision it does not import what resizes its mask: of one value, so that any method does.
vars(transformer_cosmos).setdefault(
    "transforms",
    SimpleNamespace(
        functional=SimpleNamespace(resize=lambda mask, size, interpolation: nn.functional.interpolate(mask, size)),
        InterpolationMode=SimpleNamespace(NEAREST="nearest"),
    ),
)


def cosmos_transformer(in_channels: int = 16) -> CosmosTransformer3DModel:
    return CosmosTransformer3DModel(
        in_channels=in_channels,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        rope_scale=(1.0, 4.0, 4.0),
        extra_pos_embed_type=None,
    )


def cosmos_2(seed: int) -> DiffusionPipeline:
    torch.manual_seed(seed)
    pipeline = Cosmos2TextToImagePipeline(
        **t5_text_encoder(),
        transformer=cosmos_transformer(),
        vae=AutoencoderKLWan(base_dim=4, num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        safety_checker=Harmless(),
    )
    return ready(pipeline)


INPUT_CASES = (
    Case(
        "FLUX.2 klein with a reference image",
        flux2_klein,
        {**IMAGE, "max_sequence_length": 48, "text_encoder_out_layers": (1, 2, 3)},
        ("image",),
        lambda count: resized(count, "image", 64, 64),
        one_by_one=True,
    ),
    Case("Stable Diffusion, perturbed attention", perturbed_attention, {"pag_scale": 3.0}),
    Case("Stable Diffusion T2I-Adapter", t2i_adapter, {}, ("image",), image_inputs),
    Case(
        "Stable Diffusion IP-Adapter",
        ip_adapter,
        {},
        ("ip_adapter_image",),
        lambda count: {"ip_adapter_image": images(count)},
        one_by_one=True,
    ),
    Case(
        "Stable Diffusion, guidance rescale per sample",
        stable_diffusion,
        {},
        ("guidance_rescale",),
        lambda count: {"guidance_rescale": [0.9 / (1 + row) for row in range(count)]},
        one_by_one=True,
    ),
    Case("HiDream", hidream, {**IMAGE, "max_sequence_length": 12}),
    Case(
        "Stable Diffusion 3 ControlNet",
        stable_diffusion_3_controlnet,
        {**IMAGE_SIZES, **LENGTH},
        ("control_image",),
        lambda count: {"control_image": images(count)},
        one_by_one=True,
        draws=True,
    ),
    Case(
        "HunyuanDiT ControlNet",
        hunyuan_dit_controlnet,
        {**IMAGE, "use_resolution_binning": False},
        ("control_image",),
        lambda count: resized(count, "control_image", 64, 32),
        one_by_one=True,
        draws=True,
    ),
)
