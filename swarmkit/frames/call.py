"""A call of a verb, checked: who is asked, and with which request."""

from __future__ import annotations

import difflib
import inspect
import math
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..client import io_thread
from ..client.constraints import Dialect
from ..engine.columns import Columns
from ..engine.deadline import Deadline
from ..errors import SettingError
from ..pool.connect import use_pool
from ..pool.vllm_pool import VLLMPool, check_one_of
from ..records import MOST_LOGPROBS, Failure, Prompts, RequestSpec
from ..runs import progress
from ..runs.events import Listener
from ..runs.progress import Bar
from ..runs.run import OnError, Run
from ..runs.stats import RunStats
from ..schema import Schema
from ..store.folder import Folder
from ..store.reuse import Dedup, check_dedup
from ..store.reuse import run as run_with_reuse
from ..traces import shortened
from .conversations import read_examples, read_prefix
from .deadline import read_deadline
from .options import Sampling, ScatterOptions, TreeOptions
from .prompts import PromptLike, plain_scalar
from .signatures import VERBS, keywords
from .store import open_store

__all__ = ["SET_BY_SWARMKIT", "PreparedCall", "Send", "arguments", "is_whole", "read_options"]

SET_BY_SWARMKIT = ("model", "prompt", "messages", "n", "max_tokens", "stream", "stream_options", "stream_interval")
"""Fields of a request that ``extra_body`` must not hold."""

Send = Callable[
    [Prompts, Columns, Sequence[Listener], RunStats, Sequence[int] | None], Coroutine[Any, Any, Failure | None]
]
"""Sends a column of prompts, or some of its rows, and fills the columns; the failure of the last endpoint, if none is
left, or the deadline's."""

_MOST_PRIORITY = 2**63 - 1  # of vLLM's requests
_CONSTRAINTS = {*Dialect, "grammar"}  # fields that say what an answer must be
_DEFAULTS = {
    name: keyword.default
    for options in (ScatterOptions, TreeOptions)
    for name, (_, keyword) in keywords(options).items()
}
_SAMPLING = keywords(Sampling)


@dataclass(frozen=True, slots=True)
class PreparedCall:
    """A call whose keywords are checked, with its pool and the fields of its requests."""

    pool: VLLMPool
    owned: bool
    spec: RequestSpec
    progress: bool
    monitor: bool
    on_error: OnError
    store: Folder | None
    dedup: Dedup
    model: str | None = None
    deadline: Deadline | None = None
    priority: int = 0
    began: float = field(default_factory=time.time)
    """When, in seconds since 1970."""

    async def send(
        self,
        prompts: Prompts,
        columns: Columns,
        listeners: Sequence[Listener],
        stats: RunStats,
        pending: Sequence[int] | None = None,
    ) -> Failure | None:
        """Send a column of prompts; see ``Send``."""
        how: dict[str, Any] = {"store": self.store, "dedup": self.dedup}
        how |= {"deadline": self.deadline, "priority": self.priority}
        return await run_with_reuse(self.pool, prompts, self.spec, columns, listeners, pending, stats, **how)

    def listeners(self, label: str, stats: RunStats) -> list[Bar]:
        """The listeners of a run with this label: its bar, if one is shown."""
        return [Bar(label, stats)] if self.progress else []

    def shown(self, run: Run) -> Run:
        """Show a run in a monitor if this call asks for one, and return it."""
        run.has_store = self.store is not None
        if self.monitor:
            progress.show_monitor(run)
        return run

    async def aclose(self) -> None:
        """Close the pool, if it was made for this call."""
        if self.owned:
            await self.pool.close()

    def close(self) -> None:
        """``aclose``, for callers outside the I/O loop."""
        if self.owned:
            io_thread.call(self.pool.close())


def arguments(
    verb: Callable[..., Any], options: Mapping[str, object], prompt: PromptLike | None = None, out: str | None = None
) -> dict[str, Any]:
    """The keywords of a call of this verb, and the default of every keyword that the call does not give. Examples in a
    frame become those of ``prompt``, with the answers of the column ``out``, where that is no keyword.

    The result has the defaults of other verbs' keywords too, so that all calls are read alike.

    Raises
    ------
    TypeError
        A keyword that the verb does not take. The message suggests only keywords that it takes.
    """
    own = {n: p.default for n, p in inspect.signature(verb).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for name in options:
        if name not in own:
            raise shortened(TypeError(_refusal(verb.__name__, name, list(own))))
    numpy = {name: plain_scalar(value) for name, value in options.items() if isinstance(value, np.generic)}
    found = {**_DEFAULTS, **own, **options, **numpy}
    found["deadline"] = read_deadline(found["deadline"])  # first: the time of all that follows counts, too
    asked = prompt if found["messages"] is None else None
    found["examples"] = read_examples(found["examples"], asked, found["out"] if out is None else out)
    found["assistant_prefix"] = read_prefix(found["assistant_prefix"])
    return {**found, "schema": _read_schema(found)}


def _refusal(verb: str, name: str, taken: Sequence[str]) -> str:
    if (verb, name) == ("preview", "n"):
        return "preview takes no n=, which is samples: rows=3 says how many rows it shows"
    others = sorted(other for other, signature in VERBS.items() if name in signature.parameters)
    near = difflib.get_close_matches(name, taken, n=1, cutoff=0.8 if others else 0.6)
    hint = f" Did you mean {near[0]}=?" if near else ""
    if others:
        take = f"which {', '.join(others)} take{'s' if len(others) == 1 else ''}"
        listed = ", ".join(f"{t}=" for t in taken if t not in _SAMPLING)
        sampling = " and sampling parameters" if _SAMPLING.keys() & set(taken) else ""
        return f"{verb} takes no {name}=, {take}.{hint} It takes {listed}{sampling}"
    if name in SET_BY_SWARMKIT:
        return f"{name}= is not a keyword of {verb}: swarmkit sets this field of the request itself.{hint}"
    return f"{name}= is not known.{hint} What only your servers know goes through extra_body={{'{name}': ...}}"


def _read_schema(given: Mapping[str, Any]) -> Schema | None:
    """What an answer must be; None for any text."""
    named = [name for name in ("schema", "regex", "grammar") if given[name] is not None]
    if not named:
        return None
    if len(named) > 1:
        raise SettingError(f"{' and '.join(f'{n}=' for n in named)} were given: an answer is held to one of them")
    if not is_whole(given["schema_retries"], 0):
        raise SettingError(f"schema_retries={given['schema_retries']!r}: must be a whole number, 0 or more")
    if given["n"] != 1:
        raise SettingError(f"{named[0]}= works with one sample a row (n=1), not with n={given['n']}")
    make = {"schema": Schema.of, "regex": Schema.regex, "grammar": Schema.grammar}[named[0]]
    return make(given[named[0]])


def is_whole(value: object, least: int) -> bool:
    """Whether a value is a whole number, and not too small."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def read_options(given: Mapping[str, Any], aggregation: bool = False, by_row: bool = False) -> PreparedCall:
    """Check the values of a call's keywords, find its pool, and make the request of its rows.

    Parameters
    ----------
    given : mapping
        What ``arguments`` returns.
    aggregation : bool, default False
        Whether answers may have the pool's ``max_tokens_aggregation``.
    by_row : bool, default False
        Whether ``model=`` may be a column, so that the frame decides (``row_models``).

    Raises
    ------
    SettingError
        A value outside of what is allowed.
    """
    dedup, on_error = check_dedup(given["dedup"]), given["on_error"]
    if on_error not in ("column", "raise"):
        raise SettingError(f"on_error={on_error!r}: must be 'column' or 'raise'")
    params = _params(given)
    max_tokens = params.pop("max_completion_tokens", given["max_tokens"])  # the same, under its newer name
    delivery = given["delivery"]
    if params.get("prompt_logprobs") is not None:
        if delivery == "rows":
            raise SettingError("prompt_logprobs in extra_body needs delivery='batch': servers refuse it in streams")
        delivery = "batch"
    pool, owned = use_pool(given["pool"])
    model = given["model"]
    if model is not None and not by_row:
        pool = pool.by_model(model)
    if max_tokens is None and aggregation:
        max_tokens = pool.max_tokens_aggregation
    check_one_of("too_long", given["too_long"], ("error", "truncate", "truncate_left"))
    names = ("system", "mode", "chat", "n", "details", "thinking", "schema", "schema_retries", "too_long", "logprobs")
    fields = {name: given[name] for name in (*names, "examples", "assistant_prefix")}
    fields["conversations"] = given["messages"] is not None
    spec = pool.spec(max_tokens=max_tokens, params=params, delivery=delivery, **fields)
    store = None if given["store"] is None else open_store(given["store"])
    spec = replace(spec, counted=store is not None)
    if not (is_whole(priority := given["priority"], -_MOST_PRIORITY - 1) and priority <= _MOST_PRIORITY):
        raise SettingError(
            f"priority={priority!r}: must be a whole number of 64 bits at most; runs with a lower one go first"
        )
    monitor = bool(given["monitor"]) and progress.in_notebook()
    bar = progress.wanted(given["progress"]) and not (monitor and given["progress"] == "auto")
    return PreparedCall(pool, owned, spec, bar, monitor, on_error, store, dedup, model, given["deadline"], priority)


def _params(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request that go to the servers as they are: ``extra_body``, and sampling parameters."""
    if not isinstance(given["extra_body"], Mapping | None):
        raise SettingError(f"extra_body={given['extra_body']!r}: must be a dict of fields of the request")
    params = dict(given["extra_body"] or {})
    if clash := sorted(set(params) & set(SET_BY_SWARMKIT)):
        hint = ". Give the model as model=..." if "model" in clash else ""
        raise SettingError(f"extra_body must not hold {', '.join(clash)}: swarmkit sets these itself{hint}")
    if guided := [name for name in params if name.startswith("guided_")]:
        raise SettingError(
            f"{guided[0]} in extra_body is ignored by vLLM from 0.12 on. Use schema= (or regex=, grammar=), which "
            "finds out what the servers heed"
        )
    if given["schema"] and (clash := sorted(set(params) & _CONSTRAINTS)):
        raise SettingError(
            f"extra_body holds {', '.join(clash)}, and schema=, regex= or grammar= was given too: an answer is held to "
            "one of them"
        )
    params.update({name: given[name] for name in _SAMPLING if given[name] is not None})
    if given["thinking"] not in (None, True, False, "low", "medium", "high"):
        raise SettingError(f"thinking={given['thinking']!r}: must be True, False, 'low', 'medium' or 'high'")
    if (budget := given["thinking_tokens"]) is not None:
        if not is_whole(budget, 0):
            raise SettingError(f"thinking_tokens={budget!r}: must be a whole number of tokens, 0 or more")
        params["thinking_token_budget"] = budget
    if (logprobs := given["logprobs"]) is not None:
        if not is_whole(logprobs, 0) or logprobs > MOST_LOGPROBS:
            raise SettingError(
                f"logprobs={logprobs!r}: must be a whole number of likeliest tokens, 0 to {MOST_LOGPROBS}"
            )
        if clash := [name for name in ("logprobs", "top_logprobs") if name in params]:
            raise SettingError(f"extra_body must not hold {clash[0]} where logprobs= is given, which sets it")
    return {name: _plain(name, value) for name, value in params.items()}


def _plain(name: str, value: Any) -> Any:
    """A parameter as JSON has it: numpy's numbers and arrays become Python's."""
    if isinstance(value, np.ndarray):
        value = list(value)
    if isinstance(value, np.generic):
        value = plain_scalar(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}[{key!r}]", inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{name}[{place}]", inner) for place, inner in enumerate(value)]
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    what = repr(value) if isinstance(value, float) else f"a {type(value).__name__}"
    hint = ". Give a list: .tolist()" if hasattr(value, "tolist") else ""
    raise SettingError(
        f"{name}= is {what}, which cannot be sent: parameters are text, finite numbers, True, False, None, and lists "
        f"and dicts of these{hint}"
    )
