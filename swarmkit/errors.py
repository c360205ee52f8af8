"""Every exception swarmkit raises.

::

    SwarmError
    ├── CallerError                    a call that cannot be carried out as asked; the message says what can
    │   ├── PromptError                a template or prompt column that cannot be used (also a ValueError)
    │   ├── UnknownColumnError         a column that is not there (also a KeyError)
    │   ├── HostfileError              a hostfile line that cannot be read (also a ValueError)
    │   ├── SettingError               an argument outside what is allowed (also a ValueError)
    │   ├── StoreError                 a store that cannot be read or written (also an OSError); carries ``.frame``
    │   ├── PoolClosedError            a pool used after it was closed (also a RuntimeError)
    │   └── LoopThreadError            a blocking call from the thread that does the I/O (also a RuntimeError)
    ├── EndpointError                  one endpoint failed a request; carries a ``Failure``
    ├── NoEndpointsError               no usable endpoint is left; carries ``.frame``
    ├── ScatterError                   rows failed under ``on_error="raise"``; carries ``.frame``
    └── CancelledError                 the run was cancelled; ``run.partial()`` has the finished rows

    ScatterInterrupted                 a KeyboardInterrupt (stop button, Ctrl-C) with ``.frame``
    SwarmWarning                       a UserWarning: rows failed, endpoints cannot be used or believed, ...

Mistakes of the caller and failures of endpoints are on different branches. A ``CallerError`` is raised at once;
an ``EndpointError`` becomes the error of its rows, and a run ends early only if no usable endpoint is left.
In IPython they show their message and the line of the caller; ``%tb Plain`` shows the whole trace.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

from .text import visible
from .traces import trace_lines

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
    """Base of all errors raised by swarmkit (``ScatterInterrupted`` is a ``KeyboardInterrupt``).

    Examples
    --------
    >>> try:
    ...     df.swarm.scatter("{gen}")
    ... except sk.SwarmError as error:
    ...     print(error)
    the template's placeholder {gen} is not a column. Did you mean 'gene'? The columns are: gene
    """

    def __str__(self) -> str:
        # Words of servers may be part of the message, and must not control the terminal that shows it.
        # Not super(): KeyError.__str__ would show the repr of the message, with quotes and escapes.
        return visible(Exception.__str__(self))

    def _render_traceback_(self) -> list[str]:
        return trace_lines(self)  # IPython's way to ask what is shown


class CallerError(SwarmError):
    """A call that cannot be carried out as asked.

    Raised before anything is sent, except where a store cannot be written during a run.

    Examples
    --------
    >>> df.swarm.scatter("{gene}", mode="batches")
    Traceback (most recent call last):
    swarmkit.errors.SettingError: mode='batches': must be one of 'batch', 'single'
    >>> issubclass(sk.SettingError, sk.CallerError)
    True
    """


class PromptError(CallerError, ValueError):
    """A template or prompt column that cannot be turned into prompts.

    Examples
    --------
    >>> df.swarm.scatter("Describe {gene")
    Traceback (most recent call last):
    swarmkit.errors.PromptError: the template's braces do not balance ...: 'Describe {gene'
    """


class UnknownColumnError(CallerError, KeyError):
    """A column or placeholder that the frame does not have; the message names the nearest one.

    Examples
    --------
    >>> df.swarm.scatter("{gen}")
    Traceback (most recent call last):
    swarmkit.errors.UnknownColumnError: the template's placeholder {gen} is not a column. Did you mean 'gene'? ...
    """


class HostfileError(CallerError, ValueError):
    """A hostfile, or a line of one, that cannot be read; the message has the line's number.

    Examples
    --------
    >>> sk.parse_hostfile("none.hostfile")
    Traceback (most recent call last):
    swarmkit.errors.HostfileError: cannot read the hostfile 'none.hostfile': ...
    """


class SettingError(CallerError, ValueError):
    """An argument outside of what is allowed.

    Examples
    --------
    >>> df.swarm.scatter("{gene}", max_tokens=0)
    Traceback (most recent call last):
    swarmkit.errors.SettingError: max_tokens=0: must be a whole number, 1 or more
    """


class StoreError(CallerError, OSError):
    """A store that cannot be read or written, or was written by a newer swarmkit.

    Attributes
    ----------
    frame : pandas.DataFrame or None
        The result so far, if it failed during a run.

    Examples
    --------
    >>> from pathlib import Path
    >>> _ = Path("notes.txt").write_text("no store")
    >>> sk.open_store("notes.txt")
    Traceback (most recent call last):
    swarmkit.errors.StoreError: notes.txt is a file; a store is a folder of segments
    """

    frame: pd.DataFrame | None = None


class PoolClosedError(CallerError, RuntimeError):
    """A pool was used after ``close()``, or after its ``with`` or ``async with`` block.

    Examples
    --------
    >>> with sk.VLLMPool(swarm.endpoints) as closed:
    ...     pass
    >>> df.swarm.scatter("{gene}", pool=closed)
    Traceback (most recent call last):
    swarmkit.errors.PoolClosedError: ...
    """


class LoopThreadError(CallerError, RuntimeError):
    """A blocking verb was called on the thread that runs swarmkit's own event loop."""


class EndpointError(SwarmError):
    """One endpoint failed one request.

    Attributes
    ----------
    failure : Failure
        The classified failure; ``failure.kind`` decides the reaction.

    Examples
    --------
    >>> from swarmkit.records import Failure, FailureKind
    >>> error = EndpointError(Failure(FailureKind.CONNECT, "connection refused", "node001:8000"))
    >>> print(error, "|", error.failure.kind)
    cannot connect at node001:8000: connection refused | cannot connect
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.describe())
        self.failure = failure

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.failure,), self.__dict__  # args holds the message, which __init__ does not take


class _WithFrameError(SwarmError):
    """An error that carries the rows that have finished."""

    def __init__(self, message: str, frame: pd.DataFrame | None = None) -> None:
        super().__init__(message)
        self.frame = frame


class NoEndpointsError(_WithFrameError):
    """No usable endpoint is left.

    Attributes
    ----------
    frame : pandas.DataFrame or None
        The result so far, if rows had finished before the last endpoint failed.

    Examples
    --------
    >>> try:
    ...     sk.connect("127.0.0.1:9")  # where nothing listens
    ... except sk.NoEndpointsError as error:
    ...     print(error)
    no endpoint can be used:
      127.0.0.1:9: cannot connect: connection refused
    """


class ScatterError(_WithFrameError):
    """Rows failed and ``on_error="raise"`` was set.

    Attributes
    ----------
    frame : pandas.DataFrame
        The whole result, with answers and errors.

    Examples
    --------
    >>> df = pd.DataFrame({"gene": ["lacZ", None]})
    >>> try:
    ...     df.swarm.scatter("What does {gene} do?", on_error="raise")
    ... except sk.ScatterError as error:
    ...     print(error.frame["response"].tolist())
    ['echo: What does lacZ do?', nan]
    """


class CancelledError(SwarmError):
    """The run was cancelled by ``run.cancel()``; ``run.partial()`` has the finished rows.

    Examples
    --------
    >>> run = pd.DataFrame({"i": range(20_000)}).swarm.submit("{i}")
    >>> run.cancel()
    >>> run.result()
    Traceback (most recent call last):
    swarmkit.errors.CancelledError: the run was cancelled after ...; they are in run.partial()
    """


class ScatterInterrupted(KeyboardInterrupt):
    """A run was interrupted from the keyboard or by the notebook's stop button.

    Attributes
    ----------
    frame : pandas.DataFrame
        All rows; those that had not finished have no answer, and the error "interrupted".
    """

    def __init__(self, message: str, frame: pd.DataFrame | None = None) -> None:
        super().__init__(message)
        self.frame = frame

    def _render_traceback_(self) -> list[str]:
        return trace_lines(self)


class SwarmWarning(UserWarning):
    """Rows failed, endpoints cannot be used or believed, listeners raised; the message says which and what to do.

    In a notebook it is a box under its cell. The filters of ``warnings`` and ``catch_warnings`` apply to it as to any
    other warning.

    Examples
    --------
    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore", sk.SwarmWarning)
    ...     answers = pd.DataFrame({"gene": ["lacZ", None]}).swarm.scatter("What does {gene} do?")
    >>> answers["response_error"].tolist()
    [nan, "missing value in column 'gene'"]
    """


def warn(message: str) -> None:
    """Warn with the location of the innermost line outside this package, however deep the call is.

    Words of servers may be part of the message: their control characters are written as escapes.
    """
    package = os.path.dirname(__file__)
    level = 2
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame = frame.f_back
        level += 1
    warnings.warn(visible(message), SwarmWarning, stacklevel=level)
