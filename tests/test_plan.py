"""The batch arithmetic of a round, worked out by hand."""

from typing import Any

import pytest

from ddpo_trl.plan import BatchPlan, plan_batches


def plan(**overrides: Any) -> BatchPlan:
    return BatchPlan(
        **{
            "num_processes": 1,
            "per_device_sample_batch_size": 4,
            "num_sample_batches": 6,
            "num_images_per_prompt": 1,
            "per_device_train_batch_size": 2,
            "num_mini_batches": 3,
            "num_ppo_epochs": 2,
            "recorded_steps": tuple(range(10)),
            "timestep_fraction": 1.0,
            **overrides,
        }
    )


def test_the_sizes_of_a_round():
    sizes = plan(num_processes=2, num_images_per_prompt=8)
    assert sizes.samples_per_process == 24  # 6 batches of 4
    assert sizes.samples_per_round == 48  # on 2 processes
    assert sizes.prompts_per_round == 6  # with 8 images each
    assert sizes.samples_per_mini_batch == 8  # a third of a process's 24
    assert sizes.transitions_per_sample == 10
    assert sizes.micro_batches_per_update == 40  # 4 micro-batches of 2 samples, at 10 timesteps
    assert sizes.updates_per_round == 6  # 2 passes of 3
    assert sizes.micro_batches_per_round == 240


@pytest.mark.parametrize(
    ("transitions", "fraction", "trained"),
    [(10, 1.0, 10), (10, 0.5, 5), (10, 0.3, 3), (10, 0.24, 2), (50, 0.58, 29), (100, 0.29, 29), (3, 0.01, 1)],
)
def test_a_fraction_of_the_transitions_is_trained_on_but_at_least_one(transitions, fraction, trained):
    sizes = plan(recorded_steps=tuple(range(transitions)), timestep_fraction=fraction)
    assert sizes.transitions_per_sample == trained
    assert sizes.micro_batches_per_update == 4 * trained


@pytest.mark.parametrize(("queries", "rounds"), [(1, 1), (24, 1), (25, 2), (48, 2), (49, 3)])
def test_reward_queries_are_rounded_up_to_whole_rounds(queries, rounds):
    assert plan().rounds_for(queries) == rounds


@pytest.mark.parametrize(
    ("num_processes", "num_mini_batches", "queries_an_update"),
    [
        pytest.param(8, 4, 64, id="IS: 4 updates of 64"),
        pytest.param(8, 1, 256, id="SF: 1 update of 256"),
        pytest.param(1, 4, 64, id="IS on one process"),
        pytest.param(1, 1, 256, id="SF on one process"),
    ],
)
def test_the_settings_of_the_paper(num_processes, num_mini_batches, queries_an_update):
    # 256 samples a round, 50 steps (appendix D of https://huggingface.co/papers/2305.13301)
    sizes = plan(
        num_processes=num_processes,
        per_device_sample_batch_size=8,
        num_sample_batches=32 // num_processes,
        num_mini_batches=num_mini_batches,
        num_ppo_epochs=1,
        recorded_steps=tuple(range(50)),
    )
    assert sizes.samples_per_round == 256
    assert sizes.updates_per_round == num_mini_batches
    assert sizes.samples_per_mini_batch * num_processes == queries_an_update
    assert sizes.micro_batches_per_update == queries_an_update // num_processes // 2 * 50


def test_samples_that_do_not_divide_into_updates_are_refused_with_the_numbers():
    with pytest.raises(ValueError) as refusal:
        plan(per_device_train_batch_size=5)
    message = str(refusal.value)
    # what does not divide, the four arguments that decide, and the whole plan
    for part in (
        "samples 24 images a round (per_device_sample_batch_size x num_sample_batches)",
        "num_mini_batches x per_device_train_batch_size = 15",
        "Change one of the four",
        "24 = 1 processes x 6 batches x 4 images",
        "6 = 2 passes x 3 mini-batches",
        "8, in micro-batches of 5 on each process",
    ):
        assert part in message


def test_images_that_do_not_divide_into_groups_are_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"A round has 24 images, .* num_images_per_prompt = 5\. Change it"):
        plan(num_images_per_prompt=5)


def test_groups_may_span_processes_but_must_fill_the_round():
    assert (
        plan(num_processes=2, num_images_per_prompt=16).prompts_per_round == 3
    )  # 48 / 16, although 24 / 16 is not whole
    with pytest.raises(ValueError, match="A round has 24 images"):
        plan(num_processes=1, num_images_per_prompt=16)


def test_the_printed_plan_holds_the_arithmetic():
    printed = str(
        plan(num_processes=2, num_images_per_prompt=8, recorded_steps=tuple(range(8)), timestep_fraction=0.5)
    )
    for part in (
        "48 = 2 processes x 6 batches x 4 images",
        "6 x 8 images each",
        "4 a sample, of 8 recorded (steps 0 to 7)",
        "6 = 2 passes x 3 mini-batches",
        "16, in micro-batches of 2 on each process",
        "16 (the derived gradient_accumulation_steps)",
    ):
        assert part in printed


# ---- From a config ----


@pytest.mark.parametrize(
    ("stds", "bounds", "recorded"),
    [
        ([0.1] * 10, [0.0, 1.0], tuple(range(10))),
        ([0.1] * 10, [0.0, 0.8], (0, 1, 2, 3, 4, 5, 6, 7)),  # all but the last two of ten
        ([0.1] * 10, [0.2, 0.5], (2, 3, 4)),
        ([0.1] * 9 + [0.0], [0.0, 1.0], tuple(range(9))),  # the last step is deterministic
        ([0.0, 0.1, 0.0, 0.1], [0.0, 1.0], (1, 3)),
    ],
)
def test_stochastic_steps_in_the_range_are_trained_on(make_config, stds, bounds, recorded):
    assert plan_batches(make_config(train_timestep_range=bounds), stds).recorded_steps == recorded


@pytest.mark.parametrize("steps", [3, 7, 10, 50])
def test_ranges_that_meet_share_no_step_and_leave_none_out(make_config, steps):
    parts = [
        plan_batches(make_config(train_timestep_range=bounds), [0.1] * steps).recorded_steps
        for bounds in ([0.0, 0.35], [0.35, 0.7], [0.7, 1.0])
    ]
    assert sum(parts, ()) == tuple(range(steps))


@pytest.mark.parametrize(
    ("stds", "bounds"), [([0.0] * 4, [0.0, 1.0]), ([0.1, 0.1, 0.1, 0.0], [0.75, 1.0]), ([0.1] * 4, [0.5, 0.55])]
)
def test_a_range_without_a_stochastic_step_is_refused(make_config, stds, bounds):
    with pytest.raises(ValueError, match=r"train_timestep_range is \[.*\], which holds no stochastic step of the 4"):
        plan_batches(make_config(train_timestep_range=bounds), stds)


def test_the_plan_takes_its_sizes_from_the_config(make_config):
    config = make_config(
        per_device_sample_batch_size=8,
        num_sample_batches=3,
        num_images_per_prompt=6,
        per_device_train_batch_size=4,
        num_mini_batches=2,
        num_ppo_epochs=5,
        timestep_fraction=0.5,
    )
    assert plan_batches(config, [0.1] * 4) == BatchPlan(
        num_processes=1,
        per_device_sample_batch_size=8,
        num_sample_batches=3,
        num_images_per_prompt=6,
        per_device_train_batch_size=4,
        num_mini_batches=2,
        num_ppo_epochs=5,
        recorded_steps=(0, 1, 2, 3),
        timestep_fraction=0.5,
    )
