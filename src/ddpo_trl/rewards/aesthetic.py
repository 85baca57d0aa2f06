"""How beautiful people would find an image, whatever its prompt: LAION's aesthetic predictor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ddpo_trl.rewards.clip import Clip, load_clip
from ddpo_trl.rewards.head import Head, check_head, head_of, rate
from ddpo_trl.rewards.model import RewardModel
from ddpo_trl.rewards.weights import check_weights, read_weights


FILENAME = "aesthetic-model.pth"

# Its linear layers as the file names them. The dropouts between them, 1, 3 and 5, do nothing after training.
LAYERS = ["layers.0", "layers.2", "layers.4", "layers.6", "layers.7"]


@dataclass(frozen=True, kw_only=True)
class AestheticPredictor:
    """
    A CLIP model with the head that rates its image embeddings.

    Args:
        clip (`Clip`):
            The model.
        head (`Head`):
            What rates them.
    """

    clip: Clip
    head: Head


class LaionAesthetic(RewardModel[AestheticPredictor]):
    """
    How beautiful people would find an image, on a scale from 1 to 10; the prompt does not matter.

    The [improved aesthetic predictor](https://github.com/christophschuhmann/improved-aesthetic-predictor) of LAION,
    the aesthetic reward of [DDPO](https://huggingface.co/papers/2305.13301): five linear layers without activations
    rate the normalized image embedding of CLIP ViT-L/14. It was trained on ratings from 1 to 10. Most images get 4 to
    7; nothing holds an optimized one below 10.

    Licenses: Apache-2.0 according to those who republish the head (`trl-lib` names none); of
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
        weights = read_weights(self.head, FILENAME)
        check_head(weights, LAYERS, self.head)
        clip = load_clip(self.model, self.model, device, self.dtype)
        width = weights[f"{LAYERS[0]}.weight"].shape[1]
        if width != clip.network.config.projection_dim:
            raise ValueError(
                f"head is {self.head!r} and takes {width} numbers per image, but model, {self.model!r}, gives "
                f"{clip.network.config.projection_dim}; give the CLIP model that the head was trained on."
            )
        return AestheticPredictor(clip=clip, head=head_of(weights, LAYERS, device))

    def score(
        self, loaded: AestheticPredictor, images: list[Image.Image], prompts: Sequence[str], metadata: Sequence[Any]
    ) -> Tensor:
        return rate(loaded.head, loaded.clip.embed_images(images))
