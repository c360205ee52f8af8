"""Models that think before they answer: the switch in their chat template, and thoughts in what they write.

There is no common name for the switch, so it is found by rendering a chat with each known one on and off: where the
tokens of the prompt differ, the template has it. The marks around thoughts are those that Qwen3, DeepSeek-R1 and their
kin write; a model has them if the closing one is a token of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import EndpointError
from ..records import Failure, FailureKind, Reply, RequestSpec, Route
from .capabilities import without_refused
from .hostfile import AgentEndpoint
from .tokenizer import CannotLearn, Tokenizer
from .transport import Transport
from .wire import encode, path_of

__all__ = ["STILL_THINKING", "find_switch", "opens", "without_thoughts", "writes_marks"]

STILL_THINKING = "ended while still thinking: raise max_tokens or lower thinking"
_OPEN, _CLOSE = "<think>", "</think>"
_SWITCHES = ("enable_thinking", "thinking")  # Qwen3, GLM; DeepSeek, Granite
_LEVELS, _EFFORT = ("low", "high"), "reasoning_effort"


async def find_switch(
    transport: Transport, endpoint: AgentEndpoint, model: str, thinking: bool | str, timeout: float | None = None
) -> dict[str, Any] | None:
    """The fields of a chat that make a model think, or not, or so much; None where its template has no switch.

    Raises ``EndpointError`` where the endpoint failed for a reason that says nothing about that.
    """
    names = _SWITCHES if isinstance(thinking, bool) else (_EFFORT,)
    ways = (True, False) if isinstance(thinking, bool) else _LEVELS
    for name in names:
        one, other = [await _prompt(transport, endpoint, model, _switched(name, way), timeout) for way in ways]
        if one != other:
            return _switched(name, thinking)
    if not isinstance(thinking, bool):  # gpt-oss has no template of its own in chats: vLLM renders Harmony
        one, other = [await _prompt(transport, endpoint, model, {_EFFORT: way}, timeout) for way in ways]
        if one != other:
            return {_EFFORT: thinking}
    return None


def _switched(name: str, way: bool | str) -> dict[str, Any]:
    return {"chat_template_kwargs": {name: way}}


async def _prompt(
    transport: Transport, endpoint: AgentEndpoint, model: str, params: Mapping[str, Any], timeout: float | None
) -> object:
    """What a chat is rendered as: the ids of its tokens, as the chat route has them or else ``/tokenize``; or their
    number where the server tells no ids."""
    spec = RequestSpec(model=model, params=params)

    async def chat(omit: frozenset[str]) -> dict[str, Any]:
        body = encode(Route.CHAT, spec, ["Hi"], max_tokens=1, extra={"return_token_ids": True}, omit=omit)
        return await transport.json(endpoint, path_of(Route.CHAT), body, timeout=timeout)

    reply, _ = await without_refused(chat, ("return_token_ids",))
    if isinstance(ids := reply.get("prompt_token_ids"), list):
        return ids
    try:
        return await Tokenizer(transport, endpoint, model, timeout).chat_ids(spec, "Hi")
    except CannotLearn:
        pass
    except EndpointError as exc:
        if exc.failure.kind not in (FailureKind.DENIED, FailureKind.REJECTED, FailureKind.MALFORMED):
            raise
    usage = reply.get("usage")
    if not isinstance(usage, dict):
        raise EndpointError(Failure(FailureKind.MALFORMED, "the reply has no usage", endpoint.name))
    return usage.get("prompt_tokens")


async def writes_marks(transport: Transport, endpoint: AgentEndpoint, model: str, timeout: float | None = None) -> bool:
    """Whether a model marks its thoughts; False where the server does not tokenize."""
    return await Tokenizer(transport, endpoint, model, timeout).count(_CLOSE) == 1


def without_thoughts(reply: Reply, marked: bool, opened: bool | None = False) -> Reply:
    r"""An answer without the thoughts in its text; one that has no more than thoughts has a problem.

    Parameters
    ----------
    reply : Reply
        The answer as it came.
    marked : bool
        Whether the model marks its thoughts.
    opened : bool or None
        Whether the prompt ends with the opening mark, so that the answer begins within the thoughts; None where that
        is not known, and the closing mark shows it.

    Examples
    --------
    >>> reply = Reply(0, 0, "<think>\nA capital?\n</think>\n\nParis", "stop", 3, 9, None)
    >>> [(r.text, r.reasoning) for r in [without_thoughts(reply, marked=True)]]
    [('Paris', 'A capital?')]
    >>> without_thoughts(reply._replace(text="<think>\nA cap", finish_reason="length"), marked=True).problem
    'ended while still thinking: raise max_tokens or lower thinking'
    """
    text, cut, thought = reply.text, reply.finish_reason == "length", bool(reply.reasoning)
    if marked and (opened or text.lstrip().startswith(_OPEN) or (opened is None and _CLOSE in text)):
        thoughts, closed, rest = text.partition(_CLOSE)
        if closed or cut:
            thought = True
            reply = reply._replace(text=rest, reasoning=thoughts.strip().removeprefix(_OPEN))
    if thought:
        text, reasoning = reply.text.lstrip("\n"), (reply.reasoning or "").strip() or None
        problem = STILL_THINKING if cut and not text.strip() else reply.problem
        reply = reply._replace(text=text, reasoning=reasoning, problem=problem)
        if tokens := reply.logprobs:  # those of the answer
            end = max((i + 1 for i, token in enumerate(tokens) if token["token"] == _CLOSE), default=0)
            reply = reply._replace(logprobs=tokens[end:])
    return reply


def opens(suffix: str) -> bool:
    """Whether a template ends within the model's thoughts.

    Examples
    --------
    >>> opens("<|im_start|>assistant\\n<think>\\n"), opens("<think>\\n\\n</think>\\n\\n")
    (True, False)
    """
    return suffix.rstrip().endswith(_OPEN)
