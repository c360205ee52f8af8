"""An engine without a model: it answers with the user's own text, deterministically.

It exists for tests, benchmarks and notebooks that must give the same output everywhere. The answer of a
sequence is ``echo: <the user's text>``; with a seed (and a temperature above 0) it is ``echo 7: ...``, and
that of sample k > 0 is ``echo #k: ...``, so that answers can be told apart. A chat is rendered by the template
first, and the user's text is found by taking the template off again, so a chat and the same text wrapped in a
completion run the same way. A raw prompt, one that is not wrapped in the template, is echoed as it stands.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import re
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from .engines import Increment, Job, Message, Prompt, PromptRefusedError, Sampling

__all__ = ["EchoEngine", "Speed", "detokenize", "tokenize"]

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SPECIAL_IDS = {text: i for i, text in enumerate(_SPECIAL)}
_CUT = re.compile("(" + "|".join(map(re.escape, _SPECIAL)) + ")")
_EOS = 2
_SYSTEM = "You are an echo: you answer with the user's own words."
_USER = "user\n"
_TURN = "<|im_start|>" + _USER
_TAIL = "<|im_end|>\n<|im_start|>assistant\n"
_WIDE = 1 << 44


def _width(text: str) -> int:
    """Characters a token. An id has to stay below 2**53, else some JSON readers round it."""
    return 4 if text.isascii() else 2


def _id(piece: str, width: int) -> int:
    """Id of a token's text, made of its characters: no table is kept, and all processes agree."""
    if width == 4:
        return int.from_bytes(b"\1" + piece.encode("ascii"), "big")
    first, second = ord(piece[0]), ord(piece[1]) if len(piece) == 2 else 0
    return len(piece) * _WIDE + (first << 21) + second


def _text(token: int) -> str:
    """Text of a token; "" if there is no such token."""
    if token < len(_SPECIAL):
        return _SPECIAL[token]
    size, points = divmod(token, _WIDE)
    if size == 0:
        data = token.to_bytes(6, "big").lstrip(b"\0")
        return data[1:].decode("ascii") if data[0] == 1 and data.isascii() and len(data) <= 5 else ""
    chars = divmod(points, 1 << 21)[:size]
    return "".join(map(chr, chars)) if size <= 2 and max(chars) <= sys.maxunicode else ""


def tokenize(text: str) -> list[int]:
    """Token ids of a text: each four characters are a token, or each two where the text is not ASCII.

    The marks of the chat template are tokens of their own, and the text between them is cut on its own.

    Examples
    --------
    >>> tokenize("<|im_start|>user"), detokenize(tokenize("Grüße, 世界"))
    ([1, 6265464178], 'Grüße, 世界')
    """
    ids: list[int] = []
    for part in _CUT.split(text):
        if part in _SPECIAL_IDS:
            ids.append(_SPECIAL_IDS[part])
        else:
            ids += _ids(part, _width(part))
    return ids


def _ids(text: str, width: int) -> list[int]:
    return [_id(text[i : i + width], width) for i in range(0, len(text), width)]


def _count(text: str) -> int:
    """As `tokenize`, the number only."""
    if "<|" not in text:
        return -(-len(text) // _width(text))
    return sum(1 if part in _SPECIAL_IDS else -(-len(part) // _width(part)) for part in _CUT.split(text))


_count_known = lru_cache(maxsize=256)(_count)


def detokenize(ids: Sequence[int]) -> str:
    """Text of token ids; the inverse of `tokenize`.

    Raises
    ------
    PromptRefusedError
        An id that no text has.
    """
    texts = [_text(token) for token in ids]
    if "" in texts:
        raise PromptRefusedError(f"Token id {ids[texts.index('')]} is out of vocabulary")
    return "".join(texts)


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast an address plays.

    Attributes
    ----------
    latency_s : float
        Seconds from a sequence's start to its first token.
    tokens_per_s : float
        Tokens a second of one sequence, however many run; 0 is without limit.
    max_num_seqs : int
        Sequences that run at once; others wait for a slot. Only counts where time passes.
    """

    latency_s: float = 0.0
    tokens_per_s: float = 0.0
    max_num_seqs: int = 256

    @property
    def instant(self) -> bool:
        """Whether no time passes at all."""
        return not self.latency_s and not self.tokens_per_s


@dataclass(slots=True, eq=False)
class _Sequence:
    """One answer on its way: all its tokens are known, time alone decides when they show."""

    job: Job
    answer: Increment
    start: float = 0.0
    sent: int = 0


@dataclass(slots=True)
class _Slots:
    """The sequences of one address."""

    speed: Speed
    running: int = 0
    waiting: deque[_Sequence] = field(default_factory=deque)


class EchoEngine:
    """Answers with the user's text.

    Parameters
    ----------
    model : str, default "echo"
        The id it is served under.
    max_model_len : int, default 4096
        Context in tokens; a prompt that leaves no room for an answer is refused.
    speed : Speed, optional
        Of all addresses that ``speeds`` does not name; instant by default.
    speeds : mapping of str to Speed, optional
        Of single addresses, so that one of many endpoints can be slow.
    bos : bool, default False
        Begin prompts with a token of their own, like models whose template holds it: then
        ``add_special_tokens`` doubles it.
    trim : bool, default False
        Let the template trim the messages, as some do.

    Examples
    --------
    >>> engine = EchoEngine()
    >>> text = engine.render([{"role": "user", "content": "hello"}])
    >>> got = []
    >>> prompt = engine.prompt(text, add_special_tokens=False)
    >>> engine.submit(Job([prompt], 1, Sampling(), "127.0.0.1", got.extend))
    >>> got[0].text, got[0].finish
    ('echo: hello', 'stop')
    """

    def __init__(
        self,
        model: str = "echo",
        *,
        max_model_len: int = 4096,
        speed: Speed | None = None,
        speeds: Mapping[str, Speed] | None = None,
        bos: bool = False,
        trim: bool = False,
    ) -> None:
        self.model = model
        self.max_model_len = max_model_len
        self._bos = _SPECIAL[0] if bos else ""
        self._trim = trim
        self._speed = speed or Speed()
        self._speeds = dict(speeds or {})
        self._slots: dict[str, _Slots] = {}
        # (time of the next report, tie-break, sequence) of everything that runs, whatever its address
        self._due: list[tuple[float, int, _Sequence]] = []
        self._tie = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def alive(self) -> bool:
        """See `Engine.alive`."""
        return True

    def prompt(self, value: str | list[int], *, add_special_tokens: bool) -> Prompt:
        """See `Engine.prompt`."""
        ids = None if isinstance(value, str) else value
        text = value if isinstance(value, str) else detokenize(value)
        if self._bos and add_special_tokens and ids is None:
            text = self._bos + text
        before, mark, user = text.removesuffix(_TAIL).rpartition(_TURN)
        if not mark or not text.endswith(_TAIL):
            return Prompt(text, ids, _count(text), text)
        # Known by heart: the parts that all prompts share. The template's "user" runs into the user's text.
        n_tokens = 1 + _count_known(_TAIL) + _count(_USER + user) + (_count_known(before) if before else 0)
        return Prompt(text, ids, n_tokens, user)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """See `Engine.encode`."""
        return tokenize(self._bos + text if add_special_tokens else text)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Engine.decode`."""
        return detokenize(ids)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """See `Engine.render`."""
        turns = [(m["role"], m["content"].strip() if self._trim else m["content"]) for m in messages]
        if turns[0][0] != "system":
            turns.insert(0, ("system", _SYSTEM))
        text = self._bos + "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
        return text + "<|im_start|>assistant\n" if add_generation_prompt else text

    def submit(self, job: Job) -> None:
        """See `Engine.submit`."""
        speed = self._speeds.get(job.address, self._speed)
        answers = [
            self._answer(prompt, i * job.n + k, k, job.sampling)
            for i, prompt in enumerate(job.prompts)
            for k in range(job.n)
        ]
        if speed.instant:
            job.sink(answers)
            return
        slots = self._slots.setdefault(job.address, _Slots(speed))
        slots.waiting.extend(_Sequence(job, answer) for answer in answers)
        self._admit(slots)

    def cancel(self, job: Job) -> None:
        """See `Engine.cancel`."""
        job.cancelled = True
        slots = self._slots.get(job.address)
        if slots is None:
            return
        slots.waiting = deque(s for s in slots.waiting if s.job is not job)
        kept = [entry for entry in self._due if entry[2].job is not job]
        slots.running -= len(self._due) - len(kept)
        heapq.heapify(kept)
        self._due = kept
        self._admit(slots)

    def abort(self) -> None:
        """See `Engine.abort`."""
        left = [entry[2] for entry in self._due]
        for slots in self._slots.values():
            left += slots.waiting
            slots.waiting.clear()
            slots.running = 0
        self._due = []
        for sequence in left:
            sequence.job.sink([Increment(sequence.answer.index, "", (), finish="abort")])

    def load(self, address: str) -> tuple[int, int]:
        """See `Engine.load`."""
        slots = self._slots.get(address)
        return (slots.running, len(slots.waiting)) if slots else (0, 0)

    def close(self) -> None:
        """See `Engine.close`."""
        if self._timer:
            self._timer.cancel()

    def _answer(self, prompt: Prompt, index: int, sample: int, sampling: Sampling) -> Increment:
        """The whole answer of a sequence, as one increment."""
        seed = "" if sampling.seed is None or not sampling.temperature else f" {sampling.seed}"
        head = f"echo{seed} #{sample}: " if sample else f"echo{seed}: "
        text = head + prompt.user
        room = self.max_model_len - prompt.n_tokens
        limit = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        least = limit if sampling.ignore_eos else min(sampling.min_tokens, limit)
        width = _width(text)
        if len(text) < least * width:
            text = (text * (least * width // len(text) + 1))[: least * width]
        finish, n_tokens = ("stop", -(-len(text) // width) + 1)
        if n_tokens > limit:
            text, finish, n_tokens = text[: limit * width], "length", limit
        reason = None
        shown = text
        if sampling.stop:
            found = [(text.find(stop, sampling.min_tokens * width), stop) for stop in sampling.stop]
            hits = [hit for hit in found if hit[0] >= 0]
            if hits:
                at, reason = min(hits)
                shown, finish, n_tokens = text[:at], "stop", -(-(at + len(reason)) // width)
        ids = [*_ids(text, width), _EOS][:n_tokens] if sampling.want_ids else None
        return Increment(index, shown, range(width, width * n_tokens + 1, width), ids, finish, reason)

    def _admit(self, slots: _Slots) -> None:
        """Give free slots to those who wait, and set the clock."""
        now = asyncio.get_running_loop().time()
        while slots.waiting and slots.running < slots.speed.max_num_seqs:
            sequence = slots.waiting.popleft()
            sequence.start = now
            slots.running += 1
            self._schedule(sequence, slots.speed)
        self._set_timer()

    def _schedule(self, sequence: _Sequence, speed: Speed) -> None:
        """Put a sequence down for its next report."""
        interval, total = sequence.job.sampling.interval, len(sequence.answer.ends)
        if not interval or not speed.tokens_per_s:
            target = total
        else:
            target = min(total, sequence.sent + interval if sequence.sent else 1)
        wait = speed.latency_s + ((target - 1) / speed.tokens_per_s if speed.tokens_per_s else 0.0)
        heapq.heappush(self._due, (sequence.start + wait, next(self._tie), sequence))

    def _set_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(self._due[0][0], self._report) if self._due else None

    def _report(self) -> None:
        """Hand out what is due now, one call of each job's sink."""
        # A millisecond of slack lets sequences that were started together report together.
        now = asyncio.get_running_loop().time() + 0.001
        out: dict[Job, list[Increment]] = {}
        freed: set[str] = set()
        while self._due and self._due[0][0] <= now:
            sequence = heapq.heappop(self._due)[2]
            job, answer = sequence.job, sequence.answer
            slots = self._slots[job.address]
            done = self._due_tokens(sequence, slots.speed, now)
            last = done >= len(answer.ends)
            out.setdefault(job, []).append(_part(answer, sequence.sent, done, last))
            sequence.sent = done
            if last:
                slots.running -= 1
                freed.add(job.address)
            else:
                self._schedule(sequence, slots.speed)
        self._timer = None
        for address in freed:
            self._admit(self._slots[address])
        if self._timer is None:
            self._set_timer()
        for job, increments in out.items():
            job.sink(increments)

    @staticmethod
    def _due_tokens(sequence: _Sequence, speed: Speed, now: float) -> int:
        total = len(sequence.answer.ends)
        if not speed.tokens_per_s:
            return total
        return min(total, 1 + int((now - sequence.start - speed.latency_s) * speed.tokens_per_s))


def _part(answer: Increment, start: int, end: int, last: bool) -> Increment:
    """Some of the tokens of a whole answer."""
    first = answer.ends[start - 1] if start else 0
    return Increment(
        answer.index,
        answer.text[first : answer.ends[end - 1]],
        [at - first for at in answer.ends[start:end]],
        answer.ids[start:end] if answer.ids is not None else None,
        answer.finish if last else None,
        answer.stop_reason if last else None,
    )
