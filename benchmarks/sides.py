"""
The two sides of a comparison with TRL 0.23.1: the pipelines that both load, and a trainer for each side.

TRL's environment, with transformers 4 and without ddpo_trl, imports this file too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rounds import GUIDANCE, LEARNING_RATE, PROMPTS, ROOT, quiet_config


class Case(NamedTuple):
    """A pipeline, and the size of a round with it."""

    title: str
    batch_size: int
    batches: int
    steps: int


CASES = {
    "emoji": Case("embedded pipeline, 16x16 latents", batch_size=16, batches=2, steps=10),
    "random": Case("random Stable Diffusion of 12 M parameters, 32x32 latents", batch_size=4, batches=2, steps=5),
}


# ---- The pipelines ----


def pipeline_folder(case: str) -> Path:
    """Return the folder that `save_pipeline` writes and both sides load."""
    return ROOT / "build" / "bench" / case


def save_pipeline(case: str) -> None:
    """
    Save the pipeline of a case in files that both transformers 4 and 5 can load.

    transformers 5 saves tokenizers without the two files that transformers 4 reads, and text encoders without the
    prefix that transformers 4 expects in the names of weights: it would start from random weights.
    """
    from safetensors.torch import save_file

    from ddpo_trl import load_emoji_pipeline

    folder = pipeline_folder(case)
    pipeline = load_emoji_pipeline()
    if case == "random":
        pipeline = random_stable_diffusion(pipeline)
    pipeline.save_pretrained(folder)
    pipeline.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))  # vocab.json and merges.txt
    weights = {f"text_model.{name}": weight for name, weight in pipeline.text_encoder.state_dict().items()}
    save_file(weights, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})


def random_stable_diffusion(parts: Any) -> Any:
    """Create a narrow Stable Diffusion 1.5 with random weights and the tokenizer and text encoder of `parts`."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 96, 136, 136),
        layers_per_block=2,
        cross_attention_dim=parts.text_encoder.config.hidden_size,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),  # fmt: skip
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load(case: str) -> Any:
    """Load the pipeline that `save_pipeline` wrote."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder(case))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---- The trainers ----


def brightness(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> tuple[Tensor, dict[str, Any]]:
    """Mean pixel value, with the signature of TRL 0.23.1, which ddpo_trl accepts too."""
    return images.flatten(1).mean(1), {}


def our_trainer(case: str, sizes: Case, rounds: int, callbacks: Sequence[Any] = (), **options: Any) -> Any:
    from ddpo_trl import DDPOTrainer

    settings = {
        "use_cpu": True,
        "num_train_epochs": rounds,
        "num_inference_steps": sizes.steps,
        "learning_rate": LEARNING_RATE,
        "per_device_sample_batch_size": sizes.batch_size,
        "num_sample_batches": sizes.batches,
        "per_device_train_batch_size": sizes.batch_size,
    }
    config = quiet_config(**{**settings, **options})
    return DDPOTrainer(config, brightness, PROMPTS, load(case), callbacks=list(callbacks))


def their_trainer(case: str, sizes: Case, learning_rate: float = LEARNING_RATE, max_grad_norm: float = 1.0) -> Any:
    from accelerate import PartialState

    PartialState(cpu=True)  # required by TRL 0.23.1's pipeline
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    config = DDPOConfig(
        num_epochs=1,
        sample_num_steps=sizes.steps,
        sample_guidance_scale=GUIDANCE,
        train_learning_rate=learning_rate,
        train_max_grad_norm=max_grad_norm,
        sample_batch_size=sizes.batch_size,
        sample_num_batches_per_epoch=sizes.batches,
        train_batch_size=sizes.batch_size,
        train_gradient_accumulation_steps=sizes.batches,
        mixed_precision="no",
        allow_tf32=False,
        save_freq=10**6,
        accelerator_kwargs={"cpu": True},
    )
    numbers = iter(range(10**9))
    pipeline = DefaultDDPOStableDiffusionPipeline(str(pipeline_folder(case)), use_lora=True)
    trainer = DDPOTrainer(config, brightness, lambda: (PROMPTS[next(numbers) % len(PROMPTS)], {}), pipeline)
    trainer.sd_pipeline.set_progress_bar_config(disable=True)
    return trainer
