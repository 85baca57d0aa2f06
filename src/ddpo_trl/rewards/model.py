"""Base class of reward functions with a model."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor


Loaded = TypeVar("Loaded")


class RewardModel(ABC, Generic[Loaded]):
    """
    Reward function with a model, which is loaded in the first call.

    It can be pickled; the copy loads its model again. Calls from several threads run one after the other. The reward
    of a video is the mean over its frames.

    Subclasses define what is loaded and how it scores images:

    ```python
    import torch
    from ddpo_trl.rewards import RewardModel

    class Darkness(RewardModel[float]):
        def load(self, device):
            return 1.0

        def score(self, loaded, images, prompts, metadata):
            return torch.tensor([loaded - sum(image.convert("L").tobytes()) / 255 / (image.width * image.height)
                                 for image in images])

    print(Darkness(batch_size=1)(torch.zeros(2, 3, 8, 8), ("a", "b"), ({}, {})))  # [1.0, 1.0]
    ```

    Args:
        device (`str` or `torch.device`, *optional*):
            Device of the model, such as `"cuda:1"`; that of the images of the first call by default.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Dtype of the model's weights and computation. Rewards are float32.
        batch_size (`int`, *optional*, defaults to `16`):
            Largest number of images scored at once.

    Raises:
        `ValueError`: If the batch size is not positive.
    """

    def __init__(
        self,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self._loaded: Loaded | None = None
        self._lock = threading.Lock()

    @abstractmethod
    def load(self, device: torch.device) -> Loaded:
        """Load everything that [`~RewardModel.score`] needs, on a device."""

    @abstractmethod
    def score(
        self, loaded: Loaded, images: list[Image.Image], prompts: Sequence[str], metadata: Sequence[Any]
    ) -> Tensor:
        """
        Return the rewards of at most `batch_size` images. Called without gradients.

        Args:
            loaded (`Any`):
                Return value of [`~RewardModel.load`].
            images (`list[PIL.Image.Image]` of length `B`):
                RGB images.
            prompts, metadata (`Sequence` of length `B`):
                Prompt and metadata of each image.

        Returns:
            `torch.Tensor` of shape `(B,)`.
        """

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> list[float]:
        """
        Return the rewards of a batch of images or videos.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`, or `(B, F, 3, H, W)` for video):
                Values in [0, 1].
            prompts, metadata (`Sequence` of length `B`):
                Prompt and metadata of each.

        Returns:
            `list[float]` of length `B`.
        """
        pictures = as_pictures(images.flatten(0, -4))
        frames = len(pictures) // len(images)
        owners = [index // frames for index in range(len(pictures))]
        with self._lock, torch.no_grad():
            if self._loaded is None:
                self._loaded = self.load(torch.device(images.device if self.device is None else self.device))
            scores = []
            for first in range(0, len(pictures), self.batch_size):
                rows = slice(first, first + self.batch_size)
                chunk = [prompts[owner] for owner in owners[rows]], [metadata[owner] for owner in owners[rows]]
                scores.append(self.score(self._loaded, pictures[rows], *chunk).float().cpu())
        return torch.cat(scores).view(len(images), frames).mean(1).tolist()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_loaded", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _loaded=None, _lock=threading.Lock())


def as_pictures(images: Tensor) -> list[Image.Image]:
    """Convert a `(B, 3, H, W)` tensor in [0, 1] to RGB images of 8 bits, as diffusers does."""
    pixels = (images.float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(image)) for image in pixels]
