"""Keys and headers: held in objects that show nothing, and opened for a request only.

A traceback with the values of variables (IPython's ``%xmode Verbose``, ``rich``, ``capture_locals=True``) shows what
a frame holds. So a key is a ``Key`` from the first line of the functions that take one, and the text exists only while
the header of a request is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import os
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from ..errors import SettingError
from .key_commands import key_from_command

__all__ = ["Headers", "Key", "KeyLike", "hidden", "looks_like_key"]

S = TypeVar("S", bound=Mapping[str, Any])

_REMEMBERED = 8  # values of a key that was renewed, for which the words of servers are searched
# How keys of known services begin.
_KNOWN = (
    "sk-",
    "sk_",
    "hf_",
    "gsk_",
    "ghp_",
    "gho_",
    "github_pat_",
    "glpat-",
    "nvapi-",
    "xai-",
    "pplx-",
    "AIza",
    "AKIA",
    "eyJ",
)
_SHORTEST_KNOWN = 12  # characters
_FORBIDDEN = 3  # requests that are forbidden in turn: it may be for the key's sake
_SLOWEST_S = 60.0  # a function or a command that takes longer is not waited for


class Key:
    """Where the key of an endpoint comes from. ``repr`` and ``str`` say that, and never show the key.

    Parameters
    ----------
    given : str, path, callable or Key
        The key itself; a file that holds it; or a function without arguments that returns it, or an awaitable of it.
        Files and variables are read again for each request, so that a token that is renewed while a run lasts is the
        one that is sent. Functions and commands may take their time: each call has a thread of its own, its key is
        used by all requests until it is refused or too old (``renew``), and those that need it share one call.
    kind : {"", "variable", "command"}
        That ``given`` is the name of an environment variable, or of a command in the user's settings.

    Notes
    -----
    If a source that gave a key fails later (a file is just being rewritten), its last key is used.

    Examples
    --------
    >>> Key("sk-secret")
    <Key: given>
    >>> Key(lambda: "sk-secret").reveal("node1:8000")
    'sk-secret'
    """

    __slots__ = (
        *("_asked_at", "_call", "_doubted", "_forbidden", "_forbidden_at", "_given", "_kind", "_lock", "_problem"),
        *("_seen", "version"),
    )

    def __init__(self, given: Any, kind: str = "") -> None:
        self._given = given
        self._kind = kind or "given"
        if isinstance(given, os.PathLike):
            self._given, self._kind = Path(given).expanduser(), "file"
        elif callable(given):
            self._kind = "function"
        self._seen: deque[str] = deque(maxlen=_REMEMBERED)
        self.version = 0
        """Counts the different keys that were read: it tells two of them apart without showing them."""
        self._problem = ""  # of the last call
        self._asked_at = -math.inf
        self._call: Future[None] | None = None  # of a function or a command, while it lasts
        self._doubted = 0  # the version that was once refused as forbidden
        self._forbidden, self._forbidden_at = 0, -math.inf
        self._lock = threading.Lock()

    @classmethod
    def of(cls, given: Any) -> Self | None:
        """The key, or None for None and for an empty text. What is neither of the above is refused by ``reveal``."""
        if isinstance(given, cls) or given is None or given == "":
            return given or None
        return cls(given)

    @property
    def source(self) -> str:
        """Where it comes from, for messages."""
        if self._kind == "variable":
            return f"${self._given}"
        return f"{self._kind} {self._given}" if self._kind in ("file", "command") else self._kind

    @property
    def tag(self) -> str | None:
        """How a hostfile names it; None for a key that it cannot name."""
        names = {"variable": "key_env", "file": "key_file", "command": "key_cmd"}
        text = str(self._given.absolute()) if self._kind == "file" else self._given
        return f"{names[self._kind]}={text}" if self._kind in names and not any(map(str.isspace, text)) else None

    @property
    def travels(self) -> bool:
        """Whether another process can read it: it is a file, a variable or a command."""
        return self._kind in ("file", "variable", "command")

    def is_set(self) -> bool:
        """Whether there is a key: only a variable may be missing."""
        return self._kind != "variable" or bool(os.environ.get(self._given))

    def advice(self) -> str:
        """What to do about a key that is refused."""
        if not self.is_set():
            return f"no key was sent: {self.source} is not set"
        given = {"given": "given as api_key", "function": "of the function given as api_key"}
        renewed = {"variable": "is set to", "file": "holds", "function": "returns", "command": "prints"}
        to_do = f"; as soon as it {found} another one, that is sent" if (found := renewed.get(self._kind)) else ""
        return f"the key {given.get(self._kind, f'of {self.source}')} is refused{to_do}"

    def reveal(self, owner: str) -> str | None:
        """The key as it is now, for the header of a request; None if its variable is not set. Functions and commands
        are asked, and waited for.

        Parameters
        ----------
        owner : str
            Name of the endpoint, for messages.

        Raises
        ------
        SettingError
            It cannot be read, or an HTTP header cannot carry it: it holds a line break, or characters that are not
            ASCII. The message does not show it.
        """
        if self._is_called and (call := self._begin()) is not None:
            with contextlib.suppress(TimeoutError):
                call.result(_SLOWEST_S)
        return self.last(owner)

    async def renew(self, older_than: float) -> None:
        """Ask a function or a command again, if it was last asked before that time (``time.monotonic``)."""
        if self._is_called and (call := self._begin(older_than)) is not None:
            try:
                async with asyncio.timeout(_SLOWEST_S):
                    await asyncio.wrap_future(call)
            except TimeoutError:
                with self._lock:  # the next one is not to wait for this call, too
                    self._call = None if self._call is call else self._call

    def accepted(self) -> None:
        """A request with it was answered."""
        self._forbidden = 0

    def is_doubtful(self, sent_at: float) -> bool:
        """Whether a request, sent at that time, may be forbidden (403) for the key's sake, and not for its prompt's.

        The key was not in doubt before, or all was forbidden since the last answer. Requests in flight together count
        once.
        """
        if sent_at < self._asked_at:  # that call is this request's, too
            return True
        if sent_at >= self._forbidden_at:
            self._forbidden, self._forbidden_at = self._forbidden + 1, time.monotonic()
        known, self._doubted = self._doubted == self.version, self.version
        return not known or self._forbidden >= _FORBIDDEN

    def last(self, owner: str) -> str | None:
        """As ``reveal``, but functions and commands are not asked: it is what they said last."""
        text: str | None
        if not self._is_called:
            text, problem = self._read()
            if text and not problem:
                self._note(text)
        else:
            text, problem = (self._seen[-1] if self._seen else None), self._problem
        if problem and self._seen:
            text, problem = self._seen[-1], ""
        if problem:
            del text
            raise SettingError(f"{'api_key' if self._kind == 'given' else self.source} of {owner} {problem}")
        return text

    @property
    def _is_called(self) -> bool:
        return self._kind in ("function", "command")

    def _note(self, text: str) -> None:
        if not self._seen or text != self._seen[-1]:
            self._seen.append(text)
            self.version += 1

    def _begin(self, older_than: float = math.inf) -> Future[None] | None:
        """The call that is under way, or a new one if the last one is older than that. Its thread never keeps the
        interpreter from ending."""
        with self._lock:
            if self._call is None and (not self._seen or self._asked_at <= older_than):
                self._call = Future()
                self._call.set_running_or_notify_cancel()  # who waits for it may stop, and does not end it
                self._asked_at = time.monotonic()
                self._problem = f"gave no key within {_SLOWEST_S:g} s"
                threading.Thread(target=self._ask, args=(self._call,), name="swarmkit-key", daemon=True).start()
            return self._call

    def _ask(self, call: Future[None]) -> None:
        text, self._problem = self._read()
        if text:
            self._note(text)
        del text
        with self._lock:
            self._call = None if self._call is call else self._call
        call.set_result(None)

    def _read(self) -> tuple[str | None, str]:
        """The key, and why it cannot be used."""
        text: object = self._given
        try:
            if self._kind == "variable":
                text = os.environ.get(self._given)
            elif self._kind == "file":
                text = self._given.read_text(encoding="utf-8-sig").strip()
            elif self._kind == "function":
                text = self._given()
                if inspect.isawaitable(text):
                    text = asyncio.run(_awaited(text))
            elif self._kind == "command":
                text = key_from_command(self._given)
        except UnicodeDecodeError:
            return None, "is not a text file"
        except OSError as exc:
            return None, f"cannot be read: {os.strerror(exc.errno) if exc.errno else type(exc).__name__}"
        except Exception as exc:  # noqa: BLE001 - a user's function; its words may hold secrets
            if self._kind == "command" and isinstance(exc, SettingError):
                return None, str(exc)
            return None, f"raised {type(exc).__name__}: call it by hand to see why"
        if self._kind == "variable" and not text:
            return None, ""
        if not isinstance(text, str):
            return None, f"is of type {type(text).__name__}: a key is a text, a path of a file, or a function"
        if not text:
            return None, "is empty"
        if not (text.isascii() and text.isprintable()):
            return None, "holds a line break or a character that is not ASCII, which keys never do"
        if text[:7].lower() == "bearer ":
            return None, "begins with 'Bearer ', which is written before every key here: give what comes after it"
        return text, ""

    def hide(self, text: str) -> str:
        """Remove the key, also as it was before it was renewed, from what a server says."""
        for seen in tuple(self._seen):
            text = text.replace(seen, "(the key)")
        return text

    def __repr__(self) -> str:
        return f"<Key: {self.source}>"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if not self.travels:
            raise SettingError(
                "a key that is given as a text or a function cannot be sent to another process: name a file or a "
                "variable that holds it"
            )
        return Key, (self._given, self._kind)


async def _awaited(key: Awaitable[object]) -> object:
    return await key


KeyLike = str | os.PathLike[str] | Callable[[], str] | Callable[[], Awaitable[str]] | Key
"""A key, a file that holds it, or a function that returns it."""


class Headers(Mapping[str, str]):
    """Header names and values. ``repr`` shows the names only: values may be secret.

    Examples
    --------
    >>> Headers({"X-Ticket": "secret"})
    <Headers: X-Ticket>
    """

    __slots__ = ("_values",)  # and not a dict: some tools show the items of a dict whatever its repr is

    def __init__(self, values: Mapping[str, str] | None = None) -> None:
        self._values = dict(values or {})

    def __getitem__(self, name: str) -> str:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"<Headers: {', '.join(map(str, self))}>"


def hidden(settings: S) -> S:
    """The settings of a pool, with ``api_key``, ``headers`` and ``proxy`` in objects that do not show them."""
    from .proxy import Proxy  # which is made of a key

    found: dict[str, Any] = dict(settings)
    if "proxy" in found:
        found["proxy"] = Proxy.of(found["proxy"])
    if "api_key" in found:
        found["api_key"] = Key.of(found["api_key"])
    if isinstance(found.get("headers"), Mapping):
        found["headers"] = Headers(found["headers"])
    return cast(S, found)


def looks_like_key(text: str) -> bool:
    """Whether a text begins like the keys of a known service.

    Examples
    --------
    >>> looks_like_key("sk-proj-0123456789"), looks_like_key("node001")
    (True, False)
    """
    return len(text) >= _SHORTEST_KNOWN and text.startswith(_KNOWN)
