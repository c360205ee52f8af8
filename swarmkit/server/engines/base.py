"""The protocol between the server and an engine, and its records.

The server submits the sequences of a request as one `Job`; the engine answers with `Increment` records, per
sequence, whenever tokens are ready, and drops sequences that are cancelled. That is continuous batching:
sequences of many requests run side by side and leave when they are done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

__all__ = [
    "THOUGHTS_BEGIN",
    "THOUGHTS_END",
    "Constraint",
    "ConstraintRefusedError",
    "Engine",
    "EngineDeadError",
    "Increment",
    "Job",
    "Prompt",
    "PromptRefusedError",
    "Sampling",
    "StopScan",
    "TokenLogprobs",
]

Message = dict[str, Any]
Switches = Mapping[str, Any]
THOUGHTS_BEGIN, THOUGHTS_END = "<think>", "</think>"


class PromptRefusedError(ValueError):
    """Token ids that the engine does not know; the server answers 400 for the whole request."""


class ConstraintRefusedError(ValueError):
    """A constraint that the engine cannot keep; the server answers 400 for the whole request."""


class EngineDeadError(RuntimeError):
    """The engine has failed and takes no more work; the server answers 500."""


@dataclass(slots=True)
class Prompt:
    """One prompt as the engine will run it.

    Attributes
    ----------
    text : str
        The whole text, chat template included.
    ids : list of int or None
        Its token ids; None where the engine has not needed them yet.
    n_tokens : int
        Length in tokens.
    user : str
        For the echo engine: the user's part of the text.
    """

    text: str
    ids: list[int] | None
    n_tokens: int
    user: str = ""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must look like.

    Attributes
    ----------
    kind : {"json", "regex", "choice", "grammar"}
    value : dict, str or list of str
        A JSON Schema, a regular expression, the allowed answers, or a grammar in EBNF.
    after_thoughts : bool
        Whether a model that thinks may do so before; otherwise the constraint acts from the first token.
    """

    kind: Literal["json", "regex", "choice", "grammar"]
    value: Any
    after_thoughts: bool = False


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampling parameters of a request; shared by all its sequences.

    Attributes
    ----------
    max_tokens : int or None
        Maximum number of generated tokens; None means as many as the context allows.
    temperature, top_p, top_k, seed :
        As in vLLM: temperature 0 is greedy, ``top_k`` 0 is off.
    stop : tuple of str
        An answer ends before the first of these strings.
    min_tokens : int
        Minimum number of generated tokens; an end of sequence before that is ignored.
    ignore_eos : bool
        Ignore ends of sequence: generate ``max_tokens`` tokens.
    want_ids : bool
        Whether to fill `Increment.ids`.
    interval : int
        Tokens an engine may collect before it reports them; 0 if only the finished answer is needed.
    constraint : Constraint or None
        What each answer must look like, as far as ``max_tokens`` lets it come to its end.
    thinking_budget : int or None
        Thoughts are closed after this many tokens; None lets them come to their end.
    adapter : str
        Name of the adapter to run; empty for the model itself.
    logprobs : int or None
        How many of the likeliest tokens have their log-probabilities told, beside the one that was chosen.
    logprob_ids : tuple of int
        The tokens that have theirs told, in place of the likeliest.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    want_ids: bool = False
    interval: int = 1
    constraint: Constraint | None = None
    thinking_budget: int | None = None
    adapter: str = ""
    logprobs: int | None = None
    logprob_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probabilities at the place of one generated token.

    Attributes
    ----------
    id : int
        The token's id.
    by_id : dict of int to float
        Of it and of the others that were asked for, the likeliest first.
    """

    id: int
    by_id: Mapping[int, float]


@dataclass(slots=True)
class Increment:
    """New tokens of one sequence.

    Attributes
    ----------
    index : int
        The sequence in its job, ``prompt * n + sample``, from 0.
    text : str
        Their text.
    ends : sequence of int
        Where each token's text ends in ``text``; positions past its end mean its end. A token may have no text
        of its own (end of sequence, half a character).
    ids : list of int or None
        The tokens' ids, if `Sampling.want_ids`.
    finish : str or None
        "stop", "length" or "abort" with the last increment of a sequence, else None.
    stop_reason : str or None
        The stop string that ended it.
    logprobs : list of TokenLogprobs or None
        Those of the tokens, if `Sampling.logprobs`.
    """

    index: int
    text: str
    ends: Sequence[int]
    ids: list[int] | None = None
    finish: str | None = None
    stop_reason: str | None = None
    logprobs: list[TokenLogprobs] | None = None


Sink = Callable[[list[Increment]], None]


@dataclass(slots=True, eq=False)
class Job:
    """The sequences of one request: ``len(prompts) * n`` of them.

    Attributes
    ----------
    prompts : sequence of Prompt
    n : int
        Samples drawn for each prompt.
    sampling : Sampling
    address : str
        Local address the request was received on; each address stands for one machine.
    sink : callable
        Called with lists of `Increment`, always in the event loop's thread, and possibly before ``submit`` returns.
    cancelled : bool
        Whether the job is cancelled; the engine then stops working on it.
    """

    prompts: Sequence[Prompt]
    n: int
    sampling: Sampling
    address: str
    sink: Sink
    cancelled: bool = False


class Engine(Protocol):
    """A model, real or simulated, that runs many sequences side by side.

    All methods are called in the event loop's thread and return at once.
    """

    model: str
    max_model_len: int
    max_logprobs: int  # likeliest tokens whose log-probabilities it tells; with 1, that of the chosen token only
    generates: bool  # whether it answers prompts
    dimensions: int  # numbers of a vector; 0 for a model that gives none

    @property
    def alive(self) -> bool:
        """False once the engine has failed."""

    def prompt(self, value: str | list[int], *, add_special_tokens: bool) -> Prompt:
        """Tokenize a text, or take token ids as they are. `PromptRefusedError` if the ids are unknown."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included. `PromptRefusedError` if an id is unknown."""

    def render(self, messages: Sequence[Message], switches: Switches | None = None, *, reply: bool = True) -> str:
        """Messages, each with a role and a text as content, in the model's chat template.

        ``switches`` are further variables of the template; those it does not know change nothing. ``reply``: the
        text ends where the model's answer begins.
        """

    def check(self, constraint: Constraint) -> None:
        """`ConstraintRefusedError` if the engine cannot keep this constraint."""

    async def embed(self, prompts: Sequence[Prompt], dimensions: int, address: str) -> list[bytes]:
        """The vectors of texts: so many float32 numbers each, little-endian."""

    def submit(self, job: Job) -> None:
        """Start a job. `EngineDeadError` if the engine has failed."""

    def cancel(self, job: Job) -> None:
        """Drop the unfinished sequences of a job; its sink is not called again."""

    def abort(self) -> None:
        """End every sequence with ``finish="abort"``, as at a shutdown."""

    def load(self, address: str) -> tuple[int, int]:
        """Numbers of running and of waiting sequences of this address."""

    def close(self) -> None:
        """Free the engine's threads and memory."""


class StopScan:
    """Finds stop strings in a text that arrives in pieces.

    Withholds as many characters as could be the beginning of a stop string, so that no part of one is ever
    returned.

    Examples
    --------
    >>> scan = StopScan(("END",))
    >>> scan.feed("one E"), scan.feed("ND two"), scan.hit
    ('one', ' ', 'END')
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._hold = max(map(len, stops)) - 1
        self._held = ""
        self.hit: str | None = None

    def feed(self, text: str) -> str:
        """Add a piece; return the text that can be shown, up to the stop string if it is now complete."""
        self._held += text
        found = [(self._held.find(stop), stop) for stop in self._stops]
        hits = [hit for hit in found if hit[0] >= 0]
        if hits:
            at, self.hit = min(hits)
            shown, self._held = self._held[:at], ""
            return shown
        cut = max(0, len(self._held) - self._hold)
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def rest(self) -> str:
        """Return the withheld text, once no more text arrives."""
        shown, self._held = self._held, ""
        return shown
