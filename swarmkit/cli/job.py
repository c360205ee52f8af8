"""What the commands that send a table's rows share: its input, its output, and the report."""

from __future__ import annotations

import argparse
import shlex
import signal
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import CallerError, NoEndpointsError, ScatterInterrupted, SettingError, StoreError
from ..runs.failure_summary import FailureSummary
from ..runs.run import last_run
from ..runs.stats import RunStats
from ..text import plural
from .harmless import OF_TREES, answers_of
from .output import plan_output
from .parser import Exit
from .source import Reading, find_files, scan
from .terminal import as_options, say, seconds
from .writer import Writer

__all__ = ["Job", "how_read", "inputs_of"]

_ASKED_AGAIN = "with --store so that nothing is asked twice"


def inputs_of(args: argparse.Namespace) -> list[Path]:
    """The files of the inputs, which are looked for once: the standard input can be read once."""
    if "files" not in args:
        args.files = find_files(args.inputs, args.input_format)
    found: list[Path] = args.files
    return found


def how_read(args: argparse.Namespace) -> Reading:
    """How tables are read, by the options."""
    answers = answers_of(args.out) if "out" in args else None  # without it none of the columns is the command's own
    return Reading(args.na, args.sep, args.input_format, args.raw, answers)


class Job:
    """The input table, the output table and the report of one command."""

    def __init__(
        self,
        args: argparse.Namespace,
        error_column: str,
        completable: bool | None = None,
        source: Callable[[Sequence[Path]], Any] | None = None,
    ) -> None:
        """``completable``: whether ``--only-missing`` can complete the output; None for commands without it, whose
        output does not have the rows of the input. ``source`` reads inputs that are no tables."""
        self.args, self.error_column, self.completable = args, error_column, completable
        self.batch_file = source is not None  # its lines differ in their limits, and say where an answer was cut off
        files = inputs_of(args)
        keeps_rows, piped = completable is not None, args.inputs == ["-"]
        in_place = args.in_place if keeps_rows else None
        if in_place and "-" in args.inputs:
            raise SettingError("--in-place: the standard input cannot be replaced; write to a file with -o")
        form = args.format or (how_read(args).format_of(files[0]) if piped else "csv")
        output = plan_output(
            args.output or ("-" if not in_place and (piped or not keeps_rows) else None), files,
            stdout="csv" if form == "parquet" else form, overwrite=args.overwrite,
            in_place=in_place, stored=bool(getattr(args, "store", None)), form=args.input_format,
        )  # fmt: skip
        reading = how_read(args)
        answers = OF_TREES if getattr(args, "trace", False) else reading.answers
        self.output = replace(output, sep=args.sep, raw=args.raw, answers=answers)
        limit = None if keeps_rows else args.limit
        self.source: Any = source(files) if source else scan(files, self.output, limit, reading)
        for note in () if args.quiet else self.source.notes:
            say(f"warning: {note}")

    def finish(self, work: Callable[[], pd.DataFrame]) -> Exit:
        """Do the work, and write the result, also if it ends early."""
        try:
            with warnings.catch_warnings():
                # The report has the causes.
                warnings.filterwarnings(
                    "ignore", message=r"[\d,]+ (of [\d,]+ )?(rows? failed|(answer|prompt|text)s? w)"
                )
                warnings.filterwarnings("ignore", message="the deadline ")
                ended = None
                frame = work()
        except (ScatterInterrupted, NoEndpointsError, StoreError) as exc:
            if exc.frame is None or (not isinstance(exc, ScatterInterrupted) and not last_run().stats.answered):
                raise
            ended, frame = exc, exc.frame
        if self.output.path:  # a second interrupt while the result is written would lose it
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.source.types.clear()  # the result has columns of its own, and comes in one frame
        return self.write([(frame, frame[self.error_column].dropna())], last_run().stats, lambda: ended)

    def write(
        self,
        frames: Iterable[tuple[pd.DataFrame, pd.Series]],
        stats: RunStats,
        ended: Callable[[], BaseException | None],
        *,
        rows: int | None = None,
        stop: Callable[[], None] = lambda: None,
        lists: Mapping[str, Any] | None = None,
    ) -> Exit:
        """Write frames as they come, and report.

        Parameters
        ----------
        frames : iterable of DataFrame and Series
            The frames, each with the errors of its rows.
        stats : RunStats
            Of the run.
        ended : callable
            Returns what ended the work early, if anything, once there are no more frames.
        rows : int, optional
            Rows that the output must have.
        stop : callable
            Called when nobody reads the output any more.
        lists : mapping of str to pyarrow.DataType, optional
            Types of columns of lists in a Parquet file.
        """
        # The types of the input's columns, except for columns of answers, which are replaced.
        answers = self.error_column.removesuffix("error")
        types = {name: kind for name, kind in self.source.types.items() if not f"{name}_".startswith(answers)}
        writer, written = Writer(self.output, {**types, **(lists or {})}), 0
        causes = FailureSummary("lines" if self.batch_file else "rows")
        for frame, errors in frames:
            late = stats.deadline  # how the errors of the rows end that it has left, in frames from now on
            writer.add(frame)
            written += len(frame)
            causes.add((row, why) for row, why in errors.items() if not (late and why.endswith(late)))
            if isinstance(writer.problem, BrokenPipeError):
                stop()
        missing, problem = "", ended()
        if rows is not None and written != rows:
            why = "the input has changed, or cannot be read any more"
            why = "the next ones are refused" if isinstance(problem, CallerError) else why
            missing = f"it has {written:,} of {rows:,} rows: {why}"
        where = writer.close(missing)
        self._report(written, where, stats, causes, problem, writer.problem)
        if writer.secured and not self.args.quiet:
            one = writer.secured == 1
            say(f"{plural(writer.secured, 'value')} of servers {'begins' if one else 'begin'} like a formula, or "
                f"{'has' if one else 'have'} control characters, and {'is' if one else 'are'} written with a ' in "
                "front, or escaped; --raw keeps them as they are")  # fmt: skip
        if writer.problem or isinstance(problem, StoreError):
            return Exit.NOT_WRITTEN
        if problem:
            return Exit.INTERRUPTED if isinstance(problem, KeyboardInterrupt) else Exit.NO_ENDPOINT
        if stats.deadline:
            return Exit.DEADLINE
        return Exit.ROWS_FAILED if causes.count else Exit.OK

    def _report(
        self,
        written: int,
        where: str,
        stats: RunStats,
        causes: FailureSummary,
        ended: BaseException | None,
        problem: Exception | None,
    ) -> None:
        """Say how it went: ``ended`` is what ended it early, ``problem`` what the output could not take."""
        quiet = self.args.quiet
        if ended:
            why = "interrupted" if isinstance(ended, KeyboardInterrupt) else as_options(str(ended), vars(self.args))
            say(f"swarmkit {self.args.command}: {why}")
        if not quiet or ended or problem:
            apart = "".join(f"{count:,} {what}, " for what, count in stats.apart().items())
            speed = f"{stats.rows_per_s:.1f} rows/s" if self.completable is not None else plural(stats.rows, "merge")
            say(
                f"{plural(written, 'row')}, {causes.count:,} {'unfinished or failed' if ended else 'failed'}, "
                f"{apart}{seconds(stats.time_s)}, {speed}, {plural(stats.requests, 'request')}\nwritten to {where}"
            )
        if stats.deadline:  # it ends early, too
            kept = "the store has what is done" if getattr(self.args, "store", None) else _ASKED_AGAIN
            say(f"{stats.left('row' if self.completable is not None else 'merge')}: run the same command again, {kept}")
        if quiet and not (ended or problem):
            return
        for line in () if self.batch_file else stats.cuts():
            say(as_options(line, vars(self.args)))
        if causes.count and not ended:
            say("\n".join(causes.lines()))
        unfinished = causes.count or stats.deadline
        if unfinished and self.completable and self.output.path and not problem:
            say(f"to ask only these rows again, run this with the same other options:\n  {self.again()}")

    def again(self) -> str:
        """The command that asks the rows without an answer."""
        return f"swarmkit scatter {shlex.quote(self.args.output or self.args.inputs[0])} --only-missing --in-place"
