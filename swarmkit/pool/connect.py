"""From a target to a pool: probe its endpoints, warn of those that cannot be used, and make it the default."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Unpack

from ..client import io_thread
from ..client.capabilities import PROBE_S, ServerInfo, probe_all, require_model
from ..client.hostfile import AgentEndpoint
from ..client.keys import hidden
from ..client.model_list import listed_as
from ..errors import NoEndpointsError, warn
from ..text import none_of, plural
from .settings import VLLMSettings, hands_on
from .targets import Target, may_be_misread, resolve, watched_hostfile
from .vllm_pool import VLLMPool
from .watch import Watch

__all__ = [
    "connect",
    "connected",
    "current_pool",
    "default_pool",
    "fit",
    "new_pool",
    "reasons",
    "set_default_pool",
    "use_pool",
]

_NAMED = 10


_default: VLLMPool | None = None


@hands_on(VLLMPool, chat="auto")
def connect(
    target: Target = None, *, probe_timeout: float = PROBE_S, watch: bool = False, **settings: Unpack[VLLMSettings]
) -> VLLMPool:
    """Connect to a swarm and make it the default for ``df.swarm``.

    Parameters
    ----------
    target : str, path, AgentEndpoint, LocalSwarm, pool, or a list of these
        A hostfile, a URL, ``host`` or ``host:port`` (with ranges: ``node[001-128]:8000``), or a list of them; "slurm:"
        or "pbs:" for port 8000 of the nodes of the job this runs in ("slurm:9000" for another, see `hosts_from_env`).
        Without one, the hostfile that ``$SWARMKIT_HOSTFILE`` or else ``$AURORA_SWARM_HOSTFILE`` names.
    model : str, optional
        The model to use; servers without it are not used. Where they list several, ``model=`` may be given to each
        call instead.
    api_key : str, path or callable, optional
        Sent to the endpoints that have no key of their own: the key, a file that holds it, or a function that returns
        it or an awaitable of it. Files are read again for each request, functions called again when their key is
        refused or older than ``key_ttl``, so a token may be renewed while a run lasts. Keys in the environment are not
        used unless a hostfile names them (``key_env=``).
    probe_timeout : float, default 10
        Seconds each endpoint has to answer the probe.
    watch : bool, default False
        Follow a hostfile that changes: endpoints that are added to it get work as soon as they answer, also in runs
        that go on; those that are removed finish what they have and are sent no more. While the file cannot be used,
        the endpoints stay as they were, with a warning. Sub-pools by tag and by model follow it, too.
    chat, max_tokens, max_tokens_aggregation, model_max_context, buffer, use_batch, delivery, dialect, timeout
        As for ``VLLMPool``; ``chat`` is "auto" here.
    batch, retry, concurrency, connector_limit, rpm, tpm, max_connections
        As for ``AgentPool``, and so are those below.
    trust_env, verify, headers, http_client, key_ttl, cert, proxy, via
        How requests go out.

    Returns
    -------
    VLLMPool
        With all endpoints that are up or slow to answer. One warning names the others.

    Raises
    ------
    NoEndpointsError
        No endpoint can be used; the message has the reasons.
    SettingError
        The same endpoint is given twice, or ``watch=True`` and no hostfile.
    HostfileError
        The target is neither a readable hostfile nor an address.

    Examples
    --------
    >>> with sk.connect(swarm) as pool:
    ...     pool.size
    4

    Others are given as a file or an address::

        pool = sk.connect("agents.hostfile")
        pool = sk.connect("http://localhost:8000")
        pool = sk.connect("agents.hostfile", via="ssh:login-node")
    """
    settings = hidden(settings)  # tracebacks may show variables
    pool = connected(target, probe_timeout, watch, **settings)
    set_default_pool(pool)
    return pool


def connected(target: Target, probe_timeout: float = PROBE_S, watch: bool = False, **settings: Any) -> VLLMPool:
    """The pool that ``connect`` makes; the default pool stays as it is."""
    path = watched_hostfile(target) if watch else None
    if isinstance(target, VLLMPool):
        return target

    def listed() -> VLLMPool:
        return new_pool(resolve(path or target, own_key=settings.get("api_key") is not None), settings)

    pool = listed()
    try:
        fitted = fit(
            pool,
            io_thread.call(probe_all(pool._core.transport(), pool.endpoints, probe_timeout, model=pool.model)),
            f"\n{target!r} was read as a host; there is no file of that name here" if may_be_misread(target) else "",
        )
        if path is not None:
            fitted.follow(Watch(path, lambda: listed().endpoints, fitted, probe_timeout))
        return fitted
    except BaseException:
        io_thread.call(pool.close())  # the caller has no pool to close, and the probe left connections open
        raise


def new_pool(endpoints: Iterable[AgentEndpoint], settings: Mapping[str, Any]) -> VLLMPool:
    """A pool whose prompts become chats, unless its settings say otherwise."""
    return VLLMPool(endpoints, **{"chat": "auto", **settings})


def fit(pool: VLLMPool, infos: Sequence[ServerInfo], hint: str = "") -> VLLMPool:
    """Choose the model if there is one, select the endpoints that can be used, and warn once of the others."""
    model = listed_as(pool.model, [info.models for info in infos]) if pool.model else _the_model(infos)
    infos = [require_model(info, model) for info in infos]
    usable = [k for k, info in enumerate(infos) if info.status != "down"]
    if not any(info.status == "up" for info in infos):
        raise NoEndpointsError(f"{none_of(len(infos), 'endpoint')} can be used:\n{reasons(infos)}{hint}")
    out = [info for info in infos if info.status != "up"]
    if out:
        down = sum(info.status == "down" for info in out)
        slow = len(out) - down
        counts = [*([f"{down} cannot be used"] if down else []), *([f"{slow} slow, tried again later"] if slow else [])]
        warn(f"of {plural(len(infos), 'endpoint')}, {' and '.join(counts)}:\n{reasons(out)}")
    if on_trust := [info for info in infos if info.status == "up" and info.reason]:
        lines = "\n".join(f"  {info.endpoint.name}: {info.reason}" for info in on_trust[:_NAMED])
        warn(f"{plural(len(on_trust), 'endpoint')} could not be asked for its models:\n{lines}")
    pool._core.infos.update({info.endpoint.url: info for info in infos})
    fitted = pool.select(usable)
    fitted.model = model
    return fitted


def _the_model(infos: Sequence[ServerInfo]) -> str | None:
    """The one model that the servers list; None where each call has to say which."""
    names = {name for info in infos if info.status == "up" for name in info.models if "*" not in name}
    return names.pop() if len(names) == 1 else None


def reasons(infos: Sequence[ServerInfo]) -> str:
    """Why endpoints are not up: one line each for the first ten, and the number of the others."""
    out = [info for info in infos if info.status != "up"]
    lines = [f"  {info.endpoint.name}: {info.reason}" for info in out[:_NAMED]]
    return "\n".join([*lines, *([f"  and {len(out) - _NAMED:,} more"] if len(out) > _NAMED else [])])


def set_default_pool(pool: VLLMPool | None) -> None:
    """Make a pool the one that ``df.swarm`` uses."""
    global _default
    _default = pool


def default_pool() -> VLLMPool:
    """The pool that ``df.swarm`` uses; connects from the environment when there is none yet.

    Raises
    ------
    HostfileError
        There is none, and the environment names no hostfile; the message shows the call to make.
    """
    return current_pool() or connect()


def current_pool() -> VLLMPool | None:
    """The default pool, if there is one that is open; connects to nothing."""
    return _default if _default is not None and not _default._core.closed else None


def use_pool(pool: Any) -> tuple[VLLMPool, bool]:
    """Resolve a verb's ``pool=``: a pool is used as it is, None is the default pool, anything else is connected to.

    The second value says whether the pool was made for this call, which must close it then.
    """
    if pool is None:
        return default_pool(), False
    if isinstance(pool, VLLMPool):
        return pool, False
    return connected(pool), True  # not connect: other threads must not get this pool as the default
