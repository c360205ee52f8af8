"""How the text of an answer becomes values."""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from ..text import printable
from .fields import Field, Kind
from .models import is_model, is_own
from .words import WORDS, Invalid, explained, one_of, show

__all__ = ["LONE_READERS", "guarded", "json_reader", "label_reader", "plain", "plain_value"]

_FENCE = re.compile(r"```[\w-]*\s*")


def json_reader(values: Callable[[str], tuple[Any, ...]], fields: Sequence[Field]) -> Callable[[str], tuple[Any, ...]]:
    """A reader of JSON objects, of which ``values`` validates the JSON and takes the values."""
    from pydantic import ValidationError

    def read(text: str) -> tuple[Any, ...]:
        try:
            return values(text)
        except ValidationError as exc:
            part = _json_part(text)
            if part == text:
                raise Invalid(explained(exc, text, fields)) from None
        try:
            return values(part)
        except ValidationError as exc:
            raise Invalid(explained(exc, part, fields)) from None

    return read


def guarded(read: Callable[[str], tuple[Any, ...]]) -> Callable[[str], tuple[Any, ...]]:
    """A reader that calls validators of the caller's: what they raise is the end of one answer, not of the run."""

    def guard(text: str) -> tuple[Any, ...]:
        try:
            return read(text)
        except Invalid:
            raise
        except Exception as exc:  # noqa: BLE001 - it may be anything
            raise Invalid(f"the model's own validation failed: {type(exc).__name__}: {printable(str(exc))}") from None

    return guard


def _json_part(text: str) -> str:
    """The answer without what models like to put around JSON: white space, or a fence."""
    text = text.strip()
    if text.startswith(("{", "[")):  # a fence would be within one of its texts
        return text
    starts = [fence.end() for fence in _FENCE.finditer(text)][::2]  # every other one ends a block
    for start in starts:
        try:
            _, end = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        rest = text[end:].lstrip()
        if not rest or rest.startswith("```"):
            return text[start:end]
    return text[starts[0] :].partition("\n```")[0].strip() if starts else text  # to be explained


_EXACT: dict[Kind, type | None] = {
    "text": str,
    "label": str,
    "int": int,
    "float": float,
    "bool": bool,
    "date": datetime.date,
    "datetime": datetime.datetime,
    "object": None,
}


def plain_value(field: Field, value: Any) -> Any:
    """A value of pydantic's as its field promises it; validators of the caller's may have made anything of it."""
    kind = field.kind
    exact = _EXACT[kind]
    if value is None or (type(value) is exact and kind != "label"):
        return value
    if exact is None:
        return plain(value)
    if isinstance(value, Enum):
        return plain_value(field, value.value)
    if kind == "text":
        return str.__str__(value) if isinstance(value, str) else str(value)
    if kind == "label" and value in field.labels:
        return field.labels[field.labels.index(value)]
    if kind in ("int", "float") and isinstance(value, (int, exact)) and not isinstance(value, bool):
        return exact(value)
    if kind == "datetime" and isinstance(value, exact):
        return value
    raise Invalid(f"{field.name} must be {one_of(field.labels) if field.labels else WORDS[kind]}; got {show(value)}")


def plain(value: Any) -> Any:
    """Models as dicts, with the names that the caller gave, and collections as lists; the rest as it is."""
    if type(value) in _AS_THEY_ARE:
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if is_model(type(value)):
        own = is_own(type(value))
        names = {n: (i.alias if own and i.alias else n) for n, i in type(value).model_fields.items()}
        return {names[n]: plain(v) for n, v in vars(value).items() if n in names} | (value.model_extra or {})
    return value.value if isinstance(value, Enum) else value


_AS_THEY_ARE = {str, int, float, bool, type(None)}


_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’", "«": "»"}
_INT = re.compile("[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_BOOLS = {"true": True, "yes": True, "false": False, "no": False}


def label_reader(labels: tuple[str, ...]) -> Callable[[str], tuple[str]]:
    """A reader of lone labels: exact first; else in any case, in quotes, or with a full stop, if only one fits."""
    exact = dict.fromkeys(labels)
    folded: dict[str, list[str]] = {}
    for label in labels:
        folded.setdefault(label.casefold(), []).append(label)

    def read(text: str) -> tuple[str]:
        answer = text.strip()
        if answer in exact:
            return (answer,)
        peeled = _peeled(answer)
        if peeled in exact:
            return (peeled,)
        for candidate in (answer, peeled):
            meant = folded.get(candidate.casefold(), [])
            if len(meant) == 1:
                return (meant[0],)
        raise Invalid(f"the answer must be {one_of(labels)}; got {show(text)}")

    return read


def _peeled(answer: str) -> str:
    """Without a final full stop and quotes, in either order."""
    answer = answer.removesuffix(".").rstrip()
    if len(answer) > 1 and _QUOTES.get(answer[0]) == answer[-1]:
        answer = answer[1:-1].strip().removesuffix(".").rstrip()
    return answer


def _read_int(text: str) -> tuple[int]:
    answer = text.strip().removesuffix(".")
    try:
        if _INT.fullmatch(answer):
            return (int(answer),)
    except ValueError:  # more digits than Python reads
        pass
    raise Invalid(f"the answer must be {WORDS['int']}; got {show(text)}")


def _read_float(text: str) -> tuple[float]:
    answer = text.strip()
    if _FLOAT.fullmatch(answer) and math.isfinite(float(answer)):
        return (float(answer),)
    raise Invalid(f"the answer must be {WORDS['float']}; got {show(text)}")


def _read_bool(text: str) -> tuple[bool]:
    answer = text.strip().removesuffix(".").lower()
    if answer in _BOOLS:
        return (_BOOLS[answer],)
    raise Invalid(f"the answer must be {WORDS['bool']}; got {show(text)}")


LONE_READERS: dict[Kind, Callable[[str], tuple[Any, ...]]] = {
    "int": _read_int,
    "float": _read_float,
    "bool": _read_bool,
}
