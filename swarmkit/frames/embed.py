"""Vectors of texts."""

from __future__ import annotations

import asyncio
import importlib.util
from binascii import a2b_base64
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Unpack, overload

import numpy as np
import numpy.typing as npt
import pandas as pd

from ..client.vectors import length_of, pack, unpack
from ..errors import SettingError
from ..runs.run import Run, awaited, finished
from ..text import plural
from .call import PreparedCall, arguments, is_whole, read_options
from .options import EmbedOptions
from .prompts import PromptLike, missing_in
from .scatter import ScatterFrame
from .signatures import takes
from .typed import text_column

__all__ = ["VectorFrame", "aembed", "embed", "embed_call"]

_SHOWN = 4  # numbers of a vector
_OURS = {"embed_dtype", "encoding_format", "endianness", "input", "model"}  # fields that say how vectors are read


@overload
def embed(
    df: pd.DataFrame, prompt: PromptLike, *, as_array: Literal[False] = False, **options: Unpack[EmbedOptions]
) -> pd.DataFrame: ...
@overload
def embed(
    df: pd.DataFrame, prompt: PromptLike, *, as_array: Literal[True], **options: Unpack[EmbedOptions]
) -> npt.NDArray[np.float32]: ...
@takes(EmbedOptions)
def embed(
    df: pd.DataFrame, prompt: PromptLike, *, as_array: bool = False, **options: Unpack[EmbedOptions]
) -> pd.DataFrame | npt.NDArray[np.float32]:
    """Give each row the vector of its text, by a model of embeddings.

    Texts go out as lists to ``/v1/embeddings``, as they are: no chat template stands around them. What a model wants
    before them, such as ``query:`` and a space, is part of the template.

    Parameters
    ----------
    df : pandas.DataFrame
        The rows. Never changed.
    prompt : str, callable or Series
        The text of each row: a column's name, a template with ``{column}`` placeholders, a function of the row, or an
        aligned Series.
    as_array : bool, default False
        Return one array of float32 numbers, a row for each row of the frame, in place of the frame. Rows without a
        vector are NaN.
    too_long : {"error", "truncate", "truncate_left"}, default "error"
        What becomes of a text that does not fit the model's context: the row fails with what the server says of it, or
        the end (or the beginning) of the text is cut, as the server counts its tokens. How many were cut is said at the
        end; ``<out>_truncated`` under ``details`` says which.
    dedup : "auto" or bool, default "auto"
        Whether identical texts are sent once; "auto" does so.

    Returns
    -------
    pandas.DataFrame or numpy.ndarray
        A copy of ``df``, same index, same order, with ``out`` and ``<out>_error``. Vectors are
        ``pandas.ArrowDtype(pyarrow.list_(pyarrow.float32(), n))`` where pyarrow is installed, else float32 arrays as
        objects; they are missing where there is none. With ``as_array``, shape ``(rows, n)``.

    Raises
    ------
    SettingError, TypeError
        The servers have no embeddings, or refuse ``dimensions``; a keyword that ``embed`` does not take.
    UnknownColumnError, PromptError, NoEndpointsError, ScatterInterrupted, ScatterError
        As for ``scatter``.

    Examples
    --------
    >>> vectors = df.swarm.embed("gene", dimensions=16, as_array=True)
    >>> vectors.shape, vectors.dtype
    ((2, 16), dtype('float32'))
    """
    frame, start = _prepared(embed, df, prompt, {**options, "as_array": as_array})
    result = finished(start)
    return frame.array() if as_array else result


@overload
async def aembed(
    df: pd.DataFrame, prompt: PromptLike, *, as_array: Literal[False] = False, **options: Unpack[EmbedOptions]
) -> pd.DataFrame: ...
@overload
async def aembed(
    df: pd.DataFrame, prompt: PromptLike, *, as_array: Literal[True], **options: Unpack[EmbedOptions]
) -> npt.NDArray[np.float32]: ...
@takes(EmbedOptions, like=embed)
async def aembed(
    df: pd.DataFrame, prompt: PromptLike, *, as_array: bool = False, **options: Unpack[EmbedOptions]
) -> pd.DataFrame | npt.NDArray[np.float32]:
    """Await an embed: same parameters and result as ``embed``. Cancelling it stops the run.

    Examples
    --------
    >>> import asyncio
    >>> asyncio.run(df.swarm.aembed("gene", as_array=True)).shape
    (2, 64)
    """
    frame, start = await asyncio.to_thread(_prepared, aembed, df, prompt, {**options, "as_array": as_array})
    result = await awaited(start)
    return frame.array() if as_array else result


def _prepared(
    verb: Callable[..., Any], df: pd.DataFrame, prompt: PromptLike, options: Mapping[str, object]
) -> tuple[VectorFrame, Callable[[], Run]]:
    given = arguments(verb, options)
    frame = VectorFrame(df, prompt, given)
    return frame, lambda: frame.start(embed_call(given))


def embed_call(given: Mapping[str, Any]) -> PreparedCall:
    """Read and check the keywords of an embed."""
    dimensions = given["dimensions"]
    if dimensions is not None and not is_whole(dimensions, 1):
        raise SettingError(f"dimensions={dimensions!r}: must be a whole number, 1 or more")
    if taken := sorted(_OURS & set(given["extra_body"] or ())):
        raise SettingError(f"{taken[0]} in extra_body is swarmkit's own: vectors are read as they are asked for here")
    call = read_options(given)
    params = {**call.spec.params} | ({} if dimensions is None else {"dimensions": dimensions})
    vectors = replace(call.spec, kind="embeddings", params=params, max_tokens=0, chat=None, delivery="auto")
    return replace(call, spec=vectors)


class VectorFrame(ScatterFrame):
    """A frame whose rows get vectors.

    Parameters
    ----------
    df, prompt, given
        As for ``ScatterFrame``.
    """

    def __init__(self, df: pd.DataFrame, prompt: PromptLike | None, given: Mapping[str, Any]) -> None:
        self._asked: int | None = given["dimensions"]
        self._odd: dict[int, str] = {}  # what only the reading of the vectors shows, as ``frame`` did it last
        super().__init__(df, prompt, given)
        self.label = "embed"

    def _keep_answers(self) -> None:
        if (label := self._label(self.out)) not in self.df.columns:
            return
        vectors = self.df[label]
        if isinstance(vectors, pd.DataFrame):
            raise SettingError(f"several columns are named {self.out!r}; only_missing=True needs one")
        known, values = (~missing_in(vectors), vectors.array)  # as lists they are six times as large
        for row in np.flatnonzero(known).tolist():
            try:
                text, finite = pack(np.asarray(values[row], np.float32).ravel().tolist())
            except (TypeError, ValueError):
                raise SettingError(
                    f"only_missing=True keeps the vectors of the column {self.out!r}, and {values[row]!r:.40} at row "
                    f"{self.index[row]!r} is none: embed into another column, out=..."
                ) from None
            if not finite:  # as ``as_array=True`` gives a missing vector
                known[row] = False
                continue
            self.columns.text[row] = text
            self.prompts.errors.pop(row, None)
        self._kept = known
        self.pending = np.flatnonzero(~known).tolist()

    def _answers(self, rows: Iterable[int]) -> list[tuple[object, str]]:
        return [(self.index[row], _shown(self.columns.text[row])) for row in rows]

    def errors(self) -> list[tuple[object, str]]:
        """The failed rows' labels and errors."""
        found = {**self._odd, **self.columns.errors}
        return [(self.index[row], found[row]) for row in sorted(found)]

    def array(self) -> npt.NDArray[np.float32]:
        """The vectors, a row each; NaN where there is none."""
        return self._vectors(np.arange(self.columns.size), "")[0]

    def frame(self, unfinished: str, rows: Sequence[int] | None = None) -> pd.DataFrame:
        """The frame with the vectors so far; rows that have neither vector nor error get ``unfinished``."""
        positions = np.arange(self.columns.size) if rows is None else np.asarray(rows, dtype=np.intp)
        base = self.df if rows is None else self.df.iloc[positions]
        values, errors = self._vectors(positions, unfinished)
        missing = np.array([error is not None for error in errors], bool)
        new: dict[str, Any] = {
            self.out: _column(values, missing, base.index),
            f"{self.out}_error": text_column(errors, base.index),
        }
        if self._details:
            new |= self._detail_columns(base.index, positions, positions)
        return self._with(base, new)

    def _vectors(self, rows: np.ndarray, unfinished: str) -> tuple[npt.NDArray[np.float32], list[str | None]]:
        """By row: the vector, which is NaN where there is none, and the error."""
        columns = self.columns
        texts = [columns.text[row] if row not in columns.errors else None for row in rows.tolist()]
        errors = [
            columns.error(row, unfinished) if text is None else None
            for row, text in zip(rows.tolist(), texts, strict=True)
        ]
        sizes = Counter(map(len, filter(None, texts)))
        usual = sizes.most_common(1)[0][0] if sizes else 0
        whose = "most have"
        if self._asked is not None:
            usual, whose = -(-4 * self._asked // 3) * 4, "dimensions= asks for"
        self._odd = {}
        if sizes.keys() - {usual}:  # of servers with different models under one name, or of a store before a change
            length = self._asked or length_of(text for text in texts if text and len(text) == usual)
            for place, text in enumerate(texts):
                if text and len(text) != usual:
                    errors[place] = self._odd[int(rows[place])] = (
                        f"its vector has {length_of([text]):,} numbers, and {whose} {length:,}: do all servers have "
                        "the same model, and had those of the store?"
                    )
                    texts[place] = None
        length = next((len(a2b_base64(text)) // 4 for text in texts if text), self._asked or 0)
        values = np.full((len(texts), length), np.nan, np.float32)
        for place, text in enumerate(texts):
            if text:
                values[place] = np.frombuffer(a2b_base64(text), "<f4")
        return values, errors


def _shown(text: str | None) -> str:
    if not text:
        return ""
    numbers = unpack(text)
    more = ", ..." if len(numbers) > _SHOWN else ""
    return f"[{', '.join(f'{x:.3g}' for x in numbers[:_SHOWN])}{more}] ({plural(len(numbers), 'number')})"


def _column(values: npt.NDArray[np.float32], missing: npt.NDArray[np.bool_], index: pd.Index) -> pd.Series:
    """Vectors as a column."""
    if importlib.util.find_spec("pyarrow") is None:
        arrays = np.empty(len(values), object)
        for row in np.flatnonzero(~missing).tolist():
            arrays[row] = values[row]
        return pd.Series(arrays, index)
    import pyarrow as pa

    length = values.shape[1]
    kind = pa.list_(pa.float32(), length) if length else pa.list_(pa.float32())  # not known where no row has one
    if not length:
        return pd.Series(pd.arrays.ArrowExtensionArray(pa.nulls(len(values), kind)), index)
    valid = pa.py_buffer(np.packbits(~missing, bitorder="little")) if missing.any() else None
    # Not from_arrays(mask=), which pyarrow 15 has not.
    array = pa.Array.from_buffers(kind, len(values), [valid], children=[pa.array(values.ravel())])
    return pd.Series(pd.arrays.ArrowExtensionArray(array), index)
