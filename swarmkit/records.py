"""The frozen records that are passed between packages.

A row travels as its *position*: an int from 0, its place in the column of prompts. With ``n > 1`` samples a
row, its answers stand at the *slots* ``position * n`` to ``position * n + n - 1``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from .schema import Schema
from .text import printable

__all__ = ["MOST_LOGPROBS", "Batch", "Chat", "EmbeddingResponse", "Failure", "FailureKind", "Prompts", "Quota", "Reply",
           "RequestSpec", "Response", "Route", "Usage"]  # fmt: skip

MOST_LOGPROBS = 20
"""Likeliest tokens whose log-probabilities servers tell at most."""
_LONGEST_MESSAGE = 1000  # characters
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class FailureKind(StrEnum):
    """The class of a failure; ``engine.policy.REACTIONS`` has the reaction to each."""

    STALE = "stale connection"
    """The server had closed the reused idle connection; the request was not processed."""
    CONNECT = "cannot connect"
    """Connection refused, host unreachable or unknown, TLS failure."""
    DISCONNECT = "connection lost"
    """The connection ended in the middle of a request."""
    SERVER = "server error"
    """A 5xx that is not a full queue, or an error inside a stream."""
    HANG = "read timeout"
    """No byte for ``timeout`` seconds."""
    ABORT = "aborted by the server"
    """``finish_reason="abort"``: the server was shutting down; the text is partial."""
    BUSY = "queue full"
    """429, or 503 from a server that bounds its queue."""
    TOO_LARGE = "request too large"
    """413, or 504 from a gateway: a smaller request may pass."""
    REJECTED = "request refused"
    """400 or 422: something in the request is not acceptable; the reply to a batch does not say which row."""
    DENIED = "access denied"
    """401, 402, 403, 404, 405, and what names the key: a wrong key, an unknown model or route, or a firewall that
    refuses one prompt."""
    MALFORMED = "malformed reply"
    """A 200 whose answers cannot be matched to the rows of the request."""
    INVALID = "not valid"
    """An answer that is not what the call asks for; rows fail so, requests never do."""
    DEADLINE = "not asked"
    """The call's deadline came first; runs end so, requests never do."""
    LOCAL = "limit of this machine"
    """Too many open files, no memory for a socket: a limit of the client, not a failure of the endpoint."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed request, or the part of it that failed.

    Attributes
    ----------
    kind : FailureKind
        The class of the failure, which decides the reaction.
    message : str
        The server's error message, if it sent one; one line, with control characters as escapes.
    endpoint : str
        Address of the endpoint, without any key.
    status : int or None
        HTTP status; None without a reply.
    retry_after_s : float or None
        Seconds the server asked to wait, counted from its reply.
    of_key : bool
        It is the key that is refused, whatever was asked with it.
    """

    kind: FailureKind
    message: str
    endpoint: str = ""
    status: int | None = None
    retry_after_s: float | None = None
    of_key: bool = False

    def __post_init__(self) -> None:
        # The one place that all words of servers pass on their way to errors, warnings, frames and logs.
        object.__setattr__(self, "message", printable(self.message, _LONGEST_MESSAGE))

    def describe(self) -> str:
        """One line with the kind, the endpoint, the status and the server's message."""
        where = f" at {self.endpoint}" if self.endpoint else ""
        status = f" (HTTP {self.status})" if self.status else ""
        return f"{self.kind}{where}{status}: {self.message}"


class Route(StrEnum):
    """The API routes that prompts are sent through."""

    COMPLETIONS = "completions"
    """``POST /v1/completions`` with a list of prompts."""
    CHAT_BATCH = "chat-batch"
    """``POST /v1/chat/completions/batch`` with a list of conversations (vLLM >= 0.19)."""
    CHAT = "chat"
    """``POST /v1/chat/completions``, one conversation a request."""
    GENERATE = "generate"
    """``POST /generate {"prompt"}``, one prompt a request: plain agents."""
    EMBEDDINGS = "embeddings"
    """``POST /v1/embeddings`` with a list of texts."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """A column of prompts.

    Attributes
    ----------
    texts : list of str or None
        By position; None where no prompt could be made.
    errors : dict of int to str
        Row position to the reason, for every None in ``texts``.
    fits : set of int
        Rows that are known to leave room for the whole ``max_tokens``, since their tokens were counted.
    measured : dict of str to list of float
        By model, the characters a token of those that were counted as a sample. Added to.
    """

    texts: list[str | None]
    errors: dict[int, str] = field(default_factory=dict)
    fits: Set[int] = frozenset()
    measured: dict[str, list[float]] = field(default_factory=dict, compare=False)


Chat = Literal["auto"] | tuple[str, str] | Callable[[str], str] | None
"""How prompts are turned into chats: by the server's template ("auto"), by hand, or not at all (None)."""


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """The settings that all rows of one call share.

    Attributes
    ----------
    model : str
        The model's name on the servers.
    max_tokens : int
        Maximum number of generated tokens per answer.
    n : int
        Samples per row.
    system : str or None
        The system prompt.
    params : mapping
        Sampling parameters and ``extra_body``, as they are sent.
    mode : {"batch", "single"}
        Many prompts per request, or one.
    chat : "auto", (prefix, suffix), callable or None
        How prompts are turned into chats.
    delivery : {"auto", "rows", "batch"}
        Rows as they finish, whole replies, or whichever suits the server and the time that requests take.
    details : bool
        Whether token counts per row are needed, even where they cost extra.
    counted : bool
        Whether they are wanted where a stream has them: for a store, whose rows are alike however long they took.
    thinking : bool, str or None
        Whether, or how much ("low", "medium", "high"), the model thinks; None leaves it to its chat template.
    schema : Schema or None
        What an answer must be.
    schema_retries : int
        How often a row is asked again whose answer is not that.
    conversations : bool
        Whether the texts are conversations: lists of messages, as JSON.
    examples : tuple of (str, str)
        Prompts and their answers, which stand before the rows' own as turns.
    assistant_prefix : str or None
        The first words of every answer: the servers write what follows them.
    too_long : {"error", "truncate", "truncate_left"}
        What becomes of a prompt that does not fit the context beside ``max_tokens``: the server says what it likes, or
        its end, or its beginning, is cut.
    logprobs : int, tuple of int or None
        How many of the likeliest tokens at each place of an answer are asked for with their log-probabilities; or the
        ids of tokens: these, or the likeliest where a server does not choose. None asks for none.
    kind : {"text", "embeddings"}
        Whether texts are answered, or embedded: the answer to a row is its vector then.
    repeat : int
        How many calls like this one ask the same rows before it: the answers of each are stored for themselves.
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
    counted: bool = False
    thinking: bool | str | None = None
    schema: Schema | None = None
    schema_retries: int = 2
    conversations: bool = False
    examples: tuple[tuple[str, str], ...] = ()
    assistant_prefix: str | None = None
    too_long: Literal["error", "truncate", "truncate_left"] = "error"
    logprobs: int | tuple[int, ...] | None = None
    kind: Literal["text", "embeddings"] = "text"
    repeat: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one request to one endpoint.

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
    """One finished answer, decoded from a reply.

    ``prompt`` counts prompts within the request from 0, ``sample`` the answers to that prompt from 0. Token
    counts are None if the server did not report them. The ``text`` of an embedding is its vector: float32 numbers,
    little-endian, in base64. ``finish_reason`` is "" where there is none. ``problem`` says why this is no answer, for a
    refusal or a text that is withheld or missing. ``logprobs`` are its tokens, where their
    log-probabilities were asked for and came: each a dict of ``token``, ``logprob`` and ``top``, which has those of the
    likeliest tokens at its place.
    """

    prompt: int
    sample: int
    text: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    reasoning: str | None
    problem: str | None = None
    logprobs: list[dict[str, Any]] | None = None


class Usage(NamedTuple):
    """Tokens of a reply to several prompts, as its server counts them: of all prompts and of all answers together."""

    prompt_tokens: int
    completion_tokens: int


class Quota(NamedTuple):
    """What a gateway says is left of its rate limits: requests, and tokens. Of each how many, and the seconds until
    that is over; None where it does not say."""

    requests: tuple[int, float] | None = None
    tokens: tuple[int, float] | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """One answer in the list API; None means "not known".

    Attributes
    ----------
    success : bool
        Whether there is an answer.
    text : str
        The answer; empty when ``success`` is False, unless it came and is not valid.
    error : str or None
        Why there is no answer.
    agent_index : int
        Index of the endpoint that answered (or failed last), from 0; -1 if no request was sent.
    finish_reason : str or None
        "stop", "length", ...
    prompt_tokens, completion_tokens : int or None
        As counted by the server.
    latency_s : float or None
        Seconds from sending the request that answered until this row was complete.
    attempts : int
        Number of requests this row was part of.

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


@dataclass(frozen=True, slots=True)
class EmbeddingResponse:
    """One vector in the list API.

    Attributes
    ----------
    success : bool
        Whether there is a vector.
    embedding : list of float or None
        The vector; None when ``success`` is False.
    error : str or None
        Why there is none.
    agent_index : int
        Index of the endpoint that answered (or failed last), from 0; -1 if no request was sent.

    Examples
    --------
    >>> EmbeddingResponse(True, [0.6, 0.8], agent_index=0).embedding
    [0.6, 0.8]
    """

    success: bool
    embedding: list[float] | None
    error: str | None = None
    agent_index: int = -1
