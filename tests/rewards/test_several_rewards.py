"""Several reward functions: how they become one advantage, and what is logged of each."""

import json
import math

import numpy as np
import pytest
import torch

from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOTrainer
from ddpo_trl.rewards import redness


PROMPTS = ["cat", "dog"]
WEIGHTS = [1.0, 0.5]


def large(images, prompts, metadata):
    return 1000 * redness(images, prompts, metadata)


def trained(make_config, rewards, **settings) -> DDPOTrainer:
    config = make_config(
        **{"num_images_per_prompt": 4, "advantage_normalization": "group", "reward_weights": WEIGHTS, **settings}
    )
    trainer = DDPOTrainer(config, rewards, PROMPTS, tiny_pipeline())
    trainer.train()
    return trainer


def standardized(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / values.std()


def test_normalize_then_sum_standardises_each_reward_by_group_and_their_sum_over_the_round(make_config):
    trainer = trained(make_config, [brightness, large], multi_objective_aggregation="normalize_then_sum")
    rollout = trainer.rollout
    prompts = np.array(rollout.prompts)
    total = np.zeros(len(prompts))
    for function, weight in zip((brightness, large), WEIGHTS, strict=True):
        rewards = function(rollout.images, (), ()).double().numpy()
        for prompt in PROMPTS:
            total[prompts == prompt] += weight * standardized(rewards[prompts == prompt])
    # the division by std + 1e-6 of a reward with a spread of 1e-3 is seen at 1e-3
    assert rollout.advantages.numpy() == pytest.approx(standardized(total), abs=5e-3)


@pytest.mark.parametrize("normalization", ["batch", "group", "prompt"])
def test_the_scale_of_a_reward_plays_no_part_if_each_is_standardised(make_config, normalization):
    settings = {
        "multi_objective_aggregation": "normalize_then_sum",
        "advantage_normalization": normalization,
        "per_prompt_stat_tracking_min_count": 2,
    }
    small = trained(make_config, [brightness, redness], **settings).rollout.advantages
    scaled = trained(make_config, [brightness, large], **settings).rollout.advantages
    assert torch.allclose(small, scaled, atol=5e-3)
    assert scaled.abs().max() > 0.5


def test_the_reward_with_the_largest_spread_decides_if_the_sum_is_standardised(make_config):
    both = trained(make_config, [brightness, large]).rollout.advantages
    alone = trained(make_config, [large], reward_weights=None).rollout.advantages
    other = trained(make_config, [brightness], reward_weights=None).rollout.advantages
    assert torch.allclose(both, alone, atol=2e-2)
    assert not torch.allclose(both, other, atol=2e-1)


def test_with_one_reward_by_batch_both_ways_are_one(make_config):
    settings = {"advantage_normalization": "batch", "reward_weights": None}
    one, other = (
        trained(make_config, [large], multi_objective_aggregation=way, **settings).rollout.advantages
        for way in ("sum_then_normalize", "normalize_then_sum")
    )
    assert torch.allclose(one, other, atol=1e-5)


def test_every_component_is_logged_with_mean_and_spread(make_config):
    trainer = trained(make_config, [brightness, large], multi_objective_aggregation="normalize_then_sum")
    log = next(log for log in trainer.state.log_history if "reward" in log)
    for function in (brightness, large):
        rewards = function(trainer.rollout.images, (), ()).double()
        assert log[f"rewards/{function.__name__}/mean"] == pytest.approx(rewards.mean().item(), rel=1e-5)
        assert log[f"rewards/{function.__name__}/std"] == pytest.approx(rewards.std(correction=0).item(), rel=1e-3)


def test_a_reward_without_spread_takes_no_part_and_is_counted(make_config):
    def flat(images, prompts, metadata):
        return [7.0] * len(images)

    settings = {"multi_objective_aggregation": "normalize_then_sum"}
    with_it = trained(make_config, [brightness, flat], **settings)
    without = trained(make_config, [brightness], reward_weights=None, **settings)
    assert torch.allclose(with_it.rollout.advantages, without.rollout.advantages, atol=1e-5)
    assert next(log for log in with_it.state.log_history if "reward" in log)["frac_reward_zero_std"] == 0.5


def test_a_sample_that_one_function_has_no_reward_for_is_dropped_from_all(make_config):
    def some(images, prompts, metadata):
        rewards = brightness(images, prompts, metadata).tolist()
        return [math.nan, *rewards[1:]]

    settings = {
        "multi_objective_aggregation": "normalize_then_sum",
        "advantage_normalization": "batch",
        "on_invalid_reward": "drop",
    }
    trainer = trained(make_config, [some, large], **settings)
    valid = ~trainer.rollout.rewards.isnan()
    assert valid.tolist() == [False, True, True, True] * 2
    images = trainer.rollout.images[valid]
    total = np.zeros(len(images))
    for function, weight in zip((brightness, large), WEIGHTS, strict=True):
        total += weight * standardized(function(images, (), ()).double().numpy())
    assert trainer.rollout.advantages[~valid].tolist() == [0.0, 0.0]
    assert trainer.rollout.advantages[valid].numpy() == pytest.approx(standardized(total), abs=5e-3)


def test_each_function_has_prompt_statistics_of_its_own_and_a_checkpoint_holds_them(make_config, tmp_path):
    def settings(rounds):
        return {
            "multi_objective_aggregation": "normalize_then_sum",
            "advantage_normalization": "prompt",
            "per_prompt_stat_tracking_min_count": 2,
            "num_train_epochs": rounds,
            "save_strategy": "epoch",
            "output_dir": str(tmp_path),
        }

    first = trained(make_config, [brightness, large], **settings(1))
    remembered = first.advantages.state_dict()
    assert len(remembered) == 2 and remembered[0] != remembered[1]
    assert json.loads((tmp_path / "checkpoint-1" / "prompt_statistics.json").read_text()) == remembered
    config = make_config(reward_weights=WEIGHTS, num_images_per_prompt=4, **settings(2))
    resumed = DDPOTrainer(config, [brightness, large], PROMPTS, tiny_pipeline())
    resumed._load_round(str(tmp_path / "checkpoint-1"))
    assert resumed.advantages.state_dict() == remembered


def test_statistics_of_other_reward_functions_are_forgotten_with_a_word(make_config, tmp_path, caplog):
    common = {"advantage_normalization": "prompt", "save_strategy": "epoch", "output_dir": str(tmp_path)}
    trained(make_config, [brightness, large], **common)
    config = make_config(num_train_epochs=2, multi_objective_aggregation="normalize_then_sum", **common)
    trainer = DDPOTrainer(config, [brightness, large], PROMPTS, tiny_pipeline())
    with caplog.at_level("WARNING", logger="ddpo_trl"):
        trainer.train(resume_from_checkpoint=True)
    said = [record.getMessage() for record in caplog.records if "prompt_statistics.json has" in record.getMessage()]
    assert len(said) == 1 and "has 1 statistics of" in said[0] and "this run has 2 of" in said[0]


def test_products_and_gates_are_plain_python(make_config):
    def gated(images, prompts, metadata):
        return redness(images, prompts, metadata) * (brightness(images, prompts, metadata) > 0.2)

    trainer = trained(make_config, gated, reward_weights=None)
    expected = gated(trainer.rollout.images, (), ()).double()
    assert torch.allclose(trainer.rollout.rewards, expected)


def test_nothing_to_normalise_is_refused(make_config):
    with pytest.raises(ValueError, match="normalize_then_sum.*advantage_normalization='none'"):
        make_config(multi_objective_aggregation="normalize_then_sum", advantage_normalization="none")
