"""Daemon threads for reward functions: a hanging call never blocks the exit of the interpreter."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar


T = TypeVar("T")


class CallTimeout(Exception):
    """A call did not return within its time limit."""


class DaemonPool:
    """
    Thread pool that runs calls in the order in which they were submitted.

    `concurrent.futures.ThreadPoolExecutor` runs its whole queue and joins its threads before the interpreter exits, so
    a reward server that hangs would block the exit of all processes of a run. These threads are daemons, and end when
    there is nothing to do. The price: if the interpreter exits while one computes with torch, the process aborts (code
    134, after output is flushed and `atexit` has run), since C++ can't be unwound.

    Args:
        max_workers (`int`):
            Number of calls that run at the same time.
        name (`str`):
            Name of the threads.
    """

    def __init__(self, max_workers: int, name: str):
        self.max_workers = max_workers
        self.name = name
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._running = 0

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Run `call()` in a thread, and return its future. If that is canceled before it runs, it never runs."""
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
            if future.set_running_or_notify_cancel():
                fulfil(future, call)


def call_within(seconds: float | None, call: Callable[[], T]) -> T:
    """
    Return `call()`, run in its own thread: changes to grad mode, autocast and torch's default device end with it.

    Args:
        seconds (`float`, *optional*):
            Time limit. A thread can't be ended from outside: after that time it is abandoned, and may go on.
        call (`Callable`):
            Called without arguments. Its exceptions are passed on.

    Raises:
        [`CallTimeout`]: If it does not return in time.
    """
    future: Future[T] = Future()
    name = f"{threading.current_thread().name} (call)"
    threading.Thread(target=fulfil, args=(future, call), daemon=True, name=name).start()
    # `future.result(seconds)` could not distinguish its own TimeoutError from that of the call.
    if not wait([future], seconds).done:
        raise CallTimeout
    return future.result()


def fulfil(future: Future[T], call: Callable[[], T]) -> None:
    """Set the result of `future` to the value or exception of `call()`."""
    try:
        result = call()
    except BaseException as error:  # SystemExit too, or else the caller would wait forever
        future.set_exception(error)
    else:
        future.set_result(result)
