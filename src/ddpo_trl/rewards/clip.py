"""Prompt alignment (CLIPScore) and human preference (PickScore), from CLIP models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from ddpo_trl.rewards.model import RewardModel


@dataclass(frozen=True, kw_only=True)
class Clip:
    """
    CLIP model with its processors.

    Args:
        network (`CLIPModel`):
            The model, on its device and in its dtype.
        processor (`Any`):
            Its image processor: resizes the shorter side, crops the center, normalizes.
        tokenizer (`Any`):
            Its tokenizer.
        logit_scale (`float`):
            Factor of cosines, the exponential of the model's `logit_scale` in float32: bfloat16 would round 100 to
            98.9.
    """

    network: Any
    processor: Any
    tokenizer: Any
    logit_scale: float

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return projected image embeddings of length 1: `(B, D)` float32."""
        return self.embed_pixels(self.processor(images=list(images), return_tensors="pt")["pixel_values"])

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Return the embeddings of images that are already prepared: `(B, 3, S, S)` → `(B, D)`."""
        pixels = pixels.to(self.network.device, self.network.dtype)
        return normalize(self.network.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return projected text embeddings of length 1: `(B, D)` float32. Texts are cut to the model's length."""
        length = self.network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        features = self.network.get_text_features(**tokens.to(self.network.device)).pooler_output
        return normalize(features.float(), dim=-1)

    def cosines(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Return the cosine of each image with its text: `(B,)` float32."""
        return (self.embed_images(images) * self.embed_texts(texts)).sum(-1)


def load_clip(model: str, processor: str, device: torch.device, dtype: torch.dtype) -> Clip:
    """Load a `CLIPModel`, and its tokenizer and image processor, from Hub ids or folders."""
    return prepare_clip(CLIPModel.from_pretrained(model, dtype=torch.float32), processor, device, dtype)


def prepare_clip(network: Any, processor: str, device: torch.device, dtype: torch.dtype) -> Clip:
    """Return a float32 `CLIPModel` on a device in a dtype, with the processors of a Hub id or folder."""
    return Clip(
        logit_scale=network.logit_scale.exp().item(),
        network=network.eval().requires_grad_(False).to(device, dtype),
        # As in CLIP's training. The default depends on whether torchvision is installed, and rewards would, too.
        processor=CLIPImageProcessorPil.from_pretrained(processor),
        tokenizer=AutoTokenizer.from_pretrained(processor),
    )


class CLIPScore(RewardModel[Clip]):
    """
    Prompt alignment: 2.5 max(cos(image, text), 0), in [0, 2.5], mostly 0.3 to 1.

    CLIPScore of [Hessel et al. 2021](https://huggingface.co/papers/2104.08718), who put "A photo depicts" before every
    text, as here by default. They used CLIP ViT-B/32, `model="openai/clip-vit-base-patch32"`; the default here is the
    larger ViT-L/14. Both are from [OpenAI](https://github.com/openai/CLIP), license MIT.

    Args:
        model (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or folder of a `CLIPModel` with its tokenizer and image processor.
        prefix (`str`, *optional*, defaults to `"A photo depicts"`):
            Words before every prompt, followed by a space; `""` for none.
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
            raise TypeError(f'prefix is {prefix!r}; pass the words before each prompt, or "" for none.')
        self.model = model
        self.prefix = prefix

    def load(self, device: torch.device) -> Clip:
        return load_clip(self.model, self.model, device, self.dtype)

    def score(
        self, loaded: Clip, images: list[Image.Image], prompts: Sequence[str], metadata: Sequence[Any]
    ) -> Tensor:
        texts = [f"{self.prefix} {prompt}" if self.prefix else prompt for prompt in prompts]
        return 2.5 * loaded.cosines(images, texts).clamp(min=0)


class PickScore(RewardModel[Clip]):
    """
    Human preference among images of a prompt: `logit_scale` × cos(image, text).

    PickScore of [Kirstain et al. 2023](https://huggingface.co/papers/2305.01569): a CLIP ViT-H/14 trained on choices
    of users. Between two images of one prompt, the first is preferred with probability σ(score₁ − score₂).

    Values are within ±`logit_scale`, which is about 100, and mostly 16 to 24. They are often divided by 26, so that
    they are at most about 1, which only matters in a sum with other rewards.

    Source: [PickScore](https://github.com/yuvalkirstain/PickScore), license MIT (of the authors' demo; the
    model card names none), trained from
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
        return loaded.logit_scale * loaded.cosines(images, prompts)
