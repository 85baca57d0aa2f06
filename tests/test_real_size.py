"""A small part of `make real-size`, which needs a process of its own: the simulated GPU is loaded before torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from real_size import device


ROOT = Path(__file__).parents[1]
PART = "test_simulated_gpu or (test_one_pass and PixArt-alpha)"  # what the device promises, and a tiny pipeline on it


def test_a_round_on_a_simulated_gpu():
    if reason := device.problem():
        pytest.skip(reason)
    command = [sys.executable, str(ROOT / "tests/real_size/run.py"), "-p", "no:xdist", "-k", PART]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert str(device.problem()).startswith("g++ is not installed")
    with pytest.raises(RuntimeError, match=r"g\+\+ is not installed"):
        device.load()
