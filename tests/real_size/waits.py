"""Waits of the host between denoising steps that are known, with the reason for each."""

from collections.abc import Iterable

from real_size.simulated_gpu import Wait


OWN = {
    "blocking copy to the GPU policy/schedulers/actions.py:draw < diffusers/utils/torch_utils.py:randn_tensor": (
        "the noise of a step comes from CPU generators, so that it does not depend on the device; a copy from pinned "
        "memory would not wait (point 4 of issue 17)"
    ),
}
# In evaluation with the pipeline's own sampler, and in calls that pipelines make themselves.
OF_LIBRARIES = {
    "item policy/runner.py:run < diffusers/schedulers/scheduling_pndm.py:_get_prev_sample": (
        "PNDM, in evaluation: it reads its coefficients by a timestep on the device"
    ),
}
KNOWN = {**OWN, **OF_LIBRARIES}


def unexplained(waits: Iterable[Wait]) -> list[str]:
    """Return the waits without a reason, as kind and place."""
    return sorted({f"{wait.kind} {wait.place}" for wait in waits} - KNOWN.keys())
