"""The adapter: on all attention projections and nothing else, saved for the loaders that others have."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from peft import (
    ArrowConfig,
    EvaConfig,
    LoraConfig,
    LoraRuntimeConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    inject_adapter_in_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from conformance.image_pipelines import PIXART_KWARGS, flux, pixart_sigma, stable_diffusion, stable_diffusion_3
from conformance.newer_pipelines import flux2_klein, hunyuan_dit, kandinsky, qwen_image, z_image
from conftest import needs_newest, tiny_pipeline
from ddpo_trl.policy.adapter_files import has_lora_loader, load_adapter, save_adapter
from ddpo_trl.policy.denoiser import active_adapters, adapters_off, denoiser_name, remove_adapters
from ddpo_trl.policy.full_weights import freeze_all_but_denoiser
from ddpo_trl.policy.lora import ADAPTER_NAME, add_adapter, attention_projections, default_lora_config
from ddpo_trl.versions import installed


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
    add_adapter(pipeline, peft_config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in adapter_weights(pipeline).items():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    return pipeline


def images(pipeline: DiffusionPipeline, steps: int = 2) -> torch.Tensor:
    kwargs = PIXART_KWARGS if "PixArt" in type(pipeline).__name__ else {}
    return pipeline(
        prompt=["a cat"],
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=steps,
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
    add_adapter(pipeline, None)
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
    add_adapter(pipeline, None)
    assert torch.equal(images(pipeline), plain)
    half = build(0).to(torch.bfloat16)
    add_adapter(half, None)
    assert all(weight.dtype == torch.float32 for weight in adapter_weights(half).values())


@pytest.mark.parametrize("build", [stable_diffusion, pixart_sigma])
def test_a_second_adapter_is_refused_and_the_one_that_is_there_goes_on(build):
    pipeline = trained(build)
    for weight in adapter_weights(pipeline).values():
        weight.requires_grad_(False)
    assert add_adapter(pipeline, None) == ADAPTER_NAME
    assert all(weight.requires_grad for weight in adapter_weights(pipeline).values())
    with pytest.raises(ValueError, match="the pipeline carries the adapter default already"):
        add_adapter(pipeline, LoraConfig(target_modules=["to_q"]))


@pytest.mark.parametrize(
    ("place", "peft_config"),
    [
        ("ddpo_trl.policy.adapter_checks._leaves_base_alone", LoraConfig(r=2, target_modules=["to_q"])),
        ("diffusers.UNet2DConditionModel.add_adapter", None),
        ("diffusers.StableDiffusionPipeline.load_lora_weights", LoraConfig(r=2, target_modules=["to_q"])),
    ],
)
def test_memory_that_runs_out_is_not_blamed_on_the_adapter(monkeypatch, place, peft_config):
    def run_out(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(place, run_out)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        add_adapter(stable_diffusion(0), peft_config)


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
    remove_adapters(denoiser_of(pipeline))
    assert denoiser_of(pipeline).state_dict().keys() == denoiser_of(plain).state_dict().keys()
    assert torch.equal(images(pipeline), images(plain))
    assert add_adapter(pipeline, LoraConfig(r=2, target_modules=["to_q"])) == ADAPTER_NAME  # as if never there
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
    add_adapter(other, None)
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
    assert add_adapter(carrying(use_rslora=use_rslora), None) == "mine"


def test_an_adapter_with_another_weight_is_refused():
    with pytest.raises(ValueError, match=r"mine has the weight 0\.3, .*set_adapters\('mine'\)"):
        add_adapter(carrying(0.3), None)


def test_an_adapter_that_is_switched_off_is_refused():
    pipeline = carrying()
    pipeline.disable_lora()
    with pytest.raises(ValueError, match=r"mine of pipeline\.unet is switched off.*enable_lora"):
        add_adapter(pipeline, None)


def test_a_fused_adapter_is_refused_with_the_remedy():
    pipeline = carrying()
    pipeline.fuse_lora()
    with pytest.raises(ValueError, match=r"mine of pipeline\.unet is fused into the weights.*unfuse_lora\(\)"):
        add_adapter(pipeline, None)
    pipeline.unfuse_lora()
    assert add_adapter(pipeline, None) == "mine"


@pytest.mark.parametrize("target", ["to_q", "to_qkv"])
def test_fused_projections_are_refused_with_the_remedy(target):
    """On `to_qkv` an adapter would act and not be loaded; on `to_q` it would be loaded and not have acted."""
    pipeline: Any = tiny_pipeline()
    pipeline.fuse_qkv_projections(vae=False)
    with pytest.raises(ValueError, match=r"projections of pipeline\.unet are fused.*unfuse_qkv_projections\(\)"):
        add_adapter(pipeline, LoraConfig(r=2, target_modules=[target]))
    pipeline.unfuse_qkv_projections(vae=False)
    assert add_adapter(pipeline, None) == ADAPTER_NAME


def test_weights_of_the_denoiser_that_would_not_be_loaded_again_are_refused():
    pipeline: Any = tiny_pipeline()
    pipeline.fuse_qkv_projections(vae=False)
    with pytest.raises(ValueError, match=r"projections of pipeline\.unet are fused.*unfuse_qkv_projections\(\)"):
        freeze_all_but_denoiser(pipeline, None)
    pipeline = tiny_pipeline()
    pipeline.unet.conv_out.new = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"its config does not have, such as conv_out\.new\.weight"):
        freeze_all_but_denoiser(pipeline, None)


def test_an_adapter_on_another_network_is_refused():
    pipeline: Any = tiny_pipeline()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), pipeline.text_encoder, "words")
    with pytest.raises(ValueError, match=r"pipeline\.text_encoder carries an adapter.*missing from what is saved"):
        add_adapter(pipeline, None)


# ---- Every kind of adapter comes back from its file, or is refused ----

# What is asked for beside `target_modules`, where a method's defaults don't suit layers of 16 or ask for more.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": ["to_v"]},
    "MISS": {"r": 4},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "WAVEFT": {"n_frequency": 10},
}
FEW_LAYERS = r"(down_blocks.*|transformer_blocks\.0)\.attn1\.to_(q|v|out\.0)"  # of both pipelines, to be quick
FOR_DIFFUSERS = {"LORA"}
FOR_PEFT = {
    "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "IA3",
    "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "ROAD", "SHIRA", "SUPERTUNING",
    "WAVEFT",
}  # fmt: skip
FOR_NOBODY = {
    "ADAPTION_PROMPT", "CARTRIDGE", "FROD", "LILY", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING",
    "PROMPT_TUNING", "PVERA", "P_TUNING", "RANDLORA", "SHADOW", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA",
    "VERA", "XLORA",
}  # fmt: skip
NOT_MADE = {"CPT", "ADAMSS"}  # for language models only; needs scikit-learn


OF_OLDER_VERSIONS = {"BONE"}  # now MISS
REFUSED_BY_OLDER_VERSIONS = {
    "ADALORA": "by its loader, which leaves tensors without values",
    "VBLORA": "because its default length of a vector does not divide the layer",
}
KNOWN = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}


def test_every_type_of_adapter_that_peft_knows_is_in_the_table():
    assert KNOWN <= FOR_PEFT | FOR_NOBODY | NOT_MADE | OF_OLDER_VERSIONS


@needs_newest("older versions know fewer types")
def test_every_type_of_adapter_in_the_table_is_one_that_peft_knows():
    assert FOR_PEFT | FOR_NOBODY | NOT_MADE <= KNOWN


def config_of(kind: str) -> PeftConfig:
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    arguments = dict(ARGUMENTS.get(kind, {}))
    if "target_modules" in {field.name for field in dataclasses.fields(config_class)}:
        arguments["target_modules"] = FEW_LAYERS
    return config_class(**arguments)


def check_round_trip(build: Build, config: PeftConfig, directory: Path) -> None:
    """
    What was trained is what others load into a fresh pipeline and what a resumed run starts from; and switched off
    it leaves the base model.
    """
    pipeline, fresh = build(0), build(0)
    plain = images(fresh, 1)
    adapter = add_adapter(pipeline, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in denoiser_of(pipeline).parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    expected = images(pipeline, 1)
    with adapters_off(denoiser_of(pipeline)):
        assert torch.equal(images(pipeline, 1), plain)
    assert not torch.equal(expected, plain)
    save_adapter(pipeline, adapter, directory)
    if has_lora_loader(fresh):
        fresh.load_lora_weights(directory)
    else:
        PeftModel.from_pretrained(denoiser_of(fresh), directory)
    assert torch.equal(images(fresh, 1), expected)
    with torch.no_grad():
        for weight in denoiser_of(pipeline).parameters():
            if weight.requires_grad:
                weight.zero_()
    load_adapter(pipeline, adapter, directory)
    assert torch.equal(images(pipeline, 1), expected)


def check_refusal(build: Build, config: PeftConfig, message: str) -> None:
    pipeline = build(0)
    names = denoiser_of(pipeline).state_dict().keys()
    with pytest.raises(ValueError, match=message):
        add_adapter(pipeline, config)
    assert denoiser_of(pipeline).state_dict().keys() == names
    assert active_adapters(denoiser_of(pipeline)) == []  # for another try


@pytest.mark.parametrize(
    ("kind", "build"),
    [
        *(pytest.param(kind, pixart_sigma, id=f"{kind}-peft") for kind in sorted(FOR_PEFT | FOR_NOBODY)),
        *(pytest.param(kind, tiny_pipeline, id=f"{kind}-diffusers") for kind in sorted(FOR_PEFT)),
    ],
)
def test_every_type_of_adapter_comes_back_from_its_file_or_is_refused(tmp_path, build, kind):
    if kind not in KNOWN:
        pytest.skip(f"peft {peft.__version__} has no {kind}")
    if installed("peft") < (0, 21) and kind in REFUSED_BY_OLDER_VERSIONS:
        pytest.skip(f"peft {peft.__version__} refuses {kind} {REFUSED_BY_OLDER_VERSIONS[kind]}")
    if kind in (FOR_DIFFUSERS if build is tiny_pipeline else FOR_PEFT):
        check_round_trip(build, config_of(kind), tmp_path)
    else:
        check_refusal(build, config_of(kind), rf"peft_config is {type(config_of(kind)).__name__}\(.*Use a LoraConfig")


HOLDS = None
ALL_OF_LORA: dict[str, list[tuple[Any, str | None]]] = {
    "r": [(3, HOLDS)],
    "target_modules": [
        ("all-linear", HOLDS),
        (["conv_in", "to_q"], HOLDS),
        (["nowhere"], r"peft_config can't be added to UNet2DConditionModel .*Give it target_modules"),
        (None, r"peft_config can't be added to UNet2DConditionModel .*Give it target_modules"),
    ],
    "exclude_modules": [(["to_q"], HOLDS)],
    "lora_alpha": [(16, HOLDS)],
    "lora_dropout": [(0.5, HOLDS)],
    "fan_in_fan_out": [(True, HOLDS)],
    "bias": [(value, rf"peft_config has bias='{value}'.*Leave out bias") for value in ("all", "lora_only")],
    "use_rslora": [(True, HOLDS)],
    "modules_to_save": [(["conv_out"], "peft_config trains a copy of the layer conv_out,.*Leave out modules_to_save")],
    "init_lora_weights": [
        *((value, HOLDS) for value in (True, False, "gaussian", "orthogonal")),
        *((value, f"init_lora_weights='{value}', which needs .*Leave out init") for value in ("eva", "lora_ga")),
        *((value, f"init_lora_weights='{value}'.*Leave out init") for value in ("olora", "pissa", "pissa_niter_2")),
        ("corda", "init_lora_weights='corda'.*preprocess_corda"),
    ],
    "layers_to_transform": [([0], HOLDS)],
    "layers_pattern": [],  # with the field above
    "rank_pattern": [({"to_q": 2}, HOLDS), ({"attn1.to_q": 2, "attn1.to_v": 3}, HOLDS)],
    "alpha_pattern": [({"to_q": 16}, HOLDS)],
    "megatron_config": [({}, HOLDS)],
    "megatron_core": [],  # with the field above
    "trainable_token_indices": [([0], "peft_config can't be added to UNet2DConditionModel")],
    "loftq_config": [],  # for init_lora_weights="loftq", which needs scipy
    "eva_config": [(EvaConfig(), HOLDS)],
    "corda_config": [],  # for init_lora_weights="corda"
    "lora_ga_config": [],  # for init_lora_weights="lora_ga"
    "use_dora": [(True, HOLDS)],
    "alora_invocation_tokens": [([1, 2], "has no effect.*Use a LoraConfig")],
    "use_qalora": [(True, HOLDS)],  # which is for quantized layers
    "qalora_group_size": [],  # with the field above
    "layer_replication": [([(0, 1)], "peft_config can't be added to UNet2DConditionModel")],
    "runtime_config": [(LoraRuntimeConfig(ephemeral_gpu_offload=True), HOLDS)],
    "lora_bias": [(True, HOLDS)],
    "target_parameters": [(["conv_in.weight"], "peft_config can't be added to UNet2DConditionModel")],
    "arrow_config": [(ArrowConfig(), "can't be added to a linear layer")],
    "ensure_weight_tying": [(True, HOLDS)],
}
if installed("peft") >= (0, 21):
    from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

    ALL_OF_LORA["init_lora_weights"].append(("mica", HOLDS))
    ALL_OF_LORA |= {
        "velora_config": [(VeloraConfig(), HOLDS)],
        "monteclora_config": [(MontecloraConfig(), "load_lora_weights does not load .*Use a LoraConfig")],
        "use_bdlora": [(BdLoraConfig(), "can't be added to a linear layer")],
        "kasa_config": [(KasaConfig(), "kasa_config=.*Leave out kasa_config")],
    }

SETTINGS_OF_LORA = {field.name for field in dataclasses.fields(LoraConfig)} - {
    field.name for field in dataclasses.fields(PeftConfig)
}


def test_every_setting_of_lora_is_in_the_table():
    assert ALL_OF_LORA.keys() >= SETTINGS_OF_LORA


@needs_newest("older versions have fewer settings")
def test_every_setting_in_the_table_is_one_of_lora():
    assert ALL_OF_LORA.keys() <= SETTINGS_OF_LORA


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        pytest.param({name: value}, refusal, id=f"{name}={str(value)[:30]}")
        for name, tried in ALL_OF_LORA.items()
        for value, refusal in tried
    ],
)
def test_every_setting_of_lora_comes_back_from_the_file_or_is_refused(tmp_path, settings, refusal):
    if not settings.keys() <= SETTINGS_OF_LORA:
        pytest.skip(f"LoRA in peft {peft.__version__} has no {', '.join(settings)}")
    if "layers_to_transform" in settings:
        settings = {**settings, "layers_pattern": "transformer_blocks", "target_modules": ["to_q"]}
    config = LoraConfig(**{"r": 4, "lora_alpha": 2, "target_modules": FEW_LAYERS, **settings})
    if refusal is None:
        check_round_trip(tiny_pipeline, config, tmp_path)
    else:
        check_refusal(tiny_pipeline, config, refusal)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=FEW_LAYERS, bias="lora_only"), "has bias='lora_only'"),
        (LoraConfig(target_modules=FEW_LAYERS, init_lora_weights="pissa"), "has init_lora_weights='pissa'"),
        (LoraConfig(target_modules=FEW_LAYERS, modules_to_save=["conv_out"]), "trains a copy of the layer conv_out"),
        (config_of("OFT"), r"is OFTConfig\(.*load_lora_weights does not load"),
    ],
)
def test_an_adapter_that_came_with_the_pipeline_is_held_to_the_same(config, message):
    pipeline: Any = tiny_pipeline()
    inject_adapter_in_model(config, pipeline.unet, "mine")
    with pytest.raises(ValueError, match=rf"The adapter mine of pipeline\.unet {message}"):
        add_adapter(pipeline, None)


@pytest.mark.parametrize("came_with_the_pipeline", [False, True])
def test_dropout_is_taken_out_with_a_word(came_with_the_pipeline, tmp_path, caplog):
    pipeline: Any = tiny_pipeline()
    config = LoraConfig(r=2, lora_dropout=0.3, target_modules=["to_q"])
    if came_with_the_pipeline:
        pipeline.unet.add_adapter(config, "mine")
    adapter = add_adapter(pipeline, None if came_with_the_pipeline else config)
    assert "lora_dropout is 0.3, and is set to 0" in caplog.text
    assert config.lora_dropout == 0.3  # the user's own
    save_adapter(pipeline, adapter, tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_dropout"] == 0
    torch.nn.init.normal_(adapter_weights(pipeline)["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q."
                                                    f"lora_B.{adapter}.weight"])  # fmt: skip
    expected = images(pipeline)
    pipeline.unet.train()
    assert torch.equal(images(pipeline), expected)


def test_an_adapter_is_saved_in_float32_though_the_pipeline_is_in_half_precision(tmp_path):
    pipeline = trained(lambda seed: stable_diffusion(seed).to(torch.bfloat16))
    expected = {name.replace(f".{ADAPTER_NAME}", ""): weight for name, weight in adapter_weights(pipeline).items()}
    save_adapter(pipeline, ADAPTER_NAME, tmp_path)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert {name.removeprefix("unet.") for name in saved} == expected.keys()
    for name, weight in expected.items():
        assert saved[f"unet.{name}"].dtype == torch.float32
        assert torch.equal(saved[f"unet.{name}"], weight)
