"""The doctor: it tells what stands in the way, in one sentence with a remedy, and leaves the pipeline as it was."""

import functools
import re
from typing import Any, ClassVar

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMPipeline,
    EDMEulerScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DModel,
)
from peft import LoraConfig
from safetensors.torch import load_file

from conformance.image_pipelines import IMAGE_CASES
from conformance.more_pipelines import WAN_2_2
from conftest import tiny_pipeline
from ddpo_trl import DDPOTrainer, check_pipeline, cli
from ddpo_trl.emoji import EMOJI_PATH


CASES = {case.name: case for case in IMAGE_CASES}
PROMPTS = ("a cat", "two dogs")


def state(pipeline) -> dict[str, Any]:
    """What a trial could change about the networks."""
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {
        f"{name}.{key}": value
        for name, network in networks.items()
        for key, value in (
            *(
                (key, (parameter.requires_grad, parameter.sum().item()))
                for key, parameter in network.named_parameters()
            ),
            *((f"{key} training", module.training) for key, module in network.named_modules()),
        )
    }


def test_the_embedded_pipeline_can_be_trained():
    report = check_pipeline(tiny_pipeline(), prompts=PROMPTS)
    assert report.problem is None
    assert report.notes == []
    assert report.replay_differences == {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0}
    assert report.image_shape == (3, 16, 16)
    assert report.denoiser.startswith("unet: UNet2DConditionModel")
    assert report.scheduler == "DDIMScheduler as DDIMPolicyScheduler"
    assert "to_k, to_out.0, to_q, to_v" in report.adapter


def test_a_trajectory_takes_the_memory_of_its_states_and_log_probs():
    report = check_pipeline(tiny_pipeline(), prompts=PROMPTS)
    assert report.trajectory_bytes == (5 * 4 * 8 * 8 + 4) * 4  # float32: five states for four steps, four log-probs


def test_training_memory_is_that_of_the_activations(make_config):
    """It grows with the image's area, and gradient checkpointing lowers it."""
    small, large = (
        check_pipeline(tiny_pipeline(), make_config(pipeline_kwargs={"height": size, "width": size}), PROMPTS)
        for size in (32, 64)
    )
    assert 3 < large.training_bytes / small.training_bytes < 16  # between linear and quadratic in the area
    pipeline = tiny_pipeline()
    pipeline.unet.enable_gradient_checkpointing()
    checkpointed = check_pipeline(pipeline, make_config(pipeline_kwargs={"height": 64, "width": 64}), PROMPTS)
    assert checkpointed.problem is None
    assert checkpointed.training_bytes < large.training_bytes / 2


@pytest.mark.parametrize("fault", [None, "sampling"])
def test_the_pipeline_is_left_as_it_was(fault):
    pipeline = tiny_pipeline()
    pipeline.unet.train()
    pipeline.text_encoder.requires_grad_(False)
    if fault == "sampling":
        pipeline.vae.decode = None
    before = state(pipeline)
    report = check_pipeline(pipeline, prompts=PROMPTS)
    assert (report.problem is None) == (fault is None)
    assert state(pipeline) == before
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    pipeline.unet.add_adapter(LoraConfig(target_modules=["to_q"]))  # no trace of another one


def test_an_adapter_that_is_there_is_the_one_that_is_tried():
    pipeline = tiny_pipeline()
    pipeline.unet.add_adapter(LoraConfig(r=3, target_modules=["conv1"], init_lora_weights=False), "mine")
    before = state(pipeline)
    report = check_pipeline(pipeline, prompts=PROMPTS)
    assert report.problem is None
    assert ": conv1;" in report.adapter
    assert state(pipeline) == before
    assert pipeline.unet.active_adapters() == ["mine"]


def test_training_the_denoisers_own_weights_is_checked_as_the_trainer_would(make_config):
    pipeline = tiny_pipeline()
    before = state(pipeline)
    report = check_pipeline(pipeline, make_config(use_lora=False), PROMPTS)
    assert report.problem is None and report.adapter == ""
    assert state(pipeline) == before
    report = check_pipeline(tiny_pipeline().to(torch.bfloat16), make_config(use_lora=False), PROMPTS)
    assert report.problem is not None and "use_lora is False" in report.problem and "float32" in report.problem


def tiny_with(**changes: Any):
    pipeline: Any = tiny_pipeline()
    for name, value in changes.items():
        pipeline.register_modules(**{name: value})
    return pipeline


def noisy_denoiser():
    pipeline = tiny_pipeline()
    pipeline.unet.register_forward_hook(lambda *args: (args[2][0] + torch.randn_like(args[2][0]),))
    return pipeline


def overflowing_decoder():
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(float("nan"))
    return pipeline


def blind_denoiser():
    """Its output does not depend on what is in it."""
    pipeline = tiny_pipeline()
    pipeline.unet.register_forward_hook(lambda *args: (torch.zeros_like(args[2][0]).requires_grad_(),))
    return pipeline


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: tiny_with(scheduler=EDMEulerScheduler()), r"scheduler is EDMEulerScheduler, .*Set pipeline"),
        (
            lambda: tiny_with(scheduler=CMStochasticIterativeScheduler()),
            r"pipeline\.scheduler is CMStochasticIterativeScheduler, .*Set pipeline",
        ),
        (lambda: tiny_with(scheduler=DDIMScheduler()), r"clip_sample is True: .*Switch it off with"),
        (noisy_denoiser, r"another log-probability in training than in sampling: .*The step is random"),
        (overflowing_decoder, r"images are between nan and nan; .*Look for half precision"),
        (blind_denoiser, r"Every gradient is zero"),
        (
            lambda: DDPMPipeline(UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",),
                                 up_block_types=("UpBlock2D",)), DDIMScheduler(clip_sample=False)),
            r"DDPMPipeline, whose __call__ takes no prompt",
        ),
    ],
)  # fmt: skip
def test_what_stands_in_the_way_is_named_with_the_remedy(make, sentence):
    report = check_pipeline(make(), prompts=PROMPTS)
    assert report.problem is not None
    assert re.search(sentence, report.problem), report.problem
    assert report.rows()[-1] == ("verdict", report.problem)


def test_a_missing_image_is_named_with_the_remedy(make_config):
    case = CASES["Stable Diffusion ControlNet"]
    report = check_pipeline(case.build(0), make_config(), PROMPTS)
    assert report.problem is not None
    assert "image" in report.problem and "pipeline_inputs" in report.problem


def test_an_option_that_acts_by_the_position_in_the_loop_is_found_out(make_config):
    """A replayed step is the first of its loop, so a ControlNet that stops half-way through can't be replayed."""
    case = CASES["Stable Diffusion ControlNet"]
    inputs = case.make_inputs(2) if case.make_inputs else {}
    metadata = [{name: values[row] for name, values in inputs.items()} for row in range(2)]
    config = make_config(pipeline_inputs=["image"], pipeline_kwargs={"control_guidance_end": 0.5})
    report = check_pipeline(case.build(0), config, PROMPTS, metadata)
    assert report.problem is not None and "an option in pipeline_kwargs" in report.problem
    assert report.replay_differences[0] == 0.0


def test_an_option_that_acts_on_later_steps_only_is_found_out_at_a_small_difference(make_config):
    case = CASES["Stable Diffusion 3"]
    options = {**case.pipeline_kwargs, "skip_guidance_layers": [0]}
    report = check_pipeline(case.build(0), make_config(num_inference_steps=10, pipeline_kwargs=options), PROMPTS)
    assert report.problem is not None and "position in the loop" in report.problem


def test_every_trainable_step_is_asked_for_a_gradient():
    """As Wan 2.2, which hands over to another network half-way through."""
    pipeline: Any = tiny_pipeline()
    forward = pipeline.unet.forward

    def hand_over(sample, timestep, *args, **kwargs):
        with torch.set_grad_enabled(torch.is_grad_enabled() and float(timestep) > 500):
            return forward(sample, timestep, *args, **kwargs)

    pipeline.unet.forward = hand_over
    report = check_pipeline(pipeline, prompts=PROMPTS)
    assert report.problem is not None
    assert "No gradient reaches pipeline.unet at step 2" in report.problem


def test_the_remedy_for_steps_of_another_network_is_one(make_config):
    settings = {"guidance_scale": 3.0, "num_inference_steps": 4, "pipeline_kwargs": WAN_2_2.pipeline_kwargs}
    report = check_pipeline(WAN_2_2.build(0), make_config(**settings), PROMPTS)
    assert report.problem is not None
    assert "another network there. Leave such steps out with train_timestep_range" in report.problem
    report = check_pipeline(WAN_2_2.build(0), make_config(**settings, train_timestep_range=(0.0, 0.25)), PROMPTS)
    assert report.problem is None and list(report.replay_differences) == [0]


def test_a_fused_adapter_is_not_taken_for_another_network():
    pipeline: Any = tiny_pipeline()
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "mine")
    pipeline.fuse_lora()
    report = check_pipeline(pipeline, prompts=PROMPTS)
    assert report.problem is not None and "unfuse_lora" in report.problem


def counted(function):
    @functools.wraps(function)
    def count(self, *args, **kwargs):
        self.calls.append(type(self).__name__)
        return function(self, *args, **kwargs)

    return count


class Decorated(StableDiffusionPipeline):
    """Counts its calls, and calls the stock pipeline, which is decorated with `no_grad`."""

    calls: ClassVar[list[str]] = []

    @counted
    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps, generator, output_type, return_dict=True, guidance_scale=5.0):
        return super().__call__(
            prompt,
            num_inference_steps=num_inference_steps,
            generator=generator,
            output_type=output_type,
            return_dict=return_dict,
            guidance_scale=guidance_scale,
        )


def test_a_subclass_that_calls_super_is_differentiated_and_keeps_its_own_decorator():
    pipeline = Decorated(**tiny_pipeline().components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    report = check_pipeline(pipeline, prompts=PROMPTS)
    assert report.problem is None, report.problem
    assert set(Decorated.calls) == {"Decorated"}


class InSections(StableDiffusionPipeline):
    """As FramePack, which makes a video in sections: each has a schedule of its own."""

    def __call__(self, prompt, num_inference_steps, generator, output_type, return_dict=True, guidance_scale=5.0):
        for _ in range(2):
            images = super().__call__(
                prompt,
                num_inference_steps=num_inference_steps,
                generator=generator,
                output_type=output_type,
                return_dict=return_dict,
                guidance_scale=guidance_scale,
            )
        return images


def test_a_step_that_would_be_recorded_twice_is_refused_by_the_doctor_and_at_construction(make_config):
    pipeline = InSections(**tiny_pipeline().components, requires_safety_checker=False)
    report = check_pipeline(pipeline, prompts=PROMPTS)
    assert report.problem is not None and report.problem.startswith("The pipeline starts another schedule")
    with pytest.raises(ValueError, match="starts another schedule in the same __call__"):
        DDPOTrainer(make_config(), lambda images, prompts, metadata: images.flatten(1).mean(1), PROMPTS, pipeline)


def test_the_pipelines_own_error_is_told_as_its_own(make_config):
    report = check_pipeline(tiny_pipeline(), make_config(pipeline_kwargs={"height": 7, "width": 7}), PROMPTS)
    assert report.problem is not None
    assert report.problem.startswith("ValueError in StableDiffusionPipeline: `height` and `width`")


def test_a_half_precision_adapter_stays_one():
    pipeline = tiny_pipeline()
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "mine")
    pipeline.to(torch.bfloat16)
    assert check_pipeline(pipeline, prompts=PROMPTS).problem is None
    assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {torch.bfloat16}


def test_steps_without_noise_leave_nothing_to_train_on(make_config):
    pipeline = tiny_pipeline(set_alpha_to_one=True)
    report = check_pipeline(pipeline, make_config(num_inference_steps=1), PROMPTS)
    assert report.problem is not None and "None of the 1 steps is stochastic" in report.problem


def test_an_error_inside_the_pipeline_is_a_finding():
    pipeline = tiny_pipeline()
    pipeline.vae.decode = None
    report = check_pipeline(pipeline, prompts=PROMPTS)
    assert report.problem is not None and report.problem.startswith("TypeError in StableDiffusionPipeline: ")


# ---- The command ----


def test_the_command_says_what_it_found_and_exits_accordingly(capsys):
    assert cli.main(["doctor", str(EMOJI_PATH), "--use_cpu", "true", "--num_inference_steps", "2"]) == 0
    assert "can be trained" in capsys.readouterr().out
    assert cli.main(["doctor", str(EMOJI_PATH), "--use_cpu", "true", "--pipeline_kwargs", '{"heigth": 8}']) == 1
    assert "heigth" in capsys.readouterr().out


def test_the_command_hands_over_an_image(tmp_path, capsys):
    pytest.importorskip("PIL").Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    CASES["Stable Diffusion image-to-image"].build(0).save_pretrained(tmp_path / "pipeline")
    command = ["doctor", str(tmp_path / "pipeline"), "--use_cpu", "true"]
    image = ["--pipeline_inputs", "image", "--image", str(tmp_path / "red.png")]
    assert cli.main([*command, *image]) == 0
    assert StableDiffusionImg2ImgPipeline.__name__ in capsys.readouterr().out


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_pickled_weights_are_not_read(tmp_path, capsys, component):
    tiny_pipeline().save_pretrained(tmp_path)
    (weights,) = (tmp_path / component).glob("*.safetensors")
    name = "pytorch_model.bin" if component == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(load_file(weights), tmp_path / component / name)
    weights.unlink()
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", str(tmp_path), "--use_cpu", "true"])
    assert stop.value.code == 2
    assert "safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["nowhere"], [], [str(EMOJI_PATH), "--dtype", "float7"], [str(EMOJI_PATH), "--eta", "0"]]
)
def test_wrong_usage_is_refused(arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", *arguments])
    assert stop.value.code == 2
