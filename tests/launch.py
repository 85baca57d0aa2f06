"""Real processes for the tests: forked, which costs no import, or started as users start them."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env


CONFIGS = Path(__file__).parents[1] / "examples" / "accelerate_configs"

# Forked from a process that has imported everything and run nothing. It finds the tests by the environment only.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["ddpo_trl.trainer", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "conftest"]
)
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])


def launch_options(num_processes: int, config: str) -> list[str]:
    return [
        "--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes", str(num_processes),
        "--main_process_port", "0",
    ]  # fmt: skip


def launch(
    script: Path, arguments: Sequence[str], num_processes: int = 2, config: str = "multi_gpu"
) -> subprocess.CompletedProcess[str]:
    """
    Runs a script to its end by `accelerate launch` with a config of the examples.

    They talk by gloo on the CPU. (`accelerate launch --cpu` would ask for MPI.)
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch_options(num_processes, config)]
    cpu = {"DS_ACCELERATOR": "cpu"} if config == "deepspeed_zero2" else {"ACCELERATE_USE_CPU": "true"}
    environment = {**os.environ, **cpu, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(script), *arguments], capture_output=True, text=True, timeout=300, env=environment
    )


def environments(num_processes: int, config: str) -> list[dict[str, str]]:
    """The environment of each rank: what `accelerate launch` adds for a config, and torch's launcher for a rank."""
    if num_processes == 1:
        return [{}]
    parsed = launch_command_parser().parse_args([*launch_options(num_processes, config), "script"])
    arguments, *_ = _validate_launch_command(parsed)
    common = {
        **prepare_multi_gpu_env(arguments),
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(arguments.main_process_port),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
    }
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]


def fork(main: Callable[..., None], *arguments: Any, num_processes: int = 2, config: str = "multi_gpu") -> None:
    """Runs a function to its end in processes with the environment of `launch`; one that fails is an error."""
    ranks = [
        PROCESSES.Process(target=be_a_rank, args=(environment, main, arguments))
        for environment in environments(num_processes, config)
    ]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(timeout=300)
    finally:
        statuses = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
    assert statuses == [0] * num_processes, f"statuses {statuses} (None: not at its end); tracebacks were printed"


def be_a_rank(environment: dict[str, str], main: Callable[..., None], arguments: Sequence[Any]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    main(*arguments)
