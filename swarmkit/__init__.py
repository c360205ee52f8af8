"""Push a DataFrame's column of prompts through a swarm of LLM endpoints, and get a DataFrame back.

>>> import swarmkit as sk
>>> sk.BatchPolicy().max_size
100
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import accessor as accessor  # registers df.swarm and Series.swarm

if TYPE_CHECKING:
    from .compare import Comparison, compare
    from .connect import connect
    from .errors import (
        CallerError,
        CancelledError,
        EndpointError,
        HostfileError,
        LoopThreadError,
        NoEndpointsError,
        PoolClosedError,
        PromptError,
        ScatterError,
        ScatterInterrupted,
        SettingError,
        StoreError,
        SwarmError,
        SwarmWarning,
        UnknownColumnError,
    )
    from .frames import ascatter, atree_reduce, broadcast, iter_scatter, preview, scatter, submit, tree_reduce
    from .hostfile import AgentEndpoint, parse_hostfile
    from .local import LocalSwarm, local
    from .policy import BatchPolicy, RetryPolicy
    from .pool import AgentPool
    from .records import Response
    from .run import Run, last_run
    from .simulate import EndpointModel, Simulation, Workload, simulate
    from .stats import RunStats
    from .store import Store, open_store
    from .vllm_pool import VLLMPool
    from .wait import wait_until_ready
    from .widgets import EndpointPicker, RunMonitor

__version__ = "0.1.0"

_HOMES = {
    "compare": ("Comparison", "compare"),
    "connect": ("connect",),
    "errors": (
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
    ),
    "frames": ("ascatter", "atree_reduce", "broadcast", "iter_scatter", "preview", "scatter", "submit", "tree_reduce"),
    "hostfile": ("AgentEndpoint", "parse_hostfile"),
    "local": ("LocalSwarm", "local"),
    "policy": ("BatchPolicy", "RetryPolicy"),
    "pool": ("AgentPool",),
    "records": ("Response",),
    "run": ("Run", "last_run"),
    "simulate": ("EndpointModel", "Simulation", "Workload", "simulate"),
    "stats": ("RunStats",),
    "store": ("Store", "open_store"),
    "vllm_pool": ("VLLMPool",),
    "wait": ("wait_until_ready",),
    "widgets": ("EndpointPicker", "RunMonitor"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


class _Package(ModuleType):
    """The verbs ``connect``, ``compare`` and ``local`` live in modules of their names. Importing a module would put it
    in the verb's place here; the verb stays, whichever comes first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _HOME_OF):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: openai alone takes half a second."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'swarmkit' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
