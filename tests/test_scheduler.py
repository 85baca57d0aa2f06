"""The policy scheduler against diffusers' own DDIM step, `torch.distributions` and the formulas of the papers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor
from torch.distributions import Normal

from ddpo_trl.scheduler import (
    VARIANCE_PRESERVING_SCHEDULERS,
    Replay,
    Sampling,
    policy_scheduler,
)


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


def sample(policy: Any, steps: int, latents: Tensor, source: Sampling) -> list[Tensor]:
    """The latents after each step, as a pipeline would make them."""
    trajectory = []
    with policy.acting(source):
        policy.set_timesteps(steps)
        for timestep in policy.timesteps:
            latents = policy.step(denoiser(latents, timestep), timestep, latents, return_dict=False)[0]
            trajectory.append(latents)
    return trajectory


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
        (latents,) = policy_again.step(draw(SHAPE), policy.timesteps[0], draw(SHAPE, 1), return_dict=False)
    assert torch.equal(output.prev_sample, latents)


# ---- The standard deviation ----


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_sigma_is_that_of_the_paper(eta):
    stds = policy_scheduler(ddim(), eta).stds(10)
    # leading spacing with an offset of 1: 901, 801, ..., 1; after the last step the signal is that of timestep 0
    expected = [sigma(t, t - 100, final_alpha=float(alphas_cumprod()[0]), eta=eta) for t in range(901, 0, -100)]
    # float32 keeps 1 - a / a_next, about 1e-3 at the last step, to 1e-4 of its value
    assert stds == pytest.approx(expected, rel=1e-4)
    assert min(stds) > 0


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
    assert [index for index, std in enumerate(policy.stds(10)) if std == 0] == deterministic
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
    latents, action = draw(SHAPE), draw(SHAPE, 1)
    reference = ddim(**config)
    reference.set_timesteps(10)
    policy: Any = policy_scheduler(ddim(**config), eta=0.8)
    source = Replay(index, action)
    with policy.acting(source):
        policy.set_timesteps(10)
        assert policy.timesteps.tolist() == [reference.timesteps[index].item()]
        (timestep,) = policy.timesteps
        assert policy.step(denoiser(latents, timestep), timestep, latents, return_dict=False)[0] is action
    assert source.visits == 1
    assert torch.equal(source.mean, diffusers_mean(ddim(**config), 10, index, latents, eta=0.8))
    assert source.std == policy.stds(10)[index]


def test_gradients_flow_through_a_replayed_mean():
    policy: Any = policy_scheduler(ddim(), eta=1.0)
    output = draw(SHAPE).requires_grad_()
    source = Replay(3, draw(SHAPE, 1))
    with policy.acting(source):
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
    with policy.acting(Replay(3, draw(SHAPE))):
        policy.set_timesteps(10)
        policy.step(draw(SHAPE), policy.timesteps[0], draw(SHAPE))
    after = sample(policy, 10, draw(SHAPE), Sampling(generators(2), (), "mean"))
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


# ---- Other schedulers ----


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
    ],
)
def test_schedulers_of_the_same_diffusion_become_the_same_policy(scheduler, same_as):
    policy: Any = policy_scheduler(scheduler, eta=0.0)
    assert policy.config.clip_sample is False  # DDIM's default is True, and not all classes have the key
    trajectory = sample(policy, 10, draw(SHAPE), Sampling(generators(2), (), "mean"))
    expected = diffusers_sample(same_as, 10, draw(SHAPE), eta=0.0)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(trajectory, expected, strict=True))


@pytest.mark.parametrize("scheduler_class", VARIANCE_PRESERVING_SCHEDULERS)
@pytest.mark.parametrize("config", [{}, BETAS], ids=["default betas", "Stable Diffusion's betas"])
def test_the_policy_has_the_noise_that_the_model_was_trained_with(scheduler_class, config):
    if scheduler_class is LMSDiscreteScheduler:
        pytest.importorskip("scipy")
    scheduler = scheduler_class(**config)
    options = [option for option in ("clip_sample", "thresholding") if option in scheduler.config]
    scheduler = scheduler_class(**config, **dict.fromkeys(options, False))
    assert torch.equal(policy_scheduler(scheduler, eta=1.0).alphas_cumprod, scheduler.alphas_cumprod)


def test_the_pipelines_own_scheduler_is_left_as_it_is():
    scheduler = ddim()
    scheduler.set_timesteps(10)
    before = dict(scheduler.config), scheduler.timesteps.tolist()
    sample(policy_scheduler(scheduler, eta=1.0), 4, draw(SHAPE), Sampling(generators(2), (), "mean"))
    assert (dict(scheduler.config), scheduler.timesteps.tolist()) == before


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            FlowMatchEulerDiscreteScheduler(),
            r"scheduler is FlowMatchEulerDiscreteScheduler, .*Set pipeline\.scheduler to one of DDIMScheduler, ",
        ),
        (EDMEulerScheduler(), r"pipeline\.scheduler is EDMEulerScheduler, .*Set pipeline\.scheduler to one of"),
        (
            UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
            r"pipeline\.scheduler is UniPCMultistepScheduler, .*Set pipeline\.scheduler to one of",
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
    assert policy_scheduler(remedied, eta=1.0).config[option] is False
