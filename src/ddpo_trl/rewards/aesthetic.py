"""Aesthetic quality: LAION's aesthetic predictor."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ddpo_trl.rewards.clip import Clip, load_clip
from ddpo_trl.rewards.model import RewardModel
from ddpo_trl.rewards.weights import Head, check_weights, predictor_head, rate, read_weights


FILENAME = "aesthetic-model.pth"

# Names of the linear layers in the file. The numbers between them are dropouts.
LAYERS = ["layers.0", "layers.2", "layers.4", "layers.6", "layers.7"]


class AestheticPredictor(NamedTuple):
    """CLIP model and the head that rates its image embeddings."""

    clip: Clip
    head: Head


class LaionAesthetic(RewardModel[AestheticPredictor]):
    """
    Aesthetic quality on a scale from 1 to 10; the prompt does not matter.

    The [improved aesthetic predictor](https://github.com/christophschuhmann/improved-aesthetic-predictor) of LAION,
    the aesthetic reward of [DDPO](https://huggingface.co/papers/2305.13301): five linear layers without activations
    rate the normalized image embedding of CLIP ViT-L/14. Most images get 4 to 7; optimized ones may exceed 10.

    Licenses: Apache-2.0 according to those who republish the head (`trl-lib` names none); for
    [CLIP](https://github.com/openai/CLIP), MIT.

    Args:
        model (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or folder of a `CLIPModel` with its image processor and tokenizer: the one that the head was trained
            on.
        head (`str`, *optional*, defaults to `"trl-lib/ddpo-aesthetic-predictor"`):
            Weights of the head: a file (`.safetensors`, `.pth`, `.pt` or `.bin`), or the id of a Hub repository with
            an `aesthetic-model.pth`. It stays in float32, since bfloat16 would round a rating to 1/32.
        kwargs:
            `device`, `dtype` and `batch_size` of [`RewardModel`].

    Raises:
        `ValueError`: If the head is a file that does not exist.
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        *,
        head: str = "trl-lib/ddpo-aesthetic-predictor",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        check_weights("head", head)
        self.model = model
        self.head = head

    def load(self, device: torch.device) -> AestheticPredictor:
        clip = load_clip(self.model, self.model, device, self.dtype)
        weights, width = read_weights(self.head, FILENAME), clip.network.config.projection_dim
        return AestheticPredictor(clip, predictor_head(weights, LAYERS, device, self.head, self.model, width))

    def score(
        self, loaded: AestheticPredictor, images: list[Image.Image], prompts: Sequence[str], metadata: Sequence[Any]
    ) -> Tensor:
        return rate(loaded.head, loaded.clip.embed_images(images))
