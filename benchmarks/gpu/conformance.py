"""
The tiny pipelines of tests/conformance on the device: replay against sampling, and one pass against two.

All pipelines in float32, bfloat16 and float16 with the attention kernel that PyTorch chooses, and some of them with
each kernel alone. Several processes work on the device. Nothing is asserted: the tolerances that hold are the result.
"""

import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from conformance import checks
from gpu.setting import is_rehearsal, nan_last, short, table
from gpu.workers import Worker, WorkerEnded


CASES = {case.name: case for case in checks.CASES}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KERNELS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}
CHOSEN = "chosen by PyTorch"

# Pipelines that run with each attention kernel: a UNet, and transformers with and without a mask.
WITH_EACH_KERNEL = ["Stable Diffusion 1.x", "PixArt-Sigma", "FLUX.1", "Stable Diffusion 3", "Wan 2.1"]
REHEARSED = ["Stable Diffusion 1.x", "FLUX.1"]

Job = dict[str, str]
Row = dict[str, Any]


def jobs(device: str, names: list[str]) -> list[Job]:
    """Return what to run, the most important first: a stage that runs out of time has done that."""
    plain = [{"dtype": dtype, "kernel": CHOSEN, "pipeline": name} for dtype, name in itertools.product(DTYPES, names)]
    each = [
        {"dtype": dtype, "kernel": kernel, "pipeline": name}
        for dtype, kernel, name in itertools.product(DTYPES, KERNELS, WITH_EACH_KERNEL)
        if name in names
    ]
    if is_rehearsal(device):
        return plain + each[::5]
    return plain[: len(names)] + each + plain[len(names) :]


def run(device: str, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    names = REHEARSED if is_rehearsal(device) else list(CASES)
    planned = jobs(device, names)
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in planned:
        waiting.put(job)
    rows: list[Row] = []
    figures = {"planned": len(planned), "rows": rows}
    workers = 2 if is_rehearsal(device) else max(2, (os.cpu_count() or 2) * 3 // 4)
    threads = [threading.Thread(target=work, args=(device, waiting, rows), daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for thread in threads:
            thread.join(timeout=0.5)
        save({**figures, "rows": list(rows)})
    if not any("replay" in row for row in rows):
        raise RuntimeError(f"No combination could be run. The first error is {rows[0]['error']}")
    return figures


def work(device: str, waiting: "queue.SimpleQueue[Job]", rows: list[Row]) -> None:
    """Have a process of its own do jobs until there are none; if it ends, another one goes on after that job."""
    worker = None
    while not waiting.empty():
        try:
            job = waiting.get_nowait()
        except queue.Empty:
            break
        worker = worker or Worker(answer_jobs, device)
        try:
            worker.ask(job)
            rows.append(job | worker.answer())
        except WorkerEnded as error:
            rows.append(job | {"error": str(error)})
            worker = None
    if worker:
        worker.end()


# ---- The process that does jobs ----


def answer_jobs(questions: Iterator[Job], answer: Callable[[Row], None], device: str) -> None:
    torch.set_num_threads(1)
    for job in questions:
        found = deviations(job, device)
        answer(found)
        if "CUDA error" in found.get("error", ""):
            raise SystemExit("After an error of CUDA, this process can't use the device.")


def deviations(job: Job, device: str) -> Row:
    """Measure a combination, or say why it could not be run."""
    found: Row = {}
    try:
        with kernel(job["kernel"]):
            case = CASES[job["pipeline"]]
            policy = checks.make_policy(case, device, DTYPES[job["dtype"]])
            batch = policy.sample(checks.context(policy, case), record=range(checks.STEPS))
            found["replay"] = max(checks.replay_deviations(policy, batch).values(), key=nan_last)
            found["alone"] = max(checks.replay_deviations(policy, batch, row=1).values(), key=nan_last)
            found |= checks.one_pass_deviation(policy, batch, *checks.in_one_pass(policy, batch))._asdict()
    except Exception as error:  # whatever it is, it is a result
        found["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    return found


def kernel(name: str) -> AbstractContextManager[None]:
    """Return the context in which `scaled_dot_product_attention` has only one kernel."""
    return nullcontext() if name == CHOSEN else sdpa_kernel(KERNELS[name])


# ---- Results ----


def groups(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Return the rows by dtype and kernel, in the order of the tables."""
    found = {(dtype, kernel): [] for kernel, dtype in itertools.product([CHOSEN, *KERNELS], DTYPES)}  # type: ignore[var-annotated]
    for row in rows:
        found[row["dtype"], row["kernel"]].append(row)
    return {key: group for key, group in found.items() if group}


def worst(rows: list[Row], name: str) -> str:
    """Return the largest value and the pipeline it belongs to."""
    values = [(row[name], row["pipeline"]) for row in rows if name in row]
    if not values:
        return "-"
    value, pipeline = max(values, key=lambda each: nan_last(each[0]))
    return f"{short(value)} ({pipeline})" if value else "0"


def line(figures: dict[str, Any]) -> str:
    rows = figures["rows"]
    parts = []
    for (dtype, kernel), group in groups(rows).items():
        if kernel == CHOSEN:
            exact = sum(row.get("replay") == 0 for row in group)
            parts.append(f"{dtype} {exact}/{len(group)} replayed bitwise, worst {worst(group, 'replay')}")
    errors = sum("error" in row for row in rows)
    return f"{'; '.join(parts)}; {errors} errors; {len(rows)} of {figures['planned']} run"


def page(figures: dict[str, Any]) -> str:
    rows = figures["rows"]
    heading = [
        "dtype",
        "attention kernel",
        "pipelines",
        "replayed bitwise",
        "worst \\|ratio - 1\\|",
        "the same, a sample of two replayed alone",
        "worst difference of one pass's gradient, relative to the largest",
        "same images in one pass",
        "not run",
    ]
    cells = [
        [
            dtype,
            kernel,
            len(group),
            sum(row.get("replay") == 0 for row in group),
            worst(group, "replay"),
            worst(group, "alone"),
            worst(group, "gradients"),
            sum(row.get("images") == 0 for row in group),
            sum("error" in row for row in group),
        ]
        for (dtype, kernel), group in groups(rows).items()
    ]
    errors = sorted({(row["dtype"], row["kernel"], row["pipeline"], row["error"]) for row in rows if "error" in row})
    listed = "".join(f"- {', '.join(where)}: {' '.join(error.split())}\n" for *where, error in errors)
    inexact = [row for row in rows if row["kernel"] == CHOSEN and row.get("replay", 0) != 0]
    others = ", ".join(f"{row['pipeline']} ({row['dtype']}, {short(row['replay'])})" for row in inexact)
    return (
        "The tiny pipelines of the [conformance suite](conformance.md). Each step is replayed right after sampling; "
        "the ratio of a step that is replayed bitwise is exactly 1. "
        f"{len(rows)} of {figures['planned']} combinations were run.\n\n{table(heading, cells)}\n"
        f"Not replayed bitwise with the kernel that PyTorch chooses: {others or 'none'}.\n\n{listed}"
    )
