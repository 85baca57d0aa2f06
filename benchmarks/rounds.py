"""What the benchmarks of a round share. TRL's environment imports it too, which has no ddpo_trl."""

import contextlib
import datetime
import io
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).parents[1]
PROMPTS = ["cat face", "pizza", "tulip", "octopus"]
GUIDANCE = 2.5


# ---- A trainer's rounds ----


def quiet_config(**settings: Any) -> Any:
    """A `DDPOConfig` whose rounds print nothing, and write nothing but their record, each process its own."""
    from ddpo_trl import DDPOConfig

    quiet: dict[str, Any] = {
        "output_dir": str(ROOT / "build" / "rounds" / str(os.getpid())),
        "guidance_scale": GUIDANCE,
        "log_images_rounds": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return DDPOConfig(**{**quiet, **settings})


def emoji_trainer(reward: Any, **settings: Any) -> Any:
    """A trainer of rounds of 8 images at once on the embedded pipeline, in two passes: phases are timed apart."""
    from diffusers.models.attention_processor import AttnProcessor

    from ddpo_trl import DDPOTrainer, load_emoji_pipeline

    sizes = {"num_train_epochs": 1, "per_device_sample_batch_size": 8, "per_device_train_batch_size": 8}
    pipeline = load_emoji_pipeline()
    pipeline.unet.set_attn_processor(AttnProcessor())  # as in the demo: faster on a CPU
    return DDPOTrainer(quiet_config(one_pass=False, **sizes, **settings), reward, PROMPTS, pipeline)


def log_of_a_round(trainer: Any) -> dict[str, float]:
    """Trains, and gives what the first round logged."""
    with contextlib.redirect_stdout(io.StringIO()):  # Trainer prints its logs
        trainer.train()
    return next(log for log in trainer.state.log_history if "reward" in log)


# ---- Processes ----


class Child:
    """
    A process that answers lines on its standard input with lines of JSON on its standard output.

    Args:
        command (`Sequence[str]`):
            What it runs.
        environment (`Mapping[str, str]`, *optional*):
            In place of ours.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None):
        # A pipe that nobody reads would stop the process once it is full.
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it stays open until `end`)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )

    def ask(self, line: str = "") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """
        Waits for the next one.

        Raises:
            `RuntimeError`: If the process has ended; with the end of what it said of that.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(self.errors.read()[-3000:])
        return json.loads(line)

    def end(self) -> None:
        self.process.communicate()
        self.errors.close()


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def machine() -> dict[str, str]:
    """For figures that are kept: the day and what they were measured on."""
    from ddpo_trl.environment import environment

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "processor": f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        **environment(),
    }
