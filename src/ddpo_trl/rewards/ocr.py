"""How legibly an image shows the text that was asked for, as text recognition reads it."""

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
    How legibly an image shows the text that was asked for, in [0, 1]: the text rendering reward of
    [Flow-GRPO](https://huggingface.co/papers/2505.05470), 1 − min(1, edit distance / length of the text asked for).

    The text asked for is `metadata["text"]`, or else the first text in double quotation marks in the prompt, such as
    `'a shop sign that says "OPEN"'`. Case and spaces do not count. The recognized lines are read one after the other,
    from the top; if the text asked for occurs among them the reward is 1, whatever else is written. Of a video every
    frame is read, and the mean is its reward.

    The model is PP-OCRv6 small (Apache-2.0), which reads Chinese, Japanese, English and 46 more languages in Latin
    script. The wheel of `rapidocr` contains it: nothing is downloaded. Flow-GRPO uses an older PP-OCR for English, so
    rewards of single images may differ from its. Lines that are read with a confidence below 0.5 count as not there.

    It runs on the CPU, wherever the images are, one image after the other; `device`, `dtype` and `batch_size` would
    change nothing and are no arguments. Needs `pip install ddpo_trl[ocr]`.

    Args:
        num_threads (`int`, *optional*, defaults to `1`):
            Of the CPU, for reading one image. More compete with sampling, which goes on meanwhile.

    Raises:
        `ValueError`: If `num_threads` is not positive; when called, if there is no text that was asked for.

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
        """The text recognition, on the CPU whatever the device."""
        try:
            import onnxruntime  # noqa: F401  (RapidOCR looks for it only when it reads the first image)
            import rapidfuzz  # noqa: F401
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError("OCRAccuracy needs RapidOCR: `pip install ddpo_trl[ocr]`.") from error
        models = files("rapidocr") / "models"  # named, because a model that is not there would be downloaded
        return RapidOCR(
            params={
                "Global.log_level": "error",  # it warns of every image without text
                "Global.use_cls": False,  # as in Flow-GRPO, text upside down is not turned round
                "EngineConfig.onnxruntime.intra_op_num_threads": self.num_threads,
                "Det.model_path": str(models / "PP-OCRv6_det_small.onnx"),
                "Rec.model_path": str(models / "PP-OCRv6_rec_small.onnx"),
            }
        )

    def score(
        self, loaded: "RapidOCR", images: list[Image.Image], prompts: Sequence[str], metadata: Sequence[Any]
    ) -> Tensor:
        """Rewards of images; see [`~ddpo_trl.rewards.RewardModel.score`]."""
        targets = [text_asked_for(prompt, about) for prompt, about in zip(prompts, metadata, strict=True)]
        return torch.tensor(
            [text_accuracy(recognize(loaded, image), target) for image, target in zip(images, targets, strict=True)]
        )


def text_asked_for(prompt: str, metadata: Any) -> str:
    """
    The text that an image should show: `metadata["text"]`, or else the first text in double quotation marks.

    Args:
        prompt (`str`):
            With the text in `"..."` or `“...”`, unless the metadata has it.
        metadata (`Any`):
            Read if it is a mapping; a `"text"` of `None` counts as none.

    Raises:
        `ValueError`: If there is none, or one without a character.
    """
    text = metadata.get("text") if isinstance(metadata, Mapping) else None
    if text is None and (match := QUOTED.search(prompt)):
        text = match[1] or match[2]
    if not isinstance(text, str) or not without_spaces(text):
        raise ValueError(
            f"OCRAccuracy does not know what should be written: the prompt {prompt!r} has no text in double quotation "
            f'marks, and its metadata are {metadata!r}. Put the text in quotation marks, or give it as "text" in the '
            "metadata."
        )
    return text


def text_accuracy(recognized: str, target: str) -> float:
    """
    1 − min(1, Levenshtein distance / length of the target), and 1 if the target is a part of the recognized text.

    Case and spaces do not count. As in the reference implementation of https://huggingface.co/papers/2505.05470.

    Args:
        recognized (`str`):
            What was read.
        target (`str`):
            What should be there: at least one character that is not a space.

    Returns:
        `float` in [0, 1].
    """
    from rapidfuzz.distance import Levenshtein

    recognized, target = without_spaces(recognized), without_spaces(target)
    distance = 0 if target in recognized else Levenshtein.distance(recognized, target)
    return 1 - min(1, distance / len(target))


def without_spaces(text: str) -> str:
    """In lower case, without anything that separates words or lines."""
    return "".join(text.lower().split())


def recognize(reader: "RapidOCR", image: Image.Image) -> str:
    """The lines of text in an image, from the top; empty if there are none."""
    return "".join(reader(image).txts or ())
