"""One run in one folder: what can be resumed, what is refused before anything is loaded, what is kept."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOTrainer
from ddpo_trl.artifacts import checkpoints
from ddpo_trl.artifacts.report.reading import read_run


PROMPTS = ["cat", "dog"]
SHORT = {
    "save_strategy": "epoch", "one_pass": None, "num_inference_steps": 2, "num_sample_batches": 1,
    "per_device_sample_batch_size": 2, "per_device_train_batch_size": 2,
}  # fmt: skip


def trainer_of(config: Any) -> DDPOTrainer:
    return DDPOTrainer(config, brightness, PROMPTS, tiny_pipeline(), eval_prompts=PROMPTS)


def numbers(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


@pytest.fixture
def run(make_config, tmp_path) -> Path:
    """Two rounds."""
    trainer_of(make_config(num_train_epochs=2, **SHORT)).train()
    return tmp_path / "run"


# ---- What is asked for ----


def test_what_is_no_checkpoint_is_refused_before_anything_is_sampled_or_printed(make_config, run, capsys):
    trainer = trainer_of(make_config(num_train_epochs=3, disable_tqdm=False, **SHORT))
    capsys.readouterr()
    for asked, message in (
        (
            "True",
            r"is 'True', which is not a checkpoint: .*; or True \(on the command line `--resume` without a value",
        ),
        (str(run), f"not a checkpoint: .* Give the folder of a checkpoint, such as {run / 'checkpoint-2'}"),
        (
            str(run / "checkpoint-7"),
            f"not a checkpoint: .* Give the folder of a checkpoint, such as {run / 'checkpoint-2'}",
        ),
        (run.parent, "not a checkpoint: it has no trainer_state.json. Give the folder of a checkpoint;"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=asked)
    assert capsys.readouterr().out == ""
    assert trainer.state.global_step == 0 and numbers(run) == [1, 2]


@pytest.mark.parametrize(
    "name", ["{}/checkpoint-2/", "run/checkpoint-2", "run/../run/checkpoint-2", "latest", "linked/2"]
)
def test_a_checkpoint_may_be_named_in_any_way(make_config, run, monkeypatch, name):
    """By a slash at the end, as shells complete it, relative to where one is, through links."""
    monkeypatch.chdir(run.parent)
    os.symlink(run / "checkpoint-2", "latest")
    os.symlink(run, "runs")
    os.makedirs("linked")
    os.symlink("../runs/checkpoint-2", "linked/2")
    trainer = trainer_of(make_config(num_train_epochs=3, **SHORT))
    assert trainer.checkpoint_to_resume(name.format(run)) == str(run / "checkpoint-2")


def test_the_best_checkpoint_is_kept_however_the_last_one_is_named(make_config, tmp_path, monkeypatch):
    """Nothing changes at a learning rate of 0: the first round stays the best."""
    monkeypatch.chdir(tmp_path)
    settings = {
        **SHORT, "output_dir": "run", "learning_rate": 0.0, "eval_strategy": "epoch", "load_best_model_at_end": True,
        "save_total_limit": 2,
    }  # fmt: skip
    trainer_of(make_config(num_train_epochs=2, **settings)).train()
    trainer = trainer_of(make_config(num_train_epochs=4, **settings))
    trainer.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-2")
    assert numbers(tmp_path / "run") == [1, 4]
    assert trainer.state.best_model_checkpoint == os.path.join("run", "checkpoint-1")


def test_the_configs_own_field_is_not_ignored(make_config, run):
    config = make_config(num_train_epochs=3, resume_from_checkpoint=str(run / "checkpoint-2"), **SHORT)
    trainer = trainer_of(config)
    trainer.train()
    assert [log["epoch"] for log in trainer.state.log_history if "reward" in log] == [1, 2, 3]
    with pytest.raises(ValueError, match="is 'True', which is not a checkpoint"):
        trainer.train("True")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("trainer_state.json", {"global_step": 3}, "lies inside a round of 2 .* multiple of 2"),
        ("batch_plan.json", None, "was not written by DDPOTrainer: it has no batch_plan.json"),
        ("run.json", None, "was not written by DDPOTrainer: it has no run.json"),
        ("rng_state.pth", None, r"has no random states \(as with save_only_model=True\)"),
        ("optimizer.pt", None, "has no optimizer"),
        ("scheduler.pt", None, "has no learning rate schedule"),
        ("batch_plan.json", "{", "batch_plan.json is damaged .* Resume from an earlier checkpoint"),
    ],
)
def test_a_checkpoint_that_lacks_what_goes_on_is_refused(tmp_path, name, change, message):
    files = {"trainer_state.json": {"global_step": 2}, "batch_plan.json": {"num_ppo_epochs": 1, "num_mini_batches": 2}}
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content))
    for file in ("rng_state.pth", "optimizer.pt", "scheduler.pt", "run.json", "ddpo_config.json"):
        (folder / file).touch()
    assert checkpoints.to_resume(True, str(tmp_path)) == str(folder)
    (folder / name).unlink()
    if change:
        (folder / name).write_text(change if isinstance(change, str) else json.dumps(change))
    with pytest.raises(ValueError, match=message):
        checkpoints.to_resume(True, str(tmp_path))


# ---- One run in one folder ----


def test_a_run_that_begins_in_the_folder_of_another_is_refused_with_the_remedies(make_config, run, tmp_path):
    before = (run / "metrics.csv").read_text()
    fresh = trainer_of(make_config(num_train_epochs=1, **SHORT))
    with pytest.raises(ValueError, match=r"checkpoint-2 is its last.*resume_from_checkpoint=True.*set another output"):
        fresh.train()
    assert (run / "metrics.csv").read_text() == before and numbers(run) == [1, 2]
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(run, elsewhere)
    with pytest.raises(ValueError, match="contains another run"):
        fresh.train(resume_from_checkpoint=str(elsewhere / "checkpoint-1"))


def test_a_second_call_of_train_moves_the_whole_run_of_the_first_aside(make_config, tmp_path):
    folder, earlier = tmp_path / "run", tmp_path / "run" / "_earlier-1"
    settings = {**SHORT, "log_images_rounds": 1, "num_logged_images": 1}
    trainer = trainer_of(make_config(num_train_epochs=2, **settings))
    trainer.train()
    first = (folder / "metrics.csv").read_text()
    trainer.train()
    assert (earlier / "metrics.csv").read_text() == first
    for place in (folder, earlier):
        assert [row["round"] for row in read_run(place).rows] == [1, 2] and numbers(place) == [1, 2]
        assert [one.index for one in read_run(place).rounds] == [0, 1, 2]


def test_the_record_of_a_run_without_checkpoints_is_moved_aside(make_config, tmp_path, caplog):
    folder = tmp_path / "run"
    for number in (1, 2):
        with caplog.at_level("WARNING", logger="ddpo_trl"):
            trainer = trainer_of(make_config(**{**SHORT, "save_strategy": "no"}, num_train_epochs=number))
            trainer.train()
        if number == 1:
            trainer.save_model()
            weights = (folder / "pytorch_lora_weights.safetensors").read_bytes()
            for name in ("train.yaml", "summary.json"):
                (folder / name).write_text("of the first")
    assert (folder / "_earlier-1" / "pytorch_lora_weights.safetensors").read_bytes() == weights
    assert not (folder / "pytorch_lora_weights.safetensors").exists()  # they are not the second run's
    assert all((folder / "_earlier-1" / name).is_file() for name in ("train.yaml", "summary.json"))
    assert [len(read_run(place).rows) for place in (folder, folder / "_earlier-1")] == [2, 1]
    assert any(f"were moved to {folder / '_earlier-1'}." in record.getMessage() for record in caplog.records)


def test_checkpoints_after_the_one_that_is_resumed_make_way(make_config, run):
    """Else they would be taken for the last ones, and the new ones for the oldest."""
    trainer = trainer_of(make_config(num_train_epochs=3, save_total_limit=1, **SHORT))
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert numbers(run) == [3] and numbers(run / "_earlier-1") == [2]


# ---- Which are kept ----


def test_what_is_kept_goes_by_number_and_not_by_the_time_of_a_copy(make_config, run):
    for number, age in ((1, 0), (2, 10_000)):
        moment = (run / f"checkpoint-{number}").stat().st_mtime - age
        os.utime(run / f"checkpoint-{number}", (moment, moment))
    trainer_of(make_config(num_train_epochs=3, save_total_limit=2, **SHORT)).train(resume_from_checkpoint=True)
    assert numbers(run) == [2, 3]


BEST = {**SHORT, "eval_strategy": "epoch", "load_best_model_at_end": True, "learning_rate": 0.0}


def test_the_best_checkpoint_is_found_in_a_folder_that_was_copied_or_moved(make_config, tmp_path):
    """At a learning rate of 0 the first round stays the best. The original is there still, and is another's now."""
    old, new = tmp_path / "run", tmp_path / "copy"
    trainer_of(make_config(num_train_epochs=2, save_total_limit=None, **BEST)).train()
    shutil.copytree(old, new)
    (old / "checkpoint-1" / "pytorch_lora_weights.safetensors").write_text("another's")
    for _ in range(2):  # beside the original, and without it
        trainer = trainer_of(make_config(num_train_epochs=3, save_total_limit=1, output_dir=str(new), **BEST))
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.best_model_checkpoint == str(new / "checkpoint-1")
        assert numbers(new) == [1, 3]
        shutil.rmtree(old, ignore_errors=True)


def test_another_figure_has_another_best_round(make_config, run, caplog):
    trainer_of(make_config(num_train_epochs=3, **BEST)).train(resume_from_checkpoint=True)
    settings = {**BEST, "metric_for_best_model": "eval_reward_std"}
    trainer = trainer_of(make_config(num_train_epochs=4, **settings))
    with caplog.at_level("WARNING", logger="ddpo_trl"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.best_global_step == 4
    assert any("metric_for_best_model is 'eval_reward_std'" in record.getMessage() for record in caplog.records)
