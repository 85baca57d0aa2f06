"""The pipeline as a policy: replay is sampling again, and the user's pipeline stays the user's."""

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DModel,
)
from diffusers.hooks import apply_group_offloading
from torch.overrides import TorchFunctionMode

from conformance.image_pipelines import (
    IMAGE_CASES,
    flux,
    images,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_img2img,
    stable_diffusion_xl,
)
from conformance.newer_pipelines import kandinsky
from conftest import in_both_passes, tiny_pipeline
from ddpo_trl import DDPOConfig
from ddpo_trl.emoji import load_emoji_pipeline
from ddpo_trl.policy.lora import add_adapter
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.records import Context
from ddpo_trl.policy.schedulers import Replay
from ddpo_trl.update.one_pass import layers_of_samples


PROMPTS = ["cat", "dog", "cat", "owl"]
SEEDS = [11, 12, 13, 14]
CONTEXT = Context(prompts=PROMPTS, seeds=SEEDS)


def make_policy(pipeline, config: DDPOConfig) -> Policy:
    torch.manual_seed(1)
    policy = Policy(pipeline, config, add_adapter(pipeline, None))
    with torch.no_grad():  # an adapter starts as the identity; a trained one does not
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return policy


def generators() -> list[torch.Generator]:
    """What a user of plain diffusers gives for the same images."""
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_replay_reproduces_the_recorded_log_probs_to_the_bit(make_config, dtype, prediction_type):
    policy = make_policy(tiny_pipeline(prediction_type=prediction_type).to(dtype), make_config())
    batch = policy.sample(CONTEXT, record=range(4))
    assert sorted(batch.steps) == [0, 1, 2, 3]
    for index, step in batch.steps.items():
        assert step.latents.dtype == dtype
        replayed, _ = policy(step=index, latents=step.latents, next_latents=step.next_latents, context=CONTEXT)
        assert replayed.requires_grad
        assert torch.equal(torch.exp(replayed - step.log_probs), torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_reproduces_the_embedded_pipelines_log_probs_to_the_bit(make_config, dtype):
    context = Context(prompts=["cat face", "3d pizza"], seeds=SEEDS[:2])
    policy = make_policy(load_emoji_pipeline(torch_dtype=dtype), make_config(num_inference_steps=5))
    batch = policy.sample(context, record=range(5))
    for index, step in batch.steps.items():
        replayed, _ = policy(step=index, latents=step.latents, next_latents=step.next_latents, context=context)
        assert torch.equal(replayed, step.log_probs)


def test_replay_under_other_guidance_is_another_policy(make_config):
    policy = make_policy(tiny_pipeline(), make_config(guidance_scale=3.0))
    step = policy.sample(CONTEXT, record=[1]).steps[1]
    policy.settings.guidance_scale = 5.0
    replayed, _ = policy(step=1, latents=step.latents, next_latents=step.next_latents, context=CONTEXT)
    assert (replayed - step.log_probs).abs().min() > 1e-5


def test_samples_are_those_of_plain_diffusers_with_the_same_seeds(make_config):
    """With η = 1 the policy is diffusers' own DDIM sampler, so its images are too."""
    pipeline = tiny_pipeline()
    policy = make_policy(pipeline, make_config())
    ours = policy.sample(CONTEXT).images
    theirs = pipeline(
        PROMPTS, generator=generators(), num_inference_steps=4, guidance_scale=3.0, eta=1.0, output_type="pt"
    ).images
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_without_noise_samples_are_those_of_deterministic_diffusers(make_config):
    pipeline = tiny_pipeline()
    batch = make_policy(pipeline, make_config()).sample(CONTEXT, record=range(4), stochastic=())
    theirs = pipeline(
        PROMPTS, generator=generators(), num_inference_steps=4, guidance_scale=3.0, eta=0.0, output_type="pt"
    ).images
    assert torch.allclose(batch.images, theirs, atol=1e-6)
    assert batch.steps == {}


def test_only_the_steps_of_the_window_are_recorded_and_they_replay_to_the_bit(make_config):
    policy = make_policy(tiny_pipeline(), make_config())
    batch = policy.sample(CONTEXT, record=range(4), stochastic={1, 2})
    assert sorted(batch.steps) == [1, 2]
    for index, step in batch.steps.items():
        replayed, _ = policy(step=index, latents=step.latents, next_latents=step.next_latents, context=CONTEXT)
        assert torch.equal(replayed, step.log_probs)


@pytest.mark.parametrize("max_steps", [1, 3])
def test_a_trial_stops_after_as_many_steps_as_wanted(make_config, max_steps):
    pipeline = tiny_pipeline()
    policy = make_policy(pipeline, make_config())
    calls = []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    assert policy.sample(CONTEXT, max_steps=max_steps).images.shape == (4, 3, 16, 16)
    assert len(calls) == max_steps


def test_without_a_guidance_scale_the_pipelines_own_default_counts(make_config):
    pipeline = tiny_pipeline()
    policy = make_policy(pipeline, make_config(guidance_scale=None))
    ours = policy.sample(CONTEXT).images
    theirs = pipeline(PROMPTS, generator=generators(), num_inference_steps=4, eta=1.0, output_type="pt").images
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_no_safety_checker_blackens_what_is_to_be_scored(make_config):
    def checked(images, clip_input):
        return torch.zeros_like(images) if torch.is_tensor(images) else images * 0, [True] * len(images)

    pipeline = tiny_pipeline()
    expected = make_policy(tiny_pipeline(), make_config()).sample(CONTEXT).images
    checker = torch.nn.Module()
    checker.forward = checked
    pipeline.register_modules(safety_checker=checker)
    assert torch.equal(make_policy(pipeline, make_config()).sample(CONTEXT).images, expected)
    assert pipeline.safety_checker is checker


# ---- Probing the schedule ----


def test_probing_runs_one_step_and_decodes_no_image(make_config):
    pipeline = tiny_pipeline()
    policy = make_policy(pipeline, make_config())
    calls = []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    pipeline.vae.decode = None
    stds = policy.probe_schedule(CONTEXT).stds
    assert len(calls) == 1
    assert len(stds) == 4 and min(stds) > 0


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 4), (0.75, 3), (0.5, 2)])
def test_probing_knows_the_steps_that_image_to_image_leaves_out(make_config, strength, steps):
    whole = make_policy(stable_diffusion(0), make_config()).probe_schedule(CONTEXT).stds  # has the same scheduler
    config = make_config(pipeline_inputs=["image"], pipeline_kwargs={"strength": strength})
    policy = make_policy(stable_diffusion_img2img(0), config)
    context = policy.context(PROMPTS, [{"image": image} for image in images(4)], SEEDS)
    assert policy.probe_schedule(context).stds == whole[-steps:]
    assert sorted(policy.sample(context, record=range(4)).steps) == list(range(steps))


def test_schedules_of_ones_own_are_sampled_and_replayed(make_config):
    config = make_config(num_inference_steps=3, pipeline_kwargs={"sigmas": [1.0, 0.7, 0.2], "max_sequence_length": 16})
    policy = make_policy(stable_diffusion_3(0), config)
    stds = policy.probe_schedule(CONTEXT).stds
    assert len(stds) == 3 and stds[2] == 0  # it ends at 0
    # the release's shift of 3: s -> 3 s / (1 + 2 s)
    assert policy.scheduler.sigmas.tolist() == pytest.approx([1.0, 0.875, 3 / 7, 0.0], rel=1e-6)
    for index, step in policy.sample(CONTEXT, record=range(3)).steps.items():
        replayed, _ = policy(step=index, latents=step.latents, next_latents=step.next_latents, context=CONTEXT)
        assert torch.equal(replayed, step.log_probs)


def test_noise_that_a_step_cant_hold_is_refused_before_the_first_sample(make_config):
    with pytest.raises(ValueError, match=r"eta is 2, with which step 2 of 4 .*Set eta to 1 at most"):
        make_policy(tiny_pipeline(), make_config(eta=2.0)).probe_schedule(CONTEXT)
    with pytest.raises(ValueError, match=r"noise_level is 1\.4, with which step 2 of 4 .*Set noise_level to 0\.775"):
        config = make_config(noise_level=1.4, pipeline_kwargs={"max_sequence_length": 16})
        make_policy(stable_diffusion_3(0), config).probe_schedule(CONTEXT)


def test_only_the_steps_that_a_window_can_reach_have_to_hold_their_noise(make_config):
    """The first of four steps could draw 1.058 times DDPM's noise, the third hardly more than that."""
    settings = {"eta": 1.05, "num_inference_steps": 4, "sde_window_size": 1}
    make_policy(tiny_pipeline(), make_config(train_timestep_range=(0.0, 0.25), **settings)).probe_schedule(CONTEXT)
    for window in ((0.0, 0.75), (0.5, 0.75)):
        with pytest.raises(ValueError, match="eta is 1.05, with which step 2 of 4"):
            make_policy(tiny_pipeline(), make_config(train_timestep_range=window, **settings)).probe_schedule(CONTEXT)


# ---- Gradients and batches ----


def test_gradients_reach_every_lora_parameter_and_nothing_else(make_config):
    policy = make_policy(tiny_pipeline(), make_config())
    step = policy.sample(CONTEXT, record=[2]).steps[2]
    log_probs, _ = policy(step=2, latents=step.latents, next_latents=step.next_latents, context=CONTEXT)
    log_probs.sum().backward()
    for name, parameter in policy.named_parameters():
        if "lora" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None and not parameter.requires_grad, name


def test_the_images_of_a_sample_do_not_depend_on_its_batch(make_config):
    policy = make_policy(tiny_pipeline(), make_config())
    together = policy.sample(CONTEXT, record=range(4))
    for row, prompt in enumerate(PROMPTS):
        alone = policy.sample(Context(prompts=[prompt], seeds=[SEEDS[row]]), record=range(4))
        assert torch.allclose(alone.images[0], together.images[row], atol=1e-5)


def test_prompts_are_encoded_once_and_never_in_replay(make_config):
    pipeline = tiny_pipeline()
    calls = []
    pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    policy = make_policy(pipeline, make_config())
    step = policy.sample(CONTEXT, record=[0]).steps[0]
    encoded = len(calls)
    # Each with its negative prompt, and a pair from which it is learned how embeddings are joined.
    assert encoded == 2 * (len(set(PROMPTS)) + 1)
    policy.sample(CONTEXT)
    policy.generate(CONTEXT)
    policy(step=0, latents=step.latents, next_latents=step.next_latents, context=CONTEXT)
    assert len(calls) == encoded


def test_replay_decodes_no_image(make_config):
    pipeline = tiny_pipeline()
    policy = make_policy(pipeline, make_config())
    step = policy.sample(CONTEXT, record=[0]).steps[0]
    pipeline.vae.decode = None
    policy(step=0, latents=step.latents, next_latents=step.next_latents, context=CONTEXT)


class Reads(TorchFunctionMode):
    """Counts how often values are read from tensors: on a GPU each time makes the host wait."""

    WAYS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero"}
    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function.__name__ in self.WAYS
        return function(*args, **(kwargs or {}))


@in_both_passes
@pytest.mark.parametrize("name", ["Stable Diffusion 1.x", "Stable Diffusion 3", "FLUX.1"])
def test_no_number_is_read_from_a_tensor_between_the_first_denoising_step_and_the_last(
    make_config, monkeypatch, name, one_pass
):
    case = next(case for case in IMAGE_CASES if case.name == name)
    config = make_config(pipeline_kwargs=case.pipeline_kwargs, guidance_scale=case.guidance_scale)
    policy = make_policy(case.build(0), config)
    layers = layers_of_samples(policy, policy.context(PROMPTS[:2], [{}] * 2, [0, 1]), 0)
    step, reads, reads_at_step = policy.scheduler.step, Reads(), []

    def counted(*args, **kwargs):
        reads_at_step.append(reads.count)
        return step(*args, **kwargs)

    monkeypatch.setattr(policy.scheduler, "step", functools.wraps(step)(counted))  # pipelines read its signature
    with reads:
        if one_pass:
            policy.sample_with_gradients(CONTEXT, dict.fromkeys(range(3), 1.0), layers)
        else:
            policy.sample(CONTEXT, record=range(3))
        before = reads.count
        assert torch.ones(1).item() == float(torch.ones(1))
        assert reads.count == before + 2  # they are noticed
    assert len(reads_at_step) == 4
    assert len(set(reads_at_step)) == 1


def test_the_policy_runs_on_the_device_of_its_denoiser_without_a_search_for_it(make_config, monkeypatch):
    pipeline = tiny_pipeline()
    policy = make_policy(pipeline, make_config())
    monkeypatch.setattr(type(pipeline), "_execution_device", property(lambda self: pytest.fail("a search")))
    batch = policy.sample(CONTEXT, record=range(4))
    for index, step in batch.steps.items():
        policy(index, step.latents, step.next_latents, CONTEXT)
    pipeline.to("meta")
    assert policy.runner.policy_pipeline._execution_device == torch.device("meta")


def test_dropout_stays_off_while_trainer_trains(make_config):
    policy = make_policy(tiny_pipeline(), make_config())
    policy.train()
    assert not any(module.training for module in policy.modules())


def test_the_reference_is_the_pipeline_without_its_adapter(make_config):
    plain = tiny_pipeline()
    policy = make_policy(copy.deepcopy(plain), make_config())
    step = policy.sample(CONTEXT, record=[1]).steps[1]
    arguments = {"step": 1, "latents": step.latents, "next_latents": step.next_latents, "context": CONTEXT}
    _, kl = policy(**arguments, with_reference=True)
    assert (kl > 0).all()
    # KL of two Gaussians, from the means of both policies, by torch's own formula
    mean = policy.runner.visit(policy.runner.policy_pipeline, Replay(1, step.latents), CONTEXT).mean
    reference = make_policy(plain, make_config())
    for name, parameter in reference.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    replay = reference.runner.visit(reference.runner.policy_pipeline, Replay(1, step.latents), CONTEXT)
    normals = [torch.distributions.Normal(m, replay.std) for m in (mean, replay.mean)]
    expected = torch.distributions.kl_divergence(*normals).flatten(1).mean(1)
    assert torch.allclose(kl, expected, rtol=1e-4, atol=1e-9)
    # and the adapter is on again afterwards
    assert torch.equal(policy(**arguments)[0], step.log_probs)


@pytest.mark.parametrize(
    ("build", "pipeline_kwargs"),
    [(tiny_pipeline, None), (kandinsky, {"height": 16, "width": 16, "prior_num_inference_steps": 2})],
)
def test_the_reference_of_full_fine_tuning_is_the_denoiser_as_it_was(make_config, build, pipeline_kwargs):
    config = make_config(use_lora=False, kl_coef=0.1, pipeline_kwargs=pipeline_kwargs)
    policy = Policy(build(0), config, adapter=None)
    step = policy.sample(CONTEXT, record=[1]).steps[1]
    arguments = {"step": 1, "latents": step.latents, "next_latents": step.next_latents, "context": CONTEXT}
    before, kl = policy(**arguments, with_reference=True)
    assert torch.equal(before, step.log_probs)
    assert torch.equal(kl, torch.zeros(4))
    with torch.no_grad():
        for parameter in policy.denoiser.parameters():
            parameter.mul_(1.1)
    after, kl = policy(**arguments, with_reference=True)
    assert not torch.equal(after, before)
    assert (kl > 0).all()


def test_the_users_pipeline_keeps_its_scheduler_and_methods(make_config):
    pipeline = tiny_pipeline()
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    components, config, attributes = pipeline.components, dict(pipeline.config), set(vars(pipeline))
    policy = make_policy(pipeline, make_config())
    policy.sample(CONTEXT)
    assert all(component is components[name] for name, component in pipeline.components.items())
    assert dict(pipeline.config) == config
    assert set(vars(pipeline)) == attributes  # no method is replaced
    assert "forward" not in vars(pipeline.text_encoder)


def test_the_users_combined_pipeline_keeps_its_parts(make_config):
    pipeline = kandinsky(0)
    prior, decoder = pipeline.prior_pipe, pipeline.decoder_pipe
    scheduler = decoder.scheduler
    policy = make_policy(pipeline, make_config(pipeline_kwargs={"height": 16, "width": 16}))
    policy.sample(CONTEXT)
    assert pipeline.prior_pipe is prior and pipeline.decoder_pipe is decoder
    assert decoder.scheduler is scheduler and type(decoder) is type(kandinsky(0).decoder_pipe)
    assert "prepare_latents" not in vars(decoder)


@pytest.mark.parametrize("scheduler", [PNDMScheduler, EulerDiscreteScheduler, DDIMScheduler])
def test_generate_runs_the_pipelines_own_scheduler(make_config, scheduler):
    pipeline = tiny_pipeline()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    policy = make_policy(pipeline, make_config())
    ours = policy.generate(CONTEXT)
    theirs = pipeline(
        PROMPTS, generator=generators(), num_inference_steps=4, guidance_scale=3.0, output_type="pt"
    ).images
    assert torch.equal(ours, theirs)


def test_pipeline_kwargs_reach_the_pipeline_in_sampling_and_replay(make_config):
    config = make_config(pipeline_kwargs={"negative_prompt": "dull", "height": 24, "width": 16})
    policy = make_policy(tiny_pipeline(), config)
    batch = policy.sample(CONTEXT, record=[1])
    assert batch.images.shape == (4, 3, 24, 16)
    step = batch.steps[1]
    replayed, _ = policy(step=1, latents=step.latents, next_latents=step.next_latents, context=CONTEXT)
    assert torch.equal(replayed, step.log_probs)


def test_every_sample_may_have_its_own_negative_prompt(make_config):
    negatives = ["dull", "red", "dull", ""]
    pipeline = tiny_pipeline()
    policy = make_policy(pipeline, make_config(pipeline_inputs=["negative_prompt"]))
    metadata = [{"negative_prompt": text} for text in negatives]
    ours = policy.sample(policy.context(PROMPTS, metadata, SEEDS), record=[1])
    theirs = pipeline(
        PROMPTS,
        negative_prompt=negatives,
        generator=generators(),
        num_inference_steps=4,
        guidance_scale=3.0,
        eta=1.0,
        output_type="pt",
    ).images
    assert torch.allclose(ours.images, theirs, atol=1e-6)
    # in training the samples come in another order, and each keeps its own
    order = [2, 0, 3, 1]
    step = ours.steps[1]
    shuffled = policy.context([PROMPTS[k] for k in order], [metadata[k] for k in order], [SEEDS[k] for k in order])
    replayed, _ = policy(1, step.latents[order], step.next_latents[order], shuffled)
    assert torch.allclose(replayed, step.log_probs[order], atol=1e-6)


def test_a_list_of_texts_for_all_batches_is_refused(make_config):
    with pytest.raises(ValueError, match="pipeline_kwargs holds a list for negative_prompt, .*pipeline_inputs"):
        make_policy(tiny_pipeline(), make_config(pipeline_kwargs={"negative_prompt": ["dull"] * 4}))


def test_eta_scales_the_noise_of_every_step(make_config):
    whole, less = (
        make_policy(tiny_pipeline(), make_config(eta=eta)).probe_schedule(CONTEXT).stds for eta in (1.0, 0.3)
    )
    assert less == pytest.approx([0.3 * std for std in whole], rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("sde_type", "noise_level"), [("sde", 0.7), ("sde", 0.3), ("cps", 0.5)])
def test_the_settings_of_flow_matching_reach_the_sampler(make_config, sde_type, noise_level, reduction):
    pipeline = stable_diffusion_3(0)
    config = make_config(
        sde_type=sde_type,
        noise_level=noise_level,
        log_prob_reduction=reduction,
        pipeline_kwargs={"max_sequence_length": 16},
    )
    policy = make_policy(pipeline, config)
    batch = policy.sample(CONTEXT, record=range(4))
    pipeline.scheduler.set_timesteps(4)
    sigmas = pipeline.scheduler.sigmas.tolist()
    assert sorted(batch.steps) == [0, 1, 2]
    for index, step in batch.steps.items():
        sigma, next_sigma = sigmas[index : index + 2]
        if sde_type == "cps":
            std = next_sigma * np.sin(noise_level * np.pi / 2)
        else:
            std = noise_level * np.sqrt(sigma * (sigma - next_sigma) / max(1 - sigma, sigma - next_sigma))
        replayed, _ = policy(index, step.latents, step.next_latents, CONTEXT)
        assert torch.equal(replayed, step.log_probs)
        # The mean log-density of n normal numbers is -log std - log sqrt(2 pi e), its standard error sqrt(1 / 2n).
        dimensions = step.latents[0].numel()
        per_dimension = step.log_probs.mean().item() / (dimensions if reduction == "sum" else 1)
        expected = -np.log(std) - 0.5 * np.log(2 * np.pi * np.e)
        assert abs(per_dimension - expected) < 4 / np.sqrt(2 * dimensions * len(PROMPTS))


def test_steps_that_a_pipeline_never_runs_are_named(make_config):
    policy = make_policy(stable_diffusion_xl(0), make_config(pipeline_kwargs={"denoising_end": 0.6}))
    with pytest.raises(RuntimeError, match=r"ended without running the steps \[2\] of its .*train_timestep_range"):
        policy.sample(CONTEXT, record=range(4))


def test_a_denoiser_that_reuses_earlier_steps_is_refused(make_config):
    pipeline: Any = flux(0)
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"reuses what it computed in earlier steps.*disable_cache"):
        make_policy(pipeline, make_config())


def test_a_denoiser_offloaded_in_groups_is_refused_and_other_networks_may_be(make_config):
    cpu = torch.device("cpu")
    pipeline: Any = tiny_pipeline()
    for component in (pipeline.text_encoder, pipeline.vae):
        apply_group_offloading(component, onload_device=cpu, offload_type="leaf_level")
    images = make_policy(pipeline, make_config()).sample(CONTEXT).images
    assert torch.equal(images, make_policy(tiny_pipeline(), make_config()).sample(CONTEXT).images)
    for settings in ({"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}):
        pipeline = tiny_pipeline()
        pipeline.unet.enable_group_offload(onload_device=cpu, **settings)
        with pytest.raises(ValueError, match=r"is offloaded in groups of layers.*without enable_group_offload\(\)"):
            make_policy(pipeline, make_config())


@pytest.mark.parametrize("offload", [cpu_offload, cpu_offload_with_hook], ids=["sequential", "model"])
@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_a_network_offloaded_by_accelerate_is_refused(make_config, offload, name):
    """What enable_sequential_cpu_offload() and enable_model_cpu_offload() do to each network."""
    pipeline = tiny_pipeline()
    offload(pipeline.components[name], execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=rf"pipeline\.{name} is offloaded by accelerate's hooks.*remove_all_hooks"):
        make_policy(pipeline, make_config())


def test_a_wrapped_denoiser_is_refused_with_the_remedy(make_config):
    pipeline: Any = tiny_pipeline()
    pipeline.unet = torch.compile(pipeline.unet)
    with pytest.raises(ValueError, match=r"pipeline\.unet is a OptimizedModule.*pipeline\.unet\.compile\(\)"):
        make_policy(pipeline, make_config())


def test_offloaded_text_encoders_make_the_same_images(make_config):
    expected = make_policy(tiny_pipeline(), make_config()).sample(CONTEXT).images
    offloading = make_policy(tiny_pipeline(), make_config(offload_text_encoders=True))
    assert torch.equal(offloading.sample(CONTEXT).images, expected)


def test_it_says_in_a_line_what_is_trained(make_config):
    policy = make_policy(tiny_pipeline(), make_config())
    layers = 2 * 4  # one block with self- and cross-attention, four projections each
    ranks = 4 * 2 * 16  # r = 4, of 16 channels each
    description = "LoRA on pipeline.unet (UNet2DConditionModel): {:,} weights on {} layers: to_k, to_out.0, to_q, to_v"
    assert policy.describe() == description.format(layers * ranks, layers)
    pipeline = tiny_pipeline()
    pipeline.unet.requires_grad_(False)
    pipeline.unet.conv_in.requires_grad_(True)  # 4 to 16 channels, 3x3, and a bias
    own = Policy(pipeline, make_config(use_lora=False), adapter=None)
    assert own.describe() == "pipeline.unet (UNet2DConditionModel): 592 of its own weights"


# ---- What is refused ----


def test_a_pipeline_with_nothing_to_train_is_refused(make_config):
    pipeline = tiny_pipeline()
    pipeline.unet.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter of pipeline\.unet requires a gradient"):
        Policy(pipeline, make_config(use_lora=False), adapter=None)


class IgnoresItsScheduler(StableDiffusionPipeline):
    """A pipeline that makes its images in one go."""

    def __call__(
        self, prompt, num_inference_steps=50, guidance_scale=7.5, generator=None, output_type="pil", return_dict=True
    ):
        return (torch.zeros(len(prompt), 3, 16, 16),)


def test_a_pipeline_that_never_asks_its_scheduler_is_refused(make_config):
    pipeline = IgnoresItsScheduler(**tiny_pipeline().components, requires_safety_checker=False)
    policy = make_policy(pipeline, make_config())
    with pytest.raises(RuntimeError, match="IgnoresItsScheduler finished without a step of its scheduler"):
        policy.probe_schedule(CONTEXT)


def test_a_pipeline_that_takes_no_prompts_is_refused(make_config):
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        attention_head_dim=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    pipeline = DDIMPipeline(unet, DDIMScheduler(clip_sample=False))
    with pytest.raises(
        ValueError, match=r"pipeline is a DDIMPipeline, whose __call__ takes no prompt; .*from prompts"
    ):
        make_policy(pipeline, make_config())


def test_a_pipeline_that_does_not_prepare_latents_is_refused(make_config):
    pipeline = IgnoresItsScheduler(**tiny_pipeline().components, requires_safety_checker=False)
    part = PreparesNothing(pipeline.unet, pipeline.scheduler)
    with pytest.raises(ValueError, match="PreparesNothing without a method prepare_latents"):
        make_policy(part, make_config())


class PreparesNothing(DiffusionPipeline):
    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(self, prompt, num_inference_steps, guidance_scale, generator, output_type):
        raise NotImplementedError
