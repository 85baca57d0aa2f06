"""Flow matching as a policy against diffusers' Euler step, `torch.distributions` and the marginals of a Gaussian."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    SASolverScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor
from torch.distributions import Normal
from torch.distributions.kl import kl_divergence as reference_kl

from ddpo_trl.policy.gaussian import kl_divergence, log_prob
from ddpo_trl.policy.schedulers import PolicyScheduler, Replay, Sampling, StepReplayed, policy_scheduler


SHAPE = (2, 4, 8, 8)
SDE_TYPES = ("sde", "cps")

Schedule = dict[str, Any]  # keyword arguments of `set_timesteps`


def euler(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**config)


def flow_policy(scheduler: SchedulerMixin, noise_level: float = 0.7, sde_type: Any = "sde") -> Any:
    return policy_scheduler(scheduler, eta=1.0, noise_level=noise_level, sde_type=sde_type)


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + index) for index in range(count)]


def draw(shape: Sequence[int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def denoiser(latents: Tensor, timestep: Tensor) -> Tensor:
    """Any function of state and time."""
    return torch.sin(1.7 * latents + timestep / 300)


def uniform_sigmas(steps: int) -> list[float]:
    """1, 1 − 1/N, ..., 1/N: what FLUX's pipeline passes; the scheduler appends 0."""
    return np.linspace(1, 1 / steps, steps).tolist()


def settle(policy: Any, **schedule: Any) -> Any:
    """The policy with a schedule and nothing sampled."""
    with policy.acting(Sampling((), record=(), reduction="mean")):
        policy.set_timesteps(**schedule)
    return policy


def sample(
    policy: Any, latents: Tensor, source: Sampling, denoiser: Callable[[Tensor, Tensor], Tensor] = denoiser, **schedule
) -> list[Tensor]:
    """The latents after each step, as a pipeline would make them."""
    trajectory = []
    with policy.acting(source):
        policy.set_timesteps(**schedule)
        for timestep in policy.timesteps:
            latents = policy.step(denoiser(latents, timestep), timestep, latents, return_dict=False)[0]
            trajectory.append(latents)
    return trajectory


def diffusers_sample(scheduler: Any, latents: Tensor, **schedule: Any) -> list[Tensor]:
    trajectory = []
    scheduler.set_timesteps(**schedule)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(denoiser(latents, timestep), timestep, latents).prev_sample
        trajectory.append(latents)
    return trajectory


def replay(policy: Any, step: int, velocity: Tensor, latents: Tensor, **schedule: Any) -> Replay:
    source = Replay(step)
    with policy.acting(source):
        policy.set_timesteps(**schedule)
        with pytest.raises(StepReplayed):
            policy.step(velocity, policy.timesteps[0], latents)
    return source


def transition_of_the_papers(
    latents: Any, velocity: Any, sigma: float, next_sigma: float, noise_level: float, sde_type: str
) -> tuple[Any, float]:
    """
    Mean and standard deviation in float64.

    "sde" is eq. 9 of https://huggingface.co/papers/2505.05470 over a step dt < 0 (its 1 − σ at most the step's length,
    see `sde_std`), "cps" the rotation of the noise by an angle a π / 2 of https://huggingface.co/papers/2509.05952.
    """
    if sde_type == "cps":
        angle = noise_level * np.pi / 2
        predicted_original, predicted_noise = latents - sigma * velocity, latents + (1 - sigma) * velocity
        mean = (1 - next_sigma) * predicted_original + next_sigma * np.cos(angle) * predicted_noise
        return mean, float(next_sigma * np.sin(angle))
    dt = next_sigma - sigma
    diffusion = 0.0 if next_sigma == 0 else noise_level * np.sqrt(sigma / max(1 - sigma, -dt))
    drift = velocity + diffusion**2 / (2 * sigma) * (latents + (1 - sigma) * velocity)
    return latents + drift * dt, float(diffusion * np.sqrt(-dt))


# ---- Without noise: the same steps as diffusers ----


def plain(steps: int) -> Schedule:
    return {"num_inference_steps": steps}


def shifted(steps: int) -> Schedule:
    return {"num_inference_steps": steps, "mu": 1.15}


def custom(steps: int) -> Schedule:
    return {"sigmas": uniform_sigmas(steps)}


def custom_and_shifted(steps: int) -> Schedule:
    return {"sigmas": uniform_sigmas(steps), "mu": 1.15}


def custom_timesteps(steps: int) -> Schedule:
    return {"sigmas": uniform_sigmas(steps), "timesteps": np.linspace(1000, 200, steps).tolist()}


DYNAMIC = {"use_dynamic_shifting": True}
SCHEDULES = [
    pytest.param({"shift": 1.0}, plain, id="shift 1"),
    pytest.param({"shift": 3.0}, plain, id="SD3, shift 3"),
    pytest.param(DYNAMIC, shifted, id="dynamic exponential"),
    pytest.param({**DYNAMIC, "time_shift_type": "linear"}, shifted, id="dynamic linear"),
    pytest.param({"shift": 3.0}, custom, id="custom sigmas"),
    pytest.param({"shift": 3.0}, custom_timesteps, id="custom sigmas and timesteps"),
    pytest.param(DYNAMIC, custom_and_shifted, id="FLUX, custom sigmas and dynamic"),
    pytest.param({"shift": 3.0, "shift_terminal": 0.1}, plain, id="terminal"),
    pytest.param({**DYNAMIC, "shift_terminal": 0.1}, custom_and_shifted, id="LTX, dynamic and terminal"),
    pytest.param({"use_karras_sigmas": True}, plain, id="karras"),
    pytest.param({"use_exponential_sigmas": True}, plain, id="exponential"),
    pytest.param({"use_beta_sigmas": True}, plain, id="beta"),
    pytest.param({"invert_sigmas": True}, plain, id="Mochi, inverted"),
    pytest.param({"invert_sigmas": True}, custom, id="Mochi, inverted custom sigmas"),
]


def skip_without_scipy(config: dict[str, Any]) -> None:
    if config.get("use_beta_sigmas"):
        pytest.importorskip("scipy")


# Both compute x + (σ' − σ) v in float32. Diffusers subtracts float32 numbers, the policy the same numbers in float64,
# and torch rounds the difference to float32 when it meets the latents: one rounding of the same number.
@pytest.mark.parametrize("steps", [4, 7, 10])
@pytest.mark.parametrize(("config", "schedule"), SCHEDULES)
@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_without_noise_a_step_is_diffusers_own_to_the_bit(config, schedule, steps, sde_type):
    skip_without_scipy(config)
    source = Sampling(generators(2), record=range(steps), reduction="mean")
    policy = flow_policy(euler(**config), noise_level=0.0, sde_type=sde_type)
    trajectory = sample(policy, draw(SHAPE), source, **schedule(steps))
    expected = diffusers_sample(euler(**config), draw(SHAPE), **schedule(steps))
    assert len(trajectory) == steps
    for ours, theirs in zip(trajectory, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert source.steps == {}  # nothing stochastic, nothing to train on


@pytest.mark.parametrize("steps", [4, 7, 10])
@pytest.mark.parametrize(("config", "schedule"), SCHEDULES)
def test_the_pipeline_sees_the_schedule_of_the_scheduler_it_was_given(config, schedule, steps):
    skip_without_scipy(config)
    reference = euler(**config)
    reference.set_timesteps(**schedule(steps))
    policy = settle(flow_policy(euler(**config)), **schedule(steps))
    assert policy.timesteps.dtype == reference.timesteps.dtype
    assert torch.equal(policy.timesteps, reference.timesteps)
    assert torch.equal(policy.sigmas, reference.sigmas)


FLOW_SOLVER = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SOLVERS = [
    UniPCMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    DEISMultistepScheduler,
    SASolverScheduler,
]


@pytest.mark.parametrize("base", [FlowMatchEulerDiscreteScheduler, *SOLVERS])
def test_pipelines_take_the_policy_for_the_scheduler_it_was_made_from(base):
    config = {} if base is FlowMatchEulerDiscreteScheduler else FLOW_SOLVER
    policy = flow_policy(base(**config))
    assert issubclass(type(policy), base)
    assert issubclass(type(policy), PolicyScheduler)
    assert inspect.signature(policy.set_timesteps) == inspect.signature(base(**config).set_timesteps)
    assert {name: policy.config[name] for name in config} == config


@pytest.mark.parametrize("steps", [4, 7, 10])
@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solvers_schedule_is_kept_and_its_steps_without_noise_are_eulers(solver, sde_type, steps):
    reference = solver(**FLOW_SOLVER)
    reference.set_timesteps(steps)
    policy = flow_policy(solver(**FLOW_SOLVER), noise_level=0.0, sde_type=sde_type)
    states = [draw(SHAPE)]
    states += sample(policy, states[0], Sampling(generators(2), (), "mean"), num_inference_steps=steps)
    assert torch.equal(policy.timesteps, reference.timesteps)
    assert torch.equal(policy.sigmas, reference.sigmas)
    for index, (sigma, next_sigma) in enumerate(zip(reference.sigmas[:-1], reference.sigmas[1:], strict=True)):
        velocity = denoiser(states[index], reference.timesteps[index])
        assert torch.equal(states[index + 1], states[index] + (next_sigma - sigma) * velocity)


def test_a_solver_that_shifts_by_image_size_keeps_doing_so():
    config = {**FLOW_SOLVER, "use_dynamic_shifting": True}
    reference = UniPCMultistepScheduler(**config)
    reference.set_timesteps(sigmas=np.linspace(1, 0.1, 10), mu=0.8)
    policy = settle(flow_policy(UniPCMultistepScheduler(**config)), sigmas=np.linspace(1, 0.1, 10), mu=0.8)
    assert torch.equal(policy.sigmas, reference.sigmas)
    assert torch.equal(policy.timesteps, reference.timesteps)


@pytest.mark.parametrize(
    ("scheduler", "same_as", "schedule"),
    [
        pytest.param(FlowMatchHeunDiscreteScheduler(shift=3.0), euler(shift=3.0), plain(7), id="Heun"),
        pytest.param(FlowMatchLCMScheduler(shift=3.0), euler(shift=3.0), plain(7), id="LCM"),
        pytest.param(FlowMatchLCMScheduler(**DYNAMIC), euler(**DYNAMIC), shifted(7), id="dynamic LCM"),
    ],
)
def test_other_steps_of_the_same_flow_become_eulers_schedule(scheduler, same_as, schedule):
    policy = flow_policy(scheduler, noise_level=0.0)
    trajectory = sample(policy, draw(SHAPE), Sampling(generators(2), (), "mean"), **schedule)
    expected = diffusers_sample(same_as, draw(SHAPE), **schedule)
    assert isinstance(policy, FlowMatchEulerDiscreteScheduler)
    assert torch.equal(policy.timesteps, same_as.timesteps)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(trajectory, expected, strict=True))


@pytest.mark.parametrize("arguments", [((4, "meta"), {}), ((4,), {"device": "meta"})], ids=["position", "name"])
def test_only_the_timesteps_go_to_the_pipelines_device(arguments):
    args, kwargs = arguments
    policy = flow_policy(euler())
    with policy.acting(Sampling((), (), "mean")):
        policy.set_timesteps(*args, **kwargs)
    assert policy.timesteps.device.type == "meta"  # a device whose numbers can't be read
    assert len(policy.stds) == 4


# ---- With noise: a Gaussian policy ----


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("noise_level", [0.7, 0.3, 1.2])
def test_the_standard_deviation_is_that_of_the_flow_grpo_paper_over_the_whole_step(noise_level, shift):
    reference = euler(shift=shift)
    reference.set_timesteps(10)
    sigmas = reference.sigmas.double().numpy()
    lengths = sigmas[:-1] - sigmas[1:]
    stds = np.array(settle(flow_policy(euler(shift=shift), noise_level), num_inference_steps=10).stds)
    regular = (1 - sigmas[:-1] >= lengths) & (sigmas[1:] > 0)
    assert regular.sum() == (8 if shift == 1 else 7)  # not the first (two), next to pure noise, and not the last
    sigma, length = sigmas[:-1][regular], lengths[regular]
    np.testing.assert_allclose(stds[regular], noise_level * np.sqrt(sigma / (1 - sigma)) * np.sqrt(length), rtol=1e-12)
    # at σ = 1 the authors' code divides by 1 − σ' = σ − σ', which leaves a
    assert stds[0] == pytest.approx(noise_level, rel=1e-12)
    assert stds[-1] == 0


@pytest.mark.parametrize("noise_level", [0.7, 0.3, 1.0])
def test_the_standard_deviation_of_a_coefficient_preserving_step_is_a_share_of_the_next_noise(noise_level):
    policy = settle(flow_policy(euler(shift=3.0), noise_level, "cps"), num_inference_steps=10)
    expected = policy.sigmas.double().numpy()[1:] * np.sin(noise_level * np.pi / 2)
    np.testing.assert_allclose(policy.stds, expected, rtol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("config", [{"shift": 1.0}, {"shift": 3.0}, {"shift_terminal": 0.1}], ids=str)
@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_recorded_log_probs_are_those_of_torch_distributions(sde_type, config, reduction):
    source = Sampling(generators(2), record=range(10), reduction=reduction)
    policy = flow_policy(euler(**config), 0.7, sde_type)
    states = [draw(SHAPE)]
    states += sample(policy, states[0], source, num_inference_steps=10)
    reference = euler(**config)
    reference.set_timesteps(10)
    assert sorted(source.steps) == list(range(9))
    for index in range(9):
        sigma, next_sigma = reference.sigmas[index : index + 2].tolist()
        velocity = denoiser(states[index], reference.timesteps[index]).double()
        mean, std = transition_of_the_papers(states[index].double(), velocity, sigma, next_sigma, 0.7, sde_type)
        density = Normal(mean, std).log_prob(states[index + 1].double()).flatten(1)
        expected = density.mean(1) if reduction == "mean" else density.sum(1)
        # the mean is float32: 1e-7 of latents of size 1, over std of 1e-2, is 1e-5 standard deviations
        torch.testing.assert_close(source.steps[index].log_probs.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_recorded_states_and_actions_are_the_trajectory(sde_type):
    source = Sampling(generators(2), record=(0, 3, 9), reduction="mean")
    states = [draw(SHAPE)]
    states += sample(flow_policy(euler(shift=3.0), 0.7, sde_type), states[0], source, num_inference_steps=10)
    assert sorted(source.steps) == [0, 3]  # step 9 goes to σ' = 0
    for index, step in source.steps.items():
        assert torch.equal(step.latents, states[index])
        assert torch.equal(step.next_latents, states[index + 1])


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize(("config", "schedule"), SCHEDULES)
def test_the_last_step_goes_straight_to_the_image_and_is_never_recorded(config, schedule, sde_type):
    skip_without_scipy(config)
    source = Sampling(generators(2), record=range(7), reduction="mean")
    policy = flow_policy(euler(**config), 0.7, sde_type)
    states = sample(policy, draw(SHAPE), source, **schedule(7))
    assert sorted(source.steps) == list(range(6))
    assert policy.stds[-1] == 0
    assert min(policy.stds[:-1]) > 0
    velocity = denoiser(states[-2], policy.timesteps[-1])
    sigma, last_sigma = policy.sigmas[-2:].tolist()
    assert last_sigma == (1 if config.get("invert_sigmas") else 0)
    torch.testing.assert_close(states[-1], states[-2] + (last_sigma - sigma) * velocity, rtol=1e-6, atol=1e-6)


def sigmas_of_diffusers(steps: int) -> list[float]:
    reference = euler(shift=3.0)
    reference.set_timesteps(steps)
    return reference.sigmas.tolist()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("index", [0, 4, 8])
def test_the_kl_of_two_velocities_is_that_of_torch_distributions(index, sde_type, reduction):
    policy = flow_policy(euler(shift=3.0), 0.7, sde_type)
    latents, velocities = draw(SHAPE), (draw(SHAPE, 1), draw(SHAPE, 2))
    one, other = (replay(policy, index, velocity, latents, num_inference_steps=10) for velocity in velocities)
    sigma, next_sigma = sigmas_of_diffusers(10)[index : index + 2]
    distributions = [
        Normal(*transition_of_the_papers(latents.double(), velocity.double(), sigma, next_sigma, 0.7, sde_type))
        for velocity in velocities
    ]
    divergence = reference_kl(*distributions).flatten(1)
    expected = divergence.mean(1) if reduction == "mean" else divergence.sum(1)
    ours = kl_divergence(one.mean, other.mean, one.std, reduction)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=0)


def test_the_kl_is_the_one_that_the_flow_grpo_paper_states():
    noise_level, index, latents = 0.7, 4, draw(SHAPE)
    policy = flow_policy(euler(shift=3.0), noise_level)
    velocities = (draw(SHAPE, 1), draw(SHAPE, 2))
    one, other = (replay(policy, index, velocity, latents, num_inference_steps=10) for velocity in velocities)
    sigma, next_sigma = sigmas_of_diffusers(10)[index : index + 2]
    # Δt / 2 · (g (1 − t) / (2 t) + 1 / g)² ‖v − v_ref‖², sec. 4.2 of https://huggingface.co/papers/2505.05470
    diffusion = noise_level * np.sqrt(sigma / (1 - sigma))
    factor = (sigma - next_sigma) / 2 * (diffusion * (1 - sigma) / (2 * sigma) + 1 / diffusion) ** 2
    expected = factor * (velocities[0] - velocities[1]).double().square().flatten(1).mean(1)
    torch.testing.assert_close(kl_divergence(one.mean, other.mean, one.std).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_sampled_actions_have_the_stated_mean_and_standard_deviation(sde_type):
    states = [draw((32, 4, 16, 16))]
    policy = flow_policy(euler(shift=3.0), 0.7, sde_type)
    states += sample(policy, states[0], Sampling(generators(32), (), "mean"), num_inference_steps=10)
    for index in range(9):
        sigma, next_sigma = policy.sigmas[index : index + 2].tolist()
        velocity = denoiser(states[index], policy.timesteps[index]).double()
        mean, std = transition_of_the_papers(states[index].double(), velocity, sigma, next_sigma, 0.7, sde_type)
        z = (states[index + 1].double() - mean) / std
        # standard errors over n normal numbers: 1 / sqrt(n) of the mean, sqrt(2 / n) of the variance
        assert abs(z.mean().item()) < 4 / z.numel() ** 0.5
        assert abs(z.var().item() - 1) < 4 * (2 / z.numel()) ** 0.5


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_the_noise_of_a_sample_does_not_depend_on_its_batch(sde_type):
    latents = draw((3, 4, 8, 8))
    policy = flow_policy(euler(), 0.7, sde_type)
    together = sample(policy, latents, Sampling(generators(3), (), "mean"), num_inference_steps=5)[-1]
    for row in range(3):
        alone = Sampling(generators(1, seed=row), (), "mean")
        one = sample(policy, latents[row : row + 1], alone, num_inference_steps=5)[-1]
        assert torch.equal(one[0], together[row])


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_mochis_inverted_schedule_is_the_same_policy(sde_type):
    latents, velocity = draw(SHAPE), draw(SHAPE, 1)
    upright, inverted = (flow_policy(euler(invert_sigmas=invert), 0.7, sde_type) for invert in (False, True))
    for index in range(7):
        expected = replay(upright, index, velocity, latents, num_inference_steps=7)
        ours = replay(inverted, index, -velocity, latents, num_inference_steps=7)  # Mochi's runs towards the image
        # diffusers rounds 1 − σ to float32, at most by 6e-8
        assert ours.std == pytest.approx(expected.std, rel=0, abs=1e-6)
        torch.testing.assert_close(ours.mean, expected.mean, rtol=0, atol=1e-6)


# ---- At the ends of the schedule ----


@pytest.mark.parametrize("first", [1.0, 0.999999, 0.9999, 0.99])
@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_steps_from_pure_noise_and_from_just_below_it_are_finite(sde_type, first):
    source = Sampling(generators(2), record=range(4), reduction="sum")
    policy = flow_policy(euler(), 0.7, sde_type)
    trajectory = sample(policy, draw(SHAPE), source, sigmas=[first, 0.9, 0.5, 0.1])
    assert all(torch.isfinite(latents).all() for latents in trajectory)
    assert sorted(source.steps) == [0, 1, 2]
    assert all(torch.isfinite(step.log_probs).all() for step in source.steps.values())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_solvers_that_start_just_below_pure_noise_have_finite_steps(sde_type, solver):
    source = Sampling(generators(2), record=range(10), reduction="sum")
    policy = flow_policy(solver(**FLOW_SOLVER), 0.7, sde_type)
    trajectory = sample(policy, draw(SHAPE), source, num_inference_steps=10)
    assert all(torch.isfinite(latents).all() for latents in trajectory)
    assert all(torch.isfinite(step.log_probs).all() for step in source.steps.values())
    assert max(policy.stds) <= 1


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.2])
@pytest.mark.parametrize("next_sigma", [0.98, 0.9, 0.5])
def test_the_standard_deviation_has_no_leap_towards_pure_noise(next_sigma, noise_level):
    policy = flow_policy(euler(), noise_level)
    sigmas = np.concatenate([[1.0], 1 - np.geomspace(1e-6, 1 - next_sigma, 30)[:-1]])
    stds = np.array([settle(policy, sigmas=[sigma, next_sigma]).stds[0] for sigma in sigmas])
    assert stds[0] == pytest.approx(noise_level)
    sigmas = np.float32(sigmas).astype(float)
    assert (stds <= noise_level * np.sqrt(sigmas) * (1 + 1e-12)).all()  # std² ≤ a² σ
    half_way = 1 - sigmas <= (1 - next_sigma) / 2  # from here on 1 − σ is the longer one, and std goes to 0
    assert half_way.sum() > 15
    np.testing.assert_array_less(stds[0] - stds[half_way], noise_level * (1 - sigmas[half_way]) + 1e-12)


@pytest.mark.parametrize("steps", [2, 3, 4, 5, 10, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_step_draws_at_most_the_noise_of_its_state(steps, shift):
    """std = σ solved for the noise level; the message has three digits of it, rounded down. 0.7 always fits."""
    policy = settle(flow_policy(euler(shift=shift), 100.0), num_inference_steps=steps)
    sigmas = policy.sigmas.double().numpy()
    now, following = sigmas[:-2], sigmas[1:-1]  # the last step has no noise
    length = now - following
    exact = np.sqrt(now * np.maximum(1 - now, length) / length).min()
    with pytest.raises(ValueError, match="noise_level is 100, with which step") as error:
        policy.check_noise(range(steps))
    limit = float(str(error.value).split("Set noise_level to ")[1].split(" at most")[0])
    assert 0.99 * exact < limit <= exact
    policy.noise_level = limit
    policy.check_noise(range(steps))
    assert (np.array(policy.stds[:-1]) <= now).all()
    policy.noise_level = 0.7
    policy.check_noise(range(steps))


def test_coefficient_preserving_steps_can_draw_all_noise_anew():
    policy = settle(flow_policy(euler(), 1.0, "cps"), num_inference_steps=5)
    policy.check_noise(range(5))
    assert policy.stds[:-1] == pytest.approx(policy.sigmas[1:-1].tolist())
    policy.noise_level = 1.01
    with pytest.raises(ValueError, match=r"noise_level is 1\.01, .*Set noise_level to 1 at most"):
        policy.check_noise(range(5))


def derivative_by_the_velocity(sigma: float, next_sigma: float, noise_level: float, sde_type: str) -> float:
    """Of the mean, which is linear in it: so it is the mean at velocity 1 and latents 0."""
    if sde_type == "cps":
        return -(1 - next_sigma) * sigma + next_sigma * np.cos(noise_level * np.pi / 2) * (1 - sigma)
    std = noise_level * np.sqrt(sigma / max(1 - sigma, sigma - next_sigma) * (sigma - next_sigma))
    return (next_sigma - sigma) - std**2 * (1 - sigma) / (2 * sigma)


@pytest.mark.parametrize("first", [1.0, 0.9999])
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_gradients_flow_through_a_replayed_mean(sde_type, index, first):
    sigmas = [first, 0.9, 0.5, 0.1]
    velocity = draw(SHAPE).requires_grad_()
    source = replay(flow_policy(euler(), 0.7, sde_type), index, velocity, draw(SHAPE, 1), sigmas=sigmas)
    (gradient,) = torch.autograd.grad(source.mean.sum(), velocity)
    expected = derivative_by_the_velocity(sigmas[index], sigmas[index + 1], 0.7, sde_type)
    torch.testing.assert_close(gradient, torch.full(SHAPE, expected), rtol=1e-5, atol=0)


# ---- Marginals ----
#
# One-dimensional data x_0 ~ N(m, s²): x_σ = (1 − σ) x_0 + σ ε has mean (1 − σ) m and variance
# V(σ) = (1 − σ)² s² + σ². The perfect denoiser's velocity is the regression of ε − x_0 on x_σ, which is linear, as all
# are jointly Gaussian, with Cov(ε − x_0, x_σ) = σ − (1 − σ) s²:
#
#     v(x, σ) = E[ε − x_0 | x_σ = x] = −m + (σ − (1 − σ) s²) / V(σ) · (x − (1 − σ) m).
#
# Then each step is x' = A x + b + std z, and the marginals under the policy are known without sampling.

MEAN, STD = 1.5, 0.6


def true_variance(sigma: Any, data_std: float = STD) -> Any:
    return (1 - sigma) ** 2 * data_std**2 + sigma**2


def perfect_velocity(latents: Any, sigma: float, data_std: float = STD) -> Any:
    slope = (sigma - (1 - sigma) * data_std**2) / true_variance(sigma, data_std)
    return -MEAN + slope * (latents - (1 - sigma) * MEAN)


@dataclass(frozen=True, kw_only=True)
class Marginals:
    """After each step of a schedule: its σ', and mean and variance of the latents, float64 arrays."""

    sigmas: np.ndarray
    means: np.ndarray
    variances: np.ndarray

    @property
    def variance_errors(self) -> np.ndarray:
        return self.variances - true_variance(self.sigmas)

    def variance_error_at(self, sigma: float) -> float:
        (index,) = np.flatnonzero(np.isclose(self.sigmas, sigma, atol=1e-6))
        return float(self.variance_errors[index])

    def largest_variance_error(self, below: float) -> float:
        return float(abs(self.variance_errors[self.sigmas < below + 1e-6]).max())


def propagate(policy: Any, data_std: float = STD, noise_below: float = 1.0, max_steps: int | None = None) -> Marginals:
    """Marginals of a settled policy from N(0, 1) at σ = 1; steps from a σ above `noise_below` are the ODE's."""
    sigmas = policy.sigmas.double().numpy()
    assert sigmas[0] == 1
    mean, variance = 0.0, 1.0
    means, variances = [], []
    latents = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for index, sigma in enumerate(sigmas[:-1][:max_steps]):
        velocity = perfect_velocity(latents, float(sigma), data_std)
        next_latents, std = policy.transition(velocity, index, latents, bool(sigma < noise_below + 1e-6))
        intercept = next_latents[0].item()
        slope = next_latents[1].item() - intercept
        mean, variance = slope * mean + intercept, slope**2 * variance + std**2
        means.append(mean)
        variances.append(variance)
    return Marginals(sigmas=sigmas[1:][:max_steps], means=np.array(means), variances=np.array(variances))


def marginals(steps: int, noise_level: float, sde_type: str, **kwargs: Any) -> Marginals:
    """Over a uniform schedule, so that doubling the number of steps halves each."""
    return propagate(settle(flow_policy(euler(), noise_level, sde_type), sigmas=uniform_sigmas(steps)), **kwargs)


@pytest.mark.parametrize("schedule", [plain(10), custom(100)], ids=["10 shifted steps", "100 uniform steps"])
@pytest.mark.parametrize("noise_level", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_the_marginal_mean_is_exact_whatever_the_number_of_steps(sde_type, noise_level, schedule):
    # at the mean x = (1 − σ) m the predicted noise is 0 and the predicted original m
    policy = settle(flow_policy(euler(shift=3.0), noise_level, sde_type), **schedule)
    result = propagate(policy)
    np.testing.assert_allclose(result.means, (1 - result.sigmas) * MEAN, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("noise_level", "constant"), [(0.3, 0.9), (0.7, 0.5), (1.2, 2.2)])
def test_noise_below_sigma_09_moves_the_marginals_in_proportion_to_the_length_of_a_step(noise_level, constant):
    # Away from σ = 1 the step is an Euler step of an SDE with smooth coefficients: O(Δt). Without the score's pull, or
    # with half of it, the error would stay.
    errors = [
        marginals(steps, noise_level, "sde", noise_below=0.9).largest_variance_error(below=0.9)
        for steps in (50, 100, 200, 400)
    ]
    lengths = 1 / np.array([50, 100, 200, 400])
    assert (np.array(errors) < constant * lengths).all()
    assert (np.array(errors[1:]) < 0.54 * np.array(errors[:-1])).all()  # it halves with the step


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.2])
@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_the_first_step_from_pure_noise_has_a_variance_error_that_no_number_of_steps_removes(steps, noise_level):
    # Here V = 1 and v = x − m; a step of length Δ with std² = a² multiplies the latents by 1 − Δ − a² / 2.
    (variance,) = marginals(steps, noise_level, "sde", max_steps=1).variances
    length, a = 1 / steps, noise_level
    assert variance == pytest.approx((1 - length) ** 2 + length * a**2 + a**4 / 4, rel=1e-6)
    assert variance - true_variance(1 - length) > a**4 / 4


@pytest.mark.parametrize("noise_level", [0.7, 1.4])
def test_near_pure_noise_the_variance_error_depends_on_the_number_of_steps_taken_and_not_on_their_length(noise_level):
    # The diffusion coefficient is singular at σ = 1. After k short steps 1 − σ = k Δ, so std² = a² / k whatever Δ is:
    # V ← (1 − a² / (2 k))² V + a² / k, whose error e ← (1 − a² / (2 k))² e + a⁴ / (4 k²) starts from a⁴ / 4.
    error = noise_level**4 / 4
    expected = []
    for k in range(1, 101):
        expected.append(error)
        error = (1 - noise_level**2 / (2 * k)) ** 2 * error + noise_level**4 / (4 * k**2)
    result = marginals(10_000, noise_level, "sde", max_steps=100)
    # besides it, the ODE's and SDE's own errors at 1 − σ ≤ 0.01
    np.testing.assert_allclose(result.variances / true_variance(result.sigmas) - 1, expected, rtol=0.02, atol=2e-4)


def test_the_variance_error_near_pure_noise_decays_like_the_number_of_steps_to_the_power_of_minus_a_squared():
    # The error left by step j, ~ 1 / j², is damped by ∏ (1 − a² / (2 k))² ~ (j / k)^(a²) up to step k. For a < 1 the
    # first steps' errors outlive the others: k^(−a²) in all. (For a > 1 the last ones' do: 1 / k.)
    a = 0.7
    k = np.arange(1, 101)
    for steps in (400, 10_000):
        result = marginals(steps, a, "sde", max_steps=100)
        relative_errors = result.variances / true_variance(result.sigmas) - 1
        assert (relative_errors < 0.21 * k ** -(a**2)).all()
        assert (relative_errors[9:] > 0.17 * k[9:] ** -(a**2)).all()


@pytest.mark.parametrize(
    ("noise_level", "rate", "constant"),
    [
        pytest.param(0.7, lambda length: length**0.49, 0.55, id="a = 0.7, length to the power of a squared"),
        pytest.param(1.0, lambda length: length * np.log(1 / length), 2.0, id="a = 1, length with a logarithm"),
        pytest.param(1.4, lambda length: length, 12.0, id="a = 1.4, length"),
    ],
)
def test_noise_in_all_steps_moves_the_marginals_below_sigma_09_at_the_rate_of_the_first_steps(
    noise_level, rate, constant
):
    # At a fixed σ, k = (1 − σ) / Δ steps have been taken: O(Δ^a²) for a < 1 and not O(Δ), because the first steps'
    # noise, whose size no Δ changes, is forgotten no faster. Largest is the error at σ = 0.9.
    counts = (50, 100, 200, 400)
    errors = [marginals(steps, noise_level, "sde").largest_variance_error(below=0.9) for steps in counts]
    rates = [rate(1 / steps) for steps in counts]
    assert (np.array(errors) < constant * np.array(rates)).all()
    ratios = np.array(errors[1:]) / np.array(errors[:-1])
    np.testing.assert_allclose(ratios[1:], np.array(rates[2:]) / np.array(rates[1:-1]), rtol=0.06)


def test_the_images_variance_is_the_datas_within_six_in_a_thousand():
    # Almost all of the first steps' error is forgotten on the way to the image.
    for steps in (100, 200, 400):
        assert abs(marginals(steps, 0.7, "sde").variances[-1] - STD**2) < 0.006 * STD**2


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
def test_a_coefficient_preserving_step_keeps_the_weights_of_image_and_noise(noise_level):
    # If the denoiser knew image and noise, the next latents would be (1 − σ') x_0 + σ' ε' with an ε' ~ N(0, 1).
    policy = settle(flow_policy(euler(shift=3.0), noise_level, "cps"), num_inference_steps=10)
    sigmas = policy.sigmas.double().numpy()
    original, noise = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    for index, (sigma, next_sigma) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        latents = (1 - sigma) * original + sigma * noise
        weights, std = policy.transition(noise - original, index, latents, True)
        assert weights[0].item() == pytest.approx(1 - next_sigma, abs=1e-12)
        assert weights[1].item() ** 2 + std**2 == pytest.approx(next_sigma**2, abs=1e-12)


@pytest.mark.parametrize("steps", [4, 10, 100])
@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.7, 1.0])
def test_coefficient_preserving_marginals_are_exact_if_the_data_is_one_point(noise_level, steps):
    result = marginals(steps, noise_level, "cps", data_std=0.0)
    np.testing.assert_allclose(result.variances, result.sigmas**2, rtol=0, atol=1e-12)


def variance_in_the_limit_of_coefficient_preservation(sigma: float, noise_level: float) -> float:
    """
    Where the variance at σ goes with ever more steps.

    In Gaussian data x̂_0 = m + (1 − σ) s² d / V and ε̂ = σ d / V with the same d = x − (1 − σ) m, so a step of no length
    is d ← A d + σ √(1 − ρ²) z with ρ = cos(a π / 2) and A = ((1 − σ)² s² + ρ σ²) / V, and this is its fixed point. It
    is below V: x̂_0 and ε̂ vary less than x_0 and ε, and the noise makes up for half of that only.
    """
    rho = np.cos(noise_level * np.pi / 2)
    slope = ((1 - sigma) ** 2 * STD**2 + rho * sigma**2) / true_variance(sigma)
    return float(sigma**2 * (1 - rho**2) / (1 - slope**2))


@pytest.mark.parametrize("noise_level", [0.7, 1.0])
@pytest.mark.parametrize("sigma", [0.9, 0.5, 0.2])
def test_coefficient_preservation_loses_variance_and_more_steps_do_not_bring_it_back(sigma, noise_level):
    limit = variance_in_the_limit_of_coefficient_preservation(sigma, noise_level)
    counts = (200, 400, 800)
    losses = np.array([-marginals(steps, noise_level, "cps").variance_error_at(sigma) for steps in counts])
    ode_errors = np.array([-marginals(steps, 0.0, "cps").variance_error_at(sigma) for steps in counts])
    assert (ode_errors[1:] < 0.51 * ode_errors[:-1]).all()  # Euler's own error goes away
    distances = losses - (true_variance(sigma) - limit)
    assert true_variance(sigma) - limit > 10 * ode_errors[-1]
    assert (abs(distances) < 0.55 / np.array(counts)).all()
    assert (abs(distances[1:]) < 0.54 * abs(distances[:-1])).all()


@pytest.mark.parametrize("noise_level", [0.7, 1.0])
def test_images_of_coefficient_preservation_tend_to_a_variance_below_the_datas(noise_level):
    # The limit above at σ → 0: (1 + cos(a π / 2)) / 2 of s². It is come by slowly, as little noise is left there.
    limit = (1 + np.cos(noise_level * np.pi / 2)) / 2 * STD**2
    assert variance_in_the_limit_of_coefficient_preservation(1e-4, noise_level) == pytest.approx(limit, rel=1e-3)
    variances = np.array([marginals(steps, noise_level, "cps").variances[-1] for steps in (100, 200, 400)])
    distances = limit - variances
    assert (distances > 0).all()
    assert (distances[1:] < 0.7 * distances[:-1]).all()
    assert distances[-1] < 0.02 * STD**2


@pytest.mark.parametrize("steps", [10, 100])
@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_sampled_latents_have_the_marginals_that_their_transitions_imply(sde_type, steps):
    count = 8 * 64 * 64
    policy = flow_policy(euler(), 0.7, sde_type)
    trajectory = sample(
        policy,
        draw((8, 1, 64, 64), seed=1000),
        Sampling(generators(8), (), "mean"),
        denoiser=lambda latents, timestep: perfect_velocity(latents, timestep.item() / 1000),
        sigmas=uniform_sigmas(steps),
    )
    expected = propagate(policy)
    means = np.array([latents.double().mean().item() for latents in trajectory])
    variances = np.array([latents.double().var().item() for latents in trajectory])
    assert len(trajectory) == steps
    # standard errors over n normal numbers: std / sqrt(n) of the mean, sqrt(2 / n) std² of the variance
    assert (abs(means - expected.means) < 4 * np.sqrt(expected.variances / count)).all()
    assert (abs(variances - expected.variances) < 4 * np.sqrt(2 / count) * expected.variances).all()
    if sde_type == "sde" and steps == 100:  # the image's
        assert abs(means[-1] - MEAN) < 4 * STD / np.sqrt(count)
        assert abs(variances[-1] - STD**2) < (4 * np.sqrt(2 / count) + 0.006) * STD**2


# ---- Windows, replay and image-to-image ----


def eulers_step(scheduler: Any, index: int, latents: Tensor, **schedule: Any) -> Tensor:
    scheduler.set_timesteps(**schedule)
    timestep = scheduler.timesteps[index]
    return scheduler.step(denoiser(latents, timestep), timestep, latents).prev_sample


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_outside_the_window_steps_are_the_odes_and_are_not_recorded(sde_type):
    source = Sampling(generators(2), record=range(7), reduction="mean", stochastic={1, 2})
    policy = flow_policy(euler(shift=3.0), 0.7, sde_type)
    states = [draw(SHAPE)]
    states += sample(policy, states[0], source, num_inference_steps=7)
    assert sorted(source.steps) == [1, 2]
    for index in range(7):
        ode = eulers_step(euler(shift=3.0), index, states[index], num_inference_steps=7)
        assert torch.equal(states[index + 1], ode) is (index not in (1, 2))


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("window", [None, {1, 2, 5}])
def test_replay_runs_exactly_the_one_recorded_step(window, sde_type):
    policy = flow_policy(euler(shift=3.0), 0.7, sde_type)
    source = Sampling(generators(2), record=range(7), reduction="mean", stochastic=window)
    sample(policy, draw(SHAPE), source, num_inference_steps=7)
    full, stds, sigmas = policy.timesteps, policy.stds, sigmas_of_diffusers(7)
    assert len(source.steps) == (6 if window is None else 3)
    for index, step in source.steps.items():
        replayed = Replay(index, step.latents)
        with policy.acting(replayed):
            policy.set_timesteps(7)
            assert policy.timesteps.tolist() == [*full[index:].tolist(), *full[:index].tolist()]
            # some pipelines read the sigmas too, by the position in their loop
            assert policy.sigmas.tolist() == [*sigmas[index:-1], *sigmas[:index], sigmas[-1]]
            velocity = denoiser(step.latents, policy.timesteps[0])
            with pytest.raises(StepReplayed):
                policy.step(velocity, policy.timesteps[0], step.latents)
        assert replayed.latents is step.latents
        assert replayed.std == stds[index]
        # not close: the very numbers, so that the ratio of a first update is 1
        assert torch.equal(log_prob(step.next_latents, replayed.mean, replayed.std), step.log_probs)
        sigma, next_sigma = sigmas[index : index + 2]
        papers = transition_of_the_papers(step.latents.double(), velocity.double(), sigma, next_sigma, 0.7, sde_type)
        torch.testing.assert_close(replayed.mean.double(), papers[0], rtol=0, atol=1e-6)
        assert replayed.std == pytest.approx(papers[1], rel=1e-12)


# ---- Tokens with a timestep of their own ----

TOKENS = (2, 5, 3)  # samples, tokens, channels


def with_conditions(timestep: Tensor) -> Tensor:
    """The first two tokens of each sample are conditions: a clean one, and one of σ = 0.3."""
    return torch.minimum(timestep, torch.tensor([0.0, 300.0, 1000.0, 1000.0, 1000.0]).expand(2, 5))


def step_tokens(policy: Any, latents: Tensor, velocity: Tensor, source: Any, index: int) -> Tensor:
    with policy.acting(source):
        policy.set_timesteps(5)
        timestep = policy.timesteps[index]
        own = with_conditions(timestep)
        return policy.step(-velocity, timestep, latents, per_token_timesteps=own, return_dict=False)[0]


def test_clean_tokens_are_kept_and_noisy_ones_make_diffusers_own_step():
    scheduler = euler()
    scheduler.set_timesteps(5)
    timestep, latents, velocity = scheduler.timesteps[2], draw(TOKENS), draw(TOKENS, 1)
    theirs = scheduler.step(-velocity, timestep, latents, per_token_timesteps=with_conditions(timestep)).prev_sample
    without_noise = Sampling(generators(2), record=(), reduction="mean", stochastic=())
    ours = step_tokens(flow_policy(euler()), latents, velocity, without_noise, 2)
    assert torch.equal(ours[:, 0], latents[:, 0])
    torch.testing.assert_close(ours[:, [0, 2, 3, 4]], theirs[:, [0, 2, 3, 4]])


@pytest.mark.parametrize("index, kept", [(0, [0, 1]), (2, [0, 1]), (3, [0])])
def test_conditions_get_no_noise_before_the_schedule_is_there(index, kept):
    """The five timesteps are 1000, 750, 500, 251 and 1: the fourth is below the 300 of the second token."""
    policy = flow_policy(euler())
    latents = draw(TOKENS)
    stepped = step_tokens(policy, latents, draw(TOKENS, 1), Sampling(generators(2), (), "mean"), index)
    assert [token for token in range(5) if torch.equal(stepped[:, token], latents[:, token])] == kept


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_what_is_predicted_of_conditions_is_not_part_of_the_density(sde_type):
    policy = flow_policy(euler(), 0.7, sde_type)
    velocity, source = draw(TOKENS, 1).requires_grad_(), Replay(1, draw(TOKENS))
    with pytest.raises(StepReplayed):
        step_tokens(policy, draw(TOKENS), velocity, source, 0)  # the schedule begins with the step that is replayed
    log_prob(draw(TOKENS, 2), source.mean, source.std).sum().backward()
    assert velocity.grad is not None
    assert not velocity.grad[:, :2].any() and (velocity.grad[:, 2:] != 0).all()


def test_sampling_after_a_replay_runs_the_whole_schedule_again():
    policy = flow_policy(euler(shift=3.0))
    before = sample(policy, draw(SHAPE), Sampling(generators(2), (), "mean"), num_inference_steps=7)
    replay(policy, 3, draw(SHAPE), draw(SHAPE), num_inference_steps=7)
    after = sample(policy, draw(SHAPE), Sampling(generators(2), (), "mean"), num_inference_steps=7)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def sample_from_image(policy: Any, skipped: int, image: Tensor, source: Any) -> list[Tensor]:
    """What diffusers' image-to-image pipelines do over 7 steps of which they leave out some."""
    trajectory = []
    with policy.acting(source):
        policy.set_timesteps(7)
        timesteps = policy.timesteps[skipped:]
        policy.set_begin_index(skipped)
        latents = policy.scale_noise(image, timesteps[:1].repeat(len(image)), draw(SHAPE, 1))
        trajectory.append(latents)
        for timestep in timesteps:
            latents = policy.step(denoiser(latents, timestep), timestep, latents, return_dict=False)[0]
            trajectory.append(latents)
    return trajectory


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_image_to_image_counts_its_steps_from_the_first_that_it_runs(sde_type):
    image = draw(SHAPE)
    reference = euler(shift=3.0)
    reference.set_timesteps(7)
    reference.set_begin_index(3)
    policy = flow_policy(euler(shift=3.0), 0.7, sde_type)
    source = Sampling(generators(2), record=range(7), reduction="mean", stochastic={1, 2})
    states = sample_from_image(policy, 3, image, source)
    assert len(states) == 5
    assert torch.equal(states[0], reference.scale_noise(image, reference.timesteps[3:4].repeat(2), draw(SHAPE, 1)))
    assert policy.begin_index == 3  # what `scale_noise` and pipelines read
    assert len(policy.stds) == 4
    assert sorted(source.steps) == [1, 2]
    for index in range(4):
        latents, next_latents = states[index : index + 2]
        velocity = denoiser(latents, reference.timesteps[3 + index])
        if index in (0, 3):
            assert torch.equal(next_latents, eulers_step(euler(shift=3.0), 3 + index, latents, **plain(7)))
            continue
        sigma, next_sigma = reference.sigmas[3 + index : 5 + index].tolist()
        mean, std = transition_of_the_papers(latents.double(), velocity.double(), sigma, next_sigma, 0.7, sde_type)
        assert policy.stds[index] == pytest.approx(std, rel=1e-12)
        expected = Normal(mean, std).log_prob(next_latents.double()).flatten(1).mean(1)
        torch.testing.assert_close(source.steps[index].log_probs.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_image_to_image_replays_exactly_the_one_recorded_step(sde_type, index):
    policy = flow_policy(euler(shift=3.0), 0.7, sde_type)
    source = Sampling(generators(2), record=range(7), reduction="mean")
    sample_from_image(policy, 3, draw(SHAPE), source)
    full = policy.timesteps.tolist()
    step = source.steps[index]
    replayed = Replay(index, step.latents)
    with policy.acting(replayed):
        policy.set_timesteps(7)
        assert sorted(policy.timesteps.tolist(), reverse=True) == full  # some pipelines count them
        timesteps = policy.timesteps[3:]
        assert timesteps[0] == full[3 + index]
        policy.set_begin_index(3)
        with pytest.raises(StepReplayed):
            policy.step(denoiser(step.latents, timesteps[0]), timesteps[0], step.latents)
    assert replayed.std == policy.stds[index]
    assert torch.equal(log_prob(step.next_latents, replayed.mean, replayed.std), step.log_probs)


# ---- Half precision ----


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_in_half_precision_an_action_is_rounded_before_its_density_is_taken(sde_type):
    policy = flow_policy(euler(shift=3.0), 0.7, sde_type)
    source = Sampling(generators(2), record=range(10), reduction="mean")
    final = sample(policy, draw(SHAPE).bfloat16(), source, num_inference_steps=10)[-1]
    assert final.dtype == torch.bfloat16
    assert sorted(source.steps) == list(range(9))
    noises = torch.stack([draw((9, *SHAPE[1:]), seed) for seed in (0, 1)])  # what the two generators give
    rounding_errors = []
    for index, step in source.steps.items():
        assert step.latents.dtype == step.next_latents.dtype == torch.bfloat16
        assert step.log_probs.dtype == torch.float32
        velocity = denoiser(step.latents, policy.timesteps[index]).double()  # bfloat16, as the network gave it
        sigma, next_sigma = policy.sigmas[index : index + 2].tolist()
        mean, std = transition_of_the_papers(step.latents.double(), velocity, sigma, next_sigma, 0.7, sde_type)
        rounded = Normal(mean, std).log_prob(step.next_latents.double()).flatten(1).mean(1)
        torch.testing.assert_close(step.log_probs.double(), rounded, rtol=1e-5, atol=1e-5)
        unrounded = Normal(mean, std).log_prob(mean + std * noises[:, index]).flatten(1).mean(1)
        rounding_errors.append((rounded - unrounded).abs().max().item())
    assert max(rounding_errors) > 1e-4  # more than the clip range: the order matters
    assert max(rounding_errors) < 0.05  # and it is the same noise


# ---- The user's scheduler ----


@pytest.mark.parametrize(
    "scheduler", [euler(shift=3.0), *(solver(**FLOW_SOLVER) for solver in SOLVERS)], ids=lambda s: type(s).__name__
)
def test_the_pipelines_own_scheduler_is_left_as_it_is(scheduler):
    scheduler.set_timesteps(10)
    before = dict(scheduler.config), scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), type(scheduler)
    policy = flow_policy(scheduler)
    sample(policy, draw(SHAPE), Sampling(generators(2), (), "mean"), num_inference_steps=4)
    after = dict(scheduler.config), scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), type(scheduler)
    assert after == before
    assert scheduler.begin_index is scheduler.step_index is None


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_flow_whose_model_predicts_no_velocity_is_refused(solver, prediction_type):
    scheduler = solver(**{**FLOW_SOLVER, "prediction_type": prediction_type})
    message = rf"config\.prediction_type is '{prediction_type}' with use_flow_sigmas=True; .* needs 'flow_prediction'"
    with pytest.raises(ValueError, match=message):
        flow_policy(scheduler)


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_diffusers_own_stochastic_sampling_does_not_change_the_policy(sde_type):
    trajectories = []
    for stochastic_sampling in (False, True):
        policy = flow_policy(euler(shift=3.0, stochastic_sampling=stochastic_sampling), 0.7, sde_type)
        source = Sampling(generators(2), (), "mean", stochastic=range(4))
        trajectories.append(sample(policy, draw(SHAPE), source, num_inference_steps=7))
    assert all(torch.equal(one, other) for one, other in zip(*trajectories, strict=True))


def test_the_schedulers_own_noise_level_and_form_are_those_asked_for():
    policies = [flow_policy(euler(), noise_level, sde_type) for noise_level in (0.2, 0.9) for sde_type in SDE_TYPES]
    assert [(policy.noise_level, policy.sde_type) for policy in policies] == [
        (0.2, "sde"),
        (0.2, "cps"),
        (0.9, "sde"),
        (0.9, "cps"),
    ]


@pytest.mark.parametrize(
    "scheduler",
    [
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", use_karras_sigmas=True),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", use_exponential_sigmas=True),
    ],
)
def test_noise_levels_of_another_diffusion_are_refused(scheduler):
    policy = flow_policy(scheduler)
    with pytest.raises(ValueError, match=r"sigmas from .* but those of flow matching are between 0 and 1"):
        sample(policy, draw(SHAPE), Sampling(generators(2), (), "mean"), num_inference_steps=5)


def test_a_shift_that_was_set_later_is_kept():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_shift(3.0)
    policy = flow_policy(scheduler)
    sample(policy, draw(SHAPE), Sampling(generators(2), (), "mean"), num_inference_steps=4)
    scheduler.set_timesteps(4)
    assert policy.sigmas.tolist() == scheduler.sigmas.tolist()


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_a_step_of_no_length_is_deterministic(sde_type):
    """DEIS repeats its last sigma."""
    scheduler = DEISMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    policy = flow_policy(scheduler, 0.7, sde_type)
    source = Sampling(generators(2), range(7), "mean")
    sample(policy, draw(SHAPE), source, num_inference_steps=7)
    assert policy.sigmas[-1] == policy.sigmas[-2] > 0
    assert policy.stds[-1] == 0
    assert sorted(source.steps) == list(range(6))
