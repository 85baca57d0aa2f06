"""The demo learns with every seed, in both directions and with both estimators; with shuffled rewards it does not."""

from typing import Any

import pytest

from ddpo_trl import demo
from ddpo_trl.cli.demo import parse_arguments


pytestmark = pytest.mark.slow

# A fall of the nearest-image share by more is reward hacking.
LARGEST_FALL = 1 / 3


def run(tmp_path, *flags: str) -> dict[str, Any]:
    summary = demo.run_demo(*parse_arguments(["--output_dir", str(tmp_path), "--disable_tqdm", "true", *flags]))
    before, gain = abs(summary["eval_reward_before"]), summary["eval_reward_gain"]
    print(
        f"\n{' '.join(flags):<60} gain {gain:+.3f} = {gain / before:+.0%} = "
        f"{gain / summary['eval_reward_gain_stderr']:+.1f} standard errors, recognized "
        f"{summary['recognized_before']:.0%} -> {summary['recognized_after']:.0%}, "
        f"{summary['reward_queries']} reward queries"
    )
    return summary


def assert_learned(summary: dict[str, Any]) -> None:
    assert summary["eval_reward_gain"] >= 4 * summary["eval_reward_gain_stderr"]
    assert summary["eval_reward_gain"] >= 0.2 * abs(summary["eval_reward_before"])
    assert summary["recognized_after"] >= (1 - LARGEST_FALL) * summary["recognized_before"]


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_the_demo_learns_and_the_pictures_still_show_their_subjects(tmp_path, seed):
    assert_learned(run(tmp_path, "--seed", seed))


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_shuffled_rewards_teach_the_demo_nothing(tmp_path, seed):
    summary = run(tmp_path, "--shuffle_rewards", "true", "--seed", seed)
    assert abs(summary["eval_reward_gain"]) <= 2 * summary["eval_reward_gain_stderr"]


def test_the_demo_goes_the_other_way_too(tmp_path):
    summary = run(tmp_path, "--reward", "jpeg_incompressibility")
    assert summary["eval_reward_gain"] >= 4 * summary["eval_reward_gain_stderr"]


def alignment(tmp_path, *flags: str) -> dict[str, Any]:
    summary = run(tmp_path, "--reward", "emoji_alignment", *flags)
    print(f"nearest to their own drawing {summary['recognized_gain']:+.1%} ± {summary['recognized_gain_stderr']:.1%}")
    return summary


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_alignment_makes_more_images_recognizable_to_a_judge_that_is_not_the_reward(tmp_path, seed):
    summary = alignment(tmp_path, "--seed", seed)
    assert summary["eval_reward_gain"] >= 4 * summary["eval_reward_gain_stderr"]
    assert summary["recognized_gain"] >= 3 * summary["recognized_gain_stderr"]


@pytest.mark.parametrize("seed", ["0", "1"])
def test_shuffled_alignment_rewards_make_no_image_recognizable(tmp_path, seed):
    summary = alignment(tmp_path, "--shuffle_rewards", "true", "--seed", seed)
    assert summary["eval_reward_gain"] <= 2 * summary["eval_reward_gain_stderr"]
    assert summary["recognized_gain"] <= 2 * summary["recognized_gain_stderr"]


def test_the_score_function_estimator_learns_too(tmp_path):
    summary = run(tmp_path, "--loss_type", "sf")
    assert summary["eval_reward_gain"] >= 4 * summary["eval_reward_gain_stderr"]
