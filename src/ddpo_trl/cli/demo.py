"""`ddpo-trl demo`."""

import argparse
from collections.abc import Sequence

from ddpo_trl.cli.arguments import CommandParser
from ddpo_trl.config import DDPOConfig
from ddpo_trl.demo import DEFAULTS, SCORE_FUNCTION_RATE, TASKS, DemoArguments, print_summary, run_demo


HELP = {
    "the demo": ["reward", "stop_at_gain", "lora_rank", "shuffle_rewards"],
    "length of the run": ["total_episodes", "num_train_epochs"],
    "sampler": ["num_inference_steps", "guidance_scale", "num_sample_batches", "num_images_per_prompt"],
    "objective": ["loss_type", "cliprange", "kl_coef", "advantage_normalization", "train_timestep_range"],
    "optimization": ["learning_rate", "num_mini_batches", "per_device_train_batch_size", "use_cpu", "seed"],
    "logging and saving": ["output_dir", "report_to", "save_strategy", "disable_tqdm"],
}


def parse_arguments(argv: Sequence[str]) -> tuple[DemoArguments, DDPOConfig]:
    """Reads the command line of `ddpo-trl demo`: its own arguments and any field of [`DDPOConfig`]."""
    parser = CommandParser(
        [DemoArguments, DDPOConfig],
        "ddpo-trl demo",
        "Train the embedded pipeline in a few minutes, on CPU, and compare before and after. Every field of "
        "DDPOConfig is a flag.",
        shown=HELP,
        example="--reward jpeg_incompressibility --total_episodes 512",
    )
    choices = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    choices.add_argument("--loss_type", "--loss-type")
    choices.add_argument("--reward")
    chosen = choices.parse_known_args(argv)[0]
    defaults = dict(DEFAULTS)
    if chosen.reward in TASKS:  # what is not, the parser refuses
        defaults |= TASKS[chosen.reward].defaults
    if chosen.loss_type == "sf":  # one optimizer step a round instead of four has to be larger
        defaults |= {"num_mini_batches": 1, "learning_rate": SCORE_FUNCTION_RATE * defaults["learning_rate"]}
    parser.set_defaults(**defaults)
    arguments, config = parser.parse(argv)
    return arguments, config


def main(argv: Sequence[str]) -> int:
    """Trains, compares, and prints the figures."""
    arguments, config = parse_arguments(argv)
    print_summary(run_demo(arguments, config), TASKS[arguments.reward].unit, config.output_dir)
    return 0
