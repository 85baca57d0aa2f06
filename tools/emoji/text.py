"""Text: a small tokenizer in CLIP's format, a small text encoder, and the captions of the training images."""

import json
import random

import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from data import STYLES, Concept


VOCABULARY_SIZE = 4000
MAX_LENGTH = 16
TEXT_WIDTH = 128
BOS, EOS = "<|startoftext|>", "<|endoftext|>"

# CLIP's split of a text into words, before byte pairs are applied.
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def styled(words: str, style: int) -> str:
    """Adds the word for a style: `("dog face", 1)` becomes `"3d dog face"`."""
    return f"{STYLES[style]} {words}"


def create_tokenizer(concepts: list[Concept]) -> CLIPTokenizer:
    """Trains byte pairs on the captions; other words are spelled out in bytes."""
    words = [text for concept in concepts for text in (concept.caption, *concept.keywords)]
    corpus = [form for text in words for form in (text, styled(text, 0), styled(text, 1))]
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=VOCABULARY_SIZE - 258, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]

    # CLIP's order: bytes, bytes that end a word, merges, and the two special tokens last.
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(merge) for merge in merges), BOS, EOS]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)


def create_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Builds the untrained text encoder: two layers of width 128."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Returns `(len(captions), MAX_LENGTH)` ids, padded as `StableDiffusionPipeline` pads."""
    ids: torch.Tensor = tokenizer(
        captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def sample_caption(concept: Concept, style: int, rng: random.Random) -> str:
    """Draws one of the texts under which the drawing of `concept` in `style` is shown in training.

    10% are empty (for classifier-free guidance) and 40% name the style; a keyword replaces the caption in one of six
    cases if the concept has any.
    """
    if rng.random() < 0.1:
        return ""
    words = rng.choice(concept.keywords) if concept.keywords and rng.random() < 1 / 6 else concept.caption
    return styled(words, style) if rng.random() < 0.45 else words
