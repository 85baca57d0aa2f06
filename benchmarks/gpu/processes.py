"""
Two processes on one GPU. NCCL refuses that, so they talk by gloo, each as the only process of its node.

First each operation of gloo is tried with tensors on the device, then a run of two processes is compared with that of
one, which has twice as many batches.
"""

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ddpo_trl import DDPOTrainer, load_emoji_pipeline
from gpu.setting import is_rehearsal, short, table
from gpu.workers import Worker, WorkerEnded
from rounds import PROMPTS, quiet_config
from sides import brightness


COUNT = 2
OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "all_reduce": dist.all_reduce,
    "broadcast": lambda tensor: dist.broadcast(tensor, 0),
    "all_gather": lambda tensor: dist.all_gather([torch.empty_like(tensor) for _ in range(COUNT)], tensor),
    "all_gather_into_tensor": lambda tensor: dist.all_gather_into_tensor(tensor.repeat(COUNT), tensor),
}


def run(device: str, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    figures: dict[str, Any] = {"operations": in_all(device, try_operations)[0]}
    save(figures)
    for one_pass in (True, False):
        passes = "one pass" if one_pass else "two passes"
        try:
            figures[passes] = compared(device, one_pass)
        except WorkerEnded as error:
            figures[passes] = {"error": str(error)}
        save(figures)
    return figures


def compared(device: str, one_pass: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        first, second = in_all(device, train, one_pass, folder)
        (alone,) = in_all(device, train, one_pass, folder, count=1)
    return {"between the two": difference(first, second), "from one process": difference(first, alone)}


def difference(ones: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> float:
    return max(np.abs(ones[name] - other).max().item() for name, other in others.items())


def in_all(device: str, job: Callable[..., Any], *arguments: Any, count: int = COUNT) -> list[Any]:
    """Run a function in all processes of a group, and return what each returns."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [Worker(take_part, device, rank, count, port, job, *arguments) for rank in range(count)]
    try:
        return [worker.answer() for worker in workers]
    finally:
        for worker in workers:
            worker.end()


def take_part(
    questions: Iterator[Any],
    answer: Callable[[Any], None],
    device: str,
    rank: int,
    count: int,
    port: int,
    job: Callable[..., Any],
    *arguments: Any,
) -> None:
    if count > 1:
        # As of two nodes with a process each, so that both take the first GPU.
        own = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in own.items()}, MASTER_ADDR="127.0.0.1")
        os.environ["ACCELERATE_USE_CPU"] = "true" if device == "cpu" else "false"
    torch.set_num_threads(1)
    answer(job(device, count, *arguments))


def try_operations(device: str, count: int) -> dict[str, str]:
    """Return `"runs"` or the error of each operation of gloo."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=8))
    found = {}
    for name, operation in OPERATIONS.items():
        try:
            operation(torch.ones(4, device=device))
            found[name] = "runs"
        except (RuntimeError, NotImplementedError, ValueError) as error:
            found[name] = str(error).splitlines()[0][:200]
    return found


def train(device: str, count: int, one_pass: bool, folder: str) -> dict[str, np.ndarray]:
    """Train two rounds, and return the weights."""
    size = 2 if is_rehearsal(device) else 8
    config = quiet_config(
        output_dir=folder,
        use_cpu=device == "cpu",
        ddp_backend="gloo" if count > 1 else None,
        num_train_epochs=2,
        num_inference_steps=3 if is_rehearsal(device) else 5,
        per_device_sample_batch_size=size,
        per_device_train_batch_size=size,
        num_sample_batches=2 // count,
        learning_rate=1e-3,
        one_pass=one_pass,
    )
    if config.world_size != count:
        raise RuntimeError(f"{config.world_size} processes take part, not {count}")
    trainer = DDPOTrainer(config, brightness, PROMPTS, load_emoji_pipeline())
    trainer.train()
    policy = trainer.accelerator.unwrap_model(trainer.model)
    # Not as tensors, which a process would share with another one: this one ends.
    return {name: p.detach().cpu().numpy() for name, p in policy.named_parameters() if p.requires_grad}


# ---- Results ----


def line(figures: dict[str, Any]) -> str:
    operations = figures["operations"]
    running = [name for name, result in operations.items() if result == "runs"]
    parts = [f"gloo has {len(running)} of {len(operations)} operations for this device"]
    for passes in ("one pass", "two passes"):
        if found := figures.get(passes):
            parts.append(f"{passes} {found.get('error') or differences(found)}")
    return "; ".join(parts)


def differences(found: dict[str, float]) -> str:
    return ", ".join(f"{short(value)} {name}" for name, value in found.items())


def page(figures: dict[str, Any]) -> str:
    operations = table(["gloo, tensors on the device", ""], figures["operations"].items())
    runs = [
        [passes, figures[passes].get("error") or differences(figures[passes])]
        for passes in ("one pass", "two passes")
        if passes in figures
    ]
    return (
        f"{operations}\nLargest difference of the trained weights after two rounds of the embedded pipeline, between "
        f"the two processes, and from one process with the same samples:\n\n{table(['', 'difference'], runs)}"
    )
