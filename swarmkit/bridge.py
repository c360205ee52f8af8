"""One private event loop on a daemon thread: blocking calls beside Jupyter's own loop, and awaits from any loop.

All I/O of all pools happens on this loop, so one pool serves sync cells, ``await`` and threads alike. The loop
starts with its first use; a forked child starts without one.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from .errors import LoopThreadError

__all__ = ["Job", "at_exit", "call", "generation", "hop", "is_running", "start", "wait_for"]

T = TypeVar("T")

GRACE_S = 5.0
"""Seconds an interrupted call waits for its clean-up before it leaves all the same."""


class _Loop:
    """The loop and its thread; made anew after a fork."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread: threading.Thread | None = None
        self.generation = 0
        self.jobs: set[Job[Any]] = set()

    def get(self) -> asyncio.AbstractEventLoop:
        with self.lock:
            if self.loop is None:
                self.loop = asyncio.new_event_loop()
                self.generation += 1
                self.thread = threading.Thread(target=self.loop.run_forever, name="swarmkit-io", daemon=True)
                self.thread.start()
            return self.loop

    def forget(self) -> None:
        """In a forked child: the thread is gone, and the loop's sockets are the parent's."""
        self.lock = threading.Lock()
        self.loop = None
        self.thread = None
        self.jobs = set()


_shared = _Loop()
_exit_hooks: list[Callable[[], None]] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_shared.forget)


def generation() -> int:
    """Number of the loop in use: what belongs to a loop of another number must be made anew."""
    _shared.get()
    return _shared.generation


def is_running(number: int) -> bool:
    """Whether the loop of this number is the one in use."""
    return _shared.loop is not None and _shared.generation == number


class Job(concurrent.futures.Future[T]):
    """A coroutine on its way on the private loop.

    Unlike a plain future's, ``stop`` cancels the coroutine and leaves the future to end with it, so that the
    clean-up can be waited for.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        super().__init__()
        self._coroutine = coroutine
        self._task: asyncio.Task[T] | None = None
        self._stopped = False
        self.set_running_or_notify_cancel()

    def _begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._coroutine)
        self._task.add_done_callback(self._end)
        if self._stopped:
            self._task.cancel()

    def _end(self, task: asyncio.Task[T]) -> None:
        _shared.jobs.discard(self)
        if task.cancelled():
            self.set_exception(concurrent.futures.CancelledError())
        elif (error := task.exception()) is not None:
            self.set_exception(error)
        else:
            self.set_result(task.result())

    def stop(self) -> None:
        """Cancel the coroutine, from any thread; returns at once."""
        self._stopped = True
        if self._task is not None and not self.done() and (loop := _shared.loop) is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nothing is left to cancel
                loop.call_soon_threadsafe(self._task.cancel)


def start(coroutine: Coroutine[Any, Any, T]) -> Job[T]:
    """Start a coroutine on the private loop, from any thread."""
    job = Job(coroutine)
    loop = _shared.get()
    _shared.jobs.add(job)
    loop.call_soon_threadsafe(job._begin)
    return job


def wait_for(job: Job[T]) -> T:
    """Block until a job is over and return its result.

    A ``KeyboardInterrupt`` meanwhile stops the job, waits up to ``GRACE_S`` seconds for its clean-up and goes
    on; a second one leaves at once.

    Raises
    ------
    LoopThreadError
        Called on the private loop's own thread, which would wait for itself.
    """
    if threading.current_thread() is _shared.thread:
        job.stop()
        raise LoopThreadError(
            "a blocking swarmkit verb was called on swarmkit's own I/O thread, which would wait for itself. "
            "Use the async form there: ascatter, atree_reduce, or await the run"
        )
    try:
        return job.result()
    except KeyboardInterrupt:
        if not job.done():
            job.stop()
            concurrent.futures.wait([job], timeout=GRACE_S)
        raise


def call(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the private loop and block for its result."""
    return wait_for(start(coroutine))


async def hop(coroutine: Coroutine[Any, Any, T]) -> T:
    """Await a coroutine that must run on the private loop, from whichever loop the caller is on."""
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
    """Call ``hook`` when the interpreter ends, after runs are cancelled and before the loop is stopped."""
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
