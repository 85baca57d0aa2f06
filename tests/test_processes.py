"""Two real processes (gloo) train as one does."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


SCRIPT = Path(__file__).parent / "run_in_processes.py"


def launch(output_dir: Path, num_processes: int, script: Path = SCRIPT) -> list[dict[str, Any]]:
    """Runs the script and returns what each rank saved."""
    output_dir.mkdir()
    # `accelerate launch --cpu` needs MPI for several processes; torchrun sets up the same environment with gloo.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}",
               str(script), str(output_dir), str(num_processes)]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    return [torch.load(output_dir / f"rank-{rank}.pt", weights_only=True) for rank in range(num_processes)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def runs(folder) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    (alone,) = launch(folder / "one", 1)
    return alone, launch(folder / "two", 2)


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def test_both_ranks_end_with_equal_weights(runs):
    _, (first, second) = runs
    assert largest_difference(first["weights"], second["weights"]) == 0.0


def test_two_processes_have_the_gradient_of_one(runs):
    alone, (first, second) = runs
    scale = max(gradient.abs().max().item() for gradient in alone["gradients"].values())
    assert scale > 1e-6
    for rank in (first, second):
        assert largest_difference(alone["gradients"], rank["gradients"]) < 1e-4 * scale


def test_two_processes_end_with_the_weights_of_one(runs):
    alone, (first, _) = runs
    assert largest_difference(alone["weights"], first["weights"]) < 1e-6


def test_the_images_do_not_depend_on_the_number_of_processes(runs):
    alone, ranks = runs
    assert torch.allclose(alone["images"], torch.cat([rank["images"] for rank in ranks]), atol=1e-5)


def test_rewards_and_prompt_statistics_are_shared(runs):
    alone, (first, second) = runs
    assert first["statistics"] == second["statistics"]
    assert first["rewards"] == second["rewards"] == pytest.approx(alone["rewards"], abs=1e-6)


def test_evaluation_is_split_between_processes_and_gathered_in_order(runs):
    alone, ranks = runs
    for rank in ranks:
        assert rank["evaluation"][0] == alone["evaluation"][0]
        assert torch.allclose(rank["evaluation"][1], alone["evaluation"][1], atol=1e-5)


def test_one_process_writes_the_checkpoints(runs, folder):
    names = {path.name for path in (folder / "two" / "checkpoint-2").iterdir()}
    assert {"pytorch_lora_weights.safetensors", "trainer_state.json", "prompt_statistics.json"} <= names


@pytest.fixture(scope="module")
def stopped_runs(folder) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    script = SCRIPT.with_name("run_target_kl_in_processes.py")
    (alone,) = launch(folder / "stopped-one", 1, script)
    return alone, launch(folder / "stopped-two", 2, script)


def test_target_kl_ends_the_updates_of_all_processes_alike(stopped_runs):
    alone, (first, second) = stopped_runs
    assert first["skipped"] == second["skipped"] == alone["skipped"] == pytest.approx([2 / 3, 2 / 3])
    assert largest_difference(first["weights"], second["weights"]) == 0.0
    assert all(state["step"] == 2 for rank in (first, second) for state in rank["optimizer"].values())


def test_target_kl_goes_by_the_mean_over_processes(stopped_runs):
    _, ranks = stopped_runs
    for rank in ranks:  # 1 on one process and 3 on the other, for targets of 1.9 and 2.1
        assert rank["decisions"] == [True, False]


def test_evaluation_figures_are_those_of_all_processes(stopped_runs):
    alone, (first, second) = stopped_runs
    assert first["metrics"] == second["metrics"]
    assert first["metrics"] == pytest.approx(alone["metrics"], abs=1e-3)  # the weights differ by AdamW's rounding
    assert "eval_diversity" in alone["metrics"]
