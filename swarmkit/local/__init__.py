"""OpenAI-compatible endpoints on this machine: a small real model, or an echo for tests."""

from __future__ import annotations

import sys
from types import ModuleType

from .faults import Fault
from .launch import LocalServerError, LocalSwarm, local

__all__ = ["Fault", "LocalServerError", "LocalSwarm", "local"]


class _Callable(ModuleType):
    # ``swarmkit.local`` is this package and the function as well, whichever was imported first.
    __call__ = staticmethod(local)


sys.modules[__name__].__class__ = _Callable
