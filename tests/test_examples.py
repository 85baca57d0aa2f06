"""The examples run: each with the embedded pipeline, and with a small random one of the kind that it is for."""

import copy
import re
import runpy
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
from diffusers import DiffusionPipeline
from nbclient import NotebookClient

from conformance.image_pipelines import flux, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from conftest import brightness
from ddpo_trl import rewards
from ddpo_trl.cli.sources import load_prompt_source, reward_spec
from ddpo_trl.cli.train import make_parser
from ddpo_trl.rewards.server import serve
from ddpo_trl.rollout.plan import plan_batches
from ddpo_trl.versions import http
from rewards.test_remote_reward import free_port
from rewards.test_rewards_vlm import vlm  # noqa: F401  (a fixture)


EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = (
    "--num_train_epochs=1", "--num_inference_steps=2", "--per_device_sample_batch_size=2", "--num_sample_batches=1",
    "--num_images_per_prompt=2", "--per_device_train_batch_size=2", "--num_mini_batches=1", "--log_images_rounds=0",
    "--save_strategy=no", "--disable_tqdm=True",
)  # fmt: skip


def run(name: str, output: Path, *flags: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *SHORT, f"--output_dir={output}", *flags])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def adapter(output: Path) -> Path:
    return output / "pytorch_lora_weights.safetensors"


# What is not to be had here, in place of which any reward shows that the rest is right, and what else differs.
@pytest.mark.parametrize(
    ("name", "build", "download", "flags"),
    [
        ("ddpo_sd15_aesthetic.py", stable_diffusion, "LaionAesthetic", ()),
        ("ddpo_sdxl.py", stable_diffusion_xl, "PickScore", ("--prompts={prompts}", "--column=text")),
        (
            "ddpo_flux.py",
            flux,
            "ImageReward",
            ("--size=16", '--pipeline_kwargs={{"max_sequence_length": 16}}', "--num_inference_steps=3"),
        ),
        ("ddpo_ocr.py", stable_diffusion_3, None, ("--size=16", '--pipeline_kwargs={{"max_sequence_length": 16}}')),
    ],
)
def test_an_example_trains_a_pipeline_of_the_kind_that_it_is_for(name, build, download, flags, tmp_path, monkeypatch):
    build(0).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    if download is not None:
        monkeypatch.setattr(rewards, download, lambda **kwargs: brightness)
    run(
        name,
        tmp_path,
        f"--model={tmp_path / 'model'}",
        *(flag.format(prompts=tmp_path / "prompts.txt") for flag in flags),
    )
    DiffusionPipeline.from_pretrained(tmp_path / "model").load_lora_weights(tmp_path)


def test_the_vlm_example_trains_on_the_answers_of_a_judge(tmp_path, request):
    run("ddpo_vlm_alignment.py", tmp_path, "--embedded", f"--judge={request.getfixturevalue('vlm')}")
    assert adapter(tmp_path).is_file()


@pytest.fixture(scope="module")
def reward_url():
    """A real server, in a thread of this process: importing everything once more would take seconds."""
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DDPO_TRL_REWARD_TOKEN", raising=False)
        threading.Thread(target=serve, args=(rewards.colorfulness,), kwargs={"port": port}, daemon=True).start()
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 30
        while True:
            try:
                http.get(f"{url}/health", timeout=5)
                break
            except http.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield url


SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
# They have no other pipeline than the embedded one. The former is run by test_documentation.py.
WITHOUT_A_FLAG = {"ddpo_custom_reward.py", "sf_vs_is.py"}


# Of the others these run in the quick suite: a real model, a reward of one's own kind, a server.
QUICK = {"ddpo_sdxl.py", "ddpo_ocr.py", "ddpo_remote_reward.py"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in sorted({*SCRIPTS} - WITHOUT_A_FLAG)
    ],
)
def test_an_example_trains_the_embedded_pipeline_without_a_download(name, tmp_path, request):
    flags = ["--url", request.getfixturevalue("reward_url")] if name == "ddpo_remote_reward.py" else []
    run(name, tmp_path, "--embedded", *flags)
    assert adapter(tmp_path).is_file()


def test_both_estimators_are_in_one_picture(tmp_path):
    run("sf_vs_is.py", tmp_path, "--total_episodes=2")
    assert (tmp_path / "sf_vs_is.png").read_bytes().startswith(b"\x89PNG")


# ---- Presets and accelerate's configs ----

PRESETS = sorted((EXAMPLES / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_a_run_whose_sizes_divide(path):
    (arguments, config, _), unknown = make_parser().parse(["--config", str(path)])
    assert not unknown
    assert config.output_dir == f"outputs/{path.stem}" and arguments.dtype == "bfloat16"
    assert [reward_spec(name) for name in arguments.reward] and load_prompt_source(arguments.prompts)
    plan = plan_batches(config, stds=[1.0] * config.num_inference_steps)
    text = path.read_text()
    assert f"# {plan.samples_per_round} images per round" in text
    assert f"optimizer steps of {plan.samples_per_mini_batch}" in text
    assert f"GPU with {path.stem.upper().replace('GB', ' GB')}" in text


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_memory_of_a_preset_adds_up_and_fits(path):
    lines = re.findall(r"^#.* ([\d.]+) GiB$", path.read_text(), flags=re.MULTILINE)
    *parts, together = map(float, lines)
    assert sum(parts) == pytest.approx(together, abs=0.5)
    assert together <= 0.8 * int(path.stem.removesuffix("gb"))  # an estimate leaves a fifth free


def test_the_table_of_examples_names_every_file():
    table = (EXAMPLES / "README.md").read_text()
    names = [
        str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*") if path.suffix in (".py", ".ipynb", ".yaml")
    ]
    assert [name for name in names if f"({name})" not in table] == []
    assert {name for name in re.findall(r"\]\(([^)]+)\)", table) if "://" not in name} >= {*names}


# ---- The notebook ----

NOTEBOOK = nbformat.read(EXAMPLES / "ddpo_emoji.ipynb", as_version=4)


@pytest.mark.slow
def test_the_notebook_runs_from_the_first_cell_to_the_last(tmp_path):
    notebook = copy.deepcopy(NOTEBOOK)
    for cell in notebook.cells:  # a single short round
        cell.source = cell.source.replace("total_episodes = 320", "total_episodes = 16")
        cell.source = cell.source.replace("num_inference_steps=10", "num_inference_steps=3")
        cell.source = cell.source.replace("num_sample_batches=2", "num_sample_batches=1")
    assert notebook != NOTEBOOK
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert adapter(tmp_path / "outputs" / "notebook").is_file()


def test_the_notebook_is_stored_with_its_outputs_and_small():
    nbformat.validate(NOTEBOOK)
    outputs = [output for cell in NOTEBOOK.cells for output in cell.get("outputs", [])]
    assert [output.output_type for output in outputs if output.output_type == "error"] == []
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4  # three sheets and the curve
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    assert (EXAMPLES / "ddpo_emoji.ipynb").stat().st_size < 300_000
