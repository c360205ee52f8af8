"""What a user may connect to, and the endpoints that it stands for: hostfiles, addresses, jobs, lists of these."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..client.address import shown_address
from ..client.host_list import expand
from ..client.hostfile import DEFAULT_PORT, AgentEndpoint, as_endpoint, read_hostfile
from ..client.job_hosts import NODES_IN, job_hosts
from ..errors import HostfileError, SettingError

__all__ = ["Target", "default_hostfile", "may_be_misread", "resolve", "watched_hostfile"]

_VARIABLES = ("SWARMKIT_HOSTFILE", "AURORA_SWARM_HOSTFILE")
_FILES = (".hostfile", ".txt", ".hosts", ".list", ".csv", ".json", ".toml", ".yaml", ".yml", "hostfile", "hosts")
"""Suffixes and names of files that are not read as names of hosts."""
_HOSTS = re.compile(r"[A-Za-z0-9][\w.,\[\]-]*")
_ADDRESS = re.compile(r"localhost|[\d,\[\]-]+(\.[\d,\[\]-]+){3,}", re.IGNORECASE)
_JOB = re.compile(rf"({'|'.join(NODES_IN)}):([0-9]{{0,5}})")


@runtime_checkable
class _HasEndpoints(Protocol):
    @property
    def endpoints(self) -> list[AgentEndpoint]: ...


Target = str | os.PathLike[str] | AgentEndpoint | _HasEndpoints | Iterable[Any] | None


def default_hostfile() -> str | None:
    """The hostfile that the environment names."""
    return next((path for name in _VARIABLES if (path := os.environ.get(name))), None)


def resolve(target: Target, own_key: bool = False) -> list[AgentEndpoint]:
    """The endpoints that a target stands for (see ``connect``).

    Parameters
    ----------
    target : str, path, AgentEndpoint, LocalSwarm, pool, or a list of these
        As for ``connect``.
    own_key : bool, default False
        Whether the user gives a key, which is then used in place of one that a hostfile must not send to its hosts.

    Raises
    ------
    HostfileError
        It is neither a readable hostfile nor an address, or it is empty.
    """
    if target is None:
        if path := default_hostfile():
            return read_hostfile(path, own_key=own_key)
        raise HostfileError(
            "no endpoints were given, and $SWARMKIT_HOSTFILE is not set. Call "
            'swarmkit.connect("agents.hostfile"), swarmkit.connect("http://host:8000"), or '
            "swarmkit.connect(swarmkit.local(2)) for two endpoints on this machine"
        )
    parts = list(_expand(target))
    named = {part.host.lower().rstrip(".") for part in parts if isinstance(part, AgentEndpoint)}
    endpoints = []
    for part in parts:
        endpoints += [part] if isinstance(part, AgentEndpoint) else read_hostfile(part, named, own_key)
    seen = Counter(e.url for e in endpoints)
    if twice := next((url for url, count in seen.items() if count > 1), None):
        raise SettingError(f"the endpoint {twice} is given {seen[twice]} times; each must be given once")
    if not endpoints:
        raise HostfileError("an empty list of endpoints was given")
    return endpoints


def watched_hostfile(target: Target) -> Path:
    """The one hostfile that a target stands for, to be watched.

    Raises
    ------
    SettingError
        It stands for something else.
    """
    if target is None:
        target = Path(path) if (path := default_hostfile()) else ()
    match list(_expand(target)):
        case [os.PathLike() as hostfile]:
            return Path(hostfile).expanduser().absolute()
    raise SettingError("watch=True follows one hostfile: give its path, or set $SWARMKIT_HOSTFILE")


def _expand(target: Any) -> Iterable[AgentEndpoint | os.PathLike[str]]:
    """Endpoints, and the paths of hostfiles."""
    if isinstance(target, (AgentEndpoint, os.PathLike)):
        return [target]
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


def may_be_misread(target: object) -> bool:
    """Whether a target that was read as a host may have been meant as a file: a name without a port, no address."""
    return (
        isinstance(target, str)
        and _HOSTS.fullmatch(target) is not None
        and _ADDRESS.fullmatch(target) is None
        and not Path(target).expanduser().is_file()
    )


def _from_text(text: str) -> Sequence[AgentEndpoint | Path]:
    path = Path(text).expanduser()
    if path.is_file():
        return [path]
    if job := _JOB.fullmatch(text):
        return job_hosts(job[1], int(job[2] or DEFAULT_PORT))
    looks_like_file = (
        path.suffix in _FILES
        or path.name in _FILES
        or ("/" in text and "://" not in text and not text.startswith("unix:"))
    )
    if looks_like_file or ("://" not in text and ":" not in text and not _HOSTS.fullmatch(text)):
        raise HostfileError(
            f"there is no hostfile {shown_address(text)} here ({Path.cwd()}). For an address, write host:port or http://host:port"
        )
    return [as_endpoint(address) for address in expand(text)]
