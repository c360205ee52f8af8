"""One private event loop on a daemon thread, for blocking calls in Jupyter and for ``await`` from any other loop.

All I/O of all pools runs on this loop, so a pool can be used from synchronous code, coroutines and threads. The loop
starts when it is first used; a forked child gets a new one.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Self, TypeVar

from ..errors import LoopThreadError

__all__ = ["Job", "at_exit", "call", "generation", "is_running", "run_on_loop", "start", "wait_for"]

T = TypeVar("T")

_POLL_S = 1.0
GRACE_S = 5.0
"""Seconds for which an interrupted call waits for its coroutine to clean up."""


if hasattr(os, "register_at_fork"):

    class _ForkSafeLoop(asyncio.SelectorEventLoop):
        """An event loop that reports itself closed in a forked child.

        The child shares the sockets and the selector with its parent. asyncio and aiohttp leave both alone when they
        dispose of something that belongs to a closed loop.
        """

        def __init__(self) -> None:
            super().__init__()
            self._process = os.getpid()

        def is_closed(self) -> bool:
            return super().is_closed() or os.getpid() != self._process

    _new_loop: Callable[[], asyncio.AbstractEventLoop] = _ForkSafeLoop
else:
    _new_loop = asyncio.new_event_loop


class _Loop:
    """The loop and its thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread: threading.Thread | None = None
        self.generation = 0
        self.jobs: set[Job[Any]] = set()

    def get(self) -> asyncio.AbstractEventLoop:
        with self.lock:
            if self.loop is None:
                self.loop = _new_loop()
                self.generation += 1
                self.thread = threading.Thread(target=self.loop.run_forever, name="swarmkit-io", daemon=True)
                self.thread.start()
            return self.loop

    def forget(self) -> None:
        """Start afresh in a forked child: it does not have the thread, and the loop's sockets belong to the parent."""
        self.lock = threading.Lock()
        self.loop = None
        self.thread = None
        self.jobs = set()


_shared = _Loop()
_exit_hooks: list[Callable[[], None]] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_shared.forget)


def generation() -> int:
    """Number of the loop in use. Objects made for a loop with another number cannot be used any more."""
    _shared.get()
    return _shared.generation


def is_running(number: int) -> bool:
    """Whether the loop with this number is the one in use."""
    return _shared.loop is not None and _shared.generation == number


class Job(concurrent.futures.Future[T]):
    """A coroutine that runs on the private loop, as a future.

    ``stop`` cancels the coroutine; the future ends when the coroutine has ended, so its clean-up can be waited for.
    (``cancel`` of a plain future ends the future at once.)
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        super().__init__()
        self._coroutine = coroutine
        self._task: asyncio.Task[T] | None = None
        self.set_running_or_notify_cancel()

    def begin(self) -> Self:
        """Start the coroutine, from any thread; a second time does nothing."""
        loop = _shared.get()
        _shared.jobs.add(self)
        loop.call_soon_threadsafe(self._begin)
        return self

    def _begin(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._coroutine)
            self._task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[T]) -> None:
        _shared.jobs.discard(self)
        if task.cancelled():
            self.set_exception(concurrent.futures.CancelledError())
        elif (error := task.exception()) is not None:
            self.set_exception(error)
        else:
            self.set_result(task.result())

    def stop(self) -> None:
        """Cancel the coroutine, from any thread, also before it has begun; returns at once."""
        if not self.done() and (loop := _shared.loop) is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the task with it
                loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        self._begin()
        assert self._task
        self._task.cancel()


def start(coroutine: Coroutine[Any, Any, T]) -> Job[T]:
    """Start a coroutine on the private loop, from any thread."""
    return Job(coroutine).begin()


def wait_for(job: Job[T], poll: Callable[[], None] = lambda: None) -> T:
    """Block until a job is over and return its result; ``poll`` is called every second meanwhile.

    A ``KeyboardInterrupt``, or what ``poll`` raises, stops the job, waits up to ``GRACE_S`` seconds for its clean-up,
    and is raised again; a second one is raised at once.

    Raises
    ------
    LoopThreadError
        Called on the private loop's own thread, which would wait for itself.
    """
    if threading.current_thread() is _shared.thread:
        job.stop()
        raise LoopThreadError(
            "a blocking swarmkit function was called on swarmkit's own I/O thread, which would wait for itself. "
            "Use the async form there: ascatter, atree_reduce, or await the run"
        )
    try:
        while not concurrent.futures.wait([job], timeout=_POLL_S).done:
            poll()
    except BaseException:
        job.stop()
        concurrent.futures.wait([job], timeout=GRACE_S)
        raise
    return job.result()


def call(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the private loop and block for its result."""
    job = Job(coroutine)
    try:
        return wait_for(job.begin())
    except KeyboardInterrupt:  # perhaps before the waiting began
        job.stop()
        raise


async def run_on_loop(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the private loop and await its result, from any loop."""
    if asyncio.get_running_loop() is _shared.loop:
        return await coroutine
    job = start(coroutine)
    waiter: Awaitable[T] = asyncio.wrap_future(job)
    try:
        return await asyncio.shield(waiter)
    except asyncio.CancelledError:
        job.stop()
        with contextlib.suppress(asyncio.CancelledError, concurrent.futures.CancelledError):
            await waiter
        raise


def at_exit(hook: Callable[[], None]) -> Callable[[], None]:
    """Register a function to be called at interpreter exit, after the jobs are cancelled, before the loop stops."""
    _exit_hooks.append(hook)
    return hook


@atexit.register
def _shut_down() -> None:
    jobs = list(_shared.jobs)
    for job in jobs:
        job.stop()
    concurrent.futures.wait(jobs, timeout=1.0)
    for hook in _exit_hooks:
        hook()
    if _shared.loop is not None and _shared.thread is not None:
        _shared.loop.call_soon_threadsafe(_shared.loop.stop)
        _shared.thread.join(timeout=1.0)
