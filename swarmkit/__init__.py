"""Push a DataFrame's column of prompts through a swarm of LLM endpoints, and get a DataFrame back.

>>> import pandas as pd
>>> import swarmkit as sk
>>> swarm = sk.local(engine="echo")  # servers on this machine; or sk.connect("agents.hostfile")
>>> pool = sk.connect(swarm)
>>> df = pd.DataFrame({"gene": ["lacZ", "recA"]})
>>> df.swarm.scatter("What does {gene} do?", max_tokens=32, progress=False)["response"].tolist()
['echo: What does lacZ do?', 'echo: What does recA do?']
>>> swarm.stop()

``df.swarm`` lists the verbs; ``df.swarm.scatter?`` has each of its keywords.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import accessor as _accessor
from .version import __version__

if TYPE_CHECKING:  # "as" marks names that type checkers let users import from here
    from .analysis import plots as plots
    from .analysis.compare import Comparison as Comparison
    from .analysis.compare import compare as compare
    from .analysis.compare_models import ModelComparison as ModelComparison
    from .analysis.compare_models import compare_models as compare_models
    from .analysis.estimate import Estimate as Estimate
    from .analysis.estimate import estimate as estimate
    from .analysis.models import EndpointModel as EndpointModel
    from .analysis.models import Workload as Workload
    from .analysis.semantic_entropy import semantic_entropy as semantic_entropy
    from .analysis.similar import dedupe as dedupe
    from .analysis.similar import similar as similar
    from .analysis.simulate import Simulation as Simulation
    from .analysis.simulate import simulate as simulate
    from .analysis.votes import vote as vote
    from .client.hostfile import AgentEndpoint as AgentEndpoint
    from .client.hostfile import parse_hostfile as parse_hostfile
    from .client.job_hosts import hosts_from_env as hosts_from_env
    from .engine.policy import BatchPolicy as BatchPolicy
    from .engine.policy import RetryPolicy as RetryPolicy
    from .errors import CallerError as CallerError
    from .errors import CancelledError as CancelledError
    from .errors import EndpointError as EndpointError
    from .errors import HostfileError as HostfileError
    from .errors import LoopThreadError as LoopThreadError
    from .errors import NoEndpointsError as NoEndpointsError
    from .errors import PoolClosedError as PoolClosedError
    from .errors import PromptError as PromptError
    from .errors import ScatterError as ScatterError
    from .errors import ScatterInterrupted as ScatterInterrupted
    from .errors import SettingError as SettingError
    from .errors import StoreError as StoreError
    from .errors import SwarmError as SwarmError
    from .errors import SwarmWarning as SwarmWarning
    from .errors import UnknownColumnError as UnknownColumnError
    from .frames.classify import classify as classify
    from .frames.embed import aembed as aembed
    from .frames.embed import embed as embed
    from .frames.pipeline import pipeline as pipeline
    from .frames.provenance import methods as methods
    from .frames.steps import Step as Step
    from .frames.store import Store as Store
    from .frames.store import open_store as open_store
    from .frames.verbs import ascatter as ascatter
    from .frames.verbs import atree_reduce as atree_reduce
    from .frames.verbs import broadcast as broadcast
    from .frames.verbs import iter_scatter as iter_scatter
    from .frames.verbs import preview as preview
    from .frames.verbs import scatter as scatter
    from .frames.verbs import submit as submit
    from .frames.verbs import tree_reduce as tree_reduce
    from .patterns.broadcast import broadcast_and_reduce as broadcast_and_reduce
    from .patterns.scatter_gather import map_gather as map_gather
    from .patterns.scatter_gather import scatter_gather as scatter_gather
    from .pool.agent_pool import AgentPool as AgentPool
    from .pool.connect import connect as connect
    from .pool.embedding_pool import EmbeddingPool as EmbeddingPool
    from .pool.vllm_pool import VLLMPool as VLLMPool
    from .pool.wait import wait_until_ready as wait_until_ready
    from .records import EmbeddingResponse as EmbeddingResponse
    from .records import Response as Response
    from .runs.run import Run as Run
    from .runs.run import last_run as last_run
    from .runs.stats import RunStats as RunStats
    from .schema import Schema as Schema
    from .server import LocalSwarm as LocalSwarm
    from .server import local as local
    from .widgets import EndpointPicker as EndpointPicker
    from .widgets import RunMonitor as RunMonitor

_HOMES = {
    "analysis.compare": ("Comparison", "compare"),
    "analysis.compare_models": ("ModelComparison", "compare_models"),
    "analysis.estimate": ("Estimate", "estimate"),
    "analysis.models": ("EndpointModel", "Workload"),
    "analysis.semantic_entropy": ("semantic_entropy",),
    "analysis.similar": ("dedupe", "similar"),
    "analysis.simulate": ("Simulation", "simulate"),
    "analysis.votes": ("vote",),
    "client.hostfile": ("AgentEndpoint", "parse_hostfile"),
    "client.job_hosts": ("hosts_from_env",),
    "engine.policy": ("BatchPolicy", "RetryPolicy"),
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
    "frames.classify": ("classify",),
    "frames.pipeline": ("pipeline",),
    "frames.provenance": ("methods",),
    "frames.steps": ("Step",),
    "frames.embed": ("aembed", "embed"),
    "frames.verbs": (
        "ascatter",
        "atree_reduce",
        "broadcast",
        "iter_scatter",
        "preview",
        "scatter",
        "submit",
        "tree_reduce",
    ),
    "patterns.broadcast": ("broadcast_and_reduce",),
    "patterns.scatter_gather": ("map_gather", "scatter_gather"),
    "pool.agent_pool": ("AgentPool",),
    "pool.connect": ("connect",),
    "pool.embedding_pool": ("EmbeddingPool",),
    "pool.vllm_pool": ("VLLMPool",),
    "pool.wait": ("wait_until_ready",),
    "records": ("EmbeddingResponse", "Response"),
    "runs.run": ("Run", "last_run"),
    "runs.stats": ("RunStats",),
    "schema": ("Schema",),
    "server": ("LocalSwarm", "local"),
    "frames.store": ("Store", "open_store"),
    "widgets": ("EndpointPicker", "RunMonitor"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted([*_HOME_OF, "__version__", "plots"])


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: openai alone takes half a second."""
    if name == "plots":
        value: Any = import_module(".analysis.plots", __name__)
    elif name in _HOME_OF:
        value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    else:
        raise AttributeError(f"module 'swarmkit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
