"""`make results`: which runs it makes, and what the page says of them."""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import demo_runs
import results
from ddpo_trl.artifacts.record import LoggedImage, write_samples
from ddpo_trl.cli.demo import parse_arguments
from results import Result, Run


ROOT = Path(__file__).parents[2]

RESULT = Result(
    task="jpeg_compressibility",
    kind="is",
    seed=0,
    queries=[256, 512],
    reward=[-2.0, -1.0],
    before=-2.0,
    after=-1.5,
    gain=0.5,
    gain_stderr=0.1,
    recognized_before=1.0,
    recognized_after=0.75,
    recognized_gain_stderr=0.125,
    seconds=300.0,
)


# ---- The runs ----


def test_there_are_27_runs_and_a_seed_is_complete_before_the_next_begins():
    assert len(set(results.RUNS)) == 27
    assert [run.seed for run in results.RUNS] == [0] * 9 + [1] * 9 + [2] * 9


def test_the_demo_takes_the_commands_with_four_updates_of_64_or_one_of_256():
    for run in results.RUNS:
        command = demo_runs.command(run.folder, run.flags)
        assert command[1:4] == ["-m", "ddpo_trl.cli", "demo"]
        arguments, config = parse_arguments(command[4:])
        expected = {"is": ("is", 1e-3), "sf": ("sf", 4e-3), "shuffled": ("sf", 4e-3)}[run.kind]
        half = 0.5 if run.task == "emoji_alignment" else 1.0
        assert (config.loss_type, config.learning_rate) == (expected[0], pytest.approx(half * expected[1])), run.name
        assert results.updates_of(run) == ((4, 64) if run.kind == "is" else (1, 256)), run.name
        assert (arguments.reward, config.seed, config.num_train_epochs, config.bf16) == (run.task, run.seed, 6, True)
        assert arguments.shuffle_rewards == (run.kind == "shuffled"), run.name
        assert config.output_dir == f"outputs/results/{run.task}-{run.kind}-{run.seed}"


@pytest.fixture
def made(tmp_path, monkeypatch) -> Callable[[], list[str]]:
    """Runs are one line of Python that leaves a summary, but for `sf` with seed 1. Gives the names of those made."""
    monkeypatch.setattr(results, "KEPT", tmp_path)

    def command(folder: Path, flags: list[str]) -> list[str]:
        code = (
            "import os, pathlib, sys; folder = pathlib.Path(sys.argv[1]); folder.mkdir(); "
            "print('threads:', os.environ['OMP_NUM_THREADS']); "
            "sys.exit('no memory left') if folder.name.endswith('sf-1') else (folder / 'summary.json').write_text('')"
        )
        return [sys.executable, "-S", "-c", code, str(folder)]

    monkeypatch.setattr(demo_runs, "command", command)
    return lambda: sorted(path.stem for path in tmp_path.glob("*.log"))


def commands(runs: list[Run]) -> Mapping[Path, list[str]]:
    return {run.folder: run.flags for run in runs}


def test_a_finished_run_is_not_made_again(made):
    runs = [Run("emoji_alignment", "is", seed) for seed in (0, 1)]
    runs[0].folder.mkdir()
    (runs[0].folder / "summary.json").write_text("{}")
    results.make_all(commands(runs))
    assert made() == ["emoji_alignment-is-1"]
    assert (results.KEPT / "emoji_alignment-is-1.log").read_text() == "threads: 1\n"
    results.make_all(commands(runs))
    assert (runs[0].folder / "summary.json").read_text() == "{}"


def test_a_failed_run_is_named_with_the_end_of_what_it_printed_and_no_other_begins(made, monkeypatch):
    monkeypatch.setattr(demo_runs.os, "cpu_count", lambda: 1)
    runs = [Run("emoji_alignment", "sf", 1), *(Run("emoji_alignment", "is", seed) for seed in range(20))]
    with pytest.raises(RuntimeError, match=r"(?s)emoji_alignment-sf-1 failed.*no memory left"):
        results.make_all(commands(runs))
    assert len(made()) < 20


def test_a_seed_counts_once_all_of_its_runs_are_finished(made):
    runs = [Run("emoji_alignment", kind, seed) for seed in (0, 1) for kind in ("is", "shuffled")]
    results.make_all(commands(runs[:3]))
    assert results.complete_seeds(runs) == runs[:2]


# ---- What they found ----


def write_run(run: Run, learning_rate: float = 1e-3) -> None:
    """What a run leaves: 512 queries in 200 s."""
    _, config = parse_arguments(run.flags)
    summary = {
        "reward_queries": 512,
        "eval_reward_before": -2.0,
        "eval_reward_after": -1.5,
        "eval_reward_gain": 0.5,
        "eval_reward_gain_stderr": 0.1,
        "recognized_before": 1.0,
        "recognized_after": 0.75,
        "recognized_gain_stderr": 0.125,
        "seconds": {"total": 200.0},
        "config": config.to_dict() | {"learning_rate": learning_rate},
    }
    run.folder.mkdir(parents=True)
    (run.folder / "summary.json").write_text(json.dumps(summary))
    (run.folder / "metrics.csv").write_text("round,reward,episode\n1,-2.0,256.0\n2,-1.0,512.0\n")
    (run.folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "device": f"cpu {run.seed}"}))


def test_a_run_is_read_from_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "KEPT", tmp_path)
    run = Run("jpeg_compressibility", "is", 0)
    write_run(run)
    assert results.read(run) == dataclasses.replace(RESULT, seconds=390.625)  # 200 s for 512 queries
    assert results.read(run).gain_in_stderr == 5.0
    assert results.read(run).recognized_gain_in_stderr == -2.0


def test_a_run_with_other_flags_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "KEPT", tmp_path)
    run = Run("jpeg_compressibility", "is", 0)
    write_run(run, learning_rate=2e-3)
    with pytest.raises(ValueError, match=r"jpeg_compressibility-is-0 .*other flags: learning_rate=0\.002"):
        results.read(run)


def test_the_figures_have_the_day_the_machine_and_every_run(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "KEPT", tmp_path)
    runs = [Run("jpeg_compressibility", "is", seed) for seed in (0, 1)]
    for run in runs:
        write_run(run)
    figures = results.collect(runs)
    assert figures["machine"] == {"torch": "2.13.0", "device": "cpu 0, cpu 1"}
    assert [entry["seed"] for entry in figures["results"]] == [0, 1]
    assert Result(**json.loads(json.dumps(figures))["results"][0]) == results.read(runs[0])


def test_no_image_that_differs_is_a_gain_of_no_standard_errors():
    assert results.in_stderr(0.0, 0.0) == 0.0
    assert results.in_stderr(-0.5, 0.25) == -2.0


def test_the_band_reaches_from_the_lowest_seed_to_the_highest():
    assert results.band([[1.0, 5.0], [2.0, 3.0], [6.0, 1.0]]) == [(1.0, 3.0, 6.0), (1.0, 3.0, 5.0)]


def of_all_kinds() -> list[Result]:
    """Two seeds of each: IS gains 0.5 and 0.7, SF 0.4 and 0.6, the control nothing."""
    gains = {"is": (0.5, 0.7), "sf": (0.4, 0.6), "shuffled": (0.0, 0.0)}
    seconds = {"is": (400.0, 500.0), "sf": (300.0, 330.0), "shuffled": (360.0, 360.0)}
    return [
        dataclasses.replace(
            RESULT, kind=kind, seed=seed, gain=gains[kind][seed], after=-2.0 + gains[kind][seed],
            recognized_after=1.0 if kind == "shuffled" else 0.75, seconds=seconds[kind][seed],
        )
        for kind in gains
        for seed in (0, 1)
    ]  # fmt: skip


def test_a_row_has_the_mean_of_the_seeds_and_what_each_of_them_has():
    rows = results.results_table(of_all_kinds())[2:]
    assert rows == [
        "| IS | −2.000 → −1.400 | +0.600 (+0.500 to +0.700) | +5.0, +7.0 | 100% → 75% | −2.0, −2.0 |",
        "| SF | −2.000 → −1.500 | +0.500 (+0.400 to +0.600) | +4.0, +6.0 | 100% → 75% | −2.0, −2.0 |",
        "| SF, rewards shuffled | −2.000 → −2.000 | +0.000 (+0.000 to +0.000) | +0.0, +0.0 | 100% → 100% "
        "| +0.0, +0.0 |",
    ]


def test_costs_stand_beside_their_ratio_to_importance_sampling():
    rows = results.cost_table({"jpeg_compressibility": of_all_kinds()})[2:]
    assert rows == ["| Compressibility | 400 s | 300 s, 0.75 of IS | 360 s, 0.90 of IS |"]


def test_a_long_command_is_broken_between_flags():
    assert results.shell(["a", "--b", "1", "--c", "2"], width=9) == "a --b 1 \\\n  --c 2"


# ---- Pictures ----


def test_every_kind_has_its_curve(tmp_path):
    results.draw_curves(of_all_kinds(), "kB", tmp_path / "curves.png")
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).reshape(-1, 3)
    for colour in ("#1a7f37", "#6e7781"):  # in their last strokes: the curves of this test lie on one another
        assert (pixels == tuple(bytes.fromhex(colour[1:]))).all(1).any()


def test_images_before_are_above_those_after_both_estimators(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "KEPT", tmp_path)
    monkeypatch.setattr(results, "PICTURES", tmp_path)
    grey = {("is", 0): 10, ("is", 2): 90, ("sf", 0): 10, ("sf", 2): 170}
    for (kind, round), value in grey.items():
        images = [
            LoggedImage(
                kind="fixed", index=index, frames=[Image.new("RGB", (8, 8), (value + index,) * 3)], prompt=f"{index}",
                seed=index, reward=0.0, rewards={},
            )
            for index in range(10)
        ]  # fmt: skip
        write_samples(Run("emoji_alignment", kind, 0).folder, round, images)
    results.draw_images("emoji_alignment", 0)
    for picture, first in ((1, 0), (2, 4)):
        shown = np.asarray(Image.open(tmp_path / f"results-emoji_alignment-images-{picture}.png").convert("L"))
        heights = [np.nonzero(shown == value + first)[0].mean() for value in (10, 90, 170)]
        assert heights == sorted(heights)


def test_a_spread_is_from_the_least_to_the_largest():
    assert results.spread([1.0, -2.0, 3.0], "+.1f") == "-2.0 to +3.0"


# ---- The page ----


@pytest.fixture(scope="module")
def figures() -> dict:
    """Those of the page."""
    return json.loads((ROOT / "benchmarks" / f"results-{results.READING_DATE}.json").read_text())


@pytest.fixture(scope="module")
def found(figures) -> dict[tuple[str, str, int], Result]:
    """By task, kind and seed."""
    every = [Result(**entry) for entry in figures["results"]]
    return {(result.task, result.kind, result.seed): result for result in every}


def test_the_page_is_what_the_dated_figures_say(figures):
    assert results.page(figures) == results.PAGE.read_text()


def test_other_runs_are_not_said_to_show_the_same(figures):
    assert "## Findings" in results.page(figures)
    assert "## Findings" not in results.page(figures | {"date": "2027-01-01"})


@pytest.mark.parametrize("task", results.TITLES)
def test_every_run_gains_more_than_any_control(found, task):
    learners = [found[task, kind, seed] for kind in ("is", "sf") for seed in results.SEEDS]
    assert min(run.gain for run in learners) > max(found[task, "shuffled", seed].gain for seed in results.SEEDS)
    assert min(run.gain_in_stderr for run in learners) > 4


@pytest.mark.parametrize("seed", results.SEEDS)
def test_one_large_update_gains_more_than_four_small_ones_and_loses_more_subjects(found, seed):
    assert all(found[task, "sf", seed].gain > found[task, "is", seed].gain for task in results.TITLES)
    recognized = {kind: found["jpeg_compressibility", kind, seed].recognized_after for kind in ("is", "sf")}
    assert recognized["sf"] < recognized["is"]


@pytest.mark.parametrize("seed", results.SEEDS)
def test_the_control_goes_nowhere_in_particular(found, seed):
    """JPEG sizes of one seed's two controls move in opposite directions; alignment falls, by another judge too."""
    gains = [found[task, "shuffled", seed].gain for task in ("jpeg_compressibility", "jpeg_incompressibility")]
    assert gains[0] * gains[1] > 0  # of opposite rewards
    aligned = {kind: found["emoji_alignment", kind, seed] for kind in results.FLAGS}
    assert aligned["shuffled"].gain < 0 and aligned["shuffled"].recognized_gain < 0
    assert min(aligned["is"].recognized_gain, aligned["sf"].recognized_gain) > 0


def test_with_incompressibility_the_bands_of_is_and_the_control_overlap(found):
    last = {
        kind: [found["jpeg_incompressibility", kind, seed].reward[-1] for seed in results.SEEDS]
        for kind in ("is", "shuffled")
    }
    assert max(last["shuffled"]) > min(last["is"])
