"""The vectors of embeddings as texts: float32 numbers, little-endian, in base64. So servers send them that can, in a
quarter of the bytes of decimal numbers; so they are kept, in memory and in stores."""

from __future__ import annotations

import binascii
import math
import sys
from array import array
from collections.abc import Iterable
from typing import Any

__all__ = ["length_of", "pack", "unpack"]

_LARGE = (b"\x7f", b"\xff")  # last bytes of numbers from 1.7e38 on, of infinity, and of what is no number


def pack(vector: Any) -> tuple[str, bool]:
    """A vector as text, and whether all its numbers are finite.

    Parameters
    ----------
    vector : str, or iterable of float
        As a server sends it: base64, or numbers.

    Raises
    ------
    ValueError
        It is neither, or empty.

    Examples
    --------
    >>> pack([0.5, -2])
    ('AAAAPwAAAMA=', True)
    """
    try:
        if isinstance(vector, str):
            text, raw = vector, binascii.a2b_base64(vector, strict_mode=True)
        else:
            numbers = array("f", vector)
            if sys.byteorder == "big":
                numbers.byteswap()
            raw = numbers.tobytes()
            text = binascii.b2a_base64(raw, newline=False).decode("ascii")
    except (OverflowError, TypeError, ValueError) as exc:  # of what is no base64, too
        if isinstance(vector, list) and None in vector:  # how JSON writes what is no number
            return "", False
        raise ValueError(f"is neither base64 nor a list of numbers ({exc})") from exc
    if not raw or len(raw) % 4:
        raise ValueError(f"has {len(raw)} bytes, which are no float32 numbers")
    last = raw[3::4]
    finite = not (_LARGE[0] in last or _LARGE[1] in last) or all(map(math.isfinite, unpack(text)))
    return text, finite


def unpack(text: str) -> array[float]:
    """The numbers of a vector.

    Examples
    --------
    >>> list(unpack("AAAAPwAAAMA="))
    [0.5, -2.0]
    """
    numbers = array("f", binascii.a2b_base64(text))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def length_of(texts: Iterable[str]) -> int:
    """How many numbers vectors have; 0 where they differ, or there are none.

    Examples
    --------
    >>> length_of(["AAAAPwAAAMA="]), length_of(["AAAAPwAAAMA=", "AAAAPw=="])
    (2, 0)
    """
    lengths = {len(text) // 4 * 3 - text.count("=", -2) for text in texts}
    return lengths.pop() // 4 if len(lengths) == 1 else 0
