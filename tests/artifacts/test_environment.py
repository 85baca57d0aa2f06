"""What a report says about the machine is true."""

import platform

import accelerate
import diffusers
import peft
import torch
import transformers
import trl

from ddpo_trl.artifacts.environment import environment


def test_the_versions_are_those_that_run():
    found = environment()
    for package in (accelerate, diffusers, peft, transformers, trl):
        assert found[package.__name__] == package.__version__
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["python"] == platform.python_version()


def test_the_device_is_the_one_that_is_asked_for():
    assert environment(torch.device("cpu"))["device"].startswith("cpu (")
    assert ("cuda" in environment()) == torch.cuda.is_available()


def test_everything_is_text():
    assert all(isinstance(value, str) and value for value in environment().values())
