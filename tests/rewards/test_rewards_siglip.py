"""Aesthetic Predictor V2.5 against its formula, on a random SigLIP in the format of the Hub."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel, SiglipTextConfig, SiglipVisionConfig

from ddpo_trl.rewards import AestheticPredictorV25
from ddpo_trl.rewards.siglip import HEAD


WIDTH = 16
SIZE = 24


def published_head(width: int = WIDTH) -> nn.Sequential:
    """As in the predictor's documentation: these sizes, with dropout in between, under the name "scoring_head"."""
    torch.manual_seed(1)
    sizes = [width, 1024, 128, 64, 16, 1]
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), nn.Dropout(0.5)]
    head = nn.Sequential()
    head.scoring_head = nn.Sequential(*layers[:-1])
    return head.eval()


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """Both towers, as on the Hub, and an image processor with another size than its class's default."""
    path = tmp_path_factory.mktemp("siglip")
    sizes = {"hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = SiglipModel(
        SiglipConfig(
            vision_config=SiglipVisionConfig(image_size=SIZE, patch_size=8, **sizes).to_dict(),
            text_config=SiglipTextConfig(vocab_size=8, max_position_embeddings=4, **sizes).to_dict(),
        )
    )
    for parameter in model.parameters():  # large enough for images to matter
        nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(path)
    SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "aesthetic_predictor_v2_5.pth"
    torch.save(published_head().state_dict(), path)
    return str(path)


def noise(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 20, 36, generator=torch.Generator().manual_seed(0))


def score(reward: AestheticPredictorV25, images: torch.Tensor) -> list[float]:
    return reward(images, ("",) * len(images), ({},) * len(images))


@torch.no_grad()
def by_hand(path: str, images: torch.Tensor) -> list[float]:
    """PIL resizes to a square, pixels go to [-1, 1], and the pooled embedding of length 1 to the head."""
    model = SiglipModel.from_pretrained(path).eval()
    pixels = []
    for image in images:
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        values = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float32)
        pixels.append(torch.from_numpy(values / 127.5 - 1).permute(2, 0, 1))
    pooled = model.vision_model(pixel_values=torch.stack(pixels)).pooler_output
    return published_head()(pooled / pooled.norm(dim=1, keepdim=True)).squeeze(1).tolist()


def test_the_rating_is_that_of_the_published_head(siglip, head):
    scores = score(AestheticPredictorV25(siglip, head=head), noise())
    assert scores == pytest.approx(by_hand(siglip, noise()), abs=1e-5)
    assert np.ptp(scores) > 1e-3  # or else the images would not matter


def test_the_image_processor_is_the_librarys(siglip, head):
    reward = AestheticPredictorV25(siglip, head=head)
    score(reward, noise())
    assert reward._loaded is not None and type(reward._loaded.processor) is SiglipImageProcessorPil


def test_a_batch_scores_as_its_images_one_by_one(siglip, head):
    together, alone = (AestheticPredictorV25(siglip, head=head, batch_size=size) for size in (3, 1))
    assert score(together, noise()) == pytest.approx(score(alone, noise()), abs=1e-5)


def test_the_head_may_be_in_safetensors(siglip, head, tmp_path):
    save_file(published_head().state_dict(), path := tmp_path / "head.safetensors")
    from_safetensors, from_pytorch = (AestheticPredictorV25(siglip, head=str(file)) for file in (path, head))
    assert score(from_safetensors, noise()) == pytest.approx(score(from_pytorch, noise()), abs=1e-6)


def test_the_head_is_downloaded_from_its_author_by_default(siglip, monkeypatch):
    asked = []

    def download(url, **options):
        asked.append((url, options))
        return published_head().state_dict()

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    assert score(AestheticPredictorV25(siglip), noise()) == pytest.approx(by_hand(siglip, noise()), abs=1e-5)
    assert asked == [(HEAD, {"map_location": "cpu", "weights_only": True})]
    assert HEAD.startswith("https://github.com/discus0434/aesthetic-predictor-v2-5/")


def test_the_head_stays_in_float32(siglip, head):
    half, full = (AestheticPredictorV25(siglip, head=head, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    scores = score(half, noise()), score(full, noise())
    assert half._loaded is not None and half._loaded.network.dtype == torch.bfloat16
    assert {part.dtype for layer in half._loaded.head for part in layer} == {torch.float32}
    assert scores[0] == pytest.approx(scores[1], abs=0.02)


def test_a_pickled_predictor_scores_the_same(siglip, head):
    reward = AestheticPredictorV25(siglip, head=head)
    scores = score(reward, noise())
    assert score(pickle.loads(pickle.dumps(reward)), noise()) == scores


def test_a_missing_head_is_named_at_construction():
    with pytest.raises(ValueError, match="head is 'nowhere.pth'"):
        AestheticPredictorV25(head="nowhere.pth")


def test_a_head_of_another_predictor_or_model_is_refused(siglip, tmp_path):
    for name, weights, message in (
        ("other", {"layers.0.weight": torch.zeros(1, 1)}, "holds.*layers.0.weight"),
        ("wide", published_head(width=20).state_dict(), "takes 20 numbers.*gives 16"),
    ):
        torch.save(weights, path := tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match=message):
            score(AestheticPredictorV25(siglip, head=str(path)), noise(1))
