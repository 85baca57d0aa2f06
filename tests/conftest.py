"""Tiny random pipelines, so that tests need no download and take milliseconds."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest


# torch and what builds on it take 8 seconds to import. Functions import it, as pytest-xdist's controller, which waits
# for this file before it starts the processes that run tests, calls none of them.
if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    from ddpo_trl import DDPOConfig

# Before torch is imported: two test machines' cores are few, and idle OpenMP threads must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a prompt of five letters is no work for a thread pool
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# The set of library versions, a file in tests/versions, that `make test-versions` runs; the newest ones otherwise.
VERSIONS = os.environ.get("TESTED_VERSIONS", "newest")


def needs_newest(reason: str) -> pytest.MarkDecorator:
    """Skip a test with another set of versions than the newest, in which it would test something else."""
    return pytest.mark.skipif(VERSIONS != "newest", reason=f"{reason} (versions: {VERSIONS})")


# Tests on a simulated GPU need processes of their own: `make real-size` runs them.
collect_ignore = [] if "SIMULATED_GPU" in os.environ else ["real_size"]
if "SIMULATED_GPU" in os.environ:
    from real_size import device

    device.load()  # before torch


def pytest_collection_finish() -> None:
    """The Trainer collects garbage at the end of each run, half of a tiny run's time; what was imported is not any."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def load_lora_weights_takes_folders() -> None:
    """Offline, which tests are, diffusers before 0.40 asks for the name of the file in a folder too."""
    if VERSIONS == "oldest":
        from diffusers.loaders import lora_base

        vars(lora_base)["HF_HUB_OFFLINE"] = False


def tiny_tokenizer() -> CLIPTokenizer:
    """One token per letter, in CLIP's format."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=12)


def tiny_pipeline(seed: int = 0, **scheduler_config: Any) -> StableDiffusionPipeline:
    """A random Stable Diffusion of 35 k parameters: 8x8x4 latents, 16x16 images."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        mid_block_add_attention=False,
    )
    scheduler = DDIMScheduler(
        **{
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            **scheduler_config,
        }
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline() -> StableDiffusionPipeline:
    return tiny_pipeline()


# A test marked so runs once in one pass and once in two. One whose settings don't allow one pass is an error then.
in_both_passes = pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "two passes"])


@pytest.fixture
def one_pass() -> bool | None:
    """What `make_config` sets `one_pass` to: the default of users. Modules about replay override it by `False`."""
    return None


@pytest.fixture
def make_config(tmp_path, one_pass) -> Callable[..., DDPOConfig]:
    """A config whose run takes a second: 4 steps, 8 samples a round, one round."""
    from ddpo_trl import DDPOConfig

    def make(**overrides: Any) -> DDPOConfig:
        return DDPOConfig(
            **{
                "output_dir": str(tmp_path / "run"),
                "use_cpu": True,
                "disable_tqdm": True,
                "report_to": "none",
                "save_strategy": "no",
                "log_images_rounds": 0,
                "num_train_epochs": 1,
                "num_inference_steps": 4,
                "guidance_scale": 3.0,
                "per_device_sample_batch_size": 4,
                "num_sample_batches": 2,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-2,
                "num_mini_batches": 1,
                "one_pass": one_pass,
                **overrides,
            }
        )

    return make


def brightness(images: torch.Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> torch.Tensor:
    """Mean pixel value of each image, in [0, 1]."""
    return images.flatten(1).mean(1)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, by playwright. Not for the whole session: its event loop would be in the way of other tests."""
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("needs Chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()
