"""
Share of each denoising step in the gradient, on the embedded pipeline: `python benchmarks/timestep_share.py`.

With advantages of variance 1 that don't depend on the step, the expected squared norm of the gradient is the sum over
steps and samples of ‖∇log π‖². Prints the share of each step and its σ: late steps of a short schedule have a tiny σ
and outweigh all others; `train_timestep_range` excludes them.
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table

from ddpo_trl import load_emoji_pipeline
from ddpo_trl.demo import PROMPTS
from ddpo_trl.policy.lora import add_adapter
from ddpo_trl.policy.policy import Policy
from ddpo_trl.update.one_pass import layers_of_samples
from rounds import quiet_config


def shares(steps: int, samples: int, guidance_scale: float) -> tuple[list[float], list[float]]:
    """Return the standard deviation and the share of the squared norm of each step."""
    config = quiet_config(use_cpu=True, num_inference_steps=steps, guidance_scale=guidance_scale)
    torch.manual_seed(0)
    pipeline = load_emoji_pipeline()
    policy = Policy(pipeline, config, add_adapter(pipeline, None))
    prompts = (PROMPTS * samples)[:samples]
    context = policy.context(prompts, [{}] * samples, list(range(samples)))
    stds = policy.probe_schedule(context).stds
    noisy = [step for step, std in enumerate(stds) if std > 0]
    layers = layers_of_samples(policy, policy.context(prompts[:2], [{}] * 2, [0, 1]), noisy[0])
    squares = []
    for step in noisy:
        gradients = policy.sample_with_gradients(context, {step: 1.0}, layers).gradients
        assert gradients is not None
        squares.append(sum(weight.square().sum().item() for weight in gradients.weights))
    return [stds[step] for step in noisy], [square / sum(squares) for square in squares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--guidance_scale", type=float, default=2.5)
    arguments = parser.parse_args()
    for steps in arguments.steps:
        table = Table("step", "σ", "share", title=f"{steps} steps, {arguments.samples} samples")
        for step, (std, share) in enumerate(
            zip(*shares(steps, arguments.samples, arguments.guidance_scale), strict=True)
        ):
            table.add_row(str(step), f"{std:.3g}", f"{share:.1%}")
        Console().print(table)


if __name__ == "__main__":
    main()
