"""
Speed of the embedded denoiser, with each attention processor: `python benchmarks/emoji_speed.py`.

The variants are interleaved and the medians of several repeats are printed, because on a shared machine only ratios
within one run are meaningful.
"""

import argparse
import statistics

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from ddpo_trl import load_emoji_pipeline
from rounds import seconds_of


PROCESSORS = {"fused (default)": AttnProcessor2_0, "plain": AttnProcessor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    unet = load_emoji_pipeline().unet
    width = unet.config.cross_attention_dim
    latents = torch.randn(arguments.batch_size, 4, 16, 16)
    text = torch.randn(arguments.batch_size, 16, width)

    def forward() -> torch.Tensor:
        return unet(latents, 500, encoder_hidden_states=text).sample

    def forward_and_backward() -> None:
        forward().square().mean().backward()

    def forward_only() -> None:
        with torch.no_grad():
            forward()

    jobs = {"forward": forward_only, "forward + backward": forward_and_backward}
    times: dict[tuple[str, str], list[float]] = {(name, job): [] for name in PROCESSORS for job in jobs}
    for repeat in range(arguments.repeats + 1):
        for name, processor in PROCESSORS.items():
            unet.set_attn_processor(processor())
            for job, run in jobs.items():
                taken = seconds_of(run)
                if repeat > 0:  # the first is warm-up
                    times[name, job].append(1000 * taken / arguments.batch_size)
    print(f"milliseconds per sample at batch size {arguments.batch_size}, {torch.get_num_threads()} threads, float32")
    for (name, job), values in times.items():
        print(f"{name:<16} {job:<19} {statistics.median(values):6.2f}  (from {min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
