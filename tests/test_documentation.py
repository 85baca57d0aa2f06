"""What the documents show runs as it stands, but for the number of rounds and steps."""

import ast
import doctest
import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOTrainer, rewards


ROOT = Path(__file__).parents[1]


def snippets(text: str) -> list[str]:
    """The fenced Python blocks of a Markdown text or a docstring."""
    blocks = re.findall(r"^([ ]*)```python\n(.*?)^\1```", text, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in blocks]


LARGEST = {"total_episodes": 8, "num_inference_steps": 2}


def shorter(code: str) -> str:
    """With one round in few steps. Batch sizes, which must divide into each other, are as they stand."""
    for name, largest in LARGEST.items():
        for given in set(re.findall(rf"\b{name}=(\d+)", code)):
            code = re.sub(rf"\b{name}={given}\b", f"{name}={min(int(given), largest)}", code)
    return code


# hub.md needs a Hub: test_hub.py has one and runs it.
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if snippets(path.read_text()) and path.name != "hub.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_examples_of_the_documentation_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code in snippets(page.read_text()):
        if "torchao" not in code or find_spec("torchao"):  # not installed for development
            exec(compile(shorter(code), page.name, "exec"), {})


def test_every_logged_figure_is_on_its_page_and_no_other(make_config):
    config = make_config(num_mini_batches=2, kl_coef=0.1, target_kl=1.0, eval_strategy="epoch")
    prompts = ["a", "a"]
    trainer = DDPOTrainer(
        config, brightness, prompts, tiny_pipeline(), eval_prompts=prompts, eval_reward_fn=rewards.redness
    )
    trainer.train()
    logged = {name for log in trainer.state.log_history for name in log} - {"step"}  # which is the Trainer's count
    logged = {re.sub("/(brightness|redness)/", "/<name>/", name) for name in logged}
    rows = re.findall(r"^\| (`[^|]*`) \|", (ROOT / "docs" / "metrics.md").read_text(), flags=re.MULTILINE)
    assert {name for row in rows for name in re.findall("`([^`]+)`", row)} == logged


def test_every_reward_is_on_its_page():
    page = (ROOT / "docs" / "rewards.md").read_text()
    missing = [name for name in rewards.__all__ if f"`{name}`" not in page and f"`{name}(" not in page]
    assert missing == []


def test_the_readmes_example_runs_and_plain_diffusers_loads_what_it_saves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = snippets((ROOT / "README.md").read_text())
    names: dict = {}
    exec(compile(shorter(code), "README.md", "exec"), names)
    names["load_emoji_pipeline"]().load_lora_weights("outputs/red-emoji")


def docstring_snippets() -> list[tuple[str, str]]:
    """Every fenced Python block of a docstring of the package, with where it stands."""
    found = []
    for path in sorted((ROOT / "src" / "ddpo_trl").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for code in snippets(ast.get_docstring(node) or ""):
                    found.append((f"{path.stem}.{node.name if not isinstance(node, ast.Module) else ''}", code))
    return found


@pytest.mark.parametrize("where, code", docstring_snippets(), ids=lambda value: value[:40])
def test_a_docstrings_example_runs(where, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if code.startswith(">>>"):
        example = doctest.DocTestParser().get_doctest(shorter(code), {}, where, None, 0)
        assert doctest.DocTestRunner().run(example).failed == 0
    else:
        exec(compile(shorter(code), where, "exec"), {})


def test_the_example_script_runs(tmp_path, monkeypatch):
    arguments = ["--total_episodes", "4", "--num_sample_batches", "1", "--num_inference_steps", "2"]
    arguments += ["--per_device_sample_batch_size", "4", "--per_device_train_batch_size", "4"]
    monkeypatch.setattr(sys, "argv", ["example", *arguments, "--output_dir", str(tmp_path / "out")])
    runpy.run_path(str(ROOT / "examples" / "ddpo_custom_reward.py"), run_name="__main__")
    assert (tmp_path / "out" / "reward.png").is_file()


DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def test_the_documents_name_files_and_commands_that_exist():
    missing = [f"{document}: {name}" for document in DOCUMENTS for name in missing_names(ROOT / document)]
    assert missing == []


def missing_names(document: Path) -> list[str]:
    """Links, `make` commands and Python files that a document names and that don't exist."""
    text, makefile = document.read_text(), (ROOT / "Makefile").read_text()
    targets = re.findall(r"\]\(((?!http)[^)#]+)\)", text)
    commands = re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.MULTILINE)
    files = set(re.findall(r"`([\w/]+\.py)`", text)) - {"utils.py"}
    folders = [ROOT / "src" / "ddpo_trl", ROOT / "tests", ROOT]
    return [
        *(target for target in targets if not document.parent.joinpath(target).exists()),
        *(f"make {command}" for command in commands if f"\n{command}:" not in makefile),
        *(name for name in files if not any(folder.joinpath(name).is_file() for folder in folders)),
    ]
