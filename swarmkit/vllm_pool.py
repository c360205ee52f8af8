"""The pool of OpenAI-compatible endpoints: which route each is asked by, and how long answers may be."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from .batches import Sizing
from .chat import CannotLearn, Template, learn, tokens_in, understands_batch_chat
from .dispatch import Way
from .errors import EndpointError, NoEndpointsError, SettingError
from .hostfile import AgentEndpoint
from .policy import BatchPolicy, RetryPolicy
from .pool import AgentPool
from .probe import ServerInfo, probe, probe_capabilities
from .records import Ask, Chat, FailureKind, Prompts, Response, Route
from .wire import encode, path_of

__all__ = ["VLLMPool"]

T = TypeVar("T")

_FEWEST_CHARS_A_TOKEN = 1.0  # what a prompt could be at worst, before anything is measured
_GUESSED_CHARS_A_TOKEN = 2.5  # for servers that do not tokenize: on the safe side for English and code
_SAMPLES = 8
_SAMPLE_CHARS = 4000
_ASKED_IN_TURN = 3


class VLLMPool(AgentPool):
    """OpenAI-compatible endpoints that serve one model, used as one.

    Parameters
    ----------
    endpoints : iterable of AgentEndpoint, str or (host, port)
        At least one.
    model : str, optional
        The model's name; by default the one the servers list, if they list one.
    max_tokens : int, default 512
        Tokens a row may generate. ``$SWARMKIT_MAX_TOKENS`` changes the default.
    max_tokens_aggregation : int, optional
        The same for the nodes of a tree-reduce; twice ``max_tokens`` by default.
        ``$SWARMKIT_MAX_TOKENS_AGGREGATION`` changes the default.
    model_max_context : int, optional
        Tokens of prompt and answer together; by default what the servers say.
        ``$SWARMKIT_MODEL_MAX_CONTEXT`` changes the default.
    buffer : int, default 512
        Tokens kept free when the room for an answer is computed, since prompt lengths are estimates.
    use_batch : bool, default True
        Whether ``send_all_batched`` sends many prompts a request.
    concurrency, connector_limit, timeout, batch, retry, trust_env
        As for ``AgentPool``; ``timeout`` is 300 s.
    chat : "auto", (prefix, suffix), callable or None
        How prompts become chats: learned from the server, wrapped by hand, or sent as they are (the default
        here; ``connect`` makes pools with "auto").
    delivery : {"auto", "rows", "batch"}
        Rows as they finish, whole replies, or rows where the server does them well.
    api_key : str, optional
        Key for endpoints that have none of their own.

    Notes
    -----
    The names ``AURORA_SWARM_*`` of the environment stand in for ``SWARMKIT_*`` ones that are not set.

    Examples
    --------
    >>> pool = VLLMPool([("node001", 8000)], model="llama", max_tokens=256)
    >>> pool.max_tokens_aggregation
    512
    """

    def __init__(
        self,
        endpoints: Iterable[AgentEndpoint | str | tuple[str, int]],
        model: str | None = None,
        max_tokens: int | None = None,
        max_tokens_aggregation: int | None = None,
        model_max_context: int | None = None,
        buffer: int = 512,
        use_batch: bool = True,
        concurrency: int | None = None,
        connector_limit: int | None = None,
        timeout: float = 300.0,
        *,
        chat: Chat = None,
        delivery: Literal["auto", "rows", "batch"] = "auto",
        api_key: str | None = None,
        batch: BatchPolicy | None = None,
        retry: RetryPolicy | None = None,
        trust_env: bool = False,
    ) -> None:
        super().__init__(
            endpoints, concurrency, connector_limit, timeout, batch=batch, retry=retry, trust_env=trust_env
        )
        if api_key:
            self._endpoints = [e if e.key() else replace(e, api_key=api_key) for e in self._endpoints]
        self.model = model
        self.max_tokens = _count("max_tokens", max_tokens, 512)
        self.max_tokens_aggregation = _count("max_tokens_aggregation", max_tokens_aggregation, 2 * self.max_tokens)
        self.model_max_context = _count("model_max_context", model_max_context, None)
        self.buffer = buffer
        self.use_batch = use_batch
        self.chat = check_chat(chat)
        self.delivery = check_one_of("delivery", delivery, ("auto", "rows", "batch"))

    def _facts(self) -> list[tuple[str, str]]:
        return [*super()._facts(), ("model", self.model or "the one the servers list")]

    # ---- verbs on lists ------------------------------

    async def post_batch(
        self, agent_index: int, prompts: Sequence[str], max_tokens: int | None = None
    ) -> list[Response]:
        """Send prompts to one endpoint, many a request; answers in order, an empty list for an empty list."""
        if not prompts:
            return []
        ask = self.ask(max_tokens=max_tokens, mode="batch")
        return await self.select([agent_index])._impatient()._answers(prompts, ask, agent_index)

    async def send_all_batched(self, prompts: Sequence[str], max_tokens: int | None = None) -> list[Response]:
        """Send prompts many a request, prompt ``i`` to endpoint ``i % size`` while all is well; answers in order.

        With ``use_batch=False`` they go one a request, as by ``send_all``.
        """
        if not self.use_batch:
            return await self._answers(prompts, self._ask_single(max_tokens))
        return await self._answers(prompts, self.ask(max_tokens=max_tokens, mode="batch"))

    def ask(
        self,
        *,
        max_tokens: int | None = None,
        mode: Literal["batch", "single"] | None = None,
        chat: Chat | Literal["pool"] = "pool",
        delivery: Literal["auto", "rows", "batch"] | None = None,
        **others: Any,
    ) -> Ask:
        """What to ask of every row: the pool's settings, and what the call says otherwise.

        Raises
        ------
        SettingError
            A value outside of what is allowed; the message lists what is.
        """
        chosen = self.chat if chat == "pool" else check_chat(chat)
        if others.get("system") is not None and chosen != "auto":
            raise SettingError("system= needs chat='auto': with a template of your own, write it into the template")
        cap = self.max_tokens if max_tokens is None else max_tokens
        if not isinstance(cap, int) or isinstance(cap, bool) or cap < 1:
            raise SettingError(f"max_tokens={cap!r}: must be a whole number, 1 or more")
        return Ask(
            model=self.model or "",
            max_tokens=cap,
            mode=check_one_of("mode", mode or ("batch" if self.use_batch else "single"), ("batch", "single")),
            chat=chosen,
            delivery=check_one_of("delivery", delivery or self.delivery, ("auto", "rows", "batch")),
            **others,
        )

    def _ask_single(self, max_tokens: int | None) -> Ask:
        # The non-batch mode of lists is a chat a prompt, whatever the pool wraps around its batches.
        return self.ask(max_tokens=max_tokens, mode="single", chat="auto")

    # ---- what the servers say ------------------------------

    async def complete(self, ask: Ask) -> Ask:
        """Fill in what only the servers know: the model's name. Runs on the I/O loop."""
        return await self._complete(ask)

    async def _complete(self, ask: Ask) -> Ask:
        if not ask.model:
            names = {m for info in await self._known() for m in info.models}
            if len(names) != 1:
                raise SettingError(
                    f"the servers list {len(names)} models ({', '.join(sorted(names))}); say which: model='...'"
                )
            ask = replace(ask, model=names.pop())
        if ask.params:
            await self._check_params(ask)
        return ask

    async def _known(self) -> list[ServerInfo]:
        """What is known of this pool's endpoints. Where nobody has asked yet, one that answers speaks for all:
        a pool made by hand is taken to be of one kind."""
        infos = self._core.infos
        if not any(e.url in infos for e in self._endpoints):
            found = None
            for endpoint in self._endpoints:
                found = await probe(self._core.transport(), endpoint)
                if found.status == "up":
                    break
            if found is None or found.status != "up":
                reason = f"{found.endpoint.name}: {found.reason}" if found else "there is none"
                raise NoEndpointsError(f"none of the {self.size} endpoints answers; the last one asked, {reason}")
            for endpoint in self._endpoints:
                infos[endpoint.url] = replace(found, endpoint=endpoint)
        return [infos[e.url] for e in self._endpoints if e.url in infos]

    async def _check_params(self, ask: Ask) -> None:
        """Let one server see the parameters with one short prompt: a parameter that every server refuses would
        otherwise be found out by halving every batch down to single rows."""
        params = {k: v for k, v in ask.params.items() if k != "cache_salt"}  # new each time, and never refused
        key = ("params", json.dumps(params, sort_keys=True, default=str), ask.n)
        if key in self._core.memo:
            return
        least = params.get("min_tokens")
        max_tokens = max(1, least) if isinstance(least, int) else 1

        shown = {**ask.params, **({"n": ask.n} if ask.n > 1 else {})}

        async def look(endpoint: AgentEndpoint) -> bool:
            route = Route.COMPLETIONS
            body = encode(route, ask, ["Hi"], max_tokens=max_tokens)
            try:
                await self._core.transport().post(endpoint, path_of(route), body)
            except EndpointError as exc:
                if exc.failure.kind is FailureKind.REJECTED:
                    raise SettingError(
                        f"{endpoint.name} refuses these parameters ({shown}): {exc.failure.message}"
                    ) from exc
                if exc.failure.kind is not FailureKind.DENIED:
                    raise
            return True

        self._core.memo[key] = await self._first(self._endpoints, look)

    async def _ways(self, ask: Ask) -> list[Way]:
        needs_servers = ask.mode == "batch" and (ask.chat == "auto" or ask.delivery == "auto")
        if not needs_servers:
            return [self._plain_way(ask)] * self.size
        infos = await self._known()
        families: dict[tuple[str, ...], list[AgentEndpoint]] = {}
        for info in infos:
            if info.status == "up":
                families.setdefault(info.family, []).append(info.endpoint)
        if not families:
            raise NoEndpointsError(f"none of the {self.size} endpoints answered when asked what it is")
        found = dict(
            zip(families, await asyncio.gather(*(self._way(f, families[f], ask) for f in families)), strict=True)
        )
        # An endpoint that has not answered yet is asked like most of the others.
        usual = max(families, key=lambda f: len(families[f]))
        family_of = {info.endpoint.url: info.family for info in infos if info.status == "up"}
        return [found[family_of.get(e.url, usual)] for e in self._endpoints]

    def _plain_way(self, ask: Ask) -> Way:
        """The way that needs nothing learned."""
        if ask.chat == "auto":
            return Way(Route.CHAT, note="one chat a prompt")
        return Way(Route.COMPLETIONS, _by_hand(ask.chat), lists=True, rows=ask.delivery == "rows")

    async def _way(self, family: tuple[str, ...], members: Sequence[AgentEndpoint], ask: Ask) -> Way:
        transport, memo = self._core.transport(), self._core.memo

        async def remembered(key: tuple[Any, ...], look: Callable[[AgentEndpoint], Awaitable[T]]) -> T:
            key = (*family, ask.model, *key)
            if key not in memo:
                memo[key] = await self._first(members, look)
            found: T = memo[key]
            return found

        can = await remembered(("can",), lambda e: probe_capabilities(transport, e, ask.model))
        rows = {"rows": can.streams, "batch": False, "auto": can.rows}[ask.delivery]
        if ask.chat != "auto":
            return Way(Route.COMPLETIONS, _by_hand(ask.chat), lists=can.lists, rows=rows and can.lists)
        note = "the server takes no lists of prompts"
        if can.lists:

            async def look(endpoint: AgentEndpoint) -> Template | CannotLearn:
                try:
                    return await learn(transport, endpoint, ask.model, ask.system)
                except CannotLearn as why:
                    return why

            # Learned anew each day: templates may write the date into the prefix.
            today = datetime.date.today().isoformat()
            template = await remembered(("template", ask.system, today), look)
            if isinstance(template, Template):
                return Way(Route.COMPLETIONS, template, lists=True, rows=rows, note="chat template learned")
            note = str(template)
        if ask.n == 1 and await remembered(("batch chat",), lambda e: understands_batch_chat(transport, e, ask.model)):
            return Way(Route.CHAT_BATCH, lists=True, note=note)
        return Way(Route.CHAT, note=note)

    async def _first(self, members: Sequence[AgentEndpoint], look: Callable[[AgentEndpoint], Awaitable[T]]) -> T:
        """The finding of the first of a few like endpoints that is well enough to be asked."""
        last: EndpointError | None = None
        for endpoint in members[:_ASKED_IN_TURN]:
            try:
                return await look(endpoint)
            except EndpointError as exc:
                last = exc
        raise NoEndpointsError(f"could not find out how to ask the servers: {last}") from last

    async def preview(self, prompts: Prompts, ask: Ask) -> list[tuple[str | None, int | None]]:
        """The text that would go out for each prompt, and its tokens where the server counts them."""
        await self._known()
        ask = await self._complete(ask)
        way = (await self._ways(ask))[0]
        texts = [None if t is None else way.wrap([t])[0] for t in prompts.texts]
        transport, endpoint = self._core.transport(), self._endpoints[0]

        async def count(text: str | None) -> int | None:
            return None if text is None else await tokens_in(transport, endpoint, ask.model, text)

        return list(zip(texts, await asyncio.gather(*map(count, texts)), strict=True))

    async def prompt_room(self, ask: Ask, texts: Sequence[str]) -> int | None:
        """Characters a prompt may have if the answer is to have its whole cap; None where no context is known.

        ``texts`` are samples of what the prompt will hold, by which characters are converted to tokens.
        """
        await self._known()
        ask = await self._complete(ask)
        prompts = Prompts(list(texts))
        sizing = await self._sizing(ask, [], prompts, range(len(texts)), measure=True)
        return sizing.room_chars

    async def _sizing(
        self, ask: Ask, ways: Sequence[Way], prompts: Prompts, rows: Sequence[int], measure: bool = False
    ) -> Sizing:
        context = self.model_max_context
        if context is None:
            known = (self._core.infos.get(e.url) for e in self._endpoints)
            context = min((info.context for info in known if info and info.context), default=None)
        template = next((w.template for w in ways if isinstance(w.template, Template)), None)
        extra = len(template.prefix) + len(template.suffix) if template else len(ask.system or "") + 64
        sizing = Sizing(ask.max_tokens, context, _FEWEST_CHARS_A_TOKEN, int(extra / 2), self.buffer)
        longest = max((len(prompts.texts[r] or "") for r in rows), default=0)
        if context is None or (not measure and (sizing.room_chars is None or longest <= sizing.room_chars)):
            return sizing  # every prompt leaves room for the whole cap, however it is counted
        return replace(sizing, chars_per_token=await self._calibrate(ask, prompts, rows))

    async def _calibrate(self, ask: Ask, prompts: Prompts, rows: Sequence[int]) -> float:
        """Characters a token, the fewest seen over a few of the run's own prompts."""
        step = max(1, len(rows) // _SAMPLES)
        texts = [t[:_SAMPLE_CHARS] for r in rows[::step][:_SAMPLES] if len(t := prompts.texts[r] or "") >= 32]
        endpoint = self._endpoints[0]
        counts = await asyncio.gather(*(tokens_in(self._core.transport(), endpoint, ask.model, t) for t in texts))
        ratios = [len(text) / count for text, count in zip(texts, counts, strict=True) if count]
        return max(_FEWEST_CHARS_A_TOKEN / 2, min(ratios, default=_GUESSED_CHARS_A_TOKEN))


def _by_hand(chat: Chat) -> Template | Callable[[str], str] | None:
    if isinstance(chat, tuple):
        return Template(*chat)
    return chat if callable(chat) else None


def check_chat(chat: Any) -> Chat:
    """Let through what ``chat=`` takes."""
    is_pair = isinstance(chat, (tuple, list)) and len(chat) == 2 and all(isinstance(c, str) for c in chat)
    if chat is None or chat == "auto" or callable(chat):
        return chat  # type: ignore[no-any-return] # narrowed by hand
    if is_pair:
        return (chat[0], chat[1])
    raise SettingError(f"chat={chat!r}: must be 'auto', None, a (prefix, suffix) pair, or a callable of the prompt")


def check_one_of(name: str, value: T, allowed: tuple[T, ...]) -> T:
    """Let through one of a few values."""
    if value not in allowed:
        raise SettingError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}")
    return value


def _count(name: str, given: int | None, default: Any) -> Any:
    """A setting: what was given, else the environment's, else the default."""
    value: Any = given
    source = name
    if value is None:
        for prefix in ("SWARMKIT_", "AURORA_SWARM_"):
            if text := os.environ.get(prefix + name.upper()):
                source, value = f"${prefix}{name.upper()}", int(text) if text.isdecimal() else text
                break
    if value is None:
        return default
    if not isinstance(value, int) or value < 1:
        raise SettingError(f"{source}={value!r}: must be a whole number, 1 or more")
    return value
