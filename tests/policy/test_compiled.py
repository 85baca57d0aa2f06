"""Compiled denoisers: compiled in place, a bounded number of times, with the replay and the files of others."""

from typing import Any

import pytest
import torch
from accelerate.utils import DynamoBackend
from diffusers import UNet2DModel
from torch._dynamo.testing import CompileCounter
from transformers import TrainerCallback

from conformance.image_pipelines import flux
from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOTrainer
from ddpo_trl.policy.denoiser import compile_in_place, is_compiled
from ddpo_trl.policy.policy import Policy
from test_trainer import PROMPTS, lora_weights, relative_difference


@pytest.fixture(autouse=True)
def own_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole_unet(backend: Any) -> Any:
    pipeline: Any = tiny_pipeline()
    pipeline.unet.compile(backend=backend)
    return pipeline


def blocks_of_a_unet(backend: Any) -> Any:
    pipeline: Any = tiny_pipeline()
    pipeline.unet.compile_repeated_blocks(backend=backend)
    return pipeline


FLUX = {"pipeline_kwargs": {"height": 32, "width": 32}}


def blocks_of_a_transformer(backend: Any) -> Any:
    pipeline: Any = flux(0)
    pipeline.transformer.compile_repeated_blocks(backend=backend)
    return pipeline


@pytest.mark.parametrize(
    ("build", "plain", "settings"),
    [
        pytest.param(whole_unet, tiny_pipeline, {}, marks=pytest.mark.slow),
        pytest.param(blocks_of_a_unet, tiny_pipeline, {}, marks=pytest.mark.slow),
        pytest.param(blocks_of_a_transformer, lambda: flux(0), FLUX, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_denoiser_is_replayed_to_the_bit_and_compiled_in_the_first_round_only(
    make_config, tmp_path, build, plain, settings
):
    counter = CompileCounter()  # runs each graph as it is: differences would be of what was compiled, not of kernels
    settings = {"num_train_epochs": 3, "num_mini_batches": 2, "kl_coef": 0.1, **settings}
    trainer = DDPOTrainer(make_config(**settings), brightness, PROMPTS, build(counter))
    graphs = []
    trainer.add_callback(OnRound(lambda: graphs.append(counter.frame_count)))
    trainer.train()
    assert len(graphs) == 3 and len({*graphs}) == 1
    assert {log["val/ratio_deviation"] for log in trainer.state.log_history if "val/ratio_deviation" in log} == {0.0}

    expected = DDPOTrainer(make_config(**settings), brightness, PROMPTS, plain())
    expected.train()
    assert relative_difference(lora_weights(expected), lora_weights(trainer)) < 1e-4
    assert expected.model.state_dict().keys() == trainer.model.state_dict().keys()
    trainer.save_model()
    plain().load_lora_weights(tmp_path / "run")


def test_torch_compile_compiles_the_denoiser_in_place_and_not_the_policy(make_config):
    trainer = DDPOTrainer(
        make_config(torch_compile=True, torch_compile_backend="eager"), brightness, PROMPTS, tiny_pipeline()
    )
    policy: Any = trainer.model
    assert is_compiled(policy.denoiser) and isinstance(policy, Policy)
    assert trainer.accelerator.state.dynamo_plugin.backend == DynamoBackend.NO
    assert "pipeline.unet is compiled, and hooks" in (trainer.plan.one_pass_disabled_reason or "")
    trainer.train()
    assert isinstance(trainer.model_wrapped, Policy)
    assert {log["val/ratio_deviation"] for log in trainer.state.log_history if "val/ratio_deviation" in log} == {0.0}


def test_a_denoiser_without_repeated_blocks_is_compiled_as_a_whole():
    unet: Any = UNet2DModel(
        sample_size=8, block_out_channels=(4,), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    assert not is_compiled(unet)
    compile_in_place(unet, backend="eager", mode=None)
    assert is_compiled(unet)


def test_one_pass_of_a_compiled_denoiser_is_refused_with_the_remedy(make_config):
    pipeline: Any = tiny_pipeline()
    pipeline.unet.conv_in.compile(backend="eager")
    with pytest.raises(ValueError, match=r"one_pass is True, but pipeline\.unet is compiled, .*Leave one_pass out"):
        DDPOTrainer(make_config(one_pass=True), brightness, PROMPTS, pipeline)


def test_a_compiler_in_accelerates_config_is_refused_with_the_remedy(make_config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match=r"dynamo_backend is INDUCTOR.*set torch_compile=True"):
        DDPOTrainer(make_config(), brightness, PROMPTS, tiny_pipeline())


class OnRound(TrainerCallback):
    """Call a function at the end of each round."""

    def __init__(self, function: Any):
        self.function = function

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.function()
