"""Draws what goes on, on a thread of its own, while it goes on."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

__all__ = ["EVERY_S", "follow"]

EVERY_S = 0.3
"""Seconds between two pictures: quick for the eye, little for the processor."""


def follow(job: Future[Any], draw: Callable[[], None]) -> threading.Thread:
    """Call ``draw`` every ``EVERY_S`` seconds until a job is over, and once more then.

    On a thread of its own: a picture never holds up the loop that serves the endpoints, nor does a busy notebook hold
    up the picture. The thread keeps the caller's context, so that what it displays goes to the caller's cell.
    """
    over = threading.Event()
    job.add_done_callback(lambda _: over.set())

    def work() -> None:
        while not over.wait(EVERY_S):
            draw()
        draw()

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(work,), name="swarmkit-widget", daemon=True)
    thread.start()
    return thread
