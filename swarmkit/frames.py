"""Step 7: the verbs on DataFrames."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, Unpack

import pandas as pd

from . import bridge
from .errors import ScatterInterrupted, warn
from .events import RowFailed, RowsDone, RowsReused, RunEvent
from .forest import Forest
from .options import Call, Options, read_options
from .prompts import PromptLike, make_prompts
from .run import Run
from .sheet import Sheet, text_column
from .stream import Stream

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
        Keywords of every verb that sends: see ``swarmkit.options.Options``.

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
    sheet = Sheet(df, prompt, out, n, details, only_missing)
    call = read_options(options, n, details)
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
    return await _started(submit, df, prompt, out=out, n=n, details=details, only_missing=only_missing, **options)


def iter_scatter(
    df: pd.DataFrame | Iterable[pd.DataFrame],
    prompt: PromptLike,
    *,
    out: str = "response",
    n: int = 1,
    details: bool = False,
    only_missing: bool = False,
    **options: Unpack[Options],
) -> Iterator[pd.DataFrame]:
    """Scatter, and yield finished rows as they finish; the parameters are those of ``scatter``.

    Parameters
    ----------
    df : DataFrame, or iterable of DataFrame
        One frame, or the pieces of one that memory does not hold: what ``pandas.read_csv`` and ``read_json`` give
        with ``chunksize=``, or a generator of yours.

    Yields
    ------
    pandas.DataFrame
        From one frame: one row or more, as ``scatter`` would return them, in the order they finished. Together
        they are all rows, each once. From several: what ``scatter`` would return for each, in their order. At
        most three of them are asked at once, so that the last rows of one do not keep the swarm waiting, and one
        more is read ahead. Leaving the loop early stops the run.

    Raises
    ------
    NoEndpointsError, ScatterInterrupted
        As for ``scatter``; from several frames, ``.frame`` has the rows of those under way.
    ScatterError
        Under ``on_error="raise"``; from several frames, as soon as one with failed rows is due, as ``.frame``.

    Examples
    --------
    Ten million rows, 20,000 at a time::

        for part in sk.iter_scatter(pd.read_json("in.jsonl", lines=True, chunksize=20_000), "{text}"):
            part.to_json("out.jsonl", orient="records", lines=True, mode="a")
    """
    if not isinstance(df, pd.DataFrame):
        yield from _iter_frames(df, lambda part: Sheet(part, prompt, out, n, details, only_missing),
                                read_options(options, n, details))  # fmt: skip
        return
    sheet = Sheet(df, prompt, out, n, details, only_missing)
    call = read_options(options, n, details)
    finished: queue.SimpleQueue[Sequence[int] | None] = queue.SimpleQueue()

    def listen(event: RunEvent) -> None:
        match event:
            case RowsDone(_, _, rows, _, _) if rows:
                finished.put(rows)
            case RowFailed(row, _, _):
                finished.put((row,))
            case RowsReused(rows, _):
                finished.put(rows)

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


def _iter_frames(
    frames: Iterable[pd.DataFrame], prepare: Callable[[pd.DataFrame], Sheet], call: Call
) -> Iterator[pd.DataFrame]:
    stream = Stream(frames, prepare, call)
    try:
        yield from stream
    except KeyboardInterrupt:
        raise ScatterInterrupted(
            "interrupted: the rows of the frames under way are in .frame of this error", stream.partial("interrupted")
        ) from None
    if stream.causes.count:
        warn(stream.causes.text(f"{stream.stats.rows:,} rows"))


async def _started(start: Callable[..., Run], *args: Any, **kwargs: Any) -> pd.DataFrame:
    """Start a run off the caller's loop, since connecting and making prompts may block, and await it.

    Cancelled before it has begun, it is cancelled as soon as it has.
    """
    starting = asyncio.ensure_future(asyncio.to_thread(start, *args, **kwargs))
    try:
        run = await asyncio.shield(starting)
    except asyncio.CancelledError:
        (await starting).cancel()
        raise
    return await run


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
        Keywords of every verb that sends: see ``swarmkit.options.Options``. ``max_tokens`` is the pool's
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
    forest = Forest(df, column, prompt, by, fanin, out, trace)
    return forest.start(read_options(options, aggregation=True)).finish()


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
    forest = Forest(df, column, prompt, by, fanin, out, trace)
    return await _started(lambda: forest.start(read_options(options, aggregation=True)))


# ---- broadcast, preview ------------------------------


def broadcast(prompt: str, **options: Unpack[Options]) -> pd.DataFrame:
    """Send one prompt to every endpoint.

    Parameters
    ----------
    prompt : str
        Sent as it is; nothing is filled in.
    **options
        Keywords of every verb that sends: see ``swarmkit.options.Options``.

    Returns
    -------
    pandas.DataFrame
        A row per endpoint: ``endpoint, response, response_error, latency_s``.
    """
    call = read_options(options)
    pool = call.pool
    try:
        answers = bridge.call(pool._broadcast(prompt, replace(call.ask, mode="single")))
    finally:
        if call.owned:
            bridge.call(pool.close())
    index = pd.RangeIndex(len(answers))
    frame = pd.DataFrame({"endpoint": text_column([e.name for e in pool.endpoints], index)})
    frame["response"] = text_column([a.text if a.success else None for a in answers], index)
    frame["response_error"] = text_column([a.error for a in answers], index)
    frame["latency_s"] = pd.Series([a.latency_s for a in answers], index, dtype="float64")
    return frame


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
    call = read_options(options)
    try:
        shown = bridge.call(call.pool.preview(prompts, call.ask))
    finally:
        if call.owned:
            bridge.call(call.pool.close())
    frame = pd.DataFrame({"sent": text_column([text for text, _ in shown], head.index)}, index=head.index)
    frame["tokens"] = pd.Series([count for _, count in shown], head.index, dtype="Int64")
    frame["error"] = text_column([prompts.errors.get(i) for i in range(len(head))], head.index)
    return frame
