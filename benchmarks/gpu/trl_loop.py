"""
The operations of TRL 0.23.1's DDPOTrainer, written plainly: it needs transformers 4, and the GPU machine has 5.

Sampling runs the denoiser on batches doubled by guidance and records latents and log-probabilities of DDIM steps.
Training shuffles samples, and the steps of each sample; for each step it runs the denoiser again with guidance, takes
the log-probability of the recorded latents, and accumulates the gradient of the clipped objective. One update per
round. `make bench` compares with TRL's own code, on a CPU. TRL had no SDXL; here it gets the same loop.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from torch import Tensor

from gpu.networks import Network
from rounds import GUIDANCE


ETA = 1.0
CLIP_RANGE = 1e-4
LARGEST_ADVANTAGE = 10.0


class Trajectories(NamedTuple):
    """
    Recorded batch: `(B, T, ...)` latents before and after each step, `(B, T)` log-probabilities and timesteps, the
    denoiser's conditions, which are doubled by guidance, and the images.
    """

    latents: Tensor
    next_latents: Tensor
    log_probs: Tensor
    timesteps: Tensor
    conditions: dict[str, Any]
    images: Tensor


class TRLLoop:
    """Sampling and training of a pipeline whose denoiser has its adapter."""

    def __init__(self, pipeline: Any, sizes: Network, learning_rate: float):
        self.pipeline, self.sizes, self.unet = pipeline, sizes, pipeline.unet
        self.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        self.weights = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        # A step without noise, as SDXL's last one, has no log-probability. TRL would divide by 0.
        ends_without_noise = self.scheduler.final_alpha_cumprod == 1
        self.trained_steps = sizes.steps - 1 if ends_without_noise else sizes.steps
        self.optimizer = torch.optim.AdamW(self.weights, lr=learning_rate, weight_decay=1e-4)

    def conditions(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Encode prompts to keyword arguments of the denoiser; the negative prompts' come first."""
        pipeline, device = self.pipeline, self.unet.device
        if not isinstance(pipeline, StableDiffusionXLPipeline):
            embeds, negative = pipeline.encode_prompt(list(prompts), device, 1, True)
            return {"encoder_hidden_states": torch.cat([negative, embeds])}
        embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
            prompt=list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        size = self.sizes.image_size
        ids = torch.tensor([[size, size, 0, 0, size, size]] * (2 * len(prompts)), device=device, dtype=embeds.dtype)
        return {
            "encoder_hidden_states": torch.cat([negative, embeds]),
            "added_cond_kwargs": {"text_embeds": torch.cat([negative_pooled, pooled]), "time_ids": ids},
        }

    def denoise(self, latents: Tensor, timesteps: Tensor, conditions: dict[str, Any]) -> Tensor:
        noise = self.unet(torch.cat([latents] * 2), torch.cat([timesteps] * 2), **conditions).sample
        negative, positive = noise.chunk(2)
        return negative + GUIDANCE * (positive - negative)

    def ddim_step(
        self, noise: Tensor, timesteps: Tensor, latents: Tensor, next_latents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take a DDIM step, or the log-probability of a recorded one: the mean over the latent dimensions."""
        scheduler = self.scheduler
        earlier = timesteps - scheduler.config.num_train_timesteps // self.sizes.steps
        alphas = scheduler.alphas_cumprod.gather(0, timesteps.cpu())  # as there: a wait in each step
        found = scheduler.alphas_cumprod.gather(0, earlier.clamp(min=0).cpu())
        next_alphas = torch.where(earlier.cpu() >= 0, found, scheduler.final_alpha_cumprod)
        alpha, next_alpha = (
            each.to(latents.device).view(-1, *[1] * (latents.ndim - 1)) for each in (alphas, next_alphas)
        )
        original = (latents - (1 - alpha) ** 0.5 * noise) / alpha**0.5
        std = ETA * ((1 - next_alpha) / (1 - alpha) * (1 - alpha / next_alpha)) ** 0.5
        mean = next_alpha**0.5 * original + (1 - next_alpha - std**2) ** 0.5 * noise
        if next_latents is None:
            next_latents = mean + std * torch.randn_like(mean)
        log_prob = -((next_latents.detach() - mean) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))
        return next_latents.type(latents.dtype), log_prob.mean(dim=tuple(range(1, log_prob.ndim)))

    @torch.no_grad()
    def sample(self, prompts: Sequence[str]) -> Trajectories:
        conditions = self.conditions(prompts)
        unet, count = self.unet, len(prompts)
        self.scheduler.set_timesteps(self.sizes.steps, device=unet.device)
        side = self.sizes.image_size // self.pipeline.vae_scale_factor
        latents = [torch.randn(count, unet.config.in_channels, side, side, device=unet.device, dtype=unet.dtype)]
        log_probs = []
        for timestep in self.scheduler.timesteps:
            timesteps = timestep.expand(count)
            following, log_prob = self.ddim_step(
                self.denoise(latents[-1], timesteps, conditions), timesteps, latents[-1]
            )
            latents.append(following)
            log_probs.append(log_prob)
        decoded = self.pipeline.vae.decode(latents[-1] / self.pipeline.vae.config.scaling_factor, return_dict=False)[0]
        states = torch.stack(latents, dim=1)
        return Trajectories(
            latents=states[:, :-1],
            next_latents=states[:, 1:],
            log_probs=torch.stack(log_probs, dim=1),
            timesteps=self.scheduler.timesteps.repeat(count, 1),
            conditions=conditions,
            images=(decoded.float() / 2 + 0.5).clamp(0, 1),
        )

    def train(self, batch: Trajectories, advantages: Tensor) -> None:
        rows = torch.arange(len(advantages), device=advantages.device)[:, None]
        steps = self.trained_steps
        order = torch.stack([torch.randperm(steps, device=advantages.device) for _ in advantages])
        latents, next_latents, log_probs, timesteps = (
            each[rows, order] for each in (batch.latents, batch.next_latents, batch.log_probs, batch.timesteps)
        )
        advantages = advantages.clamp(-LARGEST_ADVANTAGE, LARGEST_ADVANTAGE)
        figures: dict[str, list[Tensor]] = {"loss": [], "approx_kl": [], "clipfrac": []}
        for step in range(steps):
            noise = self.denoise(latents[:, step], timesteps[:, step], batch.conditions)
            _, log_prob = self.ddim_step(noise, timesteps[:, step], latents[:, step], next_latents[:, step])
            ratio = torch.exp(log_prob - log_probs[:, step])
            clipped = torch.clamp(ratio, 1 - CLIP_RANGE, 1 + CLIP_RANGE)
            loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
            figures["loss"].append(loss.detach())
            figures["approx_kl"].append(0.5 * (log_prob - log_probs[:, step]).square().mean().detach())
            figures["clipfrac"].append(((ratio - 1).abs() > CLIP_RANGE).float().mean())
            (loss / steps).backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        _ = {name: torch.stack(values).mean().item() for name, values in figures.items()}  # are logged

    def a_round(self, prompts: Sequence[str]) -> None:
        """Sample, score by brightness, and train."""
        batch = self.sample(prompts)
        rewards = batch.images.flatten(1).mean(1).cpu()
        advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-8)
        self.train(batch, advantages.to(batch.latents.device))
