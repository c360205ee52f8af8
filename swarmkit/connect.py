"""From a target to a pool: resolve, probe, say what is left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from . import bridge
from .errors import HostfileError, NoEndpointsError, SettingError, warn
from .hostfile import AgentEndpoint, as_endpoint, parse_hostfile
from .policy import BatchPolicy, RetryPolicy
from .probe import PROBE_S, ServerInfo, judged, probe_all
from .records import Chat
from .vllm_pool import VLLMPool

__all__ = ["connect", "default_pool", "fit", "reasons", "resolve", "set_default_pool", "use_pool"]

HOSTFILE_VARIABLES = ("SWARMKIT_HOSTFILE", "AURORA_SWARM_HOSTFILE")
_NAMED = 10


@runtime_checkable
class _HasEndpoints(Protocol):
    @property
    def endpoints(self) -> list[AgentEndpoint]: ...


Target = str | os.PathLike[str] | AgentEndpoint | _HasEndpoints | Iterable[Any] | None

_default: VLLMPool | None = None


def connect(
    target: Target = None,
    *,
    model: str | None = None,
    api_key: str | None = None,
    chat: Chat = "auto",
    delivery: Literal["auto", "rows", "batch"] = "auto",
    max_tokens: int | None = None,
    timeout: float = 300.0,
    probe_timeout: float = PROBE_S,
    batch: BatchPolicy | None = None,
    retry: RetryPolicy | None = None,
    **settings: Any,
) -> VLLMPool:
    """Connect to a swarm and make it the default for ``df.swarm``.

    Parameters
    ----------
    target : str, path, AgentEndpoint, LocalSwarm, pool, or a list of these
        A hostfile, a URL or ``host:port``, or a list of them. Without one, the hostfile that
        ``$SWARMKIT_HOSTFILE`` or else ``$AURORA_SWARM_HOSTFILE`` names.
    model : str, optional
        The model to use; needed only where the servers list several. Servers without it are left out.
    api_key : str, optional
        Sent to the endpoints that have no key of their own. Keys in the environment are not used unless a
        hostfile names them (``key_env=``).
    chat, delivery, max_tokens, timeout, batch, retry, **settings
        As for ``VLLMPool``; ``chat`` is "auto" here.
    probe_timeout : float, default 10
        Seconds an endpoint is given to say what it is.

    Returns
    -------
    VLLMPool
        With all endpoints that are up or merely slow. One warning names those left out.

    Raises
    ------
    NoEndpointsError
        None can be used; the message has the reasons.
    SettingError
        The servers list several models, or the same endpoint is given twice.
    HostfileError
        The target is neither a readable hostfile nor an address.

    Examples
    --------
    ::

        pool = swarmkit.connect("agents.hostfile")
        pool = swarmkit.connect("http://localhost:8000")
    """
    if isinstance(target, VLLMPool):
        set_default_pool(target)
        return target
    pool = VLLMPool(
        resolve(target),
        model=model,
        max_tokens=max_tokens,
        timeout=timeout,
        chat=chat,
        delivery=delivery,
        api_key=api_key,
        batch=batch,
        retry=retry,
        **settings,
    )
    try:
        pool = fit(pool, bridge.call(probe_all(pool._core.transport(), pool.endpoints, probe_timeout)))
    except BaseException:
        bridge.call(pool.close())  # nobody else could: the probe's connections would be left open
        raise
    set_default_pool(pool)
    return pool


def fit(pool: VLLMPool, infos: Sequence[ServerInfo]) -> VLLMPool:
    """Choose the model, leave out the endpoints that cannot be used, and warn once about them."""
    model = pool.model or _the_model(infos)
    infos = [judged(info, model) for info in infos]
    usable = [k for k, info in enumerate(infos) if info.status != "down"]
    if not any(info.status == "up" for info in infos):
        raise NoEndpointsError(f"none of the {len(infos)} endpoints can be used:\n{reasons(infos)}")
    out = [info for info in infos if info.status != "up"]
    if out:
        down = sum(info.status == "down" for info in out)
        slow = len(out) - down
        counts = " and ".join(
            [*([f"{down} left out"] if down else []), *([f"{slow} slow, asked again later"] if slow else [])]
        )
        warn(f"of {len(infos)} endpoints, {counts}:\n{reasons(out)}")
    pool._core.infos.update({info.endpoint.url: info for info in infos})
    fitted = pool.select(usable)
    fitted.model = model
    return fitted


def _the_model(infos: Sequence[ServerInfo]) -> str:
    counts = Counter(name for info in infos if info.status == "up" for name in info.models)
    if len(counts) > 1:
        listed = ", ".join(f"{name} ({count} endpoint{'s' * (count != 1)})" for name, count in counts.most_common(10))
        raise SettingError(f"the servers list {len(counts)} models; say which one to use, as model=...: {listed}")
    return next(iter(counts), "")


def reasons(infos: Sequence[ServerInfo]) -> str:
    """Why endpoints are not up: a line each for the first ten, and how many more there are."""
    out = [info for info in infos if info.status != "up"]
    lines = [f"  {info.endpoint.name}: {info.reason}" for info in out[:_NAMED]]
    return "\n".join([*lines, *([f"  and {len(out) - _NAMED:,} more"] if len(out) > _NAMED else [])])


def resolve(target: Target) -> list[AgentEndpoint]:
    """The endpoints that a target means (see ``connect``).

    Raises
    ------
    HostfileError
        It means none.
    """
    if target is None:
        for name in HOSTFILE_VARIABLES:
            if path := os.environ.get(name):
                return parse_hostfile(path)
        raise HostfileError(
            "no endpoints were given, and $SWARMKIT_HOSTFILE is not set. Call "
            'swarmkit.connect("agents.hostfile"), swarmkit.connect("http://host:8000"), or '
            "swarmkit.connect(swarmkit.local(2)) for two endpoints on this machine"
        )
    endpoints = list(_expand(target))
    seen = Counter(e.url for e in endpoints)
    if twice := next((url for url, count in seen.items() if count > 1), None):
        raise SettingError(f"the endpoint {twice} is given {seen[twice]} times; it would get that many shares")
    if not endpoints:
        raise HostfileError("an empty list of endpoints was given")
    return endpoints


def _expand(target: Any) -> Iterable[AgentEndpoint]:
    if isinstance(target, AgentEndpoint):
        return [target]
    if isinstance(target, os.PathLike):
        return parse_hostfile(target)
    if isinstance(target, str):
        return _from_text(target)
    if isinstance(target, tuple) and len(target) == 2 and isinstance(target[1], int):
        return [as_endpoint(target)]
    if isinstance(target, _HasEndpoints):
        return target.endpoints
    if isinstance(target, Iterable):
        return [e for part in target for e in _expand(part)]
    raise HostfileError(
        f"a {type(target).__name__} is not a target: give a hostfile, a URL, host:port, or a list of these"
    )


def _from_text(text: str) -> list[AgentEndpoint]:
    path = Path(text).expanduser()
    if path.is_file():
        return parse_hostfile(path)
    looks_like_file = path.suffix in (".hostfile", ".txt", ".hosts") or ("/" in text and "://" not in text)
    if looks_like_file or ("://" not in text and ":" not in text):
        raise HostfileError(
            f"there is no hostfile {text!r} here ({Path.cwd()}). For an address, write host:port or http://host:port"
        )
    return [as_endpoint(text)]


def set_default_pool(pool: VLLMPool | None) -> None:
    """Make a pool the one that ``df.swarm`` uses."""
    global _default
    _default = pool


def default_pool() -> VLLMPool:
    """The pool that ``df.swarm`` uses; connects from the environment when there is none yet.

    Raises
    ------
    HostfileError
        There is none, and the environment names none; the message shows the call to make.
    """
    return _default if _default is not None and not _default._core.closed else connect()


def use_pool(pool: Any) -> tuple[VLLMPool, bool]:
    """What a verb's ``pool=`` means: a pool as it is, None the default, anything else what ``connect`` takes.

    The flag says whether the pool was made here, for this call, and is to be closed after it.
    """
    if pool is None:
        return default_pool(), False
    if isinstance(pool, VLLMPool):
        return pool, False
    before = _default
    try:
        return connect(pool), True
    finally:
        set_default_pool(before)
