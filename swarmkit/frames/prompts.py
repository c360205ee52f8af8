"""Prompts from a column, a template, a callable or a Series."""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import string
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..errors import PromptError, SettingError, UnknownColumnError
from ..records import Prompts

__all__ = [
    "PromptLike",
    "Row",
    "check_column",
    "check_frame",
    "fill_parts",
    "make_prompts",
    "missing_in",
    "placeholders",
    "plain_scalar",
    "read_by",
    "refuse_containers",
    "unique_column",
    "values_of",
    "with_alias",
]

PromptLike = str | Callable[["Row"], str] | pd.Series

_BRACES = "Write {{ and }} for literal braces, as in JSON."

_CONTAINERS = (
    *(list, dict, tuple, set, frozenset, bytes, bytearray, memoryview, np.ndarray),
    *(pd.Series, pd.DataFrame, pd.Index, pd.api.extensions.ExtensionArray),
)


class Row(dict[str, Any]):
    """One row as a callable prompt sees it: ``row["column"]`` or ``row.column``.

    A column takes precedence over a method of dictionaries with its name.

    Examples
    --------
    >>> Row(gene="lacZ", items=3).gene, Row(items=3).items
    ('lacZ', 3)
    """

    def __getattribute__(self, name: str) -> Any:
        if name in self and not name.startswith("__"):
            return self[name]
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"this row has no column {name!r}; it has {', '.join(self)}")


def _of_all(method: str) -> Callable[..., Any]:
    """A method of dictionaries that reads all of a row's columns."""

    def call(self: _Watched, *args: Any) -> Any:
        object.__getattribute__(self, "_seen").update(dict.keys(self))
        return getattr(dict, method)(self, *args)

    return call


class _Watched(Row):
    """A row that knows which of its columns were read."""

    def __init__(self, values: Iterable[tuple[str, Any]], seen: set[str]) -> None:
        super().__init__(values)
        object.__setattr__(self, "_seen", seen)

    def __getitem__(self, name: str) -> Any:
        object.__getattribute__(self, "_seen").add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        object.__getattribute__(self, "_seen").add(name)
        return super().get(name, default)

    # ``f(**row)``, ``dict(row)`` and json.dumps use some of these, too.
    __iter__, keys, items, values = map(_of_all, ("__iter__", "keys", "items", "values"))
    __repr__, __or__, copy = map(_of_all, ("__repr__", "__or__", "copy"))


def read_by(df: pd.DataFrame, prompt: PromptLike | None) -> set[Hashable]:
    """The columns that a prompt reads; of a function those that it reads of the first row.

    Examples
    --------
    >>> read_by(pd.DataFrame({"gene": ["lacZ"], "start": [1]}), lambda row: row.gene)
    {'gene'}
    """
    names: set[str] = set()
    if isinstance(prompt, pd.Series):
        names = {str(prompt.name)}
    elif isinstance(prompt, str):
        names = {prompt}
        if prompt not in df.columns:
            with contextlib.suppress(ValueError):  # it is said elsewhere
                names = {name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None}
    elif callable(prompt) and len(df):
        first = zip(map(str, df.columns), [values_of(df.iloc[:1, i])[0] for i in range(df.shape[1])], strict=True)
        with contextlib.suppress(Exception):  # it is said elsewhere
            prompt(_Watched(first, names))
    return {label for label in df.columns if str(label) in names}


def check_frame(df: object) -> None:
    """Check that the rows of a call are a pandas DataFrame.

    Raises
    ------
    SettingError
        They are something else.
    """
    if not isinstance(df, pd.DataFrame):
        kind = type(df)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        hint = "A Series has the verbs itself, with {value} as its placeholder: series.swarm.scatter('{value}')"
        other = "df.to_pandas()" if hasattr(df, "to_pandas") else "pandas.DataFrame({'value': [...]})"
        raise SettingError(
            f"the rows must be a pandas DataFrame; got a {name}. "
            + (hint if isinstance(df, pd.Series) else f"Make one of it first, e.g. {other}")
        )


def make_prompts(df: pd.DataFrame, prompt: PromptLike) -> Prompts:
    """Make one prompt per row.

    Parameters
    ----------
    df : pandas.DataFrame
        The rows.
    prompt : str, callable or pandas.Series
        The name of a column of prompts; or a template whose ``{column}`` placeholders are filled in, with
        ``str.format`` specs (``{score:.2f}``) and ``{{`` for a brace; or a function of a ``Row``; or a Series
        with the frame's own index.

    Returns
    -------
    Prompts
        A text per row, or an error where the row lacks a value that its prompt needs.

    Raises
    ------
    UnknownColumnError
        A string that is neither a column nor holds a placeholder, or a placeholder without a column: a
        misspelt name is not sent as a prompt.
    PromptError
        A template that cannot be read or that reaches for attributes, or values that are no text.

    Examples
    --------
    >>> df = pd.DataFrame({"gene": ["lacZ", None], "start": [362455, 1]})
    >>> make_prompts(df, "What does {gene} at {start:,} do?").texts
    ['What does lacZ at 362,455 do?', None]
    """
    check_frame(df)
    if isinstance(prompt, pd.Series):
        return _from_series(df, prompt)
    if isinstance(prompt, str):
        if prompt in df.columns:
            return _from_values(unique_column(df, prompt), f"column {prompt!r}")
        return _from_template(df, prompt)
    if callable(prompt):
        return _from_callable(df, prompt)
    raise PromptError(f"a prompt is a template, a column's name, a callable or a Series; got a {type(prompt).__name__}")


def placeholders(template: str, names: Iterable[Hashable]) -> list[tuple[str, str | None, str]]:
    """Split a template into ``(literal text, field or None, format spec)`` parts, and check its fields.

    Raises
    ------
    PromptError
        Unbalanced braces, attribute or item access, conversions, nested or empty fields.
    UnknownColumnError
        A field that is not among ``names``.
    """
    known = {str(name) for name in names}
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as exc:
        raise PromptError(
            f"the template's braces do not balance ({exc}); write {{{{ and }}}} for literal braces: {template!r}"
        ) from exc
    checked: list[tuple[str, str | None, str]] = []
    for literal, name, spec, conversion in parts:
        if name is not None and name not in known:
            if not name:
                raise PromptError(f"an empty placeholder {{}}: write the column's name in it, as {{column}}. {_BRACES}")
            if any(c in name for c in ".[]"):
                raise PromptError(
                    f"{{{name}}} reaches into a value: a placeholder is a column's name and a format spec, nothing "
                    f"else. Use a callable for more: lambda row: ... {_BRACES}"
                )
            raise _unknown(f"the template's placeholder {{{name}}}", name, known)
        if conversion or "{" in (spec or ""):
            raise PromptError(
                f"{{{name}}}: conversions (!r) and nested placeholders are not supported; use a callable. {_BRACES}"
            )
        checked.append((literal, name, spec or ""))
    return checked


def fill_parts(parts: Iterable[tuple[str, str | None, str]], values: Mapping[str, Any]) -> str:
    """Fill the parts of a template once: braces in the values are not placeholders.

    Examples
    --------
    >>> parts = placeholders("Level {level}: {responses}", ["level", "responses"])
    >>> fill_parts(parts, {"level": "1", "responses": "{level}"})
    'Level 1: {level}'
    """
    return "".join(literal + (format(values[name], spec) if name is not None else "") for literal, name, spec in parts)


def with_alias(prompt: Any, alias: str, name: str) -> Any:
    """A prompt that may call the column ``name`` by another name, too: a template, a column's name, a function, steps
    of a pipeline, or a frame of examples. Anything else stays as it is.

    Examples
    --------
    >>> with_alias("{{{value}}} is {value:.3}", "value", "abstract")
    '{{{abstract}}} is {abstract:.3}'
    """
    if isinstance(prompt, str):
        return name if prompt == alias else _with_field(prompt, alias, name)
    if isinstance(prompt, pd.DataFrame):
        return prompt if name in prompt.columns else prompt.rename(columns={alias: name})
    if isinstance(prompt, list | tuple) and prompt and all(hasattr(step, "when") for step in prompt):
        steps = [copy.copy(step) for step in prompt]
        for step in steps:
            step.prompt, step.when = (with_alias(text, alias, name) for text in (step.prompt, step.when))
        return steps
    if not callable(prompt):
        return prompt
    return functools.wraps(prompt)(lambda row: prompt(Row({**row, alias: row[name]})))


def _with_field(template: str, old: str, new: str) -> str:
    """A template with another name for one of its fields."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError:  # it is said elsewhere
        return template
    if all(field != old for _, field, _, _ in parts):
        return template
    made = ""
    for literal, field, spec, conversion in parts:
        made += literal.replace("{", "{{").replace("}", "}}")
        if field is not None:
            how = (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            made += f"{{{new if field == old else field}{how}}}"
    return made


def _unknown(what: str, name: str, known: Iterable[str]) -> UnknownColumnError:
    columns = sorted(known)
    near = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if "placeholder {" in what and not (near and name.isidentifier()):
        hint += f" {_BRACES}"
    return UnknownColumnError(f"{what} is not a column.{hint} The columns are: {', '.join(columns) or 'none'}")


def check_column(df: pd.DataFrame, name: Hashable) -> None:
    """Check that a frame has a column.

    Raises
    ------
    UnknownColumnError
        It has none of that name; the message names the nearest.
    """
    if name not in df.columns:
        placeholders(f"{{{name}}}", df.columns)


def unique_column(df: pd.DataFrame, name: Hashable) -> pd.Series:
    """The column of a name.

    Raises
    ------
    PromptError
        Several columns have it.
    """
    found = df[name]
    if isinstance(found, pd.DataFrame):
        raise PromptError(f"{found.shape[1]} columns are named {name!r}; rename all but one, or use a callable")
    return found


def _from_series(df: pd.DataFrame, prompts: pd.Series) -> Prompts:
    if len(prompts) != len(df) or not prompts.index.equals(df.index):
        raise PromptError(
            f"the Series of prompts ({len(prompts)} values) does not have the index of the frame ({len(df)} rows)"
        )
    return _from_values(prompts, "the Series of prompts")


def _from_values(column: pd.Series, what: str) -> Prompts:
    values, missing = values_of(column), missing_in(column)
    refuse_containers(column, values, what)
    texts: list[str | None] = [
        None if absent else v if isinstance(v, str) else str(v) for v, absent in zip(values, missing, strict=True)
    ]
    return Prompts(texts, {int(i): f"missing value in {what}" for i in np.flatnonzero(missing)})


# ---- values ------------------------------


def values_of(column: pd.Series) -> list[Any]:
    """The values of a column as Python objects whose text is what pandas shows.

    A short float becomes the double with its digits, not the one that is next to it in binary.

    Examples
    --------
    >>> pd.Series([0.1], dtype="float32").tolist(), values_of(pd.Series([0.1], dtype="float32"))
    ([0.10000000149011612], [0.1])
    """
    dtype = column.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        shown = [*values_of(pd.Series(dtype.categories)), None]  # code -1: missing
        return [shown[code] for code in column.cat.codes]
    kind = _numpy_kind(dtype)
    if kind.kind == "f" and kind.itemsize < 8:
        digits: list[float] = column.to_numpy(kind, na_value=np.nan).astype(str).astype(np.float64).tolist()
        return digits
    if kind == np.complex64:
        return list(column.to_numpy())  # numpy's own, whose text has the digits
    values: list[Any] = column.tolist()
    if kind.kind == "O" and not isinstance(dtype, pd.StringDtype):
        return [plain_scalar(v) if isinstance(v, np.generic) else v for v in values]
    return values


def plain_scalar(value: np.generic) -> Any:
    """A scalar of numpy as Python has it, a short float with its own digits."""
    return float(str(value)) if isinstance(value, np.float32 | np.float16) else value.item()


def missing_in(column: pd.Series) -> np.ndarray:
    """Where a column has no value. NaN is none, whatever the column's dtype and the version of pandas."""
    missing = np.asarray(column.isna(), dtype=bool)
    if isinstance(column.dtype, pd.api.extensions.ExtensionDtype) and _numpy_kind(column.dtype).kind == "f":
        missing = missing | np.isnan(column.to_numpy(np.float64, na_value=np.nan))
    return missing


def _numpy_kind(dtype: Any) -> np.dtype[Any]:
    """The numpy dtype of a column's values; object for those that numpy has none for."""
    kind = dtype.subtype if isinstance(dtype, pd.SparseDtype) else getattr(dtype, "numpy_dtype", dtype)
    return kind if isinstance(kind, np.dtype) else np.dtype(object)


def refuse_containers(column: pd.Series, values: Sequence[Any], what: str) -> None:
    """Refuse values that are no text and no number.

    Parameters
    ----------
    column : Series
        The column, for its dtype and labels.
    values : sequence
        Its values.
    what : str
        What the column is to the user.

    Raises
    ------
    PromptError
        A list, a dict, an object whose text would be its address in memory, or the like.
    """
    if isinstance(column.dtype, pd.StringDtype) or _numpy_kind(column.dtype).kind not in "OSV":
        return
    for place, value in enumerate(values):
        if isinstance(value, str):
            continue
        kind: Any = type(value)
        if isinstance(value, _CONTAINERS) or (kind.__str__ is object.__str__ and kind.__repr__ is object.__repr__):
            raise PromptError(
                f"{what} holds a {kind.__name__} (row {column.index[place]!r}); prompts are made of text and numbers. "
                "Turn it into text first, or use a callable: lambda row: ..."
            )


# ---- prompts ------------------------------


def _from_template(df: pd.DataFrame, template: str) -> Prompts:
    parts = placeholders(template, df.columns)
    names = list(dict.fromkeys(name for _, name, _ in parts if name is not None))
    if not names:
        raise _unknown(f"{template!r} holds no placeholder, and it", template, map(str, df.columns))
    labels: dict[str, set[Hashable]] = {}
    for label in df.columns:
        labels.setdefault(str(label), set()).add(label)
    for name in names:
        if len(labels[name]) > 1:
            several = " and ".join(sorted(map(repr, labels[name])))
            raise PromptError(f"{{{name}}} may be the column {several}; rename all but one, or use a callable")
    columns = [unique_column(df, *labels[name]) for name in names]
    found = [values_of(column) for column in columns]
    for name, column, values in zip(names, columns, found, strict=True):
        refuse_containers(column, values, f"column {name!r}")
    # Positions in place of names: a column may have a name that str.format cannot read.
    positional = "".join(
        literal.replace("{", "{{").replace("}", "}}")
        + ("" if name is None else f"{{{names.index(name)}{':' if spec else ''}{spec}}}")
        for literal, name, spec in parts
    )
    missing = [missing_in(column) for column in columns]
    errors: dict[int, str] = {}
    for name, absent in zip(names, missing, strict=True):
        for i in np.flatnonzero(absent):
            errors.setdefault(int(i), f"missing value in column {name!r}")
    if not errors:
        with contextlib.suppress(ValueError, TypeError):  # the loop below finds the row that does not fit
            return Prompts(list(map(positional.format, *found)))
    texts: list[str | None] = []
    for row, filled in enumerate(zip(*found, strict=True)):
        try:
            texts.append(None if row in errors else positional.format(*filled))
        except (ValueError, TypeError) as exc:
            shown = ", ".join(f"{n}={v!r}" for n, v in zip(names, filled, strict=True))
            raise PromptError(
                f"row {df.index[row]!r} does not fit the template's format ({exc}): {shown[:200]}"
            ) from exc
    return Prompts(texts, errors)


def _from_callable(df: pd.DataFrame, make: Callable[[Row], Any]) -> Prompts:
    names = [str(label) for label in df.columns]
    columns = [values_of(df.iloc[:, i]) for i in range(df.shape[1])]
    rows = zip(*columns, strict=True) if columns else (() for _ in range(len(df)))
    texts: list[str | None] = []
    errors: dict[int, str] = {}
    for i, values in enumerate(rows):
        try:
            text = make(Row(zip(names, values, strict=True)))
        except Exception as exc:
            raise PromptError(f"the prompt function failed on row {df.index[i]!r}: {exc!r}") from exc
        if text is None or (not isinstance(text, str) and pd.isna(text) is True):
            errors[i] = "the prompt function gave no text"
            texts.append(None)
        elif isinstance(text, str):
            texts.append(text)
        else:
            raise PromptError(
                f"the prompt function gave a {type(text).__name__} on row {df.index[i]!r}; it must give a str"
            )
    return Prompts(texts, errors)
