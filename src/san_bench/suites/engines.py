"""Execute the runs of a suite, each in its own process on this machine.

An engine calls one function with the value of each job and yields an outcome as soon as a job ends. Worker processes
import the function by its path, so it must be defined at the top level of a module; no code is sent. A job that raises,
or whose process is killed, yields an outcome with an error.

Example:
    >>> import math
    >>> outcomes = LocalEngine(workers=2, threads=1).run(math.sqrt, {"four": 4.0, "minus": -1.0})
    >>> for outcome in sorted(outcomes, key=lambda outcome: outcome.job):
    ...     print(outcome.job, outcome.value, (outcome.error or "no error").partition(":")[0])
    four 2.0 no error
    minus None ValueError
"""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from san_bench.config.errors import explain
from san_bench.config.strict import san_error

PRELOAD = ["san_bench.quiet", "san_bench.run.train", "peft", "san_peft"]
"""Modules that the fork server imports once for all processes."""

PATIENCE = 30.0
"""Seconds between terminating and killing a process, in which a training saves a checkpoint."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of a job.

    Attributes:
        job: Name of the job.
        value: Return value of the function.
        error: Error message, or `None`. Errors of the program are preceded by their type and followed by the last
            frames of their traceback.
    """

    job: str
    value: Any | None
    error: str | None


class Engine(Protocol):
    """Executes jobs."""

    def run(self, function: Callable[[Any], Any], jobs: Mapping[str, Any]) -> Iterator[Outcome]:
        """Calls a function with the value of each job, and yields each outcome as it comes, in any order."""
        ...


@dataclass(frozen=True)
class LocalEngine:
    """Runs jobs on this machine, each in a fresh process, so that its peak memory is its own.

    With CUDA, each job sees one device: the one with the fewest jobs. With more workers than devices, several jobs
    share a device. The processes end when the iteration is stopped or interrupted, or when this process dies.

    Attributes:
        workers: Number of parallel jobs.
        threads: Torch threads per job; `None` leaves the number to torch.
    """

    workers: int
    threads: int | None

    def run(self, function: Callable[[Any], Any], jobs: Mapping[str, Any]) -> Iterator[Outcome]:
        """Calls a function with the value of each job, and yields each outcome as it comes, in any order.

        Raises:
            SanError: If another process could not import the function.
        """
        path, devices = import_path(function), _devices()
        waiting, running = deque(jobs.items()), list[_Child]()
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    job, value = waiting.popleft()
                    device = min(devices, key=[child.device for child in running].count, default=None)
                    running.append(_Child(job, (path, value, self.threads), device))
                wait([source for child in running for source in child.sources])
                for child in tuple(running):
                    if child.has_ended():
                        running.remove(child)
                        yield child.outcome()
        finally:
            for child in running:
                child.process.terminate()
            for child in running:
                child.process.join(PATIENCE)
                child.process.kill()
                child.process.join()


def in_fresh_process(function: Callable[[Any], Any], value: Any) -> Any:
    """Calls a function in a new process and returns its result.

    Raises:
        SanError: If the function raises, or the process is killed.
    """
    (outcome,) = LocalEngine(workers=1, threads=None).run(function, {function.__name__.strip("_"): value})
    if outcome.error is not None:
        raise san_error(outcome.error)
    return outcome.value


def import_path(function: Callable[..., Any]) -> str:
    """Returns the import path of a function, such as `math:sqrt`.

    Raises:
        SanError: If another process cannot import the function.
    """
    module, name = function.__module__, getattr(function, "__qualname__", "<no name>")
    try:
        found = None if module == "__main__" else pkgutil.resolve_name(f"{module}:{name}")
    except (AttributeError, ImportError, ValueError):
        found = None
    if found is not function:
        raise san_error(f"Another process cannot import {module}.{name}. Define it at the top level of a module.")
    return f"{module}:{name}"


def attempt(path: str, value: Any, threads: int | None) -> tuple[Any, str | None]:
    """Calls the function of an import path, in the process of a job.

    Returns:
        Its return value and `None`, or `None` and the error message.
    """
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # if torch is not imported yet
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
    try:
        return pkgutil.resolve_name(path)(value), None
    except Exception as error:
        return None, format_error(error)


def format_error(error: BaseException) -> str:
    """Formats an error: the message for a user, or type, message and the last frames of the traceback."""
    text = explain(error)
    if text is not None:
        return text
    frames = "".join(traceback.format_tb(error.__traceback__, limit=-3))
    return f"{type(error).__name__}: {error}\n{frames}".rstrip()


class _Child:
    """The process of a job."""

    def __init__(self, job: str, call: tuple[str, Any, int | None], device: str | None) -> None:
        # On Linux, fork from a server that has already imported torch, which saves seconds. Not with GPUs: importing
        # bitsandbytes initialises CUDA, which forked processes cannot use.
        forked = sys.platform == "linux" and device is None
        context: Any = multiprocessing.get_context("forkserver" if forked else "spawn")
        if forked:
            context.set_forkserver_preload(PRELOAD)
        self.job, self.device = job, device
        self.reply: tuple[Any, str | None] | None = None
        inbox, outbox = context.Pipe(duplex=False)
        self.inbox: Connection | None = inbox
        self.process = context.Process(target=_work, args=(outbox, device, *call))
        self.process.start()
        outbox.close()

    @property
    def sources(self) -> list[Any]:
        """The connections to wait for: the reply and the end of the process."""
        return [self.process.sentinel, *([self.inbox] if self.inbox else [])]

    def has_ended(self) -> bool:
        """Receives the reply if there is one, and returns whether the process has ended."""
        ended = not self.process.is_alive()
        if self.inbox and self.inbox.poll():
            try:
                self.reply = self.inbox.recv()
            except EOFError:
                self.reply = None
            except Exception as error:
                self.reply = None, f"The return value cannot be unpickled. {format_error(error)}"
            self.inbox.close()
            self.inbox = None
        return ended

    def outcome(self) -> Outcome:
        """Returns the outcome of the job after its process has ended."""
        if self.reply is not None:
            return Outcome(self.job, *self.reply)
        code = self.process.exitcode or 0
        name = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        hint = " It may have run out of memory." if code == -signal.SIGKILL else ""
        return Outcome(self.job, None, f"The process of {self.job} {name} before it returned a result.{hint}")


def _work(outbox: Connection, device: str | None, path: str, value: Any, threads: int | None) -> None:
    """Executes one job in its process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends its children
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    try:
        reply = attempt(path, value, threads)
    except KeyboardInterrupt as stop:  # a training that was stopped, after its checkpoint was saved
        sys.exit(128 + getattr(stop, "number", signal.SIGINT))
    try:
        outbox.send(reply)
    except Exception as error:
        outbox.send((None, f"The return value cannot be pickled. {format_error(error)}"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _devices() -> list[str]:
    """Returns the visible CUDA devices, as entries of `CUDA_VISIBLE_DEVICES`."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(index) for index in range(count)]
