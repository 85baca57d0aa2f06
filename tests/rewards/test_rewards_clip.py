"""Rewards of CLIP models against transformers' own forward, images prepared by hand and open_clip's architecture."""

import json
import math
import pickle
import string
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

from conftest import tiny_tokenizer
from ddpo_trl.rewards import CLIPScore, HPSv2, LaionAesthetic, PickScore, RewardModel


SIZE, PATCH, LENGTH, WIDTH, HEADS, LAYERS, PROJECTED = 32, 8, 24, 16, 2, 2, 6
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PROMPTS = ("cat", "green dog", "a very long word that does not fit in", "")

# Larger and smaller than the model's square, of odd lengths, square, wide and tall.
SHAPES = [(32, 32), (64, 64), (47, 90), (71, 40), (20, 25)]


def noise(height: int = 47, width: int = 90) -> Tensor:
    return torch.rand(len(PROMPTS), 3, height, width, generator=torch.Generator().manual_seed(0))


def scores(reward: RewardModel, images: Tensor, prompts: tuple[str, ...] = PROMPTS) -> list[float]:
    return reward(images, prompts, ({},) * len(prompts))


def randomize(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def save_processor(folder: Path) -> None:
    """Tokenizer and image processor, the latter in the old format of the Hub's CLIP repositories."""
    tiny_tokenizer().save_pretrained(folder)
    preprocessor = {
        "crop_size": SIZE, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": MEAN, "image_std": STD, "resample": 3,
        "size": SIZE,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def tiny_config(activation: str = "quick_gelu") -> CLIPConfig:
    tokenizer = tiny_tokenizer()
    shape = {
        "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "hidden_act": activation, "projection_dim": PROJECTED,
    }  # fmt: skip
    text = {
        "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    return CLIPConfig(
        projection_dim=PROJECTED,
        text_config=shape | text,
        vision_config=shape | {"image_size": SIZE, "patch_size": PATCH},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP model in the Hub's format, whose logit scale is 100."""
    path = tmp_path_factory.mktemp("clip")
    network = CLIPModel(tiny_config())
    randomize(network)
    network.logit_scale.data.fill_(math.log(100))
    network.save_pretrained(path)
    save_processor(path)
    return path


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> nn.Sequential:
    """The published head, for the tiny model's embeddings."""
    layers = nn.Sequential(
        nn.Linear(PROJECTED, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
        nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip
    randomize(layers)
    return layers.eval()


def head_state(head: nn.Sequential) -> dict[str, Tensor]:
    return {f"layers.{name}": value for name, value in head.state_dict().items()}


@pytest.fixture(scope="module")
def head_file(head: nn.Sequential, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("head") / "aesthetic-model.pth"
    torch.save(OrderedDict(head_state(head)), path)
    return str(path)


# ---- What is expected, worked out without the package ----


def pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)) for image in images]


def cropped_by_hand(picture: Image.Image) -> Tensor:
    """Shorter side to 32 by PIL's bicubic filter, the centre, normalised as the model was trained."""
    short = min(picture.size)
    width, height = (SIZE * side // short for side in picture.size)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized.crop((left, top, left + SIZE, top + SIZE))) / 255
    return torch.tensor((pixels - MEAN) / STD, dtype=torch.float32).permute(2, 0, 1)[None]


def padded_by_hand(picture: Image.Image) -> Tensor:
    """Longer side to 32 by PIL's bicubic filter in floating point, in the middle of a black square, normalised."""
    width, height = (round(SIZE * side / max(picture.size)) for side in picture.size)
    left, top = (SIZE - width) // 2, (SIZE - height) // 2
    square = np.zeros((SIZE, SIZE, 3))
    for channel in range(3):
        plane = Image.fromarray(np.asarray(picture)[..., channel].astype(np.float32) / 255)
        resized = plane.resize((width, height), Image.Resampling.BICUBIC)
        square[top : top + height, left : left + width, channel] = np.asarray(resized)
    return torch.tensor((square - MEAN) / STD, dtype=torch.float32).permute(2, 0, 1)[None]


def tokens_by_hand(text: str) -> Tensor:
    """A token per letter, other ones at the end of words, cut to the model's length, between start and end."""
    letters = string.ascii_lowercase + string.digits
    ids = [
        letters.index(letter) + (len(letters) if index == len(word) - 1 else 0)
        for word in text.lower().split()
        for index, letter in enumerate(word)
    ]
    start = 2 * len(letters)
    return torch.tensor([[start, *ids[: LENGTH - 2], start + 1]])


@torch.no_grad()
def cosines(folder: Path, images: Tensor, texts: tuple[str, ...]) -> list[float]:
    network = CLIPModel.from_pretrained(folder)
    logits = [
        network(input_ids=tokens_by_hand(text), pixel_values=cropped_by_hand(picture)).logits_per_image.item()
        for picture, text in zip(pictures(images), texts, strict=True)
    ]
    return [logit / network.logit_scale.exp().item() for logit in logits]


# ---- CLIPScore ----


@pytest.mark.parametrize("shape", SHAPES)
def test_clip_score_is_the_paper_s_formula_with_its_prefix(folder, shape):
    images = noise(*shape)
    expected = cosines(folder, images, tuple(f"A photo depicts {prompt}" for prompt in PROMPTS))
    assert max(expected) - min(expected) > 0.1
    assert scores(CLIPScore(str(folder)), images) == pytest.approx(
        [2.5 * max(value, 0) for value in expected], abs=1e-5
    )


@pytest.mark.parametrize(("prefix", "before"), [("", ""), ("red", "red ")])
def test_the_prefix_can_be_another_one_or_none(folder, prefix, before):
    expected = cosines(folder, noise(), tuple(before + prompt for prompt in PROMPTS))
    assert scores(CLIPScore(str(folder), prefix=prefix), noise()) == pytest.approx(
        [2.5 * max(value, 0) for value in expected], abs=1e-5
    )


def test_clip_score_is_zero_where_the_cosine_is_negative(folder, tmp_path):
    """Turning the text embeddings round turns every sign."""
    network = CLIPModel.from_pretrained(folder)
    network.text_projection.weight.data.neg_()
    network.save_pretrained(tmp_path)
    save_processor(tmp_path)
    one, other = (scores(CLIPScore(str(path), prefix=""), noise()) for path in (folder, tmp_path))
    assert all(min(pair) == 0 < max(pair) for pair in zip(one, other, strict=True))


def test_a_prefix_that_is_no_string_is_refused():
    with pytest.raises(TypeError, match="prefix is None"):
        CLIPScore(prefix=None)  # type: ignore[arg-type]


# ---- PickScore ----


@pytest.mark.parametrize("shape", SHAPES)
def test_pick_score_is_the_scaled_cosine(folder, shape):
    images = noise(*shape)
    expected = [100 * value for value in cosines(folder, images, PROMPTS)]
    assert scores(PickScore(str(folder), processor=str(folder)), images) == pytest.approx(expected, abs=1e-3)


def test_the_scale_of_pick_score_is_not_rounded_with_the_weights(folder):
    reward = PickScore(str(folder), processor=str(folder), dtype=torch.bfloat16)
    assert reward.load(torch.device("cpu")).logit_scale == pytest.approx(100, rel=1e-5)


# ---- LAION's aesthetic predictor ----


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_aesthetic_score_is_the_published_head_on_normalised_embeddings(folder, head, tmp_path, suffix, shape):
    file = tmp_path / f"head{suffix}"
    if suffix == ".pth":
        torch.save(head_state(head), file)
    else:
        save_file(head_state(head), file)
    images = noise(*shape)
    network = CLIPVisionModelWithProjection.from_pretrained(folder)
    with torch.no_grad():
        embeddings = network(torch.cat([cropped_by_hand(picture) for picture in pictures(images)])).image_embeds
        expected = head(embeddings / embeddings.square().sum(1, keepdim=True).sqrt())[:, 0]
    got = torch.tensor(scores(LaionAesthetic(str(folder), head=str(file)), images))
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_head_for_another_model_is_refused(folder, head, tmp_path):
    state = head_state(head)
    state["layers.0.weight"] = torch.zeros(1024, 768)
    torch.save(state, file := tmp_path / "head.pth")
    with pytest.raises(ValueError, match="takes 768 numbers per image, but model.* gives 6"):
        scores(LaionAesthetic(str(folder), head=str(file)), noise())


def test_a_head_of_another_kind_is_refused(folder, tmp_path):
    torch.save({"mlp.0.weight": torch.zeros(1)}, file := tmp_path / "head.pth")
    with pytest.raises(ValueError, match="which holds .*mlp.0.weight"):
        scores(LaionAesthetic(str(folder), head=str(file)), noise())


class Intruder:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "make", [lambda file, folder: LaionAesthetic(folder, head=file), lambda file, folder: HPSv2(file, model=folder)]
)
def test_code_in_a_file_of_weights_is_not_run(folder, tmp_path, make):
    trace = tmp_path / "trace"
    torch.save({"layers.0.weight": Intruder(trace)}, file := tmp_path / "weights.pth")
    torch.load(file, weights_only=False)
    assert trace.exists()  # the intruder works
    trace.unlink()
    with pytest.raises(pickle.UnpicklingError):
        scores(make(str(file), str(folder)), noise())
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pt"])
def test_a_file_that_does_not_exist_is_refused_at_once(suffix):
    with pytest.raises(ValueError, match=f"head is 'nowhere{suffix}'"):
        LaionAesthetic(head=f"nowhere{suffix}")
    with pytest.raises(ValueError, match=f"weights is 'nowhere{suffix}'"):
        HPSv2(f"nowhere{suffix}")


# ---- HPS v2 ----


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(WIDTH, 4 * WIDTH), gelu=nn.GELU(), c_proj=nn.Linear(4 * WIDTH, WIDTH))
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block() for _ in range(LAYERS)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(WIDTH))
        self.positional_embedding = nn.Parameter(torch.zeros((SIZE // PATCH) ** 2 + 1, WIDTH))
        self.ln_pre = nn.LayerNorm(WIDTH)
        self.transformer = Transformer()
        self.ln_post = nn.LayerNorm(WIDTH)
        self.proj = nn.Parameter(torch.zeros(WIDTH, PROJECTED))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """open_clip's CLIP with a vision transformer: its names, its order of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = VisionTransformer()
        self.transformer = Transformer()
        self.token_embedding = nn.Embedding(len(tiny_tokenizer()), WIDTH)
        self.positional_embedding = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.zeros(WIDTH, PROJECTED))
        self.logit_scale = nn.Parameter(torch.zeros([]))

    def encode_text(self, tokens: Tensor) -> Tensor:
        ended = torch.zeros(1, LENGTH, dtype=torch.long)  # it pads with zeros
        ended[:, : tokens.shape[1]] = tokens
        x = self.token_embedding(ended) + self.positional_embedding
        x = self.ln_final(self.transformer(x, nn.Transformer.generate_square_subsequent_mask(LENGTH)))
        return x[:, ended.argmax(1)[0]] @ self.text_projection

    @torch.no_grad()
    def scores(self, images: Tensor) -> list[float]:
        return [
            nn.functional.cosine_similarity(
                self.visual(padded_by_hand(picture)), self.encode_text(tokens_by_hand(prompt))
            ).item()
            for picture, prompt in zip(pictures(images), PROMPTS, strict=True)
        ]


@pytest.fixture(scope="module")
def open_clip() -> OpenClip:
    network = OpenClip().eval()
    randomize(network, seed=1)
    return network


@pytest.fixture(scope="module")
def hps_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration and processors without weights."""
    path = tmp_path_factory.mktemp("hps")
    tiny_config("gelu").save_pretrained(path)
    save_processor(path)
    return path


@pytest.fixture(scope="module")
def hps_file(open_clip: OpenClip, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("hps_file") / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": open_clip.state_dict(), "epoch": 3}, path)
    return str(path)


@pytest.mark.parametrize("shape", SHAPES)
def test_hps_is_the_cosine_of_the_open_clip_model_for_whole_images(open_clip, hps_file, hps_folder, shape):
    images = noise(*shape)
    expected = open_clip.scores(images)
    assert max(expected) - min(expected) > 0.1
    assert scores(HPSv2(hps_file, model=str(hps_folder)), images) == pytest.approx(expected, abs=1e-4)


def test_hps_reads_half_precision_from_safetensors(open_clip, hps_folder, tmp_path):
    halved = {name: value.half().contiguous() for name, value in open_clip.state_dict().items()}
    save_file(halved, file := tmp_path / "hps.safetensors")
    rounded = OpenClip().eval()
    rounded.load_state_dict({name: value.float() for name, value in halved.items()})
    reward = HPSv2(str(file), model=str(hps_folder))
    assert scores(reward, noise()) == pytest.approx(rounded.scores(noise()), abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("ln_final.bias"), "missing_keys .*final_layer_norm.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "unexpected_keys .*extra"),
        (lambda state: state.update({"visual.proj": torch.zeros(WIDTH, 3)}), "mismatched_keys .*visual_projection"),
    ],
)
def test_weights_that_do_not_fit_the_model_are_refused(open_clip, hps_folder, tmp_path, change, message):
    state = dict(open_clip.state_dict())
    change(state)
    torch.save({"state_dict": state}, file := tmp_path / "hps.pt")
    with pytest.raises(ValueError, match=message):
        scores(HPSv2(str(file), model=str(hps_folder)), noise())


# ---- All of them ----


@pytest.fixture(scope="module", params=["CLIPScore", "PickScore", "LaionAesthetic", "HPSv2"])
def make(request, folder, head_file, hps_file, hps_folder) -> Callable[..., RewardModel]:
    """Makes the reward with its tiny model."""
    makers: dict[str, Callable[..., RewardModel]] = {
        "CLIPScore": lambda **kwargs: CLIPScore(str(folder), prefix="", **kwargs),
        "PickScore": lambda **kwargs: PickScore(str(folder), processor=str(folder), **kwargs),
        "LaionAesthetic": lambda **kwargs: LaionAesthetic(str(folder), head=head_file, **kwargs),
        "HPSv2": lambda **kwargs: HPSv2(hps_file, model=str(hps_folder), **kwargs),
    }
    return makers[request.param]


def near(expected: list[float], relative: float) -> Any:
    return pytest.approx(expected, abs=relative * max(map(abs, expected)))


def test_a_batch_scores_as_its_images_one_by_one(make):
    together = scores(make(), noise())
    assert len(set(together)) > 1
    assert scores(make(batch_size=1), noise()) == near(together, 1e-5)
    assert scores(make(batch_size=3), noise()) == near(together, 1e-5)


def networks(reward: RewardModel, device: str = "cpu") -> list[Tensor]:
    """Weights that the reward loads: of the CLIP model, then of the head if there is one."""
    loaded = reward.load(torch.device(device))
    if isinstance(reward, LaionAesthetic):
        return [*loaded.clip.network.parameters(), *(tensor for layer in loaded.head for tensor in layer)]
    return list(loaded.network.parameters())


def test_weights_are_where_they_are_wanted_and_need_no_gradient(make):
    for device in ("cpu", "meta"):
        assert {weight.device.type for weight in networks(make(), device)} == {device}
    assert not any(weight.requires_grad for weight in networks(make()))


def test_the_model_computes_in_the_dtype_it_is_given(make):
    exact, rounded = scores(make(), noise()), scores(make(dtype=torch.bfloat16), noise())
    assert rounded != exact
    assert rounded == near(exact, 0.1)
    of_clip = len(list(CLIPModel(tiny_config()).parameters()))
    wanted, got = networks(make()), networks(make(dtype=torch.bfloat16))
    assert {weight.dtype for weight in got[:of_clip]} == {torch.bfloat16}
    assert all(map(torch.equal, wanted[of_clip:], got[of_clip:]))  # the head rates finely


def test_a_pickled_reward_scores_the_same(make):
    reward = make()
    expected = scores(reward, noise())
    assert scores(pickle.loads(pickle.dumps(reward)), noise()) == expected


def test_a_video_scores_as_the_mean_of_its_frames(make):
    frames = scores(make(), noise())
    video = noise()[None, :2]
    same_prompt = scores(make(), video[0], (PROMPTS[0],) * 2)
    assert scores(make(), video, PROMPTS[:1])[0] == pytest.approx(
        sum(same_prompt) / 2, abs=1e-4 * max(map(abs, frames))
    )


def add_to_hub(cache: Path, repository: str, files: Path) -> None:
    """Puts files into the Hub's cache as a download does."""
    entry = cache / f"models--{repository.replace('/', '--')}"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text("0" * 40)
    (entry / "snapshots").mkdir()
    (entry / "snapshots" / ("0" * 40)).symlink_to(files, target_is_directory=True)


@pytest.mark.parametrize(
    ("reward_class", "repositories"),
    [
        (CLIPScore, {"openai/clip-vit-large-patch14": "clip"}),
        (PickScore, {"yuvalkirstain/PickScore_v1": "clip", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "clip"}),
        (LaionAesthetic, {"openai/clip-vit-large-patch14": "clip", "trl-lib/ddpo-aesthetic-predictor": "head"}),
        (HPSv2, {"xswu/HPSv2": "hps_file", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "hps"}),
    ],
)
def test_by_default_the_published_models_are_taken_from_the_hub(
    reward_class, repositories, folder, head_file, hps_file, hps_folder, tmp_path, monkeypatch
):
    files = {"clip": folder, "head": Path(head_file).parent, "hps": hps_folder, "hps_file": Path(hps_file).parent}
    for repository, kind in repositories.items():
        add_to_hub(tmp_path, repository, files[kind])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert all(math.isfinite(score) for score in scores(reward_class(), noise()))
