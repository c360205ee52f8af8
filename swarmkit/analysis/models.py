"""What a plan is made of: models of endpoints, and the rows they are sent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

from ..errors import SettingError

if TYPE_CHECKING:
    from ..runs.stats import RunStats

__all__ = ["EndpointModel", "Workload"]


@dataclass(frozen=True, slots=True)
class EndpointModel:
    """An endpoint, as a plan sees it.

    Parameters
    ----------
    slots : int
        Rows it works on at once (vLLM's ``--max-num-seqs``).
    tokens_per_s : float
        Tokens per second of *one* row while all slots are busy; not the throughput of the whole server.
    latency_s : float
        Seconds until the server begins with a request: network, and its front end.
    prefill_tokens_per_s : float
        Prompt tokens that the whole server reads per second, while no row gets a token; by default prompts take no
        time.
    cache_tokens : int
        Tokens of prompts that it keeps, so that prompts which begin alike are read once; 0 for none. It acts on a
        workload with ``prompts``.
    alone_tokens_per_s : float, optional
        Tokens per second of a row that runs alone; ``tokens_per_s`` by default. The time of a token grows evenly with
        the rows that run beside it.

    Raises
    ------
    SettingError
        A number that must be positive is not, or a row is slower alone.

    Examples
    --------
    >>> round(EndpointModel(slots=256, tokens_per_s=40.0, alone_tokens_per_s=120.0).speed(128), 1)
    60.1

    From a run, when it is over:

    >>> answers = pd.DataFrame({"i": range(200)}).swarm.scatter("number {i}", pool=pool.select([0]))
    >>> len(EndpointModel.from_stats(sk.last_run().stats, slots=64))
    1
    """

    slots: int = 256
    tokens_per_s: float = 40.0
    latency_s: float = 0.0
    prefill_tokens_per_s: float = math.inf
    cache_tokens: int = 0
    alone_tokens_per_s: float | None = None

    def __post_init__(self) -> None:
        speeds = min(self.tokens_per_s, self.prefill_tokens_per_s)
        if self.slots < 1 or not speeds > 0 or self.latency_s < 0 or self.cache_tokens < 0:
            raise SettingError(
                f"{self!r}: needs slots of 1 or more, tokens a second above 0, latency_s and cache_tokens of 0 or more"
            )
        if self.alone_tokens_per_s is not None and self.alone_tokens_per_s < self.tokens_per_s:
            raise SettingError(f"{self!r}: a row is not slower alone; alone_tokens_per_s must be tokens_per_s or more")

    def speed(self, rows: int) -> float:
        """Tokens per second of one row while so many run."""
        from .pace import pace_of

        return 1 / pace_of(self).step(rows)

    @classmethod
    def from_stats(cls, stats: RunStats | Sequence[RunStats], slots: int | None = None) -> list[EndpointModel]:
        """One model for each endpoint of a small real run.

        The requests of the run are played again on models with other numbers, until their first tokens, their first
        rows and their ends come when they did: how long prompts take, a token, and a token beside other rows. What the
        run does not show is left out: requests that are all alike do not tell prompts from answers. So let prompts or
        answers differ in length, and have the endpoints busy, with several requests each, or they are taken to have as
        many slots as they had rows at once; otherwise give ``slots``. Only what servers answered in the run counts: not
        rows that were reused, stored or kept.

        Parameters
        ----------
        stats : RunStats, or sequence of RunStats
            Statistics of the run, or of several on the same endpoints: ``sk.last_run().stats``.
        slots : int, optional
            Rows an endpoint works on at once, if known.

        Raises
        ------
        SettingError
            No endpoint answered anything, or the servers counted no tokens.
        """
        from .calibrate import calibrate

        return calibrate([stats] if not isinstance(stats, Sequence) else stats, slots).models


@dataclass(frozen=True, slots=True)
class Workload:
    """The rows of a plan.

    Parameters
    ----------
    rows : int
        Number of rows.
    tokens : float or sequence of float
        Tokens per answer; or a sample of such lengths, from which the rows' lengths are drawn (the
        ``response_completion_tokens`` of a small run with ``details=True``). Missing ones are left out.
    prompts : sequence of str, optional
        The rows' prompts, by which ``BatchPolicy(order=)`` decides, and which servers read or find in their caches. A
        token is taken to have four characters.
    prompt_tokens : float or sequence of float
        Without ``prompts``: tokens per prompt, chat template included; or a sample. One that is as long as that of the
        answers is drawn together with it.

    Raises
    ------
    SettingError
        No rows, no tokens, another number of prompts, or both prompts and their tokens.

    Examples
    --------
    >>> Workload(1000, tokens=128.0).rows
    1000

    As long as those of a run, when it is over:

    >>> answers = df.swarm.scatter("What does {gene} do?")
    >>> Workload.from_stats(sk.last_run().stats, rows=10_000).rows
    10000
    """

    rows: int
    tokens: float | Sequence[float] = 128.0
    prompts: Sequence[str] | None = field(default=None, repr=False)
    prompt_tokens: float | Sequence[float] = 0.0

    def __post_init__(self) -> None:
        lengths = self.sample()
        if self.rows < 1 or not lengths or not min(answer for _, answer in lengths) > 0:
            raise SettingError(f"Workload(rows={self.rows!r}, tokens=...): needs rows, and lengths above 0 tokens")
        if self.prompts is None:
            return
        if len(self.prompts) != self.rows:
            raise SettingError(f"Workload(rows={self.rows!r}, prompts={len(self.prompts)} texts): needs one a row")
        if any(_numbers(self.prompt_tokens)):
            raise SettingError("Workload(prompts=..., prompt_tokens=...): needs one of them; prompts have their tokens")

    @classmethod
    def from_stats(cls, stats: RunStats, rows: int) -> Workload:
        """So many rows, with prompts and answers as long as in a small real run.

        Parameters
        ----------
        stats : RunStats
            Statistics of the run: ``sk.last_run().stats``.
        rows : int
            Number of rows.

        Raises
        ------
        SettingError
            The run has no answers whose tokens are known.
        """
        if not stats.lengths:
            raise SettingError(
                f"no workload from {stats!r}: it needs a run that is over, with answered rows whose tokens were counted"
            )
        # The samples of a row share its prompt, and each is a row here.
        prompts = [max(0, prompt) / stats.samples for prompt, _ in stats.lengths]
        return cls(rows * stats.samples, [answer for _, answer in stats.lengths], prompt_tokens=prompts)

    def sample(self) -> list[tuple[float, float]]:
        """Lengths of prompt and answer, to draw from."""
        prompts, answers = _numbers(self.prompt_tokens), _numbers(self.tokens)
        if len(prompts) != len(answers):
            prompts = [sum(p for p in prompts if p == p) / max(1, sum(p == p for p in prompts))] * len(answers)
        return [(p if p == p else 0.0, a) for p, a in zip(prompts, answers, strict=True) if a == a]


def _numbers(given: float | Sequence[float]) -> list[float]:
    values: Sequence[Any] = given if isinstance(given, Iterable) else [given]
    return [float(v) if isinstance(v, Real) else math.nan for v in values]  # pandas' NA is none
