"""Evaluation on separate prompts, with the scheduler that the pipeline's users will run."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.trainer_utils import IntervalStrategy

from ddpo_trl.config import DDPOConfig
from ddpo_trl.distributed import gather
from ddpo_trl.finite import finite_rows
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.records import Context
from ddpo_trl.prompts import PromptPair, default_prompt_key, prompt_keys
from ddpo_trl.rewards.function import unique_names
from ddpo_trl.rewards.pending import PendingRewards, first_problem
from ddpo_trl.rewards.scoring import RewardScorer
from ddpo_trl.rollout.advantages import indices_by_key
from ddpo_trl.rollout.callbacks import RoundProgress
from ddpo_trl.seeding import Stream, derived_seed, randomness_untouched


logger = logging.getLogger(__name__)


class Samples(NamedTuple):
    """
    Images and rewards of [`~DDPOTrainer.generate_samples`].

    Args:
        prompts (`list[str]` of length `N`):
            The prompts.
        images (`torch.Tensor` of shape `(N, 3, H, W)`):
            Float32 in [0, 1], on the CPU.
        rewards (`torch.Tensor` of shape `(N, F)`):
            A column per reward function, float64.
    """

    prompts: list[str]
    images: Tensor
    rewards: Tensor

    def __repr__(self) -> str:
        size = "x".join(map(str, self.images.shape[1:]))
        means = ", ".join(f"{mean:.4g}" for mean in self.rewards.nanmean(dim=0))
        return f"Samples of {len(self.prompts)} prompts: images of {size}, mean rewards {means}"


class Made(NamedTuple):
    """
    Images and rewards of an evaluation.

    Args:
        images (`torch.Tensor` of shape `(n, ...)`):
            Images made on this process, on the CPU; as many on each.
        places (`list[int]` of length `N`):
            Index of each prompt's image among those of all processes, in their order.
        rewards (`list[torch.Tensor]` of shapes `(N, F)`):
            A tensor for each scorer, over all processes.
    """

    images: Tensor
    places: list[int]
    rewards: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """
    Make one image per prompt and measure it. The i-th image has the same seed in every call.

    Prompts are split between the processes of `accelerator`, and every process gets all results. Images without a
    valid reward are left out of the figures if `drop_invalid` is `True`, or else are an error.
    """

    policy: Policy
    scorer: RewardScorer
    held_out: RewardScorer | None
    drop_invalid: bool
    accelerator: Accelerator
    seed: int
    batch_size: int
    progress: RoundProgress

    def generate(self, pairs: Sequence[PromptPair]) -> Samples:
        """Make images with the pipeline's own scheduler, and score them."""
        made = self._make_and_score(pairs, self.policy.generate, [self.scorer])
        (rewards,) = made.rewards
        chunks = torch.arange(len(pairs)).split(self.batch_size)
        images = torch.cat([self._images(made, chunk.tolist()) for chunk in chunks])
        return Samples([prompt for prompt, _ in pairs], images, rewards)

    def image_seed(self, index: int) -> int:
        """Return the seed of the image of the prompt with this index."""
        return derived_seed(self.seed, Stream.EVALUATION, index)

    def metrics(self, pairs: Sequence[PromptPair], noisy_steps: Sequence[int] | None, prefix: str) -> dict[str, float]:
        """
        Measure everything that [`~DDPOTrainer.evaluate`] returns, with `prefix` in front of the names. The training
        sampler gives noise to `noisy_steps`, to all steps by default.
        """

        def sample(context: Context) -> Tensor:
            return self.policy.sample(context, stochastic=noisy_steps).images

        scorers = [self.scorer] if self.held_out is None else [self.scorer, self.held_out]
        made = self._make_and_score(pairs, self.policy.generate, scorers)
        keys = prompt_keys(pairs, default_prompt_key)  # not only the text, where an image is edited
        distance = diversity(self._images(made, rows) for rows in repeated(keys))
        rewards = made.rewards
        del made
        (sampled_rewards,) = self._make_and_score(pairs, sample, [self.scorer]).rewards
        totals = self.scorer.total(rewards[0])
        values = {
            "reward": mean(totals),
            "reward_std": std(totals),
            "reward_sde_gap": mean(self.scorer.total(sampled_rewards) - totals),
        }
        for name, column in zip(reward_names(self.scorer, self.held_out), torch.cat(rewards, dim=1).T, strict=True):
            values[f"rewards/{name}/mean"] = mean(column)
            values[f"rewards/{name}/std"] = std(column)
        if distance is not None:
            values["diversity"] = distance
        return {f"{prefix}_{name}": value for name, value in values.items()}

    def _make_and_score(
        self, pairs: Sequence[PromptPair], make: Callable[[Context], Tensor], scorers: Sequence[RewardScorer]
    ) -> Made:
        """Make the images of this process, and gather the rewards of all."""
        # Padded: all processes make equally many batches, as a sharded denoiser needs, and gather equal shapes.
        with self.accelerator.split_between_processes(list(range(len(pairs))), apply_padding=True) as share:
            chunks = [share[first : first + self.batch_size] for first in range(0, len(share), self.batch_size)]
        made = []
        with self.progress.evaluation(len(share)) as bar, randomness_untouched(self.accelerator.device):
            for chunk in chunks:
                made.append(self._make_batch(chunk, pairs, make, scorers))
                bar.update(len(chunk))
            images, pending = zip(*made, strict=True)
            rewards = [
                torch.cat([scores.rewards_or_nan() for scores in batches]) for batches in zip(*pending, strict=True)
            ]
        problem = first_problem([scores for batch in pending for scores in batch], raises=not self.drop_invalid)
        place_of = {index: place for place, index in enumerate(gather(self.accelerator, torch.tensor(share)).tolist())}
        places = [place_of[index] for index in range(len(pairs))]
        all_rewards = [gather(self.accelerator, columns)[places] for columns in rewards]
        if problem is not None and self.accelerator.is_main_process:
            totals = [scorer.total(rewards) for scorer, rewards in zip(scorers, all_rewards, strict=True)]
            invalid = int(torch.stack(totals).isnan().any(dim=0).sum())
            logger.warning(
                f"{invalid} of {len(pairs)} images of an evaluation have no valid reward and are left out. The first "
                f"reason: {problem}"
            )
        return Made(torch.cat(images), places, all_rewards)

    def _images(self, made: Made, indices: Sequence[int]) -> Tensor:
        """Return the images of some prompts, wherever they were made, on the CPU. All processes have to call it."""
        own = len(made.images)
        places = [made.places[index] - self.accelerator.process_index * own for index in indices]
        if self.accelerator.num_processes == 1:
            return made.images[places]
        images = torch.zeros(len(indices), *made.images.shape[1:], device=self.accelerator.device)
        for row, place in enumerate(places):
            if 0 <= place < own:  # or else another process adds it
                images[row] = made.images[place]
        return self.accelerator.reduce(images, reduction="sum").cpu()

    def _make_batch(
        self,
        indices: Sequence[int],
        pairs: Sequence[PromptPair],
        make: Callable[[Context], Tensor],
        scorers: Sequence[RewardScorer],
    ) -> tuple[Tensor, list[PendingRewards]]:
        prompts, metadata = zip(*(pairs[index] for index in indices), strict=True)
        seeds = [self.image_seed(index) for index in indices]
        with self.accelerator.autocast():
            images = make(self.policy.context(prompts, metadata, seeds))
        pending = [scorer.submit(images, prompts, metadata, when="evaluation") for scorer in scorers]
        return images.cpu(), pending


def mean(rewards: Tensor) -> float:
    """Return the mean of the valid ones of `(N,)` rewards; the others are NaN."""
    return rewards[~rewards.isnan()].mean().item()


def std(rewards: Tensor) -> float:
    """Return the standard deviation of the valid rewards, without Bessel's correction."""
    return rewards[~rewards.isnan()].std(correction=0).item()


def repeated(keys: Sequence[str]) -> list[list[int]]:
    """Return the positions of each key that occurs at least twice."""
    return [rows for rows in indices_by_key(keys).values() if len(rows) > 1]


def diversity(images: Iterable[Tensor]) -> float | None:
    """
    Distance between the images of one prompt: small for a policy that makes the same image whatever the noise.

    Args:
        images (`Iterable[torch.Tensor]`):
            Images of each prompt, `(n, ...)` in [0, 1], one prompt in memory at a time. Images that are not finite are
            left out.

    Returns:
        Root mean square distance of pixels, in [0, 1], averaged over the pairs of a prompt and then over prompts;
        `None` if no prompt has two images.
    """
    flat = (group[finite_rows(group)].flatten(1).float() for group in images)
    distances = [torch.pdist(group).mean() / group.shape[1] ** 0.5 for group in flat if len(group) > 1]
    return torch.stack(distances).mean().item() if distances else None


def reward_names(scorer: RewardScorer, held_out: RewardScorer | None) -> list[str]:
    """Return the names under which an evaluation logs both scorers' functions."""
    return unique_names([*scorer.names, *([] if held_out is None else held_out.names)])


def metric_names(reward_functions: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """Return the keys of [`Evaluator.metrics`] with the prefix `"eval"`."""
    names = ["reward", "reward_std", "reward_sde_gap"]
    names += [f"rewards/{function}/{figure}" for function in reward_functions for figure in ("mean", "std")]
    names += ["diversity"] if repeated(prompts) else []
    return [f"eval_{name}" for name in names]


def check_evaluation(config: DDPOConfig, pairs: Sequence[PromptPair] | None, reward_functions: Sequence[str]) -> None:
    """
    Refuse at construction what would fail only at the first evaluation.

    Raises:
        `ValueError`: If prompts are missing, or `metric_for_best_model` is not one of the figures.
    """
    if config.eval_strategy == IntervalStrategy.NO:
        return
    if pairs is None:
        raise ValueError(
            f"eval_strategy is {IntervalStrategy(config.eval_strategy).value!r}, but there are no prompts to evaluate "
            "on: give `eval_prompts` to the trainer."
        )
    metric = config.metric_for_best_model
    keys = prompt_keys(pairs, default_prompt_key) if metric is not None else []
    known = metric_names(reward_functions, keys)
    if metric is not None and "eval_" + metric.removeprefix("eval_") not in known:
        raise ValueError(
            f"metric_for_best_model is {metric!r}, which an evaluation does not give; choose one of "
            f"{', '.join(known)}" + ("." if repeated(keys) else " (eval_diversity needs a prompt given twice).")
        )
