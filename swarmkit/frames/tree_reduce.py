"""``tree_reduce`` on DataFrames: a tree for each group of rows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..engine.columns import Columns
from ..errors import PromptError, SettingError, warn
from ..patterns.tree_reduce import Node, ScatterLevel, Settle, check_fanin, reduce_groups, roots
from ..pool.watch import present
from ..records import Failure, FailureKind, Prompts
from ..runs.progress import show_unsent
from ..runs.run import Run
from ..runs.stats import RunStats
from ..text import plural
from .answers import TypedAnswers
from .call import PreparedCall
from .prompts import (
    check_column,
    check_frame,
    fill_parts,
    make_prompts,
    missing_in,
    placeholders,
    unique_column,
    values_of,
)
from .provenance import circumstances, noted, question
from .typed import text_column

__all__ = ["ReductionTrees"]


_NO_TEXT = "there was no text to merge: all values are missing"
_COUNTS = ("n_leaves", "n_levels", "n_missing", "n_shortened")
_TRACE = ("node", "parent", "level", "group", "n_leaves", "response", "error", "shortened")
_LEAST_ROOM = 64  # characters; less is no room for texts worth merging


class ReductionTrees:
    """The trees of a frame's groups, which get their nodes during the run.

    With ``partial`` the rows are results of ``tree_reduce``, one for each part of a group: their texts are the leaves,
    and their counts are added up. A group has no answer where a deadline has left one of its parts.
    """

    def __init__(
        self, df: pd.DataFrame, column: str, prompt: str, by: Any, fanin: Any, out: str, trace: bool = False,
        partial: bool = False, typed: TypedAnswers | None = None, dropna: bool = True,
    ) -> None:  # fmt: skip
        check_frame(df)
        self.fanin = check_fanin(fanin)
        self.out = out
        self.trace = trace
        self.typed = None if trace else typed
        self.keys = [] if by is None else list(by) if isinstance(by, list) else [by]
        for name in (column, *self.keys):
            check_column(df, name)
        self._check_names()
        self.parts = self._read_prompt(prompt)
        self.nodes: list[Node] = []
        self._collecting = threading.Lock()  # this is done by the thread that looks at the result, too
        self._collect: Callable[[], None] = lambda: None  # takes the answers of the newest level over into its nodes

        groups, first = _groups(df, self.keys, dropna)
        self._prompt = prompt
        self.source: PreparedCall | None = None
        self.in_no_group = int((groups < 0).sum())
        count = len(first)
        self.key_columns = {k: unique_column(df, k).iloc[first].reset_index(drop=True) for k in self.keys}
        values = [
            [_NO_KEY if absent else value for value, absent in zip(values_of(column), missing_in(column), strict=True)]
            for column in self.key_columns.values()
        ]
        self.groups: list[tuple[Any, ...]] = list(zip(*values, strict=True)) if values else [()] * count
        texts = make_prompts(df, column).texts
        self.leaves, self.total = [0] * count, [0] * count
        self.missing, self.shortened = [0] * count, [0] * count
        self.no_leaves = [_NO_TEXT] * count  # the error of each group, if it has no leaves
        counts = df[list(_COUNTS)].to_numpy(int).tolist() if partial else [[1, 0, 0, 0]] * len(df)
        errors = df[f"{out}_error"].tolist() if partial else []
        late = {int(groups[row]) for row, error in enumerate(errors) if _is_left(error)}
        for row in np.argsort(groups, kind="stable").tolist():  # groups in order, and rows in order within them
            group, text = int(groups[row]), texts[row]
            if group < 0:
                continue  # a key is missing
            n_leaves, level, missing, shortened = counts[row]
            if text is not None and group not in late:  # of a group that a deadline has left, no part is its answer
                self.nodes.append(Node(len(self.nodes), level, group, n_leaves, text))
                self.leaves[group] += 1
            self.total[group] += n_leaves if text is not None else 0
            self.shortened[group] += shortened
            self.missing[group] += missing if partial else text is None
            if partial and isinstance(errors[row], str) and errors[row] != _NO_TEXT:
                self.no_leaves[group] = errors[row]
        self.texts = [n.response or "" for n in self.nodes]

    def _check_names(self) -> None:
        """Refuse keys that columns of the result, or placeholders of the prompt, would take the place of."""
        if not isinstance(self.out, str) or not self.out:
            raise SettingError(f"out={self.out!r}: must be a column's name")
        if self.out in _COUNTS or f"{self.out}_error" in _COUNTS:
            raise SettingError(f"out={self.out!r}: the result has a column of this name for counts; choose another")
        if len(set(self.keys)) < len(self.keys):
            raise SettingError(f"by={self.keys}: a column is given twice")
        typed = self.typed.names if self.typed else []
        if self.typed is not None:
            self.typed.check()
        if clash := [name for name in typed if name in _COUNTS]:
            raise SettingError(
                f"the schema's field would be the column {clash[0]!r}, which counts texts: rename the field, or choose "
                "another out="
            )
        taken = _TRACE if self.trace else (self.out, f"{self.out}_error", *_COUNTS, *typed)
        for key in self.keys:
            if key in taken:
                by_out = not self.trace and key not in _COUNTS
                hint = " Give the answers another name with out=, or rename" if by_out else " Rename"
                raise SettingError(
                    f"by={key!r}: the result has a column of this name, which would take the place of the key."
                    f"{hint} the column: df.rename(columns={{{key!r}: ...}})"
                )

    def _read_prompt(self, prompt: str) -> list[tuple[str, str | None, str]]:
        parts = placeholders(prompt, ["responses", "level", *self.keys])
        names = [name for _, name, _ in parts]
        if "responses" not in names:
            raise PromptError("the prompt of a tree_reduce must hold {responses}, which the texts replace")
        for key in map(str, self.keys):
            if key in ("responses", "level") and key in names:
                raise PromptError(
                    f"{{{key}}} is a placeholder of tree_reduce, and a column of by= has the same name: rename the "
                    f"column, df.rename(columns={{{key!r}: ...}})"
                )
        return parts

    def _render(self, group: int, level: int, responses: str) -> str:
        keys = {str(k): v for k, v in zip(self.keys, self.groups[group], strict=True)}
        return fill_parts(self.parts, {**keys, "responses": responses, "level": str(level)})

    def start(self, call: PreparedCall) -> Run:
        """Start a run that reduces, level by level."""
        if self.in_no_group:
            named = "a key" if len(self.keys) > 1 else f"the key {self.keys[0]!r}"
            left = plural(self.in_no_group, "row")
            warn(f"{left} without {named}, in no group: dropna=False makes a group of missing keys")
        self.source = call

        async def work(stats: RunStats) -> Failure | None:
            async def scatter_level(prompts: list[str], level: int, settle: Settle) -> None:
                await self._scatter_level(call, stats, prompts, level, settle)

            try:
                await self.reduce(call, stats, scatter_level)
            except _NoEndpointLeft as exc:
                return exc.failure
            finally:
                stats.shortened = sum(node.n_shortened for node in self.nodes)
                await call.aclose()
            return None

        run = Run("tree_reduce", work, self.frame, self._errors, call.on_error, deadline=call.deadline)
        return call.shown(run)

    async def reduce(self, call: PreparedCall, stats: RunStats, scatter_level: ScatterLevel) -> None:
        """Make the levels of the trees, each from what ``scatter_level`` settles of the one below. On the I/O loop."""
        if any(count > 1 for count in self.leaves):
            fanin, room = None if self.fanin == "auto" else self.fanin, await self._room(call, stats)
            await reduce_groups(self.nodes, len(self.groups), scatter_level, self._render, fanin=fanin, room=room)

    async def _scatter_level(
        self, call: PreparedCall, stats: RunStats, prompts: list[str], level: int, settle: Settle
    ) -> None:
        columns = Columns(len(prompts))

        def collect() -> None:
            with self._collecting:
                for row in range(columns.size):
                    settle(row, columns.response(row) if columns.is_settled(row) else None)

        self._collect = collect
        shown = call.listeners(f"tree_reduce level {level}", stats)
        failure = await call.send(Prompts(list(prompts)), columns, shown, stats)
        if failure is not None:
            raise _NoEndpointLeft(failure)
        show_unsent(shown, len(prompts), stats)
        collect()

    async def _room(self, call: PreparedCall, stats: RunStats) -> int | None:
        """Characters that the children of a node may have together, next to the rest of its prompt."""
        room = await (await present(call.pool, stats)).prompt_room(
            call.spec, self.texts[:: max(1, len(self.texts) // 64)]
        )
        if room is None:
            return None
        rest = max(len(self._render(g, 1, "")) for g in range(len(self.groups)))
        if room - rest < _LEAST_ROOM:
            raise SettingError(
                f"there is no room for texts to merge: beside max_tokens={call.spec.max_tokens} and a reserve of "
                f"{call.pool.buffer} tokens, the model's context holds a prompt of about {room:,} characters, and the "
                f"template alone has {rest:,}. Lower max_tokens=, shorten the template, or use a longer context"
            )
        return room - rest

    def _errors(self) -> list[tuple[object, str]]:
        """Groups without an answer, and failed nodes of groups that have one."""
        tops = self._roots()
        found: list[tuple[object, str]] = []
        errors = self._group_errors(tops, "")
        lost: dict[int, list[str]] = {}
        for node in self.nodes:
            if node.error is not None:
                lost.setdefault(node.group, []).append(node.error)
        for g, (error, top) in enumerate(zip(errors, tops, strict=True)):
            label = self.groups[g][0] if len(self.keys) == 1 else self.groups[g] or "all"
            own = lost.get(g, ()) if top is not None and not error else ()
            if error and not _is_left(error):  # else it is not finished
                own = [error]
            found += [(label, e) for e in own]
        return found

    def _roots(self) -> list[Node | None]:
        return roots(self.nodes, len(self.groups))

    def frame(self, unfinished: str) -> pd.DataFrame:
        """The result so far: a row per group, or per node with ``trace``."""
        self._collect()
        found = self._trace(unfinished) if self.trace else self._tops(unfinished)
        if not self.trace:
            made = [str(name) for name in found.columns if name not in self.keys]
            how = {} if self.source is None else circumstances(self.source)
            noted(found, found, self.out, {"verb": "tree_reduce", "columns": made, **question(self._prompt), **how})
        return found

    def _keyed(self, groups: Sequence[int]) -> pd.DataFrame:
        """The keys of groups, with the dtypes they have in the frame."""
        index = pd.RangeIndex(len(groups))
        return pd.DataFrame({k: v.iloc[list(groups)].set_axis(index) for k, v in self.key_columns.items()}, index=index)

    def _group_errors(self, tops: Sequence[Node | None], unfinished: str) -> list[str | None]:
        failed: dict[int, str] = {n.group: n.error for n in self.nodes if n.error is not None}
        absent = [failed.get(g, unfinished) if leaves else self.no_leaves[g] for g, leaves in enumerate(self.leaves)]
        return [self._problem(top) if top else absent[g] for g, top in enumerate(tops)]

    def _problem(self, top: Node) -> str | None:
        """What keeps a group's only text, which no model has seen, from being an answer."""
        if self.typed is None or top.level or (problem := self.typed.problem(top.response or "")) is None:
            return None
        return f"not valid: {problem}. It is the only text of its group, so there was nothing to merge"

    def _tops(self, unfinished: str) -> pd.DataFrame:
        count = len(self.groups)
        tops = self._roots()
        errors = self._group_errors(tops, unfinished)
        shortened = list(self.shortened)
        for n in self.nodes:
            shortened[n.group] += n.n_shortened if n.error is None else 0
        index = pd.RangeIndex(count)
        frame = self._keyed(range(count))
        frame[self.out] = text_column([top.response if top else None for top in tops], index)
        frame[f"{self.out}_error"] = text_column(errors, index)
        if self.typed is not None:
            valid = [top.response if top and not error else None for top, error in zip(tops, errors, strict=True)]
            for name, values in self.typed.columns(valid, index).items():
                frame[name] = values
        n_leaves = [top.n_leaves if top else 0 for top in tops]
        frame["n_leaves"] = pd.Series(n_leaves, index, dtype="Int64")
        frame["n_levels"] = pd.Series([top.level if top else 0 for top in tops], index, dtype="Int64")
        lost = [m + self.total[g] - n_leaves[g] for g, m in enumerate(self.missing)]
        frame["n_missing"] = pd.Series(lost, index, dtype="Int64")
        frame["n_shortened"] = pd.Series(shortened, index, dtype="Int64")
        return frame

    def _trace(self, unfinished: str) -> pd.DataFrame:
        nodes = self.nodes
        index = pd.RangeIndex(len(nodes))
        frame = self._keyed([n.group for n in nodes])
        for name in ("node", "parent", "level", "group", "n_leaves"):
            frame[name] = pd.Series([getattr(n, name) for n in nodes], index, dtype="Int64")
        frame["response"] = text_column([n.response for n in nodes], index)
        errors = [n.error or (unfinished if n.response is None else None) for n in nodes]
        frame["error"] = text_column(errors, index)
        frame["shortened"] = pd.Series([n.n_shortened > 0 for n in nodes], index, dtype="bool")
        return frame


def _is_left(error: object) -> bool:
    """Whether this is the error of a group that a deadline has left."""
    return isinstance(error, str) and error.startswith(f"{FailureKind.DEADLINE}: ")


class _NoKey:
    """A key that is missing, as prompts and messages have it."""

    def __format__(self, spec: str) -> str:
        return "(missing)"

    def __repr__(self) -> str:
        return "nan"


_NO_KEY = _NoKey()


def _groups(df: pd.DataFrame, keys: Sequence[Any], dropna: bool) -> tuple[np.ndarray, np.ndarray]:
    """The group of every row, -1 where a key is missing and that is no key, and the first row of every group; groups as
    ``groupby`` has them, sorted."""
    if not keys:
        return np.zeros(len(df), int), np.zeros(1, int)
    columns = {place: unique_column(df, key).reset_index(drop=True) for place, key in enumerate(keys)}
    missing = np.logical_or.reduce([missing_in(column) for column in columns.values()])
    for place, column in columns.items():
        if column.dtype == np.float16:  # pandas has no index of them
            columns[place] = column.astype(np.float32)
    if not dropna:
        for place, column in columns.items():
            columns[place] = column.mask(missing_in(column))  # NaN is missing in all dtypes
        missing = np.zeros(len(df), bool)
    found = pd.DataFrame(columns)[~missing].groupby(list(columns), sort=True, dropna=dropna, observed=True).ngroup()
    groups = np.full(len(df), -1)
    groups[~missing] = found.to_numpy(int)
    _, first = np.unique(groups[~missing], return_index=True)
    return groups, np.flatnonzero(~missing)[first]


class _NoEndpointLeft(Exception):  # noqa: N818 - carries a failure out of the levels of a tree
    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.describe())
        self.failure = failure
