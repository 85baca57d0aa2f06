"""
Lists the names of TRL 0.23.1's DDPO classes from its files, without importing it, in the environment of `make bench`.

```bash
python benchmarks/environments.py
build/trl-0.23.1/bin/python tests/golden/trl_0_23_1.py > tests/golden/trl_0_23_1.json
```
"""

import ast
import importlib.metadata
import importlib.util
import json
from pathlib import Path


def class_named(file: Path, name: str) -> ast.ClassDef:
    tree = ast.parse(file.read_text(encoding="utf-8"))
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


spec = importlib.util.find_spec("trl")
assert spec is not None and spec.origin is not None and importlib.metadata.version("trl") == "0.23.1"
trl = Path(spec.origin).parent
names = {
    "DDPOConfig": fields(class_named(trl / "trainer" / "ddpo_config.py", "DDPOConfig")),
    "DDPOTrainer": methods(class_named(trl / "trainer" / "ddpo_trainer.py", "DDPOTrainer")),
    "DefaultDDPOStableDiffusionPipeline": methods(
        class_named(trl / "models" / "modeling_sd_base.py", "DefaultDDPOStableDiffusionPipeline")
    ),
}
print(json.dumps(names, indent=2))
