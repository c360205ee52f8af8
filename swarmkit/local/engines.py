"""What the server asks of an engine, and the records that pass between the two.

The server submits a request's sequences as one `Job`; the engine answers with `Increment` records, per
sequence, whenever tokens are ready, and forgets sequences that are cancelled. That is continuous batching:
sequences of many requests run side by side and leave when they are done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Engine", "EngineDeadError", "Increment", "Job", "Prompt", "PromptRefusedError", "Sampling", "StopScan"]

Message = dict[str, Any]


class PromptRefusedError(ValueError):
    """Token ids that the engine does not know; the server makes it a 400 for the whole request."""


class EngineDeadError(RuntimeError):
    """The engine broke down and takes no more work; the server makes it a 500."""


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
class Sampling:
    """How the answers of a request are drawn; shared by all its sequences.

    Attributes
    ----------
    max_tokens : int or None
        Most tokens of an answer; None is all the context has room for.
    temperature, top_p, top_k, seed :
        As vLLM has them: temperature 0 is greedy, ``top_k`` 0 is off.
    stop : tuple of str
        An answer ends before the first of these.
    min_tokens : int
        The answer's end is not accepted before so many tokens.
    ignore_eos : bool
        Go on to ``max_tokens`` whatever the model says.
    want_ids : bool
        Fill `Increment.ids`.
    interval : int
        Tokens an engine may gather before it reports; 0 if only the finished answer matters.
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


@dataclass(slots=True)
class Increment:
    """New tokens of one sequence.

    Attributes
    ----------
    index : int
        The sequence in its job, ``prompt * n + sample``, from 0.
    text : str
        What they show.
    ends : sequence of int
        Where each token's text ends in ``text``; places past its end are its end. A token may show nothing
        (end of text, half a character).
    ids : list of int or None
        The tokens' ids, if `Sampling.want_ids`.
    finish : str or None
        "stop", "length" or "abort" with the last increment of a sequence, else None.
    stop_reason : str or None
        The stop string that ended it.
    """

    index: int
    text: str
    ends: Sequence[int]
    ids: list[int] | None = None
    finish: str | None = None
    stop_reason: str | None = None


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
        Local address the request came in on; one address plays one machine.
    sink : callable
        Gets lists of `Increment`, always in the event loop's thread; may be called before ``submit`` returns.
    cancelled : bool
        The engine stops working for it as soon as it sees this.
    """

    prompts: Sequence[Prompt]
    n: int
    sampling: Sampling
    address: str
    sink: Sink
    cancelled: bool = False


class Engine(Protocol):
    """A model, real or played, that runs many sequences side by side.

    All methods are called in the event loop's thread and return at once.
    """

    model: str
    max_model_len: int

    @property
    def alive(self) -> bool:
        """False once it has broken down."""

    def prompt(self, value: str | list[int], *, add_special_tokens: bool) -> Prompt:
        """Tokenize a text, or take token ids as they are. `PromptRefusedError` if the ids are unknown."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included. `PromptRefusedError` if an id is unknown."""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Messages, each with a role and a text as content, in the model's chat template."""

    def submit(self, job: Job) -> None:
        """Start a job. `EngineDeadError` if the engine has broken down."""

    def cancel(self, job: Job) -> None:
        """Drop what is left of a job; its sink is not called again."""

    def abort(self) -> None:
        """End every sequence with ``finish="abort"``, as a server that shuts down does."""

    def load(self, address: str) -> tuple[int, int]:
        """Sequences of this address that run, and that wait for a slot."""

    def close(self) -> None:
        """Free the engine's threads and memory."""


class StopScan:
    """Finds stop strings in a text that comes in pieces.

    Holds back as many characters as could be the beginning of a stop string, so that no part of one is
    ever returned.

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
        """Take a piece; return what can be shown, up to the stop string if it is now complete."""
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
        """Return what was held back, once no more text comes."""
        shown, self._held = self._held, ""
        return shown
