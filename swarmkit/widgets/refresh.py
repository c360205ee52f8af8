"""Redraws a widget on a thread of its own while a job runs."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

__all__ = ["EVERY_S", "follow"]

EVERY_S = 0.3
"""Seconds between two redraws: often enough to look continuous, rare enough to cost little CPU."""


def follow(job: Future[Any], draw: Callable[[], None]) -> threading.Thread:
    """Call ``draw`` every ``EVERY_S`` seconds until a job is done, and once more then.

    The thread of its own keeps a slow redraw from blocking the event loop, and a busy notebook from blocking the
    redraw. The thread has the caller's context, so that its output goes to the caller's cell.
    """
    done = threading.Event()
    job.add_done_callback(lambda _: done.set())

    def work() -> None:
        while not done.wait(EVERY_S):
            draw()
        draw()

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(work,), name="swarmkit-widget", daemon=True)
    thread.start()
    return thread
