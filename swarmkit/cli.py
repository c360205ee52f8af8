"""The command line: ``swarmkit scatter | tree-reduce | compare | probe | wait | serve | demo``.

What a command is about goes to OUTPUT or the standard output; what a person is told goes to the standard
error. No key or token is ever taken from the command line or shown, since both end up in logs.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from .arguments import SERVE_KEY, Exit, ProbeExit, parser
from .errors import CallerError, NoEndpointsError, ScatterInterrupted, SettingError, SwarmError

if TYPE_CHECKING:
    import pandas as pd

    from .stats import RunStats
    from .vllm_pool import VLLMPool

__all__ = ["Exit", "main"]


_NAME = re.compile(r"[A-Za-z_]\w*")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; those of the process by default.

    Returns
    -------
    int
        The exit code.
    """
    args = parser().parse_args(argv)
    warnings.showwarning = _show_warning
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = _COMMANDS[args.command](args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _say("interrupted")
        return Exit.INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
    except CallerError as exc:
        _say(f"swarmkit {args.command}: {exc}")
        return Exit.USAGE
    except SwarmError as exc:
        _say(f"swarmkit {args.command}: {exc}")
        return Exit.NO_ENDPOINT


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt  # a batch system's end of time is to keep finished rows, as Ctrl-C does


def _say(text: str) -> None:
    # Messages of servers may be in it, and must not move the cursor.
    print("".join(c if c.isprintable() or c == "\n" else " " for c in text), file=sys.stderr, flush=True)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(f"warning: {message}")


# ---- what commands share ------------------------------


def _target(args: argparse.Namespace) -> Any:
    from .connect import HOSTFILE_VARIABLES

    if args.hostfile or args.url:
        return Path(args.hostfile) if args.hostfile else args.url
    if any(os.environ.get(name) for name in HOSTFILE_VARIABLES):
        return None
    raise SettingError("no endpoints were given: --hostfile FILE, --url URL, or the variable SWARMKIT_HOSTFILE")


def _api_key(args: argparse.Namespace) -> str | None:
    if args.api_key_env is None:
        return None
    # What was given is not repeated: it may be a key, given by mistake.
    if not _NAME.fullmatch(args.api_key_env):
        raise SettingError("--api-key-env takes the name of an environment variable, not the key itself")
    if not (key := os.environ.get(args.api_key_env)):
        raise SettingError("the environment variable that --api-key-env names is not set, or empty")
    return key


def _pairs(given: Sequence[str], option: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise SettingError(f"{option} {text}: write it as name=value")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            quoted = shlex.quote(f"{name}={json.dumps(value)}")
            raise SettingError(f"{option} {text}: the value must be JSON; for a text: {option} {quoted}") from None
    return found


def _sending(args: argparse.Namespace, params: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a verb that sends."""
    from .options import _OURS, Sampling

    for name in params:
        if name in _OURS:
            raise SettingError(f"--param {name}=...: swarmkit sets this field itself; see --help for its options")
        near = difflib.get_close_matches(name, [*Sampling.__annotations__], n=1, cutoff=0.8)
        if near and near[0] != name:
            _say(f"warning: --param {name}=... is sent as it is; did you mean {near[0]}?")
    options: dict[str, Any] = {"extra_body": params, "progress": False if args.quiet else "auto"}
    for name in ("system", "max_tokens", "temperature", "mode", "store"):
        if (value := getattr(args, name, None)) is not None:
            options[name] = value
    return options


def _connect(args: argparse.Namespace, api_key: str | None) -> VLLMPool:
    from .connect import connect

    chat = None if args.chat == "none" else "auto"
    return connect(_target(args), model=args.model, api_key=api_key, chat=chat, delivery=args.delivery)  # type: ignore[arg-type] # narrower Literals


class _Job:
    """A table on its way from INPUT to OUTPUT."""

    def __init__(self, args: argparse.Namespace, error_column: str, again: bool | None = None) -> None:
        """``again``: whether ``--only-missing`` can complete the output; None where there is no such thing."""
        from . import tables

        self.args, self.error_column, self.again = args, error_column, again
        files = tables.find_files(args.inputs)
        self.output = tables.plan_output(
            args.output or "-", files, stdout=args.format, overwrite=args.overwrite,
            only_missing=getattr(args, "only_missing", False), stored=bool(getattr(args, "store", None)),
        )  # fmt: skip
        self.source = tables.scan(files, self.output, args.limit, args.na)
        for note in self.source.notes:
            _say(f"warning: {note}")

    def finish(self, work: Callable[[], pd.DataFrame]) -> Exit:
        """Do the work, and write what comes of it, however it ends."""
        from .run import last_run

        try:
            with warnings.catch_warnings():
                # The report below has the causes.
                warnings.filterwarnings("ignore", message=r"[\d,]+ of [\d,]+ rows failed")
                ended = None
                frame = work()
        except (ScatterInterrupted, NoEndpointsError) as exc:
            if exc.frame is None or (isinstance(exc, NoEndpointsError) and not last_run().stats.answered):
                raise
            ended, frame = exc, exc.frame
        if self.output.path:  # whoever is impatient now would lose what all this was for
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.source.types.clear()  # the frame is another one, and whole
        return self.write([frame], last_run().stats, lambda: ended)

    def write(self, frames: Iterable[pd.DataFrame], stats: RunStats, ended: Callable[[], BaseException | None]) -> Exit:
        """Write frames as they come, and report; ``ended`` tells afterwards what ended the work early."""
        from . import tables
        from .run import Causes

        # The types of the input, but not those of answers that are replaced.
        answers = self.error_column.removesuffix("error")
        types = {name: kind for name, kind in self.source.types.items() if not f"{name}_".startswith(answers)}
        writer, causes, rows = tables.Writer(self.output, types), Causes(), 0
        for frame in frames:
            writer.add(frame)
            rows += len(frame)
            causes.add(frame[self.error_column].dropna().items())
        where, problem = writer.close(), ended()
        code = Exit.ROWS_FAILED if causes.count else Exit.OK
        if problem:
            interrupted = isinstance(problem, KeyboardInterrupt)
            code = Exit.INTERRUPTED if interrupted else Exit.NO_ENDPOINT
            _say(f"swarmkit {self.args.command}: {'interrupted' if interrupted else problem}")
        if not self.args.quiet or problem or where != str(self.output):
            requests = f"{stats.requests:,} request{'s' * (stats.requests != 1)}"
            speed = f"{stats.rows_per_s:.1f} rows/s" if self.again is not None else f"{stats.rows:,} merges"
            _say(
                f"{rows:,} rows, {causes.count:,} {'unfinished or failed' if problem else 'failed'}, "
                f"{stats.time_s:.1f} s, {speed}, {requests}\nwritten to {where}"
            )
        if causes.count and not problem:
            _say("\n".join(causes.lines()))
        if causes.count and self.again and self.output.path:
            file = shlex.quote(self.args.output)
            _say(
                "to ask only these rows again, run this with the other options of before:\n"
                f"  swarmkit scatter {file} --only-missing -o {file}"
            )
        return code


# ---- scatter, tree-reduce ------------------------------


def _scatter(args: argparse.Namespace) -> int:
    from . import tables
    from .prompts import make_prompts

    params, api_key = _pairs(args.param, "--param"), _api_key(args)
    job = _Job(args, f"{args.out}_error", again=args.n == 1)
    make_prompts(next(job.source.chunks(1)).iloc[:0], args.prompt)  # a wrong name is told before anybody is asked
    from .options import read_options  # slow to import: what is wrong with the arguments is told before
    from .sheet import Sheet
    from .stream import Stream

    options = _sending(args, params)
    call = read_options({**options, "pool": _connect(args, api_key)}, args.n, args.details)  # type: ignore[typeddict-item] # --param and the like are checked there
    texts: deque[pd.DataFrame] = deque()  # of the chunks under way, columns whose texts the prompt takes as numbers

    def sheet(chunk: pd.DataFrame) -> Sheet:
        typed = tables.numbers(chunk, args.prompt)
        texts.append(chunk[[c for c in chunk.columns if typed[c].dtype != chunk[c].dtype and c != args.out]])
        return Sheet(typed, args.prompt, args.out, args.n, args.details, args.only_missing)

    stream = Stream(job.source.chunks(args.chunk_rows), sheet, call, job.source.rows)
    ended: list[BaseException] = []

    def stop(*_: object) -> None:
        ended.append(KeyboardInterrupt())
        stream.stop()

    def frames() -> Iterator[pd.DataFrame]:
        try:
            yield from stream
        except NoEndpointsError as exc:
            if not stream.stats.answered:
                raise
            ended.append(exc)
        if ended:  # the output has every row of the input, however the run ends
            yield from stream.rest("interrupted" if isinstance(ended[0], KeyboardInterrupt) else "no endpoint was left")

    def as_they_were(frame: pd.DataFrame) -> pd.DataFrame:
        for name, values in texts.popleft().items():
            frame[name] = values.loc[frame.index].to_numpy()
        if args.details:  # there only where servers reason, which a chunk alone does not tell
            reasoning = f"{args.out}_reasoning"
            frame[reasoning] = frame.get(reasoning)
        return frame

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    return job.write(map(as_they_were, frames()), stream.stats, lambda: ended[0] if ended else None)


def _tree_reduce(args: argparse.Namespace) -> int:
    params, api_key = _pairs(args.param, "--param"), _api_key(args)
    job = _Job(args, "error" if args.trace else f"{args.out}_error")
    from .frames import tree_reduce  # slow to import, as above

    options = _sending(args, params)
    pool, df = _connect(args, api_key), job.source.read()

    def work() -> pd.DataFrame:
        return tree_reduce(
            df, args.column, args.prompt, by=args.by, fanin=args.fanin, out=args.out, trace=args.trace,
            pool=pool, **options,
        )  # fmt: skip

    return job.finish(work)


# ---- compare, probe ------------------------------


def _compare(args: argparse.Namespace) -> int:
    from . import tables

    params, api_key, plot = _pairs(args.param, "--param"), _api_key(args), args.plot
    bad = plot and (plot.suffix not in (".png", ".svg", ".pdf") or not plot.parent.is_dir())
    if bad or (plot and plot.exists() and not args.overwrite):
        raise SettingError(f"--plot {plot}: must be a .png, .svg or .pdf file that can be made, or --overwrite it")
    job = _Job(args, "")
    typed = tables.numbers(job.source.read(), args.prompt)
    from .compare import compare  # slow to import, as above

    options = {"pool": _connect(args, api_key), "sample": args.sample, "repeats": args.repeats}
    found = compare(typed, args.prompt, batch_sizes=args.batch_sizes, **options, **_sending(args, params))
    if not args.quiet:
        print(found, file=sys.stderr if args.output == "-" else sys.stdout)
    if args.output:
        _say(f"written to {tables.write(found.frame, job.output)}")
    if plot:
        found.plot().savefig(plot, dpi=150)
    return Exit.OK if (found.frame["completion_rate"] == 1).all() else Exit.ROWS_FAILED


def _probe(args: argparse.Namespace) -> int:
    from . import bridge
    from .connect import resolve
    from .survey import survey
    from .vllm_pool import VLLMPool

    pool = VLLMPool(resolve(_target(args)), model=args.model, api_key=_api_key(args))
    found = bridge.call(survey(pool, args.timeout))
    width = shutil.get_terminal_size((120, 24)).columns
    print(json.dumps(found.as_dict(), indent=1) if args.json else found.text(width))
    up = found.count("up")
    return ProbeExit.ALL_UP if up == len(found.endpoints) else ProbeExit.SOME_UP if up else ProbeExit.NONE_UP


# ---- serve, demo ------------------------------


def _wait(args: argparse.Namespace) -> int:
    from .wait import wait_until_ready

    if args.url:
        raise SettingError("wait takes a --hostfile: its servers come and go, a URL is there or not")
    pool = wait_until_ready(
        args.hostfile, min_ready=args.min_ready, timeout_s=args.timeout, patience_s=args.patience, every_s=args.every,
        output=args.output, tell=None if args.quiet else _say, model=args.model, api_key=_api_key(args),
    )  # fmt: skip
    if not args.quiet:
        _say(f"ready: {pool.size} endpoints" + (f", listed in {args.output}" if args.output else ""))
    return Exit.OK


def _serve(args: argparse.Namespace) -> int:
    from .local.serve import serve

    options = {"engine": args.engine, "model": args.model, "port": args.port, "faults": args.fault}
    options |= _pairs(args.option, "--option")
    token = os.environ.get(SERVE_KEY) or secrets.token_urlsafe(24)
    with _key_file(token) as file:
        told = f'export {SERVE_KEY}="$(cat {shlex.quote(str(file))})"' if file else f"the value of ${SERVE_KEY}"
        _say(f"its key: {told}")
        try:
            serve(token=token, **options)
        except OSError as exc:
            raise SettingError(f"cannot listen on port {options['port']} ({exc}); --port 0 takes a free one") from exc
    return Exit.OK


@contextlib.contextmanager
def _key_file(token: str) -> Iterator[Path | None]:
    """A file only this user can read, with the token in it; none where the user chose the token."""
    if os.environ.get(SERVE_KEY):
        yield None
        return
    handle, name = tempfile.mkstemp(prefix="swarmkit-", suffix=".key")
    try:
        with open(handle, "w") as file:
            file.write(token)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _demo(args: argparse.Namespace) -> int:
    from .demo import demo

    return Exit.ROWS_FAILED if demo(args.n, args.engine, args.limit) else Exit.OK


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "scatter": _scatter,
    "tree-reduce": _tree_reduce,
    "compare": _compare,
    "probe": _probe,
    "wait": _wait,
    "serve": _serve,
    "demo": _demo,
}
