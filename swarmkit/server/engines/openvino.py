"""SmolLM2 on the CPU, through OpenVINO's continuous batching.

A thread of its own steps the pipeline as long as there is work: each step generates one token for every running
sequence, of whatever request.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .base import (
    Constraint,
    ConstraintRefusedError,
    EngineDeadError,
    Increment,
    Job,
    Message,
    Prompt,
    PromptRefusedError,
    Sampling,
    StopScan,
    Switches,
    TokenLogprobs,
)
from .constrained import answer
from .structural_tag import structural_tag

__all__ = ["OpenVinoEngine"]

# A character is at most four tokens (one per byte), so a window that begins this many tokens back holds all of
# an incomplete one.
_OVERLAP = 6
_WINDOW = 32
_YIELD_S = 0.005


@dataclass(slots=True, eq=False)
class _Sequence:
    """One answer in progress, and its text so far."""

    number: int
    job: Job
    index: int
    handle: Any
    scan: StopScan | None
    ids: list[int] = field(default_factory=list)
    start: int = 0  # the window that is decoded is ids[start:], and shows ``seen``
    seen: str = ""
    finish: str | None = None


class OpenVinoEngine:
    """Runs a GGUF model on the CPU.

    Parameters
    ----------
    model : str
        GGUF file.
    threads : int
        CPU threads the model may use.
    max_model_len : int, default 4096
        Context in tokens.
    max_num_seqs : int, default 64
        Sequences that run at once; others wait.
    cache_gb : float, default 1
        Memory for attention keys and values, in GB.
    exact : bool, default True
        Compute so that a sequence's greedy answer does not depend on what else is in the batch. OpenVINO's
        default arithmetic takes about a third less CPU, but depends on it: of 24 answers of 48 tokens, 6
        differed between alone and in a batch.

    Raises
    ------
    ImportError
        openvino-genai is not installed; the message has the command.
    """

    def __init__(
        self,
        model: str,
        *,
        threads: int = 1,
        max_model_len: int = 4096,
        max_num_seqs: int = 64,
        cache_gb: float = 1.0,
        exact: bool = True,
    ) -> None:
        try:
            import openvino_genai
        except ImportError as error:
            raise ImportError(
                'the openvino engine needs openvino-genai: pip install "swarmkit-frames[local]"'
            ) from error
        self._genai = openvino_genai
        self.model = re.sub(r"\.Q\d\w*$", "", Path(model).stem)
        self.max_model_len = max_model_len
        self.max_logprobs = 1  # openvino-genai tells that of the token that is chosen
        self.generates, self.dimensions = True, 0
        self._max_num_seqs = max_num_seqs
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = max(1, round(cache_gb))
        scheduler.max_num_seqs = max_num_seqs
        # A comparison of batch and single requests must not favour the one that runs second.
        scheduler.enable_prefix_caching = False
        # Threads are not pinned: several servers on one machine would all pin theirs to the same core.
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
        if exact:
            properties |= {
                "INFERENCE_PRECISION_HINT": "f32",
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
                "KV_CACHE_PRECISION": "f16",
            }
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self._tokenizer = self._pipeline.get_tokenizer()
        self._eos = self._tokenizer.get_eos_token_id()
        self._n_vocab = len(self._tokenizer.get_vocab())
        self._numbers = itertools.count()
        self._new: list[Job] = []
        self._active: dict[int, _Sequence] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = False
        self._aborting = False
        self._failure: BaseException | None = None
        self._work = threading.Condition()
        self._drained = threading.Event()
        self._thread = threading.Thread(target=self._run, name="openvino", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """See `Engine.alive`."""
        return self._failure is None

    def prompt(self, value: str | list[int], *, add_special_tokens: bool) -> Prompt:
        """See `Engine.prompt`."""
        if isinstance(value, str):
            ids = self.encode(value, add_special_tokens=add_special_tokens)
            return Prompt(value, ids, len(ids))
        return Prompt(self.decode(value), value, len(value))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """See `Engine.encode`."""
        if not text:
            return []
        data = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).input_ids.data
        return [int(token) for token in data[0]]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Engine.decode`."""
        unknown = next((token for token in ids if token >= self._n_vocab), None)
        if unknown is not None:
            raise PromptRefusedError(f"Token id {unknown} is out of vocabulary")
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False)) if ids else ""

    def render(self, messages: Sequence[Message], switches: Switches | None = None, *, reply: bool = True) -> str:
        """See `Engine.render`."""
        extra = dict(switches or {})
        return str(self._tokenizer.apply_chat_template(list(messages), reply, extra_context=extra))

    def check(self, constraint: Constraint) -> None:
        """See `Engine.check`."""
        # The pipeline would notice in a step only, which then fails for all that runs. What the echo engine can
        # answer is what xgrammar can compile.
        answer(constraint, "")
        try:
            structural_tag(constraint).encode()
        except UnicodeEncodeError as error:
            raise ConstraintRefusedError(f"The constraint contains half a character: {error}") from error

    async def embed(self, prompts: Sequence[Prompt], dimensions: int, address: str) -> list[bytes]:
        """See `Engine.embed`: the server refuses texts."""
        raise NotImplementedError

    def submit(self, job: Job) -> None:
        """See `Engine.submit`."""
        with self._work:
            if self._failure:
                raise EngineDeadError(f"the engine failed: {self._failure}")
            self._loop = asyncio.get_running_loop()
            self._new.append(job)
            self._work.notify()

    def cancel(self, job: Job) -> None:
        """See `Engine.cancel`."""
        job.cancelled = True  # seen before the next step

    def abort(self) -> None:
        """See `Engine.abort`."""
        with self._work:
            self._aborting = True
            self._work.notify()

    def load(self, address: str) -> tuple[int, int]:
        """See `Engine.load`."""
        # The pipeline takes sequences in the order they came.
        live = [s.job.address for s in list(self._active.values()) if not s.job.cancelled]
        running = live[: self._max_num_seqs].count(address)
        unseen = sum(len(job.prompts) * job.n for job in list(self._new) if job.address == address)
        return running, live.count(address) - running + unseen

    def close(self) -> None:
        """See `Engine.close`."""
        with self._work:
            self._closing = True
            self._work.notify()
        self._thread.join(timeout=2.0)

    def _run(self) -> None:
        """Body of the thread: step while there is work."""
        try:
            while self._wait():
                self._pipeline.step()
                self._deliver(self._collect())
        except (RuntimeError, ValueError, IndexError) as error:  # what errors of the native code become
            with self._work:
                self._failure = error
            self._end_all()

    def _wait(self) -> bool:
        """Wait until there is work; start new jobs and drop cancelled ones. False once the engine is closed."""
        while True:
            with self._work:
                self._work.wait_for(lambda: self._new or self._active or self._aborting or self._closing)
                new, self._new = self._new, []
            if self._closing:
                return False
            for job in new:
                self._start(job)
            if self._aborting:
                self._aborting = False
                self._end_all()
            for sequence in [s for s in self._active.values() if s.job.cancelled]:
                self._drop(sequence)
            if self._active:
                return True
            while self._pipeline.has_non_finished_requests():
                self._pipeline.step()  # the pipeline notices cancelled requests in a step only

    def _drop(self, sequence: _Sequence) -> None:
        sequence.handle.cancel()
        self._active.pop(sequence.number, None)

    def _end_all(self) -> None:
        """End all sequences. On the engine's thread, so that this is delivered after their earlier tokens."""
        out: dict[Job, list[Increment]] = {}
        for sequence in list(self._active.values()):
            out.setdefault(sequence.job, []).append(Increment(sequence.index, "", (), finish="abort"))
            self._drop(sequence)
        with self._work:
            new, self._new = self._new, []
        for job in new:
            out[job] = [Increment(i, "", (), finish="abort") for i in range(len(job.prompts) * job.n)]
        self._deliver(out)

    def _start(self, job: Job) -> None:
        from openvino import Tensor

        sampling = job.sampling
        for i, prompt in enumerate(job.prompts):
            assert prompt.ids is not None
            room = self.max_model_len - prompt.n_tokens
            for k in range(job.n):
                number = next(self._numbers)
                config = self._config(sampling, room, k)
                handle = self._pipeline.add_request(number, Tensor(_row(prompt.ids)), config)
                scan = StopScan(sampling.stop) if sampling.stop else None
                self._active[number] = _Sequence(number, job, i * job.n + k, handle, scan)

    def _config(self, sampling: Sampling, room: int, sample: int) -> Any:
        config = self._genai.GenerationConfig()
        config.apply_chat_template = False
        config.eos_token_id = self._eos
        config.stop_token_ids = {self._eos}
        config.max_new_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        if sampling.constraint:
            config.structured_output_config = self._genai.StructuredOutputConfig()
            config.structured_output_config.structural_tags_config = structural_tag(sampling.constraint)
        else:  # nothing may follow an answer that is complete
            config.min_new_tokens = min(sampling.min_tokens, config.max_new_tokens)
            config.ignore_eos = sampling.ignore_eos
        config.logprobs = 0 if sampling.logprobs is None else 1
        config.do_sample = sampling.temperature > 0
        if config.do_sample:
            seed = random.getrandbits(32) if sampling.seed is None else sampling.seed + sample
            config.rng_seed = seed % 2**32
            config.temperature = sampling.temperature
            config.top_p = sampling.top_p
            if sampling.top_k:
                config.top_k = sampling.top_k
        return config

    def _collect(self) -> dict[Job, list[Increment]]:
        """Read the tokens of the last step, by job."""
        reasons = self._genai.GenerationFinishReason
        fresh: list[tuple[_Sequence, list[int], list[float]]] = []
        for sequence in list(self._active.values()):
            new: list[int] = []
            logprobs: list[float] = []
            while sequence.handle.can_read():
                output = next(iter(sequence.handle.read().values()))
                new += output.generated_ids
                logprobs += output.generated_log_probs
                if output.finish_reason != reasons.NONE:
                    sequence.finish = "stop" if output.finish_reason == reasons.STOP else "length"
            if sequence.finish is None and sequence.handle.get_status() != self._genai.GenerationStatus.RUNNING:
                sequence.finish = "abort"  # it does not fit into the cache
            if new or sequence.finish:
                sequence.ids += new
                fresh.append((sequence, new, logprobs))
            if sequence.finish:
                del self._active[sequence.number]
        shown = self._shown([sequence for sequence, *_ in fresh])
        out: dict[Job, list[Increment]] = {}
        for (sequence, new, logprobs), text in zip(fresh, shown, strict=True):
            increment = self._increment(sequence, new, text)
            if sequence.job.sampling.logprobs is not None:
                increment.logprobs = [TokenLogprobs(t, {t: p}) for t, p in zip(new, logprobs, strict=False)]
            out.setdefault(sequence.job, []).append(increment)
        return out

    def _shown(self, sequences: list[_Sequence]) -> list[str]:
        """The new text of each sequence. The decoder is called once, for all their windows."""
        if not sequences:
            return []
        windows = [s.ids[s.start :] for s in sequences]
        texts = self._tokenizer.decode(windows, skip_special_tokens=True)
        gained = []
        for sequence, text in zip(sequences, texts, strict=True):
            whole = text if sequence.finish else text.rstrip("\N{REPLACEMENT CHARACTER}")
            gained.append(whole[len(sequence.seen) :])
            sequence.seen = whole
            if len(sequence.ids) - sequence.start > _WINDOW:
                sequence.start = len(sequence.ids) - _OVERLAP
                again = self._tokenizer.decode([sequence.ids[sequence.start :]], skip_special_tokens=True)[0]
                sequence.seen = again.rstrip("\N{REPLACEMENT CHARACTER}")
        return gained

    def _increment(self, sequence: _Sequence, new: list[int], text: str) -> Increment:
        reason = None
        scan = sequence.scan
        if scan:
            if len(sequence.ids) > sequence.job.sampling.min_tokens:
                text = scan.feed(text)
            if scan.hit is not None:
                reason = scan.hit
                if not sequence.finish:
                    self._drop(sequence)
                sequence.finish = "stop"
            elif sequence.finish:
                text += scan.rest()
        ends = [len(text)] * len(new)
        ids = new if sequence.job.sampling.want_ids else None
        return Increment(sequence.index, text, ends, ids, sequence.finish, reason)

    def _deliver(self, out: dict[Job, list[Increment]]) -> None:
        """Pass increments to the event loop, and give it time to process them."""
        loop = self._loop
        if not out or loop is None:
            return
        self._drained.clear()
        try:
            loop.call_soon_threadsafe(self._sink, out, loop)
        except RuntimeError:  # the loop has ended: nothing waits for the answers
            self._closing = True
            return
        # A step holds the interpreter's lock until it ends, and each system call of the event loop releases the
        # lock. Without this wait every such call would cost the server a whole step.
        self._drained.wait(_YIELD_S)

    def _sink(self, out: dict[Job, list[Increment]], loop: asyncio.AbstractEventLoop) -> None:
        for job, increments in out.items():
            if not job.cancelled:
                job.sink(increments)
        # After the tasks that the sinks have scheduled.
        loop.call_soon(loop.call_soon, self._drained.set)


def _row(ids: list[int]) -> Any:
    import numpy as np

    return np.array([ids], dtype=np.int64)
