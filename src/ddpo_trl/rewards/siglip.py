"""Aesthetic quality: Aesthetic Predictor V2.5, on SigLIP."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import SiglipImageProcessorPil, SiglipVisionModel

from ddpo_trl.rewards.model import RewardModel
from ddpo_trl.rewards.weights import Head, check_weights, predictor_head, rate, read_weights


FILENAME = "aesthetic_predictor_v2_5.pth"

# By commit, so that the file can't change.
HEAD = (
    "https://github.com/discus0434/aesthetic-predictor-v2-5/raw/3125a9e1f275092432ffc336f2908eda812c373c/models/"
    + FILENAME
)

# Names of the linear layers in the file. The numbers between them are dropouts.
LAYERS = ["scoring_head.0", "scoring_head.2", "scoring_head.4", "scoring_head.6", "scoring_head.8"]


class SiglipPredictor(NamedTuple):
    """SigLIP's vision tower with its image processor, and the head that rates its embeddings."""

    network: Any
    processor: Any
    head: Head


class AestheticPredictorV25(RewardModel[SiglipPredictor]):
    """
    Aesthetic quality on a scale from 1 to 10; the prompt does not matter.

    [Aesthetic Predictor V2.5](https://github.com/discus0434/aesthetic-predictor-v2-5): five linear layers without
    activations, of widths 1152, 1024, 128, 64, 16 and 1, rate the normalized image embedding of SigLIP SO400M. Unlike
    LAION's, it is also meant for illustrations. The author calls more than 5.5 a great score; optimized images may
    exceed 10.

    Licenses: the head is published in a repository under the AGPL-3.0, which names no other license for its weights;
    they are downloaded and not part of this package. [SigLIP](https://huggingface.co/google/siglip-so400m-patch14-384)
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
        `ValueError`: If the head is a file that does not exist. In the first call: if it is not a head of this
            predictor, or its width is not the model's.
    """

    def __init__(self, model: str = "google/siglip-so400m-patch14-384", *, head: str = HEAD, **kwargs: Any):
        super().__init__(**kwargs)
        if not head.startswith("https://"):
            check_weights("head", head)
        self.model = model
        self.head = head

    def load(self, device: torch.device) -> SiglipPredictor:
        network = SiglipVisionModel.from_pretrained(self.model, dtype=self.dtype).to(device).eval()
        return SiglipPredictor(
            network=network,
            # The default depends on whether torchvision is installed, and rewards would, too.
            processor=SiglipImageProcessorPil.from_pretrained(self.model),
            head=predictor_head(self._read_head(), LAYERS, device, self.head, self.model, network.config.hidden_size),
        )

    def _read_head(self) -> dict[str, Tensor]:
        if self.head.startswith("https://"):
            return torch.hub.load_state_dict_from_url(self.head, map_location="cpu", weights_only=True)
        return read_weights(self.head, FILENAME)

    def score(
        self, loaded: SiglipPredictor, images: list[Image.Image], prompts: Sequence[str], metadata: Sequence[Any]
    ) -> Tensor:
        network, processor, head = loaded
        pixels = processor(images=images, return_tensors="pt")["pixel_values"].to(network.device, network.dtype)
        return rate(head, normalize(network(pixel_values=pixels).pooler_output.float(), dim=-1))
