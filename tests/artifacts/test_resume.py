"""A run that is killed at any moment and started again ends as if it had never been interrupted, to the bit."""

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import kill_a_run
from conftest import brightness, needs_newest, tiny_pipeline
from ddpo_trl import DDPOConfig, DDPOTrainer
from ddpo_trl.artifacts import checkpoints, resuming


ROUNDS = 6

# A round samples two batches, scores two, writes and synchronises ten files, and has 16 micro-batches in two passes.
KILLS = {
    "one pass": [
        ("sampling with gradients", 1),
        ("weighting gradients", 1),
        ("saving weights", 1),
        ("publishing", 1),
        ("synchronising", 14),
    ],
    "two passes": [
        ("sampling", 1),
        ("scoring", 2),
        ("training", 5),
        ("saving the rest", 1),
        ("synchronising", 4),
        ("rotating", 2),
    ],
}


@pytest.mark.parametrize("passes", [pytest.param("one pass", marks=pytest.mark.slow), "two passes"])
def test_a_run_killed_at_every_stage_of_a_round_equals_one_never_interrupted(tmp_path, passes):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert kill_a_run.run_until_done(whole, ROUNDS, [], passes) == 0
    assert kill_a_run.run_until_done(parts, ROUNDS, KILLS[passes], passes) == len(KILLS[passes])
    expected, resumed = (torch.load(run / kill_a_run.RESULT, weights_only=False) for run in (whole, parts))
    assert len(expected["logs"]) == ROUNDS + 1  # and the summary
    for name, value in expected.items():
        assert kill_a_run.equal(value, resumed[name]), name


def test_a_run_killed_when_all_its_work_was_done_resumes_to_the_same_end(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert kill_a_run.run_until_done(whole, 2, []) == 0
    assert kill_a_run.run_until_done(killed, 2, [("rotating", 2)]) == 1
    expected, resumed = (torch.load(run / kill_a_run.RESULT, weights_only=False) for run in (whole, killed))
    assert [name for name in expected if not kill_a_run.equal(expected[name], resumed[name])] == []


def test_the_comparison_tells_runs_apart(tmp_path):
    """The control: another seed is another run in every part but the schedule of the learning rate."""
    results = []
    for seed in (42, 43):
        trainer = kill_a_run.make_trainer(tmp_path / str(seed), rounds=1, seed=seed)
        trainer.train()
        results.append(kill_a_run.result(trainer))
    same = {name for name in results[0] if kill_a_run.equal(results[0][name], results[1][name])}
    assert same == {"learning rate", "prompt function"}


# ---- Complete or absent ----


def test_a_checkpoint_gets_its_name_only_when_it_is_complete(tmp_path, monkeypatch):
    seen: list[tuple[list[str], set[str]]] = []

    def publish(staged: str, final: str) -> None:
        folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
        seen.append((folders, set(os.listdir(staged))))
        original(staged, final)

    original = checkpoints.publish
    monkeypatch.setattr(checkpoints, "publish", publish)
    kill_a_run.make_trainer(tmp_path, rounds=2).train()
    assert seen[0][0] == [checkpoints.STAGING_NAME]
    assert seen[1][0] == [checkpoints.STAGING_NAME, "checkpoint-2"]
    for _, files in seen:
        assert {
            "pytorch_lora_weights.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
            "batch_plan.json", "prompts.pt", "prompt_statistics.json", "ddpo_config.json",
        } <= files  # fmt: skip
    assert checkpoints.last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-4")


def test_a_half_written_checkpoint_is_never_picked_up(tmp_path):
    half = tmp_path / checkpoints.STAGING_NAME / "checkpoint-2"
    half.mkdir(parents=True)
    (half / "trainer_state.json").write_text("{")
    assert checkpoints.last_checkpoint(str(tmp_path)) is None
    trainer = kill_a_run.make_trainer(tmp_path, rounds=1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    assert json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2


def test_a_checkpoint_that_is_there_already_makes_way(tmp_path):
    staged, final = tmp_path / "staging" / "checkpoint-2", tmp_path / "checkpoint-2"
    for directory, text in ((staged, "new"), (final, "old")):
        directory.mkdir(parents=True)
        (directory / "file").write_text(text)
    checkpoints.publish(str(staged), str(final))
    assert (final / "file").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "staging"]
    assert os.listdir(tmp_path / "staging") == []


def test_the_best_checkpoint_is_remembered_by_its_final_name(tmp_path):
    trainer = kill_a_run.make_trainer(
        tmp_path, rounds=2, eval_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="eval_reward"
    )
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.parent == tmp_path and best.is_dir()
    saved = json.loads((best / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == str(best)


def test_only_as_many_checkpoints_are_kept_as_asked(tmp_path):
    kill_a_run.make_trainer(tmp_path, rounds=4).train()
    kept = sorted(name for name in os.listdir(tmp_path) if name.startswith("checkpoint-"))
    assert kept == ["checkpoint-6", "checkpoint-8"]


# ---- Resuming ----


def test_resuming_without_a_checkpoint_starts_anew(tmp_path):
    trainer = kill_a_run.make_trainer(tmp_path / "never-there", rounds=1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"per_device_sample_batch_size": 2, "num_sample_batches": 4},
            ["sample_batch_size is 2 and was 4"],
        ),
        (
            {"per_device_train_batch_size": 2},
            ["train_batch_size is 2 and was 4: no longer bitwise identical"],
        ),
        ({"num_images_per_prompt": 2}, ["num_images_per_prompt is 2 and was 1: from here on this is another run"]),
        ({}, []),
    ],
)
def test_resuming_with_other_sizes_works_and_says_what_is_no_longer_equal(tmp_path, monkeypatch, change, said):
    constant = {"lr_scheduler_type": "constant"}
    kill_a_run.make_trainer(tmp_path, rounds=1, **constant).train()
    warnings: list[str] = []
    monkeypatch.setattr("ddpo_trl.artifacts.saving.logger.warning", warnings.append)
    trainer = kill_a_run.make_trainer(tmp_path, rounds=2, **constant, **change)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert all(any(sentence in warning for warning in warnings) for sentence in said)
    assert bool(warnings) == bool(said)


def test_a_checkpoint_of_rounds_with_other_steps_is_refused(tmp_path):
    kill_a_run.make_trainer(tmp_path, rounds=1).train()
    with pytest.raises(ValueError, match=r"num_mini_batches is 1, but the checkpoint was written with 2: .*Set num"):
        kill_a_run.make_trainer(tmp_path, rounds=2, num_mini_batches=1).train(resume_from_checkpoint=True)


# ---- Only as itself ----


@pytest.mark.parametrize(
    "name", ["guidance_scale", "cliprange", "seed", "max_grad_norm", "kl_coef", "new_in_transformers"]
)
def test_every_setting_is_named_that_is_not_known_to_be_harmless(name):
    said = list(resuming.setting_changes({name: 1, "lr_scheduler_type": "constant"}, {name: 2}))
    assert said == [f"{name} is 2 and was 1: from here on this is another run."]


def test_settings_that_change_no_result_are_not_named(tmp_path):
    changed: dict[str, Any] = {
        "num_train_epochs": 200, "report_to": "none", "save_rounds": 5, "eval_strategy": "epoch",
        "eval_rounds": 2, "hub_model_id": "me/it", "save_total_limit": None,
        "disable_tqdm": True, "max_workers": 7, "offload_vae": True, "stop_on_signal": [], "log_images_rounds": 0,
        "resume_from_checkpoint": "here", "run_name": "x",
    }  # fmt: skip
    first = DDPOConfig(output_dir=str(tmp_path / "a"), use_cpu=True)
    second = DDPOConfig(output_dir=str(tmp_path / "b"), use_cpu=True, **changed)
    before, after = (json.loads(config.to_json_string()) for config in (first, second))
    assert before != after and list(resuming.setting_changes(before, after)) == []
    longer = list(
        resuming.setting_changes({**before, "lr_scheduler_type": "linear"}, {**after, "lr_scheduler_type": "linear"})
    )
    assert longer == ["num_train_epochs is 200 and was 100: the learning rate follows the schedule of this length."]


@needs_newest("older versions have fewer fields")
def test_the_lists_of_settings_hold_nothing_that_does_not_exist():
    fields = {field.name for field in dataclasses.fields(DDPOConfig)}
    named = resuming.HARMLESS | resuming.LENGTH | resuming.OF_THE_OPTIMIZER | resuming.REFUSED.keys()
    assert named <= fields
    assert resuming.ROUNDING.keys() - fields == {"num_processes", "samples_per_part"}
    assert all(any(name.startswith(prefix) for name in fields) for prefix in resuming.HARMLESS_PREFIXES)


@pytest.mark.parametrize("name, value", [("optim", "sgd"), ("use_lora", False), ("num_ppo_epochs", 2)])
def test_what_cannot_be_continued_is_refused_with_both_values_and_the_remedies(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is {value!r}, but .* with 1: .*Set {name}=1 .*load_lora_weights"):
        list(resuming.setting_changes({name: 1}, {name: value}))


def other_reward(images: torch.Tensor, prompts: Any, metadata: Any) -> torch.Tensor:
    return -brightness(images, prompts, metadata)


def test_another_reward_is_refused_without_a_word_and_named_with_it(make_config, tmp_path, caplog):
    def trainer(*rewards: Any, prompts: Any = ("cat", "dog"), **settings: Any) -> DDPOTrainer:
        config = make_config(
            save_strategy="epoch", num_inference_steps=2, num_sample_batches=1, one_pass=None,
            advantage_normalization="prompt", per_prompt_stat_tracking_min_count=2, **settings,
        )  # fmt: skip
        return DDPOTrainer(config, list(rewards), list(prompts), tiny_pipeline())

    def resumed(*rewards: Any, **kwargs: Any) -> tuple[DDPOTrainer, str]:
        caplog.clear()
        one = trainer(*rewards, **kwargs)
        with caplog.at_level("WARNING", logger="ddpo_trl"):
            one.train(resume_from_checkpoint=True)
        return one, "\n".join(record.getMessage() for record in caplog.records)

    trainer(brightness).train()
    with pytest.raises(ValueError, match=r"is other_reward, but .* with brightness: .*resume_with_new_rewards=True"):
        trainer(other_reward, num_train_epochs=2).train(resume_from_checkpoint=True)
    new, said = resumed(other_reward, num_train_epochs=2, resume_with_new_rewards=True, prompts=["cat", "owl"])
    assert "is other_reward, but the checkpoint was written with brightness: from here on this is another" in said
    assert "statistics of {'brightness': 1.0} by" in said and "of {'other_reward': 1.0} by" in said
    assert "The prompts are 2 prompts with the hash" in said
    remembered = new.advantages.normalize.state_dict()  # type: ignore[attr-defined]
    assert {numpy.sign(reward) for rewards in remembered.values() for reward in rewards} == {-1.0}
    _, said = resumed(other_reward, num_train_epochs=3, reward_weights=[2.0], prompts=["cat", "owl"])
    assert "weights of the rewards are {'other_reward': 2.0} and were {'other_reward': 1.0}" in said
    assert "they are not used" in said and "The prompts" not in said


def test_what_trainers_own_optimizer_would_be_does_not_matter_to_a_given_one():
    assert list(resuming.setting_changes({"optim": "sgd"}, {"optim": "adamw"}, own_optimizer=True)) == []


def reward_times(factor: float) -> Any:
    def reward(images: torch.Tensor, prompts: Any, metadata: Any) -> torch.Tensor:
        return factor * brightness(images, prompts, metadata)

    return reward


def always(prompt: str) -> Any:
    return functools.partial(lambda text: (text, {}), prompt)


def with_scale(alpha: int) -> dict[str, Any]:
    return {"peft_config": LoraConfig(r=2, lora_alpha=alpha, target_modules=["to_q"])}


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ({"reward_fn": reward_times(1)}, {"reward_fn": reward_times(-1)}, ["The code of reward is"]),
        ({"prompt_fn": always("cat")}, {"prompt_fn": always("dog")}, ["The code of prompt_fn is"]),
        ({"prompt_fn": [("cat", {"n": 1})]}, {"prompt_fn": [("cat", {"n": 2})]}, ["The prompts are 1 prompts"]),
        (with_scale(2), with_scale(8), ["The scale of the adapter is [4.0] and was [1.0]"]),
        (
            {"pipeline": 0},
            {"pipeline": 1},
            ["pipeline.text_encoder is", "pipeline.unet is", "pipeline.vae is"],
        ),
        ({}, {"prediction": "sample"}, ["pipeline.scheduler.prediction_type is 'sample' and was 'epsilon'"]),
        ({}, {}, []),
    ],
    ids=["reward", "prompt function", "metadata", "adapter", "base model", "scheduler", "nothing"],
)
def test_what_a_run_depends_on_besides_settings_is_named_where_it_has_changed(
    make_config, tmp_path, caplog, before, after, named
):
    """All of these have the same names, shapes and settings."""

    def trainer(rounds: int, pipeline: int = 0, prediction: str = "epsilon", **given: Any) -> DDPOTrainer:
        config = make_config(
            output_dir=str(tmp_path), save_strategy="epoch", num_train_epochs=rounds, num_inference_steps=2,
            num_sample_batches=1, per_device_sample_batch_size=2, per_device_train_batch_size=2,
        )  # fmt: skip
        arguments = {"reward_fn": brightness, "prompt_fn": ["cat"], **given}
        return DDPOTrainer(config, pipeline=tiny_pipeline(pipeline, prediction_type=prediction), **arguments)

    trainer(1, **before).train()
    with caplog.at_level("WARNING", logger="ddpo_trl"):
        trainer(2, **after).train(resume_from_checkpoint=True)
    own = [
        record for record in caplog.records if record.name.startswith("ddpo_trl")
    ]  # and not wandb's, of other tests
    said = sorted(record.getMessage().partition(": ")[2] for record in own)
    assert len(said) == len(named) and all(map(str.startswith, said, named)), said


def test_other_versions_are_named_and_bytecode_is_compared_within_one_version_of_python():
    def run(code: str, **versions: str) -> dict[str, Any]:
        code_of = {"The code of reward": code}
        return {"rewards": {}, "prompts": "", "eval_prompts": None, "ingredients": code_of, "versions": versions}

    before = run("a", python="3.11", torch="2.13.0")
    assert list(resuming.run_changes(before, run("a", python="3.11", torch="2.6.0"), False)) == [
        "torch is 2.6.0 and was 2.13.0: no longer bitwise identical are images and gradients."
    ]
    (said,) = resuming.run_changes(before, run("b", python="3.12", torch="2.13.0"), False)
    assert said.startswith("python is 3.12 and was 3.11")
    (said,) = resuming.run_changes(before, run("b", python="3.11", torch="2.13.0"), False)
    assert said.startswith("The code of reward is 'b' and was 'a'")
    without = {name: value for name, value in before.items() if name != "versions"}  # of an earlier checkpoint
    assert list(resuming.run_changes(without, run("a", python="3.12", torch="2.6.0"), False)) == []


def test_a_damaged_checkpoint_is_named_and_not_praised(make_config, tmp_path):
    kill_a_run.make_trainer(tmp_path, rounds=1).train()
    weights = tmp_path / "checkpoint-2" / "pytorch_lora_weights.safetensors"
    weights.write_bytes(b"half")
    with pytest.raises(ValueError, match=f"{weights} can't be read") as caught:
        kill_a_run.make_trainer(tmp_path, rounds=2).train(resume_from_checkpoint=True)
    assert caught.value.__notes__ == [f"No round was saved since {tmp_path / 'checkpoint-2'}, which was resumed."]


def test_prompts_and_statistics_of_another_kind_begin_anew(tmp_path):
    """From statistics of the round to those of each prompt, and from a function with a state to a list."""
    kill_a_run.make_trainer(tmp_path, rounds=1, advantage_normalization="batch").train()
    config = kill_a_run.make_trainer(tmp_path / "unused", rounds=2).args
    config.output_dir, config.gradient_accumulation_steps = str(tmp_path), 1
    trainer = DDPOTrainer(config, brightness, ["a", "b"], tiny_pipeline(), eval_prompts=["cat", "dog"])
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    remembered = trainer.advantages.normalize.state_dict()  # type: ignore[attr-defined]
    assert sum(map(len, remembered.values())) == 8  # of the second round


def test_prompt_functions_without_state_are_resumed_as_well(make_config, tmp_path):
    def first() -> tuple[str, Any]:
        return "cat", {}

    config = make_config(output_dir=str(tmp_path), save_strategy="epoch")
    DDPOTrainer(config, brightness, first, tiny_pipeline()).train()
    config.num_train_epochs = 2
    trainer = DDPOTrainer(config, brightness, first, tiny_pipeline())
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


# ---- Safety ----


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    """Nothing of it is unpickled: a malicious file raises before it acts."""
    kill_a_run.make_trainer(tmp_path, rounds=1).train()
    trap = tmp_path / "sprung"
    for name in ("prompts.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        file = tmp_path / "checkpoint-2" / name
        healthy = file.read_bytes()
        torch.save(Trap(str(trap)), file)
        with pytest.raises(Exception, match="(?i)weights.only"):
            kill_a_run.make_trainer(tmp_path, rounds=2).train(resume_from_checkpoint=True)
        assert not trap.exists(), name
        file.write_bytes(healthy)


def test_full_fine_tunings_weights_are_read_from_safetensors_only(tmp_path):
    settings = {"use_lora": False, "advantage_normalization": "batch"}
    kill_a_run.make_trainer(tmp_path, rounds=1, **settings).train()
    weights = tmp_path / "checkpoint-2" / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        kill_a_run.make_trainer(tmp_path, rounds=2, **settings).train(resume_from_checkpoint=True)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")
