"""HTTP server of `ddpo-trl serve-reward`, which computes a reward function for [`~ddpo_trl.rewards.RemoteReward`]."""

import asyncio
import contextlib
import itertools
import logging
import math
import operator
import secrets
import socket
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddpo_trl.rewards.answers import as_rewards
from ddpo_trl.rewards.function import RewardFunction
from ddpo_trl.rewards.guests import call_as_guest
from ddpo_trl.rewards.remote import MEGABYTE, checked_token
from ddpo_trl.rewards.scoring import RewardScorer
from ddpo_trl.rewards.wire_format import unpack
from ddpo_trl.rewards.workers import DaemonPool


if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Sample:
    """
    Image that waits for its reward.

    Args:
        image (`torch.Tensor` of shape `(3, H, W)`, or `(F, 3, H, W)` for video), prompt, metadata:
            Image or video to score, with its prompt and metadata.
        request (`int`):
            Number of its request.
        reward (`Future[float | None]`):
            Its reward: NaN for a value that is not finite, `None` if the function returned `None`.
    """

    image: Tensor
    prompt: str
    metadata: Any
    request: int
    reward: "Future[float | None]" = field(default_factory=Future)


class Batcher:
    """
    Scores images in batches across requests, one batch at a time.

    It does not wait for a batch to fill up: a batch contains the images received while the previous one was computed.

    Args:
        function (`Callable`):
            See [`~ddpo_trl.rewards.function.RewardFunction`].
        batch_size (`int`):
            Largest number of images scored at once.
        device (`str` or `torch.device`):
            Device of the images passed to the function.

    Attributes:
        name (`str`):
            Name of the function.

    Raises:
        `TypeError`: If the function can't be called with three arguments.
        `ValueError`: If the batch size is not positive.
    """

    def __init__(self, function: RewardFunction, batch_size: int, device: str | torch.device = "cpu"):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        self.name = RewardScorer([function], argument="served").names[0]
        self.function = function
        self.batch_size = batch_size
        self.device = device
        self._requests = itertools.count()
        self._waiting: deque[Sample] = deque()
        self._lock = threading.Lock()
        self._pool = DaemonPool(1, name="reward")

    def submit(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> "list[Future[float | None]]":
        """Submit a request, and return a future for each of its images."""
        with self._lock:
            request = next(self._requests)
            rows = zip(images, prompts, metadata, strict=True)
            samples = [Sample(*row, request) for row in rows]
            self._waiting.extend(samples)
        self._pool.submit(self._work_off)
        return [sample.reward for sample in samples]

    def _work_off(self) -> None:
        while batch := self._next():
            self._score(batch)

    def _next(self) -> list[Sample]:
        """Take the next batch: images of one shape, in the order of arrival."""
        with self._lock:
            batch: list[Sample] = []
            while self._waiting and len(batch) < self.batch_size:
                if batch and self._waiting[0].image.shape != batch[0].image.shape:
                    break
                sample = self._waiting.popleft()
                if sample.reward.set_running_or_notify_cancel():  # false if the server was shut down
                    batch.append(sample)
        return batch

    def _score(self, batch: list[Sample]) -> None:
        try:
            rewards = self._rewards(batch)
        except BaseException as error:  # SystemExit too: the client waits for an answer
            requests = [list(samples) for _, samples in itertools.groupby(batch, operator.attrgetter("request"))]
            if len(requests) > 1:  # only the request with the error should fail
                for request in requests:
                    self._score(request)
                return
            logger.exception("`%s` failed for the prompts %s", self.name, [sample.prompt for sample in batch])
            for sample in batch:
                sample.reward.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))
        else:
            for sample, reward in zip(batch, rewards, strict=True):
                sample.reward.set_result(reward)

    def _rewards(self, batch: list[Sample]) -> list[float | None]:
        prompts = tuple(sample.prompt for sample in batch)
        images = torch.stack([sample.image for sample in batch]).to(self.device)
        values = call_as_guest(self.function, images, prompts, tuple(sample.metadata for sample in batch))
        answer = as_rewards(values, prompts, self.name)
        if answer.problem is not None:
            logger.warning("%s", answer.problem)
        return [
            None if index in answer.not_applicable else reward for index, reward in enumerate(answer.rewards.tolist())
        ]


def create_app(batcher: Batcher, token: str | None = None, max_request_bytes: int = 256 * MEGABYTE) -> "FastAPI":
    """
    Create the HTTP service. `GET /health` returns the function's name. `POST /score` takes a request encoded by
    [`~ddpo_trl.rewards.wire_format.pack`] and returns `{"rewards": [...], "not_finite": [...]}`: `null` for images
    without a reward, and the indices of those whose reward was not finite.

    Errors are JSON, `{"detail": reason}`: 400 for a malformed request, 401 without the token, 413 if it is too large,
    500 if the function raised an error.

    Args:
        batcher ([`Batcher`]):
            The batcher with the reward function.
        token (`str`, *optional*):
            Token required in the header `Authorization: Bearer ...`.
        max_request_bytes (`int`, *optional*):
            Size limit of a request.

    Returns:
        `fastapi.FastAPI`: The application.
    """
    from fastapi import Depends, FastAPI, HTTPException, Request

    def check_token(request: Request) -> None:
        given = request.headers.get("Authorization", "").encode()
        if token is not None and not secrets.compare_digest(given, f"Bearer {token}".encode()):
            raise HTTPException(401, "The token is missing or wrong.")

    async def read(request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_request_bytes:
                raise HTTPException(413, f"A request may have {max_request_bytes} bytes.")
        return bytes(body)

    app = FastAPI(openapi_url=None, dependencies=[Depends(check_token)])

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"name": batcher.name, "max_request_bytes": max_request_bytes}

    @app.post("/score")
    async def score(request: Request) -> dict[str, list[float | None] | list[int]]:
        body = await read(request)
        try:
            batch = await asyncio.to_thread(unpack, body)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        futures = [asyncio.wrap_future(future) for future in batcher.submit(*batch)]
        try:
            rewards = await asyncio.gather(*futures)
        except RuntimeError as error:
            raise HTTPException(500, str(error)) from error
        not_finite = [index for index, reward in enumerate(rewards) if reward is not None and math.isnan(reward)]
        return {
            "rewards": [None if index in not_finite else reward for index, reward in enumerate(rewards)],
            "not_finite": not_finite,
        }

    return app


def serve(
    function: RewardFunction,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    batch_size: int = 16,
    max_request_mb: float = 256.0,
    device: str | None = None,
) -> None:
    """
    Serve a reward function until it is interrupted.

    Args:
        function (`Callable`):
            See [`~ddpo_trl.rewards.function.RewardFunction`].
        host, port:
            Address to listen on; port 0 selects a free port.
        token (`str`, *optional*):
            Token required from clients; the environment variable `DDPO_TRL_REWARD_TOKEN` by default.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of images scored at once, from one request or several.
        max_request_mb (`float`, *optional*, defaults to `256`):
            Size limit of a request in megabytes.
        device (`str`, *optional*):
            Device of the images passed to the function; the GPU by default, if there is one.

    Raises:
        `ImportError`: If FastAPI or uvicorn are not installed.
        `ValueError`, `TypeError`: If an argument is invalid.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ImportError("serve-reward needs FastAPI and uvicorn: pip install 'ddpo_trl[serve]'") from error
    if not max_request_mb > 0:
        raise ValueError(f"max_request_mb is {max_request_mb}; it must be above 0.")
    token = checked_token(token)
    batcher = Batcher(function, batch_size, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    app = create_app(batcher, token, round(max_request_mb * MEGABYTE))
    if token is None and host not in ("127.0.0.1", "localhost", "::1"):
        logger.warning("No token: anyone who can reach this machine can use `%s`.", batcher.name)
    config = uvicorn.Config(app, host=host, port=port, log_level="warning")
    listening = config.bind_socket()
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    print(f"Serving `{batcher.name}` at http://{shown}:{listening.getsockname()[1]}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])
