"""Versions, platform and device of a run, for reports and bug reports."""

import importlib.metadata
import platform
from functools import cache

import torch


PACKAGES = (
    "ddpo_trl",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "trl",
    "datasets",
    "huggingface_hub",
)


version = cache(importlib.metadata.version)  # it parses the metadata of a package at each call


def environment(device: torch.device | None = None) -> dict[str, str]:
    """
    Return `python`, the packages by their import names, `platform`, `device`, and `cuda` on an NVIDIA GPU. The device
    is by default the machine's accelerator, or else its CPU.
    """
    if device is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = accelerator or torch.device("cpu")
    found = {
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "platform": platform.platform(),
        "device": device_name(device),
    }
    if device.type == "cuda" and torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def device_name(device: torch.device) -> str:
    """Return the name of a device, such as `"NVIDIA A100-SXM4-80GB"` or `"cpu (16 threads, AVX512)"`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"
    return device.type
