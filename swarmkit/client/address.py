"""The address of a server, as people write it: read, joined with the path of a route, and shown without secrets."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit

from .keys import looks_like_key

__all__ = ["NAMES_A_SECRET", "joined", "read_address", "read_port", "shown_address", "shown_word"]

NAMES_A_SECRET = re.compile(r"(api[_.-]?)?key|.*(token|secret|passw|bearer|authorization|credential).*", re.IGNORECASE)
"""Names of fields that hold a key."""
_SHOWN_CHARS = 8  # of a word that may be a key; longer ones are not shown
_HOST = re.compile(r"[\w.-]+|[0-9A-Fa-f:.]+(%[\w.-]+)?")
_UNIX = re.compile(r"unix:(?://)?(/[^:?#]+)(?::(/[^?#]*))?")
_VERSIONED = re.compile(r"/v\d+\w*(/openai)?$|/openai/deployments/[^/]+$")  # ends of paths that take no /v1
_ROUTE = re.compile(r"(/chat)?/completions$|(?<=/v1)/models$")


def joined(base: str, path: str) -> str:
    """The path of a route below the base path of a server, which may be that of another route.

    Examples
    --------
    >>> joined("/serve/7b", "/v1/models"), joined("/v1beta/openai", "/v1/models"), joined("", "/version")
    ('/serve/7b/v1/models', '/v1beta/openai/models', '/version')
    """
    above = _ROUTE.sub("", base)
    if path.startswith("/v1") and (above != base or _VERSIONED.search(above)):
        path = path[3:]
    return above + path


def read_address(text: str) -> tuple[str, str, int | None, str, str]:
    """``scheme, host, port or None, path, query`` of an address; a ValueError says what is wrong with it, without what
    may be a key."""
    if text.startswith("unix:"):
        if not (unix := _UNIX.fullmatch(text)):
            raise ValueError("a Unix socket is written unix:/path/to.sock, or unix:/path/to.sock:/base")
        return "unix", unix[1], 0, (unix[2] or "").rstrip("/").removesuffix("/v1"), ""
    scheme, sign, _ = text.partition("://")
    scheme = scheme.lower()
    if not sign:
        if text.count(":") > 1 and not text.startswith("["):
            raise ValueError(f"{shown_address(text)}: write an IPv6 address in brackets, as [::1]:8000")
        scheme, text = "http", f"http://{text}"
    if scheme not in ("http", "https"):
        raise ValueError(
            f"{shown_word(scheme, 'the scheme')}:// is not supported: use http:// or https://, or unix:/path"
        )
    if looks_like_key(text.partition("://")[2]):
        raise ValueError("it looks like a key, not like an address")
    try:
        parts = urlsplit(text)
    except ValueError:
        raise ValueError("it is not a URL") from None
    if parts.username or parts.password:
        raise ValueError("no user or password is allowed in an address: use key_env=SWARMKIT_...")
    if parts.fragment:
        raise ValueError("an address must not have a #fragment")
    if any(NAMES_A_SECRET.fullmatch(name) or looks_like_key(value) for name, value in parse_qsl(parts.query)):
        raise ValueError("the ?query of an address must not hold a key: use key_env=SWARMKIT_... or api_key=")
    host = (parts.hostname or "").replace("%25", "%")  # a zone: [fe80::1%25eth0] in URLs, fe80::1%eth0 elsewhere
    if not _HOST.fullmatch(host):
        raise ValueError(f"{shown_address(host)} is not a host name")
    if sign == "" and (parts.path or parts.query):
        raise ValueError(
            f"{shown_address(parts.path or '?')} follows the port: write an address with a path or a query as a URL, "
            "http://host:port/path"
        )
    netloc_port = parts.netloc.rpartition("]")[2] if "]" in parts.netloc else parts.netloc
    port = read_port(netloc_port.rpartition(":")[2]) if ":" in netloc_port else None
    path = re.sub("/+", "/", parts.path).rstrip("/")  # base + "/" + "/v1", as scripts put it together
    base = _ROUTE.sub("", path)
    if base.endswith("/v1") or _VERSIONED.search(base):
        path = base
    return scheme, host, port, path.removesuffix("/v1"), parts.query


def read_port(text: str) -> int:
    """The number of a port, or a ValueError."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise ValueError(f"{shown_word(text, 'a field')} is not a port: a whole number from 1 to 65535")
    return int(text)


def shown_address(text: str) -> str:
    """An address as messages show it: without what may be a key or a password.

    Examples
    --------
    >>> shown_address("https://me:secret@node1/v1?token=secret")
    "'https://...@node1/v1?...'"
    """
    if any(looks_like_key(part) for part in re.split(r"[\s/=:]+", text)):
        return "a text that looks like a key"
    text = re.sub(r"[^/\s]*@", "...@", text.strip())
    text = re.sub(r"([?#]).*", r"\1...", text)
    first, space, _ = text.partition(" ")
    return repr(f"{first} ..." if space else first)


def shown_word(text: str, place: str) -> str:
    """A word of a hostfile as messages show it. A longer one may be a key, and is not shown."""
    return repr(text) if len(text) <= _SHOWN_CHARS else f"{place} ({len(text)} characters)"
