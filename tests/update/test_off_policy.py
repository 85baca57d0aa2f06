"""The second update of a round against a formula of its own: diffusers' DDIM, torch's Normal and PPO's objective.

The first update has changed the weights, so ratios are not 1. Nothing of what is expected here is computed by the
package: trajectories and images are made by the plain pipeline from the samples' prompts and seeds.
"""

from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from transformers import TrainerCallback

from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOTrainer
from test_trainer import PROMPTS, relative_difference


STEPS, GUIDANCE = 4, 3.0  # of `make_config`


class Updates(TrainerCallback):
    """Keeps weights and gradients as the optimizer gets them, of all updates."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.weights.append({name: weight.detach().clone() for name, weight in trained.items()})
        self.gradients.append({name: weight.grad.clone() for name, weight in trained.items()})


class MiniBatches(DDPOTrainer):
    """Keeps which samples each micro-batch has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.samples: list[list[int]] = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.samples.append(inputs["samples"])
        return super().compute_loss(model, inputs, *args, **kwargs)


class Trajectories(NamedTuple):
    """States (N, T + 1, ...) from noise to image, and the advantages (N,) of a round."""

    states: Tensor
    advantages: Tensor


def trajectories(prompts: list[str], seeds: list[int]) -> Trajectories:
    """What plain diffusers makes of the prompts and seeds at η = 1, in batches of four."""
    states, images = [], []
    for first in range(0, len(prompts), 4):
        rows = slice(first, first + 4)
        of_batch = [torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in generators(seeds[rows])])]

        def keep(pipeline: Any, step: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            of_batch.append(tensors["latents"])  # noqa: B023  (called before the next batch)
            return tensors

        made = tiny_pipeline()(
            prompts[rows],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            eta=1.0,
            generator=generators(seeds[rows]),
            output_type="pt",
            callback_on_step_end=keep,
        )
        states.append(torch.stack(of_batch, dim=1))
        images.append(made.images)
    rewards = brightness(torch.cat(images), tuple(prompts), ()).double()
    advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
    return Trajectories(torch.cat(states), advantages.float())


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def transition_of(
    pipeline: StableDiffusionPipeline, scheduler: DDIMScheduler, prompts: list[str], states: Tensor, step: int
) -> Normal:
    """The Gaussian from which the next state is drawn: diffusers' step with noise 0, and how far noise 1 moves it."""
    of_prompt, of_empty = pipeline.encode_prompt(prompts, "cpu", 1, True)
    timestep = scheduler.timesteps[step]
    unguided, guided = pipeline.unet(
        torch.cat([states] * 2), timestep, torch.cat([of_empty, of_prompt]), return_dict=False
    )[0].chunk(2)
    prediction = unguided + GUIDANCE * (guided - unguided)
    mean, moved = (
        scheduler.step(prediction, timestep, states, eta=1.0, variance_noise=noise).prev_sample
        for noise in (torch.zeros_like(states), torch.ones_like(states))
    )
    return Normal(mean, (moved - mean).detach().mean())


def reduced(values: Tensor, reduction: str) -> Tensor:
    return values.flatten(1).mean(1) if reduction == "mean" else values.flatten(1).sum(1)


def second_update(trainer: MiniBatches, updates: Updates) -> tuple[Tensor, Tensor, Tensor]:
    """Ratios and KL divergences to the reference (N, T), with gradient, and advantages (N, 1) of the second update."""
    second = trainer.samples[len(trainer.samples) // 2 :]
    samples = sorted({sample for micro_batch in second for sample in micro_batch})
    rollout, reduction = trainer.rollout, trainer.args.log_prob_reduction
    seeds = [seed for batch in rollout.batches for seed in batch.context.seeds]
    states, advantages = trajectories(rollout.prompts, seeds)
    states, advantages = states[samples], advantages[samples, None]
    scheduler = tiny_pipeline().scheduler
    scheduler.set_timesteps(STEPS)

    def policies(weights: dict[str, Tensor]) -> list[Normal]:
        prompts = [rollout.prompts[sample] for sample in samples]
        trainer.model.load_state_dict(weights, strict=False)
        return [transition_of(trainer.pipeline, scheduler, prompts, states[:, step], step) for step in range(STEPS)]

    def log_probs(normals: list[Normal]) -> Tensor:
        each = [normal.log_prob(states[:, step + 1]) for step, normal in enumerate(normals)]
        return torch.stack([reduced(values, reduction) for values in each], dim=1)

    with torch.no_grad():
        old = log_probs(policies(updates.weights[0]))
        trainer.pipeline.unet.disable_adapters()
        reference = policies({})
        trainer.pipeline.unet.enable_adapters()
    now = policies(updates.weights[1])
    divergences = [reduced(kl_divergence(own, other), reduction) for own, other in zip(now, reference, strict=True)]
    return torch.exp(log_probs(now) - old), torch.stack(divergences, dim=1), advantages


@pytest.mark.parametrize(
    ("settings", "clips"),
    [
        ({"num_mini_batches": 2, "cliprange": 0.5}, False),
        ({"num_mini_batches": 2, "cliprange": 1e-3}, True),
        ({"num_ppo_epochs": 2, "cliprange": 1e-3, "per_device_train_batch_size": 2}, True),
        ({"num_ppo_epochs": 2, "cliprange": 0.2, "log_prob_reduction": "sum", "learning_rate": 0.02}, True),
        ({"num_mini_batches": 2, "cliprange": 1e-3, "kl_coef": 0.5}, True),
    ],
    ids=["nothing clipped", "second mini-batch", "second epoch", "joint density", "KL to the reference"],
)
def test_the_second_updates_gradient_is_that_of_ppo_under_the_weights_that_the_first_one_left(
    make_config, settings, clips
):
    updates = Updates()
    config = make_config(**{"max_grad_norm": 0.0, "learning_rate": 0.2, **settings})
    trainer = MiniBatches(config, brightness, PROMPTS, tiny_pipeline(), callbacks=[updates])
    trainer.train()
    assert len(updates.gradients) == 2
    ratios, divergences, advantages = second_update(trainer, updates)
    assert (ratios - 1).abs().mean() > 5e-3
    low, high = 1 - config.cliprange, 1 + config.cliprange
    bounded = torch.minimum(ratios * advantages, ratios.clamp(low, high) * advantages)
    share = (bounded != ratios * advantages).float().mean()
    assert 0.1 < share < 0.9 if clips else share == 0

    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}

    def gradient(objective: Tensor) -> dict[str, Tensor]:
        loss = -objective.mean() + config.kl_coef * divergences.mean()
        return dict(zip(trained, torch.autograd.grad(loss, list(trained.values()), retain_graph=True), strict=True))

    assert relative_difference(updates.gradients[1], gradient(bounded)) < 5e-4
    # Controls: it is told from the gradient without clipping and from that of ratios that are taken as 1.
    assert (relative_difference(updates.gradients[1], gradient(ratios * advantages)) > 1e-2) == clips
    assert relative_difference(updates.gradients[1], gradient(torch.log(ratios) * advantages)) > 5e-3
