"""HTTP server of `ddpo-trl serve-reward`, which computes a reward function for [`~ddpo_trl.rewards.RemoteReward`]."""

import asyncio
import contextlib
import functools
import json
import logging
import secrets
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddpo_trl.rewards.answers import as_rewards
from ddpo_trl.rewards.function import RewardFunction
from ddpo_trl.rewards.guests import call_as_guest
from ddpo_trl.rewards.remote import MEGABYTE, checked_token, is_loopback
from ddpo_trl.rewards.scoring import RewardScorer
from ddpo_trl.rewards.wire_format import unpack
from ddpo_trl.rewards.workers import DaemonPool


if TYPE_CHECKING:
    from fastapi import FastAPI, Request

logger = logging.getLogger(__name__)


class ServedFunction:
    """A reward function that is called with at most `batch_size` images at once, on a device."""

    def __init__(self, function: RewardFunction, batch_size: int, device: str | torch.device = "cpu"):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        self.name = RewardScorer([function], argument="served").names[0]
        self.function = function
        self.batch_size = batch_size
        self.device = device

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> list[float | None]:
        """
        Return the rewards of a request: NaN for values that are not finite, `None` where the function returned it.

        Raises:
            `RuntimeError`: With the type and message of any error in the function, whose traceback is logged.
        """
        rewards: list[float | None] = []
        for first in range(0, len(prompts), self.batch_size):
            rows = slice(first, first + self.batch_size)
            try:
                rewards += self._batch(images[rows], tuple(prompts[rows]), tuple(metadata[rows]))
            except BaseException as error:  # SystemExit too: the client waits for an answer
                logger.exception("`%s` failed for the prompts %s", self.name, prompts[rows])
                raise RuntimeError(f"{type(error).__name__}: {error}") from error
        return rewards

    def _batch(self, images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> list[float | None]:
        answer = as_rewards(
            call_as_guest(self.function, images.to(self.device), prompts, metadata), prompts, self.name
        )
        if answer.problem is not None:
            logger.warning("%s", answer.problem)
        return [
            None if index in answer.not_applicable else reward for index, reward in enumerate(answer.rewards.tolist())
        ]


def create_app(served: ServedFunction, token: str | None = None, max_request_bytes: int = 256 * MEGABYTE) -> "FastAPI":
    """
    Create the HTTP service. `GET /health` returns `{"name": name of the function}`. `POST /score` takes a request
    encoded by [`~ddpo_trl.rewards.wire_format.pack`] and returns `{"rewards": [...]}`. Requests are scored one after
    the other.

    Errors are JSON, `{"detail": reason}`: 400 for a malformed request, 401 without the token, 413 if it is too large,
    422 if the function raised an error. A token is required in the header `Authorization: Bearer ...`.
    """
    from fastapi import Depends, FastAPI, HTTPException, Request, Response

    def check_token(request: Request) -> None:
        given = request.headers.get("Authorization", "").encode()
        if token is not None and not secrets.compare_digest(given, f"Bearer {token}".encode()):
            raise HTTPException(401, "The token is missing or wrong.")

    app = FastAPI(openapi_url=None, dependencies=[Depends(check_token)])
    pool = DaemonPool(1, name="reward")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"name": served.name}

    @app.post("/score")
    async def score(request: Request) -> Response:
        body = await _read(request, max_request_bytes)
        if body is None:
            raise HTTPException(413, f"A request may have {max_request_bytes} bytes.")
        try:
            batch = await asyncio.to_thread(unpack, body)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        try:
            rewards = await asyncio.wrap_future(pool.submit(functools.partial(served.score, *batch)))
        except RuntimeError as error:
            raise HTTPException(422, str(error)) from error
        return Response(json.dumps({"rewards": rewards}), media_type="application/json")  # which may contain NaN

    return app


async def _read(request: "Request", max_bytes: int) -> bytes | None:
    """Return the body of a request, or `None` if it is larger than `max_bytes`."""
    body, size = bytearray(), 0
    async for chunk in request.stream():  # to its end: a client that is still sending would not read the refusal
        size += len(chunk)
        if size <= max_bytes:
            body += chunk
    return bytes(body) if size <= max_bytes else None


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
            Largest number of images scored at once; larger requests are split.
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
    default = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    served = ServedFunction(function, batch_size, device or str(default))
    app = create_app(served, token, round(max_request_mb * MEGABYTE))
    if token is None and not is_loopback(host):
        logger.warning("No token: anyone who can reach this machine can use `%s`.", served.name)
    config = uvicorn.Config(app, host=host, port=port, log_level="warning")
    listening = config.bind_socket()
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    print(f"Serving `{served.name}` at http://{shown}:{listening.getsockname()[1]}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])
