"""Real processes for the tests, started as users start them."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


CONFIGS = Path(__file__).parents[1] / "examples" / "accelerate_configs"


def launch(
    script: Path, arguments: Sequence[str], num_processes: int = 2, config: str = "multi_gpu"
) -> subprocess.CompletedProcess[str]:
    """
    Runs a script to its end: one process by itself, several by `accelerate launch` with a config of the examples.

    They talk by gloo on the CPU. (`accelerate launch --cpu` would ask for MPI.)
    """
    command = [sys.executable, str(script), *arguments]
    if num_processes > 1:
        options = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes", str(num_processes)]
        command[1:1] = ["-m", "accelerate.commands.launch", *options, "--main_process_port", "0"]
    cpu = {"DS_ACCELERATOR": "cpu"} if config == "deepspeed_zero2" else {"ACCELERATE_USE_CPU": "true"}
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, **cpu, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
