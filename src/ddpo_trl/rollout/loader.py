"""The rollout loader: data loader of `transformers.Trainer` that makes one rollout per epoch."""

import dataclasses
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ddpo_trl.distributed import gather
from ddpo_trl.policy.per_sample_gradients import TrainedLayer
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.records import Context, SampledBatch
from ddpo_trl.prompts import PromptPair, PromptSource
from ddpo_trl.rewards.pending import PendingRewards, first_problem
from ddpo_trl.rewards.scoring import RewardScorer
from ddpo_trl.rollout.advantages import Advantages, select
from ddpo_trl.rollout.callbacks import RoundProgress
from ddpo_trl.rollout.plan import BatchPlan
from ddpo_trl.rollout.records import Rollout
from ddpo_trl.seeding import Stream, derived_seed, generator, randomness_lent


logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RolloutLoader:
    """
    Make a rollout per iteration, then yield its micro-batches.

    `before_sampling` is called when a round begins, so that the previous rollout makes way for the next; `on_rollout`
    receives every finished rollout before its micro-batches are yielded.
    """

    policy: Policy
    prompts: PromptSource
    scorer: RewardScorer
    advantages: Advantages
    drop_invalid: bool
    plan: BatchPlan
    gradient_layers: Mapping[TrainedLayer, int]
    seed: int
    accelerator: Accelerator
    progress: RoundProgress
    before_sampling: Callable[[], None]
    on_rollout: Callable[[Rollout], None]
    round: int = 0
    has_scored: bool = False

    def __len__(self) -> int:
        return self.plan.micro_batches_per_round

    def set_epoch(self, epoch: int) -> None:
        """Receive the epoch, which is the round, from the Trainer."""
        self.round = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.before_sampling()
        self.on_rollout(self._collect())
        yield from self._micro_batches()

    def _collect(self) -> Rollout:
        pairs = self._draw_prompts()
        start = time.perf_counter()
        with randomness_lent(self.accelerator.device):
            batches, pending = self._sample(self._own_share(pairs))
            sampled = time.perf_counter()
            rewards = torch.cat([scores.rewards_or_nan() for scores in pending])
            waited = time.perf_counter()
        problem = first_problem(pending, raises=not self.drop_invalid)
        gathered = gather(self.accelerator, rewards)  # (samples of all processes, functions), NaN where not valid
        totals = self.scorer.total(gathered)
        self._check_invalid(totals, problem)
        keys = self.advantages.keys(pairs)
        advantages = self.advantages(gathered, totals, keys)
        return Rollout(
            round=self.round,
            batches=batches,
            rewards=self._own_share(totals),
            scores=rewards,
            advantages=self._own_share(advantages).float().to(self.accelerator.device),
            metrics={
                **self._reward_metrics(gathered, totals, keys),
                "time/sampling": sampled - start,
                "time/scoring": sum(scores.seconds() for scores in pending),
                "time/waiting_for_rewards": waited - sampled,
            },
        )

    def _draw_prompts(self) -> list[PromptPair]:
        """Pairs of all samples of all processes: those of the first, where the others might draw differently."""
        pairs = self.prompts.draw(self.round, self.plan.prompts_per_round)
        if self.accelerator.num_processes > 1 and not self.prompts.alike_on_all_processes:
            pairs = broadcast_object_list(pairs)
        return [pair for pair in pairs for _ in range(self.plan.num_images_per_prompt)]

    def _sample(self, pairs: list[PromptPair]) -> tuple[list[SampledBatch], list[PendingRewards]]:
        size = self.plan.per_device_sample_batch_size
        weights = self.plan.weights(self.round, self.seed)
        noisy = self.plan.noisy_steps(self.round, self.seed)
        batches: list[SampledBatch] = []
        pending: list[PendingRewards] = []
        self.progress.sampling_begins(self.round, len(pairs))
        firsts = range(0, len(pairs), size)
        if self.policy.settings.offload_text_encoders:  # moved once per round instead of once per batch
            with self.accelerator.autocast():
                contexts = (self._context(pairs[first : first + size], first) for first in firsts)
                self.policy.runner.encode(contexts, self.policy.denoiser.device)
        for first in firsts:
            own = pairs[first : first + size]
            context, metadata = self._context(own, first), [entries for _, entries in own]
            with self.accelerator.autocast():
                if self.plan.one_pass:
                    batch = self.policy.sample_with_gradients(
                        context, weights, self.gradient_layers, noisy, self.plan.samples_per_part
                    )
                else:
                    batch = self.policy.sample(context, record=weights, stochastic=noisy)
            when = f"round {self.round}"
            pending.append(
                self.scorer.submit(batch.images, context.prompts, metadata, when, batch.finite_steps, batch.steps_run)
            )
            # Reward functions have them on the device; from here on they are only shown.
            batches.append(dataclasses.replace(batch, images=batch.images.cpu()))
            del batch  # so that its images do not stay on the device while the next batch is sampled
            if not self.has_scored:  # a faulty reward function ends the run now, and not after a whole round
                first_problem(pending, raises=not self.drop_invalid)
                self.has_scored = True
            self.progress.sampled(
                size, [self.scorer.total(scores.rewards_or_nan()) for scores in pending if scores.done()]
            )
        return batches, pending

    def _context(self, pairs: Sequence[PromptPair], first: int) -> Context:
        """Context of a batch; `first` is the index of its first sample on this process."""
        prompts, metadata = zip(*pairs, strict=True)
        # The index counts over all processes: the images of a round don't depend on how many there are.
        offset = self.accelerator.process_index * self.plan.samples_per_process + first
        seeds = [derived_seed(self.seed, Stream.SAMPLE, self.round, offset + row) for row in range(len(pairs))]
        return self.policy.context(prompts, metadata, seeds)

    def _own_share(self, values: Any) -> Any:
        """Part of a sequence over all processes' samples that belongs to this process."""
        first = self.accelerator.process_index * self.plan.samples_per_process
        return values[first : first + self.plan.samples_per_process]

    def _check_invalid(self, totals: Tensor, problem: str | None) -> None:
        """Warn of dropped samples; raise, on all processes alike, if they are more than half of the round."""
        invalid, count = int(totals.isnan().sum()), len(totals)
        dropped = f"{invalid} of {count} samples of round {self.round} have no valid reward"
        if 2 * invalid > count:
            raise RuntimeError(f"{dropped}: too many to go on. The first reason: {problem}")
        if invalid and self.accelerator.is_main_process:
            logger.warning(f"{dropped} and are dropped. The first reason: {problem}")

    def _reward_metrics(self, rewards: Tensor, totals: Tensor, keys: Sequence[Hashable]) -> dict[str, float]:
        valid = ~totals.isnan()
        rewards, totals, keys = rewards[valid], totals[valid], select(keys, valid)
        metrics = {
            "reward": totals.mean().item(),
            "reward_std": totals.std(correction=0).item(),
            "rewards/invalid": 1 - valid.double().mean().item(),
            "frac_reward_zero_std": self.advantages.fraction_without_spread(rewards, totals, keys),
        }
        for column, name in zip(rewards.T, self.scorer.names, strict=True):
            applies = ~column.isnan()
            if applies.any():
                metrics[f"rewards/{name}/mean"] = column[applies].mean().item()
                metrics[f"rewards/{name}/std"] = column[applies].std(correction=0).item()
        return metrics

    def _micro_batches(self) -> Iterator[dict[str, Any]]:
        """
        Shuffle the samples in every pass and give each micro-batch of samples its own random order of steps.

        Yields the arguments of [`~ddpo_trl.rollout.records.Rollout.transition`]: indices and not tensors, because the
        Trainer prefetches all micro-batches of an optimizer step, and their tensors would be a second copy of the
        rollout.
        """
        plan = self.plan
        if plan.one_pass:  # only the weighting of the gradients is left, which needs no transition
            yield {}
            return
        recorded_steps = plan.trained_steps(self.round, self.seed)
        random = generator(self.seed, Stream.MICRO_BATCHES, self.round, self.accelerator.process_index)
        for ppo_epoch in range(plan.num_ppo_epochs):
            order = torch.randperm(plan.samples_per_process, generator=random)
            for index, mini_batch in enumerate(order.split(plan.samples_per_mini_batch)):
                for samples in mini_batch.split(plan.per_device_train_batch_size):
                    steps = torch.randperm(len(recorded_steps), generator=random)
                    for step in steps[: plan.transitions_per_sample].tolist():
                        yield {
                            "samples": samples.tolist(),
                            "step": recorded_steps[step],
                            "on_policy": ppo_epoch == 0 and index == 0,
                        }
