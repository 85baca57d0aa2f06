"""Waits of the host between denoising steps that are known, with the reason for each."""

from collections.abc import Iterable

from real_size.simulated_gpu import Wait


KNOWN = {
    "blocking copy to the GPU policy/schedulers/actions.py:draw < diffusers/utils/torch_utils.py:randn_tensor": (
        "the noise of a step comes from CPU generators, so that it does not depend on the device; a copy from pinned "
        "memory would not wait (point 4 of issue 17)"
    ),
}


def is_own_sampler(wait: Wait) -> bool:
    """Return whether a pipeline's own sampler waits, in evaluation: diffusers' schedulers read their timestep."""
    return wait.phase == "evaluation" and "diffusers/schedulers/" in wait.place


def unexplained(waits: Iterable[Wait]) -> list[str]:
    """Return the waits without a reason, as kind and place."""
    return sorted({f"{wait.kind} {wait.place}" for wait in waits if not is_own_sampler(wait)} - KNOWN.keys())
