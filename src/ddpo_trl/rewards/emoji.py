"""Prompt alignment on emoji: the reward of the embedded pipeline, from a small CLIP trained on its images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from ddpo_trl.emoji import emoji_captions
from ddpo_trl.rewards.model import RewardModel


EMOJI_ALIGNMENT_PATH = Path(__file__).parents[1] / "assets" / "emoji_alignment"

# The words that ask the embedded pipeline for one of its two styles.
_STYLES = ("flat", "3d")

_IMAGE_SIZE = 64


class AlignmentModel(NamedTuple):
    """
    What [`EmojiAlignment`] loads.

    Args:
        clip (`CLIPModel`):
            Both towers.
        tokenizer (`CLIPTokenizer`):
            That of the embedded pipeline.
        captions (`dict[bool, torch.Tensor]`):
            What a prompt competes with: the unit vectors of all captions without a style word under `False`, with one
            under `True`.
    """

    clip: CLIPModel
    tokenizer: CLIPTokenizer
    captions: dict[bool, Tensor]


class EmojiAlignment(RewardModel[AlignmentModel]):
    """
    How well an image of the embedded pipeline shows its prompt: the log-probability of the prompt among all captions.

    With unit vectors v of the image and t of texts, and CLIP's learned temperature τ, it is
    `τ v·t(prompt) - logsumexp(τ v·t(caption))` over [`~ddpo_trl.emoji.emoji_captions`], the log-softmax of
    https://huggingface.co/papers/2103.00020; over those with a style word, if the prompt contains one. A caption has 0
    where the model is sure, and -log(412) = -6 where it has no idea. Other prompts, such as "a dog face, please",
    compete with the same captions and may come out slightly above 0. What all faces share cancels, as it does not in
    the cosine: an image gains nothing by looking like any emoji.

    The model is made for 64x64 emoji on white and knows nothing else: of 412 captions it puts the right one first for
    84 % of the drawings it learned from, and for 13 % of those in a style that it never saw of their concept. It was
    shown images of the right colors and no drawing too, and told that they mean nothing. Large steps please it with
    colors all the same: watch [`~ddpo_trl.emoji.recognized_share`] beside it.

    1.25 M parameters, Apache-2.0; it learned from Noto Emoji (Apache-2.0), Fluent Emoji (MIT) and emojibase (MIT) by
    `tools/emoji/alignment.py`. Plain transformers loads it:
    `CLIPModel.from_pretrained(ddpo_trl.rewards.emoji.EMOJI_ALIGNMENT_PATH)`.

    Args:
        device (`str` or `torch.device`, *optional*):
            Where the model is; where the images of the first call are by default.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Of the model's weights and computation.
        batch_size (`int`, *optional*, defaults to `64`):
            Images scored at once.

    Example:

    ```python
    import torch
    from ddpo_trl import load_emoji_pipeline
    from ddpo_trl.rewards import EmojiAlignment

    images = load_emoji_pipeline()(["pizza"] * 2, num_inference_steps=5, output_type="pt").images
    pizza, panda = EmojiAlignment()(images, ("pizza", "panda"), ({}, {}))
    assert pizza > panda
    ```
    """

    def __init__(
        self,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 64,
    ):
        super().__init__(device=device, dtype=dtype, batch_size=batch_size)

    def load(self, device: torch.device) -> AlignmentModel:
        clip = CLIPModel.from_pretrained(EMOJI_ALIGNMENT_PATH, dtype=self.dtype, local_files_only=True)
        clip = clip.to(device).eval()
        tokenizer = CLIPTokenizer.from_pretrained(EMOJI_ALIGNMENT_PATH, local_files_only=True)
        plain = emoji_captions()
        styled = [f"{style} {caption}" for style in _STYLES for caption in plain]
        captions = {
            has_style: text_vectors(clip, tokenizer, texts) for has_style, texts in ((False, plain), (True, styled))
        }
        return AlignmentModel(clip, tokenizer, captions)

    def score(
        self, loaded: AlignmentModel, images: list[Image.Image], prompts: Sequence[str], metadata: Sequence[Any]
    ) -> Tensor:
        temperature = loaded.clip.logit_scale.exp().float()
        pictures = temperature * image_vectors(loaded.clip, images)
        rewards = (pictures * text_vectors(loaded.clip, loaded.tokenizer, prompts)).sum(1)
        competition = {has_style: (pictures @ texts.T).logsumexp(1) for has_style, texts in loaded.captions.items()}
        has_style = torch.tensor([any(style in prompt.lower().split() for style in _STYLES) for prompt in prompts])
        return rewards - torch.where(has_style.to(rewards.device), competition[True], competition[False])


def image_vectors(clip: CLIPModel, images: Sequence[Image.Image]) -> Tensor:
    """`(B, D)` float32 unit vectors of RGB images, resized to 64x64 where they are not (bicubic, antialiased)."""
    size = (_IMAGE_SIZE, _IMAGE_SIZE)
    small = [image if image.size == size else image.resize(size, Image.Resampling.BICUBIC) for image in images]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in small])).permute(0, 3, 1, 2)
    values = (pixels.float() / 127.5 - 1).to(clip.device, clip.dtype)
    pooled = clip.vision_model(pixel_values=values).pooler_output
    return F.normalize(clip.visual_projection(pooled).float(), dim=-1)


def text_vectors(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """`(B, D)` float32 unit vectors of texts, cut to the tokenizer's 16 tokens."""
    ids = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
    pooled = clip.text_model(input_ids=ids.to(clip.device)).pooler_output
    return F.normalize(clip.text_projection(pooled).float(), dim=-1)
