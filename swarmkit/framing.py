"""HTTP/1.1 framing made cheap: the chunks of a response that come in together are made one. No I/O here.

Model servers stream every event in an HTTP chunk of its own, and the pure-Python parser below the HTTP client takes
longer for a chunk than this client for a row. What is not plainly such a response is let through as it is: the parser
judges it.
"""

from __future__ import annotations

import re

__all__ = ["Merger"]

_CHUNKED = re.compile(rb"^HTTP/1.1 2.*\r\ntransfer-encoding:[ \t]*chunked\r\n", re.IGNORECASE | re.DOTALL)
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})\r\n")
_LONG = 1 << 16  # a chunk that is longer is not held back until it is whole


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
        self._begins = True
        self._merging = False
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Take bytes as they come, none at the end of the connection; return those to be parsed, none while a chunk
        is not whole."""
        head = b""
        if not data:
            self._merging = False
        elif self._begins:
            self._begins = False
            head, end, data = data.partition(b"\r\n\r\n")
            head += end
            self._merging = end != b"" and _CHUNKED.match(head) is not None
        data, self._held = self._held + data, b""
        return head + (self._merge(data) if self._merging else data)

    def _merge(self, data: bytes) -> bytes:
        chunks: list[bytes] = []
        at = begin = end = 0
        while match := _SIZE.match(data, at):
            begin = match.end()
            end = begin + int(match[1], 16)
            if begin == end or data[end : end + 2] != b"\r\n":
                break
            chunks.append(data[begin:end])
            at = end + 2
        rest, body = data[at:], b"".join(chunks)
        # The last chunk, a long one, or what is none goes as it is, with all that follows.
        unfinished = begin < end <= begin + _LONG and end + 2 > len(data) if match else len(rest) < 10
        self._merging = unfinished
        if unfinished:
            self._held, rest = rest, b""
        return (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + rest
