"""Tokens as a server counts them: of texts and of chats, by ``/tokenize``, ``/detokenize`` and ``/apply-template``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ..errors import EndpointError
from ..records import Failure, FailureKind, RequestSpec, Route
from .hostfile import AgentEndpoint
from .transport import Transport
from .wire import encode, path_of

__all__ = ["CannotLearn", "Tokenizer", "or_none", "prompt_tokens", "says_no"]

T = TypeVar("T")

_NO = (FailureKind.DENIED, FailureKind.REJECTED, FailureKind.MALFORMED)


class CannotLearn(Exception):  # noqa: N818 - a result, not an error: another route is taken
    """The server does not tell its tokens, or its chat template could not be learned; the message says why."""


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The tokenizer of a model, on one of its servers.

    Where the server does not tokenize, methods that give None say so, and the others raise ``CannotLearn`` or
    ``EndpointError``. All raise ``EndpointError`` where the endpoint failed for a reason that says nothing about that.

    Attributes
    ----------
    transport : Transport
        Sends the requests.
    endpoint : AgentEndpoint
        A server that serves the model.
    model : str
        Its name.
    timeout : float, optional
        Seconds for each request.
    """

    transport: Transport
    endpoint: AgentEndpoint
    model: str
    timeout: float | None = None

    async def post(self, path: str, body: Mapping[str, Any] | bytes) -> dict[str, Any]:
        """The JSON object with which the server answers."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.transport.json(self.endpoint, path, data, timeout=self.timeout)

    # ---- texts ------------------------------

    async def ids(self, text: str, special: bool = False) -> list[int]:
        """Ids of the tokens of a text; ``special``: with those that the server adds."""
        reply = await self.post("/tokenize", {"model": self.model, "prompt": text, "add_special_tokens": special})
        if text and reply.get("tokens") == []:  # llama-server finds no text in fields it does not know
            reply = await self.post("/tokenize", {"content": text, "add_special": special})
        return _ids(reply, text)

    async def count(self, text: str, special: bool = False) -> int | None:
        """Number of tokens of a text; ``special`` as for ``ids``."""
        ids = await or_none(self.ids(text, special))
        return None if ids is None else len(ids)

    async def text(self, ids: Sequence[int]) -> str:
        """The text of some tokens."""
        reply = await self.post("/detokenize", {"model": self.model, "tokens": ids})
        text = reply.get("prompt", reply.get("content"))  # llama-server's has the latter
        if not isinstance(text, str):
            raise CannotLearn("/detokenize gave no text")
        return text

    async def has_first_tokens(self, text: str) -> bool | None:
        """Whether a text begins with the special tokens that the server would put before it."""

        async def compare() -> bool:
            bare, full = [await self.ids(text, special) for special in (False, True)]
            added = len(full) - len(bare)
            return added > 0 and bare[:added] == full[:added]

        return await or_none(compare())

    async def next_tokens(self, before: str, words: Sequence[str]) -> list[dict[int, str]] | None:
        """The tokens with which a text may go on as each word, by id: of the word as it is, and with a space before it,
        as far as these are one token there."""

        async def ids(text: str) -> list[int]:
            return await self.ids(text) if text else []

        async def token(start: list[int], form: str) -> dict[int, str]:
            there, alone = await asyncio.gather(ids(before + form), ids(form))
            if there[:-1] == start:
                return {there[-1]: form}
            if len(alone) != 1:
                return {}
            # The end of the text and the word are one token in a text, but not where a model goes on.
            return {alone[0]: form} if await self.text([*start, *alone]) == before + form else {}

        async def of_words() -> list[dict[int, str]]:
            start = await ids(before)
            found = await asyncio.gather(*(token(start, form) for word in words for form in (word, f" {word}")))
            return [plain | spaced for plain, spaced in zip(found[::2], found[1::2], strict=True)]

        return await or_none(of_words())

    async def end_of(self, text: str, ids: list[int], keep: int, left: bool) -> str:
        """The first ``keep`` tokens of a text, whose token ids are ``ids``; the last ones with ``left``, which cuts
        there.

        What the server makes of them only says how long they are: its text may differ in white space, and the mark
        that stands for a part of a character is left out.
        """
        part = await self.text(ids[-keep:] if left else ids[:keep])
        length = min(len(text), len(part.lstrip("\ufffd") if left else part.rstrip("\ufffd")))
        return text[len(text) - length :] if left else text[:length]

    # ---- chats ------------------------------

    async def chat_ids(self, spec: RequestSpec, text: str) -> list[int]:
        """Ids of the tokens of a chat with this prompt, with the arguments for the template that ``spec.params``
        has."""
        try:
            return await self.ids_of_chat(spec, text)
        except (CannotLearn, EndpointError) as exc:
            if not says_no(exc) or (chat := await self.text_of_chat(spec, text)) is None:
                raise
            return await self.ids(chat, special=True)

    async def ids_of_chat(self, spec: RequestSpec, text: str) -> list[int]:
        """As ``chat_ids``, where ``/tokenize`` takes chats."""
        body = {"add_generation_prompt": True, "add_special_tokens": False, **_chat(spec, text)}
        return _ids(await self.post("/tokenize", body), text)

    async def text_of_chat(self, spec: RequestSpec, text: str) -> str | None:
        """The text of a chat where ``/apply-template`` tells it, as llama-server's does."""
        reply = await or_none(self.post("/apply-template", _chat(spec, text))) or {}
        return told if isinstance(told := reply.get("prompt"), str) else None

    async def chat_count(self, spec: RequestSpec, text: str) -> int | None:
        """Number of tokens of a chat with this prompt."""
        ids = await or_none(self.chat_ids(spec, text))
        return None if ids is None else len(ids)

    async def goes_on(self) -> bool:
        """Whether the chat route goes on with an answer that has begun. Many take such a chat and begin another answer:
        their prompts have the tokens that end the one and begin the other."""
        begun = RequestSpec(model=self.model, assistant_prefix="It is")
        ended = replace(begun, params={"continue_final_message": False, "add_generation_prompt": True})
        counts: list[int] = []
        for spec in (begun, ended):
            reply = await self.post(path_of(Route.CHAT), encode(Route.CHAT, spec, ["Hi"], max_tokens=1))
            if not isinstance(count := prompt_tokens(reply), int):
                why = "the reply does not count its prompt"
                raise EndpointError(Failure(FailureKind.MALFORMED, why, self.endpoint.name))
            counts.append(count)
        return counts[0] < counts[1]


def says_no(exc: Exception) -> bool:
    """Whether a server does not do what it was asked for, rather than fail."""
    if isinstance(exc, EndpointError):
        return not (exc.failure.of_key or exc.failure.status == 403) and exc.failure.kind in _NO
    return isinstance(exc, CannotLearn)


async def or_none(told: Awaitable[T]) -> T | None:
    """What a server tells; None where it does not do what it was asked for."""
    try:
        return await told
    except (CannotLearn, EndpointError) as exc:
        if not says_no(exc):
            raise
        return None


def prompt_tokens(reply: Mapping[str, Any]) -> Any:
    """The number of tokens of a prompt, as a reply counts them."""
    usage = reply.get("usage")
    return usage.get("prompt_tokens") if isinstance(usage, dict) else None


def _chat(spec: RequestSpec, text: str) -> dict[str, Any]:
    chat: dict[str, Any] = json.loads(encode(Route.CHAT, spec, [text], max_tokens=1))
    del chat["max_tokens"]
    return chat


def _ids(reply: Mapping[str, Any], text: str) -> list[int]:
    ids = reply.get("tokens")
    if not isinstance(ids, list) or (text and not ids):
        raise CannotLearn("/tokenize gave no token ids")
    return ids
