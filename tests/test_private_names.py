"""Private names of other libraries that the package uses. If a release removes one, a test fails with its name."""

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from importlib.metadata import requires, version
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.state import GradientState
from diffusers import DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.hooks import HookRegistry
from diffusers.loaders import PeftAdapterMixin, StableDiffusionLoraLoaderMixin
from transformers import Trainer

import ddpo_trl
from conftest import needs_newest
from test_layers import TREES


def hooked_layer() -> torch.nn.Module:
    layer = torch.nn.Linear(1, 1)
    HookRegistry.check_if_exists_or_initialize(layer)
    return layer


# Owner of each name, and its use. An instance is the owner of attributes that `__init__` sets.
PRIVATE_NAMES: dict[str, tuple[Any, str]] = {
    # Steps of the Trainer that the package replaces: content and time of checkpoints, and pushes.
    **dict.fromkeys(
        [
            "_determine_best_metric", "_evaluate", "_finish_current_push", "_get_output_dir", "_load_best_model",
            "_load_callback_state", "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_rng_state",
            "_maybe_log_save_evaluate", "_prepare_for_training", "_push_from_checkpoint", "_save_checkpoint",
            "_save_optimizer_and_scheduler",
        ],
        (Trainer, "a step of the Trainer without a callback"),
    ),
    "_set_sync_gradients": (GradientState, "skips an optimizer step, momenta included"),
    "_execution_device": (DiffusionPipeline, "walks through all modules, several times per replayed step"),
    "_lora_loadable_modules": (StableDiffusionLoraLoaderMixin, "which networks `save_lora_weights` saves"),
    "_hf_peft_config_loaded": (PeftAdapterMixin, "must be reset after adapters were removed"),
    "_no_split_modules": (ModelMixin, "the blocks by which FSDP shards"),
    "_compiled_call_impl": (torch.nn.Module, "whether a module was compiled in place"),
    "_hf_hook": (add_hook_to_module(torch.nn.Linear(1, 1), ModelHook()), "offloading by accelerate is refused"),
    "_diffusers_hook": (hooked_layer(), "layerwise casting forbids adapters to cast their inputs"),
}  # fmt: skip

# The only module that has TorchDispatchMode, which is public by torch's documentation.
PRIVATE_MODULES = {"_python_dispatch"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and not name.endswith("_")  # `_x_` is an enum's


def own_names() -> Iterator[str]:
    """Names that the package defines: functions, classes, fields, and attributes set on `self`."""
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield node.name
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                yield node.target.id
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                yield node.attr


def foreign_attributes() -> set[str]:
    """Private attributes that the package reads or sets, and does not define."""
    attributes = {node.attr for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in attributes if is_private(name)} - {*own_names()}


def overridden_methods() -> set[str]:
    """Private methods of other libraries' classes that a class of the package replaces."""
    names = [name for _, name, _ in pkgutil.walk_packages(ddpo_trl.__path__, "ddpo_trl.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    classes = {kind for module in modules for kind in vars(module).values() if inspect.isclass(kind)}
    return {
        name
        for kind in classes
        if kind.__module__.startswith("ddpo_trl.")
        for name, value in vars(kind).items()
        if is_private(name) and inspect.isfunction(value)
        for base in kind.__mro__
        if not base.__module__.startswith("ddpo_trl.") and name in vars(base)
    }


@needs_newest("the upper bound is above the newest version")
def test_libraries_whose_private_names_are_used_have_an_upper_bound_at_the_next_minor():
    bounded = {module_of(owner).partition(".")[0] for owner, _ in PRIVATE_NAMES.values()} | {"accelerate"}  # its hooks
    for library in bounded - {"torch"}:
        (requirement,) = [line for line in requires("ddpo_trl") or () if re.match(rf"{library}\b", line)]
        major, minor, *_ = version(library).split(".")
        assert f"<{major}.{int(minor) + 1}" in requirement


def module_of(owner: Any) -> str:
    return owner.__module__ if inspect.isclass(owner) else type(owner).__module__


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_the_libraries_have_the_private_name(name):
    owner, _ = PRIVATE_NAMES[name]
    assert name in dir(owner)


def test_no_other_private_name_is_used():
    assert foreign_attributes() | overridden_methods() <= PRIVATE_NAMES.keys()


def test_every_listed_name_is_used():
    used = {
        name
        for tree in TREES.values()
        for node in ast.walk(tree)
        for name in (vars(node).get("attr"), vars(node).get("name"), vars(node).get("value"))
        if isinstance(name, str)
    }
    assert PRIVATE_NAMES.keys() <= used


def test_a_scheduler_names_the_settings_it_was_not_given():
    """`_use_default_values`, of which a policy scheduler must not take its parent's."""
    assert "clip_sample" in DDIMScheduler.from_config({"eta": 1.0}).config["_use_default_values"]


def test_no_other_private_module_or_name_is_imported():
    imports = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names}
    names |= {part for node in imports for part in (node.module or "").split(".")}
    assert len(names) > 100 and {name for name in names if is_private(name)} == PRIVATE_MODULES
