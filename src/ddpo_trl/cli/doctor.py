"""`ddpo-trl doctor`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from ddpo_trl.checks.doctor import check_pipeline
from ddpo_trl.cli.arguments import CommandParser
from ddpo_trl.cli.errors import usage_errors
from ddpo_trl.cli.sources import load_model
from ddpo_trl.config import DDPOConfig


HELP = {
    "how the pipeline is tried": [
        "dtype", "image", "pipeline_inputs", "pipeline_kwargs", "num_inference_steps", "guidance_scale",
        "train_timestep_range", "eta", "noise_level", "sde_type", "per_device_sample_batch_size", "use_lora",
        "use_cpu",
    ],
}  # fmt: skip


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


def main(argv: Sequence[str]) -> int:
    """Checks whether a pipeline can be a policy. The exit status is 0 if it can, else 1."""
    parser = CommandParser(
        [DoctorArguments, DDPOConfig],
        "ddpo-trl doctor",
        "Tell whether a pipeline can be a policy: sample a few steps, replay each, take one gradient. The exit status "
        "is 0 if it can and 1 if not.",
        shown=HELP,
        example="PATH_OR_ID --dtype bfloat16",
    )
    parser.add_argument("pipeline", metavar="PATH_OR_ID", help="The pipeline: a folder, a Hub id, or emoji.")
    parser.set_defaults(num_inference_steps=4, report_to="none")
    arguments, config, rest = parser.parse(argv)
    metadata: dict[str, Any] = {}
    with usage_errors():
        pipeline = load_model(rest.pipeline, arguments.dtype)
        if arguments.image is not None:
            metadata = {name: Image.open(arguments.image).convert("RGB") for name in config.pipeline_inputs or ()}
    pipeline.to(config.device)
    report = check_pipeline(pipeline, config, metadata=[metadata, metadata])
    table = Table(title=rest.pipeline, show_header=False)
    for row in report.rows():
        table.add_row(*row)
    Console().print(table)
    return 0 if report.problem is None else 1
