"""A batch becomes as many calls of the pipeline as it needs, and a call leaves everything as it found it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from conformance.image_pipelines import images, stable_diffusion, stable_diffusion_img2img
from conformance.input_pipelines import INPUT_CASES, cosmos_2, hunyuan_dit_controlnet
from conformance.more_pipelines import MORE_CASES
from conformance.newer_pipelines import flux2_klein
from ddpo_trl.policy.calls import BatchCalls, attention_modules, images_tensor, processors_kept
from ddpo_trl.policy.lora import add_adapter
from ddpo_trl.policy.policy import Policy
from ddpo_trl.policy.records import Context


PROMPTS, SEEDS = ["a cat", "two dogs"], [1, 2]
CASES = {case.name: case for case in INPUT_CASES}
(FLUX_INPAINTING,) = [case for case in MORE_CASES if case.name == "FLUX.1 inpainting"]


def policy_of(pipeline, make_config, **settings):
    config = make_config(num_inference_steps=4, **settings)
    return Policy(pipeline, config, add_adapter(pipeline, None))


# ---- How many calls ----


def test_a_batch_that_a_pipeline_takes_is_one_call(make_config):
    policy = policy_of(stable_diffusion_img2img(0), make_config, pipeline_inputs=["image"])
    context = policy.context(PROMPTS, [{"image": image} for image in images(2)], SEEDS)
    assert policy.runner.calls.split(context) == [context]
    assert policy.runner.calls.one_by_one_reason is None


def test_a_list_that_a_pipeline_reads_as_inputs_of_all_samples_becomes_one_call_per_sample(make_config):
    case = CASES["FLUX.2 klein with a reference image"]
    policy = policy_of(flux2_klein(0), make_config, pipeline_inputs=["image"], pipeline_kwargs=case.pipeline_kwargs)
    assert case.make_inputs is not None
    image, _ = case.make_inputs(2)["image"]
    context = policy.context(PROMPTS, [{"image": image}] * 2, SEEDS)  # the same for both: this does not hide it
    assert [list(call.prompts) for call in policy.runner.calls.split(context)] == [["a cat"], ["two dogs"]]
    assert (
        policy.runner.calls.one_by_one_reason == "in a batch it makes another sample from image than from each alone"
    )


def test_images_of_samples_that_are_made_one_by_one_are_those_of_batches_of_one(make_config):
    policy = policy_of(stable_diffusion(0), make_config, pipeline_inputs=["guidance_rescale"])
    metadata = [{"guidance_rescale": 0.1}, {"guidance_rescale": 0.9}]
    together = policy.sample(policy.context(PROMPTS, metadata, SEEDS), record=range(4))
    for row in range(2):
        alone = policy.sample(policy.context(PROMPTS, metadata, SEEDS).rows([row]), record=range(4))
        assert torch.equal(together.images[row], alone.images[0])
        for index, step in alone.steps.items():
            assert torch.equal(together.steps[index].log_probs[row], step.log_probs[0])


def test_samples_of_different_sizes_are_refused_with_the_sizes_and_the_remedy(make_config):
    policy = policy_of(stable_diffusion(0), make_config, pipeline_inputs=["height", "width"])
    context = policy.context(PROMPTS, [{"height": 16, "width": 16}, {"height": 32, "width": 16}], SEEDS)
    with pytest.raises(ValueError, match=r"different sizes, \(4, 8, 8\) and \(4, 16, 8\): .* set height and width"):
        policy.probe_schedule(context)


def test_inputs_that_change_the_schedule_are_refused_with_the_remedy(make_config):
    settings = {"pipeline_inputs": ["strength"], "pipeline_kwargs": {"image": images(1)[0]}}
    policy = policy_of(stable_diffusion_img2img(0), make_config, **settings)
    context = policy.context(PROMPTS, [{"strength": 0.5}, {"strength": 1.0}], SEEDS)
    with pytest.raises(ValueError, match="strength changes the schedule. Give one value for all in pipeline_kwargs"):
        policy.probe_schedule(context)
    with pytest.raises(ValueError, match="different numbers of steps, 2 and 4: strength changes the schedule"):
        policy.sample(context)


def test_what_a_pipeline_raises_for_a_single_sample_is_raised(make_config):
    policy = policy_of(stable_diffusion_img2img(0), make_config, pipeline_inputs=["image"])
    with pytest.raises(ValueError, match="Input is in incorrect format"):
        policy.probe_schedule(policy.context(PROMPTS, [{"image": "a.png"}, {"image": "b.png"}], SEEDS))


@pytest.mark.parametrize(
    ("guidance_scale", "values", "without_effect"),
    [(3.0, [0.1, 0.9], []), (1.0, [0.1, 0.9], ["guidance_rescale"]), (1.0, [0.5, 0.5], [])],
    ids=["has an effect", "has none", "nothing to compare"],
)
def test_an_input_that_leaves_samples_as_they_are_is_reported(
    make_config, monkeypatch, guidance_scale, values, without_effect
):
    """Without guidance nothing is rescaled."""
    warnings: list[str] = []
    monkeypatch.setattr("ddpo_trl.policy.calls.logger.warning", warnings.append)
    settings = {"guidance_scale": guidance_scale, "pipeline_inputs": ["guidance_rescale"]}
    policy = policy_of(stable_diffusion(0), make_config, **settings)
    policy.probe_schedule(policy.context(PROMPTS, [{"guidance_rescale": value} for value in values], SEEDS))
    assert policy.runner.calls.without_effect == without_effect
    reported = [line for line in warnings if "'guidance_rescale', but with another value of it a sample is" in line]
    assert len(reported) == len(without_effect)


def test_a_mask_that_acts_behind_the_step_has_an_effect(make_config):
    """FLUX puts the image that it is given back around the mask when the step is done."""
    case = FLUX_INPAINTING
    settings = {"pipeline_inputs": list(case.inputs), "pipeline_kwargs": case.pipeline_kwargs}
    policy = policy_of(case.build(0), make_config, **settings)
    assert case.make_inputs is not None
    inputs = case.make_inputs(2)
    metadata = [{name: values[row] for name, values in inputs.items()} for row in range(2)]
    policy.probe_schedule(policy.context(PROMPTS, metadata, SEEDS))
    assert policy.runner.calls.without_effect == []


def calls_of(run, network=None):
    """Calls of a pipeline whose inputs change no image."""
    network = network or Network()
    return BatchCalls(network, run, lambda context: torch.zeros(len(context), 3, 2, 2), is_plain=False)


@pytest.mark.parametrize(
    ("error", "inputs", "calls"),
    [(torch.OutOfMemoryError, {"image": [1, 2]}, 1), (ValueError, {}, 1), (ValueError, {"image": [1, 2]}, 2)],
    ids=["no memory", "no inputs", "inputs, which may be refused in a list only"],
)
def test_what_another_form_of_the_inputs_would_not_help_is_raised_at_once(error, inputs, calls):
    made = []

    def run(context, replay):
        made.append(context)
        raise error("refused")

    with pytest.raises(error):
        calls_of(run).split(Context(prompts=PROMPTS, seeds=SEEDS, inputs=inputs))
    assert len(made) == calls


class Network(torch.nn.Linear):
    """Stands for a denoiser."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        super().__init__(1, 1)


def reason_of(mean, before_network=lambda context: None, hook=None):
    """Why a pipeline is called for each sample that makes `mean` of a context."""
    network = Network()
    if hook is not None:
        network.register_forward_pre_hook(hook)

    def run(context, replay):
        before_network(context)
        network(torch.zeros(1))
        latents = torch.zeros(len(context), 4)
        return SimpleNamespace(latents=latents, mean=latents + mean(context))

    calls = calls_of(run, network)
    calls.split(Context(prompts=PROMPTS, seeds=SEEDS, inputs={"x": [1.0, 2.0]}))
    return calls.one_by_one_reason


def own(context):
    return torch.tensor(context.inputs["x"]).view(-1, 1)


def test_a_sample_that_changes_a_little_with_the_inputs_of_the_others_gets_its_own_call():
    assert reason_of(own) is None
    reason = reason_of(lambda context: own(context) + 1e-5 * len(context) * own(context).max())
    assert reason == "in a batch a sample changes with the x of the others"


def test_a_batch_may_differ_from_its_samples_by_rounding_but_not_in_shape():
    assert reason_of(lambda context: own(context) * (1 + 1e-6 * len(context))) is None
    reason = reason_of(lambda context: own(context) if len(context) == 1 else own(context)[:, None])
    assert reason == "in a batch it makes another sample from x than from each alone"


def test_a_form_of_inputs_that_was_tried_is_not_kept_for_other_calls():
    single = Context(prompts=PROMPTS[:1], seeds=SEEDS[:1], inputs={"image": [1]})
    calls = calls_of(lambda *_: None)
    tried = []

    def run(context):
        tried.append(calls.inputs(context)["image"])
        if isinstance(tried[-1], list):
            raise TypeError("one image, please")

    assert calls.run_either_way(single, run) is True and tried == [[1], 1]
    assert calls.inputs(single)["image"] == [1]


def test_a_draw_in_any_of_the_calls_counts_but_not_that_of_a_hook_of_the_network():
    once = [lambda: torch.rand(1)]
    reason = reason_of(own, before_network=lambda context: once.pop()() if once else None)
    assert reason == "it draws random numbers for all samples of a batch from torch's global generator"
    assert reason_of(own, hook=lambda *_: torch.rand(1) and None) is None


# ---- What a call leaves as it was ----


def test_random_numbers_without_a_generator_depend_on_the_seeds_alone_and_use_up_none_of_the_users(make_config):
    case = CASES["HunyuanDiT ControlNet"]
    settings = {"pipeline_inputs": list(case.inputs), "pipeline_kwargs": case.pipeline_kwargs}
    policy = policy_of(hunyuan_dit_controlnet(0), make_config, **settings)
    assert case.make_inputs is not None
    metadata = [{"control_image": image} for image in case.make_inputs(2)["control_image"]]
    found = []
    for user_seed, rows in ((5, [0, 1]), (6, [1, 0])):
        torch.manual_seed(user_seed)
        before = torch.get_rng_state()
        found.append(policy.sample(policy.context(PROMPTS, metadata, SEEDS).rows(rows), max_steps=2).images)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0], found[1].flip(0))


def test_attention_processors_are_put_back_after_an_error_too():
    pipeline = stable_diffusion(0)
    before = dict(pipeline.unet.attn_processors)
    with pytest.raises(RuntimeError, match="in the middle"), processors_kept(attention_modules([pipeline.unet, None])):
        pipeline.unet.set_attn_processor(type(next(iter(before.values())))())
        assert pipeline.unet.attn_processors != before
        raise RuntimeError("in the middle")
    assert pipeline.unet.attn_processors == before


def test_a_safety_checker_that_a_pipeline_insists_on_stays(make_config):
    """Cosmos refuses to run without."""
    pipeline = cosmos_2(0)
    assert policy_of(pipeline, make_config).runner.policy_pipeline.safety_checker is pipeline.safety_checker


# ---- What comes out ----


@pytest.mark.parametrize(
    "convert",
    [
        lambda pixels: torch.from_numpy(pixels).movedim(-1, -3).float() / 255,
        lambda pixels: pixels.astype(np.float32) / 255,
        lambda pixels: pixels,
        lambda pixels: [Image.fromarray(each) for each in pixels],
        lambda pixels: [torch.from_numpy(each).movedim(-1, -3) / 255 for each in pixels],
    ],
    ids=["tensor", "array", "integers", "PIL images", "tensors"],
)
def test_images_are_the_same_whatever_form_they_come_in(convert):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    tensor = images_tensor(convert(pixels))
    assert tensor.dtype == torch.float32 and tensor.shape == (2, 3, 4, 6)
    assert tensor[1, 2, 3, 5].item() == pytest.approx(pixels[1, 3, 5, 2] / 255)


def test_videos_of_pil_images_have_their_frames_before_their_channels():
    frames = [[Image.new("RGB", (6, 4), (255 * row, 0, 51 * frame)) for frame in range(5)] for row in range(2)]
    tensor = images_tensor(frames)
    assert tensor.shape == (2, 5, 3, 4, 6)
    assert tensor[1, 4, :, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.8])
