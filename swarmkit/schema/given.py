"""What a caller gives as a schema, and what it stands for."""

from __future__ import annotations

import copy
import datetime
import types
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args, get_origin

from ..errors import SettingError
from .answers import LONE_READERS, guarded, json_reader, label_reader, plain, plain_value
from .fields import Field, Kind, checked_labels, checked_name, field_of
from .json_schema import Inliner, is_json_schema, translated_fields
from .models import date_types, describe, is_model, own_model
from .words import show

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = ["Plan", "parsed_type", "plan_of"]

_ALLOWED = (
    "a pydantic model, a JSON Schema of an object, {'field': type}, a list of labels, int, float or bool; "
    "for a pattern or a grammar use their own keywords"
)
_TYPES = (
    "str, int, float, bool, datetime.date, datetime.datetime, list[...], Literal[...], Optional[...], "
    "a list of labels, a dict of fields, or a pydantic model"
)
_NAMED = {t.__name__: t for t in (str, int, float, bool, datetime.date, datetime.datetime)}

# Labels and patterns are what every grammar backend takes. A JSON Schema of a lone number is refused by some, and lets
# others write digits or white space without end: the patterns have an end, and stay within what Int64 and Float64 hold.
_INT = "-?(0|[1-9][0-9]{0,17})"
_FLOAT = r"-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?([eE][+-]?[0-9]{1,2})?"
_LONE: dict[type, tuple[Kind, dict[str, Any]]] = {
    int: ("int", {"regex": _INT}),
    float: ("float", {"regex": _FLOAT}),
    bool: ("bool", {"choice": ["true", "false"]}),
}


class Plan(NamedTuple):
    """What a schema is made of."""

    constraint: dict[str, Any]
    fields: tuple[Field, ...]
    read: Callable[[str], tuple[Any, ...]]


def plan_of(given: Any) -> Plan:
    """The plan of a schema in any of its forms."""
    if get_origin(given) is Literal:
        given = get_args(given)
    if isinstance(given, (list, tuple)):
        labels = checked_labels(given, "schema")
        return Plan({"choice": list(labels)}, (Field("", "label", labels),), label_reader(labels))
    if isinstance(given, type) and given in _LONE:
        kind, constraint = _LONE[given]
        return Plan(copy.deepcopy(constraint), (Field("", kind),), LONE_READERS[kind])
    if is_model(given):
        return _plan_of_model(given)
    if not isinstance(given, Mapping):
        hint = "; give the class, not an instance of it" if is_model(type(given)) else ""
        raise SettingError(f"schema={show(given)}: must be {_ALLOWED}{hint}")
    if not given:
        raise SettingError("schema={}: has no fields; give {'field': type}, with one field or more")
    if is_json_schema(given):
        described = Inliner(given, asked=True).top()
        return _plan_of_own(own_model(translated_fields(described, "")), described)
    model = own_model({checked_name(n, ""): _annotation(t, n) for n, t in given.items()})
    return _plan_of_own(model, Inliner(describe(model)).top())


def _plan_of_own(model: type[BaseModel], described: dict[str, Any]) -> Plan:
    fields = tuple(field_of(name, node) for name, node in described["properties"].items())
    validate = model.__pydantic_validator__.validate_json
    objects = [i for i, field in enumerate(fields) if field.kind == "object"]

    def values(text: str) -> tuple[Any, ...]:
        found = list(validate(text).__dict__.values())
        for i in objects:
            found[i] = plain(found[i])
        return tuple(found)

    read = json_reader(values, fields)
    return Plan(
        {"json": described}, fields, guarded(read) if objects else read
    )  # a model of the caller's may be in one


def _plan_of_model(model: type[BaseModel]) -> Plan:
    described = Inliner(describe(model), model.__name__).top()
    properties = described["properties"]
    fields = []
    for name, info in model.model_fields.items():
        choices = getattr(info.validation_alias, "choices", [info.validation_alias])
        written = next((c for c in (*choices, info.alias, name) if isinstance(c, str) and c in properties), None)
        fields.append(field_of(name, properties[written] if written else {}))
    validate = model.__pydantic_validator__.validate_json

    def values(text: str) -> tuple[Any, ...]:
        found = vars(validate(text))
        return tuple(plain_value(field, found[field.name]) for field in fields)

    return Plan({"json": described}, tuple(fields), guarded(json_reader(values, fields)))


def _annotation(given: Any, place: str) -> Any:
    """The type for pydantic of what the caller gives as the type of a field."""
    union: Any = typing.Union
    origin, args = get_origin(given), get_args(given)
    if isinstance(given, (list, tuple)):
        return _literal(checked_labels([v for v in given if v is not None], place), None in given)
    if isinstance(given, Mapping):
        if not given:
            raise SettingError(f"{place}: has no fields; give {{'field': type}}, with one field or more")
        if is_json_schema(given):
            raise SettingError(f"{place}: a JSON Schema among types; give the whole schema as one, or a type here")
        return own_model({checked_name(n, place): _annotation(t, f"{place}.{n}") for n, t in given.items()})
    if origin in (typing.Union, types.UnionType):
        return union[tuple(type(None) if a is type(None) else _annotation(a, place) for a in args)]
    if origin is Literal:
        values = tuple(v for v in args if v is not None)
        numbers = bool(values) and all(type(v) is int for v in values)
        return _literal(values if numbers else checked_labels(values, place), None in args)
    if origin is list:
        item: Any = _annotation(args[0], f"{place}[]")
        return list[item]
    if origin is Annotated:
        return Annotated[(_annotation(args[0], place), *args[1:])]
    if given is list:
        return list[Any]
    if is_model(given):
        return given
    if isinstance(given, type) and given in _NAMED.values():
        return date_types().get(given, given)
    if isinstance(given, str) and given in _NAMED:
        raise SettingError(f"{place}: {given!r} is a text; give the type itself: {given}")
    raise SettingError(f"{place}: {show(given)} is no type of a field; allowed are {_TYPES}")


def _literal(values: tuple[Any, ...], optional: bool) -> Any:
    # To Python, literals in another order are equal, and it gives back a union that it has made of equal ones before:
    # the annotation, which pydantic ignores, makes them differ.
    literal: Any = Literal
    found: Any = Annotated[literal[values], values]
    return found | None if optional else found


def parsed_type(text: str, place: str) -> Any:
    """The type that the command line names."""
    text = text.strip()
    if text in _NAMED:
        return _NAMED[text]
    if "|" in text:
        literal: Any = Literal
        return literal[checked_labels([label.strip() for label in text.split("|")], place)]
    if text.startswith("list[") and text.endswith("]"):
        inner: Any = parsed_type(text[5:-1], place)
        return list[inner]
    raise SettingError(
        f"{place}: {text!r} is no type; allowed are {', '.join(_NAMED)}, list[type], and labels with | between them"
    )
