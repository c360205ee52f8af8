"""JSON Schema: written as grammar backends take it, and translated to types for pydantic."""

from __future__ import annotations

import datetime
import math
import re
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from ..errors import SettingError
from ..text import few
from .fields import checked_name
from .models import date_types, own_model
from .words import show

__all__ = ["Inliner", "is_json_schema", "translated_fields"]

_TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
_STRING = ("minLength", "maxLength", "pattern")
_NUMBER = {"minimum": "ge", "maximum": "le", "exclusiveMinimum": "gt", "exclusiveMaximum": "lt"}
_OF_TYPE: dict[Any, tuple[str, ...]] = {
    "string": ("format", *_STRING),
    "integer": ("multipleOf", *_NUMBER),
    "number": ("multipleOf", *_NUMBER),
    "array": ("items", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties"),
}
_ANYWHERE = ("type", "enum", "const", "anyOf", "description")
_KNOWN = {*_ANYWHERE, *(keyword for keywords in _OF_TYPE.values() for keyword in keywords)}
_REFUSED = {
    *("oneOf", "allOf", "not", "patternProperties", "if", "then", "else", "dependentSchemas", "dependentRequired"),
    *("dependencies", "unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef", "contains"),
}
_NOTES = {
    *("title", "default", "examples", "$schema", "$id", "$comment", "$anchor", "$defs", "definitions", "deprecated"),
    *("readOnly", "writeOnly"),
}


def is_json_schema(given: Mapping[Any, Any]) -> bool:
    """Whether a dict is a JSON Schema, and not one of fields and their types (``Schema.of`` has the rule)."""
    if any(isinstance(given.get(keyword), str) for keyword in ("type", "$ref", "$schema", "$id")):
        return True
    if isinstance(given.get("$defs"), Mapping):
        return True
    for keyword in ("anyOf", "oneOf", "allOf"):
        branches = given.get(keyword)
        if isinstance(branches, list) and branches and all(isinstance(b, Mapping) for b in branches):
            return True
    properties = given.get("properties")
    return (
        isinstance(properties, Mapping)
        and bool(properties)
        and all(isinstance(p, bool) or (isinstance(p, Mapping) and _looks_like_node(p)) for p in properties.values())
    )


def _looks_like_node(given: Mapping[Any, Any]) -> bool:
    """Whether a dict that stands where a JSON Schema may stand is one: it has a keyword, and no type of Python's."""
    return not given or "enum" in given or "const" in given or "items" in given or is_json_schema(given)


class Inliner:
    """Writes a JSON Schema as grammar backends take it: no references, no annotations but descriptions, every property
    required, nothing beside them unless asked for; keywords in one order, so that the same schema is the same text.

    What pydantic describes is validated by its model: keywords that no backend knows are left out. In what the caller
    has written (``asked``) they are refused, and properties that are not required become null-able.
    """

    def __init__(self, root: Mapping[Any, Any], name: str = "", asked: bool = False) -> None:
        self.root, self.name, self.asked = root, name, asked

    def top(self) -> dict[str, Any]:
        """The whole schema, which must be of an object."""
        found = self.node(self.root, "", ())
        if found.get("type") != "object" or not found.get("properties"):
            what = f"schema={self.name}" if self.name else "schema"
            top = "an object without properties" if found.get("type") == "object" else f"of type {found.get('type')}"
            raise SettingError(
                f"{what}: its top must be an object with properties; it is {top}. "
                "Make it a property: {'type': 'object', 'properties': {'items': ...}}"
            )
        return found

    def node(self, given: Any, place: str, seen: tuple[str, ...]) -> dict[str, Any]:
        """A part of it; ``seen`` are the references that lead there."""
        where = place or "at its top"
        if given is True:
            return {}
        if not isinstance(given, Mapping):
            raise SettingError(f"schema: {where}: must be a JSON Schema, a dict; got {show(given)}")
        if "$ref" in given:
            reference = given["$ref"]
            if reference in seen:
                raise SettingError(
                    f"schema: {where}: it is recursive: {reference} contains itself, which cannot be expressed. "
                    "Write its levels out to a fixed depth"
                )
            target, siblings = self._target(reference, where), _without(given, "$ref")
            clash = [k for k in siblings.keys() & target.keys() - _NOTES if k != "description"]
            if clash:
                raise SettingError(f"schema: {where}: {', '.join(sorted(clash))} beside $ref; write it into the target")
            return self.node({**target, **siblings}, place, (*seen, reference))
        if "discriminator" in given and "oneOf" in given:  # pydantic's: at most one branch fits anyway
            given = {("anyOf" if k == "oneOf" else k): v for k, v in given.items()}
        self._check(given, where)
        given = {k: v for k, v in given.items() if k in _KNOWN or k == "prefixItems"}
        given = given if isinstance(given.get("description", ""), str) else _without(given, "description")
        if "anyOf" in given:
            return self._any_of(given, place, seen)
        if isinstance(given.get("type"), list):
            if "enum" in given or "const" in given:
                return self.node(_without(given, "type"), place, seen)
            return self._any_of({"anyOf": [{**given, "type": t} for t in given["type"]]}, place, seen)
        values = given.get("enum")
        if isinstance(values, list) and None in values and len(values) > 1:
            rest = {**given, "enum": [v for v in values if v is not None]}
            return self._any_of({"anyOf": [rest, {"type": "null"}]}, place, seen)
        return self._one(given, place, seen)

    def _any_of(self, given: dict[str, Any], place: str, seen: tuple[str, ...]) -> dict[str, Any]:
        beside = given.keys() - {"anyOf", "description"}
        if not isinstance(given["anyOf"], list) or not given["anyOf"]:
            raise SettingError(f"schema: {place or 'at its top'}: anyOf must be a list of JSON Schemas")
        if beside and self.asked:
            raise SettingError(
                f"schema: {place or 'at its top'}: {', '.join(sorted(beside))} beside anyOf; write it into each branch"
            )
        found = {"anyOf": [self.node(branch, place, seen) for branch in given["anyOf"]]}
        return found | {"description": given["description"]} if "description" in given else found

    def _one(self, given: dict[str, Any], place: str, seen: tuple[str, ...]) -> dict[str, Any]:
        if "type" not in given and ("properties" in given or "items" in given):
            given["type"] = "object" if "properties" in given else "array"
        if given.get("type", "null") not in _TYPES or not isinstance(given.get("format", ""), str):
            wrong = {k: given[k] for k in ("type", "format") if k in given}
            raise SettingError(
                f"schema: {place or 'at its top'}: {show(wrong)} is no type; types are {', '.join(_TYPES)}"
            )
        if "type" in given:  # keywords of other types mean nothing beside it
            own = (*_ANYWHERE, *_OF_TYPE.get(given["type"], ()), "prefixItems")
            given = {k: v for k, v in given.items() if k in own}
        found = dict(given)
        if "items" in given and "prefixItems" not in given:
            found["items"] = self.node(given["items"], f"{place}[]", seen) or True
        if given.get("additionalProperties", False) is not False:
            found["additionalProperties"] = self.node(given["additionalProperties"], f"{place}.*", seen) or True
        if isinstance(given.get("prefixItems"), list):
            found["prefixItems"] = [self.node(p, f"{place}[{i}]", seen) for i, p in enumerate(given["prefixItems"])]
        if "properties" in given or given.get("required"):
            found |= self._properties(found, place, seen)
        return {k: found[k] for k in sorted(found)}

    def _properties(self, given: dict[str, Any], place: str, seen: tuple[str, ...]) -> dict[str, Any]:
        where = place or "at its top"
        properties, required = given.get("properties", {}), given.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise SettingError(f"schema: {where}: properties must be a dict and required a list")
        unknown = [str(name) for name in required if name not in list(properties)]
        if unknown:
            raise SettingError(
                f"schema: {where}: required names {few(unknown, len(unknown))}, not among its properties"
            )
        found = {}
        for name, node in properties.items():
            found[checked_name(name, place)] = self.node(node, f"{place}.{name}" if place else name, seen)
            if self.asked and name not in required:
                found[name] = _nullable(found[name])
        return {
            "properties": found,
            "required": list(found),
            "additionalProperties": given.get("additionalProperties", False),
        }

    def _check(self, given: Mapping[str, Any], where: str) -> None:
        for keyword in given:
            if keyword in _REFUSED or (
                self.asked and keyword not in _KNOWN | _NOTES and not str(keyword).startswith("x-")
            ):
                raise SettingError(
                    f"schema: {where}: {show(keyword)} cannot be expressed; allowed are "
                    f"{', '.join(sorted(_KNOWN))}, $ref and $defs"
                )

    def _target(self, reference: Any, where: str) -> Mapping[str, Any]:
        target: Any = self.root
        if isinstance(reference, str) and reference.startswith("#"):
            for part in unquote(reference[1:]).split("/")[1:]:
                part = part.replace("~1", "/").replace("~0", "~")
                target = target.get(part) if isinstance(target, Mapping) else None
            if isinstance(target, Mapping):
                return target
        raise SettingError(f"schema: {where}: $ref={show(reference)} is nothing within this schema")


def _without(given: Mapping[str, Any], keyword: str) -> dict[str, Any]:
    return {k: v for k, v in given.items() if k != keyword}


def _nullable(node: dict[str, Any]) -> dict[str, Any]:
    branches = node.get("anyOf", [node])
    if not node or any(b.get("type") == "null" for b in branches):
        return node
    return {**(node if "anyOf" in node else {}), "anyOf": [*branches, {"type": "null"}]}


def translated_fields(node: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The types for pydantic of an inlined object's properties."""
    return {n: _translated(p, f"{place}.{n}" if place else n) for n, p in node["properties"].items()}


def _translated(node: Mapping[str, Any], place: str) -> Any:
    """The type for pydantic of an inlined JSON Schema."""
    if "anyOf" in node:
        union: Any = typing.Union
        return union[tuple(_translated(branch, place) for branch in node["anyOf"])]
    if "enum" in node or "const" in node:
        return _translated_enum(node, place)
    match node.get("type"):
        case "string":
            if node.get("format") in ("date", "date-time"):
                beside = [k for k in _STRING if k in node]
                if beside:
                    raise SettingError(f"schema: {place}: {', '.join(beside)} beside the format of a date")
                return date_types()[datetime.date if node["format"] == "date" else datetime.datetime]
            return _limited(
                str, node, place, {"minLength": "min_length", "maxLength": "max_length", "pattern": "pattern"}
            )
        case "integer":
            return _limited(int, node, place, {**_NUMBER, "multipleOf": "multiple_of"})
        case "number":
            return _limited(float, node, place, {**_NUMBER, "multipleOf": "multiple_of"})
        case "boolean":
            return bool
        case "null":
            return type(None)
        case "array":
            item: Any = _translated(node["items"], f"{place}[]") if isinstance(node.get("items"), Mapping) else Any
            return _limited(list[item], node, place, {"minItems": "min_length", "maxItems": "max_length"})
        case "object":
            more = node.get("additionalProperties", True)
            if "properties" not in node:
                value: Any = _translated(more, f"{place}.*") if isinstance(more, Mapping) else Any
                return dict[str, value]
            if isinstance(more, Mapping):
                raise SettingError(f"schema: {place}: additionalProperties with a schema, beside properties; use one")
            return own_model(translated_fields(node, place), "allow" if more else "ignore")
    if node.keys() - {"description"}:
        raise SettingError(f"schema: {place}: {', '.join(sorted(node))} without a type; add its type")
    return Any


def _translated_enum(node: Mapping[str, Any], place: str) -> Any:
    literal: Any = Literal
    values = node["enum"] if "enum" in node else [node["const"]]
    of_type: Any = {"string": str, "integer": int, None: (str, int)}.get(node.get("type"))
    beside = node.keys() - {"enum", "const", "type", "description"}
    if beside:
        raise SettingError(f"schema: {place}: {', '.join(sorted(beside))} beside enum; leave out what does not fit")
    # Floats are compared by value: true and 1.0 would be taken for 1.
    if not isinstance(values, list) or not values or of_type is None:
        raise SettingError(f"schema: {place}: enum must be a list of texts or whole numbers, of the type beside it")
    for value in values:
        if not isinstance(value, of_type) or isinstance(value, bool):
            raise SettingError(f"schema: {place}: enum has {value!r}; it must be texts or whole numbers, of one type")
    if len(set(values)) < len(values):
        raise SettingError(f"schema: {place}: a label of enum is there twice; give each one once")
    if "" in values:
        raise SettingError(f"schema: {place}: a label of enum must not be empty")
    return literal[tuple(values)]


def _limited(type_: Any, node: Mapping[str, Any], place: str, words: Mapping[str, str]) -> Any:
    """A type with the limits that a JSON Schema sets."""
    from pydantic import Field

    limits: dict[str, Any] = {}
    for keyword, word in words.items():
        if keyword not in node:
            continue
        limit = node[keyword]
        if keyword == "pattern":
            try:
                re.compile(limit)
            except (re.error, TypeError, OverflowError, RecursionError) as exc:
                raise SettingError(f"schema: {place}: pattern {show(limit)} is no valid pattern: {exc}") from None
        elif (
            not isinstance(limit, (int, float))
            or isinstance(limit, bool)
            or not -math.inf < limit < math.inf
            or (keyword not in _NUMBER and limit < 0)
            or (keyword == "multipleOf" and limit == 0)
            or (keyword not in _NUMBER and type_ is not float and limit != int(limit))
        ):
            raise SettingError(f"schema: {place}: {keyword}={limit!r} is no limit")
        elif type_ is not float:  # pydantic compares whole numbers with whole numbers only
            limit = math.ceil(limit) if word in ("ge", "lt") else math.floor(limit)
        limits[word] = limit
    return Annotated[type_, Field(**limits)] if limits else type_
