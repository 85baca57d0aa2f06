"""
Checks that both sides of a comparison do the same work. If they do not, the comparison is an error.

TRL's trainer runs a round in its own environment, and saves its inputs, trajectories and gradient. ddpo_trl then
computes the same inputs, and the gradient on the same trajectories.
"""

import argparse
import contextlib
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback

from environments import TRL, python_of
from rounds import PROMPTS, Child
from sides import CASES, Case, our_trainer, pipeline_folder, save_pipeline, their_trainer


# Largest difference that rounding explains in float32, relative to the norm. Measured: 0 for embeddings and images,
# 1e-6 for gradients.
ROUNDING = 1e-5

# Size of the rounds whose gradients are compared.
CHECKED = {name: case._replace(batch_size=4, batches=2, steps=3) for name, case in CASES.items()}


class Disagreement(ValueError):
    """Raised if the two sides do not do the same work."""


def require_equal(what: str, ours: Any, theirs: Any) -> None:
    """
    Check that a number or a name is the same on both sides.

    Raises:
        [`Disagreement`]: If they differ.
    """
    if ours != theirs:
        raise Disagreement(f"The comparison is not valid: {what} is {ours} for ddpo_trl and {theirs} for TRL.")


def require_close(what: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """
    Check that tensors are the same on both sides, within rounding.

    Args:
        what (`str`):
            Plural noun for the message.
        ours, theirs (`Mapping[str, torch.Tensor]`):
            Tensors by name.

    Returns:
        `float`: L2 distance of all tensors together, relative to the norm of `theirs`.

    Raises:
        [`Disagreement`]: If names or shapes differ, a value is not finite, all are 0, or the distance is larger than
            `ROUNDING`.
    """
    shapes = [{(name, tuple(tensor.shape)) for name, tensor in side.items()} for side in (ours, theirs)]
    if odd := sorted(shapes[0] ^ shapes[1]):
        raise Disagreement(f"The comparison is not valid: only one side has these {what}: {odd[:4]}.")
    size = norm(theirs.values())
    difference = norm(ours[name].double() - tensor.double() for name, tensor in theirs.items())
    relative = difference / size if size else math.inf
    if not relative <= ROUNDING:
        raise Disagreement(
            f"The comparison is not valid: the two sides' {what} differ by {relative:.1e} relative to their "
            f"norm, and rounding explains at most {ROUNDING:.0e}."
        )
    return relative


def norm(tensors: Iterable[Tensor]) -> float:
    """L2 norm of all tensors together."""
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


# ---- A round of TRL's trainer ----


class TheirRound(NamedTuple):
    """
    Inputs and results of a round of TRL's trainer.

    Args:
        torch, threads (`str`, `int`):
            Version of PyTorch and its number of threads.
        embeddings (`dict[str, torch.Tensor]`):
            Embedding of each prompt, including the empty one.
        image (`torch.Tensor`):
            Decoded first latents of the first trajectory.
        weights, gradients (`dict[str, torch.Tensor]`):
            Trained weights and the gradient of the round, by name.
        timesteps (`list[int]`):
            Timesteps of the sampler.
        samples (`list[dict[str, torch.Tensor]]`):
            Trajectories, by batch.
    """

    torch: str
    threads: int
    embeddings: dict[str, Tensor]
    image: Tensor
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    timesteps: list[int]
    samples: list[dict[str, Tensor]]


def their_round(case: str) -> TheirRound:
    """Run a round in TRL's environment."""
    trainer = their_trainer(case, CHECKED[case], learning_rate=0.0, max_grad_norm=1e9)
    trainer.prompt_fn = lambda: (PROMPTS[0], {})  # samples are shuffled before training
    weights = {name: p for name, p in trainer.sd_pipeline.unet.named_parameters() if p.requires_grad}
    shake(weights)
    train, step = trainer._train_batched_samples, trainer.optimizer.optimizer.step
    batches: list[dict[str, Tensor]] = []
    gradients: dict[str, Tensor] = {}

    def keep_samples(inner_epoch: int, epoch: int, global_step: int, samples: list[dict[str, Tensor]]) -> int:
        batches.extend(samples)
        return train(inner_epoch, epoch, global_step, samples)

    def keep_gradient(*args: Any, **kwargs: Any) -> Any:
        gradients.update({name: p.grad.clone() for name, p in weights.items() if p.grad is not None})
        return step(*args, **kwargs)

    trainer._train_batched_samples = keep_samples
    trainer.optimizer.optimizer.step = keep_gradient
    trainer.step(0, 0)
    return TheirRound(
        torch=str(torch.__version__),
        threads=torch.get_num_threads(),
        embeddings=their_embeddings(trainer),
        image=decoded(trainer.sd_pipeline.vae, batches),
        weights={name: weight.detach() for name, weight in weights.items()},
        gradients=gradients,
        timesteps=trainer.sd_pipeline.scheduler.timesteps.tolist(),
        samples=batches,
    )


def shake(weights: Mapping[str, Tensor]) -> None:
    """Move the adapter away from its initialization, where one factor is 0 and the other gets no gradient."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in weights.items():
            if "lora_B" in name:
                weight.normal_(std=0.02, generator=random)


@torch.no_grad()
def their_embeddings(trainer: Any) -> dict[str, Tensor]:
    """Embeddings as TRL's trainer computes them."""
    tokenizer, encoder = trainer.sd_pipeline.tokenizer, trainer.sd_pipeline.text_encoder
    options = {"return_tensors": "pt", "padding": "max_length", "truncation": True}
    ids = tokenizer(PROMPTS, max_length=tokenizer.model_max_length, **options).input_ids
    return {**dict(zip(PROMPTS, encoder(ids)[0], strict=True)), "": trainer.neg_prompt_embed[0]}


@torch.no_grad()
def our_embeddings(pipeline: Any) -> dict[str, Tensor]:
    """Embeddings as the pipeline computes them."""
    embeddings, negative = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
    return {**dict(zip(PROMPTS, embeddings, strict=True)), "": negative[0]}


@torch.no_grad()
def decoded(vae: Any, samples: list[dict[str, Tensor]]) -> Tensor:
    return vae.decode(samples[0]["latents"][:1, 0] / vae.config.scaling_factor).sample


# ---- The checks ----


def check_sides(case: str) -> dict[str, float]:
    """
    Save the pipeline of a case, and check everything that must hold before the sides are compared.

    Returns:
        `dict[str, float]`: Relative differences by name.

    Raises:
        [`Disagreement`]: If the sides do not do the same work.
    """
    save_pipeline(case)
    kept = pipeline_folder(case).with_suffix(".pt")
    child = Child([python_of(TRL), __file__, case, str(kept)])
    child.answer()
    child.end()
    theirs = TheirRound(**torch.load(kept, weights_only=True))
    with contextlib.redirect_stdout(io.StringIO()):  # Trainer prints its logs
        return {**against_theirs(case, theirs), "one_pass_gradient_difference": one_pass_difference(case)}


def against_theirs(case: str, theirs: TheirRound) -> dict[str, float]:
    """Compute the differences from TRL's round, inputs first."""
    require_equal("the version of torch", str(torch.__version__), theirs.torch)
    require_equal("the number of threads", torch.get_num_threads(), theirs.threads)
    ours = our_trainer(case, CHECKED[case], rounds=1, one_pass=False)
    pipeline = ours.pipeline
    differences = {
        "embedding_difference": require_close("prompt embeddings", our_embeddings(pipeline), theirs.embeddings),
        "image_difference": require_close(
            "decoded images", {"": decoded(pipeline.vae, theirs.samples)}, {"": theirs.image}
        ),
    }
    weights = {name: weight for name, weight in pipeline.unet.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for name, weight in theirs.weights.items():
            weights[name].copy_(weight)
    log_probs = replay(ours.model, CHECKED[case], theirs)
    gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    differences["log_prob_difference"] = require_close("log-probabilities", *log_probs)
    differences["gradient_difference"] = require_close("gradients", gradients, theirs.gradients)
    return differences


def replay(policy: Any, sizes: Case, theirs: TheirRound) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """
    Accumulate the gradient of the score function on TRL's trajectories.

    Returns:
        `tuple`: Log-probabilities of ddpo_trl and of TRL, by batch and step.
    """
    rows = torch.arange(sizes.batch_size)
    context = policy.context([PROMPTS[0]] * len(rows), [{}] * len(rows), [0] * len(rows))
    ours, kept = {}, {}
    for batch, samples in enumerate(theirs.samples):
        for index, timestep in enumerate(theirs.timesteps):
            place = (samples["timesteps"] == timestep).int().argmax(1)
            latents, next_latents, old = (
                samples[name][rows, place] for name in ("latents", "next_latents", "log_probs")
            )
            log_probs, _ = policy(index, latents, next_latents, context)
            loss = -(samples["advantages"].clamp(-10, 10) * log_probs).mean()  # TRL's default bound
            (loss / (sizes.batches * sizes.steps)).backward()
            ours[f"{batch}, {index}"], kept[f"{batch}, {index}"] = log_probs.detach(), old.reshape(-1)
    return ours, kept


def one_pass_difference(case: str) -> float:
    """Compute the difference between the gradients of one pass and of two passes."""
    gradients = {one_pass: our_gradient(case, one_pass) for one_pass in (True, False)}
    return require_close("gradients (one pass and two passes of ddpo_trl)", gradients[True], gradients[False])


def our_gradient(case: str, one_pass: bool) -> dict[str, Tensor]:
    """Compute the gradient of one round, by weight name."""
    gradients: dict[str, Tensor] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gradients.update({name: weight.grad.clone() for name, weight in weights.items()})

    trainer = our_trainer(case, CHECKED[case], 1, [Keep()], one_pass=one_pass, max_grad_norm=0.0)
    weights = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    shake(weights)
    trainer.train()
    return gradients


def main() -> None:
    """Save a round of TRL's trainer; runs in TRL's environment."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("kept", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        torch.save(their_round(arguments.case)._asdict(), arguments.kept)
    print('"kept"')


if __name__ == "__main__":
    main()
