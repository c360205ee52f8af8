"""JSON as servers and models write it, and as it is sent to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jiter
import pydantic_core

__all__ = ["read_json", "write_json"]

_BOM = "\ufeff".encode()


def write_json(body: Mapping[str, Any]) -> bytes:
    """A request's body as JSON."""
    # Not ASCII-escaped: scientific text is full of Greek, whose escapes take three times the bytes. pydantic's writer
    # is three times as fast as Python's; Python's writes what pydantic's refuses, such as a lone surrogate.
    try:
        return pydantic_core.to_json(body)
    except ValueError:
        return json.dumps(body, separators=(",", ":")).encode()


def read_json(data: bytes) -> Any:
    r"""Read JSON, also with half a surrogate pair in it (a model may stop within a character, and Python's own writer
    writes the half as an escape), and with a byte order mark.

    Raises
    ------
    ValueError
        It is not JSON.

    Examples
    --------
    >>> read_json(b'"\\ud83d"')
    '\ud83d'
    """
    try:
        return jiter.from_json(data, cache_mode="keys")
    except ValueError as exc:
        if data.startswith(_BOM) and not data.startswith(2 * _BOM):
            return read_json(data.removeprefix(_BOM))
        if "surrogate" not in str(exc) and "hex escape" not in str(exc):
            raise
    try:
        return json.loads(data)
    except RecursionError as exc:
        raise ValueError("it is nested too deeply") from exc
