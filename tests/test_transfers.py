"""Copies and streams, by a device that writes down what is asked of it: nothing here can see a GPU wait."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddpo_trl import transfers
from ddpo_trl.rewards.scoring import RewardScorer
from ddpo_trl.transfers import behind, to_device, wait_for


GPU = torch.device("cuda", 0)


class Recorder:
    """The device's module, as `torch.cuda` is: streams by name, and every call as text."""

    def __init__(self):
        self.calls: list[str] = []
        self.entered: list[Any] = []
        self.current = threading.local()  # in torch too each thread has its own current stream

    def name(self) -> str:
        return getattr(self.current, "name", "default")

    def Stream(self, device):
        return SimpleNamespace(
            name="second",
            wait_event=lambda event: self.calls.append(f"{self.name()} waits for what {event.of} had queued"),
            synchronize=lambda: self.calls.append("second is done"),
        )

    def Event(self):
        event = SimpleNamespace(of=None)
        event.record = lambda stream: vars(event).update(of=stream)
        return event

    def current_stream(self, device):
        return self.name()

    @contextmanager
    def stream(self, stream):
        before, self.current.name = self.name(), stream.name
        self.entered.append(stream)
        try:
            yield
        finally:
            self.current.name = before

    def synchronize(self, device):
        self.calls.append("all is done")


@pytest.fixture
def device(monkeypatch) -> Iterator[Recorder]:
    recorder = Recorder()
    monkeypatch.setattr(torch, "get_device_module", lambda device: recorder)
    transfers._second_stream.cache_clear()
    yield recorder
    transfers._second_stream.cache_clear()


def test_a_threads_work_is_behind_what_was_queued_and_is_done_when_its_context_is_left(device):
    context = behind(GPU)
    with pytest.raises(KeyError), context():
        assert device.name() == "second"
        raise KeyError
    assert device.calls == ["second waits for what default had queued", "second is done"]
    assert device.name() == "default"


def test_all_contexts_share_a_stream(device):
    for _ in range(2):
        with behind(GPU)():
            pass
    first, second = device.entered
    assert first is second


def test_a_reward_function_runs_in_the_second_stream_and_is_done_before_its_rewards_are_read(device, monkeypatch):
    monkeypatch.setattr("ddpo_trl.rewards.scoring.behind", lambda _: behind(GPU))  # of images on the CPU

    def reward(images, prompts, metadata):
        device.calls.append(f"reward in {device.name()}")
        return [1.0] * len(images)

    RewardScorer(reward).submit(torch.zeros(2, 3, 8, 8), ("a", "b"), ({}, {}), "round 0").result()
    assert device.calls == [
        "second waits for what default had queued",  # to read which images are finite
        "second waits for what default had queued",  # in the thread of the call
        "reward in second",
        "second is done",
        "second is done",
    ]


def test_a_clock_waits_for_the_device_and_the_cpu_needs_no_wait(device):
    wait_for(GPU)
    wait_for(torch.device("cpu"))
    assert device.calls == ["all is done"]


def test_without_streams_nothing_is_done(device):
    with behind(torch.device("cpu"))():
        assert device.name() == "default"
    assert device.calls == []


@pytest.mark.parametrize("target", ["cpu", "meta", None, torch.device("cpu")])
def test_copies_to_devices_without_streams_are_plain_ones(target):
    tensor = torch.arange(3.0)
    moved = to_device(tensor, target)
    assert moved.device.type == ("meta" if target == "meta" else "cpu") and moved.shape == (3,)
    assert moved is tensor if target != "meta" else moved.is_meta


def test_copies_to_a_gpu_come_from_pinned_memory_and_do_not_wait():
    pinned = SimpleNamespace(to=lambda target, non_blocking: ("pinned", target, non_blocking))
    source: Any = SimpleNamespace(device=torch.device("cpu"), pin_memory=lambda: pinned)
    assert to_device(source, GPU) == ("pinned", GPU, True)
