"""The text reward on rendered text, read by the real model, and by the published formula."""

import logging
import pickle
import random
import socket
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from conftest import tiny_pipeline
from ddpo_trl import DDPOTrainer
from ddpo_trl.rewards import OCRAccuracy
from ddpo_trl.rewards.ocr import text_accuracy, text_asked_for
from ddpo_trl.rewards.scoring import RewardScorer


def rendered(*texts: str, size: int = 256) -> torch.Tensor:
    """Images of black text on white."""
    images = []
    for text in texts:
        picture = Image.new("RGB", (size, size), "white")
        ImageDraw.Draw(picture).text((16, 64), text, fill="black", font=ImageFont.load_default(size=30))
        images.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    return torch.stack(images)


def asked(*texts: str) -> tuple[str, ...]:
    return tuple(f'a sign that says "{text}"' for text in texts)


@pytest.fixture(scope="module")
def reward() -> OCRAccuracy:
    return OCRAccuracy()


def test_the_text_that_was_asked_for_scores_one(reward):
    prompts = asked("Hello World", "OPEN", "new york")
    assert reward(rendered("Hello World", "OPEN", "New York"), prompts, ({},) * 3) == [1.0, 1.0, 1.0]


def test_misspelt_text_scores_its_edit_distance_and_a_blank_image_nothing(reward):
    images = rendered("Helo World", "Halo Wurld", "Goodbye", "")
    scores = reward(images, asked(*["Hello World"] * 4), ({},) * 4)
    # Of the ten letters of "helloworld" one is missing; one is missing and two are others.
    assert scores[:2] == pytest.approx([0.9, 0.7])
    assert scores[2] < 0.3 and scores[3] == 0.0


def test_lines_are_joined_from_the_top_and_other_text_costs_nothing(reward):
    images = rendered("New York\nSkyline", "Skyline\nNew York", "We are open\nall night")
    scores = reward(images, asked("New York Skyline", "New York Skyline", "OPEN"), ({},) * 3)
    assert scores[0] == scores[2] == 1.0 and scores[1] < 0.6


def test_the_metadatas_text_comes_before_the_prompts(reward):
    images = rendered("OPEN").expand(3, -1, -1, -1)
    prompts = ("a shop sign", 'a sign "CLOSED"', 'a sign "OPEN"')
    assert reward(images, prompts, ({"text": "Open"}, {"text": "open"}, {"text": None})) == [1.0, 1.0, 1.0]


def test_images_of_a_batch_score_as_they_do_alone(reward):
    images, prompts = rendered("OPEN", "Helo World"), asked("open", "Hello World")
    together = reward(images, prompts, ({},) * 2)
    alone = [reward(images[i : i + 1], prompts[i : i + 1], ({},))[0] for i in range(2)]
    assert together == alone == pytest.approx([1.0, 0.9])


def test_a_video_scores_the_mean_of_its_frames(reward):
    frames = rendered("OPEN", "", "OPEN", "OPEN")[None]
    assert reward(frames, asked("open"), ({},)) == [0.75]


@pytest.mark.slow
def test_the_trainers_threads_get_the_same_rewards(reward):
    images, prompts = rendered("OPEN", "OPEM"), asked("open", "open")
    scorer = RewardScorer([reward, OCRAccuracy()], max_workers=2)
    pending = [scorer.submit(images, prompts, ({},) * 2, "round 0") for _ in range(2)]
    expected = torch.tensor([[1.0] * 2, [0.75] * 2], dtype=torch.float64)
    assert all(torch.equal(scores.result(), expected) for scores in pending)


def test_a_pickled_reward_reads_again(reward):
    images, prompts = rendered("OPEM"), asked("open")
    assert reward(images, prompts, ({},)) == [0.75]
    copy = pickle.loads(pickle.dumps(reward))
    assert copy(images, prompts, ({},)) == [0.75] and copy.num_threads == 1


def test_nothing_is_downloaded_and_nothing_printed(monkeypatch, capfd, caplog):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    logging.getLogger("RapidOCR").addHandler(caplog.handler)  # its own was bound to stderr before capfd's
    assert OCRAccuracy()(rendered("OPEN", ""), asked("open", "open"), ({},) * 2) == [1.0, 0.0]
    logging.getLogger("RapidOCR").removeHandler(caplog.handler)
    assert capfd.readouterr() == ("", "") and not caplog.records


@pytest.mark.parametrize("size", [1, 8, 64])
def test_images_too_small_for_text_score_nothing(reward, size):
    assert reward(torch.zeros(1, 3, size, size), asked("open"), ({},)) == [0.0]


# ---- What was asked for ----


@pytest.mark.parametrize(
    ("prompt", "metadata", "expected"),
    [
        ('a sign that says "Hello World"', {}, "Hello World"),
        ("a sign that says “Hello World”", {}, "Hello World"),
        ('"One" above "Two"', {}, "One"),
        ('a dog\'s tag, engraved with "Rex"', None, "Rex"),
        ('a sign "A"', {"text": "B"}, "B"),
        ("a sign", {"text": "B", "other": 1}, "B"),
    ],
)
def test_the_text_is_found(prompt, metadata, expected):
    assert text_asked_for(prompt, metadata) == expected


@pytest.mark.parametrize(
    ("prompt", "metadata"),
    [
        ("a sign", {}),
        ("a sign that says 'Hi'", {}),
        ('an open "quotation', {}),
        ('nothing in ""', {}),
        ('spaces in " "', {}),
        ("a sign", {"text": ""}),
        ("a sign", {"text": 5}),
        ("a sign", "text"),
    ],
)
def test_a_prompt_without_text_is_refused_by_name(prompt, metadata):
    with pytest.raises(ValueError, match="OCRAccuracy") as error:
        text_asked_for(prompt, metadata)
    assert repr(prompt) in str(error.value) and repr(metadata) in str(error.value)


def test_a_prompt_without_text_is_refused_before_anything_is_read():
    reward = OCRAccuracy()
    with pytest.raises(ValueError, match="'a cat'"):
        reward(rendered("OPEN", "OPEN"), ('a sign "OPEN"', "a cat"), ({}, {}))


# ---- The formula ----


@pytest.mark.parametrize(
    ("recognized", "target", "expected"),
    [
        ("Hello World", "hello world", 1.0),
        ("HELLOWORLD", "Hello World", 1.0),
        ("The OPEN sign", "open", 1.0),  # a part of what was read
        ("kitten", "sitting", 1 - 3 / 7),  # the distance is 3 in every textbook
        ("Sunday", "Saturday", 1 - 3 / 8),
        ("opn", "open", 0.75),
        ("ope", "open", 0.75),
        ("", "open", 0.0),
        ("something long and wholly other", "open", 0.0),
    ],
)
def test_the_reward_is_one_less_edits_per_character(recognized, target, expected):
    assert text_accuracy(recognized, target) == pytest.approx(expected)


def test_the_reward_is_that_of_a_plain_table_of_edits():
    def edits(a: str, b: str) -> int:  # Wagner and Fischer (1974), by the definition
        table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
        table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
        for i in range(len(a)):
            for j in range(len(b)):
                replaced = table[i, j] + (a[i] != b[j])
                table[i + 1, j + 1] = min(replaced, table[i, j + 1] + 1, table[i + 1, j] + 1)
        return int(table[-1, -1])

    letters = random.Random(0)
    for _ in range(100):
        read, target = ("".join(letters.choices("abc", k=letters.randint(1, 8))) for _ in range(2))
        expected = 1.0 if target in read else max(0.0, 1 - edits(read, target) / len(target))
        assert text_accuracy(read, target) == pytest.approx(expected)


# ---- As a part of the package ----


def test_threads_of_nothing_are_refused():
    with pytest.raises(ValueError, match="num_threads is 0"):
        OCRAccuracy(num_threads=0)


def test_without_its_packages_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ImportError, match=r"pip install ddpo_trl\[ocr\]"):
        OCRAccuracy()(rendered("OPEN"), asked("open"), ({},))


def test_it_trains(make_config):
    config = make_config(per_device_sample_batch_size=1, per_device_train_batch_size=1)
    trainer = DDPOTrainer(config, OCRAccuracy(), ['cat with "A"', 'dog with "B"'], tiny_pipeline())
    trainer.train()
    assert any("rewards/OCRAccuracy/mean" in log for log in trainer.state.log_history)
