"""How an error of swarmkit shows in IPython: its message and the user's own lines, not the frames inside the package.

IPython asks an exception that has a method ``_render_traceback_`` for the lines to show. Elsewhere, and in every other
``%xmode`` than the default one, the trace is Python's or IPython's own. Knows nothing of the rest of the package.
"""

from __future__ import annotations

import linecache
import os
import sys
import sysconfig
import traceback
from functools import partial
from typing import Any, TypeVar

__all__ = ["shortened", "trace_lines"]

_PACKAGE = os.path.dirname(__file__) + os.sep
_INSTALLED = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")})
_FOLDERS = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))  # pip --user, Debian
_WHOLE = "%tb Plain shows the whole trace."

E = TypeVar("E", bound=BaseException)


def trace_lines(error: BaseException) -> list[str]:
    """What IPython shows of an error: a list of lines, the last of which says how to see all of the trace."""
    shell = sys.modules["IPython"].get_ipython()
    formatter = shell.InteractiveTB
    if formatter.mode != "Context":  # the user has asked for another one, as %tb Plain does
        whole: list[str] = formatter.structured_traceback(type(error), error, error.__traceback__)
        return whole
    name = type(error).__name__
    if str(shell.colors).lower() != "nocolor":
        name = f"\x1b[31m{name}\x1b[39m"
    message = str(error)
    notes = [str(note) for note in getattr(error, "__notes__", ())]
    lines = [f"{name}: {message}" if message else name, *notes, "", *_own_lines(error, shell)]
    if (cause := error.__cause__) is not None and (own := _own_lines(cause, shell)):
        lines += ["", f"caused by {type(cause).__name__}:", *own]  # its message is in the error
    return [*lines, "", _WHOLE]


def _own_lines(error: BaseException, shell: Any) -> list[str]:
    """Where the user's code was on its way into the package, or was called by it; the outermost line first."""
    installed = (_PACKAGE, *_INSTALLED, os.path.dirname(sys.modules["IPython"].__file__ or "") + os.sep)
    found = []
    for frame, number in traceback.walk_tb(error.__traceback__):
        path = frame.f_code.co_filename
        if not path.startswith(installed) and not any(folder in path for folder in _FOLDERS):
            label = shell.compile.format_code_name(path)
            where = f"{' '.join(label)}, line {number}" if label else f"{path}, line {number}"
            found += [where, f"    {linecache.getline(path, number, frame.f_globals).strip()}"]
    return found


def shortened(error: E) -> E:
    """Let one error of Python's own, such as a TypeError or a KeyboardInterrupt, show as those of swarmkit do."""
    # Unlike a lambda, a partial goes to other processes with the error.
    error._render_traceback_ = partial(trace_lines, error)  # type: ignore[attr-defined]  # IPython looks for this name
    return error
