"""Step 7: the verbs on DataFrames, and how answers become aligned columns."""

from __future__ import annotations

import difflib
import queue
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
import pandas as pd

from . import bridge, progress
from .connect import use_pool
from .errors import PromptError, SettingError
from .events import WATCHERS, Listener, RowFailed, RowsDone, RunEvent
from .patterns.tree_reduce import Node, check_fanin, reduce_groups, roots
from .prompts import PromptLike, fill, make_prompts, placeholders
from .records import Ask, Chat, Failure, Prompts, Response
from .results import Columns
from .run import OnError, Run
from .stats import RunStats
from .vllm_pool import VLLMPool

__all__ = [
    "Options",
    "ascatter",
    "atree_reduce",
    "broadcast",
    "iter_scatter",
    "preview",
    "scatter",
    "submit",
    "tree_reduce",
]

TEXT: Any = "str" if int(pd.__version__.split(".")[0]) >= 3 else object
"""The dtype of text columns: pandas' string dtype where it is the default, else object."""

_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "stop", "seed", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "min_tokens", "ignore_eos", "stop_token_ids", "user",
)  # fmt: skip
_OURS = ("model", "prompt", "messages", "n", "max_tokens", "stream", "stream_options", "stream_interval")
_DETAILS = ("finish_reason", "endpoint", "prompt_tokens", "completion_tokens", "latency_s", "attempts")


class Options(TypedDict, total=False):
    """Keywords of every verb that sends.

    Attributes
    ----------
    pool : VLLMPool or what ``connect`` takes
        Whom to ask; the default pool otherwise.
    system : str
        System prompt.
    mode : {"batch", "single"}
        Many prompts a request, or one.
    chat : "auto", (prefix, suffix), callable or None
        Overrides the pool's.
    delivery : {"auto", "rows", "batch"}
        Overrides the pool's.
    max_tokens : int
        Tokens a row may generate; overrides the pool's.
    progress : bool or "auto"
        Whether a bar is shown; "auto" (the default): in notebooks and terminals.
    on_error : {"column", "raise"}
        Whether failed rows only carry their error, or also raise at the end.
    extra_body : dict
        Further fields of the request, as the server knows them.
    temperature, top_p, top_k, min_p, stop, seed, presence_penalty, ... :
        Sampling parameters.
    """

    pool: Any
    system: str | None
    mode: Literal["batch", "single"]
    chat: Chat
    delivery: Literal["auto", "rows", "batch"]
    max_tokens: int
    progress: bool | Literal["auto"]
    on_error: OnError
    extra_body: dict[str, Any]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    stop: str | list[str]
    seed: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: dict[str, float]
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: list[int]
    user: str


@dataclass(frozen=True, slots=True)
class _Call:
    """What the keywords of a call come to."""

    pool: VLLMPool
    owned: bool
    ask: Ask
    progress: bool
    on_error: OnError

    def listeners(self, label: str) -> list[Listener]:
        return [WATCHERS["progress"](label)] if self.progress else []


def _call(options: Options, n: int = 1, details: bool = False, aggregation: bool = False) -> _Call:
    given: dict[str, Any] = dict(options)
    pool_like = given.pop("pool", None)
    show = given.pop("progress", "auto")
    on_error = given.pop("on_error", "column")
    if on_error not in ("column", "raise"):
        raise SettingError(f"on_error={on_error!r}: must be 'column' or 'raise'")
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise SettingError(f"n={n!r}: must be a whole number of samples, 1 or more")
    params = dict(given.pop("extra_body", None) or {})
    if clash := sorted(set(params) & set(_OURS)):
        raise SettingError(f"extra_body must not hold {', '.join(clash)}: swarmkit sets these itself")
    ours = {k: given.pop(k) for k in ("system", "mode", "chat", "delivery", "max_tokens") if k in given}
    for name in given:
        if name not in _SAMPLING:
            allowed = [*Options.__annotations__, "out", "details", "only_missing", "n", "by", "fanin", "trace"]
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f" Did you mean {near[0]}=?" if near else ""
            raise TypeError(
                f"{name}= is not known.{hint} What only your servers know goes through extra_body={{'{name}': ...}}"
            )
    params.update(given)
    pool, owned = use_pool(pool_like)
    if aggregation:
        ours.setdefault("max_tokens", pool.max_tokens_aggregation)
    return _Call(pool, owned, pool.ask(n=n, params=params, details=details, **ours), progress.wanted(show), on_error)


# ---- scatter ------------------------------


def scatter(
    df: pd.DataFrame,
    prompt: PromptLike,
    *,
    out: str = "response",
    n: int = 1,
    details: bool = False,
    only_missing: bool = False,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """Send one prompt per row through the swarm; get the frame back with the answers.

    Parameters
    ----------
    df : pandas.DataFrame
        The rows. Never changed.
    prompt : str, callable or Series
        A column's name, a template with ``{column}`` placeholders, a function of the row, or an aligned Series.
    out : str, default "response"
        Name of the column of answers; ``<out>_error`` stands beside it. Columns of these names are replaced.
    n : int, default 1
        Samples a row. With more than one each row appears ``n`` times in a row, under its own index label, told
        apart by ``<out>_sample``, 0 to n-1.
    details : bool, default False
        Adds ``<out>_finish_reason``, ``_endpoint``, ``_prompt_tokens``, ``_completion_tokens``, ``_latency_s``
        (seconds from sending the request to the row's last token) and ``_attempts`` (requests the row was part
        of); ``_reasoning`` where the server parses it out.
    only_missing : bool, default False
        Ask only the rows whose ``out`` is missing, and keep the other answers.
    **options
        Keywords of every verb that sends: see ``swarmkit.frames.Options``.

    Returns
    -------
    pandas.DataFrame
        A copy of ``df`` with the new columns, same index, same order. Text columns are pandas' string dtype
        (object on pandas 2), counts ``Int64``, times ``float64``. A row that failed has no answer and its error
        in ``<out>_error``.

    Raises
    ------
    UnknownColumnError, PromptError
        The prompt cannot be made.
    SettingError, TypeError
        A keyword, or its value, is not known.
    NoEndpointsError
        No endpoint is left; ``.frame`` has what had finished.
    ScatterInterrupted
        A ``KeyboardInterrupt``; ``.frame`` has what had finished.
    ScatterError
        Rows failed under ``on_error="raise"``; ``.frame`` has everything.

    Examples
    --------
    >>> import swarmkit, pandas as pd
    >>> df = pd.DataFrame({"gene": ["lacZ", "recA"]})
    >>> with swarmkit.local(1, engine="echo") as swarm:
    ...     pool = swarmkit.connect(swarm)
    ...     answers = swarmkit.scatter(df, "What does {gene} do?", max_tokens=32)
    >>> list(answers.columns)
    ['gene', 'response', 'response_error']
    """
    return submit(df, prompt, out=out, n=n, details=details, only_missing=only_missing, **options).finish()


def submit(
    df: pd.DataFrame,
    prompt: PromptLike,
    *,
    out: str = "response",
    n: int = 1,
    details: bool = False,
    only_missing: bool = False,
    **options: Unpack[Options],
) -> Run:
    """Start a scatter and return at once; the parameters are those of ``scatter``.

    Returns
    -------
    Run
        ``run.result()`` waits for the frame, ``run.partial()`` shows it so far, ``run.cancel()`` stops it;
        ``await run`` works too.
    """
    sheet = _Sheet(df, prompt, out, n, details, only_missing)
    call = _call(options, n, details)
    return sheet.start(call)


async def ascatter(
    df: pd.DataFrame,
    prompt: PromptLike,
    *,
    out: str = "response",
    n: int = 1,
    details: bool = False,
    only_missing: bool = False,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """``scatter`` for code that already awaits: same parameters, same result. Cancelling it stops the run."""
    run = await _off_loop(submit, df, prompt, out=out, n=n, details=details, only_missing=only_missing, **options)
    frame: pd.DataFrame = await run
    return frame


def iter_scatter(
    df: pd.DataFrame,
    prompt: PromptLike,
    *,
    out: str = "response",
    n: int = 1,
    details: bool = False,
    only_missing: bool = False,
    **options: Unpack[Options],
) -> Iterator[pd.DataFrame]:
    """Scatter, and yield finished rows as they finish; the parameters are those of ``scatter``.

    Yields
    ------
    pandas.DataFrame
        One row or more, as ``scatter`` would return them, in the order they finished. Together they are all
        rows, each once. Leaving the loop early stops the run.
    """
    sheet = _Sheet(df, prompt, out, n, details, only_missing)
    call = _call(options, n, details)
    finished: queue.SimpleQueue[Sequence[int] | None] = queue.SimpleQueue()

    def listen(event: RunEvent) -> None:
        match event:
            case RowsDone(_, _, rows, _, _) if rows:
                finished.put(rows)
            case RowFailed(row, _, _):
                finished.put((row,))

    if settled := sheet.settled_before():
        finished.put(settled)
    run = sheet.start(call, [listen])
    run._job.add_done_callback(lambda _: finished.put(None))
    over = False
    try:
        while not over:
            rows: list[int] = []
            got = finished.get()
            while got is not None:  # everything that is there already goes into one frame
                rows += got
                try:
                    got = finished.get_nowait()
                except queue.Empty:
                    break
            over = got is None
            if rows:
                yield sheet.frame("not finished", rows)
        run.result()
    finally:
        run.cancel()


async def _off_loop(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call what may block (connecting, making prompts) without blocking the caller's loop."""
    import asyncio

    return await asyncio.to_thread(function, *args, **kwargs)


class _Sheet:
    """A frame, its prompts, and the columns of answers that fill up beside it."""

    def __init__(
        self, df: pd.DataFrame, prompt: PromptLike, out: str, n: int, details: bool, only_missing: bool
    ) -> None:
        if not isinstance(out, str) or not out:
            raise SettingError(f"out={out!r}: must be a column's name")
        self.df = df
        self.out = out
        self.n = n
        self.details = details
        self.prompts = make_prompts(df, prompt)
        self.columns = Columns(len(df), n)
        self.pending: list[int] | None = None
        self.label = "scatter"
        if only_missing:
            self._keep_answers()

    def _keep_answers(self) -> None:
        if self.out not in self.df.columns:
            return  # nothing was answered yet: a first run
        if self.n > 1:
            raise SettingError("only_missing=True works with one sample a row (n=1)")
        there = self.df[self.out]
        if isinstance(there, pd.DataFrame):
            raise SettingError(f"several columns are named {self.out!r}; only_missing=True needs one")
        known = there.notna().to_numpy()
        answers = there.tolist()
        for row in np.flatnonzero(known).tolist():
            self.columns.text[row] = str(answers[row])
            self.prompts.errors.pop(row, None)
        self.pending = np.flatnonzero(~known).tolist()

    def settled_before(self) -> list[int]:
        """Rows that need no asking: kept answers, and rows without a prompt."""
        asked = range(self.columns.size) if self.pending is None else self.pending
        to_ask = {r for r in asked if self.prompts.texts[r] is not None}
        return [r for r in range(self.columns.size) if r not in to_ask]

    def start(self, call: _Call, listeners: Sequence[Listener] = ()) -> Run:
        heard = [*call.listeners(self.label), *listeners]

        async def work(stats: RunStats) -> Failure | None:
            try:
                return await call.pool.run(self.prompts, call.ask, self.columns, heard, self.pending, stats)
            finally:
                if call.owned:
                    await call.pool.close()

        self.names = [e.name for e in call.pool.endpoints]
        hint = f'Ask only these rows again: df.swarm.scatter(..., out="{self.out}", only_missing=True) on the result'
        return Run(self.label, work, self.frame, self._errors, call.on_error, hint)

    def _errors(self) -> list[tuple[object, str]]:
        rows = sorted(self.columns.errors)
        labels = self.df.index[rows].tolist()
        return [(label, self.columns.errors[row]) for label, row in zip(labels, rows, strict=True)]

    def frame(self, unfinished: str, rows: Sequence[int] | None = None) -> pd.DataFrame:
        """The frame with the answers so far; rows that have neither answer nor error get ``unfinished``."""
        columns, n, out = self.columns, self.n, self.out
        positions = np.arange(columns.size) if rows is None else np.asarray(rows, dtype=np.intp)
        base = self.df if rows is None else self.df.iloc[positions]
        if n > 1:
            base = base.iloc[np.repeat(np.arange(len(base)), n)]
        slots = (positions[:, None] * n + np.arange(n)).ravel()
        by_row = np.repeat(positions, n)
        texts = [columns.text[s] for s in slots]
        errors = [
            None if text is not None else columns.errors.get(row, unfinished)
            for row, text in zip(by_row.tolist(), texts, strict=True)
        ]
        new: dict[str, Any] = {out: _text(texts, base.index), f"{out}_error": _text(errors, base.index)}
        if n > 1:
            new[f"{out}_sample"] = pd.Series(np.tile(np.arange(n), len(positions)), base.index, dtype="Int64")
        if self.details:
            new.update(self._detail_columns(base.index, slots, by_row))
        result = base.copy()
        for name, values in new.items():
            if list(base.columns).count(name) > 1:
                result = result.loc[:, result.columns != name]
            result[name] = values
        return result

    def _detail_columns(self, index: pd.Index, slots: np.ndarray, rows: np.ndarray) -> dict[str, pd.Series]:
        columns, out = self.columns, self.out
        names = self.names
        answered = [columns.endpoint[r] for r in rows.tolist()]
        found: dict[str, pd.Series] = {
            "finish_reason": _text([columns.finish_reason[s] for s in slots], index),
            "endpoint": _text([names[e] if e >= 0 else None for e in answered], index),
            "prompt_tokens": _counts(np.asarray(columns.prompt_tokens)[slots], index),
            "completion_tokens": _counts(np.asarray(columns.completion_tokens)[slots], index),
            "latency_s": pd.Series(np.asarray(columns.latency_s)[rows], index, dtype="float64"),
            "attempts": pd.Series(np.frombuffer(columns.attempts, np.uint8)[rows], index).astype("Int64"),
        }
        if columns.reasoning:
            found["reasoning"] = _text([columns.reasoning.get(s) for s in slots.tolist()], index)
        return {f"{out}_{name}": values for name, values in found.items()}


def _text(values: Sequence[str | None], index: pd.Index) -> pd.Series:
    return pd.Series(values, index=index, dtype=TEXT)


def _counts(values: np.ndarray, index: pd.Index) -> pd.Series:
    return pd.Series(pd.arrays.IntegerArray(values.astype("int64"), values < 0), index=index)


# ---- tree_reduce ------------------------------


def tree_reduce(
    df: pd.DataFrame,
    column: str,
    prompt: str,
    *,
    by: Any = None,
    fanin: int | Literal["auto"] = "auto",
    out: str = "response",
    trace: bool = False,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """Merge a column of texts into one answer a group, level by level.

    Parameters
    ----------
    df : pandas.DataFrame
        The rows. Never changed.
    column : str
        The column of texts; missing ones are counted and not sent.
    prompt : str
        Template of the merging prompt: ``{responses}`` is where the texts go, and must be in it; ``{level}`` (1
        for the nodes above the leaves) and the group's keys may be.
    by : column, or list of columns, optional
        What ``groupby`` takes as names: keys come back as columns, sorted, rows with a missing key dropped.
    fanin : int or "auto", default "auto"
        Texts a node merges: a number of 2 or more, or as many as the model's context holds.
    out : str, default "response"
        Name of the column of answers.
    trace : bool, default False
        Return the whole tree instead.
    **options
        Keywords of every verb that sends: see ``swarmkit.frames.Options``. ``max_tokens`` is the pool's
        ``max_tokens_aggregation`` unless given.

    Returns
    -------
    pandas.DataFrame
        A row per group (one row without ``by``): the keys, ``out``, ``<out>_error``, ``n_leaves`` (texts in the
        answer), ``n_levels`` (0 where there was one text, which is returned as it is) and ``n_missing`` (texts
        that were missing or got lost with a failed node). With ``trace`` a row per node: the keys, ``node,
        parent, level, group, n_leaves, response, error, shortened``.

    Raises
    ------
    UnknownColumnError, PromptError
        ``column``, ``by`` or a placeholder does not exist, or ``{responses}`` is missing.
    SettingError
        ``fanin`` is neither "auto" nor 2 or more.
    NoEndpointsError, ScatterInterrupted, ScatterError
        As for ``scatter``.

    Examples
    --------
    >>> import swarmkit, pandas as pd
    >>> df = pd.DataFrame({"group": ["a", "a", "b"], "note": ["x", "y", "z"]})
    >>> with swarmkit.local(1, engine="echo") as swarm:
    ...     pool = swarmkit.connect(swarm)
    ...     top = swarmkit.tree_reduce(df, "note", "Merge:\\n{responses}", by="group", fanin=2)
    >>> top[["group", "n_leaves", "n_levels"]].values.tolist()
    [['a', 2, 1], ['b', 1, 0]]
    """
    forest = _Forest(df, column, prompt, by, fanin, out, trace)
    return forest.start(_call(options, aggregation=True)).finish()


async def atree_reduce(
    df: pd.DataFrame,
    column: str,
    prompt: str,
    *,
    by: Any = None,
    fanin: int | Literal["auto"] = "auto",
    out: str = "response",
    trace: bool = False,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """``tree_reduce`` for code that already awaits: same parameters, same result."""
    forest = _Forest(df, column, prompt, by, fanin, out, trace)
    call = await _off_loop(_call, options, aggregation=True)
    frame: pd.DataFrame = await forest.start(call)
    return frame


class _Forest:
    """A tree per group, growing."""

    def __init__(self, df: pd.DataFrame, column: str, prompt: str, by: Any, fanin: Any, out: str, trace: bool) -> None:
        self.fanin = check_fanin(fanin)
        self.prompt = prompt
        self.out = out
        self.trace = trace
        self.keys = [] if by is None else list(by) if isinstance(by, list) else [by]
        for name in (column, *self.keys):
            if name not in df.columns:
                placeholders("{" + str(name) + "}", df.columns)  # raises, naming the nearest
        self.groups: list[tuple[Any, ...]] = []
        self.leaves: list[list[str]] = []
        self.missing: list[int] = []
        parts: Iterable[tuple[Any, pd.DataFrame]] = (
            [((), df)] if by is None else df.groupby(self.keys, sort=True, dropna=True, observed=True)
        )
        for key, part in parts:
            texts = make_prompts(part, column)
            self.groups.append(tuple(key))
            self.leaves.append([t for t in texts.texts if t is not None])
            self.missing.append(len(texts.errors))
        self._check_prompt()
        self.nodes: list[Node] = []

    def _check_prompt(self) -> None:
        names = [name for _, name, _ in placeholders(self.prompt, ["responses", "level", *self.keys])]
        if "responses" not in names:
            raise PromptError("the prompt of a tree_reduce must hold {responses}: that is where the texts go")

    def _render(self, group: int, level: int, responses: str) -> str:
        keys = {str(k): v for k, v in zip(self.keys, self.groups[group], strict=True)}
        return fill(self.prompt, {**keys, "responses": responses, "level": str(level)})

    def start(self, call: _Call) -> Run:
        async def ask(prompts: list[str], level: int) -> list[Response]:
            columns = Columns(len(prompts))
            listeners = call.listeners(f"tree_reduce level {level}")
            failure = await call.pool.run(Prompts(list(prompts)), call.ask, columns, listeners, None, stats_of[0])
            if failure is not None:
                raise _NoneLeft(failure)
            return columns.responses()

        stats_of: list[RunStats] = []

        async def work(stats: RunStats) -> Failure | None:
            stats_of.append(stats)
            try:
                if any(len(texts) > 1 for texts in self.leaves):
                    fanin = None if self.fanin == "auto" else self.fanin
                    room = await self._room(call)
                    await reduce_groups(self.leaves, ask, self._render, fanin=fanin, room=room, nodes=self.nodes)
                else:
                    await reduce_groups(self.leaves, ask, self._render, fanin=2, nodes=self.nodes)
            except _NoneLeft as exc:
                return exc.failure
            finally:
                if call.owned:
                    await call.pool.close()
            return None

        return Run("tree_reduce", work, self.frame, self._errors, call.on_error)

    async def _room(self, call: _Call) -> int | None:
        """Characters that the children of a node may have together, next to the rest of its prompt."""
        samples = [text for texts in self.leaves for text in texts]
        room = await call.pool.prompt_room(call.ask, samples[:: max(1, len(samples) // 64)])
        if room is None:
            return None
        rest = max(len(self._render(g, 1, "")) for g in range(len(self.groups)))
        return max(64, room - rest)

    def _errors(self) -> list[tuple[object, str]]:
        frame = self._tops("not finished")
        labels = frame[self.keys].itertuples(index=False, name=None) if self.keys else [("all",)] * len(frame)
        errors = frame[f"{self.out}_error"]
        return [(key, error) for key, error in zip(labels, errors, strict=True) if isinstance(error, str)]

    def frame(self, unfinished: str) -> pd.DataFrame:
        return self._trace() if self.trace else self._tops(unfinished)

    def _key_columns(self, groups: Sequence[int]) -> dict[Any, Any]:
        return {k: [self.groups[g][i] for g in groups] for i, k in enumerate(self.keys)}

    def _tops(self, unfinished: str) -> pd.DataFrame:
        count = len(self.groups)
        tops = roots(self.nodes, count)
        failed: dict[int, str] = {n.group: n.error for n in self.nodes if n.error is not None}
        errors: list[str | None] = []
        for g, top in enumerate(tops):
            if top is not None:
                errors.append(None)
            elif not self.leaves[g]:
                errors.append("there was no text to merge: all values are missing")
            else:
                errors.append(failed.get(g, unfinished))
        index = pd.RangeIndex(count)
        frame = pd.DataFrame(self._key_columns(range(count)), index=index)
        frame[self.out] = _text([top.response if top else None for top in tops], index)
        frame[f"{self.out}_error"] = _text(errors, index)
        n_leaves = [top.n_leaves if top else 0 for top in tops]
        frame["n_leaves"] = pd.Series(n_leaves, index, dtype="Int64")
        frame["n_levels"] = pd.Series([top.level if top else 0 for top in tops], index, dtype="Int64")
        lost = [m + len(self.leaves[g]) - n_leaves[g] for g, m in enumerate(self.missing)]
        frame["n_missing"] = pd.Series(lost, index, dtype="Int64")
        return frame

    def _trace(self) -> pd.DataFrame:
        nodes = self.nodes
        index = pd.RangeIndex(len(nodes))
        frame = pd.DataFrame(self._key_columns([n.group for n in nodes]), index=index)
        for name in ("node", "parent", "level", "group", "n_leaves"):
            frame[name] = pd.Series([getattr(n, name) for n in nodes], index, dtype="Int64")
        frame["response"] = _text([n.response for n in nodes], index)
        frame["error"] = _text([n.error for n in nodes], index)
        frame["shortened"] = pd.Series([n.shortened for n in nodes], index, dtype="bool")
        return frame


class _NoneLeft(Exception):  # noqa: N818 - carries a failure out of the levels of a tree
    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.describe())
        self.failure = failure


# ---- broadcast, preview ------------------------------


def broadcast(prompt: str, **options: Unpack[Options]) -> pd.DataFrame:
    """Send one prompt to every endpoint.

    Parameters
    ----------
    prompt : str
        Sent as it is; nothing is filled in.
    **options
        Keywords of every verb that sends: see ``swarmkit.frames.Options``.

    Returns
    -------
    pandas.DataFrame
        A row per endpoint: ``endpoint, response, response_error, latency_s``.
    """
    call = _call(options)
    pool = call.pool
    try:
        answers = bridge.call(pool._broadcast(prompt, _single(call.ask)))
    finally:
        if call.owned:
            bridge.call(pool.close())
    index = pd.RangeIndex(len(answers))
    frame = pd.DataFrame({"endpoint": _text([e.name for e in pool.endpoints], index)})
    frame["response"] = _text([a.text if a.success else None for a in answers], index)
    frame["response_error"] = _text([a.error for a in answers], index)
    frame["latency_s"] = pd.Series([a.latency_s for a in answers], index, dtype="float64")
    return frame


def _single(ask: Ask) -> Ask:
    from dataclasses import replace

    return replace(ask, mode="single")


def preview(df: pd.DataFrame, prompt: PromptLike, n: int = 3, **options: Unpack[Options]) -> pd.DataFrame:
    """Show what would be sent for the first rows, template and all, before anything is generated.

    Parameters
    ----------
    df : pandas.DataFrame
        The rows.
    prompt : str, callable or Series
        As for ``scatter``.
    n : int, default 3
        Rows to show.
    **options
        As for ``scatter``.

    Returns
    -------
    pandas.DataFrame
        Index of the first ``n`` rows; ``sent`` (the text as it goes out), ``tokens`` (as the server counts them;
        missing where it does not) and ``error`` (why a row would not be sent).
    """
    head = df.iloc[:n]
    prompts = make_prompts(head, prompt.iloc[:n] if isinstance(prompt, pd.Series) else prompt)
    call = _call(options)
    try:
        shown = bridge.call(call.pool.preview(prompts, call.ask))
    finally:
        if call.owned:
            bridge.call(call.pool.close())
    frame = pd.DataFrame({"sent": _text([text for text, _ in shown], head.index)}, index=head.index)
    frame["tokens"] = pd.Series([count for _, count in shown], head.index, dtype="Int64")
    frame["error"] = _text([prompts.errors.get(i) for i in range(len(head))], head.index)
    return frame
