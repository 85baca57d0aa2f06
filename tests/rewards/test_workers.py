"""The pool of daemon threads, and calls with a time limit."""

import gc
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

from ddpo_trl.rewards import workers
from ddpo_trl.rewards.workers import CallTimeout, DaemonPool, call_within


def reward_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("test-pool")]


def test_at_most_so_many_calls_run_at_a_time_and_none_is_forgotten():
    pool = DaemonPool(2, "test-pool")
    lock = threading.Lock()
    running, most = 0, 0

    def call(index: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return index

    futures = [pool.submit(lambda index=index: call(index)) for index in range(12)]  # type: ignore[misc]
    assert [future.result(10) for future in futures] == list(range(12))
    assert most == 2


def test_what_is_canceled_before_it_runs_never_runs_and_the_pool_goes_on():
    gate, ran = threading.Event(), list[int]()
    pool = DaemonPool(1, "test-pool")
    pool.submit(lambda: gate.wait(10))
    canceled, other = (pool.submit(lambda index=index: ran.append(index)) for index in range(2))  # type: ignore[misc]
    assert canceled.cancel()
    gate.set()
    other.result(10)
    assert ran == [1]


def test_a_pool_leaves_no_thread_when_there_is_nothing_to_do_and_works_again_later():
    pool = DaemonPool(3, "test-pool")
    for _ in range(2):
        assert [pool.submit(lambda: 1).result(10) for _ in range(5)] == [1] * 5
        for thread in reward_threads():
            thread.join(10)
        assert reward_threads() == []


def test_what_a_call_held_is_let_go_of_once_it_is_done():
    class Images:
        pass

    images = Images()
    watched = weakref.ref(images)
    pool = DaemonPool(1, "test-pool")
    future = pool.submit(lambda held=images: None)  # type: ignore[misc]
    future.result(10)
    del images
    for thread in reward_threads():
        thread.join(10)
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("seconds", [None, 10.0])
def test_whatever_a_call_raises_reaches_the_caller_and_the_worker_goes_on(error, seconds):
    def fail() -> None:
        raise error("here")

    pool = DaemonPool(1, "test-pool")
    failed, well = pool.submit(lambda: call_within(seconds, fail)), pool.submit(lambda: 3)
    with pytest.raises(error, match="here"):
        failed.result(10)
    assert well.result(10) == 3


def test_a_call_is_given_up_after_its_time_and_a_quick_one_is_not():
    never = threading.Event()
    start = time.perf_counter()
    with pytest.raises(CallTimeout):
        call_within(0.1, lambda: never.wait(60))
    assert 0.1 <= time.perf_counter() - start < 5
    never.set()
    assert call_within(60.0, lambda: "answer") == "answer"


def test_a_calls_own_timeout_error_is_not_mistaken_for_the_limit():
    def fail() -> None:
        raise TimeoutError("the server's")

    with pytest.raises(TimeoutError, match="the server's"):
        call_within(10.0, fail)


EXIT = """
import sys, time
sys.path.insert(0, {folder!r})  # the file alone: importing the package takes seconds
from workers import CallTimeout, DaemonPool, call_within
pool = DaemonPool(1, "pool")
futures = [pool.submit(lambda: call_within({limit}, lambda: time.sleep(600))) for _ in range(3)]
try:
    futures[0].result(0.5)
except (CallTimeout, TimeoutError):
    print("done", flush=True)
"""


@pytest.mark.parametrize("limit", ["0.2", "None"])
def test_neither_an_abandoned_call_nor_a_queue_of_them_holds_up_the_exit_of_the_process(limit):
    process = subprocess.Popen(
        [sys.executable, "-c", EXIT.format(limit=limit, folder=str(Path(workers.__file__).parent))],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == "done\n"
        start = time.perf_counter()
        try:
            assert process.wait(timeout=10) == 0
        finally:
            process.kill()
    assert time.perf_counter() - start < 10
