"""The shape of the package: imports point downwards, nothing is probed for, nothing is called utils."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ddpo_trl


ROOT = Path(ddpo_trl.__file__).parent

# From the ground up. Modules of one layer do not import each other.
LAYERS = [
    {
        "adapter_checks", "descriptions", "emoji", "finite", "importing", "processes", "suggestions", "trl_config",
        "workers",
    },
    {
        "advantages", "boundary", "callbacks", "checkpoints", "config", "encoding", "environment", "gaussian", "lora",
        "optimizers", "plots", "rewards", "sample_gradients", "seeding", "target_kl", "types",
    },
    {"conditions", "objectives", "plan", "prompts", "record", "resuming", "schedulers", "scoring"},
    {"calls", "pipelines", "report", "reward_server"},
    {"policy"},
    {"one_pass"},
    {"evaluation", "guard", "hub", "loader", "model_card"},
    {"tracking"},
    {"doctor", "trainer"},
    {"__init__", "demo", "trl_0_23"},
    {"cli"},
]  # fmt: skip
DEPTH = {module: depth for depth, modules in enumerate(LAYERS) for module in modules}


def module_name(path: Path) -> str:
    """The module or subpackage that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


TREES = {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
MODULES = {module_name(path) for path in TREES}


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = "ddpo_trl." * (node.level > 0) + (node.module or "")
            names = [f"{prefix}.{alias.name}".replace("..", ".") for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "ddpo_trl":
                module = rest.partition(".")[0]
                yield module if module in MODULES else "__init__"


def test_every_module_has_a_layer():
    assert DEPTH.keys() == MODULES
    assert len(DEPTH) == sum(len(modules) for modules in LAYERS)


def test_imports_point_downwards():
    imports = [(path, target) for path, tree in TREES.items() for target in imported_modules(tree)]
    upwards = [
        f"{path.relative_to(ROOT)} must not import {target}"
        for path, target in imports
        if target != module_name(path) and DEPTH[target] >= DEPTH[module_name(path)]
    ]
    assert len(imports) > 100 and upwards == []


def test_the_walk_sees_every_form_of_import():
    expected = {
        "from ddpo_trl.rollout.plan import BatchPlan": ["plan"],
        "from ddpo_trl import advantages, DDPOConfig": ["advantages", "__init__"],
        "import ddpo_trl.policy.policy as p, torch": ["policy"],
        "import ddpo_trl": ["__init__"],
        "from .loader import RolloutLoader": ["loader"],
        "from . import types": ["types"],
        "def late():\n    from ddpo_trl.trainer import DDPOTrainer": ["trainer"],
        "import types, torch.nn\nfrom transformers import Trainer": [],
    }
    assert {statement: list(imported_modules(ast.parse(statement))) for statement in expected} == expected


def test_attributes_are_declared_and_never_probed_for():
    probes = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.id}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id in {"hasattr", "getattr", "setattr", "delattr"}
    ]
    assert probes == []


def test_only_the_policy_runs_a_pipeline():
    expressions = [
        (module_name(path), node)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call | ast.Attribute)
    ]
    running = {
        module
        for module, node in expressions
        if isinstance(node, ast.Call)
        and (
            ast.unparse(node.func).split(".")[-1] in ("pipeline", "pipe", "__call__")
            or ast.unparse(node.func).startswith("call_with_grad(")
        )
    }
    assert running == {"policy"}
    naming = {module for module, node in expressions if isinstance(node, ast.Attribute) and node.attr == "__call__"}
    assert naming == {"pipelines"}  # which reads its signature and takes off its `torch.no_grad()`


def test_modules_are_named_after_what_they_hold():
    empty_words = {"utils", "util", "helpers", "misc", "common"}
    parts = {path: path.relative_to(ROOT).with_suffix("").parts for path in TREES}
    assert [str(path) for path, names in parts.items() if empty_words & set(names)] == []


def test_the_public_names_are_few_and_exist():
    assert {"DDPOConfig", "DDPOTrainer"} <= set(ddpo_trl.__all__)
    assert [getattr(ddpo_trl, name).__name__ for name in ddpo_trl.__all__] == ddpo_trl.__all__
    assert set(ddpo_trl.__all__) <= set(dir(ddpo_trl))
    with pytest.raises(AttributeError, match="DDPOTrainr"):
        getattr(ddpo_trl, "DDPOTrainr")  # noqa: B009 (mypy knows that there is none)
    assert len(ddpo_trl.__all__) <= 12
