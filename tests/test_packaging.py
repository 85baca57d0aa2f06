"""The wheel and the sdist: what is in them, and that what is installed from the wheel trains."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
BUILT_FROM = ("src", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with both, the wheel from the sdist, built in a copy: setuptools leaves files where it builds."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return next(built.glob("*.whl"))


def assets() -> set[str]:
    """All files of the package that are not Python."""
    package = ROOT / "src" / "ddpo_trl"
    return {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }


def test_the_wheel_has_every_module_and_asset_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "ddpo_trl").rglob("*.py")}
    assert names == modules | assets()
    assert "ddpo_trl/py.typed" in names
    assert "ddpo_trl/assets/emoji/unet/diffusion_pytorch_model.safetensors" in names
    assert "ddpo_trl/assets/emoji_alignment/model.safetensors" in names


def test_the_wheel_carries_its_licence_and_the_credits_of_the_weights(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert {f"ddpo_trl/assets/{folder}/NOTICE" for folder in ("emoji", "emoji_alignment")} <= set(names)
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata


def test_the_sdist_has_what_the_wheel_is_built_from(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{name}" for name in assets()} <= names
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_what_is_installed_from_the_wheel_trains(wheel, tmp_path):
    """In a new environment, outside the tree: minutes of pip, then the demo."""
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv" / "bin"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        result = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        return result.stdout

    run(str(binaries / "pip"), "install", "--quiet", "torch==2.13.0")  # by exact version: the CPU build
    run(str(binaries / "pip"), "install", "--quiet", str(wheel))
    output = run(str(binaries / "ddpo-trl"), "demo", "--total_episodes", "64", "--num_sample_batches", "4")
    assert "subjects recognized" in output
    assert (tmp_path / "outputs" / "demo" / "pytorch_lora_weights.safetensors").exists()
    assert "site-packages" in run(str(binaries / "python"), "-c", "import ddpo_trl; print(ddpo_trl.__file__)")
