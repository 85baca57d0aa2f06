"""Text rendering: the edit distance of the text that is recognized in an image."""

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ddpo_trl.rewards.model import RewardModel


if TYPE_CHECKING:
    from rapidocr import RapidOCR

QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


class OCRAccuracy(RewardModel["RapidOCR"]):
    """
    Accuracy of the text in an image, in [0, 1]: the text rendering reward of
    [Flow-GRPO](https://huggingface.co/papers/2505.05470), 1 − min(1, edit distance / length of the target).

    The target is `metadata["text"]`, or else the first text in double quotation marks in the prompt, such as
    `'a shop sign that says "OPEN"'`. Case and spaces do not count. Recognized lines are joined from the top; if they
    contain the target, the reward is 1, whatever else is written.

    The model is PP-OCRv6 small (Apache-2.0) for Chinese, Japanese, English and 46 more languages in Latin script. It
    is part of the package `rapidocr`: nothing is downloaded. Flow-GRPO uses an older PP-OCR for English, so single
    rewards may differ. Lines with a confidence below 0.5 are ignored.

    It runs on the CPU, one image after the other, so there are no arguments `device`, `dtype` and `batch_size`. Needs
    `pip install ddpo_trl[ocr]`.

    Args:
        num_threads (`int`, *optional*, defaults to `1`):
            Number of CPU threads per image. More of them compete with sampling, which runs at the same time.

    Raises:
        `ValueError`: If `num_threads` is not positive. In a call: if a prompt has no target.

    Example:

    ```python
    from ddpo_trl.rewards import OCRAccuracy

    reward_fn = OCRAccuracy()
    prompts = ['a shop sign that says "OPEN"', ("a hand-written note", {"text": "back at five"})]
    ```
    """

    def __init__(self, *, num_threads: int = 1):
        super().__init__()
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; it must be at least 1.")
        self.num_threads = num_threads

    def load(self, device: torch.device) -> "RapidOCR":
        try:
            import onnxruntime  # noqa: F401  (RapidOCR looks for it only when it reads the first image)
            import rapidfuzz  # noqa: F401
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError("OCRAccuracy needs RapidOCR: `pip install ddpo_trl[ocr]`.") from error
        models = files("rapidocr") / "models"  # by default, a missing model would be downloaded
        return RapidOCR(
            params={
                "Global.log_level": "error",  # it warns of every image without text
                "Global.use_cls": False,  # as in Flow-GRPO, text upside down is not rotated
                "EngineConfig.onnxruntime.intra_op_num_threads": self.num_threads,
                "Det.model_path": str(models / "PP-OCRv6_det_small.onnx"),
                "Rec.model_path": str(models / "PP-OCRv6_rec_small.onnx"),
            }
        )

    def score(
        self, loaded: "RapidOCR", images: list[Image.Image], prompts: Sequence[str], metadata: Sequence[Any]
    ) -> Tensor:
        targets = [text_asked_for(prompt, about) for prompt, about in zip(prompts, metadata, strict=True)]
        return torch.tensor(
            [text_accuracy(recognize(loaded, image), target) for image, target in zip(images, targets, strict=True)]
        )


def text_asked_for(prompt: str, metadata: Any) -> str:
    """
    Return the text that an image should show: `metadata["text"]`, or else the first text in `"..."` or `“...”`.

    Raises:
        `ValueError`: If there is none, or it has no character.
    """
    text = metadata.get("text") if isinstance(metadata, Mapping) else None
    if text is None and (match := QUOTED.search(prompt)):
        text = match[1] or match[2]
    if not isinstance(text, str) or not without_spaces(text):
        raise ValueError(
            f"OCRAccuracy has no text to look for: the prompt {prompt!r} has none in double quotation marks, and its "
            f'metadata is {metadata!r}. Put the text in quotation marks, or into the metadata as "text".'
        )
    return text


def text_accuracy(recognized: str, target: str) -> float:
    """
    Return 1 if the recognized text contains the target, or else 1 − min(1, Levenshtein distance / target's length).

    Case and spaces do not count. As in the reference implementation of https://huggingface.co/papers/2505.05470.
    """
    from rapidfuzz.distance import Levenshtein

    recognized, target = without_spaces(recognized), without_spaces(target)
    distance = 0 if target in recognized else Levenshtein.distance(recognized, target)
    return 1 - min(1, distance / len(target))


def without_spaces(text: str) -> str:
    """Return the text in lower case, without whitespace."""
    return "".join(text.lower().split())


def recognize(reader: "RapidOCR", image: Image.Image) -> str:
    """Return the joined lines of text in an image, from the top; empty if there are none."""
    return "".join(reader(image).txts or ())
