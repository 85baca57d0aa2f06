"""Trains the denoiser and the text encoder together on the autoencoder's latents, for a given time."""

import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTokenizer

from data import STYLES, Concept
from text import TEXT_WIDTH, create_text_encoder, create_tokenizer, sample_caption, tokenize
from training import TrainingState, load_training_state, save_training_state


WARMUP_STEPS = 200
EMA_DECAY = 0.998
CHECKPOINT_SECONDS = 120


def create_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule with v-prediction: epsilon-prediction stayed gray in a short training."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def create_unet() -> UNet2DConditionModel:
    """Builds the untrained denoiser: two levels (64, 128), one layer per block, about 4 M parameters."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        # diffusers' old misnomer: this is the number of heads at each level
        attention_head_dim=(2, 4),
        cross_attention_dim=TEXT_WIDTH,
        # The pooled text is also added to the time embedding; otherwise a short training hardly follows captions.
        addition_embed_type="text",
        addition_embed_type_num_heads=8,
    )


class Denoiser(nn.Module):
    """The two networks that are trained together, the text encoder and the UNet."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text_encoder = create_text_encoder(tokenizer)
        self.unet = create_unet()
        # PyTorch's fused attention has a slow backward pass on a CPU: plain attention makes a step a quarter faster.
        self.unet.set_attn_processor(AttnProcessor())

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Predicts v, `(B, 4, 16, 16)`, for noisy latents of that shape, `(B,)` timesteps and `(B, L)` token ids."""
        text = self.text_encoder(input_ids).last_hidden_state
        prediction: torch.Tensor = self.unet(latents, timesteps, text).sample
        return prediction


def training_batches(
    concepts: list[Concept], latents: torch.Tensor, tokenizer: CLIPTokenizer, batch_size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields `(B, 4, 16, 16)` latents and `(B, L)` caption ids forever, each drawing once per pass.

    Args:
        latents: `(len(concepts), len(STYLES), 4, 16, 16)`, all drawings.
        seed: Seed for the order and the choice of captions.
    """
    rng = random.Random(seed)
    drawings = [(concept, style) for concept in range(len(concepts)) for style in range(len(STYLES))]
    queue: list[tuple[int, int]] = []
    while True:
        while len(queue) < batch_size:
            queue += rng.sample(drawings, len(drawings))
        chosen, queue = queue[:batch_size], queue[batch_size:]
        captions = [sample_caption(concepts[concept], style, rng) for concept, style in chosen]
        yield torch.stack([latents[pair] for pair in chosen]), tokenize(tokenizer, captions)


def stratified_timesteps(batch_size: int, num_timesteps: int) -> torch.Tensor:
    """Draws `(B,)` timesteps, one from each of `batch_size` equal parts of the schedule, for a less noisy loss."""
    parts = (torch.randperm(batch_size) + torch.rand(batch_size)) / batch_size
    return (parts * num_timesteps).long().clamp(max=num_timesteps - 1)


def learning_rate_at(state: TrainingState, peak: float, minutes: float) -> float:
    """Warms up over [`WARMUP_STEPS`], then follows a cosine in *time*: the budget is in minutes, not in steps."""
    warmup = min(1.0, (state.step + 1) / WARMUP_STEPS)
    return peak * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, state.seconds / (60 * minutes))))


def v_loss(denoiser: nn.Module, scheduler: DDIMScheduler, latents: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean squared error of v at stratified timesteps; a scalar."""
    noise = torch.randn_like(latents)
    timesteps = stratified_timesteps(len(latents), scheduler.config.num_train_timesteps).to(latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    with torch.autocast(latents.device.type, torch.bfloat16):
        prediction = denoiser(noisy, timesteps, ids)
    return (prediction.float() - scheduler.get_velocity(latents, noise, timesteps)).square().mean()


def train_unet(
    concepts: list[Concept],
    latents: torch.Tensor,
    work_dir: Path,
    minutes: float,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    device: str = "cpu",
) -> None:
    """Trains for `minutes` in total, over all resumptions, with its checkpoint in `work_dir / "unet.pt"`.

    Args:
        latents: `(len(concepts), len(STYLES), 4, 16, 16)`, of unit variance.
    """
    checkpoint = work_dir / "unet.pt"
    tokenizer = create_tokenizer(concepts)
    torch.manual_seed(1)
    denoiser = Denoiser(tokenizer).to(device)
    average = AveragedModel(denoiser, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=learning_rate, betas=(0.9, 0.99), fused=True)
    state = TrainingState()
    if checkpoint.exists():
        state = load_training_state(checkpoint, denoiser, optimizer)
        average.load_state_dict(torch.load(checkpoint, weights_only=True)["average"])
        # Continue with new noise and captions, not with those of the first steps.
        torch.manual_seed(state.step)
    scheduler = create_scheduler()
    batches = training_batches(concepts, latents, tokenizer, batch_size, seed=state.step)

    last_saved, last_time, losses = state.seconds, time.monotonic(), []
    while state.seconds < 60 * minutes:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(state, learning_rate, minutes)
        batch, ids = next(batches)
        loss = v_loss(denoiser, scheduler, batch.to(device), ids.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(denoiser)
        losses.append(loss.item())
        now = time.monotonic()
        state = TrainingState(state.step + 1, state.seconds + now - last_time)
        last_time = now
        if state.step % 200 == 0:
            passes = state.step * batch_size / latents[:, :, 0, 0, 0].numel()
            mean_loss, losses = sum(losses) / len(losses), []
            print(
                f"unet step {state.step} ({passes:.0f} passes) loss {mean_loss:.4f} {state.seconds / 60:.1f} minutes",
                flush=True,
            )
        if state.seconds - last_saved > CHECKPOINT_SECONDS or state.seconds >= 60 * minutes:
            save_training_state(checkpoint, state, denoiser, optimizer, average=average.state_dict())
            last_saved = state.seconds


def load_average(work_dir: Path, tokenizer: CLIPTokenizer) -> Denoiser:
    """Returns the averaged weights of the checkpoint in `work_dir`, finished or not."""
    denoiser = Denoiser(tokenizer)
    average = torch.load(work_dir / "unet.pt", weights_only=True)["average"]
    # AveragedModel keeps the weights under "module.", and a counter.
    prefix = "module."
    denoiser.load_state_dict({k.removeprefix(prefix): v for k, v in average.items() if k.startswith(prefix)})
    return denoiser.eval()
