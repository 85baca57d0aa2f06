"""The Gaussian policy against `torch.distributions`, which knows nothing of it."""

import math

import pytest
import torch
from torch.distributions import Normal
from torch.distributions.kl import kl_divergence as reference_kl

from ddpo_trl.policy.gaussian import kl_divergence, log_prob, reduce_latents


STD = 0.37
SHAPES = [(3, 4, 8, 8), (2, 4, 3, 8, 8), (5, 7)]  # image, video and flat latents


def draw(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_sum_of_log_prob_is_the_joint_density_of_torch_distributions(shape):
    x, mean = draw(shape, 0), draw(shape, 1)
    expected = Normal(mean.double(), STD).log_prob(x.double()).flatten(1).sum(1)
    torch.testing.assert_close(log_prob(x, mean, STD, "sum").double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_mean_of_log_prob_is_the_joint_density_per_dimension(shape):
    x, mean = draw(shape, 0), draw(shape, 1)
    expected = Normal(mean.double(), STD).log_prob(x.double()).flatten(1).mean(1)
    torch.testing.assert_close(log_prob(x, mean, STD, "mean").double(), expected, rtol=1e-5, atol=0)


def test_the_default_reduction_is_the_mean_that_the_clip_range_belongs_to():
    x, mean = draw((2, 4, 8, 8), 0), draw((2, 4, 8, 8), 1)
    assert torch.equal(log_prob(x, mean, STD), log_prob(x, mean, STD, "mean"))
    assert torch.equal(kl_divergence(x, mean, STD), kl_divergence(x, mean, STD, "mean"))


def test_log_prob_of_the_mean_itself_is_the_height_of_the_gaussian():
    # -log(2) - log(2 pi) / 2 = -0.693147 - 0.918939
    assert log_prob(torch.zeros(1, 6), torch.zeros(1, 6), 2.0).item() == pytest.approx(-1.612086, abs=1e-6)
    assert log_prob(torch.zeros(1, 6), torch.zeros(1, 6), 2.0, "sum").item() == pytest.approx(-9.672514, abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kl_divergence_is_that_of_torch_distributions(shape, reduction):
    mean, reference = draw(shape, 0), draw(shape, 1)
    per_dim = reference_kl(Normal(mean.double(), STD), Normal(reference.double(), STD)).flatten(1)
    expected = per_dim.mean(1) if reduction == "mean" else per_dim.sum(1)
    torch.testing.assert_close(kl_divergence(mean, reference, STD, reduction).double(), expected, rtol=1e-5, atol=0)


def test_kl_divergence_of_equal_policies_is_exactly_zero():
    mean = draw((3, 4, 8, 8), 0)
    assert torch.equal(kl_divergence(mean, mean.clone(), STD), torch.zeros(3))


@pytest.mark.parametrize("function", [log_prob, kl_divergence])
def test_half_precision_inputs_are_computed_in_float32(function):
    x, mean = draw((2, 4, 8, 8), 0).bfloat16(), draw((2, 4, 8, 8), 1).bfloat16()
    result = function(x, mean, STD)
    assert result.dtype == torch.float32
    assert torch.equal(result, function(x.float(), mean.float(), STD))


@pytest.mark.parametrize(("reduction", "dimensions"), [("sum", 1), ("mean", 4 * 8 * 8)])
def test_gradient_of_log_prob_is_the_standardised_deviation(reduction, dimensions):
    x, mean = draw((3, 4, 8, 8), 0), draw((3, 4, 8, 8), 1).requires_grad_()
    log_prob(x, mean, STD, reduction).sum().backward()
    # d/dmean log N(x; mean, std^2) = (x - mean) / std^2
    torch.testing.assert_close(mean.grad, (x - mean.detach()) / STD**2 / dimensions, rtol=1e-5, atol=1e-9)


def test_gradient_of_kl_divergence_points_away_from_the_reference():
    mean, reference = draw((3, 12), 0).requires_grad_(), draw((3, 12), 1)
    kl_divergence(mean, reference, STD, "sum").sum().backward()
    torch.testing.assert_close(mean.grad, (mean.detach() - reference) / STD**2, rtol=1e-5, atol=1e-9)


def test_samples_are_reduced_apart_from_each_other():
    values = torch.tensor([[[1.0, 2.0], [3.0, 6.0]], [[-1.0, 0.0], [0.0, 0.0]]])  # (2, 2, 2)
    assert reduce_latents(values, "sum").tolist() == [12.0, -1.0]
    assert reduce_latents(values, "mean").tolist() == [3.0, -0.25]


def test_the_ratio_of_mean_densities_is_the_root_of_the_true_ratio():
    x, mean, other = draw((1, 4, 4, 4), 0), draw((1, 4, 4, 4), 1), draw((1, 4, 4, 4), 2)
    root = math.exp((log_prob(x, mean, 3.0) - log_prob(x, other, 3.0)).item())
    true = math.exp((log_prob(x, mean, 3.0, "sum") - log_prob(x, other, 3.0, "sum")).item())
    assert root**64 == pytest.approx(true, rel=1e-4)
