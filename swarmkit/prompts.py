"""Step 1: a column, a template, a callable or a Series becomes a list of prompts."""

from __future__ import annotations

import contextlib
import difflib
import string
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import numpy as np
import pandas as pd

from .errors import PromptError, UnknownColumnError
from .records import Prompts

__all__ = ["PromptLike", "Row", "fill", "make_prompts", "placeholders"]

PromptLike = str | Callable[["Row"], str] | pd.Series

_CONTAINERS = (list, dict, tuple, set, frozenset, bytes, bytearray, np.ndarray, pd.Series, pd.DataFrame)


class Row(dict[str, Any]):
    """One row as a callable prompt sees it: ``row["column"]`` or ``row.column``.

    Examples
    --------
    >>> Row(gene="lacZ").gene
    'lacZ'
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this row has no column {name!r}; it has {', '.join(self)}") from None


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
        typing error must not be sent ten million times.
    PromptError
        A template that cannot be read or that reaches for attributes, or values that are no text.

    Examples
    --------
    >>> df = pd.DataFrame({"gene": ["lacZ", None], "start": [362455, 1]})
    >>> make_prompts(df, "What does {gene} at {start:,} do?").texts
    ['What does lacZ at 362,455 do?', None]
    """
    if isinstance(prompt, pd.Series):
        return _from_series(df, prompt)
    if isinstance(prompt, str):
        if prompt in df.columns:
            return _from_values(_column(df, prompt), f"column {prompt!r}", df.index)
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
                raise PromptError("an empty placeholder {}: write the column's name in it, as {column}")
            if any(c in name for c in ".[]"):
                raise PromptError(
                    f"{{{name}}} reaches into a value: a placeholder is a column's name and a format spec, nothing "
                    "else. Use a callable for more: lambda row: ..."
                )
            raise _unknown(f"the template's placeholder {{{name}}}", name, known)
        if conversion or "{" in (spec or ""):
            raise PromptError(f"{{{name}}}: conversions (!r) and nested placeholders are not supported; use a callable")
        checked.append((literal, name, spec or ""))
    return checked


def fill(template: str, values: dict[str, str]) -> str:
    """Fill a template once: what was filled in is not read again, so braces in an answer stay what they are.

    Examples
    --------
    >>> fill("Level {level}: {responses}", {"level": "1", "responses": "{level}"})
    'Level 1: {level}'
    """
    parts = placeholders(template, values)
    return "".join(literal + (format(values[name], spec) if name is not None else "") for literal, name, spec in parts)


def _unknown(what: str, name: str, known: Iterable[str]) -> UnknownColumnError:
    columns = sorted(known)
    near = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UnknownColumnError(f"{what} is not a column.{hint} The columns are: {', '.join(columns) or 'none'}")


def _column(df: pd.DataFrame, name: Hashable) -> pd.Series:
    found = df[name]
    if isinstance(found, pd.DataFrame):
        raise PromptError(f"{found.shape[1]} columns are named {name!r}; rename all but one, or use a callable")
    return found


def _from_series(df: pd.DataFrame, prompts: pd.Series) -> Prompts:
    if len(prompts) != len(df) or not prompts.index.equals(df.index):
        raise PromptError(
            f"the Series of prompts ({len(prompts)} values) does not have the index of the frame ({len(df)} rows)"
        )
    return _from_values(prompts, "the Series of prompts", df.index)


def _from_values(values: pd.Series, what: str, index: pd.Index) -> Prompts:
    _refuse_containers(values, what)
    missing = values.isna().to_numpy()
    texts: list[str | None] = [
        None if gone else v if isinstance(v, str) else str(v) for v, gone in zip(values.tolist(), missing, strict=True)
    ]
    return Prompts(texts, {int(i): f"missing value in {what}" for i in np.flatnonzero(missing)})


def _refuse_containers(values: pd.Series, what: str) -> None:
    if values.dtype != object:
        return
    for label, value in zip(values.index, values, strict=True):
        if isinstance(value, _CONTAINERS):
            raise PromptError(
                f"{what} holds a {type(value).__name__} (row {label!r}); prompts are made of text and numbers. "
                "Turn it into text first, or use a callable: lambda row: ..."
            )


def _from_template(df: pd.DataFrame, template: str) -> Prompts:
    parts = placeholders(template, df.columns)
    names = list(dict.fromkeys(name for _, name, _ in parts if name is not None))
    if not names:
        raise _unknown(f"{template!r} holds no placeholder, and it", template, map(str, df.columns))
    labels = {str(label): label for label in df.columns}
    columns = [_column(df, labels[name]) for name in names]
    for name, column in zip(names, columns, strict=True):
        _refuse_containers(column, f"column {name!r}")
    # Positions for names: the fields are then ours, whatever the columns are called.
    positional = "".join(
        literal.replace("{", "{{").replace("}", "}}")
        + ("" if name is None else f"{{{names.index(name)}{':' if spec else ''}{spec}}}")
        for literal, name, spec in parts
    )
    missing = [column.isna().to_numpy() for column in columns]
    errors: dict[int, str] = {}
    for name, gone in zip(names, missing, strict=True):
        for i in np.flatnonzero(gone):
            errors.setdefault(int(i), f"missing value in column {name!r}")
    found = [column.tolist() for column in columns]
    if not errors:
        with contextlib.suppress(ValueError, TypeError):  # the slow way below says which row does not fit
            return Prompts(list(map(positional.format, *found)))
    texts: list[str | None] = []
    for row, values in enumerate(zip(*found, strict=True)):
        try:
            texts.append(None if row in errors else positional.format(*values))
        except (ValueError, TypeError) as exc:
            shown = ", ".join(f"{n}={v!r}" for n, v in zip(names, values, strict=True))
            raise PromptError(
                f"row {df.index[row]!r} does not fit the template's format ({exc}): {shown[:200]}"
            ) from exc
    return Prompts(texts, errors)


def _from_callable(df: pd.DataFrame, make: Callable[[Row], Any]) -> Prompts:
    names = [str(label) for label in df.columns]
    columns = [df.iloc[:, i].tolist() for i in range(df.shape[1])]
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
