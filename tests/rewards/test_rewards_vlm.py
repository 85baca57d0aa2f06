"""A vision-language model as a judge: its answers are the model's own, one image at a time and without padding."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from conftest import needs_newest
from ddpo_trl.rewards import VLMJudge
from ddpo_trl.rewards.vlm import recall


WORDS = ["a", "cat", "dog", "red", "two", "is", "it", "in", "the", "image", "show", "what", "on", "does", "?", "."]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
ANSWERS = ["yes", "Yes", "no", "No"]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
PROMPTS = ("cat", "a red dog", "two")
QUESTION = "does it show {prompt} ?"


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: index for index, word in enumerate([*SPECIAL, "user", "assistant", *WORDS, *ANSWERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """A random Llava of 16 patches of an image and 27 words."""
    path = tmp_path_factory.mktemp("vlm")
    tokenizer = word_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(image_size=16, patch_size=4, projection_dim=16, **sizes),
            text_config=LlamaConfig(
                vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=2, eos_token_id=3, **sizes
            ),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            pad_token_id=0,
        )
    )
    for parameter in model.parameters():  # large enough for images and words to matter
        torch.nn.init.normal_(parameter, std=0.5)
    # Never the likeliest, as in a trained model: it says words only, and "</s>".
    silent = tokenizer.convert_tokens_to_ids(["<pad>", "<unk>", "<s>", "<image>"])
    model.lm_head.weight.data[silent] = 0.0
    model.save_pretrained(path)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def tiled_vlm(tmp_path_factory):
    """A random Idefics3, the architecture of SmolVLM, whose processor cuts an image into tiles and shows it whole."""
    path = tmp_path_factory.mktemp("tiled_vlm")
    tokenizer = word_tokenizer()
    places = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    marks = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *places]
    tokenizer.add_tokens(marks, special_tokens=True)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = Idefics3ForConditionalGeneration(
        Idefics3Config(
            vision_config={"image_size": 16, "patch_size": 4, **sizes},
            text_config=LlamaConfig(
                vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=2, eos_token_id=3, **sizes
            ),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            scale_factor=2,
            pad_token_id=0,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(path)
    Idefics3Processor(
        Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}),
        tokenizer,
        image_seq_len=4,
        chat_template=TEMPLATE,
    ).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    torch.manual_seed(1)
    model = BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            initializer_range=0.5,
        )
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def noise(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 20, 24, generator=torch.Generator().manual_seed(0))


def picture(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


class Alone:
    """The model by itself: one picture, the chat written out by hand, no padding."""

    def __init__(self, path: str):
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(path)

    @torch.no_grad()
    def next_logits(self, image: Image.Image, text: str) -> dict[str, float]:
        inputs = self.processor(images=image, text=text, return_tensors="pt")
        logits = self.model(**inputs).logits[0, -1]
        words = self.processor.tokenizer.convert_ids_to_tokens(range(len(logits)))
        return dict(zip(words, logits.tolist(), strict=True))

    def describe(self, image: Image.Image, text: str, length: int) -> str:
        answer: list[str] = []
        while len(answer) < length:
            logits = self.next_logits(image, " ".join([text, *answer]))
            word = max(logits, key=lambda token: logits[token])
            if word == "</s>":
                break
            answer.append(word)
        return " ".join(answer)


@pytest.mark.parametrize(
    "architecture",
    ["vlm", pytest.param("tiled_vlm", marks=needs_newest("older versions of Idefics3 need torchvision"))],
)
def test_the_answer_is_the_probability_of_yes_against_no(architecture, request):
    vlm = request.getfixturevalue(architecture)
    alone = Alone(vlm)
    expected = []
    for image, prompt in zip(noise(), PROMPTS, strict=True):
        logits = alone.next_logits(picture(image), f"user <image> does it show {prompt} ? assistant ")
        yes, no = (np.exp(logits[word]) + np.exp(logits[word.capitalize()]) for word in ("yes", "no"))
        expected.append(yes / (yes + no))
    scores = VLMJudge(vlm, QUESTION)(noise(), PROMPTS, ({},) * 3)
    assert scores == pytest.approx(expected, abs=1e-5)
    assert np.ptp(scores) > 0.01  # or else the padded rows prove nothing


@pytest.mark.parametrize("mode", ["question", "caption"])
def test_a_batch_scores_as_its_images_one_by_one(vlm, bert, mode):
    question = QUESTION if mode == "question" else "what is in the image ?"
    options = {"mode": mode, "text_model": bert, "text_layer": 2, "max_new_tokens": 5}
    together = VLMJudge(vlm, question, **options)(noise(), PROMPTS, ({},) * 3)
    alone = VLMJudge(vlm, question, batch_size=1, **options)(noise(), PROMPTS, ({},) * 3)
    assert together == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) == 3


def test_the_other_answer_has_the_other_probability(vlm):
    for_, against = (
        VLMJudge(vlm, QUESTION, answers=answers)(noise(), PROMPTS, ({},) * 3)
        for answers in (("yes", "no"), ("no", "yes"))
    )
    assert np.add(for_, against).tolist() == pytest.approx([1.0] * 3, abs=1e-6)


def test_a_sample_may_bring_its_own_question(vlm):
    own = [{"question": "is it a {prompt} ?"}, {"question": None}, {"other": 1}]
    mixed = VLMJudge(vlm, QUESTION)(noise(), PROMPTS, own)
    default = VLMJudge(vlm, QUESTION)(noise(), PROMPTS, ({}, None, "text"))
    other = VLMJudge(vlm, "is it a {prompt} ?")(noise(), PROMPTS, ({},) * 3)
    assert mixed == pytest.approx([other[0], *default[1:]], abs=1e-5)
    assert abs(other[0] - default[0]) > 1e-3
    with pytest.raises(TypeError, match="'cat'.*\"question\" 3"):
        VLMJudge(vlm, QUESTION)(noise(1), PROMPTS[:1], ({"question": 3},))


def test_braces_in_a_prompt_are_text(vlm):
    braces, unknown = (VLMJudge(vlm, QUESTION)(noise(1), (prompt,), ({},)) for prompt in ("{0}", "<unk>"))
    assert braces == pytest.approx(unknown, abs=1e-6)


def test_a_description_is_the_models_greedy_one_and_scores_the_recall_of_the_prompt(vlm, bert):
    alone = Alone(vlm)
    reward = VLMJudge(vlm, "what is in the image ?", mode="caption", text_model=bert, text_layer=2, max_new_tokens=6)
    scores = reward(noise(), PROMPTS, ({},) * 3)
    judge = reward._loaded
    assert judge is not None
    encoder, tokenizer = BertModel.from_pretrained(bert), BertTokenizer.from_pretrained(bert)
    for image, prompt, score in zip(noise(), PROMPTS, scores, strict=True):
        description = alone.describe(picture(image), "user <image> what is in the image ? assistant", 6)
        assert judge.describe([picture(image)], ["what is in the image ?"], 6) == [description]
        embedded = []
        for text in (prompt, description):
            with torch.no_grad():
                ids = tokenizer(text, return_tensors="pt")["input_ids"]
                hidden = encoder(ids, output_hidden_states=True).hidden_states[2][0, 1:-1].double().numpy()
            embedded.append(hidden)
        best = [
            max(word @ other / (np.linalg.norm(word) * np.linalg.norm(other)) for other in embedded[1])
            for word in embedded[0]
        ]
        assert score == pytest.approx(np.mean(best), abs=1e-5)
        assert len(description.split()) > 1  # or else there is nothing to match


def test_the_reference_may_have_a_sentence_around_the_prompt(vlm, bert):
    options = {"mode": "caption", "text_model": bert, "text_layer": 2, "max_new_tokens": 4}
    around = VLMJudge(vlm, "what ?", reference="the image show {prompt}", **options)(noise(1), ("cat",), ({},))
    written = VLMJudge(vlm, "what ?", **options)(noise(1), ("the image show cat",), ({},))
    assert around == written


def test_recall_by_hand():
    reference = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    description = torch.tensor([[3.0, 4.0], [5.0, 0.0], [-1.0, 0.0]])
    # (2, 0) finds (5, 0): 1; the best for (0, 1) is (3, 4): 0.8.
    assert recall(reference, description).item() == pytest.approx(0.9)
    assert recall(description, reference).item() == pytest.approx((0.8 + 1.0 + 0.0) / 3)
    assert recall(reference, description[:0]).item() == recall(reference[:0], description).item() == 0.0


def test_an_empty_prompt_scores_nothing(vlm, bert):
    reward = VLMJudge(vlm, "what ?", mode="caption", text_model=bert, text_layer=2, max_new_tokens=3)
    scores = reward(noise(2), ("", "cat"), ({}, {}))
    assert scores[0] == 0.0 != scores[1]


def test_a_pickled_judge_scores_the_same(vlm):
    reward = VLMJudge(vlm, QUESTION)
    scores = reward(noise(), PROMPTS, ({},) * 3)
    assert pickle.loads(pickle.dumps(reward))(noise(), PROMPTS, ({},) * 3) == scores


def test_it_computes_in_the_dtype_it_is_told(vlm):
    half, full = VLMJudge(vlm, QUESTION, dtype=torch.bfloat16), VLMJudge(vlm, QUESTION)
    scores = [reward(noise(), PROMPTS, ({},) * 3) for reward in (half, full)]
    assert half._loaded is not None and half._loaded.model.dtype == torch.bfloat16
    assert scores[0] == pytest.approx(scores[1], abs=0.1) and scores[0] != scores[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "answer"}, "mode is 'answer'"),
        ({"answers": ("yes", "Yes")}, "answers is"),
        ({"answers": ("yes",)}, "answers is"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"text_layer": -1}, "text_layer is -1"),
        ({"mode": "caption", "question": "is it {prompt} ?"}, "would only repeat it"),
        ({"mode": "caption", "reference": "a cat"}, "reference is 'a cat'"),
    ],
)
def test_mistakes_are_named_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        VLMJudge("nowhere", **options)


def test_answers_the_model_has_no_token_for_and_layers_it_has_not_are_refused(vlm, bert):
    with pytest.raises(ValueError, match="'oui'.*not one token"):
        VLMJudge(vlm, answers=("oui", "no"))(noise(1), ("cat",), ({},))
    with pytest.raises(ValueError, match="text_layer is 40.*3 layers"):
        VLMJudge(vlm, mode="caption", text_model=bert)(noise(1), ("cat",), ({},))
