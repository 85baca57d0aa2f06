"""`ddpo-trl doctor`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from ddpo_trl.checks.doctor import check_pipeline
from ddpo_trl.cli.arguments import CommandParser
from ddpo_trl.cli.errors import usage_errors
from ddpo_trl.config import DDPOConfig
from ddpo_trl.policy.loading import Dtype, load_pipeline
from ddpo_trl.settings import documented, setting


# Fields of DDPOConfig in `--help`.
SHOWN = ["num_inference_steps", "guidance_scale", "pipeline_kwargs", "pipeline_inputs", "use_cpu"]


@documented()
@dataclass
class DoctorArguments:
    """
    Arguments of `ddpo-trl doctor` in addition to the pipeline and the fields of [`DDPOConfig`].
    """

    dtype: Dtype = setting("float32", "Precision in which the pipeline is loaded.")
    image: str | None = setting(None, "Image file that is passed for each of --pipeline_inputs.")


def main(argv: Sequence[str]) -> int:
    """Check whether a pipeline can be trained."""
    parser = CommandParser(
        [DoctorArguments, DDPOConfig],
        "ddpo-trl doctor",
        "Check whether a pipeline can be trained: sample a few steps, replay each, compute a gradient. The exit "
        "status is 0 if it can and 1 if not. Every field of DDPOConfig is a flag.",
        example="PATH_OR_ID --dtype bfloat16",
        shown=SHOWN,
    )
    parser.add_argument("pipeline", metavar="PATH_OR_ID", help="The pipeline: a folder, a Hub id, or emoji.")
    parser.set_defaults(num_inference_steps=4, report_to="none")
    (arguments, config, rest), _ = parser.parse(argv)
    metadata: dict[str, Any] = {}
    with usage_errors():
        pipeline = load_pipeline(rest.pipeline, arguments.dtype)
        if arguments.image is not None:
            metadata = {name: Image.open(arguments.image).convert("RGB") for name in config.pipeline_inputs or ()}
    pipeline.to(config.device)
    report = check_pipeline(pipeline, config, metadata=[metadata, metadata])
    table = Table(title=rest.pipeline, show_header=False)
    for row in report.rows():
        table.add_row(*row)
    Console().print(table)
    return 0 if report.problem is None else 1
