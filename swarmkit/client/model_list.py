"""What servers list as their models, in all the shapes of it; and which of them a name may stand for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from ..text import printable

__all__ = ["listed_as", "listed_models", "nearest", "serves"]

_NEAREST = 3
_ID = ("id", "name", "model")
_LATEST = ":latest"  # the tag that Ollama lists, and that its users leave out


def listed_models(listing: Any) -> list[dict[str, Any]]:
    """The models of a listing, each with its ``id``: of an object that has them as ``data`` or ``models``, or of a bare
    list; of objects, or of bare names. Ollama's own listing has the id as ``model``.

    Examples
    --------
    >>> listed_models({"data": [{"id": "phi-4", "owned_by": "me"}]}), listed_models(["phi-4"])
    ([{'id': 'phi-4', 'owned_by': 'me'}], [{'id': 'phi-4'}])
    """
    if isinstance(listing, dict):
        listing = listing.get("data") or listing.get("models")
    found = []
    for entry in listing if isinstance(listing, list) else []:
        model = {"id": entry} if isinstance(entry, str) else entry
        name = next(filter(None, map(model.get, _ID)), None) if isinstance(model, dict) else None
        if isinstance(name, str) and name:
            found.append({**model, "id": name})
    return found


def serves(models: Sequence[str], model: str) -> bool:
    """Whether a server that lists these names takes ``model``: by the name itself, without the tag ``:latest``
    (Ollama), or by a pattern (LiteLLM's ``*`` and ``openai/*``)."""
    return model in models or f"{model}{_LATEST}" in models or any("*" in m and fnmatchcase(model, m) for m in models)


def listed_as(model: str, listings: Iterable[Sequence[str]]) -> str:
    """The name by which the servers of these listings know a model: with the tag where they list it only so, since what
    stands before an Ollama may take no other.

    Examples
    --------
    >>> listed_as("llama3.2", [["llama3.2:latest", "phi4:latest"], ["qwen3"]])
    'llama3.2:latest'
    """
    having = [models for models in listings if serves(models, model)]
    tagged = model + _LATEST
    return tagged if having and all(model not in m and tagged in m for m in having) else model


def nearest(model: str, models: Iterable[str]) -> str:
    """Which of the models that servers list a name may be meant for, in words.

    Examples
    --------
    >>> nearest("llama-3.1-8b", ["gpt-4o", "meta-llama/Llama-3.1-8B-Instruct", "Llama-3.2-1B", "phi-4"])
    'the nearest of 4: meta-llama/Llama-3.1-8B-Instruct, Llama-3.2-1B, phi-4'
    """
    names = list(dict.fromkeys(name for name in models if "*" not in name))
    wanted = _plain(model)
    likeness = difflib.SequenceMatcher(b=wanted)

    def unlike(name: str) -> tuple[bool, float]:
        likeness.set_seq1(plain := _plain(name))
        return wanted not in plain, -likeness.ratio()

    found = ", ".join(printable(name, 100) for name in sorted(names, key=unlike)[:_NEAREST])
    return f"the nearest of {len(names):,}: {found}" if len(names) > _NEAREST else f"listed: {found or 'none'}"


def _plain(name: str) -> str:
    """What of a name is compared: without its owner, in small letters."""
    return name.rpartition("/")[2].lower()
