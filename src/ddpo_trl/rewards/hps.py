"""Human preference: HPS v2.1, a CLIP model in open_clip's format."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers import CLIPConfig, CLIPModel

from ddpo_trl.rewards.clip import Clip, prepare_clip
from ddpo_trl.rewards.model import RewardModel
from ddpo_trl.rewards.weights import check_weights, read_weights, renamed


FILENAME = "HPS_v2.1_compressed.pt"

# Names in open_clip, and those in transformers.
NAMES = {
    r"^positional_embedding$": "text_model.embeddings.position_embedding.weight",
    r"^token_embedding\.": "text_model.embeddings.token_embedding.",
    r"^transformer\.resblocks\.": "text_model.encoder.layers.",
    r"^ln_final\.": "text_model.final_layer_norm.",
    r"^text_projection$": "text_projection.weight",
    r"^visual\.class_embedding$": "vision_model.embeddings.class_embedding",
    r"^visual\.conv1\.": "vision_model.embeddings.patch_embedding.",
    r"^visual\.positional_embedding$": "vision_model.embeddings.position_embedding.weight",
    r"^visual\.ln_pre\.": "vision_model.pre_layrnorm.",
    r"^visual\.transformer\.resblocks\.": "vision_model.encoder.layers.",
    r"^visual\.ln_post\.": "vision_model.post_layernorm.",
    r"^visual\.proj$": "visual_projection.weight",
    r"\.attn\.": ".self_attn.",
    r"\.ln_([12])\.": r".layer_norm\1.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
}
TRANSPOSED = ("text_projection", "visual.proj")


class HPSv2(RewardModel[Clip]):
    """
    Human preference among images of a prompt: cos(image, text) of HPS v2.1, in [-1, 1], mostly 0.2 to 0.35 (the
    authors' tables show 100 times as much). Only scores of the same prompt can be compared.

    [Human Preference Score v2](https://huggingface.co/papers/2306.09341): a CLIP ViT-H/14 trained on 798,000 choices.
    Its checkpoint, in open_clip's format, is converted to a transformers `CLIPModel`. As in the package `hpsv2`,
    images are not cropped: their longer side is resized, and the rest is black.

    Source: [HPSv2](https://github.com/tgxs002/HPSv2), license Apache-2.0, trained from
    [CLIP ViT-H/14 of LAION](https://huggingface.co/laion/CLIP-ViT-H-14-laion2B-s32B-b79K), MIT.

    Args:
        weights (`str`, *optional*, defaults to `"xswu/HPSv2"`):
            Weights in open_clip's format: a file (`.pt`, `.pth`, `.bin` or `.safetensors`), such as that of HPS v2.0,
            or the id of a Hub repository with an `HPS_v2.1_compressed.pt`.
        model (`str`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            Hub id or folder of the `CLIPConfig`, tokenizer and image processor. Its weights are not used.
        kwargs:
            `device`, `dtype` and `batch_size` of [`RewardModel`].

    Raises:
        `ValueError`: If the weights are a file that does not exist.
    """

    def __init__(
        self, weights: str = "xswu/HPSv2", *, model: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", **kwargs: Any
    ):
        super().__init__(**kwargs)
        check_weights("weights", weights)
        self.weights = weights
        self.model = model

    def load(self, device: torch.device) -> Clip:
        checkpoint = read_weights(self.weights, FILENAME)
        network, report = CLIPModel.from_pretrained(
            None,
            config=CLIPConfig.from_pretrained(self.model),
            state_dict=from_open_clip(checkpoint.get("state_dict", checkpoint)),
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
        )
        problems = [f"{kind} {sorted(names)[:3]}" for kind, names in report.items() if names]
        if problems:
            raise ValueError(
                f"weights is {self.weights!r}, which does not fit model, {self.model!r}: {', '.join(problems)}. Pass "
                "the CLIP model that the weights were trained from."
            )
        return prepare_clip(network, self.model, device, self.dtype)

    def score(
        self, loaded: Clip, images: list[Image.Image], prompts: Sequence[str], metadata: Sequence[Any]
    ) -> Tensor:
        size = loaded.network.config.vision_config.image_size
        mean, std = (
            torch.tensor(values).view(3, 1, 1) for values in (loaded.processor.image_mean, loaded.processor.image_std)
        )
        pixels = torch.stack([(letterbox(image, size) - mean) / std for image in images])
        return (loaded.embed_pixels(pixels) * loaded.embed_texts(prompts)).sum(-1)


def letterbox(image: Image.Image, size: int) -> Tensor:
    """
    Return an image in the middle of a black square, as the package `hpsv2` does (with torchvision 0.17 or later).

    Args:
        image (`PIL.Image.Image`):
            RGB image.
        size (`int`):
            Side of the square in pixels.

    Returns:
        `torch.Tensor` of shape `(3, size, size)`: Resized by antialiased bicubic interpolation and not rounded to 8
        bits, so values may be slightly outside of [0, 1].
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    height, width = (round(side * size / max(image.size)) for side in (image.height, image.width))
    pixels = interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    return pad(pixels, (left, size - width - left, top, size - height - top))[0]


def from_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Return the weights of an open_clip model (a `CLIP` with a vision transformer) under the names of a `CLIPModel` of
    transformers. Unknown names stay.
    """
    converted = {}
    for name, value in weights.items():
        new = renamed(name, NAMES)
        if ".in_proj_" in new:  # queries, keys and values in one
            stem, _, part = new.rpartition(".in_proj_")
            for letter, rows in zip("qkv", value.chunk(3), strict=True):
                converted[f"{stem}.{letter}_proj.{part}"] = rows.contiguous()
        else:
            converted[new] = value.T.contiguous() if name in TRANSPOSED else value
    return converted
