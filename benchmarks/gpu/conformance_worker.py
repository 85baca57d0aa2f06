"""Answers each combination of pipeline, dtype and attention kernel with its deviations, for `gpu.conformance`."""

import contextlib
import json
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel

from conformance.checks import CASES, STEPS, context, make_policy, one_pass_deviation, replay_deviations
from gpu.conformance import CHOSEN, KERNELS
from gpu.setting import nan_last, quiet


BY_NAME = {case.name: case for case in CASES}


def deviations(job: dict[str, str], device: str) -> dict[str, Any]:
    """Measure a combination, or say why it could not be run."""
    found: dict[str, Any] = {}
    try:
        with kernel(job["kernel"]):
            case = BY_NAME[job["pipeline"]]
            policy = make_policy(case, device, getattr(torch, job["dtype"]))
            batch = policy.sample(context(policy, case), record=range(STEPS))
            found["replay"] = max(replay_deviations(policy, batch).values(), key=nan_last)
            found |= one_pass_deviation(policy, batch)._asdict()
    except Exception as error:  # whatever it is, it is a result
        found["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    return found


def kernel(name: str) -> AbstractContextManager[None]:
    """Return the context in which `scaled_dot_product_attention` has only one kernel."""
    return nullcontext() if name == CHOSEN else sdpa_kernel(KERNELS[name])


def main() -> None:
    quiet()
    answers = sys.stdout
    for job in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            found = deviations(json.loads(job), sys.argv[1])
        print(json.dumps(found), file=answers, flush=True)
        if "CUDA error" in found.get("error", ""):
            raise SystemExit("After an error of CUDA, this process can't use the device.")


if __name__ == "__main__":
    main()
