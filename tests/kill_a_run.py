"""
A run that is killed and started again, for tests/artifacts/test_resume.py and `make torture`.

It trains a tiny pipeline in a process of its own, resuming from the last checkpoint, which kills itself (SIGKILL) when
something happens for the n-th time. At the end it writes what a run that was never interrupted must equal.
"""

import os
import random
import signal
import sys
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import TrainerCallback

from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOConfig, DDPOTrainer
from ddpo_trl.artifacts import checkpoints as checkpoint_files
from launch import PROCESSES


RESULT = "result.pt"

# Logged values about one call of `train` or about time, which a resumed run can't share.
OF_THE_CALL = ("time/", "eps", "runtime", "per_second", "flos", "train_loss")

# Number of mini-batches per round, which decides between one pass (the default) and two.
PASSES = {"one pass": 1, "two passes": 2}

# Where a run can be killed: a function of the package, as module and attribute path, when it is called.
EVENTS: dict[str, tuple[str, str]] = {
    "sampling": ("ddpo_trl.policy.policy", "Policy.sample"),
    "sampling with gradients": ("ddpo_trl.policy.policy", "Policy.sample_with_gradients"),
    "weighting gradients": ("ddpo_trl.trainer", "DDPOTrainer._weight_gradients"),
    "scoring": ("ddpo_trl.rewards.scoring", "score"),
    "training": ("ddpo_trl.trainer", "DDPOTrainer.compute_loss"),
    "saving weights": ("ddpo_trl.policy.policy", "Policy.save"),
    "saving the rest": ("ddpo_trl.artifacts.saving", "SavingTrainer._save_round"),
    "publishing": ("ddpo_trl.artifacts.checkpoints", "publish"),
    "synchronising": ("ddpo_trl.artifacts.checkpoints", "synchronize"),
    "rotating": ("ddpo_trl.artifacts.saving", "rotate_checkpoints"),
}


class Prompts:
    """A prompt function with a state of its own beside the three global random generators."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> tuple[str, dict[str, Any]]:
        self.count += 1
        draws = random.random() + np.random.random() + torch.rand(()).item()
        return f"{'abc'[int(draws * 1000) % 3]}{self.count % 4}", {}

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def make_trainer(directory: Path, rounds: int, **overrides: Any) -> DDPOTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "num_train_epochs": rounds,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "per_device_sample_batch_size": 4,
        "num_sample_batches": 2,
        "per_device_train_batch_size": 4,
        "num_mini_batches": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "advantage_normalization": "prompt",
        "per_prompt_stat_tracking_min_count": 2,
        "save_total_limit": 2,
        "log_images_rounds": 0,
    }
    config = DDPOConfig(**{**settings, **overrides})
    return DDPOTrainer(config, brightness, Prompts(), tiny_pipeline(), eval_prompts=["cat", "dog"])


def result(trainer: DDPOTrainer) -> dict[str, Any]:
    """All that a resumed run must share with one that was never interrupted."""
    return {
        "weights": {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad},
        "optimizer": trainer.optimizer.state_dict()["state"],
        "learning rate": trainer.lr_scheduler.get_last_lr(),
        "random states": [random.getstate()[1], torch.get_rng_state(), str(np.random.get_state())],
        "prompt function": trainer.prompts.state_dict(),
        "prompt statistics": trainer.advantages.normalize.state_dict(),  # type: ignore[attr-defined]
        "logs": [
            {name: value for name, value in log.items() if not any(part in name for part in OF_THE_CALL)}
            for log in trainer.state.log_history
        ],
        "images": trainer.generate_samples().images,
    }


def equal(one: Any, other: Any) -> bool:
    """Equal to the bit, tensors too."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def kill_at(event: str, count: int) -> None:
    """Replaces a function by one that kills the process when it is called for the `count`-th time."""
    module_name, path = EVENTS[event]
    holder: Any = sys.modules[module_name]
    *parents, name = path.split(".")
    for parent in parents:
        holder = vars(holder)[parent]
    function = vars(holder)[name]
    calls = iter(range(1, 10**6))

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    type.__setattr__(holder, name, deadly) if isinstance(holder, type) else vars(holder).update({name: deadly})


def was_killed(directory: Path, rounds: int, kill: tuple[str, int] | None, passes: str) -> bool:
    """Starts or resumes the run in another process, which may kill itself; otherwise it has finished."""
    child = PROCESSES.Process(target=run, args=(directory, rounds, kill, passes))
    child.start()
    child.join(timeout=300)
    if child.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"The run ended with status {child.exitcode}; its traceback was printed.")
    return child.exitcode != 0


def run_until_done(directory: Path, rounds: int, kills: list[tuple[str, int]], passes: str = "two passes") -> int:
    """Starts the run again after each kill. Returns how often it was really killed."""
    survived = 0
    for kill in [*kills, None]:
        if not was_killed(directory, rounds, kill, passes):
            break
        survived += 1
    return survived


class WaitInside(TrainerCallback):
    """Stops in the midst of the first round until a signal has been sent."""

    def __init__(self, directory: Path):
        self.directory = directory

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == args.num_mini_batches - 1:
            (self.directory / "inside").touch()
            while not (self.directory / "sent").exists():
                time.sleep(0.01)


def wait_for_a_signal(directory: Path, rounds: int, mini_batches: int) -> None:
    """What a process does that gets one: it ends by itself, with status 0."""
    torch.set_num_threads(1)
    trainer = make_trainer(directory, rounds, num_mini_batches=mini_batches)
    trainer.add_callback(WaitInside(directory))
    trainer.train()


def run(directory: Path, rounds: int, kill: tuple[str, int] | None, passes: str) -> None:
    """What the other process does."""
    tqdm.set_lock(threading.RLock())  # its own one is a semaphore, which a killed process would leave behind
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        trainer = make_trainer(directory, rounds, num_mini_batches=PASSES[passes])
        assert trainer.plan.one_pass == (passes == "one pass")
        if kill is not None:
            kill_at(*kill)
        trainer.train(resume_from_checkpoint=True)
        assert checkpoint_files.last_checkpoint(str(directory)) is not None
        torch.save(result(trainer), directory / RESULT)
