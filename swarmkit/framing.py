"""HTTP/1.1 framing made cheap: the chunks of a response that come in together are made one. No I/O here.

Model servers stream every event in an HTTP chunk of its own, and the pure-Python parser below the HTTP client takes
longer for a chunk than this client for a row. What is not plainly such a response is let through as it is: the parser
judges it.
"""

from __future__ import annotations

import re

__all__ = ["Merger"]

_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked[ \t]*\r\n", re.IGNORECASE)
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})\r\n")
_LONG = 1 << 16  # a chunk that is longer is not worth merging, nor holding back until it is whole
_LONGEST_HEAD = 1 << 16


class Merger:
    """Reads the bytes of responses, one after another on one connection.

    Examples
    --------
    >>> merger = Merger()
    >>> _ = merger.feed(b"HTTP/1.1 200 OK\\r\\ntransfer-encoding: chunked\\r\\n\\r\\n")
    >>> merger.feed(b"3\\r\\nabc\\r\\n2\\r\\nde\\r\\n4\\r\\nf")
    b'5\\r\\nabcde\\r\\n'
    >>> merger.feed(b"ghi\\r\\n0\\r\\n\\r\\n")
    b'4\\r\\nfghi\\r\\n0\\r\\n\\r\\n'
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """The next response begins."""
        self._held = b""
        self._in_head = True
        self._as_it_is = False

    def feed(self, data: bytes) -> bytes:
        """Take bytes as they come, none at the end of the connection; return those to be parsed, none while a chunk
        is not whole."""
        held, self._held = self._held, b""
        if self._as_it_is or not data:
            return held + data
        data = held + data
        return self._head(data) if self._in_head else self._body(data)

    def _head(self, data: bytes) -> bytes:
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            if len(data) > _LONGEST_HEAD:
                return self._let_through(data)
            self._held = data
            return b""
        if not _CHUNKED.search(data, 0, end) or not data.startswith(b"HTTP/1.1 2"):
            return self._let_through(data)
        self._in_head = False
        return data[:end] + self._body(data[end:])

    def _body(self, data: bytes) -> bytes:
        chunks: list[bytes] = []
        at = 0
        while match := _SIZE.match(data, at):
            begin, size = match.end(), int(match[1], 16)
            end = begin + size
            if not 0 < size <= _LONG or data[end : end + 2] not in (b"\r\n", b"\r", b""):
                return _chunk(chunks) + self._let_through(data[at:])
            if end + 2 > len(data):
                break
            chunks.append(data[begin:end])
            at = end + 2
        if not match and b"\n" in data[at:]:  # a chunk extension, or no chunk at all
            return _chunk(chunks) + self._let_through(data[at:])
        self._held = data[at:]
        return _chunk(chunks)

    def _let_through(self, data: bytes) -> bytes:
        self._as_it_is = True
        return data


def _chunk(parts: list[bytes]) -> bytes:
    data = b"".join(parts)
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""
