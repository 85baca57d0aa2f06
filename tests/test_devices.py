"""Devices other than CUDA: nothing is asked of CUDA alone, and float64, which MPS does not have, stays on the CPU."""

import ast

import pytest

from test_layers import TREES, module_name


# Modules that use a name, with the reason.
CUDA = {
    "artifacts.environment": "the name of the card, if it is one",
    "update.one_pass": "its allocator's unused memory, if it is one",
}
FLOAT64 = {
    "policy.schedulers.layout": "numbers of elements, moved to the CPU before",
    "rollout.advantages": "gathered rewards, on the CPU; advantages move as float32",
    "rollout.loader": "a share of the gathered rewards",
    "rewards.answers": "of lists",
    "rewards.pixels": "of lists",
    "rewards.scoring": "on the CPU",
    "distributed": "gathered as int64",
}


def modules_with(names: tuple[str, ...]) -> set[str]:
    return {
        module_name(path)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in names
    }


@pytest.mark.parametrize(
    ("names", "allowed"), [(("cuda",), CUDA), (("float64", "double"), FLOAT64)], ids=["cuda", "float64"]
)
def test_a_name_that_not_every_device_knows_is_used_where_a_list_says_why(names, allowed):
    assert {module.removeprefix("ddpo_trl.") for module in modules_with(names)} == allowed.keys()
