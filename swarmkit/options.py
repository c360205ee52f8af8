"""The keywords of every verb that sends, and what they come to."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from . import progress
from .connect import use_pool
from .errors import SettingError
from .events import Listener
from .records import Ask, Chat, Failure, Prompts
from .results import Columns
from .reuse import Dedup, check_dedup
from .reuse import run as run_with_reuse
from .run import OnError, Run
from .stats import RunStats
from .store import Store, open_store
from .vllm_pool import VLLMPool

__all__ = ["Call", "Options", "Sampling", "read_options"]

_OURS = ("model", "prompt", "messages", "n", "max_tokens", "stream", "stream_options", "stream_interval")


class Sampling(TypedDict, total=False):
    """What shapes an answer; goes to the servers as it is."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    stop: str | list[str]
    seed: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: dict[str, float]
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: list[int]
    user: str


class Options(Sampling, total=False):
    """Keywords of every verb that sends.

    Attributes
    ----------
    pool : VLLMPool or what ``connect`` takes
        Whom to ask; the default pool otherwise.
    system : str
        System prompt.
    mode : {"batch", "single"}
        Many prompts a request, or one.
    chat : "auto", (prefix, suffix), callable or None
        Overrides the pool's.
    delivery : {"auto", "rows", "batch"}
        Overrides the pool's.
    max_tokens : int
        Tokens a row may generate; overrides the pool's.
    progress : bool or "auto"
        Whether a bar is shown; "auto" (the default): in notebooks and terminals, unless ``$SWARMKIT_PROGRESS`` is 0.
    monitor : bool
        Whether the run is shown in full (``RunMonitor``) in place of the bar; outside of notebooks it is the bar.
        ``compare`` and ``broadcast`` show neither.
    store : str, path or Store
        Folder of finished rows (``open_store``): the same call again, after a crash or an interrupt, asks only what is
        missing.
    dedup : {"auto", True, False}
        Whether identical prompts go out once; "auto" (the default): at temperature 0 with one sample a row.
    on_error : {"column", "raise"}
        Whether failed rows only carry their error, or also raise at the end.
    extra_body : dict
        Further fields of the request, as the server knows them.
    temperature, top_p, top_k, min_p, stop, seed, presence_penalty, ... :
        Sampling parameters.
    """

    pool: Any
    system: str | None
    mode: Literal["batch", "single"]
    chat: Chat
    delivery: Literal["auto", "rows", "batch"]
    max_tokens: int
    progress: bool | Literal["auto"]
    monitor: bool
    store: str | os.PathLike[str] | Store | None
    dedup: Dedup
    on_error: OnError
    extra_body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """What the keywords of a call come to."""

    pool: VLLMPool
    owned: bool
    ask: Ask
    progress: bool
    monitor: bool
    on_error: OnError
    store: Store | None
    dedup: Dedup

    async def run(
        self,
        prompts: Prompts,
        columns: Columns,
        listeners: Sequence[Listener],
        stats: RunStats,
        pending: Iterable[int] | None = None,
    ) -> Failure | None:
        """Send a column, as this call wants it sent."""
        return await run_with_reuse(
            self.pool, prompts, self.ask, columns, listeners, pending, stats, store=self.store, dedup=self.dedup
        )

    def listeners(self, label: str) -> list[Listener]:
        """Who watches a run with this label."""
        return [progress.Bar(label)] if self.progress else []

    def shown(self, run: Run) -> Run:
        """Let a run be seen, if this call wants that, and return it."""
        if self.monitor:
            from .widgets import show  # widgets are slow to import, and most runs need none

            show(run)
        return run


def read_options(options: Options, n: int = 1, details: bool = False, aggregation: bool = False) -> Call:
    """Check a call's keywords, find its pool, and put together what is asked of every row.

    Raises
    ------
    SettingError, TypeError
        A value outside of what is allowed; a keyword that is not known.
    """
    given: dict[str, Any] = dict(options)
    pool_like = given.pop("pool", None)
    monitor = bool(given.pop("monitor", False)) and progress.in_notebook()
    show = given.pop("progress", False if monitor else "auto")
    on_error = given.pop("on_error", "column")
    store, dedup = given.pop("store", None), check_dedup(given.pop("dedup", "auto"))
    if on_error not in ("column", "raise"):
        raise SettingError(f"on_error={on_error!r}: must be 'column' or 'raise'")
    params = dict(given.pop("extra_body", None) or {})
    if clash := sorted(set(params) & set(_OURS)):
        raise SettingError(f"extra_body must not hold {', '.join(clash)}: swarmkit sets these itself")
    ours = {k: given.pop(k) for k in ("system", "mode", "chat", "delivery", "max_tokens") if k in given}
    for name in given:
        if name not in Sampling.__annotations__:
            allowed = [*Options.__annotations__, "out", "details", "only_missing", "n", "by", "fanin", "trace"]
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f" Did you mean {near[0]}=?" if near else ""
            raise TypeError(
                f"{name}= is not known.{hint} What only your servers know goes through extra_body={{'{name}': ...}}"
            )
    params.update(given)
    pool, owned = use_pool(pool_like)
    if aggregation:
        ours.setdefault("max_tokens", pool.max_tokens_aggregation)
    ask = pool.ask(n=n, params=params, details=details, **ours)
    opened = None if store is None else open_store(store)
    return Call(pool, owned, ask, progress.wanted(show), monitor, on_error, opened, dedup)
