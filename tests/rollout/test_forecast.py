"""The forecast of GPU memory; `make real-size` compares it with whole rounds on a simulated GPU."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOTrainer
from ddpo_trl.checks.doctor import check_pipeline, counted_activations, storage_bytes
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.without_memory import Call, backward_peak, linear_attention, without_memory
from ddpo_trl.rollout.forecast import Cost, MemoryForecast, forecast, forecast_or_reason
from rollout.test_plan import plan


GiB = 2**30


def two_samples(config: Any, pipeline: Any) -> tuple[Policy, Any]:
    policy = Policy.from_pipeline(pipeline, config)
    context = policy.context(["cat", "dog"], [{}] * 2, [0, 1])
    policy.probe_schedule(context)
    return policy, context


def made(**overrides: Any) -> MemoryForecast:
    """10 GiB of networks; a sample takes 1 to denoise, 2 to decode, 6 to train on and 3 with checkpointing."""
    given = {
        "resident": 10 * GiB,
        "visiting": 0,
        "alone": True,
        "denoising": Cost(0, GiB),
        "decoding": Cost(GiB, 2 * GiB),
        "training": Cost(GiB, 6 * GiB),
        "checkpointed": Cost(GiB, 3 * GiB),
        "gradient_bytes": GiB,
    }
    return MemoryForecast(**{**given, **overrides})


@pytest.mark.parametrize(
    ("available", "one_pass", "checkpointing", "batch"),
    [
        (16, False, False, 0),
        (17, False, False, 1),  # 10 + 1 + 6
        (40, False, False, 4),  # 10 + 1 + 4 x 6 = 35
        (40, True, False, 4),  # 10 + 1 + 4 x (6 + 1) = 39
        (40, False, True, 9),  # 10 + 1 + 9 x 3 = 38
        (40, True, True, 7),  # 10 + 1 + 7 x (3 + 1) = 39
    ],
)
def test_the_largest_batch_fits_and_the_next_does_not(available, one_pass, checkpointing, batch):
    assert made().largest_batch(available * GiB, one_pass, checkpointing) == batch


def test_text_encoders_have_to_fit_too():
    with_encoders = made(visiting=20 * GiB)
    assert with_encoders.largest_batch(19 * GiB, False, False) == 0
    assert with_encoders.largest_batch(20 * GiB, False, False) == 1
    assert dataclasses.replace(with_encoders, alone=False).largest_batch(20 * GiB, False, False) == 0


def test_the_plan_adds_up_the_parts_of_a_round():
    sizes = {"forecast": made(visiting=5 * GiB), "state_bytes": GiB, "image_bytes": GiB, "trainable_steps": (0,)}
    two = plan(num_sample_batches=3, **sizes).forecast_peaks
    kept = 12 * 2 + 4  # states of 12 samples before and after the step, images of a batch of 4
    assert two == {
        "encoding": 5 * GiB,
        "sampling": (10 + 1 + 4 * 2 + kept) * GiB,
        "training": (10 + 1 + 2 * 6 + kept) * GiB,
    }
    one = plan(num_sample_batches=3, one_pass=True, gradient_bytes=GiB, offload_rollout=True, **sizes).forecast_peaks
    assert one == {"encoding": 5 * GiB, "sampling": (10 + 1 + 4 * 7 + 4) * GiB}
    assert "sampling 43 GiB" in str(
        plan(num_sample_batches=3, one_pass=True, gradient_bytes=GiB, offload_rollout=True, **sizes)
    )


def test_a_plan_without_forecast_says_why_and_on_the_cpu_there_is_none():
    assert "forecast of GPU memory           none: it is quantized" in str(plan(forecast="it is quantized"))
    assert "forecast" not in str(plan())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_takes_what_autograd_keeps(make_config, checkpointing):
    """Counted on real tensors of a real replay: the peak is that, and what the backward pass has at hand."""
    policy, context = two_samples(make_config(), tiny_pipeline())
    found = forecast(policy, context, policy.settings, alone=True)
    batch = policy.sample(context, record=[0])
    if checkpointing:
        policy.activation_checkpointing_enable()
    with counted_activations(policy) as kept:
        log_probs, _ = policy(0, batch.steps[0].latents, batch.steps[0].next_latents, context)
    log_probs.sum().backward()
    cost = found.checkpointed if checkpointing else found.training
    assert cost is not None
    assert 0.8 < cost.of(2) / storage_bytes(kept) < (4 if checkpointing else 1.3)


def test_two_samples_take_twice_the_memory_of_one(make_config):
    policy, context = two_samples(make_config(), tiny_pipeline())
    two = forecast(policy, context, policy.settings, alone=True)
    one = forecast(policy, context.rows([0]), policy.settings, alone=True)
    for name in ("training", "checkpointed", "denoising"):
        assert vars(two)[name].of(1) == pytest.approx(vars(one)[name].of(1), rel=0.05)


def test_resident_are_the_networks_and_the_moments_of_adamw(make_config):
    pipeline = tiny_pipeline()
    policy, context = two_samples(make_config(), pipeline)
    parts = {name: pipeline.components[name] for name in ("unet", "vae", "text_encoder")}
    sizes = {name: sum(each.nbytes for each in [*part.parameters(), *part.buffers()]) for name, part in parts.items()}
    moments = 2 * sum(each.nbytes for each in policy.parameters() if each.requires_grad)
    assert forecast(policy, context, policy.settings, alone=True).resident == sum(sizes.values()) + moments
    settings = make_config(offload_vae=True, offload_text_encoders=True)
    offloaded = forecast(policy, context, settings, alone=True)
    assert offloaded.resident == sizes["unet"] + moments
    assert offloaded.visiting == sizes["text_encoder"]
    here = forecast(policy, context, policy.settings, alone=True)
    assert offloaded.decoding.of(2) == here.decoding.of(2) + sizes["vae"]


def test_a_chain_of_layers_takes_the_bytes_of_its_outputs():
    with torch.device("meta"):
        layers = nn.Sequential(*[nn.Sequential(nn.Linear(256, 256, bias=False), nn.Tanh()) for _ in range(8)])
        values = torch.empty(1024, 256)
    peak = backward_peak(layers, [Call((values,), {}, 0)])
    weights, output = 8 * 256 * 256 * 4, 1024 * 256 * 4  # a gradient for each; each tanh keeps its result
    assert 8 * output + weights / 8 <= peak <= 11 * output + weights


def test_attention_keeps_no_scores():
    query = torch.empty(1, 1, 4096, 64, device="meta", requires_grad=True)
    with linear_attention():
        peak = backward_peak(torch.nn.functional.scaled_dot_product_attention, [Call((query,) * 3, {}, 0)])
    assert peak < 4096 * 4096  # an eighth of the scores in float32 and their gradient


def test_the_pipeline_is_left_as_it_was(make_config):
    pipeline = tiny_pipeline()
    policy, context = two_samples(make_config(), pipeline)
    before = policy.sample(context).images
    forecast(policy, context, policy.settings, alone=True)
    assert "forward" not in vars(pipeline.unet) and "decode" not in vars(pipeline.vae)
    assert not pipeline.unet.is_gradient_checkpointing
    assert torch.equal(policy.sample(context).images, before)


def test_tables_that_are_no_buffers_are_copied_too(make_config):
    """A network may keep them on its device, where tensors without memory can't meet them."""
    pipeline = tiny_pipeline()
    pipeline.unet.tables = [torch.arange(3), {"more": torch.arange(3)}]
    first, second = without_memory(pipeline.unet).tables
    assert first.is_meta and second["more"].is_meta
    assert not pipeline.unet.tables[0].is_meta


def test_what_can_not_be_run_without_memory_has_no_forecast(make_config):
    policy, context = two_samples(make_config(bf16=True), tiny_pipeline())
    assert "autocast" in str(forecast_or_reason(policy, context, policy.settings, alone=True))
    pipeline = tiny_pipeline()
    policy, context = two_samples(make_config(), pipeline)
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: inputs[0].sum().item())
    pipeline.unet.register_to_config(quantization_config={"load_in_4bit": True})
    assert "is quantized" in str(forecast_or_reason(policy, context, policy.settings, alone=True))


def test_the_doctor_shows_the_largest_batches_of_the_users_settings(make_config):
    plain, report = (check_pipeline(tiny_pipeline(), make_config(offload_vae=offload)) for offload in (False, True))
    assert plain.forecast is not None and report.forecast is not None
    assert report.forecast.resident < plain.forecast.resident
    rows = dict(report.rows())
    assert rows["forecast of the largest batch, two passes"].startswith("8 GB: 1024, ")
    assert len([name for name in rows if name.startswith("forecast of the largest batch")]) == 4


def test_the_trainer_forecasts_for_accelerators_only(make_config):
    trainer = DDPOTrainer(make_config(), brightness, ["cat"], tiny_pipeline())
    assert trainer.plan.forecast is None
