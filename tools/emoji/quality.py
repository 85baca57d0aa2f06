"""Measures the embedded pipeline: the share of its samples whose nearest training image is that of their caption.

    python tools/emoji/quality.py

Prints a line per caption, then the share, and draws the samples to outputs/. Needs no training data: it compares with
the contact sheet next to the weights.
"""

import argparse
import random
import textwrap
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

from ddpo_trl.emoji import EMOJI_PATH, emoji_captions, load_emoji_pipeline, nearest_captions, recognized_share


ROOT = Path(__file__).parents[2]
NUM_CAPTIONS = 40
NUM_SEEDS = 4
NUM_STEPS = 30
GUIDANCE_SCALE = 4.0

# Captions of no training image: colors, and new combinations of concepts and styles.
UNSEEN_CAPTIONS = (
    "blue dog face",
    "green cat face",
    "red frog",
    "panda with sunglasses",
    "flat pizza face",
    "3d strawberry face",
    "crying dog face",
    "tiger with heart-eyes",
    "dog with tears of joy",
    "apple with cowboy hat",
    "angry tomato",
    "bicycle",
)


def fixed_captions() -> list[str]:
    """Selects the captions of the measurement, the same on every machine: one in three asks for a style."""
    rng = random.Random(0)
    captions = rng.sample(emoji_captions(), NUM_CAPTIONS)
    prefixes = ("", "", "", "", "flat ", "3d ")
    return [prefixes[index % len(prefixes)] + caption for index, caption in enumerate(captions)]


def draw_samples(
    pipeline: StableDiffusionPipeline, captions: list[str], num_seeds: int, guidance_scale: float
) -> torch.Tensor:
    """Samples `(len(captions), num_seeds, 3, 64, 64)` images in [0, 1]; each depends only on its caption and seed."""
    rows = []
    for caption in captions:
        generators = [torch.Generator().manual_seed(seed) for seed in range(num_seeds)]
        rows.append(
            pipeline(
                [caption] * num_seeds,
                num_inference_steps=NUM_STEPS,
                guidance_scale=guidance_scale,
                generator=generators,
                output_type="pt",
            ).images
        )
    return torch.stack(rows)


def labeled_sheet(
    images: torch.Tensor, captions: list[str], columns: int, misses: list[list[bool]] | None = None
) -> Image.Image:
    """Lays out `(len(captions), num_seeds, 3, H, W)` images in `columns` columns of captions, with misses framed."""
    _, num_seeds, _, height, width = images.shape
    cell_width, cell_height = num_seeds * width + 12, height + 22
    rows = -(-len(captions) // columns)
    sheet = Image.new("RGB", (columns * cell_width + 12, rows * cell_height + 6), "white")
    canvas = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    pixels = images.mul(255).round().byte().permute(0, 1, 3, 4, 2).numpy()
    for index, caption in enumerate(captions):
        left, top = 12 + index % columns * cell_width, 4 + index // columns * cell_height
        text = caption if font.getlength(caption) < num_seeds * width else textwrap.shorten(caption, num_seeds * 11)
        canvas.text((left, top), text, fill="black", font=font)
        for seed in range(num_seeds):
            corner = (left + seed * width, top + 15)
            sheet.paste(Image.fromarray(pixels[index, seed]), corner)
            if misses is not None and misses[index][seed]:
                canvas.rectangle((*corner, corner[0] + width - 1, corner[1] + height - 1), outline="red")
    return sheet


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Writes a small PNG: 256 colors are enough for a picture of emoji."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "outputs")
    args = parser.parse_args()

    pipeline = load_emoji_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    print(f"{EMOJI_PATH}: {NUM_STEPS} DDIM steps, guidance {args.guidance_scale}, {NUM_SEEDS} seeds")

    unseen = draw_samples(pipeline, list(UNSEEN_CAPTIONS), NUM_SEEDS, args.guidance_scale)
    print("\nNot seen in training, with the nearest captions:")
    for caption, row in zip(UNSEEN_CAPTIONS, unseen, strict=True):
        print(f"  {caption:24} {', '.join(nearest_captions(row))}")
    save_sheet(labeled_sheet(unseen, list(UNSEEN_CAPTIONS), columns=3), args.output_dir / "emoji-unseen.png")

    captions = fixed_captions()
    images = draw_samples(pipeline, captions, NUM_SEEDS, args.guidance_scale)
    hits = [
        [recognized_share(image[None], [caption]) == 1 for image in row]
        for caption, row in zip(captions, images, strict=True)
    ]
    print("\nSeen in training, with the nearest captions of the misses:")
    for caption, row, row_hits in zip(captions, images, hits, strict=True):
        misses = [name for name, hit in zip(nearest_captions(row), row_hits, strict=True) if not hit]
        print(f"  {caption:44} {sum(row_hits)}/{NUM_SEEDS}  {', '.join(misses)}")
    framed = [[not hit for hit in row] for row in hits]
    save_sheet(labeled_sheet(images, captions, columns=4, misses=framed), args.output_dir / "emoji-quality.png")
    num_hits = sum(map(sum, hits))
    num_images = NUM_CAPTIONS * NUM_SEEDS
    print(f"recognized {num_hits / num_images:.2f} ({num_hits}/{num_images})")


if __name__ == "__main__":
    main()
