"""Request bodies -> checked records; errors have vLLM's status codes and bodies."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from .engines.base import Constraint, ConstraintRefusedError, Engine, Message, Prompt, PromptRefusedError, Sampling

__all__ = ["Base64", "Constraints", "Embedding", "Generation", "Logprobs", "RefusedError", "parse_body",
           "parse_embedding", "parse_generate", "render_chat"]  # fmt: skip

MAX_PROMPTS = 1024
Kind = Literal["completion", "chat", "batch"]
Constraints = Literal["obey", "ignore", "refuse", "chat", "old"]
Logprobs = Literal["obey", "ignore", "refuse", "old"]
Base64 = Literal["obey", "ignore", "refuse"]
_CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


class RefusedError(Exception):
    """A request that is answered with an error; ``body`` has the form of vLLM's.

    Parameters
    ----------
    message : str
    param : str, optional
        The field at fault.
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
class Generation:
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
    parse_reasoning : bool
        Give the thoughts apart from the answer (chats only).
    tokens_as_ids : bool
        ``return_tokens_as_token_ids``: call tokens "token_id:7" beside their log-probabilities.
    """

    kind: Kind
    prompts: list[Prompt]
    n: int
    sampling: Sampling
    stream: bool
    usage: bool
    continuous_usage: bool
    prompt_text: bool
    parse_reasoning: bool = False
    tokens_as_ids: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(prompt.n_tokens for prompt in self.prompts)


@dataclass(frozen=True, slots=True)
class Embedding:
    """A checked request for vectors.

    Attributes
    ----------
    prompts : list of Prompt
    dimensions : int
        Numbers of a vector.
    base64 : bool
        Write vectors as base64, not as lists of numbers.
    """

    prompts: list[Prompt]
    dimensions: int
    base64: bool


def parse_body(data: bytes) -> dict[str, Any]:
    """The JSON object of a request body. `RefusedError` if it is not one."""
    try:
        body = json.loads(data)
    except ValueError as error:
        raise RefusedError(f"1 validation error:\n  JSON decode error: {error}", type_="Bad Request") from error
    if not isinstance(body, dict):
        raise RefusedError("1 validation error:\n  Input should be a JSON object", type_="Bad Request")
    return body


def parse_generate(
    body: Mapping[str, Any],
    kind: Kind,
    engine: Engine,
    *,
    lists: bool,
    interval: bool,
    constraints: Constraints,
    reasoning_parser: bool,
    logprobs: Logprobs,
    adapters: Collection[str] = (),
) -> Generation:
    """Check a request for text.

    Parameters
    ----------
    body : mapping
    kind : {"completion", "chat", "batch"}
    engine : Engine
        Tokenizes the prompts.
    lists : bool
        Whether a completion may have several prompts.
    interval : bool
        Whether ``stream_interval`` is honoured.
    constraints : {"obey", "ignore", "refuse", "chat", "old"}
        What is done about a constraint, see `ServerOptions`.
    reasoning_parser : bool
        Whether the thoughts of chats are given apart, see `ServerOptions`.
    adapters : collection of str
        Further names of the engine's model.
    logprobs : {"obey", "ignore", "refuse", "old"}
        What is done about log-probabilities, see `ServerOptions`.

    Raises
    ------
    RefusedError
        400 or 404, for the whole request.
    """
    adapter = check_model(body, engine, adapters)
    stream = kind != "batch" and bool(body.get("stream"))
    options = body.get("stream_options") or {}
    if options and not stream:
        raise RefusedError("Stream options can only be defined when `stream=True`.", "stream_options")
    n = _whole(body, "n", 1, 1)
    if kind == "batch" and n > 1:
        raise RefusedError("Batch chat completions do not support n > 1.", "n")
    if reasoning_parser and constraints == "obey":
        constraints = "chat"
    constraint = _constraint(body, constraints)
    sampling = _sampling(body, kind, engine.max_model_len, n, stream=stream, interval=interval)
    if adapter:
        sampling = replace(sampling, adapter=adapter)
    most, ids = _logprobs(body, kind, logprobs, engine, stream=stream)
    sampling = sampling if most is None else replace(sampling, logprobs=most, logprob_ids=ids)
    if constraint:
        try:
            engine.check(constraint)
        except ConstraintRefusedError as error:
            raise RefusedError(str(error), "structured_outputs") from error
        if constraints != "chat" or kind != "completion":
            sampling = replace(sampling, constraint=replace(constraint, after_thoughts=reasoning_parser))
    if sampling.thinking_budget is not None and not reasoning_parser:
        raise RefusedError(
            "thinking_token_budget is set but reasoning_config is not configured. Please set --reasoning-parser "
            "and/or --reasoning-config to use thinking_token_budget."
        )
    try:
        prompts = _prompts(body, kind, engine, lists=lists)
    except PromptRefusedError as error:
        raise RefusedError(str(error), "prompt") from error
    for prompt in prompts:
        _check_length(prompt, engine.max_model_len)
        if sampling.want_ids and prompt.ids is None:
            prompt.ids = engine.encode(prompt.text, add_special_tokens=False)
    usage = bool(options.get("include_usage"))
    return Generation(
        kind=kind,
        prompts=prompts,
        n=n,
        sampling=sampling,
        stream=stream,
        usage=usage,
        continuous_usage=usage and bool(options.get("continuous_usage_stats")),
        prompt_text=kind == "chat" and bool(body.get("return_prompt_text")),
        parse_reasoning=reasoning_parser and kind != "completion",
        tokens_as_ids=logprobs == "obey" and bool(body.get("return_tokens_as_token_ids")),
    )


def parse_embedding(
    body: Mapping[str, Any], engine: Engine, *, lists: bool, base64: Base64, adapters: Collection[str] = ()
) -> Embedding:
    """Check a request for vectors. `RefusedError` 400 or 404, for the whole request."""
    check_model(body, engine, adapters)
    if not engine.dimensions:
        raise RefusedError("The model does not support Embeddings API")
    form = body.get("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise RefusedError(
            "1 validation error:\n  encoding_format: Input should be 'float' or 'base64'", "encoding_format"
        )
    if base64 == "refuse" and "encoding_format" in body:
        raise RefusedError("1 validation error:\n  encoding_format: Extra inputs are not permitted", "encoding_format")
    dimensions = _whole(body, "dimensions", engine.dimensions, 1)
    if dimensions > engine.dimensions:
        raise RefusedError(f"dimensions must be {engine.dimensions} or less, got {dimensions}.", "dimensions")
    prompts = [engine.prompt(text, add_special_tokens=True) for text in _values(body.get("input"), lists)]
    for prompt in prompts:
        _check_length(prompt, engine.max_model_len, answers=False)
    return Embedding(prompts, dimensions, form == "base64" and base64 == "obey")


def check_model(body: Mapping[str, Any], engine: Engine, adapters: Collection[str] = ()) -> str:
    """The adapter that the request names, if it does. `RefusedError` 404 if it names what is not served."""
    model = body.get("model")
    if not model or model == engine.model:
        return ""
    if model not in adapters:
        message = f"The model `{model}` does not exist. Valid aliases: {', '.join([engine.model, *adapters])}."
        raise RefusedError(message, "model", 404, "NotFoundError")
    return str(model)


def parse_messages(value: object) -> list[Message]:
    """Chat messages, each with its content as one text. `RefusedError` if they are not messages."""
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


def render_chat(body: Mapping[str, Any], chat: object, engine: Engine) -> str:
    """A chat in the model's template, in the way that the request asks for. `RefusedError` if it cannot be."""
    messages = parse_messages(chat)
    generate, goes_on = body.get("add_generation_prompt", True) is not False, body.get("continue_final_message") is True
    if generate and goes_on:
        raise RefusedError("Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
    text = engine.render(messages, parse_switches(body), reply=generate)
    if not goes_on:
        return text
    words = messages[-1]["content"]
    start = text.rfind(words.strip())
    if start < 0 or not words.strip():
        raise RefusedError("continue_final_message is set but the final message does not appear in the chat")
    # The final message is left open: what the template writes after it is cut off.
    kept = words.lstrip()
    return text[: start + len(kept if text.startswith(kept, start) else kept.rstrip())]


def parse_switches(body: Mapping[str, Any]) -> dict[str, Any]:
    """``chat_template_kwargs``, further variables of the chat template. `RefusedError` if they are not an object."""
    value = body.get("chat_template_kwargs")
    if value is not None and not isinstance(value, dict):
        raise RefusedError(
            "1 validation error:\n  chat_template_kwargs: Input should be a valid dictionary", "chat_template_kwargs"
        )
    return value or {}


def _prompts(body: Mapping[str, Any], kind: Kind, engine: Engine, *, lists: bool) -> list[Prompt]:
    if kind == "completion":
        special = body.get("add_special_tokens", True) is not False
        return [engine.prompt(p, add_special_tokens=special) for p in _values(body.get("prompt"), lists)]
    value = body.get("messages")
    chats = value if kind == "batch" and isinstance(value, list) else [value]
    if not chats:
        raise RefusedError("1 validation error:\n  messages: at least one conversation is needed", "messages")
    special = body.get("add_special_tokens", False) is True
    return [engine.prompt(render_chat(body, chat, engine), add_special_tokens=special) for chat in chats]


def _values(value: object, lists: bool) -> list[str] | list[list[int]]:
    """The four forms of a completion's prompt, as a list."""
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


def _check_length(prompt: Prompt, limit: int, answers: bool = True) -> None:
    if not prompt.n_tokens:
        raise RefusedError("The decoder prompt cannot be empty")
    if prompt.n_tokens + answers > limit:
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
    budget = body.get("thinking_token_budget")
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
        thinking_budget=None if budget is None else _whole(body, "thinking_token_budget", 0, 0),
    )


def _logprobs(
    body: Mapping[str, Any], kind: Kind, logprobs: Logprobs, engine: Engine, *, stream: bool
) -> tuple[int | None, tuple[int, ...]]:
    """How many of the likeliest tokens are told with their log-probabilities, None for none; and which instead."""
    if logprobs == "ignore":
        return None, ()
    asked = body.get("logprobs") if kind == "completion" else body.get("logprobs") or None
    if logprobs == "refuse" and asked is not None:
        raise RefusedError("1 validation error:\n  logprobs: Extra inputs are not permitted", "logprobs")
    if stream and body.get("prompt_logprobs"):
        raise RefusedError("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
    ids = body.get("logprob_token_ids") if logprobs == "obey" and engine.max_logprobs > 1 else None
    if asked is None:
        if ids:
            raise RefusedError("when using `logprob_token_ids`, `logprobs` must be set.", "logprob_token_ids")
        return None, ()
    most = _whole(body, "logprobs" if kind == "completion" else "top_logprobs", 0, 0)
    if ids is not None and not (isinstance(ids, list) and _is_ids(ids)):
        raise RefusedError("1 validation error:\n  logprob_token_ids: a list of token ids", "logprob_token_ids")
    if not ids and most > engine.max_logprobs:
        raise RefusedError(
            f"Requested sample logprobs of {most}, which is greater than max allowed: {engine.max_logprobs}", "logprobs"
        )
    return most, tuple(ids or ())


def _constraint(body: Mapping[str, Any], constraints: Constraints) -> Constraint | None:
    """The constraint that a server of this sort would find in the request."""
    if constraints == "ignore":
        return None
    if constraints == "old":
        given = {name.removeprefix("guided_"): body[name] for name in _GUIDED if body.get(name) is not None}
        return _one_of(given) if given else None
    asked = body.get("structured_outputs")
    form = _from_response_format(body.get("response_format"))
    if constraints == "refuse":
        named = "structured_outputs" if asked is not None else "response_format" if form else None
        named = next((name for name in _GUIDED if body.get(name) is not None), named)
        if named:
            raise RefusedError(f"1 validation error:\n  {named}: Extra inputs are not permitted", named)
        return None
    if asked is not None and not isinstance(asked, dict):
        raise RefusedError(
            "1 validation error:\n  structured_outputs: Input should be a valid dictionary", "structured_outputs"
        )
    found = None if asked is None else _one_of({k: asked[k] for k in _CONSTRAINTS if asked.get(k) is not None})
    return form or found


def _from_response_format(value: object) -> Constraint | None:
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or kind not in ("text", "json_object", "json_schema"):
        raise RefusedError(
            "1 validation error:\n  response_format.type: Input should be 'text', 'json_object' or 'json_schema'",
            "response_format",
        )
    if kind == "text":
        return None
    if kind == "json_object":
        return _one_of({"json_object": True})
    wrapped = value.get("json_schema")
    if not isinstance(wrapped, dict):
        raise RefusedError(
            "When response_format type is 'json_schema', the 'json_schema' field must be provided.", "response_format"
        )
    return _one_of({"json": wrapped.get("schema") or {}})


def _one_of(given: Mapping[str, Any]) -> Constraint:
    """The one constraint among the given ones."""
    if len(given) > 1:
        names = ", ".join(given)
        raise RefusedError(
            f"You can only use one kind of structured outputs constraint but multiple are specified: {names}",
            "structured_outputs",
        )
    if not given:
        raise RefusedError(
            f"You must use one kind of structured outputs constraint ({', '.join(_CONSTRAINTS)}) "
            "but none are specified",
            "structured_outputs",
        )
    (name, value), *_ = given.items()
    if name == "json_object" and value is True:
        return Constraint("json", {"type": "object"})
    if name == "json" and isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RefusedError("Invalid JSON grammar specification.", "structured_outputs") from error
    if name == "json" and isinstance(value, dict):
        return Constraint("json", value)
    if name == "choice" and isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return Constraint("choice", value)
    if name in ("regex", "grammar") and isinstance(value, str) and value:
        return Constraint("regex" if name == "regex" else "grammar", value)
    if name == "structural_tag":
        raise RefusedError("structural_tag is not supported by this engine", "structured_outputs")
    needed = {"json": "a JSON schema", "json_object": "true", "choice": "a non-empty list of strings"}
    raise RefusedError(
        f"1 validation error:\n  structured_outputs.{name}: Input should be {needed.get(name, 'a non-empty string')}",
        "structured_outputs",
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
