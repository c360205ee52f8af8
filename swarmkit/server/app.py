"""An OpenAI-compatible server in front of an engine, with the status codes and error bodies of vLLM.

One difference from vLLM is deliberate: if a token is set, every route requires it, not only those below ``/v1``.
"""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ..version import __version__
from . import fault_injection
from .engines.base import Engine, EngineDeadError, Increment, Job, Prompt, PromptRefusedError
from .faults import Fault, FaultPlan, Tamper, spoilt
from .replies import PlainReply, StreamReply, to_json, vectors_json
from .requests import (
    Base64,
    Constraints,
    Generation,
    Kind,
    Logprobs,
    RefusedError,
    check_model,
    parse_body,
    parse_embedding,
    parse_generate,
    render_chat,
)

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
    """The features of the server; the defaults are those of a current vLLM.

    Attributes
    ----------
    lists : bool
        Accept lists of prompts in ``/v1/completions``; otherwise they are answered with 400, as by Ollama.
    tokenize : bool
        Provide ``/tokenize`` and ``/detokenize``; otherwise they are 404.
    stream_interval : bool
        Honour the field ``stream_interval``; otherwise every token is a chunk, as in older versions of vLLM.
    batch_chat : bool
        Provide ``/v1/chat/completions/batch``; otherwise it is 404, as before vLLM 0.19.
    constraints : {"obey", "ignore", "refuse", "chat", "old"}
        What is done about ``structured_outputs`` and ``response_format``. ``obey``: every route keeps them.
        ``ignore``: none does, with status 200 all the same. ``refuse``: 400, unknown field. ``chat``: the chat
        routes keep them, and ``/v1/completions`` ignores them, as vLLM with ``--reasoning-parser``. ``old``: only
        ``guided_json``, ``guided_regex``, ``guided_choice`` and ``guided_grammar`` act, as before vLLM 0.12; all
        others ignore these.
    reasoning_parser : bool
        As vLLM's ``--reasoning-parser``: chats give a model's thoughts as ``reasoning``, apart from ``content``;
        ``thinking_token_budget`` acts, which is refused otherwise; and with ``obey``, constraints are kept as with
        ``chat``, after the thoughts.
    models : tuple of str
        Further names that the engine's model is served under, as vLLM serves LoRA adapters. The echo begins its answers
        with the name that was asked for.
    logprobs : {"obey", "ignore", "refuse", "old"}
        What is done about log-probabilities that are asked for. ``obey``: they are told. ``ignore``: they are not, with
        status 200 all the same. ``refuse``: 400, unknown field. ``old``: ``logprob_token_ids`` and
        ``return_tokens_as_token_ids`` are ignored, as in older versions of vLLM.
    base64 : {"obey", "ignore", "refuse"}
        What is done about ``encoding_format`` in requests for vectors. ``obey``: they are written so. ``ignore``: as
        lists of numbers all the same. ``refuse``: 400, unknown field.
    faults : tuple of Fault
        Scripted faults.
    """

    lists: bool = True
    tokenize: bool = True
    stream_interval: bool = True
    batch_chat: bool = True
    constraints: Constraints = "obey"
    reasoning_parser: bool = False
    models: tuple[str, ...] = ()
    logprobs: Logprobs = "obey"
    base64: Base64 = "obey"
    faults: tuple[Fault, ...] = ()


@dataclass(slots=True)
class Counts:
    """What one address has served."""

    requests: Counter[str] = field(default_factory=Counter)
    responses: Counter[tuple[str, int]] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    prompts: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    aborted: int = 0


class _Inbox:
    """The increments of a job, from the engine to the request that waits for them."""

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
        """Stop waiting: the client has disconnected."""
        self.closed = True
        self._wake()

    async def take(self) -> list[Increment]:
        """All new increments, waiting for the first; none if the client has disconnected."""
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
        Generates the answers.
    options : ServerOptions, optional
        The features of the server.
    token : str, optional
        Bearer token that every request must have; None requires none.
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
        self._other_routes = Starlette(
            routes=routes, exception_handlers={HTTPException: _http_error, RefusedError: _refused}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request: check the key, then apply the faults, then answer."""
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
        if path == "/v1/embeddings" and scope["method"] == "POST":
            await self._embed(scope, receive, counted)
            return
        fault = self._fault(address, path, None)
        if fault and await fault_injection.answer_with_fault(fault, scope, receive, counted):
            return
        await self._other_routes(scope, receive, fault_injection.delayed(fault, counted))

    def _allowed(self, scope: Scope) -> bool:
        if self._token is None:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        return hmac.compare_digest(key, self._token) and scheme.lower() == b"bearer"

    async def _generate(self, kind: Kind, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve any of the three routes that generate text."""
        address, path = scope["server"][0], scope["path"]
        try:
            if not self.engine.generates:
                raise RefusedError("The model does not support text generation")
            generation = parse_generate(
                parse_body(await _read(receive)),
                kind,
                self.engine,
                lists=self.options.lists,
                interval=self.options.stream_interval,
                constraints=self.options.constraints,
                reasoning_parser=self.options.reasoning_parser,
                adapters=self.options.models,
                logprobs=self.options.logprobs,
            )
        except RefusedError as error:
            await _json(error.status, error.body)(scope, receive, send)
            return
        counts = self.counts[address]
        counts.prompts += len(generation.prompts)
        counts.prompt_tokens += generation.prompt_tokens
        fault = self._fault(address, path, generation.prompts)
        if fault and await fault_injection.answer_with_fault(fault, scope, receive, send, stream=generation.stream):
            return
        tamper = Tamper(fault, len(generation.prompts) * generation.n) if fault and fault.is_tamper else None
        invalid: set[int] = set()
        if self.options.faults and generation.sampling.constraint:
            texts = [prompt.text for prompt in generation.prompts for _ in range(generation.n)]
            invalid = self.plan.invalid_rows(address, path, texts)
            if invalid:
                counts.faults["invalid"] += len(invalid)
        await self._answer(generation, scope, receive, fault_injection.delayed(fault, send), tamper, invalid)

    async def _embed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve vectors."""
        address, path, options = scope["server"][0], scope["path"], self.options
        try:
            asked = parse_embedding(
                parse_body(await _read(receive)),
                self.engine,
                lists=options.lists,
                base64=options.base64,
                adapters=options.models,
            )
        except RefusedError as error:
            await _json(error.status, error.body)(scope, receive, send)
            return
        counts = self.counts[address]
        counts.prompts += len(asked.prompts)
        counts.prompt_tokens += sum(prompt.n_tokens for prompt in asked.prompts)
        fault = self._fault(address, path, asked.prompts)
        if fault and await fault_injection.answer_with_fault(fault, scope, receive, send):
            return
        vectors = await self.engine.embed(asked.prompts, asked.dimensions, address)
        tamper = Tamper(fault, len(vectors)) if fault and fault.is_tamper else None
        body = vectors_json(asked, vectors, self.engine.model, tamper)
        send = fault_injection.delayed(fault, send)
        cut = tamper is not None and tamper.ends_now(len(vectors))
        body = body[: len(body) // 2] if tamper and tamper.kind == "half_json" else body
        headers = [*_JSON, (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        sent = body[: len(body) // 2] if cut else body
        await send({"type": "http.response.body", "body": sent, "more_body": cut})
        if tamper and cut:
            await fault_injection.end_early(tamper.kind, scope, receive)

    def _fault(self, address: str, path: str, prompts: list[Prompt] | None) -> Fault | None:
        """The scripted fault of this request, if any."""
        if not self.options.faults:
            return None
        texts = None if prompts is None else [prompt.text for prompt in prompts]
        fault = self.plan.pick(address, path, texts)
        if fault:
            self.counts[address].faults[fault.kind] += 1
        return fault

    async def _answer(
        self,
        generation: Generation,
        scope: Scope,
        receive: Receive,
        send: Send,
        tamper: Tamper | None,
        invalid: Collection[int],
    ) -> None:
        """Run the engine, and write its answers until the last row is done or the client disconnects."""
        counts = self.counts[scope["server"][0]]
        inbox = _Inbox()
        job = Job(generation.prompts, generation.n, generation.sampling, scope["server"][0], inbox.put)
        make = StreamReply if generation.stream else PlainReply
        reply = make(generation, self.engine, _request_id(scope), tamper)
        watch: asyncio.Task[None] | None = None
        cut = False
        try:
            self.engine.submit(job)
        except EngineDeadError as error:
            refusal = RefusedError(str(error), status=500, type_="InternalServerError")
            await _json(500, refusal.body)(scope, receive, send)
            return
        if generation.stream:
            await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
        written = reply.opening()
        try:
            while reply.unfinished and not cut:
                if inbox.empty:
                    # Not earlier: an instant engine has finished by now, and a task would cost more than its answer.
                    watch = watch or asyncio.create_task(_until_disconnect(receive, inbox))
                    if written:
                        await send(_part(written))
                        written = ""
                increments = await inbox.take()
                if inbox.closed:
                    counts.aborted += reply.unfinished
                    return
                if invalid:
                    increments = [spoilt(new) if new.index in invalid else new for new in increments]
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
            await fault_injection.end_early(tamper.kind, scope, receive)

    async def models(self, request: Request) -> Response:
        """``/v1/models``: the engine's model, and its adapters."""
        card = {
            "id": self.engine.model,
            "object": "model",
            "created": self.started,
            "owned_by": "swarmkit",
            "root": self.engine.model,
            "parent": None,
            "max_model_len": self.engine.max_model_len,
        }
        own = {"parent": self.engine.model, "max_model_len": None}
        adapters = [{**card, "id": name, "root": name, **own} for name in self.options.models]
        return JSONResponse({"object": "list", "data": [card, *adapters]})

    async def health(self, request: Request) -> Response:
        """``/health``: an empty 200, or 503 once the engine has failed."""
        return Response(status_code=200 if self.engine.alive else 503)

    async def version(self, request: Request) -> Response:
        """``/version``: the version of swarmkit."""
        return JSONResponse({"version": __version__})

    async def tokenize(self, request: Request) -> Response:
        """``/tokenize``, of a prompt or of messages."""
        body = parse_body(await request.body())
        check_model(body, self.engine, self.options.models)
        if "messages" in body:
            text: Any = render_chat(body, body["messages"], self.engine)
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
        check_model(body, self.engine, self.options.models)
        ids = body.get("tokens")
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise RefusedError("1 validation error:\n  tokens: Input should be a list of integers", "tokens")
        try:
            return _json(200, {"prompt": self.engine.decode(ids)})
        except PromptRefusedError as error:
            raise RefusedError(str(error), "tokens") from error

    async def metrics(self, request: Request) -> Response:
        """``/metrics`` of the requested address, as if it were a server of its own; of all addresses with ``?all``."""
        asked = [request.scope["server"][0]] if "all" not in request.query_params else sorted(self.counts)
        return PlainTextResponse(metrics_text(self.engine, {a: self.counts[a] for a in asked}))


def metrics_text(engine: Engine, counts: Mapping[str, Counts]) -> str:
    """Prometheus text: running, waiting and served requests, labelled with the local address."""
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


async def _until_disconnect(receive: Receive, inbox: _Inbox) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    inbox.close()


def _request_id(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
    return given.decode("latin-1") if given else uuid.uuid4().hex


def _json(status: int, value: object) -> Response:
    # Not starlette's JSONResponse: it cannot write lone surrogates, which a prompt may contain.
    return Response(to_json(value), status, media_type="application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json(error.status_code, {"detail": error.detail})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return _json(error.status, error.body)
