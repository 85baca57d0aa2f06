"""The records of a round: a micro-batch collects what belongs to its samples."""

import dataclasses
import math

import pytest
import torch

from ddpo_trl.policy.records import Context, SampledBatch, Step
from ddpo_trl.rollout.records import Rollout


def numbered(first: int) -> SampledBatch:
    """Three samples, of which everything tells the sample's number, and the step where there are several."""
    numbers = range(first, first + 3)
    values = torch.arange(first, first + 3, dtype=torch.float32)
    return SampledBatch(
        context=Context(
            prompts=[f"prompt {number}" for number in numbers],
            seeds=[100 + number for number in numbers],
            inputs={
                "image": [f"image {number}" for number in numbers],
                "mask": [f"mask {number}" for number in numbers],
            },
        ),
        images=values[:, None, None, None].expand(3, 3, 2, 2),
        steps={
            step: Step(
                latents=1000 * step + values[:, None],
                next_latents=1000 * step + 0.5 + values[:, None],
                log_probs=-1000 * step - values,
            )
            for step in (2, 5)
        },
    )


def rollout() -> Rollout:
    advantages = torch.arange(6, dtype=torch.float32) / 10
    return Rollout(
        round=0,
        batches=[numbered(0), numbered(3)],
        rewards=torch.zeros(6),
        scores=torch.zeros(6, 1),
        advantages=advantages,
    )


@pytest.mark.parametrize("samples", [[0, 1, 2], [4, 0, 5], [3], [5, 4, 3, 2, 1, 0]])
@pytest.mark.parametrize("step", [2, 5])
def test_a_micro_batch_has_everything_of_its_samples_in_their_order(samples, step):
    batch = rollout().transition(samples, step, on_policy=True)
    assert batch.step == step and batch.on_policy
    assert batch.latents.flatten().tolist() == [1000 * step + sample for sample in samples]
    assert batch.next_latents.flatten().tolist() == [1000 * step + sample + 0.5 for sample in samples]
    assert batch.log_probs.tolist() == [-1000 * step - sample for sample in samples]
    assert batch.advantages.tolist() == pytest.approx([sample / 10 for sample in samples])
    assert len(batch.context) == len(samples)
    assert list(batch.context.prompts) == [f"prompt {sample}" for sample in samples]
    assert list(batch.context.seeds) == [100 + sample for sample in samples]
    assert {name: list(values) for name, values in batch.context.inputs.items()} == {
        "image": [f"image {sample}" for sample in samples],
        "mask": [f"mask {sample}" for sample in samples],
    }


def test_a_rollout_lists_its_prompts_and_images_in_the_order_of_its_samples():
    assert rollout().prompts == [f"prompt {number}" for number in range(6)]
    assert rollout().images[:, 0, 0, 0].tolist() == list(range(6))


def test_without_a_valid_sample_a_micro_batch_is_finite_and_counts_nothing():
    """On one of several processes: it has to run as many micro-batches as the others, and 0 · NaN is NaN."""
    whole = rollout()
    nan = torch.full((3, 1), math.nan)
    spoilt = [
        dataclasses.replace(batch, steps={2: Step(latents=nan, next_latents=nan, log_probs=nan.flatten())})
        for batch in whole.batches
    ]
    dropped = dataclasses.replace(whole, batches=spoilt, rewards=torch.full((6,), math.nan))
    batch = dropped.transition([4, 1], 2, on_policy=True)
    assert batch.share_counted == 0 and len(batch.counted(torch.ones(2))) == 2
    assert batch.latents.shape == batch.next_latents.shape == (2, 1) and batch.log_probs.shape == (2,)
    assert all(values.isfinite().all() for values in (batch.latents, batch.next_latents, batch.log_probs))
