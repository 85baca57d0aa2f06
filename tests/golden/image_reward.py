"""
What the original code of ImageReward says about three images, in the file image_reward.json.

The weights come from a formula, so that they need not be stored: they are those of the original with narrower and
fewer layers, under its names. To make the file again, on Linux with the torch of this project:

    pip install --no-deps --target /tmp/original image-reward==1.5 timm==0.6.13 transformers==4.30.2 \
        tokenizers==0.13.3 huggingface_hub==0.16.4 torchvision==0.28.0
    PYTHONPATH=/tmp/original python tests/golden/image_reward.py
"""

import importlib
import json
import math
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


PATH = Path(__file__).with_suffix(".json")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "red", "two", "in", "the", "snow", "on", "."]
PROMPTS = ["a red cat", "two dog in the snow .", "cat " * 50]  # the last is too long
SIZES = [(224, 224), (351, 240), (64, 96)]  # width and height; the second loses an odd number of columns

# Heads are 16 and 12 as in the original, where no weight tells how many there are.
VISION, TEXT, LAYERS = 64, 48, 2


def picture(index: int) -> Image.Image:
    """Stripes, rings and a ramp, in colours of no symmetry."""
    width, height = SIZES[index]
    x, y = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    waves = [np.sin(9 * x + index), np.cos(40 * np.hypot(x - 0.4, y - 0.6)), 2 * y - 1]
    return Image.fromarray(((np.stack(waves, axis=2) + 1) * 127.5).round().astype(np.uint8))


def shapes() -> dict[str, tuple[int, ...]]:
    """Of the original's weights, by its names."""
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        found.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(name: str, width: int) -> None:
        found.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    found.update({f"{vision}.cls_token": (1, 1, VISION), f"{vision}.pos_embed": (1, 197, VISION)})
    found[f"{vision}.patch_embed.proj.weight"] = (VISION, 3, 16, 16)
    found[f"{vision}.patch_embed.proj.bias"] = (VISION,)
    norm(f"{vision}.norm", VISION)
    for block in (f"{vision}.blocks.{index}" for index in range(LAYERS)):
        norm(f"{block}.norm1", VISION)
        norm(f"{block}.norm2", VISION)
        linear(f"{block}.attn.qkv", VISION, 3 * VISION)
        linear(f"{block}.attn.proj", VISION, VISION)
        linear(f"{block}.mlp.fc1", VISION, 4 * VISION)
        linear(f"{block}.mlp.fc2", 4 * VISION, VISION)
    found[f"{text}.embeddings.word_embeddings.weight"] = (len(WORDS), TEXT)
    found[f"{text}.embeddings.position_embeddings.weight"] = (40, TEXT)
    norm(f"{text}.embeddings.LayerNorm", TEXT)
    for layer in (f"{text}.encoder.layer.{index}" for index in range(LAYERS)):
        for attention, width in (("attention", TEXT), ("crossattention", VISION)):
            linear(f"{layer}.{attention}.self.query", TEXT, TEXT)
            linear(f"{layer}.{attention}.self.key", width, TEXT)
            linear(f"{layer}.{attention}.self.value", width, TEXT)
            linear(f"{layer}.{attention}.output.dense", TEXT, TEXT)
            norm(f"{layer}.{attention}.output.LayerNorm", TEXT)
        linear(f"{layer}.intermediate.dense", TEXT, 96)
        linear(f"{layer}.output.dense", 96, TEXT)
        norm(f"{layer}.output.LayerNorm", TEXT)
    linear("blip.vision_proj", VISION, 256)  # these two are in the file, and not used
    linear("blip.text_proj", TEXT, 256)
    for index, inputs, outputs in ((0, TEXT, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1)):
        linear(f"mlp.layers.{index}", inputs, outputs)
    return found


def weights() -> dict[str, Tensor]:
    """Of every name some values that look random, of a size that lets signals through; those of norms are near 1."""
    found: dict[str, Tensor] = {}
    for name, shape in shapes().items():
        count = math.prod(shape)
        # The fractional part of an irrational multiple of a square is as good as random, and exact in float64.
        squares = (torch.arange(count, dtype=torch.float64) + zlib.crc32(name.encode()) % 10007) ** 2
        uniform = (squares * (math.sqrt(5) - 1) / 2).remainder(1) * 2 - 1
        is_norm = len(shape) == 1 and name.endswith("weight")
        scale = 0.3 if len(shape) == 1 or "embed" in name else math.sqrt(6 / math.prod(shape[1:]))
        found[name] = (uniform * scale + is_norm).float().view(shape)
    return found | {"blip.text_encoder.embeddings.position_ids": torch.arange(40).view(1, -1)}


def original() -> Any:
    """The original's model with these weights; what it imports and does not need is left empty."""
    for operator in ("nms", "qnms"):  # the binary part of torchvision is for another torch
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou) -> Tensor")
    package = Path(importlib.import_module("timm").__file__ or "").parents[1] / "ImageReward"
    stubs = {"ImageReward": [package], "ImageReward.models": [package / "models"]}
    stubs |= {name: [] for name in ("fairscale", "fairscale.nn", "fairscale.nn.checkpoint")}
    for name, path in stubs.items():
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(part) for part in path]
    checkpoint = ModuleType("fairscale.nn.checkpoint.checkpoint_activations")
    vars(checkpoint)["checkpoint_wrapper"] = None
    sys.modules[checkpoint.__name__] = checkpoint
    module: Any = importlib.import_module("ImageReward.ImageReward")
    blip: Any = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")
    vit: Any = importlib.import_module("ImageReward.models.BLIP.vit")
    transformers: Any = importlib.import_module("transformers")
    folder = Path("/tmp/image_reward_golden")
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    config = {"hidden_size": TEXT, "num_hidden_layers": LAYERS, "num_attention_heads": 12, "intermediate_size": 96}
    config |= {"vocab_size": len(WORDS), "max_position_embeddings": 40, "encoder_width": 768}
    (folder / "med.json").write_text(json.dumps(config | {"add_cross_attention": True, "layer_norm_eps": 1e-12}))
    blip.init_tokenizer = lambda: transformers.BertTokenizer(folder / "vocab.txt")
    blip.create_vit = lambda *_: (
        vit.VisionTransformer(img_size=224, patch_size=16, embed_dim=VISION, depth=LAYERS, num_heads=16),
        VISION,
    )
    model = module.ImageReward(med_config=str(folder / "med.json"))
    model.mlp = module.MLP(TEXT)
    model.load_state_dict(weights())
    return model.eval()


if __name__ == "__main__":
    model = original()
    with torch.no_grad():
        scores = [model.score(prompt, picture(index)) for index, prompt in enumerate(PROMPTS)]
        pixels = [model.preprocess(picture(index)).double() for index in range(len(SIZES))]
    # Sums with weights that no shift of the picture leaves alone.
    ramp = torch.linspace(-1, 1, 224, dtype=torch.float64)
    sums = [[(image * ramp).mean().item(), (image * ramp[:, None]).mean().item()] for image in pixels]
    golden = {"scores": scores, "pixels": sums, "mean": model.mean, "std": model.std}
    PATH.write_text(json.dumps(golden, indent=2) + "\n")
    print(PATH.read_text())
