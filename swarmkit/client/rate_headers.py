"""What the headers of an answer say of rate limits: ``Retry-After``, ``x-ratelimit-*`` and ``ratelimit-*``."""

from __future__ import annotations

import contextlib
import datetime
import math
import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Protocol

from ..records import Quota
from .hostfile import AgentEndpoint

__all__ = ["RateWatch", "quota_of", "retry_after_s", "seconds_of"]

_LONGEST_S = 86_400.0
_NAMES = (b"x-ratelimit-", b"ratelimit-")  # of headers
_UNITS = {"d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ms|us|µs|ns|[dhms])")
_LONGEST_TEXT = 40
_A_TIME = 1e9  # a number of seconds as large as this is a time since 1970
_IN_MS = 1e11  # ... and one as large as this counts milliseconds


class RateWatch(Protocol):
    """Who wants to know what is sent to gateways, and what these say of their rates."""

    def asked(self, endpoint: AgentEndpoint) -> None:
        """A question goes out that belongs to no run."""

    def told(self, endpoint: AgentEndpoint, quota: Quota, asked_at: float) -> None:
        """The answer to a request that was sent at ``asked_at`` (``time.monotonic``) says what is left."""


def seconds_of(text: str, now: float = 0.0) -> float | None:
    """Seconds in a header: "1.5", "6m0s", "250ms", or a date, or a time since 1970, to which they are counted from
    ``now``; None for anything else.

    Examples
    --------
    >>> seconds_of("12"), seconds_of("6m0s"), seconds_of("250ms"), seconds_of("soon")
    (12.0, 360.0, 0.25, None)
    """
    text = text.strip().lower()
    if len(text) > _LONGEST_TEXT:
        return None
    parts = _PART.findall(text)
    if parts and "".join(number + unit for number, unit in parts) == text:
        seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    else:
        try:
            seconds = float(text)
        except ValueError:
            if (date := _date(text)) is None:
                return None
            seconds = date - now
        else:
            seconds /= 1000 if seconds > _IN_MS else 1
            seconds -= now if seconds > _A_TIME else 0
    return min(max(seconds, 0.0), _LONGEST_S) if math.isfinite(seconds) else None


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds for which a server asks to wait: as a number, or as a date, which is compared with its own clock.

    Parameters
    ----------
    headers : mapping
        Of its answer.
    now : float
        Seconds since 1970, for servers that do not say what time it is.
    """
    if (wait_ms := seconds_of(headers.get("retry-after-ms", ""))) is not None:
        return wait_ms / 1000
    return seconds_of(headers.get("retry-after", ""), _date(headers.get("date", "")) or now)


def _date(text: str) -> float | None:
    for read in (datetime.datetime.fromisoformat, parsedate_to_datetime):
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            date = read(text.upper())
            return (date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp()
    return None


def quota_of(raw: list[tuple[bytes, bytes]], now: float = 0.0) -> Quota | None:
    """What ``x-ratelimit-remaining-*`` and ``x-ratelimit-reset-*`` say, with or without ``x-``; None where they say
    nothing. Those that name neither requests nor tokens (Envoy, OpenRouter) are about requests.

    Parameters
    ----------
    raw : list of (bytes, bytes)
        Names and values of the headers.
    now : float
        Seconds since 1970, for servers that do not say what time it is.

    Examples
    --------
    >>> quota_of([(b"X-RateLimit-Remaining-Requests", b"0"), (b"x-ratelimit-reset-requests", b"1s")])
    Quota(requests=(0, 1.0), tokens=None)
    """
    found = {key.removeprefix(b"x-"): value for name, value in raw if (key := name.lower()).startswith(_NAMES)}
    if not found:
        return None
    date = next((value.decode("latin-1") for name, value in raw if name.lower() == b"date"), "")
    requests, tokens, plain = (_left(found, unit, _date(date) or now) for unit in (b"-requests", b"-tokens", b""))
    quota = Quota(requests or plain, tokens)
    return None if quota == Quota() else quota


def _left(found: Mapping[bytes, bytes], unit: bytes, now: float) -> tuple[int, float] | None:
    left = found.get(b"ratelimit-remaining" + unit, b"").decode("latin-1").strip()
    reset_s = seconds_of(found.get(b"ratelimit-reset" + unit, b"").decode("latin-1"), now)
    return (int(left), reset_s) if re.fullmatch("[0-9]{1,15}", left) and reset_s is not None else None
