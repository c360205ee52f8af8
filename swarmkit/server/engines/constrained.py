"""The echo engine's constrained answers: made from the user's text by fixed rules, so that tests can compute them.

choice
    The first of the choices that occurs in the text; if none does, that at ``crc32(text) % len(choices)``.
json
    A value of the schema, on one line:

    - an object has all its properties, in their order; an array has ``minItems`` items, or two;
    - a string is ``echo: <the text>``, cut to 20 characters, and cut or repeated to fit its length limits; with a
      ``pattern`` or a ``format`` it is a fixed text;
    - a number is the first in the text, else the text's length, moved into its limits;
    - a boolean is true if the text's length is odd;
    - ``enum`` is like choice, with the values as they stand in JSON (strings without quotes);
    - of several types or ``anyOf`` it is the first that is not null.
regex, grammar
    A fixed text: the first alternative of each, and the fewest repetitions.

What is not named here is refused (`ConstraintRefusedError`), and so are schemas that refer to themselves.
"""

from __future__ import annotations

import json
import math
import re
import string
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from .base import Constraint, ConstraintRefusedError

__all__ = ["answer", "as_pattern", "inlined", "properties"]

_LENGTH = 20
_ITEMS = 2
_FORMATS = {
    "date": "2026-01-31",
    "date-time": "2026-01-31T12:30:00Z",
    "time": "12:30:00Z",
    "duration": "P1D",
    "email": "echo@example.org",
    "hostname": "example.org",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.org/",
    "uuid": "12345678-1234-4234-8234-123456789abc",
}
_UNSUPPORTED = {
    "not", "if", "then", "else", "contains", "propertyNames", "patternProperties", "dependentSchemas",
    "dependentRequired", "multipleOf", "uniqueItems", "minProperties", "maxProperties",
}  # fmt: skip
# Of a grammar: a text, a regular expression, a class of characters, a name, white space, a comment.
_WORD = r'"(?:[^"\\]|\\.)*"|/(?:[^/\\]|\\.)+/|\[(?:[^\]\\]|\\.)*\]|[A-Za-z_]\w*|\s+|#.*'
# Not re.escape: it escapes more than other engines know.
_SPECIAL = re.compile(r"[\\^$.|?*+()\[\]{}]")
_ANY = "a0 " + string.printable


def answer(constraint: Constraint, text: str, head: str = "echo: ") -> str:
    """The answer to the user's text.

    Parameters
    ----------
    constraint : Constraint
    text : str
    head : str, default "echo: "
        What strings begin with.

    Raises
    ------
    ConstraintRefusedError
        A construct that these rules do not cover; it does not depend on the text.

    Examples
    --------
    >>> answer(Constraint("choice", ["good", "bad"]), "not bad")
    'bad'
    >>> answer(Constraint("json", {"properties": {"n": {"type": "integer"}}}), "7 plates")
    '{"n": 7}'
    >>> answer(Constraint("regex", "[A-Z]{2}-[0-9]+"), "")
    'AA-0'
    """
    value = constraint.value
    try:
        if constraint.kind == "json":
            return json.dumps(_Maker(text, head).value(inlined(value, value)), ensure_ascii=False)
        if constraint.kind == "choice":
            return str(_choose(value, value, text))
        return _fixed(as_pattern(value) if constraint.kind == "grammar" else value)
    except ConstraintRefusedError:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise _refused(f"a keyword with a value it must not have ({error})") from error


def _refused(what: str) -> ConstraintRefusedError:
    return ConstraintRefusedError(f"The constraint contains features not supported by this engine: {what}")


def _choose(values: Sequence[Any], names: Sequence[str], text: str) -> Any:
    found = next((i for i, name in enumerate(names) if name in text), None)
    if found is None:
        found = zlib.crc32(text.encode("utf-8", "surrogatepass")) % len(values)
    return values[found]


def inlined(schema: Any, root: Mapping[str, Any], path: tuple[str, ...] = ()) -> Any:
    """The schema with each reference replaced by what it refers to.

    Parameters
    ----------
    schema : dict or bool
    root : dict
        The whole schema, which references begin at.
    path : tuple of str
        The references that led here.

    Raises
    ------
    ConstraintRefusedError
        A construct that is not covered, or a schema that refers to itself.

    Examples
    --------
    >>> inlined({"items": {"$ref": "#/$defs/n"}}, {"$defs": {"n": {"type": "integer"}}})
    {'items': {'type': 'integer'}}
    """
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise _refused(f"the schema {json.dumps(schema)}")
    if unsupported := sorted(_UNSUPPORTED & schema.keys()):
        raise _refused(", ".join(unsupported))
    if "$ref" in schema:
        reference = schema["$ref"]
        if reference in path:
            raise _refused(f"the recursive $ref {reference}")
        return inlined(_referred(reference, root), root, (*path, reference))
    if "allOf" in schema:
        if len(schema["allOf"]) != 1:
            raise _refused("allOf of several schemas")
        return inlined(schema["allOf"][0], root, path)
    out = {key: part for key, part in schema.items() if key not in ("$defs", "definitions")}
    for key in ("anyOf", "oneOf", "prefixItems"):
        if key in schema:
            out[key] = [inlined(part, root, path) for part in schema[key]]
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            out[key] = inlined(schema[key], root, path)
    if "properties" in schema:
        out["properties"] = {name: inlined(part, root, path) for name, part in schema["properties"].items()}
    return out


def _referred(reference: object, root: Mapping[str, Any]) -> Any:
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise _refused(f"$ref {reference}")
    found: Any = root
    for name in reference.split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, dict) or name not in found:
            raise _refused(f"$ref {reference}, which leads nowhere")
        found = found[name]
    return found


def properties(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The properties of an object, and those that are only required, in their order."""
    found = dict(schema.get("properties") or {})
    others = schema.get("additionalProperties", True)
    for name in schema.get("required") or ():
        found.setdefault(name, {} if others is True else others)
    return found


class _Maker:
    """Makes the values of schemas without references, from one text."""

    def __init__(self, text: str, head: str) -> None:
        self._text = text
        self._echo = head + text

    def value(self, schema: Any) -> Any:
        """A value of the schema. Parts that it does not need are made too: all of the schema has to be sound."""
        if schema is True:
            schema = {}
        if schema is False:
            raise _refused("the schema false")
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            values = schema["enum"]
            if not values:
                raise _refused("an empty enum")
            return _choose(values, [v if isinstance(v, str) else json.dumps(v) for v in values], self._text)
        if options := schema.get("anyOf") or schema.get("oneOf"):
            return _first([self.value(option) for option in options])
        return _first([self._typed(kind, schema) for kind in _types(schema)])

    def _typed(self, kind: object, schema: Mapping[str, Any]) -> Any:
        if kind == "object":
            self.value(schema.get("additionalProperties") or {})
            return {name: self.value(part) for name, part in properties(schema).items()}
        if kind == "array":
            return self._array(schema)
        if kind == "string":
            return self._string(schema)
        if kind in ("integer", "number"):
            return self._number(schema, whole=kind == "integer")
        if kind == "boolean":
            return len(self._text) % 2 == 1
        if kind == "null":
            return None
        raise _refused(f"type {kind}")

    def _array(self, schema: Mapping[str, Any]) -> list[Any]:
        first = list(schema.get("prefixItems") or ())
        rest = schema.get("items", not first)
        most = schema.get("maxItems", math.inf if rest is not False else len(first))
        count = min(schema.get("minItems") or max(len(first), _ITEMS if rest is not False else 0), most)
        if count < schema.get("minItems", 0):
            raise _refused("minItems above maxItems")
        made = [self.value(part) for part in first]
        return [*made, *[self.value(rest or {})] * max(0, count - len(made))][:count]

    def _string(self, schema: Mapping[str, Any]) -> str:
        least, most = schema.get("minLength", 0), schema.get("maxLength", math.inf)
        if least > most:
            raise _refused("minLength above maxLength")
        if "pattern" in schema or "format" in schema:
            if "minLength" in schema or "maxLength" in schema:
                raise _refused("a pattern or format with minLength or maxLength")
            if "pattern" in schema:
                return _fixed(schema["pattern"])
            if schema["format"] not in _FORMATS:
                raise _refused(f"format {schema['format']}")
            return _FORMATS[schema["format"]]
        size = int(min(max(_LENGTH, least), most))
        repeats = max(1, -(-int(least) // len(self._echo)))
        return (self._echo * repeats)[:size]

    def _number(self, schema: Mapping[str, Any], *, whole: bool) -> int | float:
        low = max(schema.get("minimum", -math.inf), math.nextafter(schema.get("exclusiveMinimum", -math.inf), math.inf))
        high = min(schema.get("maximum", math.inf), math.nextafter(schema.get("exclusiveMaximum", math.inf), -math.inf))
        if whole:
            low, high = math.ceil(low), math.floor(high)
        if low > high:
            raise _refused("a lower limit above the upper one")
        found = re.search(r"-?[0-9]{1,15}" if whole else r"-?[0-9]{1,15}(\.[0-9]{1,15})?", self._text)
        value = json.loads(re.sub("^(-?)0+(?=[0-9])", r"\1", found[0])) if found else len(self._text)
        return min(max(value, low), high)  # type: ignore[no-any-return]  # a number, as a schema's limits are


def _first(values: list[Any]) -> Any:
    """The first that is not null."""
    return next((value for value in values if value is not None), None)


def _types(schema: Mapping[str, Any]) -> list[Any]:
    kind = schema.get("type")
    if kind is None:
        by_key = {"properties": "object", "required": "object", "items": "array", "prefixItems": "array"}
        by_key |= dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), "number")
        kind = next((kind for key, kind in by_key.items() if key in schema), "string")
    return kind if isinstance(kind, list) else [kind]


class _Pattern:
    """A regular expression, read from left to right; ``text()`` is one that it matches."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0

    def text(self) -> str:
        """The first alternative of each, and the fewest repetitions."""
        first = self._alternative()
        while self._takes(r"\|"):
            self._alternative()
        return first

    def _takes(self, token: str) -> re.Match[str] | None:
        match = re.compile(token, re.DOTALL).match(self._pattern, self._at)
        self._at = match.end() if match else self._at
        return match

    def _alternative(self) -> str:
        if self._pattern.startswith("|", self._at):
            raise _refused("an empty alternative that is not the last")
        out = ""
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            piece = self._piece()
            times = self._takes(r"[*+?]|\{(\d+)(,\d*)?\}")
            if times:
                self._takes(r"\?")
                piece *= int(times[1]) if times[0][0] == "{" else times[0] == "+"
            out += piece
        return out

    def _piece(self) -> str:
        if self._takes(r"[$^]"):
            return ""
        if self._takes(r"\((\?:)?(?!\?)"):
            text = self.text()
            if not self._takes(r"\)"):
                raise _refused("an open group")
            return text
        # Whatever a class or an escape may hold: the first character it matches.
        if kind := self._takes(r"\[(?:[^\]\\]|\\.)*\]|\\.|\."):
            return next(c for c in (kind[0][1:] if kind[0][:2] != "[^" else "") + _ANY if re.fullmatch(kind[0], c))
        if literal := self._takes(r"[^*+?{}()]"):
            return literal[0]
        raise _refused(f"the regular expression at {self._pattern[self._at :]!r}")


def _fixed(pattern: str) -> str:
    """A text that the pattern matches."""
    try:
        text = _Pattern(pattern).text()
        matches = re.fullmatch(pattern, text)
    except (re.error, StopIteration):
        matches = None
    if not matches:
        raise _refused(f"the regular expression {pattern!r}")
    return text


def as_pattern(grammar: str) -> str:
    """A grammar without recursion, as a regular expression.

    Examples
    --------
    >>> print(as_pattern('root ::= verb "?" [0-9]+\\nverb ::= "eat" | "drink"'))
    (?:(?:eat)|(?:drink))(?:\\?)[0-9]+
    """
    _, *parts = re.split(r"^[?!]?(\w+)\s*(?:::=|:)", grammar, flags=re.MULTILINE)
    rules = dict(zip(parts[::2], parts[1::2], strict=True))

    def expand(name: str, path: tuple[str, ...] = ()) -> str:
        if name not in rules or name in path:
            raise _refused(f"the grammar's rule {name}, which is {'recursive' if name in path else 'missing'}")

        def one(token: re.Match[str]) -> str:
            word = token[0]
            if word[0] == '"':
                return "(?:" + _SPECIAL.sub(r"\\\g<0>", json.loads(word)) + ")"
            if word[0].isalpha() or word[0] == "_":
                return f"(?:{expand(word, (*path, name))})"
            if word[0] == "/":
                return f"(?:{word[1:-1]})"
            return word if word[0] == "[" else ""

        return re.sub(_WORD, one, rules[name])

    return expand("root" if "root" in rules else "start")
