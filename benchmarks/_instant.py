"""Endpoints that answer at once: canned replies in vLLM's shape, many addresses, in a process of their own.

What is measured against them is the client. They answer in the time it takes to read a request, and their CPU is not
the client's.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson

from swarmkit import AgentEndpoint

MODEL = "instant"
CONTEXT = 32768
ANSWER = "The protein catalyses the first step of the pathway and is induced when its substrate is present."
_LABEL = "yes"  # where one token is asked for
_PREFIX, _SUFFIX = "<|user|>", "<|assistant|>"
_WHOLE_CHUNK = b"%x\r\n%s\r\n"


class Instant:
    """The server as a child process; a context manager.

    Parameters
    ----------
    addresses : int
        Loopback addresses it listens on, all with one port: each is an endpoint.
    """

    def __init__(self, addresses: int = 1) -> None:
        command = [sys.executable, "-m", "benchmarks._instant", str(addresses)]
        root = Path(__file__).parent.parent
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
        assert self.process.stdout
        self.port = int(self.process.stdout.readline())
        self.endpoints = [AgentEndpoint(_address(i), self.port) for i in range(addresses)]
        self.url = self.endpoints[0].url

    def __enter__(self) -> Instant:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()  # it ends with this pipe
        self.process.wait(30)
        self.process.stdout.close()


def _address(i: int) -> str:
    return f"127.0.{i // 250}.{i % 250 + 1}"


@functools.cache
def _reply(prompts: int, short: bool) -> bytes:
    text, reason, tokens = (_LABEL, "length", 1) if short else (ANSWER, "stop", 20)
    choices = [
        {"index": i, "text": text, "logprobs": None, "finish_reason": reason, "stop_reason": None, "token_ids": None,
         "prompt_logprobs": None, "prompt_token_ids": None}
        for i in range(prompts)
    ]  # fmt: skip
    return _json({**_head("text_completion"), "choices": choices, "usage": _usage(50 * prompts, tokens * prompts)})


@functools.cache
def _stream(prompts: int, short: bool) -> bytes:
    """What vLLM streams for short answers with a long interval: each row's first token, then its rest."""
    words = ANSWER.split(" ", 1)
    parts = ((words[0], None, 1), (f" {words[1]}", "stop", 20))
    events = [
        {**_head("text_completion"), "usage": _usage(50, tokens), "choices": [
            {"index": i, "text": text, "logprobs": None, "finish_reason": reason, "stop_reason": None,
             "prompt_token_ids": None, "token_ids": None}]}
        for text, reason, tokens in (((_LABEL, "length", 1),) if short else parts)
        for i in range(prompts)
    ]  # fmt: skip
    events.append({**_head("text_completion"), "choices": [], "usage": _usage(50 * prompts, 20 * prompts)})
    lines = [b"data: %s\n\n" % orjson.dumps(event) for event in events] + [b"data: [DONE]\n\n"]
    body = b"".join(_WHOLE_CHUNK % (len(line), line) for line in lines)
    return b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n%s0\r\n\r\n" % body


@functools.cache
def _chat() -> bytes:
    message = {"role": "assistant", "content": ANSWER, "refusal": None, "tool_calls": [], "reasoning": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    return _json({**_head("chat.completion"), "choices": [choice], "usage": _usage(50, 20)})


def _head(kind: str) -> dict[str, Any]:
    return {"object": kind, "created": 1767225600, "model": MODEL}


def _usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}


def _json(value: Any) -> bytes:
    body = orjson.dumps(value)
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


def answer(path: bytes, body: bytes) -> bytes:
    match path:
        case b"/v1/completions":
            asked = orjson.loads(body)
            prompts = len(asked["prompt"]) if isinstance(asked["prompt"], list) else 1
            return (_stream if asked.get("stream") else _reply)(prompts, asked.get("max_tokens") == 1)
        case b"/v1/chat/completions":
            return _chat()
        case b"/v1/models":
            return _json({"object": "list", "data": [{"id": MODEL, "owned_by": "instant", "max_model_len": CONTEXT}]})
        case b"/version":
            return _json({"version": "1"})
        case b"/tokenize":
            asked = orjson.loads(body)
            messages = asked.get("messages")
            text = f"{_PREFIX}{messages[0]['content']}{_SUFFIX}" if messages else asked["prompt"]
            return _json({"tokens": list(map(ord, text))})
        case b"/detokenize":
            return _json({"prompt": "".join(map(chr, orjson.loads(body)["tokens"]))})
    return b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


class Connection(asyncio.Protocol):
    """Reads requests, and answers each with ``answer``; one after the other."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.needed = 0  # bytes of the request that is coming in; 0 while its header is not whole
        self.header = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        while not self.needed or len(self.received) >= self.needed:
            if not self.needed and not self._measure():
                return
            if len(self.received) < self.needed:
                return
            path = bytes(self.received[: self.header].split(b" ", 2)[1])
            body = bytes(self.received[self.header : self.needed])
            del self.received[: self.needed]
            self.needed = 0
            self.asked(path, body)

    def asked(self, path: bytes, body: bytes) -> None:
        self.transport.write(answer(path, body))

    def _measure(self) -> bool:
        end = self.received.find(b"\r\n\r\n")
        if end < 0:
            return False
        self.header = end + 4
        _, found, rest = self.received[: self.header].lower().partition(b"content-length:")
        self.needed = self.header + (int(rest.split(b"\r\n", 1)[0]) if found else 0)
        return True


def _listen(addresses: int) -> list[socket.socket]:
    for _ in range(20):
        sockets = [socket.create_server((_address(0), 0), backlog=128)]
        port = sockets[0].getsockname()[1]
        try:
            for i in range(1, addresses):
                sockets.append(socket.create_server((_address(i), port), backlog=128))
        except OSError:  # taken on one of the addresses: another port
            for used in sockets:
                used.close()
            continue
        return sockets
    raise OSError(f"no port was free on all of {addresses} addresses")


async def _serve(addresses: int) -> None:
    sockets = _listen(addresses)
    loop = asyncio.get_running_loop()
    for listener in sockets:
        await loop.create_server(Connection, sock=listener)
    print(sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("addresses", type=int)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(_serve(parser.parse_args().addresses))


if __name__ == "__main__":
    main()
