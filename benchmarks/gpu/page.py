"""docs/gpu.md and benchmarks/gpu-DATE.json, from the results of `make gpu`. Imports only the standard library."""

import json
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "gpu.md"

TITLES = {
    "machine": "Machine",
    "conformance": "Replay and one pass",
    "resume": "Resumed and repeated runs",
    "speed": "Speed and memory",
    "forecast": "Peak memory against its forecast",
    "waits": "Waits of the host, and rewards in their own stream",
    "learning": "Learning",
    "processes": "Two processes on one GPU",
    "compiled": "torch.compile",
}

HEADING = """\
# On a GPU

Written by `make gpu`.
"""

NOTHING = """
**Nothing has been measured on a GPU yet.** All figures of these documents that are called *measured* were measured on
a CPU; figures about GPUs are forecasts.
"""

HOW_TO = """
## How to run it

`make gpu` takes at most 8 minutes on one H100 or H200, in stages with a line each. A stage that is done is not
repeated, a stage that fails leaves the others alone, and the exit status is 0 if all are done. It writes this page and
`benchmarks/gpu-DATE.json`.

```bash
make gpu                      # in an environment with a CUDA build of PyTorch
DEVICE=cpu make gpu           # a rehearsal in small sizes, without a GPU; it writes only to outputs/gpu
make gpu FLAGS="--stages conformance waits --again"
```

On a machine without a network: `make gpu-wheels` downloads what such a machine lacks in addition to PyTorch,
transformers and accelerate (9 MiB) to `build/gpu-wheels`, and `make gpu WHEELS=build/gpu-wheels`, or without make
`python3 benchmarks/gpu/run.py --wheels build/gpu-wheels`, runs from there. After each stage, results and logs are also
copied to the folder `$OUT`, if it is set. `outputs/gpu` holds what is done so far: copied to another machine, the same
command goes on there. `python benchmarks/gpu/run.py --publish cuda.json` writes this page from the results of another
machine.
"""


def text(results: dict[str, Any] | None) -> str:
    """Return the page, from results, or from nothing."""
    if results is None:
        return f"{HEADING}{NOTHING}{HOW_TO}"
    sections = [
        f"## {title}\n\n{section(results['stages'].get(name))}".rstrip() + "\n" for name, title in TITLES.items()
    ]
    head = (
        f"\nEverything on this page was measured on {results['date']}. Figures: `benchmarks/{file_name(results)}`.\n"
    )
    return "\n".join([f"{HEADING}{head}", *sections]) + HOW_TO


def section(stage: dict[str, Any] | None) -> str:
    """Return the part of a stage."""
    if stage is None:
        return "Not run."
    if stage["status"] in ("done", "skipped"):
        return str(stage["page"])
    return f"This stage is not complete: {stage['status']}.\n\n{stage['page']}\n\n```text\n{stage['error']}\n```"


def file_name(results: dict[str, Any]) -> str:
    return f"gpu-{results['date']}.json"


def published() -> dict[str, Any] | None:
    """Return the newest published results."""
    paths = sorted((ROOT / "benchmarks").glob("gpu-*.json"))
    return json.loads(paths[-1].read_text()) if paths else None


def publish(results: dict[str, Any]) -> None:
    """
    Write both files.

    Raises:
        `ValueError`: If the results are those of a rehearsal.
    """
    if results["device"] == "cpu":
        raise ValueError("These are results of a rehearsal on a CPU, which are not published.")
    (ROOT / "benchmarks" / file_name(results)).write_text(json.dumps(results, indent=1) + "\n")
    DOCUMENT.write_text(text(results))


if __name__ == "__main__":
    DOCUMENT.write_text(text(published()))
