"""benchmarks/gpu: stages fail alone and are not repeated, and their figures are right."""

import collections
import json
import subprocess
import sys
import tomllib
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from conformance import image_pipelines
from conformance.checks import config
from ddpo_trl.policy.lora import add_adapter
from ddpo_trl.policy.policy import Policy
from gpu import conformance, forecast, machine, page, run, speed, waits, wheels
from gpu.networks import NETWORKS
from gpu.trl_loop import TRLLoop
from rounds import PROMPTS


# ---- Stages ----


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """Runs `make gpu` with stages whose results are those of a list, and returns what was run."""
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", "--stages", "machine", "resume", "waits"])
    monkeypatch.delenv("OUT", raising=False)

    def make(**statuses):
        ran = []

        def stage(name, device, budget):
            ran.append(name)
            status = statuses.get(name, "done")
            return {
                "status": status,
                "seconds": 1.0,
                "sources": "",
                "line": "",
                "page": "",
                "figures": {},
                "error": "",
            }

        monkeypatch.setattr(run, "run_stage", stage)
        return run.main(), ran

    return make


def test_a_stage_that_fails_leaves_the_others_alone_and_only_it_is_repeated(stages):
    assert stages(resume="failed with status 1") == (1, ["machine", "resume", "waits"])
    assert stages() == (0, ["resume"])
    assert stages() == (0, [])


def test_without_the_device_no_other_stage_is_tried(stages):
    assert stages(machine="failed with status 1") == (1, ["machine"])


def test_results_and_logs_are_copied_to_out(stages, monkeypatch, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "cpu-waits.log").write_text("a warning")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    stages()
    assert set(json.loads((tmp_path / "out" / "cpu.json").read_text())["stages"]) == {"machine", "resume", "waits"}
    assert "a warning" in (tmp_path / "out" / "gpu.log").read_text()


@pytest.mark.parametrize(
    ("code", "budget", "status"),
    [
        ("pass", 60, "done"),
        ("import os; os.abort()", 60, "failed with status -6"),
        ("import time; time.sleep(60)", 0.01, "stopped after 0 s"),
    ],
)
def test_a_crash_or_a_hang_ends_a_stage_and_says_so(code, budget, status):
    assert run.status_of(subprocess.Popen([sys.executable, "-c", code], process_group=0), budget) == status


def test_every_stage_has_a_section_on_the_page():
    assert set(page.TITLES) == set(run.STAGES)
    for name in run.STAGES:
        assert (run.ROOT / "benchmarks" / "gpu" / f"{name}.py").is_file()


# ---- The page ----


def test_the_page_is_that_of_the_newest_published_results():
    """Stale, if this fails: run `python benchmarks/gpu/page.py`."""
    assert page.DOCUMENT.read_text() == page.text(page.published())


def test_a_rehearsal_is_not_published():
    with pytest.raises(ValueError, match="rehearsal"):
        page.publish({"device": "cpu", "date": "2026-01-01", "stages": {}})


def test_the_page_shows_what_is_not_complete():
    stages = {"waits": {"status": "stopped after 9 s", "page": "3 places so far", "error": "the last lines"}}
    text = page.text({"device": "cuda", "date": "2026-01-01", "stages": stages})
    assert "not complete: stopped after 9 s" in text and "3 places so far" in text and "the last lines" in text
    assert "## Learning\n\nNot run." in text


# ---- The wheels ----


def test_the_wheels_meet_the_requirements_of_the_package():
    project = tomllib.loads((run.ROOT / "pyproject.toml").read_text())["project"]
    required = {each.name: each.specifier for each in map(Requirement, project["dependencies"])}
    pinned = dict(pin.split("==") for pin in wheels.pins())
    assert pinned.keys() & required.keys() >= {"diffusers", "trl", "datasets", "peft"}
    for name in pinned.keys() & required.keys():
        assert pinned[name] in required[name], name


def test_the_metadata_that_stand_for_an_installation_have_the_version(tmp_path):
    wheels.describe_project(tmp_path)
    code = "import importlib.metadata as metadata; print(metadata.version('ddpo_trl'))"
    environment = {"PYTHONPATH": str(tmp_path)}
    found = subprocess.run([sys.executable, "-S", "-c", code], env=environment, capture_output=True, text=True)
    version = tomllib.loads((run.ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert found.stdout.strip() == version, found.stderr


# ---- What is measured ----


def test_the_machine_is_described():
    figures = machine.run("cpu", lambda figures: None)
    assert torch.__version__.partition("+")[0] in machine.line(figures)
    assert "| torch |" in machine.page(figures)


def test_a_combination_is_measured_or_the_reason_is_given():
    name = "Stable Diffusion 1.x"
    figures: dict[str, Any] = {"planned": 3, "rows": []}
    for dtype, kernel in (("float32", conformance.CHOSEN), ("float32", "cuDNN")):
        job = {"dtype": dtype, "kernel": kernel, "pipeline": name}
        figures["rows"].append(job | conformance.deviations(job, "cpu"))
    exact, refused = figures["rows"]
    assert 0 <= exact["alone"] < 1e-5
    assert exact["replay"] == exact["images"] == 0 and exact["gradients"] < 1e-5
    assert "RuntimeError" in refused["error"]
    assert "float32 1/1 replayed bitwise, worst 0; 1 errors; 2 of 3 run" in conformance.line(figures)
    assert f"- float32, cuDNN, {name}: RuntimeError" in conformance.page(figures)


def test_all_pipelines_run_in_every_dtype_and_float32_comes_first():
    names = list(conformance.CASES)
    jobs = conformance.jobs("cuda", names)
    assert [job["pipeline"] for job in jobs[: len(names)]] == names
    assert {job["dtype"] for job in jobs[: len(names)]} == {"float32"}
    plain = [(job["dtype"], job["pipeline"]) for job in jobs if job["kernel"] == conformance.CHOSEN]
    assert sorted(plain) == sorted((dtype, name) for dtype in conformance.DTYPES for name in names)
    assert set(conformance.WITH_EACH_KERNEL) <= set(names)


def test_a_value_that_is_not_a_number_is_the_worst():
    rows = [{"pipeline": "a", "replay": 1.0}, {"pipeline": "b", "replay": float("nan")}]
    assert conformance.worst(rows, "replay") == "not a number (b)"


def test_a_wait_is_counted_at_its_place():
    found: collections.Counter[str] = collections.Counter()
    number = torch.ones(())
    with waits.counted_waits("cpu", found):
        number + 1
        assert not found
        number.item()
    (where,) = found
    assert "test_gpu.py" in where


def test_trls_loop_takes_the_log_probabilities_of_the_policy():
    """The policy replays recorded states of the loop, and finds the same log-probabilities."""
    case = next(case for case in image_pipelines.IMAGE_CASES if case.name == "Stable Diffusion 1.x")
    sizes = NETWORKS["SD 1.5"].sized("cpu")
    pipeline = case.build(0)
    settings = config(case, num_inference_steps=sizes.steps, guidance_scale=2.5)
    policy = Policy(pipeline, settings, add_adapter(pipeline, None))
    loop = TRLLoop(pipeline, sizes, learning_rate=1e-3)
    torch.manual_seed(0)
    batch = loop.sample(PROMPTS[: sizes.batch_size])
    context = policy.context(PROMPTS[: sizes.batch_size], [{}] * sizes.batch_size, [1, 2])
    policy.runner.first_state(context)
    for step in range(sizes.steps):
        own, _ = policy(step, batch.latents[:, step], batch.next_latents[:, step], context)
        assert torch.allclose(own, batch.log_probs[:, step], rtol=1e-4, atol=1e-4)


def test_trls_loop_makes_an_update():
    sizes = NETWORKS["SDXL"].sized("cpu")
    pipeline = sizes.tiny(0)
    pipeline.set_progress_bar_config(disable=True)
    add_adapter(pipeline, None)
    loop = TRLLoop(pipeline, sizes, learning_rate=1e-3)
    before = [weight.detach().clone() for weight in loop.weights]
    loop.a_round(PROMPTS[: sizes.batch_size])
    assert loop.trained_steps == sizes.steps - 1  # the last one has no noise
    assert any(not torch.equal(old, new) for old, new in zip(before, loop.weights, strict=True))
    assert all(torch.isfinite(weight).all() for weight in loop.weights)


def rounds(*seconds: float, gib: int = 1, denoised: int = 8, forecast: int | None = None) -> list[dict[str, Any]]:
    measured = {"peak_bytes": gib * 2**30, "denoised": denoised, "forecast_bytes": forecast}
    return [{"seconds": each, **measured} for each in seconds]


def test_ratios_are_those_of_neighboring_rounds():
    answers = {
        "floor": rounds(1.0, 2.0, 1.0),
        "TRL's loop": rounds(4.0, 4.0, 4.0),
        "two passes": rounds(2.0, 3.0, 4.0),
    }
    text = speed.page({"SDXL": {"answers": answers, "errors": {"one pass": "OutOfMemoryError: 1 GiB"}}})
    # Of TRL's loop: 0.5, 0.75 and 1. Of the floor: 2, 1.5 and 4.
    assert "| two passes | 3.000 | 0.75 (0.50 to 1.00) | 2.00 (1.50 to 4.00) | 1.00 |" in text
    assert "- one pass did not run: OutOfMemoryError: 1 GiB" in text


def test_sides_that_do_not_do_the_same_work_are_not_compared():
    answers = {"floor": rounds(1.0), "TRL's loop": rounds(1.0, denoised=9), "two passes": rounds(1.0)}
    with pytest.raises(RuntimeError, match="not valid"):
        speed.require_equal_work({"SDXL": {"answers": answers}})


def test_a_peak_is_compared_with_its_forecast_or_the_stage_is_skipped(monkeypatch, tmp_path):
    monkeypatch.setattr(forecast, "ROOT", tmp_path)
    (tmp_path / "outputs" / "gpu").mkdir(parents=True)

    def compare(**kwargs: Any) -> dict[str, Any]:
        figures = {"SDXL": {"answers": {"one pass": rounds(1.0, **kwargs)}, "errors": {}}}
        (tmp_path / "outputs" / "gpu" / "cuda.json").write_text(
            json.dumps({"stages": {"speed": {"figures": figures}}})
        )
        return forecast.run("cuda", lambda found: None)

    assert "skipped" in compare()
    figures = compare(gib=3, forecast=4 * 2**30)
    assert forecast.line(figures) == "measured / forecast from 0.75 to 0.75"
    assert "| SDXL, one pass | 4.00 | 3.00 | 0.75 |" in forecast.page(figures)
