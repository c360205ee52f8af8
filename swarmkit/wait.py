"""Waiting for a cluster: its hostfile to appear, and its servers to come up."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import bridge
from .connect import HOSTFILE_VARIABLES, fit, reasons, set_default_pool
from .errors import HostfileError, NoEndpointsError, SettingError
from .hostfile import AgentEndpoint, parse_hostfile, write_hostfile
from .probe import PROBE_S, ServerInfo, probe_all
from .vllm_pool import VLLMPool

__all__ = ["wait_until_ready"]


def wait_until_ready(
    hostfile: str | os.PathLike[str] | None = None,
    *,
    min_ready: int | float = 1.0,
    timeout_s: float = 3600.0,
    patience_s: float = 300.0,
    every_s: float = 5.0,
    output: str | os.PathLike[str] | None = None,
    tell: Callable[[str], None] | None = None,
    **settings: Any,
) -> VLLMPool:
    """Wait until a hostfile is there and its servers are up, then connect.

    Meant for the start of a batch job: the hostfile may not exist yet, and may grow while servers come up (it is read
    again at each look). Large models load for many minutes, so the clock for the slow ones starts only with the
    first healthy server.

    Parameters
    ----------
    hostfile : str or path, optional
        The file; ``$SWARMKIT_HOSTFILE`` by default.
    min_ready : int or float, default 1.0
        How many endpoints are enough when ``patience_s`` is over: a number, or as a float from 0 to 1 a share of the
        hostfile. When all are up, nobody waits longer.
    timeout_s : float, default 3600
        Seconds until the first endpoint must be up.
    patience_s : float, default 300
        Seconds from the first healthy endpoint until those that are not up are left out.
    every_s : float, default 5
        Seconds between two looks.
    output : str or path, optional
        Where a hostfile of the healthy endpoints is written, all or nothing, for the processes that follow.
    tell : callable, optional
        Is told, in a line, whenever the number of healthy endpoints changes.
    **settings
        As for ``connect``.

    Returns
    -------
    VLLMPool
        The healthy endpoints; one warning names those left out. It becomes the default pool.

    Raises
    ------
    NoEndpointsError
        The time was over before enough were up; the message names the missing ones with their reasons.
    SettingError
        ``min_ready`` is neither a positive number nor a share.

    Examples
    --------
    ::

        pool = swarmkit.wait_until_ready("agents.hostfile", min_ready=0.95, output="ready.hostfile")
    """
    is_share = isinstance(min_ready, float)
    if min_ready <= 0 or (is_share and min_ready > 1):
        raise SettingError(f"min_ready={min_ready!r}: must be a whole number above 0, or a share, as 0.9")
    path = Path(hostfile or next((os.environ[v] for v in HOSTFILE_VARIABLES if os.environ.get(v)), ""))
    if not path.name:
        raise HostfileError("which hostfile? Give its name, or set $SWARMKIT_HOSTFILE; it need not exist yet")
    began = time.monotonic()
    first_up: float | None = None
    up: dict[str, ServerInfo] = {}
    told = ""
    while True:
        endpoints, problem = _read(path)
        infos = _look(endpoints, up, settings)
        healthy = [i for i in infos if i.status == "up"]
        up = {i.endpoint.url: i for i in healthy}
        first_up = first_up or (time.monotonic() if healthy else None)
        line = problem or f"{len(healthy)} of {len(infos)} endpoints are up"
        if tell is not None and line != told:
            tell(line)
        told = line
        needed = max(1, round(min_ready * len(infos))) if is_share else int(min_ready)
        waited, now = time.monotonic() - began, time.monotonic()
        if infos and len(healthy) == len(infos) and len(healthy) >= (1 if is_share else needed):
            break
        if first_up is not None and now - first_up >= patience_s:
            if len(healthy) >= needed:
                break
            why = f"{needed} are needed, and {patience_s:g} s of patience are over"
            raise NoEndpointsError(f"{line}, {why}:\n{reasons(infos)}")
        if first_up is None and waited >= timeout_s:
            raise NoEndpointsError(f"{line} after {timeout_s:g} s:\n{reasons(infos)}")
        time.sleep(every_s)
    pool = fit(VLLMPool(endpoints, **{"chat": "auto", **settings}), infos)
    if output is not None:
        write_hostfile(output, [i.endpoint for i in healthy])
    set_default_pool(pool)
    return pool


def _read(path: Path) -> tuple[list[AgentEndpoint], str]:
    """The endpoints listed so far; a file that is not there yet, or half written, is looked at again."""
    try:
        return parse_hostfile(path), ""
    except HostfileError as exc:
        if path.exists() and path.stat().st_size:
            return [], f"the hostfile cannot be read yet: {exc}"
        return [], f"there is no hostfile {path} yet"


def _look(endpoints: list[AgentEndpoint], up: dict[str, ServerInfo], settings: dict[str, Any]) -> list[ServerInfo]:
    """Probe those that were not up at the last look; a server that has come up is not asked again and again."""
    if not endpoints:
        return []
    pool = VLLMPool(endpoints, api_key=settings.get("api_key"))
    with pool:
        missing = [e for e in pool.endpoints if e.url not in up]
        found = {i.endpoint.url: i for i in bridge.call(probe_all(pool._core.transport(), missing, PROBE_S))}
        return [found.get(e.url) or up[e.url] for e in pool.endpoints]
