"""Many endpoints in one process, which play an incident: rows of a second each, 32 at once, and what goes wrong.

Everything is a timer, so a hundred endpoints that answer 3,200 rows a second take a small part of a core.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import resource
import socket
import struct
import subprocess
import sys
from collections import Counter, deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from swarmkit import AgentEndpoint

from . import _instant
from ._incidents import ROW_S, SLOTS, Incident, Role, answer_of

MODEL = "incident"
_LOOK_S = 0.05  # prompts that are no rows only ask what the server can do
_FAULT_S = 0.5
_ROW = re.compile(r"row (\d+) of")
_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_NO_LINGER = struct.pack("ii", 1, 0)  # closing resets


@dataclass(frozen=True)
class Sent:
    """What the servers were sent: requests and prompts for rows; requests of one row, but for duplicates of rows that
    another request holds; the most times that a row was sent."""

    requests: int
    prompts: int
    alone: int
    most: int


class IncidentServer:
    """The endpoints of an incident, as a child process; a context manager.

    The incident begins with the first row that comes in. ``sent`` is known after the end.
    """

    def __init__(self, incident: Incident) -> None:
        command = [sys.executable, "-m", "benchmarks._incident_server"]
        root = Path(__file__).parent.parent
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
        assert self.process.stdin
        assert self.process.stdout
        asked = {"roles": [asdict(role) for role in incident.roles], "resets": incident.resets}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        port = int(self.process.stdout.readline())
        self.endpoints = [AgentEndpoint(_address(i), port) for i in range(len(incident.roles))]
        self.sent: Sent | None = None

    def __enter__(self) -> IncidentServer:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()  # it ends with this pipe
        self.sent = Sent(**json.loads(self.process.stdout.readline()))
        self.process.wait(30)
        self.process.stdout.close()


def _address(i: int) -> str:
    # Not 127.0.0.1, where connections begin: one could take the port of an endpoint that is down.
    return f"127.1.{i // 250}.{i % 250 + 1}"


class _Swarm:
    """All endpoints, and what they count."""

    def __init__(self, roles: list[Role], resets: list[float]) -> None:
        self.loop = asyncio.get_running_loop()
        self.resets = resets
        self.requests = self.alone = 0
        self.times: dict[int, int] = {}
        self.held: Counter[int] = Counter()  # rows in requests that are not answered
        self.began = False
        self.endpoints = [_Endpoint(self, role, _address(i), random.Random(i)) for i, role in enumerate(roles)]

    async def listen(self) -> int:
        for _ in range(20):
            with socket.create_server((_address(0), 0)) as free:
                port: int = free.getsockname()[1]
            try:
                for endpoint in self.endpoints:
                    endpoint.port = port
                    if not any(begin == 0.0 for begin, _ in endpoint.role.down):
                        await endpoint.open()
            except OSError:  # taken on one of the addresses: another port
                for endpoint in self.endpoints:
                    endpoint.close()
                continue
            return port
        raise OSError(f"no port was free on all of {len(self.endpoints)} addresses")

    def count(self, rows: list[int]) -> None:
        self.requests += 1
        self.alone += len(rows) == 1 and not self.held[rows[0]]
        self.held.update(rows)
        for row in rows:
            self.times[row] = self.times.get(row, 0) + 1
        if not self.began:
            self.began = True
            self.begin()

    def begin(self) -> None:
        for at in self.resets:
            self.loop.call_later(at, lambda: [endpoint.reset() for endpoint in self.endpoints])
        for endpoint in self.endpoints:
            for begin, end in endpoint.role.down:
                self.loop.call_later(begin, endpoint.close)
                if end < 1e6:
                    self.loop.call_later(end, lambda e=endpoint: self.loop.create_task(e.open()))

    def sent(self) -> Sent:
        return Sent(self.requests, sum(self.times.values()), self.alone, max(self.times.values(), default=0))


class _Endpoint:
    """One address: 32 slots, and a queue of rows before them."""

    def __init__(self, swarm: _Swarm, role: Role, host: str, rng: random.Random) -> None:
        self.swarm, self.role, self.host, self.rng = swarm, role, host, rng
        self.port = 0
        self.free = SLOTS
        self.waiting: deque[tuple[_Exchange, list[int]]] = deque()
        self.connections: set[_Connection] = set()
        self.listener: asyncio.Server | None = None

    async def open(self) -> None:
        listener = socket.create_server((self.host, self.port), backlog=256)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.listener = await self.swarm.loop.create_server(lambda: _Connection(self), sock=listener, backlog=256)

    def close(self) -> None:
        if self.listener:
            self.listener.close()
            self.listener = None
        self.reset()

    def reset(self) -> None:
        for connection in list(self.connections):
            connection.transport.abort()

    def work(self) -> None:
        while self.free and self.waiting:
            exchange, indexes = self.waiting.popleft()
            now, later = indexes[: self.free], indexes[self.free :]
            if later:
                self.waiting.appendleft((exchange, later))
            self.free -= len(now)
            exchange.start(now)


class _Exchange:
    """One request: its rows wait for slots, take a second each, and are written as they end or all at the end."""

    def __init__(self, connection: _Connection, rows: list[int], stream: bool, chat: bool) -> None:
        self.connection, self.rows, self.stream, self.chat = connection, rows, stream, chat
        self.endpoint = connection.endpoint
        self.left = len(rows)
        self.running: dict[asyncio.TimerHandle, int] = {}

    def begin(self) -> None:
        if self.stream:
            self.connection.write(_STREAM)
        self.endpoint.waiting.append((self, list(range(len(self.rows)))))
        self.endpoint.work()

    def start(self, indexes: list[int]) -> None:
        def ends() -> None:
            del self.running[timer]
            self.endpoint.free += len(indexes)
            self.end(indexes)
            self.endpoint.work()

        timer = self.endpoint.swarm.loop.call_later(ROW_S, ends)
        self.running[timer] = len(indexes)

    def end(self, indexes: list[int]) -> None:
        self.left -= len(indexes)
        if self.stream:
            events = [
                {"object": "text_completion", "model": MODEL, "choices": [_choice(i, self.rows[i])]} for i in indexes
            ]
            self.connection.write(_events(events, last=not self.left))
        elif not self.left:
            self.connection.write(_json(_whole(self.rows, self.chat)))
        if not self.left:
            self.connection.exchange = None
            self.connection.answered()

    def drop(self) -> None:
        """The client has gone: what it asked for is aborted."""
        for timer, slots in self.running.items():
            timer.cancel()
            self.endpoint.free += slots
        self.endpoint.waiting = deque(w for w in self.endpoint.waiting if w[0] is not self)
        self.endpoint.work()


class _Connection(_instant.Connection):
    def __init__(self, endpoint: _Endpoint) -> None:
        super().__init__()
        self.endpoint = endpoint
        self.exchange: _Exchange | None = None
        self.rows: list[int] = []  # of the request that is not answered

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.endpoint.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.endpoint.connections.discard(self)
        self.answered()
        if self.exchange:
            self.exchange.drop()

    def answered(self) -> None:
        self.endpoint.swarm.held.subtract(self.rows)
        self.rows = []

    def write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)

    def asked(self, path: bytes, body: bytes) -> None:
        if path not in (b"/v1/completions", b"/v1/chat/completions"):
            self.write(_look(path, body))
            return
        asked: dict[str, Any] = orjson.loads(body)
        stream, chat = bool(asked.get("stream")), "messages" in asked
        prompt = asked["messages"][-1]["content"] if chat else asked["prompt"]
        texts = prompt if isinstance(prompt, list) else [prompt]
        rows = [int(found[1]) if (found := _ROW.search(str(text))) else -1 for text in texts]
        if min(rows) >= 0:
            self.endpoint.swarm.count(rows)
            self.rows = rows
        self.play(rows, stream, chat)

    def play(self, rows: list[int], stream: bool, chat: bool) -> None:
        role, rng = self.endpoint.role, self.endpoint.rng
        match role.fault if rng.random() < role.chance else "":
            case "" if min(rows) < 0:
                self.later(_LOOK_S, _streamed(rows) if stream else _json(_whole(rows, chat)))
            case "":
                self.exchange = _Exchange(self, rows, stream, chat)
                self.exchange.begin()
            case "empty":
                self.say(_streamed(rows, "") if stream else _json(_whole(rows, chat, "")))
            case "error_200":
                self.say(_json({"error": {"message": "the engine is not ready", "type": "internal_error"}}))
            case "http_500":
                error = _json({"error": {"message": "internal error", "code": 500}}, "500 Internal Server Error")
                self.later(_FAULT_S * rng.random(), error)
            case "http_502":
                page = b"<html><body><h1>502 Bad Gateway</h1></body></html>"
                self.later(_FAULT_S * rng.random(), _reply(page, "502 Bad Gateway", "text/html"))

    def say(self, data: bytes) -> None:
        self.write(data)
        self.answered()

    def later(self, seconds: float, data: bytes) -> None:
        self.endpoint.swarm.loop.call_later(seconds, self.say, data)


def _look(path: bytes, body: bytes) -> bytes:
    """What is asked before the first row: the models, the chat template."""
    if path == b"/v1/models":
        return _json({"object": "list", "data": [{"id": MODEL, "owned_by": "incident", "max_model_len": 32768}]})
    return _instant.answer(path, body)


def _choice(index: int, row: int, text: str | None = None, chat: bool = False) -> dict[str, Any]:
    said = text if text is not None else answer_of(row) if row >= 0 else "Two"
    where = {"message": {"role": "assistant", "content": said}} if chat else {"text": said}
    return {"index": index, **where, "logprobs": None, "finish_reason": "stop"}


def _whole(rows: list[int], chat: bool, text: str | None = None) -> dict[str, Any]:
    choices = [_choice(i, row, text, chat) for i, row in enumerate(rows)]
    usage = {"prompt_tokens": 12 * len(rows), "completion_tokens": 8 * len(rows), "total_tokens": 20 * len(rows)}
    kind = "chat.completion" if chat else "text_completion"
    return {"id": "1", "object": kind, "created": 1, "model": MODEL, "choices": choices, "usage": usage}


def _streamed(rows: list[int], text: str | None = None) -> bytes:
    events = [{"model": MODEL, "choices": [_choice(i, row, text)]} for i, row in enumerate(rows)]
    return _STREAM + _events(events, last=True)


def _events(events: list[dict[str, Any]], last: bool) -> bytes:
    body = b"".join(b"data: %s\n\n" % orjson.dumps(event) for event in events) + (b"data: [DONE]\n\n" if last else b"")
    return b"%x\r\n%s\r\n%s" % (len(body), body, b"0\r\n\r\n" if last else b"")


def _json(value: Any, status: str = "200 OK") -> bytes:
    return _reply(orjson.dumps(value), status, "application/json")


def _reply(body: bytes, status: str, media: str) -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: {media}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def _serve() -> None:
    asked = json.loads(sys.stdin.readline())
    roles = [Role(**{**role, "down": tuple(map(tuple, role["down"]))}) for role in asked["roles"]]
    swarm = _Swarm(roles, asked["resets"])
    print(await swarm.listen(), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    print(json.dumps(asdict(swarm.sent())), flush=True)


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(_serve())
