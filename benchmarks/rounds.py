"""Shared parts of the benchmarks. Environments of other trainers, without ddpo_trl, import this file too."""

import contextlib
import datetime
import functools
import io
import json
import os
import platform
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).parents[1]
PROMPTS = ["cat face", "pizza", "tulip", "octopus"]
GUIDANCE, LEARNING_RATE = 2.5, 1e-4


# ---- Rounds of a trainer ----


@functools.cache
def runs_folder() -> tempfile.TemporaryDirectory[str]:
    """Create the folder for the output of all runs of this process, removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="ddpo-trl-rounds-")


def quiet_config(**settings: Any) -> Any:
    """Create a `DDPOConfig` whose rounds print nothing and write only their record, to a separate folder."""
    from ddpo_trl import DDPOConfig

    quiet: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(dir=runs_folder().name),
        "guidance_scale": GUIDANCE,
        "num_mini_batches": 1,
        "log_images_rounds": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return DDPOConfig(**{**quiet, **settings})


def emoji_trainer(reward: Any, **settings: Any) -> Any:
    """Create a trainer of the embedded pipeline with batches of 8 and two passes, so that each phase is timed."""
    from diffusers.models.attention_processor import AttnProcessor

    from ddpo_trl import DDPOTrainer, load_emoji_pipeline

    sizes = {"num_train_epochs": 1, "per_device_sample_batch_size": 8, "per_device_train_batch_size": 8}
    pipeline = load_emoji_pipeline()
    pipeline.unet.set_attn_processor(AttnProcessor())  # as in the demo: faster on a CPU
    return DDPOTrainer(quiet_config(one_pass=False, **sizes, **settings), reward, PROMPTS, pipeline)


def log_of_a_round(trainer: Any) -> dict[str, float]:
    """Train, and return the log of the first round."""
    with contextlib.redirect_stdout(io.StringIO()):  # Trainer prints its logs
        trainer.train()
    return next(log for log in trainer.state.log_history if "reward" in log)


def seconds_of(job: Callable[[], object]) -> float:
    """Run a function, and return the seconds it took."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


# ---- Processes ----


class Child:
    """
    Process that answers each line on its standard input with a line of JSON on its standard output.

    Args:
        command (`Sequence[str]`):
            Command line of the process.
        environment (`Mapping[str, str]`, *optional*):
            Environment variables, by default those of this process.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None):
        self.command = command
        # A pipe that is not read would block the process once it is full.
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it stays open until `end`)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )

    def ask(self, line: str = "") -> None:
        """Send a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """
        Wait for the next answer.

        Raises:
            `RuntimeError`: If the process has ended, with the end of its standard error.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"`{shlex.join(self.command)}` ended:\n{self.errors.read()[-3000:]}")
        return json.loads(line)

    def end(self) -> None:
        """Close the standard input of the process, and wait until it ends."""
        self.process.communicate()
        self.errors.close()


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def machine() -> dict[str, str]:
    """Collect date, hardware and versions, for the JSON file."""
    from ddpo_trl.artifacts.environment import environment

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "processor": f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        **environment(),
    }
