"""
Wheels of the packages that a GPU machine without network lacks: `make gpu-wheels` fills a folder, `make gpu` with
`WHEELS` installs from it. Imports only the standard library.
"""

import subprocess
import sys
import tomllib
from pathlib import Path


ROOT = Path(__file__).parents[2]
PINS = Path(__file__).with_name("wheels.txt")

# What travels to the machine, the tree of 22 MB included, may have 64 MiB.
MOST_BYTES = 40 * 2**20

# Of the machine: Python 3.12 on x86-64. pip compares the number of a manylinux tag for equality.
PLATFORM = ["--python-version", "3.12", "--implementation", "cp"]
PLATFORM += [flag for glibc in (34, 31, 28, 27, 24, 17) for flag in ("--platform", f"manylinux_2_{glibc}_x86_64")]
PLATFORM += ["--platform", "manylinux2014_x86_64"]


def pins() -> list[str]:
    """Return the pinned packages, as `name==version`."""
    lines = (line.partition("#")[0].strip() for line in PINS.read_text().splitlines())
    return [line for line in lines if line]


def download(folder: Path) -> None:
    """Fill a folder with exactly the pinned wheels, and print their sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    only = ["--no-deps", "--only-binary", ":all:", *PLATFORM]
    pip("download", *only, "--dest", str(folder), *pins())
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size / 2**20:7.2f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total / 2**20:7.2f} MiB in {len(sizes)} wheels, of at most {MOST_BYTES / 2**20:.0f}")
    if total > MOST_BYTES:
        raise SystemExit("The wheels are too large to travel: leave out those that only extras need.")


def install(folder: Path, site: Path) -> None:
    """
    Install the wheels of a folder into a folder of packages, once for each set of wheels.

    It is not a virtual environment: the machine's Python lives in one itself, and an environment that is made from
    another does not see the other's packages (torch), whatever `--system-site-packages` says.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"{folder} has no wheels: `make gpu-wheels` downloads them, on a machine with a network.")
    installed = site / "installed.txt"
    names = "\n".join(path.name for path in wheels)
    if installed.is_file() and installed.read_text() == names:
        return
    only = [
        "--no-index",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--python-version",
        "3.12",
    ]  # a rehearsal may have 3.11
    pip("install", *only, "--no-compile", "--upgrade", "--target", str(site), *map(str, wheels))
    describe_project(site)
    installed.write_text(names)


def describe_project(site: Path) -> None:
    """Write the metadata of ddpo_trl, which its `__version__` reads. Its code stays in `src`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = site / f"ddpo_trl-{project['version']}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ddpo-trl\nVersion: {project['version']}\n")


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", arguments[0], "--quiet", *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"`{' '.join(command)}` failed:\n{done.stderr[-2000:]}")


if __name__ == "__main__":
    download(Path(sys.argv[1]))
