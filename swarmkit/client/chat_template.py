"""Chat templates without a tokenizer: learned from the server, applied to prompts here.

An instruction-tuned model answers a raw prompt with garbage or nothing, and ``/v1/completions``, which takes lists of
prompts, applies no chat template. So the template is learned from the server: tokenize a message that holds a
sentinel, detokenize it, split the text at the sentinel. The two parts are put around every prompt.

The result is verified: the wrapped text of a test prompt must give the same token ids as the server's own chat, else
``CannotLearn`` says why, and the caller takes another route. What the server made of the test prompt is kept with the
template (``ChatTemplate.proof``): a server that makes something else of it has another template by now.

llama-server tokenizes no chats, but tells their text (``/apply-template``), which is split and compared in its place.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ..errors import EndpointError
from ..records import Failure, FailureKind, RequestSpec, Route
from ..text import plural
from .ask import ask
from .hostfile import AgentEndpoint
from .transport import Transport
from .wire import Malformed, encode, path_of

__all__ = [
    "FOR_CHATS",
    "TEMPLATE_FIELDS",
    "CannotLearn",
    "ChatTemplate",
    "chat_ids",
    "chat_tokens_in",
    "end_of",
    "goes_on",
    "has_first_tokens",
    "learn",
    "misfit",
    "next_tokens",
    "rendered",
    "text_ids",
    "tokens_in",
    "understands_batch_chat",
]

T = TypeVar("T")

# Fields of a request that act on the chat template alone: they are learned into it.
_LEARNED = ("chat_template_kwargs", "chat_template", "add_generation_prompt", "continue_final_message", "documents")
FOR_CHATS = ("tools", "tool_choice", "reasoning_effort")
"""Fields of a request that act on more than the chat template: the server's own chats are needed for them."""
TEMPLATE_FIELDS = (*_LEARNED, *FOR_CHATS)
"""All fields that a server gives to its chat template: completions drop them without a word."""

_SENTINEL = "QSENTINELQ"
_PADDED = f" \n {_SENTINEL} \n "
_TEST_PROMPT = "\nWhich gene encodes β-galactosidase?\n\n1) lacZ\n2) <|x|> & “other”\n"
_TEST_TOKENS = 16
_NO = (FailureKind.DENIED, FailureKind.REJECTED, FailureKind.MALFORMED)


class CannotLearn(Exception):  # noqa: N818 - a result, not an error: another route is taken
    """The template could not be learned, or differs from what the chat route does; the message says why."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template as two strings.

    Attributes
    ----------
    prefix, suffix : str
        Text before and after the prompt, special tokens included.
    trim : bool
        Whether the template strips white space from both ends of the prompt.
    proof : tuple of int, or str
        What the server made of the test prompt: the ids of its tokens, or its text where it tells no ids of chats.
        Empty for templates made by hand.

    Examples
    --------
    >>> ChatTemplate("<user>", "<bot>").wrap("Hi")
    '<user>Hi<bot>'
    """

    prefix: str
    suffix: str
    trim: bool = False
    proof: tuple[int, ...] | str = field(default=(), repr=False, compare=False)

    @property
    def as_text(self) -> bool:
        """Whether it was told as text, from which the server leaves out the first tokens that it puts before each
        prompt."""
        return isinstance(self.proof, str)

    def wrap(self, text: str) -> str:
        """Return the text to send for a prompt."""
        return self.wrap_all([text])[0]

    def wrap_all(self, texts: Iterable[str]) -> list[str]:
        """Return the texts to send for prompts."""
        prefix, suffix = self.prefix, self.suffix
        return [f"{prefix}{text}{suffix}" for text in (map(str.strip, texts) if self.trim else texts)]


async def learn(
    transport: Transport, endpoint: AgentEndpoint, wanted: RequestSpec, timeout: float | None = None
) -> ChatTemplate:
    """Learn the template of a model from one of its servers, and verify it.

    Parameters
    ----------
    transport : Transport
        Sends the requests.
    endpoint : AgentEndpoint
        A server that serves the model.
    wanted : RequestSpec
        Its model, and what stands around a row's prompt in a chat: system prompt and examples become part of the
        prefix, the first words of the answer part of the suffix, and the fields for the template act on both.
    timeout : float, optional
        Seconds for each request.

    Returns
    -------
    ChatTemplate
        For prompts sent to ``/v1/completions``, with ``add_special_tokens=false`` unless it is ``as_text``.

    Raises
    ------
    CannotLearn
        The server has no ``/tokenize``, or its chat route renders messages differently.
    EndpointError
        The endpoint failed for another reason.
    """
    model, spec, as_text = wanted.model, _plain(wanted), False
    proof: tuple[int, ...] | str | None
    ids: list[int] | None
    try:
        try:
            padded = await _told_ids(transport, endpoint, spec, _PADDED, timeout)
            text = await _detokenize(transport, endpoint, model, padded, timeout)
        except (CannotLearn, EndpointError) as exc:
            if not _says_no(exc) or (told := await _text_of(transport, endpoint, spec, _PADDED, timeout)) is None:
                raise
            text, as_text = told, True
        template = _split(text)
        wrapped = template.wrap(_TEST_PROMPT)
        if as_text:
            proof = await _text_of(transport, endpoint, spec, _TEST_PROMPT, timeout)
            ids = await _or_none(text_ids(transport, endpoint, model, wrapped, timeout, special=True))
        else:
            proof = tuple(await _told_ids(transport, endpoint, spec, _TEST_PROMPT, timeout))
            ids = await text_ids(transport, endpoint, model, wrapped, timeout)
    except EndpointError as exc:
        if _says_no(exc):
            raise CannotLearn(f"the server does not tokenize chats ({exc.failure.message})") from exc
        raise
    if proof is None or proof != (wrapped if as_text else tuple(ids or ())):
        raise CannotLearn("the wrapped prompt and the chat give different token ids")
    if not template.suffix.rstrip().endswith((spec.assistant_prefix or "").strip()):
        raise CannotLearn("/tokenize does not leave an answer open that has begun")
    await _compare_with_chat(transport, endpoint, spec, ids, as_text, timeout)
    return replace(template, proof=proof)


async def rendered(
    transport: Transport,
    endpoint: AgentEndpoint,
    wanted: RequestSpec,
    text: str = _TEST_PROMPT,
    timeout: float | None = None,
    *,
    as_text: bool = False,
) -> tuple[int, ...] | str:
    """What a server makes of a chat with this prompt: the ids of its tokens, or its text; empty where it does not say.

    Raises ``EndpointError`` where it failed for a reason that says nothing about that.
    """
    spec = _plain(wanted)
    if as_text:
        return await _text_of(transport, endpoint, spec, text, timeout) or ""
    return tuple(await _or_none(_told_ids(transport, endpoint, spec, text, timeout)) or ())


async def misfit(
    transport: Transport,
    endpoint: AgentEndpoint,
    wanted: RequestSpec,
    template: ChatTemplate,
    texts: Sequence[str],
    timeout: float | None = None,
) -> str | None:
    """The first of some prompts whose chat is not the prompt within the template; None if there is none.

    Those that the server does not render, such as one that is too long, say nothing. Raises as ``rendered``.
    """

    async def fits(text: str) -> bool:
        wrapped = template.wrap(text)
        chat = await rendered(transport, endpoint, wanted, text, timeout, as_text=template.as_text)
        if not chat or template.as_text:
            return chat in ((), "", wrapped)
        ids = await _or_none(text_ids(transport, endpoint, wanted.model, wrapped, timeout))
        return ids is None or chat == tuple(ids)

    fit = await asyncio.gather(*map(fits, texts))
    return next((text for text, fits_it in zip(texts, fit, strict=True) if not fits_it), None)


def _plain(spec: RequestSpec) -> RequestSpec:
    """The same turns around the prompt of a row, the fields for the template, and nothing else."""
    kept = {name: getattr(spec, name) for name in ("model", "system", "examples", "assistant_prefix")}
    return RequestSpec(**kept, params={name: spec.params[name] for name in _LEARNED if name in spec.params})


def _says_no(exc: Exception) -> bool:
    """Whether a server does not do what it was asked for, rather than fail."""
    if isinstance(exc, EndpointError):
        return not (exc.failure.of_key or exc.failure.status == 403) and exc.failure.kind in _NO
    return isinstance(exc, CannotLearn)


async def _or_none(told: Awaitable[T]) -> T | None:
    """What a server tells; None where it does not do what it was asked for."""
    try:
        return await told
    except (CannotLearn, EndpointError) as exc:
        if not _says_no(exc):
            raise
        return None


def _split(rendered: str) -> ChatTemplate:
    if rendered.count(_SENTINEL) != 1:
        raise CannotLearn(f"the template holds the prompt {plural(rendered.count(_SENTINEL), 'time')}, not once")
    if _PADDED in rendered:
        prefix, _, suffix = rendered.partition(_PADDED)
        return ChatTemplate(prefix, suffix)
    prefix, _, suffix = rendered.partition(_SENTINEL)
    if prefix.endswith(" \n ") or suffix.startswith(" \n "):
        raise CannotLearn("the template strips white space from one end of the prompt only")
    return ChatTemplate(prefix, suffix, trim=True)


async def _compare_with_chat(
    transport: Transport,
    endpoint: AgentEndpoint,
    spec: RequestSpec,
    expected: list[int] | None,
    as_text: bool,
    timeout: float | None,
) -> None:
    """Compare the token ids of ``/tokenize`` with those that the chat route uses for the same prompt, or their number
    where the route tells no ids, and it matters: with fields that one of the two may not know.

    They differ for models whose chats are rendered by other code (Harmony). A server that parses reasoning out of its
    chats is refused as well: in a completion the reasoning would stay in the text.
    """
    extra = {"temperature": 0, "return_token_ids": True}
    body = encode(Route.CHAT, spec, [_TEST_PROMPT], max_tokens=_TEST_TOKENS, extra=extra)
    try:
        reply = await transport.json(endpoint, path_of(Route.CHAT), body, timeout=timeout)
    except EndpointError as exc:
        if not _says_no(exc):
            raise
        raise CannotLearn(f"the chat route refuses the test of the template ({exc.failure.message})") from exc
    ids, count = reply.get("prompt_token_ids"), _prompt_tokens(reply)
    if isinstance(ids, list) or expected is None:
        same = expected in (None, ids)
    else:
        matters = bool(spec.params.keys() - {"chat_template_kwargs"}) or (as_text and count)
        same = not matters or count == len(expected)
    if not same:
        raise CannotLearn("/tokenize and the chat route render the same message differently")
    choices = reply.get("choices") or [{}]
    message = choices[0].get("message") or {} if isinstance(choices[0], dict) else {}
    if message.get("reasoning") or message.get("reasoning_content"):
        raise CannotLearn("the server parses reasoning out of its chats, which completions would leave in the text")


async def understands_batch_chat(
    transport: Transport, endpoint: AgentEndpoint, model: str, timeout: float | None = None
) -> bool:
    """Whether ``/v1/chat/completions/batch`` answers a list of two chats. Raises ``EndpointError`` where the endpoint
    failed for a reason that says nothing about it."""
    spec, texts = RequestSpec(model=model), ["Hi", "Ho"]
    asked = ask(transport, endpoint, Route.CHAT_BATCH, spec, texts, max_tokens=2, timeout=timeout)
    try:
        return await _or_none(asked) is not None
    except Malformed:
        return False


async def tokens_in(
    transport: Transport,
    endpoint: AgentEndpoint,
    model: str,
    text: str,
    special: bool = False,
    timeout: float | None = None,
) -> int | None:
    """Number of tokens of a text; None if the server does not tokenize. ``special``: with those the server adds.

    Raises ``EndpointError`` where the endpoint failed for a reason that says nothing about that.
    """
    ids = await _or_none(text_ids(transport, endpoint, model, text, timeout, special))
    return None if ids is None else len(ids)


async def has_first_tokens(
    transport: Transport, endpoint: AgentEndpoint, model: str, text: str, timeout: float | None = None
) -> bool | None:
    """Whether a text begins with the special tokens that the server would put before it; None if the server does not
    tokenize. Raises like ``tokens_in``."""

    async def compare() -> bool:
        bare, full = [await text_ids(transport, endpoint, model, text, timeout, special) for special in (False, True)]
        added = len(full) - len(bare)
        return added > 0 and bare[:added] == full[:added]

    return await _or_none(compare())


async def next_tokens(
    transport: Transport,
    endpoint: AgentEndpoint,
    model: str,
    before: str,
    words: Sequence[str],
    timeout: float | None = None,
) -> list[dict[int, str]] | None:
    """The tokens with which a text may go on as each word, by id: of the word as it is, and with a space before it, as
    far as these are one token there. None if the server does not tokenize. Raises like ``tokens_in``."""

    async def ids(text: str) -> list[int]:
        return await text_ids(transport, endpoint, model, text, timeout) if text else []

    async def token(start: list[int], form: str) -> dict[int, str]:
        there, alone = await asyncio.gather(ids(before + form), ids(form))
        if there[:-1] == start:
            return {there[-1]: form}
        if len(alone) != 1:
            return {}
        # The end of the text and the word are one token in a text, but not where a model goes on.
        whole = await _detokenize(transport, endpoint, model, [*start, *alone], timeout)
        return {alone[0]: form} if whole == before + form else {}

    async def of_words() -> list[dict[int, str]]:
        start = await ids(before)
        found = await asyncio.gather(*(token(start, form) for word in words for form in (word, f" {word}")))
        return [plain | spaced for plain, spaced in zip(found[::2], found[1::2], strict=True)]

    return await _or_none(of_words())


async def chat_ids(
    transport: Transport, endpoint: AgentEndpoint, spec: RequestSpec, text: str, timeout: float | None = None
) -> list[int]:
    """Ids of the tokens of a chat with this prompt, with the arguments for the template that ``spec.params`` has.

    Raises ``CannotLearn`` or ``EndpointError`` where the server does not say.
    """
    try:
        return await _told_ids(transport, endpoint, spec, text, timeout)
    except (CannotLearn, EndpointError) as exc:
        if not _says_no(exc) or (chat := await _text_of(transport, endpoint, spec, text, timeout)) is None:
            raise
        return await text_ids(transport, endpoint, spec.model, chat, timeout, special=True)


async def _told_ids(
    transport: Transport, endpoint: AgentEndpoint, spec: RequestSpec, text: str, timeout: float | None
) -> list[int]:
    """Ids of the tokens of a chat where ``/tokenize`` takes chats; raises as ``chat_ids``."""
    body = {"add_generation_prompt": True, "add_special_tokens": False, **_chat(spec, text)}
    return _ids(await transport.json(endpoint, "/tokenize", json.dumps(body).encode(), timeout=timeout), text)


async def _text_of(
    transport: Transport, endpoint: AgentEndpoint, spec: RequestSpec, text: str, timeout: float | None
) -> str | None:
    """The text of a chat where ``/apply-template`` tells it, as llama-server's does; raises as ``tokens_in``."""
    body = json.dumps(_chat(spec, text)).encode()
    reply = await _or_none(transport.json(endpoint, "/apply-template", body, timeout=timeout)) or {}
    return told if isinstance(told := reply.get("prompt"), str) else None


def _chat(spec: RequestSpec, text: str) -> dict[str, Any]:
    chat: dict[str, Any] = json.loads(encode(Route.CHAT, spec, [text], max_tokens=1))
    del chat["max_tokens"]
    return chat


async def _chat_tokens(
    transport: Transport, endpoint: AgentEndpoint, spec: RequestSpec, text: str, timeout: float | None = None
) -> int:
    """Number of tokens of the prompt of a chat, as the chat route counts them. Raises ``EndpointError`` where it does
    not."""
    body = encode(Route.CHAT, spec, [text], max_tokens=1)
    count = _prompt_tokens(await transport.json(endpoint, path_of(Route.CHAT), body, timeout=timeout))
    if not isinstance(count, int):
        raise EndpointError(Failure(FailureKind.MALFORMED, "the reply does not count its prompt", endpoint.name))
    return count


def _prompt_tokens(reply: Mapping[str, Any]) -> Any:
    usage = reply.get("usage")
    return usage.get("prompt_tokens") if isinstance(usage, dict) else None


async def goes_on(transport: Transport, endpoint: AgentEndpoint, model: str, timeout: float | None = None) -> bool:
    """Whether the chat route goes on with an answer that has begun. Many take such a chat and begin another answer:
    their prompts have the tokens that end the one and begin the other. Raises ``EndpointError`` where it does not say.
    """
    begun = RequestSpec(model=model, assistant_prefix="It is")
    ended = replace(begun, params={"continue_final_message": False, "add_generation_prompt": True})
    one, other = [await _chat_tokens(transport, endpoint, spec, "Hi", timeout) for spec in (begun, ended)]
    return one < other


async def chat_tokens_in(
    transport: Transport, endpoint: AgentEndpoint, spec: RequestSpec, text: str, timeout: float | None = None
) -> int | None:
    """Number of tokens of a chat with this prompt; None if the server does not tokenize chats. Raises as
    ``tokens_in``."""
    ids = await _or_none(chat_ids(transport, endpoint, spec, text, timeout))
    return None if ids is None else len(ids)


async def end_of(
    transport: Transport,
    endpoint: AgentEndpoint,
    model: str,
    text: str,
    ids: list[int],
    keep: int,
    left: bool,
    timeout: float | None = None,
) -> str:
    """The first ``keep`` tokens of a text, whose token ids are ``ids``; the last ones with ``left``, which cuts there.

    What the server makes of them only says how long they are: its text may differ in white space, and the mark that
    stands for a part of a character is left out.
    """
    part = await _detokenize(transport, endpoint, model, ids[-keep:] if left else ids[:keep], timeout)
    length = min(len(text), len(part.lstrip("\ufffd") if left else part.rstrip("\ufffd")))
    return text[len(text) - length :] if left else text[:length]


async def text_ids(
    transport: Transport,
    endpoint: AgentEndpoint,
    model: str,
    text: str,
    timeout: float | None = None,
    special: bool = False,
) -> list[int]:
    """Token ids of a text. Raises ``CannotLearn`` or ``EndpointError`` where the server does not say."""
    vllm = {"model": model, "prompt": text, "add_special_tokens": special}
    reply = await transport.json(endpoint, "/tokenize", json.dumps(vllm).encode(), timeout=timeout)
    if text and reply.get("tokens") == []:  # llama-server finds no text in fields it does not know
        llama = {"content": text, "add_special": special}
        reply = await transport.json(endpoint, "/tokenize", json.dumps(llama).encode(), timeout=timeout)
    return _ids(reply, text)


async def _detokenize(
    transport: Transport, endpoint: AgentEndpoint, model: str, ids: list[int], timeout: float | None = None
) -> str:
    body = json.dumps({"model": model, "tokens": ids}).encode()
    reply = await transport.json(endpoint, "/detokenize", body, timeout=timeout)
    text = reply.get("prompt", reply.get("content"))  # llama-server's has the latter
    if not isinstance(text, str):
        raise CannotLearn("/detokenize gave no text")
    return text


def _ids(reply: Mapping[str, Any], text: str) -> list[int]:
    ids = reply.get("tokens")
    if not isinstance(ids, list) or (text and not ids):
        raise CannotLearn("/tokenize gave no token ids")
    return ids
