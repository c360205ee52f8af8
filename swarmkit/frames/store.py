"""A store as a researcher sees it: its answers as frames, and beside the rows that asked."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..errors import SettingError
from ..store.folder import Folder
from ..store.keys import Keys, keys_of
from ..store.reuse import duplicates_in
from ..store.writer import Durability
from ..text import encodable
from .conversations import row_prompts
from .prompts import PromptLike
from .typed import text_column

__all__ = ["Store", "open_store"]

_TEXTS = ("key", "prompt", "text", "finish_reason", "endpoint", "model", "ask", "reasoning")
_COUNTS = ("sample", "prompt_tokens", "completion_tokens")
_FLOATS = ("latency_s", "logprob")
_COLUMNS = (
    *("key", "sample", "prompt", "text", "finish_reason", "prompt_tokens", "completion_tokens", "endpoint"),
    *("written_at", "model"),
)
_AT_ONCE = 50_000  # rows


def open_store(
    path: str | os.PathLike[str] | Store, *, durability: Durability = "second", store_prompts: bool = True
) -> Store:
    """Open a store; a new one is created with its first row.

    Parameters
    ----------
    path : str or path
        The folder; it need not exist yet.
    durability : {"second", "row", "close"}
        When finished rows are flushed to the disk itself, so that they outlive a power cut: at most a second later,
        at once, or at the end of the run. The end of a process loses none: rows are written when they finish.
    store_prompts : bool, default True
        Whether prompts are stored with their answers, compressed: some 30 bytes a row for short ones of one template,
        a little more than half of its length for prose.

    Returns
    -------
    Store
        ``.to_frame()`` returns its content, ``.join(df, prompt)`` puts it beside its rows, ``.compact()`` merges its
        segments into one.

    Raises
    ------
    StoreError
        The path is a file, or the store was written by a newer swarmkit.

    Examples
    --------
    >>> import tempfile
    >>> open_store(tempfile.mkdtemp()).to_frame().shape
    (0, 10)
    """
    return path if isinstance(path, Store) else Store(path, durability, store_prompts)


class Store(Folder):
    """A folder of finished rows; made by ``open_store``.

    Attributes
    ----------
    path : pathlib.Path
        The folder.

    Examples
    --------
    >>> answers = df.swarm.scatter("What does {gene} do?", store="runs/genes")
    >>> store = sk.open_store("runs/genes")
    >>> store.to_frame(["text"])["text"].tolist()
    ['echo: What does lacZ do?', 'echo: What does recA do?']
    >>> store.join(df, "What does {gene} do?")["response"].equals(answers["response"])
    True
    >>> store.to_parquet("genes.parquet")
    >>> store.compact()  # its segments become one
    """

    def to_frame(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """All stored answers, one per row.

        Parameters
        ----------
        columns : sequence of str, optional
            Those wanted, of the ones below and ``ask`` (a hash of the call's settings), ``latency_s``, ``reasoning``,
            ``logprob``. Without ``prompt`` it takes less time.

        Returns
        -------
        pandas.DataFrame
            With the columns ``key, sample, prompt, text, finish_reason, prompt_tokens, completion_tokens, endpoint,
            written_at, model``. The ``text`` of an embedding is its vector: float32 numbers, little-endian, in base64.
        """
        names = _checked(columns)
        return _frame(names, [_values(line, names) for line in self.answers("prompt" in names)])

    def to_parquet(self, path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> None:
        """Write all stored answers to a Parquet file, as ``to_frame`` returns them, without all of them in memory.

        Raises
        ------
        SettingError
            A column that there is none of, or pyarrow is not installed.
        """
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise SettingError(f'{path}: Parquet needs pyarrow: pip install "swarmkit-frames[parquet]"') from None
        names = _checked(columns)
        types = {
            **dict.fromkeys(_TEXTS, pa.string()), **dict.fromkeys(_COUNTS, pa.int64()),
            **dict.fromkeys(_FLOATS, pa.float64()), "written_at": pa.timestamp("ns"),
        }  # fmt: skip
        schema = pa.schema([(name, types[name]) for name in names])
        target = Path(path).expanduser()
        scratch = target.with_name(target.name + ".part")
        answers = (_values(line, names) for line in self.answers("prompt" in names))
        try:
            with pq.ParquetWriter(scratch, schema) as writer:
                while part := list(itertools.islice(answers, _AT_ONCE)):
                    values = [[encodable(v) if isinstance(v, str) else v for v in row] for row in part]
                    writer.write_table(pa.Table.from_pandas(_frame(names, values), schema, preserve_index=False))
            scratch.replace(target)
        finally:
            scratch.unlink(missing_ok=True)

    def join(
        self,
        df: pd.DataFrame,
        prompt: PromptLike | None = None,
        *,
        out: str = "response",
        n: int = 1,
        messages: str | None = None,
        ask: str | None = None,
        overwrite: bool = False,
    ) -> pd.DataFrame:
        """Put stored answers back beside the rows that they answer: no pool, and no request.

        Parameters
        ----------
        df : pandas.DataFrame
            The rows. Never changed.
        prompt : str, callable or Series, optional
            As in the call that asked them.
        out : str, default "response"
            Name of the column of answers; ``<out>_error`` stands beside it.
        n : int, default 1
            Samples a row, as in that call.
        messages : str, optional
            The column of conversations, in place of ``prompt``.
        ask : str, optional
            Which call, where several have asked these prompts: a value of the column ``ask`` of ``to_frame``.
        overwrite : bool, default False
            Whether columns of the new names are replaced that the prompt reads, or that swarmkit did not make.

        Returns
        -------
        pandas.DataFrame
            As ``scatter``, or ``embed``, would return it. A row without an answer says so in ``<out>_error``, and is
            asked by ``scatter(..., only_missing=True)``. Answers of a call with a function as ``chat=`` are not found,
            since their keys are of what it made of the prompts.

        Raises
        ------
        SettingError
            Several calls have asked these prompts, and ``ask`` does not say which.
        """
        from .call import arguments
        from .embed import VectorFrame, embed
        from .scatter import ScatterFrame
        from .verbs import scatter

        prompts = row_prompts(df, prompt, messages)
        wanted = [row for row, text in enumerate(prompts.texts) if text is not None]
        settings, keys = self._call(prompts.texts, wanted, messages is not None, ask)
        given = {"out": out, "overwrite": overwrite, "n": n, "messages": messages}
        given |= {"assistant_prefix": settings.get("assistant_prefix")}
        rows = ScatterFrame(df, prompt, arguments(scatter, given))
        if vectors := settings.get("kind") == "embeddings":
            rows = VectorFrame(df, prompt, arguments(embed, {"out": out, "overwrite": overwrite}))
        found = self.fill(rows.columns, keys, wanted, {})
        if vectors or (settings.get("params", {}).get("temperature") == 0 and n == 1):  # such a prompt is sent once
            for first, repeats in duplicates_in(wanted, prompts).items():
                for row in repeats if found[first] else ():
                    rows.columns.copy(first, row)
                    found[row] = True
        for row in np.flatnonzero(~found).tolist():
            if row not in rows.columns.errors:
                rows.columns.clear(row)  # stored in part
        return rows.frame("not in the store")

    def _call(
        self, texts: Sequence[str | None], rows: Sequence[int], conversations: bool, ask: str | None
    ) -> tuple[dict[str, Any], list[Keys]]:
        """The settings of the call that has asked these prompts, and the keys that rows have in it."""
        index = self._fresh()
        meanings = dict(index.meanings())
        if ask is not None and ask not in meanings:
            raise SettingError(f"ask={ask!r}: the store has answers of {', '.join(meanings) or 'no call'}")
        calls: dict[str, list[Keys]] = {}
        wanted = np.asarray(rows, np.int64)
        for one, meaning in meanings.items():
            if bool(index.asks[one].get("conversations")) == conversations and ask in (None, one, meaning):
                keys = keys_of(one, texts)
                if self.find(keys, wanted):
                    calls.setdefault(meaning, []).append(keys)
        named = {meaning: index.asks[one] for one, meaning in meanings.items() if meaning in calls}
        if len(calls) > 1:
            listed = list(named.values())
            differ = [name for name in listed[0] if any(one.get(name) != listed[0].get(name) for one in listed)]
            said = "; ".join(", ".join(f"{name}={one.get(name)!r}" for name in differ) for one in listed)
            raise SettingError(f"{len(calls)} calls have asked these prompts; say which one by ask=: {said}")
        return next(iter(named.values()), {}), next(iter(calls.values()), [])


def _checked(columns: Sequence[str] | None) -> list[str]:
    known = {*_TEXTS, *_COUNTS, *_FLOATS, "written_at"}
    if columns is None:
        return list(_COLUMNS)
    if isinstance(columns, str) or (unknown := [name for name in columns if name not in known]):
        what = columns if isinstance(columns, str) else unknown
        raise SettingError(f"columns={what!r}: must be a list of {', '.join(sorted(known))}")
    return list(columns)


def _values(line: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    return [line.get(name) for name in names]


def _frame(names: Sequence[str], values: Sequence[Sequence[Any]]) -> pd.DataFrame:
    """Answers as a frame, each column of the dtype that it always has."""
    index = pd.RangeIndex(len(values))
    columns: dict[str, pd.Series] = {}
    for place, name in enumerate(names):
        found = [row[place] for row in values]
        if name in _TEXTS:
            columns[name] = text_column(found, index)
        elif name in _COUNTS:
            columns[name] = pd.Series(found, index, dtype="Int64")
        elif name in _FLOATS:
            columns[name] = pd.Series(found, index, dtype="float64")
        else:
            columns[name] = pd.to_datetime(pd.Series(found, index, dtype="float64"), unit="s")
    return pd.DataFrame(columns, index=index)
