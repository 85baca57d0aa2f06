"""Compiles `device.cpp` and loads it: afterwards a CPU build of PyTorch has one CUDA device. Import before torch."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


SOURCE = Path(__file__).with_name("device.cpp")
BUILD = Path(__file__).parents[2] / "build" / "real_size"


def problem() -> str | None:
    """Return why the device can't be built here, `None` if it can."""
    if shutil.which("g++") is None:
        return "g++ is not installed: the simulated GPU needs it to compile tests/real_size/device.cpp"
    if (torch_folder() / "lib" / "libtorch_cuda.so").exists():
        return "PyTorch is a CUDA build: the simulated GPU takes the place of CUDA in a CPU build"
    return None


def torch_folder() -> Path:
    """Return the folder of torch without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def built() -> Path:
    """Return the compiled library, compiled again for another version of torch or of the source."""
    found = re.search(r"__version__ = '(.+)'", (torch_folder() / "version.py").read_text())
    assert found is not None
    library = BUILD / f"device-{found[1]}.so"
    if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
        BUILD.mkdir(parents=True, exist_ok=True)
        own = library.with_suffix(f".{os.getpid()}")
        include, libraries = f"-I{torch_folder() / 'include'}", f"-L{torch_folder() / 'lib'}"
        options = ["-std=c++20", "-O1", "-shared", "-fPIC", include, libraries]
        subprocess.run(["g++", *options, str(SOURCE), "-o", str(own), "-lc10"], check=True)
        own.replace(library)  # other processes may be loading it
    return library


def load() -> None:
    """Load the device. What is called first wins, so that torch must not be imported yet."""
    if reason := problem():
        raise RuntimeError(reason)
    assert "torch" not in sys.modules, "the simulated device has to be loaded before torch"
    for library in (torch_folder() / "lib" / "libc10.so", built()):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
