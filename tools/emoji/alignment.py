"""Trains a small CLIP on the emoji and their captions: the reward `emoji_alignment`.

    python tools/emoji/alignment.py             # first without a fifth of the 3d drawings, then with everything
    python tools/emoji/alignment.py --measure   # the shipped model on what the embedded pipeline draws

The first run measures how well such a model names drawings that it has not seen; the second one trains the shipped
model.
"""

import argparse
import io
import json
import math
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from autoencoder import decode, encode_mean
from data import IMAGE_SIZE, STYLES, Concept, load_dataset
from ddpo_trl.emoji import EMOJI_PATH, emoji_captions, load_emoji_pipeline, nearest_captions
from ddpo_trl.rewards import EmojiAlignment
from text import MAX_LENGTH, styled, tokenize


ROOT = Path(__file__).parents[2]
TARGET = ROOT / "src" / "ddpo_trl" / "assets" / "emoji_alignment"

# Replaces the first paragraph of the pipeline's NOTICE, which mentions a contact sheet that this folder does not have.
NOTICE = """The weights in this folder were trained from scratch, by tools/emoji/alignment.py in this project's
repository, on the images and words below."""

# In the first run, the 3d drawing of one in this many concepts is held out.
HELD_OUT_EVERY = 5
HELD_OUT_STYLE = STYLES.index("3d")

WIDTH = 96
PEAK_LEARNING_RATE = 1e-3
WARMUP_STEPS = 100
CONCEPTS_PER_BATCH = 64

# Words around a caption; half of the texts have none. Short, because a text has only 14 tokens.
PHRASES = ("a {}", "an {}", "the {}", "one {}", "my {}", "some {}", "{} emoji", "emoji of {}", "{}, please")

# Standard deviations of the noise that is added to latents of unit variance before they are decoded.
LATENT_NOISE = (0.0, 0.25, 0.5)


class Drawing(NamedTuple):
    """One training image.

    Attributes:
        concept: Index of its concept.
        style: Index of its style in [`STYLES`].
    """

    concept: int
    style: int


def create_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Builds the untrained model: patches of 8x8 pixels, 1.3 M parameters, a third of them in the text tower."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    # The backward pass of PyTorch's fused attention is slow on a CPU: with plain attention a step is twice as fast.
    model.set_attn_implementation("eager")
    return model


def decoded_variants(images: Tensor) -> Tensor:
    """Decodes `(N, 3, 64, 64)` images in [-1, 1] from their latents with noise, using the embedded autoencoder.

    Returns:
        `(1 + len(LATENT_NOISE), N, 3, 64, 64)` in [0, 1], the images themselves first.
    """
    autoencoder = AutoencoderKL.from_pretrained(EMOJI_PATH / "vae", torch_dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    variants = [images]
    with torch.no_grad():
        latents = torch.cat([encode_mean(autoencoder, batch) for batch in images.split(64)])
        for sigma in LATENT_NOISE:
            noisy = latents + sigma * torch.randn(latents.shape, generator=generator)
            variants.append(torch.cat([decode(autoencoder, batch) for batch in noisy.split(64)]))
    return (torch.stack(variants) / 2 + 0.5).clamp(0, 1)


def moved(images: Tensor) -> Tensor:
    """Mirrors, turns by up to 12 degrees, scales by 0.8 to 1.2 and shifts by up to 6 pixels; the new area is white."""
    count = len(images)
    angle = (torch.rand(count) * 2 - 1) * math.radians(12)
    scale = 0.8 + 0.4 * torch.rand(count)
    mirror = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    shift = (torch.rand(count, 2) * 2 - 1) * 2 * 6 / IMAGE_SIZE
    rows = [
        torch.stack([mirror * angle.cos() / scale, -angle.sin() / scale, shift[:, 0]], dim=1),
        torch.stack([mirror * angle.sin() / scale, angle.cos() / scale, shift[:, 1]], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return 1 - F.grid_sample(1 - images, grid, align_corners=False)


def faded(images: Tensor) -> Tensor:
    """Changes contrast against white and brightness, and blurs half of the images."""
    count = len(images)
    images = 1 - (1 - images) * (0.55 + 0.55 * torch.rand(count, 1, 1, 1))
    images = images + 0.1 * torch.randn(count, 1, 1, 1) + 0.03 * torch.randn(count, 3, 1, 1)
    size = int(torch.randint(12, 40, ()))
    blurred = F.interpolate(F.interpolate(images, size=size, mode="area"), size=IMAGE_SIZE, mode="bilinear")
    return torch.where(torch.rand(count, 1, 1, 1) < 0.5, blurred, images)


def noisy(images: Tensor) -> Tensor:
    """Adds noise of up to 0.15 to each pixel, and as much again in coarse spots."""
    count = len(images)
    fine = torch.randn_like(images) * torch.rand(count, 1, 1, 1) * 0.15
    spots = F.interpolate(torch.randn(count, 3, 16, 16), size=IMAGE_SIZE, mode="bilinear")
    return (images + fine + spots * torch.rand(count, 1, 1, 1) * 0.15).clamp(0, 1)


def as_jpeg(image: Tensor, quality: int) -> Tensor:
    """Compresses a `(3, H, W)` image in [0, 1] as JPEG, and decodes it."""
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer := io.BytesIO(), format="JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1) / 255


def augmented(images: Tensor, rng: random.Random) -> Tensor:
    """Varies `(B, 3, 64, 64)` images in [0, 1] as the pipeline might draw them; a quarter are compressed as JPEG."""
    images = noisy(faded(moved(images)))
    return torch.stack([as_jpeg(image, rng.randint(20, 90)) if rng.random() < 0.25 else image for image in images])


def scrambled(images: Tensor) -> Tensor:
    """Destroys the drawings of `(B, 3, 64, 64)` images but keeps their colors: tiles in random order, or blobs.

    Otherwise a policy could exploit the reward with such images.
    """
    tiles = images.unflatten(3, (4, 16)).unflatten(2, (4, 16)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    order = torch.rand(len(images), 16).argsort(1)
    tiles = tiles[torch.arange(len(images))[:, None], order].unflatten(1, (4, 4))
    puzzles = tiles.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    size = int(torch.randint(3, 7, ()))
    blobs = F.interpolate(F.interpolate(images, size=size, mode="area"), size=IMAGE_SIZE, mode="bilinear")
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, puzzles, blobs)


def normalized(images: Tensor) -> Tensor:
    """Maps [0, 1] to [-1, 1], as the shipped image processor does."""
    return images * 2 - 1


def image_features(model: CLIPModel, images: Tensor) -> Tensor:
    """`(B, WIDTH)` unit vectors of `(B, 3, 64, 64)` images in [0, 1]."""
    hidden = model.vision_model(pixel_values=normalized(images)).pooler_output
    return F.normalize(model.visual_projection(hidden).float(), dim=-1)


def all_image_features(model: CLIPModel, images: Tensor) -> Tensor:
    """Computes [`image_features`] in batches."""
    return torch.cat([image_features(model, batch) for batch in images.split(64)])


def text_features(model: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """`(B, WIDTH)` unit vectors of B texts."""
    hidden = model.text_model(input_ids=tokenize(tokenizer, list(texts))).pooler_output
    return F.normalize(model.text_projection(hidden).float(), dim=-1)


def contrastive_loss(similarity: Tensor, drawings: list[Drawing], concepts: list[int], of_nothing: Tensor) -> Tensor:
    """CLIP's loss in both directions, where a caption without a style word matches every drawing of its concept.

    Captions with a style word compete only with each other, and so do those without.

    Args:
        similarity: `(len(drawings), 3 * len(concepts))` logits; for each concept a column without style, then one
            for each of [`STYLES`].
        drawings: Drawings of the rows.
        concepts: Concepts of the columns.
        of_nothing: `(M, 3 * len(concepts))` logits of images that show nothing: all captions are equally likely.
    """
    place = {concept: index for index, concept in enumerate(concepts)}
    concept = torch.tensor([place[drawing.concept] for drawing in drawings])
    style = torch.tensor([drawing.style for drawing in drawings])
    columns = similarity.unflatten(1, (len(concepts), 1 + len(STYLES)))
    unstyled, with_style = columns[:, :, 0], columns[:, :, 1:].flatten(1)
    nothing = of_nothing.unflatten(1, (len(concepts), 1 + len(STYLES)))[:, :, 0]
    shown = len(STYLES) * concept + style
    means = F.one_hot(concept, len(concepts)).T.float()
    losses = [
        F.cross_entropy(unstyled, concept),
        F.cross_entropy(with_style, shown),
        F.cross_entropy(unstyled.T, means / means.sum(1, keepdim=True)),
        F.cross_entropy(with_style.T[shown], torch.arange(len(drawings))),
        F.cross_entropy(nothing, torch.full_like(nothing, 1 / len(concepts))),
    ]
    return torch.stack(losses).mean()


def batch_texts(concepts: list[Concept], rng: random.Random) -> list[str]:
    """Builds three texts for each concept: its caption (or in one of six cases a keyword) without and with the styles.

    All three use the same one of [`PHRASES`], or none.
    """
    texts = []
    for concept in concepts:
        words = rng.choice(concept.keywords) if concept.keywords and rng.random() < 1 / 6 else concept.caption
        phrase = rng.choice(PHRASES) if rng.random() < 1 / 2 else "{}"
        texts += [phrase.format(form) for form in (words, *(styled(words, style) for style in range(len(STYLES))))]
    return texts


def train(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    concepts: list[Concept],
    variants: Tensor,
    known: set[Drawing],
    steps: int,
) -> CLIPModel:
    """Trains with a cosine schedule after a warm-up.

    Args:
        variants: `(V, concepts, styles, 3, 64, 64)` in [0, 1], see [`decoded_variants`].
        known: Drawings to train on.
    """
    rng = random.Random(0)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1)
    start, losses = time.monotonic(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            warmup = min(1.0, (step + 1) / WARMUP_STEPS)
            group["lr"] = PEAK_LEARNING_RATE * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = rng.sample(range(len(concepts)), CONCEPTS_PER_BATCH)
        drawings = [Drawing(c, s) for c in chosen for s in range(len(STYLES)) if Drawing(c, s) in known]
        images = torch.stack([variants[(rng.randrange(len(variants)), *drawing)] for drawing in drawings])
        shown = augmented(images, rng)
        with torch.autocast("cpu", torch.bfloat16):
            pictures = image_features(model, torch.cat([shown, scrambled(shown[::4])]))
            words = text_features(model, tokenizer, batch_texts([concepts[c] for c in chosen], rng))
        logits = model.logit_scale.exp() * pictures @ words.T
        loss = contrastive_loss(logits[: len(shown)], drawings, chosen, of_nothing=logits[len(shown) :])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))  # as CLIP does
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            mean_loss, losses = sum(losses) / len(losses), []
            print(
                f"step {step + 1}/{steps} loss {mean_loss:.3f} {(time.monotonic() - start) / 60:.1f} minutes",
                flush=True,
            )
    return model.eval()


@torch.no_grad()
def retrieval(
    model: CLIPModel, tokenizer: CLIPTokenizer, concepts: list[Concept], images: Tensor, drawings: list[Drawing]
) -> tuple[float, float]:
    """Measures how often the right caption comes first among all captions, and how often among the first five.

    Args:
        images: `(len(drawings), 3, 64, 64)` in [0, 1].
    """
    words = text_features(model, tokenizer, [concept.caption for concept in concepts])
    best = (all_image_features(model, images) @ words.T).topk(5).indices
    right = best == torch.tensor([drawing.concept for drawing in drawings])[:, None]
    return right[:, 0].float().mean().item(), right.any(1).float().mean().item()


def export(model: CLIPModel, tokenizer: CLIPTokenizer, target: Path) -> None:
    """Writes what plain transformers loads: the model in half precision, tokenizer, image processor, credits."""
    shutil.rmtree(target, ignore_errors=True)
    model.half().save_pretrained(target)
    tokenizer.save_pretrained(target)
    gray = [0.5] * 3
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=gray, image_std=gray
    ).save_pretrained(target)
    # With dtype float16 in its config, transformers would compute in half precision, which is slow on a CPU.
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")
    for file in target.iterdir():
        file.chmod(0o644)
    credits = (Path(__file__).parent / "NOTICE").read_text().split("\n\n", 1)[1]
    (target / "NOTICE").write_text(f"{NOTICE}\n\n{credits}")
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{target}: {size / 1e6:.2f} MB")


def build(work_dir: Path, target: Path, steps: int, only: str | None, begin: Path | None) -> None:
    """Trains on the split, evaluates on the held-out drawings, trains on everything, and exports.

    Args:
        target: Folder that the model replaces.
        steps: Steps of each of the two trainings.
        only: `"split"` or `"everything"` to run only one of them.
        begin: Folder with a model to continue from, instead of an untrained one.
    """
    concepts, arrays = load_dataset(work_dir)
    images = torch.from_numpy(arrays).permute(0, 1, 4, 2, 3).float()
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI_PATH / "tokenizer")
    variants = decoded_variants(images.flatten(0, 1) / 127.5 - 1).unflatten(1, images.shape[:2])
    everything = [Drawing(c, s) for c in range(len(concepts)) for s in range(len(STYLES))]
    shuffled = random.Random(1).sample(range(len(concepts)), len(concepts))
    unseen = [Drawing(c, HELD_OUT_STYLE) for c in shuffled[::HELD_OUT_EVERY]]
    for name, held_out in (("split", unseen), ("everything", [])):
        if only not in (None, name):
            continue
        seen = [drawing for drawing in everything if drawing not in held_out]
        torch.manual_seed(0)
        model = create_model(tokenizer)
        if begin is not None:
            model.load_state_dict(CLIPModel.from_pretrained(begin, dtype=torch.float32).state_dict())
        model = train(model, tokenizer, concepts, variants, set(seen), steps)
        for kind, drawings in (("seen", seen), ("held-out", held_out)):
            if drawings:
                shown = torch.stack([variants[(0, *drawing)] for drawing in drawings])
                first, five = retrieval(model, tokenizer, concepts, shown, drawings)
                print(f"{len(drawings)} {kind} drawings: top-1 {first:.3f}, top-5 {five:.3f} of {len(concepts)}")
        if not held_out:
            export(model, tokenizer, target)


# Samples of the measurement: text around the caption, steps, guidance scale.
SAMPLERS = (("{}", 5, 2.5), ("{}", 2, 1.0), ("a {}", 5, 1.0))


@torch.no_grad()
def measure() -> None:
    """Draws every caption once with each of [`SAMPLERS`] and compares the reward with the nearest-image measure."""
    pipeline = load_emoji_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    captions = emoji_captions()
    reward = EmojiAlignment()
    tokenizer = CLIPTokenizer.from_pretrained(TARGET)
    model = CLIPModel.from_pretrained(TARGET).eval()
    words = text_features(model, tokenizer, captions)
    for phrase, steps, guidance_scale in SAMPLERS:
        prompts = [phrase.format(caption) for caption in captions]
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        batches = [
            pipeline(
                prompts[first : first + 64],
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=generators[first : first + 64],
                output_type="pt",
            ).images
            for first in range(0, len(prompts), 64)
        ]
        images = torch.cat(batches)
        named = [captions[best] for best in (all_image_features(model, images) @ words.T).argmax(1).tolist()]
        nearest = [name.split(" ", 1)[1] for name in nearest_captions(images)]
        hit = torch.tensor([name == caption for name, caption in zip(nearest, captions, strict=True)])
        rewards = torch.tensor(reward(images, prompts, prompts))
        above = (rewards[hit][:, None] > rewards[~hit]).float().mean().item()
        print(
            f"{phrase!r}, {steps} steps, guidance {guidance_scale}: {share(nearest, captions)} nearest to their own "
            f"drawing, {share(named, captions)} named by the reward model, agreement {share(named, nearest)}; reward "
            f"{rewards[hit].mean():.2f} for the former, {rewards[~hit].mean():.2f} for the others, right order in "
            f"{above:.3f} of pairs",
            flush=True,
        )


def share(names: list[str], others: list[str]) -> str:
    """Formats the share of equal names."""
    return f"{sum(a == b for a, b in zip(names, others, strict=True)) / len(names):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "build" / "emoji", help="where the packages are")
    parser.add_argument("--target", type=Path, default=TARGET, help="folder that the model replaces")
    parser.add_argument("--steps", type=int, default=1800, help="steps of each of the two trainings")
    parser.add_argument("--only", choices=("split", "everything"), help="run only one of the two trainings")
    parser.add_argument("--begin", type=Path, help="folder with a model to continue from")
    parser.add_argument("--measure", action="store_true", help="only measure the model that ships")
    args = parser.parse_args()
    if args.measure:
        measure()
        return
    args.work_dir.mkdir(parents=True, exist_ok=True)
    build(args.work_dir, args.target, args.steps, args.only, args.begin)


if __name__ == "__main__":
    main()
