"""Runs of `ddpo-trl demo` as separate processes, for the benchmarks that measure learning."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rounds import ROOT


def is_finished(folder: Path) -> bool:
    """Return `True` if a run is complete: `summary.json` is the last file that it writes."""
    return (folder / "summary.json").is_file()


def command(folder: Path, flags: Sequence[str]) -> list[str]:
    """Command line of the demo with these flags and this output directory."""
    return [sys.executable, "-m", "ddpo_trl.cli", "demo", *flags, "--output_dir", os.path.relpath(folder, ROOT)]


def make(folder: Path, flags: Sequence[str]) -> None:
    """
    Run the demo with one thread: two runs in parallel finish sooner than two in sequence with two threads each.

    Raises:
        `RuntimeError`: If the run fails, with its name and the end of its output.
    """
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TRANSFORMERS_VERBOSITY": "error"}
    log = folder.with_name(f"{folder.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        done = subprocess.run(
            command(folder, flags), cwd=ROOT, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT
        )
    if done.returncode:
        raise RuntimeError(f"{folder.name} failed, see {log}:\n{log.read_text()[-2000:]}")


def make_all(runs: Mapping[Path, Sequence[str]]) -> None:
    """
    Run the demos that are not finished, one per core at a time. After a failure, no further run is started.

    Args:
        runs (`Mapping[Path, Sequence[str]]`):
            Flags of each run, by its folder.
    """
    missing = {folder: flags for folder, flags in runs.items() if not is_finished(folder)}
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress, ThreadPoolExecutor(os.cpu_count()) as executor:
        bar = progress.add_task("runs", total=len(runs), completed=len(runs) - len(missing))
        futures = {executor.submit(make, folder, flags): folder for folder, flags in missing.items()}
        for future in as_completed(futures):
            if future.exception() is not None:
                executor.shutdown(wait=False, cancel_futures=True)
            future.result()
            progress.console.print(f"{futures[future].name} is finished")
            progress.advance(bar)
