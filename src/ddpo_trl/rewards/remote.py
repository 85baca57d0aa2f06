"""Rewards from another process or machine: the client of `ddpo-trl serve-reward`, and how a request is written."""

import functools
import ipaddress
import logging
import math
import os
import time
import urllib.request
from collections.abc import Sequence
from typing import Any

import httpx2
from torch import Tensor

from ddpo_trl.rewards.wire_format import FORMATS, pack
from ddpo_trl.rewards.workers import CallTimeout, call_within


logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "DDPO_TRL_REWARD_TOKEN"
MEGABYTE = 10**6
START = "Start one by `ddpo-trl serve-reward module:function`"


class RemoteReward:
    """
    A reward function that a reward server computes, in another process or on another machine.

    The server is started by `ddpo-trl serve-reward module:function`. Its reward function's name is that of the logs. A
    failure of the connection, and an answer of status 429 or 5xx, is tried again after `backoff`, 2 `backoff`, 4
    `backoff`, ... seconds. A wrong answer, an error in the served function and no answer within `timeout` are not.

    It can be pickled, with its token, and called from several threads at once. Where the environment names a proxy
    (`HTTP_PROXY`, ...), requests go through it, and errors name it; to a server on this machine they never do.

    ```py
    reward = RemoteReward("http://127.0.0.1:8000")
    trainer = DDPOTrainer(config, reward, prompts, pipeline)
    ```

    Args:
        url (`str`):
            Of the server, such as `"http://gpu2:8000"`. It is asked at construction whether it is there.
        token (`str`, *optional*):
            The server's; the environment variable `DDPO_TRL_REWARD_TOKEN` by default.
        image_format (`str`, *optional*, defaults to `"png"`):
            How images travel: as `"png"`, rounded to 8 bits as in a file, or as `"fp16"`, pixels in half precision:
            some three times the bytes, but no work to speak of, where PNG takes 50 ms for an image of 512×512.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds that a request may take until its answer is complete. The first may need the model to be loaded.
            Half of them may pass until there is a connection.
        retries (`int`, *optional*, defaults to `5`):
            How often a call is tried again.
        backoff (`float`, *optional*, defaults to `1.0`):
            Seconds before the first of these. With `retries` it is (2^`retries` − 1) `backoff` seconds, 31 by default,
            that a server may be away; `reward_timeout` of [`DDPOConfig`] should be longer.

    Attributes:
        name (`str`):
            Of the served reward function.

    Raises:
        `ConnectionError`: If there is no server.
        `ValueError`: If an argument is out of range, or if there is a server, but no reward server or not with this
            token.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        image_format: str = "png",
        timeout: float = 120.0,
        retries: int = 5,
        backoff: float = 1.0,
    ):
        _check_url(url)
        if image_format not in FORMATS:
            raise ValueError(f"image_format is {image_format!r}; give one of {FORMATS}.")
        for name, value, least in (("retries", retries, 0), ("backoff", backoff, 0.0)):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}.")
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout}; give a number of seconds above 0.")
        self.url = url.rstrip("/")
        self.image_format = image_format
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self._token = checked_token(token)
        self._proxy = proxy_for(self.url)
        self.name, self._max_bytes = self._ask_who_is_there()

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> list[float | None]:
        """
        Has a batch of images or videos scored.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`, or `(B, F, 3, H, W)` for video):
                Values in [0, 1].
            prompts, metadata (`Sequence` of length `B`):
                What belongs to each. The metadata travels as JSON: tuples become lists, keys strings.

        Returns:
            `list` of length `B`: numbers, `None` where the served function gave `None`, and NaN where it gave another
            value that is not finite.

        Raises:
            `ConnectionError`: If the server is away for longer than the retries last.
            `TimeoutError`: If it gives no answer in time.
            `RuntimeError`: If the served function raised an error.
            `TypeError`: If the metadata is not JSON.
            `ValueError`: If the answer is no answer, or the request larger than the server takes.
        """
        body = pack(images, prompts, metadata, self.image_format)
        if len(body) > self._max_bytes:
            raise ValueError(self._too_large(len(body)))
        response = self._post(body)
        if response.status_code == 413:
            raise ValueError(self._too_large(len(body)))
        if response.status_code == 500:
            raise RuntimeError(
                f"The served function `{self.name}` at {self.place} failed: {_detail(response)} (The server's log has "
                "the traceback.)"
            )
        if response.status_code != 200:
            raise ValueError(self._refused(response))
        return self._rewards(response)

    def _post(self, body: bytes) -> httpx2.Response:
        """The first answer that doesn't ask to try again."""
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                delay = self.backoff * 2 ** (attempt - 1)
                logger.warning("%s: %s; try %d of %d in %g s.", self.place, problem, attempt, self.retries, delay)
                time.sleep(delay)
            try:
                response = self._send("POST", "/score", body)
            except ConnectionError as error:
                problem = str(error)
            else:
                if not _is_passing(response):
                    return response
                problem = f"status {response.status_code}"
        raise ConnectionError(
            f"The reward server at {self.place} could not be reached in {self.retries + 1} tries ({problem}). See "
            f"whether it still runs, and its log. {START}, or raise retries or backoff if it needs longer to return."
        )

    def _send(self, method: str, path: str, body: bytes | None = None) -> httpx2.Response:
        """One try; a `ConnectionError` is worth another."""
        with self._connect() as client:  # closed when the time is over, which ends what still trickles in
            try:
                # The client's own limit is for a single read or write, of which an answer may take any number.
                return call_within(
                    self.timeout, functools.partial(client.request, method, self.url + path, content=body)
                )
            except httpx2.DecodingError as error:
                raise ValueError(f"The reward server at {self.place} gave a malformed answer: {error}.") from error
            except (CallTimeout, httpx2.ReadTimeout, httpx2.WriteTimeout) as error:
                raise TimeoutError(
                    f"The reward server at {self.place} gave no answer within {self.timeout:g} s. If it needs more, "
                    "raise timeout; if it hangs, its log may tell why."
                ) from error
            except httpx2.RequestError as error:
                raise ConnectionError(f"{type(error).__name__}: {error}") from error

    def _ask_who_is_there(self) -> tuple[str, int]:
        """The name of the served function, and how many bytes a request may have."""
        try:
            response = self._send("GET", "/health")
        except ConnectionError as error:
            raise ConnectionError(
                f"There is no reward server at {self.place} ({error}). {START} on that machine, with --host 0.0.0.0 "
                "if it is another one, and give the url that it prints."
            ) from error
        if response.status_code != 200:
            raise ValueError(self._refused(response))
        try:
            answer = response.json()
            name, max_bytes = answer["name"], answer["max_request_bytes"]
        except (ValueError, TypeError, KeyError):
            name, max_bytes = None, None
        if not (isinstance(name, str) and name and isinstance(max_bytes, int)):
            raise ValueError(
                f"What is at {self.place} is no reward server: to /health it answered {_detail(response)!r}. {START}."
            )
        return name, max_bytes

    def _rewards(self, response: httpx2.Response) -> list[float | None]:
        """The rewards of an answer. Their number and values are left to the scorer, as those of local functions."""
        try:
            answer = response.json()
            rewards, not_finite = answer["rewards"], answer.get("not_finite", [])
        except (ValueError, TypeError, KeyError, AttributeError):
            rewards, not_finite = None, []
        if not isinstance(rewards, list):
            raise ValueError(
                f"The reward server at {self.place} answered {_detail(response)!r}; it must be JSON like "
                '{"rewards": [0.5, null]}.'
            )
        return [math.nan if index in not_finite else reward for index, reward in enumerate(rewards)]

    def _refused(self, response: httpx2.Response) -> str:
        if response.status_code == 401:
            given = "another one was given" if self._token else "none was given"
            return (
                f"The reward server at {self.place} asks for its token, and {given}; give token, or set the "
                f"environment variable {TOKEN_VARIABLE}, to what the server was started with."
            )
        return f"The reward server at {self.place} answered status {response.status_code}: {_detail(response)!r}."

    def _too_large(self, size: int) -> str:
        return (
            f"A request of {size / MEGABYTE:.1f} MB is more than the reward server at {self.place} takes; start it "
            "with a larger --max_request_mb, or send less at once: image_format='png', or a smaller "
            "per_device_sample_batch_size."
        )

    @property
    def place(self) -> str:
        """The server's url for error messages, with the proxy on the way to it."""
        if self._proxy is None:
            return self.url
        return f"{self.url} (through the proxy {httpx2.URL(self._proxy).copy_with(userinfo=b'')})"

    def _connect(self) -> httpx2.Client:
        return httpx2.Client(
            timeout=httpx2.Timeout(self.timeout, connect=self.timeout / 2),
            transport=httpx2.HTTPTransport(proxy=self._proxy),  # and not whichever the client would find
            headers={} if self._token is None else {"Authorization": f"Bearer {self._token}"},
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for a url; none for this machine itself, whatever it says."""
    parsed = httpx2.URL(url)
    if is_loopback(parsed.host) or urllib.request.proxy_bypass(parsed.host):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(parsed.scheme) or proxies.get("all")


def is_loopback(host: str) -> bool:
    """Whether it is `localhost` or an address such as 127.0.0.1 and ::1."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _check_url(url: str) -> None:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"url is {url!r}, which is none: {error}.") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"url is {url!r}; give that of a reward server, such as 'http://127.0.0.1:8000'.")


def checked_token(token: str | None) -> str | None:
    """
    The given token, or that of the environment.

    Raises:
        `ValueError`: If it is empty or can't be sent; not that of a variable that isn't set.
    """
    token = os.environ.get(TOKEN_VARIABLE) if token is None else token
    if token is None or (token.isascii() and token.isprintable() and token and " " not in token):
        return token
    raise ValueError(  # which shows no secret
        f"token (or {TOKEN_VARIABLE}) has {len(token)} characters, which are not all printable ASCII without spaces; "
        "give another one, or none."
    )


def _is_passing(response: httpx2.Response) -> bool:
    """Whether it may be better next time. Status 500 with a reason is the served function's own error."""
    own_error = response.status_code == 500 and _reason(response) is not None
    return response.status_code == 429 or (response.status_code >= 500 and not own_error)


def _reason(response: httpx2.Response) -> str | None:
    """What a reward server says about an error, in JSON; `None` if it is no reward server's."""
    try:
        reason = response.json()["detail"]
    except (ValueError, TypeError, KeyError):
        return None
    return reason if isinstance(reason, str) else None


def _detail(response: httpx2.Response) -> str:
    """What an answer says, or else how it begins."""
    return _reason(response) or response.text[:200]
