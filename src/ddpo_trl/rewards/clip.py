"""CLIP as a judge: how well an image fits its prompt (CLIPScore), and which images people pick (PickScore)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from ddpo_trl.rewards.model import RewardModel


@dataclass(frozen=True, kw_only=True)
class Clip:
    """
    A CLIP model with what prepares its inputs.

    Args:
        network (`CLIPModel`):
            On its device, in its dtype.
        processor (`Any`):
            Its image processor: resizes the shorter side, crops the center, normalizes.
        tokenizer (`Any`):
            Its tokenizer.
        logit_scale (`float`):
            What the model multiplies cosines with, e^`logit_scale` of its weights, in float32 whatever their dtype:
            bfloat16 would round 100 to 98.9.
    """

    network: Any
    processor: Any
    tokenizer: Any
    logit_scale: float

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Images as the model wants them: `(B, 3, S, S)` float32 on the CPU."""
        return self.processor(images=list(images), return_tensors="pt")["pixel_values"]

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Projected image embeddings of length 1: `(B, D)` float32."""
        pixels = pixels.to(self.network.device, self.network.dtype)
        return _of_length_one(self.network.get_image_features(pixel_values=pixels).pooler_output)

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Projected image embeddings of length 1: `(B, D)` float32."""
        return self.embed_pixels(self.pixels(images))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Projected text embeddings of length 1: `(B, D)` float32. What is too long for the model is cut off."""
        length = self.network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        return _of_length_one(self.network.get_text_features(**tokens.to(self.network.device)).pooler_output)


def load_clip(model: str, processor: str, device: torch.device, dtype: torch.dtype) -> Clip:
    """
    Loads a CLIP model.

    Args:
        model, processor (`str`):
            Hub ids or folders of the weights, and of the tokenizer and image processor.
        device (`torch.device`), dtype (`torch.dtype`):
            Of the weights.
    """
    return prepare_clip(CLIPModel.from_pretrained(model, dtype=torch.float32), processor, device, dtype)


def prepare_clip(network: Any, processor: str, device: torch.device, dtype: torch.dtype) -> Clip:
    """A float32 `CLIPModel` with the tokenizer and image processor of a Hub id or folder, on a device in a dtype."""
    return Clip(
        logit_scale=network.logit_scale.exp().item(),
        network=network.eval().requires_grad_(False).to(device, dtype),
        # PIL is what CLIP was trained with. Left to itself, transformers takes torchvision wherever it is installed,
        # and a reward would depend on that.
        processor=AutoImageProcessor.from_pretrained(processor, backend="pil"),
        tokenizer=AutoTokenizer.from_pretrained(processor),
    )


def _of_length_one(embeddings: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embeddings.float(), dim=-1)


class CLIPScore(RewardModel[Clip]):
    """
    How well an image fits its prompt: 2.5 max(cos(image, text), 0).

    CLIPScore of [Hessel et al. 2021](https://huggingface.co/papers/2104.08718), who put "A photo depicts" before every
    text, as here by default. They used CLIP ViT-B/32, `model="openai/clip-vit-base-patch32"`; the default here is the
    larger ViT-L/14. Both are of [OpenAI](https://github.com/openai/CLIP), license MIT.

    Values are in [0, 2.5], mostly in 0.3 to 1.

    Args:
        model (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or folder of a `CLIPModel` with its tokenizer and image processor.
        prefix (`str`, *optional*, defaults to `"A photo depicts"`):
            Comes before every prompt, with a space; `""` for none.
        kwargs:
            `device`, `dtype` and `batch_size` of [`RewardModel`].

    Raises:
        `TypeError`: If the prefix is not a string.
    """

    def __init__(
        self, model: str = "openai/clip-vit-large-patch14", *, prefix: str = "A photo depicts", **kwargs: Any
    ):
        super().__init__(**kwargs)
        if not isinstance(prefix, str):
            raise TypeError(f'prefix is {prefix!r}; give the words before each prompt, or "" for none.')
        self.model = model
        self.prefix = prefix

    def load(self, device: torch.device) -> Clip:
        return load_clip(self.model, self.model, device, self.dtype)

    def score(
        self, loaded: Clip, images: list[Image.Image], prompts: Sequence[str], metadata: Sequence[Any]
    ) -> Tensor:
        texts = [f"{self.prefix} {prompt}" if self.prefix else prompt for prompt in prompts]
        return 2.5 * (loaded.embed_images(images) * loaded.embed_texts(texts)).sum(-1).clamp(min=0)


class PickScore(RewardModel[Clip]):
    """
    Which of two images of a prompt people would pick: `logit_scale` × cos(image, text), higher for the better one.

    PickScore of [Kirstain et al. 2023](https://huggingface.co/papers/2305.01569): a CLIP ViT-H/14 trained on choices
    of users. Between two images of one prompt, the first is picked with probability σ(score₁ − score₂).

    Values are within ±`logit_scale`, which is about 100, and mostly in 16 to 24. Users often divide by 26, to have
    rewards up to about 1. That only matters where they are added to other rewards.

    Source: [PickScore](https://github.com/yuvalkirstain/PickScore), license MIT (that of the authors' demo; the
    model's card names none), trained from
    [CLIP ViT-H/14 of LAION](https://huggingface.co/laion/CLIP-ViT-H-14-laion2B-s32B-b79K), MIT.

    Args:
        model (`str`, *optional*, defaults to `"yuvalkirstain/PickScore_v1"`):
            Hub id or folder of a `CLIPModel`.
        processor (`str`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            Hub id or folder of its tokenizer and image processor.
        kwargs:
            `device`, `dtype` and `batch_size` of [`RewardModel`].
    """

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        *,
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.model = model
        self.processor = processor

    def load(self, device: torch.device) -> Clip:
        return load_clip(self.model, self.processor, device, self.dtype)

    def score(
        self, loaded: Clip, images: list[Image.Image], prompts: Sequence[str], metadata: Sequence[Any]
    ) -> Tensor:
        return loaded.logit_scale * (loaded.embed_images(images) * loaded.embed_texts(prompts)).sum(-1)
