r"""What is tunable, and the rules of failure: values and pure functions, no state.

What happens to the unfinished rows of a failed request, and to its endpoint (``REACTIONS``):

==============  ===============================================================  ===========
kind            rows                                                             endpoint
==============  ===============================================================  ===========
STALE           same endpoint, at once                                           \-
CONNECT         any endpoint (no server has seen the rows)                       opens
DISCONNECT      another endpoint; see below                                      fault
SERVER          another endpoint                                                 fault
HANG            another endpoint; see below                                      opens
ABORT           another endpoint                                                 opens
BUSY            any endpoint, after the pause                                    congested
TOO_LARGE       any endpoint, in smaller requests; alone as SERVER or REJECTED   smaller
REJECTED        halved until the bad row is alone; it is sent to one other       \-
                endpoint, then fails with the server's own message
DENIED          halved at an endpoint that has answered; alone sent again once   denied
                it answers others, then fails; elsewhere where it is the key
MALFORMED       another endpoint                                                 fault
LOCAL           any endpoint, after a pause                                      pause
==============  ===============================================================  ===========

Where everything is refused in the same words, also a short prompt, the rows fail together (``refusals.py``).

Evidence against rows (``evidence.py``). A fault counts against a row if its endpoint is well for others: the last
outcome there was a success, or was when all were sent that failed together. Where a plain prompt is answered and no row
was so far, the endpoint rests before they are sent again. The second counted fault halves a batch (a later one where
faults are frequent), so that a bad row is alone before it fails. A batch of all rows that there are is halved by any
fault, while nothing is answered yet. A DISCONNECT or HANG may be a crash: if nothing else lives on the endpoint half a
second later, and fewer than three endpoints broke at that time, the engine died, and its rows may be the cause. Rows
that saw two crashes are suspect: they are tested in groups, each alone on an endpoint, preferably one that they crashed
before, and halved there.

Endpoints. A *fault* or three in a row *open* the breaker (``breaker.py``); failures of requests sent before the last
fault belong to the same incident and are not counted again. After a fault an endpoint is sent rows that have not failed
yet, or a row that is known to be good, or a plain prompt while none is: so it is seen who is at fault. Pauses grow with
the time an endpoint has been unwell, so the end of an outage is noticed within a part of its length (``pause_s``). A
*congested* endpoint holds half as many rows from then on, and a few more with every request that ends (additive
increase, multiplicative decrease); what was too large for it is tried again ever more rarely. One that has answered and
*denies* rows is sent others, and rests if it denies most of these; then a prompt that is known to be good shows whether
it denies everything. An endpoint is out of a run only if it denied three times in turn and never answered. A run ends
for want of endpoints only when none has answered for ``RetryPolicy.give_up_s``; if all that is left then are rows that
were refused alone as BUSY, these fail, and the run ends well.

Rates (``rates.py``) hold rows back before they are sent: that is no failure, and no time without an answer. A BUSY that
says when to come again is obeyed to the second, and makes no request smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import SettingError
from ..records import FailureKind
from .prefixes import Order

__all__ = ["REACTIONS", "BatchPolicy", "Reaction", "RetryPolicy", "pause_s", "silence_s"]


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """How many rows share a request, and how many requests an endpoint holds.

    Parameters
    ----------
    max_size : int or "auto", default 100
        Prompts a request, at most. vLLM refuses more than 1,024. "auto" begins with 100, and doubles that, to 1,000 at
        most, while requests are answered within half a second and each endpoint has many of the larger ones before it.
    max_in_flight : int, default 16
        Requests an endpoint holds at once, at most. It is sent one until it has answered, then as many as keep it
        full; where rows differ in length, most requests in flight have few rows left.
    single_in_flight : int, default 64
        The same for runs that send one prompt a request.
    hedge : bool, default True
        Whether idle endpoints are sent duplicates of the rows that end clearly later where they are, or are held up
        there, at the end of a run.
    order : {"auto", "prefix", "given"}, default "auto"
        In which order rows are sent. Servers keep what they have computed of a prompt, and prompts that begin alike
        share it, so rows with a common prefix are best sent to one endpoint, one after another. "auto" looks once
        whether many rows share long prefixes beyond what all share, such as the documents of a table of documents and
        questions, and sends them in runs then; "prefix" does so for any prefixes of 16 tokens or more; "given" deals
        rows in the order of the frame. Results are in the order of the frame in any case.
    max_batch_tokens : int, optional
        Tokens a request, at most, as they are estimated from the length of its texts (by what the server has counted of
        the first ones, where it does) and the answers that they may have; for servers that take only so much at once,
        as some do of embeddings. A row that has more by itself is sent alone.

    Raises
    ------
    SettingError
        A number is below 1, or ``max_size`` above 1,024; an ``order`` that there is not.

    Examples
    --------
    >>> BatchPolicy(max_size=32).max_size
    32
    >>> growing = BatchPolicy(max_size="auto")
    >>> growing.first_size, growing.largest
    (100, 1000)
    """

    max_size: int | Literal["auto"] = 100
    max_in_flight: int = 16
    single_in_flight: int = 64
    hedge: bool = True
    order: Order = "auto"
    max_batch_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_size", "max_in_flight", "single_in_flight", "max_batch_tokens"):
            value = getattr(self, name)
            if (name, value) in (("max_size", "auto"), ("max_batch_tokens", None)):
                continue
            if not isinstance(value, int) or value < 1:
                other = ', or "auto"' if name == "max_size" else ""
                raise SettingError(f"BatchPolicy({name}={value!r}): must be a whole number, 1 or more{other}")
        if self.largest > 1024:
            raise SettingError(f"BatchPolicy(max_size={self.max_size}): vLLM takes at most 1,024 prompts a request")
        if self.order not in get_args(Order):
            allowed = ", ".join(map(repr, get_args(Order)))
            raise SettingError(f"BatchPolicy(order={self.order!r}): must be one of {allowed}")

    @property
    def first_size(self) -> int:
        """Prompts a request, at most, as a run begins."""
        return 100 if self.max_size == "auto" else self.max_size

    @property
    def largest(self) -> int:
        """Prompts a request, at most, at any time of a run."""
        return 1000 if self.max_size == "auto" else self.max_size


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often failed work is retried, and after which pauses.

    Parameters
    ----------
    max_attempts : int, default 5
        Requests of a row that may fail at endpoints that answer others before the row fails. Where faults are frequent
        on all endpoints a row is tried more often (four times as often at most). Outages are not counted.
    breaker_threshold : int, default 3
        Faults in a row that open an endpoint's breaker. A refused connection opens it at once.
    base_s, cap_s : float, default 0.5 and 30
        The shortest and the longest pause before an endpoint is tried again, in seconds. One that refuses connections
        is tried after a fifth of that.
    jitter : float, default 0.5
        Part of each pause that is random, 0 to 1, so that endpoints do not come back in step.
    give_up_s : float, default 600
        Seconds without an answer from any endpoint after which a run ends. At most 60 times ``base_s`` while no
        endpoint has answered in the run.
    row_timeout_s : float, optional
        Seconds from the first request of a row until it fails without an answer; unlimited by default.
    quiet_s : float, default 10
        Seconds without a byte after which an endpoint's ``/health`` is checked. A vLLM that is shutting down leaves
        its clients' connections open and silent while it refuses new ones.

    Raises
    ------
    SettingError
        A value is outside of what is allowed.

    Examples
    --------
    >>> RetryPolicy(give_up_s=60).max_attempts
    5
    """

    max_attempts: int = 5
    breaker_threshold: int = 3
    base_s: float = 0.5
    cap_s: float = 30.0
    jitter: float = 0.5
    give_up_s: float = 600.0
    row_timeout_s: float | None = None
    quiet_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("max_attempts", "breaker_threshold"):
            if getattr(self, name) < 1:
                raise SettingError(f"RetryPolicy({name}={getattr(self, name)!r}): must be 1 or more")
        if not 0 <= self.jitter <= 1 or self.base_s <= 0 or self.cap_s < self.base_s or self.quiet_s <= 0:
            raise SettingError("RetryPolicy: needs 0 <= jitter <= 1, 0 < base_s <= cap_s and quiet_s > 0")
        if self.give_up_s < 0 or (self.row_timeout_s is not None and self.row_timeout_s <= 0):
            raise SettingError("RetryPolicy: needs give_up_s >= 0 and row_timeout_s > 0 (or None)")


def pause_s(unwell_s: float, retry: RetryPolicy, draw: float, refused: bool = False) -> float:
    """Seconds to wait before an endpoint is tried again that has been unwell for ``unwell_s`` seconds.

    ``min(cap, max(base, unwell / 4)) * (1 - jitter * draw)``: an outage is seen to be over within that part of its
    length, and tries become as rare as it grows old. To try an endpoint that ``refused`` the connection costs nothing,
    so that is done sooner: ``base / 5`` and ``unwell / 32``. ``draw`` is a random number from 0 to 1, passed in.

    Examples
    --------
    >>> pause_s(0.0, RetryPolicy(), draw=0.0), pause_s(20.0, RetryPolicy(), draw=0.0)
    (0.5, 5.0)
    """
    base, part = (retry.base_s / 5, 32.0) if refused else (retry.base_s, 4.0)
    return min(retry.cap_s, max(base, unwell_s / part)) * (1.0 - retry.jitter * draw)


def silence_s(timeout: float, tokens: int) -> float:
    """Seconds a server may say nothing when its answer comes as a whole and may hold so many tokens.

    ``timeout`` for each 8,192 tokens, at least once. Streamed rows get ``timeout`` in any case: their server sends
    something all the time. One that is gone is noticed long before, by ``RetryPolicy.quiet_s``.

    Examples
    --------
    >>> silence_s(300.0, tokens=512), silence_s(300.0, tokens=100 * 512)
    (300.0, 1875.0)
    """
    return timeout * max(1.0, tokens / 8192)


@dataclass(frozen=True, slots=True)
class Reaction:
    """What follows from one kind of failure (the table at the top of this module).

    Attributes
    ----------
    rows : {"same", "elsewhere", "any", "refused"}
        Where the unfinished rows go.
    endpoint : {"none", "fault", "opens", "congested", "smaller", "denied", "pause"}
        What it means for the endpoint.
    counts : bool
        Whether it counts against rows if the endpoint is well for others.
    """

    rows: Literal["same", "elsewhere", "any", "refused"]
    endpoint: Literal["none", "fault", "opens", "congested", "smaller", "denied", "pause"] = "none"
    counts: bool = False


REACTIONS: dict[FailureKind, Reaction] = {
    FailureKind.STALE: Reaction("same"),
    FailureKind.CONNECT: Reaction("elsewhere", "opens"),
    FailureKind.DISCONNECT: Reaction("elsewhere", "fault", counts=True),
    FailureKind.SERVER: Reaction("elsewhere", "fault", counts=True),
    FailureKind.HANG: Reaction("elsewhere", "opens", counts=True),
    FailureKind.ABORT: Reaction("elsewhere", "opens", counts=True),
    FailureKind.BUSY: Reaction("any", "congested"),
    FailureKind.TOO_LARGE: Reaction("any", "smaller"),
    FailureKind.REJECTED: Reaction("refused"),
    FailureKind.DENIED: Reaction("elsewhere", "denied"),
    FailureKind.MALFORMED: Reaction("elsewhere", "fault", counts=True),
    FailureKind.LOCAL: Reaction("any", "pause"),
}
