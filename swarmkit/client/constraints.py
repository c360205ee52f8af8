"""How servers are told what an answer must be, and how it is seen whether they heed it.

Several servers take a constraint and ignore it without a word: vLLM on ``/v1/completions`` when it parses reasoning,
any server for fields that it does not know. So each is asked once for what no model would say by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

__all__ = ["PROBES", "UNCONSTRAINED", "Dialect", "fields_of"]

UNCONSTRAINED = "nothing constrains the answers: they are checked here"
"""What the plan of an endpoint says that heeds no constraint."""

_WORD = "zqx"


class Dialect(StrEnum):
    """The fields of a request that hold a constraint, in the order in which they are tried."""

    STRUCTURED_OUTPUTS = "structured_outputs"
    """vLLM from 0.12 on."""
    RESPONSE_FORMAT = "response_format"
    """OpenAI's, for JSON only."""
    GUIDED = "guided_json"
    """vLLM before 0.12: ``guided_json``, ``guided_choice``, ``guided_regex``, ``guided_grammar``."""
    LLAMA = "json_schema"
    """llama-server: ``json_schema``, or ``grammar`` in GBNF."""


def fields_of(dialect: Dialect, constraint: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of a request that hold a constraint; None where the dialect has no words for it.

    Parameters
    ----------
    constraint : mapping
        One of ``json`` (a JSON Schema), ``choice`` (texts), ``regex`` or ``grammar``.

    Examples
    --------
    >>> fields_of(Dialect.GUIDED, {"choice": ["yes", "no"]})
    {'guided_choice': ['yes', 'no']}
    >>> fields_of(Dialect.RESPONSE_FORMAT, {"regex": "[0-9]+"}) is None
    True
    """
    kind, value = next(iter(constraint.items()))
    match dialect, kind:
        case Dialect.STRUCTURED_OUTPUTS, _:
            return {"structured_outputs": {kind: value}}
        case Dialect.GUIDED, _:
            return {f"guided_{kind}": value}
        case Dialect.RESPONSE_FORMAT, "json":
            schema = {"name": "answer", "schema": value, "strict": True}
            return {"response_format": {"type": "json_schema", "json_schema": schema}}
        case Dialect.LLAMA, "json":
            return {"json_schema": value}
        case Dialect.LLAMA, "choice":
            return {"grammar": "root ::= " + " | ".join(json.dumps(text, ensure_ascii=False) for text in value)}
        case Dialect.LLAMA, "grammar":
            return {"grammar": value}
    return None


def _is_the_object(text: str) -> bool:
    try:
        answer = json.loads(text)
    except ValueError:
        return False
    return isinstance(answer, dict) and list(answer) == [_WORD]


def _is_the_word(text: str) -> bool:
    return text.strip() == _WORD


_OBJECT = {
    "type": "object",
    "properties": {_WORD: {"type": "boolean"}},
    "required": [_WORD],
    "additionalProperties": False,
}
PROBES: dict[str, tuple[Mapping[str, Any], Callable[[str], bool]]] = {
    "json": ({"json": _OBJECT}, _is_the_object),
    "choice": ({"choice": [_WORD]}, _is_the_word),
    "regex": ({"regex": _WORD}, _is_the_word),
    "grammar": ({"grammar": f'root ::= "{_WORD}"'}, _is_the_word),
}
"""By kind: a constraint that no model meets by itself, and whether an answer meets it."""
