"""
Peak memory of one round, beside TRL 0.23.1's DDPOTrainer on the same work: `python benchmarks/memory_vs_trl.py`.

Both train a LoRA adapter of rank 4 on the embedded pipeline: the same number of images, denoising steps and samples a
micro-batch, guidance in sampling and training, float32 on the CPU. Each run has a process of its own, whose memory
before training (libraries and weights) is subtracted. TRL 0.23.1, the last with this trainer, has the environment that
`make bench` makes for it.
"""

import argparse
import contextlib
import io
import resource
import statistics
import subprocess
from typing import Any

import torch

from bench import PROMPTS, brightness, fetch_trl, pipeline_folder, python_of, resident_bytes


STEPS, GUIDANCE, LEARNING_RATE = 10, 2.5, 1e-3


def train_ours(batch_size: int, batches: int, **options: Any) -> int:
    """Resident bytes before training."""
    from ddpo_trl import DDPOConfig, DDPOTrainer, load_emoji_pipeline

    config = DDPOConfig(
        output_dir="build/memory",
        use_cpu=True,
        num_train_epochs=1,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        learning_rate=LEARNING_RATE,
        per_device_sample_batch_size=batch_size,
        num_sample_batches=batches,
        per_device_train_batch_size=batch_size,
        one_pass=False,  # which `make bench` measures too
        log_images_rounds=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    trainer = DDPOTrainer(config, brightness, PROMPTS, load_emoji_pipeline())
    before = resident_bytes()
    trainer.train()
    return before


def train_theirs(batch_size: int, batches: int) -> int:
    """Resident bytes before training."""
    from accelerate import PartialState

    PartialState(cpu=True)  # TRL 0.23.1's pipeline can't be made without
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    config = DDPOConfig(
        num_epochs=1,
        sample_num_steps=STEPS,
        sample_guidance_scale=GUIDANCE,
        train_learning_rate=LEARNING_RATE,
        sample_batch_size=batch_size,
        sample_num_batches_per_epoch=batches,
        train_batch_size=batch_size,
        train_gradient_accumulation_steps=batches,
        mixed_precision="no",
        allow_tf32=False,
        save_freq=10**6,
        accelerator_kwargs={"cpu": True},
    )
    prompts = iter(PROMPTS * batch_size * batches)
    pipeline = DefaultDDPOStableDiffusionPipeline(str(pipeline_folder("emoji")), use_lora=True)
    trainer = DDPOTrainer(config, brightness, lambda: (next(prompts), {}), pipeline)
    before = resident_bytes()
    trainer.train()
    return before


RUNS = {
    "TRL 0.23.1": train_theirs,
    "ddpo_trl": train_ours,
    "ddpo_trl, gradient checkpointing": lambda *sizes: train_ours(*sizes, gradient_checkpointing=True),
}


def growth_of(run: str, batch_size: int, batches: int) -> float:
    """Peak resident MiB of a run in a process of its own, less those before training."""
    command = [python_of(run), __file__, "--run", run, "--batch_size", str(batch_size), "--batches", str(batches)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(child.stderr[-3000:])
    return float(child.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", choices=list(RUNS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):
            before = RUNS[arguments.run](arguments.batch_size, arguments.batches)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20)
        return
    fetch_trl()
    pipeline_folder("emoji")  # made here, and only once
    growth: dict[str, list[float]] = {run: [] for run in RUNS}
    for _ in range(arguments.repeats):
        for run, values in growth.items():
            values.append(growth_of(run, arguments.batch_size, arguments.batches))
    base = statistics.median(growth["TRL 0.23.1"])
    print(f"{arguments.batches} batches of {arguments.batch_size} images, {STEPS} steps; peak above the start")
    for run, values in growth.items():
        median = statistics.median(values)
        print(f"{run:<34} {median:7.0f} MiB  {median / base:5.2f}  (from {min(values):.0f} to {max(values):.0f})")


if __name__ == "__main__":
    main()
