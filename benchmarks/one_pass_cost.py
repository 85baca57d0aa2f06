"""
Operations and peak memory of a trained step, in one pass and in two, with activation checkpointing and without.

    python benchmarks/one_pass_cost.py [--batch-size 2]

counts the operations of the embedded pipeline. `step_costs` counts those of any policy, and its peak memory, with what
`measure` counts: on a GPU, or on a simulated one at the size of SDXL.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from ddpo_trl import DDPOConfig, load_emoji_pipeline
from ddpo_trl.policy.per_sample_gradients import SampleGradients, trained_layers
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.records import Context
from ddpo_trl.policy.sampling import differentiate


class Cost(NamedTuple):
    """
    Cost of a call: the number of floating-point operations, and the bytes that are in use at its peak; 0 where that is
    not counted.
    """

    operations: float
    peak_bytes: int


class StepCosts(NamedTuple):
    """
    Costs of a trained step of a batch.

    Args:
        sampling, training (`Cost`):
            Two passes: the forward pass of sampling; the forward and backward pass of a micro-batch.
        one_pass (`Cost`):
            One pass: the forward pass of sampling with its backward pass, and the per-sample gradients.
    """

    sampling: Cost
    training: Cost
    one_pass: Cost

    @property
    def operations(self) -> float:
        """Operations of one pass as a share of those of two."""
        return self.one_pass.operations / (self.sampling.operations + self.training.operations)

    @property
    def peak(self) -> float:
        """Peak memory of one pass as a share of that of the training step of two."""
        return self.one_pass.peak_bytes / max(self.training.peak_bytes, 1)


def step_costs(policy: Policy, context: Context, measure: Callable[[Callable[[], object]], Cost]) -> StepCosts:
    """
    Count what a trained step costs in one pass and in two.

    Args:
        policy ([`~ddpo_trl.policy.policy.Policy`]):
            The policy, with activation checkpointing enabled or not.
        context ([`~ddpo_trl.policy.records.Context`] of length `B`):
            A batch that the pipeline takes in one call.
        measure (`Callable[[Callable[[], object]], Cost]`):
            Runs a function and counts what it costs.
    """
    state = policy.runner.first_state(context)
    gradients = SampleGradients(dict.fromkeys(trained_layers(policy.denoiser), 1), len(context))

    def sampling() -> None:
        with torch.no_grad():
            policy(0, state, state, context)

    def training() -> None:
        policy(0, state, state, context).log_probs.mean().backward()

    def one_pass() -> None:
        with gradients.watch.watching():
            differentiate(policy.runner, context, 0, gradients.add)

    costs = StepCosts(measure(sampling), measure(training), measure(one_pass))
    policy.zero_grad(set_to_none=True)
    return costs


def counted(run: Callable[[], object]) -> Cost:
    """Count operations, and on a GPU the peak memory."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with FlopCounterMode(display=False) as counter:
        run()
    return Cost(counter.get_total_flops(), torch.cuda.max_memory_allocated() if on_gpu else 0)


def report(name: str, costs: StepCosts) -> None:
    """Print a line for both ways."""
    sampling, training, one_pass = (cost.operations / 1e9 for cost in costs)
    peak, one_pass_peak = costs.training.peak_bytes / 2**30, costs.one_pass.peak_bytes / 2**30
    print(
        f"{name:<20} GFLOP: two passes {sampling:.2f} + {training:.2f}, one pass {one_pass:.2f} = "
        f"{costs.operations:.3f}; peak GiB: two passes {peak:.2f}, one pass {one_pass_peak:.2f} = {costs.peak:.3f}"
    )


def main() -> None:
    """Count for the embedded pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=2, help="samples of a batch")
    size = parser.parse_args().batch_size
    policy = Policy.from_pipeline(load_emoji_pipeline(), DDPOConfig(output_dir="outputs/cost", num_inference_steps=4))
    context = policy.context(["cat face"] * size, [{}] * size, range(size))
    report("all activations kept", step_costs(policy, context, counted))
    policy.activation_checkpointing_enable()
    report("with checkpointing", step_costs(policy, context, counted))


if __name__ == "__main__":
    main()
