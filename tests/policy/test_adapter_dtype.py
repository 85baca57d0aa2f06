"""`adapter_compute_dtype`: products of the adapter in the denoiser's dtype, from float32 weights."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from conftest import brightness, in_both_passes, tiny_pipeline
from ddpo_trl import DDPOTrainer
from ddpo_trl.checks.doctor import counted_activations, storage_bytes
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.records import SampledBatch
from test_trainer import PROMPTS, gradients_of_a_round, lora_weights, relative_difference, reward_logs


# Linear layers and convolutions.
TARGETS = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "conv1", "conv_in"])


def half_pipeline() -> Any:
    return tiny_pipeline().to(torch.bfloat16)


def trained_policy(config: Any, pipeline: Any) -> Policy:
    """A policy whose adapter is not the identity."""
    policy = Policy.from_pipeline(pipeline, config, TARGETS)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=random))
    return policy


def sampled(policy: Policy) -> SampledBatch:
    return policy.sample(policy.context(["cat", "dog"], [{}] * 2, [0, 1]), record=range(4))


def test_products_are_those_of_inputs_and_weights_in_the_dtype_of_the_inputs(make_config):
    policy = trained_policy(make_config(adapter_compute_dtype="denoiser"), half_pipeline())
    layers = {name: layer for name, layer in policy.denoiser.named_modules() if isinstance(layer, LoraLayer)}
    for kind, compute in ((nn.Linear, nn.functional.linear), (nn.Conv2d, nn.functional.conv2d)):
        layer = next(layer for layer in layers.values() if isinstance(layer.get_base_layer(), kind))
        first, second = layer.lora_A["default"], layer.lora_B["default"]
        shape = (3, 5, first.in_features) if kind is nn.Linear else (3, first.in_channels, 8, 8)
        inputs = torch.randn(shape, dtype=torch.bfloat16)
        geometry = {} if kind is nn.Linear else {"stride": first.stride, "padding": first.padding}
        inner = compute(inputs, first.weight.bfloat16(), **geometry)
        expected = layer.get_base_layer()(inputs) + compute(inner, second.weight.bfloat16()) * layer.scaling["default"]
        assert torch.equal(layer(inputs), expected)


def test_a_replay_is_what_was_sampled(make_config):
    policy = trained_policy(make_config(adapter_compute_dtype="denoiser"), half_pipeline())
    batch = sampled(policy)
    assert len(batch.steps) == 4
    for index, step in batch.steps.items():
        log_probs, _ = policy(index, step.latents, step.next_latents, batch.context)
        assert torch.equal(log_probs, step.log_probs)


@in_both_passes
def test_a_round_trains_float32_weights_with_ratios_of_one(make_config, one_pass):
    config = make_config(adapter_compute_dtype="denoiser")
    trainer = DDPOTrainer(config, brightness, PROMPTS, half_pipeline(), peft_config=TARGETS)
    before = lora_weights(trainer)
    trainer.train()
    after = lora_weights(trainer)
    assert all(
        weight.dtype == torch.float32 and not torch.equal(weight, before[name]) for name, weight in after.items()
    )
    assert trainer.plan.one_pass == one_pass
    assert one_pass or reward_logs(trainer)[0]["val/ratio_deviation"] == 0.0


def test_one_pass_differs_from_two_by_rounding_only(make_config):
    one, two = (
        gradients_of_a_round(
            make_config(one_pass=one_pass, adapter_compute_dtype="denoiser", max_grad_norm=0.0), half_pipeline()
        )
        for one_pass in (True, False)
    )
    difference = torch.cat([(one[name] - two[name]).flatten() for name in one])
    assert difference.norm() < 0.05 * torch.cat([gradient.flatten() for gradient in two.values()]).norm()


def test_nothing_changes_in_a_float32_denoiser(make_config):
    results: list[Mapping[str, torch.Tensor]] = []
    for dtype in ("float32", "denoiser"):
        config = make_config(adapter_compute_dtype=dtype, max_grad_norm=0.0)
        batch = sampled(trained_policy(config, tiny_pipeline()))
        results.append({"images": batch.images, **gradients_of_a_round(config)})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_files_hold_float32_weights_and_make_the_same_images_in_the_users_pipeline(make_config, tmp_path):
    policy = trained_policy(make_config(adapter_compute_dtype="denoiser"), half_pipeline())
    policy.save(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    saved = load_file(file)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    assert len(saved) == len(trained) and {weight.dtype for weight in saved.values()} == {torch.float32}
    user = half_pipeline()
    user.load_lora_weights(tmp_path)
    images = [
        pipeline("cat", num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)).images
        for pipeline in (user, policy.pipeline)
    ]
    assert torch.equal(*images)


def test_another_run_on_the_same_pipeline_has_its_own_choice(make_config):
    pipeline = half_pipeline()
    trained_policy(make_config(adapter_compute_dtype="denoiser"), pipeline)
    again = Policy.from_pipeline(pipeline, make_config(adapter_compute_dtype="float32"))
    fresh = Policy.from_pipeline(half_pipeline(), make_config(), TARGETS)
    for own, wanted in zip(again.parameters(), fresh.parameters(), strict=True):
        wanted.data.copy_(own.data)
    assert torch.equal(sampled(again).images, sampled(fresh).images)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}])
def test_variants_of_lora_train_too(make_config, settings):
    config = make_config(adapter_compute_dtype="denoiser", one_pass=None)
    adapter = LoraConfig(r=2, target_modules=["to_q", "conv1"], **settings)
    DDPOTrainer(config, brightness, PROMPTS, half_pipeline(), peft_config=adapter).train()


def test_fewer_bytes_are_kept_for_the_backward_pass(make_config):
    kept = {}
    for dtype in ("float32", "denoiser"):
        policy = trained_policy(make_config(adapter_compute_dtype=dtype), half_pipeline())
        batch = sampled(policy)
        step = batch.steps[0]
        with counted_activations(policy) as tensors:
            policy(0, step.latents, step.next_latents, batch.context)
        kept[dtype] = storage_bytes(tensors)
    assert kept["denoiser"] < 0.9 * kept["float32"]


def test_checkpointing_gives_the_same_gradient(make_config):
    plain, checkpointed = (
        gradients_of_a_round(
            make_config(adapter_compute_dtype="denoiser", max_grad_norm=0.0, gradient_checkpointing=on),
            half_pipeline(),
        )
        for on in (False, True)
    )
    assert relative_difference(plain, checkpointed) == 0.0
