"""The shape of the package: imports point downwards, nothing is probed for, nothing is called utils."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest

import ddpo_trl


ROOT = Path(ddpo_trl.__file__).parent

# From the ground up. Rooms of one layer do not import each other.
LAYERS = [
    {"versions"},
    {"descriptions", "distributed", "emoji", "finite", "seeding", "settings", "suggestions", "transfers"},
    {"config_checks"},
    {"config"},
    {"policy"},
    {"prompts", "rewards"},
    {"rollout"},
    {"update"},
    {"checks", "evaluation"},
    {"artifacts"},
    {"trainer"},
    {"__init__", "demo", "trl_0_23"},
    {"cli"},
]
DEPTH = {room: depth for depth, rooms in enumerate(LAYERS) for room in rooms}


def module_name(path: Path) -> str:
    """Dotted name of a file below the package; of a folder's `__init__.py`, the folder's."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    """The file or folder at the top level that a module belongs to."""
    return module.partition(".")[0]


TREES = {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
MODULES = {module_name(path) for path in TREES}


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "ddpo_trl":
                owner = rest.rpartition(".")[0]
                yield rest if rest in MODULES else owner if owner in MODULES else "__init__"


IMPORTS = {module_name(path): {*imported_modules(tree)} - {module_name(path)} for path, tree in TREES.items()}


def test_every_file_and_folder_has_a_layer():
    assert DEPTH.keys() == {room(module) for module in MODULES}
    assert len(DEPTH) == sum(len(rooms) for rooms in LAYERS)


def test_imports_point_downwards():
    arrows = [(module, target) for module, targets in IMPORTS.items() for target in targets]
    upwards = [
        f"{module} must not import {target}"
        for module, target in arrows
        if room(module) != room(target) and DEPTH[room(target)] >= DEPTH[room(module)]
    ]
    assert len(arrows) > 200 and upwards == []


def test_no_files_import_each_other_in_a_circle():
    TopologicalSorter(IMPORTS).prepare()  # raises a CycleError that names the circle


def test_the_walk_sees_every_form_of_import():
    expected = {
        "from ddpo_trl.rollout.plan import BatchPlan": ["rollout.plan"],
        "from ddpo_trl.rollout import advantages, plan": ["rollout.advantages", "rollout.plan"],
        "from ddpo_trl import demo, DDPOConfig": ["demo", "__init__"],
        "import ddpo_trl.policy.policy as p, torch": ["policy.policy"],
        "import ddpo_trl": ["__init__"],
        "def late():\n    from ddpo_trl.trainer import DDPOTrainer": ["trainer"],
        "import types, torch.nn\nfrom transformers import Trainer": [],
    }
    assert {statement: list(imported_modules(ast.parse(statement))) for statement in expected} == expected
    relative = [path for path, tree in TREES.items() for node in ast.walk(tree) if vars(node).get("level")]
    assert relative == []


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
    assert running == {"policy.runner"}
    naming = {module for module, node in expressions if isinstance(node, ast.Attribute) and node.attr == "__call__"}
    assert naming == {"policy.pipeline"}  # which reads its signature and takes off its `torch.no_grad()`


def test_modules_are_named_after_what_they_hold():
    empty_words = {"utils", "util", "helpers", "misc", "common"}
    parts = {path: path.relative_to(ROOT).with_suffix("").parts for path in TREES}
    assert [str(path) for path, names in parts.items() if empty_words & set(names)] == []


def test_the_public_names_are_few_and_exist():
    assert {"DDPOConfig", "DDPOTrainer"} <= set(ddpo_trl.__all__)
    assert [getattr(ddpo_trl, name).__name__ for name in ddpo_trl.__all__] == ddpo_trl.__all__
    assert set(dir(ddpo_trl)) == {*ddpo_trl.__all__, "__version__", "prompts", "rewards"}  # tab completion
    assert ddpo_trl.__version__ == version("ddpo_trl")
    with pytest.raises(AttributeError, match="DDPOTrainr"):
        getattr(ddpo_trl, "DDPOTrainr")  # noqa: B009 (mypy knows that there is none)
    assert len(ddpo_trl.__all__) <= 12
