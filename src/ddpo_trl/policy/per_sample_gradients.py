"""Per-sample gradients of log-probabilities, taken while sampling: the basis of one pass.

The score-function gradient is linear in the advantages, g = −Σ_i A_i ∇log π(τ_i). With ∇log π(τ_i) kept for every
sample, the rewards only have to weight them, and no step has to be run a second time.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


TrainedLayer = nn.Linear | nn.Conv2d


class Call(NamedTuple):
    """
    One call of a layer in a forward pass.

    Args:
        number (`int`):
            Number of calls of watched layers before it in this forward pass.
        layer (`torch.nn.Linear` or `torch.nn.Conv2d`):
            The layer.
        inputs (`torch.Tensor` of shape `(R, ...)`):
            Its inputs. The rows R are those of all samples: twice as many with classifier-free guidance, more where a
            sample has several frames.
    """

    number: int
    layer: TrainedLayer
    inputs: Tensor


class Watch:
    """
    Hand over the gradient of each output of some layers as soon as a backward pass has computed it.

    So no two gradients need to be in memory at a time, nor the outputs. Inputs are kept as autograd keeps tensors:
    activation checkpointing recomputes them. PyTorch's own product with the inputs, which sums over the batch, is not
    computed.

    Args:
        layers (`Iterable[torch.nn.Module]`):
            The layers.
        take (`Callable[[Call, torch.Tensor], None]`):
            Called with a call and the gradient of its outputs, in the order of the backward pass; not for calls whose
            outputs the differentiated value does not depend on.
    """

    def __init__(self, layers: Iterable[TrainedLayer], take: Callable[[Call, Tensor], None]):
        self.layers = list(layers)
        self.take = take
        # An input of all watched outputs: a backward pass that goes back to it comes by all of them.
        self._token = torch.zeros((), requires_grad=True)
        self._calls = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """
        Watch the layers while the context is open and grad mode is on. Backward passes have to run in it too:
        activation checkpointing calls the layers again there, and expects them to keep the same tensors.
        """
        hooks = [layer.register_forward_hook(self._watch) for layer in self.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _watch(self, layer: Any, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return outputs
        number, self._calls = self._calls, self._calls + 1
        hand_over = functools.partial(self._hand_over, number, layer)
        watched: Tensor = _WatchedOutput.apply(self._token, hand_over, inputs[0].detach(), outputs)
        return watched

    def _hand_over(self, number: int, layer: TrainedLayer, inputs: Tensor, grad: Tensor) -> None:
        with torch.autocast(
            grad.device.type, enabled=False
        ):  # which a backward pass may find otherwise than a forward
            self.take(Call(number, layer, inputs), grad)

    def backward(self, value: Tensor, others: Sequence[Tensor] = ()) -> tuple[Tensor | None, ...]:
        """
        Run the backward pass of a watched forward pass, and forget it. Return the gradients of `others`, `None` where
        unused.
        """
        _, *gradients = torch.autograd.grad(value, [self._token, *others], allow_unused=True)
        self._calls = 0
        return tuple(gradients)


class _WatchedOutput(torch.autograd.Function):
    """A layer's output, unchanged, whose gradient is handed over together with the layer's inputs."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, hand_over: Callable[[Tensor, Tensor], None], inputs: Tensor, outputs: Tensor
    ) -> Tensor:
        ctx.hand_over = hand_over
        ctx.save_for_backward(inputs)
        return outputs.detach()  # not `outputs`: PyTorch would refuse to change that in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, Tensor]:
        (inputs,) = ctx.saved_tensors
        ctx.hand_over(inputs, grad)
        return None, None, None, grad


class SampleGradients:
    """
    Sums, for each sample of a batch, of the gradient of its log-probability over the steps of its trajectory.

    Args:
        layers (`Mapping[torch.nn.Module, int]`):
            The layers whose weights are trained, each with the number of rows in a row that belong to one sample: 1,
            or the number of frames. See [`row_layout`].
        batch_size (`int`):
            B.

    Attributes:
        watch ([`Watch`]):
            Has to be watching while the denoiser runs.
        sums (`list[torch.Tensor]`):
            A tensor of shape `(B, *weight.shape)` for each weight of [`trained_weights`], float32.
    """

    def __init__(self, layers: Mapping[TrainedLayer, int], batch_size: int):
        self.layers = layers
        self.batch_size = batch_size
        self.watch = Watch(layers, self._take)
        self._sums: dict[Tensor, Tensor] = {
            weight: torch.zeros(batch_size, *weight.shape, device=weight.device) for weight in trained_weights(layers)
        }

    @property
    def sums(self) -> list[Tensor]:
        return list(self._sums.values())

    def add(self, log_probs: Tensor) -> None:
        """
        Add the gradients of a step's log-probabilities, `(B,)`. Those of a sample depend on its own rows only, so one
        backward pass of their sum serves all.
        """
        self.watch.backward(log_probs.sum())

    def _take(self, call: Call, grad: Tensor) -> None:
        inner = self.layers[call.layer]
        for weight, gradient in weight_gradients(call.layer, call.inputs, grad).items():
            by_sample = gradient.unflatten(0, (-1, self.batch_size, inner))
            self._sums[weight] += by_sample.sum((0, 2))


def trained_weights(layers: Iterable[TrainedLayer]) -> list[nn.Parameter]:
    """Return the parameters of the layers that require a gradient."""
    return [weight for layer in layers for weight in layer.parameters(recurse=False) if weight.requires_grad]


def weight_gradients(layer: TrainedLayer, inputs: Tensor, grad: Tensor) -> dict[Tensor, Tensor]:
    """
    Compute the contribution of each row of a batch to the gradient of a layer's weight and bias.

    Args:
        layer (`torch.nn.Linear` or `torch.nn.Conv2d`):
            The layer.
        inputs (`torch.Tensor` of shape `(R, ..., in)` or `(R, C, H, W)`):
            Its inputs.
        grad (`torch.Tensor` of shape `(R, ..., out)` or `(R, out, H', W')`):
            The gradient of its outputs.

    Returns:
        `dict`: A tensor of shape `(R, *parameter.shape)` for the weight and for the bias, if they require a gradient.
    """
    inputs = inputs.to(grad.dtype)  # as autocast had them
    gradients: dict[Tensor, Tensor] = {}
    if layer.weight.requires_grad:
        if isinstance(layer, nn.Conv2d):
            gradients[layer.weight] = _convolution_products(layer, inputs, grad).float()
        else:
            gradients[layer.weight] = (_positions(grad).transpose(1, 2) @ _positions(inputs)).float()
    if layer.bias is not None and layer.bias.requires_grad:
        channels_last = grad.movedim(1, -1) if isinstance(layer, nn.Conv2d) else grad
        gradients[layer.bias] = _positions(channels_last).float().sum(1)
    return gradients


def _positions(values: Tensor) -> Tensor:
    """`(R, ..., channels)` as `(R, positions, channels)`."""
    return values.unsqueeze(1).flatten(1, -2)


def _convolution_products(layer: nn.Conv2d, inputs: Tensor, grad: Tensor) -> Tensor:
    """
    `(R, out, in, *kernel)`: a convolution's products, summed over positions.

    One of the factors has to be laid out once for each place of the kernel. With a stride of 1 it may be either, and
    the one with fewer channels is cheaper: of LoRA's first convolution that is the rank.
    """
    kernel, padding = layer.kernel_size, _padding(layer)
    margin = tuple(d * (k - 1) - p for d, k, p in zip(layer.dilation, kernel, padding, strict=True))
    if kernel == (1, 1) and layer.stride == (1, 1) and padding == (0, 0):
        return (grad.flatten(2) @ inputs.flatten(2).transpose(1, 2))[..., None, None]
    if layer.stride == (1, 1) and min(margin) >= 0 and layer.out_channels < layer.in_channels:
        columns = F.unfold(grad, kernel, layer.dilation, margin)  # (R, out · kernel, positions of the input)
        products = (columns @ inputs.flatten(2).transpose(1, 2)).unflatten(1, (layer.out_channels, *kernel))
        return products.flip(2, 3).movedim(-1, 2)  # seen from the input the kernel is reversed
    columns = F.unfold(inputs, kernel, layer.dilation, padding, layer.stride)  # (R, in · kernel, positions)
    return (grad.flatten(2) @ columns.transpose(1, 2)).unflatten(2, (layer.in_channels, *kernel))


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    assert not isinstance(layer.padding, str), "`trained_layers` refuses named paddings"
    return layer.padding


def trained_layers(denoiser: nn.Module) -> list[TrainedLayer]:
    """
    Return the layers that hold the trained weights of a denoiser.

    Raises:
        `ValueError`: If a trained parameter belongs to a layer that is neither linear nor a plain convolution.
    """
    layers = []
    for name, module in denoiser.named_modules():
        if not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            continue
        if not _has_known_gradient(module):
            raise ValueError(f"{name} is a {type(module).__name__}, whose gradient is not known sample by sample")
        layers.append(module)
    return layers


def _has_known_gradient(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear)


def reached_rows(grad: Tensor) -> Tensor:
    """Return which rows of an `(R, ...)` gradient are not 0, `(R,)`."""
    return grad.flatten(1).ne(0).any(1)  # none if a row has no elements


def row_layout(of_first: Tensor, of_second: Tensor) -> int:
    """
    Infer from a batch of two how many rows in a row belong to one sample.

    The rows of sample b are k·B·n + b·n + (0, ..., n − 1): for k = 0 without guidance, for k = 0, 1 with it, with n
    rows for each, such as the frames of a video.

    Args:
        of_first, of_second (`torch.Tensor` of shape `(R,)`, bool):
            Rows that the gradient of each sample's log-probability reaches. It vanishes on the rows of the other
            sample, and may on some of its own: keys of an empty negative prompt, all alike, get none.

    Returns:
        `int`: The smallest n that fits.

    Raises:
        `ValueError`: If none does.
    """
    rows = len(of_first)
    for inner in range(1, rows // 2 + 1):
        is_second = torch.arange(rows, device=of_first.device) // inner % 2 == 1
        if rows % (2 * inner) == 0 and not (of_first & is_second).any() and not (of_second & ~is_second).any():
            return inner
    raise ValueError("which rows of its layers belong to which sample can't be determined")
