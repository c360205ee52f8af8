"""The formats of requests. No I/O.

Protocol: OpenAI's completions and chat completions as vLLM serves them, and vLLM's batch chat route.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..records import MOST_LOGPROBS, RequestSpec, Route
from .json_bytes import write_json

__all__ = [
    "LOGPROB_FIELDS",
    "OPTIONAL",
    "PRIORITY",
    "STREAM_INTERVAL",
    "TOKEN_LIMIT",
    "conversation",
    "encode",
    "path_of",
]

_PATHS = {
    Route.COMPLETIONS: "/v1/completions",
    Route.CHAT_BATCH: "/v1/chat/completions/batch",
    Route.CHAT: "/v1/chat/completions",
    Route.GENERATE: "/generate",
    Route.EMBEDDINGS: "/v1/embeddings",
}
STREAM_INTERVAL = 64
"""Tokens between two chunks of a streamed row. A row's last chunk comes when the row is done, whatever the interval;
with a very long interval a long answer would look like a server that hangs."""
OPTIONAL = (
    *("stream_interval", "continuous_usage_stats", "stream_options", "return_token_ids", "cache_salt"),
    "encoding_format",
)
"""Fields that make requests cheaper or tell more, and that requests do without where a server refuses them.
``add_special_tokens`` is none, since prompts would have two first tokens."""
PRIORITY = "priority"
"""The field by which vLLM orders requests, if it was started with that policy; where it was not, some versions refuse
it."""
TOKEN_LIMIT = "max_tokens"
"""The field that bounds an answer. Where chats refuse it, it goes by its newer name, ``max_completion_tokens``."""
LOGPROB_FIELDS = ("logprobs", "top_logprobs", "logprob_token_ids", "return_tokens_as_token_ids")


def path_of(route: Route) -> str:
    """The path of a route, relative to the endpoint's base address."""
    return _PATHS[route]


def encode(
    route: Route,
    spec: RequestSpec,
    texts: Sequence[str],
    *,
    max_tokens: int,
    stream: bool = False,
    wrapped: bool = False,
    token_ids: bool = False,
    extra: Mapping[str, Any] | None = None,
    lists: bool = True,
    omit: Collection[str] = (),
) -> bytes:
    """Build the body of one request.

    Parameters
    ----------
    route : Route
        The API route; a route that does not take lists gets exactly one text.
    spec : RequestSpec
        What the rows of the run have in common.
    texts : sequence of str
        The prompts: with the chat template applied for ``COMPLETIONS``, without it for the chat routes.
    max_tokens : int
        Tokens each row may generate.
    stream : bool
        Request rows as they finish (``COMPLETIONS`` only).
    wrapped : bool
        The texts hold the template's special tokens, so the server must not add any.
    token_ids : bool
        Request token ids, by which the tokens of each row are counted in a reply that is not streamed. A reply of one
        choice has the counts in its ``usage``, so they are not requested there.
    extra : mapping, optional
        Further fields, e.g. a ``cache_salt``.
    lists : bool
        Send one text as a list of one; False sends it as a string, for servers that take nothing else.
    omit : collection of str
        Fields that the server refuses, and ``TOKEN_LIMIT``, if its chats refuse that name.

    Returns
    -------
    bytes
        JSON, UTF-8.

    Examples
    --------
    >>> encode(Route.GENERATE, RequestSpec(), ["Hi"], max_tokens=8)
    b'{"prompt":"Hi"}'
    """
    if route is Route.GENERATE:
        return write_json({"prompt": texts[0]})
    if route is Route.EMBEDDINGS:
        asked = {"model": spec.model, "encoding_format": "base64", **spec.params}
        asked["input"] = list(texts) if lists or len(texts) > 1 else texts[0]
        return write_json({name: value for name, value in asked.items() if name not in omit})
    limit = TOKEN_LIMIT
    if TOKEN_LIMIT in omit and route is not Route.COMPLETIONS:
        limit = "max_completion_tokens"
    body: dict[str, Any] = {"model": spec.model, **spec.params, **(extra or {}), limit: max_tokens}
    if spec.n > 1:
        body["n"] = spec.n
    if spec.logprobs is not None:
        most = spec.logprobs if isinstance(spec.logprobs, int) else MOST_LOGPROBS
        body |= {"logprobs": most} if route is Route.COMPLETIONS else {"logprobs": True, "top_logprobs": most}
        if isinstance(spec.logprobs, tuple):  # texts of tokens may collide
            body |= {"logprob_token_ids": list(spec.logprobs), "return_tokens_as_token_ids": True}
    if route is Route.COMPLETIONS:
        body["prompt"] = list(texts) if lists or len(texts) > 1 else texts[0]
        if wrapped:
            body.setdefault("add_special_tokens", False)
        if stream:
            body["stream"] = True
            body["stream_interval"] = STREAM_INTERVAL
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
            if "continuous_usage_stats" in omit:
                body["stream_options"] = {"include_usage": True}
    else:
        chats = [conversation(spec, text) for text in texts]
        body["messages"] = chats if route is Route.CHAT_BATCH else chats[0]
        if spec.assistant_prefix is not None:  # both: servers refuse the one without the other
            body = {"add_generation_prompt": False, "continue_final_message": True, **body}
    if token_ids and not stream and len(texts) * spec.n > 1:
        body["return_token_ids"] = True
    for name in omit:
        if name != TOKEN_LIMIT:
            body.pop(name, None)
    return write_json(body)


def conversation(spec: RequestSpec, text: str) -> list[dict[str, str]]:
    """The messages of a row: the system prompt, the examples, its own, and the first words of the answer.

    A conversation that begins with a system prompt of its own keeps that one.

    Examples
    --------
    >>> spec = RequestSpec(system="Be brief.", assistant_prefix="It is")
    >>> [message["role"] for message in conversation(spec, "Hi")]
    ['system', 'user', 'assistant']
    """
    own: list[dict[str, str]] = json.loads(text) if spec.conversations else [_message("user", text)]
    system = [_message("system", spec.system)] if spec.system is not None else []
    if own[0]["role"] == "system":
        system, own = own[:1], own[1:]
    shown = [_message(*turn) for pair in spec.examples for turn in zip(("user", "assistant"), pair, strict=True)]
    begun = [_message("assistant", spec.assistant_prefix)] if spec.assistant_prefix is not None else []
    return [*system, *shown, *own, *begun]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
