"""`ddpo-trl demo`."""

import argparse
from collections.abc import Sequence

from ddpo_trl.cli.arguments import CommandParser
from ddpo_trl.config import DDPOConfig
from ddpo_trl.demo import DEFAULTS, SCORE_FUNCTION_RATE, TASKS, DemoArguments, print_summary, run_demo


# Fields of DDPOConfig in `--help`.
SHOWN = ["output_dir", "total_episodes", "num_inference_steps", "loss_type", "learning_rate", "use_cpu", "seed"]


def parse_arguments(argv: Sequence[str]) -> tuple[DemoArguments, DDPOConfig]:
    """Parse the command line of `ddpo-trl demo`: its own arguments and the fields of [`DDPOConfig`]."""
    parser = CommandParser(
        [DemoArguments, DDPOConfig],
        "ddpo-trl demo",
        "Train the embedded pipeline in a few minutes, on CPU, and compare before and after. Every field of "
        "DDPOConfig is a flag.",
        example="--reward jpeg_incompressibility --total_episodes 512",
        shown=SHOWN,
    )
    choices = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    choices.add_argument("--loss_type", "--loss-type")
    choices.add_argument("--reward")
    chosen = choices.parse_known_args(argv)[0]
    defaults = dict(DEFAULTS)
    if chosen.reward in TASKS:  # other values are refused by the parser
        defaults |= TASKS[chosen.reward].defaults
    if chosen.loss_type == "sf":  # one optimizer step per round instead of four has to be larger
        defaults["learning_rate"] *= SCORE_FUNCTION_RATE
    parser.set_defaults(**defaults)
    (arguments, config), _ = parser.parse(argv)
    return arguments, config


def main(argv: Sequence[str]) -> int:
    """Train, compare and print the figures."""
    arguments, config = parse_arguments(argv)
    print_summary(run_demo(arguments, config), TASKS[arguments.reward].unit, config.output_dir)
    return 0
