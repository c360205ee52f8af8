"""The values of an answer: their names, labels and kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import SettingError

__all__ = ["Field", "Kind", "checked_labels", "checked_name", "field_of"]

Kind = Literal["text", "int", "float", "bool", "label", "date", "datetime", "object"]
"""What the values of a field are, and with it the dtype of its column."""


@dataclass(frozen=True, slots=True)
class Field:
    """One value of an answer.

    Attributes
    ----------
    name : str
        The name; "" where the answer is a lone value.
    kind : {"text", "int", "float", "bool", "label", "date", "datetime", "object"}
        What its values are.
    labels : tuple of str
        All labels, in their order, of the kind "label".
    optional : bool
        Whether the value may be missing.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...] = ()
    optional: bool = False


def field_of(name: str, node: Mapping[str, Any]) -> Field:
    """The field that an inlined JSON Schema describes."""
    optional = False
    if "anyOf" in node:
        branches = [b for b in node["anyOf"] if b.get("type") != "null"]
        optional = len(branches) < len(node["anyOf"])
        if len(branches) != 1:
            return Field(name, "object", optional=optional)
        node = branches[0]
    values = node.get("enum", [node["const"]] if "const" in node else [])
    if values and all(isinstance(v, str) for v in values):
        return Field(name, "label", tuple(values), optional)
    if values:
        one_type = {type(v) for v in values}
        return Field(name, "int" if one_type == {int} else "bool" if one_type == {bool} else "object", (), optional)
    kinds: dict[Any, Kind] = {"integer": "int", "number": "float", "boolean": "bool"}
    if node.get("type") == "string":
        # The others of pydantic's formats are of types that are no texts.
        formats: dict[Any, Kind] = {"date": "date", "date-time": "datetime"}
        others = ("duration", "binary", "base64url", "password")
        format_ = node.get("format")
        return Field(name, "object" if format_ in others else formats.get(format_, "text"), (), optional)
    return Field(name, kinds.get(node.get("type"), "object"), (), optional)


def checked_name(given: Any, place: str) -> str:
    """The name of a field, if it can be one."""
    where = f"{place}: " if place else "schema: "
    if not isinstance(given, str):
        raise SettingError(f"{where}the name of a field must be a text; got {given!r}")
    if not given.strip() or not _is_encodable(given):
        raise SettingError(f"{where}the name of a field must not be empty or broken text; got {given!r}")
    return given


def checked_labels(given: Sequence[Any], place: str) -> tuple[str, ...]:
    """Labels, if there is a choice between them."""
    labels: list[str] = []
    for label in given:
        if not isinstance(label, str):
            raise SettingError(f"{place}: labels must be texts; got {label!r}, which may be written as {str(label)!r}")
        if not label.strip():
            raise SettingError(f"{place}: a label must not be empty; got {label!r}")
        if label != label.strip() or not _is_encodable(label):
            raise SettingError(f"{place}: the label {label!r} has white space around it, or is broken text; clean it")
        if label in labels:
            raise SettingError(f"{place}: the label {label!r} is there twice; give each one once")
        labels.append(str.__str__(label))
    if len(labels) < 2:
        raise SettingError(f"{place}: labels must be two or more, so that there is a choice; got {list(given)!r}")
    return tuple(labels)


def _is_encodable(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)
