"""A run is evaluated, saved and stopped between rounds only, and on all its processes."""

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

import kill_a_run
from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOTrainer
from ddpo_trl.rollout.boundary import RoundCallbacks, StopSignals, agree


PROMPTS = ["cat", "dog"]


class Ask(TrainerCallback):
    """Asks for something in the first event of a kind at or after an optimizer step."""

    def __init__(self, event: str, step: int, *requests: str):
        self.asked = False

        def answer(args, state, control, **kwargs):
            if state.global_step >= step and not self.asked:
                self.asked = True
                for request in requests:
                    setattr(control, request, True)

        setattr(self, event, answer)


def test_a_signal_or_a_request_of_one_run_or_round_is_not_one_of_the_next(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("ddpo_trl.rollout.boundary.logger.warning", said.append)
    signals = StopSignals(["SIGUSR1"])
    for sends in (True, False):
        with signals.handled():
            for _ in range(2 * sends):
                os.kill(os.getpid(), signal.SIGUSR1)
            assert signals.received is sends
    assert len(said) == 1  # although launchers send it twice
    state, control = TrainerState(global_step=1), TrainerControl()
    rounds = RoundCallbacks(CallbackHandler([Ask("on_step_end", 1, "should_save")], *[None] * 4), updates_per_round=2)
    rounds.inside = True
    rounds.on_step_end(TrainingArguments(use_cpu=True), state, control)
    saves = []
    for _ in range(2):
        control.should_save = False
        rounds.release(control)
        saves.append(control.should_save)
    assert saves == [True, False]


@pytest.mark.parametrize(("epoch", "evaluates"), [(1.0, False), (3.0, True)])
def test_a_stop_brings_no_evaluation_before_eval_delay(epoch, evaluates):
    trainer = SimpleNamespace(
        control=TrainerControl(should_training_stop=True),
        args=TrainingArguments(use_cpu=True, eval_strategy="epoch", eval_delay=2.0, save_strategy="no"),
        state=TrainerState(epoch=epoch),
        accelerator=SimpleNamespace(num_processes=1),
    )
    agree(trainer, StopSignals([]))
    assert trainer.control.should_evaluate is evaluates


@pytest.fixture
def light_config(make_config) -> Any:
    """A round of two images and two steps."""

    def make(**settings: Any) -> Any:
        sizes = {"num_inference_steps": 2, "per_device_sample_batch_size": 2, "per_device_train_batch_size": 1}
        return make_config(**{**sizes, "num_sample_batches": 1, **settings})

    return make


def trainer_of(config: Any, *callbacks: TrainerCallback) -> DDPOTrainer:
    """Callbacks come after all of the trainer's own."""
    trainer = DDPOTrainer(config, brightness, PROMPTS, tiny_pipeline(), eval_prompts=PROMPTS)
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


def evaluated(trainer: DDPOTrainer) -> list[float]:
    return [log["epoch"] for log in trainer.state.log_history if "eval_reward" in log]


# ---- Callbacks ----

REQUESTS = ("should_save", "should_evaluate", "should_training_stop", "should_epoch_stop")
SELDOM = {"save_strategy": "epoch", "save_rounds": 5, "eval_strategy": "epoch", "eval_rounds": 5}


@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end", "on_optimizer_step", "on_step_end"])
def test_what_is_asked_for_inside_a_round_comes_at_its_end(light_config, tmp_path, caplog, event):
    """Asked for after the third of six steps; a round has two."""
    config = light_config(num_mini_batches=2, num_train_epochs=3, **SELDOM)
    trainer = trainer_of(config, Ask(event, 3, *REQUESTS))
    with caplog.at_level("WARNING", logger="ddpo_trl"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert checkpoints(tmp_path / "run") == [4] and evaluated(trainer) == [2.0]
    said = [record.getMessage() for record in caplog.records if "inside round 2" in record.getMessage()]
    assert len(said) == len(REQUESTS) and all(event in line and "when the round is over" in line for line in said)


def test_a_request_at_the_last_step_of_a_round_is_granted_without_a_word(light_config, tmp_path, caplog):
    trainer = trainer_of(light_config(num_train_epochs=3, one_pass=None, **SELDOM), Ask("on_step_end", 2, *REQUESTS))
    with caplog.at_level("WARNING", logger="ddpo_trl"):
        trainer.train()
    assert checkpoints(tmp_path / "run") == [2] and evaluated(trainer) == [2.0]
    assert not [record for record in caplog.records if "inside" in record.getMessage()]
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert [log["epoch"] for log in state["log_history"] if "reward" in log] == [1.0, 2.0]  # with its own round


def test_a_run_that_a_callback_stops_inside_a_round_goes_on_as_if_it_had_not(tmp_path):
    whole = kill_a_run.make_trainer(tmp_path / "whole", rounds=2)
    whole.train()
    stopped = kill_a_run.make_trainer(tmp_path / "parts", rounds=2)
    stopped.add_callback(Ask("on_substep_end", 0, "should_training_stop"))
    stopped.train()
    assert stopped.state.global_step == 2
    resumed = kill_a_run.make_trainer(tmp_path / "parts", rounds=2)
    resumed.train(resume_from_checkpoint=True)
    expected, ended = kill_a_run.result(whole), kill_a_run.result(resumed)
    assert [name for name in expected if not kill_a_run.equal(expected[name], ended[name])] == []


@pytest.mark.parametrize("event", ["on_epoch_end", "on_log", "on_save"])
def test_the_last_round_is_evaluated_and_saved_whenever_a_callback_ends_the_run(light_config, tmp_path, event):
    config = light_config(num_train_epochs=9, one_pass=None, **SELDOM)
    step = 2
    callbacks = [Ask("on_epoch_end", step, "should_save")] if event == "on_save" else []
    trainer = trainer_of(config, *callbacks, Ask(event, step, "should_training_stop"))
    trainer.train()
    assert trainer.state.global_step == step and evaluated(trainer) == [2.0]
    assert checkpoints(tmp_path / "run") == [step]
    state = json.loads((tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").read_text())
    assert [log["epoch"] for log in state["log_history"] if "eval_reward" in log] == [2.0]


def test_the_round_after_which_patience_ends_is_saved_too(light_config, tmp_path):
    """Nothing changes at a learning rate of 0: the first evaluation is the best, then patience ends."""
    config = light_config(
        num_train_epochs=9, save_strategy="epoch", save_rounds=4, eval_strategy="epoch", learning_rate=0.0,
        metric_for_best_model="eval_reward", one_pass=None,
    )  # fmt: skip
    trainer = trainer_of(config, EarlyStoppingCallback(early_stopping_patience=1))
    trainer.train()
    assert checkpoints(tmp_path / "run") == [2]


def test_patience_goes_on_where_it_stood_when_a_run_is_resumed(light_config):
    def trainer(*more: TrainerCallback) -> DDPOTrainer:
        config = light_config(
            num_train_epochs=9, save_strategy="epoch", eval_strategy="epoch", learning_rate=0.0,
            metric_for_best_model="eval_reward", one_pass=None,
        )  # fmt: skip
        return trainer_of(config, EarlyStoppingCallback(early_stopping_patience=2), *more)

    trainer(Ask("on_epoch_end", 2, "should_training_stop")).train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


def test_another_patience_takes_effect_when_a_run_is_resumed(light_config):
    """Nothing changes at a learning rate of 0: the first evaluation is the best, and one more of patience is spent."""

    def ended(patience: int, **kwargs: Any) -> int:
        config = light_config(
            num_train_epochs=9, save_strategy="epoch", eval_strategy="epoch", learning_rate=0.0,
            metric_for_best_model="eval_reward", one_pass=None,
        )  # fmt: skip
        trainer = trainer_of(config, EarlyStoppingCallback(early_stopping_patience=patience))
        trainer.train(**kwargs)
        return trainer.state.global_step

    assert ended(1) == 2
    assert ended(3, resume_from_checkpoint=True) == 4


class Fail(TrainerCallback):
    """At the first update only."""

    def __init__(self) -> None:
        self.failed = False

    def on_step_end(self, args, state, control, **kwargs):
        if not self.failed:
            self.failed = True
            raise RuntimeError("a callback failed")


def test_what_a_run_that_failed_was_asked_for_does_not_end_the_next_one(light_config):
    config = light_config(num_train_epochs=2, one_pass=None)
    trainer = trainer_of(config, Ask("on_step_begin", 0, "should_training_stop"), Fail())
    with pytest.raises(RuntimeError, match="a callback failed"):
        trainer.train()
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_checkpoint_comes_every_so_many_rounds_and_after_the_last(light_config, tmp_path):
    trainer_of(light_config(num_train_epochs=5, save_strategy="epoch", save_rounds=2, one_pass=None)).train()
    assert checkpoints(tmp_path / "run") == [2, 4, 5]


def test_the_best_evaluated_round_is_saved_whatever_save_rounds_says(light_config, tmp_path):
    config = light_config(
        num_train_epochs=4, save_strategy="epoch", save_rounds=4, eval_strategy="epoch", learning_rate=0.0,
        load_best_model_at_end=True, one_pass=None,
    )  # fmt: skip
    trainer = trainer_of(config)
    trainer.train()
    assert checkpoints(tmp_path / "run") == [1, 4]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-1")


def test_a_long_run_keeps_three_checkpoints_by_default(light_config, tmp_path):
    trainer_of(light_config(num_train_epochs=5, save_strategy="epoch", one_pass=None)).train()
    assert checkpoints(tmp_path / "run") == [3, 4, 5]


# ---- Signals ----


def wait_for(path: Path) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.01)


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_a_signal_ends_the_run_after_its_round_and_it_goes_on_as_if_it_had_not(tmp_path, mini_batches):
    """A real SIGTERM to a real process in the midst of its first round; one pass, and two."""
    folder = tmp_path / "parts"
    child = kill_a_run.PROCESSES.Process(target=kill_a_run.wait_for_a_signal, args=(folder, 2, mini_batches))
    child.start()
    wait_for(folder / "inside")
    assert child.pid is not None
    os.kill(child.pid, signal.SIGTERM)
    (folder / "sent").touch()
    child.join(timeout=120)
    assert child.exitcode == 0
    assert checkpoints(folder) == [mini_batches]
    resumed = kill_a_run.make_trainer(folder, rounds=2, num_mini_batches=mini_batches)
    resumed.train(resume_from_checkpoint=True)
    whole = kill_a_run.make_trainer(tmp_path / "whole", rounds=2, num_mini_batches=mini_batches)
    whole.train()
    expected, ended = kill_a_run.result(whole), kill_a_run.result(resumed)
    assert [name for name in expected if not kill_a_run.equal(expected[name], ended[name])] == []


class Send(TrainerCallback):
    """Sends a signal to its own process in the first round."""

    def __init__(self, number: int):
        self.number = number

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            os.kill(os.getpid(), self.number)


def test_a_signal_saves_where_only_the_best_is_saved_and_says_where_nothing_is(light_config, tmp_path, caplog):
    settings = {"num_train_epochs": 3, "stop_on_signal": ["SIGUSR1"], "one_pass": None}
    best = {"save_strategy": "best", "eval_strategy": "epoch", "eval_rounds": 2}
    trainer_of(light_config(output_dir=str(tmp_path / "best"), **best, **settings), Send(signal.SIGUSR1)).train()
    assert checkpoints(tmp_path / "best") == [1]
    with caplog.at_level("WARNING", logger="ddpo_trl"):
        trainer = trainer_of(light_config(**settings), Send(signal.SIGUSR1))
        trainer.train()
    assert trainer.state.global_step == 1 and checkpoints(tmp_path / "run") == []
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "SIGUSR1 received" in said and "without a checkpoint, because save_strategy is 'no'" in said


def test_a_signal_leaves_the_schedule_of_evaluations_as_it_is(light_config):
    """The run is not over: an evaluation that was not due would be one more in the resumed run."""
    trainer = trainer_of(light_config(num_train_epochs=3, **SELDOM), Send(signal.SIGTERM))
    trainer.train()
    assert trainer.state.global_step == 1 and evaluated(trainer) == []


def test_handlers_are_the_users_again_after_training_and_after_an_error(light_config):
    def own(number, frame):
        raise AssertionError

    before = signal.signal(signal.SIGTERM, own)
    try:
        trainer_of(light_config(one_pass=None)).train()
        assert signal.getsignal(signal.SIGTERM) is own
        broken = trainer_of(light_config(one_pass=None))
        broken.scorer.functions = [lambda images, prompts, metadata: None]
        with pytest.raises(TypeError):
            broken.train()
        assert signal.getsignal(signal.SIGTERM) is own
        trainer_of(light_config(stop_on_signal=["none"]), CheckHandler(own)).train()
    finally:
        signal.signal(signal.SIGTERM, before)


class CheckHandler(TrainerCallback):
    def __init__(self, own: Any):
        self.own = own

    def on_step_end(self, args, state, control, **kwargs):
        assert signal.getsignal(signal.SIGTERM) is self.own


def test_a_thread_trains_without_handlers(light_config):
    trainer = trainer_of(light_config(one_pass=None))
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1


def test_processes_that_a_reward_function_forks_end_as_ever():
    forking = multiprocessing.get_context("fork")
    runs = forking.Event()

    def work() -> None:
        runs.set()
        time.sleep(60)

    with StopSignals(["SIGTERM"]).handled():
        child = forking.Process(target=work)
        child.start()
        runs.wait(20)  # a signal before that is lost in Python's own start
        child.terminate()
        child.join(timeout=20)
    assert child.exitcode == -signal.SIGTERM
