"""
Virtual environments of other trainers, from lock files: `python benchmarks/environments.py` installs all of them.

`benchmarks/NAME.txt` pins every package of `build/NAME`. An environment is installed once, and again when its lock
file changes.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from rounds import ROOT


TRL = "trl-0.23.1"
LOCK_FILES = ROOT / "benchmarks"
ENVIRONMENTS = ROOT / "build"


def python_of(name: str) -> str:
    """Path of the interpreter of an environment."""
    return str(ENVIRONMENTS / name / "bin" / "python")


def install(name: str) -> None:
    """
    Install an environment from its lock file, unless it is up to date.

    Args:
        name (`str`):
            Stem of the lock file.

    Raises:
        `RuntimeError`: If pip fails, with the end of its output.
    """
    lock_file, folder = LOCK_FILES / f"{name}.txt", ENVIRONMENTS / name
    installed = folder / "installed.txt"  # copy of the lock file, written last
    if installed.is_file() and installed.read_bytes() == lock_file.read_bytes():
        return
    print(f"Installing {lock_file.relative_to(ROOT)} into {folder.relative_to(ROOT)}, some minutes", flush=True)
    run([sys.executable, "-m", "venv", "--clear", str(folder)])
    run([python_of(name), "-m", "pip", "install", "--quiet", "--requirement", str(lock_file)])
    shutil.copyfile(lock_file, installed)


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{done.stderr[-3000:]}")


def locked(lock_file: Path) -> dict[str, str]:
    """Versions in a lock file, by package."""
    lines = [line for line in lock_file.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


if __name__ == "__main__":
    for path in sorted(LOCK_FILES.glob("*.txt")):
        install(path.stem)
