"""An OpenAI-compatible server in front of an engine, erring as vLLM errs.

One difference to vLLM is meant: if a token is set, every route asks for it, not only those below ``/v1``.
"""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

import swarmkit

from . import misbehave
from .engines import Engine, EngineDeadError, Increment, Job, Prompt, PromptRefusedError
from .faults import Fault, FaultPlan, Tamper
from .replies import PlainReply, StreamReply, to_json
from .requests import Ask, Kind, RefusedError, check_model, parse_body, parse_generate, parse_messages

__all__ = ["App", "ServerOptions"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_GENERATE: dict[str, Kind] = {
    "/v1/completions": "completion",
    "/v1/chat/completions": "chat",
    "/v1/chat/completions/batch": "batch",
}
_JSON = [(b"content-type", b"application/json")]
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What the server knows and does; the defaults are those of a current vLLM.

    Attributes
    ----------
    lists : bool
        Take lists of prompts in ``/v1/completions``; without, they are 400, as with Ollama.
    tokenize : bool
        Have ``/tokenize`` and ``/detokenize``; without, they are 404.
    stream_interval : bool
        Honour the field ``stream_interval``; without, every token is a chunk, as with an older vLLM.
    batch_chat : bool
        Have ``/v1/chat/completions/batch``; without, it is 404, as before vLLM 0.19.
    faults : tuple of Fault
        Scripted faults.
    """

    lists: bool = True
    tokenize: bool = True
    stream_interval: bool = True
    batch_chat: bool = True
    faults: tuple[Fault, ...] = ()


@dataclass(slots=True)
class Counts:
    """What was served on one address."""

    requests: Counter[str] = field(default_factory=Counter)
    responses: Counter[tuple[str, int]] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    prompts: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    aborted: int = 0


class _Inbox:
    """Where an engine leaves a job's increments and the request waits for them."""

    def __init__(self) -> None:
        self._got: list[Increment] = []
        self._waiter: asyncio.Future[None] | None = None
        self.closed = False

    def put(self, increments: list[Increment]) -> None:
        self._got.extend(increments)
        self._wake()

    @property
    def empty(self) -> bool:
        """Whether `take` would wait."""
        return not self._got

    def close(self) -> None:
        """The client is gone: nobody needs the rest."""
        self.closed = True
        self._wake()

    async def take(self) -> list[Increment]:
        """All there is, waiting for some; nothing if the client is gone."""
        if not self._got and not self.closed:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            self._waiter = None
        got, self._got = self._got, []
        return [] if self.closed else got

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)


class App:
    """The server as an ASGI application.

    Parameters
    ----------
    engine : Engine
        What answers.
    options : ServerOptions, optional
        What it knows and does.
    token : str, optional
        Bearer token that every request must carry; None asks for none.
    """

    def __init__(self, engine: Engine, options: ServerOptions | None = None, token: str | None = None) -> None:
        options = options or ServerOptions()
        self.engine = engine
        self.options = options
        self.started = int(time.time())
        self.plan = FaultPlan(options.faults)
        self.counts: defaultdict[str, Counts] = defaultdict(Counts)
        self._token = token.encode() if token else None
        routes = [
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/version", self.version, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]
        if options.tokenize:
            routes.append(Route("/tokenize", self.tokenize, methods=["POST"]))
            routes.append(Route("/detokenize", self.detokenize, methods=["POST"]))
        self._rest = Starlette(routes=routes, exception_handlers={HTTPException: _http_error, RefusedError: _refused})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request: the key first, then the faults, then the route."""
        address, path = scope["server"][0], scope["path"]
        counts = self.counts[address]
        counts.requests[path] += 1

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                counts.responses[path, message["status"]] += 1
            await send(message)

        if not self._allowed(scope):
            await _json(401, {"error": "Unauthorized"})(scope, receive, counted)
            return
        kind = _GENERATE.get(path)
        if kind and scope["method"] == "POST" and (kind != "batch" or self.options.batch_chat):
            await self._generate(kind, scope, receive, counted)
            return
        fault = self._fault(address, path, None)
        if fault and await misbehave.instead(fault, scope, receive, counted):
            return
        await self._rest(scope, receive, misbehave.slowed(fault, counted))

    def _allowed(self, scope: Scope) -> bool:
        if self._token is None:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        return hmac.compare_digest(key, self._token) and scheme.lower() == b"bearer"

    async def _generate(self, kind: Kind, scope: Scope, receive: Receive, send: Send) -> None:
        """Any of the three routes that make text."""
        address, path = scope["server"][0], scope["path"]
        try:
            ask = parse_generate(
                parse_body(await _read(receive)),
                kind,
                self.engine,
                lists=self.options.lists,
                interval=self.options.stream_interval,
            )
        except RefusedError as error:
            await _json(error.status, error.body)(scope, receive, send)
            return
        counts = self.counts[address]
        counts.prompts += len(ask.prompts)
        counts.prompt_tokens += ask.prompt_tokens
        fault = self._fault(address, path, ask.prompts)
        if fault and await misbehave.instead(fault, scope, receive, send, stream=ask.stream):
            return
        tamper = Tamper(fault, len(ask.prompts) * ask.n) if fault and fault.is_tamper else None
        await self._answer(ask, scope, receive, misbehave.slowed(fault, send), tamper)

    def _fault(self, address: str, path: str, prompts: list[Prompt] | None) -> Fault | None:
        """The scripted fault this request meets, if any."""
        if not self.options.faults:
            return None
        texts = None if prompts is None else [prompt.text for prompt in prompts]
        fault = self.plan.pick(address, path, texts)
        if fault:
            self.counts[address].faults[fault.kind] += 1
        return fault

    async def _answer(self, ask: Ask, scope: Scope, receive: Receive, send: Send, tamper: Tamper | None) -> None:
        """Run the engine, and write what it makes until the last row is done or the client is gone."""
        counts = self.counts[scope["server"][0]]
        inbox = _Inbox()
        job = Job(ask.prompts, ask.n, ask.sampling, scope["server"][0], inbox.put)
        make = StreamReply if ask.stream else PlainReply
        reply = make(ask, self.engine.model, _request_id(scope), tamper)
        watch: asyncio.Task[None] | None = None
        cut = False
        try:
            self.engine.submit(job)
        except EngineDeadError as error:
            refusal = RefusedError(str(error), status=500, type_="InternalServerError")
            await _json(500, refusal.body)(scope, receive, send)
            return
        if ask.stream:
            await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
        written = reply.opening()
        try:
            while reply.unfinished and not cut:
                if inbox.empty:
                    # Only now: an instant engine is done already, and a task would cost more than its answer.
                    watch = watch or asyncio.create_task(_until_gone(receive, inbox))
                    if written:
                        await send(_part(written))
                        written = ""
                increments = await inbox.take()
                if inbox.closed:
                    counts.aborted += reply.unfinished
                    return
                written += reply.feed(tamper.alter(increments) if tamper else increments)
                cut = tamper is not None and tamper.ends_now(len(reply.rows) - reply.unfinished)
        finally:
            if watch:
                watch.cancel()
            if reply.unfinished or tamper:
                self.engine.cancel(job)
            counts.generation_tokens += reply.n_tokens
        half = tamper is not None and tamper.kind == "half_json"
        if isinstance(reply, StreamReply):
            written += "" if cut else reply.closing()
            await send(_part(written[: len(written) // 2] if half else written, more=cut))
        else:
            body = reply.body()
            body = body[: len(body) // 2] if half else body
            headers = [*_JSON, (b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            sent = body[: len(body) // 2] if cut else body
            await send({"type": "http.response.body", "body": sent, "more_body": cut})
        if tamper and cut:
            await misbehave.end_early(tamper.kind, scope, receive)

    async def models(self, request: Request) -> Response:
        """``/v1/models``: the one model there is."""
        card = {
            "id": self.engine.model,
            "object": "model",
            "created": self.started,
            "owned_by": "swarmkit",
            "root": self.engine.model,
            "parent": None,
            "max_model_len": self.engine.max_model_len,
        }
        return JSONResponse({"object": "list", "data": [card]})

    async def health(self, request: Request) -> Response:
        """``/health``: an empty 200, or 503 once the engine has broken down."""
        return Response(status_code=200 if self.engine.alive else 503)

    async def version(self, request: Request) -> Response:
        """``/version``: of swarmkit, since there is no vLLM here."""
        return JSONResponse({"version": swarmkit.__version__})

    async def tokenize(self, request: Request) -> Response:
        """``/tokenize``, of a prompt or of messages."""
        body = parse_body(await request.body())
        check_model(body, self.engine)
        if "messages" in body:
            generate = body.get("add_generation_prompt", True) is not False
            text: Any = self.engine.render(parse_messages(body["messages"]), add_generation_prompt=generate)
            special = body.get("add_special_tokens", False) is True
        else:
            text, special = body.get("prompt"), body.get("add_special_tokens", True) is not False
        if not isinstance(text, str):
            raise RefusedError("1 validation error:\n  prompt: Input should be a valid string", "prompt")
        ids = self.engine.encode(text, add_special_tokens=special)
        strings = [self.engine.decode([i]) for i in ids] if body.get("return_token_strs") else None
        limit = self.engine.max_model_len
        return _json(200, {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": strings})

    async def detokenize(self, request: Request) -> Response:
        """``/detokenize``."""
        body = parse_body(await request.body())
        check_model(body, self.engine)
        ids = body.get("tokens")
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise RefusedError("1 validation error:\n  tokens: Input should be a list of integers", "tokens")
        try:
            return _json(200, {"prompt": self.engine.decode(ids)})
        except PromptRefusedError as error:
            raise RefusedError(str(error), "tokens") from error

    async def metrics(self, request: Request) -> Response:
        """``/metrics``: of the address that is asked, as if it were a server of its own; ``?all`` has all."""
        asked = [request.scope["server"][0]] if "all" not in request.query_params else sorted(self.counts)
        return PlainTextResponse(metrics_text(self.engine, {a: self.counts[a] for a in asked}))


def metrics_text(engine: Engine, counts: Mapping[str, Counts]) -> str:
    """Prometheus text of what runs, waits and was served, labelled with the local address."""
    lines: defaultdict[str, list[str]] = defaultdict(list)
    for address, count in counts.items():
        label = f'address="{address}",model_name="{engine.model}"'
        running, waiting = engine.load(address)
        lines["vllm:num_requests_running gauge"].append(f"{{{label}}} {running}")
        lines["vllm:num_requests_waiting gauge"].append(f"{{{label}}} {waiting}")
        lines["vllm:prompt_tokens_total counter"].append(f"{{{label}}} {count.prompt_tokens}")
        lines["vllm:generation_tokens_total counter"].append(f"{{{label}}} {count.generation_tokens}")
        lines["swarmkit:prompts_total counter"].append(f"{{{label}}} {count.prompts}")
        lines["swarmkit:aborted_total counter"].append(f"{{{label}}} {count.aborted}")
        for path, n in sorted(count.requests.items()):
            lines["swarmkit:requests_total counter"].append(f'{{{label},path="{path}"}} {n}')
        for (path, status), n in sorted(count.responses.items()):
            lines["swarmkit:responses_total counter"].append(f'{{{label},path="{path}",status="{status}"}} {n}')
        for kind, n in sorted(count.faults.items()):
            lines["swarmkit:faults_total counter"].append(f'{{{label},kind="{kind}"}} {n}')
    text = ""
    for heading, samples in lines.items():
        name = heading.split()[0]
        text += f"# TYPE {heading}\n" + "".join(f"{name}{sample}\n" for sample in samples)
    return text


def _part(text: str, *, more: bool = True) -> MutableMapping[str, Any]:
    return {"type": "http.response.body", "body": text.encode("ascii"), "more_body": more}


async def _read(receive: Receive) -> bytes:
    message = await receive()
    parts = [message.get("body", b"")]
    while message.get("more_body"):
        message = await receive()
        parts.append(message.get("body", b""))
    return b"".join(parts)


async def _until_gone(receive: Receive, inbox: _Inbox) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    inbox.close()


def _request_id(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
    return given.decode("latin-1") if given else uuid.uuid4().hex


def _json(status: int, value: object) -> Response:
    # Not starlette's JSONResponse: that cannot write lone surrogates, which a prompt may hold.
    return Response(to_json(value), status, media_type="application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json(error.status_code, {"detail": error.detail})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return _json(error.status, error.body)
