"""Coming from TRL 0.23 or ddpo-pytorch: every name has its row, and what the settings do stays the same."""

import importlib
import inspect
import json
import re
import runpy
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOConfig, DDPOTrainer
from ddpo_trl.rollout.plan import plan_batches
from ddpo_trl.trl_0_23 import DDPOConfig as OldConfig
from ddpo_trl.trl_0_23 import DDPOTrainer as OldTrainer
from ddpo_trl.trl_0_23 import convert_config


ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
TRL = json.loads((GOLDEN / "trl_0_23_1.json").read_text())  # made from the wheel by the script beside it
PYTORCH = json.loads((GOLDEN / "ddpo_pytorch.json").read_text())
CPU = {"mixed_precision": "no", "use_cpu": True}  # fp16, TRL's default, is for GPUs


def rows(section: str) -> list[list[str]]:
    """The cells of the table in a section of the page."""
    page = (ROOT / "docs" / "migration.md").read_text()
    text = page.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


SECTIONS = ["DDPOConfig", "DDPOTrainer", "DefaultDDPOStableDiffusionPipeline", "ddpo-pytorch"]


def names_of(class_name: str) -> list[str]:
    """What a table should list: methods with their arguments, each argument of a constructor by itself."""
    names = []
    for name, arguments in TRL[class_name].items():
        if name == "__init__":
            names += [f"__init__({argument})" for argument in arguments]
        else:
            names.append(f"{name}({', '.join(arguments)})" if arguments else name)
    return names


# What the trainer inherited from `huggingface_hub`; the wheel of TRL does not show it.
INHERITED = ["save_pretrained(save_directory)", "push_to_hub(repo_id)", "from_pretrained"]


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("DDPOConfig", list(TRL["DDPOConfig"])),
        ("DDPOTrainer", [*names_of("DDPOTrainer"), *INHERITED]),
        ("DefaultDDPOStableDiffusionPipeline", names_of("DefaultDDPOStableDiffusionPipeline")),
        ("ddpo-pytorch", PYTORCH["names"]),
    ],
)
def test_every_name_of_old_has_a_row(section, expected):
    assert [row[0] for row in rows(section)] == [f"`{name}`" for name in expected]


def exists(name: str) -> bool:
    """Whether it is a field of the config, an argument of the trainer, or to be found under its full name."""
    owner, _, member = name.rpartition(".")
    if owner == "trainer":
        return member in dir(DDPOTrainer)
    if owner == "pipeline":
        return member in dir(StableDiffusionPipeline) or member in tiny_pipeline().components
    if owner.startswith("ddpo_trl"):
        return member in vars(importlib.import_module(owner))
    return name in {field.name for field in fields(DDPOConfig)} | inspect.signature(DDPOTrainer).parameters.keys()


@pytest.mark.parametrize("section", SECTIONS)
def test_every_name_of_ours_exists(section):
    for old, ours, _ in rows(section):
        names = re.findall(r"`([^`]+)`", ours)
        assert names or ours == "no counterpart", old
        assert [name for name in names if not exists(name)] == [], old
    assert not exists("num_epochs") and not exists("trainer.step") and not exists("ddpo_trl.rewards.Aesthetic")


def test_the_old_config_has_trls_names_and_defaults():
    ours = vars(OldConfig())
    assert ours.pop("output_dir") is None
    assert ours.keys() == TRL["DDPOConfig"].keys()
    for name, value in TRL["DDPOConfig"].items():
        assert name == "exp_name" or ours[name] == value, name  # TRL's is the name of the script


# What each field of TRL's becomes, alone or with those that it needs.
CONVERSIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "run_name": ({"run_name": "a"}, {"run_name": "a"}),
    "seed": ({"seed": 7}, {"seed": 7}),
    "log_with": ({"log_with": "tensorboard"}, {"report_to": ["tensorboard"]}),
    "project_kwargs": (
        {"project_kwargs": {"project_dir": "save", "total_limit": 3}}, {"output_dir": "save", "save_total_limit": 3},
    ),
    "tracker_project_name": ({"tracker_project_name": "mine"}, {"project": "mine"}),
    "num_epochs": ({"num_epochs": 7}, {"num_train_epochs": 7}),
    "save_freq": ({"save_freq": 7, "num_epochs": 8}, {"save_strategy": "epoch", "save_rounds": 7}),
    "num_checkpoint_limit": ({"num_checkpoint_limit": 2}, {"save_total_limit": 2}),
    "mixed_precision": ({"mixed_precision": "bf16"}, {"bf16": True, "fp16": False}),
    "allow_tf32": ({"allow_tf32": True}, {"tf32": False}),  # on this machine, as TRL did without CUDA
    "resume_from": ({"resume_from": "save"}, {"resume_from_checkpoint": "save"}),
    "sample_num_steps": ({"sample_num_steps": 7}, {"num_inference_steps": 7}),
    "sample_eta": ({"sample_eta": 0.7}, {"eta": 0.7}),
    "sample_guidance_scale": ({"sample_guidance_scale": 7.5}, {"guidance_scale": 7.5}),
    "sample_batch_size": ({"sample_batch_size": 7}, {"per_device_sample_batch_size": 7, "num_mini_batches": 14}),
    "sample_num_batches_per_epoch": (
        {"sample_num_batches_per_epoch": 7}, {"num_sample_batches": 7, "num_mini_batches": 7},
    ),
    "train_batch_size": ({"train_batch_size": 2}, {"per_device_train_batch_size": 2, "num_mini_batches": 1}),
    "train_use_8bit_adam": ({"train_use_8bit_adam": True}, {"optim": "adamw_bnb_8bit"}),
    "train_learning_rate": ({"train_learning_rate": 0.7}, {"learning_rate": 0.7}),
    "train_adam_beta1": ({"train_adam_beta1": 0.7}, {"adam_beta1": 0.7}),
    "train_adam_beta2": ({"train_adam_beta2": 0.7}, {"adam_beta2": 0.7}),
    "train_adam_weight_decay": ({"train_adam_weight_decay": 0.7}, {"weight_decay": 0.7}),
    "train_adam_epsilon": ({"train_adam_epsilon": 0.7}, {"adam_epsilon": 0.7}),
    "train_gradient_accumulation_steps": ({"train_gradient_accumulation_steps": 2}, {"num_mini_batches": 1}),
    "train_max_grad_norm": ({"train_max_grad_norm": 0.7}, {"max_grad_norm": 0.7}),
    "train_num_inner_epochs": ({"train_num_inner_epochs": 7}, {"num_ppo_epochs": 7}),
    "train_adv_clip_max": ({"train_adv_clip_max": 7.0}, {"advantage_clip": 7.0}),
    "train_clip_range": ({"train_clip_range": 0.7}, {"cliprange": 0.7}),
    "train_timestep_fraction": ({"train_timestep_fraction": 0.5}, {"timestep_fraction": 0.5}),
    "per_prompt_stat_tracking": ({"per_prompt_stat_tracking": True}, {"advantage_normalization": "prompt"}),
    "per_prompt_stat_tracking_buffer_size": (
        {"per_prompt_stat_tracking": True, "per_prompt_stat_tracking_buffer_size": 32},
        {"per_prompt_stat_tracking_buffer_size": 32, "per_prompt_stat_tracking_min_count": 16},
    ),
    "per_prompt_stat_tracking_min_count": (
        {"per_prompt_stat_tracking": True, "per_prompt_stat_tracking_min_count": 7},
        {"per_prompt_stat_tracking_min_count": 7},
    ),
    "async_reward_computation": ({"async_reward_computation": True}, {"max_workers": 2}),
    "max_workers": ({"async_reward_computation": True, "max_workers": 7}, {"max_workers": 7}),
    "negative_prompts": ({"negative_prompts": "dull"}, {"pipeline_kwargs": {"negative_prompt": "dull"}}),
    "push_to_hub": ({"push_to_hub": True}, {"push_to_hub": True}),
}  # fmt: skip

WARNINGS: dict[str, tuple[dict[str, Any], str]] = {
    "exp_name": ({"exp_name": "a"}, "run_name"),
    "logdir": ({"logdir": "logs"}, "output_dir"),
    "accelerator_kwargs": ({"accelerator_kwargs": {"cpu": True}}, "accelerate launch"),
    "tracker_kwargs": ({"tracker_kwargs": {"wandb": {}}}, "WANDB_ENTITY"),
    "train_cfg": ({"train_cfg": False}, "same in training"),
    "project_kwargs['logging_dir']": ({"project_kwargs": {"logging_dir": "a"}}, "TENSORBOARD_LOGGING_DIR"),
    "tracker_project_name": ({"tracker_project_name": "a", "log_with": "wandb"}, "WANDB_PROJECT"),
}


def test_no_field_is_forgotten():
    assert CONVERSIONS.keys() | WARNINGS.keys() >= TRL["DDPOConfig"].keys()


@pytest.mark.filterwarnings("error::UserWarning:test_migration")
def test_every_field_becomes_ours_without_a_warning():
    default = vars(convert_config(**CPU))
    found, without_effect = {}, set()
    for name, (given, expected) in CONVERSIONS.items():
        config = vars(convert_config(**{**CPU, **given}))
        found[name] = {ours: config[ours] for ours in expected}
        if {ours: default[ours] for ours in expected} == expected:
            without_effect.add(name)
    assert found == {name: expected for name, (_, expected) in CONVERSIONS.items()}
    assert without_effect <= {"allow_tf32", "tracker_project_name"}


def test_every_field_without_counterpart_gives_a_warning_that_tells_what_to_do():
    for name, (given, remedy) in WARNINGS.items():
        message = re.escape(f"TRL's {name} has no counterpart: ") + f".*{remedy}"
        with pytest.warns(UserWarning, match=message) as warned:
            convert_config(**CPU, **given)
        assert warned[0].filename == __file__


def test_what_is_left_out_has_trls_default():
    config = convert_config(use_cpu=True)
    assert (config.seed, config.fp16, config.per_device_sample_batch_size, config.num_sample_batches) == (
        0,
        True,
        1,
        2,
    )
    assert config.max_workers == 1  # one call of the reward function at a time, as in TRL without async
    assert config.save_strategy == "epoch" and config.output_dir == "trainer_output"


def test_our_own_fields_are_taken_too_and_win():
    config = convert_config(**CPU, num_epochs=5, use_lora=False, output_dir="out", num_train_epochs=3)
    assert (config.use_lora, config.output_dir, config.num_train_epochs) == (False, "out", 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sample_steps": 5}, "sample_steps is a field neither of TRL's .* Did you mean sample_num_steps"),
        ({"num_inference_step": 5}, "Did you mean num_inference_steps"),
        ({"zzz": 5}, "zzz is a field neither of TRL's DDPOConfig nor of ours.$"),
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8'; give one of no, fp16, bf16"),
        ({"sample_batch_size": 6, "train_batch_size": 5}, "12 samples don't divide .* = 5"),
    ],
)
def test_what_trl_never_had_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        convert_config(**{**CPU, **given})


# (sample_batch_size, sample_num_batches_per_epoch, train_batch_size, train_gradient_accumulation_steps,
# train_num_inner_epochs, sample_num_steps, train_timestep_fraction) -> calls of `optimizer.step` in one epoch, and
# timesteps trained of each sample, as counted in TRL 0.23.1 while it trained the pipeline of conftest.py.
COUNTED_IN_TRL = [
    ((6, 4, 3, 1, 1, 4, 1.0), 8, 4),
    ((4, 2, 2, 2, 1, 4, 1.0), 2, 4),
    ((4, 2, 2, 2, 3, 4, 0.5), 6, 2),
    ((1, 2, 1, 1, 1, 3, 1.0), 2, 3),
    ((8, 1, 4, 2, 2, 5, 0.5), 2, 2),
    ((4, 3, 1, 6, 1, 4, 0.3), 2, 1),
]


def config_of(sizes: tuple[float, ...], **ours: Any) -> DDPOConfig:
    names = (
        "sample_batch_size", "sample_num_batches_per_epoch", "train_batch_size", "train_gradient_accumulation_steps",
        "train_num_inner_epochs", "sample_num_steps", "train_timestep_fraction",
    )  # fmt: skip
    return convert_config(**dict(zip(names, sizes, strict=True)), **CPU, num_epochs=1, **ours)


@pytest.mark.parametrize(("sizes", "updates", "timesteps"), COUNTED_IN_TRL)
def test_a_round_has_as_many_optimizer_steps_as_in_trl(sizes, updates, timesteps):
    config = config_of(sizes)
    plan = plan_batches(config, stds=[1.0] * config.num_inference_steps)
    assert (plan.updates_per_round, plan.transitions_per_sample) == (updates, timesteps)


def test_a_converted_config_makes_the_planned_optimizer_steps(tmp_path):
    sizes, updates, _ = COUNTED_IN_TRL[2]
    config = config_of(sizes, output_dir=str(tmp_path), disable_tqdm=True, log_images_rounds=0)
    trainer = DDPOTrainer(config, brightness, ["cat", "dog"], tiny_pipeline())
    trainer.train()
    assert trainer.state.global_step == updates


# ---- An old script ----

IMPORT = "from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline\n"
PIPELINE = """    pipeline = DefaultDDPOStableDiffusionPipeline(
        script_args.pretrained_model, pretrained_model_revision=script_args.pretrained_revision
    )
"""
NEW_IMPORT = """from ddpo_trl.trl_0_23 import DDPOConfig, DDPOTrainer
from diffusers import StableDiffusionPipeline
"""
NEW_PIPELINE = """    pipeline = StableDiffusionPipeline.from_pretrained(
        script_args.pretrained_model, revision=script_args.pretrained_revision
    )
"""


def run_old_script(directory: Path, model: Path, *flags: str) -> None:
    """As its users do, but for the two changes."""
    old = (GOLDEN / "trl_0_23_script.py").read_text()
    assert old.count(IMPORT) == old.count(PIPELINE) == 1
    script = directory / "ddpo.py"
    script.write_text(old.replace(IMPORT, NEW_IMPORT).replace(PIPELINE, NEW_PIPELINE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ddpo.py", f"--pretrained_model={model}", *flags])
        patch.chdir(directory)
        runpy.run_path(str(script), run_name="__main__")


FLAGS = (
    "--num_epochs=2", "--train_gradient_accumulation_steps=1", "--sample_num_steps=3", "--sample_batch_size=4",
    "--train_batch_size=2", "--sample_num_batches_per_epoch=2", "--per_prompt_stat_tracking=True",
    "--per_prompt_stat_tracking_buffer_size=32", "--tracker_project_name=stable_diffusion_training",
    "--log_with=tensorboard", "--mixed_precision=no",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def old_run(tmp_path_factory, model) -> Path:
    directory = tmp_path_factory.mktemp("old_run")
    run_old_script(directory, model, *FLAGS)
    return directory


def test_an_old_script_trains_and_saves_with_its_imports_and_pipeline_changed(old_run, model):
    steps = [json.loads((path / "trainer_state.json").read_text())["global_step"] for path in old_run.glob("save/c*")]
    assert sorted(steps) == [4, 8]  # 8 samples a round, 2 in each optimizer step
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.load_lora_weights(old_run / "save")
    moved = [parameter.abs().sum() for name, parameter in pipeline.unet.named_parameters() if "lora_B" in name]
    assert moved and all(total > 0 for total in moved)


def test_an_old_scripts_hook_gets_every_rounds_images_and_its_tracker(old_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(old_run / "logs" / "stable_diffusion_training"))
    events.Reload()
    tags = events.Tags()["images"]
    assert tags and all(re.fullmatch(r"(cat|dog) \| 0\.\d\d \| \d", tag) for tag in tags)
    images = [image for tag in tags for image in events.Images(tag)]
    assert sorted(image.step for image in images) == [0] * 4 + [4] * 4  # the last batch of each round
    assert {(image.width, image.height) for image in images} == {(16, 16)}


def test_an_old_script_resumes_from_its_folder_of_checkpoints(tmp_path, old_run, model):
    run_old_script(tmp_path, model, *FLAGS, "--num_epochs=3", f"--resume_from={old_run / 'save'}")
    state = json.loads((tmp_path / "save" / "checkpoint-12" / "trainer_state.json").read_text())
    assert [log["episode"] for log in state["log_history"] if "episode" in log] == [8, 16, 24]


def old_config(tmp_path: Path, **given: Any) -> OldConfig:
    settings = {"mixed_precision": "no", "num_epochs": 1, "sample_num_steps": 2, "output_dir": str(tmp_path)}
    return OldConfig(**{**settings, **given})


def test_old_arguments_are_taken_by_name_and_train_takes_epochs(tmp_path):
    trainer = OldTrainer(
        config=old_config(tmp_path),
        reward_function=lambda images, prompts, metadata: (images.mean((1, 2, 3)), {}),
        prompt_function=lambda: ("cat", {}),
        sd_pipeline=tiny_pipeline(),
    )
    trainer.train(2)
    assert trainer.state.epoch == 2


def test_without_lora_the_whole_denoiser_is_trained(tmp_path):
    pipeline = tiny_pipeline()
    before = pipeline.unet.conv_in.weight.detach().clone()
    config = old_config(tmp_path, train_learning_rate=1e-2)
    OldTrainer(config, brightness, lambda: ("cat", {}), pipeline, use_lora=False).train()
    assert not torch.equal(pipeline.unet.conv_in.weight, before)


def test_the_hook_is_given_what_the_reward_function_saw_and_said(tmp_path):
    seen, told = [], []

    def reward(images, prompts, metadata):
        seen.append((images, prompts, metadata))
        return [len(seen), 2 * len(seen)], {"call": len(seen)}

    config = old_config(
        tmp_path, log_with="tensorboard", sample_batch_size=2, num_epochs=2, train_batch_size=2, save_freq=2
    )
    trainer = OldTrainer(config, reward, lambda: ("cat", {"a": 1}), tiny_pipeline(), lambda *given: told.append(given))
    trainer.train()
    assert [step for _, step, _ in told] == [0, 2]
    batches = [batch for data, _, _ in told for batch in data]
    assert len(batches) == 4  # two per round
    for images, prompts, metadata, rewards, info in batches:
        call = info["call"]
        assert torch.equal(images, seen[call - 1][0])
        assert (prompts, metadata) == (("cat", "cat"), ({"a": 1}, {"a": 1}))
        assert rewards.tolist() == [call, 2 * call]
    assert {type(tracker).__name__ for _, _, tracker in told} == {"TensorBoardTracker"}
    assert trainer.scorer.names == ["reward"]


def test_a_hook_without_a_tracker_is_refused(tmp_path):
    with pytest.raises(ValueError, match="image_samples_hook .* log_with"):
        OldTrainer(old_config(tmp_path), brightness, lambda: ("cat", {}), tiny_pipeline(), lambda *given: None)
