"""`ddpo-trl train` on several processes: the same command line, handed over to `accelerate launch`."""

import os
import subprocess
from collections.abc import Sequence
from importlib.resources import files

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ddpo_trl.cli.errors import UsageError, did_you_mean


# Tells a process that it is one of several, and needs not start them again.
LAUNCHED = "--launched"

PRESETS = files("ddpo_trl") / "assets" / "accelerate_configs"


def launch_flags() -> set[str]:
    """The flags of `accelerate launch`, such as `--num_processes`."""
    return {flag for action in launch_command_parser()._actions for flag in action.option_strings}


def config_path(name: str) -> str:
    """
    The file of an accelerate config.

    Args:
        name (`str`):
            A path, or one of the files in the package without its ending: `multi_gpu`, `fsdp2`, `deepspeed_zero2`.

    Raises:
        [`~ddpo_trl.cli.errors.UsageError`]: If it is neither.
    """
    if os.path.isfile(name):
        return name
    presets = {entry.name.removesuffix(".yaml"): str(entry) for entry in PRESETS.iterdir()}
    if name not in presets:
        meant = did_you_mean(name, presets) or f" Configs of the package are {', '.join(sorted(presets))}."
        raise UsageError(f"--accelerate_config is {name!r}, which is no file and no config of the package.{meant}")
    return presets[name]


def launch(command: Sequence[str], accelerate_config: str | None, options: Sequence[str]) -> int:
    """
    Runs a command of `ddpo-trl` by `accelerate launch`.

    Args:
        command (`Sequence[str]`):
            Its name and flags.
        accelerate_config (`str`, *optional*):
            See [`config_path`]; without it accelerate takes its default file, if there is one.
        options (`Sequence[str]`):
            Further flags of `accelerate launch`.

    Returns:
        `int`: Exit status of the process that failed first; 0 if none did.
    """
    config = [] if accelerate_config is None else ["--config_file", config_path(accelerate_config)]
    arguments = launch_command_parser().parse_args([*config, *options, "--module", "ddpo_trl.cli", *command, LAUNCHED])
    if arguments.training_script != "ddpo_trl.cli":  # argparse took a stray word for it
        raise UsageError(f"{arguments.training_script!r} is the value of no flag.")
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0
