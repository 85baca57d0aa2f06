"""The model card: metadata that the Hub understands, and a page that tells how to use the model. More: test_hub.py."""

import ast
import os
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from huggingface_hub import ModelCard, metadata_load
from PIL import Image

from conformance import checks
from conformance.image_pipelines import PIXART_KWARGS, pixart_sigma
from conftest import brightness, tiny_pipeline
from ddpo_trl import DDPOConfig, DDPOTrainer, load_emoji_pipeline
from ddpo_trl.artifacts import record
from ddpo_trl.artifacts.code_example import written_arguments
from ddpo_trl.artifacts.model_card import write_model_card
from ddpo_trl.policy.lora import add_adapter
from ddpo_trl.policy.policy import Policy
from ddpo_trl.versions import DTYPE


def write_card(directory: Any, pipeline: Any, config: Any, **arguments: Any) -> Any:
    """The card of a pipeline with the default adapter."""
    write_model_card(
        directory,
        **{
            "model_name": "ours",
            "repo_id": "me/ours",
            "policy": Policy(pipeline, config, add_adapter(pipeline, None) if config.use_lora else None),
            "config": config,
            "prompt": "a cat",
            "inputs": {},
            "tags": ["trl", "ddpo", "lora", "diffusers"],
            "dataset_name": None,
            "rewards": {"brightness": 1.0},
            "log_history": [],
            "paper": DDPOTrainer._paper,
            **arguments,
        },
    )
    return ModelCard.load(directory / "README.md")


def card_of(name: str, directory: Any, **settings: Any) -> Any:
    """The card of one of the conformance suite's pipelines."""
    case = next(case for case in checks.CASES if case.name == name)
    return write_card(directory, case.build(0), checks.config(case, **settings))


def example(card: ModelCard) -> str:
    return card.text.split("```python\n")[1].split("```")[0]


def arguments_of_call(card: ModelCard) -> dict[str, Any]:
    """What the example's last line gives to the pipeline."""
    assignment = ast.parse(example(card)).body[-1]
    call = next(node for node in ast.walk(assignment) if isinstance(node, ast.Call))
    return {
        "prompt": ast.literal_eval(call.args[0]),
        **{keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg},
    }


# ---- The trainer's ----


def test_the_trainers_card_names_model_rewards_settings_and_versions(make_config, tmp_path):
    def held_out(images, prompts, metadata):
        return -images.flatten(1).mean(1)

    trainer = DDPOTrainer(
        make_config(eval_strategy="epoch"),
        brightness,
        ["cat", "dog"],
        tiny_pipeline(),
        eval_prompts=["cat"],
        eval_reward_fn=held_out,
    )
    trainer.train()
    trainer.model.model_tags = ["trackio"]  # as transformers' TrackioCallback does
    trainer.create_model_card(model_name="me/brighter", tags="bright", dataset_name="me/prompts")
    card: Any = ModelCard.load(tmp_path / "run" / "README.md")
    assert {"trl", "ddpo", "lora", "diffusers", "trackio", "bright"} < set(card.data.tags)
    assert card.data.datasets == "me/prompts"
    assert 'pipeline.load_lora_weights("me/brighter")' in card.text
    reward = next(log["reward"] for log in trainer.state.log_history if "reward" in log)
    evaluation = next(log["eval_reward"] for log in trainer.state.log_history if "eval_reward" in log)
    assert f"| `brightness` | 1 | {reward:.4g} | {reward:.4g} | {evaluation:.4g} |" in card.text
    assert "| `held_out` | not trained for | – | – | -" in card.text
    assert "| `guidance_scale` | 3.0 |" in card.text
    assert "- diffusers: " in card.text and "- trl: " in card.text
    assert "8 reward queries" in card.text


def test_the_metadata_are_what_the_hubs_own_reader_reads(make_config, tmp_path):
    card = write_card(tmp_path, tiny_pipeline(), make_config())
    assert metadata_load(tmp_path / "README.md") == card.data.to_dict()


# ---- What depends on the pipeline ----


@pytest.mark.parametrize(
    ("name", "task", "result"),
    [
        ("Stable Diffusion 1.x", "text-to-image", ".images[0]"),
        ("Wan 2.1", "text-to-video", ".frames[0]"),
        ("CogVideoX", "text-to-video", ".frames[0]"),
        ("Stable Diffusion inpainting", "image-to-image", ".images[0]"),
    ],
)
def test_the_pipeline_tag_is_what_the_pipeline_does(tmp_path, name, task, result):
    card = card_of(name, tmp_path)
    assert card.data.pipeline_tag == task
    assert task in card.data.tags
    assert example(card).rstrip().endswith(result)


def test_the_example_calls_the_pipeline_as_training_did(tmp_path):
    inpainting = card_of("Stable Diffusion inpainting", tmp_path, num_inference_steps=7)
    expected = {"num_inference_steps": "7", "guidance_scale": "3.0", "image": "image", "mask_image": "mask_image"}
    assert arguments_of_call(inpainting) == {"prompt": "a cat", **expected}
    assert 'mask_image = load_image("mask_image.png")' in example(inpainting)
    qwen = arguments_of_call(card_of("Qwen-Image", tmp_path))
    assert qwen["true_cfg_scale"] == "4.0" and qwen["negative_prompt"] == "' '"
    assert "guidance_scale" not in qwen


def test_the_example_loads_half_precision_as_such(make_config, tmp_path):
    card = write_card(tmp_path, tiny_pipeline().to(torch.bfloat16), make_config(bf16=True))
    assert example(card).startswith("import torch\nfrom diffusers")
    load = 'StableDiffusionPipeline.from_pretrained("path/to/the/base/pipeline", '
    assert f"{load}{DTYPE}=torch.bfloat16)" in card.text


@pytest.mark.parametrize("prompt", ['a "quoted" cat', "back\\slash", "two\nlines", "Katze, größer: #1 'x'", "---"])
def test_any_prompt_makes_a_valid_card(make_config, tmp_path, prompt):
    add_samples(tmp_path / "run", prompt)
    card = write_card(tmp_path / "run", tiny_pipeline(), make_config(), prompt=prompt)
    assert arguments_of_call(card)["prompt"] == prompt
    assert [entry["text"] for entry in card.data["widget"]] == [prompt, f"{prompt} (before training)"]


def test_a_base_on_this_machine_is_not_named(make_config, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    pipeline = type(tiny_pipeline()).from_pretrained(tmp_path / "base")
    card = write_card(tmp_path, pipeline, make_config())
    assert card.data.base_model is None and "base_model_relation" not in card.data
    assert str(tmp_path) not in card.content
    assert 'from_pretrained("path/to/the/base/pipeline")' in card.text


def test_the_example_of_the_embedded_pipeline_runs(make_config, tmp_path):
    config = make_config(num_inference_steps=2)
    pipeline = load_emoji_pipeline()
    card = write_card(tmp_path, pipeline, config, repo_id=str(tmp_path))
    Policy(pipeline, config, add_adapter(pipeline, None)).save(tmp_path)
    names: dict[str, Any] = {}
    exec(example(card), names)
    assert names["image"].size == (64, 64)


def image_of_example(directory: Any, build: Any, config: Any, inputs: dict[str, Any], change: Any) -> Any:
    """The image that a policy makes and the one that its card's example makes of the same noise; both as arrays."""
    base = build()
    base.save_pretrained(directory / "base")
    pipeline = type(base).from_pretrained(directory / "base")
    change(pipeline)
    policy = Policy(pipeline, config, add_adapter(pipeline, None) if config.use_lora else None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    policy.save(directory / "run")
    card = write_card(
        directory / "run", pipeline, config, policy=policy, repo_id=str(directory / "run"), inputs=inputs
    )
    code = example(card).replace("path/to/the/base/pipeline", str(directory / "base"))
    assert code.count("= pipeline(") == 1
    names: dict[str, Any] = {"noise": torch.Generator().manual_seed(5)}
    exec(code.replace("= pipeline(", "= pipeline(generator=[noise], prompt="), names)
    (expected,) = policy.generate(policy.context(["a cat"], [inputs], [5]))
    return expected.permute(1, 2, 0).numpy(), np.asarray(names["image"]) / 255


def other_scheduler(pipeline: Any) -> None:
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)


def nothing(pipeline: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("settings", "inputs", "change"),
    [
        ({}, {}, nothing),
        ({"use_lora": False}, {}, nothing),
        ({}, {}, other_scheduler),
        ({"num_inference_steps": 3}, {}, nothing),
        ({"guidance_scale": None}, {}, nothing),
        ({"pipeline_kwargs": {"negative_prompt": "dull"}}, {}, nothing),
        ({"pipeline_kwargs": {"cross_attention_kwargs": {"scale": 3.0}}}, {}, nothing),
        ({"pipeline_kwargs": {"height": 24, "width": 32, "guidance_rescale": 0.7}}, {}, nothing),
        ({"pipeline_inputs": ["negative_prompt"]}, {"negative_prompt": "a dog"}, nothing),
    ],
    ids=["LoRA", "full", "scheduler", "steps", "guidance", "negative", "cross attention", "size", "input"],
)
def test_the_example_makes_the_image_that_the_run_would(make_config, tmp_path, settings, inputs, change):
    config = make_config(**settings)
    expected, actual = image_of_example(tmp_path / "as it was", tiny_pipeline, config, inputs, change)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=0.51 / 255)  # of a picture's integers
    if settings or change is not nothing:  # which matter
        plain, _ = image_of_example(tmp_path / "plain", tiny_pipeline, make_config(), {}, nothing)
        assert plain.shape != expected.shape or np.abs(plain - expected).max() > 2 / 255


def test_the_example_loads_pefts_format(make_config, tmp_path):
    config = make_config(pipeline_kwargs=PIXART_KWARGS)
    expected, actual = image_of_example(tmp_path, lambda: pixart_sigma(0), config, {}, nothing)
    np.testing.assert_allclose(actual, expected, atol=0.51 / 255)


def test_what_cant_be_written_into_the_example_is_named_there(tmp_path):
    values = {"width": torch.tensor(8), "prompt_attention": {"scale": [0.5, None, True]}, "beside": float("inf")}
    config = DDPOConfig(pipeline_kwargs=values, pipeline_inputs=["image", "strength"], use_cpu=True)
    inputs = {"image": Image.new("RGB", (2, 2)), "strength": 0.3}
    written, defined = written_arguments(config, inputs)
    assert 'prompt_attention={"scale": [0.5, None, True]}'.replace('"', "'") in written
    assert {"width=width", "beside=beside", "image=image", "strength=0.3"} < set(written)
    assert defined == [
        "width = ...  # the Tensor of the run",
        "beside = ...  # the float of the run",
        'image = load_image("image.png")',
    ]


# ---- Papers ----


@pytest.mark.parametrize(
    ("name", "settings", "cited"),
    [
        ("Stable Diffusion 1.x", {}, []),
        ("Stable Diffusion 3", {}, ["2505.05470"]),
        ("Stable Diffusion 3", {"sde_type": "cps", "sde_window_size": 2}, ["2509.05952", "2507.21802"]),
    ],
)
def test_the_papers_of_what_was_used_are_cited(tmp_path, name, settings, cited):
    text = card_of(name, tmp_path, **settings).text
    assert "@inproceedings{black2024training," in text
    assert [paper for paper in ("2505.05470", "2509.05952", "2507.21802") if paper in text] == cited
    assert ("| `eta` |" in text) == (name == "Stable Diffusion 1.x")
    assert ("| `sde_type` |" in text) == (name == "Stable Diffusion 3")


# ---- Pictures ----


def add_samples(directory: Any, *prompts: str, frames: int = 1) -> None:
    """What a run leaves of its fixed prompts before training and after round 7."""
    for round, colour in ((0, "red"), (7, "green")):
        images = [
            record.LoggedImage(
                kind="fixed",
                index=index,
                frames=[Image.new("RGB", (8, 8), colour)] * frames,
                prompt=prompt,
                seed=index,
                reward=0.0,
                rewards={},
            )
            for index, prompt in enumerate(prompts)
        ]
        record.write_samples(directory, round, images)


def test_the_gallery_has_each_prompt_once_before_and_after_training(make_config, tmp_path):
    add_samples(tmp_path, "cat", "dog", "cat", "owl", "pig", "fox")
    card = write_card(tmp_path, tiny_pipeline(), make_config())
    shown = {entry["text"]: entry["output"]["url"] for entry in card.data["widget"]}
    assert set(shown) == {f"{prompt}{when}" for prompt in ("cat", "dog", "owl", "pig") for when in ("", BEFORE)}
    assert Image.open(tmp_path / shown["owl"]).getpixel((0, 0)) == (0, 128, 0)
    assert Image.open(tmp_path / shown[f"owl{BEFORE}"]).getpixel((0, 0)) == (255, 0, 0)
    assert "<Gallery />" in card.text


BEFORE = " (before training)"


def test_videos_are_shown_as_such(make_config, tmp_path):
    add_samples(tmp_path, "cat", frames=2)
    card = write_card(tmp_path, tiny_pipeline(), make_config())
    assert [os.path.splitext(entry["output"]["url"])[1] for entry in card.data["widget"]] == [".gif", ".gif"]


def test_without_pictures_the_card_shows_none(make_config, tmp_path):
    card = write_card(tmp_path, tiny_pipeline(), make_config())
    assert "widget" not in card.data and "<Gallery />" not in card.text and "![" not in card.text
