"""Proxies: an address that may be shown, and a user and password that may not."""

from __future__ import annotations

import base64
import urllib.request
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from ..errors import SettingError
from .keys import Key

__all__ = ["Proxy", "of_environment"]


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy.

    Attributes
    ----------
    address : str
        ``http://host:port``.
    login : Key or None
        Its ``user:password``. Never shown, compared or pickled.

    Examples
    --------
    >>> Proxy.of("http://me:secret@squid:3128")
    Proxy(address='http://squid:3128')
    >>> Proxy.of("squid:3128")
    Proxy(address='http://squid:3128')
    """

    address: str
    login: Key | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, given: Any) -> Proxy | None:
        """Read an address, with or without a scheme; None for None and for an empty text.

        What is no address gives a proxy without one, which ``check`` refuses: to raise here would show the text, and
        with it perhaps a password, to tools that show the variables of a traceback.
        """
        if isinstance(given, cls) or not given:
            return given or None
        return (_read(given) if isinstance(given, str) else None) or cls("")

    def check(self, source: str = "proxy=") -> None:
        """Raise ``SettingError`` if it has no address."""
        if not self.address:
            raise SettingError(f"{source} is not the address of an HTTP proxy: write http://host:port")

    def headers(self) -> dict[str, str]:
        """The header that the proxy asks for, if there is a password. Do not keep or print it."""
        login = self.login.reveal(self.address) if self.login else None
        return {"Proxy-Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"} if login else {}

    def hide(self, text: str) -> str:
        """Remove the user and the password from what a server or an exception says."""
        for header in self.headers().values():
            text = text.replace(header.removeprefix("Basic "), "(the password)")
        return self.login.hide(text) if self.login else text


def of_environment() -> dict[str, Proxy]:
    """The proxies of ``$HTTP_PROXY``, ``$HTTPS_PROXY`` and ``$ALL_PROXY``, by the scheme of a request.

    Raises
    ------
    SettingError
        One of them is not an HTTP proxy.
    """
    given, found = urllib.request.getproxies(), {}
    for scheme in ("http", "https"):
        name = scheme if given.get(scheme) else "all"
        if proxy := Proxy.of(given.get(name)):
            proxy.check(f"the value of ${name.upper()}_PROXY, which trust_env=True uses,")
            found[scheme] = proxy
    return found


def _read(text: str) -> Proxy | None:
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not host or any(c.isspace() for c in text):
        return None
    if parts.scheme not in ("http", "https") or parts.path.strip("/") or parts.query or parts.fragment:
        return None
    port = port or (443 if parts.scheme == "https" else 80)
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else None
    return Proxy(f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}", Key.of(login))
