"""Endpoints, and the hostfile that lists them.

One endpoint a line, fields parted by tabs or spaces::

    # anything after a hash that starts a field is a comment
    node001 8000 rack=a gpu=3        host, port (8000 when left out), tags
    node002:8001 rack=b
    [2001:db8::7]:8000
    https://gateway.example/serve/7b key_env=SWARMKIT_GATEWAY_KEY

A hostfile never holds a key. ``key_env=NAME`` names the environment variable that does, and only
``SWARMKIT_*``, ``VLLM_API_KEY`` and ``OPENAI_API_KEY`` may be named: a hostfile is often shared, and must not
be able to send other secrets of the reader to a host of the writer's choice.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .errors import HostfileError, SettingError
from .markup import table_html

__all__ = ["AgentEndpoint", "as_endpoint", "parse_hostfile", "write_hostfile"]

DEFAULT_PORT = 8000
_KEY_ENV = re.compile(r"SWARMKIT_\w+|VLLM_API_KEY|OPENAI_API_KEY")
_HOST = re.compile(r"[\w.-]+|[0-9A-Fa-f:.%]+")
_TAG_KEY = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class AgentEndpoint:
    """One server's address and what is known of it beforehand.

    Parameters
    ----------
    host : str
        Host name or address; an IPv6 address without its brackets.
    port : int, default 8000
        TCP port, 1 to 65535.
    tags : dict of str to str, optional
        Free labels, for ``pool.by_tag``.
    scheme : {"http", "https"}, optional
        How to speak to it.
    path : str, optional
        Prefix before ``/v1``, without the final slash ("" or "/serve/7b").
    api_key : str, optional
        Sent as a bearer token to this endpoint only. Never shown, compared, pickled or written to a file.
    key_env : str, optional
        Environment variable the key is read from when ``api_key`` is not given.

    Examples
    --------
    >>> AgentEndpoint("node001", 8000, {"rack": "a"}).url
    'http://node001:8000'
    """

    host: str
    port: int = DEFAULT_PORT
    tags: Mapping[str, str] = field(default_factory=dict, hash=False)
    scheme: str = "http"
    path: str = ""
    api_key: str | None = field(default=None, repr=False, compare=False)
    key_env: str | None = field(default=None, repr=False, compare=False)

    @property
    def url(self) -> str:
        """Base address, without ``/v1`` and without a final slash."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"

    @property
    def name(self) -> str:
        """The address as people write it: ``host:port`` and the path, if any."""
        return self.url.split("://", 1)[1]

    def key(self) -> str | None:
        """The key to send, or None. Read from the environment at each call, so that nothing keeps it.

        Raises
        ------
        SettingError
            It holds what no HTTP header can carry: a line break from the end of a file, most often.
        """
        key = self.api_key or (os.environ.get(self.key_env) if self.key_env else None)
        if key and not (key.isascii() and key.isprintable()):
            source = f"${self.key_env}" if not self.api_key else "api_key"
            raise SettingError(
                f"{source} of {self.name} holds a line break or a character that is not ASCII: no key does"
            )
        return key

    def _repr_html_(self) -> str:
        tags = " ".join(f"{k}={v}" for k, v in self.tags.items())
        key = "given" if self.api_key else f"from ${self.key_env}" if self.key_env else "none"
        return table_html([("endpoint", self.url), *([("tags", tags)] if tags else []), ("key", key)])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "api_key": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def parse_hostfile(path: str | os.PathLike[str]) -> list[AgentEndpoint]:
    """Read a hostfile (its format is at the top of this module).

    Parameters
    ----------
    path : str or path
        The file.

    Returns
    -------
    list of AgentEndpoint
        In file order.

    Raises
    ------
    HostfileError
        The file cannot be read, holds no endpoint, names one twice, or has a line that cannot be
        understood; the message has the line's number and what is allowed.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp(), "agents.hostfile")
    >>> _ = file.write_text("node001 8000 rack=a\\nnode002:8001\\n")
    >>> [e.name for e in parse_hostfile(file)]
    ['node001:8000', 'node002:8001']
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise HostfileError(f"cannot read the hostfile {os.fspath(path)!r}: {exc}") from exc
    found: dict[str, int] = {}
    endpoints = []
    for number, line in enumerate(lines, 1):
        fields = _without_comment(line.split())
        if not fields:
            continue
        try:
            endpoint = _endpoint(fields)
        except ValueError as exc:
            raise HostfileError(f"{os.fspath(path)}, line {number}: {exc} (line: {line.strip()!r})") from exc
        if endpoint.url in found:
            raise HostfileError(
                f"{os.fspath(path)}, line {number}: {endpoint.name} is already on line {found[endpoint.url]}; "
                "an endpoint listed twice would be given two shares. Remove one of the lines"
            )
        found[endpoint.url] = number
        endpoints.append(endpoint)
    if not endpoints:
        raise HostfileError(f"{os.fspath(path)} holds no endpoint: write one a line, as host:port")
    return endpoints


def as_endpoint(value: str | tuple[str, int] | AgentEndpoint) -> AgentEndpoint:
    """Make an endpoint of a URL, a ``host:port`` text, a ``(host, port)`` pair or an endpoint.

    Raises
    ------
    HostfileError
        What was given is none of these.

    Examples
    --------
    >>> as_endpoint("http://localhost:8000/v1").url
    'http://localhost:8000'
    """
    if isinstance(value, AgentEndpoint):
        return value
    try:
        if isinstance(value, str):
            return _endpoint(value.split())
        host, port = value
        return _endpoint([str(host), str(port)])
    except (ValueError, TypeError) as exc:
        raise HostfileError(
            f"{value!r} is not an endpoint: {exc}. Give a URL, 'host:port', a (host, port) pair or an AgentEndpoint"
        ) from exc


def write_hostfile(path: str | os.PathLike[str], endpoints: Iterable[AgentEndpoint]) -> None:
    """Write endpoints as a hostfile, all or nothing: readers that wait for the file never see half of it.

    Keys are not written; the names of their environment variables are.
    """
    lines = []
    for e in endpoints:
        address = e.url if e.scheme != "http" or e.path else e.name
        tags = [f"{k}={v}" for k, v in e.tags.items()] + ([f"key_env={e.key_env}"] if e.key_env else [])
        lines.append("\t".join([address, *tags]))
    target = Path(path)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    scratch.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    scratch.replace(target)


def _without_comment(fields: list[str]) -> list[str]:
    start = next((i for i, text in enumerate(fields) if text.startswith("#")), len(fields))
    return fields[:start]


def _endpoint(fields: list[str]) -> AgentEndpoint:
    """One line's fields -> endpoint; ValueError says what is wrong with which field."""
    if not fields:
        raise ValueError("the address is empty")
    address, *rest = fields
    scheme, host, port, path = _address(address)
    if rest and "=" not in rest[0]:
        if port is not None:
            raise ValueError(f"two ports: {address!r} has one already, then comes {rest[0]!r}")
        port = _port(rest.pop(0))
    tags: dict[str, str] = {}
    key_env = None
    for text in rest:
        key, sign, value = text.partition("=")
        if not sign or not value or not _TAG_KEY.fullmatch(key):
            raise ValueError(f"{text!r} is not a tag: write key=value, without spaces")
        if key in tags or (key == "key_env" and key_env):
            raise ValueError(f"the tag {key!r} is given twice")
        if key == "key_env":
            if not _KEY_ENV.fullmatch(value):
                raise ValueError(
                    f"key_env={value} is not allowed: a hostfile may name SWARMKIT_*, VLLM_API_KEY or OPENAI_API_KEY"
                )
            key_env = value
        elif key in ("api_key", "key", "token"):
            raise ValueError(f"a hostfile must not hold a key: use key_env=SWARMKIT_... in place of {key}=")
        else:
            tags[key] = value
    if port is None:
        port = 443 if scheme == "https" else 80 if "://" in address else DEFAULT_PORT
    return AgentEndpoint(host, port, tags, scheme, path, key_env=key_env)


def _address(text: str) -> tuple[str, str, int | None, str]:
    """``scheme, host, port or None, path`` of an address field."""
    scheme, sign, _ = text.partition("://")
    if not sign:
        if text.count(":") > 1 and not text.startswith("["):
            raise ValueError(f"{text!r}: write an IPv6 address in brackets, as [::1]:8000")
        text = f"http://{text}"
        scheme = "http"
    if scheme not in ("http", "https"):
        raise ValueError(f"{scheme}:// is not spoken here: use http:// or https://")
    parts = urlsplit(text)
    if parts.username or parts.password:
        raise ValueError("no user or password in an address: use key_env=SWARMKIT_...")
    if parts.query or parts.fragment:
        raise ValueError("an address has no ?query or #fragment")
    host = parts.hostname or ""
    if not _HOST.fullmatch(host):
        raise ValueError(f"{host!r} is not a host name")
    if sign == "" and parts.path:
        raise ValueError(f"{parts.path!r} after the port: write a path as a URL, http://host:port/path")
    netloc_port = parts.netloc.rpartition("]")[2] if "]" in parts.netloc else parts.netloc
    port = _port(netloc_port.rpartition(":")[2]) if ":" in netloc_port else None
    path = parts.path.rstrip("/")
    return scheme, host, port, path.removesuffix("/v1")


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise ValueError(f"{text!r} is not a port: a whole number from 1 to 65535")
    return int(text)
