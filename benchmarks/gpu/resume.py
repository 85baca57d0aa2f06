"""
Runs of the embedded pipeline that should end equal: two equal ones, and one that was resumed after its first round.

Each is compared in one pass and in two, with PyTorch's default kernels, and with deterministic ones and attention by
plain matrix products. And the images of the same seeds on the CPU and on the device, with and without TF32 in
convolutions (PyTorch's default is with).
"""

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddpo_trl import DDPOTrainer, load_emoji_pipeline
from ddpo_trl.policy.policy import Policy
from gpu.setting import is_rehearsal, short, table
from rounds import PROMPTS, quiet_config
from sides import brightness


ROUNDS = 2


def run(device: str, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # deterministic kernels need it, before CUDA is used
    figures: dict[str, Any] = {"runs": {}, "images": image_differences(device)}
    for deterministic in (False, True):
        # Not all operations have a deterministic kernel; the difference shows whether that matters.
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        for one_pass in (True, False):
            kernels = "deterministic" if deterministic else "default"
            name = f"{'one pass' if one_pass else 'two passes'}, {kernels} kernels"
            with sdpa_kernel(SDPBackend.MATH) if deterministic else contextlib.nullcontext():
                figures["runs"][name] = compared_runs(device, one_pass)
            save(figures)
    return figures


def compared_runs(device: str, one_pass: bool) -> dict[str, float]:
    whole, folder = weights_after(device, one_pass)
    again, _ = weights_after(device, one_pass)
    resumed, _ = weights_after(device, one_pass, sorted(Path(folder).glob("checkpoint-*"))[0])
    start = {name: torch.zeros_like(weight) for name, weight in whole.items() if "lora_B" in name}
    return {
        "equal runs": difference(whole, again),
        "resumed": difference(whole, resumed),
        "moved": difference(whole, start),
    }


def weights_after(device: str, one_pass: bool, checkpoint: Path | None = None) -> tuple[dict[str, Tensor], str]:
    """Train, from a checkpoint or from the start, and return the trained weights and the folder of checkpoints."""
    size = 4 if is_rehearsal(device) else 16
    config = quiet_config(
        use_cpu=device == "cpu",
        num_train_epochs=ROUNDS,
        num_inference_steps=3 if is_rehearsal(device) else 5,
        per_device_sample_batch_size=size,
        per_device_train_batch_size=size,
        num_sample_batches=1 if is_rehearsal(device) else 2,
        learning_rate=1e-3,
        save_strategy="epoch",
        one_pass=one_pass,
    )
    trainer = DDPOTrainer(config, brightness, PROMPTS, load_emoji_pipeline())
    with contextlib.redirect_stdout(io.StringIO()):  # Trainer prints its logs
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    weights = {name: p.detach().cpu() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return weights, config.output_dir


def difference(ones: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Return the largest absolute difference, of the weights that both have."""
    return max((ones[name] - other).abs().max().item() for name, other in others.items())


def image_differences(device: str) -> dict[str, Any]:
    """Compare images with the same seeds on the CPU and on the device, pixels being in [0, 1]."""
    steps = 3 if is_rehearsal(device) else 20
    found = {}
    config = quiet_config(use_cpu=device == "cpu", num_inference_steps=steps)
    expected = images("cpu", config)
    for tf32 in (True, False):
        torch.backends.cudnn.allow_tf32 = tf32
        distance = (images(device, config) - expected).abs()
        found[f"TF32 {'on' if tf32 else 'off'}"] = {
            "mean": distance.mean().item(),
            "largest": distance.max().item(),
        }
    torch.backends.cudnn.allow_tf32 = True
    return found


def images(device: str, config: Any) -> Tensor:
    policy = Policy.from_pipeline(load_emoji_pipeline().to(device), config)
    return policy.sample(policy.context(PROMPTS, [{}] * len(PROMPTS), [1, 2, 3, 4])).images.cpu()


def line(figures: dict[str, Any]) -> str:
    runs = figures["runs"]
    exact = sum(found["equal runs"] == found["resumed"] == 0 for found in runs.values())
    distances = [f"{short(found['mean'])} with {name}" for name, found in figures["images"].items()]
    return f"bitwise equal and resumed in {exact} of {len(runs)}; CPU and device differ by {', '.join(distances)}"


def page(figures: dict[str, Any]) -> str:
    names = ["equal runs", "resumed", "moved"]
    rows = [[run, *(short(found[name]) for name in names)] for run, found in figures["runs"].items()]
    images = [[name, short(found["mean"]), short(found["largest"])] for name, found in figures["images"].items()]
    return (
        f"Largest difference of the trained weights of the embedded pipeline after {ROUNDS} rounds: of two equal "
        "runs; of a run that was resumed after its first round and one that was not; and how far training moved them. "
        f"0 is bitwise.\n\n{table(['', *names], rows)}\n"
        "Images with the same seeds, on the CPU and on the device, pixels in [0, 1]:\n\n"
        f"{table(['convolutions', 'mean difference', 'largest'], images)}"
    )
