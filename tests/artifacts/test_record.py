"""What a run leaves on the disk: what is in it, and what a later run makes of it."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpo_trl.artifacts import record
from ddpo_trl.artifacts.record import LoggedImage


def logged(kind: record.Kind = "fixed", index: int = 0, colour=(255, 0, 0), **overrides) -> LoggedImage:
    return LoggedImage(
        **{
            "kind": kind,
            "index": index,
            "frames": [Image.new("RGB", (8, 8), colour)],
            "prompt": f"prompt {index}",
            "seed": index,
            "reward": 1.0,
            "rewards": {"brightness": 1.0},
            **overrides,
        }
    )


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def colours(path: Path) -> set[tuple[int, ...]]:
    return set(map(tuple, np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).tolist()))


# ---- Figures ----


def test_a_training_log_has_one_row_with_its_evaluation_and_later_columns_are_empty_before(tmp_path):
    history = [
        {"eval_reward": 0.1, "episode": 0, "step": 0},  # before training
        {"loss": 3.0, "reward": 1.0, "episode": 8.0, "step": 2},
        {"loss": 3.0, "reward": 2.0, "episode": 16.0, "step": 4, "val/ratio": 1.0},
        {"eval_reward": 0.5, "eval_rewards/a, b/mean": 0.25, "epoch": 2.0, "episode": 16.0, "step": 4},
        {"train_runtime": 1.0, "step": 6},
    ]
    record.write_metrics(tmp_path, history, steps=2)
    before, first, second = rows(tmp_path)
    assert before["round"] == before["episode"] == "0" and before["eval_reward"] == "0.1"
    assert first["round"] == "1" and second["round"] == "2"
    assert first["eval_reward"] == first["val/ratio"] == "" and second["eval_reward"] == "0.5"
    assert second["eval_rewards/a, b/mean"] == "0.25" and second["reward"] == "2.0"
    assert "train_runtime" not in second
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_an_evaluation_between_logs_that_span_rounds_has_its_own_row_and_so_has_a_second_one(tmp_path):
    history = [
        {"eval_reward": 1.0, "episode": 8, "step": 2},
        {"loss": 1.0, "reward": 2.0, "episode": 16, "step": 4},
        {"eval_reward": 3.0, "episode": 16, "step": 4},
        {"eval_reward": 4.0, "episode": 16, "step": 4},
    ]
    record.write_metrics(tmp_path, history, steps=1)
    assert [(row["round"], row["episode"], row["eval_reward"]) for row in rows(tmp_path)] == [
        ("2", "8", "1.0"), ("4", "16", "3.0"), ("4", "16", "4.0"),
    ]  # fmt: skip


def test_several_logs_inside_a_round_have_a_row_each_with_the_round_they_belong_to(tmp_path):
    history = [
        {"loss": 1.0, "reward": 1.0, "step": 1},
        {"loss": 1.0, "policy/clipfrac_avg": 0.5, "step": 3},
        {"loss": 1.0, "reward": 2.0, "step": 5},
    ]
    record.write_metrics(tmp_path, history, steps=4)
    assert [row["round"] for row in rows(tmp_path)] == ["1", "1", "2"]
    assert [row["policy/clipfrac_avg"] for row in rows(tmp_path)] == ["", "0.5", ""]


def test_a_run_without_a_round_has_a_heading_and_no_lines(tmp_path):
    record.write_metrics(tmp_path, [], steps=2)
    assert (tmp_path / "metrics.csv").read_text().strip() == "round"


# ---- Images ----


def test_a_rounds_folder_says_of_each_image_what_it_is(tmp_path):
    images = [logged(), logged(index=1, reward=None, rewards={"brightness": None}), logged("worst", 0)]
    record.write_samples(tmp_path, 10, images)
    folder = tmp_path / "samples" / "round-0010"
    entries = json.loads((folder / "samples.json").read_text())
    assert [entry["file"] for entry in entries] == ["fixed-00.png", "fixed-01.png", "worst-0.png"]
    assert entries[1] == {
        "kind": "fixed",
        "file": "fixed-01.png",
        "prompt": "prompt 1",
        "seed": 1,
        "reward": None,
        "rewards": {"brightness": None},
    }
    assert all(colours(folder / entry["file"]) == {(255, 0, 0)} for entry in entries)


def test_images_that_are_made_again_leave_none_of_the_old_ones(tmp_path):
    record.write_samples(tmp_path, 1, [logged(), logged("best", 0), logged("best", 1)])
    record.write_samples(tmp_path, 1, [logged()])
    names = {path.name for path in (tmp_path / "samples" / "round-0001").iterdir()}
    assert names == {"fixed-00.png", "samples.json"}


@pytest.mark.parametrize("first, left", [(0, []), (3, ["round-0000", "round-0002"])])
def test_rounds_from_one_on_are_removed_and_nothing_else(tmp_path, first, left):
    for round in (0, 2, 3, 12000):
        record.write_samples(tmp_path, round, [logged()])
    (tmp_path / "samples" / "round-trip").mkdir()
    record.remove_rounds_from(tmp_path, first)
    kept = {path.name for path in (tmp_path / "samples").iterdir()}
    assert kept == {"round-trip", *left}


def test_before_and_after_show_the_same_prompts_and_seeds(tmp_path):
    red, green, blue, white = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255)
    record.write_samples(tmp_path, 0, [logged(index=0, colour=red), logged(index=1, colour=green)])
    record.write_samples(tmp_path, 4, [logged(index=0, colour=blue), logged("best", 1, white), logged(index=2)])
    record.write_before_after(tmp_path, 4)
    shown = colours(tmp_path / "before_after.png")
    assert {red, blue} <= shown and not {green, white} & shown


def test_without_images_of_round_zero_there_is_no_before_and_after(tmp_path):
    record.write_samples(tmp_path, 4, [logged()])
    record.write_before_after(tmp_path, 4)
    assert not (tmp_path / "before_after.png").exists()


def test_pixels_are_rounded_and_what_is_beyond_is_cut_off():
    values = torch.tensor([0.0, 0.5, 1.0, -3.0, 7.0, float("nan")])
    (image,) = record.frames(values.expand(3, 1, 6))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 128, 255, 0, 255, 0]


def test_of_a_video_the_middle_frame_is_the_image_and_all_frames_are_a_gif(tmp_path):
    levels = [0.0, 0.4, 0.8]
    video = torch.tensor(levels)[:, None, None, None].expand(3, 3, 8, 16)
    record.write_samples(tmp_path, 0, [logged(frames=record.frames(video))])
    folder = tmp_path / "samples" / "round-0000"
    assert colours(folder / "fixed-00.png") == {(102, 102, 102)}
    assert Image.open(folder / "fixed-00.png").size == (16, 8)
    assert Image.open(folder / "fixed-00.gif").n_frames == 3  # type: ignore[attr-defined]
