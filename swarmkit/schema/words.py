"""What is wrong with an answer, in words for a person."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..text import few, printable
from .fields import Field, Kind

if TYPE_CHECKING:
    from pydantic import ValidationError

__all__ = ["WORDS", "Invalid", "explained", "one_of", "show"]

_SHOWN = 60  # characters of a value in a message
_MOST = 3  # problems that a message names

WORDS: dict[Kind, str] = {
    "text": "a text",
    "label": "one of the labels",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "date": "a date such as 2024-01-31",
    "datetime": "a date and time such as 2024-01-31T12:00:00",
    "object": "an object",
}
# The beginnings of pydantic's names of errors; its own words are for programmers. "date_past" is not among them.
_BY_ERROR = {
    "int_": WORDS["int"],
    "float_": WORDS["float"],
    "finite_number": WORDS["float"],
    "bool_": WORDS["bool"],
    "string_type": WORDS["text"],
    "list_": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "dict_": WORDS["object"],
    "model_": WORDS["object"],
    "date_type": WORDS["date"],
    "date_parsing": WORDS["date"],
    "date_from": WORDS["date"],
    "datetime_type": WORDS["datetime"],
    "datetime_parsing": WORDS["datetime"],
    "datetime_from": WORDS["datetime"],
    "none_required": "null",
}


class Invalid(ValueError):  # noqa: N818 - never leaves this module but as the ValueError of Schema.values
    """An answer does not fit; the message is for a person."""


def explained(exc: ValidationError, text: str, fields: Sequence[Field]) -> str:
    """What is wrong with an answer, at most so many of its problems."""
    import pydantic_core

    errors = exc.errors(include_url=False)
    if errors[0]["type"] == "json_invalid":
        reason = str(errors[0]["ctx"]["error"])
        if not text.strip():
            return "the answer is empty"
        if reason.startswith("EOF") and text.lstrip().startswith(("{", "[")):
            return "the answer is JSON that ends early"
        return f"the answer is not JSON: {printable(reason)}; got {show(text)}"
    if errors[0]["type"] == "string_unicode":
        return f"the answer has half of a surrogate pair, which is no character; got {show(text)}"
    try:
        document = pydantic_core.from_json(text)
    except ValueError:
        document = None
    labels = {f.name: f.labels for f in fields}
    found: dict[str, tuple[list[str], str]] = {}  # a type of several alternatives has an error for each of them
    for error in errors:
        place = _place(error["loc"], document, error["type"] == "missing")
        phrases, _ = found.setdefault(place, ([], show(error["input"])))
        phrase = _phrase(error, labels.get(place, ()))
        if phrase not in phrases:
            phrases.append(phrase)
    told = []
    for place, (phrases, got) in found.items():
        alternatives = [p.removeprefix("must be ") for p in phrases if p.startswith("must be ")]
        what = f"must be {' or '.join(alternatives)}" if len(alternatives) == len(phrases) else phrases[0]
        told.append(f"{place} {what}" + (f"; got {got}" if what != "is missing" else ""))
    more = len(told) - _MOST
    return ". ".join([*told[:_MOST], *([f"And {more} more"] if more > 0 else [])])


def _place(location: Sequence[str | int], document: Any, is_missing: bool) -> str:
    """The name of a value within the answer. pydantic's has the names of alternatives too, which nobody wrote."""
    name, here = "", document
    for i, step in enumerate(location):
        absent = is_missing and i == len(location) - 1
        if isinstance(step, int) and isinstance(here, list) and (step < len(here) or absent):
            name += f"[{step}]"
        elif isinstance(step, str) and isinstance(here, dict) and (step in here or absent):
            name += f".{step}"
        else:
            continue
        here = None if absent else here[step]
    return printable(name.removeprefix("."), _SHOWN) or "the answer"


def _phrase(error: Any, labels: Sequence[str]) -> str:
    type_, message = error["type"], str(error["msg"])
    if type_ == "missing":
        return "is missing"
    if type_ == "extra_forbidden":
        return "is no field that was asked for"
    if type_ in ("literal_error", "enum"):
        return f"must be {one_of(labels) if labels else printable(str(error['ctx']['expected']))}"
    for beginning, words in _BY_ERROR.items():
        if type_.startswith(beginning):
            return f"must be {words}"
    message = printable(message.removeprefix("Value error, ").removeprefix("Assertion failed, "))
    changed = re.sub(r"^(Input|String|List|Value|Dictionary|Tuple|Set) should ", "must ", message)
    return changed if changed != message else f"is not valid: {message}"


def one_of(labels: Sequence[str]) -> str:
    """Labels, as a list to choose from."""
    return f"one of {few([show(label) for label in labels], len(labels), 12)}"


def show(value: Any) -> str:
    """A value for a message: texts in quotes, the rest as JSON has it, cut."""
    if isinstance(value, str):
        return printable(repr(value[:_SHOWN])) + (" ..." if len(value) > _SHOWN else "")
    try:
        return printable(json.dumps(value, ensure_ascii=False), _SHOWN)
    except (TypeError, ValueError, RecursionError):
        return printable(repr(value), _SHOWN)
