"""Two real processes (gloo), with the environment that `accelerate launch` gives them, train as one does."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from accelerate import DistributedType, PartialState
from diffusers import UNet2DConditionModel
from PIL import Image

import run_accelerate_config
import run_in_processes
from conftest import tiny_pipeline
from ddpo_trl import DDPOConfig
from ddpo_trl.distributed import check_wrapping, note_process
from ddpo_trl.update.one_pass import free_memory
from ddpo_trl.versions import installed
from launch import fork, launch


def results_of(
    output_dir: Path,
    num_processes: int,
    *arguments: Any,
    main: Callable[..., None] = run_in_processes.main,
    config: str = "multi_gpu",
) -> list[dict[str, Any]]:
    """What each rank saved."""
    output_dir.mkdir()
    if config == "deepspeed_zero2":  # which looks into the environment when it is imported
        run = launch(Path(run_accelerate_config.__file__), [str(output_dir)], num_processes, config)
        assert run.returncode == 0, run.stdout + run.stderr
    else:
        fork(main, str(output_dir), *arguments, num_processes=num_processes, config=config)
    return [torch.load(output_dir / f"rank-{rank}.pt", weights_only=True) for rank in range(num_processes)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def both(folder) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    (alone,) = results_of(folder / "one", 1)
    return alone, results_of(folder / "two", 2)


@pytest.fixture
def runs(both) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One process and two, with plain gradient descent."""
    alone, ranks = both
    return alone["plain"], [rank["plain"] for rank in ranks]


@pytest.fixture
def stopped_runs(both) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One process and two, with `target_kl`."""
    alone, ranks = both
    return alone["stopped"], [rank["stopped"] for rank in ranks]


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def test_both_ranks_end_with_equal_weights(runs):
    _, (first, second) = runs
    assert largest_difference(first["weights"], second["weights"]) == 0.0


def test_two_processes_have_the_gradient_of_one(runs):
    alone, (first, second) = runs
    assert max(gradient.abs().max().item() for gradient in alone["gradients"].values()) > 1e-3
    for rank in (first, second):
        assert largest_difference(alone["gradients"], rank["gradients"]) < 1e-6


def test_one_pass_on_two_processes_has_the_gradient_and_weights_of_two_passes_on_one(both):
    alone, ranks = both
    for rank in ranks:
        for what in ("gradients", "weights"):
            assert largest_difference(alone["plain"][what], rank["one_pass"][what]) < 1e-6


def test_two_processes_end_with_the_weights_of_one(runs):
    alone, (first, _) = runs
    assert largest_difference(alone["weights"], first["weights"]) < 1e-6


@pytest.mark.parametrize("num_processes", [2, 4])
def test_the_images_do_not_depend_on_the_number_of_processes(runs, folder, num_processes):
    alone, two = runs
    ranks = two if num_processes == 2 else [rank["plain"] for rank in results_of(folder / "four", num_processes, True)]
    assert torch.allclose(alone["images"], torch.cat([rank["images"] for rank in ranks]), atol=1e-5)


def test_two_processes_have_the_advantages_of_one(runs):
    alone, ranks = runs
    assert alone["advantages"].abs().max() > 0.5
    assert torch.allclose(alone["advantages"], torch.cat([rank["advantages"] for rank in ranks]), rtol=0, atol=1e-6)


def test_rewards_and_prompt_statistics_are_shared(runs):
    alone, (first, second) = runs
    assert first["statistics"] == second["statistics"]
    assert first["rewards"] == second["rewards"] == pytest.approx(alone["rewards"], abs=1e-6)


def test_evaluation_is_split_between_processes_and_gathered_in_order(runs):
    alone, ranks = runs
    for rank in ranks:
        assert rank["evaluation"][0] == alone["evaluation"][0]
        assert torch.allclose(rank["evaluation"][1], alone["evaluation"][1], atol=1e-5)


def test_the_images_that_are_logged_are_those_of_all_processes(runs, folder):
    """`runs` has written them: the fixed ones are made by both processes, the best may be on either."""
    logged = {}
    for name in ("one", "two"):
        samples = folder / name / "plain" / "samples" / "round-0002"
        entries = json.loads((samples / "samples.json").read_text())
        logged[name] = [
            (entry["kind"], entry["prompt"], entry["seed"], np.asarray(Image.open(samples / entry["file"])))
            for entry in entries
        ]
    assert len(logged["one"]) == 3 + 3 * 1
    for alone, together in zip(logged["one"], logged["two"], strict=True):
        assert alone[:3] == together[:3]
        assert np.abs(alone[3].astype(int) - together[3]).max() <= 1


def test_one_process_writes_the_checkpoints(runs, folder):
    names = {path.name for path in (folder / "two" / "plain" / "checkpoint-2").iterdir()}
    assert {"pytorch_lora_weights.safetensors", "trainer_state.json", "prompt_statistics.json"} <= names


def test_what_one_process_asks_for_all_do_at_the_end_of_the_round(both):
    """The stop inside round 2, the signal there; at the log of round 1 a stop, a checkpoint, an evaluation."""
    ends = {
        "on_substep_end should_training_stop": (4, [2.0], ["checkpoint-4"]),
        "on_step_begin signal": (4, [2.0], ["checkpoint-4"]),
        "on_log should_training_stop": (2, [1.0], ["checkpoint-2"]),
        "on_evaluate should_save": (6, [2.0, 3.0], ["checkpoint-4", "checkpoint-6"]),
        "on_epoch_end should_evaluate": (6, [1.0, 2.0, 3.0], ["checkpoint-6"]),
        "on_log should_save": (6, [2.0, 3.0], ["checkpoint-2", "checkpoint-6"]),
        "on_log should_evaluate": (6, [1.0, 2.0, 3.0], ["checkpoint-6"]),
    }
    for rank in both[1]:
        assert {event: tuple(end.values()) for event, end in rank["asked"].items()} == ends


@pytest.mark.parametrize("passes", ["one_pass=True", "one_pass=False"])
def test_a_process_all_of_whose_samples_are_dropped_adds_nothing_whatever_they_hold(both, passes):
    _, ranks = both
    (of_rewards, of_latents), (others, _) = (rank["dropped"][passes] for rank in ranks)
    assert largest_difference(of_rewards["weights"], of_latents["weights"]) == 0.0
    assert largest_difference(of_rewards["weights"], others["weights"]) == 0.0
    (log,) = of_latents["logs"]
    assert log["rewards/invalid"] == 0.5 and log["grad_norm"] > 0
    assert all(math.isfinite(value) for value in log.values())


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


# ---- What is not the same on both ----


def test_one_process_without_memory_has_all_take_two_passes_and_say_why(both):
    _, ranks = both
    first, second = (rank["unequal"] for rank in ranks)
    assert first["one_pass"] is second["one_pass"] is False
    assert first["because"] == second["because"]
    assert re.fullmatch("on process 1 the gradients of a round's samples take .* GiB are free", first["because"])
    assert largest_difference(first["weights"], second["weights"]) == 0.0
    assert (
        first["insisting"]
        == second["insisting"]
        == (f"one_pass is True, but {first['because']}. Leave one_pass out to take two passes.")
    )


def test_processes_that_were_given_different_things_are_refused_on_both(both):
    _, ranks = both
    for rank in ranks:
        assert rank["unequal"]["other settings"].startswith("learning_rate is 0.01 on process 0 and 0.02 on process 1")
        assert re.match('prompt_fn is "3 prompts .* on process 0 and "3 prompts', rank["unequal"]["other prompts"])
        given = 'resume_from_checkpoint is "checkpoint-2" on process 0 and null on process 1'
        assert rank["unequal"]["other checkpoints"].startswith(given)


def test_all_processes_are_tried_with_the_prompt_that_the_first_one_draws(both):
    _, ranks = both
    assert [rank["unequal"]["example"] for rank in ranks] == ["cat alone", "cat alone"]


def test_processes_that_are_not_joined_are_refused(monkeypatch):
    """What `accelerate launch --multi_gpu` starts on a machine without GPUs."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(DDPOConfig, "world_size", 1)
    with pytest.raises(ValueError, match="2 processes were started, but .*Set use_cpu=True"):
        DDPOConfig()


def test_an_error_says_on_which_process_it_was_raised(monkeypatch):
    error = ValueError("only here")
    note_process(error)
    assert not hasattr(error, "__notes__")  # of one process
    monkeypatch.setattr(PartialState(), "num_processes", 4)
    monkeypatch.setattr(PartialState(), "process_index", 2)
    note_process(error)
    assert error.__notes__ == ["Raised on process 2 of 4."]


def test_processes_on_one_host_share_its_memory(monkeypatch):
    memory = psutil.virtual_memory()._replace(available=8_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(torch.device("cpu")) == 2_000


# ---- The example configs ----


@pytest.fixture(scope="module")
def data_parallel(folder) -> dict[str, Any]:
    return results_of(folder / "ddp", 2, True, main=run_accelerate_config.main)[0]


@pytest.fixture(scope="module", params=["fsdp2", "deepspeed_zero2"])
def sharded(request, folder) -> tuple[Path, list[dict[str, Any]]]:
    if request.param == "deepspeed_zero2":
        pytest.importorskip("deepspeed")
    elif installed("torch") == (2, 6):
        pytest.skip("torch 2.6 has no FSDP2 on a CPU, whose streams can't record events")
    return folder / request.param, results_of(
        folder / request.param, 2, main=run_accelerate_config.main, config=request.param
    )


@pytest.mark.slow
@pytest.mark.parametrize("run", ["whole", "full"])
def test_sharding_trains_as_data_parallel_does(sharded, data_parallel, run):
    directory, (first, second) = sharded
    assert largest_difference(first[run]["weights"], second[run]["weights"]) == 0.0
    # Steps of AdamW at a learning rate of 1e-2, which turns rounding of small gradients into more.
    assert largest_difference(first[run]["weights"], data_parallel[run]["weights"]) < 1e-4
    assert torch.allclose(first[run]["evaluation"], data_parallel[run]["evaluation"], atol=1e-5)
    assert first[run]["held"] == (0.5 if directory.name == "fsdp2" else 1.0)


@pytest.mark.slow
def test_a_sharded_adapter_is_saved_for_plain_diffusers(sharded):
    directory, (first, _) = sharded
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(directory / "whole", adapter_name="default")
    saved = {f"denoiser.{name}": p for name, p in pipeline.unet.named_parameters() if "lora_" in name}
    assert largest_difference(first["whole"]["weights"], saved) == 0.0


@pytest.mark.slow
def test_full_fine_tuning_is_sharded_and_saved_for_plain_diffusers(sharded):
    directory, (first, _) = sharded
    saved = UNet2DConditionModel.from_pretrained(directory / "full", subfolder="unet")
    weights = {f"denoiser.{name}": p for name, p in saved.named_parameters()}
    assert largest_difference(first["full"]["weights"], weights) == 0.0


@pytest.mark.slow
def test_checkpoints_of_a_sharded_adapter_leave_out_the_frozen_model(sharded):
    directory, _ = sharded
    if directory.name == "deepspeed_zero2":
        pytest.skip("DeepSpeed writes the whole module")
    files = {path.name: path.stat().st_size for path in (directory / "whole" / "checkpoint-2").iterdir()}
    assert "pytorch_lora_weights.safetensors" in files
    frozen = sum(p.numel() * p.element_size() for p in tiny_pipeline().unet.parameters())
    assert max(files.values()) < frozen


@pytest.mark.slow
def test_a_sharded_run_resumes_as_if_never_interrupted(sharded):
    _, (first, _) = sharded
    assert largest_difference(first["whole"]["weights"], first["resumed"]["weights"]) == 0.0


@pytest.mark.slow
def test_replay_is_sampling_to_the_bit_when_sharded_in_half_precision_too(sharded):
    _, ranks = sharded
    for rank in ranks:
        assert all(deviation == 0.0 for run in rank.values() for deviation in run["deviations"])
        assert len(rank["half"]["deviations"]) == 1


@pytest.mark.parametrize(
    ("accelerator", "message"),
    [
        (
            SimpleNamespace(
                distributed_type=DistributedType.FSDP,
                is_fsdp2=False,
                state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1)),
            ),
            "fsdp_version is 1.*Set `fsdp_version: 2`",
        ),
        (
            SimpleNamespace(
                distributed_type=DistributedType.DEEPSPEED,
                mixed_precision="no",
                state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3)),
            ),
            "zero_stage is 3.*use FSDP2",
        ),
        (
            SimpleNamespace(
                distributed_type=DistributedType.DEEPSPEED,
                mixed_precision="bf16",
                state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=2)),
            ),
            "bf16=True is set with DeepSpeed.*load the pipeline in half precision",
        ),
    ],
    ids=["FSDP1", "ZeRO-3", "ZeRO-2 in bf16"],
)
def test_wrapping_under_which_a_replay_is_not_the_sampling_is_refused(accelerator, message):
    with pytest.raises(ValueError, match=message):
        check_wrapping(accelerator)
