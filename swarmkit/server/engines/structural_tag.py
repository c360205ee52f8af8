"""Constraints as xgrammar's structural tags, which is what OpenVINO takes.

A JSON Schema given to xgrammar allows any white space between its parts, and a small model may write nothing else
until ``max_tokens``. So objects are taken apart here: a text that is fixed, a value, and so on. Their answers have
all properties, in their order, and one blank after each comma and colon. Arrays are left to xgrammar.

Seen with openvino-genai 2026.4: ``maxLength`` costs about 40 ms for each character when a schema is new (all that
runs waits for it), and ``maximum`` of a ``number`` is not kept (1.5 for 1).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .base import Constraint, ConstraintRefusedError
from .constrained import as_pattern, inlined, properties

__all__ = ["structural_tag"]

_Format = dict[str, Any]


def structural_tag(constraint: Constraint) -> str:
    """The JSON of the structural tag.

    Parameters
    ----------
    constraint : Constraint
        One that `constrained.answer` can answer.

    Raises
    ------
    ConstraintRefusedError
        One of the choices is empty.

    Examples
    --------
    >>> structural_tag(Constraint("regex", "[a-z]+"))
    '{"type": "structural_tag", "format": {"type": "regex", "pattern": "[a-z]+"}}'
    """
    value = constraint.value
    if constraint.kind == "json":
        format_ = _of_schema(inlined(value, value))
    elif constraint.kind == "choice":
        if "" in value:
            raise ConstraintRefusedError("This engine does not support an empty choice.")
        format_ = _any_of([_text(choice) for choice in value])
    else:
        format_ = {"type": "regex", "pattern": as_pattern(value) if constraint.kind == "grammar" else value}
    return json.dumps({"type": "structural_tag", "format": format_}, ensure_ascii=False)


def _text(text: str) -> _Format:
    return {"type": "const_string", "value": text}


def _any_of(elements: list[_Format]) -> _Format:
    return {"type": "or", "elements": elements}


def _of_schema(schema: Mapping[str, Any]) -> _Format:
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return _any_of([_of_schema(option) for option in options])
    parts = properties(schema)
    if not parts or "object" not in schema.get("type", "object") or "enum" in schema or "const" in schema:
        return {"type": "json_schema", "json_schema": schema}
    elements: list[_Format] = []
    for name, part in parts.items():
        before = ", " if elements else "{"
        elements += [_text(f"{before}{json.dumps(name, ensure_ascii=False)}: "), _of_schema(part)]
    return {"type": "sequence", "elements": [*elements, _text("}")]}
