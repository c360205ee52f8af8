"""Batch files: lines of requests as the OpenAI Batch API and ``vllm run-batch`` take them, and lines of answers.

Lines that differ only in what they ask are one scatter. A chat of one turn, maybe after a system prompt that other
lines share, goes out as a prompt, which may stand in a list with others; chats of more turns go out as conversations.
Fields that do not act alike on every route keep a line on the route that it names. So a line is asked as it says, or
not at all: then its answer is an error.
"""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from ..engine.columns import Columns
from ..errors import SettingError
from ..frames.call import PreparedCall, Send, arguments, read_options
from ..frames.options import Sampling
from ..frames.scatter import ScatterFrame
from ..frames.verbs import scatter
from ..pool.vllm_pool import VLLMPool
from ..records import Failure, FailureKind
from ..runs.events import Listener
from ..runs.run import Run
from ..runs.stats import RunStats
from ..text import printable
from .formats import format_of, opened

__all__ = ["SMALL_GROUPS", "AskedLines", "BatchFile", "why_no_batch_file"]

SMALL_GROUPS = 64
"""Groups of lines that run at once where they are small: lines may differ in all their parameters."""
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
_ANYWHERE = {*Sampling.__annotations__, "chat_template_kwargs"}  # fields that act alike on all routes
_CONSTRAINTS = {"response_format", "structured_outputs"}  # these act alike on both routes of chats
_MORE_THAN_TEXT = ("tools", "functions", "prompt_logprobs", "return_token_ids", "audio", "modalities")
_SHARED = 8  # lines for which it pays to learn the chat template with their system prompt
_COMPLETION_TOKENS = 16  # the protocol's default for completions; chats go on to the end of the context
_SEEN = 10  # lines by which a batch file is known


def why_no_batch_file(file: Path, form: str | None = None) -> str:
    """Why a file is not one of batch lines, by its first lines; "" if it is. ``form`` goes before its suffix."""
    if (form or format_of(file)) != "jsonl":
        return "its name does not end in .jsonl"
    try:
        with opened(file) as lines:
            seen = [_read(0, "", text) for text in itertools.islice(lines, _SEEN) if not text.isspace()]
    except (ValueError, EOFError):
        return "it cannot be read as text"
    if any(line.custom_id is not None for line in seen):
        return ""
    return f"of its first line, {seen[0].problem.removeprefix('its ')}" if seen else "it is empty"


class BatchFile:
    """The lines of batch files, read twice: to be counted, and to be asked.

    Parameters
    ----------
    files : sequence of Path
        Files of JSON lines.

    Attributes
    ----------
    rows : int
        Lines that are not blank; each gets a line in the output.
    notes, types
        As those of a ``Source``; empty.
    unlimited : int
        Chats without a limit of tokens that got the pool's, since no server reports its context.

    Raises
    ------
    SettingError
        A file cannot be read.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.notes: list[str] = []
        self.types: dict[str, Any] = {}
        self.unlimited = 0
        self._done: dict[int, list[Any]] = {}  # lines of the output that wait for earlier ones
        self._next = 0
        try:
            self.rows = sum(1 for _ in self._texts())
        except (OSError, ValueError, EOFError) as exc:
            raise SettingError(f"cannot read {', '.join(map(str, files))}: {exc}") from exc

    def _texts(self) -> Iterator[tuple[str, str]]:
        for file in self.files:
            of = f" of {file}" if len(self.files) > 1 else ""
            with opened(file) as lines:
                yield from ((f"line {n}{of}", text) for n, text in enumerate(lines, 1) if not text.isspace())

    def asked(self, pool: VLLMPool, rows: int, **options: Any) -> Iterator[AskedLines]:
        """What is to be asked: the groups of lines that can be asked together, of ``rows`` lines at a time.

        Parameters
        ----------
        pool : VLLMPool
            Who is asked.
        rows : int
            Lines that are read at a time.
        **options
            ``model``, in place of that of the lines; ``max_tokens`` of lines that name none; ``mode``.
        """
        texts = enumerate(self._texts())
        while chunk := list(itertools.islice(texts, rows)):
            lines = [_read(order, where, text) for order, (where, text) in chunk]
            self._refuse([line for line in lines if line.problem])
            for group in _groups([line for line in lines if not line.problem]):
                try:
                    found = self._prepared(group, pool, **options)
                except SettingError as exc:
                    self._refuse([replace(line, problem=str(exc)) for line in group])
                else:
                    yield found

    def _prepared(
        self, group: Sequence[_Line], pool: VLLMPool, model: str | None, max_tokens: int | None, mode: str | None
    ) -> AskedLines:
        first, own = group[0], dict(group[0].options)
        named = own.pop("model", None)
        if model is None and named is not None:
            pool = pool.by_model(named)
        if len(group) < pool.size:  # the first row of a run goes to the first endpoint
            start = first.order % pool.size
            pool = pool.select([*range(start, pool.size), *range(start)])
        if own.setdefault("max_tokens", max_tokens) is None:
            most = _COMPLETION_TOKENS if first.url == COMPLETION else _context(pool)
            self.unlimited += len(group) if most is None else 0
            own["max_tokens"] = most
        if mode is not None:
            own.setdefault("mode", mode)
        own |= {"chat": "auto" if first.url == CHAT else None, "details": True, "progress": False, "pool": pool}
        own |= {"messages": "messages"} if first.prompt is None else {"system": first.system}
        given = arguments(scatter, own)
        return AskedLines(group, given, read_options(given))

    def _refuse(self, lines: Iterable[_Line]) -> None:
        for line in lines:
            message = f"{line.where}: {line.problem}"
            self._done[line.order] = _written(line, None, {"code": "invalid_request", "message": message})

    def answers(self, frames: Iterable[pd.DataFrame]) -> Iterator[tuple[pd.DataFrame, pd.Series]]:
        """The lines of the output in the order of the input, as soon as all before them are there; and the errors."""
        for frame in frames:
            self._done.update(zip(frame.index.tolist(), frame.to_numpy().tolist(), strict=True))
            yield from self._ready()
        yield from self._ready(rest=True)

    def _ready(self, rest: bool = False) -> Iterator[tuple[pd.DataFrame, pd.Series]]:
        ready = []
        while self._next in self._done:
            ready.append(self._done.pop(self._next))
            self._next += 1
        if rest:  # what an early end has left
            ready += [self._done.pop(order) for order in sorted(self._done)]
        if ready:
            frame = pd.DataFrame(ready, columns=_WRITTEN, dtype=object).set_index("line")
            errors = frame["error"].dropna().to_dict().items()
            found = {_number(str(where)): error["message"].removeprefix(f"{where}: ") for where, error in errors}
            yield frame, pd.Series(found, dtype=object)


def _number(where: str) -> int | str:
    """The number of a line, where that is all that names it."""
    number = where.removeprefix("line ")
    return int(number) if number.isdecimal() else where


_WRITTEN = ["line", "id", "custom_id", "response", "error"]


def _written(line: _Line, response: Mapping[str, Any] | None, error: Mapping[str, Any] | None) -> list[Any]:
    """A line of the output, after the name of the line that it answers."""
    return [line.where, f"batch_req_{uuid.uuid4().hex}", line.custom_id, response, error]


def _context(pool: VLLMPool) -> int | None:
    """Tokens of prompt and answer together at every endpoint; None where that is not known."""
    known = (pool._core.infos.get(e.url) for e in pool.endpoints)
    contexts = (pool.model_max_context or info.context_of(pool.model or "") for info in known if info)
    return min(filter(None, contexts), default=None)


# ---- reading ------------------------------


@dataclass(slots=True)
class _Line:
    """A line of the input.

    ``order`` counts all lines from 0, ``where`` names it. ``prompt`` is the text that is asked where that is all, but
    for ``system``; else ``turns`` are the messages. ``options`` are the keywords of its scatter. ``problem`` says why
    it cannot be asked.
    """

    order: int
    where: str
    custom_id: Any = None
    url: str = ""
    prompt: str | None = None
    system: str | None = None
    turns: Sequence[Any] = ()
    options: dict[str, Any] = field(default_factory=dict)
    alike: str = ""  # the same for lines that differ only in what they ask
    problem: str = ""


def _read(order: int, where: str, text: str) -> _Line:
    line = _Line(order, where)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as exc:
        line.problem = f"it is not JSON ({exc})"
        return line
    if not isinstance(record, dict):
        line.problem = f"it is not a JSON object, but {_shown(record)}"
        return line
    line.custom_id = record.get("custom_id")
    line.problem = _fill(line, record)
    line.alike = json.dumps([line.url, line.options], sort_keys=True)
    return line


def _fill(line: _Line, record: Mapping[str, Any]) -> str:
    """Fill in what a line asks; what is wrong with it, or ""."""
    method, url, body = record.get("method", "POST"), record.get("url"), record.get("body")
    if not isinstance(line.custom_id, str):
        return f"its custom_id is {_shown(line.custom_id)}; it must be a text, by which its answer is known"
    if method != "POST":
        return f"its method is {_shown(method)}; only POST can be asked"
    if url not in (CHAT, COMPLETION):
        return f"its url is {_shown(url)}; {CHAT} and {COMPLETION} can be asked"
    if not isinstance(body, dict):
        return f"its body is {_shown(body)}; it must be an object, the request"
    line.url = url
    rest = {name: value for name, value in body.items() if value is not None}
    if rest.pop("stream", False):
        return "its body has stream=true, and a file holds no streams; leave that out"
    for name in _MORE_THAN_TEXT:
        if rest.get(name) and not (name == "tools" and rest.get("tool_choice") == "none"):
            return f"its body has {name}, whose answers are more than texts, which alone are written; leave that out"
    if url == CHAT:
        turns = rest.pop("messages", None)
        if not isinstance(turns, list) or not turns:
            return f"its messages are {_shown(turns)}; they must be a list of messages"
        line.turns = turns
    else:
        prompt = rest.pop("prompt", None)
        line.prompt = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
        if not isinstance(line.prompt, str):
            return f"its prompt is {_shown(prompt)}; it must be one text"
    line.options = _options(rest, url)
    if not line.options["extra_body"].keys() - _ANYWHERE and url == CHAT:
        line.system, line.prompt = _one_turn(line.turns)
    return ""


def _options(rest: dict[str, Any], url: str) -> dict[str, Any]:
    """The fields of a body as keywords of a scatter; those that it does not know go to the servers as they are."""
    found: dict[str, Any] = {name: rest.pop(name) for name in ("model", "n", "max_tokens") if name in rest}
    if url == CHAT:
        if "max_completion_tokens" in rest:
            found["max_tokens"] = rest.pop("max_completion_tokens")
        if isinstance(rest.get("logprobs"), bool) and rest.pop("logprobs"):
            found["logprobs"] = rest.pop("top_logprobs", 0)
    elif "logprobs" in rest:
        found["logprobs"] = rest.pop("logprobs")
    if others := rest.keys() - _ANYWHERE:
        if url == COMPLETION:
            found["delivery"] = "batch"  # servers refuse some of them in streams
        elif others - _CONSTRAINTS:
            found["mode"] = "single"
    return {**found, "extra_body": rest}


def _one_turn(turns: Sequence[Any]) -> tuple[str | None, str | None]:
    """The system prompt and the prompt of a chat that has no more; (None, None) for another."""
    plain = [t for t in turns if isinstance(t, dict) and t.keys() == {"role", "content"}]
    match [(t["role"], t["content"]) for t in plain]:
        case [("user", str(prompt))] if len(turns) == 1 and prompt.strip():
            return None, prompt
        case [("system", str(system)), ("user", str(prompt))] if len(turns) == 2 and prompt.strip():
            return system, prompt
    return None, None


def _groups(lines: Sequence[_Line]) -> Iterable[list[_Line]]:
    """The lines that can be asked together."""
    sharing = Counter((line.alike, line.system) for line in lines)
    groups: dict[tuple[str, str | None, bool], list[_Line]] = {}
    for line in lines:
        if line.system is not None and sharing[line.alike, line.system] < _SHARED:
            line.prompt = line.system = None
        groups.setdefault((line.alike, line.system, line.prompt is None), []).append(line)
    return groups.values()


def _shown(value: Any) -> str:
    return "missing" if value is None else printable(json.dumps(value, ensure_ascii=False), 60)


# ---- asking ------------------------------


class AskedLines(ScatterFrame):
    """Lines that are asked together, as a frame of prompts or of conversations.

    Parameters
    ----------
    lines : sequence of _Line
        They differ only in what they ask.
    given : mapping
        The keywords of the scatter.
    call : PreparedCall
        The same, checked.
    """

    def __init__(self, lines: Sequence[_Line], given: Mapping[str, Any], call: PreparedCall) -> None:
        self._lines, self._own = lines, call
        name = "messages" if lines[0].prompt is None else "prompt"
        asked = [line.turns if line.prompt is None else line.prompt for line in lines]
        frame = pd.DataFrame({name: pd.Series(asked, [line.order for line in lines], dtype=object)})
        super().__init__(frame, None if name == "messages" else name, given)

    def start(self, call: PreparedCall, listeners: Sequence[Listener] = ()) -> Run:
        """Start a run of these lines, with the store of ``call``."""
        own: dict[str, Any] = {"store": call.store, "deadline": call.deadline, "priority": call.priority}
        return super().start(replace(self._own, **own), listeners)

    async def _send(self, send: Send, listeners: Sequence[Listener], stats: RunStats) -> Failure | None:
        """Send them. Settings that a server refuses cost these lines only."""
        try:
            return await super()._send(send, listeners, stats)
        except SettingError as exc:
            for row in list(self.columns.missing()):
                self.columns.fail(row, str(exc))
                stats.failed += 1
            return None

    def frame(self, unfinished: str, rows: Sequence[int] | None = None) -> pd.DataFrame:
        """The lines of the output so far, by the order of the input."""
        rows = range(self.columns.size) if rows is None else rows
        written = [self._written(row, unfinished) for row in rows]
        return pd.DataFrame(written, self.index[list(rows)], _WRITTEN, dtype=object)

    def _written(self, row: int, unfinished: str) -> list[Any]:
        line, columns, n = self._lines[row], self.columns, self.n
        if row in columns.errors:
            code = "invalid_request" if row in self.prompts.errors else "request_failed"
            return _written(line, None, {"code": code, "message": columns.errors[row]})
        slots = range(row * n, row * n + n)
        if any(columns.text[slot] is None for slot in slots):
            why = columns.error(row, unfinished)
            code = "batch_expired" if unfinished.startswith(FailureKind.DEADLINE) else "batch_cancelled"
            return _written(line, None, {"code": code, "message": why})
        chat = line.url == CHAT
        body = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": self._own.spec.model,
            "choices": [_choice(columns, slot, k, chat) for k, slot in enumerate(slots)],
            "usage": _usage(columns, slots),
        }
        return _written(line, {"status_code": 200, "request_id": f"req_{uuid.uuid4().hex}", "body": body}, None)


def _choice(columns: Columns, slot: int, number: int, chat: bool) -> dict[str, Any]:
    text, tokens = columns.text[slot], columns.token_logprobs.get(slot)
    end = {"logprobs": tokens and _logprobs(tokens, chat), "finish_reason": columns.finish_reason[slot]}
    if not chat:
        return {"index": number, "text": text, **end}
    reasoning = {"reasoning": columns.reasoning[slot]} if slot in columns.reasoning else {}
    return {"index": number, "message": {"role": "assistant", "content": text, **reasoning}, **end}


def _usage(columns: Columns, slots: Sequence[int]) -> dict[str, int] | None:
    """The tokens of a line's answer; None where its server did not count them."""
    prompt, answers = columns.prompt_tokens[slots[0]], [columns.completion_tokens[slot] for slot in slots]
    if prompt < 0 or min(answers) < 0:
        return None
    return {"prompt_tokens": prompt, "completion_tokens": sum(answers), "total_tokens": prompt + sum(answers)}


def _logprobs(tokens: Sequence[Mapping[str, Any]], chat: bool) -> dict[str, Any]:
    """The tokens of an answer, in the shape of its route."""
    if chat:
        return {
            "content": [
                {**_token(t["token"], t["logprob"]), "top_logprobs": list(itertools.starmap(_token, t["top"].items()))}
                for t in tokens
            ]
        }
    texts = [t["token"] for t in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [t["logprob"] for t in tokens],
        "top_logprobs": [t["top"] for t in tokens],
        "text_offset": list(itertools.accumulate(map(len, texts[:-1]), initial=0)),
    }


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": None}
