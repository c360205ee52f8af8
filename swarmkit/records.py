"""The frozen records that cross module borders.

A row travels as its *position*: an int from 0, its place in the column of prompts. With ``n > 1`` samples a
row, its answers stand at the *slots* ``position * n`` to ``position * n + n - 1``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

__all__ = ["Ask", "Batch", "Chat", "Failure", "FailureKind", "Prompts", "Reply", "Response", "Route"]

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class FailureKind(StrEnum):
    """What kind of failure was seen. ``policy.REACTIONS`` says what follows from each."""

    STALE = "stale connection"
    """The server had closed the idle connection that we reused; the request was not worked on."""
    CONNECT = "cannot connect"
    """Refused, unreachable, no such host, TLS failure."""
    DISCONNECT = "connection lost"
    """The connection ended in the middle of a request."""
    SERVER = "server error"
    """A 5xx that is not a full queue, or an error inside a stream."""
    HANG = "no sign of life"
    """Not a byte for ``timeout`` seconds."""
    ABORT = "aborted by the server"
    """``finish_reason="abort"``: the server was shutting down; the text is partial."""
    BUSY = "queue full"
    """429, or 503 from a server that bounds its queue."""
    REJECTED = "request refused"
    """400 or 422: something in the request is not acceptable; a batch does not say which row."""
    DENIED = "endpoint unusable"
    """401, 403, 404: a wrong key or an unknown model; no retry will help."""
    MALFORMED = "malformed reply"
    """A 200 that cannot be matched to the rows it should answer."""
    LOCAL = "limit of this machine"
    """Too many open files, no memory for a socket: our side, never blamed on the endpoint."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed request, or the part of it that failed.

    Attributes
    ----------
    kind : FailureKind
        The class of the failure; decides the reaction.
    message : str
        The server's own words where it had any.
    endpoint : str
        Address of the endpoint, without any key.
    status : int or None
        HTTP status, when there was an answer.
    retry_after_s : float or None
        Seconds the server asked to wait, counted from the answer.
    """

    kind: FailureKind
    message: str
    endpoint: str = ""
    status: int | None = None
    retry_after_s: float | None = None

    def describe(self) -> str:
        """One line for a person: kind, endpoint, status and the server's words."""
        where = f" at {self.endpoint}" if self.endpoint else ""
        status = f" (HTTP {self.status})" if self.status else ""
        return f"{self.kind}{where}{status}: {self.message}"


class Route(StrEnum):
    """The ways to ask a server."""

    COMPLETIONS = "completions"
    """``POST /v1/completions`` with a list of prompts."""
    CHAT_BATCH = "chat-batch"
    """``POST /v1/chat/completions/batch`` with a list of conversations (vLLM >= 0.19)."""
    CHAT = "chat"
    """``POST /v1/chat/completions``, one conversation a request."""
    GENERATE = "generate"
    """``POST /generate {"prompt"}``, one prompt a request: plain agents."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """A column of prompts.

    Attributes
    ----------
    texts : list of str or None
        By position; None where no prompt could be made.
    errors : dict of int to str
        Position to the reason, for every None in ``texts``.
    """

    texts: list[str | None]
    errors: dict[int, str] = field(default_factory=dict)


Chat = Literal["auto"] | tuple[str, str] | Callable[[str], str] | None
"""How prompts are made chats: learned from the server, wrapped by hand, or not at all."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What all rows of one call have in common: what the caller asked for.

    Attributes
    ----------
    model : str
        The model's name as the servers know it.
    max_tokens : int
        The cap on generated tokens a row.
    n : int
        Samples a row.
    system : str or None
        The system prompt.
    params : mapping
        Sampling parameters and ``extra_body``, as they go on the wire.
    mode : {"batch", "single"}
        Many prompts a request, or one.
    chat : "auto", (prefix, suffix), callable or None
        How prompts are made chats.
    delivery : {"auto", "rows", "batch"}
        Rows as they finish, whole replies, or whichever the server does well.
    details : bool
        Whether token counts a row are wanted even where they cost something.
    """

    model: str = ""
    max_tokens: int = 512
    n: int = 1
    system: str | None = None
    params: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    mode: Literal["batch", "single"] = "batch"
    chat: Chat = None
    delivery: Literal["auto", "rows", "batch"] = "auto"
    details: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """One request's worth of rows, on its way to one endpoint.

    Attributes
    ----------
    ticket : int
        The request's number within the run, from 0.
    endpoint : int
        Index of the endpoint in the pool, from 0.
    rows : tuple of int
        Row positions, in the order they stand in the request.
    """

    ticket: int
    endpoint: int
    rows: tuple[int, ...]


class Reply(NamedTuple):
    """One finished answer as it came off the wire.

    ``prompt`` counts prompts within the request from 0, ``sample`` the answers to that prompt from 0. Token
    counts are None where the server did not say.
    """

    prompt: int
    sample: int
    text: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    reasoning: str | None


@dataclass(frozen=True, slots=True)
class Response:
    """One answer in the layer of lists; falsy fields mean "not known".

    Attributes
    ----------
    success : bool
        Whether there is an answer.
    text : str
        The answer; empty when ``success`` is False.
    error : str or None
        What went wrong, for a person.
    agent_index : int
        Index of the endpoint that answered (or failed last), from 0; -1 when none was asked.
    finish_reason : str or None
        "stop", "length", ...
    prompt_tokens, completion_tokens : int or None
        As the server counted them.
    latency_s : float or None
        Seconds from sending the request that answered until this row was complete.
    attempts : int
        Requests this row was part of.

    Examples
    --------
    >>> Response(True, "Paris", agent_index=0).text
    'Paris'
    """

    success: bool
    text: str
    error: str | None = None
    agent_index: int = -1
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    latency_s: float | None = None
    attempts: int = 0
