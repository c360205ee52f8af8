"""Several questions in a row: each row goes on to its next step when it has the answer of the last one.

Each step is a run of its own, and all of them go on at the same time. A row joins the run of the next step a moment
after its answer, so no step waits for the slowest rows of the one before.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Unpack

import pandas as pd

from ..client import io_thread
from ..engine.deadline import Deadline
from ..errors import SettingError, StoreError
from ..pool.connect import use_pool
from ..pool.vllm_pool import VLLMPool
from ..pool.watch import present
from ..records import Failure, FailureKind
from ..runs.events import Listener, RowsReused, RunEnded, RunEvent, RunStarted, renumbered
from ..runs.listeners import Listeners
from ..runs.run import Run, finished
from ..runs.stats import RunStats
from ..store.keys import ask_of, settings_of
from ..store.reuse import have_one_answer
from .call import PreparedCall, arguments, read_options
from .options import NOT_OF_PIPELINE, NOT_OF_STEP, PipelineOptions, StepOptions
from .prompts import PromptLike, check_frame
from .signatures import keywords, takes
from .step_run import StepRun
from .steps import Step, StepFrame

__all__ = ["pipeline"]

_OF_STEP = keywords(StepOptions).keys() - NOT_OF_STEP
_OF_ALL = ("store", "deadline", "progress", "monitor", "on_error")
_SPENT = ("cut", "prompt_tokens", "completion_tokens", "_counted")


@takes(PipelineOptions, without=NOT_OF_PIPELINE)
def pipeline(df: pd.DataFrame, steps: Sequence[Step], **options: Unpack[PipelineOptions]) -> pd.DataFrame:
    """Ask each row several questions, one after another, whose prompts may use the answers before.

    A row goes on to its next step when it has its answer, whatever the other rows do, so the steps overlap. Each step
    is asked as ``scatter`` asks it, with its own schema, pool or model; an endpoint may hold the requests of several.
    Keywords of the call hold for every step that does not say otherwise. In a ``store`` sampled answers of steps that
    ask alike are apart.

    Parameters
    ----------
    df : pandas.DataFrame
        The rows. Never changed.
    steps : sequence of Step
        The questions, in order.

    Returns
    -------
    pandas.DataFrame
        A copy of ``df``, same index, same order, with the columns of every step: ``<name>``, ``<name>_error``, and
        those of its ``schema`` or ``details``, as ``scatter`` has them. A row that fails at a step has no later
        answers, and their errors say why. A row that a step does not ask (``when=``) has neither answer nor error
        there, nor in later steps whose prompt or ``when=`` names its columns; the others ask it.

    Raises
    ------
    UnknownColumnError, PromptError
        The prompt of a step cannot be made.
    SettingError, TypeError
        No step, two of one name, columns of two steps that have the same name, a ``when=`` that is no expression, or
        fits no row; or a keyword that is not taken.
    NoEndpointsError, ScatterInterrupted, ScatterError
        As for ``scatter``. If no endpoint of a step is left, the other steps end, too; ``.frame`` has what had
        finished.

    Examples
    --------
    >>> steps = [
    ...     sk.Step("role", "What does {gene} do?", max_tokens=32),
    ...     sk.Step("check", "Is that right? {role}", when="{gene} == 'recA'", max_tokens=32),
    ... ]
    >>> df.swarm.pipeline(steps)["check"].tolist()
    [nan, 'echo: Is that right? echo: What does recA do?']
    """
    return finished(lambda: _Pipeline(df, steps, options).start())


class _Pipeline:
    """A frame and its steps, whose columns are filled during the run.

    To those who look at the run from outside, the rows of step ``k`` are numbered from ``k * len(df)``.
    """

    def __init__(self, df: pd.DataFrame, steps: Sequence[Step], options: Mapping[str, Any]) -> None:
        check_frame(df)
        if own := [name for name in options if name in _OF_STEP - inspect.signature(pipeline).parameters.keys()]:
            raise TypeError(f"{own[0]}= belongs to a step: swarmkit.Step(name, prompt, {own[0]}=...)")
        self._given = given = arguments(pipeline, options)
        self.df = df.copy(deep=False)
        self.steps = _checked(steps)
        shared = {name: value for name, value in options.items() if name in _OF_STEP}
        self._calls = [arguments(Step, {**shared, **step.options}, step.prompt, step.name) for step in self.steps]
        self._calls = [{**call, **{name: given[name] for name in _OF_ALL}} for call in self._calls]
        self._frames: list[StepFrame] = []
        for step, call in zip(self.steps, self._calls, strict=True):
            self._frames.append(StepFrame(self.df, step, call, tuple(self._frames)))
        self.parts: list[StepRun] = []
        self.distrusted: set[str] = set()  # names of endpoints that gave the same answer to every prompt
        self.again = False  # whether answers were taken back that later steps had used
        self.unsure = False  # ... and these have not gone through all rows since
        self.stats = RunStats()
        self._listeners: Listener = lambda event: None

    def start(self) -> Run:
        """Connect to the pools of the steps, and start the run."""
        calls = self._prepared()
        for frame, call in zip(self._frames, calls, strict=True):
            frame.source = call
        index = self.df.index.append([self.df.index] * (len(calls) - 1))

        async def work(stats: RunStats) -> Failure | None:
            return await self._work(calls, stats)

        on_error, deadline = calls[0].on_error, calls[0].deadline
        run = Run("pipeline", work, self.frame, self._errors, on_error, "", self._answers, index, deadline)
        return calls[0].shown(run)

    def _prepared(self) -> list[PreparedCall]:
        """The calls of the steps. A pool that several of them name is made once; the first of them closes it."""
        pools: dict[int, tuple[VLLMPool, bool]] = {}
        calls: list[PreparedCall] = []
        try:
            for given in self._calls:
                asked = given["pool"]
                owned = id(asked) not in pools
                if owned:
                    pools[id(asked)] = use_pool(asked)
                pool, made = pools[id(asked)]
                call = replace(read_options({**given, "pool": pool}), owned=made and owned)
                call = replace(call, store=call.store.for_frames() if call.store is not None else None)
                if (late := call.deadline) is not None:  # one moment; how long requests take is each step's own
                    call = replace(call, deadline=Deadline(late.at, late.shown))
                calls.append(call)
        except BaseException:
            for pool, made in pools.values():
                if made:
                    io_thread.call(pool.close())
            raise
        return calls

    # ---- the run ------------------------------

    async def _work(self, calls: Sequence[PreparedCall], stats: RunStats) -> Failure | None:
        self.stats = stats
        self._listeners = Listeners(calls[0].listeners("pipeline", stats), stats.listener_errors)
        self.parts = [StepRun(self, *each) for each in zip(range(len(calls)), self._frames, calls, strict=True)]
        failure, cancelled, error = None, True, ""
        try:
            alike: Counter[Any] = Counter()
            for step, part in zip(self.steps, self.parts, strict=True):
                pool = await present(part.call.pool, stats)
                spec = await pool.complete(part.call.spec)  # a model that there is none of is said before any request
                for endpoint in pool.endpoints:
                    stats.roster.place(endpoint)
                if part.call.store is not None and not have_one_answer(spec, part.call.dedup):
                    same = ask_of(settings_of(spec)), _what(step.prompt)
                    part.call = replace(part.call, spec=replace(part.call.spec, repeat=alike[same]))
                    alike[same] += 1
            self.count_rows()
            self.stats(self._started())
            self._listeners(self._started())
            failure = await self._passes()
            cancelled = False
            await _close_stores(calls)
            return failure
        except Exception as exc:
            error, cancelled = f"{type(exc).__name__}: {exc}", False
            raise
        finally:
            if self.unsure:
                for part in self.parts[1:]:
                    part.check()
                self.count_rows()
            self._add_up()
            self.emit(0, RunEnded(failure, cancelled, time.monotonic(), error))
            with suppress(StoreError):  # which has been raised before
                await _close_stores(calls)
            for call in calls:
                await call.aclose()

    async def _passes(self) -> Failure | None:
        """Ask all rows. Where answers were taken back that later steps had used, these steps go again through the rows,
        and ask those that have another prompt now."""
        while True:
            failure = await self._all_steps()
            if failure is not None or not self.again:
                self.unsure = self.unsure and failure is not None
                return failure
            self.again = False
            for part in self.parts:
                part.restart()

    async def _all_steps(self) -> Failure | None:
        self.parts[0].put(range(len(self.df)))
        tasks = {asyncio.ensure_future(part.run()): place for place, part in enumerate(self.parts)}
        late: Failure | None = None
        try:
            left = set(tasks)
            while left:
                done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    failure = task.result()
                    if failure is not None and failure.kind is not FailureKind.DEADLINE:
                        return failure
                    late = failure or late
                    for part in self.parts[tasks[task] + 1 : tasks[task] + 2]:
                        part.close()
            return late
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _add_up(self) -> None:
        for part in self.parts:
            self.stats.take_over(part.stats)
            if part.stats.cut:  # a warning names the limit
                self.stats.max_tokens = max(self.stats.max_tokens, part.stats.max_tokens)
            self.stats.lengths += part.stats.lengths

    # ---- as it is seen from outside ------------------------------

    def began(self, place: int, event: RunStarted) -> None:
        """The run of a step has begun."""
        for route in event.routes:
            route = f"{self._frames[place].name}: {route}"
            self.stats.routes[route] = self.stats.routes.get(route, 0) + 1

    def _started(self) -> RunStarted:
        known = self.stats.stored + self.stats.reused
        return RunStarted(self.stats.rows, self.stats.rows - known, self.stats.roster.names, (), time.monotonic())

    def count_rows(self) -> None:
        """Count the answers that there may be: rows that a step does not ask have none."""
        frames = self._frames
        rows = len(self.df) * len(frames) - sum(len(f.skipped) + len(f.unreached) for f in frames)
        if rows != self.stats.rows:
            self.stats.rows = rows
            self._listeners(self._started())

    def emit(self, place: int, event: RunEvent) -> None:
        """Tell the listeners an event of a step, with the numbers of the whole."""
        names, parts = self.parts[place].stats.roster, len(self.parts)
        event = renumbered(
            event,
            lambda index: self.stats.roster.place_of(names, index),
            lambda ticket: ticket * parts + place,
            place * len(self.df),
        )
        self.stats.enrol(self.stats.roster.names)
        self.stats(event)
        for name in _SPENT:  # which need the columns of the step
            setattr(self.stats, name, sum(getattr(each.stats, name) for each in self.parts))
        self._listeners(self._started() if isinstance(event, RowsReused) else event)

    def frame(self, unfinished: str) -> pd.DataFrame:
        """The frame with the answers of all steps so far."""
        found = self.df
        for step in self._frames:
            found = step.onto(found, unfinished)
        return found

    def _errors(self) -> list[tuple[object, str]]:
        """The failed rows' labels, and the step at which they failed."""
        found = {row: f"{f.name}: {error}" for f in reversed(self._frames) for row, error in f.columns.errors.items()}
        return [(self.df.index[row], found[row]) for row in sorted(found)]

    def _answers(self, rows: Iterable[int]) -> list[tuple[object, str]]:
        size = len(self.df)
        places = [divmod(row, size) for row in rows]
        return [(self.df.index[row], self._frames[step].columns.text[row] or "") for step, row in places]


def _checked(steps: Sequence[Step]) -> list[Step]:
    if isinstance(steps, Step) or not isinstance(steps, Iterable):
        raise SettingError(f"steps={steps!r}: must be a list of swarmkit.Step(name, prompt, ...)")
    found = list(steps)
    if not found:
        raise SettingError("steps=[]: a pipeline needs one swarmkit.Step(name, prompt, ...) at least")
    if other := [step for step in found if not isinstance(step, Step)]:
        raise SettingError(f"steps= holds a {type(other[0]).__name__}: each is a swarmkit.Step(name, prompt, ...)")
    names = [step.name for step in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SettingError(f"two steps are named {twice[0]!r}: each needs a name of its own, for its column")
    return found


def _what(prompt: PromptLike) -> Hashable:
    """What a prompt is known by: of a function its code, which is the same for each that one line makes."""
    known: object = getattr(prompt, "__code__", prompt)
    return known if isinstance(known, Hashable) else id(prompt)


async def _close_stores(calls: Iterable[PreparedCall]) -> None:
    for call in calls:
        if call.store is not None:
            await asyncio.to_thread(call.store.close)
