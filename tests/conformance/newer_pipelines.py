"""Tiny random pipelines of the newer architectures: language models as text encoders, videos, two-stage models.

Every component is a stock class with the scheduler configuration of the released checkpoint; only the sizes are small.
"""

import re
import string
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLFlux2,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    KandinskyV22CombinedPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PriorTransformer,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    VQModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from conformance.image_pipelines import Case, ready
from conftest import tiny_tokenizer


SPECIAL_TOKENS = ["<pad>", "</s>", "<unk>", "<bos>", "<cls>", "<sep>", "<|im_start|>", "<|im_end|>"]
VOCABULARY_SIZE = 192  # the special tokens, the 100 printable characters, and the words of a pipeline's own template
WIDTH = 16  # of the text encoders
# The default initialization (0.02) is for wide layers: in narrow ones attention would be uniform.
LANGUAGE_MODEL = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def character_tokenizer(
    pattern: str = "$A", text: str = "", special: Sequence[str] = (), **config: Any
) -> PreTrainedTokenizerFast:
    """One token per character, but one per word (and the space before it) for the words of a pipeline's own ``text``.

    ``pattern`` puts a model's special tokens around, as T5's "$A </s>"; ``special`` are further ones.
    """
    words = dict.fromkeys(re.findall("[A-Za-z]+", text))
    tokens = [*SPECIAL_TOKENS, *special, *string.printable, *words, *(f" {word}" for word in words)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    assert len(vocabulary) <= VOCABULARY_SIZE
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    word = rf" ?\b(?:{'|'.join(words)})\b|" if words else ""
    tokenizer.pre_tokenizer = Split(Regex(word + r"[\s\S]"), "isolated")
    numbered = [(token, vocabulary[token]) for token in SPECIAL_TOKENS]
    tokenizer.post_processor = TemplateProcessing(single=pattern, special_tokens=numbered)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[*SPECIAL_TOKENS[3:], *special],
        model_max_length=256,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        **config,
    )


def qwen3_tokenizer() -> PreTrainedTokenizerFast:
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    )
    return character_tokenizer(text="user assistant think", chat_template=template)


def t5_config() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY_SIZE,
        "d_model": WIDTH,
        "d_kv": WIDTH // 2,
        "d_ff": 2 * WIDTH,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }


def t5_text_encoder() -> dict[str, Any]:
    return {"text_encoder": T5EncoderModel(T5Config(**t5_config())), "tokenizer": character_tokenizer("$A </s>")}


def umt5_text_encoder() -> dict[str, Any]:
    return {"text_encoder": UMT5EncoderModel(UMT5Config(**t5_config())), "tokenizer": character_tokenizer("$A </s>")}


def qwen3_text_encoder(num_hidden_layers: int = 2) -> dict[str, Any]:
    config = Qwen3Config(**{**LANGUAGE_MODEL, "num_hidden_layers": num_hidden_layers}, head_dim=WIDTH // 2)
    return {"text_encoder": Qwen3ForCausalLM(config), "tokenizer": qwen3_tokenizer()}


def tiny_vae(latent_channels: int, **config: Any) -> AutoencoderKL:
    """Four levels, for the factor 8 between pixels and latents that some pipelines take for granted."""
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        mid_block_add_attention=False,
        **config,
    )


def flux_vae() -> AutoencoderKL:
    """The scale and shift of FLUX.1's autoencoder, which Lumina 2, Chroma and Z-Image use."""
    return tiny_vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)


def open_gates(transformer: torch.nn.Module, name: str) -> None:
    """Large random weights where the time embedding sets the gates: near zero, they would hide the prompt."""
    for parameter_name, weight in transformer.named_parameters():
        if name in parameter_name:
            torch.nn.init.normal_(weight, std=2.0)


def qwen_image(seed: int) -> DiffusionPipeline:
    torch.manual_seed(seed)
    rotary = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLConfig(
        text_config={**LANGUAGE_MODEL, "rope_parameters": rotary},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
    )
    pipeline = QwenImagePipeline(
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=character_tokenizer(),
        transformer=QwenImageTransformer2DModel(
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(2, 2, 4),
        ),
        vae=AutoencoderKLQwenImage(base_dim=4, num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=256,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
    )
    # The pipeline drops the first 34 tokens: all that its template puts before the prompt, if its words are tokens.
    pipeline.register_modules(tokenizer=character_tokenizer(text=pipeline.prompt_template_encode))
    return ready(pipeline)


def lumina2(seed: int) -> DiffusionPipeline:
    torch.manual_seed(seed)
    pipeline = Lumina2Pipeline(
        text_encoder=Gemma2Model(Gemma2Config(**LANGUAGE_MODEL, head_dim=WIDTH // 2)),
        tokenizer=character_tokenizer("<bos> $A"),
        transformer=Lumina2Transformer2DModel(
            sample_size=4,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(128, 8, 8),
            cap_feat_dim=WIDTH,
        ),
        vae=flux_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )
    pipeline.register_modules(tokenizer=character_tokenizer("<bos> $A", text=pipeline.system_prompt))
    return ready(pipeline)


def auraflow(seed: int) -> DiffusionPipeline:
    torch.manual_seed(seed)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    open_gates(transformer, "norm1")
    pipeline = AuraFlowPipeline(
        **umt5_text_encoder(),
        transformer=transformer,
        vae=tiny_vae(4, scaling_factor=0.13025),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    return ready(pipeline)


def wan(seed: int) -> DiffusionPipeline:
    torch.manual_seed(seed)
    pipeline = WanPipeline(
        **umt5_text_encoder(),
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=WIDTH,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        vae=AutoencoderKLWan(base_dim=4, num_res_blocks=1),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    )
    return ready(pipeline)


def ltx_video(seed: int) -> DiffusionPipeline:
    torch.manual_seed(seed)
    pipeline = LTXPipeline(
        **t5_text_encoder(),
        transformer=LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            num_layers=2,
            caption_channels=WIDTH,
        ),
        vae=AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            down_block_types=("LTXVideoDownBlock3D",) * 2,
            layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            spatio_temporal_scaling=(True, True),
            decoder_spatio_temporal_scaling=(True, True),
            decoder_inject_noise=(False, False, False),
            downsample_type=("conv", "conv"),
            upsample_residual=(False, False),
            upsample_factor=(1, 1),
            patch_size=2,
            encoder_causal=True,
            decoder_causal=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
    )
    return ready(pipeline)


def cogvideox(seed: int) -> DiffusionPipeline:
    """CogVideoX-2B: sums of sines as positions; the text takes its fixed number of places."""
    torch.manual_seed(seed)
    pipeline = CogVideoXPipeline(
        **t5_text_encoder(),
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=WIDTH,
            num_layers=2,
            sample_width=8,
            sample_height=4,
            sample_frames=9,
            max_text_seq_length=16,
        ),
        vae=AutoencoderKLCogVideoX(
            block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2
        ),
        scheduler=CogVideoXDDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=True,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
        ),
    )
    return ready(pipeline)


def kandinsky_prior() -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=WIDTH, num_embeddings=12
    )
    # Zeros at first: with them every image embedding would be zero, whatever the prompt.
    for weight in (prior.clip_mean, prior.clip_std, prior.positional_embedding, prior.prd_embedding):
        torch.nn.init.normal_(weight)
    return {
        "prior_tokenizer": tokenizer,
        "prior_text_encoder": CLIPTextModelWithProjection(text),
        "prior_image_encoder": CLIPVisionModelWithProjection(vision),
        "prior_image_processor": CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
        "prior_prior": prior,
        "prior_scheduler": UnCLIPScheduler(
            variance_type="fixed_small_log", clip_sample=True, clip_sample_range=10.0, prediction_type="sample"
        ),
    }


def kandinsky(seed: int) -> DiffusionPipeline:
    torch.manual_seed(seed)
    pipeline = KandinskyV22CombinedPipeline(
        **kandinsky_prior(),
        unet=UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=8,
            addition_embed_type="image",
            encoder_hid_dim_type="image_proj",
            encoder_hid_dim=WIDTH,
            cross_attention_dim=16,
            attention_head_dim=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            resnet_time_scale_shift="scale_shift",
        ),
        movq=VQModel(
            block_out_channels=(32, 32),  # the spatial norms have 32 groups
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            layers_per_block=1,
            latent_channels=4,
            num_vq_embeddings=16,
            vq_embed_dim=4,
            norm_num_groups=4,
            norm_type="spatial",
        ),
        scheduler=DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="linear",
            variance_type="learned_range",
            # Released with clipping and thresholding, which a policy refuses; so this is the remedy that it names.
            clip_sample=False,
            thresholding=False,
        ),
    )
    return ready(pipeline)


def hunyuan_dit(seed: int) -> DiffusionPipeline:
    """HunyuanDiT 1.1: with style and size embeddings, which 1.2 dropped."""
    torch.manual_seed(seed)
    bert = BertConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    t5 = t5_text_encoder()
    pipeline = HunyuanDiTPipeline(
        text_encoder=BertModel(bert),
        tokenizer=character_tokenizer("<cls> $A <sep>"),
        text_encoder_2=t5["text_encoder"],
        tokenizer_2=t5["tokenizer"],
        transformer=HunyuanDiT2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=4,
            num_layers=4,  # the second half's blocks have skips from the first half's, from four blocks on
            num_attention_heads=2,
            attention_head_dim=8,
            hidden_size=16,
            mlp_ratio=2.0,
            cross_attention_dim=WIDTH,
            cross_attention_dim_t5=WIDTH,
            pooled_projection_dim=16,
        ),
        vae=tiny_vae(4, scaling_factor=0.13025),
        scheduler=DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.018,
            beta_schedule="scaled_linear",
            clip_sample=False,
            prediction_type="v_prediction",
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return ready(pipeline)


def chroma(seed: int) -> DiffusionPipeline:
    torch.manual_seed(seed)
    pipeline = ChromaPipeline(
        **t5_text_encoder(),
        transformer=ChromaTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(2, 2, 4),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        vae=flux_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )
    return ready(pipeline)


def z_image(seed: int) -> DiffusionPipeline:
    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        dim=24,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 16, 16],
    )
    # Created empty or zero: a released model's are learned.
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    pipeline = ZImagePipeline(
        **qwen3_text_encoder(),
        transformer=transformer,
        vae=flux_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return ready(pipeline)


def flux2_klein(seed: int) -> DiffusionPipeline:
    torch.manual_seed(seed)
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    # The statistics by which the pipeline scales the latents.
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=16,
        mlp_ratio=2.0,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    open_gates(transformer, "modulation")
    pipeline = Flux2KleinPipeline(
        **qwen3_text_encoder(num_hidden_layers=3),
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
    )
    return ready(pipeline)


IMAGE = {"height": 32, "width": 64}
NEWER_CASES = (
    Case("Qwen-Image", qwen_image, {**IMAGE, "true_cfg_scale": 4.0, "negative_prompt": " "}, guidance_scale=None),
    Case("Lumina 2", lumina2, {**IMAGE, "max_sequence_length": 96}),
    Case("AuraFlow", auraflow, {**IMAGE, "max_sequence_length": 32}),
    Case("Wan 2.1", wan, {**IMAGE, "num_frames": 5, "max_sequence_length": 32}),
    Case("LTX-Video", ltx_video, {**IMAGE, "num_frames": 5, "max_sequence_length": 32}),
    Case("CogVideoX", cogvideox, {**IMAGE, "num_frames": 9, "max_sequence_length": 16}),
    Case("Kandinsky 2.2", kandinsky, {"height": 16, "width": 32, "prior_num_inference_steps": 2}),
    Case("HunyuanDiT", hunyuan_dit, {**IMAGE, "use_resolution_binning": False}),
    Case("Chroma", chroma, {**IMAGE, "max_sequence_length": 32}),
    Case("Z-Image", z_image, {**IMAGE, "max_sequence_length": 48}),
    Case("FLUX.2 klein", flux2_klein, {**IMAGE, "max_sequence_length": 48, "text_encoder_out_layers": (1, 2, 3)}),
)
