"""The diffusers pipeline as a policy. This is the only file that runs a pipeline's `__call__`."""

import copy
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import PeftConfig
from torch import Tensor, nn

from ddpo_trl.config import DDPOConfig
from ddpo_trl.policy.adapter_files import load_adapter, save_adapter
from ddpo_trl.policy.calls import BatchCalls, attention_modules, images_tensor, processors_kept
from ddpo_trl.policy.denoiser import adapter_layers, adapters_off, denoiser_name, present_classes, recorded_grad_modes
from ddpo_trl.policy.embeddings import OnlyInPlace, PromptEncoder
from ddpo_trl.policy.fingerprint import Conditions, SettingOwners, conditions, setting_owners, settings_in_use
from ddpo_trl.policy.full_weights import freeze_all_but_denoiser, load_denoiser, save_denoiser
from ddpo_trl.policy.gaussian import kl_divergence, log_prob
from ddpo_trl.policy.lora import adapter_scales, add_adapter, describe_adapter
from ddpo_trl.policy.per_sample_gradients import SampleGradients, TrainedLayer
from ddpo_trl.policy.pipeline import check_call, parts, policy_copy, quiet_copy, with_denoiser
from ddpo_trl.policy.records import Context, Gradients, SampledBatch, Step, join_samples, steps_to
from ddpo_trl.policy.schedulers import (
    BeforeSteps,
    DifferentiatedSampling,
    Numbered,
    Replay,
    Sampling,
    StepReplayed,
    learn_layout,
    policy_scheduler,
)
from ddpo_trl.policy.values import is_setting


class Survey(NamedTuple):
    """
    What is known of a sampler before the first sample.

    Args:
        stds (`list[float]`):
            σ_t of each step, from noise to image; 0 for deterministic steps.
        state_bytes (`int`):
            Memory of one sample's state x_t.
        embedding_bytes (`int`):
            Memory of what its prompt is encoded to, the negative prompt included; 0 if the pipeline's are not known.
    """

    stds: list[float]
    state_bytes: int
    embedding_bytes: int


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
            A text-to-image or text-to-video pipeline; what is to be trained in its denoiser requires gradients
            already.
        config ([`DDPOConfig`]):
            Sampler and log-probability settings.
        adapter (`str`, *optional*):
            Name of the trained LoRA adapter, `None` if the denoiser's own weights are trained.

    Raises:
        `ValueError`: If the scheduler can't be turned into a policy, the pipeline does not take the arguments it is
            meant to be called with, or nothing requires gradients.
    """

    @classmethod
    def from_pipeline(
        cls, pipeline: DiffusionPipeline, config: DDPOConfig, peft_config: PeftConfig | None = None
    ) -> "Policy":
        """
        Prepares a pipeline for training: with an adapter on its denoiser, or all weights of the denoiser.

        Args:
            pipeline ([`~diffusers.DiffusionPipeline`]):
                The pipeline. What is not trained is frozen.
            config ([`DDPOConfig`]):
                Settings; `use_lora` decides.
            peft_config ([`~peft.PeftConfig`], *optional*):
                Adapter to add; the pipeline's own, or the default one, if it is left out.

        Raises:
            `ValueError`: If the pipeline can't be trained so, see [`~ddpo_trl.policy.lora.add_adapter`] and
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
        pipeline_kwargs = config.pipeline_kwargs or {}
        assert isinstance(pipeline_kwargs, dict), "DDPOConfig parses strings"
        self.pipeline_kwargs = pipeline_kwargs
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
        self.policy_pipeline = policy_copy(pipeline, self.scheduler, config.offload_text_encoders)
        self.pipeline: Any = quiet_copy(pipeline)  # runs with its own, deterministic or not, scheduler
        if config.offload_vae:
            self.pipeline.vae.to("cpu")
        if config.vae_slicing:  # for good: images that are encoded in replay have to be as they were in sampling
            self.pipeline.vae.enable_slicing()
        if config.vae_tiling:
            self.pipeline.vae.enable_tiling()
        # FSDP shards by these blocks: one at a time is whole.
        self._no_split_modules = present_classes(self.denoiser, self.denoiser._no_split_modules or ())
        if "encode_prompt" in vars(self.policy_pipeline):  # the same cache for both
            self.pipeline.encode_prompt = self.policy_pipeline.encode_prompt
        self._reference_pipeline = self.policy_pipeline
        if adapter is None and config.kl_coef > 0:
            frozen = copy.deepcopy(self.denoiser).requires_grad_(False).to(config.device)
            self._reference_pipeline = with_denoiser(self.policy_pipeline, frozen)
        self._attention_modules = attention_modules(
            [*self.policy_pipeline.components.values(), self._reference_pipeline.components[self.denoiser_name]]
        )
        self.calls = BatchCalls(
            self.denoiser, self._try, self._images_after_one_step, is_plain=is_setting(self.pipeline_kwargs)
        )

    def context(self, prompts: Sequence[str], metadata: Sequence[Any], seeds: Sequence[int]) -> Context:
        """
        What a batch is made from.

        Args:
            prompts (`Sequence[str]` of length `B`):
                The prompts.
            metadata (`Sequence` of length `B`):
                What came with them; entries named in `config.pipeline_inputs` go to the pipeline.
            seeds (`Sequence[int]` of length `B`):
                All randomness of each sample.

        Raises:
            `ValueError`: If an entry is missing.
        """
        for entries in metadata:
            known = entries if isinstance(entries, Mapping) else {}
            if missing := [name for name in self.input_names if name not in known]:
                raise ValueError(
                    f"pipeline_inputs names {missing[0]!r}, but the metadata of a prompt is {entries!r}. Return it "
                    "beside each prompt, as a dict, or as a column of the dataset."
                )
        inputs = {name: [entries[name] for entries in metadata] for name in self.input_names}
        return Context(prompts=tuple(prompts), seeds=tuple(seeds), inputs=inputs)

    def survey(self, context: Context) -> Survey:
        """
        Runs the pipeline up to its first step, and no further: what its timesteps are, only its `__call__` knows.

        Args:
            context ([`~ddpo_trl.policy.records.Context`]):
                One sample is enough.

        Returns:
            [`Survey`]

        Raises:
            `ValueError`: If a step that gets noise can't hold so much, or no state can be handed to the pipeline.
        """
        latents = self._first_state(context)
        steps = len(self.scheduler.stds)
        windowed = self.settings.sde_window_size is not None
        self.scheduler.check_noise(self.settings.steps_in_range(steps) if windowed else range(steps))
        encoder = vars(self.policy_pipeline).get("encode_prompt")
        embedding_bytes = 0 if encoder is None else encoder.largest
        return Survey(self.scheduler.stds, latents.nbytes // len(context), embedding_bytes)

    @torch.no_grad()
    def _first_state(self, context: Context) -> Tensor:
        """The state of the first step; and the scheduler knows afterwards where it comes from."""
        first = self._visit(self.policy_pipeline, Replay(0), context).latents
        assert first is not None, "_visit raises if no step was run"
        if self.scheduler.layout is None:
            self._learn_layout(self.calls.split(context)[0])
        return first

    def _learn_layout(self, call: Context) -> None:
        def visit(replay: Replay) -> Tensor:
            latents = self._run_to(self.policy_pipeline, replay, call).latents
            assert latents is not None, "the first step was run before"
            return latents

        first, lowest = visit(Replay(0)), Numbered(place=0)
        digits = [visit(lowest), *(visit(Numbered(place)) for place in range(1, lowest.places))]
        self.scheduler.layout = learn_layout(len(call), lowest.elements, first, digits)

    @torch.no_grad()
    def encode(self, contexts: Iterable[Context], device: torch.device) -> None:
        """
        Has prompts encoded beforehand, as many as are going to be kept, so that offloaded text encoders come once.

        Args:
            contexts (`Iterable[~ddpo_trl.policy.records.Context]`):
                The batches.
            device (`torch.device`):
                Where the pipeline is going to run.
        """
        encoder: PromptEncoder = self.policy_pipeline.encode_prompt
        with encoder.ahead(torch.empty(0, device=device).device):
            for context in contexts:
                if encoder.is_full:
                    return
                # Nothing is where it runs yet, so that how a batch is called can't be learned here.
                for call in context.singles() if context.inputs else [context]:
                    self.calls.run_either_way(call, self._encode_prompts)

    def _encode_prompts(self, context: Context) -> None:
        with suppress(OnlyInPlace):
            self._run_to(self.policy_pipeline, BeforeSteps(), context)

    def describe(self) -> str:
        """One line about what is trained."""
        what = f"pipeline.{self.denoiser_name} ({type(self.denoiser).__name__})"
        if self.adapter is None:
            weights = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
            return f"{what}: {weights:,} of its own weights"
        return f"LoRA on {what}: {describe_adapter(self.denoiser, self.adapter)}"

    @property
    def adapter_record(self) -> dict[str, Any]:
        """What the record of a run says of its adapter besides the weights; empty if there is none."""
        if self.adapter is None:
            return {}
        return {"The scale of the adapter": adapter_scales(self.denoiser, self.adapter)}

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
        context: Context,
        record: Collection[int] = (),
        stochastic: Collection[int] | None = None,
        max_steps: int | None = None,
    ) -> SampledBatch:
        """
        Draws images from the policy.

        Args:
            context ([`~ddpo_trl.policy.records.Context`] of length `B`):
                What they are made from.
            record (`Collection[int]`):
                Indices of the denoising steps whose transitions are kept; deterministic ones never are.
            stochastic (`Collection[int]`, *optional*):
                Indices of the steps that get noise, all by default.
            max_steps (`int`, *optional*):
                Stop denoising after so many steps; all by default.
        """
        calls = self.calls.split(context)
        return SampledBatch.joined(context, [self._sample(call, record, stochastic, max_steps) for call in calls])

    def _sample(
        self,
        context: Context,
        record: Collection[int],
        stochastic: Collection[int] | None,
        max_steps: int | None,
    ) -> SampledBatch:
        source = Sampling(seeded(context), record, self.settings.log_prob_reduction, stochastic, max_steps)
        images = self._sample_from(source, context)
        steps: Mapping[int, Step] = source.steps
        self._check_all_run(source, steps)
        if self.settings.offload_rollout:
            steps = steps_to(steps, "cpu")
        return SampledBatch(
            context=context,
            images=images,
            steps=steps,
            conditions=self.conditions(stochastic),
            finite_steps=source.finite_steps,
            steps_run=source.steps_run,
        )

    @torch.no_grad()
    def sample_with_gradients(
        self,
        context: Context,
        weights: Mapping[int, float],
        layers: Mapping[TrainedLayer, int],
        stochastic: Collection[int] | None = None,
    ) -> SampledBatch:
        """
        Draws the images that [`~Policy.sample`] draws, and takes the gradients of their log-probabilities meanwhile.

        Args:
            context ([`~ddpo_trl.policy.records.Context`] of length `B`):
                What they are made from.
            weights (`Mapping[int, float]`):
                The denoising steps that are trained on, by index, each with the weight of its log-probability.
            layers (`Mapping[torch.nn.Module, int]`):
                See [`~ddpo_trl.policy.per_sample_gradients.SampleGradients`].
            stochastic (`Collection[int]`, *optional*):
                Indices of the steps that get noise, all by default.
        """
        calls = self.calls.split(context)
        return SampledBatch.joined(
            context, [self._sample_with_gradients(call, weights, layers, stochastic) for call in calls]
        )

    def _sample_with_gradients(
        self,
        context: Context,
        weights: Mapping[int, float],
        layers: Mapping[TrainedLayer, int],
        stochastic: Collection[int] | None,
    ) -> SampledBatch:
        gradients = SampleGradients(layers, len(context))
        source = DifferentiatedSampling(
            lambda step, log_probs: gradients.add(weights[step] * log_probs),
            generators=seeded(context),
            record=weights,
            reduction=self.settings.log_prob_reduction,
            stochastic=stochastic,
        )
        with gradients.watch.watching():
            images = self._sample_from(source, context)
        self._check_all_run(source, source.log_probs)
        device = "cpu" if self.settings.offload_rollout else self.denoiser.device
        taken = Gradients(
            log_probs=torch.stack(list(source.log_probs.values()), dim=1),
            weights=[each.to(device) for each in gradients.sums],
        )
        return SampledBatch(
            context=context,
            images=images,
            steps={},
            conditions=self.conditions(stochastic),
            gradients=taken,
            finite_steps=source.finite_steps,
            steps_run=source.steps_run,
        )

    @torch.no_grad()
    def differentiate(self, context: Context, step: int, take: Callable[[Tensor], None]) -> None:
        """
        Samples as [`~Policy.sample_with_gradients`] does up to one step, and leaves: no image is made.

        Args:
            context ([`~ddpo_trl.policy.records.Context`] of length `B`):
                What the samples are made from, in a single call: one of `calls.split`.
            step (`int`):
                Index of a step in the sampler's schedule.
            take (`Callable[[torch.Tensor], None]`):
                Receives the log-probabilities of the step's actions, `(B,)`, with their graph. It is not called if the
                pipeline ends before the step.
        """

        def take_and_leave(index: int, log_probs: Tensor) -> None:
            take(log_probs)
            raise StepReplayed

        self.eval()
        source = DifferentiatedSampling(
            take_and_leave, generators=seeded(context), record={step}, reduction=self.settings.log_prob_reduction
        )
        with self.scheduler.acting(source), suppress(StepReplayed):
            self._run(self.policy_pipeline, context, generator=source.generators, output_type="latent")

    def _sample_from(self, source: Sampling, context: Context) -> Tensor:
        with self.scheduler.acting(source):
            return self._run_to_images(self.policy_pipeline, context, source.generators)

    def _check_all_run(self, source: Sampling, run: Collection[int]) -> None:
        noisy = [step for step, std in enumerate(self.scheduler.stds) if std > 0 and source.is_stochastic(step)]
        if never_run := [
            step for step in noisy if source.max_steps is None and step in source.record and step not in run
        ]:
            raise RuntimeError(
                f"{type(self.pipeline).__name__} ended without running the steps {never_run} of its schedule. Leave "
                "them out with train_timestep_range, or take denoising_end and the like out of pipeline_kwargs."
            )

    def conditions(self, stochastic: Collection[int] | None) -> Conditions:
        """
        What holds now and was true of the last call of the pipeline: training has to share it with sampling.

        Args:
            stochastic (`Collection[int]`, *optional*):
                Indices of the steps that get noise, `None` for all.
        """
        embeddings = [encoder.returned for encoder in self._encoders]
        return conditions(settings_in_use(self.setting_owners), self.denoiser, embeddings, stochastic)

    @torch.no_grad()
    def embedding_sums(self, context: Context) -> tuple[Tensor, ...]:
        """Those that [`~ddpo_trl.types.Conditions`] would hold of a batch now; its first step is run for it."""
        sums: list[Tensor] = []
        for call in self.calls.split(context):
            self._run_to(self.policy_pipeline, Replay(0), call)
            sums.extend(self.conditions(None).embeddings)
        return tuple(sums)

    @property
    def _encoders(self) -> list[PromptEncoder]:
        """Those of the pipeline and of its parts."""
        pipelines = (self.policy_pipeline, *parts(self.policy_pipeline).values())
        return [vars(each)["encode_prompt"] for each in pipelines if "encode_prompt" in vars(each)]

    @property
    def setting_owners(self) -> SettingOwners:
        """Where the settings are that every run of the pipeline reads."""
        return setting_owners(self.settings, self.pipeline_kwargs, self.scheduler)

    @torch.no_grad()
    def generate(self, context: Context) -> Tensor:
        """
        Draws images as the pipeline's users will, with its own scheduler.

        Args:
            context ([`~ddpo_trl.policy.records.Context`] of length `B`):
                What they are made from.

        Returns:
            `torch.Tensor` of shape `(B, 3, H, W)`, or `(B, F, 3, H, W)` for video, float32 in [0, 1].
        """
        images = [self._run_to_images(self.pipeline, call, seeded(call)) for call in self.calls.split(context)]
        return join_samples(images)

    def forward(
        self, step: int, latents: Tensor, next_latents: Tensor, context: Context, with_reference: bool = False
    ) -> PolicyOutput:
        """
        Runs one recorded step again.

        Args:
            step (`int`):
                Its index in the sampler's schedule.
            latents, next_latents (`torch.Tensor` of shape `(B, ...)`):
                State x_t and action x_{t-1} as recorded.
            context ([`~ddpo_trl.policy.records.Context`] of length `B`):
                What they were sampled from.
            with_reference (`bool`, *optional*, defaults to `False`):
                Whether to take the KL divergence to the reference policy too, at the cost of one more forward pass.
        """
        if self.scheduler.layout is None:
            self._first_state(context)
        kl = None
        if with_reference:  # first, so that no graph is held meanwhile
            with torch.no_grad(), self._reference() as pipeline:
                reference_mean = self._visit(pipeline, Replay(step, latents), context).mean
        replay = self._visit(self.policy_pipeline, Replay(step, latents), context)
        reduction = self.settings.log_prob_reduction
        if with_reference:
            kl = kl_divergence(replay.mean, reference_mean, replay.std, reduction)
        return PolicyOutput(log_prob(next_latents, replay.mean, replay.std, reduction), kl)

    def no_gradient(self, step: int, latents: Tensor, next_latents: Tensor, context: Context) -> str:
        """The cause, in a sentence, if a step has no gradient; arguments as for [`Policy.forward`]."""
        found = f"No gradient reaches pipeline.{self.denoiser_name} at step {step}: "
        with torch.enable_grad(), recorded_grad_modes(self.denoiser) as modes:
            replayed = Policy.forward(self, step, latents, next_latents, context).log_probs
        if replayed.requires_grad:
            return f"{found}gradients are switched off around the policy. Look for torch.set_grad_enabled(False)."
        if not modes:
            return f"{found}the pipeline runs another network there. Leave such steps out with train_timestep_range."
        if not any(modes):
            return (
                f"{found}the pipeline runs it without gradients. Look for `torch.no_grad()` inside of its __call__ or "
                "of a hook, or leave such steps out with train_timestep_range."
            )
        if any(layer.merged for layer in adapter_layers(self.denoiser)):
            return f"{found}the adapter is fused into its weights. Call `pipeline.unfuse_lora()` before training."
        return (
            f"{found}what it predicts there does not depend on the weights that are trained. The adapter may be "
            "switched off (`enable_lora()`), or the network detaches its output; if only in some steps, leave them "
            "out with train_timestep_range."
        )

    def save(self, directory: str | os.PathLike[str], write: bool = True) -> None:
        """
        Write the adapter ([`~ddpo_trl.policy.adapter_files.save_adapter`]), or the denoiser in a subfolder.

        Args:
            directory (`str` or `os.PathLike`):
                Where to.
            write (`bool`, *optional*, defaults to `True`):
                `False` on all processes but one: they only have a share in gathering sharded weights.
        """
        if self.adapter is None:
            save_denoiser(self.denoiser, os.path.join(directory, self.denoiser_name), write)
        else:
            save_adapter(self.pipeline, self.adapter, directory, write)

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Reads back what [`~Policy.save`] wrote, into the parameters that are there."""
        if self.adapter is None:
            load_denoiser(self.denoiser, directory, self.denoiser_name)
        else:
            load_adapter(self.pipeline, self.adapter, directory)

    def _visit(self, pipeline: DiffusionPipeline, replay: Replay, context: Context) -> Replay:
        """Runs a pipeline up to the step that `replay` wants, in as many calls as it needs."""
        calls = self.calls.split(context)
        states: Sequence[Tensor | None] = [replay.state] * len(calls)
        if replay.state is not None and len(calls) > 1:
            # Copies: how kernels round may depend on where in memory a tensor begins.
            states = [state.clone() for state in replay.state.split(1)]
        visits = [
            self._run_to(pipeline, Replay(replay.step, state), call) for state, call in zip(states, calls, strict=True)
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

    def _try(self, context: Context, replay: Replay) -> Replay:
        self.eval()  # an adapter that was just added is in training mode, with its dropout
        return self._run_to(self.policy_pipeline, replay, context)

    @torch.no_grad()
    def _images_after_one_step(self, context: Context) -> Tensor:
        return self._sample(context, record=(), stochastic=None, max_steps=1).images

    def _run_to(self, pipeline: DiffusionPipeline, replay: Replay, context: Context) -> Replay:
        """One call of a pipeline, which ends at the step that `replay` wants."""
        with self.scheduler.acting(replay), suppress(StepReplayed):
            self._run(pipeline, context, generator=seeded(context), output_type="latent")
        return replay

    def _run_to_images(
        self, pipeline: DiffusionPipeline, context: Context, generators: list[torch.Generator]
    ) -> Tensor:
        self.eval()  # an adapter that was just added is in training mode, with its dropout
        with self._vae_at_hand():
            # Without a processor "pt" is what the decoder gives, in [-1, 1] as a rule.
            kind = "pt" if {"image_processor", "video_processor"} & vars(pipeline).keys() else "np"
            images = images_tensor(self._run(pipeline, context, generator=generators, output_type=kind))
        return images.to(self.denoiser.device)

    @contextmanager
    def _vae_at_hand(self) -> Iterator[None]:
        """The autoencoder is where the denoiser is."""
        if not self.settings.offload_vae:
            yield
            return
        self.pipeline.vae.to(self.denoiser.device)
        try:
            yield
        finally:
            self.pipeline.vae.to("cpu")

    def _run(self, pipeline: DiffusionPipeline, context: Context, **kwargs: Any) -> Any:
        if self.settings.guidance_scale is not None:
            kwargs["guidance_scale"] = self.settings.guidance_scale
        for encoder in self._encoders:
            encoder.returned.clear()
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

    @contextmanager
    def _reference(self) -> Iterator[DiffusionPipeline]:
        """The policy pipeline as it was before training."""
        if self.adapter is None:
            yield self._reference_pipeline
            return
        with adapters_off(self.denoiser):
            yield self.policy_pipeline


def seeded(context: Context) -> list[torch.Generator]:
    """The generators of a batch, at their beginning."""
    return [torch.Generator().manual_seed(seed) for seed in context.seeds]
