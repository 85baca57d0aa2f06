"""Both objectives: values worked out by hand, the gradients PPO promises, and the statistics of the estimators."""

import pytest
import torch
from torch import Tensor

from ddpo_trl.policy.gaussian import log_prob
from ddpo_trl.update.objectives import Objective, importance_sampling, score_function


def is_objective(ratios: list[float], advantages: list[float], cliprange: float) -> tuple[Objective, Tensor]:
    """Importance sampling at the given ratios, and the log-probabilities that its gradient goes to."""
    log_probs = torch.tensor(ratios).log().requires_grad_()
    return importance_sampling(log_probs, torch.zeros(len(ratios)), torch.tensor(advantages), cliprange), log_probs


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(loss, of)
    return result


# ---- Golden values ----


def test_score_function_loss_is_minus_the_mean_of_advantage_times_log_prob():
    # -(2 * -1 + -1 * -3 + 0.5 * 4) / 3 = -(-2 + 3 + 2) / 3
    objective = score_function(torch.tensor([-1.0, -3.0, 4.0]), torch.tensor([2.0, -1.0, 0.5]))
    assert objective.loss.item() == pytest.approx(-1.0)
    assert objective.metrics == {}


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 3.0, -3.0),  # on-policy: -A
        (1.0, -3.0, 3.0),
        (1.1, 2.0, -2.2),  # inside the interval [0.8, 1.2]: -r A
        (0.9, -2.0, 1.8),
        (1.5, 2.0, -2.4),  # would go further: clipped at 1.2
        (0.5, -2.0, 1.6),  # would go further: clipped at 0.8
        (0.5, 2.0, -1.0),  # has to come back: not clipped
        (1.5, -2.0, 3.0),
        (1.5, 0.0, 0.0),
    ],
)
def test_importance_sampling_loss_of_one_transition(ratio, advantage, expected):
    objective, _ = is_objective([ratio], [advantage], cliprange=0.2)
    assert objective.loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_importance_sampling_loss_of_a_batch_is_the_mean_over_its_transitions():
    objective, _ = is_objective([1.5, 0.5, 1.1, 1.5], [2.0, -2.0, 2.0, -2.0], cliprange=0.2)
    assert objective.loss.item() == pytest.approx((-2.4 + 1.6 - 2.2 + 3.0) / 4)


def test_importance_sampling_reads_the_ratio_from_both_log_probs():
    # exp(-7 + 7.05) = 1.051271
    objective = importance_sampling(torch.tensor([-7.0]), torch.tensor([-7.05]), torch.tensor([1.0]), 0.2)
    assert objective.loss.item() == pytest.approx(-1.051271, abs=1e-6)


def test_importance_sampling_metrics():
    objective, _ = is_objective([1.0, 1.3, 0.5, 1.1], [1.0, 1.0, 1.0, -1.0], cliprange=0.2)
    assert objective.metrics.keys() == {"policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio"}
    # logs: 0, 0.2623643, -0.6931472, 0.0953102; half the mean of their squares
    assert objective.metrics["policy/approxkl_avg"].item() == pytest.approx(0.0697958, abs=1e-6)
    assert objective.metrics["policy/clipfrac_avg"].item() == 0.5  # 1.3 and 0.5 are outside [0.8, 1.2]
    assert objective.metrics["val/ratio"].item() == pytest.approx(0.975)
    assert not any(metric.requires_grad for metric in objective.metrics.values())


# ---- Gradients ----


@pytest.mark.parametrize(("ratio", "advantage"), [(1.0002, 1.0), (1.5, 2.0), (0.9998, -1.0), (0.5, -2.0)])
def test_gradient_is_exactly_zero_beyond_the_trusted_interval(ratio, advantage):
    objective, log_probs = is_objective([ratio], [advantage], cliprange=1e-4)
    assert gradient(objective.loss, log_probs).item() == 0.0


@pytest.mark.parametrize(("log_ratio", "advantage"), [(100.0, 1.0), (-200.0, -1.0), (100.0, 0.0)])
def test_gradient_is_exactly_zero_where_the_ratio_leaves_float32(log_ratio, advantage):
    # `log_prob_reduction="sum"` over thousands of dimensions gets there: exp(88.8) is infinite in float32
    log_probs = torch.tensor([log_ratio], requires_grad=True)
    objective = importance_sampling(log_probs, torch.zeros(1), torch.tensor([advantage]), 1e-4)
    assert torch.isfinite(objective.loss)
    assert gradient(objective.loss, log_probs).item() == 0.0


@pytest.mark.parametrize(("ratio", "advantage"), [(0.9998, 1.0), (0.5, 2.0), (1.0002, -1.0), (1.5, -2.0)])
def test_gradient_leads_back_from_outside_the_trusted_interval(ratio, advantage):
    objective, log_probs = is_objective([ratio], [advantage], cliprange=1e-4)
    # d(-r A) / dlog p = -r A
    assert gradient(objective.loss, log_probs).item() == pytest.approx(-ratio * advantage, rel=1e-6)


@pytest.mark.parametrize(("ratio", "advantage"), [(1.0, 1.0), (1.1, 2.0), (0.9, 2.0), (1.1, -2.0), (0.9, -2.0)])
def test_gradient_inside_the_trusted_interval_is_that_of_the_ratio(ratio, advantage):
    objective, log_probs = is_objective([ratio], [advantage], cliprange=0.2)
    assert gradient(objective.loss, log_probs).item() == pytest.approx(-ratio * advantage, rel=1e-6)


def test_both_objectives_have_the_same_gradient_on_policy():
    random = torch.Generator().manual_seed(0)
    log_probs = torch.randn(64, generator=random).requires_grad_()
    advantages = torch.randn(64, generator=random)
    by_score = gradient(score_function(log_probs, advantages).loss, log_probs)
    by_ratio = gradient(importance_sampling(log_probs, log_probs.detach(), advantages, 1e-4).loss, log_probs)
    assert torch.equal(by_score, by_ratio)
    torch.testing.assert_close(by_score, -advantages / 64)


def test_zero_advantages_give_a_zero_gradient():
    log_probs = torch.randn(8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    zero = torch.zeros(8)
    for objective in (score_function(log_probs, zero), importance_sampling(log_probs, log_probs.detach(), zero, 0.1)):
        assert torch.equal(gradient(objective.loss, log_probs), zero)


# ---- Statistics: a linear-Gaussian policy, whose policy gradient is known ----

THETA, STD, TARGET = 0.8, 0.5, 2.0
BATCHES, BATCH = 100, 2000


def states(random: torch.Generator) -> Tensor:
    return torch.rand(BATCH, 2, generator=random) + 0.5  # uniform on [0.5, 1.5], two dimensions


# x ~ N(theta s, std^2 I), r = -|x - target|^2. E[r] = -sum_d (theta s_d - target)^2 - 2 std^2, so
# dE[r]/dtheta = -2 sum_d E[s_d (theta s_d - target)], with E[s] = 1 and E[s^2] = 1 + 1/12.
ANALYTIC_GRADIENT = -2 * 2 * (THETA * (1 + 1 / 12) - TARGET)


def gradient_estimates(objective: str, sampling_theta: float) -> Tensor:
    """The policy-gradient estimate of each of `BATCHES` batches sampled with `sampling_theta`, taken at `THETA`."""
    random = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(BATCHES):
        s = states(random)
        x = sampling_theta * s + STD * torch.randn(s.shape, generator=random)
        rewards = -((x - TARGET) ** 2).sum(1)
        theta = torch.tensor(THETA, requires_grad=True)
        log_probs = log_prob(x, theta * s, STD, "sum")
        if objective == "sf":
            loss = score_function(log_probs, rewards).loss
        else:
            old_log_probs = log_prob(x, sampling_theta * s, STD, "sum")
            loss = importance_sampling(log_probs, old_log_probs, rewards, cliprange=1e6).loss
        estimates.append(-gradient(loss, theta))  # the loss goes down where the reward goes up
    return torch.stack(estimates)


@pytest.mark.parametrize(
    ("objective", "sampling_theta"),
    [("sf", THETA), ("is", THETA), ("is", THETA - 0.05)],
    ids=["score function", "importance sampling on-policy", "importance sampling off-policy"],
)
def test_the_mean_gradient_is_the_analytic_policy_gradient(objective, sampling_theta):
    estimates = gradient_estimates(objective, sampling_theta)
    error = estimates.std().item() / BATCHES**0.5
    assert abs(estimates.mean().item() - ANALYTIC_GRADIENT) < 4 * error
    assert 50 * error < ANALYTIC_GRADIENT  # so a flipped sign, or a factor of 1.1, would fail the line above


def test_the_score_function_needs_samples_of_the_current_policy():
    # The control: off-policy it is biased, and these statistics see it.
    estimates = gradient_estimates("sf", THETA - 0.05)
    assert abs(estimates.mean().item() - ANALYTIC_GRADIENT) > 10 * estimates.std().item() / BATCHES**0.5
