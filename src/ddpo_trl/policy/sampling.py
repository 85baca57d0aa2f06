"""Sampling a policy: images with the recorded steps, with gradients of the log-probabilities, or up to one step."""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

import torch
from torch import Tensor

from ddpo_trl.policy.per_sample_gradients import SampleGradients, TrainedLayer
from ddpo_trl.policy.records import Context, Gradients, SampledBatch, Step, steps_to
from ddpo_trl.policy.runner import PipelineRunner, seeded
from ddpo_trl.policy.schedulers.actions import DifferentiatedSampling, Sampling, StepReplayed


def sample(
    runner: PipelineRunner,
    context: Context,
    record: Collection[int],
    stochastic: Collection[int] | None,
    max_steps: int | None,
) -> SampledBatch:
    """Sample one call of [`~ddpo_trl.policy.policy.Policy.sample`]."""
    source = Sampling(seeded(context), record, runner.settings.log_prob_reduction, stochastic, max_steps)
    images = runner.sample_images(source, context)
    steps: Mapping[int, Step] = source.steps
    _check_all_run(runner, source, steps)
    if runner.settings.offload_rollout:
        steps = steps_to(steps, "cpu")
    return SampledBatch(
        context=context,
        images=images,
        steps=steps,
        fingerprint=runner.fingerprint(),
        finite_steps=source.finite_steps,
        steps_run=source.steps_run,
    )


def sample_with_gradients(
    runner: PipelineRunner,
    context: Context,
    weights: Mapping[int, float],
    layers: Mapping[TrainedLayer, int],
    stochastic: Collection[int] | None,
) -> SampledBatch:
    """Sample one call of [`~ddpo_trl.policy.policy.Policy.sample_with_gradients`]."""
    gradients = SampleGradients(layers, len(context))
    source = DifferentiatedSampling(
        lambda step, log_probs: gradients.add(weights[step] * log_probs),
        generators=seeded(context),
        record=weights,
        reduction=runner.settings.log_prob_reduction,
        stochastic=stochastic,
    )
    with gradients.watch.watching():
        images = runner.sample_images(source, context)
    _check_all_run(runner, source, source.log_probs)
    device = "cpu" if runner.settings.offload_rollout else runner.denoiser.device
    taken = Gradients(
        log_probs=torch.stack(list(source.log_probs.values()), dim=1),
        weights=[each.to(device) for each in gradients.sums],
    )
    return SampledBatch(
        context=context,
        images=images,
        steps={},
        fingerprint=runner.fingerprint(),
        gradients=taken,
        finite_steps=source.finite_steps,
        steps_run=source.steps_run,
    )


@torch.no_grad()
def differentiate(runner: PipelineRunner, context: Context, step: int, take: Callable[[Tensor], None]) -> None:
    """
    Sample as [`sample_with_gradients`] does up to one step, and leave: no image is made.

    `context` is that of a single call, one of `runner.calls.split`. `take` receives the log-probabilities of the
    step's actions, `(B,)`, with their graph; it is not called if the pipeline ends before the step.
    """

    def take_and_leave(index: int, log_probs: Tensor) -> None:
        take(log_probs)
        raise StepReplayed

    runner.denoiser.eval()
    source = DifferentiatedSampling(
        take_and_leave, generators=seeded(context), record={step}, reduction=runner.settings.log_prob_reduction
    )
    with runner.scheduler.acting(source), suppress(StepReplayed):
        runner.run(runner.policy_pipeline, context, generator=source.generators, output_type="latent")


def _check_all_run(runner: PipelineRunner, source: Sampling, run: Collection[int]) -> None:
    noisy = [step for step, std in enumerate(runner.scheduler.stds) if std > 0 and source.is_stochastic(step)]
    if never_run := [step for step in noisy if source.max_steps is None and step in source.record and step not in run]:
        raise RuntimeError(
            f"{type(runner.pipeline).__name__} ended without running the steps {never_run} of its schedule. Leave "
            "them out with train_timestep_range, or take denoising_end and the like out of pipeline_kwargs."
        )
