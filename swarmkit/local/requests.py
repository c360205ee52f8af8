"""Request bodies -> checked records, refused with vLLM's status codes and error bodies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .engines import Engine, Message, Prompt, PromptRefusedError, Sampling

__all__ = ["Ask", "RefusedError", "parse_body", "parse_generate", "parse_messages"]

MAX_PROMPTS = 1024
Kind = Literal["completion", "chat", "batch"]


class RefusedError(Exception):
    """A request that is answered with an error; ``body`` is what vLLM would send.

    Parameters
    ----------
    message : str
    param : str, optional
        The field that is to blame.
    status : int, default 400
    type_ : str, optional
        vLLM's name of the error.
    """

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, type_: str = "BadRequestError"
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": type_, "param": param, "code": status}}


@dataclass(frozen=True, slots=True)
class Ask:
    """A checked request for text.

    Attributes
    ----------
    kind : {"completion", "chat", "batch"}
    prompts : list of Prompt
    n : int
        Samples for each prompt.
    sampling : Sampling
    stream : bool
    usage, continuous_usage : bool
        ``stream_options``: usage at the end of a stream, and in each of its chunks.
    prompt_text : bool
        ``return_prompt_text``: send the rendered prompt back (chat only).
    """

    kind: Kind
    prompts: list[Prompt]
    n: int
    sampling: Sampling
    stream: bool
    usage: bool
    continuous_usage: bool
    prompt_text: bool

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(prompt.n_tokens for prompt in self.prompts)


def parse_body(data: bytes) -> dict[str, Any]:
    """JSON object of a request body. `RefusedError` if it is none."""
    try:
        body = json.loads(data)
    except ValueError as error:
        raise RefusedError(f"1 validation error:\n  JSON decode error: {error}", type_="Bad Request") from error
    if not isinstance(body, dict):
        raise RefusedError("1 validation error:\n  Input should be a JSON object", type_="Bad Request")
    return body


def parse_generate(body: Mapping[str, Any], kind: Kind, engine: Engine, *, lists: bool, interval: bool) -> Ask:
    """Check a request for text.

    Parameters
    ----------
    body : mapping
    kind : {"completion", "chat", "batch"}
    engine : Engine
        Tokenizes the prompts.
    lists : bool
        Whether several prompts in one completion are allowed.
    interval : bool
        Whether ``stream_interval`` is honoured.

    Raises
    ------
    RefusedError
        400 or 404, for the whole request.
    """
    check_model(body, engine)
    stream = kind != "batch" and bool(body.get("stream"))
    options = body.get("stream_options") or {}
    if options and not stream:
        raise RefusedError("Stream options can only be defined when `stream=True`.", "stream_options")
    n = _whole(body, "n", 1, 1)
    if kind == "batch" and n > 1:
        raise RefusedError("Batch chat completions do not support n > 1.", "n")
    sampling = _sampling(body, kind, engine.max_model_len, n, stream=stream, interval=interval)
    try:
        prompts = _prompts(body, kind, engine, lists=lists)
    except PromptRefusedError as error:
        raise RefusedError(str(error), "prompt") from error
    for prompt in prompts:
        _check_length(prompt, engine.max_model_len)
        if sampling.want_ids and prompt.ids is None:
            prompt.ids = engine.encode(prompt.text, add_special_tokens=False)
    usage = bool(options.get("include_usage"))
    return Ask(
        kind=kind,
        prompts=prompts,
        n=n,
        sampling=sampling,
        stream=stream,
        usage=usage,
        continuous_usage=usage and bool(options.get("continuous_usage_stats")),
        prompt_text=kind == "chat" and bool(body.get("return_prompt_text")),
    )


def check_model(body: Mapping[str, Any], engine: Engine) -> None:
    """`RefusedError` 404 if the request names a model that is not served."""
    model = body.get("model")
    if model and model != engine.model:
        message = f"The model `{model}` does not exist. Valid aliases: {engine.model}."
        raise RefusedError(message, "model", 404, "NotFoundError")


def parse_messages(value: object) -> list[Message]:
    """Chat messages with their content as one text. `RefusedError` if they are not messages."""
    if not isinstance(value, list) or not value:
        raise RefusedError("1 validation error:\n  messages: a list of messages is needed", "messages")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RefusedError("1 validation error:\n  messages: each needs a role", "messages")
        content = message.get("content") or ""
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            if not all(isinstance(part, str) for part in parts):
                raise RefusedError("1 validation error:\n  messages: only text is understood", "messages")
            content = "\n".join(filter(None, parts))
        if not isinstance(content, str):
            raise RefusedError("1 validation error:\n  messages: content must be text", "messages")
        messages.append({"role": message["role"], "content": content})
    return messages


def _prompts(body: Mapping[str, Any], kind: Kind, engine: Engine, *, lists: bool) -> list[Prompt]:
    if kind == "completion":
        special = body.get("add_special_tokens", True) is not False
        return [engine.prompt(p, add_special_tokens=special) for p in _values(body.get("prompt"), lists)]
    value = body.get("messages")
    chats = value if kind == "batch" and isinstance(value, list) else [value]
    if not chats:
        raise RefusedError("1 validation error:\n  messages: at least one conversation is needed", "messages")
    special = body.get("add_special_tokens", False) is True
    generate = body.get("add_generation_prompt", True) is not False
    texts = [engine.render(parse_messages(chat), add_generation_prompt=generate) for chat in chats]
    return [engine.prompt(text, add_special_tokens=special) for text in texts]


def _values(value: object, lists: bool) -> list[str] | list[list[int]]:
    """The four forms a completion's prompt can have, as a list."""
    if isinstance(value, str) and value:
        return [value]
    if value is None or value == "" or value == []:
        raise RefusedError("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    if not isinstance(value, list):
        raise RefusedError("1 validation error:\n  prompt: Input should be a valid string", "prompt")
    if not lists:
        raise RefusedError(
            "json: cannot unmarshal array into Go struct field CompletionRequest.prompt of type string",
            type_="invalid_request_error",
        )
    if _is_ids(value):
        return [value]
    if len(value) > MAX_PROMPTS:
        raise RefusedError(
            f"prompt list length {len(value)} exceeds the maximum allowed count of {MAX_PROMPTS}. To "
            "increase this limit, set the VLLM_MAX_COMPLETION_PROMPTS environment variable.",
            "prompt",
        )
    if all(isinstance(v, str) for v in value) or all(isinstance(v, list) and _is_ids(v, 0) for v in value):
        return value
    raise RefusedError("1 validation error:\n  prompt: all texts, or all lists of token ids", "prompt")


def _is_ids(value: list[Any], least: int = 1) -> bool:
    return len(value) >= least and all(type(v) is int and v >= 0 for v in value)


def _check_length(prompt: Prompt, limit: int) -> None:
    if not prompt.n_tokens:
        raise RefusedError("The decoder prompt cannot be empty")
    if prompt.n_tokens >= limit:
        raise RefusedError(
            f"This model's maximum context length is {limit} tokens. However, your prompt contains "
            f"{prompt.n_tokens} input tokens, which exceeds this limit even without any output tokens. "
            "Please reduce the length of the input prompt.",
            "input_tokens",
        )


def _sampling(body: Mapping[str, Any], kind: Kind, limit: int, n: int, *, stream: bool, interval: bool) -> Sampling:
    max_tokens: int | None
    if kind == "completion":
        max_tokens = _whole(body, "max_tokens", 16, 1)
    else:
        max_tokens = _whole(body, "max_completion_tokens", 0, 1) or _whole(body, "max_tokens", 0, 1) or None
    if max_tokens is not None and max_tokens > limit:
        raise RefusedError(
            f"max_tokens={max_tokens} cannot be greater than max_model_len={limit}. "
            "Please request fewer output tokens.",
            "max_tokens",
        )
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(s, str) for s in stop):
        raise RefusedError("1 validation error:\n  stop: a text or a list of texts", "stop")
    if not all(stop):
        raise RefusedError("stop cannot contain an empty string.")
    temperature = _real(body, "temperature", 1.0)
    if temperature < 0:
        raise RefusedError(f"temperature must be non-negative, got {temperature}.", "temperature")
    if n > 1 and not temperature:
        raise RefusedError(f"n must be 1 when using greedy sampling, got {n}.")
    top_p = _real(body, "top_p", 1.0)
    if not 0 < top_p <= 1:
        raise RefusedError(f"top_p must be in (0, 1], got {top_p}.", "top_p")
    seed = body.get("seed")
    if seed is not None and type(seed) is not int:
        raise RefusedError("1 validation error:\n  seed: Input should be a valid integer", "seed")
    min_tokens = _whole(body, "min_tokens", 0, 0)
    if max_tokens is not None and min_tokens > max_tokens:
        raise RefusedError(f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {min_tokens}.")
    asked = _whole(body, "stream_interval", 1, 1)
    return Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=max(0, _whole(body, "top_k", 0, -1)),
        seed=seed,
        stop=tuple(stop),
        min_tokens=min_tokens,
        ignore_eos=bool(body.get("ignore_eos")),
        want_ids=bool(body.get("return_token_ids")),
        interval=(asked if interval else 1) if stream else 0,
    )


def _whole(body: Mapping[str, Any], name: str, default: int, least: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int:
        raise RefusedError(f"1 validation error:\n  {name}: Input should be a valid integer", name)
    if value < least:
        raise RefusedError(f"{name} must be at least {least}, got {value}.", name)
    return value


def _real(body: Mapping[str, Any], name: str, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RefusedError(f"1 validation error:\n  {name}: Input should be a valid number", name)
    return float(value)
