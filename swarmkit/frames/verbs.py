"""The verbs on DataFrames."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, Unpack

import pandas as pd

from ..client import io_thread
from ..errors import ScatterInterrupted, SettingError, warn
from ..runs.events import RowFailed, RowsDone, RowsReused, RunEvent
from ..runs.run import RUN_AGAIN, Run, awaited, finished, started
from ..text import plural
from .answers import TypedAnswers
from .call import PreparedCall, arguments, is_whole, read_options
from .chunks import ChunkedScatter
from .conversations import row_prompts
from .look import Preview
from .options import BroadcastOptions, PreviewOptions, ScatterOptions, TreeOptions
from .prompts import PromptLike, check_frame
from .scatter import ScatterFrame
from .signatures import takes
from .tree_reduce import ReductionTrees
from .typed import text_column

__all__ = ["ascatter", "atree_reduce", "broadcast", "iter_scatter", "preview", "scatter", "submit", "tree_reduce"]

# ---- scatter ------------------------------


@takes(ScatterOptions)
def scatter(df: pd.DataFrame, prompt: PromptLike | None = None, **options: Unpack[ScatterOptions]) -> pd.DataFrame:
    """Send one prompt per row through the swarm; get the frame back with the answers.

    Parameters
    ----------
    df : pandas.DataFrame
        The rows. Never changed.
    prompt : str, callable or Series, optional
        A column's name, a template with ``{column}`` placeholders, a function of the row, or an aligned Series. Not
        with ``messages``.

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
        A keyword that ``scatter`` does not take, or a value that is not allowed.
    NoEndpointsError
        No endpoint is left; ``.frame`` has the rows that had finished.
    ScatterInterrupted
        A ``KeyboardInterrupt``; ``.frame`` has the rows that had finished.
    ScatterError
        Rows failed under ``on_error="raise"``; ``.frame`` has all rows.

    Examples
    --------
    >>> df.swarm.scatter("What does {gene} do?", max_tokens=32)[["gene", "response"]]
       gene                  response
    0  lacZ  echo: What does lacZ do?
    1  recA  echo: What does recA do?
    >>> list(df.swarm.scatter("Describe {gene}.", out="text", store="runs/a").columns)
    ['gene', 'text', 'text_error']
    """
    return finished(lambda: _start_scatter(scatter, df, prompt, options))


@takes(ScatterOptions, like=scatter)
def submit(df: pd.DataFrame, prompt: PromptLike | None = None, **options: Unpack[ScatterOptions]) -> Run:
    """Start a scatter and return at once.

    Returns
    -------
    Run
        ``run.result()`` waits for the frame, ``run.partial()`` shows it so far, ``run.cancel()`` stops it;
        ``await run`` works too.

    Examples
    --------
    >>> run = df.swarm.submit("What does {gene} do?")
    >>> run.result()["response"].tolist()
    ['echo: What does lacZ do?', 'echo: What does recA do?']
    """
    return _start_scatter(submit, df, prompt, options)


@takes(ScatterOptions, like=scatter)
async def ascatter(
    df: pd.DataFrame, prompt: PromptLike | None = None, **options: Unpack[ScatterOptions]
) -> pd.DataFrame:
    """Await a scatter: same parameters and result as ``scatter``. Cancelling it stops the run.

    Examples
    --------
    In a notebook this is ``await df.swarm.ascatter("What does {gene} do?")``.

    >>> import asyncio
    >>> asyncio.run(df.swarm.ascatter("What does {gene} do?"))["response"].tolist()
    ['echo: What does lacZ do?', 'echo: What does recA do?']
    """
    return await awaited(_start_scatter, ascatter, df, prompt, options)


def _start_scatter(
    verb: Callable[..., Any], df: pd.DataFrame, prompt: PromptLike | None, options: Mapping[str, object]
) -> Run:
    given = arguments(verb, options, prompt)
    return ScatterFrame(df, prompt, given).start(read_options(given, by_row=True))


@takes(ScatterOptions, like=scatter)
def iter_scatter(
    df: pd.DataFrame | Iterable[pd.DataFrame], prompt: PromptLike | None = None, **options: Unpack[ScatterOptions]
) -> Iterator[pd.DataFrame]:
    """Scatter, and yield finished rows as they finish.

    Parameters
    ----------
    df : DataFrame, or iterable of DataFrame
        One frame, or the pieces of one that memory does not hold: what ``pandas.read_csv`` and ``read_json`` give
        with ``chunksize=``, or a generator of yours.

    Yields
    ------
    pandas.DataFrame
        From one frame: one row or more, as ``scatter`` would return them, in the order they finished. Together
        they are all rows, each once. (Should a server turn out to have answered wrongly for a while, such rows come
        again, and a warning says so.) From several: what ``scatter`` would return for each, in their order. At
        most three of them run at once, so that the swarm is not idle while the last rows of one finish, and one
        more is read ahead. Leaving the loop early stops the run.

    Raises
    ------
    NoEndpointsError, ScatterInterrupted
        As for ``scatter``; from several frames, ``.frame`` has the rows of those that are running.
    ScatterError
        Under ``on_error="raise"``; from several frames, when the first one with failed rows is due, as ``.frame``.
    SettingError
        ``monitor=True`` with several frames: each is a run of its own, and a monitor shows one.

    Examples
    --------
    >>> sorted(text for part in df.swarm.iter_scatter("What does {gene} do?") for text in part["response"])
    ['echo: What does lacZ do?', 'echo: What does recA do?']

    Ten million rows, 20,000 at a time::

        for part in sk.iter_scatter(pd.read_json("in.jsonl", lines=True, chunksize=20_000), "{text}"):
            part.to_json("out.jsonl", orient="records", lines=True, mode="a")
    """
    given = arguments(iter_scatter, options, prompt)
    if isinstance(df, pd.DataFrame):
        yield from _iter_rows(ScatterFrame(df, prompt, given), read_options(given, by_row=True))
        return
    if isinstance(df, str | Mapping | pd.Series) or not isinstance(df, Iterable):
        check_frame(df)
    if given["monitor"]:
        raise SettingError("monitor=True shows one run, and each of several frames is one: use progress=True")
    yield from _iter_frames(df, lambda part: ScatterFrame(part, prompt, given), read_options(given, by_row=True))


def _iter_rows(frame: ScatterFrame, call: PreparedCall) -> Iterator[pd.DataFrame]:
    done: queue.SimpleQueue[Sequence[int] | None] = queue.SimpleQueue()  # None: the run is over

    def listen(event: RunEvent) -> None:
        match event:
            case RowsDone() if event.rows:
                done.put(event.rows)
            case RowFailed(row, _, _):
                done.put((row,))
            case RowsReused(rows, _):
                done.put(rows)

    if not_sent := frame.not_sent():
        done.put(not_sent)
    run = started(frame.start, call, [listen])
    over = False
    yielded = bytearray(len(frame.df))
    again = 0
    try:
        run._job.add_done_callback(lambda _: done.put(None))
        while not over:
            rows, over = _taken(done)
            part, rows = _settled_part(frame, rows)
            if rows:
                again += sum(yielded[row] for row in rows)
                for row in rows:
                    yielded[row] = 1
                yield part
        if (left := run.left_over()) and (rows := [r for r, done in enumerate(yielded) if not done]):
            yield frame.frame(left, rows)
        run.result()
        if again:
            warn(
                f"{plural(again, 'row')} came twice: the first answers were taken back after they had been yielded "
                "(sk.last_run().story() says why). The later ones hold: keep the last row of each index label"
            )
    finally:
        run.cancel()


def _taken(done: queue.SimpleQueue[Sequence[int] | None]) -> tuple[list[int], bool]:
    """All rows that have finished by now, once there is one; and whether the run is over."""
    rows: list[int] = []
    found = done.get()
    while found is not None:
        rows += found
        try:
            found = done.get_nowait()
        except queue.Empty:
            return rows, False
    return rows, True


def _settled_part(frame: ScatterFrame, rows: Sequence[int]) -> tuple[pd.DataFrame, list[int]]:
    """The frame of those rows that have an answer or an error. Answers may be taken back at any time, also while the
    frame is made; such a row comes again."""
    found = list(dict.fromkeys(rows))
    while True:
        settled = [row for row in found if frame.columns.is_settled(row)]
        part = frame.frame("not finished", settled)
        if all(map(frame.columns.is_settled, settled)):
            return part, settled
        found = settled


def _iter_frames(
    frames: Iterable[pd.DataFrame], prepare: Callable[[pd.DataFrame], ScatterFrame], call: PreparedCall
) -> Iterator[pd.DataFrame]:
    stream = ChunkedScatter(frames, prepare, call)
    try:
        yield from stream
    except KeyboardInterrupt:
        if not stream.holds_frames:
            raise
        raise ScatterInterrupted(
            "interrupted: .frame of this error has the rows of the frames that were running",
            stream.partial("interrupted"),
        ) from None
    failed = [stream.causes.text(plural(stream.stats.rows, "row"))] if stream.causes.count else []
    late = [f"{stream.stats.left()}. {RUN_AGAIN}"] if stream.stats.deadline else []
    if lines := [*failed, *late, *stream.stats.cuts()]:
        warn("\n".join(lines))


# ---- tree_reduce ------------------------------


@takes(TreeOptions)
def tree_reduce(df: pd.DataFrame, column: str, prompt: str, **options: Unpack[TreeOptions]) -> pd.DataFrame:
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

    Returns
    -------
    pandas.DataFrame
        A row per group (one row without ``by``): the keys, ``out``, ``<out>_error``, ``n_leaves`` (texts in the
        answer), ``n_levels`` (0 where there was one text, which is returned as it is), ``n_missing`` (texts
        that were missing, or lost with a failed node) and ``n_shortened`` (texts that were cut, so that those of
        a node fit the model's context together). With ``schema`` a column a field, too; a text that is alone in its
        group is not merged, so it is valid or has its error. With ``trace`` a row per node: the keys, ``node, parent,
        level, group, n_leaves, response, error, shortened``.

    Raises
    ------
    UnknownColumnError, PromptError
        ``column``, ``by`` or a placeholder does not exist, or ``{responses}`` is missing.
    SettingError
        ``fanin`` is neither "auto" nor 2 or more; a column of ``by`` has the name of a column of the result; or
        the prompt leaves no room for texts in the model's context.
    NoEndpointsError, ScatterInterrupted, ScatterError
        As for ``scatter``.

    Examples
    --------
    >>> df = pd.DataFrame({"group": ["a", "a", "b"], "note": ["x", "y", "z"]})
    >>> top = df.swarm.tree_reduce("note", "Merge:\\n{responses}", by="group", fanin=2)
    >>> top[["group", "n_leaves", "n_levels"]].values.tolist()
    [['a', 2, 1], ['b', 1, 0]]
    """
    return finished(lambda: _start_tree(tree_reduce, df, column, prompt, options))


@takes(TreeOptions, like=tree_reduce)
async def atree_reduce(df: pd.DataFrame, column: str, prompt: str, **options: Unpack[TreeOptions]) -> pd.DataFrame:
    """Await a tree reduction: same parameters and result as ``tree_reduce``. Cancelling it stops the run.

    Examples
    --------
    >>> import asyncio
    >>> asyncio.run(df.swarm.atree_reduce("gene", "Merge: {responses}"))["response"].tolist()
    ['echo: Merge: lacZ\\n---\\nrecA']
    """
    return await awaited(_start_tree, atree_reduce, df, column, prompt, options)


def _start_tree(
    verb: Callable[..., Any], df: pd.DataFrame, column: str, prompt: str, options: Mapping[str, object]
) -> Run:
    given = arguments(verb, options)
    return trees_of(df, column, prompt, given).start(read_options(given, aggregation=True))


def trees_of(df: pd.DataFrame, column: str, prompt: str, given: Mapping[str, Any]) -> ReductionTrees:
    """The trees of a ``tree_reduce`` with these keywords."""
    shape = {name: given[name] for name in ("by", "dropna", "fanin", "out", "trace")}
    return ReductionTrees(df, column, prompt, **shape, typed=TypedAnswers.of(given))


# ---- broadcast, preview ------------------------------


@takes(BroadcastOptions)
def broadcast(prompt: str, **options: Unpack[BroadcastOptions]) -> pd.DataFrame:
    """Send one prompt to every endpoint.

    Parameters
    ----------
    prompt : str
        Sent as it is; nothing is filled in.

    Returns
    -------
    pandas.DataFrame
        A row per endpoint: ``endpoint, response, response_error, latency_s``.

    Examples
    --------
    >>> sk.broadcast("Who are you?", pool=pool.select([0, 1]))["response"].tolist()
    ['echo: Who are you?', 'echo: Who are you?']
    """
    with closing(read_options(arguments(broadcast, options))) as call:
        pool = call.pool._still()
        answers = io_thread.call(pool._broadcast(prompt, replace(call.spec, mode="single")))
    index = pd.RangeIndex(len(answers))
    frame = pd.DataFrame({"endpoint": text_column([e.name for e in pool.endpoints], index)})
    frame["response"] = text_column([a.text if a.success else None for a in answers], index)
    frame["response_error"] = text_column([a.error for a in answers], index)
    frame["latency_s"] = pd.Series([a.latency_s for a in answers], index, dtype="float64")
    return frame


@takes(PreviewOptions)
def preview(
    df: pd.DataFrame, prompt: PromptLike | None = None, rows: int = 3, **options: Unpack[PreviewOptions]
) -> pd.DataFrame:
    """Show what would be sent for the first rows, chat template included, before any row is sent.

    Sampling parameters are shown to one server in a request for one token, as a run would do it: those that it
    refuses raise a ``SettingError``.

    Parameters
    ----------
    df : pandas.DataFrame
        The rows.
    prompt : str, callable or Series, optional
        As for ``scatter``.
    rows : int, default 3
        Rows to show.

    Returns
    -------
    pandas.DataFrame
        Index of the first ``rows`` rows; ``sent`` (the text as it is sent), ``tokens`` (as the server counts them;
        missing where it does not) and ``error`` (why a row would not be sent). A notebook shows whole prompts.

    Examples
    --------
    >>> print(df.swarm.preview("What does {gene} do?")["sent"][0])
    <|im_start|>system
    ...
    What does lacZ do?<|im_end|>
    <|im_start|>assistant
    ...
    """
    given = arguments(preview, options, prompt)
    check_frame(df)
    if not is_whole(rows, 0):
        raise SettingError(f"rows={rows!r}: must be a whole number of rows to show")
    head = df.iloc[:rows]
    prompts = row_prompts(head, prompt.iloc[:rows] if isinstance(prompt, pd.Series) else prompt, given["messages"])
    with closing(read_options(given)) as call:
        shown = io_thread.call(call.pool._still().preview(prompts, call.spec))
    frame = pd.DataFrame({"sent": text_column([text for text, _ in shown], head.index)}, index=head.index)
    frame["tokens"] = pd.Series([count for _, count in shown], head.index, dtype="Int64")
    frame["error"] = text_column([prompts.errors.get(i) for i in range(len(head))], head.index)
    return Preview(frame, prompts.texts, len(df))
