"""Scripted gateways over real sockets: what stands before models elsewhere, and takes far less than vLLM does.

``Strict`` is like a hosted API of newer models: chats alone, one a request. ``Institute`` is like the gateway of a
computing centre: lists of prompts, and no listing of models. Both have only their own paths (404 elsewhere), refuse
fields that they do not know, bound the requests and tokens a minute, and take a key for so many requests only.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import threading
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from aiohttp import web

JSON = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A request that came, and the status of its answer."""

    method: str
    path: str
    body: JSON
    headers: dict[str, str]
    status: int

    @property
    def prompts(self) -> int:
        """How many prompts it holds."""
        prompt = self.body.get("prompt", [])
        return len(prompt) if isinstance(prompt, list) else 1


class Refusal(Exception):  # noqa: N818 - an answer
    """Answered with this status, body and headers."""

    def __init__(self, status: int, body: JSON, headers: dict[str, str] | None = None) -> None:
        super().__init__(status)
        self.answer = status, body, headers or {}


class Gateway:
    """A gateway on a port and a thread of its own. It is a context manager.

    Parameters
    ----------
    model : str
        The only model that it knows.
    requests, tokens : int
        So many a minute, at most; 0 for any number. Prompts count a token a word, and answers what they may have.
    minute_s : float
        How long its minutes are.
    key_requests : int
        A key is taken for so many requests; 0: for ever.
    key_file : Path, optional
        Where the key stands, too.
    delay_s : float
        How long an answer takes.

    Attributes
    ----------
    asked : list of Asked
        What came, in the order in which it was answered.
    url : str
        Its address.
    """

    paths: tuple[str, ...] = ()
    known: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        model: str = "m",
        requests: int = 0,
        tokens: int = 0,
        minute_s: float = 60.0,
        key_requests: int = 0,
        key_file: Path | None = None,
        delay_s: float = 0.0,
    ) -> None:
        self.model, self.minute_s, self.delay_s = model, minute_s, delay_s
        self.limits = {"requests": requests, "tokens": tokens}
        self.key_requests, self.key_file = key_requests, key_file
        self.asked: list[Asked] = []
        self.url = ""
        self._used = {"requests": 0, "tokens": 0}
        self._minute_ends = 0.0
        self._valid = self._issued = 0  # numbers of the key that is taken, and of the one that is given out
        self._uses = 0
        self._ids = itertools.count()
        self._issue()

    # ---- what a test sees ------------------------------

    def key(self) -> str:
        """The key as its user has it: the one that was issued last. A new one is issued when the old one is refused."""
        return f"key-{self._issued}-of-the-gateway"

    def of(self, path: str, status: int = 200) -> list[Asked]:
        """The requests to a path that were answered so."""
        return [each for each in self.asked if each.path == path and each.status == status]

    @property
    def statuses(self) -> Counter[int]:
        """How many requests were answered with each status."""
        return Counter(each.status for each in self.asked)

    # ---- as a server ------------------------------

    def __enter__(self) -> Self:
        started: Future[str] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), daemon=True)
        self._thread.start()
        self.url = started.result(30)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(30)

    async def _serve(self, started: Future[str]) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=1 << 28)
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        started.set_result(f"http://127.0.0.1:{runner.addresses[0][1]}")
        await self._over.wait()
        for _ in range(5):  # rounds of the loop: asyncio leaks a connection that it accepts while a server closes
            await asyncio.sleep(0.002)
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        raw = await request.read()
        body = json.loads(raw) if raw else {}
        try:
            content: JSON | str = self._checked(request, body)
            status, headers = 200, {}
            await asyncio.sleep(self.delay_s)
        except Refusal as refusal:
            status, content, headers = refusal.answer
        self.asked.append(Asked(request.method, request.path, body, dict(request.headers), status))
        headers = {**self._counts(), **headers}
        if isinstance(content, str):
            return web.Response(text=content, content_type="text/event-stream", headers=headers)
        return web.json_response(content, status=status, headers=headers)

    def _checked(self, request: web.Request, body: JSON) -> JSON | str:
        if request.path not in self.paths:
            raise self.no_such_path(request)
        self._check_key(request.headers.get("Authorization", ""))
        if request.method == "GET":
            return {"object": "list", "data": [{"id": self.model, "object": "model", "owned_by": "gateway"}]}
        self.check_fields(body)
        if body.get("model") != self.model:
            raise self.refusal(404, f"The model '{body.get('model')}' does not exist.", "model_not_found")
        texts = self.texts(body)
        most = body.get("max_tokens", body.get("max_completion_tokens", 16))
        self._check_rate(len(texts), sum(len(text.split()) for text in texts) + most * len(texts) * body.get("n", 1))
        return self.replies(body, texts, most)

    # ---- keys and rates ------------------------------

    def _issue(self) -> None:
        self._issued = self._valid
        if self.key_file is not None:
            self.key_file.write_text(f"{self.key()}\n")

    def _check_key(self, given: str) -> None:
        if self.key_requests and self._uses >= self.key_requests:
            self._valid, self._uses = self._valid + 1, 0
        if given != f"Bearer key-{self._valid}-of-the-gateway":
            self._issue()
            raise self.refusal(401, "Your token has expired, or is not valid.", "invalid_api_key")
        self._uses += 1

    def _check_rate(self, prompts: int, tokens: int) -> None:
        now = time.monotonic()
        if now >= self._minute_ends:
            self._minute_ends = now + self.minute_s
            self._used = dict.fromkeys(self._used, 0)
        for name, more in (("requests", 1), ("tokens", tokens)):
            limit, used = self.limits[name], self._used[name]
            if limit and more > limit:
                words = f"Request too large on {name} per min: Limit {limit}, Requested {more}."
                raise self.refusal(429, words, "rate_limit_exceeded")
            if limit and used + more > limit:
                left = self._minute_ends - now
                words = f"Rate limit reached on {name} per min: Limit {limit}, Used {used}, Requested {more}."
                raise self.refusal(429, words, "rate_limit_exceeded", {"Retry-After": str(math.ceil(left))})
        self._used["requests"] += 1
        self._used["tokens"] += tokens

    def _counts(self) -> dict[str, str]:
        """The headers that tell what is left of this minute."""
        left = max(0.0, self._minute_ends - time.monotonic())
        headers = {}
        for name, limit in self.limits.items():
            if limit:
                headers[f"x-ratelimit-limit-{name}"] = str(limit)
                headers[f"x-ratelimit-remaining-{name}"] = str(limit - self._used[name])
                headers[f"x-ratelimit-reset-{name}"] = f"{left:.3f}s"
        return headers

    # ---- what differs ------------------------------

    def no_such_path(self, request: web.Request) -> Refusal:
        return self.refusal(404, f"Invalid URL ({request.method} {request.path})")

    def refusal(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> Refusal:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": code or None}
        return Refusal(status, {"error": error}, headers)

    def check_fields(self, body: JSON) -> None:
        raise NotImplementedError

    def texts(self, body: JSON) -> list[str]:
        raise NotImplementedError

    def replies(self, body: JSON, texts: list[str], most: int) -> JSON | str:
        raise NotImplementedError

    # ---- answers ------------------------------

    def choices(self, texts: list[str], n: int, most: int) -> list[tuple[int, str, str]]:
        """Index, text and finish reason of each choice: an answer repeats its prompt, as far as it may."""
        found = []
        for index, text in enumerate(text for text in texts for _ in range(n)):
            words = f"re: {text}".split(" ")
            found.append((index, " ".join(words[:most]), "stop" if len(words) <= most else "length"))
        return found

    def completion(self, kind: str, texts: list[str], choices: list[JSON], said: list[str]) -> JSON:
        prompts, answers = (sum(len(text.split()) for text in each) for each in (texts, said))
        usage = {"prompt_tokens": prompts, "completion_tokens": answers, "total_tokens": prompts + answers}
        number = next(self._ids)
        return {"id": f"{kind}-{number}", "object": kind, "model": self.model, "choices": choices, "usage": usage}


class Strict(Gateway):
    """Chats alone; the token limit is ``max_completion_tokens``, and ``max_tokens`` is refused."""

    paths = ("/v1/models", "/v1/chat/completions")
    known = ("model", "messages", "max_completion_tokens", "temperature", "top_p", "n", "stop", "seed", "user",
             "presence_penalty", "frequency_penalty", "logprobs", "top_logprobs", "response_format")  # fmt: skip

    def check_fields(self, body: JSON) -> None:
        if "max_tokens" in body:
            words = "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
            raise self.refusal(400, f"Unsupported parameter: {words}", "unsupported_parameter")
        if odd := sorted(set(body) - set(self.known)):
            raise self.refusal(400, f"Unrecognized request argument supplied: {odd[0]}")

    def texts(self, body: JSON) -> list[str]:
        if not isinstance(body["messages"], list) or not all(isinstance(each, dict) for each in body["messages"]):
            raise self.refusal(400, "Invalid type for 'messages[0]': expected an object.", "invalid_type")
        return [body["messages"][-1]["content"]]

    def replies(self, body: JSON, texts: list[str], most: int) -> JSON | str:
        found = self.choices(texts, body.get("n", 1), most)
        choices = [
            {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
            for index, text, reason in found
        ]
        return self.completion("chat.completion", texts, choices, [text for _, text, _ in found])


class Institute(Gateway):
    """Lists of prompts, whole or as a stream; no listing of models. A refusal names all fields that are too many."""

    paths = ("/v1/completions",)
    known = ("model", "prompt", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "user", "stream", "logprobs",
             "presence_penalty", "frequency_penalty", "best_of", "echo", "logit_bias", "suffix")  # fmt: skip

    def no_such_path(self, request: web.Request) -> Refusal:
        return Refusal(404, {"detail": "Not Found"})

    def check_fields(self, body: JSON) -> None:
        if odd := sorted(set(body) - set(self.known)):
            faults = [{"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted"}
                      for name in odd]  # fmt: skip
            raise Refusal(400, {"detail": faults})

    def texts(self, body: JSON) -> list[str]:
        prompt = body["prompt"]
        return [prompt] if isinstance(prompt, str) else list(prompt)

    def replies(self, body: JSON, texts: list[str], most: int) -> JSON | str:
        found = self.choices(texts, body.get("n", 1), most)
        choices = [{"index": index, "text": text, "finish_reason": reason} for index, text, reason in found]
        if not body.get("stream"):
            return self.completion("text_completion", texts, choices, [text for _, text, _ in found])
        number = next(self._ids)
        chunks = ({"id": f"cmpl-{number}", "model": self.model, "choices": [choice]} for choice in choices)
        return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
