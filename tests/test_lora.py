"""The adapter: on all attention projections and nothing else, saved for the loaders that others have."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from conformance.image_pipelines import PIXART_KWARGS, flux, pixart_sigma, stable_diffusion, stable_diffusion_3
from conformance.newer_pipelines import flux2_klein, hunyuan_dit, kandinsky, qwen_image, z_image
from conftest import tiny_pipeline
from ddpo_trl.lora import (
    ADAPTER_NAME,
    adapters_off,
    attention_projections,
    default_lora_config,
    denoiser_name,
    has_lora_loader,
    load_adapter,
    put_on_adapter,
    save_adapter,
    take_off_adapter,
)


Build = Callable[[int], DiffusionPipeline]

OF_ONE_STREAM = ["to_k", "to_out.0", "to_q", "to_v"]
OF_TWO_STREAMS = ["add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", *OF_ONE_STREAM]


def denoiser_of(pipeline: DiffusionPipeline) -> nn.Module:
    return pipeline.components[denoiser_name(pipeline)]


def layers_with_adapter(denoiser: nn.Module) -> set[str]:
    return {name for name, module in denoiser.named_modules() if isinstance(module, LoraLayer)}


def adapter_weights(pipeline: DiffusionPipeline) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in denoiser_of(pipeline).named_parameters() if "lora_" in name}


def trained(build: Build, peft_config: LoraConfig | None = None) -> DiffusionPipeline:
    """A pipeline whose adapter is not the identity, as after some training."""
    pipeline = build(0)
    put_on_adapter(pipeline, peft_config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in adapter_weights(pipeline).items():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    return pipeline


def images(pipeline: DiffusionPipeline) -> torch.Tensor:
    kwargs = PIXART_KWARGS if "PixArt" in type(pipeline).__name__ else {}
    return pipeline(
        prompt=["a cat"],
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=2,
        output_type="pt",
        return_dict=False,
        **kwargs,
    )[0]


# ---- Where it goes ----


@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (stable_diffusion, OF_ONE_STREAM),
        (pixart_sigma, OF_ONE_STREAM),
        (hunyuan_dit, OF_ONE_STREAM),
        (z_image, OF_ONE_STREAM),
        (stable_diffusion_3, OF_TWO_STREAMS),
        (flux, OF_TWO_STREAMS),
        (qwen_image, OF_TWO_STREAMS),
        (kandinsky, ["add_k_proj", "add_v_proj", *OF_ONE_STREAM]),  # keys and values of an image embedding
    ],
)
def test_the_default_targets_are_the_names_of_the_attention_projections(build, targets):
    assert attention_projections(denoiser_of(build(0))) == targets


def test_targets_are_full_names_where_short_ones_would_match_a_container():
    """FLUX.2's single stream has a layer `to_out`, its double stream a list `to_out` of two modules."""
    assert attention_projections(denoiser_of(flux2_klein(0))) == [
        "single_transformer_blocks.0.attn.to_out",
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
        *(f"transformer_blocks.0.attn.{name}" for name in OF_TWO_STREAMS),
    ]


PROJECTIONS = (*OF_TWO_STREAMS, "to_qkv_mlp_proj", "to_out")  # of all pipelines here


@pytest.mark.parametrize(
    "build",
    [stable_diffusion, pixart_sigma, stable_diffusion_3, flux, qwen_image, z_image, hunyuan_dit, kandinsky,
     flux2_klein],
)  # fmt: skip
def test_the_default_adapter_is_on_all_attention_projections_and_on_nothing_else(build):
    pipeline = build(0)
    linear = {name for name, module in denoiser_of(pipeline).named_modules() if isinstance(module, nn.Linear)}
    expected = {name for name in linear if name.endswith(tuple(f".{name}" for name in PROJECTIONS))}
    assert expected and expected < linear
    put_on_adapter(pipeline, None)
    assert layers_with_adapter(denoiser_of(pipeline)) == expected
    weights = adapter_weights(pipeline)
    assert len(weights) == 2 * len(expected)
    for name, parameter in denoiser_of(pipeline).named_parameters():
        assert parameter.requires_grad == (name in weights), name


def test_a_denoiser_without_attention_is_refused_with_the_remedy():
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        mid_block_type=None,
        up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(4, 4),
        layers_per_block=1,
        norm_num_groups=2,
    )
    with pytest.raises(ValueError, match=r"UNet2DConditionModel has no attention layers .*Give `peft_config`"):
        default_lora_config(unet)


def test_the_default_adapter_is_that_of_trl():
    config = default_lora_config(denoiser_of(stable_diffusion(0)))
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (4, 4, "gaussian")  # TRL 0.23's ddpo.py


@pytest.mark.parametrize("build", [stable_diffusion, pixart_sigma])
def test_an_adapter_starts_as_the_identity_and_trains_in_float32(build):
    plain = images(build(0))
    pipeline = build(0)
    put_on_adapter(pipeline, None)
    assert torch.equal(images(pipeline), plain)
    half = build(0).to(torch.bfloat16)
    put_on_adapter(half, None)
    assert all(weight.dtype == torch.float32 for weight in adapter_weights(half).values())


@pytest.mark.parametrize("build", [stable_diffusion, pixart_sigma])
def test_a_second_adapter_is_refused_and_the_one_that_is_there_goes_on(build):
    pipeline = trained(build)
    for weight in adapter_weights(pipeline).values():
        weight.requires_grad_(False)
    assert put_on_adapter(pipeline, None) == ADAPTER_NAME
    assert all(weight.requires_grad for weight in adapter_weights(pipeline).values())
    with pytest.raises(ValueError, match="the pipeline carries the adapter default already"):
        put_on_adapter(pipeline, LoraConfig(target_modules=["to_q"]))


# ---- Off and away ----


@pytest.mark.parametrize("build", [stable_diffusion, pixart_sigma])
def test_switched_off_the_adapter_changes_nothing_and_afterwards_it_is_on_again(build):
    plain = images(build(0))
    pipeline = trained(build)
    before = images(pipeline)
    assert (before - plain).abs().max() > 1e-3
    with adapters_off(denoiser_of(pipeline)):
        assert torch.equal(images(pipeline), plain)
    assert torch.equal(images(pipeline), before)
    assert all(weight.requires_grad for weight in adapter_weights(pipeline).values())
    with pytest.raises(KeyboardInterrupt), adapters_off(denoiser_of(pipeline)):
        raise KeyboardInterrupt
    assert torch.equal(images(pipeline), before)


@pytest.mark.parametrize("build", [stable_diffusion, pixart_sigma])
def test_taken_off_the_adapter_leaves_the_denoiser_as_it_was(build):
    pipeline, plain = trained(build), build(0)
    take_off_adapter(denoiser_of(pipeline))
    assert denoiser_of(pipeline).state_dict().keys() == denoiser_of(plain).state_dict().keys()
    assert torch.equal(images(pipeline), images(plain))
    assert put_on_adapter(pipeline, LoraConfig(r=2, target_modules=["to_q"])) == ADAPTER_NAME  # as if never there
    assert all(name.endswith(".to_q") for name in layers_with_adapter(denoiser_of(pipeline)))


# ---- Saved and loaded ----


@pytest.mark.parametrize(
    "peft_config",
    [None, LoraConfig(r=2, lora_alpha=16, target_modules=["to_q", "to_v"])],
    ids=["default", "alpha other than the rank"],
)
def test_a_denoiser_that_diffusers_has_no_loader_for_is_saved_for_peft(tmp_path, peft_config):
    pipeline = trained(pixart_sigma, peft_config)
    save_adapter(pipeline, ADAPTER_NAME, tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors"}
    assert "pytorch_lora_weights.safetensors" not in names
    fresh = pixart_sigma(0)
    plain = images(fresh)
    PeftModel.from_pretrained(fresh.transformer, tmp_path / "adapter")
    assert torch.allclose(images(fresh), images(pipeline), atol=1e-6)
    assert (images(fresh) - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("build", "file"),
    [
        (stable_diffusion, "pytorch_lora_weights.safetensors"),
        (stable_diffusion_3, "pytorch_lora_weights.safetensors"),
        (pixart_sigma, "adapter_model.safetensors"),
        (kandinsky, "adapter_model.safetensors"),  # its denoiser knows adapters, but the pipeline has no loader
    ],
)
def test_a_saved_adapter_is_loaded_into_the_parameters_that_are_there(tmp_path, build, file):
    pipeline = trained(build)
    expected = {name: weight.detach().clone() for name, weight in adapter_weights(pipeline).items()}
    save_adapter(pipeline, ADAPTER_NAME, tmp_path)
    assert (tmp_path / file).is_file()
    other = build(0)
    put_on_adapter(other, None)
    parameters = adapter_weights(other)
    assert any(not torch.equal(weight, expected[name]) for name, weight in parameters.items())
    load_adapter(other, ADAPTER_NAME, tmp_path)
    assert adapter_weights(other).keys() == expected.keys()  # no second adapter beside it
    for name, weight in adapter_weights(other).items():
        assert weight is parameters[name]  # an optimizer's
        assert torch.equal(weight, expected[name])


def test_an_adapter_is_saved_for_diffusers_only_if_the_pipelines_loader_reads_those_of_its_denoiser():
    assert all(has_lora_loader(build(0)) for build in (stable_diffusion, stable_diffusion_3, flux, qwen_image))
    assert not any(has_lora_loader(build(0)) for build in (pixart_sigma, kandinsky, hunyuan_dit))

    class LoadsTextEncodersOnly(StableDiffusionPipeline):
        _lora_loadable_modules = ["text_encoder"]

    pipeline = LoadsTextEncodersOnly(**stable_diffusion(0).components, requires_safety_checker=False)
    assert not has_lora_loader(pipeline)


@pytest.mark.parametrize("build", [stable_diffusion, pixart_sigma])
def test_an_adapter_of_another_config_is_refused(tmp_path, build):
    pipeline = trained(build)
    weights = len(adapter_weights(pipeline))
    save_adapter(pipeline, ADAPTER_NAME, tmp_path)
    other = trained(build, LoraConfig(r=4, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=rf"holds {weights} LoRA weights .* Resume with the LoRA config"):
        load_adapter(other, ADAPTER_NAME, tmp_path)


# ---- Adapters that would be saved otherwise than they are used ----


def carrying(weight: float = 1.0, use_rslora: bool = False) -> Any:
    pipeline: Any = tiny_pipeline()
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"], use_rslora=use_rslora)
    pipeline.unet.add_adapter(config, "mine")
    if weight != 1:
        pipeline.set_adapters("mine", weight)
    return pipeline


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_of_weight_one_is_taken(use_rslora):
    assert put_on_adapter(carrying(use_rslora=use_rslora), None) == "mine"


def test_an_adapter_with_another_weight_is_refused():
    with pytest.raises(ValueError, match=r"mine has the weight 0\.3, .*set_adapters\('mine'\)"):
        put_on_adapter(carrying(0.3), None)


def test_an_adapter_that_is_switched_off_is_refused():
    pipeline = carrying()
    pipeline.disable_lora()
    with pytest.raises(ValueError, match=r"mine of pipeline\.unet is switched off.*enable_lora"):
        put_on_adapter(pipeline, None)


def test_an_adapter_on_another_network_is_refused():
    pipeline: Any = tiny_pipeline()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), pipeline.text_encoder, "words")
    with pytest.raises(ValueError, match=r"pipeline\.text_encoder carries an adapter.*missing from what is saved"):
        put_on_adapter(pipeline, None)
