"""What servers are like, said outright: what is otherwise learned by asking them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal

from ..errors import SettingError
from .capabilities import Capabilities
from .wire import OPTIONAL, TOKEN_LIMIT

__all__ = ["DIALECTS", "Dialect", "facts_of"]

_STRICT = {"omit": frozenset(OPTIONAL), "template": False, "health": False, "rows": False, "streams": False}

DIALECTS: Mapping[str, Mapping[str, Any]] = {
    "vllm": {"lists": True, "rows": True, "streams": True, "whole": True, "omit": frozenset(), "chats": True},
    "openai": {**_STRICT, "lists": False, "whole": False, "omit": frozenset((*OPTIONAL, TOKEN_LIMIT)), "chats": True},
    "first": {**_STRICT, "lists": True, "whole": True},
}
"""Fields of ``Capabilities``, by the name of a dialect: vLLM as it is by default; chats alone, as OpenAI's newer models
take them; lists of prompts and no field that OpenAI's completions do not have, as the FIRST gateway takes them."""

Dialect = Literal["openai", "vllm", "first"] | Mapping[str, Any] | None


def facts_of(dialect: Any) -> Mapping[str, Any]:
    """The facts that ``dialect=`` says, by field of ``Capabilities``; what is not in it is learned.

    Raises
    ------
    SettingError
        It is no dialect.

    Examples
    --------
    >>> facts_of({"lists": True, "omit": ["stream_options"]})
    {'lists': True, 'omit': frozenset({'stream_options'})}
    """
    if dialect is None:
        return {}
    if isinstance(dialect, str):
        if dialect in DIALECTS:
            return DIALECTS[dialect]
        raise SettingError(f"dialect={dialect!r}: must be one of {', '.join(map(repr, DIALECTS))}, or a dict of facts")
    if not isinstance(dialect, Mapping):
        raise SettingError(f"dialect={dialect!r}: must be the name of a dialect, or a dict of facts")
    allowed = [field.name for field in fields(Capabilities) if field.name != "note"]
    optional = (*OPTIONAL, TOKEN_LIMIT)
    for name, value in dialect.items():
        if name not in allowed:
            near = difflib.get_close_matches(str(name), allowed, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise SettingError(f"dialect= has no {name!r}.{hint} It may say: {', '.join(allowed)}")
        if name == "omit":
            if isinstance(value, str) or not isinstance(value, Iterable) or not set(value) <= set(optional):
                raise SettingError(f"dialect={{'omit': {value!r}}}: must be a list of some of {', '.join(optional)}")
        elif not isinstance(value, bool):
            raise SettingError(f"dialect={{{name!r}: {value!r}}}: must be True or False")
    facts = dict(dialect)
    return {**facts, "omit": frozenset(facts["omit"])} if "omit" in facts else facts
