"""A tree per group of a frame, growing: tree_reduce between DataFrames and lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from .errors import PromptError
from .options import Call
from .patterns.tree_reduce import Node, check_fanin, reduce_groups, roots
from .prompts import fill, make_prompts, placeholders
from .records import Failure, Prompts, Response
from .results import Columns
from .run import Run
from .sheet import text_column
from .stats import RunStats

__all__ = ["Forest"]


_NO_TEXT = "there was no text to merge: all values are missing"


class Forest:
    """A tree per group, growing.

    With ``partial`` the rows are results of this verb, one for each part of a group: their texts are the leaves, and
    what they count is carried on.
    """

    def __init__(
        self, df: pd.DataFrame, column: str, prompt: str, by: Any, fanin: Any, out: str, trace: bool = False,
        partial: bool = False,
    ) -> None:  # fmt: skip
        self.fanin = check_fanin(fanin)
        self.prompt = prompt
        self.out = out
        self.trace = trace
        self.keys = [] if by is None else list(by) if isinstance(by, list) else [by]
        for name in (column, *self.keys):
            if name not in df.columns:
                placeholders("{" + str(name) + "}", df.columns)  # raises, naming the nearest
        self.groups: list[tuple[Any, ...]] = []
        self.nodes: list[Node] = []
        self.missing: list[int] = []
        self.lacking: list[str] = []  # what is said of a group that has no leaves
        parts: Iterable[tuple[Any, pd.DataFrame]] = (
            [((), df)] if by is None else df.groupby(self.keys, sort=True, dropna=True, observed=True)
        )
        for key, part in parts:
            texts = make_prompts(part, column)
            group, found = len(self.groups), range(len(part))
            leaves = zip(part["n_leaves"], part["n_levels"], strict=True) if partial else ((1, 0) for _ in found)
            for text, (n_leaves, level) in zip(texts.texts, leaves, strict=True):
                if text is not None:
                    self.nodes.append(Node(len(self.nodes), level, group, n_leaves, text))
            errors = part[f"{out}_error"].dropna().tolist() if partial else []
            self.groups.append(tuple(key))
            self.missing.append(int(part["n_missing"].sum()) if partial else len(texts.errors))
            self.lacking.append(next((e for e in errors if e != _NO_TEXT), _NO_TEXT))
        self.leaves = Counter(n.group for n in self.nodes)
        self.texts = [n.response or "" for n in self.nodes]
        self.total = Counter[int]()
        for n in self.nodes:
            self.total[n.group] += n.n_leaves
        self._check_prompt()

    def _check_prompt(self) -> None:
        names = [name for _, name, _ in placeholders(self.prompt, ["responses", "level", *self.keys])]
        if "responses" not in names:
            raise PromptError("the prompt of a tree_reduce must hold {responses}: that is where the texts go")

    def _render(self, group: int, level: int, responses: str) -> str:
        keys = {str(k): v for k, v in zip(self.keys, self.groups[group], strict=True)}
        return fill(self.prompt, {**keys, "responses": responses, "level": str(level)})

    def start(self, call: Call) -> Run:
        """Begin to reduce, level by level."""

        async def ask(prompts: list[str], level: int) -> list[Response]:
            columns = Columns(len(prompts))
            listeners = call.listeners(f"tree_reduce level {level}")
            failure = await call.run(Prompts(list(prompts)), columns, listeners, stats_of[0])
            if failure is not None:
                raise _NoneLeft(failure)
            return columns.responses()

        stats_of: list[RunStats] = []

        async def work(stats: RunStats) -> Failure | None:
            stats_of.append(stats)
            try:
                if any(count > 1 for count in self.leaves.values()):
                    fanin = None if self.fanin == "auto" else self.fanin
                    room = await self._room(call)
                    await reduce_groups(self.nodes, len(self.groups), ask, self._render, fanin=fanin, room=room)
            except _NoneLeft as exc:
                return exc.failure
            finally:
                if call.owned:
                    await call.pool.close()
            return None

        return call.shown(Run("tree_reduce", work, self.frame, self._errors, call.on_error))

    async def _room(self, call: Call) -> int | None:
        """Characters that the children of a node may have together, next to the rest of its prompt."""
        room = await call.pool.prompt_room(call.ask, self.texts[:: max(1, len(self.texts) // 64)])
        if room is None:
            return None
        rest = max(len(self._render(g, 1, "")) for g in range(len(self.groups)))
        return max(64, room - rest)

    def _errors(self) -> list[tuple[object, str]]:
        """Groups without an answer, and nodes that failed in groups that have one all the same."""
        found: list[tuple[object, str]] = []
        for g, (error, top) in enumerate(zip(self._tops("")[f"{self.out}_error"], self._roots(), strict=True)):
            label = self.groups[g][0] if len(self.keys) == 1 else self.groups[g] or "all"
            lost = [n.error for n in self.nodes if n.group == g and n.error is not None]
            found += [(label, e) for e in ([error] if top is None else lost)]
        return found

    def _roots(self) -> list[Node | None]:
        return roots(self.nodes, len(self.groups))

    def frame(self, unfinished: str) -> pd.DataFrame:
        """The result so far: a row per group, or per node with ``trace``."""
        return self._trace() if self.trace else self._tops(unfinished)

    def _key_columns(self, groups: Sequence[int]) -> dict[Any, Any]:
        return {k: [self.groups[g][i] for g in groups] for i, k in enumerate(self.keys)}

    def _tops(self, unfinished: str) -> pd.DataFrame:
        count = len(self.groups)
        tops = self._roots()
        failed: dict[int, str] = {n.group: n.error for n in self.nodes if n.error is not None}
        errors: list[str | None] = []
        for g, top in enumerate(tops):
            if top is not None:
                errors.append(None)
            elif not self.leaves[g]:
                errors.append(self.lacking[g])
            else:
                errors.append(failed.get(g, unfinished))
        index = pd.RangeIndex(count)
        frame = pd.DataFrame(self._key_columns(range(count)), index=index)
        frame[self.out] = text_column([top.response if top else None for top in tops], index)
        frame[f"{self.out}_error"] = text_column(errors, index)
        n_leaves = [top.n_leaves if top else 0 for top in tops]
        frame["n_leaves"] = pd.Series(n_leaves, index, dtype="Int64")
        frame["n_levels"] = pd.Series([top.level if top else 0 for top in tops], index, dtype="Int64")
        lost = [m + self.total[g] - n_leaves[g] for g, m in enumerate(self.missing)]
        frame["n_missing"] = pd.Series(lost, index, dtype="Int64")
        return frame

    def _trace(self) -> pd.DataFrame:
        nodes = self.nodes
        index = pd.RangeIndex(len(nodes))
        frame = pd.DataFrame(self._key_columns([n.group for n in nodes]), index=index)
        for name in ("node", "parent", "level", "group", "n_leaves"):
            frame[name] = pd.Series([getattr(n, name) for n in nodes], index, dtype="Int64")
        frame["response"] = text_column([n.response for n in nodes], index)
        frame["error"] = text_column([n.error for n in nodes], index)
        frame["shortened"] = pd.Series([n.shortened for n in nodes], index, dtype="bool")
        return frame


class _NoneLeft(Exception):  # noqa: N818 - carries a failure out of the levels of a tree
    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.describe())
        self.failure = failure
