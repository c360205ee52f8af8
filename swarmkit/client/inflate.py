"""Compressed bodies, unpacked piece by piece, so that a few bytes cannot become more than memory holds.

Servers are asked for plain ones; some compress all the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import httpx2

__all__ = ["Inflater", "Undecodable", "inflater"]

_PIECE = 1 << 18  # bytes
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS


class Undecodable(httpx2.DecodingError):
    """A body is compressed in a way that is not read here, or is not what its encoding says."""


class Inflater:
    """Unpacks a body that is compressed as gzip or deflate.

    Examples
    --------
    >>> unpack = Inflater("gzip")
    >>> [len(piece) for piece in unpack(zlib.compress(b"x" * 1_000_000))]
    [262144, 262144, 262144, 213568]
    >>> unpack.end()
    """

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._inner = zlib.decompressobj(_GZIP_OR_ZLIB)

    def __call__(self, data: bytes) -> Iterator[bytes]:
        """What comes of some bytes, in pieces of bounded size; whoever has had enough stops asking."""
        more = True
        while more:
            try:
                piece = self._inner.decompress(data, _PIECE)
            except zlib.error as exc:
                raise Undecodable(f"the body is not {self._encoding}, as its header says: {exc}") from exc
            data = self._inner.unconsumed_tail
            more = bool(data) or len(piece) == _PIECE
            if piece:
                yield piece

    def end(self) -> None:
        """Check that nothing is missing."""
        if not self._inner.eof:
            raise Undecodable(f"the body ends within its {self._encoding}")


def inflater(encoding: str) -> Inflater | None:
    """What unpacks a body with this ``Content-Encoding``; None where it is plain.

    Raises
    ------
    Undecodable
        It is neither plain nor gzip nor deflate.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return None
    if encoding in ("gzip", "x-gzip", "deflate"):
        return Inflater(encoding)
    raise Undecodable(f"the body is compressed ({encoding[:40]}), though a plain one was asked for")
