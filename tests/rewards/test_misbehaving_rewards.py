"""Reward functions that fail in the middle of a run: what is raised, what is dropped, and what goes on."""

import logging
import math
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import run_misbehaving_rewards
from conftest import brightness, in_both_passes, tiny_pipeline
from ddpo_trl import DDPOTrainer
from ddpo_trl.rollout.advantages import PromptStatistics
from launch import fork, launch


PROMPTS = ["cat", "dog", "owl"]
NEVER = threading.Event()


def raises(rewards: list[Any]) -> Any:
    raise ConnectionError("server gone")


def hangs(rewards: list[Any]) -> Any:
    NEVER.wait(60)


def with_last(value: Any) -> Callable[[list[Any]], Any]:
    return lambda rewards: [*rewards[:-1], value]


ALL, LAST = [0, 1, 2, 3], [3]

# What becomes of the right answer for a batch; the message; the samples of a batch of four that are lost.
FAILURES: dict[str, tuple[Callable[[list[Any]], Any], str, list[int]]] = {
    "raises": (raises, r"raised ConnectionError: server gone", ALL),
    "times out": (hangs, r"did not return within 0\.5 s", ALL),
    "NaN": (with_last(math.nan), r"returned nan for image \d; rewards must be finite", LAST),
    "infinite": (with_last(-math.inf), r"returned -inf for image \d; rewards must be finite", LAST),
    "None among the values": (with_last(None), r"returned None for image \d; it must be a number", LAST),
    "None": (lambda rewards: None, r"returned None; it must return one number per image", ALL),
    "too few": (lambda rewards: rewards[:-1], r"returned \d values for \d images", ALL),
    "a wrong type": (with_last("good"), r"returned 'good' for image \d; it must be a number", ALL),
}


class FailsAt:
    """Brightness, except in the calls with these numbers. Calls 1 and 2 are the batches of round 0, and so on."""

    def __init__(self, failure: Callable[[list[Any]], Any], *calls: int):
        self.failure, self.calls, self.count = failure, calls, 1

    def __call__(self, images: torch.Tensor, prompts: Any, metadata: Any) -> Any:
        call, self.count = self.count, self.count + 1
        rewards = brightness(images, prompts, metadata).tolist()
        return self.failure(rewards) if call in self.calls else rewards


def trainer_of(config: Any, failure: Callable[[list[Any]], Any], *calls: int) -> DDPOTrainer:
    config.max_workers = 1  # so that calls are counted in order
    return DDPOTrainer(config, FailsAt(failure, *calls), PROMPTS, tiny_pipeline())


def logs_of(trainer: DDPOTrainer) -> list[dict[str, float]]:
    return [log for log in trainer.state.log_history if "reward" in log]


# ---- raise ----


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_ends_the_run_with_its_name_and_the_last_finished_round_is_on_disk(make_config, kind, tmp_path):
    failure, message, _ = FAILURES[kind]
    config = make_config(reward_timeout=0.5, num_train_epochs=2, save_strategy="epoch")
    trainer = trainer_of(config, failure, 4)  # the second batch of round 1
    with pytest.raises((RuntimeError, TimeoutError, TypeError, ValueError)) as caught:
        trainer.train()
    for part in ("`FailsAt`", "round 1", message):
        assert re.search(part, str(caught.value))
    assert any("checkpoint-1 is intact" in note for note in caught.value.__notes__)
    assert any(repr(prompt) in str(caught.value) for prompt in PROMPTS)
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


@pytest.mark.parametrize("policy", ["raise", "drop"])
@pytest.mark.parametrize("kind", FAILURES)
def test_the_trial_at_construction_raises_where_it_is_asked_for(make_config, kind, policy):
    failure, message, _ = FAILURES[kind]
    with pytest.raises((RuntimeError, TimeoutError, TypeError, ValueError), match=f"`FailsAt`.* {message}"):
        trainer_of(make_config(try_reward_fn=True, on_invalid_reward=policy, reward_timeout=0.5), failure, 1)


def test_reward_functions_are_not_called_before_training(make_config):
    called = threading.Event()

    def paid(images: torch.Tensor, prompts: Any, metadata: Any) -> Any:
        called.set()
        return brightness(images, prompts, metadata)

    trainer = DDPOTrainer(make_config(), paid, PROMPTS, tiny_pipeline(), eval_prompts=PROMPTS, eval_reward_fn=paid)
    assert not called.is_set()
    trainer.train()
    assert called.is_set()


@in_both_passes
def test_a_problem_with_the_first_batch_ends_the_run_before_the_second_is_sampled(make_config):
    pipeline, calls = tiny_pipeline(), []
    trainer = DDPOTrainer(make_config(), lambda images, prompts, metadata: None, PROMPTS, pipeline)
    pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(TypeError, match="returned None; it must return one number per image"):
        trainer.train()
    assert len(calls) == trainer.args.num_inference_steps


# ---- drop ----


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_drops_its_samples_and_the_run_goes_on(make_config, kind, caplog):
    failure, message, lost = FAILURES[kind]
    config = make_config(on_invalid_reward="drop", reward_timeout=0.5, num_train_epochs=2, learning_rate=0.0)
    trainer = trainer_of(config, failure, 2, 4)  # the second batch of both rounds
    with caplog.at_level(logging.WARNING, logger="ddpo_trl"):
        trainer.train()
    assert trainer.state.global_step == 2
    rollout = trainer.rollout
    dropped = [4 + sample for sample in lost]
    assert rollout.rewards.isnan().nonzero().flatten().tolist() == dropped
    assert rollout.advantages[dropped].tolist() == [0.0] * len(lost)
    expected = rollout.images.flatten(1).mean(1).double()[[i for i in range(8) if i not in dropped]]
    assert [log["rewards/invalid"] for log in logs_of(trainer)] == [len(lost) / 8] * 2
    last = logs_of(trainer)[-1]
    assert last["reward"] == last["rewards/FailsAt/mean"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert last["reward_std"] == last["rewards/FailsAt/std"] == pytest.approx(expected.std(correction=0).item(), 1e-4)
    assert all(math.isfinite(value) for value in last.values())
    warnings = [record.getMessage() for record in caplog.records if record.name == "ddpo_trl.rollout.loader"]
    assert len(warnings) == 2  # one a round
    for index, warning in enumerate(warnings):
        assert f"{len(lost)} of 8 samples of round {index} have no valid reward" in warning
        assert re.search(message, warning)


NORMALISATIONS = ["batch", "group", "prompt", "none"]


@pytest.mark.parametrize("normalization", NORMALISATIONS)
def test_the_other_samples_have_the_advantages_that_they_would_have_alone(make_config, normalization):
    config = make_config(
        on_invalid_reward="drop", advantage_normalization=normalization, num_images_per_prompt=4,
        per_prompt_stat_tracking_min_count=2,
    )  # fmt: skip
    trainer = trainer_of(config, with_last(None), 1, 2)
    trainer.train()
    rewards, advantages = trainer.rollout.rewards, trainer.rollout.advantages.double()

    def standardised(part: torch.Tensor) -> torch.Tensor:
        return (part - part.mean()) / (part.std(correction=0) + 1e-6)

    first, second = [0, 1, 2], [4, 5, 6]  # a batch of four is a prompt and a group; its last sample is dropped
    expected = {
        "batch": standardised(rewards[first + second]),
        "group": torch.cat([standardised(rewards[first]), standardised(rewards[second])]),
        "prompt": torch.cat([standardised(rewards[first]), standardised(rewards[second])]),
        "none": rewards[first + second],
    }[normalization]
    torch.testing.assert_close(advantages[first + second], expected, rtol=1e-5, atol=1e-6)
    assert advantages[[3, 7]].tolist() == [0.0, 0.0]
    if isinstance(trainer.advantages.normalize, PromptStatistics):
        remembered = trainer.advantages.normalize.state_dict()
        assert remembered[trainer.rollout.prompts[0]] == rewards[first].tolist()
        assert remembered[trainer.rollout.prompts[4]] == rewards[second].tolist()


@in_both_passes
def test_a_dropped_sample_adds_nothing_to_the_gradient(make_config):
    """With the only samples that differ dropped, the gradient is exactly zero."""
    config = make_config(on_invalid_reward="drop", max_grad_norm=0.0, weight_decay=0.0, optim="sgd")
    trainer = trainer_of(config, lambda rewards: [0.5] * 3 + [None], 1, 2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert logs_of(trainer)[0]["rewards/invalid"] == 0.25
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_exactly_half_goes_on_and_more_than_half_is_an_error(make_config):
    half = trainer_of(make_config(on_invalid_reward="drop"), lambda rewards: None, 1)
    half.train()
    assert logs_of(half)[0]["rewards/invalid"] == 0.5
    config = make_config(on_invalid_reward="drop")
    more = DDPOTrainer(config, AlmostAlwaysNone(), PROMPTS, tiny_pipeline())
    message = (
        "5 of 8 samples of round 0 have no valid reward: too many to go on. The first reason: .* image 0; it must"
    )
    with pytest.raises(RuntimeError, match=message):
        more.train()
    assert more.state.global_step == 0


class AlmostAlwaysNone:
    """Two invalid rewards for a batch, then three."""

    def __init__(self) -> None:
        self.calls = 1

    def __call__(self, images: Any, prompts: Any, metadata: Any) -> Any:
        self.calls += 1
        invalid = min(self.calls, 3)
        return [None] * invalid + [1.0] * (len(images) - invalid)


def test_runs_without_invalid_rewards_log_zero_and_are_the_same_under_both_policies(make_config):
    weights = []
    for policy in ("raise", "drop"):
        trainer = DDPOTrainer(make_config(on_invalid_reward=policy), brightness, PROMPTS, tiny_pipeline())
        trainer.train()
        assert logs_of(trainer)[0]["rewards/invalid"] == 0.0
        weights.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
    assert all(torch.equal(left, right) for left, right in zip(*weights, strict=True))


# ---- Degenerate groups ----


@pytest.mark.parametrize(
    ("normalization", "rewards", "expected"),
    [
        ("batch", {"cat": 1.0, "dog": 1.0, "owl": 1.0}, 1.0),
        ("none", {"cat": 1.0, "dog": 1.0, "owl": 1.0}, 1.0),
        ("batch", {"cat": 1.0, "dog": 2.0, "owl": 3.0}, 0.0),  # two prompts in the round
        ("none", {"cat": 1.0, "dog": 2.0, "owl": 3.0}, 0.0),
        ("group", {"cat": 1.0, "dog": 2.0, "owl": 3.0}, 1.0),
        ("prompt", {"cat": 1.0, "dog": 2.0, "owl": 3.0}, 1.0),
    ],
)
def test_the_share_of_equal_rewards_is_logged_and_their_advantage_is_zero(
    make_config, normalization, rewards, expected
):
    config = make_config(
        advantage_normalization=normalization, num_images_per_prompt=4, per_prompt_stat_tracking_min_count=2
    )
    trainer = DDPOTrainer(config, lambda i, prompts, m: [rewards[p] for p in prompts], PROMPTS, tiny_pipeline())
    trainer.train()
    assert logs_of(trainer)[0]["frac_reward_zero_std"] == expected
    if normalization != "none":
        assert bool(trainer.rollout.advantages.any()) == (expected == 0)
    assert trainer.rollout.advantages.isfinite().all()


def test_one_group_of_two_without_spread_is_half(make_config):
    def flat_for_cats(images: torch.Tensor, prompts: Any, metadata: Any) -> Any:
        return [0.5] * len(images) if prompts[0] == "cat" else brightness(images, prompts, metadata)

    config = make_config(advantage_normalization="group", num_images_per_prompt=4)
    trainer = DDPOTrainer(config, flat_for_cats, PROMPTS[:2], tiny_pipeline())
    trainer.train()
    assert sorted(set(trainer.rollout.prompts)) == PROMPTS[:2]
    assert logs_of(trainer)[0]["frac_reward_zero_std"] == 0.5


def test_groups_with_one_valid_sample_have_no_advantage(make_config):
    config = make_config(advantage_normalization="group", num_images_per_prompt=2, on_invalid_reward="drop")
    halves = FailsAt(lambda rewards: [rewards[0], None, None, rewards[3]], 1, 2)
    trainer = DDPOTrainer(config, halves, [*PROMPTS, "fox"], tiny_pipeline())
    trainer.train()
    assert len(set(trainer.rollout.prompts)) == 4
    assert trainer.rollout.advantages.tolist() == [0.0] * 8
    assert logs_of(trainer)[0]["frac_reward_zero_std"] == 1.0


# ---- Several processes ----


@pytest.mark.parametrize("by_the_command", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_when_one_ranks_reward_raises_both_ranks_end_with_its_message(tmp_path, by_the_command):
    """As users start them, a rank that ends so ends the command too."""
    output_dir = tmp_path / "run"
    output_dir.mkdir()
    if by_the_command:
        run = launch(Path(run_misbehaving_rewards.__file__), [str(output_dir), "raise"])
        assert run.returncode != 0
    else:
        with pytest.raises(AssertionError, match=r"statuses \[1, 1\]"):
            fork(run_misbehaving_rewards.main, str(output_dir), "raise")
    end = time.time()
    for rank in range(2):
        raised = torch.load(tmp_path / "run" / f"raised-{rank}.pt", weights_only=True)
        assert "raised ConnectionError: rank 1 fails (round 1" in raised["message"]
        assert end - raised["time"] < 60  # although a call on rank 0 hangs
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


@pytest.fixture(scope="module")
def survivors(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes") / "run"
    folder.mkdir()
    fork(run_misbehaving_rewards.main, str(folder), "drop")
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


def test_when_one_rank_is_slow_and_the_other_drops_a_sample_training_goes_on_with_equal_weights(survivors):
    first, second = survivors
    assert first["weights"].keys() == second["weights"].keys()
    assert all(torch.equal(weight, second["weights"][name]) for name, weight in first["weights"].items())
    assert first["invalid"] == second["invalid"] == [1 / 8, 1 / 8]
    assert first["reward"] == second["reward"]
    assert first["rewards"].isnan().sum() == 0
    assert second["rewards"].isnan().nonzero().flatten().tolist() == [3]


def test_when_one_rank_samples_a_nan_image_both_drop_it_or_both_raise(survivors):
    first, second = survivors
    for name, weight in first["weights_after_nan"].items():
        assert weight.isfinite().all() and torch.equal(weight, second["weights_after_nan"][name])
    for rank in survivors:
        assert "The policy sampled an image that is not finite (round 0, image 2" in rank["raised_by_nan"]


def test_when_more_than_half_is_invalid_over_all_ranks_all_of_them_raise(survivors):
    for rank in survivors:
        assert "5 of 8 samples of round 0 have no valid reward: too many to go on" in rank["too_many"]
        assert "returned None for image 3" in rank["too_many"]
