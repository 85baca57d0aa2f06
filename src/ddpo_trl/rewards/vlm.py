"""Prompt alignment by a vision-language model: its answer to a question, or its description of the image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from ddpo_trl.rewards.model import RewardModel


QUESTIONS = {
    "question": 'Does this image show "{prompt}"? Please answer yes or no.',
    "caption": "Answer concisely: what is going on in this image?",
}


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """Model and tokenizer that embed texts token by token, and the layer to use; 0 is the embeddings."""

    model: Any
    tokenizer: Any
    layer: int

    def embed(self, texts: Sequence[str]) -> list[Tensor]:
        """Return a `(T, d)` tensor for each text, without special tokens; T may be 0."""
        inputs = self.tokenizer(
            list(texts),
            padding=True,
            padding_side="right",
            truncation=True,
            return_special_tokens_mask=True,
            return_tensors="pt",
        ).to(self.model.device)
        words = inputs["attention_mask"].bool() & ~inputs.pop("special_tokens_mask").bool()
        hidden = self.model(**inputs, output_hidden_states=True).hidden_states[self.layer]
        return [rows[kept].float() for rows, kept in zip(hidden, words, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """
    Vision-language model.

    Args:
        model, processor (`Any`):
            The model and processor, from transformers.
        yes, no (`list[int]`):
            Tokens that count as each answer. Empty in mode `"caption"`.
        text_encoder (`TextEncoder`, *optional*):
            Only in mode `"caption"`.
    """

    model: Any
    processor: Any
    yes: list[int]
    no: list[int]
    text_encoder: TextEncoder | None

    def inputs(self, images: Sequence[Image.Image], questions: Sequence[str]) -> Any:
        """Return the model's inputs for one question per image, padded on the left, as generation requires."""
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
            for image, question in zip(images, questions, strict=True)
        ]
        return self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(self.model.device, self.model.dtype)

    def probability(self, images: Sequence[Image.Image], questions: Sequence[str]) -> Tensor:
        """Return p(yes) / (p(yes) + p(no)) for the first token of the answer: `(B,)`, in [0, 1]."""
        # `generate` instead of `forward`: it counts positions in padded rows as each architecture requires.
        answer = self.model.generate(
            **self.inputs(images, questions),
            max_new_tokens=1,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = answer.logits[0].float()
        return torch.sigmoid(logits[:, self.yes].logsumexp(1) - logits[:, self.no].logsumexp(1))

    def describe(self, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int) -> list[str]:
        """Return the answers of the model, by greedy decoding."""
        inputs = self.inputs(images, questions)
        tokens = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(answers, skip_special_tokens=True)]


class VLMJudge(RewardModel[Judge]):
    """
    Prompt alignment, judged by a vision-language model: any image-text-to-text model of transformers with a chat
    template.

    With `mode="question"` the model is asked whether the image shows the prompt. The reward is the probability of
    "yes" relative to "no" for the first token of its answer: p(yes) / (p(yes) + p(no)), in [0, 1]. VQAScore
    (https://huggingface.co/papers/2404.01291) is p(yes) alone.

    With `mode="caption"` the model describes the image. The reward is the recall of BERTScore
    (https://huggingface.co/papers/1904.09675) of the description, in [-1, 1]: the mean, over the tokens of the prompt,
    of the highest cosine similarity with a token of the description, in the embeddings of a text encoder. An empty
    prompt or description scores 0. This is the prompt alignment task of https://huggingface.co/papers/2305.13301,
    whose code uses LLaVA, the same question, text encoder and layer, and the reference
    `"The image contains {prompt}"`. Unlike in the package bert-score, no token of the prompt may match a special token
    of the description.

    A policy learns whatever increases the model's answer: in the paper, it wrote the number of animals into the image
    instead of drawing as many.

    The license is that of the models: Apache-2.0 for `"HuggingFaceTB/SmolVLM-Instruct"`, for instance, the Llama 2
    license for `"llava-hf/llava-1.5-7b-hf"`, MIT for the text encoder. Models whose processor takes videos too, such
    as Qwen2-VL, need the package torchvision.

    Args:
        model (`str`):
            Hub id or folder of the vision-language model.
        question (`str`, *optional*):
            Question; `{prompt}` stands for the prompt. By default `'Does this image show "{prompt}"? Please answer yes
            or no.'` or, in mode `"caption"`, `"Answer concisely: what is going on in this image?"`. In mode
            `"question"`, a text under `"question"` in the metadata of a sample replaces it.
        mode (`str`, *optional*, defaults to `"question"`):
            `"question"` or `"caption"`.
        answers (`tuple[str, str]`, *optional*, defaults to `("yes", "no")`):
            Positive and negative answer in mode `"question"`, in any capitalization. Each must be one token of the
            model.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Largest number of tokens of a description.
        text_model (`str`, *optional*, defaults to `"microsoft/deberta-xlarge-mnli"`):
            Hub id or folder of the text encoder.
        text_layer (`int`, *optional*, defaults to `40`):
            Layer of it whose output is compared. The authors of BERTScore recommend 40 for the default model, 17 for
            `"roberta-large"` and 9 for `"bert-base-uncased"`.
        reference (`str`, *optional*, defaults to `"{prompt}"`):
            Text whose recall is measured.
        **options:
            `device`, `dtype` and `batch_size` of [`RewardModel`].

    Raises:
        `ValueError`: If the mode is unknown, the question for a description contains the prompt, the reference does
            not, the answers are equal, or a number is out of range. In the first call: if an answer is not one token,
            or the text encoder has fewer layers.
        `TypeError`: In a call, if the question of a sample is not a text.
    """

    def __init__(
        self,
        model: str,
        question: str | None = None,
        *,
        mode: Literal["question", "caption"] = "question",
        answers: tuple[str, str] = ("yes", "no"),
        max_new_tokens: int = 64,
        text_model: str = "microsoft/deberta-xlarge-mnli",
        text_layer: int = 40,
        reference: str = "{prompt}",
        **options: Any,
    ):
        super().__init__(**options)
        if mode not in QUESTIONS:
            raise ValueError(f'mode is {mode!r}; it must be "question" or "caption".')
        if len(answers) != 2 or answers[0].lower() == answers[1].lower():
            raise ValueError(f"answers is {answers!r}; pass two different ones, such as ('yes', 'no').")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        if text_layer < 0:
            raise ValueError(f"text_layer is {text_layer}; it must be 0 (the embeddings) or more.")
        self.model = model
        self.question = QUESTIONS[mode] if question is None else question
        self.mode = mode
        self.answers = answers
        self.max_new_tokens = max_new_tokens
        self.text_model = text_model
        self.text_layer = text_layer
        self.reference = reference
        if mode == "caption" and "{prompt}" in self.question:
            raise ValueError(
                f"question is {self.question!r}; a model that knows the prompt would only repeat it. Leave out "
                '`{prompt}`, or use mode="question".'
            )
        if "{prompt}" not in reference:
            raise ValueError(f"reference is {reference!r}; it must contain `{{prompt}}`, which stands for the prompt.")

    def load(self, device: torch.device) -> Judge:
        model = AutoModelForImageTextToText.from_pretrained(self.model, dtype=self.dtype).to(device).eval()
        processor = AutoProcessor.from_pretrained(self.model)
        asks = self.mode == "question"
        yes, no = [answer_tokens(processor.tokenizer, answer) if asks else [] for answer in self.answers]
        return Judge(
            model=model,
            processor=processor,
            yes=yes,
            no=no,
            text_encoder=None if asks else self._load_text_encoder(device),
        )

    def _load_text_encoder(self, device: torch.device) -> TextEncoder:
        model = AutoModel.from_pretrained(self.text_model, dtype=self.dtype).to(device).eval()
        layers = model.config.num_hidden_layers
        if self.text_layer > layers:
            raise ValueError(
                f"text_layer is {self.text_layer}, but {self.text_model!r} has {layers} layers; pass one that it has."
            )
        return TextEncoder(
            model=model, tokenizer=AutoTokenizer.from_pretrained(self.text_model), layer=self.text_layer
        )

    def score(
        self, loaded: Judge, images: list[Image.Image], prompts: Sequence[str], metadata: Sequence[Any]
    ) -> Tensor:
        if loaded.text_encoder is None:
            questions = [self._question(*sample) for sample in zip(prompts, metadata, strict=True)]
            return loaded.probability(images, questions)
        descriptions = loaded.describe(images, [self.question] * len(images), self.max_new_tokens)
        references = [self.reference.replace("{prompt}", prompt) for prompt in prompts]
        embeddings = loaded.text_encoder.embed([*references, *descriptions])
        pairs = zip(embeddings[: len(images)], embeddings[len(images) :], strict=True)
        return torch.stack([recall(reference, description) for reference, description in pairs])

    def _question(self, prompt: str, entry: Any) -> str:
        # In a dataset's column, `None` stands for a row without a question.
        own = entry.get("question") if isinstance(entry, Mapping) else None
        if not isinstance(own, str | None):
            raise TypeError(f'The metadata of prompt {prompt!r} has the "question" {own!r}; it must be a text.')
        # Not `format`: prompts and questions may contain other braces.
        return (self.question if own is None else own).replace("{prompt}", prompt)


def answer_tokens(tokenizer: Any, answer: str) -> list[int]:
    """
    Return the tokens that are an answer in some capitalization, with or without a space before it.

    Args:
        tokenizer (`Any`):
            Tokenizer from transformers.
        answer (`str`):
            Word, such as `"yes"`.

    Raises:
        `ValueError`: If there is none.
    """
    spellings = [space + word for space in ("", " ") for word in (answer.lower(), answer.capitalize(), answer.upper())]
    encoded = [tokenizer(spelling, add_special_tokens=False)["input_ids"] for spelling in spellings]
    tokens = {ids[0] for ids in encoded if len(ids) == 1} - {tokenizer.unk_token_id}
    if not tokens:
        raise ValueError(f"answers has {answer!r}, which is not one token of the model; pass a shorter word.")
    return sorted(tokens)


def recall(reference: Tensor, description: Tensor) -> Tensor:
    """
    Return BERTScore's recall: the mean over the reference's tokens of the highest cosine with a token of the
    description.

    Args:
        reference (`torch.Tensor` of shape `(T, d)`), description (`torch.Tensor` of shape `(U, d)`):
            Embeddings of their tokens.

    Returns:
        `torch.Tensor` of shape `()`, in [-1, 1]; 0 if T or U is 0.
    """
    if not (len(reference) and len(description)):
        return reference.new_zeros(())
    return (normalize(reference, dim=1) @ normalize(description, dim=1).T).amax(1).mean()
