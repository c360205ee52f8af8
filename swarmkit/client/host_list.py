"""Host names with ranges, as Slurm writes them: ``n[001-004,7],gpu-[1-2][a-b]``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import product
from math import prod

from ..errors import HostfileError

__all__ = ["MAX_HOSTS", "expand", "expand_list"]

MAX_HOSTS = 100_000
"""Names that a text may stand for: a slip of the keyboard, or a hostile file, must not fill the memory."""
_PIECE = re.compile(r"\[([^][]*)\]|[^][]+|.", re.DOTALL)  # brackets, a text between them, a bracket without its pair
_PATTERN = re.compile(r"(?:\[[^][]*\]|[^,])+")  # up to a comma that is not within brackets
_NUMBER = re.compile(r"[0-9]{1,9}")
_LETTERS = re.compile(r"[a-z]{2}|[A-Z]{2}")
_SHOWN_CHARS = 8  # a longer text may be a key, and is not shown

_Range = tuple[range, Callable[[int], str]]  # the numbers, and how each is written


def expand(pattern: str, limit: int = MAX_HOSTS) -> list[str]:
    """The names that a pattern stands for, the rightmost range running fastest.

    Parameters
    ----------
    pattern : str
        A name, or an address, with any number of ``[...]``. In each are numbers, letters and ranges of them, with
        commas between; a range has as many digits as its first number. Brackets with a colon are those of an IPv6
        address and stay.
    limit : int, default 100,000
        Names that it may stand for.

    Raises
    ------
    HostfileError
        A range is malformed, or the names are too many.

    Examples
    --------
    >>> expand("n[08-10,7]:8000")
    ['n08:8000', 'n09:8000', 'n10:8000', 'n7:8000']
    >>> expand("gpu-[1-2][a-b]x")
    ['gpu-1ax', 'gpu-1bx', 'gpu-2ax', 'gpu-2bx']
    """
    if "[" not in pattern and "]" not in pattern:
        return [pattern]
    pieces = [_piece(found) for found in _PIECE.finditer(pattern)]
    if prod(1 if isinstance(piece, str) else sum(len(numbers) for numbers, _ in piece) for piece in pieces) > limit:
        raise HostfileError(f"its ranges stand for more than {MAX_HOSTS:,} hosts, which is the most that are allowed")
    return ["".join(parts) for parts in product(*map(_texts, pieces))]


def expand_list(text: str) -> list[str]:
    """The names of a list of patterns with commas between, as in ``$SLURM_JOB_NODELIST``.

    Examples
    --------
    >>> expand_list("n[1-2,5],login")
    ['n1', 'n2', 'n5', 'login']
    """
    names: list[str] = []
    for pattern in _PATTERN.findall(text.strip()):
        names += expand(pattern, MAX_HOSTS - len(names))
    return names


def _piece(found: re.Match[str]) -> str | list[_Range]:
    inside = found[1]
    if inside is None:
        if found[0] in "[]":
            raise HostfileError(f"a {found[0]!r} has no bracket that belongs to it: write ranges as node[001-128]")
        return found[0]
    return found[0] if ":" in inside else [_range(item) for item in inside.split(",")]


def _range(item: str) -> _Range:
    low, dash, high = item.partition("-")
    high = high if dash else low
    if _NUMBER.fullmatch(low) and _NUMBER.fullmatch(high) and int(low) <= int(high):
        return range(int(low), int(high) + 1), f"{{:0{len(low)}d}}".format
    if len(low) == 1 and _LETTERS.fullmatch(low + high) and low <= high:
        return range(ord(low), ord(high) + 1), chr
    shown = repr(item) if len(item) <= _SHOWN_CHARS else f"a text of {len(item)} characters"
    raise HostfileError(
        f"{shown} in brackets is no range: write numbers of up to 9 digits, or letters, the lower first, "
        "as node[001-128] or node[1,3-5]"
    )


def _texts(piece: str | list[_Range]) -> Iterator[str]:
    if isinstance(piece, str):
        return iter((piece,))
    return (write(number) for numbers, write in piece for number in numbers)
