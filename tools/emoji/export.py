"""Writes the shipped files: the pipeline's folder, the contact sheet, the list of concepts and the credits.

python tools/emoji/export.py            # from the newest checkpoint, while training goes on
"""

import argparse
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from autoencoder import create_autoencoder
from data import STYLES, Concept, load_dataset
from text import create_tokenizer
from unet import create_scheduler, load_average


ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "src" / "ddpo_trl" / "assets" / "emoji"

# The contact sheet has all drawings in the order of the concepts, with both styles next to each other.
TILE_SIZE = 32
SHEET_COLUMNS = 48


def create_pipeline(concepts: list[Concept], work_dir: Path) -> StableDiffusionPipeline:
    """Assembles the pipeline in fp32 from the newest checkpoints in `work_dir`."""
    tokenizer = create_tokenizer(concepts)
    denoiser = load_average(work_dir, tokenizer)
    denoiser.unet.set_default_attn_processor()
    # A new object: the one from from_pretrained would write a path of this machine into its config.
    autoencoder = create_autoencoder()
    autoencoder.load_state_dict(AutoencoderKL.from_pretrained(work_dir / "autoencoder").state_dict())
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        unet=denoiser.unet,
        scheduler=create_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def index_drawings(concepts: list[Concept], drawings: np.ndarray) -> tuple[list[dict[str, object]], np.ndarray]:
    """Gives every drawing a place in the contact sheet; identical drawings (Fluent has a pair) share one.

    Args:
        drawings: `(concepts, styles, 64, 64, 3)` uint8.

    Returns:
        The concepts with their places, as in `{"tiles": {"flat": 0, "3d": 1}}`, and the `(places, 64, 64, 3)` images.
    """
    places: dict[bytes, int] = {}
    images: list[np.ndarray] = []
    entries: list[dict[str, object]] = []
    for concept, pair in zip(concepts, drawings, strict=True):
        tiles = {}
        for style, image in zip(STYLES, pair, strict=True):
            tiles[style] = places.setdefault(image.tobytes(), len(images))
            if tiles[style] == len(images):
                images.append(image)
        entries.append({**asdict(concept), "tiles": tiles})
    return entries, np.array(images)


def contact_sheet(images: np.ndarray) -> Image.Image:
    """Averages `(N, 64, 64, 3)` uint8 images to tiles and lays them out row by row."""
    factor = images.shape[1] // TILE_SIZE
    tiles = images.reshape(-1, TILE_SIZE, factor, TILE_SIZE, factor, 3).mean(axis=(2, 4)).round().astype(np.uint8)
    rows = -(-len(tiles) // SHEET_COLUMNS)
    sheet = np.full((rows * SHEET_COLUMNS, TILE_SIZE, TILE_SIZE, 3), 255, dtype=np.uint8)
    sheet[: len(tiles)] = tiles
    grid = sheet.reshape(rows, SHEET_COLUMNS, TILE_SIZE, TILE_SIZE, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(grid.reshape(rows * TILE_SIZE, SHEET_COLUMNS * TILE_SIZE, 3))


def with_prefix(weights: Path) -> None:
    """Renames the text encoder's tensors as transformers before 5.10 does; all later versions read these names too."""
    tensors = {f"text_model.{name}": tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})


def export(work_dir: Path, target: Path) -> None:
    """Writes the whole folder next to `target` and then swaps the two, so that `target` is never incomplete."""
    concepts, drawings = load_dataset(work_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".emoji-", dir=target.parent))
    folder.chmod(0o755)
    pipeline = create_pipeline(concepts, work_dir).to(torch.float16)
    pipeline.save_pretrained(folder)
    # transformers 5 writes only tokenizer.json; these are vocab.json and merges.txt, which older versions read.
    pipeline.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    with_prefix(folder / "text_encoder" / "model.safetensors")
    # With dtype float16 in its config, the text encoder would load in half precision, and the rest in single.
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(0o644)
    index, images = index_drawings(concepts, drawings)
    contact_sheet(images).save(folder / "contact_sheet.png", optimize=True)
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in index)
    (folder / "concepts.json").write_text(f"[\n{lines}\n]\n")
    shutil.copy(Path(__file__).parent / "NOTICE", folder)
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=".emoji-old-", dir=target.parent))
        os.replace(target, old / "emoji")
        os.replace(folder, target)
        shutil.rmtree(old)
    else:
        os.replace(folder, target)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"{target}: {size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "build" / "emoji", help="packages and checkpoints")
    parser.add_argument("--target", type=Path, default=ASSETS, help="folder to replace")
    args = parser.parse_args()
    export(args.work_dir, args.target)


if __name__ == "__main__":
    main()
