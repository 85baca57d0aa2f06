"""`target_kl`: a round's updates end where the policy has gone far enough, and nothing else changes."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOTrainer
from ddpo_trl.update.target_kl import TargetKL


PROMPTS = ["cat", "dog", "owl"]

TINY, HUGE = 1e-30, 1e30


def trained(make_config, callbacks: Any = None, **settings: Any) -> DDPOTrainer:
    """Two rounds of AdamW, whose momenta and weight decay would move the weights in a step without gradients too."""
    config = make_config(**{"num_train_epochs": 2, "weight_decay": 0.1, **settings})
    trainer = DDPOTrainer(config, brightness, PROMPTS, tiny_pipeline(), callbacks=callbacks)
    trainer.train()
    return trainer


def weights(trainer: DDPOTrainer) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in trainer.model.parameters() if parameter.requires_grad]


def optimizer_state(trainer: DDPOTrainer) -> list[torch.Tensor]:
    state = trainer.optimizer.state_dict()["state"]
    return [value for parameter in state for _, value in sorted(state[parameter].items())]


def assert_same_weights_and_optimizer(left: DDPOTrainer, right: DDPOTrainer) -> None:
    for values in (weights, optimizer_state):
        expected, actual = values(left), values(right)
        assert len(expected) == len(actual) > 0
        assert all(torch.equal(one, other) for one, other in zip(expected, actual, strict=True))


def round_logs(trainer: DDPOTrainer) -> list[dict[str, float]]:
    return [log for log in trainer.state.log_history if "reward" in log]


def test_a_tiny_target_leaves_one_update_per_round_and_no_trace_of_the_others(make_config):
    stopped = trained(make_config, num_ppo_epochs=4, target_kl=TINY)
    assert_same_weights_and_optimizer(stopped, trained(make_config, one_pass=False))
    assert all(state["step"] == 2 for state in stopped.optimizer.state_dict()["state"].values())
    assert [log["policy/updates_skipped"] for log in round_logs(stopped)] == [0.75, 0.75]


def test_a_huge_target_changes_nothing(make_config):
    limited = trained(make_config, num_mini_batches=2, target_kl=HUGE)
    assert_same_weights_and_optimizer(limited, trained(make_config, num_mini_batches=2))
    assert [log["policy/updates_skipped"] for log in round_logs(limited)] == [0.0, 0.0]


def test_a_target_between_two_updates_divergences_ends_the_round_between_them(make_config):
    every_update = {"num_train_epochs": 1, "logging_strategy": "steps", "logging_steps": 1}
    free = trained(make_config, num_ppo_epochs=3, **every_update)
    first, second, third = [log["policy/approxkl_avg"] for log in free.state.log_history if "loss" in log]
    assert first == 0 < second < third
    stopped = trained(make_config, num_ppo_epochs=3, num_train_epochs=1, target_kl=(second + third) / 2)
    assert_same_weights_and_optimizer(stopped, trained(make_config, num_ppo_epochs=2, num_train_epochs=1))
    assert round_logs(stopped)[0]["policy/updates_skipped"] == pytest.approx(1 / 3)
    at_the_target = trained(make_config, num_ppo_epochs=3, num_train_epochs=1, target_kl=third)
    assert round_logs(at_the_target)[0]["policy/updates_skipped"] == 0


def test_the_divergence_is_averaged_over_all_micro_batches_of_an_update(make_config):
    settings = {"num_ppo_epochs": 2, "num_train_epochs": 1}
    (log,) = round_logs(trained(make_config, **settings))
    mean = 2 * log["policy/approxkl_avg"]  # the first pass has none
    for factor, skipped in ((1.01, 0.0), (0.99, 0.5)):
        (limited,) = round_logs(trained(make_config, target_kl=factor * mean, **settings))
        assert limited["policy/updates_skipped"] == skipped


class Steps(TrainerCallback):
    """Counts what happens, as other callbacks see it."""

    def __init__(self):
        self.updates: list[tuple[int, float, float]] = []
        self.micro_batches = 0

    def on_substep_end(self, args, state, control, **kwargs):
        self.micro_batches += 1

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        self.micro_batches += 1
        self.updates.append((state.global_step, state.epoch, lr_scheduler.get_last_lr()[0]))


def test_steps_epochs_learning_rate_and_checkpoints_go_on_as_without(make_config, tmp_path):
    def counted(target_kl):
        steps = Steps()
        trained(
            make_config, [steps], num_ppo_epochs=3, target_kl=target_kl, lr_scheduler_type="linear",
            save_strategy="epoch", output_dir=str(tmp_path / str(target_kl)),
        )  # fmt: skip
        return steps

    free, stopped = counted(None), counted(TINY)
    assert stopped.updates == free.updates
    assert [step for step, _, _ in stopped.updates] == [1, 2, 3, 4, 5, 6]
    assert stopped.micro_batches == free.micro_batches
    for target_kl in (None, TINY):
        assert {path.name for path in (tmp_path / str(target_kl)).glob("checkpoint-*")} == {
            "checkpoint-3",
            "checkpoint-6",
        }


def test_a_stopped_run_resumes_as_if_never_interrupted(make_config, tmp_path):
    settings = {"num_ppo_epochs": 3, "target_kl": TINY, "save_strategy": "epoch", "num_train_epochs": 3}
    whole = trained(make_config, output_dir=str(tmp_path / "whole"), **settings)
    resumed = DDPOTrainer(make_config(**settings, weight_decay=0.1), brightness, PROMPTS, tiny_pipeline())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same_weights_and_optimizer(whole, resumed)


def test_what_is_left_out_costs_no_forward_pass(make_config):
    pipeline = tiny_pipeline()
    config = make_config(num_ppo_epochs=5, target_kl=TINY)
    trainer = DDPOTrainer(config, brightness, PROMPTS, pipeline)
    count: list[int] = []
    pipeline.unet.register_forward_hook(lambda *_: count.append(1))
    trainer.train()
    sampling = measured = made = 2 * 4  # batches or micro-batches x steps
    assert len(count) == sampling + made + measured


def test_no_gradient_is_left_behind(make_config):
    trainer = trained(make_config, num_ppo_epochs=2, target_kl=TINY)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_without_a_target_nothing_is_logged_of_it(make_config):
    assert all("policy/updates_skipped" not in log for log in round_logs(trained(make_config, num_ppo_epochs=2)))


@pytest.mark.parametrize(
    ("divergences", "reached"),
    [([1.0, 3.0], False), ([1.0, 3.1], True), ([0.0, float("nan")], True), ([float("inf")], True)],
    ids=["at the target", "beyond", "nan", "inf"],
)
def test_an_update_is_made_up_to_the_target_and_the_next_round_starts_anew(divergences, reached):
    limit, accelerator = TargetKL(2.0), Accelerator(cpu=True)
    for divergence in divergences:
        limit.add(torch.tensor(divergence))
    limit.end_update(accelerator)
    assert limit.reached == reached
    limit.add(torch.tensor(9.0))  # of an update that an error has cut off
    limit.begin_round()
    limit.add(torch.tensor(2.0))
    limit.end_update(accelerator)
    assert not limit.reached
