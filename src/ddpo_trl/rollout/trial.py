"""Samples and reward calls at construction, so that what can't be trained is refused before time is spent."""

from collections.abc import Iterator, Sequence

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ddpo_trl.finite import finite_rows, image_problem
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.records import Context
from ddpo_trl.prompts import PromptPair, PromptSource, ShuffledPrompts
from ddpo_trl.rewards.pending import first_problem
from ddpo_trl.rewards.scoring import RewardScorer
from ddpo_trl.seeding import Stream, derived_seed, randomness_untouched


# Number of samples that show whether a sample depends on those next to it.
TRIAL_SAMPLES = 2

# Maximum number of prompts that are encoded at construction, where text encoders are offloaded.
MAX_PROMPTS_AHEAD = 1024


def preview(prompts: PromptSource, count: int) -> list[PromptPair]:
    """Return the first prompts of a run, those of the first process on all. All processes have to call it."""
    pairs = prompts.preview(count)
    return pairs if prompts.alike_on_all_processes else broadcast_object_list(pairs)


def trial_samples(policy: Policy, prompts: PromptSource) -> Context:
    """
    Return samples to try at construction: two, unless all batches have one. With `pipeline_inputs` they differ, which
    shows whether a sample depends on those next to it.
    """
    settings = policy.settings
    size = min(TRIAL_SAMPLES, max(settings.per_device_sample_batch_size, settings.per_device_train_batch_size))
    pairs = preview(prompts, size) if policy.input_names else preview(prompts, 1) * size
    texts, metadata = zip(*pairs, strict=True)
    seeds = [derived_seed(settings.seed, Stream.EVALUATION, index) for index in range(size)]
    return policy.context(texts, metadata, seeds)


def known_prompts(policy: Policy, prompts: PromptSource, eval_prompts: Sequence[PromptPair]) -> Iterator[Context]:
    """Yield batches of the prompts that are known before training begins, those of the first rounds first."""
    pairs = preview(prompts, 1)
    if isinstance(prompts, ShuffledPrompts) and not policy.input_names:  # these may be large
        pairs = preview(prompts, min(len(prompts.pairs), MAX_PROMPTS_AHEAD))
    own = list({prompt: (prompt, metadata) for prompt, metadata in [*pairs, *eval_prompts]}.values())
    size = policy.settings.per_device_sample_batch_size
    for first in range(0, len(own), size):
        texts, metadata = zip(*own[first : first + size], strict=True)
        yield policy.context(texts, metadata, range(len(texts)))


def trial_image(policy: Policy, pair: PromptPair) -> Tensor:
    """
    Make an image in one denoising step, under the autocast of the caller: `(1, 3, H, W)` or `(1, F, 3, H, W)`,
    float32 in [0, 1].

    Raises:
        `NotFiniteError`: If the image is not finite.
    """
    prompt, metadata = pair
    seed = derived_seed(policy.settings.seed, Stream.EVALUATION, 0)
    image = policy.sample(policy.context([prompt], [metadata], [seed]), max_steps=1).images
    if not finite_rows(image).all():
        raise image_problem("check at construction", 0, prompt, None, 1)
    return image


def try_reward_functions(scorers: Sequence[RewardScorer], image: Tensor, pair: PromptPair, size: int) -> None:
    """
    Score an image with the training and held-out rewards, so that a faulty reward function is refused at construction.

    With `size` 2 the image is scored together with a darker copy: a function that works for one image may fail for
    two.

    Raises:
        `ValueError` or `TypeError`: If a reward is not valid, whatever `on_invalid_reward` is.
    """
    prompt, metadata = pair
    images = torch.cat([image, image / 2])[:size]
    with randomness_untouched(image.device):
        scores = [
            scorer.submit(images, [prompt] * size, [metadata] * size, "check at construction") for scorer in scorers
        ]
        first_problem(scores, raises=True)
