"""ImageReward against the original code: golden/image_reward.py ran it with the same weights and images."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import BertTokenizer

from ddpo_trl.rewards import ImageReward
from ddpo_trl.rewards.image_reward import MEAN, STD, as_pixels
from golden.image_reward import PATH, PROMPTS, SIZES, WORDS, picture, weights


GOLDEN = json.loads(PATH.read_text())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "ImageReward.pt"
    torch.save(weights(), path)
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(path)
    return str(path)


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def noise() -> torch.Tensor:
    return torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("index", range(len(PROMPTS)))
def test_the_score_is_that_of_the_original_code(model, tokenizer, index):
    reward = ImageReward(model, tokenizer=tokenizer)
    (score,) = reward(as_tensor(picture(index)), PROMPTS[index : index + 1], ({},))
    assert score == pytest.approx(GOLDEN["scores"][index], abs=1e-5)


@pytest.mark.parametrize("index", range(len(SIZES)))
def test_pixels_are_those_of_the_original_code(index):
    pixels = as_pixels(picture(index)).double()
    ramp = torch.linspace(-1, 1, 224, dtype=torch.float64)
    sums = [(pixels * ramp).mean().item(), (pixels * ramp[:, None]).mean().item()]
    assert sums == pytest.approx(GOLDEN["pixels"][index], abs=1e-6)


def test_scores_are_standardised_as_by_the_original_code():
    assert (GOLDEN["mean"], GOLDEN["std"]) == (MEAN, STD)


def test_a_batch_scores_as_its_images_one_by_one(model, tokenizer):
    together, alone = (
        ImageReward(model, tokenizer=tokenizer, batch_size=size)(noise(), PROMPTS, ({},) * 3) for size in (3, 1)
    )
    assert together == pytest.approx(alone, abs=1e-4)


def test_image_and_prompt_both_matter(model, tokenizer):
    reward = ImageReward(model, tokenizer=tokenizer)
    images = noise()[[0, 0, 1]]
    same, other_prompt, other_image = reward(images, (PROMPTS[0], PROMPTS[1], PROMPTS[0]), ({},) * 3)
    assert abs(other_prompt - same) > 1e-3 and abs(other_image - same) > 1e-3


def test_the_weights_may_be_in_safetensors(model, tokenizer, tmp_path):
    save_file(weights(), path := tmp_path / "model.safetensors")
    scores = [ImageReward(str(file), tokenizer=tokenizer)(noise(), PROMPTS, ({},) * 3) for file in (path, model)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_the_head_stays_in_float32(model, tokenizer):
    reward = ImageReward(model, tokenizer=tokenizer, dtype=torch.bfloat16)
    scores = reward(noise(), PROMPTS, ({},) * 3)
    assert reward._loaded is not None
    assert reward._loaded.vision.dtype == reward._loaded.text.dtype == torch.bfloat16
    assert {part.dtype for layer in reward._loaded.head for part in layer} == {torch.float32}
    full = ImageReward(model, tokenizer=tokenizer)(noise(), PROMPTS, ({},) * 3)
    assert scores == pytest.approx(full, abs=0.3)


def test_a_pickled_reward_scores_the_same(model, tokenizer):
    reward = ImageReward(model, tokenizer=tokenizer)
    scores = reward(noise(), PROMPTS, ({},) * 3)
    assert pickle.loads(pickle.dumps(reward))(noise(), PROMPTS, ({},) * 3) == scores


def test_a_missing_file_is_named_at_construction():
    with pytest.raises(ValueError, match="model is 'nowhere.pt'"):
        ImageReward("nowhere.pt")


def test_weights_of_something_else_are_refused(tokenizer, tmp_path):
    torch.save({"layers.0.weight": torch.zeros(1)}, path := tmp_path / "other.pt")
    with pytest.raises(ValueError, match="lacks.*cls_token"):
        ImageReward(str(path), tokenizer=tokenizer)(noise()[:1], ("a",), ({},))
