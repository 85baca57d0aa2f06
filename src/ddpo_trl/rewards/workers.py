"""Threads that compute beside the caller, at the end of which nothing has to wait."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar


T = TypeVar("T")


class CallTimeout(Exception):
    """A call that had a time limit gave no answer within it."""


class DaemonPool:
    """
    At most `max_workers` calls at a time, in threads; the others wait, in the order in which they came.

    `concurrent.futures.ThreadPoolExecutor` joins its threads when the interpreter exits, and before that works off its
    whole queue: a process whose reward server hangs would never end, nor would the other processes of its run. These
    threads are daemons, which the interpreter leaves behind. Nothing is lost with them: a result that is still wanted
    is one that somebody waits for, so the interpreter isn't exiting. A thread ends when there is nothing to do, so the
    pool needs no closing either. The price: a daemon that computes with torch at the very moment of the exit turns
    that into an abort (code 134, after output is flushed and `atexit` has run), since C++ can't be unwound.

    Args:
        max_workers (`int`):
            How many calls run at the same time.
        name (`str`):
            Of the threads.
    """

    def __init__(self, max_workers: int, name: str):
        self.max_workers = max_workers
        self.name = name
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._running = 0

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Has `call()` run in a thread, and gives its future."""
        future: Future[T] = Future()
        with self._lock:
            self._waiting.append((future, call))
            if self._running == self.max_workers:
                return future
            self._running += 1
        threading.Thread(target=self._work, daemon=True, name=self.name).start()
        return future

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running -= 1
                    return
                future, call = self._waiting.popleft()
            fulfil(future, call)


def call_within(seconds: float | None, call: Callable[[], T]) -> T:
    """
    `call()`, in a thread of its own and for no longer than some seconds; `None` sets no limit.

    What it changes for its thread (grad mode, autocast, torch's default device) is gone with it. A thread can't be
    ended from outside, so it is a daemon, which is abandoned when the time is over: it may go on, but nobody waits for
    it, neither the caller's thread nor the interpreter's exit.

    Raises:
        [`CallTimeout`]: If it gave no answer in time. Whatever `call` raises, it raises too.
    """
    future: Future[T] = Future()
    name = f"{threading.current_thread().name} (call)"
    threading.Thread(target=fulfil, args=(future, call), daemon=True, name=name).start()
    if not wait([future], seconds).done:  # `future.result(seconds)` can't tell its own TimeoutError from the call's
        raise CallTimeout
    return future.result()


def fulfil(future: Future[T], call: Callable[[], T]) -> None:
    """Makes what `call()` returns or raises the result of `future`."""
    try:
        result = call()
    except BaseException as error:  # SystemExit too: a thread that ends without a word would be waited for forever
        future.set_exception(error)
    else:
        future.set_result(result)
