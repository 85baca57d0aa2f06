"""Rewards from another process or machine: the client of `ddpo-trl serve-reward`."""

import functools
import ipaddress
import logging
import os
import time
import urllib.request
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ddpo_trl.rewards.wire_format import FORMATS, pack
from ddpo_trl.rewards.workers import CallTimeout, call_within
from ddpo_trl.versions import http


logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "DDPO_TRL_REWARD_TOKEN"
MEGABYTE = 10**6
START = "Start one by `ddpo-trl serve-reward module:function`"


class RemoteReward:
    """
    A reward function that a reward server computes, in another process or on another machine.

    The server is started by `ddpo-trl serve-reward module:function`. Rewards are logged under the name of the served
    function. A request is sent again after `backoff`, 2 `backoff`, 4 `backoff`, ... seconds if the connection fails or
    the status is 429 or 5xx. A malformed answer, an error in the served function and a timeout are not retried.

    It can be pickled, with its token, and called from several threads at once. Requests go through the proxy that the
    environment sets (`HTTP_PROXY`, ...), and errors name it; requests to this machine never use a proxy.

    ```py
    reward = RemoteReward("http://127.0.0.1:8000")
    trainer = DDPOTrainer(config, reward, prompts, pipeline)
    ```

    Args:
        url (`str`):
            URL of the server, such as `"http://gpu2:8000"`. It must be running at construction.
        token (`str`, *optional*):
            Token of the server; the environment variable `DDPO_TRL_REWARD_TOKEN` by default.
        image_format (`str`, *optional*, defaults to `"png"`):
            Encoding of images: `"png"`, rounded to 8 bits, or `"fp16"`, pixels in half precision. The latter has about
            three times the size, but saves the encoding time of PNG, about 50 ms per 512×512 image.
        timeout (`float`, *optional*, defaults to `120.0`):
            Time limit in seconds for a request and its complete answer. The first request may include loading the
            model. Half of it is the limit for connecting.
        retries (`int`, *optional*, defaults to `5`):
            Number of retries of a call.
        backoff (`float`, *optional*, defaults to `1.0`):
            Seconds before the first retry. A server may be unavailable for (2^`retries` − 1) `backoff` seconds, 31 by
            default; `reward_timeout` of [`DDPOConfig`] should be longer.

    Attributes:
        name (`str`):
            Name of the served reward function.

    Raises:
        `ConnectionError`: If there is no server at the URL.
        `ValueError`: If an argument is out of range, the server is not a reward server, or it refuses the token.
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
            raise ValueError(f"image_format is {image_format!r}; it must be one of {FORMATS}.")
        for name, value, least in (("retries", retries, 0), ("backoff", backoff, 0.0)):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}.")
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout}; it must be a number of seconds above 0.")
        self.url = url.rstrip("/")
        self.image_format = image_format
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self._token = checked_token(token)
        self._proxy = proxy_for(self.url)
        self.name = self._ask_health()

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> list[float | None]:
        """
        Score a batch of images or videos on the server.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`, or `(B, F, 3, H, W)` for video):
                Values in [0, 1].
            prompts, metadata (`Sequence` of length `B`):
                Prompt and metadata of each. Metadata is sent as JSON: tuples become lists, keys become strings.

        Returns:
            `list` of length `B`: numbers, `None` where the served function returned `None`, and NaN for other values
            that are not finite.

        Raises:
            `ConnectionError`: If the server can't be reached in any of the retries.
            `TimeoutError`: If it does not answer in time.
            `RuntimeError`: If the served function raised an error.
            `TypeError`: If the metadata can't be written as JSON.
            `ValueError`: If the answer is malformed, or the request larger than the server accepts.
        """
        body = pack(images, prompts, metadata, self.image_format)
        response = self._post(body)
        if response.status_code != 200:
            raise self._error(response, len(body))
        rewards = _field(response, "rewards")
        if not isinstance(rewards, list):  # the scorer checks their number and values, as for local functions
            raise ValueError(
                f"The reward server at {self.place} answered {_detail(response)!r}; it must be JSON like "
                '{"rewards": [0.5, null]}.'
            )
        return rewards

    def _post(self, body: bytes) -> http.Response:
        """Return the first answer that is not to be retried."""
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                delay = self.backoff * 2 ** (attempt - 1)
                logger.warning("%s: %s; retry %d of %d in %g s.", self.place, problem, attempt, self.retries, delay)
                time.sleep(delay)
            try:
                response = self._send("POST", "/score", body)
            except ConnectionError as error:
                problem = str(error)
            else:
                if response.status_code != 429 and response.status_code < 500:
                    return response
                problem = f"status {response.status_code}"
        raise ConnectionError(
            f"The reward server at {self.place} could not be reached in {self.retries + 1} tries ({problem}). Check "
            f"whether it is running, and its log. {START}, or increase retries or backoff if it restarts slowly."
        )

    def _send(self, method: str, path: str, body: bytes | None = None) -> http.Response:
        """Send a request once; a `ConnectionError` is to be retried."""
        with self._connect() as client:  # closing it on a timeout ends an answer that is still being received
            try:
                # The client's own timeout applies to a single read or write, of which an answer may need many.
                return call_within(
                    self.timeout, functools.partial(client.request, method, self.url + path, content=body)
                )
            except http.DecodingError as error:
                raise ValueError(f"The reward server at {self.place} sent a malformed answer: {error}.") from error
            except (CallTimeout, http.ReadTimeout, http.WriteTimeout) as error:
                raise TimeoutError(
                    f"The reward server at {self.place} did not answer within {self.timeout:g} s. If it needs more "
                    "time, increase timeout; if it hangs, see its log."
                ) from error
            except http.RequestError as error:
                raise ConnectionError(f"{type(error).__name__}: {error}") from error

    def _ask_health(self) -> str:
        """Return the name of the served function."""
        try:
            response = self._send("GET", "/health")
        except ConnectionError as error:
            raise ConnectionError(
                f"There is no reward server at {self.place} ({error}). {START} on that machine, with --host 0.0.0.0 "
                "if it is a remote one, and pass the url that it prints."
            ) from error
        if response.status_code != 200:
            raise self._error(response)
        name = _field(response, "name")
        if not (isinstance(name, str) and name):
            raise ValueError(
                f"{self.place} is not a reward server: to /health it answered {_detail(response)!r}. {START}."
            )
        return name

    def _error(self, response: http.Response, size: int = 0) -> Exception:
        """Return the error for the status of an answer to a request of `size` bytes."""
        match response.status_code:
            case 401:
                given = "another one was passed" if self._token else "none was passed"
                return ValueError(
                    f"The reward server at {self.place} requires its token, but {given}; pass token, or set the "
                    f"environment variable {TOKEN_VARIABLE}, to the token that the server was started with."
                )
            case 413:
                return ValueError(
                    f"A request of {size / MEGABYTE:.1f} MB is more than the reward server at {self.place} accepts; "
                    "start it with a larger --max_request_mb, or send smaller requests: image_format='png', or a "
                    "smaller per_device_sample_batch_size."
                )
            case 422:
                return RuntimeError(
                    f"The served function `{self.name}` at {self.place} failed: {_detail(response)} (The server's log "
                    "has the traceback.)"
                )
        return ValueError(
            f"The reward server at {self.place} answered status {response.status_code}: {_detail(response)!r}."
        )

    @property
    def place(self) -> str:
        """URL of the server for error messages, with the proxy in use."""
        if self._proxy is None:
            return self.url
        return f"{self.url} (through the proxy {http.URL(self._proxy).copy_with(userinfo=b'')})"

    def _connect(self) -> http.Client:
        return http.Client(
            timeout=http.Timeout(self.timeout, connect=self.timeout / 2),
            transport=http.HTTPTransport(proxy=self._proxy),  # instead of the one that the client would choose
            headers={} if self._token is None else {"Authorization": f"Bearer {self._token}"},
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


def proxy_for(url: str) -> str | None:
    """Return the proxy that the environment sets for a URL; always `None` for this machine."""
    parsed = http.URL(url)
    if is_loopback(parsed.host) or urllib.request.proxy_bypass(parsed.host):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(parsed.scheme) or proxies.get("all")


def is_loopback(host: str) -> bool:
    """Return whether a host is `localhost` or a loopback address such as 127.0.0.1 or ::1."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _check_url(url: str) -> None:
    try:
        parsed = http.URL(url)
    except http.InvalidURL as error:
        raise ValueError(f"url is {url!r}, which is not a valid URL: {error}.") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"url is {url!r}; pass the URL of a reward server, such as 'http://127.0.0.1:8000'.")


def checked_token(token: str | None) -> str | None:
    """
    Return the given token, or the one in the environment, after checking it.

    Raises:
        `ValueError`: If it is empty or can't be sent in a header.
    """
    token = os.environ.get(TOKEN_VARIABLE) if token is None else token
    if token is None or (token.isascii() and token.isprintable() and token and " " not in token):
        return token
    raise ValueError(  # does not show the token
        f"token (or {TOKEN_VARIABLE}) has {len(token)} characters, which are not all printable ASCII without spaces; "
        "use another one, or none."
    )


def _field(response: http.Response, name: str) -> Any:
    """Return a field of the JSON object in an answer; `None` if there is none."""
    try:
        return response.json()[name]
    except (ValueError, TypeError, KeyError):
        return None


def _detail(response: http.Response) -> str:
    """Return the error message of a reward server, or the first characters of another answer."""
    return str(_field(response, "detail") or response.text[:200])
