"""Human preference: ImageReward, on BLIP."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from ddpo_trl.rewards.model import RewardModel
from ddpo_trl.rewards.weights import Head, check_weights, head_of, rate, read_weights, renamed


FILENAME = "ImageReward.pt"

# The original code standardizes scores with these.
MEAN = 0.16717362830052426
STD = 1.0333394966054072

SIDE = 224
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_TOKENS = 35

VISION = "blip.visual_encoder."
TEXT = "blip.text_encoder."

# Names in the original's image encoder, and those in transformers. In the text encoder they are the same.
VISION_NAMES = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^norm\.": "post_layernorm.",
    r"^blocks\.": "encoder.layers.",
    r"\.norm([12])\.": r".layer_norm\1.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.attn\.proj\.": ".self_attn.projection.",
}

# Names of the head's linear layers in the file. The numbers between them are dropouts.
LAYERS = ["mlp.layers.0", "mlp.layers.2", "mlp.layers.4", "mlp.layers.6", "mlp.layers.7"]


class BlipJudge(NamedTuple):
    """BLIP's image encoder, the text encoder that attends to its output, BERT's tokenizer, and the head."""

    vision: Any
    text: Any
    tokenizer: Any
    head: Head


class ImageReward(RewardModel[BlipJudge]):
    """
    Human preference among images of a prompt, by alignment and quality.

    ImageReward of [Xu et al. 2023](https://huggingface.co/papers/2304.05977), trained on comparisons by experts:
    BLIP's text encoder reads the prompt with cross-attention to the image, which a ViT-L/16 encodes. Five linear
    layers without activations rate its output at the first token, [CLS]. Scores are standardized to the authors'
    images: mostly -2.3 to 2, without bounds.

    Source: [ImageReward](https://github.com/THUDM/ImageReward), code and weights Apache-2.0. The architecture is from
    [BLIP](https://github.com/salesforce/BLIP), BSD-3-Clause, in transformers.

    Args:
        model (`str`, *optional*, defaults to `"THUDM/ImageReward"`):
            Weights under the original's names: a file (`.safetensors`, `.pth`, `.pt` or `.bin`), or the id of a Hub
            repository with an `ImageReward.pt`. The head stays in float32.
        tokenizer (`str`, *optional*, defaults to `"google-bert/bert-base-uncased"`):
            Hub id or folder of the tokenizer. Prompts are cut to 35 tokens.
        kwargs:
            `device`, `dtype` and `batch_size` of [`RewardModel`].

    Raises:
        `ValueError`: If the model is a file that does not exist. In the first call: if it has other weights.
    """

    def __init__(
        self,
        model: str = "THUDM/ImageReward",
        *,
        tokenizer: str = "google-bert/bert-base-uncased",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        check_weights("model", model)
        self.model = model
        self.tokenizer = tokenizer

    def load(self, device: torch.device) -> BlipJudge:
        weights = read_weights(self.model, FILENAME)
        missing = [name for name in (f"{VISION}cls_token", "mlp.layers.7.weight") if name not in weights]
        if missing:
            raise ValueError(
                f"model is {self.model!r}, which lacks {missing}; pass the weights of ImageReward under the names "
                "that they have in ImageReward.pt."
            )
        vision, text = vision_model(weights), text_model(weights)
        return BlipJudge(
            vision=vision.to(device, self.dtype).eval(),
            text=text.to(device, self.dtype).eval(),
            tokenizer=AutoTokenizer.from_pretrained(self.tokenizer),
            head=head_of(weights, LAYERS, device),
        )

    def score(
        self, loaded: BlipJudge, images: list[Image.Image], prompts: Sequence[str], metadata: Sequence[Any]
    ) -> Tensor:
        vision, text, tokenizer, head = loaded
        tokens = tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(vision.device)
        pixels = torch.stack([as_pixels(image) for image in images]).to(vision.device, vision.dtype)
        hidden = text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=vision(pixel_values=pixels).last_hidden_state,
        ).last_hidden_state
        return (rate(head, hidden[:, 0].float()) - MEAN) / STD


def as_pixels(image: Image.Image) -> Tensor:
    """
    Return an image as the original prepares it: shorter side to 224, center, normalized, `(3, 224, 224)` float32.

    Processors of transformers differ from torchvision, which the original uses, in half of the images from which an
    odd number of rows or columns is cropped.
    """
    width, height = (SIDE * side // min(image.size) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
    pixels = np.asarray(resized.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float32) / 255
    normalized = (torch.from_numpy(pixels) - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    return normalized.permute(2, 0, 1)


def vision_model(weights: Mapping[str, Tensor]) -> Any:
    """Return the image encoder, with 16 heads and the sizes of the weights, which have the original's names."""
    qkv = [name for name in weights if name.startswith(VISION) and name.endswith(".attn.qkv.weight")]
    intermediate, width = weights[f"{VISION}blocks.0.mlp.fc1.weight"].shape
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=len(qkv),
        num_attention_heads=16,
        image_size=SIDE,
        patch_size=weights[f"{VISION}patch_embed.proj.weight"].shape[-1],
        layer_norm_eps=1e-6,
    )
    model = BlipVisionModel(config)
    model.load_state_dict({renamed(name, VISION_NAMES): value for name, value in _below(VISION, weights).items()})
    return model


def text_model(weights: Mapping[str, Tensor]) -> Any:
    """Return the text encoder, with 12 heads and the sizes of the weights, which have the original's names."""
    own = _below(TEXT, weights)
    dense = [name for name in own if name.endswith(".intermediate.dense.weight")]
    words, width = own["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=own["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=own[dense[0]].shape[0],
        num_hidden_layers=len(dense),
        num_attention_heads=12,
        max_position_embeddings=own["embeddings.position_embeddings.weight"].shape[0],
    )
    model = BlipTextModel(config, add_pooling_layer=False)
    # Older files also contain the numbers of the positions.
    model.load_state_dict({name: value for name, value in own.items() if name != "embeddings.position_ids"})
    return model


def _below(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
