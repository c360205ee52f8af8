"""Waiting for a cluster: its hostfile to appear, and its servers to come up."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Unpack

from ..client import io_thread
from ..client.capabilities import PROBE_S, ServerInfo, probe_all, require_model
from ..client.hostfile import AgentEndpoint, KeyHostError, read_hostfile, write_hostfile
from ..client.keys import hidden
from ..errors import HostfileError, NoEndpointsError, SettingError
from .connect import fit, new_pool, reasons, set_default_pool
from .settings import VLLMSettings, hands_on
from .targets import default_hostfile
from .vllm_pool import VLLMPool

__all__ = ["wait_until_ready"]

# The settings that a probe needs.
_HOW_TO_REACH = {"api_key", "key_ttl", "trust_env", "verify", "headers", "http_client", "cert", "proxy", "via"}


@hands_on(VLLMPool, chat="auto")
def wait_until_ready(
    hostfile: str | os.PathLike[str] | None = None,
    *,
    min_ready: int | float = 1.0,
    timeout_s: float = 3600.0,
    patience_s: float = 300.0,
    every_s: float = 5.0,
    output: str | os.PathLike[str] | None = None,
    tell: Callable[[str], None] | None = None,
    probe_timeout: float = PROBE_S,
    **settings: Unpack[VLLMSettings],
) -> VLLMPool:
    """Wait until a hostfile is there and its servers are up, then connect.

    For the start of a batch job: the hostfile may not exist yet, and may grow while servers start (it is read again
    before each check). Large models load for many minutes, so ``patience_s`` counts from the first healthy server.

    Parameters
    ----------
    hostfile : str or path, optional
        The file; ``$SWARMKIT_HOSTFILE`` by default.
    min_ready : int or float, default 1.0
        Endpoints that are enough when ``patience_s`` is over: a number, or a float from 0 to 1 for a share of the
        hostfile. The wait ends at once when all are up.
    timeout_s : float, default 3600
        Seconds within which the first endpoint must be up.
    patience_s : float, default 300
        Seconds from the first healthy endpoint after which those that are not up are given up.
    every_s : float, default 5
        Seconds between two checks.
    output : str or path, optional
        Where a hostfile of the healthy endpoints is written, atomically, for the processes that follow.
    tell : callable, optional
        Called with a line of text whenever the number of healthy endpoints changes.
    probe_timeout : float, default 10
        Seconds each endpoint has to answer a check.
    **settings
        As for ``connect``. With ``model=``, an endpoint is up when it serves that model.

    Returns
    -------
    VLLMPool
        The healthy endpoints; one warning names the others. It becomes the default pool.

    Raises
    ------
    NoEndpointsError
        Too few endpoints were up in time; the message names the others with their reasons.
    SettingError
        ``min_ready`` is neither a positive number nor a share.
    TypeError
        A keyword that ``connect`` does not take.

    Examples
    --------
    >>> from pathlib import Path
    >>> _ = Path("agents.hostfile").write_text("\\n".join(swarm.urls))
    >>> with sk.wait_until_ready("agents.hostfile", min_ready=0.95, output="ready.hostfile", api_key="a-key") as pool:
    ...     pool.size
    4
    """
    settings = hidden(settings)
    is_share = isinstance(min_ready, float)
    if min_ready <= 0 or (is_share and min_ready > 1):
        raise SettingError(f"min_ready={min_ready!r}: must be a whole number above 0, or a share, as 0.9")
    if unknown := [name for name in settings if name not in VLLMSettings.__annotations__]:
        raise TypeError(f"wait_until_ready takes no {unknown[0]}=; it takes the keywords of connect")
    path = Path(hostfile or default_hostfile() or "")
    if not path.name:
        raise HostfileError("which hostfile? Give its name, or set $SWARMKIT_HOSTFILE; it need not exist yet")
    began = time.monotonic()
    first_up: float | None = None
    up: dict[str, ServerInfo] = {}
    last_line = ""
    while True:
        endpoints, problem = _read(path, own_key=settings.get("api_key") is not None)
        infos = _probe(endpoints, up, probe_timeout, settings)
        up = {i.endpoint.url: i for i in infos if i.status == "up"}
        now = time.monotonic()
        if up and first_up is None:
            first_up = now
        line = problem or f"{len(up)} of {len(infos)} endpoints are up"
        if tell is not None and line != last_line:
            tell(line)
        last_line = line
        needed = max(1, round(min_ready * len(infos))) if is_share else int(min_ready)
        patient = first_up is None or now - first_up < patience_s
        if len(up) >= needed and (len(up) == len(infos) or not patient):
            break
        if not patient:
            why = f"{needed} are needed, and patience_s={patience_s:g} is over"
            raise NoEndpointsError(f"{line}, {why}:\n{reasons(infos)}")
        if first_up is None and now - began >= timeout_s:
            raise NoEndpointsError(f"{line} after {timeout_s:g} s:\n{reasons(infos)}")
        time.sleep(every_s)
    pool = fit(new_pool(endpoints, settings), infos)
    if output is not None:
        write_hostfile(output, [i.endpoint for i in up.values()])
    set_default_pool(pool)
    return pool


def _read(path: Path, own_key: bool) -> tuple[list[AgentEndpoint], str]:
    """The endpoints listed so far, or why there are none; a missing or half-written file is read again later."""
    try:
        return read_hostfile(path, own_key=own_key), ""
    except KeyHostError:
        raise
    except HostfileError as exc:
        if path.exists() and path.stat().st_size:
            return [], f"the hostfile cannot be read yet: {exc}"
        return [], f"there is no hostfile {path} yet"


def _probe(
    endpoints: list[AgentEndpoint], up: dict[str, ServerInfo], timeout: float, settings: Mapping[str, Any]
) -> list[ServerInfo]:
    """Probe the endpoints that were not up at the last check, and keep the others as they were found."""
    if not endpoints:
        return []
    pool = VLLMPool(endpoints, **{name: value for name, value in settings.items() if name in _HOW_TO_REACH})
    with pool:
        missing = [e for e in pool.endpoints if e.url not in up]
        model = settings.get("model")
        probes = probe_all(pool._core.transport(), missing, timeout, model=model)
        found = {i.endpoint.url: require_model(i, model) for i in io_thread.call(probes)}
        return [found.get(e.url) or up[e.url] for e in pool.endpoints]
