"""Splitting of a batch of samples into calls of a pipeline, and state that a call must not change."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from PIL import Image
from torch import Tensor, nn
from transformers.utils import logging

from ddpo_trl.policy.records import Context
from ddpo_trl.policy.schedulers import Replay, StepReplayed
from ddpo_trl.policy.values import by_value
from ddpo_trl.seeding import Stream, derived_seed, forked_generators


logger = logging.get_logger(__name__)

# The coarsest precision in which float32 is multiplied: TensorFloat-32 has the mantissa of float16.
COARSE = torch.float16


class BatchCalls:
    """
    Splits batches into the calls that a pipeline needs, and lays out their inputs.

    One call per batch is the fastest, but a pipeline may take one value per call only (Wan image-to-video), read a
    list as several values of every sample (FLUX.2), or draw noise for all samples from torch's global generator
    (ControlNet of Stable Diffusion 3). Pipelines do not declare this: it is detected by running the first step of the
    first batch. If a sample depends on the batch it is in, every sample gets its own call.

    Args:
        denoiser ([`~diffusers.ModelMixin`]):
            The trained network.
        run (`Callable[[Context, Replay], Replay]`):
            Makes one call of the pipeline for all samples of a context, up to the replayed step.
        images_after_one_step (`Callable[[Context], torch.Tensor]`):
            Makes one call of the pipeline for all samples of a context, with a single denoising step.
        is_plain (`bool`):
            Whether calls without per-sample inputs contain texts and numbers only, for which batches always work.

    Attributes:
        draws (`bool`):
            Whether the pipeline draws from torch's global generators before its first step.
        one_by_one_reason (`str`, *optional*):
            Reason why every sample gets its own call; `None` if calls make several samples.
        without_effect (`list[str]`):
            Names of inputs for which another value did not change the image after one step.
    """

    def __init__(
        self,
        denoiser: ModelMixin,
        run: Callable[[Context, Replay], Replay],
        images_after_one_step: Callable[[Context], Tensor],
        is_plain: bool,
    ):
        self.denoiser = denoiser
        self.draws = False
        self.one_by_one_reason: str | None = None
        self.without_effect: list[str] = []
        self._run = run
        self._images_after_one_step = images_after_one_step
        self._is_plain = is_plain
        self._together: bool | None = None  # whether a call makes several samples; `None` if not known yet
        self._bare: bool | None = None  # whether a call for one sample gets an input's value itself, without a list

    def split(self, context: Context) -> list[Context]:
        """
        Return the contexts of the calls that make a batch, in order.

        Args:
            context ([`~ddpo_trl.policy.records.Context`] of length `B`):
                The batch.

        Returns:
            `list[Context]`: One of length `B`, or `B` of length 1.

        Raises:
            `Exception`: Any error of the pipeline if it does not accept the inputs of a single sample.
        """
        if len(context) > 1:
            if self._together is None:
                self._learn_together(context)
            if self._together:
                return [context]
        singles = context.singles()
        self._learn_single(singles[0])
        return singles

    def inputs(self, context: Context) -> dict[str, Any]:
        """Return the per-sample arguments of a call. Texts are always in a list, as prompts are."""
        bare = len(context) == 1 and self._bare
        return {
            name: values[0] if bare and not isinstance(values[0], str) else list(values)
            for name, values in context.inputs.items()
        }

    def run_either_way(self, single: Context, run: Callable[[Context], Any]) -> bool:
        """
        Run a call for one sample with its inputs in lists; if it is refused, with the inputs themselves.

        Args:
            single ([`~ddpo_trl.policy.records.Context`] of length 1):
                The sample.
            run (`Callable[[Context], Any]`):
                Makes the call.

        Returns:
            `bool`: Whether the call with lists was refused.
        """
        before, self._bare = self._bare, False
        try:
            try:
                run(single)
                return False
            except torch.OutOfMemoryError:
                raise
            except Exception:  # a pipeline may refuse a list in any way
                if not single.inputs:
                    raise
            self._bare = True
            run(single)
            return True
        finally:
            self._bare = before

    def _learn_single(self, single: Context) -> None:
        if self._bare is None:
            self._bare = self.run_either_way(single, self._first_step)

    def _learn_together(self, context: Context) -> None:
        what = " and ".join(context.inputs) or "pipeline_kwargs"
        if self._is_plain and not context.inputs:
            self._first_step(context)
            reason = None
        else:
            reason = self._reason_for_one_by_one(context, what)
        if self.draws:
            reason = "it draws random numbers for all samples of a batch from torch's global generator"
        self._together, self.one_by_one_reason = reason is None, reason
        if reason is not None:
            logger.warning(f"Every sample gets its own call of the pipeline: {reason}.")

    def _reason_for_one_by_one(self, context: Context, what: str) -> str | None:
        singles = context.singles()
        self._learn_single(singles[0])
        alone = [self._first_step(single) for single in singles]
        if alone[1].latents is not None:
            self._compare_inputs(singles[0], singles[1], alone[1])
        try:
            batch = self._first_step(context)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a pipeline may refuse a batch in any way
            return f"it takes no batch with {what} ({type(error).__name__}: {error})"
        if batch.latents is None:
            return None  # no step was run, which is reported elsewhere
        if not is_batch_of(batch, alone, coarsest_precision(self.denoiser, batch.latents)):
            return f"in a batch it makes another sample from {what} than from each alone"
        copies = Context(
            prompts=context.prompts,
            seeds=context.seeds,
            inputs={name: [values[0]] * len(context) for name, values in context.inputs.items()},
        )
        if context.inputs and not torch.equal(self._first_step(copies).mean[0], batch.mean[0]):
            return f"in a batch a sample changes with the {what} of the others"
        return None

    def _compare_inputs(self, other: Context, single: Context, run: Replay) -> None:
        """Record and report the inputs that can be exchanged with another sample's without an effect."""
        for name, values in other.inputs.items():
            if by_value(values) == by_value(single.inputs[name]):
                continue  # or they can't be compared
            changed = replace(single, inputs={**single.inputs, name: values})
            try:
                has_effect = self._has_effect(changed, single, run)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # it may not fit the other inputs, and then it has an effect
                continue
            if not has_effect:
                self.without_effect.append(name)
                logger.warning(
                    f"pipeline_inputs names {name!r}, but with another value of it a sample is the same after one "
                    "step. If it is not meant for later steps, the pipeline ignores it: look for the setting that "
                    "makes it read it."
                )

    def _has_effect(self, changed: Context, single: Context, run: Replay) -> bool:
        if not torch.equal(self._first_step(changed).mean, run.mean):
            return True
        # A mask may act behind the step only.
        images = []
        for context in (single, changed):
            with self.drawing_from(context):
                images.append(self._images_after_one_step(context))
        return not torch.equal(*images)

    @torch.no_grad()
    def _first_step(self, context: Context) -> Replay:
        """Run the first step, and record if random numbers are drawn before it; without inputs, stop there."""
        with self.drawing_from(context):
            before = global_states(self.denoiser.device)

            def note(*_: Any) -> None:
                hook.remove()
                states = global_states(self.denoiser.device)
                self.draws |= not all(map(torch.equal, states, before))
                if self._is_plain and not context.inputs:
                    raise StepReplayed

            hook = self.denoiser.register_forward_pre_hook(note, prepend=True)  # hooks of others may draw
            try:
                return self._run(context, Replay(0))
            finally:
                hook.remove()

    @contextmanager
    def drawing_from(self, context: Context) -> Iterator[None]:
        """Seed torch's global generators from the samples, and restore them at the end."""
        device = self.denoiser.device
        seed = derived_seed(context.seeds[0], Stream.PIPELINE)
        with forked_generators(device):
            torch.default_generator.manual_seed(seed)
            if device.type != "cpu":
                torch.get_device_module(device).manual_seed(seed)
            yield


def global_states(device: torch.device) -> list[Tensor]:
    """Return the states of torch's global generators on the CPU and on a device."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def coarsest_precision(denoiser: ModelMixin, latents: Tensor) -> float:
    """Return the relative rounding error of the coarsest dtype that a pipeline computes with."""
    kind = latents.device.type
    dtypes = [latents.dtype, denoiser.dtype] if kind == "cpu" else [latents.dtype, denoiser.dtype, COARSE]
    if torch.is_autocast_enabled(kind):
        dtypes.append(torch.get_autocast_dtype(kind))
    return max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)


def is_batch_of(batch: Replay, alone: list[Replay], precision: float) -> bool:
    """Return whether a step of a batch is that of each of its samples alone, to half the digits of a precision."""
    means = [each.mean for each in alone]
    if [mean.shape[1:] for mean in means] != [batch.mean.shape[1:]] * len(batch.mean):
        return False
    assert batch.latents is not None, "the step was run"
    difference = (batch.mean - torch.cat(means)).norm()
    return bool(difference <= precision**0.5 * (batch.mean - batch.latents).norm())


def images_tensor(output: Any) -> Tensor:
    """
    Convert a pipeline's images of any `output_type` to one tensor.

    Args:
        output (`torch.Tensor`, `np.ndarray`, `PIL.Image.Image` or `list` of these):
            Tensors have channels before height and width; arrays and PIL images have them last.

    Returns:
        `torch.Tensor` of shape `(B, 3, H, W)` or `(B, F, 3, H, W)`, float32; in [0, 1] if it was integers.
    """
    match output:
        case Tensor():
            return output.float()
        case np.ndarray():
            images = torch.from_numpy(output).movedim(-1, -3)
            return images.float() / 255 if output.dtype == np.uint8 else images.float()
        case Image.Image():
            return images_tensor(np.array(output.convert("RGB")))
        case _:
            return torch.stack([images_tensor(part) for part in output])


def attention_modules(networks: Iterable[Any]) -> list[Any]:
    """Return the attention layers of networks. Other objects are skipped."""
    return [
        module
        for network in networks
        if isinstance(network, nn.Module)
        for module in network.modules()
        if isinstance(module, Attention | AttentionModuleMixin)
    ]


@contextmanager
def processors_kept(modules: Iterable[Any]) -> Iterator[None]:
    """
    Restore the processors of attention layers when the context is left.

    Pipelines with perturbed attention guidance (PAG) replace them while they run, and restore them only at the end of
    a call, which a replay does not reach.

    Args:
        modules (`Iterable[torch.nn.Module]`):
            [`attention_modules`].
    """
    before = [(module, module.processor) for module in modules]
    try:
        yield
    finally:
        for module, processor in before:
            if module.processor is not processor:
                module.set_processor(processor)
