"""The commands of CONTRIBUTING exist, and a comparison of unequal work is an error."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import bench
import environments
from agreement import CHECKED, Disagreement, TheirRound, against_theirs, decoded, our_embeddings, require_close, shake
from conftest import tiny_pipeline
from rounds import PROMPTS, Child
from sides import Case, load, our_trainer, save_pipeline


ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()


# ---- Commands ----


def targets() -> dict[str, str]:
    """Recipe of each target of the Makefile that is a word."""
    return dict(re.findall(r"^([a-z-]+):[^\n]*\n((?:\t[^\n]*\n)*)", MAKEFILE, flags=re.MULTILINE))


def test_every_target_of_contributing_exists_and_every_target_is_there():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", page, flags=re.MULTILINE))
    assert named == targets().keys()
    declared = re.search(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)
    assert declared is not None and set(declared[1].split()) == targets().keys()


def test_every_file_that_the_makefile_runs_exists():
    files = re.findall(r"\b((?:benchmarks|tests|tools)/[\w./-]*)", MAKEFILE)
    assert len(files) >= 8
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_every_script_takes_the_flags_that_make_hands_over():
    without = [name for name, recipe in targets().items() if "$(FLAGS)" not in recipe]
    assert sorted(without) == ["check", "clean", "conformance", "docs", "format", "gpu-wheels"]


# ---- Environments of other trainers ----


def test_a_lock_file_pins_every_package_and_the_torch_of_the_makefile():
    lock_file = ROOT / "benchmarks" / f"{environments.TRL}.txt"
    lines = [line for line in lock_file.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    versions = environments.locked(lock_file)
    assert f"torch=={versions['torch']}\n" in MAKEFILE  # any other spelling takes another build
    assert versions["trl"] == "0.23.1" and versions["transformers"].startswith("4.")


def test_an_environment_is_installed_once_and_again_when_its_lock_file_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    monkeypatch.setattr(environments, "LOCK_FILES", tmp_path)
    monkeypatch.setattr(environments, "ENVIRONMENTS", tmp_path / "build")
    commands: list[list[str]] = []

    def run(command: list[str]) -> None:
        commands.append(command)
        (tmp_path / "build" / "other").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(environments, "run", run)
    for pins, expected in (("a==1\n", 2), ("a==1\n", 2), ("a==2\n", 4)):
        (tmp_path / "other.txt").write_text(pins)
        environments.install("other")
        assert len(commands) == expected
    assert commands[1][0] == str(tmp_path / "build" / "other" / "bin" / "python")
    assert commands[1][-2:] == ["--requirement", str(tmp_path / "other.txt")]


def test_a_command_that_fails_says_why():
    with pytest.raises(RuntimeError, match="no such package"):
        environments.run([sys.executable, "-S", "-c", "raise SystemExit('no such package')"])


# ---- The pipeline that both sides read ----


def test_the_handed_over_files_are_those_of_transformers_4(tmp_path, monkeypatch):
    """transformers 4 reads vocab.json and merges.txt, and weights that begin with text_model; 5 reads both kinds."""
    monkeypatch.setattr("sides.pipeline_folder", lambda case: tmp_path)
    pipeline = tiny_pipeline()
    monkeypatch.setattr("ddpo_trl.load_emoji_pipeline", lambda: pipeline)
    save_pipeline("emoji")
    assert json.loads((tmp_path / "tokenizer" / "vocab.json").read_text()) == pipeline.tokenizer.get_vocab()
    assert (tmp_path / "tokenizer" / "merges.txt").is_file()
    with safe_open(tmp_path / "text_encoder" / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
    assert names and all(name.startswith("text_model.") for name in names)
    loaded = load("emoji")
    assert require_close("embeddings", our_embeddings(loaded), our_embeddings(pipeline)) == 0


# ---- Both sides do the same work ----


def test_rounding_is_no_disagreement_and_its_size_is_returned():
    ours, theirs = {"a": torch.tensor([3.0, 4.0])}, {"a": torch.tensor([3.0, 4.0 + 2e-5])}
    assert require_close("tensors", ours, theirs) == pytest.approx(4e-6, rel=0.1)  # 2e-5 of 5


@pytest.mark.parametrize(
    "theirs",
    [
        {"a": torch.tensor([3.0, 4.001])},
        {"a": torch.tensor([3.0, float("nan")])},
        {"a": torch.tensor([3.0, float("inf")])},
        {"a": torch.tensor([3.0])},
        {"b": torch.tensor([3.0, 4.0])},
        {},
    ],
    ids=str,
)
def test_tensors_that_differ_by_more_are_an_error(theirs):
    with pytest.raises(Disagreement, match="The comparison is not valid: .*tensors"):
        require_close("tensors", {"a": torch.tensor([3.0, 4.0])}, theirs)


def test_gradients_that_are_all_zero_agree_about_nothing():
    with pytest.raises(Disagreement):
        require_close("gradients", {"a": torch.zeros(2)}, {"a": torch.zeros(2)})


@pytest.fixture(scope="module")
def rounds() -> tuple[Any, TheirRound]:
    """A trainer of ours, and a round that agrees with it: its own, with the gradient of the mean over all of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sides.load", lambda case: tiny_pipeline())
        trainer = our_trainer("emoji", CHECKED["emoji"], rounds=1, one_pass=False)
    sizes, policy = CHECKED["emoji"], trainer.model
    weights = {name: weight for name, weight in trainer.pipeline.unet.named_parameters() if weight.requires_grad}
    shake(weights)
    prompts, timesteps = [PROMPTS[0]] * sizes.batch_size, [7, 5, 2]
    samples: list[dict[str, Tensor]] = []
    losses = []
    for batch in range(sizes.batches):
        context = policy.context(prompts, [{}] * len(prompts), [10 * batch + row for row in range(len(prompts))])
        steps = policy.sample(context, record=set(range(sizes.steps))).steps
        advantages = torch.tensor([1.0, -1.0, 0.5, 2.0])
        names = ("latents", "next_latents", "log_probs")
        states = {name: torch.stack([vars(steps[i])[name] for i in range(sizes.steps)], dim=1) for name in names}
        samples.append({**states, "advantages": advantages, "timesteps": torch.tensor([timesteps] * len(prompts))})
        for i in range(sizes.steps):
            losses.append(-advantages * policy(i, steps[i].latents, steps[i].next_latents, context).log_probs)
    gradients = torch.autograd.grad(torch.stack(losses).mean(), list(weights.values()))
    return (
        trainer,
        TheirRound(
            torch=str(torch.__version__),
            threads=torch.get_num_threads(),
            embeddings=our_embeddings(trainer.pipeline),
            image=decoded(trainer.pipeline.vae, samples),
            weights={name: weight.detach().clone() for name, weight in weights.items()},
            gradients=dict(zip(weights, gradients, strict=True)),
            timesteps=timesteps,
            samples=samples,
        ),
    )


@pytest.fixture
def theirs(rounds, monkeypatch) -> TheirRound:
    trainer, round = rounds
    trainer.model.zero_grad()
    monkeypatch.setattr("agreement.our_trainer", lambda *args, **options: trainer)
    return round


def other(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first of them is off by a thousandth."""
    name = next(iter(tensors))
    return {**tensors, name: 1.001 * tensors[name] + 1e-3}


def test_a_round_like_ours_agrees(theirs):
    assert max(against_theirs("emoji", theirs).values()) < 1e-5


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("torch", lambda version: "2.0.0", "version of torch is .* for ddpo_trl and 2.0.0 for TRL"),
        ("threads", lambda threads: threads + 1, "number of threads"),
        ("embeddings", other, "prompt embeddings"),
        ("image", lambda image: 1.001 * image, "decoded images"),
        ("samples", lambda batches: [{**b, "log_probs": b["log_probs"] + 1e-3} for b in batches], "log-probabilities"),
        ("gradients", other, "the two sides' gradients differ"),
        ("gradients", lambda gradients: {name: -g for name, g in gradients.items()}, "gradients"),
    ],
)
def test_a_round_of_other_work_is_an_error(theirs, field, change, message):
    changed = theirs._replace(**{field: change(theirs._asdict()[field])})
    with pytest.raises(Disagreement, match=message):
        against_theirs("emoji", changed)


def test_a_round_that_does_other_work_than_it_is_timed_for_is_an_error():
    """32 images in 10 steps, doubled by guidance, once while sampling and once while training; one update."""
    sizes = Case("", batch_size=16, batches=2, steps=10)
    answer = {"round": 1.0, "denoised": 1280, "updates": 1}
    bench.require_work("two passes", sizes, answer)
    assert answer == {"round": 1.0}  # counts are checked, not kept
    bench.require_work("one pass", sizes, {"denoised": 640, "updates": 1})
    bench.require_work("floor", sizes, {"denoised": 1280, "updates": 0})
    for run, denoised, updates in (("one pass", 1280, 1), ("TRL 0.23.1", 640, 1), ("two passes", 1280, 2)):
        with pytest.raises(Disagreement, match=run):
            bench.require_work(run, sizes, {"denoised": denoised, "updates": updates})


@pytest.mark.parametrize("error", [Disagreement("embeddings differ"), RuntimeError("a side has ended")], ids=str)
def test_bench_fails_and_writes_nothing(tmp_path, monkeypatch, error):
    def compare(cases: dict[str, Case], repeats: int) -> None:
        raise error

    monkeypatch.setattr(bench, "compare", compare)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--output", str(tmp_path / "bench.json")])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == str(error)  # printed, and the exit status is 1
    assert not (tmp_path / "bench.json").exists()


def test_a_process_that_ends_is_an_error_with_what_it_said():
    child = Child([sys.executable, "-S", "-c", "print('1', flush=True); raise SystemExit('no memory left')"])
    assert child.answer() == 1
    with pytest.raises(RuntimeError, match="no memory left"):
        child.answer()
    child.end()
