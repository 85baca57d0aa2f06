"""Choices of the transitions to train on, as benchmarks/transitions.py compares them."""

import pytest

from ddpo_trl.cli.demo import parse_arguments
from ddpo_trl.rollout.plan import plan_batches
from transitions import CHOICES, COMMON


# Of the embedded pipeline's five steps.
STDS = [0.82, 0.65, 0.43, 0.041, 0.021]


@pytest.mark.parametrize(
    ("choice", "trainable", "trained_of_a_sample", "with_noise"),
    [
        ("all", (0, 1, 2, 3, 4), 5, None),
        ("std", (0, 1, 2, 3, 4), 5, None),
        ("first", (0, 1, 2), 3, None),
        ("fraction", (0, 1, 2), 1, None),
        ("window", (0, 1, 2), 2, 2),
    ],
)
def test_a_choice_trains_on_what_its_title_says(tmp_path, choice, trainable, trained_of_a_sample, with_noise):
    _, config = parse_arguments([*COMMON, *CHOICES[choice].flags, "--output_dir", str(tmp_path)])
    plan = plan_batches(config, STDS)
    assert plan.trainable_steps == trainable
    assert plan.transitions_per_sample == trained_of_a_sample
    assert plan.window_size == with_noise
    assert (plan.weight(3) != 1.0) == (choice == "std")
    assert (plan.samples_per_round, plan.updates_per_round) == (128, 4)
