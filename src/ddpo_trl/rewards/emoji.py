"""Prompt alignment on emoji: the reward for the embedded pipeline, from a small CLIP trained on its images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ddpo_trl.emoji import emoji_captions
from ddpo_trl.rewards.clip import Clip, load_clip
from ddpo_trl.rewards.model import RewardModel


EMOJI_ALIGNMENT_PATH = Path(__file__).parents[1] / "assets" / "emoji_alignment"

# Words that select one of the embedded pipeline's two styles.
_STYLES = ("flat", "3d")


class AlignmentModel(NamedTuple):
    """
    CLIP model, and the embeddings of the captions that a prompt competes with: all captions without a style word
    (`False`) or with one (`True`).
    """

    clip: Clip
    captions: dict[bool, Tensor]


class EmojiAlignment(RewardModel[AlignmentModel]):
    """
    Prompt alignment of images of the embedded pipeline: the log-probability of the prompt among all captions.

    With embeddings v of the image and t of texts, of length 1, and CLIP's learned temperature τ, it is
    `τ v·t(prompt) - logsumexp(τ v·t(caption))` over [`~ddpo_trl.emoji.emoji_captions`], the log-softmax of
    https://huggingface.co/papers/2103.00020; with a style word before each caption, if the prompt contains one. It is
    0 if the model is certain, and -log(412) = -6 if it can't tell. Other prompts, such as "a dog face, please",
    compete with the same captions, and their reward may be slightly above 0. Unlike the cosine, it does not reward
    what all emoji have in common.

    The model is for 64x64 emoji on white: of 412 captions it ranks the right one first for 84% of its training
    drawings, and for 13% of drawings in a style that it never saw for their concept. It was also trained to give
    images of the right colors without a drawing a low reward, but large steps still exploit it with colors: monitor
    [`~ddpo_trl.emoji.recognized_share`], too.

    1.25 M parameters, Apache-2.0; trained on Noto Emoji (Apache-2.0), Fluent Emoji (MIT) and emojibase (MIT) by
    `tools/emoji/alignment.py`. transformers loads it:
    `CLIPModel.from_pretrained(ddpo_trl.rewards.emoji.EMOJI_ALIGNMENT_PATH)`.

    Args:
        device (`str` or `torch.device`, *optional*):
            Device of the model; that of the images of the first call by default.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Dtype of the model's weights and computation.
        batch_size (`int`, *optional*, defaults to `64`):
            Largest number of images scored at once.

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
        clip = load_clip(str(EMOJI_ALIGNMENT_PATH), str(EMOJI_ALIGNMENT_PATH), device, self.dtype)
        plain = emoji_captions()
        styled = [f"{style} {caption}" for style in _STYLES for caption in plain]
        return AlignmentModel(clip, {False: clip.embed_texts(plain), True: clip.embed_texts(styled)})

    def score(
        self, loaded: AlignmentModel, images: list[Image.Image], prompts: Sequence[str], metadata: Sequence[Any]
    ) -> Tensor:
        embeddings = loaded.clip.logit_scale * loaded.clip.embed_images(images)
        rewards = (embeddings * loaded.clip.embed_texts(prompts)).sum(1)
        competition = {has_style: (embeddings @ texts.T).logsumexp(1) for has_style, texts in loaded.captions.items()}
        has_style = torch.tensor([any(style in prompt.lower().split() for style in _STYLES) for prompt in prompts])
        return rewards - torch.where(has_style.to(rewards.device), competition[True], competition[False])
