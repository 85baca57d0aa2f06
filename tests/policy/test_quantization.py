"""Quantized denoisers: an adapter is trained on them, saved and loaded as on any other; the rest is refused."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from diffusers import (
    BitsAndBytesConfig,
    QuantoConfig,
    StableDiffusionPipeline,
    TorchAoConfig,
    UNet2DConditionModel,
)
from huggingface_hub import ModelCard
from peft import LoraConfig
from torch import nn

from artifacts.test_model_card import example, image_of_example
from conformance.image_pipelines import flux
from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOTrainer, check_pipeline
from ddpo_trl.checks.quantization import gradient_error
from ddpo_trl.policy.lora import ADAPTER_NAME, add_adapter, default_lora_config
from ddpo_trl.policy.policy import Policy
from test_trainer import PROMPTS, gradients_of_a_round, lora_weights, relative_difference


def torchao(name: str, **arguments: Any) -> TorchAoConfig:
    return TorchAoConfig(vars(import_module("torchao.quantization"))[name](**arguments))


def torchao_int4() -> TorchAoConfig:
    """The int4 format that runs on a CPU."""
    group = import_module("torchao.quantization").PerGroup(16)
    return torchao("IntxWeightOnlyConfig", weight_dtype=vars(torch)["int4"], granularity=group)


# Package, class of the quantized weights, and the config; `None` for layerwise casting, which is diffusers' own.
METHODS: dict[str, tuple[str, str, Callable[[], Any] | None]] = {
    "bitsandbytes NF4": (
        "bitsandbytes",
        "Params4bit",
        lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "bitsandbytes int8": ("bitsandbytes", "Int8Params", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "torchao int8": ("torchao", "Int8Tensor", lambda: torchao("Int8WeightOnlyConfig", version=2)),
    "torchao int4": ("torchao", "IntxUnpackedToInt8Tensor", torchao_int4),
    "torchao float8": ("torchao", "Float8Tensor", lambda: torchao("Float8WeightOnlyConfig")),
    "quanto int8": ("optimum.quanto", "WeightQBytesTensor", lambda: QuantoConfig(weights_dtype="int8")),
    "quanto float8": ("optimum.quanto", "WeightQBytesTensor", lambda: QuantoConfig(weights_dtype="float8")),
    "quanto int2": ("optimum.quanto", "WeightQBitsTensor", lambda: QuantoConfig(weights_dtype="int2")),
    "layerwise casting": ("diffusers", "Parameter", None),
}

every_method = pytest.mark.parametrize("method", METHODS)


def quantize(pipeline: Any, config: Any, dtype: torch.dtype, directory: Any) -> None:
    """Replace the denoiser by the same, loaded from a file with `quantization_config`."""
    pipeline.unet.save_pretrained(directory)
    # For torchao, a map with a CPU in it says that nothing is to be quantized.
    where = {"device_map": {"": "cpu"}} if isinstance(config, BitsAndBytesConfig) else {}
    pipeline.unet = UNet2DConditionModel.from_pretrained(
        directory, quantization_config=config, torch_dtype=dtype, **where
    )


@pytest.fixture
def quantized(tmp_path, monkeypatch) -> Callable[..., StableDiffusionPipeline]:
    """A tiny pipeline with a denoiser that was quantized when it was loaded."""

    def build(method: str, dtype: torch.dtype = torch.float32, saved: Any = None) -> StableDiffusionPipeline:
        package, weight, config = METHODS[method]
        pytest.importorskip(package)
        if package == "bitsandbytes":  # runs on a CPU; diffusers insists on a GPU
            quantizers = import_module("diffusers.quantizers.bitsandbytes.bnb_quantizer")
            for quantizer in (quantizers.BnB4BitDiffusersQuantizer, quantizers.BnB8BitDiffusersQuantizer):
                monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
        pipeline: Any = tiny_pipeline().to(dtype)
        if config is not None:
            quantize(pipeline, config(), dtype, tmp_path / "denoiser")
        if saved is not None:
            pipeline.load_lora_weights(saved)
        if config is None:  # of a denoiser that is cast already, diffusers would load an adapter as float8
            pipeline.unet.enable_layerwise_casting(torch.float8_e4m3fn, dtype, skip_modules_classes=(nn.Conv2d,))
        layer = pipeline.unet.down_blocks[0].attentions[0].transformer_blocks[0].ff.net[2]
        assert type(layer.weight).__name__ == weight  # and not left as it was
        return pipeline

    return build


# ---- What works ----


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_reproduces_the_recorded_log_probs_to_the_bit(make_config, quantized, method, dtype):
    pipeline = quantized(method, dtype)
    policy = Policy.from_pipeline(pipeline, make_config())
    context = policy.context(PROMPTS, [{}] * len(PROMPTS), range(len(PROMPTS)))
    batch = policy.sample(context, record=range(4))
    assert len(batch.steps) == 4
    for index, step in batch.steps.items():
        replayed, _ = policy(index, step.latents, step.next_latents, context)
        assert torch.equal(replayed, step.log_probs)
    assert {parameter.dtype for parameter in policy.parameters() if parameter.requires_grad} == {torch.float32}


@every_method
def test_the_gradient_of_one_pass_is_that_of_two(make_config, quantized, method):
    settings = {"max_grad_norm": 0.0, "loss_type": "sf"}
    one, two = (
        gradients_of_a_round(make_config(one_pass=one_pass, **settings), quantized(method), brightness)
        for one_pass in (True, False)
    )
    # int8 of bitsandbytes computes in float16, and rounds each gradient to it.
    assert relative_difference(one, two) < (1e-2 if method == "bitsandbytes int8" else 1e-5)


@every_method
def test_a_run_resumes_to_the_bit_and_plain_diffusers_loads_what_it_saved(make_config, quantized, method, tmp_path):
    def trainer(run: str, rounds: int) -> DDPOTrainer:
        config = make_config(
            output_dir=str(tmp_path / run), num_train_epochs=rounds, save_strategy="epoch", kl_coef=0.1
        )
        return DDPOTrainer(config, brightness, PROMPTS, quantized(method))

    whole, resumed = trainer("whole", 2), trainer("parts", 2)
    whole.train()
    trainer("parts", 1).train()
    resumed.train(resume_from_checkpoint=True)
    assert relative_difference(lora_weights(whole), lora_weights(resumed)) == 0.0

    whole.save_model()
    base, images = (
        quantized(method, saved=saved)(
            ["cat", "dog"],
            num_inference_steps=4,
            guidance_scale=3.0,
            output_type="pt",
            generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
        ).images.float()
        for saved in (None, tmp_path / "whole")
    )
    policy: Any = whole.model
    expected = policy.generate(policy.context(["cat", "dog"], [{}, {}], range(2)))
    assert torch.equal(images, expected) and not torch.equal(base, expected)


@pytest.mark.parametrize("method", ["torchao int8", "torchao int4", "quanto int8"])
def test_the_model_cards_example_quantizes_the_base_as_the_run_did(make_config, tmp_path, method):
    package, _, config = METHODS[method]
    pytest.importorskip(package)
    assert config is not None

    def change(pipeline: Any) -> None:
        quantize(pipeline, config(), torch.float32, tmp_path / "denoiser")

    expected, actual = image_of_example(tmp_path / "run", tiny_pipeline, make_config(), {}, change)
    assert abs(actual - expected).max() <= 0.51 / 255  # of a picture's integers


@every_method
def test_the_doctor_finds_nothing_and_leaves_the_pipeline_as_it_was(quantized, method):
    pipeline = quantized(method)
    before = {name: (type(value), value.dtype) for name, value in pipeline.unet.named_parameters()}
    report = check_pipeline(pipeline)
    assert report.problem is None and set(report.replay_differences.values()) == {0.0}
    assert {name: (type(value), value.dtype) for name, value in pipeline.unet.named_parameters()} == before


def test_layerwise_casting_may_be_enabled_before_or_after_the_adapter_is_added(make_config):
    log_probs = []
    for adapter_first in (True, False):
        pipeline: Any = flux(0).to(torch.bfloat16)
        adapter = default_lora_config(pipeline.transformer)
        adapter.init_lora_weights = True  # with the same effect, none
        if adapter_first:
            pipeline.transformer.add_adapter(adapter, ADAPTER_NAME)
        pipeline.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
        config = make_config(pipeline_kwargs={"height": 32, "width": 32})
        policy = Policy.from_pipeline(pipeline, config, None if adapter_first else adapter)
        context = policy.context(PROMPTS, [{}] * len(PROMPTS), range(len(PROMPTS)))
        log_probs.append(policy.sample(context, record=[0]).steps[0].log_probs)
    assert torch.equal(*log_probs)


# ---- What is refused ----


@every_method
def test_training_quantized_weights_themselves_is_refused_by_name(make_config, quantized, method):
    with pytest.raises(ValueError, match=r"use_lora is False, .*can't be updated\. Set use_lora=True to train an ada"):
        Policy.from_pipeline(quantized(method), make_config(use_lora=False))


def test_layers_that_let_no_gradient_through_are_refused(make_config, tmp_path):
    """torchao rounds the inputs of such layers, without a gradient: adapters before them would not learn from them."""
    pytest.importorskip("torchao")
    pipeline = tiny_pipeline()
    quantize(pipeline, torchao("Int8DynamicActivationInt8WeightConfig", version=2), torch.float32, tmp_path / "it")
    with pytest.raises(ValueError, match=r"is a Linear with a weight of Int8Tensor.*Quantize weights only"):
        DDPOTrainer(make_config(), brightness, PROMPTS, pipeline)
    assert "Quantize weights only" in (check_pipeline(pipeline).problem or "")


class Halved(torch.autograd.Function):
    """A gradient that is not the function's."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] / 2


def test_a_gradient_that_is_not_that_of_the_weights_is_noticed():
    class Wrong(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(Halved.apply(inputs))

    assert gradient_error(nn.Linear(64, 32), torch.float32) < 1e-6
    assert gradient_error(Wrong(64, 32), torch.float32) == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(target_modules=["to_q"])], ids=["default", "own"])
def test_convolutions_under_layerwise_casting_are_refused_with_the_remedy(peft_config):
    pipeline: Any = tiny_pipeline()
    pipeline.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    message = r"pipeline\.unet\.conv_in is a Conv2d stored as torch\.float8_e4m3fn.*skip_modules_classes=\(torch\.nn"
    with pytest.raises(ValueError, match=message):
        add_adapter(pipeline, peft_config)


def test_a_pipeline_of_quantized_files_is_loaded_and_trained(make_config, quantized, tmp_path):
    """As they are published, for example, of FLUX: the config of the denoiser names the method."""
    quantized("torchao int8").save_pretrained(tmp_path / "published")
    trainer = DDPOTrainer(make_config(), brightness, PROMPTS, str(tmp_path / "published"))
    trainer.train()
    policy: Any = trainer.model
    assert "(UNet2DConditionModel, quantized by torchao)" in policy.describe()
    trainer.create_model_card()
    assert "quantization" not in example(ModelCard.load(tmp_path / "run" / "README.md"))
