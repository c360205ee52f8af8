"""The schema of an answer: what the caller asks for, what a server is told, and how an answer is read."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

from ..errors import SettingError
from ..text import printable
from .fields import Field
from .given import Plan, parsed_type, plan_of
from .words import Invalid, show

__all__ = ["Schema"]


class Schema:
    """What an answer must be: made by ``Schema.of``, ``parse``, ``regex`` or ``grammar``.

    Attributes
    ----------
    constraint : dict
        What a server is told, in vLLM's words: ``{"json": ...}``, ``{"choice": [...]}``, ``{"regex": "..."}`` or
        ``{"grammar": "..."}``.
    fields : tuple of Field
        The values of an answer, in their order.
    key : str
        The same text for the same schema. Validators that a pydantic model has beyond its JSON Schema are no part of
        it.

    Examples
    --------
    >>> schema = Schema.of({"tone": ["pos", "neg"], "n": int})
    >>> schema.problem('{"tone": "pos", "n": "twelve"}')
    "n must be a whole number; got 'twelve'"
    >>> schema.values('{"tone": "pos", "n": 12}')
    ('pos', 12)
    """

    def __init__(self, plan: Plan, made_by: tuple[Callable[..., Schema], tuple[Any, ...]]) -> None:
        self.constraint, self.fields, self._read = plan
        self._made_by = made_by
        self._last: tuple[str | None, tuple[Any, ...]] = None, ()
        fields = [[f.name, f.kind, f.labels, f.optional] for f in self.fields]
        self.key = json.dumps([self.constraint, fields], ensure_ascii=True, separators=(",", ":"))

    def __repr__(self) -> str:
        described = ", ".join(
            (f"{f.name}: " if f.name else "") + ("|".join(f.labels) or f.kind) + ("?" if f.optional else "")
            for f in self.fields
        )
        return f"<Schema {printable(described)}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schema) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __reduce__(self) -> tuple[Callable[..., Schema], tuple[Any, ...]]:
        return self._made_by  # validators cannot be pickled; what they were made of can

    @classmethod
    def of(cls, given: Any) -> Schema:
        """The schema that a caller has given.

        Parameters
        ----------
        given : pydantic model, dict, list of str, or one of int, float, bool
            A dict is taken for a JSON Schema if it has a text as "type", a name that begins with "$", a list of dicts
            as "anyOf", "oneOf" or "allOf", or "properties" that are JSON Schemas themselves. Any other dict has names
            of fields and their types: str, int, float, bool, datetime.date, datetime.datetime, list[...],
            Literal[...], Optional[...], a list of labels (None among them: it may be missing), another such dict, or a
            pydantic model. Where the order of optional labels matters, use the list: to Python, Literals in another
            order are equal, and it may give back an Optional[...] that it has made before.

        Raises
        ------
        SettingError
            The message names the part that cannot be used, and what is allowed.

        Examples
        --------
        >>> Schema.of(["yes", "no"])
        <Schema yes|no>
        >>> Schema.of({"type": "object", "properties": {"n": {"type": "integer", "minimum": 0}}, "required": ["n"]})
        <Schema n: int>
        """
        if isinstance(given, Schema):
            return given
        try:
            plan = plan_of(given)
            return cls(plan, (Schema.of, (copy.deepcopy(given),)))  # the caller may change its dict
        except RecursionError:
            raise SettingError("schema: it contains itself; give a fixed depth") from None

    @classmethod
    def parse(cls, text: str) -> Schema:
        """The schema that a text of the command line stands for.

        Parameters
        ----------
        text : str
            ``name=type`` or ``name=label|label``, with commas between; a "?" at the end makes a field optional. Or a
            lone type, or lone labels. Or JSON, as a file has it.

        Examples
        --------
        >>> Schema.parse("tone=pos|neg,n=int,when=date,note=str?")
        <Schema tone: pos|neg, n: int, when: date, note: text?>
        """
        if text.lstrip().startswith(("{", "[")):
            try:
                return cls.of(json.loads(text))
            except ValueError as exc:
                if isinstance(exc, SettingError):
                    raise
                raise SettingError(f"schema: it begins like JSON, and is none: {exc}") from None
            except RecursionError:
                raise SettingError("schema: its JSON is nested too deeply") from None
        if "=" not in text:
            return cls.of(parsed_type(text, "schema"))
        fields: dict[str, Any] = {}
        for part in text.split(","):
            name, equals, type_ = (p.strip() for p in part.partition("="))
            if not equals or not name:
                raise SettingError(
                    f"schema: {part.strip()!r} is not name=type; write it as in tone=pos|neg,n=int,note=str?"
                )
            if name in fields:
                raise SettingError(f"schema: {name} is there twice")
            wanted = parsed_type(type_.removesuffix("?").strip(), name)
            if type_.endswith("?"):
                labels = get_args(wanted) if get_origin(wanted) is Literal else ()
                wanted = [*labels, None] if labels else wanted | None
            fields[name] = wanted
        return cls.of(fields)

    @classmethod
    def regex(cls, pattern: str) -> Schema:
        r"""An answer that a pattern matches from its first to its last character.

        Examples
        --------
        >>> Schema.regex(r"[A-Z]{3}\d+").problem("ABC")
        "the answer must match '[A-Z]{3}\\\\d+'; got 'ABC'"
        """
        if not isinstance(pattern, str) or not pattern:
            raise SettingError(f"regex={pattern!r}: must be a pattern, as a text")
        try:
            matches = re.compile(pattern).fullmatch
        except (re.error, OverflowError, RecursionError) as exc:
            raise SettingError(f"regex={show(pattern)}: no valid pattern: {exc}") from None

        def read(text: str) -> tuple[str]:
            for answer in (text, text.strip()):
                if matches(answer):
                    return (answer,)
            raise Invalid(f"the answer must match {show(pattern)}; got {show(text)}")

        return cls(Plan({"regex": pattern}, (Field("", "text"),), read), (Schema.regex, (pattern,)))

    @classmethod
    def grammar(cls, text: str) -> Schema:
        """An answer that a grammar of the server describes. It cannot be validated here.

        Examples
        --------
        >>> Schema.grammar('root ::= "yes" | "no"').values("yes")
        ('yes',)
        """
        if not isinstance(text, str) or not text.strip():
            raise SettingError(f"grammar={text!r}: must be a grammar, as a text")
        return cls(Plan({"grammar": text}, (Field("", "text"),), lambda answer: (answer,)), (Schema.grammar, (text,)))

    def problem(self, text: str) -> str | None:
        """What is wrong with an answer, for a person; None if nothing is."""
        try:
            self._last = text, self._read(text)
        except Invalid as exc:
            return str(exc)
        return None

    def may_go_on(self, text: str) -> bool:
        """Whether a valid answer that was cut off may be the beginning of another: of a number, or a longer label.

        Examples
        --------
        >>> Schema.of(int).may_go_on("12"), Schema.of(["pos", "neg"]).may_go_on("pos")
        (True, False)
        """
        field, begun = self.fields[0], text.strip().casefold()
        if field.name:
            return False  # an object has an end
        longer = (label for label in map(str.casefold, field.labels) if label != begun)
        return field.kind in ("int", "float") or any(label.startswith(begun) for label in longer)

    def values(self, text: str) -> tuple[Any, ...]:
        """The values of a valid answer, one for each field; None for an optional one that is null or absent.

        Raises
        ------
        ValueError
            The answer is not valid; the message is that of ``problem``.
        """
        known, values = self._last
        if known is text:  # problem() has just read it
            self._last = None, ()  # once: objects are not to be shared by rows
            return values
        return self._read(text)
