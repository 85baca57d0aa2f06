"""All tiny pipelines of the conformance tests, through the real trainer on a simulated GPU."""

from typing import Any

import pytest

from conformance.checks import CASES, PROMPTS, metadata
from conformance.image_pipelines import Case
from ddpo_trl import DDPOTrainer
from ddpo_trl.checks import construction
from ddpo_trl.policy.embeddings import text_encoders
from ddpo_trl.rollout.forecast import MemoryForecast
from real_size.rounds import ONE_PASS, TWO_PASSES, config, trained, waits_between_steps
from real_size.simulated_gpu import SimulatedGPU
from real_size.test_families import devices, networks_on, tensors
from real_size.waits import unexplained


# The denoiser reads the lengths of prompts from their mask, which has no values in a forecast.
WITHOUT_FORECAST = {"Lumina 2"}


def run(case: Case, tmp_path: Any, evaluate: bool, **settings: Any) -> tuple[DDPOTrainer, SimulatedGPU]:
    gpu = SimulatedGPU()
    pipeline = case.build(0)
    own = {
        "guidance_scale": case.guidance_scale,
        "pipeline_kwargs": case.pipeline_kwargs,
        "pipeline_inputs": list(case.inputs),
        "num_inference_steps": 3 if case.inputs else 2,  # with a strength below 1, fewer are run
        "train_timestep_range": [0.0, 1.0],
        "per_device_sample_batch_size": 2,
        "per_device_train_batch_size": 2,
    }
    prompts = list(zip(PROMPTS, metadata(case), strict=True))
    with gpu, waits_between_steps(gpu, pipeline) as waits:
        trainer = trained(gpu, config(tmp_path, **own, **settings), pipeline, prompts, evaluate=evaluate)
    assert unexplained(waits) == []
    assert devices(tensors(trainer.model)) == {"cuda"}
    return trainer, gpu


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_pass_with_offloaded_networks(case, tmp_path):
    components = case.build(0).components
    encoders = "encode_prompt" in dir(case.build(0))
    vae = "vae" in components and not case.inputs
    settings = {**ONE_PASS, "offload_text_encoders": encoders, "offload_vae": vae}
    trainer, _ = run(case, tmp_path, evaluate=True, **settings)
    assert trainer.plan.one_pass
    assert isinstance(trainer.plan.forecast, MemoryForecast) or case.name in WITHOUT_FORECAST, trainer.plan.forecast
    waiting = {*(text_encoders(trainer.pipeline) if encoders else ()), *(["vae"] * vae)}
    assert networks_on(trainer.pipeline, "cpu") == waiting


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_passes_with_an_offloaded_rollout(case, tmp_path, monkeypatch):
    monkeypatch.setattr(construction, "forecast_or_reason", lambda *args: "made in one pass")
    trainer, _ = run(case, tmp_path, evaluate=False, **TWO_PASSES, kl_coef=0.1, offload_rollout=True)
    assert not trainer.plan.one_pass
    assert networks_on(trainer.pipeline, "cpu") == set()
    steps = [step for batch in trainer.rollout.batches for step in batch.steps.values()]
    assert devices(tensor for step in steps for tensor in vars(step).values()) == {"cpu"}
