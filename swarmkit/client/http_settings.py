"""How a pool speaks HTTP: timeout, trust, headers, or a client of the user's own."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

from ..errors import SettingError
from .hostfile import AgentEndpoint
from .keys import Headers
from .proxy import Proxy
from .ssh import host_of

__all__ = ["CertLike", "HttpSettings"]

PathLike = str | os.PathLike[str]
CertLike = PathLike | tuple[PathLike, PathLike]

_NOT_FOR_USERS = {"accept-encoding", "connection", "content-length", "content-type", "transfer-encoding"}
_SHORTEST_SECRET = 8  # characters; a shorter header value is a setting, and may be part of ordinary words


@dataclass(frozen=True)
class HttpSettings:
    """How a pool speaks HTTP.

    Parameters
    ----------
    timeout : float, default 300
        Seconds without a single byte after which a request is given up.
    trust_env : bool, default False
        Use the proxies of the environment. Off, since on clusters they break node-to-node calls.
    verify : ssl.SSLContext, str or path, optional
        Trust settings for https, or a file or folder of CA certificates; the system's by default.
    headers : mapping of str to str, optional
        Sent with every request. Never shown.
    http_client : httpx2.AsyncClient, optional
        Used instead of swarmkit's own client, and not closed with the pool.
    key_ttl : float, default 300
        Seconds after which a key that a function or a command gave is asked for again.
    cert : str, path, or pair of these, optional
        The client's certificate (PEM) and its key, where https endpoints ask for one.
    proxy : str or Proxy, optional
        The proxy of the endpoints that name none.
    via : str, optional
        "ssh:HOST": all endpoints are reached from that host.

    Raises
    ------
    SettingError
        A value outside what is allowed, or a combination that means nothing.
    """

    timeout: float = 300.0
    trust_env: bool = False
    verify: ssl.SSLContext | str | os.PathLike[str] | None = None
    headers: Mapping[str, str] = field(default_factory=Headers, repr=False)
    http_client: httpx2.AsyncClient | None = field(default=None, repr=False)
    key_ttl: float = 300.0
    cert: CertLike | None = None
    proxy: Proxy | str | None = None
    via: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "proxy", Proxy.of(self.proxy))
        object.__setattr__(self, "headers", _checked(self.headers))
        if not (isinstance(self.key_ttl, (int, float)) and self.key_ttl >= 0):
            raise SettingError(
                f"key_ttl={self.key_ttl!r}: must be a number of seconds, 0 to ask for the key of each request, or "
                "math.inf for as long as the key is accepted"
            )
        self.ssl_context()
        if proxy := Proxy.of(self.proxy):
            proxy.check()
        if self.via is not None:
            host_of(self.via)
            if proxy:
                raise SettingError("via= and proxy= are two ways to the same endpoints: give one of them")
        if self.http_client is None:
            return
        if not isinstance(self.http_client, httpx2.AsyncClient):
            raise SettingError(
                f"http_client= is a {type(self.http_client).__name__}: must be an httpx2.AsyncClient, for example "
                "openai.DefaultAioHttpClient()"
            )
        if self.verify is not None or self.trust_env or self.cert or self.proxy or self.via:
            raise SettingError(
                "verify=, cert=, proxy=, via= and trust_env= configure swarmkit's own HTTP client: give them to your "
                "http_client instead"
            )

    def check(self, endpoints: Iterable[AgentEndpoint]) -> None:
        """Raise ``SettingError`` for an endpoint that is not reached in the way that it names."""
        for endpoint in endpoints if self.http_client or self.via else ():
            if self.http_client and (endpoint.proxy or endpoint.scheme == "unix"):
                raise SettingError(
                    f"{endpoint.name} is reached by a proxy or a Unix socket, which your http_client knows nothing of: "
                    "set it up in the client, and give the address alone"
                )
            if endpoint.proxy:
                raise SettingError(f"{endpoint.name} has a proxy, and via= is another way to it: give one of them")

    def ssl_context(self) -> ssl.SSLContext | None:
        """The trust settings for https; None stands for the system's."""
        if isinstance(self.verify, ssl.SSLContext):
            if self.cert is not None:
                raise SettingError("verify= is an SSLContext, which cert= cannot change: call its load_cert_chain(...)")
            return self.verify
        if self.verify is None:
            return None if self.cert is None else self._with_cert(ssl.create_default_context())
        if not isinstance(self.verify, (str, os.PathLike)):
            raise SettingError(
                f"verify={self.verify!r}: must be an ssl.SSLContext, the path of a file or folder of CA certificates, "
                "or None for the system's"
            )
        path = os.fspath(self.verify)
        try:
            if os.path.isdir(path):
                return self._with_cert(ssl.create_default_context(capath=path))
            return self._with_cert(ssl.create_default_context(cafile=path))
        except OSError as exc:
            raise SettingError(f"verify={path!r} cannot be read as CA certificates: {exc}") from exc

    def _with_cert(self, context: ssl.SSLContext) -> ssl.SSLContext:
        if self.cert is not None:
            try:
                crt, key = (self.cert, None) if isinstance(self.cert, (str, os.PathLike)) else self.cert
                context.load_cert_chain(crt, key, password="")  # without it OpenSSL asks for one at the terminal
            except (OSError, TypeError, ValueError) as exc:
                raise SettingError(
                    f"cert={self.cert!r} cannot be used: {exc}. It must be a PEM file with a certificate and its key, "
                    "or a pair of files (certificate, key), and the key must not be encrypted"
                ) from exc
        return context

    def secrets(self) -> list[str]:
        """Texts to remove from what a server says: the header values and their words, the longest first."""
        parts = {part for value in self.headers.values() for part in (value, *value.split())}
        return sorted((part for part in parts if len(part) >= _SHORTEST_SECRET), key=len, reverse=True)

    def __getstate__(self) -> dict[str, Any]:
        kept = [name for name in ("headers", "http_client") if getattr(self, name)]
        kept += ["verify"] if isinstance(self.verify, ssl.SSLContext) else []
        kept += ["proxy"] if (proxy := Proxy.of(self.proxy)) and proxy.login else []
        if kept:
            raise SettingError(
                f"a pool with {', '.join(f'{name}=' for name in kept)} cannot be sent to another process: headers and "
                "proxies may hold secrets, clients and SSL contexts belong to their process. Call "
                "swarmkit.connect(...) in that process; verify= as a path can be sent, and a proxy without a password"
            )
        return dict(self.__dict__)


def _checked(headers: Any) -> Headers:
    """Check names and values. Messages do not show the values, which may be secret; nor do variables here."""
    if not isinstance(headers, Mapping):
        raise SettingError(f"headers= is a {type(headers).__name__}: must map header names to their values")
    checked = headers = Headers(headers)
    for name in checked:
        if not (isinstance(name, str) and isinstance(checked[name], str)):
            raise SettingError(
                f"headers= must map names to strings; the value of {name!r} has the type {type(checked[name]).__name__}"
            )
        if not name.isascii() or not name.replace("-", "").replace("_", "").isalnum():
            raise SettingError(f"headers= has the name {name!r}: letters, digits, '-' and '_' are allowed")
        if name.lower() in _NOT_FOR_USERS:
            raise SettingError(f"headers= has {name}, which swarmkit sets itself: remove it from headers=")
        if not (checked[name].isascii() and checked[name].isprintable()):
            raise SettingError(f"the value of the header {name} holds a line break or a character that is not ASCII")
    return checked
