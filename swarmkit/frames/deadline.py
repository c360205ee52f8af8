"""``deadline=``: as a call gives it, on the clock of its runs, and for what a call does before its run."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from ..client.job_end import ENDS_OF, job_end
from ..engine.deadline import Deadline
from ..errors import SettingError

__all__ = ["before", "moment_of", "read_deadline"]

T = TypeVar("T")

_KEPT_S = 60.0
"""Seconds before the end of a job that are kept for writing the result; a tenth of what is left, where that is less."""


def read_deadline(given: Any) -> Deadline | None:
    """The deadline of a call that begins now.

    Parameters
    ----------
    given : float, datetime, "slurm", "pbs" or None
        Seconds from now; a moment, in local time if it has no time zone; or shortly before the end of this job.

    Raises
    ------
    SettingError
        It is none of these, or the job does not say when it ends.
    """
    now, clock = datetime.now(UTC), time.monotonic()
    match given:
        case None | Deadline():
            return given
        case str() if given in ENDS_OF:
            left_s = (job_end(given) - now).total_seconds()
            left_s -= min(_KEPT_S, max(0.0, left_s / 10))
        case datetime():
            left_s = (given.astimezone(UTC) - now).total_seconds()
        case int() | float() if not isinstance(given, bool) and given > 0 and math.isfinite(given):
            left_s = float(given)
        case _:
            raise SettingError(
                f'deadline={given!r}: must be seconds above 0, a datetime, or "slurm" or "pbs" for the end of this job'
            )
    moment = (now + timedelta(seconds=left_s)).astimezone()
    today = moment.date() == now.astimezone().date()
    return Deadline(clock + left_s, f"{moment:%H:%M:%S}" if today else f"{moment:%Y-%m-%d %H:%M:%S}")


def moment_of(deadline: Deadline) -> datetime:
    """A deadline as it holds in other processes, too."""
    return datetime.now(UTC) + timedelta(seconds=deadline.at - time.monotonic())


async def before(deadline: Deadline | None, work: Awaitable[T], late: T) -> T:
    """The result of some work; ``late`` where the deadline comes first."""
    left_s = None if deadline is None else deadline.at - time.monotonic()
    try:
        async with asyncio.timeout(left_s) as timer:
            return await work
    except TimeoutError:
        if not timer.expired():
            raise
        return late
