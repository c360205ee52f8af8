"""What servers really do: families by behaviour, every column right for servers that obey, ignore or refuse."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
from scripted import Call, Scripted

import swarmkit as sk

FRAME = pd.DataFrame({"q": ["one", "two"]})
ACTS = ["json", "regex", "choice"]
PLAIN = {"model", "prompt", "messages", "max_tokens", "stream", "stream_options"}
CARD = {"id": "m", "owned_by": "test", "max_model_len": 512}


def rows(found: pd.DataFrame, family: int = 0) -> dict[str, dict[str, Any]]:
    """The values by route, with None for what is not known."""
    of = found[found["family"] == family].drop(columns="family").astype(object).set_index("route")
    return {str(route): dict(row) for route, row in of.where(of.notna(), None).iterrows()}


def test_two_launches_of_one_version_are_two_families() -> None:
    with sk.local(1, engine="echo", addresses=2) as obeys, sk.local(1, engine="echo", constraints="chat") as partly:
        with sk.connect([obeys, partly]) as pool:
            found = pool.capabilities()
            again = pool.capabilities()
        assert found.groupby("family")["endpoints"].first().tolist() == [2, 1]
        assert found["version"].nunique() == 1
        assert found["asked"].unique().tolist() == [obeys.endpoints[0].name, partly.endpoints[0].name]
        first, second = rows(found), rows(found, 1)
        assert [first[route]["json"] for route in first] == ["structured_outputs"] * 3
        assert [second[route]["json"] for route in second] == ["no", *["structured_outputs"] * 2]
        pd.testing.assert_frame_equal(found, again)


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({}, ["structured_outputs"] * 3),
        ({"constraints": "old"}, ["guided_json", "guided_regex", "guided_choice"]),
        ({"constraints": "ignore", "tokenize": False}, ["no"] * 3),
        ({"constraints": "refuse", "lists": False, "stream_interval": False}, ["no"] * 3),
        ({"thinking": True, "reasoning_parser": True, "batch_chat": False}, ["no"] * 3),
    ],
    ids=str,
)
def test_each_column_says_what_the_server_was_launched_to_do(options: dict[str, Any], fields: list[str]) -> None:
    with sk.local(1, engine="echo", **options) as swarm, sk.connect(swarm) as pool:
        found = rows(pool.capabilities())
        FRAME.swarm.scatter("q", pool=pool)
        route = sk.last_run().stats.routes
    get = options.get
    completions, chat = found["completions"], found["chat"]
    assert ("chat-batch" in found) == get("batch_chat", True)
    assert [completions[kind] for kind in ACTS] == fields
    parsed = get("reasoning_parser", False)
    assert [chat[kind] for kind in ACTS] == (["structured_outputs"] * 3 if parsed else fields)
    assert [completions[name] for name in ("n", "seed", "stop")] == [True] * 3
    lists = get("lists", True)
    assert (completions["lists"], completions["rows"]) == (lists, lists)
    assert completions["stream_interval"] == (lists and get("stream_interval", True))
    assert completions["max_list"] == ("1024" if lists else "1")
    assert (completions["template"] == "learned") == (get("tokenize", True) and not parsed)
    assert chat["thinking"] == ("enable_thinking" if get("thinking") else "no")
    assert (completions["reasoning"], chat["reasoning"]) == (("in the text", "apart") if parsed else ("none", "none"))
    assert chat["context"] == 4096
    assert [name for name, row in found.items() if row["used"]] == [next(iter(route)).split(",")[0].split(" ")[0]]


def deaf(call: Call) -> None:
    """Heeds no parameter, and says something else each time."""
    call.prompts = [secrets.token_hex(20) for _ in call.prompts]
    call.answer()


def strict(call: Call) -> None:
    """Refuses each parameter that is not plain, and lists."""
    if refused := sorted(set(call.body) - PLAIN) or (["prompt"] if len(call.prompts) > 1 else []):
        message = {"error": {"message": f"{refused[0]}: extra inputs are not permitted"}}
        call.reply(json.dumps(message).encode(), status="400 Bad Request")
    else:
        deaf(call)


def failing(call: Call) -> None:
    """Fails whenever more is asked than a plain prompt, which says nothing of what it can do."""
    if set(call.body) - PLAIN:
        call.reply(b"no memory", status="500 Internal Server Error")
    else:
        deaf(call)


def server(script: Callable[[Call], None]) -> Scripted:
    def answer(call: Call) -> None:
        path = call.headers.split(" ")[1]
        if path == "/v1/models":
            call.reply(json.dumps({"data": [CARD]}).encode())
        elif path in ("/v1/completions", "/v1/chat/completions"):
            script(call)
        else:
            call.reply(b"{}", status="404 Not Found")

    return Scripted(answer)


@pytest.mark.parametrize(
    ("script", "acts", "constraint", "lists", "longest"),
    [
        (deaf, False, "no", True, "≥ 1025"),
        (strict, False, "no", False, "1"),
        (failing, None, None, None, None),
    ],
)  # fmt: skip
def test_what_is_ignored_or_refused_does_not_act_and_what_fails_is_not_known(
    script: Callable[[Call], None], acts: bool | None, constraint: str | None, lists: bool | None, longest: str | None
) -> None:
    with server(script) as there, sk.connect(there.address) as pool:
        frame = pool.capabilities()
        found = rows(frame)
    assert list(found) == ["completions", "chat"]
    for row in found.values():
        assert [row[name] for name in ("logprobs", "n", "seed", "stop")] == [acts] * 4
        assert [row[kind] for kind in ACTS] == [constraint] * 3
    assert (found["completions"]["lists"], found["completions"]["max_list"]) == (lists, longest)
    assert found["chat"]["used"] == (None if script is failing else True)
    assert str(frame["seed"].dtype) == "boolean"


def test_an_endpoint_that_is_down_has_a_row_of_its_own(echo: sk.LocalSwarm) -> None:
    with sk.VLLMPool([("127.0.0.1", 9), *echo.endpoints[:1]]) as pool:
        found = pool.capabilities()
    assert found["endpoints"].tolist() == [1] * 4
    assert found["route"].isna().tolist() == [True, False, False, False]
