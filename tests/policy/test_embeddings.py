"""Prompt embeddings: encoded once and one by one, joined to what the pipeline's own batch call gives."""

import copy
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from conformance.image_pipelines import flux, stable_diffusion_3
from conformance.newer_pipelines import qwen_image, z_image
from conftest import tiny_pipeline
from ddpo_trl.policy.embedding_batches import check_mask, join
from ddpo_trl.policy.embedding_cache import EmbeddingCache
from ddpo_trl.policy.embeddings import OnlyInPlace, PromptEncoder


PROMPTS = ["cat", "dog", "cat", "owl"]
PAIR = 1  # call with the first prompt twice, from which it is learned where the samples are in the embeddings
ON_CPU: dict[str, Any] = {"device": torch.device("cpu"), "num_images_per_prompt": 1}


def calls_of(module: nn.Module) -> list[int]:
    """A list that grows by one with every call of a module."""
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def encoder_of(pipeline: DiffusionPipeline, offload: bool = False) -> PromptEncoder:
    return PromptEncoder(copy.copy(pipeline), offload)


# ---- Once ----


def test_every_prompt_is_encoded_once_with_its_negative_prompt():
    pipeline = tiny_pipeline()
    calls = calls_of(pipeline.text_encoder)
    encode = encoder_of(pipeline)
    encode(prompt=PROMPTS, do_classifier_free_guidance=True, **ON_CPU)
    assert len(calls) == 2 * (3 + PAIR)
    encode(prompt=["owl", "fox"], do_classifier_free_guidance=True, **ON_CPU)
    assert len(calls) == 2 * (4 + PAIR)
    for _ in range(3):
        encode(prompt=PROMPTS, do_classifier_free_guidance=True, **ON_CPU)
    assert len(calls) == 2 * (4 + PAIR)


def test_every_text_encoder_of_several_encodes_every_prompt_once():
    pipeline = stable_diffusion_3(0)
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
    last_layers = [
        module for encoder in encoders for name, module in encoder.named_modules() if name.endswith("final_layer_norm")
    ]
    counts = [calls_of(layer) for layer in last_layers]
    encode = encoder_of(pipeline)
    arguments = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": True, **ON_CPU}
    for _ in range(2):
        encode(prompt=PROMPTS, max_sequence_length=16, **arguments)
    assert [len(count) for count in counts] == [2 * (3 + PAIR)] * 3


def test_another_setting_is_another_embedding():
    encode = encoder_of(tiny_pipeline())
    first = encode(prompt=["cat"], do_classifier_free_guidance=True, clip_skip=None, **ON_CPU)
    with_guidance = encode(prompt=["cat"], do_classifier_free_guidance=True, negative_prompt=["dull"], **ON_CPU)
    without = encode(prompt=["cat"], do_classifier_free_guidance=False, **ON_CPU)
    assert torch.equal(first[0], with_guidance[0])
    assert not torch.equal(first[1], with_guidance[1])
    assert without[1] is None


def test_embeddings_are_those_of_the_pipelines_own_batch_call():
    pipeline = tiny_pipeline()
    arguments = {"do_classifier_free_guidance": True, "negative_prompt": ["dull", "red", "dull", ""], **ON_CPU}
    ours = encoder_of(pipeline)(prompt=PROMPTS, **arguments)
    with torch.no_grad():
        theirs = pipeline.encode_prompt(prompt=PROMPTS, **arguments)
    torch.testing.assert_close(ours, theirs)


def test_embeddings_carry_no_gradient_although_a_replayed_step_does():
    pipeline = tiny_pipeline()
    assert pipeline.text_encoder.embeddings.token_embedding.weight.requires_grad
    embeddings = encoder_of(pipeline)(prompt=["cat"], do_classifier_free_guidance=True, **ON_CPU)
    straight_through = encoder_of(pipeline)(prompt="cat", do_classifier_free_guidance=True, **ON_CPU)
    assert not any(value.requires_grad for value in (*embeddings, *straight_through))


def test_the_users_text_encoder_is_left_as_it_is():
    pipeline = tiny_pipeline()
    text_encoder = pipeline.text_encoder
    calls = calls_of(text_encoder.final_layer_norm)
    encoder_of(pipeline)(prompt=["cat"], do_classifier_free_guidance=False, **ON_CPU)
    assert pipeline.text_encoder is text_encoder
    calls.clear()
    for _ in range(2):
        pipeline.encode_prompt(prompt=["cat"], do_classifier_free_guidance=False, **ON_CPU)
    assert len(calls) == 2


# ---- Which calls are about single prompts ----


class Lengths(nn.Module):
    """A text encoder whose embedding of a text is its length."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, lengths: Tensor) -> Tensor:
        return self.weight * lengths


class RecordingPipeline(DiffusionPipeline):
    """Notes how its `encode_prompt` is called."""

    def __init__(self, text_encoder: nn.Module):
        super().__init__()
        self.register_modules(text_encoder=text_encoder)
        self.calls: list[dict[str, Any]] = []

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def encode_prompt(
        self,
        prompt: Any,
        negative_prompt: Any = None,
        prompt_2: Any = None,
        layers: Any = (1, 2),
        prompt_embeds: Tensor | None = None,
    ) -> Any:
        arguments = {"prompt": prompt, "negative_prompt": negative_prompt, "prompt_2": prompt_2, "layers": layers}
        self.calls.append({name: value for name, value in arguments.items() if value is not None})
        if prompt_embeds is not None:
            return prompt_embeds
        texts = [prompt] if isinstance(prompt, str) else prompt
        return self.text_encoder(torch.tensor([[float(len(text))] for text in texts]))


def recording() -> tuple[PromptEncoder, list[dict[str, Any]]]:
    pipeline = RecordingPipeline(Lengths())
    return PromptEncoder(pipeline, offload=False), pipeline.calls


def test_lists_of_negative_prompts_are_split_by_sample_and_other_lists_are_settings():
    encode, calls = recording()
    embeddings = encode(["cat", "mouse"], negative_prompt=["dull", "red"], prompt_2=["a", "b"], layers=[9, 18])
    assert calls == [
        {"prompt": ["cat"], "negative_prompt": ["dull"], "prompt_2": ["a"], "layers": [9, 18]},
        {"prompt": ["cat"] * 2, "negative_prompt": ["dull"] * 2, "prompt_2": ["a"] * 2, "layers": [9, 18]},
        {"prompt": ["mouse"], "negative_prompt": ["red"], "prompt_2": ["b"], "layers": [9, 18]},
    ]
    assert embeddings.tolist() == [[3.0], [5.0]]


def test_the_same_prompt_with_another_negative_prompt_is_encoded_again():
    encode, calls = recording()
    encode(["cat", "cat", "cat"], ["dull", "red", "dull"])
    assert calls == [
        {"prompt": ["cat"], "negative_prompt": ["dull"], "layers": (1, 2)},
        {"prompt": ["cat"] * 2, "negative_prompt": ["dull"] * 2, "layers": (1, 2)},
        {"prompt": ["cat"], "negative_prompt": ["red"], "layers": (1, 2)},
    ]


def test_one_negative_prompt_for_all_is_given_to_each():
    encode, calls = recording()
    encode(["cat", "mouse"], "dull")
    assert [call["negative_prompt"] for call in calls] == ["dull"] * (2 + PAIR)


def test_a_call_with_more_than_texts_and_settings_goes_straight_through():
    encode, calls = recording()
    given = torch.tensor([[1.0], [2.0]])
    for _ in range(2):
        assert encode(["cat", "mouse"], prompt_embeds=given) is given
    assert calls == [{"prompt": ["cat", "mouse"], "layers": (1, 2)}] * 2  # not split, not remembered


def test_a_call_about_a_single_text_goes_straight_through():
    encode, calls = recording()
    assert encode("mouse").tolist() == [[5.0]]
    assert calls == [{"prompt": "mouse", "layers": (1, 2)}]


# ---- What is kept ----


def test_the_prompts_used_longest_ago_are_forgotten_first(monkeypatch):
    monkeypatch.setattr("ddpo_trl.policy.embedding_cache.MAX_CACHED_BYTES", 2 * 4)  # of two prompts
    encode, calls = recording()
    encode(["cat", "mouse"])
    encode(["cat"])  # the mouse now is the one used longest ago
    encode(["ow"])
    calls.clear()
    encode(["cat"])
    assert calls == []
    encode(["mouse"])
    assert [call["prompt"] for call in calls] == [["mouse"]]


def test_a_batch_of_more_prompts_than_are_kept_is_whole(monkeypatch):
    monkeypatch.setattr("ddpo_trl.policy.embedding_cache.MAX_CACHED_BYTES", 2 * 4)  # of two prompts
    encode, calls = recording()
    assert encode(["a", "ab", "abc", "abcd", "a"]).tolist() == [[1.0], [2.0], [3.0], [4.0], [1.0]]
    assert len(calls) == 4 + PAIR


def test_what_two_prompts_have_in_common_is_kept_once_and_counted_once(monkeypatch):
    cache = EmbeddingCache()
    for name, value in (("cat", 1.0), ("dog", 2.0)):
        cache.put(name, (torch.full((1, 4), value), torch.zeros(1, 4)))  # with a negative prompt
    (cat, negative), (dog, again) = cache.get("cat"), cache.get("dog")
    assert (cat.tolist(), dog.tolist()) == ([[1.0] * 4], [[2.0] * 4])
    assert negative is again
    monkeypatch.setattr("ddpo_trl.policy.embedding_cache.MAX_CACHED_BYTES", 3 * 4 * 4)
    cache.shrink()
    assert "cat" in cache
    monkeypatch.setattr("ddpo_trl.policy.embedding_cache.MAX_CACHED_BYTES", 3 * 4 * 4 - 1)
    cache.shrink()
    assert "cat" not in cache and "dog" in cache


def learn_layout(encode: PromptEncoder, pipeline: Any, log: list[str]) -> None:
    """Lets an encoder find out where the samples are in its embeddings, and forgets what was noted of it."""
    encode(["x", "xx"])
    pipeline.calls.clear()
    log.clear()


class Placed(RecordingPipeline):
    """A pipeline that says where embeddings are to be, as most do."""

    def encode_prompt(self, prompt: list[str], device: Any = None) -> Any:  # type: ignore[override]
        self.calls.append({"prompt": prompt, "device": device})
        return torch.tensor([[float(len(text))] for text in prompt])


def test_prompts_are_encoded_ahead_for_the_device_that_the_pipeline_is_going_to_run_on():
    log: list[str] = []
    pipeline, gpu = Placed(Travelling(log)), torch.device("meta")
    encode = PromptEncoder(pipeline, offload=True)
    log.clear()
    with encode.ahead(gpu):
        assert encode(["cat"], device=torch.device("cpu")).tolist() == [[3.0]]
        encode(["mouse", "cat"], device=torch.device("cpu"))
    assert log == ["to meta", "to cpu"]  # once
    prompts = [["cat"], ["mouse"], ["mouse", "mouse"]]
    assert pipeline.calls == [{"prompt": prompt, "device": gpu} for prompt in prompts]
    assert encode(["cat", "mouse"], device=gpu).tolist() == [[3.0], [5.0]]
    assert len(pipeline.calls) == 3 and log == ["to meta", "to cpu"]


def test_what_is_encoded_in_place_only_is_not_encoded_ahead():
    encode, calls = recording()
    with encode.ahead(torch.device("meta")), pytest.raises(OnlyInPlace):
        encode(["cat"])
    assert calls == []


# ---- Joining ----


def test_embeddings_of_different_lengths_are_padded_with_zeros_at_the_end_and_so_are_their_masks():
    short, long = torch.full((1, 2, 3), 5.0), torch.full((1, 4, 3), 7.0)
    pooled = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])]
    masks = [torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)]
    embeddings, joined_pooled, mask = join([(short, pooled[0], masks[0]), (long, pooled[1], masks[1])])
    assert embeddings.shape == (2, 4, 3)
    assert embeddings[:, :, 0].tolist() == [[5.0, 5.0, 0.0, 0.0], [7.0, 7.0, 7.0, 7.0]]
    assert joined_pooled.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True, True, False, False], [True, True, True, True]]


def test_what_is_equal_for_all_prompts_is_kept_as_it_is():
    ids = torch.zeros(4, 3)
    embeddings, joined_ids, nothing, dtype = join(
        [(torch.zeros(1, 4, 2), ids, None, torch.float32), (torch.ones(1, 4, 2), ids.clone(), None, torch.float32)]
    )
    assert embeddings.shape == (2, 4, 2)
    assert torch.equal(joined_ids, ids)
    assert nothing is None
    assert dtype is torch.float32


def test_a_single_number_as_a_tensor_is_kept_as_it_is():
    assert torch.equal(join([torch.tensor(3.0), torch.tensor(3.0)]), torch.tensor(3.0))


def test_lists_are_joined_and_dicts_are_joined_by_key():
    first, second = torch.ones(2, 3), torch.ones(5, 3)
    lists, dicts = join(
        [([first], {"text": torch.zeros(1, 2), "size": 8}), ([second], {"text": torch.ones(1, 2), "size": 8})]
    )
    assert lists[0] is first and lists[1] is second and len(lists) == 2
    assert dicts["text"].tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert dicts["size"] == 8


def test_empty_lists_stay_empty():
    """Z-Image's negative embeddings without guidance."""
    assert join([([torch.ones(2, 3)], []), ([torch.ones(4, 3)], [])])[1] == []


def test_a_mask_that_single_prompts_lack_is_ones_up_to_their_length():
    """Qwen-Image leaves out a mask of ones: every single prompt's is."""
    example = (torch.zeros(2, 6, 3), torch.ones(2, 6, dtype=torch.long))
    values = [(torch.ones(1, length, 3), None) for length in (2, 4)]
    embeddings, mask = join(values, example)
    assert embeddings.shape == (2, 4, 3)
    assert mask.dtype == torch.long
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_a_mask_is_left_out_where_all_prompts_are_equally_long():
    example = (torch.zeros(2, 6, 3), torch.ones(2, 6, dtype=torch.long))
    assert join([(torch.ones(1, 4, 3), None), (torch.zeros(1, 4, 3), None)], example)[1] is None


def test_what_is_none_in_the_example_too_stays_none():
    assert join([(torch.ones(1, length, 3), None) for length in (2, 4)], (torch.zeros(2, 6, 3), None))[1] is None


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([torch.zeros(2, 3), torch.ones(2, 3)], "Tensor"),
        ([(torch.zeros(1, 2), torch.zeros(3, 2)), (torch.zeros(1, 2), torch.ones(3, 2))], "Tensor"),
        ([torch.tensor(1.0), torch.tensor(2.0)], "Tensor"),
        (["a", "b"], "str"),
        ([(torch.zeros(1, 2), 1), (torch.zeros(1, 2), 2)], "int"),
    ],
)
def test_what_differs_and_has_not_one_row_each_is_refused(values, kind):
    with pytest.raises(ValueError, match=rf"encode_prompt returned {kind} for single prompts that can't be joined"):
        join(values)


# ---- Real pipelines ----

OF_DIFFERENT_LENGTH = ["cat", "a sleeping dog", "cat", "an owl"]


def own_and_joined(pipeline: DiffusionPipeline, prompts: list[str], **arguments: Any) -> tuple[Any, Any]:
    """The embeddings of the pipeline's own batch call, and ours."""
    with torch.no_grad():
        own = pipeline.encode_prompt(prompt=list(prompts), **arguments)  # Z-Image writes its template into the list
    return own, encoder_of(pipeline)(prompt=list(prompts), **arguments)


def test_qwen_images_embeddings_and_mask_are_those_of_its_own_batch_call():
    (own, own_mask), (ours, mask) = own_and_joined(qwen_image(0), OF_DIFFERENT_LENGTH, **ON_CPU)
    assert Counter(own_mask.sum(1).tolist()).most_common(1)[0][1] == 2  # of three different lengths
    torch.testing.assert_close(ours, own)
    assert torch.equal(mask, own_mask) and mask.dtype == own_mask.dtype


def test_qwen_images_mask_is_left_out_where_its_own_batch_call_leaves_it_out():
    pipeline = qwen_image(0)
    encode = encoder_of(pipeline)
    encode(prompt=OF_DIFFERENT_LENGTH, **ON_CPU)  # from here on it knows of the mask
    with torch.no_grad():
        own, own_mask = pipeline.encode_prompt(prompt=["cat", "dog"], **ON_CPU)
    ours, mask = encode(prompt=["cat", "dog"], **ON_CPU)
    assert own_mask is None and mask is None
    torch.testing.assert_close(ours, own)


def test_qwen_images_mask_is_known_when_prompts_of_different_length_come_from_memory():
    pipeline = qwen_image(0)
    encode = encoder_of(pipeline)
    for prompt in OF_DIFFERENT_LENGTH:
        encode(prompt=[prompt], **ON_CPU)
    with torch.no_grad():
        _, own_mask = pipeline.encode_prompt(prompt=OF_DIFFERENT_LENGTH, **ON_CPU)
    assert torch.equal(encode(prompt=OF_DIFFERENT_LENGTH, **ON_CPU)[1], own_mask)


def test_fluxs_text_ids_are_shared_and_its_embeddings_joined():
    arguments = {"prompt_2": None, "max_sequence_length": 16, **ON_CPU}
    own, ours = own_and_joined(flux(0), OF_DIFFERENT_LENGTH, **arguments)
    torch.testing.assert_close(ours, own)
    embeddings, pooled, ids = ours
    assert len(embeddings) == len(pooled) == 4
    assert ids.shape == (16, 3)  # tokens, and no samples


def test_z_images_lists_of_embeddings_are_joined():
    arguments = {"max_sequence_length": 48, "do_classifier_free_guidance": True, "device": torch.device("cpu")}
    (own, own_negative), (ours, negative) = own_and_joined(z_image(0), OF_DIFFERENT_LENGTH, **arguments)
    assert isinstance(ours, list) and len({len(one) for one in ours}) == 3  # not padded
    torch.testing.assert_close(ours, own)
    torch.testing.assert_close(negative, own_negative)


class Layers(RecordingPipeline):
    """Its embeddings have the text encoder's layers before the samples, as HiDream's, and a table for all samples."""

    layers = 3

    def encode_prompt(self, prompt: list[str]) -> Any:  # type: ignore[override]
        self.calls.append({"prompt": prompt})
        lengths = torch.tensor([[float(len(text))] * 4 for text in prompt])
        scales = torch.arange(1.0, self.layers + 1)
        return scales[:, None, None] * lengths, torch.zeros(2, 4)


@pytest.mark.parametrize("prompts", [["cat", "mouse", "ox"], ["cat", "cat", "cat"]])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_samples_are_joined_where_the_pipelines_own_batch_has_them(layers, prompts, monkeypatch):
    monkeypatch.setattr(Layers, "layers", layers)
    ours, theirs = PromptEncoder(Layers(Lengths()), offload=False)(prompts), Layers(Lengths()).encode_prompt(prompts)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


class Doubled(RecordingPipeline):
    """Its negative and positive embeddings are one tensor, all of the former first."""

    def encode_prompt(self, prompt: list[str]) -> Any:  # type: ignore[override]
        self.calls.append({"prompt": prompt})
        return torch.tensor([[0.0]] * len(prompt) + [[float(len(text))] for text in prompt])


def test_what_can_not_be_joined_is_encoded_as_whole_batches_and_remembered():
    pipeline = Doubled(Lengths())
    encode = PromptEncoder(pipeline, offload=False)
    for _ in range(2):
        assert encode(["cat", "mouse"]).tolist() == [[0.0], [0.0], [3.0], [5.0]]
    assert [call["prompt"] for call in pipeline.calls] == [["cat"], ["cat", "cat"], ["cat", "mouse"]]


class Seeing(RecordingPipeline):
    """Its text encoder reads an image too."""

    def encode_prompt(self, prompt: list[str], image: Any) -> Any:  # type: ignore[override]
        self.calls.append({"prompt": prompt})
        return torch.tensor([[float(len(prompt[0])), np.asarray(image, dtype=float).mean()]])


@pytest.mark.parametrize("kind", [torch.tensor, np.array, lambda rows: Image.fromarray(np.array(rows, np.uint8))])
def test_a_prompt_with_an_image_is_encoded_once_for_each_image(kind):
    pipeline = Seeing(Lengths())
    encode = PromptEncoder(pipeline, offload=False)
    for _ in range(2):
        assert encode(["cat"], kind([[0, 8], [0, 0]])).tolist() == [[3.0, 2.0]]
        assert encode(["cat"], kind([[0, 0], [0, 4]])).tolist() == [[3.0, 1.0]]
    assert len(pipeline.calls) == 2


class SeeingAll(RecordingPipeline):
    """Its text encoder reads an image of each prompt; if `mixes`, all of them for each."""

    mixes = False

    def encode_prompt(self, prompt: list[str], image: list[Image.Image]) -> Any:  # type: ignore[override]
        self.calls.append({"prompt": prompt})
        means = [np.asarray(each, dtype=float).mean() for each in image]
        seen = [sum(means)] * len(prompt) if self.mixes else means
        return torch.tensor([[float(len(text)), mean] for text, mean in zip(prompt, seen, strict=True)])


def gray(level: int) -> Image.Image:
    return Image.new("L", (2, 2), level)


def test_prompts_with_an_image_each_are_encoded_once_whatever_batch_they_are_in():
    pipeline = SeeingAll(Lengths())
    encode = PromptEncoder(pipeline, offload=False)
    assert encode(["cat", "mouse"], [gray(1), gray(2)]).tolist() == [[3.0, 1.0], [5.0, 2.0]]
    known = len(pipeline.calls)
    assert encode(["mouse", "cat"], [gray(2), gray(1)]).tolist() == [[5.0, 2.0], [3.0, 1.0]]
    assert encode(["cat"], [gray(1)]).tolist() == [[3.0, 1.0]]
    assert len(pipeline.calls) == known
    assert encode(["mouse", "cat"], [gray(1), gray(1)]).tolist() == [[5.0, 1.0], [3.0, 1.0]]
    assert pipeline.calls[known:] == [{"prompt": ["mouse"]}]


def test_an_image_twice_does_not_show_whether_images_mix():
    pipeline = SeeingAll(Lengths())
    pipeline.mixes = True
    encode = PromptEncoder(pipeline, offload=False)
    for _ in range(2):
        assert encode(["cat", "mouse"], [gray(1), gray(1)]).tolist() == [[3.0, 2.0], [5.0, 2.0]]
        assert encode(["cat", "mouse"], [gray(1), gray(2)]).tolist() == [[3.0, 3.0], [5.0, 3.0]]


# ---- Offloading ----


class Travelling(Lengths):
    """Notes where it is sent and when it works, and stays."""

    def __init__(self, log: list[str]):
        super().__init__()
        self.log = log

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.log.append(f"to {args[0]}")
        return self

    def forward(self, lengths: Tensor) -> Tensor:
        self.log.append("encode")
        if lengths.max() > 99:
            raise RuntimeError("out of memory")
        return super().forward(lengths)


class Elsewhere(RecordingPipeline):
    """A pipeline on another device than the CPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("meta")


def test_text_encoders_are_at_hand_only_while_there_is_something_to_encode():
    log: list[str] = []
    encode = PromptEncoder(Elsewhere(Travelling(log)), offload=True)
    assert log == ["to cpu"]
    learn_layout(encode, encode.pipeline, log)
    encode(["cat", "mouse", "cat"])
    assert log == ["to meta", "encode", "encode", "to cpu"]
    log.clear()
    encode(["mouse", "cat"])
    assert log == []


def test_text_encoders_leave_the_device_after_a_failure_too():
    log: list[str] = []
    encode = PromptEncoder(Elsewhere(Travelling(log)), offload=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        encode(["x" * 100])
    assert log[-1] == "to cpu"


def test_text_encoders_are_not_moved_without_offloading():
    log: list[str] = []
    PromptEncoder(Elsewhere(Travelling(log)), offload=False)(["cat"])
    assert log == ["encode"]


def test_lengths_without_a_mask_are_refused():
    """CogView4 pads by itself and masks nothing: a sample would depend on the longest prompt beside it."""
    with pytest.raises(ValueError, match=r"different lengths and no mask.*sample_batch_size and per_device_train"):
        check_mask((torch.zeros(2, 7, 16), torch.zeros(2, 16)), length=7)
    check_mask((torch.zeros(2, 7, 16), torch.ones(2, 7)), length=7)
