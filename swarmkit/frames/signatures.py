"""Signatures and docstrings of the verbs, made from the option classes they take.

A verb is written as ``def verb(df, prompt, **options: Unpack[SomeOptions])``, which type checkers read. ``@takes``
gives it the signature and the docstring that people read, and ``as_method`` makes a method of it. All of them have one
source: the fields of the option class, each annotated with a ``Keyword``.
"""

from __future__ import annotations

import inspect
import re
import textwrap
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["VERBS", "Keyword", "as_method", "keywords", "takes"]

F = TypeVar("F", bound=Callable[..., Any])

_SECTION = re.compile(r"^([A-Z][A-Za-z ]+)\n---+\n", re.MULTILINE)

VERBS: dict[str, inspect.Signature] = {}
"""The signature of every verb that was imported, by name."""


@dataclass(frozen=True, slots=True)
class Keyword:
    """What is known of a keyword beside its name and type.

    Attributes
    ----------
    default : object
        Its value where a call does not give it.
    text : str
        Its description, a sentence or two.
    sampling : bool, default False
        Whether it shapes the choice of tokens; such keywords stand last in a signature.
    """

    default: Any
    text: str
    sampling: bool = False


def keywords(options: type) -> dict[str, tuple[Any, Keyword]]:
    """The keywords of an option class: type and ``Keyword`` by name, sampling parameters last."""
    found = {name: get_args(hint) for name, hint in get_type_hints(options, include_extras=True).items()}
    return {name: found[name] for name in sorted(found, key=lambda name: found[name][1].sampling)}


def takes(options: type, like: Callable[..., Any] | None = None, without: Collection[str] = ()) -> Callable[[F], F]:
    """Give a function with ``**options: Unpack[options]`` its full signature and docstring.

    Parameters
    ----------
    options : type
        The option class, a ``TypedDict`` whose fields are ``Annotated[type, Keyword(...)]``.
    like : callable, optional
        A documented function: parameters that the docstring does not describe are described as there.
    without : collection of str
        Keywords of the option class that mean nothing to this function.

    Raises
    ------
    KeyError
        A parameter is described nowhere.
    """

    def decorate(function: F) -> F:
        known = {name: found for name, found in keywords(options).items() if name not in without}
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=keyword.default, annotation=kind)
            for name, (kind, keyword) in known.items()
        ]
        signature = signature.replace(parameters=parameters)
        function.__signature__ = signature  # type: ignore[attr-defined] # what inspect.signature looks for
        inherited = _described(like.__doc__) if like else {}
        entries = {name: _entry(name, kind, keyword) for name, (kind, keyword) in known.items()}
        function.__doc__ = _document(function.__doc__, signature, {**entries, **inherited})
        if "." not in function.__qualname__:  # a function; methods repeat the verb of a function
            VERBS[function.__name__] = signature
        return function

    return decorate


def as_method(verb: Callable[..., Any], owner: type, *fixed: Any, **defaults: Any) -> Callable[..., Any]:
    """Make a method of a verb, for a class whose instances hold their frame as ``_df``.

    Parameters
    ----------
    verb : callable
        The verb, a function whose first parameter is the frame.
    owner : type
        The class of the method.
    *fixed
        Values of the parameters that follow the frame; the method does not have these.
    **defaults
        Defaults of parameters that are positional and have none in the verb.
    """
    signature = inspect.signature(verb)
    _, *parameters = signature.parameters.values()
    parameters = [p.replace(default=defaults.get(p.name, p.default)) for p in parameters[len(fixed) :]]
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = signature.replace(parameters=[this, *parameters])

    out = next((p.default for p in parameters if p.name == "out"), None)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        given, options = [*fixed, *args], options if args else {**defaults, **options}
        if hasattr(self, "_named"):  # a Series, whose texts are called {value}, too
            frame, given, options = self._named(given, {"out": out, **options} if out else options)
            return verb(frame, *given, **options)
        return verb(self._df, *given, **options)

    async def wait(self: Any, *args: Any, **options: Any) -> Any:
        return await call(self, *args, **options)

    method: Callable[..., Any] = wait if inspect.iscoroutinefunction(verb) else call
    update_wrapper(method, verb)
    method.__module__, method.__qualname__ = owner.__module__, f"{owner.__name__}.{verb.__name__}"
    method.__signature__ = signature  # type: ignore[attr-defined] # what inspect.signature looks for
    method.__doc__ = _document(verb.__doc__, signature, {})
    return method


# ---- docstrings ------------------------------


def _document(docstring: str | None, signature: inspect.Signature, entries: Mapping[str, str]) -> str | None:
    """The docstring with a section "Parameters" that describes those of the signature, in order.

    What the docstring says of a parameter takes precedence over ``entries``.
    """
    if docstring is None:  # python -OO
        return None
    docstring = inspect.cleandoc(docstring) + "\n"
    described = {**entries, **_described(docstring)}
    listed = "\n".join(described[name].rstrip() for name in signature.parameters if name != "self")
    section = f"Parameters\n----------\n{listed}\n\n"
    start, end = _span(docstring)
    return (docstring[:start].rstrip() + "\n\n" + section + docstring[end:].lstrip()).rstrip() + "\n"


def _span(docstring: str) -> tuple[int, int]:
    """Where the section "Parameters" stands; where it belongs, if there is none."""
    sections = [*_SECTION.finditer(docstring), None]
    first = sections[0]
    if first is None:
        return len(docstring), len(docstring)
    if first[1] != "Parameters":
        return first.start(), first.start()
    after = sections[1]
    return first.start(), after.start() if after else len(docstring)


def _described(docstring: str | None) -> dict[str, str]:
    """The entries of the section "Parameters", by the parameter's name."""
    if docstring is None:
        return {}
    docstring = inspect.cleandoc(docstring) + "\n"
    start, end = _span(docstring)
    section = _SECTION.sub("", docstring[start:end], count=1)
    chunks = re.split(r"^(?=\S)", section, flags=re.MULTILINE)
    return {chunk.split(" :")[0]: chunk for chunk in chunks if chunk.strip()}


def _entry(name: str, kind: Any, keyword: Keyword) -> str:
    """A keyword, as a docstring describes it."""
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    shown = " or ".join(_type_name(k) for k in kinds if k is not types.NoneType or keyword.default is not None)
    usual = "optional" if keyword.default is None else f"default {_quoted(keyword.default)}"
    text = textwrap.indent(textwrap.fill(keyword.text, 100), "    ")
    return f"{name} : {shown}, {usual}\n{text}"


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        values = ", ".join(map(_quoted, get_args(kind)))
        return f"{{{values}}}" if len(get_args(kind)) > 1 else values
    if kind in (Any, types.NoneType):
        return "None" if kind is types.NoneType else "object"
    return re.sub(r"\b(\w+\.)+", "", inspect.formatannotation(kind))  # without the names of modules


def _quoted(value: object) -> str:
    return f'"{value}"'.replace("\n", "\\n") if isinstance(value, str) else repr(value)
