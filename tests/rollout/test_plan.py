"""The batch arithmetic of a round, worked out by hand."""

from typing import Any

import pytest

from ddpo_trl.rollout.plan import BatchPlan, plan_batches


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
            "trainable_steps": tuple(range(10)),
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
    sizes = plan(trainable_steps=tuple(range(transitions)), timestep_fraction=fraction)
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
        trainable_steps=tuple(range(50)),
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
        "samples 24 images per round (per_device_sample_batch_size x num_sample_batches)",
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
        plan(num_processes=2, num_images_per_prompt=8, trainable_steps=tuple(range(8)), timestep_fraction=0.5)
    )
    for part in (
        "48 = 2 processes x 6 batches x 4 images",
        "6 x 8 images each",
        "4 per sample, of 8 that may be (steps 0 to 7)",
        "steps with noise                 all",
        "6 = 2 passes x 3 mini-batches",
        "16, in micro-batches of 2 on each process",
        "16 (the derived gradient_accumulation_steps)",
    ):
        assert part in printed


# ---- The window ----


def window(size: int, **overrides: Any) -> BatchPlan:
    return plan(trainable_steps=(1, 2, 3, 4, 5, 6), window_size=size, **overrides)


def test_without_a_window_every_round_trains_on_all_steps_that_may_be():
    sizes = plan(trainable_steps=(1, 2, 4))
    assert {sizes.trained_steps(round, seed) for round in range(5) for seed in range(5)} == {(1, 2, 4)}


def test_a_fixed_window_stays_at_the_first_steps():
    sizes = window(2, window_strategy="fixed")
    assert {sizes.trained_steps(round, seed) for round in range(60) for seed in range(3)} == {(1, 2)}


def test_a_progressive_window_moves_on_by_a_step_every_interval_and_from_the_end_to_the_start():
    sizes = window(4, window_strategy="progressive", window_interval=3)
    positions = [sizes.trained_steps(round, seed=0) for round in range(12)]
    once = [(1, 2, 3, 4)] * 3 + [(2, 3, 4, 5)] * 3 + [(3, 4, 5, 6)] * 3
    assert positions == once + [(1, 2, 3, 4)] * 3


def test_a_random_window_is_drawn_anew_in_each_round_and_gets_everywhere():
    sizes = window(4, window_strategy="random")
    drawn = [sizes.trained_steps(round, seed=7) for round in range(60)]
    assert set(drawn) == {(1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 6)}
    assert drawn == [sizes.trained_steps(round, seed=7) for round in range(60)]  # on every process, and on resume
    assert drawn != [sizes.trained_steps(round, seed=8) for round in range(60)]
    # each of 3 with probability 1/3: mean 20 of 60, standard deviation sqrt(60 * 1/3 * 2/3) = 3.7
    assert all(abs(drawn.count(position) - 20) < 4 * 3.7 for position in set(drawn))


@pytest.mark.parametrize("strategy", ["fixed", "progressive", "random"])
def test_a_window_as_wide_as_the_range_has_one_place(strategy):
    sizes = window(6, window_strategy=strategy, window_interval=1)
    assert {sizes.trained_steps(round, seed=0) for round in range(20)} == {(1, 2, 3, 4, 5, 6)}


def test_a_window_steps_over_deterministic_steps():
    sizes = plan(trainable_steps=(0, 1, 3, 4), window_size=2, window_strategy="progressive", window_interval=1)
    assert [sizes.trained_steps(round, seed=0) for round in range(3)] == [(0, 1), (1, 3), (3, 4)]


@pytest.mark.parametrize(
    ("size", "fraction", "trained"), [(1, 1.0, 1), (2, 1.0, 2), (6, 1.0, 6), (4, 0.5, 2), (2, 0.1, 1)]
)
def test_the_cost_of_training_falls_with_the_window(size, fraction, trained):
    sizes = window(size, timestep_fraction=fraction)
    assert sizes.transitions_per_sample == trained
    assert sizes.micro_batches_per_update == 4 * trained


def test_the_printed_plan_names_the_window():
    printed = str(window(2, window_strategy="progressive"))
    assert "2 per sample, of 6 that may be (steps 1 to 6)" in printed
    assert "2 in a row, progressive" in printed


# ---- From a config ----


@pytest.mark.parametrize(
    ("stds", "bounds", "trained"),
    [
        ([0.1] * 10, [0.0, 1.0], tuple(range(10))),
        ([0.1] * 10, [0.0, 0.8], (0, 1, 2, 3, 4, 5, 6, 7)),  # all but the last two of ten
        ([0.1] * 10, [0.2, 0.5], (2, 3, 4)),
        ([0.1] * 9 + [0.0], [0.0, 1.0], tuple(range(9))),  # the last step is deterministic
        ([0.0, 0.1, 0.0, 0.1], [0.0, 1.0], (1, 3)),
    ],
)
def test_stochastic_steps_in_the_range_are_trained_on(make_config, stds, bounds, trained):
    assert plan_batches(make_config(train_timestep_range=bounds), stds).trainable_steps == trained


@pytest.mark.parametrize("steps", [3, 7, 10, 50])
def test_ranges_that_meet_share_no_step_and_leave_none_out(make_config, steps):
    parts = [
        plan_batches(make_config(train_timestep_range=bounds), [0.1] * steps).trainable_steps
        for bounds in ([0.0, 0.35], [0.35, 0.7], [0.7, 1.0])
    ]
    assert sum(parts, ()) == tuple(range(steps))


@pytest.mark.parametrize(
    ("stds", "bounds"), [([0.0] * 4, [0.0, 1.0]), ([0.1, 0.1, 0.1, 0.0], [0.75, 1.0]), ([0.1] * 4, [0.5, 0.55])]
)
def test_a_range_without_a_stochastic_step_is_refused(make_config, stds, bounds):
    with pytest.raises(ValueError, match=r"train_timestep_range is \[.*\], which holds no stochastic step of the 4"):
        plan_batches(make_config(train_timestep_range=bounds), stds)


@pytest.mark.parametrize(
    ("stds", "bounds", "size", "stochastic"),
    [([0.1] * 4, [0.0, 1.0], 5, 4), ([0.1] * 4, [0.0, 0.5], 3, 2), ([0.1, 0.1, 0.1, 0.0], [0.0, 1.0], 4, 3)],
)
def test_a_window_wider_than_the_steps_that_may_be_trained_on_is_refused(make_config, stds, bounds, size, stochastic):
    message = (
        rf"sde_window_size is {size}, more than the {stochastic} stochastic steps in train_timestep_range=.*"
        r"\. Lower it, or raise num_inference_steps"
    )
    with pytest.raises(ValueError, match=message):
        plan_batches(make_config(train_timestep_range=bounds, sde_window_size=size), stds)
    assert plan_batches(make_config(train_timestep_range=bounds, sde_window_size=size - 1), stds)


def test_the_plan_takes_its_sizes_from_the_config(make_config):
    config = make_config(
        per_device_sample_batch_size=8,
        num_sample_batches=3,
        num_images_per_prompt=6,
        per_device_train_batch_size=4,
        num_mini_batches=2,
        num_ppo_epochs=5,
        timestep_fraction=0.5,
        sde_window_size=2,
        sde_window_strategy="progressive",
        sde_window_interval=7,
    )
    assert plan_batches(config, [0.1] * 4) == BatchPlan(
        num_processes=1,
        per_device_sample_batch_size=8,
        num_sample_batches=3,
        num_images_per_prompt=6,
        per_device_train_batch_size=4,
        num_mini_batches=2,
        num_ppo_epochs=5,
        trainable_steps=(0, 1, 2, 3),
        window_size=2,
        window_strategy="progressive",
        window_interval=7,
        timestep_fraction=0.5,
        stds=(0.1, 0.1, 0.1, 0.1),
    )


def test_weights_are_in_proportion_to_the_std_and_1_on_average_over_the_steps_that_may_be_trained_on():
    sizes = plan(trainable_steps=(1, 2, 3), stds=(5.0, 4.0, 1.5, 0.5, 0.1), transition_weighting="std")
    assert [sizes.weight(step) for step in (1, 2, 3)] == [2.0, 0.75, 0.25]  # their mean σ is 2
    assert sizes.weights(round=0, seed=0) == {1: 2.0, 2: 0.75, 3: 0.25}
    assert "by σ, 2 for the first to 0.25 for the last" in str(sizes)
    uniform = plan(trainable_steps=(1, 2, 3))
    assert uniform.weights(round=0, seed=0) == {1: 1.0, 2: 1.0, 3: 1.0}
