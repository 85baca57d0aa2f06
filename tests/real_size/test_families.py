"""Every family at its published size, through the real trainer on a simulated GPU."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpo_trl import DDPOTrainer
from ddpo_trl.policy.embeddings import text_encoders
from real_size.families import FAMILIES, Family
from real_size.rounds import OFFLOADED, ONE_PASS, TWO_PASSES, config, trained, waits_between_steps
from real_size.simulated_gpu import SimulatedGPU
from real_size.waits import unexplained


# Both cover all kinds of offloading, with and without activation checkpointing.
IN_ONE_PASS = {**ONE_PASS, **OFFLOADED}
IN_TWO_PASSES = {**TWO_PASSES, "gradient_checkpointing": True, "kl_coef": 0.1}


def run(family: Family, tmp_path: Any, evaluate: bool, **settings: Any) -> tuple[DDPOTrainer, SimulatedGPU]:
    """Run a round of a family, and check what holds for all settings."""
    gpu = SimulatedGPU()
    pipeline = family.pipeline(gpu)
    own = {"guidance_scale": family.guidance_scale, "pipeline_kwargs": family.pipeline_kwargs}
    with gpu, waits_between_steps(gpu, pipeline) as waits:
        trainer = trained(gpu, config(tmp_path, **own, **settings), pipeline, evaluate=evaluate)
    assert unexplained(waits) == []
    check_forecast(trainer, gpu)
    assert sizes(trainer)["weights"] == pytest.approx(family.weights, abs=0.1)
    assert {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad} == {torch.float32}
    assert trainer.model.denoiser.dtype == torch.bfloat16
    assert devices(tensors(trainer.model)) == {"cuda"}
    assert devices(batch.images for batch in trainer.rollout.batches) == {"cpu"}
    return trainer, gpu


def check_forecast(trainer: DDPOTrainer, gpu: SimulatedGPU) -> None:
    """The peak is the plan's forecast, within 5 % above and 30 % below."""
    forecast, peak = max(trainer.plan.forecast_peaks.values()), max(gpu.peaks.values())
    parts = {name: round(size / 2**30, 2) for name, size in trainer.plan.forecast_peaks.items()}
    print(f"forecast {forecast / 2**30:.2f} GiB {parts}, simulated {peak / 2**30:.2f} GiB")
    assert 0.7 * forecast <= peak <= 1.05 * forecast


def sizes(trainer: DDPOTrainer) -> dict[str, float]:
    """Millions of the denoiser's frozen weights."""
    frozen = [parameter.numel() for parameter in trainer.model.parameters() if not parameter.requires_grad]
    return {"weights": sum(frozen) / 1e6}


def tensors(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def devices(values: Any) -> set[str]:
    return {tensor.device.type for tensor in values}


def networks_on(pipeline: Any, device: str) -> set[str]:
    """Names of the networks that are on a device."""
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {name for name, part in networks.items() if device in devices(tensors(part))}


@pytest.mark.parametrize("name", FAMILIES)
def test_one_pass_with_everything_offloaded(name, tmp_path):
    trainer, gpu = run(FAMILIES[name], tmp_path, evaluate=True, **IN_ONE_PASS)
    assert trainer.plan.one_pass
    pipeline = trainer.pipeline
    assert networks_on(pipeline, "cpu") == {"vae", *text_encoders(pipeline)}
    assert networks_on(pipeline, "cuda") == {trainer.model.denoiser_name}
    # What stays at the end: the denoiser, the adapter with its gradient and AdamW's two moments, and small change.
    weights = sum(tensor.nbytes for tensor in tensors(trainer.model))
    adapter = sum(tensor.nbytes for tensor in trainer.model.parameters() if tensor.requires_grad)
    del pipeline
    gc.collect()
    assert weights + 2 * adapter <= gpu.current <= 1.02 * (weights + 3 * adapter) + 50 * 2**20


@pytest.mark.parametrize("name", FAMILIES)
def test_two_passes_with_activation_checkpointing(name, tmp_path):
    trainer, _ = run(FAMILIES[name], tmp_path, evaluate=False, **IN_TWO_PASSES)
    assert not trainer.plan.one_pass
    assert networks_on(trainer.pipeline, "cpu") == set()
    steps = [step for batch in trainer.rollout.batches for step in batch.steps.values()]
    assert devices(tensor for step in steps for tensor in vars(step).values()) == {"cuda"}
    assert {step.log_probs.dtype for step in steps} == {torch.float32}
