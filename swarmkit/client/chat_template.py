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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from ..errors import EndpointError
from ..records import RequestSpec, Route
from ..text import plural
from .ask import ask
from .error_replies import Malformed
from .hostfile import AgentEndpoint
from .tokenizer import CannotLearn, Tokenizer, or_none, prompt_tokens, says_no
from .transport import Transport
from .wire import encode, path_of

__all__ = [
    "FOR_CHATS",
    "TEMPLATE_FIELDS",
    "CannotLearn",
    "ChatTemplate",
    "learn",
    "misfit",
    "rendered",
    "understands_batch_chat",
]

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
    spec, as_text = _plain(wanted), False
    tokenizer = Tokenizer(transport, endpoint, wanted.model, timeout)
    proof: tuple[int, ...] | str | None
    ids: list[int] | None
    try:
        try:
            text = await tokenizer.text(await tokenizer.ids_of_chat(spec, _PADDED))
        except (CannotLearn, EndpointError) as exc:
            if not says_no(exc) or (told := await tokenizer.text_of_chat(spec, _PADDED)) is None:
                raise
            text, as_text = told, True
        template = _split(text)
        wrapped = template.wrap(_TEST_PROMPT)
        if as_text:
            proof = await tokenizer.text_of_chat(spec, _TEST_PROMPT)
            ids = await or_none(tokenizer.ids(wrapped, special=True))
        else:
            proof = tuple(await tokenizer.ids_of_chat(spec, _TEST_PROMPT))
            ids = await tokenizer.ids(wrapped)
    except EndpointError as exc:
        if says_no(exc):
            raise CannotLearn(f"the server does not tokenize chats ({exc.failure.message})") from exc
        raise
    if proof is None or proof != (wrapped if as_text else tuple(ids or ())):
        raise CannotLearn("the wrapped prompt and the chat give different token ids")
    if not template.suffix.rstrip().endswith((spec.assistant_prefix or "").strip()):
        raise CannotLearn("/tokenize does not leave an answer open that has begun")
    await _compare_with_chat(tokenizer, spec, ids, as_text)
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
    spec, tokenizer = _plain(wanted), Tokenizer(transport, endpoint, wanted.model, timeout)
    if as_text:
        return await tokenizer.text_of_chat(spec, text) or ""
    return tuple(await or_none(tokenizer.ids_of_chat(spec, text)) or ())


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
        ids = await or_none(Tokenizer(transport, endpoint, wanted.model, timeout).ids(wrapped))
        return ids is None or chat == tuple(ids)

    fit = await asyncio.gather(*map(fits, texts))
    return next((text for text, fits_it in zip(texts, fit, strict=True) if not fits_it), None)


def _plain(spec: RequestSpec) -> RequestSpec:
    """The same turns around the prompt of a row, the fields for the template, and nothing else."""
    kept = {name: getattr(spec, name) for name in ("model", "system", "examples", "assistant_prefix")}
    return RequestSpec(**kept, params={name: spec.params[name] for name in _LEARNED if name in spec.params})


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
    tokenizer: Tokenizer, spec: RequestSpec, expected: list[int] | None, as_text: bool
) -> None:
    """Compare the token ids of ``/tokenize`` with those that the chat route uses for the same prompt, or their number
    where the route tells no ids, and it matters: with fields that one of the two may not know.

    They differ for models whose chats are rendered by other code (Harmony). A server that parses reasoning out of its
    chats is refused as well: in a completion the reasoning would stay in the text.
    """
    extra = {"temperature": 0, "return_token_ids": True}
    body = encode(Route.CHAT, spec, [_TEST_PROMPT], max_tokens=_TEST_TOKENS, extra=extra)
    try:
        reply = await tokenizer.post(path_of(Route.CHAT), body)
    except EndpointError as exc:
        if not says_no(exc):
            raise
        raise CannotLearn(f"the chat route refuses the test of the template ({exc.failure.message})") from exc
    ids, count = reply.get("prompt_token_ids"), prompt_tokens(reply)
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
        return await or_none(asked) is not None
    except Malformed:
        return False
