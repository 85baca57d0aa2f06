"""The diffusers pipeline as a policy. This is the only file that runs a pipeline's `__call__`."""

import copy
import functools
import inspect
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from ddpo_trl.config import DDPOConfig
from ddpo_trl.gaussian import kl_divergence, log_prob
from ddpo_trl.lora import denoiser_name, load_adapter, save_adapter
from ddpo_trl.scheduler import Replay, Sampling, policy_scheduler
from ddpo_trl.types import SampledBatch


# Embeddings of this many prompts are kept. Stable Diffusion's take 0.5 MB each in float32.
MAX_CACHED_PROMPTS = 1024


class PolicyOutput(NamedTuple):
    """
    What the policy says of recorded actions.

    Args:
        log_probs (`torch.Tensor` of shape `(B,)`):
            log π_θ, float32.
        kl (`torch.Tensor` of shape `(B,)`, *optional*):
            KL(π_θ ‖ π_ref) of the transition, float32, ≥ 0; only where asked for.
    """

    log_probs: Tensor
    kl: Tensor | None


class Policy(nn.Module):
    """
    π_θ(x_{t-1} | x_t, prompt), given by a diffusers pipeline.

    Sampling and training run the same `pipeline.__call__` under a policy scheduler. The module registers the denoiser
    and keeps the pipeline beside it, so that DDP wraps it and synchronises gradients although the pipeline calls the
    bare denoiser.

    The user's pipeline is not touched but for the adapter: a shallow copy, which shares all networks, gets the policy
    scheduler and a cache of prompt embeddings.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            A text-to-image pipeline; what is to be trained in its denoiser requires gradients already.
        config ([`DDPOConfig`]):
            Sampler and log-probability settings.
        adapter (`str`, *optional*):
            Name of the trained LoRA adapter, `None` if the denoiser's own weights are trained.

    Raises:
        `ValueError`: If the scheduler can't be turned into a policy, or nothing requires gradients.
    """

    def __init__(self, pipeline: DiffusionPipeline, config: DDPOConfig, adapter: str | None):
        super().__init__()
        self.settings = config  # not `config`: Trainer takes that for a transformers model's and writes to it
        self.adapter = adapter
        pipeline_kwargs = config.pipeline_kwargs or {}
        assert isinstance(pipeline_kwargs, dict), "DDPOConfig parses strings"
        self.pipeline_kwargs = pipeline_kwargs
        self.scheduler = policy_scheduler(pipeline.scheduler, config.eta)
        self.denoiser_name = denoiser_name(pipeline)
        self.denoiser: ModelMixin = pipeline.components[self.denoiser_name]
        if not any(parameter.requires_grad for parameter in self.denoiser.parameters()):
            raise ValueError(
                f"Nothing is trainable: no parameter of pipeline.{self.denoiser_name} requires a gradient. Set "
                "`requires_grad_(True)` on what you want to train, or use_lora=True."
            )
        self.pipeline = quiet_copy(pipeline)  # runs with its own, deterministic or not, scheduler
        self.policy_pipeline = quiet_copy(pipeline)
        self.policy_pipeline.scheduler = self.scheduler
        self.policy_pipeline.encode_prompt = memoised_by_prompt(self.policy_pipeline.encode_prompt)
        if "safety_checker" in pipeline.components:
            self.policy_pipeline.safety_checker = None  # it would blacken images before they are scored
        self._reference_pipeline = self.policy_pipeline
        if adapter is None and config.kl_coef > 0:
            self._reference_pipeline = copy.copy(self.policy_pipeline)
            frozen = copy.deepcopy(self.denoiser).requires_grad_(False)
            self._reference_pipeline.register_modules(**{self.denoiser_name: frozen})

    @property
    def stds(self) -> list[float]:
        """σ_t of each step of the sampler, from noise to image; 0 for deterministic steps."""
        return self.scheduler.stds(self.settings.num_inference_steps)

    def train(self, mode: bool = True) -> "Policy":
        """Keeps the denoiser in evaluation mode: with dropout a replayed step is not the policy that was sampled."""
        return super().train(False)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """
        What the Trainer calls for `gradient_checkpointing=True`.

        Raises:
            `ValueError`: For the options that diffusers' models don't have.
        """
        if activation_checkpointing_kwargs or every_n_layers != 1 or offload:
            raise ValueError(
                "gradient_checkpointing_kwargs is set, but diffusers' models take no options there; leave it out."
            )
        self.denoiser.enable_gradient_checkpointing()

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        record: Collection[int] = (),
        num_inference_steps: int | None = None,
    ) -> SampledBatch:
        """
        Draws one image per prompt from the policy.

        Args:
            prompts (`Sequence[str]` of length `B`):
                The prompts.
            generators (`Sequence[torch.Generator]` of length `B`):
                All randomness of each sample.
            record (`Collection[int]`):
                Indices of the denoising steps whose transitions are kept; deterministic ones never are.
            num_inference_steps (`int`, *optional*):
                Steps, the config's by default.
        """
        source = Sampling(generators, record, self.settings.log_prob_reduction)
        with self.scheduler.acting(source):
            images = self._run(
                self.policy_pipeline,
                prompts,
                generator=list(generators),
                output_type="pt",
                num_inference_steps=num_inference_steps or self.settings.num_inference_steps,
            )
        return SampledBatch(prompts=tuple(prompts), images=images.float(), steps=source.steps)

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], generators: Sequence[torch.Generator]) -> Tensor:
        """
        Draws one image per prompt as the pipeline's users will, with its own scheduler.

        Args:
            prompts (`Sequence[str]` of length `B`):
                The prompts.
            generators (`Sequence[torch.Generator]` of length `B`):
                The randomness of each sample.

        Returns:
            `torch.Tensor` of shape `(B, 3, H, W)`, float32 in [0, 1].
        """
        images = self._run(
            self.pipeline,
            prompts,
            generator=list(generators),
            output_type="pt",
            num_inference_steps=self.settings.num_inference_steps,
        )
        return images.float()

    def forward(
        self, step: int, latents: Tensor, next_latents: Tensor, prompts: Sequence[str], with_reference: bool = False
    ) -> PolicyOutput:
        """
        Runs one recorded step again.

        Args:
            step (`int`):
                Its index in the sampler's schedule.
            latents, next_latents (`torch.Tensor` of shape `(B, ...)`):
                State x_t and action x_{t-1} as recorded.
            prompts (`Sequence[str]` of length `B`):
                The prompts they were sampled with.
            with_reference (`bool`, *optional*, defaults to `False`):
                Whether to take the KL divergence to the reference policy too, at the cost of one more forward pass.
        """
        kl = None
        if with_reference:  # first, so that no graph is held meanwhile
            with torch.no_grad(), self._reference() as pipeline:
                reference_mean = self._replay(pipeline, step, latents, next_latents, prompts).mean
        replay = self._replay(self.policy_pipeline, step, latents, next_latents, prompts)
        reduction = self.settings.log_prob_reduction
        if with_reference:
            kl = kl_divergence(replay.mean, reference_mean, replay.std, reduction)
        return PolicyOutput(log_prob(next_latents, replay.mean, replay.std, reduction), kl)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the trained weights: the adapter in diffusers' LoRA format, or else the denoiser in a subfolder."""
        if self.adapter is None:
            self.denoiser.save_pretrained(os.path.join(directory, self.denoiser_name))
        else:
            save_adapter(self.pipeline, self.adapter, directory)

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Reads back what [`~Policy.save`] wrote, into the parameters that are there."""
        if self.adapter is None:
            saved = type(self.denoiser).from_pretrained(directory, subfolder=self.denoiser_name)
            self.denoiser.load_state_dict(saved.state_dict())
        else:
            load_adapter(self.pipeline, self.adapter, directory)

    def _replay(
        self, pipeline: DiffusionPipeline, step: int, latents: Tensor, action: Tensor, prompts: Sequence[str]
    ) -> Replay:
        source = Replay(step, action)
        with self.scheduler.acting(source):
            self._run(
                pipeline,
                prompts,
                latents=latents,
                output_type="latent",
                num_inference_steps=self.settings.num_inference_steps,
            )
        if source.visits != 1:
            raise RuntimeError(
                f"{type(pipeline).__name__} ran {source.visits} scheduler steps where one was replayed: it does not "
                "take its timesteps from the scheduler, so it can't be a policy."
            )
        return source

    def _run(self, pipeline: DiffusionPipeline, prompts: Sequence[str], **kwargs: Any) -> Any:
        # Diffusers decorates `__call__` with `torch.no_grad()`; our callers decide about gradients.
        call = inspect.unwrap(type(pipeline).__call__)
        return call(
            pipeline,
            prompt=list(prompts),
            guidance_scale=self.settings.guidance_scale,
            return_dict=False,
            **self._pipeline_kwargs(len(prompts)),
            **kwargs,
        )[0]

    def _pipeline_kwargs(self, batch_size: int) -> dict[str, Any]:
        negative_prompt = self.pipeline_kwargs.get("negative_prompt")
        if isinstance(negative_prompt, str):  # Stable Diffusion wants as many as there are prompts
            return {**self.pipeline_kwargs, "negative_prompt": [negative_prompt] * batch_size}
        return self.pipeline_kwargs

    @contextmanager
    def _reference(self) -> Iterator[DiffusionPipeline]:
        """The policy pipeline as it was before training."""
        if self.adapter is None:
            yield self._reference_pipeline
            return
        self.denoiser.disable_adapters()
        try:
            yield self.policy_pipeline
        finally:
            self.denoiser.enable_adapters()


def quiet_copy(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """A shallow copy that shares all components and draws no progress bar."""
    twin = copy.copy(pipeline)
    twin.set_progress_bar_config(disable=True)
    return twin


def memoised_by_prompt(encode_prompt: Any) -> Any:
    """
    A pipeline's `encode_prompt` that encodes every prompt once and by itself.

    So replay runs no text encoder, and a sample's embedding does not depend on the batch it is in.
    """

    @functools.lru_cache(MAX_CACHED_PROMPTS)
    def encode_one(prompt: str, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            return encode_prompt(prompt, *args, **kwargs)

    @functools.wraps(encode_prompt)
    def encode(prompt: Sequence[str], *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        def of_sample(index: int, value: Any) -> Any:  # a negative prompt per sample
            return value[index] if isinstance(value, list) else value

        embeddings = [
            encode_one(
                text,
                *(of_sample(index, value) for value in args),
                **{name: of_sample(index, value) for name, value in kwargs.items()},
            )
            for index, text in enumerate(prompt)
        ]
        return tuple(None if column[0] is None else torch.cat(column) for column in zip(*embeddings, strict=True))

    return encode
