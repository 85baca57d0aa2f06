"""Calls of a diffusers pipeline: up to a denoising step, or to images. This is the only file that runs `__call__`."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from ddpo_trl.config import DDPOConfig
from ddpo_trl.policy.calls import BatchCalls, attention_modules, images_tensor, processors_kept
from ddpo_trl.policy.denoiser import adapters_off
from ddpo_trl.policy.embeddings import OnlyInPlace, PromptEncoder
from ddpo_trl.policy.fingerprint import Fingerprint, adapter_switches, settings_in_use, weight_sums
from ddpo_trl.policy.pipeline import moving_to_decode, policy_copy, quiet_copy, with_component
from ddpo_trl.policy.records import Context, join_samples
from ddpo_trl.policy.schedulers import PolicyScheduler, Replay, Sampling, StepReplayed
from ddpo_trl.policy.schedulers.actions import BeforeSteps, StartingFrom
from ddpo_trl.policy.schedulers.layout import learn_layout, numbered
from ddpo_trl.policy.values import is_setting


class PipelineRunner:
    """
    Runs a pipeline for batches of samples, in as many calls as the pipeline needs.

    The user's pipeline is only read: shallow copies that share all networks get the policy scheduler, a cache of
    prompt embeddings, and no progress bars.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The user's pipeline.
        denoiser_name (`str`):
            Name of the component that is trained.
        scheduler ([`~ddpo_trl.policy.schedulers.PolicyScheduler`]):
            Scheduler of the policy.
        config ([`DDPOConfig`]):
            Sampler settings, read in each call.
        has_adapter (`bool`):
            Whether the reference policy is the denoiser without its adapters; otherwise it is a frozen copy, made if
            `kl_coef` > 0.

    Attributes:
        policy_pipeline ([`~diffusers.DiffusionPipeline`]):
            Copy that steps with `scheduler`.
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Copy that steps with its own scheduler.
        calls ([`~ddpo_trl.policy.calls.BatchCalls`]):
            Splits batches into calls.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        denoiser_name: str,
        scheduler: PolicyScheduler,
        config: DDPOConfig,
        has_adapter: bool,
    ):
        pipeline_kwargs = config.pipeline_kwargs or {}
        assert isinstance(pipeline_kwargs, dict), "DDPOConfig parses strings"
        self.settings = config
        self.pipeline_kwargs = pipeline_kwargs
        self.scheduler: Any = scheduler
        self.denoiser: ModelMixin = pipeline.components[denoiser_name]
        own: Any = pipeline
        if config.vae_slicing:  # for good: images that are encoded in replay must be as they were in sampling
            own.vae.enable_slicing()
        if config.vae_tiling:
            own.vae.enable_tiling()
        if config.offload_vae:
            own = with_component(pipeline, "vae", moving_to_decode(own.vae.to("cpu"), self.denoiser))
        self.policy_pipeline = policy_copy(own, denoiser_name, scheduler, config.offload_text_encoders)
        self.pipeline: Any = quiet_copy(own)
        if "encode_prompt" in vars(self.policy_pipeline):  # the same cache for both
            self.pipeline.encode_prompt = self.policy_pipeline.encode_prompt
        self._has_adapter = has_adapter
        self._reference_pipeline = self.policy_pipeline
        if not has_adapter and config.kl_coef > 0:
            frozen = copy.deepcopy(self.denoiser).requires_grad_(False).to(config.device)
            self._reference_pipeline = with_component(self.policy_pipeline, denoiser_name, frozen)
        self._attention_modules = attention_modules(
            [*self.policy_pipeline.components.values(), self._reference_pipeline.components[denoiser_name]]
        )
        self.calls = BatchCalls(
            self.denoiser, self._first_call, self._images_after_one_step, is_plain=is_setting(pipeline_kwargs)
        )

    # ---- Up to a step ----

    def visit(self, pipeline: DiffusionPipeline, replay: Replay, context: Context) -> Replay:
        """
        Run a pipeline up to the step to replay, in as many calls as it needs, and return `replay` with the step's
        state, mean and standard deviation.

        Raises:
            `RuntimeError`: If the pipeline runs no step of its scheduler.
            `ValueError`: If the step has another standard deviation for each sample.
        """
        calls = self.calls.split(context)
        states: Sequence[Tensor | None] = [replay.state] * len(calls)
        if replay.state is not None and len(calls) > 1:
            # Copies: how kernels round may depend on where in memory a tensor begins.
            states = [state.clone() for state in replay.state.split(1)]
        visits = [
            self.run_to(pipeline, Replay(replay.step, state), call) for state, call in zip(states, calls, strict=True)
        ]
        latents = [visit.latents for visit in visits if visit.latents is not None]
        if not latents:
            raise RuntimeError(
                f"{type(pipeline).__name__} finished without a step of its scheduler, so it can't be a policy: it "
                "does not take its timesteps from pipeline.scheduler."
            )
        if len(stds := {visit.std for visit in visits}) > 1:
            raise ValueError(
                f"Step {replay.step} has another σ for each sample of a batch ({', '.join(map(str, sorted(stds)))}): "
                f"{', '.join(context.inputs)} changes the schedule. Give one value for all in pipeline_kwargs."
            )
        replay.latents, replay.mean = join_samples(latents), join_samples([visit.mean for visit in visits])
        replay.std = visits[0].std
        return replay

    def run_to(self, pipeline: DiffusionPipeline, replay: Replay, context: Context) -> Replay:
        """Make one call of a pipeline, which ends at the step to replay."""
        with self.scheduler.acting(replay), suppress(StepReplayed):
            self.run(pipeline, context, generator=seeded(context), output_type="latent")
        return replay

    @torch.no_grad()
    def first_state(self, context: Context) -> Tensor:
        """Return the state of the first step. Afterwards the scheduler knows the layout of states."""
        first = self.visit(self.policy_pipeline, Replay(0), context).latents
        assert first is not None, "visit raises if no step was run"
        if self.scheduler.layout is None:
            self._learn_layout(self.calls.split(context)[0])
        return first

    def _learn_layout(self, call: Context) -> None:
        own = Replay(0)
        visits = [self.run_to(self.policy_pipeline, own, call)]
        visits += [self.run_to(self.policy_pipeline, StartingFrom(digit), call) for digit in numbered(own.prepared)]
        first, *digits = [visit.latents for visit in visits if visit.latents is not None]
        self.scheduler.layout = learn_layout(len(call), own.prepared.numel(), first, digits)

    def _first_call(self, context: Context, replay: Replay) -> Replay:
        self.denoiser.eval()  # an adapter that was just added is in training mode, with its dropout
        return self.run_to(self.policy_pipeline, replay, context)

    @contextmanager
    def reference(self) -> Iterator[DiffusionPipeline]:
        """Give the policy pipeline as it was before training."""
        if not self._has_adapter:
            yield self._reference_pipeline
            return
        with adapters_off(self.denoiser):
            yield self.policy_pipeline

    # ---- Before the first step ----

    @torch.no_grad()
    def encode(self, contexts: Iterable[Context], device: torch.device) -> None:
        """
        Encode prompts for `device` beforehand, as many as the cache keeps, so that offloaded text encoders are moved
        once.
        """
        encoder: PromptEncoder = self.policy_pipeline.encode_prompt
        with encoder.ahead(torch.empty(0, device=device).device):
            for context in contexts:
                if encoder.is_full:
                    return
                # Nothing is where it runs yet, so that how a batch is called can't be learned here.
                for call in context.singles() if context.inputs else [context]:
                    self.calls.run_either_way(call, self._encode)

    def _encode(self, context: Context) -> None:
        with suppress(OnlyInPlace):
            self.run_to(self.policy_pipeline, BeforeSteps(), context)

    # ---- To images ----

    def run_to_images(
        self, pipeline: DiffusionPipeline, context: Context, generators: list[torch.Generator]
    ) -> Tensor:
        """Make one call of a pipeline to its end."""
        self.denoiser.eval()  # an adapter that was just added is in training mode, with its dropout
        try:
            # Without a processor "pt" is the decoder's output, usually in [-1, 1].
            kind = "pt" if {"image_processor", "video_processor"} & vars(pipeline).keys() else "np"
            images = images_tensor(self.run(pipeline, context, generator=generators, output_type=kind))
        finally:
            if self.settings.offload_vae:
                self.pipeline.vae.to("cpu")
        return images.to(self.denoiser.device)

    def sample_images(self, source: Sampling, context: Context) -> Tensor:
        """Make one call of the policy pipeline to its end, with the actions of `source`."""
        with self.scheduler.acting(source):
            return self.run_to_images(self.policy_pipeline, context, source.generators)

    @torch.no_grad()
    def _images_after_one_step(self, context: Context) -> Tensor:
        source = Sampling(seeded(context), (), self.settings.log_prob_reduction, stochastic=None, max_steps=1)
        return self.sample_images(source, context)

    # ---- The call ----

    def run(self, pipeline: DiffusionPipeline, context: Context, **kwargs: Any) -> Any:
        """Call a pipeline with a batch and the configured arguments, and return the first of its outputs."""
        if self.settings.guidance_scale is not None:
            kwargs["guidance_scale"] = self.settings.guidance_scale
        draws = self.calls.drawing_from(context) if self.calls.draws else nullcontext()
        with processors_kept(self._attention_modules), draws:
            return pipeline(
                prompt=list(context.prompts),
                num_inference_steps=self.settings.num_inference_steps,
                return_dict=False,
                **self._pipeline_kwargs(len(context)),
                **self.calls.inputs(context),
                **kwargs,
            )[0]

    def _pipeline_kwargs(self, batch_size: int) -> dict[str, Any]:
        # Stable Diffusion wants as many negative prompts as there are prompts.
        return {
            name: [value] * batch_size if name.startswith("negative_prompt") and isinstance(value, str) else value
            for name, value in self.pipeline_kwargs.items()
        }

    # ---- What a call depends on ----

    def fingerprint(self) -> Fingerprint:
        """Return the state that training has to share with sampling."""
        return Fingerprint(
            settings=settings_in_use(self.settings, self.pipeline_kwargs, self.scheduler),
            adapter=adapter_switches(self.denoiser),
            weights=weight_sums(self.denoiser),
        )


def seeded(context: Context) -> list[torch.Generator]:
    """Return a new generator for each sample of a batch, at its seed."""
    return [torch.Generator().manual_seed(seed) for seed in context.seeds]
