"""
Dependence of a round's images on the sample batch size: `python benchmarks/batch_sizes.py`.

The noise is bitwise identical, so all differences are rounding: other batch sizes use other kernels. Each row has the
largest and the mean absolute difference between the pixels, in [0, 1], of the two batch sizes in the second column.
"""

import argparse

import torch
from torch import Tensor

from ddpo_trl import load_emoji_pipeline
from ddpo_trl.policy.lora import add_adapter
from ddpo_trl.policy.policy import Policy
from ddpo_trl.seeding import Stream, derived_seed
from rounds import PROMPTS, quiet_config


def images(policy: Policy, count: int, batch_size: int) -> Tensor:
    """Sample the images of the first round of a run with seed 42."""
    seeds = [derived_seed(42, Stream.SAMPLE, 0, index) for index in range(count)]
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(count)]
    batches = []
    for first in range(0, count, batch_size):
        rows = slice(first, first + batch_size)
        batches.append(policy.sample(policy.context(prompts[rows], [{}] * batch_size, seeds[rows])).images)
    return torch.cat(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    print("| dtype | batch sizes | largest difference | mean difference |\n|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = load_emoji_pipeline(torch_dtype=dtype)
        config = quiet_config(use_cpu=True, num_inference_steps=arguments.steps)
        policy = Policy(pipeline, config, add_adapter(pipeline, None))
        reference, *others = (images(policy, arguments.images, size) for size in arguments.batch_sizes)
        for size, other in zip(arguments.batch_sizes[1:], others, strict=True):
            difference = (other - reference).abs()
            sizes = f"{arguments.batch_sizes[0]} and {size}"
            print(f"| {str(dtype)[6:]} | {sizes} | {difference.max():.1e} | {difference.mean():.1e} |")


if __name__ == "__main__":
    main()
