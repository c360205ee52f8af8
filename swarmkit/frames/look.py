"""Frames that are looked at before and after a run: what is sent, one answer, the rows that failed."""

from __future__ import annotations

import contextlib
import html
import json
import re
import textwrap
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..errors import CallerError, SettingError
from ..records import FailureKind
from ..runs.notebook import RED
from ..text import plural, visible
from .answers import OURS
from .conversations import row_prompts
from .prompts import PromptLike, missing_in, read_by, values_of
from .provenance import answers_in, label_of, records
from .typed import text_column

__all__ = ["Page", "Preview", "failed", "show"]

_DESCRIBED = re.compile(  # what Failure.describe says, by itself or at the end of why no endpoint is left
    rf"(?P<kind>{'|'.join(map(re.escape, FailureKind))})(?: at (?P<endpoint>.+?))?"
    r"(?P<status> \(HTTP \d+\))?: (?P<rest>.*)",
    re.DOTALL,
)
_NO_PROMPT = ("missing value in ", "the prompt function gave no text")
_NOT_FINISHED = ("interrupted", "not finished", "no endpoint", "not in the store")
_WIDTH = 100
_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;text-align:left;margin:0;font-family:monospace"
_DIM = '<span style="opacity:.5">'


# ---- before ------------------------------


class Preview(pd.DataFrame):
    """What ``preview`` returns: a DataFrame that a notebook shows with whole prompts. What is made of it is plain.

    Parameters
    ----------
    frame : DataFrame
        With ``sent``, ``tokens`` and ``error``.
    prompts : sequence of str or None
        The prompts, without what the chat template adds.
    rows : int
        Rows of the frame that is asked.
    """

    _prompts: list[str | None]
    _rows: int

    def __init__(self, frame: pd.DataFrame, prompts: Sequence[str | None], rows: int) -> None:
        super().__init__(frame)  # type: ignore[call-arg] # the stubs of pandas know DataFrame.__new__ only
        object.__setattr__(self, "_prompts", list(prompts))  # as an attribute pandas would take it for a column
        object.__setattr__(self, "_rows", rows)

    @property
    def _constructor(self) -> type[pd.DataFrame]:
        return pd.DataFrame

    def _repr_html_(self) -> str:
        prompts = getattr(self, "_prompts", ())
        if len(prompts) != len(self) or not {"sent", "tokens", "error"} <= set(self.columns):  # changed in place
            return str(pd.DataFrame(self).to_html())
        columns = self.index, values_of(self["sent"]), self["tokens"], self["error"]
        shown = [
            _preview_row(repr(label), sent if isinstance(sent, str) else None, prompt, tokens, error)
            for label, sent, tokens, error, prompt in zip(*columns, prompts, strict=True)
        ]
        known = self["tokens"].dropna()
        total = f", {plural(int(known.sum()), 'token')} together" if len(known) else ""
        head = f"{len(self):,} of {plural(self._rows, 'row')}{total}; what the chat template adds is dimmed"
        return f"<div>{head}<table>{''.join(shown)}</table></div>"


def _preview_row(label: str, sent: str | None, prompt: str | None, tokens: Any, error: Any) -> str:
    side = '<td style="vertical-align:top;text-align:left;white-space:nowrap">'
    count = "" if pd.isna(tokens) else f"<br>{_DIM}{plural(int(tokens), 'token')}</span>"
    if sent is None:
        why = html.escape(visible(str(error)))
        text, count = f'<b style="color:{RED}">not sent</b>: {why}', ""
    else:
        text = _dimmed(sent, prompt or "")
    body = f'<td style="text-align:left"><div style="{_TEXT}">{text}</div></td>'
    return f"<tr>{side}{html.escape(visible(label))}{count}</td>{body}</tr>"


def _dimmed(sent: str, prompt: str) -> str:
    """What is sent, escaped; where the prompt is in it just once, what the template adds is dimmed."""
    if not prompt or sent.count(prompt) != 1:
        return html.escape(visible(sent))
    around = [part and f"{_DIM}{html.escape(visible(part))}</span>" for part in sent.split(prompt)]
    return html.escape(visible(prompt)).join(around)


# ---- after ------------------------------


class Page:
    """A page of text, as ``show`` returns it: printed by ``print`` and shown by a notebook as it is."""

    def __init__(self, parts: Sequence[tuple[str, str]]) -> None:
        self._parts = [(visible(title), visible(text)) for title, text in parts]

    def __str__(self) -> str:
        return "\n\n".join(f"{title}\n{'-' * len(title)}\n{_wrapped(text)}" for title, text in self._parts)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(
            f'<div style="opacity:.6;margin-top:.8em">{html.escape(title)}</div>'
            f'<div style="{_TEXT};max-width:{_WIDTH}ch">{html.escape(text)}</div>'
            for title, text in self._parts
        )


def _wrapped(text: str) -> str:
    return "\n".join(
        textwrap.fill(line, _WIDTH, replace_whitespace=False, drop_whitespace=False) for line in text.split("\n")
    )


def show(
    df: pd.DataFrame,
    row: Hashable,
    prompt: PromptLike | None = None,
    *,
    out: str | None = None,
    messages: Hashable | None = None,
) -> Page:
    """Show one prompt and its answer as a page of text.

    Parameters
    ----------
    df : pandas.DataFrame
        What a verb has returned.
    row : label
        The row's index label. All rows with this label are shown: samples, or duplicates.
    prompt : str, callable or Series, optional
        The prompt as it was asked. Otherwise it is made of the template that ``df.attrs["swarmkit"]`` has.
    out : str, optional
        The column of answers; by default that of the newest call.
    messages : str, optional
        The column of conversations, in place of ``prompt``.

    Returns
    -------
    Page
        Shown by a notebook, and printed by ``print``; ``str`` of it is the text.

    Raises
    ------
    SettingError
        The frame has no such row, or no such answers.

    Examples
    --------
    >>> df = df.swarm.scatter("What does {gene} do?", max_tokens=32)
    >>> df.swarm.show(1)
    prompt of row 1
    ---------------
    What does recA do?
    <BLANKLINE>
    response
    --------
    echo: What does recA do?
    """
    out = answers_in(df, out)
    rows = _positions(df, row)
    record = records(df).get(out, {})
    template = record.get("template") if prompt is None and messages is None else None
    parts: list[tuple[str, str]] = []
    if isinstance(system := record.get("parameters", {}).get("system"), str):
        parts.append(("system", system))
    earlier = None
    for place in rows:
        asked = _asked(df, place, prompt, messages) if template is None else _as_recorded(df, place, template, record)
        if asked != earlier:
            parts.append((f"prompt of row {row!r}", asked))
            earlier = asked
        parts += _answer(df, place, out)
    return Page(parts)


def _positions(df: pd.DataFrame, row: Hashable) -> list[int]:
    try:
        found: Any = pd.RangeIndex(len(df))[df.index.get_loc(row)]  # a position, a slice, or a mask
    except (KeyError, TypeError, ValueError, pd.errors.InvalidIndexError):
        raise SettingError(f"row={row!r}: not in the index of the frame, which has {plural(len(df), 'row')}") from None
    return [found] if isinstance(found, int) else list(found)


def _as_recorded(df: pd.DataFrame, place: int, template: str, record: Mapping[str, Any]) -> str:
    """The prompt of a row by the template of the record, if the frame has the values that were filled in."""
    if not read_by(df, template) & {label_of(df, name) for name in record.get("columns", ())}:
        with contextlib.suppress(CallerError):  # a column is gone, or the template is that of the nodes of a tree
            return _asked(df, place, template, None)
    return f"(not known here: this frame does not have what was filled into the template {template!r})"


def _asked(df: pd.DataFrame, place: int, prompt: PromptLike | None, messages: Any) -> str:
    if prompt is None and messages is None:
        return "(not known here: give the template, show(row, prompt))"
    if isinstance(prompt, pd.Series):
        prompt = prompt.iloc[place : place + 1]
    made = row_prompts(df.iloc[place : place + 1], prompt, messages)
    text = made.texts[0]
    if text is None:
        return f"(none: {made.errors[0]})"
    if messages is not None:
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in json.loads(text))
    return text


def _answer(df: pd.DataFrame, place: int, out: str) -> list[tuple[str, str]]:
    """The answer of a row, its thoughts, its error, and what else is known of it."""
    values = {name: df[label].iloc[place] for name in _columns_of(df, out) if (label := label_of(df, name)) is not None}
    values = {name: v for name, v in values.items() if isinstance(v, list | dict | np.ndarray) or not pd.isna(v)}
    found = [(name, str(values.pop(name))) for name in (f"{out}_reasoning", out, f"{out}_error") if name in values]
    values.pop(f"{out}_token_logprobs", None)
    if (took_s := f"{out}_latency_s") in values:
        values[took_s] = f"{values[took_s]:.3g}"
    if values:
        found.append(("details", "\n".join(f"{name}: {value}" for name, value in values.items())))
    return found or [(out, "(no answer and no error: this row was not asked)")]


def _columns_of(df: pd.DataFrame, out: str) -> list[str]:
    """Names of the columns that stand beside an answer, those that are in the frame once."""
    names = records(df).get(out, {}).get("columns") or [out, *(f"{out}_{name}" for name in OURS)]
    return [name for name in names if list(df.columns).count(label_of(df, name)) == 1]


def failed(df: pd.DataFrame, *, out: str | None = None) -> pd.DataFrame:
    """List the rows that have no answer, and why.

    Parameters
    ----------
    df : pandas.DataFrame
        What a verb has returned.
    out : str, optional
        The column of answers; by default that of the newest call.

    Returns
    -------
    pandas.DataFrame
        The failed rows with the columns that they had before; ``kind`` (as "request refused" or "no prompt"),
        ``endpoint`` (missing where it was none's fault) and ``message``. Columns of the frame that have one of these
        names are left out.

    Raises
    ------
    SettingError
        The frame has no such answers.

    Examples
    --------
    >>> import pandas as pd
    >>> error = "request refused at node1:8000 (HTTP 400): too long"
    >>> df = pd.DataFrame({"gene": ["lacZ", "recA"], "response": ["It cuts.", None], "response_error": [None, error]})
    >>> df.swarm.failed()
       gene             kind    endpoint              message
    1  recA  request refused  node1:8000  (HTTP 400) too long
    """
    out = answers_in(df, out)
    errors = df[label_of(df, f"{out}_error")]
    rows = np.flatnonzero(~missing_in(errors))
    own = {label_of(df, name) for name in (*_columns_of(df, out), "kind", "endpoint", "message")}
    found = df.iloc[rows]
    found = found.loc[:, [label not in own for label in found.columns]].copy()
    parted = [_parted(str(text)) for text in values_of(errors.iloc[rows])]
    at = label_of(df, f"{out}_endpoint")
    said = values_of(df[at].iloc[rows]) if at in df.columns else [None] * len(rows)
    last = [name if isinstance(name, str) else None for name in said]
    endpoints = [named or name for (_, named, _), name in zip(parted, last, strict=True)]
    for name, values in (
        ("kind", [kind for kind, _, _ in parted]), ("endpoint", endpoints), ("message", [text for *_, text in parted])
    ):  # fmt: skip
        found[label_of(df, name)] = text_column(values, found.index)
    return found


def _parted(error: str) -> tuple[str, str | None, str]:
    """Kind, endpoint if any, and message of a row's error.

    Examples
    --------
    >>> _parted("read timeout at node7:8000: nothing for 60 s")
    ('read timeout', 'node7:8000', 'nothing for 60 s')
    >>> _parted("missing value in column 'gene'")
    ('no prompt', None, "missing value in column 'gene'")
    """
    if found := _DESCRIBED.match(error):
        return found["kind"], found["endpoint"], f"{found['status'] or ''} {found['rest']}".strip()
    if error.startswith(_NO_PROMPT):
        return "no prompt", None, error
    last = _DESCRIBED.search(error)
    kind = "not finished" if error.startswith(_NOT_FINISHED) else "failed"
    return kind, last and last["endpoint"], error
