"""What a run shows: on the disk and in the trackers, read back with the trackers' own files, and at no cost to it."""

import copy
import csv
import io
import json
import logging
import random
import struct
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback
from wandb.proto import wandb_internal_pb2

import kill_a_run
from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOConfig, DDPOTrainer
from ddpo_trl.artifacts.tracking import places


PROMPTS = ["cat", "dog", "owl", "fox"]
ROUNDS, EVERY, FIXED = 3, 2, 4
LOGGED = [0, 2, 3]  # before training, every second round, at the end


def darkness(images: torch.Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> list[float]:
    """A second reward function, of another scale."""
    return (-10 * images.flatten(1).mean(1)).tolist()


def trained(folder: Path, pipeline: Any = None, **settings: Any) -> DDPOTrainer:
    config = DDPOConfig(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
            "save_strategy": "no",
            "num_train_epochs": ROUNDS,
            "num_inference_steps": 4,
            "guidance_scale": 3.0,
            "per_device_sample_batch_size": 4,
            "num_sample_batches": 2,
            "num_mini_batches": 1,
            "learning_rate": 1e-2,
            "log_images_rounds": EVERY,
            "num_logged_images": FIXED,
            **settings,
        }
    )
    trainer = DDPOTrainer(config, [brightness, darkness], PROMPTS, pipeline or tiny_pipeline())
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> SimpleNamespace:
    """One run, watched by all trackers at once."""
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WANDB_MODE", "offline")
        environment.setenv("WANDB_SILENT", "true")
        environment.setenv("WANDB_DIR", str(folder))
        environment.setenv("WANDB_DATA_DIR", str(folder / "staged"))
        environment.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
        environment.setenv("TRACKIO_DIR", str(folder / "trackio"))  # read when trackio is imported
        try:
            trainer = trained(
                folder / "run", report_to=["wandb", "tensorboard", "trackio"], run_name="one", project="p"
            )
        finally:
            wandb.teardown()
    return SimpleNamespace(folder=folder, output=folder / "run", trainer=trainer)


def samples(output: Path, round: int) -> dict[str, dict[str, Any]]:
    """What samples.json says, by the image's name, with the image's pixels."""
    folder = output / "samples" / f"round-{round:04d}"
    entries = json.loads((folder / "samples.json").read_text())
    return {
        entry["file"].removesuffix(".png"): {**entry, "pixels": pixels(folder / entry["file"])} for entry in entries
    }


def rounds_with_images(output: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("round-")) for path in (output / "samples").iterdir())


def pixels(image: Any) -> np.ndarray:
    return np.asarray(Image.open(image).convert("RGB"))


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---- On the disk ----


def test_images_are_logged_before_training_every_so_many_rounds_and_at_the_end(run):
    assert rounds_with_images(run.output) == LOGGED


def test_the_fixed_images_are_those_of_plain_diffusers_with_the_seeds_that_are_stated(run):
    entries = samples(run.output, 0)
    assert list(entries) == [f"fixed-{index:02d}" for index in range(FIXED)]
    expected = tiny_pipeline()(
        [entry["prompt"] for entry in entries.values()],
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(entry["seed"]) for entry in entries.values()],
        output_type="np",
    ).images
    for entry, image in zip(entries.values(), expected, strict=True):
        assert np.abs(entry["pixels"] - 255 * image).max() < 0.6


def test_the_fixed_prompts_are_the_first_ones_of_training_and_stay(run):
    of_rounds = [
        [(entry["prompt"], entry["seed"]) for entry in samples(run.output, round).values() if entry["kind"] == "fixed"]
        for round in LOGGED
    ]
    assert of_rounds[0] == of_rounds[1] == of_rounds[2]
    first_round = [prompt for prompt, _ in run.trainer.prompts.draw(0, 8)]
    assert [prompt for prompt, _ in of_rounds[0]] == first_round[:FIXED]


@pytest.mark.parametrize("round", LOGGED)
def test_each_image_has_its_own_rewards(run, round):
    for entry in samples(run.output, round).values():
        light = entry["pixels"].mean() / 255
        assert entry["rewards"] == pytest.approx({"brightness": light, "darkness": -10 * light}, abs=2e-2)
        assert entry["reward"] == pytest.approx(sum(entry["rewards"].values()))


def test_the_best_median_and_worst_are_those_of_the_round(run):
    rewards = run.trainer.rollout.rewards.sort(descending=True).values.tolist()
    entries = samples(run.output, ROUNDS)
    for kind, expected in {"best": rewards[:2], "median": rewards[3:5], "worst": rewards[:-3:-1]}.items():
        assert [entries[f"{kind}-{index}"]["reward"] for index in range(2)] == expected
    shown = run.trainer.rollout.images[run.trainer.rollout.rewards.argmax()]
    assert np.abs(entries["best-0"]["pixels"] - 255 * shown.permute(1, 2, 0).numpy()).max() < 0.6


def test_an_evaluation_before_training_leaves_the_record_of_another_run_alone(make_config, tmp_path):
    """A trainer that is made in the folder of a run that is over, to evaluate what it has saved."""
    trained(tmp_path / "run")
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    config = make_config(output_dir=str(tmp_path / "run"))
    DDPOTrainer(config, brightness, ["cat", "dog"], tiny_pipeline(), eval_prompts=["cat"]).evaluate()
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == before


def test_the_metrics_are_the_trainers_logs(run):
    logs = [log for log in run.trainer.state.log_history if "reward" in log]
    for round, (row, log) in enumerate(zip(rows(run.output), logs, strict=True), start=1):
        assert {name: float(value) for name, value in row.items()} == {"round": round, **log}


def test_pictures_settings_and_environment_are_there(run):
    assert all(Image.open(run.output / name).width > 400 for name in ("reward.png", "before_after.png"))
    assert json.loads((run.output / "ddpo_config.json").read_text())["num_logged_images"] == FIXED
    assert json.loads((run.output / "environment.json").read_text())["torch"] == version("torch")


def test_without_matplotlib_a_run_says_which_pictures_it_does_not_draw(make_config, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    config = make_config(output_dir=str(tmp_path / "run"), log_images_rounds=1, num_logged_images=2)
    trainer = DDPOTrainer(config, brightness, ["cat", "dog"], tiny_pipeline())
    with caplog.at_level(logging.WARNING):
        trainer.train()
    (warning,) = [record.getMessage() for record in caplog.records if "matplotlib" in record.getMessage()]
    assert "reward.png and before_after.png are not drawn" in warning and "ddpo_trl[plots]" in warning
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert written.isdisjoint({"reward.png", "before_after.png"}) and written >= {"report.html", "samples"}


# ---- In the trackers ----


def wandb_records(path: Path) -> Iterator[Any]:
    """What wandb wrote to upload later: protobuf messages in blocks of 32 KiB, in LevelDB's log format."""
    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = vars(wandb_internal_pb2)["Record"]()  # its class is made at import
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_wandb_gets_a_table_with_the_images(run):
    (path,) = (run.folder / "wandb").glob("offline-run-*/*.wandb")
    artifacts = [record.artifact for record in wandb_records(path) if record.WhichOneof("record_type") == "artifact"]
    assert len(artifacts) == len(LOGGED)
    for round, artifact in zip(LOGGED, artifacts, strict=True):
        staged = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
        table = json.loads(staged["samples.table.json"].read_text())
        check_rows(run, round, [dict(zip(table["columns"], row, strict=True)) for row in table["data"]])
        for row in table["data"]:
            cells = dict(zip(table["columns"], row, strict=True))
            shown = pixels(staged[cells["image"]["path"]])
            assert (shown == samples(run.output, round)[cells["name"]]["pixels"]).all()


def check_rows(run: SimpleNamespace, round: int, table: list[dict[str, Any]]) -> None:
    """The rows of a tracker's table say what samples.json says."""
    expected = samples(run.output, round)
    assert [row["name"] for row in table] == list(expected)
    for row in table:
        entry = expected[row["name"]]
        assert (row["round"], row["prompt"], row["seed"]) == (round, entry["prompt"], str(entry["seed"]))
        assert row["reward"] == entry["reward"]
        assert {name: row[f"rewards/{name}"] for name in entry["rewards"]} == entry["rewards"]


def test_wandbs_figures_and_images_are_in_one_run_at_the_same_steps(run):
    (path,) = (run.folder / "wandb").glob("offline-run-*/*.wandb")
    history = [
        {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        for record in wandb_records(path)
        if record.WhichOneof("record_type") == "history"
    ]
    assert [line["train/global_step"] for line in history if "samples/path" in line] == ["0", "2", "3"]
    rewards = [json.loads(line["train/reward"]) for line in history if "train/reward" in line]
    assert rewards == [log["reward"] for log in run.trainer.state.log_history if "reward" in log]


def test_trackio_gets_a_table_with_the_images(run):
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import MEDIA_DIR

    logs = SQLiteStorage.get_logs("p", "one")
    tables = [(log["train/global_step"], log["samples"]["_value"]) for log in logs if "samples" in log]
    assert [step for step, _ in tables] == LOGGED
    for round, table in tables:
        check_rows(run, round, table)
        for row in table:
            shown = pixels(MEDIA_DIR / row["image"]["file_path"])
            assert (shown == samples(run.output, round)[row["name"]]["pixels"]).all()
    assert sum("train/reward" in log for log in logs) == ROUNDS


def test_tensorboard_shows_each_image_through_the_rounds(run):
    events = EventAccumulator(str(run.folder / "events"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    for name in ("fixed-00", "best-0"):
        shown = {
            event.step: pixels(io.BytesIO(event.encoded_image_string)) for event in events.Images(f"samples/{name}")
        }
        assert list(shown) == [round for round in LOGGED if name in samples(run.output, round)]
        assert all((image == samples(run.output, round)[name]["pixels"]).all() for round, image in shown.items())
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/text_summary")]
    for text, round in zip(texts, LOGGED, strict=True):
        for name, entry in samples(run.output, round).items():
            assert f"| {name} | {entry['prompt']} | {entry['reward']:.4g} | {entry['seed']} |" in text
    assert len(events.Scalars("train/reward")) == ROUNDS


# ---- At no cost to the training ----


def noisy(images: torch.Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> torch.Tensor:
    """A reward that draws from all global random generators."""
    noise = torch.rand(len(images)) + np.random.random() + random.random()
    return brightness(images, prompts, metadata) + noise


@pytest.mark.parametrize(("one_pass", "eval_prompts"), [(True, None), (False, ["cat", "dog"])])
def test_a_run_with_images_equals_one_without_to_the_bit(make_config, tmp_path, eval_prompts):
    ends = []
    for every in (0, 1):
        config = make_config(
            output_dir=str(tmp_path / str(every)),
            advantage_normalization="prompt",
            num_train_epochs=2,
            max_workers=1,  # two would draw in any order
            log_images_rounds=every,
            num_logged_images=3,
        )
        prompts = kill_a_run.Prompts()  # which draw too
        trainer = DDPOTrainer(config, noisy, prompts, tiny_pipeline(), eval_prompts=eval_prompts)
        trainer.train()
        trainer.eval_prompts = [("cat", {})]  # what `result` makes images of
        ends.append(kill_a_run.result(trainer))
    assert (tmp_path / "1" / "samples" / "round-0002").is_dir() and not (tmp_path / "0" / "samples").exists()
    assert [name for name in ends[0] if not kill_a_run.equal(ends[0][name], ends[1][name])] == []


# ---- All kinds of runs ----


def test_a_resumed_run_drops_what_came_after_its_checkpoint_and_keeps_what_came_before(tmp_path):
    first = trained(tmp_path, num_train_epochs=4, save_strategy="epoch", log_images_rounds=1, num_logged_images=1)
    assert [row["round"] for row in rows(tmp_path)] == ["1", "2", "3", "4"]
    best = tmp_path / "samples" / "round-0002" / "best-0.png"
    written = best.stat().st_mtime_ns

    class Watch(TrainerCallback):
        """What is there at the beginning of each round."""

        def __init__(self):
            self.seen: list[tuple[list[str], list[int]]] = []

        def on_epoch_begin(self, args, state, control, **kwargs):
            self.seen.append(([row["round"] for row in rows(tmp_path)], rounds_with_images(tmp_path)))

    watch = Watch()
    config = copy.copy(first.args)
    config.num_train_epochs, config.gradient_accumulation_steps = 3, 1
    resumed = DDPOTrainer(config, [brightness, darkness], PROMPTS, tiny_pipeline(), callbacks=[watch])
    step = 2 * config.updates_per_round
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert watch.seen == [(["1", "2"], [0, 1, 2])]
    assert best.stat().st_mtime_ns == written
    logs = [log for log in resumed.state.log_history if "reward" in log]
    assert [float(row["reward"]) for row in rows(tmp_path)] == [log["reward"] for log in logs]
    assert rounds_with_images(tmp_path) == [0, 1, 2, 3]


def test_a_new_run_in_the_same_folder_leaves_nothing_of_the_old_one(tmp_path):
    trained(tmp_path, num_train_epochs=2, num_logged_images=1, log_images_rounds=1)
    trained(tmp_path, num_train_epochs=1, num_logged_images=1)
    assert rounds_with_images(tmp_path) == [0, 1]
    assert [row["round"] for row in rows(tmp_path)] == ["1"]


def test_without_images_figures_and_settings_are_still_written(tmp_path):
    trained(tmp_path, num_train_epochs=1, log_images_rounds=0)
    assert {"metrics.csv", "ddpo_config.json", "environment.json"} <= {path.name for path in tmp_path.iterdir()}
    assert list(tmp_path.rglob("*.png")) == []


def test_a_run_that_is_stopped_early_shows_its_last_round(make_config):
    class Stop(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            control.should_training_stop = True

    config = make_config(num_train_epochs=5, log_images_rounds=3, num_logged_images=1)
    DDPOTrainer(config, brightness, PROMPTS, tiny_pipeline(), callbacks=[Stop()]).train()
    assert set(samples(Path(config.output_dir), 1)) == {"fixed-00", "best-0", "median-0", "worst-0"}


def test_an_image_without_a_reward_is_shown_without_one_and_ends_nothing(make_config):
    def picky(images, prompts, metadata):
        return [None if prompt == "bad" else 1.0 for prompt in prompts]

    config = make_config(log_images_rounds=1, num_logged_images=2)
    DDPOTrainer(config, picky, PROMPTS, tiny_pipeline(), eval_prompts=["good", "bad"]).train()
    entries = samples(Path(config.output_dir), 1)
    assert [entries[f"fixed-{index:02d}"]["reward"] for index in range(2)] == [1.0, None]
    assert entries["fixed-01"]["rewards"] == {"picky": None}


def test_a_prompt_function_may_give_fewer_prompts_a_round_than_images_are_wanted(make_config):
    calls = iter(range(100))

    def count() -> tuple[str, dict]:
        return f"{next(calls)}", {}

    config = make_config(log_images_rounds=1, num_sample_batches=1, num_images_per_prompt=2, num_logged_images=9)
    trainer = DDPOTrainer(config, brightness, count, tiny_pipeline())
    trainer.train()
    fixed = [entry["prompt"] for entry in samples(Path(config.output_dir), 0).values()]
    assert fixed == ["0", "1"] and trainer.rollout.prompts == ["0", "0", "1", "1"]


# ---- Which samples are shown ----


@pytest.mark.parametrize(
    ("rewards", "count", "expected"),
    [
        ([3.0, 1.0, 2.0], 1, ([0], [2], [1])),
        ([5.0, 4.0, 3.0, 2.0, 1.0, 0.0], 2, ([0, 1], [2, 3], [5, 4])),
        ([5.0, 4.0, 3.0, 2.0, 1.0], 9, ([0], [2], [4])),  # not more than don't overlap
        ([float("nan"), 1.0, float("nan"), 2.0, 3.0], 1, ([4], [3], [1])),
        ([float("nan"), 7.0], 4, ([1], [1], [1])),
        ([float("nan")], 4, ([], [], [])),
        ([1.0] * 3, 1, ([0], [1], [2])),
    ],
)
def test_the_best_the_median_and_the_worst_come_first(rewards, count, expected):
    found = places(torch.tensor(rewards, dtype=torch.float64), count)
    assert (found["best"], found["median"], found["worst"]) == expected
