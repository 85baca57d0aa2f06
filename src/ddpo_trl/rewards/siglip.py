"""How beautiful people would find an image, whatever its prompt: Aesthetic Predictor V2.5, on SigLIP."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, SiglipVisionModel

from ddpo_trl.rewards.head import Head, check_head, head_of, rate
from ddpo_trl.rewards.model import RewardModel
from ddpo_trl.rewards.weights import check_weights, read_weights


FILENAME = "aesthetic_predictor_v2_5.pth"

# Of a commit, so that it can't become another one.
HEAD = (
    "https://github.com/discus0434/aesthetic-predictor-v2-5/raw/3125a9e1f275092432ffc336f2908eda812c373c/models/"
    + FILENAME
)

# Its linear layers as the file names them. The dropouts between them, 1, 3, 5 and 7, do nothing after training.
LAYERS = ["scoring_head.0", "scoring_head.2", "scoring_head.4", "scoring_head.6", "scoring_head.8"]


@dataclass(frozen=True, kw_only=True)
class SiglipPredictor:
    """
    A SigLIP vision tower with the head that rates its image embeddings.

    Args:
        network (`SiglipVisionModel`):
            On its device, in its dtype.
        processor (`Any`):
            Its image processor: resizes to a square whatever the shape was, normalizes to [-1, 1].
        head (`Head`):
            What rates them.
    """

    network: Any
    processor: Any
    head: Head

    def rate(self, images: Sequence[Image.Image]) -> Tensor:
        """`(B,)` float32, about 1 to 10."""
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        pooled = self.network(pixel_values=pixels.to(self.network.device, self.network.dtype)).pooler_output
        return rate(self.head, normalize(pooled.float(), dim=-1))


class AestheticPredictorV25(RewardModel[SiglipPredictor]):
    """
    How beautiful people would find an image, on a scale from 1 to 10; the prompt does not matter.

    [Aesthetic Predictor V2.5](https://github.com/discus0434/aesthetic-predictor-v2-5): five linear layers without
    activations, of widths 1152, 1024, 128, 64, 16 and 1, rate the normalized image embedding of SigLIP SO400M. Unlike
    LAION's, it is meant for illustrations too. Above 5.5 is a great score, its author says; nothing holds an optimized
    image below 10.

    Licenses: the head is published in a repository under the AGPL-3.0, which names no other license for its weights;
    they are downloaded and no part of this package. [SigLIP](https://huggingface.co/google/siglip-so400m-patch14-384)
    is Google's, Apache-2.0.

    Args:
        model (`str`, *optional*, defaults to `"google/siglip-so400m-patch14-384"`):
            Hub id or folder of a `SiglipModel` with its image processor: the one that the head was trained on.
        head (`str`, *optional*):
            Weights of the head: an `https://` address of a PyTorch file, by default that of the author's repository; a
            file (`.safetensors`, `.pth`, `.pt` or `.bin`); or the id of a Hub repository with an
            `aesthetic_predictor_v2_5.pth`. It stays in float32, since bfloat16 would round a rating to 1/32.
        kwargs:
            `device`, `dtype` and `batch_size` of [`RewardModel`].

    Raises:
        `ValueError`: If the head is a file that does not exist. When it is loaded: if it is not a head of this
            predictor, or of another width than the model.
    """

    def __init__(self, model: str = "google/siglip-so400m-patch14-384", *, head: str = HEAD, **kwargs: Any):
        super().__init__(**kwargs)
        if not head.startswith("https://"):
            check_weights("head", head)
        self.model = model
        self.head = head

    def load(self, device: torch.device) -> SiglipPredictor:
        weights = self._read_head()
        network = SiglipVisionModel.from_pretrained(self.model, dtype=self.dtype).to(device).eval()
        width = weights[f"{LAYERS[0]}.weight"].shape[1]
        if width != network.config.hidden_size:
            raise ValueError(
                f"head is {self.head!r} and takes {width} numbers per image, but model, {self.model!r}, gives "
                f"{network.config.hidden_size}; give the SigLIP model that the head was trained on."
            )
        return SiglipPredictor(
            network=network,
            # Left to itself, transformers takes torchvision wherever it is installed, and a reward would depend on it.
            processor=AutoImageProcessor.from_pretrained(self.model, backend="pil"),
            head=head_of(weights, LAYERS, device),
        )

    def _read_head(self) -> dict[str, Tensor]:
        if self.head.startswith("https://"):
            weights = torch.hub.load_state_dict_from_url(self.head, map_location="cpu", weights_only=True)
        else:
            weights = read_weights(self.head, FILENAME)
        check_head(weights, LAYERS, self.head)
        return weights

    def score(
        self, loaded: SiglipPredictor, images: list[Image.Image], prompts: Sequence[str], metadata: Sequence[Any]
    ) -> Tensor:
        return loaded.rate(images)
