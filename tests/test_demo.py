"""`ddpo-trl demo`: the whole job, short."""

import dataclasses
import json

import pytest
from PIL import Image
from safetensors import safe_open
from transformers import TrainerControl, TrainerState, TrainingArguments

from ddpo_trl import cli, demo
from ddpo_trl.cli.demo import parse_arguments


SHORT = [
    "--total_episodes", "4", "--per_device_sample_batch_size", "4", "--num_sample_batches", "1",
    "--num_images_per_prompt", "2", "--per_device_train_batch_size", "4", "--num_inference_steps", "2",
    "--num_mini_batches", "1", "--disable_tqdm", "true",
]  # fmt: skip


@pytest.fixture(autouse=True)
def few_evaluation_images(monkeypatch):
    for name, task in demo.TASKS.items():
        monkeypatch.setitem(demo.TASKS, name, dataclasses.replace(task, captions=task.captions[:4], eval_seeds=1))


def test_the_demo_saves_weights_pictures_and_figures(tmp_path, capsys):
    assert cli.main(["demo", "--output_dir", str(tmp_path), *SHORT]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["reward_queries"] == 4
    assert summary["eval_reward_before"] < 0  # compressibility is minus kB
    gain = summary["eval_reward_after"] - summary["eval_reward_before"]
    assert summary["eval_reward_gain"] == pytest.approx(gain)
    assert summary["eval_reward_gain_stderr"] > 0
    assert 0 <= summary["recognized_after"] <= 1
    seconds = summary["seconds"]
    assert 0 < seconds["sampling"] < seconds["total"]
    assert 0 < seconds["training"] < seconds["total"]
    assert summary["config"]["num_inference_steps"] == 2
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as weights:
        assert all(name.startswith("unet.") for name in weights.keys())  # noqa: SIM118 (not a dict)
    for picture in ("reward.png", "before_after.png"):
        assert Image.open(tmp_path / picture).width > 600
    assert f"{summary['eval_reward_after']:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, field, value",
    [
        (["--loss_type", "sf"], "loss_type", "sf"),
        (["--loss_type", "sf", "--learning_rate", "1e-3"], "learning_rate", 1e-3),
        (["--loss_type", "sf"], "learning_rate", 2e-3),
        (["--loss_type", "sf", "--reward", "emoji_alignment"], "learning_rate", 6e-4),
        (["--kl_coef", "0.5"], "kl_coef", 0.5),
        (["--train_timestep_range", "0", "0.5"], "train_timestep_range", [0.0, 0.5]),
        (["--seed", "7"], "seed", 7),
    ],
)
def test_every_config_field_is_a_flag(tmp_path, flags, field, value):
    _, config = parse_arguments(["--output_dir", str(tmp_path), *flags])
    assert vars(config)[field] == value
    assert config.num_inference_steps == demo.DEFAULTS["num_inference_steps"]


def test_training_stops_once_the_reward_has_improved_enough(tmp_path):
    """From −2 to −1.6 is a fifth of the magnitude; from 2 up to 2.3 is less."""
    stop, control = demo.StopAtGain(0.18), TrainerControl()

    def is_over_after(reward: float) -> bool:
        stop.on_log(TrainingArguments(str(tmp_path)), TrainerState(), control, logs={"reward": reward})
        return control.should_training_stop

    assert not is_over_after(-2.0)
    assert not is_over_after(-1.65)
    assert is_over_after(-1.6)
    stop, control = demo.StopAtGain(0.18), TrainerControl()
    assert not is_over_after(2.0)
    assert not is_over_after(2.3)
    assert is_over_after(2.4)


@pytest.mark.slow
def test_the_other_direction_is_a_flag(tmp_path):
    flags = ["--reward", "jpeg_incompressibility", "--log_images_rounds", "0", "--output_dir", str(tmp_path)]
    arguments, config = parse_arguments([*flags, *SHORT])
    assert demo.run_demo(arguments, config)["eval_reward_before"] > 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--eta", "0"], "eta is 0.0"),
        (["--loss_type", "ppo"], "invalid choice: 'ppo'"),
        (["--reward", "beauty"], "invalid choice: 'beauty'"),
        (["--no_such_flag"], "no_such_flag"),
    ],
)
def test_a_wrong_flag_ends_with_a_line_that_names_it(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_and_a_missing_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    assert "demo" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
