"""Builds the embedded pipeline from scratch: packages, autoencoder, denoiser, export. Run it again to resume.

python tools/emoji/build.py --minutes 65
"""

import argparse
from pathlib import Path

import torch

from autoencoder import encode_mean, train_autoencoder
from data import IMAGE_SIZE, load_dataset
from export import ASSETS, export
from unet import train_unet


ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "build" / "emoji", help="packages and checkpoints")
    parser.add_argument("--target", type=Path, default=ASSETS, help="folder that the pipeline replaces")
    parser.add_argument("--device", default="cpu", help="device to train on, such as cpu or cuda")
    parser.add_argument("--minutes", type=float, default=65, help="minutes of denoiser training, over all resumptions")
    parser.add_argument("--autoencoder-steps", type=int, default=2400, help="training steps of the autoencoder")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)

    concepts, drawings = load_dataset(args.work_dir)
    images = torch.from_numpy(drawings).flatten(0, 1).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
    print(f"{len(concepts)} concepts, {len(images)} images of {IMAGE_SIZE}x{IMAGE_SIZE}", flush=True)
    autoencoder = train_autoencoder(images, args.work_dir, args.autoencoder_steps, device=args.device)
    with torch.no_grad():
        latents = torch.cat([encode_mean(autoencoder, batch) for batch in images.split(128)])
    train_unet(concepts, latents.unflatten(0, drawings.shape[:2]), args.work_dir, args.minutes, device=args.device)
    export(args.work_dir, args.target)


if __name__ == "__main__":
    main()
