"""
Processes that answer questions, forked from one that has imported everything and used no device: they start at once.

If a library ever uses CUDA when it is imported, forked processes can't use it: `GPU_WORKERS=spawn make gpu` starts new
ones instead.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import sys
from collections.abc import Callable
from typing import Any

from gpu.setting import quiet


PROCESSES: Any = multiprocessing.get_context(os.environ.get("GPU_WORKERS", "forkserver"))
if PROCESSES.get_start_method() == "forkserver":
    PROCESSES.set_forkserver_preload(["ddpo_trl.trainer", "conformance.checks", "gpu.networks"])

Answer = Callable[[Any], None]
Main = Callable[..., None]


class WorkerEnded(RuntimeError):
    """A process has raised an error, or crashed."""


class Worker:
    """
    A process that runs `main(questions, answer, *arguments)`, with an iterator of questions and a function that sends
    an answer.
    """

    def __init__(self, main: Main, *arguments: Any):
        self.connection, theirs = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=serve, args=(theirs, main, arguments), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, question: Any) -> None:
        """Send a question. If the process has ended, the answer will say so."""
        with contextlib.suppress(OSError):
            self.connection.send(question)

    def answer(self) -> Any:
        """
        Wait for the next answer.

        Raises:
            [`WorkerEnded`]: If the process has ended, with its error.
        """
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise WorkerEnded(f"the process ended with status {self.process.exitcode}") from None
        if isinstance(answer, WorkerEnded):
            raise answer
        return answer

    def end(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.join(timeout=2)
        self.process.kill()


def serve(connection: multiprocessing.connection.Connection, main: Main, arguments: tuple[Any, ...]) -> None:
    """Run the main function of a worker, and send its error if it raises one."""
    quiet()
    questions = iter(lambda: receive(connection), None)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Trainer prints its logs
            main(questions, connection.send, *arguments)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        with contextlib.suppress(OSError):
            connection.send(WorkerEnded(f"{type(error).__name__}: {lines[0][:500]}"))
        raise


def receive(connection: multiprocessing.connection.Connection) -> Any:
    """Return the next question, `None` if there are no more."""
    try:
        return connection.recv()
    except EOFError:
        return None
