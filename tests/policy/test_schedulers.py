"""Policy schedulers of variance-preserving diffusions, and what all have in common.

Against diffusers' own DDIM step, `torch.distributions` and the formulas of the papers.
"""

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    SchedulerMixin,
    SCMScheduler,
    TCDScheduler,
)
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor
from torch.distributions import Normal

from ddpo_trl.policy.gaussian import log_prob
from ddpo_trl.policy.schedulers import ActionSource, Replay, Sampling, StepReplayed, policy_scheduler
from ddpo_trl.policy.schedulers.convert import VARIANCE_PRESERVING_SCHEDULERS


# Stable Diffusion's noise
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STABLE_DIFFUSION = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
SHAPE = (2, 4, 8, 8)


def ddim(**config: Any) -> DDIMScheduler:
    return DDIMScheduler(**{**STABLE_DIFFUSION, **config})


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + index) for index in range(count)]


def draw(shape: Sequence[int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def denoiser(latents: Tensor, timestep: Tensor) -> Tensor:
    """Any function of state and time."""
    return torch.sin(1.7 * latents + timestep / 300)


def begin(policy: Any, steps: int, first: int = 0) -> Tensor:
    """The timesteps of a pipeline that leaves out the `first` ones, as image-to-image pipelines do."""
    policy.set_timesteps(steps)
    if first:
        policy.set_begin_index(first)
    return policy.timesteps[first:]


def sample(policy: Any, steps: int, latents: Tensor, source: Sampling, first: int = 0) -> list[Tensor]:
    """The latents after each step, as a pipeline would make them."""
    trajectory = []
    with policy.acting(source):
        for timestep in begin(policy, steps, first):
            latents = policy.step(denoiser(latents, timestep), timestep, latents, return_dict=False)[0]
            trajectory.append(latents)
    return trajectory


def replay(policy: Any, steps: int, index: int, latents: Tensor, first: int = 0) -> Replay:
    """What a pipeline that is given `latents` as its first state does until the policy leaves it."""
    source = Replay(index, latents)
    with policy.acting(source), pytest.raises(StepReplayed):
        timestep = begin(policy, steps, first)[0]
        policy.step(denoiser(latents, timestep), timestep, latents)
    return source


def stds(policy: Any, steps: int, source: ActionSource | None = None) -> list[float]:
    with policy.acting(source or Replay(0)):
        policy.set_timesteps(steps)
    return policy.stds


def diffusers_sample(scheduler: DDIMScheduler, steps: int, latents: Tensor, **step_kwargs: Any) -> list[Tensor]:
    trajectory = []
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(denoiser(latents, timestep), timestep, latents, **step_kwargs).prev_sample
        trajectory.append(latents)
    return trajectory


def diffusers_mean(scheduler: DDIMScheduler, steps: int, index: int, latents: Tensor, eta: float) -> Tensor:
    """Mean of a step: diffusers' own with its noise set to zero."""
    scheduler.set_timesteps(steps)
    timestep = scheduler.timesteps[index]
    noise = torch.zeros_like(latents)
    return scheduler.step(denoiser(latents, timestep), timestep, latents, eta=eta, variance_noise=noise).prev_sample


def alphas_cumprod() -> np.ndarray:
    """The signal's variance of Stable Diffusion's noise at every training timestep, float64."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return np.cumprod(1 - betas)


def sigma(timestep: int, next_timestep: int, final_alpha: float, eta: float) -> float:
    """eta * sqrt((1 - a_next) / (1 - a)) * sqrt(1 - a / a_next), eq. 16 of https://huggingface.co/papers/2010.02502."""
    alpha = alphas_cumprod()[timestep]
    next_alpha = alphas_cumprod()[next_timestep] if next_timestep >= 0 else final_alpha
    return float(eta * np.sqrt((1 - next_alpha) / (1 - alpha)) * np.sqrt(1 - alpha / next_alpha))


# ---- The same steps as diffusers ----

EVERY_DDIM = [
    pytest.param(
        {"prediction_type": prediction, "timestep_spacing": spacing, "set_alpha_to_one": to_one},
        id=f"{prediction}-{spacing}-{'to one' if to_one else 'not to one'}",
    )
    for prediction in ("epsilon", "v_prediction", "sample")
    for spacing in ("leading", "trailing", "linspace")
    for to_one in (True, False)
]


@pytest.mark.parametrize("config", EVERY_DDIM)
@pytest.mark.parametrize("steps", [10, 7])  # 7 does not divide 1000
def test_without_noise_a_step_is_diffusers_own_to_the_bit(config, steps):
    source = Sampling(generators(2), record=range(steps), reduction="mean")
    trajectory = sample(policy_scheduler(ddim(**config), eta=0.0), steps, draw(SHAPE), source)
    expected = diffusers_sample(ddim(**config), steps, draw(SHAPE), eta=0.0)
    assert len(trajectory) == steps
    for ours, theirs in zip(trajectory, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert source.steps == {}  # nothing stochastic, nothing to train on


@pytest.mark.parametrize("config", EVERY_DDIM)
@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_with_noise_a_step_is_diffusers_own_to_the_bit(config, eta):
    source = Sampling(generators(2), record=range(10), reduction="mean")
    trajectory = sample(policy_scheduler(ddim(**config), eta), 10, draw(SHAPE), source)
    expected = diffusers_sample(ddim(**config), 10, draw(SHAPE), eta=eta, generator=generators(2))
    for ours, theirs in zip(trajectory, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_pipeline_gets_the_form_of_answer_it_asks_for():
    policy: Any = policy_scheduler(ddim(), eta=1.0)
    with policy.acting(Sampling(generators(2), record=(), reduction="mean")):
        policy.set_timesteps(5)
        output = policy.step(draw(SHAPE), policy.timesteps[0], draw(SHAPE, 1))
    policy_again: Any = policy_scheduler(ddim(), eta=1.0)
    with policy_again.acting(Sampling(generators(2), record=(), reduction="mean")):
        policy_again.set_timesteps(5)
        latents, predicted = policy_again.step(draw(SHAPE), policy.timesteps[0], draw(SHAPE, 1), return_dict=False)
    assert torch.equal(output.prev_sample, latents)
    reference = ddim()
    reference.set_timesteps(5)
    expected = reference.step(draw(SHAPE), int(reference.timesteps[0]), draw(SHAPE, 1)).pred_original_sample
    assert torch.equal(predicted, expected)  # some pipelines decode it after the last step
    assert torch.equal(output.pred_original_sample, expected)


# ---- The standard deviation ----


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_sigma_is_that_of_the_paper(eta):
    # leading spacing with an offset of 1: 901, 801, ..., 1; after the last step the signal is that of timestep 0
    expected = [sigma(t, t - 100, final_alpha=float(alphas_cumprod()[0]), eta=eta) for t in range(901, 0, -100)]
    # float32 keeps 1 - a / a_next, about 1e-3 at the last step, to 1e-4 of its value
    actual = stds(policy_scheduler(ddim(), eta), 10)
    assert actual == pytest.approx(expected, rel=1e-4)
    assert min(actual) > 0


@pytest.mark.parametrize(
    ("config", "deterministic"),
    [
        ({"set_alpha_to_one": True}, [9]),
        ({"set_alpha_to_one": False}, []),
        ({"set_alpha_to_one": False, "steps_offset": 0}, [9]),  # from timestep 0 to timestep 0
        ({"set_alpha_to_one": True, "timestep_spacing": "trailing"}, [9]),
        ({"set_alpha_to_one": False, "timestep_spacing": "trailing"}, []),
    ],
)
def test_deterministic_steps_are_run_but_never_recorded(config, deterministic):
    policy: Any = policy_scheduler(ddim(**config), eta=1.0)
    source = Sampling(generators(2), record=range(10), reduction="mean")
    assert len(sample(policy, 10, draw(SHAPE), source)) == 10
    assert [index for index, std in enumerate(policy.stds) if std == 0] == deterministic
    assert sorted(source.steps) == [index for index in range(10) if index not in deterministic]


@pytest.mark.parametrize("steps", [5, 25, 50])  # at 25 and 50 diffusers' own step takes the root of -6e-8
def test_zero_terminal_snr_has_finite_steps(steps):
    config = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
    }
    policy: Any = policy_scheduler(ddim(**config), eta=1.0)
    source = Sampling(generators(2), record=range(steps), reduction="mean")
    trajectory = sample(policy, steps, draw(SHAPE), source)
    assert policy.alphas_cumprod[-1] == 0  # the first step starts from pure noise
    assert all(torch.isfinite(latents).all() for latents in trajectory)
    assert sorted(source.steps) == list(range(steps - 1))
    assert all(torch.isfinite(step.log_probs).all() for step in source.steps.values())


# ---- How much noise a step can hold ----


def limit_of(policy: Any, steps: int, first: int = 0) -> float:
    """The largest eta, from the message."""
    policy.eta = 1e6
    with policy.acting(Sampling(generators(2), record=(), reduction="mean")):
        begin(policy, steps, first)
        with pytest.raises(
            ValueError, match=r"eta is 1e\+06, with which step \d+ of .*Set eta to .* at most"
        ) as error:
            policy.check_noise(range(steps - first))
    return float(str(error.value).split("Set eta to ")[1].split(" at most")[0])


@pytest.mark.parametrize("steps", [2, 3, 10, 50, 200])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_the_largest_eta_is_that_with_which_a_step_draws_all_of_its_noise(steps, spacing):
    """sigma^2 = 1 - a_next solved for eta; the message has three digits of it, rounded down."""
    scheduler = ddim(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    alphas = alphas_cumprod()
    now = scheduler.timesteps.numpy()
    following = np.maximum(now - 1000 // steps, 0)  # after the last step, timestep 0's
    exact = min(
        np.sqrt((1 - alphas[t]) / (1 - alphas[t] / alphas[s]))
        for t, s in zip(now, following, strict=True)
        if t != s  # no step at all, so no noise
    )
    limit = limit_of(policy_scheduler(scheduler, eta=1.0), steps)
    assert 0.99 * exact < limit <= exact * (1 + 1e-4)  # 1 - a / a_next is known to 1e-4
    assert limit >= 1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_what_is_refused_has_more_noise_than_the_denoiser_expects(prediction):
    policy: Any = policy_scheduler(ddim(prediction_type=prediction), eta=1.0)
    limit = limit_of(policy, 3)
    expected = 1 - alphas_cumprod()[[334, 1, 0]]
    for eta, fits in ((limit, True), (1.01 * limit, False), (2.0, False)):
        policy.eta = eta
        variances = np.array(stds(policy, 3)) ** 2
        assert (variances <= expected * (1 + 1e-4)).all() == fits
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match=f"Set eta to {limit:g} at most"):
            policy.check_noise(range(3))


@pytest.mark.parametrize("scheduler_class", [CogVideoXDDIMScheduler, DDIMScheduler, DDPMScheduler, PNDMScheduler])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_ddpms_noise_fits_every_schedule(scheduler_class, steps):
    config = {"clip_sample": False} if "clip_sample" in scheduler_class().config else {}
    policy: Any = policy_scheduler(scheduler_class(**config), eta=1.0)
    stds(policy, steps)
    policy.check_noise(range(steps))


def test_only_steps_that_get_noise_have_to_hold_it():
    policy: Any = policy_scheduler(ddim(set_alpha_to_one=True), eta=2.0)
    settled = stds(policy, 3)
    assert settled[2] == 0  # deterministic
    policy.check_noise([2])
    with pytest.raises(ValueError, match="step 1 of 3"):
        policy.check_noise([1, 2])


# ---- What is recorded ----


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_recorded_log_probs_are_those_of_torch_distributions(reduction, prediction):
    eta = 0.7
    source = Sampling(generators(2), record=range(10), reduction=reduction)
    states = [draw(SHAPE)]
    policy: Any = policy_scheduler(ddim(prediction_type=prediction), eta)
    states += sample(policy, 10, states[0], source)
    for index, timestep in enumerate(range(901, 0, -100)):
        mean = diffusers_mean(ddim(prediction_type=prediction), 10, index, states[index], eta)
        std = sigma(timestep, timestep - 100, final_alpha=float(alphas_cumprod()[0]), eta=eta)
        density = Normal(mean.double(), std).log_prob(states[index + 1].double()).flatten(1)
        expected = density.mean(1) if reduction == "mean" else density.sum(1)
        # the float32 sigma is known to 1e-4: d log N = (z^2 - 1) d log sigma, of mean zero over the dimensions
        torch.testing.assert_close(source.steps[index].log_probs.double(), expected, rtol=1e-4, atol=1e-5)


def test_recorded_states_and_actions_are_the_trajectory():
    source = Sampling(generators(2), record=(0, 3, 9), reduction="mean")
    states = [draw(SHAPE)]
    states += sample(policy_scheduler(ddim(), eta=1.0), 10, states[0], source)
    assert sorted(source.steps) == [0, 3, 9]
    for index, step in source.steps.items():
        assert torch.equal(step.latents, states[index])
        assert torch.equal(step.next_latents, states[index + 1])


def test_sampled_actions_have_the_stated_mean_and_standard_deviation():
    states = [draw((64, 4, 16, 16))]
    states += sample(policy_scheduler(ddim(), eta=1.0), 10, states[0], Sampling(generators(64), (), "mean"))
    for index, timestep in enumerate(range(901, 0, -100)):
        std = sigma(timestep, timestep - 100, final_alpha=float(alphas_cumprod()[0]), eta=1.0)
        z = (states[index + 1] - diffusers_mean(ddim(), 10, index, states[index], eta=1.0)).double() / std
        # standard errors over n normal numbers: 1 / sqrt(n) of the mean, sqrt(2 / n) of the variance
        assert abs(z.mean().item()) < 4 / z.numel() ** 0.5
        assert abs(z.var().item() - 1) < 4 * (2 / z.numel()) ** 0.5


def test_the_noise_of_a_sample_does_not_depend_on_its_batch():
    latents = draw((3, 4, 8, 8))
    together = sample(policy_scheduler(ddim(), 1.0), 5, latents, Sampling(generators(3), (), "mean"))[-1]
    for row in range(3):
        alone = Sampling(generators(1, seed=row), (), "mean")
        one = sample(policy_scheduler(ddim(), 1.0), 5, latents[row : row + 1], alone)[-1]
        assert torch.equal(one[0], together[row])


def test_in_half_precision_an_action_is_rounded_before_its_density_is_taken():
    latents = draw(SHAPE).bfloat16()
    source = Sampling(generators(2), record=range(10), reduction="mean")
    final = sample(policy_scheduler(ddim(), eta=1.0), 10, latents, source)[-1]
    assert final.dtype == torch.bfloat16
    rounding_errors = []
    for index, timestep in enumerate(range(901, 0, -100)):
        step = source.steps[index]
        assert step.latents.dtype == step.next_latents.dtype == torch.bfloat16
        assert step.log_probs.dtype == torch.float32
        scheduler = ddim()
        scheduler.set_timesteps(10)
        now = scheduler.timesteps[index]
        output = denoiser(step.latents, now).float()  # bfloat16, as the network gave it
        zeros = torch.zeros(SHAPE)
        mean = scheduler.step(output, now, step.latents.float(), eta=1.0, variance_noise=zeros).prev_sample
        std = sigma(timestep, timestep - 100, final_alpha=float(alphas_cumprod()[0]), eta=1.0)
        noise = torch.cat([draw((10, 1, *SHAPE[1:]), seed)[index] for seed in (0, 1)])
        rounded = Normal(mean, std).log_prob(step.next_latents.float()).flatten(1).mean(1)
        torch.testing.assert_close(step.log_probs, rounded, rtol=1e-4, atol=1e-5)
        unrounded = Normal(mean, std).log_prob(mean + std * noise).flatten(1).mean(1)
        rounding_errors.append((rounded - unrounded).abs().max().item())
    assert max(rounding_errors) > 1e-4  # more than the clip range: the order matters


# ---- Replay ----


@pytest.mark.parametrize("config", EVERY_DDIM)
@pytest.mark.parametrize("index", [0, 4, 9])
def test_replay_runs_exactly_the_one_recorded_step(config, index):
    latents = draw(SHAPE)
    reference = ddim(**config)
    reference.set_timesteps(10)
    policy: Any = policy_scheduler(ddim(**config), eta=0.8)
    source = replay(policy, 10, index, latents)
    assert policy.timesteps[0] == reference.timesteps[index]  # it is the first that the pipeline gets to see
    assert sorted(policy.timesteps.tolist()) == sorted(reference.timesteps.tolist())  # some pipelines count them
    assert source.latents is latents
    assert torch.equal(source.mean, diffusers_mean(ddim(**config), 10, index, latents, eta=0.8))
    assert source.std == stds(policy, 10)[index]


def test_a_replayed_step_needs_no_state_of_ones_own():
    latents = draw(SHAPE)
    policy: Any = policy_scheduler(ddim(), eta=1.0)
    source = Replay(0)
    assert source.latents is None
    with policy.acting(source), pytest.raises(StepReplayed):
        policy.set_timesteps(10)
        policy.step(denoiser(latents, policy.timesteps[0]), policy.timesteps[0], latents)
    assert source.latents is latents
    assert torch.equal(source.mean, diffusers_mean(ddim(), 10, 0, latents, eta=1.0))


def test_gradients_flow_through_a_replayed_mean():
    policy: Any = policy_scheduler(ddim(), eta=1.0)
    output = draw(SHAPE).requires_grad_()
    source = Replay(3, draw(SHAPE, 1))
    with policy.acting(source), pytest.raises(StepReplayed):
        policy.set_timesteps(10)
        policy.step(output, policy.timesteps[0], draw(SHAPE, 2))
    (gradient,) = torch.autograd.grad(source.mean.sum(), output)
    # d mean / d epsilon = sqrt(1 - a_next - sigma^2) - sqrt(a_next) sqrt(1 - a) / sqrt(a), at timestep 601
    alpha, next_alpha = alphas_cumprod()[601], alphas_cumprod()[501]
    std = sigma(601, 501, final_alpha=0.0, eta=1.0)
    expected = np.sqrt(1 - next_alpha - std**2) - np.sqrt(next_alpha * (1 - alpha) / alpha)
    torch.testing.assert_close(gradient, torch.full(SHAPE, expected, dtype=torch.float32), rtol=1e-4, atol=0)


def test_sampling_after_a_replay_runs_the_whole_schedule_again():
    policy: Any = policy_scheduler(ddim(), eta=1.0)
    before = sample(policy, 10, draw(SHAPE), Sampling(generators(2), (), "mean"))
    replay(policy, 10, 3, draw(SHAPE))
    after = sample(policy, 10, draw(SHAPE), Sampling(generators(2), (), "mean"))
    assert len(before) == 10
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_policy_scheduler_works_only_where_its_actions_come_from_somewhere():
    policy: Any = policy_scheduler(ddim(), eta=1.0)
    with pytest.raises(RuntimeError, match="acting"):
        policy.set_timesteps(10)
    with pytest.raises(RuntimeError, match="a user's interrupt"), policy.acting(Replay(0, draw(SHAPE))):
        policy.set_timesteps(10)
        raise RuntimeError("a user's interrupt")
    with pytest.raises(RuntimeError, match="acting"):
        policy.step(draw(SHAPE), 901, draw(SHAPE))


# ---- Parts of the schedule ----


def test_steps_outside_the_window_are_diffusers_deterministic_ones_and_are_not_recorded():
    policy: Any = policy_scheduler(ddim(), eta=1.0)
    source = Sampling(generators(2), record=range(10), reduction="mean", stochastic={1, 2})
    states = [draw(SHAPE)]
    states += sample(policy, 10, states[0], source)
    for index in range(10):
        deterministic = diffusers_mean(ddim(), 10, index, states[index], eta=0.0)
        assert torch.equal(states[index + 1], deterministic) == (index not in {1, 2})
    assert sorted(source.steps) == [1, 2]
    noise = [torch.stack([torch.randn(2, 4, 8, 8, generator=one)[i] for one in generators(2)]) for i in range(2)]
    for index, drawn in zip((1, 2), noise, strict=True):  # the first numbers of each sample's generator
        mean = diffusers_mean(ddim(), 10, index, states[index], eta=1.0)
        std = sigma(901 - 100 * index, 801 - 100 * index, final_alpha=0.0, eta=1.0)
        torch.testing.assert_close(states[index + 1], mean + std * drawn, rtol=1e-4, atol=1e-5)
        assert replay(policy, 10, index, states[index]).std == pytest.approx(std, rel=1e-4)


def test_the_window_does_not_change_what_the_standard_deviations_are():
    policy: Any = policy_scheduler(ddim(), eta=1.0)
    window = Sampling(generators(2), (), "mean", stochastic={4})
    assert stds(policy, 10, window) == stds(policy, 10)


def test_only_the_first_steps_are_run_if_no_more_are_wanted():
    whole = sample(policy_scheduler(ddim(), eta=1.0), 10, draw(SHAPE), Sampling(generators(2), (), "mean"))
    few = Sampling(generators(2), (), "mean", max_steps=3)
    trajectory = sample(policy_scheduler(ddim(), eta=1.0), 10, draw(SHAPE), few)
    assert len(trajectory) == 3
    assert all(torch.equal(one, other) for one, other in zip(trajectory, whole[:3], strict=True))


FIRST = 4  # image-to-image with strength 0.6 leaves out four steps of ten


def test_steps_are_counted_from_the_first_that_the_pipeline_runs():
    policy: Any = policy_scheduler(ddim(), eta=1.0)
    source = Sampling(generators(2), record=(0, 5), reduction="mean")
    states = [draw(SHAPE)]
    states += sample(policy, 10, states[0], source, FIRST)
    assert len(states) == 1 + 6
    assert sorted(source.steps) == [0, 5]
    for index, step in source.steps.items():
        assert torch.equal(step.latents, states[index])
        timestep = 901 - 100 * (FIRST + index)
        mean = diffusers_mean(ddim(), 10, FIRST + index, states[index], eta=1.0)
        std = sigma(timestep, timestep - 100, final_alpha=float(alphas_cumprod()[0]), eta=1.0)
        expected = Normal(mean.double(), std).log_prob(step.next_latents.double()).flatten(1).mean(1)
        torch.testing.assert_close(step.log_probs.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_standard_deviations_are_those_of_the_steps_that_the_pipeline_runs():
    policy: Any = policy_scheduler(ddim(), eta=1.0)
    whole = stds(policy, 10)
    replay(policy, 10, 0, draw(SHAPE), FIRST)
    assert policy.stds == whole[FIRST:]


@pytest.mark.parametrize("index", [0, 2, 5])
def test_replay_finds_its_step_behind_those_that_the_pipeline_leaves_out(index):
    policy: Any = policy_scheduler(ddim(), eta=1.0)
    replay(policy, 10, 0, draw(SHAPE), FIRST)  # a trainer's first run: how many are left out is known after it
    latents = draw(SHAPE)
    source = replay(policy, 10, index, latents, FIRST)
    reference = ddim()
    reference.set_timesteps(10)
    assert policy.timesteps[FIRST] == reference.timesteps[FIRST + index]
    assert sorted(policy.timesteps.tolist()) == sorted(reference.timesteps.tolist())
    assert torch.equal(source.mean, diffusers_mean(ddim(), 10, FIRST + index, latents, eta=1.0))
    assert source.std == stds(policy_scheduler(ddim(), eta=1.0), 10)[FIRST + index]


def test_as_many_steps_as_wanted_are_run_behind_those_that_the_pipeline_leaves_out():
    policy: Any = policy_scheduler(ddim(), eta=1.0)
    whole = sample(policy, 10, draw(SHAPE), Sampling(generators(2), (), "mean"), FIRST)
    trajectory = sample(policy, 10, draw(SHAPE), Sampling(generators(2), (), "mean", max_steps=2), FIRST)
    assert len(whole) == 6
    assert len(trajectory) == 2
    assert all(torch.equal(one, other) for one, other in zip(trajectory, whole[:2], strict=True))


# ---- Other schedulers ----


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_learned_variance_is_left_out(prediction):
    """PixArt's and Kandinsky's denoisers predict it in a second half of the channels; DDIM's variance is fixed."""
    latents = draw(SHAPE)
    policy: Any = policy_scheduler(ddim(prediction_type=prediction), eta=0.5)
    source = Replay(2)
    with policy.acting(source), pytest.raises(StepReplayed):
        policy.set_timesteps(10)
        output = denoiser(latents, policy.timesteps[0])
        policy.step(torch.cat([output, draw(SHAPE, 1)], dim=1), policy.timesteps[0], latents)
    assert torch.equal(source.mean, diffusers_mean(ddim(prediction_type=prediction), 10, 2, latents, eta=0.5))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [10, 25, 50])
@pytest.mark.parametrize("name", ["DDIM", "PNDM", "Euler"])
def test_a_velocity_keeps_zero_terminal_snr_finite_in_every_schedule(name, spacing, steps):
    settings = {"prediction_type": "v_prediction", "timestep_spacing": spacing}
    # PNDM has no option for it, but takes any betas.
    betas = rescale_zero_terminal_snr(torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    scheduler = {
        "DDIM": lambda: ddim(**settings, rescale_betas_zero_snr=True),
        "PNDM": lambda: PNDMScheduler(trained_betas=betas.tolist(), skip_prk_steps=True, **settings),
        "Euler": lambda: EulerDiscreteScheduler(**BETAS, rescale_betas_zero_snr=True, **settings),
    }[name]()
    assert scheduler.alphas_cumprod[-1] < 1e-6
    policy: Any = policy_scheduler(scheduler, eta=1.0)
    source = Sampling(generators(2), record=range(steps), reduction="mean")
    trajectory = sample(policy, steps, draw(SHAPE), source)
    assert all(torch.isfinite(latents).all() for latents in trajectory)
    assert len(source.steps) >= steps - 1  # the last may be deterministic
    assert all(torch.isfinite(step.log_probs).all() for step in source.steps.values())


# The release of CogVideoX: shifted towards noise, down to none of the signal.
COGVIDEOX = {"clip_sample": False, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({**COGVIDEOX, "prediction_type": "v_prediction"}, id="2B"),
        pytest.param({**COGVIDEOX, "prediction_type": "v_prediction", "snr_shift_scale": 1.0}, id="5B"),
        pytest.param({"clip_sample": False}, id="epsilon"),
        pytest.param({"clip_sample": False, "prediction_type": "sample"}, id="sample"),
        pytest.param({"clip_sample": False, "set_alpha_to_one": False}, id="not to one"),
    ],
)
@pytest.mark.parametrize("steps", [10, 7])
@pytest.mark.parametrize("scheduler_class", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_cogvideox_steps_are_diffusers_own_ddim_steps_without_noise(scheduler_class, config, steps):
    shape = (2, 3, 4, 4, 4)  # samples, frames, channels
    policy: Any = policy_scheduler(scheduler_class(**config), eta=0.0)
    trajectory = sample(policy, steps, draw(shape), Sampling(generators(2), (), "mean"))
    scheduler: Any = CogVideoXDDIMScheduler(**config)
    expected = diffusers_sample(scheduler, steps, draw(shape))
    assert len(trajectory) == steps
    for ours, theirs in zip(trajectory, expected, strict=True):  # diffusers computes in float64
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "same_as"),
    [
        pytest.param(
            PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
            DDIMScheduler(**STABLE_DIFFUSION),
            id="Stable Diffusion 1.5, whose file has no clip_sample",
        ),
        pytest.param(
            PNDMScheduler(**BETAS, steps_offset=1, prediction_type="v_prediction"),
            DDIMScheduler(**STABLE_DIFFUSION, prediction_type="v_prediction"),
            id="PNDM, whose default for the last step is not DDIM's",
        ),
        pytest.param(
            EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
            DDIMScheduler(**{**STABLE_DIFFUSION, "set_alpha_to_one": True}),
            id="SDXL",
        ),
        pytest.param(
            EulerDiscreteScheduler(**BETAS),
            DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="linspace"),
            id="Euler, whose default spacing is not DDIM's",
        ),
        pytest.param(
            DPMSolverMultistepScheduler(**BETAS, timestep_spacing="trailing"),
            DDIMScheduler(**{**STABLE_DIFFUSION, "set_alpha_to_one": True}, timestep_spacing="trailing"),
            id="DPM-Solver++",
        ),
        pytest.param(DDPMScheduler(clip_sample=False), DDIMScheduler(clip_sample=False), id="DDPM"),
        pytest.param(
            SASolverScheduler(), DDIMScheduler(clip_sample=False, timestep_spacing="linspace"), id="SA-Solver"
        ),
    ],
)
def test_schedulers_of_the_same_diffusion_become_the_same_policy(scheduler, same_as):
    policy: Any = policy_scheduler(scheduler, eta=0.0)
    assert policy.config.clip_sample is False  # DDIM's default is True, and not all classes have the key
    trajectory = sample(policy, 10, draw(SHAPE), Sampling(generators(2), (), "mean"))
    expected = diffusers_sample(same_as, 10, draw(SHAPE), eta=0.0)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(trajectory, expected, strict=True))


@pytest.mark.parametrize("scheduler_class", [LCMScheduler, TCDScheduler])
def test_a_distilled_model_runs_on_the_timesteps_that_it_was_distilled_for(scheduler_class):
    policy: Any = policy_scheduler(scheduler_class(), eta=0.0)
    alphas = alphas_cumprod()
    latents = draw(SHAPE).double()
    trajectory = sample(policy, 4, draw(SHAPE), Sampling(generators(2), (), "mean"))
    assert policy.timesteps.tolist() == [999, 759, 499, 259]
    for step, (t, t_next) in enumerate([(999, 759), (759, 499), (499, 259), (259, None)]):
        noise = denoiser(latents, torch.tensor(t))
        signal = (latents - np.sqrt(1 - alphas[t]) * noise) / np.sqrt(alphas[t])
        latents = signal if t_next is None else np.sqrt(alphas[t_next]) * signal + np.sqrt(1 - alphas[t_next]) * noise
        torch.testing.assert_close(trajectory[step].double(), latents, rtol=1e-4, atol=1e-4)


def test_the_schedule_of_a_distilled_model_takes_its_own_arguments():
    policy: Any = policy_scheduler(LCMScheduler(), eta=1.0)
    reference = LCMScheduler()
    reference.set_timesteps(4, original_inference_steps=20)
    with policy.acting(Replay(0)):
        policy.set_timesteps(4, original_inference_steps=20)
    assert policy.timesteps.tolist() == reference.timesteps.tolist()


@pytest.mark.parametrize("first", [0, 4])
def test_a_pipeline_that_slices_the_schedule_and_does_not_say_so_gets_the_coefficients_of_its_steps(first):
    told: Any = policy_scheduler(ddim(), eta=1.0)
    silent: Any = policy_scheduler(ddim(), eta=1.0)
    silent.set_begin_index = lambda _: None
    expected = sample(told, 10, draw(SHAPE), Sampling(generators(2), (), "mean"), first)
    source = Sampling(generators(2), (2,), "mean")
    trajectory = sample(silent, 10, draw(SHAPE), source, first)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(trajectory, expected, strict=True))
    assert silent.stds == told.stds
    replayed = replay(silent, 10, 2, source.steps[2].latents, first)
    assert torch.equal(log_prob(source.steps[2].next_latents, replayed.mean, replayed.std), source.steps[2].log_probs)


def test_a_timestep_that_is_a_copy_is_found_by_its_value_and_an_unknown_one_is_refused():
    policy: Any = policy_scheduler(ddim(), eta=1.0)
    with policy.acting(Sampling(generators(2), (), "mean")):
        policy.set_timesteps(10)
        expected = diffusers_mean(ddim(), 10, 3, draw(SHAPE), eta=1.0)
        observed = Replay(0)
        policy.source = observed
        with pytest.raises(StepReplayed):
            policy.step(denoiser(draw(SHAPE), torch.tensor(601)), policy.timesteps[3].clone(), draw(SHAPE))
        assert torch.equal(observed.mean, expected)
        with pytest.raises(ValueError, match=r"timestep 650, .* not in the schedule"):
            policy.step(draw(SHAPE), 650, draw(SHAPE))


def test_a_pipeline_that_copies_its_scheduler_is_refused():
    policy: Any = policy_scheduler(ddim(), eta=1.0)
    copy.deepcopy(policy)
    with policy.acting(Sampling(generators(2), (), "mean")), pytest.raises(ValueError, match="copies its scheduler"):
        copy.deepcopy(policy)


def test_a_pipeline_that_starts_a_second_schedule_is_refused():
    policy: Any = policy_scheduler(ddim(), eta=1.0)
    with policy.acting(Sampling(generators(2), (), "mean")):
        policy.set_timesteps(10)
        policy.set_timesteps(10)
        policy.step(draw(SHAPE), policy.timesteps[0], draw(SHAPE))
        with pytest.raises(ValueError, match="another schedule in the same __call__, after 1 steps"):
            policy.set_timesteps(10)


@pytest.mark.parametrize("scheduler_class", VARIANCE_PRESERVING_SCHEDULERS)
@pytest.mark.parametrize("config", [{}, BETAS], ids=["default betas", "Stable Diffusion's betas"])
def test_the_policy_has_the_noise_that_the_model_was_trained_with(scheduler_class, config):
    if scheduler_class is LMSDiscreteScheduler:
        pytest.importorskip("scipy")
    scheduler = scheduler_class(**config)
    options = [option for option in ("clip_sample", "thresholding") if option in scheduler.config]
    scheduler = scheduler_class(**config, **dict.fromkeys(options, False))
    policy: Any = policy_scheduler(scheduler, eta=1.0)
    assert torch.equal(policy.alphas_cumprod, scheduler.alphas_cumprod)


def test_the_pipelines_own_scheduler_is_left_as_it_is():
    scheduler = ddim()
    scheduler.set_timesteps(10)
    before = dict(scheduler.config), scheduler.timesteps.tolist()
    sample(policy_scheduler(scheduler, eta=1.0), 4, draw(SHAPE), Sampling(generators(2), (), "mean"))
    assert (dict(scheduler.config), scheduler.timesteps.tolist()) == before


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EDMEulerScheduler(), r"pipeline\.scheduler is EDMEulerScheduler, .*Set pipeline\.scheduler to one of"),
        (EDMDPMSolverMultistepScheduler(), r"is EDMDPMSolverMultistepScheduler, whose steps can't be turned into"),
        (CMStochasticIterativeScheduler(), r"is CMStochasticIterativeScheduler, whose steps can't be turned into"),
        (SCMScheduler(), r"is SCMScheduler, .* or to FlowMatchEulerDiscreteScheduler if it was trained with flow"),
        (
            EulerDiscreteScheduler(timestep_type="continuous"),
            r"config\.timestep_type is 'continuous': the model was trained on EDM's noise levels",
        ),
        (
            ddim(clip_sample=True),
            r"pipeline\.scheduler\.config\.clip_sample is True: .*DDIMScheduler\.from_config\(.*, clip_sample=False\)",
        ),
        (
            ddim(thresholding=True),
            r"pipeline\.scheduler\.config\.thresholding is True: .*from_config\(.*, thresholding=False\)",
        ),
        (DDIMScheduler(), r"config\.clip_sample is True"),  # diffusers' default
        (DDPMScheduler(), r"config\.clip_sample is True: .*DDPMScheduler\.from_config"),
        (
            ddim(prediction_type="flow_prediction"),
            r"config\.prediction_type is 'flow_prediction'; the policy needs one of epsilon, sample, v_prediction",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, SchedulerMixin) else "",
)
def test_a_scheduler_that_is_no_gaussian_policy_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        policy_scheduler(scheduler, eta=1.0)


@pytest.mark.parametrize("option", ["clip_sample", "thresholding"])
def test_the_remedy_for_clipping_works(option):
    scheduler = ddim(**{option: True})
    remedied = DDIMScheduler.from_config(scheduler.config, **{option: False})
    policy: Any = policy_scheduler(remedied, eta=1.0)
    assert policy.config[option] is False


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(beta_schedule="sigmoid", clip_sample=False),
        DDPMScheduler(beta_schedule="laplace", clip_sample=False),
        HeunDiscreteScheduler(beta_schedule="exp"),
    ],
    ids=lambda scheduler: f"{type(scheduler).__name__} {scheduler.config.beta_schedule}",
)
def test_betas_that_ddim_does_not_know_are_taken_over(scheduler):
    policy: Any = policy_scheduler(scheduler, eta=1.0)
    assert torch.equal(policy.alphas_cumprod, scheduler.alphas_cumprod)
