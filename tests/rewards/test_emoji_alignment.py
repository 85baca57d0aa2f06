"""The reward EmojiAlignment as it ships: its files, what it knows, and that the demo trains with it."""

import dataclasses
import json
import pickle
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from ddpo_trl import cli, demo, load_emoji_pipeline
from ddpo_trl.cli.demo import parse_arguments
from ddpo_trl.emoji import EMOJI_PATH, emoji_captions
from ddpo_trl.rewards import EmojiAlignment
from ddpo_trl.rewards.emoji import EMOJI_ALIGNMENT_PATH


SAMPLED = [
    "cat face", "panda", "frog", "tomato", "flat pizza", "3d hamburger", "flat nerd face", "3d watermelon", "octopus",
    "rose", "bread", "owl",
]  # fmt: skip


@pytest.fixture(scope="module")
def samples():
    """What the embedded pipeline draws for `SAMPLED`."""
    pipeline = load_emoji_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(SAMPLED))]
    return pipeline(SAMPLED, num_inference_steps=10, guidance_scale=3, generator=generators, output_type="pt").images


def rewards_of(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return torch.tensor(EmojiAlignment()(images, prompts, [{}] * len(prompts)))


@cache
def training_drawings() -> tuple[torch.Tensor, list[str]]:
    """
    Every third of the contact sheet's drawings, cut apart independently of the package, at 64x64, and their styled
    captions.
    """
    sheet = Image.open(EMOJI_PATH / "contact_sheet.png").convert("RGB")
    columns = sheet.width // 32
    images, captions = [], []
    for concept in json.loads((EMOJI_PATH / "concepts.json").read_text()):
        for style, index in concept["tiles"].items():
            left, top = index % columns * 32, index // columns * 32
            tile = sheet.crop((left, top, left + 32, top + 32)).resize((64, 64), Image.Resampling.BICUBIC)
            images.append(torch.from_numpy(np.array(tile)).permute(2, 0, 1) / 255)
            captions.append(f"{style} {concept['caption']}")
    return torch.stack(images[::3]), captions[::3]


def plain_transformers(images: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """CLIP's logits `(images, texts)` by nothing but transformers and the shipped files."""
    model = CLIPModel.from_pretrained(EMOJI_ALIGNMENT_PATH).eval()
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI_ALIGNMENT_PATH)
    processor = CLIPImageProcessorPil.from_pretrained(EMOJI_ALIGNMENT_PATH)
    pictures = [
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()) for image in images
    ]
    inputs = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        return model(
            input_ids=inputs.input_ids, pixel_values=processor(pictures, return_tensors="pt").pixel_values
        ).logits_per_image


def test_the_model_takes_less_than_3_mb_and_credits_its_sources():
    files = [file for file in EMOJI_ALIGNMENT_PATH.rglob("*") if file.is_file()]
    assert 1e6 < sum(file.stat().st_size for file in files) <= 3e6
    assert {file.suffix for file in files} <= {".json", ".safetensors", ""}
    notice = (EMOJI_ALIGNMENT_PATH / "NOTICE").read_text()
    for words in ("Noto Emoji", "Apache License, Version 2.0", "Fluent Emoji", "Microsoft", "emojibase", "MIT"):
        assert words in notice


def test_its_tokenizer_is_the_embedded_pipelines():
    texts = [f"{style}{caption}" for style in ("", "flat ", "3d ") for caption in emoji_captions()]
    own, theirs = (CLIPTokenizer.from_pretrained(path) for path in (EMOJI_ALIGNMENT_PATH, EMOJI_PATH / "tokenizer"))
    assert own(texts).input_ids == theirs(texts).input_ids


def test_the_reward_is_the_log_softmax_that_plain_transformers_gives(samples):
    plain, styled = emoji_captions(), [f"{style} {c}" for style in ("flat", "3d") for c in emoji_captions()]
    log_plain = plain_transformers(samples, plain).log_softmax(1)
    log_styled = plain_transformers(samples, styled).log_softmax(1)
    expected = [
        log_styled[row, styled.index(caption)] if caption in styled else log_plain[row, plain.index(caption)]
        for row, caption in enumerate(SAMPLED)
    ]
    assert torch.allclose(rewards_of(samples, SAMPLED), torch.stack(expected), atol=1e-3)


def test_the_right_caption_beats_wrong_ones_on_samples(samples):
    right = rewards_of(samples, SAMPLED)
    for shift in (1, 4, 7):
        wrong = rewards_of(samples, SAMPLED[shift:] + SAMPLED[:shift])
        assert (right > wrong + 1).float().mean() >= 0.9


def test_of_all_captions_the_right_one_is_first_on_samples_and_on_the_drawings(samples):
    captions = emoji_captions()
    drawings, names = training_drawings()
    for images, shown, least in ((samples, SAMPLED, 0.75), (drawings, names, 0.75)):
        best = plain_transformers(images, captions).argmax(1).tolist()
        right = [
            captions[index] == name.removeprefix("flat ").removeprefix("3d ")
            for index, name in zip(best, shown, strict=True)
        ]
        assert sum(right) / len(right) >= least


def test_noise_instead_of_a_picture_shows_nothing(samples):
    noise = torch.rand(samples.shape, generator=torch.Generator().manual_seed(0))
    assert rewards_of(noise, SAMPLED).max() < rewards_of(samples, SAMPLED).median()


def test_the_style_asked_for_scores_higher():
    drawings, names = training_drawings()
    other = [
        name.replace("flat ", "3d ") if name.startswith("flat ") else name.replace("3d ", "flat ", 1) for name in names
    ]
    assert (rewards_of(drawings, names) > rewards_of(drawings, other)).float().mean() >= 0.9


@pytest.mark.parametrize("phrase", ["a {}", "{} emoji", "{}, please"])
def test_words_around_the_caption_hardly_matter(samples, phrase):
    prompts = [phrase.format(caption) for caption in SAMPLED]
    wrong = prompts[1:] + prompts[:1]
    assert (rewards_of(samples, prompts) > rewards_of(samples, wrong) + 1).float().mean() >= 0.9


def test_batched_scores_are_those_of_single_images(samples):
    metadata: list[dict] = [{}] * len(SAMPLED)
    whole = EmojiAlignment(batch_size=5)(samples, SAMPLED, metadata)
    alone = [EmojiAlignment()(samples[i : i + 1], SAMPLED[i : i + 1], [{}])[0] for i in range(len(SAMPLED))]
    assert whole == pytest.approx(alone, abs=1e-4)


def test_larger_images_are_made_smaller(samples):
    large = F.interpolate(samples, scale_factor=4, mode="bilinear")
    assert torch.allclose(rewards_of(large, SAMPLED), rewards_of(samples, SAMPLED), atol=1.0)


def test_it_loads_late_and_a_pickled_copy_scores_the_same(samples):
    reward = EmojiAlignment()
    assert reward._loaded is None
    scores = reward(samples, SAMPLED, [{}] * len(SAMPLED))
    assert pickle.loads(pickle.dumps(reward))(samples, SAMPLED, [{}] * len(SAMPLED)) == scores


@pytest.mark.slow
def test_the_demo_trains_with_it_on_prompts_that_the_pipeline_does_not_know(tmp_path, monkeypatch, capsys):
    task = demo.TASKS["emoji_alignment"]
    task = dataclasses.replace(task, captions=task.captions[:16], eval_seeds=1)
    monkeypatch.setitem(demo.TASKS, "emoji_alignment", task)
    flags = [
        "--total_episodes", "4", "--per_device_sample_batch_size", "4", "--num_sample_batches", "1",
        "--num_images_per_prompt", "2", "--per_device_train_batch_size", "4", "--num_inference_steps", "3",
        "--num_mini_batches", "1", "--num_logged_images", "2", "--disable_tqdm", "true", "--output_dir", str(tmp_path),
    ]  # fmt: skip
    cli.main(["demo", "--reward", "emoji_alignment", *flags])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["reward"] == "EmojiAlignment"
    assert summary["eval_reward_before"] < 0
    assert 0 < summary["recognized_before"] < 0.9
    assert summary["recognized_gain"] == pytest.approx(summary["recognized_after"] - summary["recognized_before"])
    assert "nats" in capsys.readouterr().out


def test_the_demos_other_rewards_keep_their_defaults(tmp_path):
    for reward in ("jpeg_compressibility", "jpeg_incompressibility"):
        arguments, config = parse_arguments(["--output_dir", str(tmp_path), "--reward", reward])
        assert arguments.stop_at_gain == 0.18
        plain = parse_arguments(["--output_dir", str(tmp_path)])[1]
        assert config.to_dict() == plain.to_dict()
        assert (config.guidance_scale, config.num_train_epochs) == (2.5, 14)
        assert demo.TASKS[reward].prompts() == demo.PROMPTS
