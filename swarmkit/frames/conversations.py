"""Conversations as prompts, and examples of answers."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from ..client.thinking import opens
from ..errors import PromptError, SettingError, UnknownColumnError
from ..records import Prompts
from ..text import printable
from .prompts import PromptLike, check_column, check_frame, make_prompts, missing_in, unique_column, values_of

__all__ = ["read_examples", "read_prefix", "row_prompts"]

_ROLES = ("system", "user", "assistant")
_SHAPE = 'a conversation is a list of {"role": ..., "content": ...}, the last of the user'


def row_prompts(df: pd.DataFrame, prompt: PromptLike | None, messages: Any) -> Prompts:
    """What is asked of each row: its prompt, or its conversation, as JSON.

    Parameters
    ----------
    df : pandas.DataFrame
        The rows.
    prompt : str, callable or Series, optional
        As ``make_prompts`` takes it.
    messages : object
        The column of conversations; None where there is a prompt.

    Raises
    ------
    PromptError
        Neither is given, or both.
    UnknownColumnError
        There is no such column.

    Examples
    --------
    >>> df = pd.DataFrame({"chat": [[{"role": "user", "content": "Hi"}], [{"role": "bot", "content": "Hi"}]]})
    >>> found = row_prompts(df, None, "chat")
    >>> found.texts
    ['[{"role":"user","content":"Hi"}]', None]
    """
    if messages is None:
        if prompt is None:
            raise PromptError(
                "there is nothing to ask: give a prompt (a template with {column} placeholders, a column's name, a "
                "callable or a Series), or messages='column' with conversations"
            )
        return make_prompts(df, prompt)
    if prompt is not None and not (isinstance(prompt, str) and prompt == messages):
        raise PromptError(
            "a prompt and messages= were given: the last turn of a conversation is what is asked. Give one of them, or "
            "add the prompt to the conversations as a turn of the user"
        )
    check_frame(df)
    if not isinstance(messages, Hashable):
        raise SettingError(f"messages= got a {type(messages).__name__}: it is the name of a column of conversations")
    check_column(df, messages)
    column = unique_column(df, messages)
    texts: list[str | None] = []
    errors: dict[int, str] = {}
    for row, (cell, absent) in enumerate(zip(values_of(column), missing_in(column), strict=True)):
        texts.append(None)
        if absent:
            errors[row] = f"missing value in column {messages!r}"
            continue
        try:
            texts[row] = json.dumps(_turns(cell), ensure_ascii=False, separators=(",", ":"))
        except ValueError as exc:
            errors[row] = f"column {messages!r}: {exc}"
    return Prompts(texts, errors)


def _turns(cell: Any) -> list[dict[str, str]]:
    """The messages of a cell; a ValueError says what is wrong with it."""
    if isinstance(cell, str):  # as files without types have it
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            raise ValueError(f"{_shown(cell)} is no JSON; {_SHAPE}") from None
    if isinstance(cell, np.ndarray):  # as pandas reads lists of Parquet files
        cell = cell.tolist()
    if not isinstance(cell, list | tuple):
        raise ValueError(f"{_shown(cell)} is no conversation; {_SHAPE}")
    turns: list[dict[str, str]] = []
    for number, message in enumerate(cell, 1):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {number} is {_shown(message)}; {_SHAPE}")
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            has = "no role" if role is None else f"the role {role!r}"
            raise ValueError(f"message {number} has {has}; roles are {', '.join(_ROLES[:-1])} and {_ROLES[-1]}")
        if not isinstance(content, str):
            has = "no content" if content is None else f"a {type(content).__name__} as content"
            raise ValueError(f"message {number} has {has}; it must be a text")
        # A field without a value is none: Parquet files have all fields in all messages.
        if others := [name for name, value in message.items() if name not in ("role", "content") and value is not None]:
            raise ValueError(f"message {number} has {others[0]!r} beside role and content; leave it out")
        if role == "system" and turns:
            raise ValueError(f"message {number} has the role 'system', which only the first may have")
        turns.append({"role": str(role), "content": str(content)})
    if not turns:
        raise ValueError(f"an empty list; {_SHAPE}")
    if turns[-1]["role"] != "user":
        has = f"the role {turns[-1]['role']!r}"
        raise ValueError(f"the last message has {has}, so there is nothing to answer; it must be 'user'")
    return turns


def read_examples(given: Any, prompt: PromptLike | None, out: str) -> tuple[tuple[str, str], ...]:
    """Prompts and their answers: of pairs, or of a frame like that of the rows, for each of whose rows the prompt is
    made, with the answers in ``out``.

    Raises
    ------
    SettingError
        Values that are neither, or an example without prompt or answer.
    UnknownColumnError, PromptError
        The frame lacks a column.

    Examples
    --------
    >>> shown = pd.DataFrame({"gene": ["lacZ"], "response": ["It cuts lactose."]})
    >>> read_examples(shown, "What does {gene} do?", "response")
    (('What does lacZ do?', 'It cuts lactose.'),)
    """
    if given is None:
        return ()
    if isinstance(given, pd.DataFrame):
        return _from_frame(given, prompt, out)
    pairs = list(given) if isinstance(given, list | tuple) else [given]
    for pair in pairs:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise SettingError(
                "examples= takes a list of (prompt, answer) pairs of texts, or a DataFrame with the prompt's columns "
                f"and {out!r}, a column of answers; got {'' if pair is given else 'a list with '}{_shown(pair)}"
            )
    return tuple((str(question), str(answer)) for question, answer in pairs)


def _shown(value: Any) -> str:
    return printable(repr(value), 60)


def _from_frame(frame: pd.DataFrame, prompt: PromptLike | None, out: str) -> tuple[tuple[str, str], ...]:
    if prompt is None or isinstance(prompt, pd.Series):
        what = "messages= has" if prompt is None else "a Series has"
        raise SettingError(
            f"examples= as a DataFrame takes the prompt of a template or a column, which {what} not: give pairs, "
            "examples=[(prompt, answer), ...]"
        )
    try:
        check_column(frame, out)
        asked, answers = make_prompts(frame, prompt), make_prompts(frame, out)
    except (PromptError, UnknownColumnError) as exc:
        raise type(exc)(f"examples=: {exc}") from exc
    for row, error in {**asked.errors, **answers.errors}.items():
        raise SettingError(f"examples=, row {frame.index[row]!r}: {error}")
    return tuple((question or "", answer or "") for question, answer in zip(asked.texts, answers.texts, strict=True))


def read_prefix(given: Any) -> str | None:
    """The first words of every answer.

    Raises
    ------
    SettingError
        It is no text, or a blank one; or it opens the model's thoughts, which are no part of an answer.
    """
    if given is not None and (not isinstance(given, str) or not given.strip()):
        raise SettingError(f"assistant_prefix={given!r}: must be a text, the first words of every answer")
    if given is not None and opens(given):
        raise SettingError(f"assistant_prefix={given!r} makes the model think, not answer: use thinking=True")
    return given
