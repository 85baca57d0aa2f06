"""
CPU time of the rewards that use a model: `python benchmarks/reward_cost.py`.

The networks have their published sizes and random weights, which cost as much as trained ones. Prints the time per
image relative to `LaionAesthetic`, and that of `LaionAesthetic` in seconds: on a shared machine only ratios within one
run are meaningful. `VLMJudge` is left out, because its cost depends on the model it is given.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BatchEncoding,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from ddpo_trl.emoji import EMOJI_PATH
from ddpo_trl.rewards import (
    AestheticPredictorV25,
    CLIPScore,
    EmojiAlignment,
    HPSv2,
    ImageReward,
    LaionAesthetic,
    NSFWGate,
    OCRAccuracy,
    PickScore,
    RewardModel,
)
from ddpo_trl.rewards.aesthetic import AestheticPredictor
from ddpo_trl.rewards.clip import Clip
from ddpo_trl.rewards.image_reward import MAX_TOKENS, BlipJudge
from ddpo_trl.rewards.siglip import SiglipPredictor
from ddpo_trl.rewards.weights import Head


LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
HUGE = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}


class FullLength:
    """Tokenizer that returns ImageReward's maximum number of tokens for every text."""

    def __call__(self, texts: list[str], **options: object) -> BatchEncoding:
        tokens = torch.ones(len(texts), MAX_TOKENS, dtype=torch.long)
        return BatchEncoding({"input_ids": tokens, "attention_mask": tokens})


def clip(vision: dict[str, int], text: dict[str, int], projection: int) -> Clip:
    config = CLIPConfig(
        vision_config={**vision, "image_size": 224, "patch_size": 14},
        text_config=text,
        projection_dim=projection,
    )
    return Clip(
        network=CLIPModel(config).eval(),
        processor=CLIPImageProcessorPil(),
        tokenizer=AutoTokenizer.from_pretrained(EMOJI_PATH / "tokenizer"),
        logit_scale=100.0,
    )


def head(width: int) -> Head:
    sizes = [width, 1024, 128, 64, 16, 1]
    return [(torch.randn(after, before), torch.zeros(after)) for before, after in zip(sizes, sizes[1:], strict=False)]


def blip() -> BlipJudge:
    vision = BlipVisionConfig(**LARGE, image_size=224, patch_size=16)
    text = BlipTextConfig(**BASE, encoder_hidden_size=1024)
    return BlipJudge(
        vision=BlipVisionModel(vision).eval(),
        text=BlipTextModel(text, add_pooling_layer=False).eval(),
        tokenizer=FullLength(),
        head=head(768),
    )


def siglip() -> SiglipPredictor:
    config = SiglipVisionConfig(**SO400M, image_size=384, patch_size=14)
    processor = SiglipImageProcessorPil(size={"height": 384, "width": 384})
    return SiglipPredictor(network=SiglipVisionModel(config).eval(), processor=processor, head=head(1152))


def rewards() -> list[RewardModel]:
    """Create the rewards, with random networks instead of downloads."""
    large = clip(LARGE, BASE, 768)
    huge = clip(HUGE, LARGE, 1024)
    ready: list[tuple[RewardModel, object]] = [
        (LaionAesthetic(), AestheticPredictor(clip=large, head=head(768))),
        (CLIPScore(), large),
        (PickScore(), huge),
        (HPSv2(), huge),
        (ImageReward(), blip()),
        (AestheticPredictorV25(), siglip()),
    ]
    for reward, loaded in ready:
        reward._loaded = loaded
    return [*(reward for reward, _ in ready), OCRAccuracy(), NSFWGate(), EmojiAlignment()]


def seconds_per_image(reward: RewardModel, images: Tensor) -> float:
    start = time.perf_counter()
    reward(images, ('a shop sign that says "OPEN"',) * len(images), ({},) * len(images))
    return (time.perf_counter() - start) / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    images = torch.rand(arguments.images, 3, arguments.size, arguments.size)
    everything = rewards()
    seconds: dict[str, list[float]] = {type(reward).__name__: [] for reward in everything}
    for repeat in range(arguments.repeats + 1):
        for reward in everything:  # interleaved
            taken = seconds_per_image(reward, images)
            if repeat > 0:
                seconds[type(reward).__name__].append(taken)
    unit = statistics.median(seconds["LaionAesthetic"])
    print(f"LaionAesthetic: {unit:.2f} s per image on this machine")
    for name, values in seconds.items():
        print(f"{name:24} {statistics.median(values) / unit:6.2f}")


if __name__ == "__main__":
    main()
