"""Chat templates without a tokenizer: learned from the server, and wrapped around prompts here.

A raw completion on an instruction-tuned model is garbage or empty; a chat a prompt cannot be batched on
``/v1/completions``. So the template is taken from the server: tokenize a message that holds a sentinel,
detokenize, split at the sentinel. What stands before and after it goes around every prompt.

Nothing is taken on trust. The wrapped text of a real prompt must give the token ids the server's own chat
gives, else ``CannotLearn`` says why, and the caller takes another route.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import EndpointError
from .hostfile import AgentEndpoint
from .records import Ask, FailureKind, Route
from .transport import Transport
from .wire import Malformed, decode, encode, path_of

__all__ = ["CannotLearn", "Template", "learn", "tokens_in", "understands_batch_chat"]

_SENTINEL = "QSENTINELQ"
_PADDED = f" \n {_SENTINEL} \n "
_REAL = "Which gene encodes β-galactosidase?\n\n1) lacZ\n2) <|x|> & “other”"
_LOOK_TOKENS = 16


class CannotLearn(Exception):  # noqa: N818 - a finding, not an error: another route is taken
    """The template could not be learned, or does not give what the chat gives; the message says why."""


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template as two strings.

    Attributes
    ----------
    prefix, suffix : str
        Text before and after the prompt, with the template's special tokens written out.
    trim : bool
        Whether the template strips white space off the prompt.

    Examples
    --------
    >>> Template("<user>", "<bot>").wrap("Hi")
    '<user>Hi<bot>'
    """

    prefix: str
    suffix: str
    trim: bool = False

    def wrap(self, text: str) -> str:
        """The text that is sent for a prompt."""
        return f"{self.prefix}{text.strip() if self.trim else text}{self.suffix}"


async def learn(transport: Transport, endpoint: AgentEndpoint, model: str, system: str | None = None) -> Template:
    """Learn the template of a model from one of its servers, and verify it.

    Parameters
    ----------
    transport : Transport
        To speak to the server.
    endpoint : AgentEndpoint
        A server of the model.
    model : str
        The model's name.
    system : str, optional
        System prompt; it becomes part of the prefix.

    Returns
    -------
    Template
        What to wrap around prompts for ``/v1/completions`` with ``add_special_tokens=false``.

    Raises
    ------
    CannotLearn
        The server has no ``/tokenize``, or what it says there is not what its chat does.
    EndpointError
        The endpoint failed for another reason.
    """
    ask = Ask(model=model, system=system)
    try:
        rendered = await _detokenize(transport, endpoint, model, await _chat_ids(transport, endpoint, ask, _PADDED))
        template = _split(rendered)
        ids = await _chat_ids(transport, endpoint, ask, _REAL)
        wrapped = await _text_ids(transport, endpoint, model, template.wrap(_REAL))
    except EndpointError as exc:
        if exc.failure.kind in (FailureKind.DENIED, FailureKind.REJECTED, FailureKind.MALFORMED):
            raise CannotLearn(f"the server does not tokenize chats ({exc.failure.message})") from exc
        raise
    if ids != wrapped:
        raise CannotLearn("the wrapped prompt and the chat give different token ids")
    await _compare_with_chat(transport, endpoint, ask, ids)
    return template


def _split(rendered: str) -> Template:
    if rendered.count(_SENTINEL) != 1:
        raise CannotLearn(f"the template shows the prompt {rendered.count(_SENTINEL)} times")
    if _PADDED in rendered:
        prefix, _, suffix = rendered.partition(_PADDED)
        return Template(prefix, suffix)
    prefix, _, suffix = rendered.partition(_SENTINEL)
    if prefix.endswith(" \n ") or suffix.startswith(" \n "):
        raise CannotLearn("the template strips white space off one side of the prompt only")
    return Template(prefix, suffix, trim=True)


async def _compare_with_chat(transport: Transport, endpoint: AgentEndpoint, ask: Ask, expected: list[int]) -> None:
    """Hold what ``/tokenize`` says against what the chat route really does with the same prompt.

    They differ for models whose chats are rendered by other code (Harmony), and a completion would leave the
    reasoning in the text that a chat would have had parsed out of it.
    """
    body = encode(Route.CHAT, ask, [_REAL], max_tokens=_LOOK_TOKENS, token_ids=True, extra={"temperature": 0})
    reply = await transport.json(endpoint, path_of(Route.CHAT), body)
    ids = reply.get("prompt_token_ids")
    if isinstance(ids, list) and ids != expected:
        raise CannotLearn("/tokenize and the chat route render the same message differently")
    choices = reply.get("choices") or [{}]
    message = choices[0].get("message") or {} if isinstance(choices[0], dict) else {}
    if message.get("reasoning") or message.get("reasoning_content"):
        raise CannotLearn("the server parses reasoning out of its chats, which completions would leave in the text")


async def understands_batch_chat(transport: Transport, endpoint: AgentEndpoint, model: str) -> bool:
    """Whether ``/v1/chat/completions/batch`` answers a list of two."""
    body = encode(Route.CHAT_BATCH, Ask(model=model), ["Hi", "Ho"], max_tokens=2)
    with contextlib.suppress(EndpointError, Malformed):
        return len(decode(Route.CHAT_BATCH, await transport.post(endpoint, path_of(Route.CHAT_BATCH), body), 2)) == 2
    return False


async def tokens_in(transport: Transport, endpoint: AgentEndpoint, model: str, text: str) -> int | None:
    """Number of tokens of a text, or None if the server does not tell."""
    with contextlib.suppress(EndpointError, CannotLearn):
        return len(await _text_ids(transport, endpoint, model, text))
    return None


async def _chat_ids(transport: Transport, endpoint: AgentEndpoint, ask: Ask, text: str) -> list[int]:
    messages = json.loads(encode(Route.CHAT, ask, [text], max_tokens=1))["messages"]
    body = {"model": ask.model, "messages": messages, "add_generation_prompt": True, "add_special_tokens": False}
    return _ids(await transport.json(endpoint, "/tokenize", json.dumps(body).encode()))


async def _text_ids(transport: Transport, endpoint: AgentEndpoint, model: str, text: str) -> list[int]:
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    return _ids(await transport.json(endpoint, "/tokenize", json.dumps(body).encode()))


async def _detokenize(transport: Transport, endpoint: AgentEndpoint, model: str, ids: list[int]) -> str:
    body = json.dumps({"model": model, "tokens": ids}).encode()
    text = (await transport.json(endpoint, "/detokenize", body)).get("prompt")
    if not isinstance(text, str):
        raise CannotLearn("/detokenize gave no text")
    return text


def _ids(reply: Mapping[str, Any]) -> list[int]:
    ids = reply.get("tokens")
    if not isinstance(ids, list):
        raise CannotLearn("/tokenize gave no token ids")
    return ids
