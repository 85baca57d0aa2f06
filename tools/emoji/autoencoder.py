"""Trains the autoencoder: 64x64x3 images to 16x16x4 latents of unit variance and back, deterministic."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from training import TrainingState, load_training_state, save_training_state


LATENT_CHANNELS = 4
# The decoder has to tolerate small errors of the denoiser, so it never sees a clean latent in training.
LATENT_NOISE = 0.03
# Posterior noise would be redundant, and made the model collapse: the log-variance is this constant.
LOG_VARIANCE = -6.0


def create_autoencoder() -> AutoencoderKL:
    """Builds the untrained autoencoder: 0.65 M parameters, no attention, a factor of 4 in each direction."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def encode_mean(autoencoder: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Encodes `(B, 3, 64, 64)` images in [-1, 1] to `(B, 4, 16, 16)` latents, the posterior's mean."""
    return autoencoder.quant_conv(autoencoder.encoder(images))[:, :LATENT_CHANNELS]


def decode(autoencoder: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Decodes `(B, 4, 16, 16)` latents to `(B, 3, 64, 64)` images in about [-1, 1]."""
    return autoencoder.decoder(autoencoder.post_quant_conv(latents))


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 + MSE + half the L1 of the image gradients, which keeps outlines sharp; `(B, 3, H, W)` in, a scalar out."""
    error = output - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


def augmented_batches(images: torch.Tensor, batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yields shuffled batches forever, half of them mirrored and some with permuted color channels.

    These have colors that no emoji has, so that a fine-tuned denoiser may leave the training images.
    """
    while True:
        for chosen in torch.randperm(len(images), generator=generator).split(batch_size):
            if len(chosen) < batch_size:
                continue
            batch = images[chosen]
            if torch.rand((), generator=generator) < 0.5:
                batch = batch.flip(-1)
            if torch.rand((), generator=generator) < 0.15:
                batch = batch[:, torch.randperm(3, generator=generator)]
            yield batch


def fold_latent_scale(autoencoder: AutoencoderKL, images: torch.Tensor) -> None:
    """Gives the latents of `images` mean 0 and variance 1 by rewriting the two 1x1 convolutions around them.

    Training divides by each batch's statistics; the saved autoencoder has no such step.
    """
    with torch.no_grad():
        latents = torch.cat([encode_mean(autoencoder, batch) for batch in images.split(128)])
        mean = latents.mean((0, 2, 3))
        std = latents.std()
        quant, post = autoencoder.quant_conv, autoencoder.post_quant_conv
        quant.weight[:LATENT_CHANNELS] /= std
        quant.bias[:LATENT_CHANNELS] = (quant.bias[:LATENT_CHANNELS] - mean) / std
        # The decoder was trained on latents that were divided by the std but not centered.
        post.bias += post.weight[:, :, 0, 0] @ (mean / std)
        quant.weight[LATENT_CHANNELS:] = 0
        quant.bias[LATENT_CHANNELS:] = LOG_VARIANCE


def psnr(autoencoder: AutoencoderKL, images: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of encode-decode over `(N, 3, 64, 64)` images in [-1, 1]."""
    with torch.no_grad():
        outputs = torch.cat([decode(autoencoder, encode_mean(autoencoder, batch)) for batch in images.split(128)])
    mse = ((outputs.clamp(-1, 1) - images) / 2).square().mean().item()
    return -10 * math.log10(mse)


def train_autoencoder(
    images: torch.Tensor,
    work_dir: Path,
    steps: int = 2400,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    device: str = "cpu",
) -> AutoencoderKL:
    """Trains on `(N, 3, 64, 64)` images in [-1, 1]; resumes from `work_dir`, where the result is saved too."""
    finished = work_dir / "autoencoder"
    if finished.exists():
        return AutoencoderKL.from_pretrained(finished)
    torch.manual_seed(0)
    autoencoder = create_autoencoder().to(device)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=learning_rate, betas=(0.9, 0.99), fused=True)
    state = TrainingState()
    checkpoint = work_dir / "autoencoder.pt"
    if checkpoint.exists():
        state = load_training_state(checkpoint, autoencoder, optimizer)
    batches = augmented_batches(images.to(device), batch_size, torch.Generator().manual_seed(state.step))

    start = time.monotonic()
    while state.step < steps:
        warmup = min(1.0, (state.step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * state.step / steps))
        batch = next(batches)
        with torch.autocast(device, torch.bfloat16):
            latents = encode_mean(autoencoder, batch).float()
            latents = latents / latents.std()
            latents = latents + LATENT_NOISE * torch.randn_like(latents)
            output = decode(autoencoder, latents)
        loss = reconstruction_loss(output.float(), batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        state.step += 1
        if state.step % 50 == 0:
            now = time.monotonic()
            state.seconds, start = state.seconds + now - start, now
            print(f"autoencoder step {state.step}/{steps} loss {loss.item():.4f} {state.seconds:.0f} s", flush=True)
        if state.step % 300 == 0:
            save_training_state(checkpoint, state, autoencoder, optimizer)

    autoencoder = autoencoder.cpu().eval()
    fold_latent_scale(autoencoder, images)
    print(f"autoencoder: {psnr(autoencoder, images):.2f} dB over {len(images)} images in {state.seconds:.0f} s")
    autoencoder.save_pretrained(finished)
    return autoencoder
