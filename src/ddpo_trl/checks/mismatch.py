"""A transition whose replay differs from sampling, the tolerances, and other ways to replay it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpo_trl.config import DDPOConfig
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.records import SampledBatch, Step
from ddpo_trl.rollout.records import Transition


# Largest accepted difference of a log-probability, averaged over dimensions, between sampling and training before any
# update. At the batch size of sampling it is 0, in half precision too. Other kernels, which another micro-batch size
# or autograd may select, change it by about 1e-6 in float32 (more with TensorFloat-32), and by up to 4e-3 in bfloat16,
# where the last steps are the most sensitive. A fault such as another guidance scale changes it by 1e-3 to 10. A
# difference up to the rounding limits is accepted only if it vanishes at the batch size of sampling.
FLOAT32_TOLERANCE = 1e-5
FLOAT32_ROUNDING = 1e-3
HALF_PRECISION_ROUNDING = 0.1
HALF_DTYPES = (torch.bfloat16, torch.float16)

# A way to replay explains the difference if it leaves at most this fraction of it.
VANISHED = 0.1

# Number of replays that are compared with each other: two alone may agree by chance.
REPLAYS = 4


def log_prob_difference(config: DDPOConfig, replayed: Tensor, recorded: Tensor, latents: Tensor) -> float:
    """Return the largest difference between `(B,)` log-probabilities, in nats per latent dimension."""
    dimensions = latents[0].numel() if config.log_prob_reduction == "sum" else 1
    return (replayed - recorded).abs().max().item() / dimensions


@dataclass(kw_only=True)
class Mismatch:
    """
    A transition whose replay has another log-probability than the recorded one, to be replayed in other ways.

    Args:
        policy ([`~ddpo_trl.policy.policy.Policy`]):
            The policy as training calls it.
        micro_batch ([`~ddpo_trl.rollout.records.Transition`]):
            The micro-batch as training replayed it.
        batch ([`~ddpo_trl.policy.records.SampledBatch`]):
            The batch in which its worst sample was drawn. It is replayed as a whole, so that size and composition of
            the batch are as in sampling.
        difference (`float`):
            The difference to explain, in nats per latent dimension.
    """

    policy: Policy
    micro_batch: Transition
    batch: SampledBatch
    difference: float

    @property
    def recorded(self) -> Step:
        """The recorded step of the sampled batch, on the device of the micro-batch."""
        return self.batch.steps[self.micro_batch.step].to(self.micro_batch.latents.device)

    @torch.no_grad()
    def replay(self) -> Tensor:
        """Return the log-probabilities of the sampled batch, replayed as a whole."""
        step = self.recorded
        return self.policy(self.micro_batch.step, step.latents, step.next_latents, self.batch.context).log_probs

    def distance(self, left: Tensor, right: Tensor) -> float:
        """Return the largest difference between two results, in the unit of `difference`."""
        return log_prob_difference(self.policy.settings, left, right, self.micro_batch.latents)

    def spread(self) -> float:
        """Return the largest difference of replays of the sampled batch from the first of them."""
        first = self.replay()
        return max(self.distance(self.replay(), first) for _ in range(REPLAYS - 1))

    def difference_in_batch(self) -> float:
        """Return the difference that remains if the sampled batch is replayed as a whole."""
        return self.distance(self.replay(), self.recorded.log_probs)

    def vanishes_in_batch(self) -> bool:
        """Return whether the difference vanishes if the sampled batch is replayed as a whole."""
        return self.difference_in_batch() <= VANISHED * self.difference  # and not a NaN

    def vanishes_in_micro_batch(self, with_gradients: bool) -> bool:
        """Return whether the difference vanishes if the micro-batch is replayed again."""
        batch = self.micro_batch
        with torch.set_grad_enabled(with_gradients):
            replayed = self.policy(batch.step, batch.latents, batch.next_latents, batch.context).log_probs.detach()
        return self.distance(replayed, batch.log_probs) <= VANISHED * self.difference
