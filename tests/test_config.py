"""DDPOConfig: its defaults, what it refuses, and its command line."""

import ast
import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import TrainingArguments
from trl import TrlParser

from conftest import brightness, needs_newest, tiny_pipeline
from ddpo_trl import DDPOConfig, DDPOTrainer
from ddpo_trl.config_checks import WITHOUT_EFFECT, check_relations
from ddpo_trl.settings import NUMBERS


OWN_FIELDS = [field for field in dataclasses.fields(DDPOConfig) if field.name in inspect.get_annotations(DDPOConfig)]


def parse(*arguments: str, output_dir: Path) -> DDPOConfig:
    (config,) = TrlParser(DDPOConfig).parse_args_and_config(["--output_dir", str(output_dir), "--use_cpu", *arguments])
    return config


# ---- Defaults ----


def test_the_defaults_are_those_of_the_design_and_the_measured_ones(tmp_path):
    expected = {
        "loss_type": "is",
        "num_train_epochs": 100,
        "total_episodes": None,
        "num_inference_steps": 50,
        "guidance_scale": 5.0,
        "eta": 1.0,
        "num_ppo_epochs": 1,
        "num_mini_batches": 4,  # benchmarks/defaults.py
        "cliprange": 1e-4,
        "log_prob_reduction": "mean",
        "advantage_normalization": "prompt",  # benchmarks/defaults.py
        "advantage_clip": 5.0,
        "on_invalid_reward": "raise",
        "reward_timeout": None,
        "per_prompt_stat_tracking_buffer_size": 16,
        "per_prompt_stat_tracking_min_count": 16,
        "timestep_fraction": 1.0,
        "train_timestep_range": [0.0, 1.0],
        "kl_coef": 0.0,
        "noise_level": 0.7,  # Flow-GRPO's
        "sde_type": "sde",
        "sde_window_size": None,
        "sde_window_strategy": "fixed",
        "sde_window_interval": 25,  # MixGRPO's
        "pipeline_inputs": None,
        "offload_text_encoders": False,
        "gradient_accumulation_steps": 1,  # derived
        "save_strategy": "epoch",  # between rounds
    }
    config = vars(DDPOConfig(output_dir=str(tmp_path), use_cpu=True))
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("settings", "updates"),
    [
        ({}, 4),  # 32 samples per round, micro-batches of 4
        ({"num_sample_batches": 2}, 2),
        ({"num_sample_batches": 3}, 1),
        ({"num_mini_batches": 8}, 8),
        ({"loss_type": "sf"}, 1),
        ({"one_pass": True}, 1),
    ],
)
def test_a_round_has_four_updates_where_it_divides_into_them_unless_one_is_asked_for(tmp_path, settings, updates):
    config = DDPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    assert config.num_mini_batches == config.updates_per_round == updates


def test_ranges_of_two_configs_are_two_lists(tmp_path):
    first, second = (DDPOConfig(output_dir=str(tmp_path), use_cpu=True) for _ in range(2))
    first.train_timestep_range[1] = 0.5
    assert second.train_timestep_range == [0.0, 1.0]


def test_updates_of_a_round_are_passes_times_mini_batches(make_config):
    for passes, mini_batches, updates in [(1, 1, 1), (1, 4, 4), (3, 2, 6)]:
        assert make_config(num_ppo_epochs=passes, num_mini_batches=mini_batches).updates_per_round == updates


# ---- Refusals: the argument, its value, the remedy ----

AT_LEAST_ONE = [
    "num_inference_steps",
    "per_device_sample_batch_size",
    "num_sample_batches",
    "num_images_per_prompt",
    "per_device_train_batch_size",
    "num_ppo_epochs",
    "num_mini_batches",
    "max_workers",
    "per_prompt_stat_tracking_buffer_size",
    "per_prompt_stat_tracking_min_count",
    "sde_window_interval",
    "sde_window_size",
    "eval_rounds",
    "num_logged_images",
    "save_rounds",
]


@pytest.mark.parametrize("name", AT_LEAST_ONE)
def test_counts_below_one_are_refused(make_config, name):
    for value in (0, -3):
        with pytest.raises(ValueError, match=f"^{name} is {value}; it must be at least 1"):
            make_config(**{name: value})


NAN = float("nan")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eta": 0.0}, r"eta is 0\.0: a step without noise is not a policy\. Set eta above 0"),
        ({"eta": -1.0}, r"eta is -1\.0"),
        ({"eta": NAN}, r"eta is nan"),
        (
            {"noise_level": 0.0},
            r"noise_level is 0\.0: a step without noise is not a policy\. Set noise_level above 0",
        ),
        ({"noise_level": -0.7}, r"noise_level is -0\.7"),
        ({"noise_level": NAN}, r"noise_level is nan"),
        (
            {"noise_level": 1.1, "sde_type": "cps"},
            r"noise_level is 1\.1 with sde_type='cps', .*Set it to 1\.0 or below",
        ),
        ({"sde_type": "ode"}, r"sde_type is 'ode'; choose one of 'sde', 'cps'"),
        (
            {"sde_window_strategy": "sliding"},
            r"sde_window_strategy is 'sliding'; choose one of 'fixed', 'progressive', 'random'",
        ),
        ({"cliprange": 0.0}, r"cliprange is 0\.0; it must be above 0"),
        ({"cliprange": NAN}, r"cliprange is nan"),
        ({"advantage_clip": -5.0}, r"advantage_clip is -5\.0; it must be above 0"),
        ({"on_invalid_reward": "ignore"}, r"on_invalid_reward is 'ignore'; choose one of 'raise', 'drop'"),
        ({"reward_timeout": 0}, r"reward_timeout is 0; it must be above 0, finite or None"),
        ({"reward_timeout": -1.5}, r"reward_timeout is -1\.5; it must be"),
        ({"reward_timeout": NAN}, r"reward_timeout is nan; it must be"),
        ({"reward_timeout": float("inf")}, r"reward_timeout is inf; .* finite or None"),
        ({"total_episodes": 0}, r"total_episodes is 0; it must be at least 1 or None"),
        ({"kl_coef": -0.1}, r"kl_coef is -0\.1; it must be at least 0, finite"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be at least 0, finite"),
        ({"weight_decay": float("inf")}, "weight_decay is inf; it must be at least 0, finite"),
        (
            {"auto_find_batch_size": True},
            "auto_find_batch_size is True, which would do nothing here: the batch plan is made once.*Leave it out",
        ),
        ({"max_grad_norm": float("nan")}, "max_grad_norm is nan; it must be above 0, or 0 for no clipping"),
        ({"log_images_rounds": -1}, r"log_images_rounds is -1; it must be at least 0"),
        ({"timestep_fraction": 0.0}, r"timestep_fraction is 0\.0; it must be above 0, at most 1"),
        ({"timestep_fraction": 1.5}, r"timestep_fraction is 1\.5; it must be above 0, at most 1"),
        ({"timestep_fraction": NAN}, r"timestep_fraction is nan"),
        ({"train_timestep_range": [0.5, 0.5]}, r"train_timestep_range is \[0\.5, 0\.5\]; .*0 <= first < second <= 1"),
        ({"train_timestep_range": [0.8, 0.2]}, r"train_timestep_range is \[0\.8, 0\.2\]"),
        ({"train_timestep_range": [-0.1, 0.2]}, r"train_timestep_range is \[-0\.1, 0\.2\]"),
        ({"train_timestep_range": [0.0, 1.1]}, r"train_timestep_range is \[0\.0, 1\.1\]"),
        ({"train_timestep_range": [0.8]}, r"train_timestep_range is \[0\.8\]; it must be two numbers"),
        ({"train_timestep_range": [0.0, 0.5, 1.0]}, r"train_timestep_range is .*; it must be two numbers"),
        (
            {"per_prompt_stat_tracking_min_count": 17},
            r"min_count is 17, more than the 16 rewards .*Raise per_prompt_stat_tracking_buffer_size or lower",
        ),
        ({"loss_type": "ppo"}, r"loss_type is 'ppo'; choose one of 'is', 'sf'"),
        (
            {"advantage_normalization": "rank"},
            r"advantage_normalization is 'rank'; choose one of 'batch', 'prompt', 'group', 'none'",
        ),
        ({"log_prob_reduction": "none"}, r"log_prob_reduction is 'none'; choose one of 'mean', 'sum'"),
        (
            {"loss_type": "sf", "num_mini_batches": 4},
            r"loss_type is 'sf' with num_ppo_epochs=1 and num_mini_batches=4: .*Set both to 1, or loss_type='is'",
        ),
        ({"loss_type": "sf", "num_ppo_epochs": 2}, r"loss_type is 'sf' with num_ppo_epochs=2 and num_mini_batches=1"),
        (
            {"advantage_normalization": "group"},
            r"advantage_normalization is 'group' with num_images_per_prompt=1: .*Set num_images_per_prompt to 2",
        ),
        ({"pipeline_kwargs": "height=64"}, r"pipeline_kwargs is 'height=64'; give a dict, or .* a JSON object"),
        ({"pipeline_kwargs": [64]}, r"pipeline_kwargs is \[64\]; give a dict"),
        (
            {"pipeline_kwargs": {"height": 64, "latents": None, "eta": 0.0}},
            r"pipeline_kwargs holds eta, latents, which the trainer sets itself",
        ),
        (
            {"pipeline_inputs": ["image", "prompt", "latents"]},
            r"pipeline_inputs holds latents, prompt, which the trainer sets itself",
        ),
        (
            {"pipeline_inputs": ["image", "mask_image"], "pipeline_kwargs": {"strength": 0.5, "image": 1}},
            r"^image is in pipeline_kwargs and in pipeline_inputs; .*Leave it out of one",
        ),
        ({"gradient_accumulation_steps": 8}, r"gradient_accumulation_steps is 8, but it is derived: .*Leave it at 1"),
        ({"save_strategy": "steps"}, r"save_strategy is 'steps': a checkpoint inside a round .*save_strategy='epoch'"),
        (
            {"save_strategy": "best", "metric_for_best_model": "reward"},
            r"save_strategy is 'best' with eval_strategy=.*Set eval_strategy='epoch'",
        ),
        (
            {"max_steps": 6, "num_mini_batches": 4},
            r"max_steps is 6, which ends inside a round of 4 optimizer steps .*Set a multiple",
        ),
        ({"target_kl": 0.0, "num_mini_batches": 2}, r"target_kl is 0\.0; it must be above 0 or None"),
        ({"target_kl": -1e-8, "num_mini_batches": 2}, r"target_kl is -1e-08; it must be above 0"),
        ({"target_kl": NAN, "num_mini_batches": 2}, r"target_kl is nan; it must be above 0"),
        (
            {"target_kl": 1e-8},
            r"target_kl is set with one update per round, .*Raise num_ppo_epochs or num_mini_batches",
        ),
        ({"target_kl": 1e-8, "loss_type": "sf"}, r"target_kl is set with loss_type='sf', .*or set loss_type='is'"),
        (
            {"target_kl": 1e-8, "num_mini_batches": 2, "fp16": True},
            r"target_kl is set, but the loss scaler of fp16 .*Use bf16 or float32",
        ),
        ({"eval_rounds": 2}, r"eval_rounds is 2, but eval_strategy is not 'epoch': .*Set eval_strategy='epoch'"),
        ({"save_rounds": 2, "save_strategy": "no"}, r"save_rounds is 2, .*Set save_strategy='epoch'"),
        (
            {"eval_strategy": "steps", "eval_steps": 4},
            r"eval_strategy is 'steps', .*eval_strategy='epoch'.*eval_rounds",
        ),
        ({"enable_jit_checkpoint": True}, r"enable_jit_checkpoint is True: .*inside a round.*stop_on_signal"),
        ({"stop_on_signal": ["SIGNAL"]}, r"stop_on_signal holds 'SIGNAL', .*'SIGTERM' or 'SIGUSR1'"),
        (
            {"stop_on_signal": "SIGKILL"},
            r"stop_on_signal holds 'SIGKILL', which is not a signal that can be waited for",
        ),
        (
            {"logging_steps": 10},
            r"logging_steps is 10, which does nothing with logging_strategy='epoch': set logging_str",
        ),
        ({"eval_steps": 10}, r"eval_steps is 10, which does nothing with eval_strategy='no': .*set eval_rounds"),
        ({"save_steps": 10}, r"save_steps is 10, which does nothing with save_strategy='no': .*set save_rounds"),
        (
            {"pipeline_kwargs": '{"height": 64'},
            r"pipeline_kwargs is '{\"height\": 64'; give a dict, or .* a JSON object",
        ),
        ({"num_train_epochs": 2.5}, r"num_train_epochs is 2\.5; a run has a whole number of rounds"),
    ],
)
def test_what_cannot_be_trained_is_refused(make_config, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_config(**arguments)


@pytest.mark.parametrize(
    ("name", "value"), [("pipeline_inputs", "image"), ("reward_weights", 0.5), ("train_timestep_range", 0.8)]
)
def test_a_single_value_where_a_list_is_meant_is_refused_with_the_list(make_config, name, value):
    with pytest.raises(TypeError, match=re.escape(f"{name} is {value!r}; give a list, such as [{value!r}]")):
        make_config(**{name: value})


@pytest.mark.parametrize(
    "arguments",
    [
        {"loss_type": "sf", "num_ppo_epochs": 1, "num_mini_batches": 1},
        {"loss_type": "is", "num_ppo_epochs": 2, "num_mini_batches": 4},
        {"advantage_normalization": "group", "num_images_per_prompt": 2},
        {"advantage_clip": float("inf")},
        {"pipeline_kwargs": {"height": 64, "negative_prompt": "blurry"}},
        {"pipeline_kwargs": {"timesteps": [999, 500, 100]}},
        {"pipeline_kwargs": {"sigmas": [1.0, 0.5, 0.1]}},
        {"pipeline_kwargs": {"strength": 0.5}, "pipeline_inputs": ["image"]},
        {"noise_level": 1.0, "sde_type": "cps"},
        {"noise_level": 1.1, "sde_type": "sde"},
        {"guidance_scale": None},
        {"on_invalid_reward": "drop", "reward_timeout": 0.01},
        {"sde_window_size": 1, "sde_window_strategy": "random", "sde_window_interval": 1},
        {"save_strategy": "best", "eval_strategy": "epoch", "metric_for_best_model": "reward"},
        {"target_kl": 1e-12, "num_ppo_epochs": 2},
        {"target_kl": float("inf"), "num_mini_batches": 2},
        {"eval_rounds": 3, "eval_strategy": "epoch"},
        {"save_rounds": 3, "save_strategy": "epoch"},
        {"stop_on_signal": ["SIGUSR1", "SIGTERM"]},
        {"stop_on_signal": []},
        {"max_steps": 8, "num_mini_batches": 4},
        {"num_train_epochs": 3.0},
        {"train_timestep_range": (0.0, 0.8)},
    ],
)
def test_what_stands_just_inside_the_limits_is_accepted(make_config, arguments):
    config = make_config(**arguments)
    assert {name: vars(config)[name] for name in arguments} == arguments


# ---- The command line ----


def test_every_field_of_ours_is_a_flag():
    flags = {flag for action in TrlParser(DDPOConfig)._actions for flag in action.option_strings}
    assert {f"--{field.name}" for field in OWN_FIELDS} <= flags


def test_values_come_from_the_command_line(tmp_path):
    config = parse(
        *("--loss_type", "sf"),
        *("--train_timestep_range", "0.1", "0.8"),
        *("--pipeline_kwargs", '{"height": 64, "negative_prompt": "blurry"}'),
        *("--reward_weights", "1", "-0.5"),
        *("--total_episodes", "640"),
        *("--use_lora", "false"),
        *("--cliprange", "1e-3"),
        *("--pipeline_inputs", "image", "mask_image"),
        *("--sde_window_size", "2"),
        *("--on_invalid_reward", "drop"),
        *("--reward_timeout", "30"),
        *("--sde_window_strategy", "progressive"),
        output_dir=tmp_path,
    )
    assert config.loss_type == "sf"
    assert config.train_timestep_range == [0.1, 0.8]
    assert config.pipeline_kwargs == {"height": 64, "negative_prompt": "blurry"}
    assert config.reward_weights == [1.0, -0.5]
    assert config.total_episodes == 640
    assert config.use_lora is False
    assert config.cliprange == 1e-3
    assert config.pipeline_inputs == ["image", "mask_image"]
    assert config.sde_window_size == 2
    assert config.on_invalid_reward == "drop"
    assert config.reward_timeout == 30.0
    assert config.sde_window_strategy == "progressive"


def test_an_empty_command_line_gives_the_defaults(tmp_path):
    parsed = parse(output_dir=tmp_path)
    expected = DDPOConfig(output_dir=str(tmp_path), use_cpu=True)
    assert all(vars(parsed)[field.name] == vars(expected)[field.name] for field in OWN_FIELDS)


def test_values_come_from_a_yaml_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("eta: 0.5\ntrain_timestep_range: [0.0, 0.8]\npipeline_kwargs: {height: 64}\nnum_mini_batches: 4\n")
    config = parse("--config", str(file), "--num_mini_batches", "2", output_dir=tmp_path)
    assert (config.eta, config.train_timestep_range, config.pipeline_kwargs) == (0.5, [0.0, 0.8], {"height": 64})
    assert config.num_mini_batches == 2  # the command line wins


def test_choices_are_checked_on_the_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse("--loss_type", "ppo", output_dir=tmp_path)
    assert re.search("argument --loss_type.*: invalid choice: 'ppo'", capsys.readouterr().err)


# ---- The fields of TrainingArguments ----

# Used by the Trainer or by us; "script" are those that transformers leaves to the user's script.
USED = {
    "run": "output_dir num_train_epochs max_steps seed full_determinism use_cpu resume_from_checkpoint "
    "restore_callback_states_from_checkpoint debug skip_memory_metrics local_rank",
    "batches and memory": "per_device_train_batch_size per_device_eval_batch_size torch_empty_cache_steps "
    "gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs "
    "bf16 fp16 tf32 torch_compile torch_compile_backend torch_compile_mode",
    "optimizer": "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay "
    "adam_beta1 adam_beta2 adam_epsilon optim_target_modules max_grad_norm",
    "logs": "logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica "
    "disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id",
    "evaluation": "eval_strategy eval_delay eval_on_start metric_for_best_model greater_is_better "
    "load_best_model_at_end",
    "saving": "save_strategy save_only_model save_on_each_node save_total_limit push_to_hub hub_token "
    "hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
    "processes": "accelerator_config ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
    "ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed",
    "script": "do_train do_eval do_predict",
}

# Whichever value they have, it is what happens: no column is removed, no memory pinned, no data to skip.
TRUE_EITHER_WAY = {"remove_unused_columns", "dataloader_pin_memory", "ignore_data_skip"}

# Refused with a reason of their own, and the value that is.
REFUSED: dict[str, dict[str, Any]] = {
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "logging_nan_inf_filter": {"logging_nan_inf_filter": True},
    "enable_jit_checkpoint": {"enable_jit_checkpoint": True},
    "eval_steps": {"eval_steps": 3},
    "save_steps": {"save_steps": 3},
}

# Fields of older versions, which their Trainer uses.
OF_OLDER_VERSIONS = {"logging_dir", "warmup_ratio"}

OTHER_VALUES: dict[str, Any] = {
    "include_num_input_tokens_seen": "all",
    "include_for_metrics": ["inputs"],
    "label_names": ["labels"],
    "length_column_name": "size",
    "liger_kernel_config": {"rope": True},
    "parallelism_config": object(),
    "train_sampling_strategy": "sequential",
    "dataloader_multiprocessing_context": "fork",
    "data_seed": 3,
    "dataloader_num_workers": 2,
    "dataloader_prefetch_factor": 2,
    "eval_accumulation_steps": 2,
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
}


def test_every_field_of_training_arguments_is_used_or_refused():
    """One that a release of transformers adds has to be looked at, and put into one of these lists."""
    used = {name for names in USED.values() for name in names.split()}
    classes = [used, TRUE_EITHER_WAY, {*REFUSED}, {*WITHOUT_EFFECT}]
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert fields <= set().union(*classes) | OF_OLDER_VERSIONS
    assert sum(map(len, classes)) == len(set().union(*classes))


@needs_newest("older versions have fewer fields")
def test_no_field_is_listed_that_does_not_exist():
    used = {name for names in USED.values() for name in names.split()}
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert used | TRUE_EITHER_WAY | {*REFUSED, *WITHOUT_EFFECT} <= fields


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_a_setting_that_would_do_nothing_is_refused_with_what_to_do(make_config, name):
    if name not in (defaults := vars(TrainingArguments())):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    default = defaults[name]
    make_config(**{name: default})
    if default is True:
        make_config(**{name: False})  # asks for nothing
        return
    value = OTHER_VALUES.get(name, True)
    assert value != default
    with pytest.raises(ValueError, match=rf"{name} is .*, which would do nothing here: .{{10,}}\. Leave it out\."):
        make_config(**{name: value})


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_would_break_rounds_is_refused(make_config, name):
    with pytest.raises(ValueError, match=f"{name} is"):
        make_config(**REFUSED[name])


def test_images_of_an_evaluation_are_made_in_batches_of_their_own_size(make_config):
    assert make_config().per_device_eval_batch_size == make_config().per_device_sample_batch_size == 4
    sizes = []

    def reward(images, prompts, metadata):
        sizes.append(len(images))
        return brightness(images, prompts, metadata)

    config = make_config(per_device_eval_batch_size=3)
    DDPOTrainer(config, reward, ["cat"], tiny_pipeline(), eval_prompts=["owl"] * 6).generate_samples()
    assert sizes == [3, 3]


def test_no_number_may_be_nan_or_a_text_and_no_count_a_fraction(make_config):
    """YAML takes 1e-4 for a text."""
    fields = [field for field in dataclasses.fields(DDPOConfig) if field.name not in OF_OLDER_VERSIONS]
    kinds = {field.name: field.type for field in fields if field.type in NUMBERS}
    assert len(kinds) > 30
    for name, kind in kinds.items():
        with pytest.raises(TypeError, match=rf"{name} is '1e-4'; give an? .*In YAML, 1e-4 is a text"):
            make_config(**{name: "1e-4"})
        wrong = TypeError if NUMBERS[kind][1] == "an integer" else ValueError
        with pytest.raises(wrong, match=f"{name} is nan"):
            make_config(**{name: NAN, **({"num_mini_batches": 2} if name == "target_kl" else {})})
    with pytest.raises(TypeError, match="num_sample_batches is 2.0; give an integer"):
        make_config(num_sample_batches=2.0)


def test_settings_are_written_as_json_whatever_pipeline_kwargs_hold(make_config):
    """The same arguments are described alike, other ones are not."""

    def written(colour: int, number: float = 0.5, scale: float = 1.0) -> str:
        return make_config(
            pipeline_kwargs={
                "image": Image.new("L", (4, 2), colour),
                "strength": np.float32(number),
                "mask": torch.ones(2, dtype=torch.bfloat16) * scale,
                "sizes": (np.int64(3), [np.zeros(2)]),
                "callback_on_step_end": written,
            },
            learning_rate=np.float64(0.1),
        ).to_json_string()

    settings = json.loads(written(0))
    assert settings["pipeline_kwargs"]["strength"] == 0.5 and settings["learning_rate"] == 0.1
    assert settings["pipeline_kwargs"]["sizes"][0] == 3
    assert settings["pipeline_kwargs"]["image"].startswith("<L image of 4x2 pixels")
    assert "written" in settings["pipeline_kwargs"]["callback_on_step_end"]
    assert written(0) == written(0)
    assert len({written(0), written(1), written(0, number=0.25), written(0, scale=2.0)}) == 4


# ---- Documentation ----


def test_every_field_has_a_help_text():
    assert [field.name for field in OWN_FIELDS if not field.metadata.get("help", "").endswith(".")] == []


def documented_defaults() -> dict[str, Any]:
    """The default that the docstring states for each field; `None` where it is only *optional*."""
    entries = re.findall(r"^ {8}(\w+) \((.*?)\):$", DDPOConfig.__doc__ or "", flags=re.MULTILINE)
    stated = {name: re.search(r"defaults to `(.*)`$", description) for name, description in entries}
    return {name: ast.literal_eval(match.group(1)) if match else None for name, match in stated.items()}


def test_every_field_is_documented_with_its_default_and_nothing_else_is():
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in OWN_FIELDS
    }
    assert documented_defaults() == defaults


def test_no_field_shadows_one_of_the_trainer_but_for_its_default():
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {field.name for field in OWN_FIELDS} & inherited == {
        "num_train_epochs",
        "per_device_eval_batch_size",
        "learning_rate",
        "weight_decay",
        "lr_scheduler_type",
        "per_device_train_batch_size",
        "save_strategy",
        "logging_nan_inf_filter",
        "save_total_limit",
        "restore_callback_states_from_checkpoint",
        "logging_strategy",
        "metric_for_best_model",
    }


@pytest.mark.parametrize("keeps_the_best", [{"load_best_model_at_end": True}, {"save_strategy": "best"}])
def test_the_best_is_that_of_the_evaluation_reward_unless_said_otherwise(make_config, keeps_the_best):
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", **keeps_the_best}
    config = make_config(**settings)
    assert (config.metric_for_best_model, config.greater_is_better) == ("eval_reward", True)
    assert make_config(**settings, metric_for_best_model="eval_diversity").metric_for_best_model == "eval_diversity"
    assert make_config().metric_for_best_model is None


def test_target_kl_is_refused_under_deepspeed(make_config):
    config = make_config(target_kl=1e-8, num_mini_batches=2)
    config.deepspeed_plugin = object()  # as TrainingArguments sets it, which needs the package
    with pytest.raises(ValueError, match="target_kl is set, but DeepSpeed makes the optimizer step"):
        check_relations(config)


@needs_newest("older versions of Trainer fill fsdp_config, which is then shown too")
def test_a_config_is_shown_by_what_differs_from_the_defaults(make_config):
    config = DDPOConfig(output_dir="run", use_cpu=True, eta=0.5, stop_on_signal=[], bf16=True)
    assert repr(config) == (
        "DDPOConfig(output_dir='run', bf16=True, use_cpu=True, eta=0.5, num_mini_batches=4, stop_on_signal=[])"
    )
