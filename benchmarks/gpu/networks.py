"""Stable Diffusion 1.5 and SDXL with their published configurations and random weights, made on the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin
from torch import nn

from conformance import image_pipelines
from gpu.setting import is_rehearsal
from real_size import families


DTYPE = torch.bfloat16  # of all networks; the adapter is in float32


class Network(NamedTuple):
    """
    A pipeline and the size of a round with it.

    Args:
        build (`Callable[[], DiffusionPipeline]`):
            Makes the pipeline, with networks on "meta".
        tiny (`Callable[[int], DiffusionPipeline]`):
            Makes the one that stands for it in a rehearsal, from a seed.
        batch_size, steps (`int`):
            Images per round, which are one batch and one micro-batch, and denoising steps.
        image_size (`int`):
            Height and width in pixels.
    """

    build: Callable[[], Any]
    tiny: Callable[[int], Any]
    batch_size: int
    steps: int
    image_size: int

    def pipeline(self, device: str) -> Any:
        """Return a pipeline of its own, the same for each caller."""
        torch.manual_seed(0)
        pipeline = self.tiny(0).to(device, DTYPE) if is_rehearsal(device) else with_weights(self.build(), device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def sized(self, device: str) -> "Network":
        """Return the network with the sizes of a rehearsal, if this is one."""
        tiny = image_pipelines.IMAGE_SIZE
        return self._replace(batch_size=2, steps=3, image_size=tiny) if is_rehearsal(device) else self


@contextmanager
def made_on(device: str) -> Iterator[None]:
    """Weights are made on a device in bfloat16 while the context is open: on a CPU that would take minutes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


def with_weights(pipeline: Any, device: str) -> Any:
    """Replace the networks of a pipeline, which have no memory, by random ones on a device."""
    for name, network in pipeline.components.items():
        if isinstance(network, nn.Module):
            kind: Any = type(network)
            with made_on(device):
                made = kind.from_config(network.config) if isinstance(network, ModelMixin) else kind(network.config)
            pipeline.register_modules(**{name: made.eval()})
    return pipeline


SD, SDXL = image_pipelines.stable_diffusion, image_pipelines.stable_diffusion_xl
NETWORKS = {
    "SD 1.5": Network(families.stable_diffusion, SD, batch_size=4, steps=5, image_size=512),
    "SDXL": Network(families.stable_diffusion_xl, SDXL, batch_size=1, steps=5, image_size=1024),
}
