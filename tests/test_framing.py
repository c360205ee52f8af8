"""Merging the chunks of a response changes nothing that the parser reads from it."""

import h11
from hypothesis import given
from hypothesis import strategies as st

from swarmkit.framing import Merger

BODIES = st.lists(st.binary(min_size=1, max_size=40) | st.just(b"x" * 70_000), max_size=8)
HEADS = st.sampled_from([
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: Chunked\r\n\r\n",
    b"HTTP/1.1 503 Busy\r\ntransfer-encoding: chunked\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
])  # fmt: skip
ENDS = st.sampled_from(
    [b"0\r\n\r\n", b"0\r\nx-trailer: 1\r\n\r\n", b"", b"5\r\nab", b"zz\r\n", b"3;a=b\r\nabc\r\n0\r\n\r\n"]
)


def parse(pieces):
    """Status, body and fate of a response that comes in these pieces, after which the connection ends."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("host", "a")]))
    connection.send(h11.EndOfMessage())
    status, body = 0, b""
    try:
        for piece in [*pieces, b""]:
            connection.receive_data(piece)
            while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                if isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data):
                    body += event.data
                elif isinstance(event, h11.EndOfMessage):
                    return status, body, "whole"
    except h11.RemoteProtocolError as exc:
        return status, body, str(exc)
    return status, body, "no end"


def merged(pieces):
    merger = Merger()
    return [out for piece in [*pieces, b""] if (out := merger.feed(piece))]


@given(HEADS, BODIES, ENDS, st.lists(st.integers(1, 200), max_size=30))
def test_any_response_in_any_pieces_reads_the_same(head, body, end, cuts):
    data = head + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in body) + end
    pieces, at = [], 0
    for cut in cuts:
        pieces.append(data[at : at + cut])
        at += cut
    pieces = [piece for piece in [*pieces, data[at:]] if piece]
    assert parse(merged(pieces)) == parse(pieces)


def test_what_comes_together_is_one_chunk_and_nothing_waits_for_what_comes_later():
    merger = Merger()
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    assert merger.feed(head + b"1\r\na\r\n" * 100) == head + b"64\r\n" + b"a" * 100 + b"\r\n"
    assert merger.feed(b"1\r\nb\r\n2\r\nc") == b"1\r\nb\r\n"
    assert merger.feed(b"d\r\n0\r\n\r\n") == b"2\r\ncd\r\n0\r\n\r\n"
    merger.start()
    assert merger.feed(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx")[-1:] == b"x"
