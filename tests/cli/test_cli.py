"""The command line: help that fits a screen, answers of one line to mistakes, and commands that do what they say."""

import argparse
import dataclasses
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCardData
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.debug_utils import DebugOption

from conformance.image_pipelines import IMAGE_CASES
from conftest import needs_newest, tiny_pipeline
from ddpo_trl import DDPOConfig, cli
from ddpo_trl.cli import demo, doctor, errors, sources, train
from ddpo_trl.cli.arguments import CommandParser
from ddpo_trl.cli.launch import PRESETS, config_path, launch, launch_flags
from ddpo_trl.cli.sample import SampleArguments, load_policy, make_images, make_row, make_rows, with_saved_adapter
from ddpo_trl.emoji import emoji_captions
from ddpo_trl.policy.adapter_files import LORA_WEIGHTS_NAME, save_adapter
from ddpo_trl.policy.denoiser import adapter_layers
from ddpo_trl.policy.loading import load_pipeline
from ddpo_trl.policy.lora import add_adapter
from ddpo_trl.prompts import animal_activities


ROUND = [
    "--num_inference_steps", "2", "--num_sample_batches", "1", "--per_device_sample_batch_size", "4",
    "--use_cpu", "--disable_tqdm", "true", "--log_images_rounds", "0",
]  # fmt: skip
WHAT = ["--model", "emoji", "--prompts", "emoji", "--reward", "redness"]


@pytest.fixture(autouse=True)
def own_surroundings(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "path", list(sys.path))  # which commands add the working directory to


def run(capsys, *argv: str) -> tuple[int, str, str]:
    """The exit status, and what was printed."""
    try:
        status = cli.main(argv)
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        status = stop.code
    return status, *capsys.readouterr()


def parse_train(*argv: str) -> tuple[train.TrainArguments, DDPOConfig]:
    (arguments, config, _), _ = train.make_parser().parse(argv)
    return arguments, config


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("tiny"))
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    """A run of two rounds, by flags."""
    folder = tmp_path_factory.mktemp("trained")
    prompts = folder / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    flags = ["--model", tiny, "--prompts", str(prompts), "--reward", "brightness", "--learning_rate", "0.05"]
    assert cli.main(["train", *flags, *ROUND, "--total_episodes", "8", "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


# ---- Help ----


def test_the_command_line_starts_without_the_heavy_libraries():
    heavy = ["torch", "transformers", "diffusers", "trl", "datasets", "matplotlib", "numpy"]
    code = f"import sys, ddpo_trl.cli; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_command_is_listed_with_what_it_does(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert [line.split()[0] for line in out.partition("commands:\n")[2].splitlines()] == list(cli.COMMANDS)
    assert run(capsys, "--version")[0] == 0


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_help_of_a_command_fits_a_screen(command, capsys):
    status, out, _ = run(capsys, command, "--help")
    lines = out.splitlines()
    assert status == 0
    assert lines[0].startswith(f"usage: ddpo-trl {command}")
    assert len(lines) <= 55
    assert max(map(len, lines)) <= 102  # the usage line of `train` is a command to copy


@pytest.mark.parametrize("module", [train, doctor, demo])
def test_help_shows_own_arguments_and_common_settings_in_full(module, capsys):
    _, out, _ = run(capsys, module.__name__.rpartition(".")[2], "--help")
    (own,) = (
        value for name, value in vars(module).items() if name in ("TrainArguments", "DoctorArguments", "DemoArguments")
    )
    text = " ".join(out.split())
    for field in dataclasses.fields(own):
        assert f" --{field.name}" in text and field.metadata["help"] in text, field.name
    assert [name for name in module.SHOWN if f" --{name} " not in text.replace("]", " ")] == []
    assert " --adam_beta1" not in text and " --help-all" in text


def test_all_of_the_help_has_every_field(capsys):
    _, out, _ = run(capsys, "train", "--help-all")
    fields = [*dataclasses.fields(train.TrainArguments), *dataclasses.fields(DDPOConfig)]
    flags = set(re.findall(r"^  --(\w+)", out, flags=re.MULTILINE))
    assert {field.name for field in fields if field.init} <= flags


def test_dashes_in_a_flag_are_underscores():
    arguments, config = parse_train(*WHAT, "--eval-prompts", "emoji", "--learning-rate=0.5")
    assert (arguments.eval_prompts, config.learning_rate) == ("emoji", 0.5)


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (["trian"], "unknown command 'trian'. Did you mean train?"),
        (
            ["train", *WHAT, "--num_inference_step", "3"],
            "unknown argument --num_inference_step. Did you mean --num_inference_steps",
        ),
        (["train", *WHAT, "--num_processs", "3"], "unknown argument --num_processs. Did you mean --num_processes?"),
        (["train", *WHAT, "--rewrd=redness"], "unknown argument --rewrd. Did you mean --reward?"),
        (["train", *WHAT, "--loss_type", "ppo"], "invalid choice: 'ppo'"),
        (["train", *WHAT, "--num_inference_steps", "ten"], "invalid int value: 'ten'"),
        (["train", *WHAT, "--eta", "0"], "eta is 0.0: a step without noise is not a policy"),
        (["train", *WHAT, "--seed", "1", "2"], "unexpected argument '2'"),
        (["train", *WHAT, "--config"], "--config is '', which is not a file"),
        (["train", *WHAT, "--config=nowhere.yaml"], "--config is 'nowhere.yaml', which is not a file"),
        (["train", *WHAT, "--accelerate_config", "mutli_gpu"], "Did you mean multi_gpu?"),
        (
            ["train", *WHAT, "--accelerate_config", "8xH100"],
            "Configs of the package are deepspeed_zero2, fsdp2,",
        ),
        (["train", *WHAT[:-2]], "the following arguments are required: --reward"),
        (["train", *WHAT, "--reward", "rednes"], "the URL of a reward server. Did you mean redness?"),
        (["train", *WHAT, "--reward", "beauty"], "Built-in rewards are AestheticPredictorV25, CLIPScore"),
        (["train", *WHAT, "--reward", "no_such_module:f"], "There is no module 'no_such_module'"),
        (["train", *WHAT, "--reward", "conftest:gray"], "'conftest:gray' does not exist"),
        (["train", *WHAT, "--model", "emojis"], "Did you mean emoji?"),
        (["train", *WHAT, "--dtype", "float7"], "argument --dtype: invalid choice: 'float7'"),
        (["train", *WHAT, "--prompts", "common_animal"], "Did you mean common_animals?"),
        (["train", *WHAT, "--prompts", "nowhere.txt"], "'nowhere.txt', and there is no such file"),
        (["sample", "nowhere"], "nowhere has no LoRA weights"),
        (["sample", "nowhere", "--num_seeds", "0"], "num_seeds is 0; it must be at least 1"),
        (["report", "nowhere"], "nowhere"),
        (["env", "now"], "unexpected argument 'now'"),
        (["doctor"], "the following arguments are required: PATH_OR_ID"),
        (["demo", "--loss_tpye", "sf"], "unknown argument --loss_tpye. Did you mean --loss_type?"),
        (["train", *WHAT, "--lr", "1"], "unknown argument --lr. Did you mean --learning_rate?"),
        (["train", *WHAT, "--epochs=3"], "unknown argument --epochs. Did you mean --num_train_epochs?"),
        (["train", *WHAT, "--train-batch-size", "1"], "Did you mean --per_device_train_batch_size?"),
        (["train", *WHAT, "--beta", "0.1"], "unknown argument --beta. Did you mean --kl_coef?"),
        (["train", *WHAT, "--gpus", "2"], "unknown argument --gpus. Did you mean --num_processes?"),
        (["train", "--modle", "emoji", *WHAT[2:]], "unknown argument --modle. Did you mean --model?"),
        (
            ["train", "--pretrained_model", "emoji", *WHAT[2:]],
            "unknown argument --pretrained_model. Did you mean --model?",
        ),
        (["train", "--num_processes", "2", *WHAT[2:]], "the following arguments are required: --model"),
        (["train", *WHAT, "--dataloader_num_workers", "2"], "dataloader_num_workers is 2, which would do nothing"),
        (["train", *WHAT, "--pipeline_kwargs", "height=64"], "give a dict, or on the command line a JSON object"),
        (["finetune"], "unknown command 'finetune'. Did you mean train?"),
        (["serve"], "unknown command 'serve'. Did you mean serve-reward?"),
    ],
    ids=lambda value: " ".join(word for word in value if word not in WHAT[:-1]) if isinstance(value, list) else "",
)
def test_a_mistake_is_answered_by_one_line(argv, answer, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert answer in err
    assert err.startswith("ddpo-trl") and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (
            "total_episode: 8",
            "'total_episode' in the file of --config is not a setting. Did you mean --total_episodes?",
        ),
        ("reward: [", "is not valid YAML: while parsing a flow node"),
        pytest.param(
            "8", "must contain a YAML mapping", marks=needs_newest("older versions of TRL have no message for it")
        ),
        ("eta: 0", "eta is 0"),
        ("dtype: float7", "dtype is 'float7'; choose one of 'float32', 'bfloat16', 'float16'"),
    ],
)
def test_a_mistake_in_a_file_is_answered_by_one_line(content, answer, capsys, tmp_path):
    (tmp_path / "train.yaml").write_text(content)
    status, _, err = run(capsys, "train", *WHAT, "--config", str(tmp_path / "train.yaml"))
    assert status == 2
    assert answer in err and err.count("\n") == 1


def test_debug_shows_where_a_mistake_was_found(capsys):
    for argv in (["train", *WHAT, "--eta", "0", "--debug"], ["--debug", "train", *WHAT, "--eta", "0"]):
        with pytest.raises(ValueError, match="eta is 0") as caught:
            cli.main(argv)
        assert any(Path(entry.path).name == "config.py" for entry in caught.traceback)


def test_a_run_that_fails_is_one_line_with_the_cause(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "failing.py").write_text("raise KeyError('no such column')")
    argv = ["train", *WHAT, "--reward", "failing:reward"]
    status, _, err = run(capsys, *argv)
    assert status == 1
    assert "'failing' could not be imported. KeyError: 'no such column' (--debug" in err and err.count("\n") == 1
    with pytest.raises(RuntimeError, match="could not be imported"):
        cli.main([*argv, "--debug"])


def test_the_trainers_own_debug_flag_is_left_to_it():
    assert set(errors.DEBUG_OPTIONS) == {option.value for option in DebugOption}
    assert parse_train(*WHAT, "--debug", "underflow_overflow")[1].debug == [DebugOption.UNDERFLOW_OVERFLOW]
    assert parse_train(*WHAT, "--debug")[1].debug == []


# ---- Arguments ----


def test_rewards_are_given_at_once_or_one_by_one():
    two = ["redness", "brightness"]
    base = ["--model", "emoji", "--prompts", "emoji"]
    assert parse_train(*base, "--reward", *two)[0].reward == two
    assert parse_train(*base, "--reward", "redness", "--reward", "brightness")[0].reward == two
    _, config = parse_train(*base, "--reward", *two, "--reward_weights", "1", "0.5")
    assert config.reward_weights == [1.0, 0.5]


def test_a_file_says_what_flags_say_and_flags_go_before_it(tmp_path):
    settings = """
        # what is trained
        model: emoji
        prompts: emoji
        reward: redness

        # sampler
        num_inference_steps: 7
        pipeline_kwargs: {height: 32}
        train_timestep_range: [0.0, 0.5]
        learning_rate: 1e-3
        push_to_hub: true
        hub_model_id: me/mine
    """
    (tmp_path / "train.yaml").write_text(inspect.cleandoc(settings))
    arguments, config = parse_train("--config", str(tmp_path / "train.yaml"), "--reward", "brightness")
    assert (arguments.model, arguments.reward) == ("emoji", ["brightness"])
    assert (config.num_inference_steps, config.learning_rate) == (7, 1e-3)
    assert (config.pipeline_kwargs, config.train_timestep_range) == ({"height": 32}, [0.0, 0.5])
    assert (config.push_to_hub, config.hub_model_id) == (True, "me/mine")
    assert parse_train("--config", str(tmp_path / "train.yaml"))[0].reward == ["redness"]


def test_what_was_given_is_kept_without_defaults_and_secrets(tmp_path, monkeypatch):
    (tmp_path / "train.yaml").write_text("eta: 0.5\nseed: 1\nhub_token: abc\nenv: {A_SECRET: abc}")
    monkeypatch.setenv("A_SECRET", "")  # so that it is reset
    parser = train.make_parser()
    flags = [*WHAT, "--config", str(tmp_path / "train.yaml"), "--seed", "2", "--debug"]
    given = {"model": "emoji", "prompts": "emoji", "reward": ["redness"], "eta": 0.5, "seed": 2}
    parser.parse(flags)
    assert {name: value for name, value in parser.given(flags).items() if name not in train.NOT_KEPT} == given


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], None),
        (["--lora_r", "2"], (2, 2, {"to_k", "to_out.0", "to_q", "to_v"})),
        (["--lora_alpha", "8"], (4, 8, {"to_k", "to_out.0", "to_q", "to_v"})),
        (["--lora_r", "3", "--lora_alpha", "6", "--lora_target_modules", "conv1", "to_q"], (3, 6, {"conv1", "to_q"})),
    ],
)
def test_the_adapter_is_what_the_flags_say(flags, expected):
    config = train.lora_config(parse_train(*WHAT, *flags)[0], tiny_pipeline())
    found = config and (config.r, config.lora_alpha, set(config.target_modules or ()))
    assert found == expected


def test_every_built_in_reward_has_a_name():
    for name in sources.BUILT_IN_REWARDS:
        try:
            reward = sources.load_reward(name)
        except ImportError as error:  # an extra that is not installed, named by the error
            assert "pip install" in str(error), name
        else:
            assert callable(reward), name


def test_a_url_is_a_reward_server():
    with pytest.raises(ConnectionError, match="127.0.0.1:9"):
        sources.load_reward("http://127.0.0.1:9")


def test_prompts_come_from_lists_files_folders_and_functions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "a cat", "kind": "pet"}, {"prompt": "a fox", "kind": "wild"}]
    pairs = [("a cat", {"kind": "pet"}), ("a fox", {"kind": "wild"})]
    Path("my_prompts.py").write_text(f"PAIRS = {pairs[:1]}\ndef draw(): return {pairs[1]}")
    Path("prompts.json").write_text(json.dumps(rows))
    Path("folder").mkdir()
    Path("folder/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Dataset.from_list(rows).save_to_disk("saved")

    def first(name: str, count: int) -> list:
        return sources.first_prompts(sources.load_prompt_source(name), count)

    assert first("emoji", 2) == [(caption, {}) for caption in emoji_captions()[:2]]
    assert first("animal_activities", 1000) == animal_activities()
    for name in ("prompts.json", "folder", "saved"):
        assert first(name, 5) == pairs
    assert first("my_prompts:PAIRS", 5) == pairs[:1]
    assert first("my_prompts:draw", 2) == [pairs[1]] * 2


# ---- train ----


def test_training_the_embedded_pipeline_leaves_weights_that_diffusers_loads(tmp_path, capsys):
    flags = ["--model", "emoji", "--reward", "jpeg_compressibility", "--prompts", "emoji", "--total_episodes", "4"]
    status, out, _ = run(capsys, "train", *flags, *ROUND, "--output_dir", str(tmp_path / "run"))
    assert status == 0
    assert f"Saved in {tmp_path / 'run'}: README.md, checkpoint-1, ddpo_config.json" in out
    assert f"ddpo-trl sample {tmp_path / 'run'}" in out
    load_pipeline("emoji").load_lora_weights(tmp_path / "run")
    kept = yaml.safe_load((tmp_path / "run" / train.SETTINGS_NAME).read_text())
    assert kept["reward"] == ["jpeg_compressibility"] and "hub_token" not in kept and "eta" not in kept


def test_the_settings_of_a_run_repeat_it_to_the_bit(trained, tmp_path):
    assert cli.main(["train", "--config", str(trained / train.SETTINGS_NAME), "--output_dir", str(tmp_path)]) == 0
    first, second = (load_file(folder / LORA_WEIGHTS_NAME) for folder in (trained, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(first[name].abs().sum() > 0 for name in first if "lora_B" in name or "lora.up" in name)


def test_a_run_goes_on_from_its_last_checkpoint(tiny, tmp_path, capsys):
    flags = ["--model", tiny, "--prompts", "emoji", "--reward", "brightness", *ROUND, "--output_dir", str(tmp_path)]
    assert cli.main(["train", *flags, "--num_train_epochs", "1"]) == 0
    assert cli.main(["train", *flags, "--num_train_epochs", "3", "--resume"]) == 0
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert [log["episode"] for log in state["log_history"] if "reward" in log] == [4, 8, 12]
    assert "resume" not in (tmp_path / train.SETTINGS_NAME).read_text()
    assert parse_train(*WHAT, "--resume", "here")[1].resume_from_checkpoint == "here"
    settings = (tmp_path / train.SETTINGS_NAME).read_text()
    flags[flags.index("brightness")] = "redness"
    for more, message in (
        ([], "contains another run (checkpoint-3 is its last checkpoint): resume that one with"),
        (["--resume"], "reward_fn is redness, but the checkpoint was written with brightness"),
        (["--resume", "True"], "--resume` without a value"),
        (["--resume", str(tmp_path)], "which is not a checkpoint"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            cli.main(["train", *flags, "--num_train_epochs", "4", *more])
        assert message in capsys.readouterr().err
    assert (tmp_path / train.SETTINGS_NAME).read_text() == settings


def test_several_rewards_and_an_evaluation_by_another(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("green_reward.py").write_text("def green(images, prompts, metadata): return images[:, 1].mean((1, 2))")
    flags = ["--model", tiny, "--prompts", "emoji", "--reward", "green_reward:green", "--reward", "brightness"]
    flags += ["--reward_weights", "1", "0.5", "--eval_prompts", "emoji", "--eval_reward", "redness"]
    Path("few.txt").write_text("a cat\na dog\n")
    flags += ["--eval_prompts", "few.txt", "--eval_strategy", "epoch", "--load_best_model_at_end"]
    assert cli.main(["train", *flags, *ROUND, "--num_train_epochs", "1", "--output_dir", "out"]) == 0
    logs = json.loads(Path("out/checkpoint-1/trainer_state.json").read_text())["log_history"]
    assert {"rewards/green/mean", "rewards/brightness/mean"} <= set().union(*logs)
    assert "eval_rewards/redness/mean" in set().union(*logs)


# ---- Several processes ----


def test_the_accelerate_configs_of_the_package_are_those_of_the_examples():
    examples = Path(__file__).parents[2] / "examples" / "accelerate_configs"
    presets = {entry.name: entry.read_text() for entry in PRESETS.iterdir()}
    assert {path.name: path.read_text() for path in examples.glob("*")} == presets
    for name in presets:
        assert Path(config_path(name.removesuffix(".yaml"))).read_text() == presets[name]
        assert config_path(str(examples / name)) == str(examples / name)


def test_flags_of_the_launcher_are_told_from_mistakes():
    assert {"--num_processes", "--main_process_port", "--mixed_precision"} <= launch_flags()
    _, unknown = train.make_parser().parse([*WHAT, "--num_processes", "2", "--seed", "2"])
    assert unknown == ["--num_processes", "2"]


def test_processes_are_started_and_their_status_comes_back(capfd, monkeypatch):
    """With commands that take no time."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    two = ["--num_processes", "2", "--main_process_port", "0"]
    assert launch(["--version"], "multi_gpu", two) == 0
    version = capfd.readouterr().out.split()
    assert len(version) == 2 and version[0] == version[1]
    assert launch(["trian"], "multi_gpu", two) == 2
    assert "Did you mean train?" in capfd.readouterr().err


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
@pytest.mark.parametrize("flags", [["--accelerate_config", "multi_gpu"], ["--num_processes", "2"]], ids=lambda f: f[0])
def test_processes_that_could_not_join_are_refused_with_the_remedy(capsys, monkeypatch, flags):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    status, _, error = run(capsys, "train", *WHAT, *flags)
    assert status == 2 and "there is no GPU here. Add --use_cpu" in error


def test_several_processes_on_cpus_are_started_and_joined_without_mpi(monkeypatch):
    started: list[argparse.Namespace] = []
    monkeypatch.setattr("ddpo_trl.cli.launch.launch_command", started.append)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    for flags in (["--num_processes", "2"], ["--num_processes", "2", "--cpu"]):
        assert launch(["train"], None, flags, use_cpu="--cpu" not in flags) == 0
        assert started[-1].multi_gpu and not started[-1].cpu
        assert os.environ["ACCELERATE_USE_CPU"] == "true"


@pytest.mark.slow
def test_two_processes_train_one_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["--model", tiny, "--prompts", "emoji", "--reward", "brightness", *ROUND, "--output_dir", str(tmp_path)]
    (tmp_path / "two.yaml").write_text("num_processes: 2\naccelerate_config: multi_gpu\nmain_process_port: 0\n")
    argv = ["train", *flags, "--num_train_epochs", "1", "--config", str(tmp_path / "two.yaml")]
    assert cli.main(argv) == 0
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert [log["episode"] for log in state["log_history"] if "reward" in log] == [8]  # 4 on each
    assert (tmp_path / LORA_WEIGHTS_NAME).is_file()


# ---- sample, report, env ----


def test_a_sheet_has_the_prompts_of_the_run_before_and_after(trained, tmp_path, capsys):
    sheet = tmp_path / "new" / "sheet.png"
    status, out, _ = run(capsys, "sample", str(trained), "--use_cpu", "--reward", "brightness", "-o", str(sheet))
    assert (status, out) == (0, f"Saved {sheet}\n")
    assert Image.open(sheet).width > 300
    assert (
        run(capsys, "sample", str(trained / "checkpoint-1"), "--use_cpu", "--prompt", "a", "b", "--dtype", "bfloat16")[
            0
        ]
        == 0
    )
    assert (trained / "checkpoint-1" / "sheet.png").is_file()


def test_its_rows_are_what_plain_diffusers_draws_without_and_with_the_weights(trained, tiny):
    arguments = SampleArguments(use_cpu=True, seed=5, num_seeds=2, batch_size=1)
    rows = make_rows(arguments, load_policy(arguments, trained), None, [("a cat", {}), ("a dog", {})])
    assert [row.title for row in rows] == ["before, seed 5", "after, seed 5", "before, seed 6", "after, seed 6"]
    pipeline = StableDiffusionPipeline.from_pretrained(tiny)
    pipeline.set_progress_bar_config(disable=True)
    settings = json.loads((trained / "ddpo_config.json").read_text())

    def draw(seed: int) -> list[bytes]:
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        options: dict[str, Any] = {name: settings[name] for name in ("num_inference_steps", "guidance_scale")}
        images = pipeline(["a cat", "a dog"], generator=generators, **options).images
        return [image.tobytes() for image in images]

    expected = {"before": [draw(5), draw(6)]}
    pipeline.load_lora_weights(trained)
    expected["after"] = [draw(5), draw(6)]
    for place, row in enumerate(rows):
        assert [image.tobytes() for image in row.images] == expected[row.title.partition(",")[0]][place // 2]
    assert expected["before"] != expected["after"]
    assert [row.rewards for row in rows] == [[None, None]] * 4


def test_weights_in_pefts_format_are_added_as_well(tmp_path):
    """Where diffusers has no LoRA loader for a pipeline."""
    case = next(case for case in IMAGE_CASES if case.name == "PixArt-Sigma")
    trained, fresh = case.build(0), case.build(0)
    adapter = add_adapter(trained, None)
    for layer in adapter_layers(trained.transformer):
        torch.nn.init.normal_(layer.lora_B[adapter].weight)
    save_adapter(trained, adapter, tmp_path)
    with_saved_adapter(fresh, DDPOConfig(str(tmp_path), use_cpu=True, report_to="none"), tmp_path)
    expected, found = (pipeline.transformer.state_dict() for pipeline in (trained, fresh))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_base_pipeline_is_named_by_the_card_or_asked_for(trained, tmp_path, capsys):
    weights = tmp_path / LORA_WEIGHTS_NAME
    weights.write_bytes((trained / LORA_WEIGHTS_NAME).read_bytes())
    status, _, err = run(capsys, "sample", str(tmp_path), "--prompt", "a cat", "--use_cpu")
    assert status == 2 and "give --model" in err
    status, _, err = run(capsys, "sample", str(tmp_path), "--model", "emoji", "--use_cpu")
    assert status == 2 and "give --prompt" in err
    card = ModelCardData(base_model="emoji")
    (tmp_path / "README.md").write_text(f"---\n{card.to_yaml()}\n---\n")
    status, _, err = run(capsys, "sample", str(tmp_path), "--prompt", "a cat", "--use_cpu")
    assert status == 2 and "weights" in err and "don't fit" in err and err.count("\n") == 1  # the tiny pipeline's


def as_kohya(name: str) -> str:
    """A weight's name as kohya's sd-scripts writes it, and A1111 and ComfyUI read it."""
    layer, _, part = name.removeprefix("unet.").rpartition(".lora_")
    return f"lora_unet_{layer.replace('.', '_')}.lora_{'down' if part.startswith('A') else 'up'}.weight"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """LoRA weights of the tiny pipeline that change its images, as diffusers names them."""
    pipeline = tiny_pipeline()
    adapter = add_adapter(pipeline, None)
    torch.manual_seed(1)
    for layer in adapter_layers(pipeline.unet):
        torch.nn.init.normal_(layer.lora_B[adapter].weight, std=0.3)
    return {f"unet.{name}": weight for name, weight in get_peft_model_state_dict(pipeline.unet).items()}


def sheet_of(weights: dict[str, torch.Tensor], folder: Path, tiny: str, capsys: Any) -> tuple[int, str]:
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / LORA_WEIGHTS_NAME)
    status, _, err = run(
        capsys, "sample", str(folder), "--model", tiny, "--prompt", "a cat", "--use_cpu", "--num_inference_steps", "2"
    )
    assert (folder / "sheet.png").is_file() == (status == 0)
    return status, err.splitlines()[-1] if err else ""


def test_weights_of_other_tools_are_converted(weights, tiny, tmp_path, capsys):
    twice = {as_kohya(name): weight for name, weight in weights.items()}
    alphas = {name.partition(".")[0] + ".alpha": torch.tensor(8.0) for name in twice}  # twice the rank
    for folder in ("ours", "theirs"):
        (tmp_path / folder).mkdir()
    ours = {name: weight * (2 if "lora_B" in name else 1) for name, weight in weights.items()}
    assert sheet_of(ours, tmp_path / "ours", tiny, capsys)[0] == 0
    assert sheet_of({**twice, **alphas}, tmp_path / "theirs", tiny, capsys)[0] == 0
    sheets = [Image.open(tmp_path / folder / "sheet.png").tobytes() for folder in ("ours", "theirs")]
    assert sheets[0] == sheets[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {name.replace("unet.", "diffusion_model."): x for name, x in w.items()}, "16 of the 16 weights"),
        (lambda w: {name.replace("unet.", "transformer."): x for name, x in w.items()}, "16 of the 16 weights"),
        (lambda w: {name.removeprefix("unet."): x for name, x in w.items()}, "16 of the 16 weights"),
        (lambda w: {**w, **{f"unet.new.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}}, "2 of the 18"),
        (lambda w: {"lora_unet_mid_block.hada_w1_a": torch.ones(4, 4)}, "don't fit .*hada_w1_a"),
        (lambda w: {"something": torch.ones(1)}, "don't fit .*Invalid LoRA checkpoint"),
        (lambda w: {name: torch.zeros_like(x) for name, x in w.items()}, "change nothing in these images"),
        (lambda w: {name: torch.ones(4, 4) for name in w}, "don't fit .*Give the --model"),
        (lambda w: {name: x + float("nan") for name, x in w.items()}, "not finite"),
    ],
    ids=["ComfyUI", "another denoiser", "no prefix", "layers beside", "LoHa", "no LoRA", "untrained", "sizes", "NaN"],
)  # fmt: skip
def test_weights_that_cant_be_applied_are_no_sheet(weights, tiny, tmp_path, capsys, change, message):
    status, err = sheet_of(change(weights), tmp_path, tiny, capsys)
    assert status == 2
    assert re.search(message, err), err


def test_weights_for_a_text_encoder_are_not_left_out_in_silence(weights, tiny, tmp_path, capsys):
    of_text = {f"text_encoder.encoder.layers.0.self_attn.q_proj.lora_{part}.weight": torch.ones(4, 16) for part in "A"}
    of_text |= {name.replace("lora_A", "lora_B"): weight.T for name, weight in of_text.items()}
    status, err = sheet_of({**weights, **of_text}, tmp_path, tiny, capsys)
    assert status == 2 and (
        "pipeline.text_encoder carries an adapter" in err or "don't fit" in err
    )  # peft or transformers may not load them


def test_videos_are_shown_by_the_frame_in_the_middle():
    video = torch.linspace(0, 1, 5)[None, :, None, None, None].expand(1, 5, 3, 8, 8)
    (image,) = make_row("before", video, None, [("a cat", {})]).images
    assert image.size == (8, 8) and image.getpixel((0, 0)) == (128, 128, 128)


def test_the_report_and_the_environment(trained, tmp_path, capsys):
    status, out, _ = run(capsys, "report", str(trained), "-o", str(tmp_path / "report.html"))
    assert (status, out) == (0, f"Saved {tmp_path / 'report.html'}\n")
    assert "<html" in (tmp_path / "report.html").read_text()
    status, out, _ = run(capsys, "env")
    assert status == 0
    assert f"- torch: {version('torch')}\n" in out  # without the build that torch.__version__ may add


def test_images_are_made_in_batches(trained):
    policy = load_policy(SampleArguments(use_cpu=True), trained)
    pairs: list = [("a cat", {}), ("a dog", {}), ("b", {})]
    whole, parts = (make_images(policy, pairs, 0, size) for size in (3, 2))
    assert whole.shape == (3, 3, 16, 16)
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=0)


def test_a_parser_without_settings_takes_no_file(capsys):
    assert "--config" not in CommandParser([], "ddpo-trl env", "").format_help()


# ---- The page ----

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()


def commands(language: str) -> list[list[str]]:
    blocks = re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]


def test_the_examples_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (settings,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    Path("small-jpegs.yaml").write_text(settings)
    monkeypatch.setenv("WANDB_PROJECT", "")  # so that it is reset: the file sets it
    fewer = ["--num_inference_steps", "2"]
    quick = {"train": [*fewer, "--log_images_rounds", "0"], "sample": fewer}
    for command, *flags in commands("bash"):
        assert cli.main([command, *flags, *quick.get(command, [])]) == 0, flags
    assert Path("outputs/small-jpegs/report.html").is_file()
    assert os.environ["WANDB_PROJECT"] == "small-jpegs"


def test_the_page_names_every_command_and_its_other_examples_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small-jpegs.yaml").write_text("{model: emoji, prompts: emoji, reward: redness}")
    assert {argv[0] for argv in commands("bash") + commands("shell")} == set(cli.COMMANDS)
    for command, *flags in commands("shell"):
        if command == "train":
            parser = train.make_parser()
            flags = [flag for flag in flags if flag != "--bf16"]  # which is refused without a GPU
            parser.parse(flags)
