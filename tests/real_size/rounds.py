"""A round of the real trainer on a simulated GPU, with what the device saw."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import DiffusionPipeline

from ddpo_trl import DDPOConfig, DDPOTrainer
from ddpo_trl.policy.denoiser import denoiser_name
from ddpo_trl.policy.runner import PipelineRunner
from real_size.simulated_gpu import SimulatedGPU, Wait


PROMPTS = ["a cat", "two dogs"]  # of different lengths
OFFLOADED = {"offload_text_encoders": True, "offload_vae": True, "offload_rollout": True}
ONE_PASS = {"one_pass": True}
TWO_PASSES = {"one_pass": False}


def config(folder: Path, **settings: Any) -> DDPOConfig:
    """A round of one image, of which the first of two denoising steps is trained on."""
    given = {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "num_inference_steps": 2,
        "train_timestep_range": [0.0, 0.5],
        "per_device_sample_batch_size": 1,
        "num_sample_batches": 1,
        "per_device_train_batch_size": 1,
        "log_images_rounds": 0,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return DDPOConfig(**{**given, **settings})


def index_as_reward(images: torch.Tensor, prompts: Any, metadata: Any) -> list[float]:
    """Check the format of the images, and return rewards that differ."""
    assert images.dtype == torch.float32 and images.is_cuda
    assert images.ndim in (4, 5) and images.shape[-3] == 3 and len(images) == len(prompts)
    return [float(len(prompt)) for prompt in prompts]


def trained(
    gpu: SimulatedGPU, settings: DDPOConfig, pipeline: DiffusionPipeline, prompts: Any = PROMPTS, evaluate: bool = True
) -> DDPOTrainer:
    """Construct a trainer, train, evaluate and save it."""
    with contextlib.redirect_stdout(io.StringIO()):  # Trainer prints its logs
        with gpu.during("construction"):
            trainer = DDPOTrainer(settings, index_as_reward, prompts, pipeline, eval_prompts=prompts[:1])
        with gpu.during("training"):
            trainer.train()
        if evaluate:
            with gpu.during("evaluation"):
                trainer.evaluate()
        with gpu.during("saving"):
            trainer.save_model(f"{settings.output_dir}/model")
    return trainer


@contextlib.contextmanager
def waits_between_steps(gpu: SimulatedGPU, pipeline: DiffusionPipeline) -> Iterator[set[Wait]]:
    """Collect the waits between the first and the last call of the denoiser in each call of the pipeline."""
    found: set[Wait] = set()
    last: list[int] = []  # number of waits when the denoiser was last called; empty before its first call
    run = PipelineRunner.run

    def counted(*args: Any, **kwargs: Any) -> Any:
        last.clear()
        return run(*args, **kwargs)

    def noted(*args: Any) -> None:
        if last:
            found.update(gpu.waits[last[0] :])
        last[:] = [len(gpu.waits)]

    hook = pipeline.components[denoiser_name(pipeline)].register_forward_pre_hook(noted)
    try:
        with mock.patch.object(PipelineRunner, "run", counted):
            yield found
    finally:
        hook.remove()
