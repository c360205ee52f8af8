"""What a process holds: descriptors, threads, tasks of the I/O loop, memory."""

import asyncio
import gc
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from swarmkit.client import io_thread


class Footprint(NamedTuple):
    """What a process holds at one time: ``threads`` without asyncio's few workers, which stay; ``rss_mb`` is its
    resident memory in MiB."""

    descriptors: int
    threads: int
    tasks: int
    rss_mb: float


def footprint() -> Footprint:
    """What this process holds now."""

    async def tasks() -> int:
        return len(asyncio.all_tasks()) - 1

    gc.collect()
    with open("/proc/self/statm") as file:
        rss = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    threads = [thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")]
    return Footprint(len(os.listdir("/proc/self/fd")), len(threads), io_thread.call(tasks()), round(rss / 2**20, 1))


def settled(enough: Callable[[Footprint], bool], within_s: float = 10.0) -> Footprint:
    """The footprint as soon as it is small enough: connections stay open for some seconds when they are idle."""
    end = time.monotonic() + within_s
    while not enough(now := footprint()) and time.monotonic() < end:
        time.sleep(0.2)
    return now
