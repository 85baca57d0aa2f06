"""
Lists the names of TRL 0.23.1's DDPO classes from its wheel, without importing it.

```bash
pip download trl==0.23.1 --no-deps
python tests/golden/trl_0_23_1.py trl-0.23.1-py3-none-any.whl > tests/golden/trl_0_23_1.json
```
"""

import ast
import json
import sys
import zipfile


def class_named(wheel: zipfile.ZipFile, file: str, name: str) -> ast.ClassDef:
    tree = ast.parse(wheel.read(file))
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def field_default(value: ast.expr) -> object:
    """The default of `field(default=...)`; that of a factory is what it makes, `None` what is no literal."""
    assert isinstance(value, ast.Call)
    keywords = {keyword.arg: keyword.value for keyword in value.keywords}
    if "default_factory" in keywords:
        return {}
    try:
        return ast.literal_eval(keywords["default"])
    except ValueError:
        return None


def fields(definition: ast.ClassDef) -> dict[str, object]:
    return {
        node.target.id: field_default(node.value)
        for node in definition.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None
    }


def methods(definition: ast.ClassDef) -> dict[str, list[str]]:
    """The arguments of the constructor and of each public method or property."""
    return {
        node.name: [argument.arg for argument in [*node.args.args, *node.args.kwonlyargs] if argument.arg != "self"]
        for node in definition.body
        if isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_"))
    }


with zipfile.ZipFile(sys.argv[1]) as wheel:
    names = {
        "DDPOConfig": fields(class_named(wheel, "trl/trainer/ddpo_config.py", "DDPOConfig")),
        "DDPOTrainer": methods(class_named(wheel, "trl/trainer/ddpo_trainer.py", "DDPOTrainer")),
        "DefaultDDPOStableDiffusionPipeline": methods(
            class_named(wheel, "trl/models/modeling_sd_base.py", "DefaultDDPOStableDiffusionPipeline")
        ),
    }
names["DDPOConfig"] and None
print(json.dumps(names, indent=2))
