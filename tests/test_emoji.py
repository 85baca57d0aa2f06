"""The embedded pipeline: what it is made of, what it draws, and the measure that says so."""

import json
import warnings
from functools import cache

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open

from ddpo_trl.emoji import (
    EMOJI_PATH,
    emoji_captions,
    load_emoji_pipeline,
    nearest_captions,
    recognized_share,
)


SAMPLED = ["cat face", "panda", "frog", "tomato", "flat pizza", "3d hamburger", "flat nerd face", "3d watermelon"]


@cache
def contact_sheet_tiles() -> dict[str, torch.Tensor]:
    """Cuts the sheet independently of the package: styled caption -> `(3, 32, 32)`."""
    sheet = Image.open(EMOJI_PATH / "contact_sheet.png").convert("RGB")
    columns = sheet.width // 32
    tiles = {}
    for concept in json.loads((EMOJI_PATH / "concepts.json").read_text()):
        for style, index in concept["tiles"].items():
            left, top = index % columns * 32, index // columns * 32
            pixels = torch.from_numpy(np.array(sheet.crop((left, top, left + 32, top + 32))))
            tiles[f"{style} {concept['caption']}"] = pixels.permute(2, 0, 1) / 255
    return tiles


@pytest.fixture(scope="module")
def pipeline():
    pipeline = load_emoji_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def samples(pipeline):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(SAMPLED))]
    return pipeline(SAMPLED, num_inference_steps=10, guidance_scale=4, generator=generators, output_type="pt").images


class TestPipelineFolder:
    def test_plain_from_pretrained_loads_and_draws_it(self, pipeline):
        plain = StableDiffusionPipeline.from_pretrained(EMOJI_PATH)
        plain.set_progress_bar_config(disable=True)
        call = {"prompt": "dog face", "num_inference_steps": 2, "guidance_scale": 4, "output_type": "pt"}
        image = plain(**call, generator=torch.Generator().manual_seed(0)).images
        assert image.shape == (1, 3, 64, 64)
        assert torch.equal(image, pipeline(**call, generator=torch.Generator().manual_seed(0)).images)

    def test_consists_of_stock_classes_only(self, pipeline):
        assert type(pipeline) is diffusers.StableDiffusionPipeline
        assert {name: type(part) for name, part in pipeline.components.items() if part is not None} == {
            "vae": diffusers.AutoencoderKL,
            "text_encoder": transformers.CLIPTextModel,
            "tokenizer": transformers.CLIPTokenizer,
            "unet": diffusers.UNet2DConditionModel,
            "scheduler": diffusers.DDIMScheduler,
        }

    def test_has_the_scheduler_settings_of_stable_diffusion(self, pipeline):
        config = pipeline.scheduler.config
        assert (config.beta_schedule, config.beta_start, config.beta_end) == ("scaled_linear", 0.00085, 0.012)
        assert (config.clip_sample, config.set_alpha_to_one, config.steps_offset) == (False, False, 1)

    def test_takes_at_most_15_mb_in_half_precision(self):
        files = [file for file in EMOJI_PATH.rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) <= 15e6
        weights = [file for file in files if file.suffix == ".safetensors"]
        assert len(weights) == 3
        for file in weights:
            with safe_open(file, "pt") as tensors:
                assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} <= {"F16", "I64"}  # noqa: SIM118

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_loads_in_the_precision_asked_for_without_a_warning_or_a_progress_bar(self, dtype, capfd):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipeline = load_emoji_pipeline(dtype)
        assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {dtype}
        assert "Loading" not in capfd.readouterr().err

    def test_leaves_the_libraries_progress_bars_as_they_were(self):
        from diffusers.utils import logging

        logging.disable_progress_bar()
        load_emoji_pipeline()
        assert not logging.is_progress_bar_enabled()
        logging.enable_progress_bar()
        load_emoji_pipeline()
        assert logging.is_progress_bar_enabled()

    def test_credits_its_sources(self):
        notice = (EMOJI_PATH / "NOTICE").read_text()
        for words in ("Noto Emoji", "Apache License, Version 2.0", "Fluent Emoji", "Microsoft", "emojibase", "MIT"):
            assert words in notice


class TestTokenizer:
    def test_spells_out_every_caption_and_back(self, pipeline):
        tokenizer = pipeline.tokenizer
        for caption in emoji_captions():
            for words in (caption, f"flat {caption}", f"3d {caption}"):
                ids = tokenizer(words).input_ids
                assert len(ids) <= tokenizer.model_max_length == 16
                assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == words.replace(" ", "")

    def test_tells_all_captions_apart(self, pipeline):
        captions = emoji_captions()
        assert len({tuple(pipeline.tokenizer(caption).input_ids) for caption in captions}) == len(captions)

    def test_takes_words_it_never_saw(self, pipeline):
        ids = pipeline.tokenizer("Größenwahn").input_ids
        assert pipeline.tokenizer.decode(ids, skip_special_tokens=True) == "größenwahn"


class TestCaptions:
    def test_are_sorted_distinct_and_without_a_style_word(self):
        captions = emoji_captions()
        assert captions == sorted(set(captions))
        assert len(captions) >= 400
        assert not any(caption.startswith(("flat ", "3d ")) for caption in captions)

    def test_groups_part_them(self):
        groups = [emoji_captions(group) for group in ("animal", "plant", "food", "face")]
        assert sorted(sum(groups, [])) == emoji_captions()
        assert "tiger face" in groups[0]
        assert "rose" in groups[1]
        assert "pizza" in groups[2]
        assert "nerd face" in groups[3]

    def test_refuse_an_unknown_group_by_naming_the_known_ones(self):
        with pytest.raises(ValueError, match=r"'vehicle'.*\['animal', 'face', 'food', 'plant'\]"):
            emoji_captions("vehicle")


class TestMeasure:
    @pytest.mark.slow
    def test_every_training_image_is_its_own_nearest(self):
        tiles = contact_sheet_tiles()
        images = F.interpolate(torch.stack(list(tiles.values())), scale_factor=2)
        assert recognized_share(images, list(tiles)) == 1
        # Fluent draws one pair of concepts alike; all others also go by their own name.
        assert sum(a != b for a, b in zip(nearest_captions(images), tiles, strict=True)) <= 1

    def test_asks_for_the_style_only_where_the_caption_does(self):
        image = contact_sheet_tiles()["3d panda"][None]
        assert recognized_share(image, ["panda"]) == 1
        assert recognized_share(image, ["3d panda"]) == 1
        assert recognized_share(image, ["flat panda"]) == 0

    def test_counts_shares(self):
        tiles = contact_sheet_tiles()
        images = torch.stack([tiles["flat panda"], tiles["3d pizza"], tiles["3d rose"], tiles["flat rose"]])
        assert recognized_share(images, ["panda", "pizza", "frog", "3d rose"]) == 0.5

    def test_accepts_keywords(self):
        assert recognized_share(contact_sheet_tiles()["flat hamburger"][None], ["burger"]) == 1

    def test_compares_after_averaging_so_fine_noise_changes_nothing(self):
        tile = contact_sheet_tiles()["flat lemon"][None] * 0.8 + 0.1
        checkers = torch.tensor([[0.1, -0.1], [-0.1, 0.1]]).repeat(32, 32)
        image = F.interpolate(tile, scale_factor=2) + checkers
        assert nearest_captions(image) == nearest_captions(tile)

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (torch.zeros(3, 64, 64), r"\(B, 3, H, W\), got \(3, 64, 64\)"),
            (torch.zeros(1, 64, 64, 3), r"\(B, 3, H, W\)"),
            (torch.zeros(1, 3, 16, 16), "32x32 or more"),
            (torch.full((1, 3, 64, 64), -1.0), r"\[0, 1\].*output_type='pt'"),
            (torch.full((1, 3, 64, 64), 255), r"\[0, 1\]"),
            (torch.full((1, 3, 64, 64), torch.nan), r"\[0, 1\]"),
        ],
    )
    def test_refuses_other_shapes_and_ranges(self, images, message):
        with pytest.raises(ValueError, match=message):
            nearest_captions(images)

    def test_refuses_unknown_captions_and_other_numbers_of_them(self):
        with pytest.raises(ValueError, match=r"'blue dog face'.*emoji_captions"):
            recognized_share(torch.zeros(1, 3, 64, 64), ["blue dog face"])
        with pytest.raises(ValueError, match="2 images and 1 captions"):
            recognized_share(torch.zeros(2, 3, 64, 64), ["panda"])
        with pytest.raises(ValueError, match="0 images"):
            recognized_share(torch.zeros(0, 3, 64, 64), [])


class TestSamples:
    def test_show_what_their_captions_say(self, samples):
        assert recognized_share(samples, SAMPLED) >= 0.85

    def test_do_not_show_what_other_captions_say(self, samples):
        # The control: with captions shifted by one, the same measure finds next to nothing.
        assert recognized_share(samples, SAMPLED[1:] + SAMPLED[:1]) <= 0.13

    def test_follow_the_style_word(self, samples):
        asked = [caption.split()[0] for caption in SAMPLED]
        drawn = [caption.split()[0] for caption in nearest_captions(samples)]
        pairs = [(a, b) for a, b in zip(asked, drawn, strict=True) if a in ("flat", "3d")]
        assert len(pairs) == 4
        assert sum(a == b for a, b in pairs) >= 3
