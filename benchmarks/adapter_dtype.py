"""
Learning with the adapter's products in float32 and in the denoiser's dtype: `python benchmarks/adapter_dtype.py`.

The embedded pipeline in bfloat16 learns JPEG compressibility, as in the demo but smaller (bfloat16 is slow on a CPU):
without guidance, 6 rounds of 32 images in groups of 4, four updates per round, the first 2 of 4 steps, three
seeds for each value of `adapter_compute_dtype`. The result is the gain of the evaluation reward (kB) on 32 images of
fixed prompts and seeds, with the lowest and the highest seed, and the change of the share of images that show their
subject. Runs are kept in outputs/adapter_dtype, so the command is resumable.

Products in the denoiser's dtype become the default if their mean gain is at least the mean gain with float32 products
less half of the spread of its three seeds; this rule was written before the first run. No run has been finished yet.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor

from ddpo_trl import DDPOConfig, DDPOTrainer, load_emoji_pipeline
from ddpo_trl.demo import PROMPTS, demo_lora_config, mean_and_stderr, recognized
from ddpo_trl.rewards import jpeg_compressibility
from rounds import ROOT


FOLDER = ROOT / "outputs/adapter_dtype"
DTYPES = ("float32", "denoiser")
SEEDS = (0, 1, 2)
SETTINGS: dict[str, Any] = {
    "use_cpu": True, "num_train_epochs": 6, "num_inference_steps": 4, "guidance_scale": 1.0,
    "train_timestep_range": [0.0, 0.5], "per_device_sample_batch_size": 16, "num_sample_batches": 2,
    "num_images_per_prompt": 4, "per_device_train_batch_size": 8, "num_mini_batches": 4,
    "advantage_normalization": "group", "learning_rate": 1e-3, "cliprange": 5e-3, "save_strategy": "no",
    "report_to": "none", "disable_tqdm": True, "log_images_rounds": 0,
}  # fmt: skip


def result(dtype: str, seed: int) -> Path:
    """File of the figures of a run."""
    return FOLDER / f"{dtype}_seed_{seed}.json"


def train(dtype: Any, seed: int) -> None:
    """Make a run, and write its figures."""
    pipeline = load_emoji_pipeline().to(torch.bfloat16)
    pipeline.unet.set_attn_processor(AttnProcessor())
    config = DDPOConfig(output_dir=str(FOLDER / f"{dtype}_{seed}"), seed=seed, adapter_compute_dtype=dtype, **SETTINGS)
    trainer = DDPOTrainer(
        config, jpeg_compressibility, PROMPTS, pipeline, peft_config=demo_lora_config(16), eval_prompts=PROMPTS * 2
    )
    before = trainer.generate_samples()
    trainer.train()
    after = trainer.generate_samples()
    gain, stderr = mean_and_stderr((after.rewards - before.rewards)[:, 0])
    shares = [recognized(samples, PROMPTS).mean().item() for samples in (before, after)]
    logs = [log for log in trainer.state.log_history if "reward" in log]
    figures = {
        "gain": gain,
        "stderr": stderr,
        "recognized": shares[1] - shares[0],
        "rewards": [log["reward"] for log in logs],
        "deviations": [log["val/ratio_deviation"] for log in logs],
    }
    result(dtype, seed).write_text(json.dumps(figures, indent=2) + "\n")


def start(run: tuple[str, int]) -> None:
    """Make a run in a process with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    dtype, seed = run
    command = [sys.executable, __file__, "--dtype", dtype, "--seed", str(seed)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def main() -> None:
    """Make the runs that are missing, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, help="make one run only, with this dtype")
    parser.add_argument("--seed", type=int, default=0, help="and with this seed")
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if arguments.dtype is not None:
        train(arguments.dtype, arguments.seed)
        return
    runs = [(dtype, seed) for seed in SEEDS for dtype in DTYPES if not result(dtype, seed).is_file()]
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        list(executor.map(start, runs))
    for dtype in DTYPES:
        found = [json.loads(result(dtype, seed).read_text()) for seed in SEEDS]
        gains = [each["gain"] for each in found]
        print(
            f"{dtype:<10} gain {sum(gains) / 3:+.3f} kB ({', '.join(f'{gain:+.3f}' for gain in gains)}), recognized "
            f"{sum(each['recognized'] for each in found) / 3:+.0%}, first replay's ratio differs from 1 by at most "
            f"{max(deviation for each in found for deviation in each['deviations']):.1g}"
        )


if __name__ == "__main__":
    main()
