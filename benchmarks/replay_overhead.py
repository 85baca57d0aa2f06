"""
Time of a replayed step outside the denoiser: `python benchmarks/replay_overhead.py`.

A step is replayed by the pipeline's own `__call__`, with all its preparations. It is timed with the denoiser and its
backward pass, and with a stub that returns immediately; the two are interleaved.
"""

import argparse
import statistics

import torch

from ddpo_trl.policy.lora import add_adapter
from ddpo_trl.policy.policy import Policy
from rounds import PROMPTS, quiet_config, seconds_of
from sides import CASES, load, save_pipeline


def measure(case: str, repeats: int) -> tuple[list[float], list[float]]:
    """Measure the seconds of a replayed step (forward and backward) and of one without the denoiser."""
    sizes = CASES[case]
    config = quiet_config(use_cpu=True, num_inference_steps=sizes.steps)
    save_pipeline(case)
    pipeline = load(case)
    policy = Policy(pipeline, config, add_adapter(pipeline, None))
    prompts = (PROMPTS * sizes.batch_size)[: sizes.batch_size]
    context = policy.context(prompts, [{}] * len(prompts), list(range(len(prompts))))
    state = policy.sample(context, record={0}, max_steps=1).steps[0]
    denoise = policy.denoiser.forward

    def replay() -> torch.Tensor:
        return policy(0, state.latents, state.next_latents, context).log_probs

    def with_denoiser() -> None:
        policy.denoiser.forward = denoise
        replay().mean().backward()

    def without() -> None:
        policy.denoiser.forward = lambda latents, *args, **kwargs: (latents,)
        replay()

    times = [(seconds_of(with_denoiser), seconds_of(without)) for _ in range(repeats + 1)][1:]  # the first is warm-up
    whole, outside = zip(*times, strict=True)
    return list(whole), list(outside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    for case, sizes in CASES.items():
        whole, outside = (statistics.median(values) for values in measure(case, arguments.repeats))
        print(
            f"{sizes.title}: {outside / whole:.1%} of a replayed step with its backward pass is outside the denoiser"
        )


if __name__ == "__main__":
    main()
