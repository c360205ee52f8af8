"""The pool of OpenAI-compatible endpoints: their routes, and how long answers may be."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import operator
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack

from ..client import io_thread
from ..client.capabilities import probe_all, require_model
from ..client.chat_template import TEMPLATE_FIELDS, CannotLearn, ChatTemplate
from ..client.dialects import Dialect, facts_of
from ..client.hostfile import AgentEndpoint
from ..client.keys import Key, KeyLike, hidden
from ..client.model_list import listed_as, nearest, serves
from ..client.tokenizer import Tokenizer
from ..client.wire import conversation
from ..engine.token_budgets import Sizing
from ..errors import EndpointError, SettingError
from ..records import MOST_LOGPROBS, Chat, Prompts, RequestSpec, Response, Route
from ..text import few, plural, printable
from .agent_pool import AgentPool
from .capabilities import RouteCapabilities, find_capabilities, to_frame
from .constraining import constrained
from .executor import Renewal
from .learning import first_answer
from .route_plan import RoutePlan
from .routing import LOOK_S, Router
from .settings import PoolSettings, hands_on
from .telling import LabelTokens, label_tokens, telling
from .templates import TemplateWatch, telling_prompts
from .truncating import truncated

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["VLLMPool"]

T = TypeVar("T")

_FEWEST_CHARS_A_TOKEN = 1.0  # the worst case, before anything is measured
_GUESSED_CHARS_A_TOKEN = 2.5  # for servers that do not tokenize: a safe guess for English and code
_SAMPLES = 8
_SAMPLE_CHARS = 4000


class VLLMPool(AgentPool):
    """OpenAI-compatible endpoints, used as one.

    It has the methods of ``AgentPool``, too: sub-pools, one prompt to one endpoint or to all, ``close``.

    Parameters
    ----------
    endpoints : iterable of AgentEndpoint, str or (host, port)
        At least one.
    model : str, optional
        The model's name; by default the one the servers list. Where they list several, each call says which.
    max_tokens : int, default 512
        Tokens a row may generate. ``$SWARMKIT_MAX_TOKENS`` changes the default.
    max_tokens_aggregation : int, optional
        The same for the nodes of a tree_reduce; twice ``max_tokens`` by default.
        ``$SWARMKIT_MAX_TOKENS_AGGREGATION`` changes the default.
    model_max_context : int, optional
        Tokens of prompt and answer together; by default as reported by the servers.
        ``$SWARMKIT_MODEL_MAX_CONTEXT`` changes the default.
    buffer : int, default 512
        Tokens kept free when the room for an answer is computed, because prompt lengths are estimates.
    use_batch : bool, default True
        Whether ``send_all_batched`` sends many prompts per request.
    concurrency, connector_limit, timeout, batch, retry, rpm, tpm, max_connections
        As for ``AgentPool``, and so are those below; ``timeout`` is 300 s.
    trust_env, verify, headers, http_client, key_ttl, cert, proxy, via
        How requests go out.
    chat : "auto", (prefix, suffix), callable or None
        How prompts become chats: learned from the server, wrapped by hand, or sent as they are (the default
        here; ``connect`` makes pools with "auto"). The server puts the model's first tokens before what is wrapped by
        hand or sent as it is, unless the wrapping has them.
    delivery : {"auto", "rows", "batch"}
        Rows as they finish, whole replies, or rows where the server streams them well ("auto"). There, too, answers
        come as whole replies, for less of the client's CPU, from an endpoint that answered its last request within two
        seconds: little is lost with such a reply. With ``details=True`` and with a store they do not, since only
        streams count the tokens of each row at no cost.
    dialect : {"openai", "vllm", "first"} or mapping, optional
        What the servers are like, where it is not to be learned by asking them: chats alone, as OpenAI's newer models
        take them; vLLM as it is by default; lists of prompts and no unknown fields, as the FIRST gateway takes them; or
        some of ``lists, rows, streams, whole, chats, template, health`` (True or False) and ``omit`` (optional fields
        that are refused), e.g. ``{"lists": True, "omit": ["stream_options"]}``.
    api_key : str, path or callable, optional
        Key for endpoints that have none of their own: the key, a file that holds it, or a function that returns it or
        an awaitable of it. See ``AgentEndpoint``.

    Notes
    -----
    The names ``AURORA_SWARM_*`` of the environment stand in for ``SWARMKIT_*`` ones that are not set.

    Examples
    --------
    >>> VLLMPool([("node001", 8000)], model="llama", max_tokens=256).max_tokens_aggregation
    512

    The models that servers list, and the endpoints of one of them:

    >>> pool.known_models(), pool.models, pool.by_model("echo").size
    ({'echo': 4}, {'echo': 4}, 4)

    Lists of prompts, many per request, to all endpoints and to one:

    >>> import asyncio
    >>> [answer.text for answer in asyncio.run(pool.send_all_batched(["lacZ?", "recA?"]))]
    ['echo: lacZ?', 'echo: recA?']
    >>> [answer.text for answer in asyncio.run(pool.post_batch(0, ["lacZ?", "recA?"]))]
    ['echo: lacZ?', 'echo: recA?']
    """

    @hands_on(AgentPool)
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
        dialect: Dialect = None,
        api_key: KeyLike | None = None,
        **settings: Unpack[PoolSettings],
    ) -> None:
        key, api_key = Key.of(api_key), None  # tracebacks may show variables
        settings = hidden(settings)
        super().__init__(endpoints, concurrency, connector_limit, timeout, **settings)
        if key:
            self._endpoints = [e if e.has_key() else replace(e, api_key=key) for e in self._endpoints]
        self.model = model
        self.max_tokens = _count("max_tokens", max_tokens, 512)
        self.max_tokens_aggregation = _count("max_tokens_aggregation", max_tokens_aggregation, 2 * self.max_tokens)
        self.model_max_context = _count("model_max_context", model_max_context, None)
        self.buffer = buffer
        self.use_batch = use_batch
        self.chat = check_chat(chat)
        self.delivery = check_one_of("delivery", delivery, ("auto", "rows", "batch"))
        self.dialect = facts_of(dialect)

    def _facts(self) -> list[tuple[str, str]]:
        return [*super()._facts(), ("model", self.model or self._listed() or "the one the servers list")]

    def __repr__(self) -> str:
        several = "_core" in self.__dict__ and not self.model and len(self.models) > 1
        return f"{super().__repr__()[:-1]}; models: {self._listed()}>" if several else super().__repr__()

    # ---- models ------------------------------

    @property
    def models(self) -> dict[str, int]:
        """The models that the endpoints list, and how many of them have each; empty before any was asked."""
        infos = (self._core.infos.get(e.url) for e in self._endpoints)
        return dict(Counter(name for info in infos if info for name in info.models if "*" not in name).most_common())

    def known_models(self, name: str = "") -> dict[str, int]:
        """``models``, for which the endpoints are asked if none was yet."""
        if not any(e.url in self._core.infos for e in self._endpoints):
            io_thread.call(self._router().known(name))
        return self.models

    def by_model(self, name: str) -> Self:
        """The sub-pool of the endpoints that serve a model, whose calls use it.

        One that has not said what it serves is in it, too.
        """
        if not isinstance(name, str) or not name:
            raise SettingError(f"model={name!r}: must be the name of a model")
        self.known_models(name)
        infos = self._core.infos

        def listed(endpoint: AgentEndpoint) -> tuple[str, ...]:
            return info.models if (info := infos.get(endpoint.url)) else ()

        listings = list(map(listed, self._endpoints))
        if any(listings) and not any(serves(models, name) for models in listings):
            raise SettingError(f"model={name!r}: no server lists it; {nearest(name, self.models)}")
        pool = self._where(lambda endpoint: not (models := listed(endpoint)) or serves(models, name))
        pool.model = listed_as(name, listings)
        return pool

    def _listed(self) -> str:
        counts = [f"{printable(name)} ({plural(count, 'endpoint')})" for name, count in self.models.items()]
        return few(counts, len(counts), 10)

    # ---- verbs on lists ------------------------------

    async def post_batch(
        self, agent_index: int, prompts: Sequence[str], max_tokens: int | None = None
    ) -> list[Response]:
        """Send prompts to one endpoint, many per request; answers in order, an empty list for an empty list."""
        if not prompts:
            return []
        spec = self.spec(max_tokens=max_tokens, mode="batch")
        return await self.select([agent_index])._without_waiting()._answers(prompts, spec, agent_index)

    async def send_all_batched(self, prompts: Sequence[str], max_tokens: int | None = None) -> list[Response]:
        """Send many prompts per request, prompt ``i`` to endpoint ``i % size`` unless one fails; answers in order.

        With ``use_batch=False`` there is one prompt per request, as in ``send_all``.
        """
        if not self.use_batch:
            return await self._answers(prompts, self._single_spec(max_tokens))
        return await self._answers(prompts, self.spec(max_tokens=max_tokens, mode="batch"))

    def spec(
        self,
        *,
        max_tokens: int | None = None,
        mode: Literal["batch", "single"] | None = None,
        chat: Chat | Literal["pool"] = "pool",
        delivery: Literal["auto", "rows", "batch"] | None = None,
        **others: Any,
    ) -> RequestSpec:
        """The specification of a call's requests: the pool's settings, overridden by the arguments.

        Raises
        ------
        SettingError
            A value outside of what is allowed; the message lists the allowed ones.
        """
        chosen = self.chat if chat == "pool" else check_chat(chat)
        if others.get("system") is not None and chosen != "auto":
            raise SettingError("system= needs chat='auto': with a template of your own, write it into the template")
        turns = {"conversations": "messages=", "examples": "examples=", "assistant_prefix": "assistant_prefix="}
        if chosen != "auto" and (given := [shown for name, shown in turns.items() if others.get(name)]):
            raise SettingError(f"{given[0]} needs chat='auto': its turns go through the model's own chat template")
        if others.get("conversations") and others.get("too_long", "error") != "error":
            raise SettingError("too_long= cuts prompts, and messages= are conversations: shorten their turns before")
        if others.get("thinking") and others.get("assistant_prefix"):
            raise SettingError(
                "assistant_prefix= begins the answer, so that no thoughts come before it: thinking=False"
            )
        if others.get("thinking") is not None and chosen != "auto":
            raise SettingError("thinking= needs chat='auto': it is a switch of the model's own chat template")
        if chosen != "auto" and (fields := [name for name in TEMPLATE_FIELDS if name in others.get("params", {})]):
            raise SettingError(
                f"{', '.join(fields)} in extra_body needs chat='auto': it goes to the model's own chat template"
            )
        cap = self.max_tokens if max_tokens is None else max_tokens
        if not isinstance(cap, int) or isinstance(cap, bool) or cap < 1:
            raise SettingError(f"max_tokens={cap!r}: must be a whole number, 1 or more")
        return RequestSpec(
            model=self.model or "",
            max_tokens=cap,
            mode=check_one_of("mode", mode or ("batch" if self.use_batch else "single"), ("batch", "single")),
            chat=chosen,
            delivery=check_one_of("delivery", delivery or self.delivery, ("auto", "rows", "batch")),
            **others,
        )

    def _single_spec(self, max_tokens: int | None) -> RequestSpec:
        # The non-batch mode of lists is one chat per prompt, whatever the pool wraps around its batches.
        return self.spec(max_tokens=max_tokens, mode="single", chat="auto")

    # ---- learned from the servers ------------------------------

    async def complete(self, spec: RequestSpec) -> RequestSpec:
        """Fill in the model's name, which only the servers know. Runs on the I/O loop."""
        return await self._complete(spec)

    async def _complete(self, spec: RequestSpec) -> RequestSpec:
        if not spec.model:
            await self._router().known()
            if len(self.models) != 1:
                listed = f"{plural(len(self.models), 'model')}; say which one to use, as model=...: {self._listed()}"
                raise SettingError(f"the servers list {listed.removesuffix(': ')}")
            spec = replace(spec, model=next(iter(self.models)))
        if spec.assistant_prefix is not None:
            await self._router().check_prefix(spec.model)
        if spec.thinking is not None:
            switch, given = await self._router().switch(spec), spec.params.get("chat_template_kwargs", {})
            if "chat_template_kwargs" in switch:
                switch = {"chat_template_kwargs": {**given, **switch["chat_template_kwargs"]}}
            spec = replace(spec, thinking=None, params={**spec.params, **switch})
        return spec

    def _router(self, tries: bool = True) -> Router:
        core = self._core
        return Router(self._endpoints, core.transport(), core.infos, core.memo, self.dialect, tries)

    def _renewal(self, spec: RequestSpec, texts: Sequence[str]) -> Renewal:
        async def plan(endpoint: AgentEndpoint) -> RoutePlan:
            return (await self._with(_endpoints=[endpoint])._plans(spec, texts))[0]

        return TemplateWatch(self._router(), spec, plan)

    async def _plans(self, spec: RequestSpec, texts: Sequence[str] = (), tries: bool = True) -> list[RoutePlan]:
        router, asked = self._router(tries), spec
        if told := spec.logprobs is not None:
            spec = replace(spec, logprobs=None)
        plans = await router.with_first_tokens(await router.plans(spec, texts), spec)
        if spec.schema is not None:
            plans = await constrained(router, plans, spec, spec.schema)
        return await telling(router, plans, asked) if told else plans

    async def label_tokens(self, spec: RequestSpec, text: str, choices: Sequence[Sequence[str]]) -> LabelTokens:
        """Which of some lists of words can be told apart by one token, after this prompt. Runs on the I/O loop."""
        spec = await self._complete(replace(spec, logprobs=MOST_LOGPROBS))
        return await label_tokens(self._router(), await self._plans(spec), spec, text, choices)

    async def preview(self, prompts: Prompts, spec: RequestSpec) -> list[tuple[str | None, int | None]]:
        """The text that would be sent for each prompt, and its tokens where the server counts them."""
        await self._router().known(spec.model)
        spec = await self._complete(spec)
        plan = (await self._plans(spec, telling_prompts(prompts.texts, range(len(prompts.texts)))))[0]
        tokenizer = Tokenizer(self._core.transport(), self._endpoints[0], spec.model, LOOK_S)

        async def show(prompt: str | None) -> tuple[str | None, int | None]:
            if prompt is None:
                return None, None
            special = plan.route is Route.COMPLETIONS and not plan.wrapped
            text = plan.wrap([prompt])[0]
            if spec.conversations:
                text = json.dumps(conversation(spec, prompt), ensure_ascii=False)
            with contextlib.suppress(EndpointError, CannotLearn):
                if spec.conversations:
                    return text, len(await tokenizer.chat_ids(spec, prompt))
                return text, await tokenizer.count(text, special)
            return text, None

        return await asyncio.gather(*map(show, prompts.texts))

    async def prompt_room(self, spec: RequestSpec, texts: Sequence[str]) -> int | None:
        """Most characters of a prompt that leave room for the full ``max_tokens``; None if the context is not known.

        ``texts`` are samples of the prompts' contents, with which characters are converted to tokens.
        """
        await self._router().known(spec.model)
        spec = await self._complete(spec)
        prompts = Prompts(list(texts))
        sizing = await self._sizing(spec, [], prompts, range(len(texts)), measure=True)
        return sizing.room_chars

    async def rooms(self, spec: RequestSpec, prompts: Prompts, rows: Sequence[int]) -> dict[int, int]:
        """Position to the tokens that the row may generate, for rows of a run; empty where the context is not known."""
        await self._router().known()
        plans = await self._plans(spec, telling_prompts(prompts.texts, rows), tries=False)  # the run will
        sizing = await self._sizing(spec, plans, prompts, rows)
        return {} if sizing.context is None else {row: sizing.budget(len(prompts.texts[row] or "")) for row in rows}

    async def fitted(
        self, spec: RequestSpec, prompts: Prompts, rows: Sequence[int]
    ) -> tuple[Prompts, set[int], int | None]:
        """The prompts, those cut that are too long, as ``spec.too_long`` says; the rows that were; and the context.

        Raises
        ------
        SettingError
            They cannot be cut.
        """
        await self._router().known(spec.model)
        plans = await self._plans(spec, telling_prompts(prompts.texts, rows), tries=False)  # the run will
        sizing = await self._sizing(spec, plans, prompts, rows)
        up = [e for e in self._endpoints if self._status(e) == "up"] or self._endpoints
        found, cut = await truncated(self._core.transport(), up, plans[0], spec, sizing, prompts, rows)
        return found, cut, sizing.context

    def capabilities(self) -> pd.DataFrame:
        """What the servers really do, found by trying it on each route of each endpoint.

        Sends 50 to 100 short requests to every endpoint, and waits a few minutes for one at most. What was found is
        remembered; of a large fleet ask a sample: ``pool.sample(16).capabilities()``.

        Returns
        -------
        pandas.DataFrame
            One row for each route of each family: endpoints that behave alike on all their routes. Missing values are
            not known. ``family, endpoints, asked`` (the first of them), ``server, version, model, context``;
            ``route``, and whether batches take it (``used``); ``lists`` of prompts, ``rows`` as they finish,
            ``stream_interval``; ``json, regex, choice``: the field that constrains answers so, or "no"; whether
            ``logprobs, n, seed, stop`` act; ``template``: learned, or why not; ``thinking``: the switch of the
            template, or "no"; where ``reasoning`` is: apart, in the text, or none; ``max_list``: prompts that a request
            may hold.

        Examples
        --------
        >>> found = pool.select([0]).capabilities()
        >>> found[["route", "used", "json", "stop"]]
                 route   used                json  stop
        0  completions   True  structured_outputs  True
        1   chat-batch  False  structured_outputs  True
        2         chat  False  structured_outputs  True
        """
        return to_frame(io_thread.call(self._capabilities()))

    async def _capabilities(self) -> list[RouteCapabilities]:
        core, transport = self._core, self._core.transport()
        unknown = [e for e in self._endpoints if e.url not in core.infos]
        for info in await probe_all(transport, unknown, model=self.model):
            core.infos[info.endpoint.url] = require_model(info, self.model)
        return await find_capabilities(transport, [core.infos[e.url] for e in self._endpoints], self.model, core.memo)

    async def _sizing(
        self,
        spec: RequestSpec,
        plans: Sequence[RoutePlan],
        prompts: Prompts,
        rows: Sequence[int],
        measure: bool = False,
    ) -> Sizing:
        if spec.kind == "embeddings" and spec.too_long == "error":
            return Sizing(0)  # no answer needs room; a text that does not fit is refused in the server's own words
        context = self.model_max_context
        if context is None:
            known = (self._core.infos.get(e.url) for e in self._endpoints)
            contexts = (info.context_of(spec.model) for info in known if info)
            context = min(filter(None, contexts), default=None)
        template = next((w.template for w in plans if isinstance(w.template, ChatTemplate)), None)
        turns = [spec.system or "", spec.assistant_prefix or "", *itertools.chain(*spec.examples)]
        extra = len(template.prefix) + len(template.suffix) if template else sum(map(len, turns)) + 64
        buffer = 0 if spec.kind == "embeddings" else self.buffer
        sizing = Sizing(spec.max_tokens, context, _FEWEST_CHARS_A_TOKEN, int(extra / 2), buffer)
        longest = max(map(len, filter(None, map(prompts.texts.__getitem__, rows))), default=0)
        if context is None or (not measure and (sizing.room_chars is None or longest <= sizing.room_chars)):
            return sizing  # every prompt leaves room for the full max_tokens, even in the worst case
        return replace(sizing, chars_per_token=await self._calibrate(spec, prompts, rows))

    async def _calibrate(self, spec: RequestSpec, prompts: Prompts, rows: Sequence[int]) -> float:
        """Characters per token: the fewest over a few of the run's own prompts, which are counted once."""
        known = prompts.measured.setdefault(spec.model, [])
        if len(known) >= _SAMPLES:
            return max(_FEWEST_CHARS_A_TOKEN / 2, min(known))
        step = max(1, len(rows) // _SAMPLES)
        texts = [t[:_SAMPLE_CHARS] for r in rows[::step][:_SAMPLES] if len(t := prompts.texts[r] or "") >= 32]
        transport = self._core.transport()

        async def look(endpoint: AgentEndpoint) -> list[int | None]:
            tokenizer = Tokenizer(transport, endpoint, spec.model, LOOK_S)
            return await asyncio.gather(*map(tokenizer.count, texts))

        counts: list[int | None] = [None] * len(texts)
        with contextlib.suppress(EndpointError):
            counts = await first_answer([e for e in self._endpoints if self._status(e) == "up"], look)
        known += [len(text) / count for text, count in zip(texts, counts, strict=True) if count]
        return max(_FEWEST_CHARS_A_TOKEN / 2, min(known, default=_GUESSED_CHARS_A_TOKEN))


def check_chat(chat: Any) -> Chat:
    """Check the value of ``chat=``."""
    is_pair = isinstance(chat, (tuple, list)) and len(chat) == 2 and all(isinstance(c, str) for c in chat)
    if chat is None or chat == "auto" or callable(chat):
        return chat  # type: ignore[no-any-return] # narrowed by hand
    if is_pair:
        return (chat[0], chat[1])
    raise SettingError(f"chat={chat!r}: must be 'auto', None, a (prefix, suffix) pair, or a callable of the prompt")


def check_one_of(name: str, value: T, allowed: tuple[T, ...]) -> T:
    """Check that a value is one of a few."""
    if value not in allowed:
        raise SettingError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}")
    return value


def _count(name: str, given: int | None, default: Any) -> Any:
    """A setting: the given value, else the environment's, else the default."""
    value: Any = given
    source = name
    if value is None:
        for prefix in ("SWARMKIT_", "AURORA_SWARM_"):
            if text := os.environ.get(prefix + name.upper()):
                source, value = f"${prefix}{name.upper()}", int(text) if text.isdecimal() else text
                break
    if value is None:
        return default
    if hasattr(value, "__index__") and not isinstance(value, bool):
        value = operator.index(value)  # also numpy's whole numbers
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SettingError(f"{source}={value!r}: must be a whole number, 1 or more")
    return value
