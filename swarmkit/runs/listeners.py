"""Listeners that cannot break a run."""

from __future__ import annotations

from collections.abc import Iterable

from ..text import printable
from .events import Listener, RunEvent
from .log import LOGGER

__all__ = ["Listeners", "listener_failed"]


class Listeners:
    """A listener that passes events on to others, none of which can break the run.

    One that raises is removed: the exception is logged with its traceback, and a line about it is added to
    ``errors``, of which whoever waits for the run warns (a warning on the I/O thread could not be caught by anybody).

    Parameters
    ----------
    listeners : iterable of callable
        In the order in which they are called.
    errors : list of str
        Added to.

    Examples
    --------
    >>> from swarmkit.runs.events import RunEnded
    >>> seen, errors = [], []
    >>> listeners = Listeners([lambda event: 1 / 0, seen.append], errors)
    >>> for at_s in (0.0, 1.0):
    ...     listeners(RunEnded(None, False, at_s))
    >>> len(seen), len(errors)
    (2, 1)
    """

    def __init__(self, listeners: Iterable[Listener], errors: list[str]) -> None:
        self._listeners = tuple(listeners)
        self._errors = errors

    def __call__(self, event: RunEvent) -> None:
        """Pass on one event."""
        for listener in self._listeners:
            try:
                listener(event)
            except Exception as exc:  # noqa: BLE001 - whatever it is, it is not the run's; it is reported
                self._listeners = tuple(other for other in self._listeners if other is not listener)
                self._errors.append(listener_failed(listener, exc))


def listener_failed(listener: object, exc: Exception) -> str:
    """Log that a listener raised; return a line that says so."""
    kind = listener if hasattr(listener, "__qualname__") else type(listener)
    name = f"{kind.__module__}.{kind.__qualname__}"
    line = f"the listener {name} raised {type(exc).__name__}: {printable(str(exc))}"
    LOGGER.error("%s", line, exc_info=exc)
    return f"{line}. It was removed; the run is not affected"
