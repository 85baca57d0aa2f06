"""The diffusers pipeline as a policy: a module that samples, replays recorded steps, and saves what is trained."""

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import PeftConfig
from torch import Tensor, nn

from ddpo_trl.config import DDPOConfig
from ddpo_trl.policy.adapter_dtype import set_compute_dtype
from ddpo_trl.policy.adapter_files import load_adapter, save_adapter
from ddpo_trl.policy.denoiser import denoiser_name, present_classes
from ddpo_trl.policy.full_weights import freeze_all_but_denoiser, load_denoiser, save_denoiser
from ddpo_trl.policy.gaussian import kl_divergence, log_prob
from ddpo_trl.policy.lora import adapter_scales, add_adapter, describe_adapter
from ddpo_trl.policy.per_sample_gradients import TrainedLayer
from ddpo_trl.policy.pipeline import check_call
from ddpo_trl.policy.records import Context, SampledBatch, join_samples
from ddpo_trl.policy.runner import PipelineRunner, seeded
from ddpo_trl.policy.sampling import sample, sample_with_gradients
from ddpo_trl.policy.schedulers import Replay, policy_scheduler


class Schedule(NamedTuple):
    """
    Schedule of a sampler, and the memory of one sample.

    Args:
        stds (`list[float]`):
            σ_t of each step, from noise to image; 0 for deterministic steps.
        state_bytes (`int`):
            Bytes of one sample's state x_t.
        embedding_bytes (`int`):
            Bytes of its prompt embedding, including the negative prompt's; 0 if the pipeline's are not known.
    """

    stds: list[float]
    state_bytes: int
    embedding_bytes: int


class PolicyOutput(NamedTuple):
    """
    Log-probabilities of recorded actions, and the divergence of their steps.

    Args:
        log_probs (`torch.Tensor` of shape `(B,)`):
            log π_θ, float32.
        kl (`torch.Tensor` of shape `(B,)`, *optional*):
            KL(π_θ ‖ π_ref) of the transition, float32, ≥ 0; only if requested.
    """

    log_probs: Tensor
    kl: Tensor | None


class Policy(nn.Module):
    """
    π_θ(x_{t-1} | x_t, prompt), given by a diffusers pipeline.

    Sampling and training run the same `pipeline.__call__` under a policy scheduler
    ([`~ddpo_trl.policy.runner.PipelineRunner`]). The module registers the denoiser only, so that DDP wraps it and
    synchronizes gradients although the pipeline calls the bare denoiser.

    The user's pipeline is not changed except for the adapter.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            A text-to-image or text-to-video pipeline. The weights to train in its denoiser already require gradients.
        config ([`DDPOConfig`]):
            Sampler and log-probability settings.
        adapter (`str`, *optional*):
            Name of the trained LoRA adapter, `None` if the denoiser's own weights are trained.

    Raises:
        `ValueError`: If the scheduler can't be turned into a policy, the pipeline does not take the arguments that it
            will be called with, or nothing requires gradients.
    """

    @classmethod
    def from_pipeline(
        cls, pipeline: DiffusionPipeline, config: DDPOConfig, peft_config: PeftConfig | None = None
    ) -> "Policy":
        """
        Prepare a pipeline for training an adapter on its denoiser, or the denoiser's own weights.

        Args:
            pipeline ([`~diffusers.DiffusionPipeline`]):
                The pipeline. What is not trained is frozen.
            config ([`DDPOConfig`]):
                Settings; `use_lora` selects which of the two.
            peft_config ([`~peft.PeftConfig`], *optional*):
                Adapter to add. Defaults to the pipeline's own adapter, or else to the default one.

        Raises:
            `ValueError`: If the pipeline can't be trained that way, see [`~ddpo_trl.policy.lora.add_adapter`] and
                [`~ddpo_trl.policy.full_weights.freeze_all_but_denoiser`].
            `TypeError`: If an argument has the wrong type.
        """
        if not isinstance(pipeline, DiffusionPipeline):
            what = repr(pipeline) if isinstance(pipeline, type) else type(pipeline).__name__
            remedy = f"`{pipeline.__name__}.from_pretrained(...)`" if isinstance(pipeline, type) else "a Hub id"
            raise TypeError(f"pipeline is {what}; give a pipeline of diffusers, such as {remedy}.")
        if not isinstance(peft_config, PeftConfig | None):
            raise TypeError(
                f"peft_config is {type(peft_config).__name__}; give a `peft.LoraConfig(...)`, or leave it out."
            )
        if config.use_lora:
            return cls(pipeline, config, add_adapter(pipeline, peft_config))
        freeze_all_but_denoiser(pipeline, peft_config)
        return cls(pipeline, config, adapter=None)

    def __init__(self, pipeline: DiffusionPipeline, config: DDPOConfig, adapter: str | None):
        super().__init__()
        self.settings = config  # not `config`: Trainer takes that for a transformers model's and writes to it
        self.model_tags: Sequence[str] = ()  # of the model card; Trainer's callbacks put theirs here
        self.adapter = adapter
        self.input_names = tuple(config.pipeline_inputs or ())
        check_call(pipeline, config)
        self.scheduler: Any = policy_scheduler(pipeline.scheduler, config.eta, config.noise_level, config.sde_type)
        self.denoiser_name = denoiser_name(pipeline)
        self.denoiser: ModelMixin = pipeline.components[self.denoiser_name]
        if not any(parameter.requires_grad for parameter in self.denoiser.parameters()):
            raise ValueError(
                f"Nothing is trainable: no parameter of pipeline.{self.denoiser_name} requires a gradient. Set "
                "`requires_grad_(True)` on what you want to train, or use_lora=True."
            )
        if adapter is not None:
            set_compute_dtype(self.denoiser, adapter, config.adapter_compute_dtype)
        # FSDP shards by these blocks and gathers one at a time.
        self._no_split_modules = present_classes(self.denoiser, self.denoiser._no_split_modules or ())
        self.runner = PipelineRunner(pipeline, self.denoiser_name, self.scheduler, config, adapter is not None)
        self.pipeline: Any = self.runner.pipeline

    def context(self, prompts: Sequence[str], metadata: Sequence[Any], seeds: Sequence[int]) -> Context:
        """
        Build the context of a batch.

        Args:
            prompts (`Sequence[str]` of length `B`):
                The prompts.
            metadata (`Sequence` of length `B`):
                Metadata of the prompts; entries named in `config.pipeline_inputs` are passed to the pipeline.
            seeds (`Sequence[int]` of length `B`):
                Seeds of all randomness of each sample.

        Raises:
            `ValueError`: If an entry is missing.
        """
        for entries in metadata:
            known = entries if isinstance(entries, Mapping) else {}
            if missing := [name for name in self.input_names if name not in known]:
                raise ValueError(
                    f"pipeline_inputs names {missing[0]!r}, but the metadata of a prompt is {entries!r}. Return it "
                    "with each prompt, as a dict, or as a column of the dataset."
                )
        inputs = {name: [entries[name] for entries in metadata] for name in self.input_names}
        return Context(prompts=tuple(prompts), seeds=tuple(seeds), inputs=inputs)

    def probe_schedule(self, context: Context) -> Schedule:
        """
        Run the pipeline up to its first step and no further: only its `__call__` knows its timesteps.

        Args:
            context ([`~ddpo_trl.policy.records.Context`]):
                One sample is enough.

        Returns:
            [`Schedule`]

        Raises:
            `ValueError`: If a step can't hold the noise it would get, or the pipeline does not accept a state.
        """
        latents = self.runner.first_state(context)
        steps = len(self.scheduler.stds)
        windowed = self.settings.sde_window_size is not None
        self.scheduler.check_noise(self.settings.steps_in_range(steps) if windowed else range(steps))
        encoder = vars(self.runner.policy_pipeline).get("encode_prompt")
        embedding_bytes = 0 if encoder is None else encoder.largest
        return Schedule(self.scheduler.stds, latents.nbytes // len(context), embedding_bytes)

    def describe(self) -> str:
        """Return one line about the trained weights."""
        quantizer = vars(self.denoiser).get("hf_quantizer")
        quantized = "" if quantizer is None else f", quantized by {quantizer.quantization_config.quant_method.value}"
        what = f"pipeline.{self.denoiser_name} ({type(self.denoiser).__name__}{quantized})"
        if self.adapter is None:
            weights = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
            return f"{what}: {weights:,} of its own weights"
        return f"LoRA on {what}: {describe_adapter(self.denoiser, self.adapter)}"

    @property
    def adapter_record(self) -> dict[str, Any]:
        """Entries about the adapter, other than its weights, in the record of a run; empty without an adapter."""
        if self.adapter is None:
            return {}
        return {"The scale of the adapter": adapter_scales(self.denoiser, self.adapter)}

    def train(self, mode: bool = True) -> "Policy":
        """Keep the denoiser in evaluation mode: with dropout, a replayed step is not the policy that was sampled."""
        return super().train(False)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """
        Enable gradient checkpointing: called for `gradient_checkpointing=True`, at construction and by the Trainer.

        Raises:
            `ValueError`: If the denoiser does not support it, or for the options that diffusers' models don't have.
        """
        if activation_checkpointing_kwargs or every_n_layers != 1 or offload:
            raise ValueError(
                "gradient_checkpointing_kwargs is set, but diffusers' models take no options there; leave it out."
            )
        try:
            self.denoiser.enable_gradient_checkpointing()
        except ValueError as error:
            raise ValueError(
                f"gradient_checkpointing is True, but {type(self.denoiser).__name__} does not support it. Leave it "
                "out, and lower per_device_train_batch_size if memory is short."
            ) from error

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Enable gradient checkpointing, by the name that transformers before 5.24 calls."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    @torch.no_grad()
    def sample(
        self,
        context: Context,
        record: Collection[int] = (),
        stochastic: Collection[int] | None = None,
        max_steps: int | None = None,
    ) -> SampledBatch:
        """
        Draw images from the policy.

        Args:
            context ([`~ddpo_trl.policy.records.Context`] of length `B`):
                Prompts, seeds and inputs of the samples.
            record (`Collection[int]`):
                Indices of the denoising steps whose transitions are kept, if they are stochastic.
            stochastic (`Collection[int]`, *optional*):
                Indices of the steps that get noise, all by default.
            max_steps (`int`, *optional*):
                Number of steps after which denoising stops; all by default.
        """
        calls = self.runner.calls.split(context)
        return SampledBatch.joined(
            context, [sample(self.runner, call, record, stochastic, max_steps) for call in calls]
        )

    @torch.no_grad()
    def sample_with_gradients(
        self,
        context: Context,
        weights: Mapping[int, float],
        layers: Mapping[TrainedLayer, int],
        stochastic: Collection[int] | None = None,
        max_samples: int | None = None,
    ) -> SampledBatch:
        """
        Draw the images that [`~Policy.sample`] draws, and take the gradients of their log-probabilities meanwhile.

        Args:
            context ([`~ddpo_trl.policy.records.Context`] of length `B`):
                Prompts, seeds and inputs of the samples.
            weights (`Mapping[int, float]`):
                Weight of the log-probability of each trained denoising step, by the step's index.
            layers (`Mapping[torch.nn.Module, int]`):
                See [`~ddpo_trl.policy.per_sample_gradients.SampleGradients`].
            stochastic (`Collection[int]`, *optional*):
                Indices of the steps that get noise, all by default.
            max_samples (`int`, *optional*):
                Number of samples, at most, whose activations are in memory at a time; all by default.
        """
        parts = context.split(max_samples or len(context))
        calls = [call for part in parts for call in self.runner.calls.split(part)]
        return SampledBatch.joined(
            context, [sample_with_gradients(self.runner, call, weights, layers, stochastic) for call in calls]
        )

    @torch.no_grad()
    def generate(self, context: Context) -> Tensor:
        """
        Draw images as the pipeline's users will, with its own scheduler.

        Args:
            context ([`~ddpo_trl.policy.records.Context`] of length `B`):
                Prompts, seeds and inputs of the samples.

        Returns:
            `torch.Tensor` of shape `(B, 3, H, W)`, or `(B, F, 3, H, W)` for video, float32 in [0, 1].
        """
        images = [
            self.runner.run_to_images(self.pipeline, call, seeded(call)) for call in self.runner.calls.split(context)
        ]
        return join_samples(images)

    def forward(
        self, step: int, latents: Tensor, next_latents: Tensor, context: Context, with_reference: bool = False
    ) -> PolicyOutput:
        """
        Replay one recorded step.

        Args:
            step (`int`):
                Index of the step in the sampler's schedule.
            latents, next_latents (`torch.Tensor` of shape `(B, ...)`):
                State x_t and action x_{t-1} as recorded.
            context ([`~ddpo_trl.policy.records.Context`] of length `B`):
                Context that they were sampled from.
            with_reference (`bool`, *optional*, defaults to `False`):
                Also compute the KL divergence to the reference policy, at the cost of one more forward pass.
        """
        if self.scheduler.layout is None:
            self.runner.first_state(context)
        kl = None
        if with_reference:  # first, so that no graph is held meanwhile
            with torch.no_grad(), self.runner.reference() as pipeline:
                reference_mean = self.runner.visit(pipeline, Replay(step, latents), context).mean
        replay = self.runner.visit(self.runner.policy_pipeline, Replay(step, latents), context)
        reduction = self.settings.log_prob_reduction
        if with_reference:
            kl = kl_divergence(replay.mean, reference_mean, replay.std, reduction)
        return PolicyOutput(log_prob(next_latents, replay.mean, replay.std, reduction), kl)

    def save(self, directory: str | os.PathLike[str], write: bool = True) -> None:
        """
        Write the adapter ([`~ddpo_trl.policy.adapter_files.save_adapter`]), or the denoiser in a subfolder.

        Args:
            directory (`str` or `os.PathLike`):
                Target directory.
            write (`bool`, *optional*, defaults to `True`):
                `False` on all processes except one: they only take part in gathering sharded weights.
        """
        if self.adapter is None:
            save_denoiser(self.denoiser, os.path.join(directory, self.denoiser_name), write)
        else:
            save_adapter(self.pipeline, self.adapter, directory, write)

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Load what [`~Policy.save`] wrote into the existing parameters."""
        if self.adapter is None:
            load_denoiser(self.denoiser, directory, self.denoiser_name)
        else:
            load_adapter(self.pipeline, self.adapter, directory)
