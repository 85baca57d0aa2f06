"""The machine: device, driver, versions, PyTorch's settings, and two ceilings that the other figures compare with."""

import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from ddpo_trl.artifacts.environment import environment
from gpu.setting import is_rehearsal, synchronize, table


def run(device: str, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"PyTorch {torch.__version__} finds no CUDA device. DEVICE=cpu make gpu is the rehearsal.")
    size = 256 if is_rehearsal(device) else 8192
    return {
        "versions": environment(torch.device(device)),
        "cores": os.cpu_count(),
        **(of_the_gpu() if device == "cuda" else {}),
        "settings": {
            "matmul.allow_tf32": torch.backends.cuda.matmul.allow_tf32,
            "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
            "cudnn.benchmark": torch.backends.cudnn.benchmark,
        },
        "matrix product, bf16, TFLOP/s": matrix_product(device, size),
        "copy, GB/s read and written": copy_bandwidth(device, size * size),
    }


def of_the_gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return {
        "nvidia-smi": subprocess.run(query, capture_output=True, text=True).stdout.strip(),
        "memory, GiB": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "cudnn": torch.backends.cudnn.version(),
    }


def matrix_product(device: str, size: int) -> float:
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return round(2 * size**3 / seconds_of(device, lambda: left @ right) / 1e12, 3)


def copy_bandwidth(device: str, numbers: int) -> float:
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    return round(2 * source.nbytes / seconds_of(device, lambda: target.copy_(source)) / 1e9, 1)


def seconds_of(device: str, job: Callable[[], object], repeats: int = 10) -> float:
    for _ in range(3):
        job()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        job()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def line(figures: dict[str, Any]) -> str:
    versions = figures["versions"]
    shown = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "diffusers", "transformers", "peft"))
    return f"{versions['device']}, {figures['cores']} cores, {shown}"


def page(figures: dict[str, Any]) -> str:
    own = {name: value for name, value in figures.items() if not isinstance(value, dict)}
    return table(["", ""], {**figures["versions"], **own, **figures["settings"]}.items())
