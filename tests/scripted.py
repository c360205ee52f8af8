"""A scripted endpoint: a few lines of socket server for what lives below HTTP, and counts of what it was asked."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

TAIL = "<|im_end|>\n<|im_start|>assistant\n"


@dataclass
class Call:
    """One request: its prompts, without a chat template, its place on its connection (from 0), and the connection."""

    server: Scripted
    connection: socket.socket
    nth: int
    prompts: list[str]
    stream: bool
    headers: str
    body: dict[str, Any] = field(default_factory=dict)

    def write(self, data: bytes) -> None:
        self.connection.sendall(data)

    def reply(self, data: bytes, status: str = "200 OK", media: str = "application/json", extra: str = "") -> None:
        head = f"HTTP/1.1 {status}\r\ncontent-type: {media}\r\ncontent-length: {len(data)}\r\n{extra}\r\n"
        self.write(head.encode() + data)

    def answer(self, pad: str = "") -> None:
        """What a healthy endpoint says, in one piece."""
        texts = [f"echo: {p}" for p in self.prompts]
        said = [{"message": {"content": t}} if "messages" in self.body else {"text": t} for t in texts]
        choices = [{"index": i, **words, "finish_reason": "stop"} for i, words in enumerate(said)]
        if not self.stream:
            self.reply(json.dumps({"choices": choices, "pad": pad}).encode())
            return
        events = "".join(f"data: {json.dumps({'choices': [choice], 'pad': pad})}\n\n" for choice in choices)
        self.reply(f"{events}data: [DONE]\n\n".encode(), media="text/event-stream")

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def wait_for_the_end(self) -> None:
        """Say nothing until the client or the test lets go."""
        with contextlib.suppress(OSError):
            while self.connection.recv(4096):
                pass


class Scripted:
    """A server on a port of its own, a thread a connection; ``script`` says what each request gets.

    It is a context manager. ``prompts`` counts the prompts it was sent.
    """

    def __init__(self, script: Callable[[Call], None], host: str = "127.0.0.1") -> None:
        self.script = script
        self.prompts = 0
        self.requests = 0
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        self.address = (host, 0)
        self.open()

    def open(self) -> None:
        """Listen (again, on the same port)."""
        self._listener = listener = socket.create_server(self.address, backlog=64)
        self.address = listener.getsockname()[:2]
        self._start(self._accept, listener)

    @property
    def listening(self) -> bool:
        """Whether it takes connections."""
        return self._listener is not None

    def close(self) -> None:
        """Refuse new connections from now on; those there are stay open."""
        listener, self._listener = self._listener, None
        if listener:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept()
            listener.close()

    def hang_up(self) -> None:
        """End all connections."""
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
        self.hang_up()
        for thread in self._threads:
            thread.join(10)

    def _start(self, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with self._lock:
                    self._connections.add(connection)
                self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            nth, unread = 0, bytearray()
            while call := self._read(connection, nth, unread):
                if call.headers.startswith("GET /health"):
                    call.reply(b"")
                    continue
                with self._lock:
                    self.prompts += 0 if call.headers.startswith("POST /tokenize") else len(call.prompts)
                    self.requests += 1
                self.script(call)
                nth += 1
        with self._lock:
            self._connections.discard(connection)

    def _read(self, connection: socket.socket, nth: int, unread: bytearray) -> Call | None:
        while b"\r\n\r\n" not in unread:
            if not (more := connection.recv(65536)):
                return None
            unread += more
        end = unread.index(b"\r\n\r\n")
        headers = unread[:end].decode("latin-1")
        length = next(
            (int(h.split(":")[1]) for h in headers.split("\r\n") if h.lower().startswith("content-length")), 0
        )
        while len(unread) < end + 4 + length:
            if not (more := connection.recv(65536)):
                return None
            unread += more
        body = bytes(unread[end + 4 : end + 4 + length])
        del unread[: end + 4 + length]  # what is left belongs to the next request
        asked = json.loads(body) if body else {}
        chats = asked.get("messages", [])
        chats = [chats] if chats and isinstance(chats[0], dict) else chats
        prompt = asked.get("prompt", [chat[-1]["content"] for chat in chats])
        prompts = [prompt] if isinstance(prompt, str) else prompt
        prompts = [p.rpartition("user\n")[2].removesuffix(TAIL) for p in prompts]  # without the local server's template
        return Call(self, connection, nth, prompts, asked.get("stream", False), headers, asked)
