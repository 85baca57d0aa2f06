"""
Checks that every pipeline has to pass to work as a policy.

Each check raises an `AssertionError` if it fails, and may return a remark for the table.
"""

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
)
from peft import PeftModel
from torch import Tensor

from conformance.image_pipelines import IMAGE_CASES, Case
from conformance.image_prompt_pipelines import IMAGE_PROMPT_CASES
from conformance.input_pipelines import INPUT_CASES
from conformance.more_pipelines import MORE_CASES
from conformance.newer_pipelines import NEWER_CASES
from conformance.refused_pipelines import Refusal
from ddpo_trl import DDPOConfig, DDPOTrainer, check_pipeline
from ddpo_trl.checks.causes import changed_settings
from ddpo_trl.checks.gradients import check_checkpointing
from ddpo_trl.policy.adapter_files import has_lora_loader, save_adapter
from ddpo_trl.policy.denoiser import denoiser_name
from ddpo_trl.policy.embeddings import text_encoders
from ddpo_trl.policy.lora import ADAPTER_NAME, add_adapter
from ddpo_trl.policy.per_sample_gradients import TrainedLayer, trained_weights
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.records import Context, SampledBatch
from ddpo_trl.policy.runner import PipelineRunner, seeded
from ddpo_trl.policy.schedulers import Sampling
from ddpo_trl.update.one_pass import layers_of_samples, policy_gradient


CASES = (*IMAGE_CASES, *NEWER_CASES, *MORE_CASES, *INPUT_CASES, *IMAGE_PROMPT_CASES)
PROMPTS = ["a cat", "two dogs"]  # of different lengths
STEPS = 3
NOT_APPLICABLE = "does not apply"
ROUNDING = 1e-5  # of pixel values, in float32

# Layers of the default adapter that no gradient can reach, with the reason.
LAST_TEXT = "the last block drops its text stream, so no gradient reaches"
WITHOUT_GRADIENT = {
    "Stable Diffusion 3": (LAST_TEXT, ["transformer_blocks.1.attn.add_q_proj"]),
    "Stable Diffusion 3 without T5": (LAST_TEXT, ["transformer_blocks.1.attn.add_q_proj"]),
    "Stable Diffusion 3 ControlNet": (LAST_TEXT, ["transformer_blocks.1.attn.add_q_proj"]),
    "Stable Diffusion 3 inpainting": (LAST_TEXT, ["transformer_blocks.1.attn.add_q_proj"]),
    **dict.fromkeys(
        ("Qwen-Image", "Qwen-Image-Edit", "Qwen-Image-Edit-Plus"),
        (LAST_TEXT, ["transformer_blocks.1.attn.add_q_proj", "transformer_blocks.1.attn.to_add_out"]),
    ),
}


def metadata(case: Case) -> list[dict[str, Any]]:
    inputs = case.make_inputs(len(PROMPTS)) if case.make_inputs else {}
    return [{name: values[row] for name, values in inputs.items()} for row in range(len(PROMPTS))]


def config(case: Case, **overrides: Any) -> DDPOConfig:
    settings: dict[str, Any] = {
        "output_dir": tempfile.gettempdir(),
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "num_train_epochs": 1,
        "num_inference_steps": STEPS,
        "guidance_scale": case.guidance_scale,
        "pipeline_kwargs": case.pipeline_kwargs,
        "pipeline_inputs": list(case.inputs),
        "per_device_sample_batch_size": 2,
        "num_sample_batches": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "log_images_rounds": 0,
    }
    return DDPOConfig(**{**settings, **overrides})


def make_policy(case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Policy:
    """Create a policy whose adapter is not the identity, as after some training."""
    pipeline = case.build(0).to(device, dtype)
    policy = Policy(pipeline, config(case, use_cpu=device == "cpu"), add_adapter(pipeline, None))
    randomize_adapter(policy.denoiser)
    return policy


def randomize_adapter(denoiser: torch.nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)


def context(policy: Policy, case: Case) -> Context:
    return policy.context(PROMPTS, metadata(case), seeds=[1, 2])


def replay_equals_sampling(case: Case) -> None:
    """In every trainable step, the replayed log-probability is bitwise identical to the sampled one."""
    policy = make_policy(case)
    batch = policy.sample(context(policy, case), record=range(STEPS))
    trainable = [index for index, std in enumerate(policy.scheduler.stds) if std > 0]
    assert sorted(batch.steps) == trainable and trainable
    assert replay_deviations(policy, batch) == dict.fromkeys(batch.steps, 0.0)
    assert batch.fingerprint is not None
    assert changed_settings(batch.fingerprint.settings, policy.runner.fingerprint().settings) == []


def replay_deviations(policy: Policy, batch: SampledBatch, row: int | None = None) -> dict[int, float]:
    """
    Return the largest |ratio - 1| of each recorded step: 0 only if it is replayed bitwise. With `row`, that sample is
    replayed without the others.
    """
    rows = slice(None) if row is None else slice(row, row + 1)
    samples = batch.context if row is None else batch.context.rows([row])
    found = {}
    for index, step in batch.steps.items():
        replayed, _ = policy(index, step.latents[rows], step.next_latents[rows], samples)
        found[index] = torch.expm1((replayed - step.log_probs[rows]).detach()).abs().max().item()
    return found


def replay_needs_the_prompt(case: Case) -> None:
    """With the other prompt, the log-probability of a step is different: replay depends on the prompt."""
    policy = make_policy(case)
    batch = policy.sample(context(policy, case), record=[0])
    step = batch.steps[0]
    swapped = policy.context(PROMPTS[::-1], metadata(case), seeds=[1, 2])
    replayed, _ = policy(0, step.latents, step.next_latents, swapped)
    assert (replayed - step.log_probs).abs().min() > 0


def gradients_reach_the_adapter(case: Case) -> str | None:
    """Every parameter of the adapter gets a gradient, and no other parameter does."""
    policy = make_policy(case)
    batch = policy.sample(context(policy, case), record=range(STEPS))
    index, step = min(batch.steps.items())
    log_probs, _ = policy(index, step.latents, step.next_latents, batch.context)
    log_probs.sum().backward()
    for name, parameter in policy.denoiser.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == (is_adapter(name) and not is_without_gradient(case, name)), name
        assert torch.isfinite(parameter.grad if reached else parameter).all(), name
    if case.name not in WITHOUT_GRADIENT:
        return None
    reason, layers = WITHOUT_GRADIENT[case.name]
    return f"{reason} {', '.join(layers)}"


def is_adapter(name: str) -> bool:
    return "lora_" in name


def is_without_gradient(case: Case, name: str) -> bool:
    _, layers = WITHOUT_GRADIENT.get(case.name, ("", []))
    return any(name.startswith(f"{layer}.") for layer in layers)


def a_round_changes_the_adapter(case: Case) -> None:
    """One round of the trainer changes every parameter of the adapter."""
    pipeline = case.build(0)
    pairs = list(zip(PROMPTS, metadata(case), strict=True))
    trainer = DDPOTrainer(config(case, num_ppo_epochs=2), brightness, pairs, pipeline)
    before = {name: p.detach().clone() for name, p in trainer.model.denoiser.named_parameters() if is_adapter(name)}
    with contextlib.redirect_stdout(io.StringIO()):  # Trainer prints its logs
        trainer.train()
    (log,) = [log for log in trainer.state.log_history if "reward" in log]
    # Replay in the sampled order is bitwise identical, as another check shows. Micro-batches shuffle rows, and on some
    # processors the last bit of a log-probability depends on the row.
    assert log["val/ratio_deviation"] <= 4 * torch.finfo(torch.float32).eps
    for name, parameter in trainer.model.denoiser.named_parameters():
        if is_adapter(name) and not is_without_gradient(case, name):
            assert not torch.equal(parameter, before[name]), name
            assert torch.isfinite(parameter).all(), name


def brightness(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
    """Return the mean pixel value of each image or video, in [0, 1], and check the format of the inputs."""
    assert images.ndim in (4, 5) and images.shape[-3] == 3 and len(images) == len(prompts)
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
    return images.flatten(1).mean(1)


def saved_adapter_is_reloaded(case: Case) -> None:
    """The saved adapter, loaded by the pipeline's own loader (or peft's), gives the same images."""
    trained, fresh = case.build(0), case.build(0)
    adapter = add_adapter(trained, None)
    randomize_adapter(Policy(trained, config(case), adapter).denoiser)
    plain = images(fresh, case)
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(trained, adapter, directory)
        if has_lora_loader(fresh):
            fresh.load_lora_weights(directory)
        else:
            load_with_peft(fresh, directory)
    expected = images(trained, case)
    scale = expected.abs().max().clamp(min=1)
    # Not bitwise: weights in a mapped file are aligned differently, so that matrix products round differently.
    assert (images(fresh, case) - expected).abs().max() < ROUNDING * scale
    assert (plain - expected).abs().max() > 100 * ROUNDING * scale


def load_with_peft(pipeline: DiffusionPipeline, directory: str) -> None:
    PeftModel.from_pretrained(
        pipeline.components[denoiser_name(pipeline)], directory, adapter_name=ADAPTER_NAME
    )  # in place


def images(pipeline: DiffusionPipeline, case: Case, prompts: Sequence[str] = PROMPTS) -> Tensor:
    """Images of the unmodified pipeline for these prompts, with seeds 1, 2, ..."""
    return torch.cat([_images(pipeline, case, prompts, rows) for rows in rows_of_calls(case, prompts)])


def rows_of_calls(case: Case, prompts: Sequence[str]) -> list[list[int]]:
    rows = list(range(len(prompts)))
    return [[row] for row in rows] if case.one_by_one else [rows]


def _images(pipeline: DiffusionPipeline, case: Case, prompts: Sequence[str], rows: Sequence[int]) -> Tensor:
    guidance = {} if case.guidance_scale is None else {"guidance_scale": case.guidance_scale}
    inputs = case.make_inputs(len(prompts)) if case.make_inputs else {}
    own = {name: values[rows[0]] if case.one_by_one else values for name, values in inputs.items()}
    kwargs = {**guidance, **own, **case.pipeline_kwargs}
    if isinstance(kwargs.get("negative_prompt"), str):
        kwargs["negative_prompt"] = [kwargs["negative_prompt"]] * len(rows)
    if case.draws:
        torch.manual_seed(0)
    (output,) = pipeline(
        prompt=[prompts[row] for row in rows],
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(row + 1) for row in rows],
        output_type="pt",
        return_dict=False,
        **kwargs,
    )[:1]
    return torch.from_numpy(output).movedim(-1, -3) if isinstance(output, np.ndarray) else output


def images_without_cache(policy: Policy, case: Case, prompts: Sequence[str] = PROMPTS) -> Tensor:
    """Images of the policy without noise, made by the pipeline with its own `encode_prompt`."""
    plain = copy.copy(policy.pipeline)
    vars(plain).pop("encode_prompt", None)
    plain.scheduler = policy.scheduler
    made = []
    for rows in rows_of_calls(case, prompts):
        with policy.scheduler.acting(Sampling([], record=(), reduction="mean", stochastic=())):
            made.append(_images(plain, case, prompts, rows))
    return torch.cat(made)


def cached_prompts_are_the_pipelines_own(case: Case) -> str | None:
    """Without noise, images match those that the pipeline makes from all prompts at once without a cache."""
    policy = make_policy(case)
    if "encode_prompt" not in dir(policy.runner.policy_pipeline):
        return f"{NOT_APPLICABLE}: nothing is cached"
    if case.draws:
        return f"{NOT_APPLICABLE}: the pipeline draws from torch's global generator"
    ours = policy.sample(context(policy, case), stochastic=()).images
    theirs = images_without_cache(policy, case)
    assert (ours - theirs).abs().max() < ROUNDING  # not 0: a batch of prompts through the encoders rounds differently
    return None


def without_noise_it_is_the_own_sampler(case: Case) -> str | None:
    """Without noise, images match those of the pipeline's own DDIM or Euler sampler, within rounding."""
    policy = make_policy(case)
    if isinstance(policy.pipeline.scheduler, LCMScheduler):
        return f"{NOT_APPLICABLE}: the pipeline's own sampler can't be run without noise"
    samples = context(policy, case)
    ours = policy.sample(samples, stochastic=()).images
    plain = with_scheduler(policy.pipeline, own_sampler(policy.pipeline.scheduler))
    with torch.no_grad():
        calls = [policy.runner.run_to_images(plain, call, seeded(call)) for call in policy.runner.calls.split(samples)]
    assert (ours - torch.cat(calls)).abs().max() < ROUNDING  # not 0: CogVideoX's computes in float64
    return None


def with_scheduler(pipeline: Any, scheduler: SchedulerMixin) -> Any:
    """Copy a pipeline, including its nested pipelines, with another scheduler."""
    twin = copy.copy(pipeline)
    for name, part in vars(pipeline).items():
        if isinstance(part, DiffusionPipeline) and part.scheduler is pipeline.scheduler:
            vars(twin)[name] = with_scheduler(part, scheduler)
    twin.scheduler = scheduler
    return twin


def own_sampler(scheduler: Any) -> SchedulerMixin:
    """Create the deterministic first-order sampler with a scheduler's settings."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler | DDIMScheduler | CogVideoXDDIMScheduler):
        return scheduler
    settings = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    if scheduler.config.get("use_flow_sigmas", False):
        euler: Any = type("Euler", (EulersStep, type(scheduler)), {})
        return euler.from_config(settings)
    return NoiseOnlyDDIM.from_config({**settings, "clip_sample": False})


class EulersStep:
    """Step x + (σ' - σ) v with the sigmas of another solver, found by the timestep."""

    def step(self: Any, velocity: Tensor, timestep: Tensor, latents: Tensor, **_: Any) -> tuple[Tensor]:
        index = self.timesteps.tolist().index(timestep.item())
        return (latents + (self.sigmas[index + 1] - self.sigmas[index]) * velocity,)


class NoiseOnlyDDIM(DDIMScheduler):
    """DDIM of diffusers, for a model that also predicts the variance."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        return super().step(model_output[:, : sample.shape[1]], timestep, sample, **kwargs)


def prompts_are_encoded_once(case: Case) -> str | None:
    """Replay, and sampling the same prompts again, run no text encoder."""
    policy = make_policy(case)
    if "encode_prompt" not in dir(policy.runner.policy_pipeline):
        return f"{NOT_APPLICABLE}: the prior runs in every replay: it draws its embeddings with the sample's seed"
    with counted_encodings(policy.pipeline) as calls:
        batch = policy.sample(context(policy, case), record=range(STEPS))
    assert calls
    with counted_encodings(policy.pipeline) as calls:
        policy.sample(policy.context(PROMPTS[::-1], metadata(case)[::-1], seeds=[3, 4]))
        for index, step in batch.steps.items():
            policy(index, step.latents, step.next_latents, batch.context)
    assert not calls
    return None


@contextlib.contextmanager
def counted_encodings(pipeline: DiffusionPipeline) -> Iterator[list[str]]:
    """Collect the names of the modules of text encoders that run."""
    calls: list[str] = []
    hooks = [
        module.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
        for encoder in text_encoders(pipeline).values()
        for module in encoder.modules()
        if not list(module.children())
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def one_pass_is_exact(case: Case) -> str | None:
    """Weighted gradients of sampling add up to that of replay, with checkpointing too; images are identical."""
    policy = make_policy(case)
    batch = policy.sample(context(policy, case), record=range(STEPS))
    taken, layers = in_one_pass(policy, batch)
    remark = checkpointing_changes_nothing(policy, taken, layers)
    deviation = one_pass_deviation(policy, batch, taken, layers)
    assert deviation.images == 0
    assert deviation.gradients < ROUNDING
    return remark


def in_one_pass(policy: Policy, batch: SampledBatch) -> tuple[SampledBatch, Mapping[TrainedLayer, int]]:
    """Sample a batch again, with gradients, and return it and the layers that were watched."""
    layers = layers_of_samples(policy, batch.context, min(batch.steps))
    return policy.sample_with_gradients(batch.context, dict.fromkeys(sorted(batch.steps), 1.0), layers), layers


def checkpointing_changes_nothing(
    policy: Policy, taken: SampledBatch, layers: Mapping[TrainedLayer, int]
) -> str | None:
    try:
        policy.activation_checkpointing_enable()
        check_checkpointing(policy, taken.context.rows([0]))
    except ValueError as refusal:
        return str(refusal).partition(". ")[0]
    finally:
        policy.denoiser.disable_gradient_checkpointing()
    policy.activation_checkpointing_enable()
    steps = [index for index, std in enumerate(policy.scheduler.stds) if std > 0]
    assert layers_of_samples(policy, taken.context, steps[0]) == layers
    again = policy.sample_with_gradients(taken.context, dict.fromkeys(steps, 1.0), layers)
    assert taken.gradients is not None and again.gradients is not None
    for own, expected in zip(again.gradients.weights, taken.gradients.weights, strict=True):
        assert torch.equal(own, expected)
    return None


class OnePassDeviation(NamedTuple):
    """
    Largest difference between one pass and two, of the images, and of the gradients relative to the largest of them.
    """

    images: float
    gradients: float


def one_pass_deviation(
    policy: Policy, batch: SampledBatch, taken: SampledBatch, layers: Mapping[TrainedLayer, int]
) -> OnePassDeviation:
    """Compare a batch that was sampled with gradients, which are used up, with one that is replayed."""
    advantages = torch.tensor([1.0, -2.0], device=taken.images.device)
    for index, step in batch.steps.items():
        log_probs, _ = policy(index, step.latents, step.next_latents, batch.context)
        (-(advantages @ log_probs) / (len(advantages) * len(batch.steps))).backward()
    wanted = [weight.grad for weight in trained_weights(list(layers))]
    largest = max(grad.abs().max() for grad in wanted if grad is not None)
    missed = [
        (own if grad is None else own - grad).abs().max()
        for own, grad in zip(policy_gradient([taken], advantages), wanted, strict=True)
    ]
    return OnePassDeviation(
        images=(taken.images - batch.images).abs().max().item(),
        gradients=(torch.stack(missed).max() / largest).item(),
    )


def the_doctor_agrees(case: Case) -> None:
    """`check_pipeline` reports no problem and a replay difference of 0, and leaves the pipeline unchanged."""
    pipeline = case.build(0)
    before = images(pipeline, case)
    report = check_pipeline(pipeline, config(case), PROMPTS, metadata(case))
    assert report.problem is None, report.problem
    assert set(report.replay_differences.values()) == {0.0}
    assert report.trajectory_bytes > 0 and report.training_bytes > 0
    assert torch.equal(images(pipeline, case), before)
    assert not [name for component in pipeline.components.values() for name in adapter_names(component)]


def adapter_names(component: Any) -> list[str]:
    return (
        [n for n, _ in component.named_parameters() if is_adapter(n)] if isinstance(component, torch.nn.Module) else []
    )


def the_same_prompt_twice_is_right(case: Case) -> str | None:
    """Without noise, the images of a prompt that occurs twice match those that the pipeline makes."""
    if case.draws:
        return f"{NOT_APPLICABLE}: the pipeline draws from torch's global generator"
    policy = make_policy(case)
    if "encode_prompt" not in dir(policy.runner.policy_pipeline):
        return f"{NOT_APPLICABLE}: nothing is cached"
    prompts = [PROMPTS[1]] * 2
    ours = policy.sample(policy.context(prompts, metadata(case), seeds=[1, 2]), stochastic=()).images
    theirs = images_without_cache(policy, case, prompts)
    assert (ours - theirs).abs().max() < ROUNDING
    return None


def a_sample_does_not_depend_on_the_input_next_to_it(case: Case) -> str | None:
    """With another input for the second sample, the first image stays the same and the second changes."""
    if not case.make_inputs:
        return f"{NOT_APPLICABLE}: there are only prompts"
    policy = make_policy(case)
    first, second = metadata(case)
    rows = [[first, second], [first, first]]
    ours, changed = (
        policy.sample(policy.context(PROMPTS, entries, seeds=[1, 2]), stochastic=()).images for entries in rows
    )
    assert torch.equal(ours[0], changed[0])
    assert not torch.equal(ours[1], changed[1])
    return None


def batches_have_one_sample_if_asked(case: Case) -> None:
    """With batch sizes of 1, no pipeline call has two samples, neither at construction nor in training."""
    pairs = list(zip(PROMPTS, metadata(case), strict=True))
    ones = {"per_device_sample_batch_size": 1, "per_device_train_batch_size": 1, "num_sample_batches": 2}
    with mock.patch.object(PipelineRunner, "run", autospec=True, side_effect=PipelineRunner.run) as run:
        trainer = DDPOTrainer(config(case, **ones), brightness, pairs, case.build(0))
        with contextlib.redirect_stdout(io.StringIO()):  # Trainer prints its logs
            trainer.train()
    assert {len(call.args[2]) for call in run.call_args_list} == {1}


def the_networks_are_as_they_were(case: Case) -> None:
    """After sampling and replay, attention processors, hooks, weights and the random state are unchanged."""
    pipeline = case.build(0)
    images(pipeline, case)  # some text encoders put hooks on their layers the first time they run
    policy = Policy(pipeline, config(case), add_adapter(pipeline, None)).eval()
    before = states(policy)
    random_state = torch.get_rng_state()
    batch = policy.sample(context(policy, case), record=range(STEPS))
    index, step = min(batch.steps.items())
    policy(index, step.latents, step.next_latents, batch.context)
    assert states(policy) == before
    assert torch.equal(torch.get_rng_state(), random_state)


def states(policy: Policy) -> list[Any]:
    """Collect everything that a call might change in the modules of the pipeline's networks."""
    return [
        (
            name,
            module,
            module.training,
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
            id(vars(module).get("processor")),
            [
                tensor.double().sum().item()
                for tensor in (*module._parameters.values(), *module._buffers.values())
                if tensor is not None
            ],
        )
        for component, network in policy.pipeline.components.items()
        if isinstance(network, torch.nn.Module)
        for name, module in network.named_modules(prefix=component)
    ]


def an_input_in_pipeline_kwargs_serves_all(case: Case) -> str | None:
    """Inputs that all samples share may be in `pipeline_kwargs`: replay is exact, and they have an effect."""
    if not case.make_inputs:
        return f"{NOT_APPLICABLE}: there are only prompts"
    pipeline = case.build(0)
    first, second = metadata(case)
    adapter = add_adapter(pipeline, None)
    found = []
    for inputs in (first, second):
        settings = config(case, pipeline_kwargs={**case.pipeline_kwargs, **inputs}, pipeline_inputs=None)
        policy = Policy(pipeline, settings, adapter)
        batch = policy.sample(policy.context(PROMPTS, [{}, {}], seeds=[1, 2]), record=[0])
        step = batch.steps[0]
        replayed, _ = policy(0, step.latents, step.next_latents, batch.context)
        assert torch.equal(replayed, step.log_probs)
        found.append(batch.images)
    assert not torch.equal(*found)
    return None


def it_is_refused_with_the_cause(refusal: Refusal) -> str:
    """
    The pipeline makes images, and the same ones after `check_pipeline`. The problem it reports also stops the
    construction of `DDPOTrainer`; the message names the cause, and the remedy if there is one.
    """
    case = refusal.case
    pipeline = case.build(0)
    before = images(pipeline, case)
    problem = check_pipeline(pipeline, config(case), PROMPTS, metadata(case)).problem or "no problem"
    assert torch.equal(images(pipeline, case), before)
    pairs = list(zip(PROMPTS, metadata(case), strict=True))
    try:
        DDPOTrainer(config(case), brightness, pairs, case.build(0))
    except ValueError as error:
        stopped = str(error)
    else:
        raise AssertionError("the trainer was built")
    for words in refusal.words:
        assert words in problem and words in stopped, f"{words!r} is in only one of {problem!r} and {stopped!r}"
    return problem


CHECKS: dict[str, Callable[[Case], str | None]] = {
    "replay = sampling": replay_equals_sampling,
    "prompt matters": replay_needs_the_prompt,
    "gradients": gradients_reach_the_adapter,
    "one round": a_round_changes_the_adapter,
    "save, reload": saved_adapter_is_reloaded,
    "encoded once": prompts_are_encoded_once,
    "own sampler": without_noise_it_is_the_own_sampler,
    "cache": cached_prompts_are_the_pipelines_own,
    "one pass": one_pass_is_exact,
    "doctor": the_doctor_agrees,
    "same prompt twice": the_same_prompt_twice_is_right,
    "other inputs": a_sample_does_not_depend_on_the_input_next_to_it,
    "batch size 1": batches_have_one_sample_if_asked,
    "networks kept": the_networks_are_as_they_were,
    "input for all": an_input_in_pipeline_kwargs_serves_all,
}
