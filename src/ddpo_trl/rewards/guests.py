"""Isolated calls of a user's function: its side effects on arguments, torch and the process are undone."""

import asyncio
import contextlib
import inspect
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ddpo_trl.descriptions import own_copy
from ddpo_trl.rewards.function import RewardFunction
from ddpo_trl.rewards.workers import CallTimeout, call_within
from ddpo_trl.transfers import Behind


# Process-wide settings that a reward function may change: getter and setter.
SHARED: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (os.getcwd, os.chdir),  # output_dir may be relative
]


def call_as_guest(
    function: RewardFunction,
    images: Tensor,
    prompts: tuple[str, ...],
    metadata: tuple[Any, ...],
    timeout: float | None = None,
    behind: Behind = contextlib.nullcontext,
) -> Any:
    """
    Call a reward function so that changes to its arguments or to torch's settings have no effect outside: with copies
    of images and metadata, in its own thread, without gradients, and with the images' GPU as the current device. The
    function may be `async`.

    Args:
        function (`Callable`):
            See [`~ddpo_trl.rewards.function.RewardFunction`].
        images, prompts, metadata:
            Its arguments.
        timeout (`float`, *optional*):
            Time limit in seconds.
        behind (`Callable`, *optional*):
            Context for work on the images, see [`~ddpo_trl.transfers.behind`].

    Returns:
        The value that the function returned.

    Raises:
        [`~ddpo_trl.rewards.workers.CallTimeout`]: If it takes longer. Exceptions of the function are passed on.
    """

    def call() -> Any:
        # Every thread starts on GPU 0: a model that the function loads to "cuda" would be there on all ranks.
        if images.device.type != "cpu":
            torch.accelerator.set_device_index(images.device)  # of this thread, which ends with the call
        with GUESTS.visit(), behind(), torch.no_grad():
            answer = function(images.detach().clone(), prompts, tuple(map(own_copy, metadata)))
            return asyncio.run(_await_within(timeout, answer)) if inspect.isawaitable(answer) else answer

    return call_within(timeout, call)


class Guests:
    """
    Restores process-wide settings ([`SHARED`]: torch's default dtype, the working directory) to their values from
    before the first of several concurrent reward functions. They are restored after the last of them, since one that
    is still loading a model may need another dtype meanwhile.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[Any] = []

    @contextlib.contextmanager
    def visit(self) -> Iterator[None]:
        """Surround the call of a function."""
        with self._lock:
            if not self._inside:
                self._before = [get() for get, _ in SHARED]
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    for (_, restore), value in zip(SHARED, self._before, strict=True):
                        restore(value)


GUESTS = Guests()


async def _await_within(seconds: float | None, answer: Awaitable[Any]) -> Any:
    """Await with a time limit; unlike a thread, a coroutine can be canceled."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await answer
    except TimeoutError:
        if limit.expired():
            raise CallTimeout from None
        raise
