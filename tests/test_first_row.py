"""What is asked before the first row: optional, tried again, asked as the rows are, and said in the route's note.

Servers are scripted with ``aiohttp``: each answers a few paths, and 404 elsewhere. What must hold is held with and
without ``/version``, ``/health`` and ``/tokenize``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import pytest
from aiohttp import web

import swarmkit as sk

QUICK = sk.RetryPolicy(base_s=0.02, cap_s=0.2)
FRAME = pd.DataFrame({"q": [f"q{i}" for i in range(6)]})
MODELS = {"data": [{"id": "m", "owned_by": "someone"}]}


class Server:
    """Answers ``{"POST /path": function of the body}``, which gives a dict, (status, dict, headers), events or None."""

    def __init__(self, routes: dict[str, Callable[[Any], Any]]) -> None:
        self.routes = {"GET /v1/models": lambda body: MODELS, **routes}
        self.asked: list[tuple[str, Any]] = []

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        key, body = f"{request.method} {request.path}", json.loads(raw) if raw else None
        self.asked.append((key, body))
        reply = self.routes.get(key, lambda b: (404, {"error": {"message": "no such route"}}))(body)
        reply = await reply if asyncio.iscoroutine(reply) else reply
        if reply is None:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if isinstance(reply, str):
            return web.Response(text=reply, content_type="text/event-stream")
        status, content, headers = (*reply, {})[:3] if isinstance(reply, tuple) else (200, reply, {})
        return web.json_response(content, status=status, headers=headers)

    def of(self, path: str) -> list[Any]:
        """The bodies that were posted to a path."""
        return [body for key, body in self.asked if key == f"POST {path}"]

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        loop, up, url = asyncio.new_event_loop(), threading.Event(), ""
        over = asyncio.Event()

        async def serve() -> None:
            nonlocal url
            app = web.Application(client_max_size=1 << 28)
            app.router.add_route("*", "/{tail:.*}", self._answer)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            up.set()
            await over.wait()
            for _ in range(5):  # rounds of the loop: asyncio leaks a connection that it accepts while a server closes
                await asyncio.sleep(0.002)
            await runner.cleanup()
            await asyncio.sleep(0)  # closed transports let go of their sockets

        thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
        thread.start()
        up.wait()
        try:
            yield url
        finally:
            loop.call_soon_threadsafe(over.set)
            thread.join(10)
            loop.close()


def chat(body: Any) -> Any:
    choice = {"index": 0, "message": {"role": "assistant", "content": f"re: {body['messages'][-1]['content']}"}}
    return {"choices": [{**choice, "finish_reason": "stop"}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}


def lists(body: Any) -> Any:
    prompts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
    choices = [{"index": i, "text": f"re: {p}", "finish_reason": "stop"} for i, p in enumerate(prompts)]
    return events(*({"choices": [c]} for c in choices)) if body.get("stream") else {"choices": choices}


def events(*chunks: Any) -> str:
    return "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n"


def strings_only(body: Any) -> Any:
    if not isinstance(body["prompt"], str):
        return 400, {"error": {"message": "json: cannot unmarshal array into field .prompt of type string"}}
    return lists(body)


def knows(*names: str, then: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def script(body: Any) -> Any:
        if odd := sorted(set(body) - {"model", "prompt", "messages", "max_tokens", "temperature", "stream", *names}):
            return 400, {"error": {"message": f"Extra inputs are not permitted: {odd[0]}"}}
        return then(body)

    return script


def first(times: int, reply: Any, then: Callable[[Any], Any]) -> Callable[[Any], Any]:
    left = [times]

    def script(body: Any) -> Any:
        left[0] -= 1
        return reply if left[0] >= 0 else then(body)

    return script


OTHERS = {
    "bare": {},
    "/version": {"GET /version": lambda b: {"version": "1.0"}},
    "/health": {"GET /health": lambda b: {}},
    "/tokenize": {"POST /tokenize": lambda b: (500, {})},
    "all": {
        "GET /version": lambda b: {"version": "1.0"},
        "GET /health": lambda b: {},
        "POST /tokenize": lambda b: (503, {}),
    },
}


def run(server: Server, frame: pd.DataFrame = FRAME, **options: Any) -> tuple[pd.DataFrame, Any]:
    connection = {k: options.pop(k) for k in ("chat", "model", "retry") if k in options}
    with server.running() as url, sk.connect(url, **{"retry": QUICK, **connection}) as pool:
        out = sk.scatter(frame, "{q}", pool=pool, progress=False, max_tokens=16, **options)
        return out, pool.last_run


def assert_answered(out: pd.DataFrame) -> None:
    assert out["response_error"].dropna().unique().tolist() == []
    assert (out["response"] == "re: " + out["q"]).all()


# ---- asked as the rows are ------------------------------


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"temperature": 0, "mode": "single"}, {"chat": None}])
def test_a_server_that_takes_strings_only(options, others):
    out, _ = run(Server({"POST /v1/completions": strings_only, "POST /v1/chat/completions": chat, **OTHERS[others]}),
                 **options)  # fmt: skip
    assert_answered(out)


@pytest.mark.parametrize("others", OTHERS)
def test_parameters_are_shown_to_the_route_that_rows_take(others):
    refuses = {"error": {"message": "The completion operation does not work with the specified model."}}
    routes = {"POST /v1/completions": lambda b: (400, refuses), "POST /v1/chat/completions": chat, **OTHERS[others]}
    out, _ = run(Server(routes), temperature=0)
    assert_answered(out)


@pytest.mark.parametrize("delivery", ["rows", "batch", "auto"])
@pytest.mark.parametrize("mode", ["batch", "single"])
def test_a_parameter_that_is_refused_ends_the_call_before_its_first_row(mode, delivery):
    script = knows("stream_options", "stream_interval", "min_tokens", then=lists)
    server = Server({"POST /v1/completions": script, "POST /v1/chat/completions": knows(then=chat)})
    with pytest.raises(sk.SettingError, match=r"refuses these parameters .*top_k.*not permitted: top_k"):
        run(server, mode=mode, delivery=delivery, top_k=4)
    sent = [p for body in server.of("/v1/completions") for p in body["prompt"]]
    sent += [m["content"] for body in server.of("/v1/chat/completions") for m in body["messages"]]
    assert not set(sent) & set(FRAME["q"])


@pytest.mark.parametrize("delivery", ["rows", "batch"])
@pytest.mark.parametrize("chats", [None, "auto"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 4}, r"answers, but not with these parameters \({'top_k': 4}\): got an unexpected keyword"),
        ({"n": 2}, r"answers, but not with these parameters \({'n': 2}\): \d of \d (choices are missing|answers came)"),
    ],
)
def test_a_parameter_that_is_failed_for_or_left_out_is_as_one_that_is_refused(options, words, chats, delivery):
    def failing(then):
        crash = (500, {"error": {"message": "got an unexpected keyword argument"}})
        return lambda body: crash if "top_k" in body else then(body)  # and n acts nowhere

    server = Server({"POST /v1/completions": failing(lists), "POST /v1/chat/completions": failing(chat)})
    with pytest.raises(sk.SettingError, match=words):
        run(server, chat=chats, delivery=delivery, **options)
    assert len(server.asked) < 60
    assert not {p for body in server.of("/v1/completions") for p in body["prompt"]} & set(FRAME["q"])
    assert not {body["messages"][-1]["content"] for body in server.of("/v1/chat/completions")} & set(FRAME["q"])


@pytest.mark.parametrize("delivery", ["auto", "rows", "batch"])
@pytest.mark.parametrize("fields", [(), ("stream_options",), ("min_tokens",), ("stream_interval", "stream_options")])
def test_fields_of_our_own_that_are_refused_are_left_out(delivery, fields):
    frame = pd.DataFrame({"q": [f"q{i}" for i in range(300)]})
    server = Server({"POST /v1/completions": knows(*fields, then=lists)})
    out, stats = run(server, frame, chat=None, delivery=delivery)
    assert_answered(out)
    assert stats.requests <= 8
    if delivery == "rows" and "stream_interval" not in fields:
        assert "without" in str(stats.summary())
        assert "stream_interval" in str(stats.summary())


def test_a_refusal_that_names_nothing_is_traced_to_its_field():
    def script(body):
        return (400, {"error": {"message": "bad request"}}) if "stream_interval" in body else lists(body)

    server = Server({"POST /v1/completions": script})
    out, _ = run(server, chat=None, delivery="rows")
    assert_answered(out)
    last = server.of("/v1/completions")[-1]
    assert "stream_interval" not in last
    assert last["stream_options"]["include_usage"]


@pytest.mark.parametrize("details", [False, True])
def test_chats_carry_no_fields_of_our_own(details):
    server = Server({"POST /v1/chat/completions": knows(then=chat)})
    out, _ = run(server, details=details)
    assert_answered(out)


def test_token_ids_are_done_without():
    server = Server({"POST /v1/completions": knows("min_tokens", then=lists)})
    out, stats = run(server, chat=None, delivery="batch", details=True)
    assert_answered(out)
    assert "return_token_ids" in str(stats.summary())


def test_a_salt_of_our_own_is_done_without():
    server = Server({"POST /v1/chat/completions": knows(then=chat)})
    with server.running() as url, sk.connect(url, retry=QUICK) as pool:
        found = sk.compare(FRAME, "{q}", pool=pool, repeats=1)
    assert found.frame["completion_rate"].tolist() == [1.0, 1.0]


def array_of_replies(body):
    texts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
    one = [{"choices": [{"index": i, "text": f"re: {t}", "finish_reason": "stop"}]} for i, t in enumerate(texts)]
    if body.get("stream"):
        tokens = [
            {"choices": [{"index": i, "text": c, "finish_reason": None}]} for i in range(len(texts)) for c in "re: "
        ]
        ends = [{"choices": [{"index": i, "text": t, "finish_reason": "stop"}]} for i, t in enumerate(texts)]
        return events(*tokens, *ends)
    return one[0] if len(one) == 1 else one


def joined(body):
    text = body["prompt"] if isinstance(body["prompt"], str) else "\n".join(body["prompt"])
    choice = {"index": 0, "text": f"re: {text}", "finish_reason": "stop"}
    return events({"choices": [choice]}) if body.get("stream") else {"choices": [choice]}


def all_zero(body):
    reply = lists(body)
    return reply if not isinstance(reply, str) else reply.replace('"index": 1', '"index": 0')


@pytest.mark.slow
@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("delivery", ["auto", "rows", "batch"])
@pytest.mark.parametrize("script", [array_of_replies, joined, all_zero])
def test_lists_that_are_not_answered_as_asked(script, delivery, others):
    out, _ = run(Server({"POST /v1/completions": script, **OTHERS[others]}), chat=None, delivery=delivery)
    assert_answered(out)


# ---- tried again, and done without ------------------------------

BUSY = (429, {"error": {"message": "slow down"}}, {"Retry-After": "1"})
PASSING = {
    "429": (429, {"error": {"message": "slow down"}}),
    "429 with Retry-After": BUSY,
    "503": (503, {"error": {"message": "busy"}}),
    "502": (502, {"error": {"message": "bad gateway"}}),
    "closed": None,
}


@pytest.mark.parametrize("temperature", [None, 0])
@pytest.mark.parametrize("reply", PASSING)
def test_a_fault_that_passes_is_tried_again(reply, temperature):
    script = first(1, PASSING[reply], lambda b: (404, {}))
    options = {} if temperature is None else {"temperature": temperature}
    chats = first(1, PASSING[reply], chat)
    out, _ = run(Server({"POST /v1/completions": script, "POST /v1/chat/completions": chats}), **options)
    assert_answered(out)


@pytest.mark.parametrize("reply", PASSING)
def test_connect_tries_a_fault_that_passes_again(reply):
    server = Server({"GET /v1/models": first(1, PASSING[reply], lambda b: MODELS), "POST /v1/chat/completions": chat})
    out, _ = run(server)
    assert_answered(out)


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_template_that_cannot_be_learned_is_done_without_and_said(status):
    routes = {
        "POST /v1/completions": lists,
        "POST /v1/chat/completions": chat,
        "POST /tokenize": lambda b: (status, {}),
    }
    if status == 503:  # a full queue is waited for
        routes["POST /tokenize"] = lambda b: (500, {})
    out, stats = run(Server(routes))
    assert_answered(out)
    assert "template could not be learned" in str(stats.summary())


def test_lists_that_crash_the_request_are_done_without_and_said():
    def script(body):
        many = isinstance(body["prompt"], list) and len(body["prompt"]) > 1
        return (500, {"error": {"message": "cannot handle more than one prompt"}}) if many else lists(body)

    out, stats = run(Server({"POST /v1/completions": script}), chat=None)
    assert_answered(out)
    assert "not known" in str(stats.summary())


def test_unwell_endpoints_do_not_keep_others_from_being_asked():
    broken = [Server({"POST /v1/completions": lambda b: (500, {})}) for _ in range(4)]
    well = Server({"POST /v1/completions": lists})
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(server.running()) for server in [*broken, well]]
        pool = stack.enter_context(sk.connect(urls, chat=None, retry=QUICK))
        out = sk.scatter(FRAME, "{q}", pool=pool, progress=False)
        stats = pool.last_run
    assert_answered(out)
    assert len(stats.routes) == 1  # one family, though none has a /version
    assert "not known" not in str(stats.routes)


def test_an_endpoint_that_does_not_tokenize_in_time_does_not_hold_up_the_run():
    async def hang(body):
        await asyncio.sleep(60)

    def tokens(body):
        return {"tokens": list(range(len(body.get("prompt", "")) // 4))}

    listing = {"data": [{"id": "m", "owned_by": "someone", "max_model_len": 2000}]}
    servers = [Server({"GET /v1/models": lambda b: listing, "POST /v1/completions": lists, "POST /tokenize": tokenize})
               for tokenize in (hang, tokens)]  # fmt: skip
    frame = pd.DataFrame({"q": [f"{i} " + "word " * 200 for i in range(6)]})
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(server.running()) for server in servers]
        pool = stack.enter_context(sk.connect(urls, chat=("<", ">"), retry=QUICK))
        began = time.monotonic()
        out = sk.scatter(frame, "{q}", pool=pool, progress=False, max_tokens=1000)
        assert time.monotonic() - began < 15
    assert out["response"].notna().all()


# ---- health ------------------------------


async def forever(body):
    await asyncio.sleep(30)


@pytest.mark.slow
@pytest.mark.parametrize("health", [(404, {}), (503, {"error": "no server for this path"}), (500, {}), forever],
                         ids=["404", "503", "500", "no answer"])  # fmt: skip
def test_a_health_that_was_never_well_says_nothing_of_a_silent_endpoint(health):
    async def slow(body):
        await asyncio.sleep(2.5)
        return chat(body)

    reply = health if callable(health) else lambda b: health
    server = Server({"POST /v1/chat/completions": slow, "GET /health": reply})
    out, stats = run(server, FRAME.head(2), retry=sk.RetryPolicy(base_s=0.02, cap_s=0.2, quiet_s=0.3))
    assert_answered(out)
    assert stats.failed_requests == 0


def test_health_that_makes_paid_calls_is_not_asked():
    def models(body):
        return 200, MODELS, {"x-litellm-version": "1.80"}

    async def slow(body):
        await asyncio.sleep(1.0)
        return chat(body)

    server = Server({"GET /v1/models": models, "POST /v1/chat/completions": slow, "GET /health": lambda b: {}})
    out, _ = run(server, FRAME.head(2), retry=sk.RetryPolicy(base_s=0.02, cap_s=0.2, quiet_s=0.2))
    assert_answered(out)
    assert "GET /health" not in [key for key, _ in server.asked]


def test_a_health_that_was_well_and_fails_gives_silent_requests_up():
    dead = threading.Event()

    async def hang_once(body):
        if not dead.is_set() and body["messages"][-1]["content"] != "Hi":  # the row, and no probe
            dead.set()
            await asyncio.sleep(30)
        return chat(body)

    def health(body):
        return (503, {}) if dead.is_set() else {}

    server = Server({"POST /v1/chat/completions": hang_once, "GET /health": health})
    began = time.monotonic()
    out, stats = run(server, FRAME.head(1), retry=sk.RetryPolicy(base_s=0.02, cap_s=0.2, quiet_s=0.3))
    assert_answered(out)
    assert stats.failed_requests == 1
    assert time.monotonic() - began < 15


# ---- ways in ------------------------------


@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
@pytest.mark.parametrize(
    ("listing", "path", "model"),
    [
        ({"data": [{"id": "llama3.2:latest"}]}, "/v1", "llama3.2"),
        ({"data": [{"id": "*"}]}, "/v1", "gpt-4o"),
        ({"data": [{"id": "openai/*"}]}, "/v1", "openai/gpt-4o"),
        ((404, {}), "/v1", "m"),
        ((403, {"message": "for admins"}), "/v1", "m"),
        ((401, {}), "/v1", "m"),
        ((400, {}), "/v1", "m"),
        ((501, {}), "/v1", "m"),
        ("<html>Sign in</html>", "/v1", "m"),
        ({"error": {"message": "no listing"}}, "/v1", "m"),
        ({"models": [{"model": "m"}]}, "/v1", None),
        ({"object": "list", "data": []}, "/v1", "m"),
        ({"models": [{"name": "m"}]}, "/v1", "m"),
        ([{"id": "m"}], "/v1", "m"),
        ([{"id": "m"}], "/v1", None),
        ({"data": ["m"]}, "/v1", None),
        (["m"], "/v1", None),
        ({"data": [{"id": "m"}]}, "/v1beta/openai", "m"),
        ({"data": [{"id": "m"}]}, "/api/paas/v4", "m"),
    ],
)
def test_a_way_in(listing, path, model):
    routes = {"GET /v1/models": lambda b: (404, {}), f"GET {path}/models": lambda b: listing,
              f"POST {path}/chat/completions": chat}  # fmt: skip
    with Server(routes).running() as url, sk.connect(url + path, model=model, retry=QUICK) as pool:
        assert_answered(sk.scatter(FRAME, "{q}", pool=pool, progress=False))


@pytest.mark.parametrize("listing", [(404, {}), {"data": []}])
def test_a_model_that_is_taken_on_trust_is_said(listing):
    routes = {"GET /v1/models": lambda b: listing, "POST /v1/chat/completions": chat}
    with Server(routes).running() as url:
        with pytest.warns(sk.SwarmWarning, match="lists no models.*model='m' is taken on trust"):
            pool = sk.connect(url, model="m")
        with pool:
            assert pool.model == "m"
        with pytest.raises(sk.NoEndpointsError, match="name the one to use: model="):
            sk.connect(url)
    says = "is the path right" if isinstance(listing, tuple) else "lists no model"
    none = Server({"GET /v1/models": lambda b: listing})
    with none.running() as url, pytest.raises(sk.NoEndpointsError, match=says):
        sk.connect(url, model="m")


@pytest.mark.parametrize(
    ("refusal", "says"),
    [
        ((400, {"error": "No connected db"}), r"HTTP 400\): No connected db\. Is the key right\?"),
        ((401, {}), r"it rejects the key \(HTTP 401"),
        ((403, {}), r"it rejects the key \(HTTP 403"),
        ((307, {}, {"Location": "https://elsewhere.example/"}), "it redirects to https://elsewhere.example/"),
        ("<html>Sign in</html>", "neither a JSON object nor a list: 'Sign in'"),
    ],
)
def test_a_server_that_answers_nothing_is_not_trusted(refusal, says):
    paths = ("GET /v1/models", "POST /v1/chat/completions", "POST /v1/completions")
    with Server(dict.fromkeys(paths, lambda b: refusal)).running() as url:
        for model in (None, "m"):
            with pytest.raises(sk.NoEndpointsError, match=says):
                sk.connect(url, model=model)


# ---- rows that all fail, and some that are forbidden ------------------------------


def prompts_of(body: Any) -> list[str]:
    prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    return [prompt] if isinstance(prompt, str) else prompt


def for_rows(reply: Any, then: Callable[[Any], Any], is_bad: Callable[[str], bool]) -> Callable[[Any], Any]:
    return lambda body: reply if any(p[0] == "q" and is_bad(p) for p in prompts_of(body)) else then(body)


@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
@pytest.mark.parametrize("reply", [(500, {"error": {"message": "boom"}}), {"choices": []}], ids=["500", "malformed"])
@pytest.mark.parametrize(("path", "then", "rows"), [("chat/completions", chat, 20), ("completions", lists, 200)])
def test_rows_that_all_fail_where_a_plain_prompt_is_answered_fail_after_a_few_tries(path, then, rows, reply):
    server = Server({f"POST /v1/{path}": for_rows(reply, then, lambda p: True)})
    frame = pd.DataFrame({"q": [f"q{i}" for i in range(rows)]})
    began = time.monotonic()
    out, stats = run(server, frame, retry=sk.RetryPolicy(base_s=0.2, jitter=0.0))
    assert time.monotonic() - began > 0.8, "with a pause before each of the tries that count"
    assert out["response"].isna().all()
    assert out["response_error"].str.contains("boom" if isinstance(reply, tuple) else "choices are missing").all()
    assert stats.requests <= (6.5 if rows == 20 else 3) * rows  # a list is looked through in halves first


@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
@pytest.mark.parametrize(
    "flagged", [lambda p: p.endswith("7"), lambda p: len(p) == 3 and p < "q30"], ids=["7", "first"]
)
def test_prompts_that_a_gateway_forbids_cost_two_requests_each_side_by_side(flagged):
    script = for_rows((403, {"error": {"message": "flagged"}}), chat, flagged)

    async def gateway(body):
        reply = script(body)
        await asyncio.sleep(0.0 if isinstance(reply, tuple) else 0.1)  # a filter comes before the model
        return reply

    frame = pd.DataFrame({"q": [f"q{i}" for i in range(10, 210)]})
    began = time.monotonic()
    out, stats = run(Server({"POST /v1/chat/completions": gateway}), frame, retry=sk.RetryPolicy())
    assert time.monotonic() - began < 6
    bad = out["q"].map(flagged)
    assert bad.sum() == 20
    assert (out["response"][~bad] == "re: " + out["q"][~bad]).all()
    assert out["response_error"][bad].str.contains("flagged").all()
    assert stats.requests <= 200 + 20 + 20


# ---- limits of this machine ------------------------------


@pytest.mark.slow
def test_more_endpoints_than_open_files():
    with sk.local(1, engine="echo", addresses=300) as swarm:
        urls = [f"{e.url} {e.key()}" for e in swarm.endpoints]
        code = (
            "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); import swarmkit as sk;"
            "lines = [line.split() for line in sys.stdin];"
            "pool = sk.connect([line[0] for line in lines], api_key=lines[0][1]);"
            "print(sum(i.status == 'up' for i in pool._core.infos.values()), pool.size)"
        )
        done = subprocess.run([sys.executable, "-W", "error", "-c", code], input="\n".join(urls), text=True,
                              capture_output=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["300", "300"]
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256


REFUSALS = ["http_400", "http_403", "http_404", "http_405", "http_413", "http_422"]
ASKED_FIRST = ["/v1/completions", "/v1/chat/completions", "/tokenize"]


@pytest.mark.slow
@pytest.mark.parametrize("path", ASKED_FIRST)
@pytest.mark.parametrize("kind", REFUSALS)
def test_one_refusal_by_chance_does_not_make_runs_slow(kind: str, path: str) -> None:
    fault = f"{kind}:first=1,path={path}"
    frame = pd.DataFrame({"q": [f"q{i}" for i in range(200)]})
    with (
        sk.local(1, engine="echo", addresses=2, faults=[fault], max_num_seqs=64) as swarm,
        sk.connect(swarm.endpoints, retry=QUICK) as pool,
    ):
        answers = frame.swarm.scatter("q", pool=pool, temperature=0.5, extra_body={"top_k": 5}, progress=False)
    assert answers["response"].tolist() == ("echo: " + frame["q"]).tolist()
    stats = sk.last_run().stats
    assert stats.requests <= 20, stats
    assert "chat template learned" in next(iter(stats.routes)), stats
