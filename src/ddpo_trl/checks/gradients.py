"""The reason why no gradient reaches the denoiser in a step, or one of something else."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ddpo_trl.policy.denoiser import adapter_layers
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.records import Context
from ddpo_trl.policy.schedulers import Replay


# Half precision rounds by less, if kernels with gradients and without differ; usually they don't.
CHECKPOINTING_TOLERANCE = 0.01


def check_checkpointing(policy: Policy, context: Context) -> None:
    """
    Refuse a denoiser that computes something else with activation checkpointing: some of diffusers' leave out an
    argument there, such as the attention mask of the prompt.

    Args:
        policy ([`~ddpo_trl.policy.policy.Policy`]):
            The policy, with activation checkpointing enabled: it is used only where gradients are computed.
        context ([`~ddpo_trl.policy.records.Context`]):
            One sample is enough.

    Raises:
        `ValueError`: If the first step differs.
    """
    with torch.no_grad():
        plain = policy.runner.visit(policy.runner.policy_pipeline, Replay(0), context)
    with torch.enable_grad():
        mean = policy.runner.visit(policy.runner.policy_pipeline, Replay(0), context).mean.detach()
    assert plain.latents is not None, "visit raises if no step was run"
    change = ((mean - plain.mean).norm() / (plain.mean - plain.latents).norm()).item()
    if change > CHECKPOINTING_TOLERANCE:
        raise ValueError(
            f"gradient_checkpointing is True, but {type(policy.denoiser).__name__} computes something else with it: "
            f"the first step differs by {change:.2g} of its length, because diffusers leaves out an argument there. "
            "Leave gradient_checkpointing out, and lower per_device_train_batch_size if memory is short."
        )


def no_gradient_cause(policy: Policy, step: int, latents: Tensor, next_latents: Tensor, context: Context) -> str:
    """
    Return the reason, in a sentence, why a step has no gradient.

    Args:
        policy ([`~ddpo_trl.policy.policy.Policy`]):
            The policy, not wrapped.
        step, latents, next_latents, context:
            As for [`~ddpo_trl.policy.policy.Policy.forward`].
    """
    found = f"No gradient reaches pipeline.{policy.denoiser_name} at step {step}: "
    with torch.enable_grad(), recorded_grad_modes(policy.denoiser) as modes:
        replayed = Policy.forward(policy, step, latents, next_latents, context).log_probs
    if replayed.requires_grad:
        return f"{found}gradients are switched off around the policy. Look for torch.set_grad_enabled(False)."
    if not modes:
        return f"{found}the pipeline runs another network there. Leave such steps out with train_timestep_range."
    if not any(modes):
        return (
            f"{found}the pipeline runs it without gradients. Look for `torch.no_grad()` in its __call__ or "
            "of a hook, or leave such steps out with train_timestep_range."
        )
    if any(layer.merged for layer in adapter_layers(policy.denoiser)):
        return f"{found}the adapter is fused into its weights. Call `pipeline.unfuse_lora()` before training."
    return (
        f"{found}its output there does not depend on the trained weights. The adapter may be "
        "switched off (`enable_lora()`), or the network detaches its output; if only in some steps, leave them "
        "out with train_timestep_range."
    )


@contextmanager
def recorded_grad_modes(module: nn.Module) -> Iterator[list[bool]]:
    """Record for each call of a module if gradients were on."""
    modes: list[bool] = []
    hook = module.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    try:
        yield modes
    finally:
        hook.remove()
