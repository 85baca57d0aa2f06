"""The presets in examples/configs fit on their GPUs, by the plan's forecast."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig

from ddpo_trl import DDPOConfig, DDPOTrainer
from ddpo_trl.policy.denoiser import denoiser_name
from ddpo_trl.policy.lora import default_lora_config
from real_size.families import FAMILIES
from real_size.rounds import index_as_reward
from real_size.simulated_gpu import SimulatedGPU


CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
MODELS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "SD 1.5",
    "stabilityai/stable-diffusion-xl-base-1.0": "SDXL",
    "black-forest-labs/FLUX.1-dev": "FLUX.1-dev",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "Wan 2.1 1.3B",
}
# GiB of the reward models' weights in float32, as the presets state them, and of CUDA itself, an assumption.
REWARDS = {"LaionAesthetic": 1.6, "PickScore": 3.7, "ImageReward": 1.7}
CUDA = 1.0


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_preset_fits_on_its_gpu(path, tmp_path):
    settings: dict[str, Any] = yaml.safe_load(path.read_text())
    card = int(path.stem.partition("gb")[0])
    model, reward, rank, _, _, _ = (
        settings.pop(name, None) for name in ("model", "reward", "lora_r", "lora_alpha", "dtype", "prompts")
    )
    gpu = SimulatedGPU(capacity=card)
    pipeline = FAMILIES[MODELS[model]].pipeline(gpu)
    with gpu, gpu.during("construction"):
        config = DDPOConfig(**{**settings, "output_dir": str(tmp_path), "report_to": "none"})
        adapter = default_lora_config(pipeline.components[denoiser_name(pipeline)])
        adapter = LoraConfig(r=rank or adapter.r, target_modules=adapter.target_modules)
        prompts = ["a cat", "two dogs"]
        trainer = DDPOTrainer(config, index_as_reward, prompts, pipeline, peft_config=adapter)
    peaks = {name: size / 2**30 for name, size in trainer.plan.forecast_peaks.items()}
    parts = ", ".join(f"{name} {size:.1f}" for name, size in peaks.items())
    total = max(peaks.values()) + REWARDS[reward] + CUDA
    print(f"{path.stem}: {parts}, reward {REWARDS[reward]}, CUDA {CUDA}: {total:.1f} of {card} GiB")
    if stated := re.search(r"peak of a round.* ([\d.]+) GiB", path.read_text()):
        assert max(peaks.values()) == pytest.approx(float(stated[1]), abs=0.2)
    assert max(gpu.peaks.values()) / 2**30 <= 1.05 * max(peaks.values())
    assert total <= card
