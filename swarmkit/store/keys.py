"""The keys of rows: which stored answer is the answer to which prompt.

A key is a hash of what the caller asked, not of the request (a chat template may contain the date): model, prompt,
system prompt, chat setting, parameters, ``max_tokens``, and the number of the occurrence of a repeated prompt. Values
count, not their spelling.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import SettingError
from ..records import RequestSpec

__all__ = ["SIZE", "Keys", "ask_of", "keys_of", "settings_of"]

SIZE = 16
"""Bytes of a key; in a segment it is written in hexadecimal."""

_TURNS = ("conversations", "examples", "assistant_prefix", "repeat")
_WHOLE = 2.0**53  # up to here each whole number is a float of its own


class Keys:
    """The keys of a column of rows, by position.

    Parameters
    ----------
    raw : bytearray
        ``SIZE`` bytes a row; zeros where there is no prompt.
    """

    def __init__(self, raw: bytearray) -> None:
        self._raw = raw

    def __len__(self) -> int:
        return len(self._raw) // SIZE

    def __getitem__(self, row: int) -> str:
        return self._raw[row * SIZE : row * SIZE + SIZE].hex()

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))

    @classmethod
    def without(cls, rows: int) -> Keys:
        """A column of rows whose keys are not known yet."""
        return cls(bytearray(SIZE * rows))

    def put(self, rows: Sequence[int], keys: Keys) -> None:
        """Take over the keys of some rows, in order."""
        for place, row in enumerate(rows):
            self._raw[row * SIZE : row * SIZE + SIZE] = keys._raw[place * SIZE : place * SIZE + SIZE]

    def digests(self) -> npt.NDArray[np.uint64]:
        """The first half of each key, as a number: what the index knows of it."""
        return np.frombuffer(self._raw, ">u8")[::2].astype(np.uint64)


def keys_of(ask: str, texts: Sequence[str | None], earlier: Mapping[str, int] | None = None) -> Keys:
    """The key of every row.

    Each occurrence of a repeated prompt has a key of its own.

    Parameters
    ----------
    ask : str
        The settings of the call (``ask_of``).
    texts : sequence of str or None
        The prompts. A function around them cannot be hashed, its result can: these are its results.
    earlier : mapping of str to int, optional
        Number of the last occurrence of a prompt in earlier frames, from 0.
    """
    hashed, raw, common = hashlib.blake2b, bytearray(), ask.encode()
    if earlier:
        for text in texts:
            raw += b"" if text is None else _key(common, earlier.get(text, -1) + 1, text)
            raw += bytes(SIZE * (text is None))
    else:
        common_first, nothing = common + b" 0 ", bytes(SIZE)
        for text in texts:
            if text is None:
                raw += nothing
            else:
                raw += hashed(common_first + text.encode("utf-8", "surrogatepass"), digest_size=SIZE).digest()
    keys = Keys(raw)
    seen: dict[bytes, int] = {}
    for row in _repeated(keys.digests()):
        if (text := texts[row]) is not None:
            place = slice(row * SIZE, row * SIZE + SIZE)
            first = bytes(raw[place])
            times = seen[first] = seen.get(first, -1) + 1
            if times:
                raw[place] = _key(common, (earlier or {}).get(text, -1) + 1 + times, text)
    return keys


def _key(common: bytes, times: int, text: str) -> bytes:
    data = b"%s %d %s" % (common, times, text.encode("utf-8", "surrogatepass"))
    return hashlib.blake2b(data, digest_size=SIZE).digest()


def _repeated(digests: npt.NDArray[np.uint64]) -> list[int]:
    """Positions of values that are there more than once, in order."""
    order = np.argsort(digests, kind="stable")
    same = digests[order[1:]] == digests[order[:-1]]
    repeated = np.zeros(len(order), bool)
    repeated[order[1:][same]] = repeated[order[:-1][same]] = True
    found: list[int] = np.flatnonzero(repeated).tolist()
    return found


def settings_of(spec: RequestSpec) -> dict[str, Any]:
    """The settings of a call, as a segment has them."""
    if spec.kind != "text":
        return {"kind": spec.kind, "model": spec.model, "params": {**spec.params}}
    chat = "by hand" if callable(spec.chat) else spec.chat
    return {
        "model": spec.model,
        "system": spec.system,
        "chat": chat,
        "max_tokens": spec.max_tokens,
        "params": {**spec.params},
        **({"schema": spec.schema.key} if spec.schema else {}),
        **{name: value for name in _TURNS if (value := getattr(spec, name))},  # not those that earlier versions lack
        **({} if spec.logprobs is None else {"logprobs": spec.logprobs}),
    }


def ask_of(settings: Mapping[str, Any]) -> str:
    """A short hash of the settings of a call, which is the same however their values are spelled.

    Examples
    --------
    >>> ask_of({"params": {"temperature": 0.0, "stop": "x"}}) == ask_of({"params": {"stop": ["x"], "temperature": 0}})
    True
    """
    params = {name: _value(name, value) for name, value in settings["params"].items()}
    try:
        text = json.dumps({**settings, "params": params}, sort_keys=True)
    except TypeError as exc:
        raise SettingError(f"with store=, parameters must be plain JSON values: {exc}") from exc
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _value(name: str, value: Any) -> Any:
    """The value of a parameter. Other dicts than ``logit_bias`` stay as they are: templates write 1.0 and 1 apart."""
    if isinstance(value, float) and value.is_integer() and abs(value) < _WHOLE:
        return int(value)
    if isinstance(value, list | tuple):
        return [_value("", inner) for inner in value]
    if name == "logit_bias" and isinstance(value, Mapping):
        return {token: _value("", bias) for token, bias in value.items()}
    return [value] if name == "stop" and isinstance(value, str) else value
