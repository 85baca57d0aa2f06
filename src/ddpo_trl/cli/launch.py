"""`ddpo-trl train` in several processes: the same command line, started by `accelerate launch`."""

import argparse
import os
import subprocess
from collections.abc import Sequence
from importlib.resources import files

import torch
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DistributedType, parse_flag_from_env
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ddpo_trl.cli.errors import UsageError
from ddpo_trl.suggestions import did_you_mean


# Flag of the started processes, so that they don't start others.
LAUNCHED = "--launched"

PRESETS = files("ddpo_trl") / "assets" / "accelerate_configs"


def launch_flags() -> set[str]:
    """Return the flags of `accelerate launch`, such as `--num_processes`, without the one that we set."""
    settings = vars(launch_command_parser().parse_args(["script"]))
    return {f"--{name}" for name in settings} - {"--module", "--training_script", "--training_script_args"}


def config_path(name: str) -> str:
    """Return the path of an accelerate config: a file, or a config of the package by its name."""
    if os.path.isfile(name):
        return name
    presets = {entry.name.removesuffix(".yaml"): str(entry) for entry in PRESETS.iterdir()}
    if name not in presets:
        meant = did_you_mean(name, presets) or f" Configs of the package are {', '.join(sorted(presets))}."
        raise UsageError(f"--accelerate_config is {name!r}, neither a file nor a config of the package.{meant}")
    return presets[name]


def launch(
    command: Sequence[str], accelerate_config: str | None, options: Sequence[str], use_cpu: bool = False
) -> int:
    """
    Run a command of `ddpo-trl` with `accelerate launch` and its `options`.

    Returns:
        `int`: Exit status of the process that failed first; 0 if none did.

    Raises:
        [`~ddpo_trl.cli.errors.UsageError`]: If the processes could not join.
    """
    config = [] if accelerate_config is None else ["--config_file", config_path(accelerate_config)]
    arguments = launch_command_parser().parse_args([*config, *options, "--module", "ddpo_trl.cli", *command, LAUNCHED])
    if arguments.training_script != "ddpo_trl.cli":
        raise UsageError(f"unexpected argument {arguments.training_script!r}")
    _join_processes(arguments, use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU"))
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


def _join_processes(arguments: argparse.Namespace, use_cpu: bool) -> None:
    """
    Make several processes one run. By default accelerate starts a single one if it sees no GPU, or starts all without
    joining them; on CPUs it requires MPI, although PyTorch includes gloo.
    """
    config = None if arguments.config_file is None else load_config_from_file(arguments.config_file)
    number = arguments.num_processes or (1 if config is None else config.num_processes)
    if number == 1 or arguments.mpirun_hostfile is not None:
        return
    use_cpu = use_cpu or arguments.cpu or (config is not None and config.use_cpu)
    if not (use_cpu or torch.accelerator.is_available()):
        raise UsageError(
            f"{number} processes are to train one run, but there is no GPU here. Add --use_cpu to train on the CPU, "
            "or leave out --accelerate_config and --num_processes."
        )
    if use_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # for the started processes
        arguments.cpu = False  # which requires MPI
    others = (arguments.use_fsdp, arguments.use_deepspeed, arguments.use_megatron_lm, arguments.tpu)
    single = config is None or config.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)
    if single and not any(others):
        arguments.multi_gpu = True  # starts torchrun, on CPUs as well
