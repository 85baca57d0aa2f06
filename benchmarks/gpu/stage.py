"""
The process of a stage: `python -m gpu.stage NAME DEVICE FILE`.

The module `gpu.NAME` has three functions. `run(device, save)` measures and returns figures in JSON's types; before it
is through, it may `save` what it has so far. `line` says the main result, and `page` is a section of docs/gpu.md.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from gpu.setting import quiet


def main() -> None:
    name, device, path = sys.argv[1:]
    stage = importlib.import_module(f"gpu.{name}")

    def save(figures: dict[str, Any]) -> None:
        skipped = figures.get("skipped")
        found = {
            "line": f"skipped, {skipped}" if skipped else stage.line(figures),
            "page": f"Skipped: {skipped}.\n" if skipped else stage.page(figures),
            "figures": figures,
        }
        partial = Path(f"{path}.part")
        partial.write_text(json.dumps(found))
        partial.replace(path)

    quiet()
    save(stage.run(device, save))


if __name__ == "__main__":
    main()
