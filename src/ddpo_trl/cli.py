"""The command line, `ddpo-trl`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from rich.console import Console
from rich.table import Table
from trl import TrlParser

from ddpo_trl import demo
from ddpo_trl.config import DDPOConfig
from ddpo_trl.doctor import check_pipeline
from ddpo_trl.reward_server import serve


@dataclass
class DoctorArguments:
    """
    What `ddpo-trl doctor` takes beside the pipeline and the fields of [`DDPOConfig`].

    Args:
        dtype (`str`, *optional*, defaults to `"float32"`):
            In which the pipeline is loaded, such as `"bfloat16"`.
        image (`str`, *optional*):
            An image file to hand over for each of `--pipeline_inputs`.
    """

    dtype: str = field(default="float32", metadata={"help": "In which the pipeline is loaded: bfloat16, ..."})
    image: str | None = field(
        default=None, metadata={"help": "An image file to hand over for each of --pipeline_inputs."}
    )


def doctor(argv: Sequence[str]) -> int:
    """`ddpo-trl doctor PATH_OR_ID`: whether a pipeline can be a policy. The exit status is 0 if it can, else 1."""
    parser = TrlParser([DoctorArguments, DDPOConfig], prog="ddpo-trl doctor")
    parser.add_argument("pipeline", metavar="PATH_OR_ID", help="A folder or a Hub repository with a pipeline.")
    parser.set_defaults(num_inference_steps=4, report_to="none")
    try:
        arguments, config, rest = parser.parse_args_and_config(argv)
        dtype = vars(torch).get(arguments.dtype)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype is {arguments.dtype!r}; give float32, bfloat16 or float16.")
        # Other formats may be pickles, which run what code they like.
        pipeline = DiffusionPipeline.from_pretrained(rest.pipeline, dtype=dtype, use_safetensors=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    pipeline.to(config.device)
    metadata: dict[str, Any] = {}
    if arguments.image is not None:
        metadata = {name: Image.open(arguments.image).convert("RGB") for name in config.pipeline_inputs or ()}
    report = check_pipeline(pipeline, config, metadata=[metadata, metadata])
    table = Table(title=rest.pipeline, show_header=False)
    for row in report.rows():
        table.add_row(*row)
    Console().print(table)
    return 0 if report.problem is None else 1


@dataclass
class ServeRewardArguments:
    """
    What `ddpo-trl serve-reward` takes beside the reward function; see [`~ddpo_trl.reward_server.serve`].

    Args:
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Where to listen; `"0.0.0.0"` for other machines.
        port (`int`, *optional*, defaults to `8000`):
            Port 0 is any that is free.
        token (`str`, *optional*):
            What clients have to know; better set as `DDPO_TRL_REWARD_TOKEN`, since others can see a command line.
        batch_size (`int`, *optional*, defaults to `16`):
            Images scored at once.
        max_request_mb (`float`, *optional*, defaults to `256`):
            A request of more megabytes is refused.
        device (`str`, *optional*):
            Where the function gets its images; on the GPU by default, if there is one.
    """

    host: str = field(default="127.0.0.1", metadata={"help": "Where to listen; 0.0.0.0 for other machines."})
    port: int = field(default=8000, metadata={"help": "0 is any that is free."})
    token: str | None = field(
        default=None, metadata={"help": "What clients have to know; better set as DDPO_TRL_REWARD_TOKEN."}
    )
    batch_size: int = field(default=16, metadata={"help": "Images scored at once."})
    max_request_mb: float = field(default=256.0, metadata={"help": "A request of more megabytes is refused."})
    device: str | None = field(default=None, metadata={"help": "Where the function gets its images: cuda:1, ..."})


def serve_reward(argv: Sequence[str]) -> int:
    """`ddpo-trl serve-reward module:function`: a reward function as an HTTP service, until it is told to stop."""
    parser = TrlParser([ServeRewardArguments], prog="ddpo-trl serve-reward")
    parser.add_argument("reward", metavar="module:function", help="The reward function, or a class of them.")
    arguments, rest = parser.parse_args_and_config(argv)
    try:
        serve(rest.reward, **vars(arguments))
    except (ImportError, TypeError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return 0


def run_demo(argv: Sequence[str]) -> int:
    """`ddpo-trl demo`."""
    demo.main(argv)
    return 0


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "demo": (run_demo, "train the embedded pipeline in a few minutes, on CPU"),
    "doctor": (doctor, "tell whether a pipeline can be a policy"),
    "serve-reward": (serve_reward, "serve a reward function to RemoteReward"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments, those of the process by default.

    Returns:
        `int`: Exit status.
    """
    parser = argparse.ArgumentParser(prog="ddpo-trl", description="Fine-tune diffusion models with DDPO.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, description) in COMMANDS.items():
        commands.add_parser(name, add_help=False, help=description)
    namespace, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    run, _ = COMMANDS[namespace.command]
    return run(rest)


if __name__ == "__main__":
    raise SystemExit(main())
