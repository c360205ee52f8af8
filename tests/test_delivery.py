"""``delivery="auto"`` and ``max_size="auto"``: how answers come, and how many a request, by what requests take."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
from test_first_row import QUICK, Server, lists

import swarmkit as sk

SIZE = 5


def rows_of(body: Any) -> bool:
    """Whether a request is one of a run, not one that asks what the server can do."""
    return str(body["prompt"][0]).startswith("row ")


def asked(
    script: Callable[[Any], Any], rows: int = 30, batch: sk.BatchPolicy | None = None, **options: Any
) -> list[Any]:
    """Ask a server of one endpoint; check the answers, and return the bodies of the run's requests."""
    server = Server({"POST /v1/completions": script})
    frame = pd.DataFrame({"q": [f"row {i}" for i in range(rows)]})
    batch = batch or sk.BatchPolicy(max_size=SIZE, max_in_flight=1, hedge=False)
    with server.running() as url, sk.connect(url, retry=QUICK, batch=batch, chat=None) as pool:
        answers = sk.scatter(frame, "q", pool=pool, progress=False, **options)
    assert answers["response"].tolist() == [f"re: row {i}" for i in range(rows)]
    return [body for body in server.of("/v1/completions") if rows_of(body)]


def streamed(bodies: list[Any]) -> list[bool]:
    return [bool(body.get("stream")) for body in bodies]


def delayed(seconds: float) -> Callable[[Any], Any]:
    async def script(body: Any) -> Any:
        await asyncio.sleep(seconds if rows_of(body) else 0)
        return lists(body)

    return script


def test_answers_come_as_whole_replies_once_requests_are_seen_to_be_quick():
    first, *others = streamed(asked(lists))
    assert first
    assert others
    assert not any(others)


def test_rows_of_a_store_have_their_tokens_however_quick_the_requests_are(tmp_path):
    assert all(streamed(asked(lists, store=tmp_path / "answers")))


@pytest.mark.parametrize(
    ("script", "options"), [(delayed(2.2), {}), (lists, {"details": True}), (lists, {"delivery": "rows"})]
)
def test_rows_are_streamed_where_requests_take_long_or_each_row_is_counted(script, options):
    assert all(streamed(asked(script, rows=3 * SIZE, **options)))


def test_after_a_whole_reply_was_lost_rows_are_streamed_until_requests_are_quick_again():
    lost: list[Any] = []

    def script(body: Any) -> Any:
        if not (lost or body.get("stream")) and rows_of(body):
            lost.append(body)
            return None
        return lists(body)

    found = asked(script)
    after = found[found.index(lost[0]) + 1 :]
    assert streamed(after)[0]
    assert not streamed(after)[-1]


def test_a_server_whose_whole_replies_cannot_be_read_costs_no_failure():
    def script(body: Any) -> Any:
        return lists(body) if body.get("stream") else {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}

    found = streamed(asked(script))
    assert found == [True, False] + [True] * (len(found) - 2)
    assert sk.last_run().stats.failed_requests == 0


def test_requests_grow_where_many_come_back_at_once():
    sizes = [len(body["prompt"]) for body in asked(lists, 6000, sk.BatchPolicy(max_size="auto", max_in_flight=2))]
    assert max(sizes[:3]) <= 100
    assert 400 <= max(sizes) <= 1000


@pytest.mark.parametrize(("script", "rows"), [(lists, 700), (delayed(0.7), 6000)], ids=["few rows", "no quick answers"])
def test_requests_stay_as_large_as_they_are(script, rows):
    found = asked(script, rows, sk.BatchPolicy(max_size="auto"))
    assert max(len(body["prompt"]) for body in found) == 100


@pytest.mark.parametrize("value", ["large", 0, 2000])
def test_other_sizes_are_refused(value):
    with pytest.raises(sk.SettingError, match="max_size="):
        sk.BatchPolicy(max_size=value)
