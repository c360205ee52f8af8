"""Endpoints, and the hostfile that lists them.

One endpoint a line, fields separated by tabs or spaces::

    # a field that starts with a hash begins a comment
    node001 8000 rack=a gpu=3        host, port (8000 by default), tags
    node002:8001 rack=b
    gpu[001-128]:8000                128 endpoints, as Slurm writes lists of hosts
    [2001:db8::7]:8000
    unix:/run/vllm.sock              a Unix socket; unix:/run/vllm.sock:/serve/7b with a path
    https://gateway.example/serve/7b key_env=SWARMKIT_GATEWAY_KEY proxy=http://squid:3128

A hostfile never holds a key. ``key_env=NAME`` names the environment variable that holds it, ``key_file=PATH`` the file,
and ``key_cmd=NAME`` a command of the reader's own settings that prints it (``key_commands``). Hostfiles are shared, and
the writer of one must not be able to have secrets of its readers sent to a host of their choice. So of variables only
``SWARMKIT_*`` and ``VLLM_API_KEY`` are allowed; and ``OPENAI_API_KEY``, any file and any command for hosts that the
reader has named: in code, or in ``$SWARMKIT_KEY_HOSTS`` (host names, separated by commas; ``*.example.org`` stands for
all hosts of a domain).

``rpm=``, ``tpm=`` and ``max_connections=`` are tags that limit what is sent to a gateway.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
from collections.abc import Container, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from ..errors import HostfileError
from ..text import table_html
from .address import NAMES_A_SECRET, joined, read_address, read_port, shown_address, shown_word
from .host_list import MAX_HOSTS, expand
from .keys import Key, KeyLike, looks_like_key
from .proxy import Proxy

__all__ = [
    "RATE_TAGS",
    "AgentEndpoint",
    "KeyHostError",
    "as_endpoint",
    "parse_hostfile",
    "read_hostfile",
    "write_hostfile",
]

DEFAULT_PORT = 8000
KEY_HOSTS = "SWARMKIT_KEY_HOSTS"
_KEY_ENV = re.compile(r"SWARMKIT_\w+|VLLM_API_KEY|OPENAI_API_KEY")
_FOR_NAMED_HOSTS = ("OPENAI_API_KEY",)  # people have it set for other purposes
RATE_TAGS = frozenset({"rpm", "tpm", "max_connections"})
"""Tags that limit what an endpoint's gateway is sent: requests and tokens a minute, and requests in flight."""
_KEY_TAGS = ("key_env", "key_file", "key_cmd")
_PATH = re.compile(r"(/|~/|\.{1,2}/).*")
_COMMAND = re.compile(r"\w[\w-]*", re.ASCII)
_RANDOM = re.compile(r"(?=.*\d)(?=.*[A-Za-z])\w{32,}", re.ASCII)  # a key of no known service
_KEY_AS_HOST = re.compile(r"(?=.*\d)(?=.*[a-z])[a-z0-9]{32,}")  # names of containers have as many letters, and "_"
_VARIABLE = re.compile(r"[A-Z]+(_[A-Z]+)+")
_TAG_KEY = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class AgentEndpoint:
    """The address of one server, its tags and its key.

    Parameters
    ----------
    host : str
        Host name or address; an IPv6 address without its brackets, with its zone where it needs one
        ("fe80::1%eth0"); for ``scheme="unix"`` the path of the socket.
    port : int, default 8000
        TCP port, 1 to 65535.
    tags : dict of str to str, optional
        Labels of your own, for ``pool.by_tag``.
    scheme : {"http", "https", "unix"}, optional
        Plain, encrypted, or plain over a Unix socket.
    path : str, optional
        Path before ``/v1``, without a final slash ("" or "/serve/7b"). Where no ``/v1`` comes after it, the path of a
        route ("/api/chat/completions").
    api_key : str, path or callable, optional
        Sent as a bearer token to this endpoint only: the key, a file that holds it, or a function that returns it or
        an awaitable of it. A file is read again for each request; a function is called on a thread of its own, again
        when its key is refused or older than the pool's ``key_ttl``. So a token may be renewed while a run lasts. Never
        shown, compared or written to a file; of a pickle only the path of a file is part, while copies in the same
        process keep the key.
    key_env : str, optional
        Environment variable the key is read from when ``api_key`` is not given.
    query : str, optional
        Sent with every request: "api-version=2024-10-21" for Azure, whose keys then go in its header ``api-key``.
    proxy : str, optional
        The proxy that leads to it ("http://squid:3128"), in place of the pool's. A user and password in it are never
        shown.

    Examples
    --------
    >>> endpoint = AgentEndpoint("node001", 8000, {"rack": "a"}, path="/serve/7b")
    >>> endpoint.url, endpoint.name, endpoint.place, endpoint.has_key()
    ('http://node001:8000/serve/7b', 'node001:8000/serve/7b', 'node001:8000', False)
    """

    host: str
    port: int = DEFAULT_PORT
    tags: Mapping[str, str] = field(default_factory=dict, hash=False)
    scheme: str = "http"
    path: str = ""
    api_key: KeyLike | None = field(default=None, repr=False, compare=False)
    key_env: str | None = field(default=None, repr=False, compare=False)
    query: str = ""
    proxy: Proxy | str | None = None

    def __post_init__(self) -> None:
        self.__dict__["_named_key"] = Key(self.key_env, "variable") if self.key_env else None
        self.__dict__["proxy"] = proxy = Proxy.of(self.proxy)
        if proxy:
            proxy.check()

    @property
    def url(self) -> str:
        """Base address, without ``/v1``, a final slash, and the query."""
        if self.scheme == "unix":
            return f"unix:{self.host}:{self.path}" if self.path else f"unix:{self.host}"
        return f"{self.scheme}://{self.place}{self.path}"

    @property
    def place(self) -> str:
        """``host:port``."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def name(self) -> str:
        """The address without its scheme: ``host:port``, and the path if there is one; of a Unix socket all of it."""
        return self.url.rpartition("://")[2]

    def address(self, path: str) -> str:
        """The address that a request for a path of the API is sent to.

        Examples
        --------
        >>> AgentEndpoint("node001").address("/v1/models")
        'http://node001:8000/v1/models'
        >>> AgentEndpoint("api.example", 443, {}, "https", "/v1beta/openai").address("/v1/models")
        'https://api.example:443/v1beta/openai/models'
        """
        below = joined(self.path, path) + (f"?{self.query}" if self.query else "")
        if self.scheme == "unix":  # a host of its own for each socket, since connections are kept by host
            host = f"{hashlib.blake2s(self.host.encode(), digest_size=8).hexdigest()}.localhost"
            return f"http://{host}{below}"
        return f"{self.scheme}://{self.place}{below}"

    def key(self) -> str | None:
        """The key to send, or None. It is read anew at each call: do not keep it, and do not print it.

        Raises
        ------
        SettingError
            The key cannot be read, or an HTTP header cannot carry it: it holds a line break, mostly from the end of a
            file, or characters that are not ASCII.
        """
        key = self.key_source()
        return None if key is None else key.reveal(self.name)

    def key_header(self, key: str) -> tuple[str, str]:
        """Name and value of the header that carries its key. Do not keep or print it."""
        if "api-version=" in self.query and not key.startswith("eyJ"):  # Azure; tokens of Entra are bearers there, too
            return "api-key", key
        return "Authorization", f"Bearer {key}"

    def has_key(self) -> bool:
        """Whether there is a key to send; a variable that is not set is none."""
        key = self.key_source()
        return key is not None and key.is_set()

    def hide_key(self, text: str) -> str:
        """Remove the keys that were sent to this endpoint from what it says."""
        key = self.key_source()
        return text if key is None else key.hide(text)

    def key_travels(self) -> bool:
        """Whether another process can read the key by itself: from a file or a variable."""
        key = self.key_source()
        return key is None or key.travels

    def key_source(self) -> Key | None:
        """Where its key comes from."""
        key: Key | None = self.__dict__["_own_key"] or self.__dict__["_named_key"]  # no fields: tools show those
        return key

    def _repr_html_(self) -> str:
        tags = " ".join(f"{k}={v}" for k, v in self.tags.items())
        key = self.key_source()
        shown = "none" if key is None else key.source if key.source == "given" else f"from {key.source}"
        shown += ", which is not set" if key and not key.is_set() else ""
        return table_html([("endpoint", self.url), *([("tags", tags)] if tags else []), ("key", shown)])

    # A pickle may reach a disk or another machine, where no key belongs; a copy stays in this process and keeps it.

    def __copy__(self) -> Self:
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return replace(self, tags=deepcopy(self.tags, memo))

    def __getstate__(self) -> dict[str, Any]:
        key = self.__dict__["_own_key"]
        state = {name: value for name, value in self.__dict__.items() if not name.endswith("_key")}
        return {**state, "api_key": key if key and key.travels else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc] # a fresh record of these fields


def _held(self: AgentEndpoint) -> Key | None:
    key: Key | None = self.__dict__["_own_key"]
    return key


def _hold(self: AgentEndpoint, given: KeyLike | None) -> None:
    self.__dict__["_own_key"] = Key.of(given)


# The field holds an object that does not show the key, also not in ``dataclasses.asdict``.
AgentEndpoint.api_key = property(_held, _hold)  # type: ignore[assignment] # a field of a frozen record


class KeyHostError(HostfileError):
    """A hostfile asks for a key to be sent to a host that the user has not named."""


def parse_hostfile(path: str | os.PathLike[str]) -> list[AgentEndpoint]:
    """Read a hostfile: an endpoint a line, as ``host port`` or a URL, then ``key=value`` tags.

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
        The file cannot be read, holds no endpoint or the same one twice, or has an invalid line; the message has
        the line's number and says what is allowed.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp(), "agents.hostfile")
    >>> _ = file.write_text("node001 8000 rack=a\\nnode002:8001\\n")
    >>> [e.name for e in parse_hostfile(file)]
    ['node001:8000', 'node002:8001']
    """
    return read_hostfile(path)


def read_hostfile(
    path: str | os.PathLike[str], named: Container[str] = (), own_key: bool = False
) -> list[AgentEndpoint]:
    """``parse_hostfile``, for callers that know more.

    Parameters
    ----------
    path : str or path
        The file.
    named : container of str
        Hosts that the user has named in code: they may get any key.
    own_key : bool, default False
        Whether the user gives a key: it is used in place of one that a host must not get.

    Raises
    ------
    KeyHostError
        A key was to be sent to a host that the user has not named.
    """
    found = _read(Path(path), named, own_key)
    if isinstance(found, HostfileError):
        raise found  # here, and not where the line is read: tracebacks may show variables, and a line may hold a key
    return found


def _read(path: Path, named: Container[str], own_key: bool) -> list[AgentEndpoint] | HostfileError:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as exc:
        return HostfileError(f"cannot read the hostfile {str(path)!r}: {exc}")
    except UnicodeDecodeError:
        return HostfileError(f"cannot read the hostfile {str(path)!r}: it is not a text file (UTF-8)")
    lines_of: dict[str, int] = {}
    endpoints: list[AgentEndpoint] = []
    for number, line in enumerate(lines, 1):
        fields = [*itertools.takewhile(lambda word: not word.startswith("#"), line.split())]
        if not fields:
            continue
        try:
            addresses = expand(fields[0], MAX_HOSTS - len(endpoints))
            found = [_endpoint([address, *fields[1:]], path.parent) for address in addresses]
        except ValueError as exc:
            return HostfileError(f"{path}, line {number}: {exc}")
        for endpoint in found:
            for_named = endpoint.key_env in _FOR_NAMED_HOSTS or endpoint.api_key is not None  # a file or a command
            if for_named and (host := _unnamed(endpoint, named)):
                if not own_key:
                    return KeyHostError(f"{path}, line {number}: {_not_to(host, endpoint.key_source())}")
                endpoint = replace(endpoint, key_env=None, api_key=None)
            if endpoint.url in lines_of:
                return HostfileError(
                    f"{path}, line {number}: {endpoint.name} is already on line {lines_of[endpoint.url]}; "
                    "an endpoint listed twice would get two shares of the work. Remove one of the lines"
                )
            lines_of[endpoint.url] = number
            endpoints.append(endpoint)
    return endpoints or HostfileError(f"{path} holds no endpoint: write one a line, as host:port")


def _is_named(host: str, named: Container[str]) -> bool:
    """Whether the user has named a host, in code or in ``$SWARMKIT_KEY_HOSTS``."""
    host = host.lower().rstrip(".")
    if host in named:
        return True
    for entry in os.environ.get(KEY_HOSTS, "").lower().split(","):
        entry = entry.strip().rstrip(".")
        if host == entry or (entry.startswith("*.") and len(entry) > 2 and host.endswith(entry[1:])):
            return True
    return False


def _unnamed(endpoint: AgentEndpoint, named: Container[str]) -> str | None:
    """The host that would see the key, and that the user has not named: a proxy sees it where TLS does not hide it."""
    hosts = [endpoint.host]
    if endpoint.scheme == "http" and (proxy := Proxy.of(endpoint.proxy)):
        hosts.append(urlsplit(proxy.address).hostname or "")
    return next((host for host in hosts if not _is_named(host, named)), None)


def _not_to(host: str, key: Key | None) -> str:
    return (
        f"it asks for the key of {key and key.source} to be sent to {host}, a host that you have not named. "
        f"If the host is to have it, set {KEY_HOSTS}={host} (host names, separated by commas; *.example.org "
        "for a domain), or give api_key=... in code"
    )


def as_endpoint(value: str | tuple[str, int] | AgentEndpoint) -> AgentEndpoint:
    """Convert a URL, a ``host:port`` string, a ``(host, port)`` pair or an endpoint to an endpoint.

    Raises
    ------
    HostfileError
        The value is none of these.

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
        shown = shown_address(value) if isinstance(value, str) else f"a {type(value).__name__}"
        problem = f"{shown} is not an endpoint: {exc}. Give a URL, 'host:port', a (host, port) pair or an AgentEndpoint"
    raise HostfileError(problem)  # not from exc, whose frames hold the address, and with it perhaps a password


def write_hostfile(path: str | os.PathLike[str], endpoints: Iterable[AgentEndpoint]) -> None:
    """Write endpoints as a hostfile. It appears at once and whole, so readers that wait for it never see half of it.

    Keys, and passwords of proxies, are not written; the names of the keys' environment variables, files and commands
    are.
    """
    lines = []
    for e in endpoints:
        address = e.url if e.scheme != "http" or e.path or e.query else e.name
        address += f"?{e.query}" if e.query else ""
        tags = [f"{k}={v}" for k, v in e.tags.items()]
        key = f"key_env={e.key_env}" if e.key_env else (source := e.key_source()) and source.tag
        tags += [key] if key else []
        if proxy := Proxy.of(e.proxy):
            tags.append(f"proxy={proxy.address}")
        lines.append("\t".join([address, *tags]))
    target = Path(path)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    scratch.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    scratch.replace(target)


def _endpoint(fields: list[str], folder: Path = Path()) -> AgentEndpoint:
    """Read the fields of one line; a ValueError says which field is wrong, and why. Paths are seen from ``folder``."""
    if not fields:
        raise ValueError("the address is empty")
    address, *rest = fields
    scheme, host, port, path, query = read_address(address)
    if rest and "=" not in rest[0]:
        if port is not None:
            raise ValueError(f"there are two ports: {port}, and {shown_word(rest[0], 'the second field')}")
        port = read_port(rest.pop(0))
    if port is None:
        if "://" not in address and _KEY_AS_HOST.fullmatch(host.lower()):
            raise ValueError("it looks like a key, not like an address")
        port = 443 if scheme == "https" else 80 if "://" in address else DEFAULT_PORT
    tags: dict[str, str] = {}
    key: dict[str, Any] = {}
    proxy: Proxy | None = None
    for text in rest:
        name, sign, value = text.partition("=")
        if not sign or not value or not _TAG_KEY.fullmatch(name):
            raise ValueError(f"{shown_word(text, 'a field')} is not a tag: write key=value, without spaces")
        if looks_like_key(name) or looks_like_key(value):
            raise ValueError("a field looks like a key, which a hostfile must not hold: use key_env=SWARMKIT_...")
        if name in _KEY_TAGS:
            if key:
                raise ValueError(
                    f"the tag {name!r} is given twice, or beside another one: write one of {', '.join(_KEY_TAGS)}"
                )
            key = _key(name, value, folder)
        elif name == "proxy":
            proxy = Proxy.of(value)
            if proxy and proxy.login:
                raise ValueError(
                    "a hostfile must not hold a password: write proxy=http://host:port, or give the proxy with its "
                    "user and password in code, as connect(..., proxy=...)"
                )
        elif NAMES_A_SECRET.fullmatch(name):
            raise ValueError(f"a hostfile must not hold a key: use key_env=SWARMKIT_... in place of {name}=")
        elif name in tags:
            raise ValueError(f"the tag {shown_word(name, 'of a field')} is given twice")
        elif name in RATE_TAGS and not (value.isdecimal() and int(value)):
            raise ValueError(f"{shown_word(value, 'the value')} of {name}= is no whole number above 0")
        else:
            tags[name] = value
    return AgentEndpoint(host, port, tags, scheme, path, query=query, proxy=proxy, **key)


def _key(tag: str, value: str, folder: Path) -> dict[str, Any]:
    """Where the key of an endpoint is, as fields of it."""
    if tag == "key_env":
        if not _KEY_ENV.fullmatch(value):
            named = f"key_env={value}" if _VARIABLE.fullmatch(value) else "this key_env="
            raise ValueError(
                f"{named} is not allowed: a hostfile may name the variables SWARMKIT_*, VLLM_API_KEY or "
                "OPENAI_API_KEY, and never the key itself"
            )
        return {"key_env": value}
    if tag == "key_file":
        if not _PATH.fullmatch(value):
            raise ValueError("key_file= needs the path of a file that holds the key, as /path, ~/path or ./path")
        return {"api_key": Key(folder / Path(value).expanduser())}
    if _RANDOM.fullmatch(value):
        raise ValueError("key_cmd= looks like a key, which a hostfile must not hold: it names a command")
    if not _COMMAND.fullmatch(value):
        raise ValueError("key_cmd= needs the name of a command in your settings: letters, digits, '_' and '-'")
    return {"api_key": _command_key(value)}


@functools.lru_cache
def _command_key(name: str) -> Key:
    """One for all endpoints: the command is run once for them."""
    return Key(name, "command")
