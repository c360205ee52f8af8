"""Every exception swarmkit raises.

::

    SwarmError
    ├── CallerError                    what was asked cannot be done; the message says what can
    │   ├── PromptError                a template or prompt column that cannot be used (also a ValueError)
    │   ├── UnknownColumnError         a column that is not there (also a KeyError)
    │   ├── HostfileError              a hostfile line that cannot be read (also a ValueError)
    │   ├── SettingError               an argument outside what is allowed (also a ValueError)
    │   ├── StoreError                 a store that cannot be read or written
    │   ├── PoolClosedError            a pool used after it was closed (also a RuntimeError)
    │   └── LoopThreadError            a blocking call from the thread that does the I/O (also a RuntimeError)
    ├── EndpointError                  one endpoint failed a request; carries a ``Failure``
    ├── NoEndpointsError               no endpoint is left that could do the work; carries ``.frame``
    ├── ScatterError                   rows failed under ``on_error="raise"``; carries ``.frame``
    └── CancelledError                 the run was cancelled; ``run.partial()`` has what had finished

    ScatterInterrupted                 a KeyboardInterrupt (stop button, Ctrl-C) with ``.frame``
    SwarmWarning                       a UserWarning: rows failed, or endpoints are left out

What the caller did wrong and what an endpoint did wrong never share a branch: the first is raised at
once, the second becomes the error of a row unless nothing is left that could answer.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from .records import Failure

__all__ = [
    "CallerError",
    "CancelledError",
    "EndpointError",
    "HostfileError",
    "LoopThreadError",
    "NoEndpointsError",
    "PoolClosedError",
    "PromptError",
    "ScatterError",
    "ScatterInterrupted",
    "SettingError",
    "StoreError",
    "SwarmError",
    "SwarmWarning",
    "UnknownColumnError",
    "warn",
]


class SwarmError(Exception):
    """Base of all errors raised by swarmkit (``ScatterInterrupted`` is a ``KeyboardInterrupt``)."""

    # KeyError.__str__ would show the repr of the message, quotes and escapes included.
    __str__ = Exception.__str__


class CallerError(SwarmError):
    """What was asked cannot be done as asked; nothing has been sent."""


class PromptError(CallerError, ValueError):
    """A template or prompt column that cannot be turned into prompts."""


class UnknownColumnError(CallerError, KeyError):
    """A column or placeholder that the frame does not have; the message names the nearest one."""


class HostfileError(CallerError, ValueError):
    """A hostfile, or a line of one, that cannot be read; the message has the line's number."""


class SettingError(CallerError, ValueError):
    """An argument outside of what is allowed."""


class StoreError(CallerError, OSError):
    """A store that cannot be read or written, or was written by a newer swarmkit."""


class PoolClosedError(CallerError, RuntimeError):
    """A pool was used after ``close()`` or after its ``async with`` block."""


class LoopThreadError(CallerError, RuntimeError):
    """A blocking verb was called on the thread that runs swarmkit's own event loop."""


class EndpointError(SwarmError):
    """One endpoint failed one request.

    Attributes
    ----------
    failure : Failure
        What was seen, classified: ``failure.kind`` decides what happens next.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.describe())
        self.failure = failure


class _WithFrameError(SwarmError):
    """An error that hands back the rows that did finish."""

    def __init__(self, message: str, frame: pd.DataFrame | None = None) -> None:
        super().__init__(message)
        self.frame = frame


class NoEndpointsError(_WithFrameError):
    """No endpoint is left that could do the work.

    Attributes
    ----------
    frame : pandas.DataFrame or None
        The result so far, when rows had finished before the last endpoint went.
    """


class ScatterError(_WithFrameError):
    """Rows failed and ``on_error="raise"`` was asked for.

    Attributes
    ----------
    frame : pandas.DataFrame
        The whole result, answers and errors.
    """


class CancelledError(SwarmError):
    """The run was cancelled by ``run.cancel()``; ``run.partial()`` has the rows that had finished."""


class ScatterInterrupted(KeyboardInterrupt):
    """A run was interrupted from the keyboard or by the notebook's stop button.

    Attributes
    ----------
    frame : pandas.DataFrame
        The rows that had finished; the others are missing and carry the error "interrupted".
    """

    def __init__(self, message: str, frame: pd.DataFrame | None = None) -> None:
        super().__init__(message)
        self.frame = frame


class SwarmWarning(UserWarning):
    """Rows failed, or endpoints are left out; the message says which and what to do."""


def warn(message: str) -> None:
    """Warn at the line of the caller's own code that called into this package, however deep that was."""
    package = os.path.dirname(__file__)
    level = 2
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame = frame.f_back
        level += 1
    warnings.warn(message, SwarmWarning, stacklevel=level)
