"""Remote rewards against a real server in another process: right answers, and whatever can go wrong."""

import json
import math
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from fastapi.testclient import TestClient
from safetensors.torch import save

from conftest import tiny_pipeline
from ddpo_trl import DDPOTrainer, cli
from ddpo_trl.rewards import RemoteReward
from ddpo_trl.rewards.scoring import RewardScorer
from ddpo_trl.rewards.server import ServedFunction, create_app
from ddpo_trl.rewards.wire_format import pack, unpack
from ddpo_trl.versions import http
from launch import PROCESSES


TOKEN = "correct-horse"
# The served module is in the working directory, which, as for the installed command, is not on the path (-P).
COMMAND = [sys.executable, "-P", "-m", "ddpo_trl.cli", "serve-reward"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def own_surroundings(monkeypatch):
    """No token from outside, and what the command adds to the path is taken off again."""
    monkeypatch.delenv("DDPO_TRL_REWARD_TOKEN", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(spec: str, port: int, log: Path, *options: str, **environment: str) -> subprocess.Popen:
    with log.open("a") as output:
        return subprocess.Popen(
            [*COMMAND, spec, "--port", str(port), *options],
            cwd=Path(__file__).parents[1],
            env=ENVIRONMENT | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def fork(spec: str, port: int, log: Path) -> BaseProcess:
    """As `start`, without the import of everything."""
    process = PROCESSES.Process(target=serve_reward, args=(spec, port, log))
    process.start()
    return process


def serve_reward(spec: str, port: int, log: Path) -> None:
    with log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.exit(cli.main(["serve-reward", spec, "--port", str(port)]))


def wait_for(url: str, status: Callable[[], int | None], log: Path) -> None:
    """Until something answers, be it that the token is missing."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert status() is None, log.read_text()
        try:
            http.get(f"{url}/health", timeout=5)
            return
        except http.TransportError:
            time.sleep(0.1)
    pytest.fail(f"No server after two minutes: {log.read_text()}")


@pytest.fixture(scope="module")
def mortal(tmp_path_factory) -> Iterator[dict[str, Any]]:
    """A server without a token of a class's instance; it may be killed."""
    port, log = free_port(), tmp_path_factory.mktemp("mortal") / "log"
    held = {"url": f"http://127.0.0.1:{port}", "log": log, "process": fork("served_rewards:Redness", port, log)}
    yield held
    held["process"].kill()
    held["process"].join()


@pytest.fixture(scope="module")
def server(tmp_path_factory, mortal) -> Iterator[tuple[str, Path]]:
    """The url and the log of a server of `obedient`, which starts beside the other one."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    limits = ["--batch_size", "4", "--max_request_mb", "0.1"]
    process = start("served_rewards:obedient", port, log, *limits, DDPO_TRL_REWARD_TOKEN=TOKEN)
    url = f"http://127.0.0.1:{port}"
    wait_for(url, process.poll, log)
    wait_for(mortal["url"], lambda: mortal["process"].exitcode, mortal["log"])
    yield url, log
    process.terminate()
    assert process.wait(30) in (0, -15)


def connect(server: tuple[str, Path], **options: Any) -> RemoteReward:
    return RemoteReward(server[0], token=TOKEN, **{"timeout": 60.0, "retries": 2, "backoff": 0.01, **options})


def noise(count: int, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def ask(reward: RemoteReward, *metadata: Any) -> list[float | None]:
    """For black images."""
    return reward(torch.zeros(len(metadata), 3, 8, 8), [f"prompt {i}" for i in range(len(metadata))], metadata)


# ---- Right answers ----


@pytest.mark.parametrize("count", [1, 3, 11])
def test_a_remote_reward_is_that_of_the_local_function(server, count):
    images = noise(count)
    of_bytes = (images * 255).round().double().flatten(1).mean(1) / 255
    arguments: Any = (images, ["cat"] * count, [{}] * count)
    assert connect(server)(*arguments) == pytest.approx(of_bytes.tolist(), abs=1e-6)
    half = connect(server, image_format="fp16")(*arguments)
    assert half == pytest.approx(images.double().flatten(1).mean(1).tolist(), abs=5e-4)


@pytest.mark.parametrize("image_format", ["png", "fp16"])
def test_a_request_arrives_as_it_was_sent(image_format):
    video = (noise(2 * 3) * 255).round().view(2, 3, 3, 16, 16)[..., :10] / 255
    prompts, metadata = ('a \N{CAT FACE} "cat"', "\ud800"), ({"a": [1, None, "ü"]}, "x")
    images, *rest = unpack(pack(video, prompts, metadata, image_format))
    assert rest == [prompts, metadata]
    assert images.dtype == torch.float32
    if image_format == "png":
        assert torch.equal(images, video)
    else:
        assert images.shape == video.shape
        assert (images - video).abs().max() <= 2**-12  # half a unit in the last place of a half below 1


def test_videos_are_scored(server):
    frames = torch.tensor([0.0, 0.2, 0.4, 0.6]).view(2, 2, 1, 1, 1).expand(-1, -1, 3, 8, 8)
    assert connect(server)(frames, ["a", "b"], [{}, {}]) == pytest.approx([0.1, 0.5])


def test_prompts_and_metadata_reach_the_function_in_order(server):
    metadata = [{"do": "tell", "add": [0, 0.5 + index]} for index in range(6)]
    rewards = connect(server)(noise(6), ["x" * length for length in range(6)], metadata)
    assert rewards == [0.5, 2.5, 4.5, 6.5, 8.5, 10.5]


def test_a_class_is_served_as_an_instance_and_may_be_async(server, mortal):
    reward = RemoteReward(mortal["url"])
    assert reward.name == "Redness"
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(2, 3, 8, 8)
    assert reward(red, ["a", "b"], [{}, {}]) == [1.0, 1.0]


def test_it_is_logged_under_the_served_functions_name(server):
    assert RewardScorer([connect(server), connect(server)]).names == ["obedient", "obedient_2"]


# ---- Batches ----


def test_large_requests_are_cut(server):
    assert ask(connect(server), *[{"do": "count"}] * 10) == [4, 4, 4, 4, 4, 4, 4, 4, 2, 2]


class Gated:
    """Brightness once the gate is open, keeping the prompts of every call and the number of calls at the same time."""

    def __init__(self) -> None:
        self.gate, self.calls, self.inside, self.most = threading.Event(), list[str](), 0, 0

    def __call__(self, images: torch.Tensor, prompts: Any, metadata: Any) -> torch.Tensor:
        self.inside += 1
        self.most = max(self.most, self.inside)
        assert self.gate.wait(60)
        self.calls.append("".join(prompts))
        self.inside -= 1
        if "!" in prompts:
            raise StopIteration("not mine")
        return images.flatten(1).mean(1)


def test_requests_are_scored_one_after_the_other_and_a_failure_costs_only_its_own():
    function = Gated()
    with TestClient(create_app(ServedFunction(function, 2))) as client, ThreadPoolExecutor(3) as threads:
        bodies = [pack(torch.ones(len(p), 3, 8, 8), p, [{}] * len(p), "png") for p in ("abc", "d!e", "fg")]
        answers = [threads.submit(client.post, "/score", content=body) for body in bodies]
        function.gate.set()
        first, failed, last = (answer.result(60) for answer in answers)
    assert first.json() == {"rewards": [1.0] * 3} and last.json() == {"rewards": [1.0] * 2}
    assert failed.status_code == 422 and failed.json() == {"detail": "StopIteration: not mine"}
    assert function.most == 1 and sorted(function.calls) == ["ab", "c", "d!", "fg"]


def test_several_threads_get_their_own_answers(server):
    reward = pickle.loads(pickle.dumps(connect(server)))
    with ThreadPoolExecutor(4) as threads:
        levels = [index / 255 for index in range(24)]
        calls = [threads.submit(reward, torch.full((1, 3, 8, 8), level), [""], [{}]) for level in levels]
        assert [call.result() for call in calls] == [pytest.approx([level], abs=1e-6) for level in levels]


# ---- Failures of the served function ----


def test_an_error_in_the_function_is_named_and_not_tried_again(server):
    url, log = server
    with pytest.raises(RuntimeError) as caught:
        ask(connect(server), {"do": "raise", "value": "only once"})
    assert "`obedient`" in str(caught.value) and url in str(caught.value)
    assert "KeyError: 'only once'" in str(caught.value)
    assert "Traceback" not in str(caught.value) and "served_rewards.py" not in str(caught.value)
    text = log.read_text()
    assert text.count("KeyError: 'only once'") == 1
    assert "Traceback" in text and "served_rewards.py" in text


def test_a_wrong_number_of_rewards_is_named(server):
    with pytest.raises(RuntimeError, match="`obedient` returned 3 values for 2 images"):
        ask(connect(server), {}, {"do": "too many"})


@pytest.mark.parametrize("value", ["None", "nan", "inf"])
def test_a_single_value_that_is_no_reward_costs_one_image(server, value):
    wishes: Any = {}, {"do": "return", "value": value}, {}
    answer = ask(connect(server), *wishes)
    assert answer == [0.0, None if value == "None" else pytest.approx(math.nan, nan_ok=True), 0.0]
    pending = RewardScorer(connect(server)).submit(torch.zeros(3, 3, 8, 8), ["a", "b", "c"], wishes, "round 7")
    assert [math.isnan(value) for value in pending.rewards_or_nan().flatten().tolist()] == [False, True, False]
    with pytest.raises((TypeError, ValueError), match=r"`obedient` \(round 7\) returned None|nan for image 1; .* 'b'"):
        pending.result()


def test_a_slow_function_is_a_timeout_which_is_not_tried_again(server, caplog):
    reward = connect(server, timeout=0.3)
    with pytest.raises(TimeoutError, match=rf"{server[0]} did not answer within 0\.3 s\..* increase timeout"):
        ask(reward, {"do": "sleep", "value": 1.0})
    assert not caplog.records  # it says when it tries again
    assert ask(connect(server), {}) == [0.0]  # it goes on


@contextmanager
def dripping(head: bytes) -> Iterator[tuple[str, threading.Event]]:
    """Answers `/health` at once; then sends `head`, and a byte every 50 ms until the client is gone."""
    gone = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(HEALTHY), HEALTHY))

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            with suppress(OSError):
                self.wfile.write(head)
                for _ in range(400):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            gone.set()

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as poser:
        threading.Thread(target=poser.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{poser.server_address[1]}", gone
        poser.shutdown()


@pytest.mark.parametrize(
    "head", [b"HTTP/1.0 200 OK\r\nX-Long: ", b"HTTP/1.0 200 OK\r\nContent-Length: 400\r\n\r\n"], ids=["header", "body"]
)
def test_the_timeout_is_that_of_the_whole_request_however_slowly_its_bytes_come(head):
    with dripping(head) as (url, gone):
        reward = RemoteReward(url, timeout=0.5)
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=r"did not answer within 0\.5 s"):
            ask(reward, {})
        assert 0.5 <= time.monotonic() - start < 3
        assert gone.wait(5)  # the connection is closed, and not left to drip


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_server_on_this_machine_is_not_asked_through_a_proxy(variable, monkeypatch):
    monkeypatch.setenv(variable, "http://127.0.0.1:9")  # where nothing is
    answer = json.dumps({"rewards": [0.5]}).encode()
    with posing(Nonsense((200, HEALTHY)), Nonsense((200, answer))) as url:
        for place in (url, url.replace("127.0.0.1", "localhost")):
            assert ask(RemoteReward(place, retries=0), {}) == [0.5]


def test_an_error_names_the_proxy_on_the_way_without_its_password(monkeypatch):
    with posing(Nonsense((502, b"no route")), Nonsense((200, b""))) as proxy:
        monkeypatch.setenv("http_proxy", proxy.replace("//", "//user:secret@"))
        with pytest.raises(ValueError, match=rf"http://gpu2:8000 \(through the proxy {proxy}/?\) answered") as caught:
            RemoteReward("http://gpu2:8000", retries=0)
        assert "secret" not in str(caught.value)
        monkeypatch.setenv("no_proxy", "gpu2")
        with pytest.raises(ConnectionError) as caught_directly:
            RemoteReward("http://gpu2:8000", retries=0, timeout=2.0)
        assert "proxy" not in str(caught_directly.value)


# ---- What is refused ----


@pytest.mark.parametrize(("token", "told"), [(None, "none was passed"), ("wrong", "another one was passed")])
def test_without_the_token_nothing_is_told(server, token, told):
    url, _ = server
    with pytest.raises(ValueError, match=f"{url} requires its token, but {told}; pass token, or set .*REWARD_TOKEN"):
        RemoteReward(url, token=token)
    body = pack(torch.zeros(1, 3, 8, 8), ["a"], [{}], "png")
    assert http.post(f"{url}/score", content=body).status_code == 401


def test_the_token_may_come_from_the_environment_and_is_not_shown(server, monkeypatch):
    monkeypatch.setenv("DDPO_TRL_REWARD_TOKEN", TOKEN)
    reward = RemoteReward(server[0])
    assert ask(reward, {}) == [0.0]
    assert TOKEN not in repr(reward)


def test_a_request_that_is_too_large_is_refused(server):
    url, _ = server
    with pytest.raises(ValueError, match=f"0.3 MB is more than the reward server at {url} accepts.*--max_request_mb"):
        connect(server, image_format="fp16")(torch.zeros(1, 3, 224, 224), [""], [{}])
    with http.Client(headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        assert client.post(f"{url}/score", content=b"0" * 100_001).status_code == 413
        assert client.post(f"{url}/score", content=b"0" * 100_000).status_code == 400


def changed(**header: str) -> bytes:
    fields = {"image_format": "fp16", "shape": "[1, 3, 2, 2]", "prompts": '["a"]', "metadata": "[{}]"}
    return save({"images": torch.zeros(1, 3, 2, 2).half()}, fields | header)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not a safetensors file",
        pickle.dumps({"images": [0]}),
        save({"images": torch.zeros(1, 3, 2, 2)}),
        changed(shape="[2, 3, 2, 2]"),
        changed(shape="[1, 2, 3, 2]"),
        changed(shape='"all"'),
        changed(prompts='"a"'),
        changed(prompts="[1]"),
        changed(prompts='["a", "b"]'),
        changed(metadata="[{}"),
        changed(metadata="[" * 100_000),
        changed(image_format="png"),
    ],
    ids=lambda body: repr(body[:20]),
)
def test_a_malformed_request_is_refused(server, body):
    with pytest.raises(ValueError, match="The request is malformed"):
        unpack(body)
    if len(body) < 100_000:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        response = http.post(f"{server[0]}/score", content=body, headers=headers)
        assert response.status_code == 400 and "The request is malformed" in response.json()["detail"]


def test_the_request_of_the_test_above_is_fine_unchanged():
    assert unpack(changed())[1:] == (("a",), ({},))


def test_metadata_that_is_not_json_is_refused_with_its_prompt(server):
    with pytest.raises(TypeError, match="metadata of prompt 'dog' .* Object of type Tensor is not JSON serializable"):
        connect(server)(torch.zeros(2, 3, 8, 8), ["cat", "dog"], [{}, {"mask": torch.zeros(1)}])


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("gpu2:8000", {}, "url is 'gpu2:8000'"),
        ("http://", {}, "url is 'http://'"),
        ("http://gpu2:port", {}, "url is 'http://gpu2:port'"),
        ("http://gpu2", {"image_format": "jpeg"}, "image_format is 'jpeg'; it must be one of"),
        ("http://gpu2", {"timeout": 0}, "timeout is 0"),
        ("http://gpu2", {"retries": -1}, "retries is -1; it must be at least 0"),
        ("http://gpu2", {"backoff": -0.5}, "backoff is -0.5"),
        ("http://gpu2", {"token": ""}, "token .* has 0 characters"),
        ("http://gpu2", {"token": "a\nb"}, "token .* has 3 characters"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_sent(url, options, message):
    with pytest.raises(ValueError, match=message):
        RemoteReward(url, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["served_rewards"], "'served_rewards' is not a built-in reward, module:function or the URL"),
        (["no_such_module:f"], "There is no module 'no_such_module'"),
        (["served_rewards:nothing"], "'served_rewards:nothing' does not exist"),
        (["served_rewards:number"], "is 3, which can't be called"),
        (["served_rewards:two"], "called with three: (images, prompts, metadata)"),
        (["served_rewards:NeedsArgument"], "a class that can't be instantiated without arguments"),
        (["served_rewards:redness", "--batch_size", "0"], "batch_size is 0"),
        (["served_rewards:redness", "--max_request_mb", "0"], "max_request_mb is 0"),
        (["served_rewards:redness", "--token", ""], "token"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_usage_of_the_command_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(SystemExit) as stop:
        cli.main(["serve-reward", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("ddpo-trl serve-reward: error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_package_is_named_with_its_extra(package, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit):
        cli.main(["serve-reward", "served_rewards:redness"])
    assert "pip install 'ddpo_trl[serve]'" in capsys.readouterr().err


def test_a_module_that_fails_shows_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_rewards.py").write_text("import a_module_that_is_missing")
    with pytest.raises(RuntimeError, match="'broken_rewards' could not be imported") as caught:
        cli.main(["serve-reward", "broken_rewards:f", "--debug"])
    assert "a_module_that_is_missing" in str(caught.value.__cause__)


# ---- Servers that are away, or something else ----


def test_no_server_is_a_clear_error_at_once():
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ConnectionError, match=f"no reward server at {url} .*ConnectError.*`ddpo-trl serve-reward"):
        RemoteReward(url)


class Nonsense:
    """A server that gives the same answers to everybody, one after the other, the last for ever."""

    def __init__(self, *answers: tuple[int, bytes], **headers: str):
        self.answers, self.headers, self.asked = list(answers), headers, 0

    def next(self) -> tuple[int, bytes]:
        self.asked += 1
        return self.answers[min(self.asked, len(self.answers)) - 1]


HEALTHY = b'{"name": "fake"}'


@contextmanager
def posing(health: Nonsense, score: Nonsense) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self, nonsense: Nonsense) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, body = nonsense.next()
            self.send_response(status)
            for name, value in nonsense.headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.answer(health)

        def do_POST(self) -> None:
            self.answer(score)

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as poser:
        threading.Thread(target=poser.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{poser.server_address[1]}"
        poser.shutdown()


@pytest.mark.parametrize(
    "answer", [b"<html>It works!</html>", b"[]", b'{"name": 3}', b'{"name": ""}', b'{"status": "ok"}', b"\xff"]
)
def test_something_else_at_the_url_is_named(answer):
    with posing(Nonsense((200, answer)), Nonsense((200, b""))) as url, pytest.raises(ValueError) as caught:
        RemoteReward(url)
    assert f"{url} is not a reward server" in str(caught.value)


@pytest.mark.parametrize("answer", [b"", b"<html>", b"[0.5, 0.5]", b'{"rewards": 0.5}', b'{"rewards"', b"\xff\xfe"])
def test_a_malformed_answer_is_named_and_not_tried_again(answer):
    score = Nonsense((200, answer))
    with posing(Nonsense((200, HEALTHY)), score) as url:
        reward = RemoteReward(url, backoff=0.01)
        with pytest.raises(ValueError, match=f"{url} answered .*; it must be JSON like"):
            ask(reward, {}, {})
    assert score.asked == 1


def test_an_answer_that_can_not_be_decoded_is_named():
    score = Nonsense((200, b"no gzip"), Content_Encoding="gzip")
    with posing(Nonsense((200, HEALTHY)), score) as url, pytest.raises(ValueError, match=f"{url} sent a malformed"):
        ask(RemoteReward(url, backoff=0.01), {})
    assert score.asked == 1


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ("[0.5]", "`fake` (round 2) returned 1 values for 2 images; it must return one per image"),
        ("[0.5, NaN]", "`fake` (round 2) returned nan for image 1; rewards must be finite"),
        ("[0.5, null]", "`fake` (round 2) returned None for image 1; it must be a number"),
        ('[0.5, "good"]', "`fake` (round 2) returned 'good' for image 1; it must be a number"),
        ("[0.5, {}]", "`fake` (round 2) returned {} for image 1; it must be a number"),
    ],
)
def test_wrong_rewards_are_the_same_errors_as_those_of_a_local_function(rewards, message):
    score = Nonsense((200, f'{{"rewards": {rewards}}}'.encode()))
    with posing(Nonsense((200, HEALTHY)), score) as url:
        scorer = RewardScorer(RemoteReward(url, backoff=0.01))
        problem = scorer.submit(torch.zeros(2, 3, 8, 8), ["a", "b"], [{}, {}], "round 2").problem()

    def local(images: torch.Tensor, prompts: Any, metadata: Any) -> Any:
        return json.loads(rewards)

    own = RewardScorer(local).submit(torch.zeros(2, 3, 8, 8), ["a", "b"], [{}, {}], "round 2").problem()
    assert message in str(problem)
    assert type(problem) is type(own) and str(problem) == str(own).replace("`local`", "`fake`")
    assert score.asked == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_passing_trouble_is_tried_again_after_longer_and_longer(status, monkeypatch, caplog):
    delays: list[float] = []
    monkeypatch.setattr("ddpo_trl.rewards.remote.time.sleep", delays.append)
    score = Nonsense(*[(status, b"busy")] * 3, (200, b'{"rewards": [2.5]}'))
    with posing(Nonsense((200, HEALTHY)), score) as url:
        assert ask(RemoteReward(url, backoff=0.5, retries=3), {}) == [2.5]
    assert len(caplog.records) == 3 and url in caplog.text
    assert score.asked == 4 and delays == [0.5, 1.0, 2.0]


def test_the_tries_are_bounded():
    score = Nonsense((503, b"busy"))
    with posing(Nonsense((200, HEALTHY)), score) as url:
        reward = RemoteReward(url, backoff=0.01, retries=2)
        with pytest.raises(ConnectionError, match=rf"{url} could not be reached in 3 tries \(status 503\)"):
            ask(reward, {})
    assert score.asked == 3


@pytest.mark.parametrize(("status", "error"), [(400, ValueError), (404, ValueError), (307, ValueError)])
def test_other_refusals_are_not_tried_again(status, error):
    score = Nonsense((status, b"no"), Location="http://example.org/")
    with posing(Nonsense((200, HEALTHY)), score) as url, pytest.raises(error, match=f"{url} answered status {status}"):
        ask(RemoteReward(url, backoff=0.01), {})
    assert score.asked == 1


# ---- Training ----


def rewards_of(trainer: DDPOTrainer) -> list[Any]:
    return trainer.rollout.rewards.tolist()


def test_a_run_is_that_with_the_local_function(server, make_config):
    config = make_config(num_train_epochs=2, max_workers=2)
    trainer = DDPOTrainer(config, connect(server, image_format="fp16"), lambda: ("cat", {}), tiny_pipeline())
    trainer.train()
    expected = trainer.rollout.images.double().flatten(1).mean(1).tolist()
    assert rewards_of(trainer) == pytest.approx(expected, abs=5e-4)
    assert all("rewards/obedient/mean" in log for log in trainer.state.log_history if "reward" in log)


def test_a_run_may_drop_what_has_no_reward(server, make_config):
    config = make_config(on_invalid_reward="drop", num_train_epochs=2)
    wishes = Dataset.from_dict({"prompt": ["cat", "dog", "owl"], "do": [None, None, "return"], "value": ["None"] * 3})
    trainer = DDPOTrainer(config, connect(server), wishes, tiny_pipeline())
    trainer.train()
    invalid = [math.isnan(reward) for reward in rewards_of(trainer)]
    assert invalid == [prompt == "owl" for prompt in trainer.rollout.prompts]
    assert any(invalid) and not all(invalid)


# ---- Last, because it dies: a server that comes back ----


def test_a_server_that_dies_is_an_error_and_one_that_comes_back_goes_on(server, mortal):
    url, process, log = mortal["url"], mortal["process"], mortal["log"]
    reward = RemoteReward(url, retries=2, backoff=0.05)
    patient = RemoteReward(url, retries=9, backoff=0.125)
    assert ask(reward, {}) == [0.0]
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(ask, reward, {"seconds": 600})
        time.sleep(0.5)
        assert not call.done()
        process.kill()
        with pytest.raises(ConnectionError, match=rf"{url} could not be reached in 3 tries \(Conn.*serve-reward"):
            call.result(60)
        process.join()
        answer = threads.submit(patient, torch.ones(2, 3, 8, 8), ["a", "b"], [{}, {}])
        mortal["process"] = fork("served_rewards:redness", int(re.findall(r"\d+$", url)[0]), log)
        assert answer.result(120) == [1.0, 1.0]
