"""The pipeline as a policy: replay is sampling again, and the user's pipeline stays the user's."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

from conftest import tiny_pipeline
from ddpo_trl import DDPOConfig
from ddpo_trl.emoji import load_emoji_pipeline
from ddpo_trl.lora import put_on_adapter
from ddpo_trl.policy import Policy
from ddpo_trl.seeding import Stream, generator


PROMPTS = ["cat", "dog", "cat", "owl"]


def make_policy(pipeline, config: DDPOConfig) -> Policy:
    torch.manual_seed(1)
    policy = Policy(pipeline, config, put_on_adapter(pipeline, None))
    with torch.no_grad():  # an adapter starts as the identity; a trained one does not
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return policy


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [generator(0, Stream.SAMPLE, 0, first + index) for index in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_replay_reproduces_the_recorded_log_probs_to_the_bit(make_config, dtype, prediction_type):
    policy = make_policy(tiny_pipeline(prediction_type=prediction_type).to(dtype), make_config())
    batch = policy.sample(PROMPTS, generators(4), record=range(4))
    assert sorted(batch.steps) == [0, 1, 2, 3]
    for index, step in batch.steps.items():
        assert step.latents.dtype == dtype
        replayed, _ = policy(step=index, latents=step.latents, next_latents=step.next_latents, prompts=PROMPTS)
        assert replayed.requires_grad
        assert torch.equal(torch.exp(replayed - step.log_probs), torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_reproduces_the_embedded_pipelines_log_probs_to_the_bit(make_config, dtype):
    prompts = ["cat face", "3d pizza"]
    policy = make_policy(load_emoji_pipeline(torch_dtype=dtype), make_config(num_inference_steps=5))
    batch = policy.sample(prompts, generators(2), record=range(5))
    for index, step in batch.steps.items():
        replayed, _ = policy(step=index, latents=step.latents, next_latents=step.next_latents, prompts=prompts)
        assert torch.equal(replayed, step.log_probs)


def test_replay_under_other_guidance_is_another_policy(make_config):
    policy = make_policy(tiny_pipeline(), make_config(guidance_scale=3.0))
    step = policy.sample(PROMPTS, generators(4), record=[1]).steps[1]
    policy.settings.guidance_scale = 5.0
    replayed, _ = policy(step=1, latents=step.latents, next_latents=step.next_latents, prompts=PROMPTS)
    assert (replayed - step.log_probs).abs().min() > 1e-5


def test_samples_are_those_of_plain_diffusers_with_the_same_seeds(make_config):
    """With η = 1 the policy is diffusers' own DDIM sampler, so its images are too."""
    pipeline = tiny_pipeline()
    policy = make_policy(pipeline, make_config())
    ours = policy.sample(PROMPTS, generators(4)).images
    theirs = pipeline(
        PROMPTS, generator=generators(4), num_inference_steps=4, guidance_scale=3.0, eta=1.0, output_type="pt"
    ).images
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_gradients_reach_every_lora_parameter_and_nothing_else(make_config):
    policy = make_policy(tiny_pipeline(), make_config())
    step = policy.sample(PROMPTS, generators(4), record=[2]).steps[2]
    log_probs, _ = policy(step=2, latents=step.latents, next_latents=step.next_latents, prompts=PROMPTS)
    log_probs.sum().backward()
    for name, parameter in policy.named_parameters():
        if "lora" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None and not parameter.requires_grad, name


def test_the_images_of_a_sample_do_not_depend_on_its_batch(make_config):
    policy = make_policy(tiny_pipeline(), make_config())
    together = policy.sample(PROMPTS, generators(4), record=range(4))
    for row, prompt in enumerate(PROMPTS):
        alone = policy.sample([prompt], generators(1, first=row), record=range(4))
        assert torch.allclose(alone.images[0], together.images[row], atol=1e-5)


def test_prompts_are_encoded_once_and_never_in_replay(make_config):
    pipeline = tiny_pipeline()
    calls = []
    pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    policy = make_policy(pipeline, make_config())
    step = policy.sample(PROMPTS, generators(4), record=[0]).steps[0]
    encoded = len(calls)
    assert encoded == 2 * len(set(PROMPTS))  # a prompt and its negative prompt
    policy.sample(PROMPTS, generators(4))
    policy(step=0, latents=step.latents, next_latents=step.next_latents, prompts=PROMPTS)
    assert len(calls) == encoded


def test_replay_decodes_no_image(make_config):
    pipeline = tiny_pipeline()
    policy = make_policy(pipeline, make_config())
    step = policy.sample(PROMPTS, generators(4), record=[0]).steps[0]
    pipeline.vae.decode = None
    policy(step=0, latents=step.latents, next_latents=step.next_latents, prompts=PROMPTS)


def test_dropout_stays_off_while_trainer_trains(make_config):
    policy = make_policy(tiny_pipeline(), make_config())
    policy.train()
    assert not any(module.training for module in policy.modules())


def test_the_reference_is_the_pipeline_without_its_adapter(make_config):
    plain = tiny_pipeline()
    policy = make_policy(copy.deepcopy(plain), make_config())
    step = policy.sample(PROMPTS, generators(4), record=[1]).steps[1]
    arguments = {"step": 1, "latents": step.latents, "next_latents": step.next_latents, "prompts": PROMPTS}
    _, kl = policy(**arguments, with_reference=True)
    assert (kl > 0).all()
    # KL of two Gaussians, from the means of both policies, by torch's own formula
    mean = policy._replay(policy.policy_pipeline, 1, step.latents, step.next_latents, PROMPTS).mean
    reference = make_policy(plain, make_config())
    for name, parameter in reference.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    replay = reference._replay(reference.policy_pipeline, 1, step.latents, step.next_latents, PROMPTS)
    normals = [torch.distributions.Normal(m, replay.std) for m in (mean, replay.mean)]
    expected = torch.distributions.kl_divergence(*normals).flatten(1).mean(1)
    assert torch.allclose(kl, expected, rtol=1e-4, atol=1e-9)
    # and the adapter is on again afterwards
    assert torch.equal(policy(**arguments)[0], step.log_probs)


def test_the_users_pipeline_keeps_its_scheduler_and_methods(make_config):
    pipeline = tiny_pipeline()
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    scheduler, config = pipeline.scheduler, dict(pipeline.config)
    make_policy(pipeline, make_config())
    assert pipeline.scheduler is scheduler
    assert dict(pipeline.config) == config
    assert "encode_prompt" not in vars(pipeline)


@pytest.mark.parametrize("scheduler", [PNDMScheduler, EulerDiscreteScheduler, DDIMScheduler])
def test_generate_runs_the_pipelines_own_scheduler(make_config, scheduler):
    pipeline = tiny_pipeline()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    policy = make_policy(pipeline, make_config())
    ours = policy.generate(PROMPTS, generators(4))
    theirs = pipeline(
        PROMPTS, generator=generators(4), num_inference_steps=4, guidance_scale=3.0, output_type="pt"
    ).images
    assert torch.equal(ours, theirs)


def test_pipeline_kwargs_reach_the_pipeline_in_sampling_and_replay(make_config):
    config = make_config(pipeline_kwargs={"negative_prompt": "dull", "height": 24, "width": 16})
    policy = make_policy(tiny_pipeline(), config)
    batch = policy.sample(PROMPTS, generators(4), record=[1])
    assert batch.images.shape == (4, 3, 24, 16)
    step = batch.steps[1]
    replayed, _ = policy(step=1, latents=step.latents, next_latents=step.next_latents, prompts=PROMPTS)
    assert torch.equal(replayed, step.log_probs)


def test_a_pipeline_with_nothing_to_train_is_refused(make_config):
    pipeline = tiny_pipeline()
    pipeline.unet.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter of pipeline\.unet requires a gradient"):
        Policy(pipeline, make_config(use_lora=False), adapter=None)
