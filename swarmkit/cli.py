"""The command line: ``swarmkit scatter | tree-reduce | compare | probe | serve | demo``.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from .errors import CallerError, NoEndpointsError, ScatterInterrupted, SettingError, SwarmError

if TYPE_CHECKING:
    import pandas as pd

    from .stats import RunStats
    from .vllm_pool import VLLMPool

__all__ = ["Exit", "main"]


class Exit(IntEnum):
    """What a command's exit code says."""

    OK = 0
    ROWS_FAILED = 1
    USAGE = 2
    NO_ENDPOINT = 3
    INTERRUPTED = 130


class ProbeExit(IntEnum):
    """What the exit code of ``swarmkit probe`` says."""

    ALL_UP = 0
    SOME_UP = 1
    NONE_UP = 2


CODES = f"""\
exit codes:
  {Exit.OK:<4} all rows were answered
  {Exit.ROWS_FAILED:<4} some rows failed; the error column of the output says why
  {Exit.USAGE:<4} wrong usage or input; nothing was sent
  {Exit.NO_ENDPOINT:<4} no endpoint could be used, or none was left (finished rows are written)
  {Exit.INTERRUPTED:<4} interrupted by Ctrl-C or SIGTERM (finished rows are written)
"""
SERVE_KEY = "SWARMKIT_LOCAL_KEY"
_NAME = re.compile(r"[A-Za-z_]\w*")
_SHOWN_CAUSES = 5


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
    args = _parser().parse_args(argv)
    warnings.showwarning = _show_warning
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code: int = args.run(args)
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


# ---- arguments ------------------------------


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(
        prog="swarmkit", description="Push a table's column of prompts through a swarm of LLM endpoints.",
        epilog="swarmkit COMMAND --help has an example of each. New here? swarmkit demo",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"swarmkit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_scatter, _add_tree_reduce, _add_compare, _add_probe, _add_serve, _add_demo):
        add(commands)
    return parser


def _command(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, allow_abbrev=False,
        epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    return parser


def _add_endpoint_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("endpoints")
    whom = group.add_mutually_exclusive_group()
    whom.add_argument("--hostfile", metavar="H", help="file with one endpoint a line; $SWARMKIT_HOSTFILE by default")
    whom.add_argument("--url", metavar="URL", action="append", help="address of an endpoint; repeatable")
    group.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the endpoints' key")
    group.add_argument("--model", help="the model to use, where the servers list several")


def _add_send_options(parser: argparse.ArgumentParser, out: str | None) -> None:
    """``out``: what the column of answers holds, where they are what is written."""
    parser.add_argument("inputs", metavar="INPUT", nargs="+",
                        help="files, folders or globs of .csv, .tsv, .jsonl (each also .gz) or .parquet")  # fmt: skip
    group = parser.add_argument_group("tables")
    group.add_argument("-o", "--output", metavar="OUTPUT", required=bool(out),
                       help="where the table goes, its format by suffix; - is the standard output")  # fmt: skip
    group.add_argument("--format", choices=("csv", "tsv", "jsonl"), default="csv", help="format for -o - (csv)")
    group.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it is there")
    if out:
        group.add_argument("--out", metavar="NAME", default="response", help=f"column of {out} (response)")
    group.add_argument("--limit", metavar="N", type=_count, help="use the first N rows only")
    group.add_argument("--na", metavar="TEXT", action="append", default=[],
                       help="CSV and TSV: a text that means missing, beside the empty one; repeatable")  # fmt: skip
    group = parser.add_argument_group("asking")
    group.add_argument("--system", metavar="TEXT", help="system prompt")
    group.add_argument("--max-tokens", metavar="N", type=_count, help="tokens an answer may have")
    group.add_argument("--temperature", metavar="T", type=float, help="0 is the likeliest answer")
    group.add_argument("--param", metavar="NAME=JSON", action="append", default=[],
                       help="another field of the request: --param top_p=0.9 --param 'stop=[\"END\"]'")  # fmt: skip
    group.add_argument("--chat", choices=("auto", "none"), default="auto",
                       help="wrap prompts in the model's chat template (auto), or send them as they are")  # fmt: skip
    if out:
        group.add_argument("--mode", choices=("batch", "single"), help="many prompts a request (batch), or one")
    group.add_argument("--delivery", choices=("auto", "rows", "batch"), default="auto",
                       help="answers as they finish (rows), a request at a time (batch)")  # fmt: skip
    group.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    _add_endpoint_options(parser)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def _add_scatter(commands: Any) -> None:
    example = (
        "example:\n  swarmkit scatter papers.csv --hostfile agents.hostfile -o answers.csv \\\n"
        '    --prompt "Summarise in one sentence: {abstract}" --max-tokens 100 --temperature 0\n\n'
        "Only failed or unanswered rows, after an interrupt or a failure:\n"
        "  swarmkit scatter answers.csv --only-missing -o answers.csv --hostfile agents.hostfile --prompt ...\n\n"
        "Values of CSV and TSV files are text, and come out as they went in.\n\n" + CODES
    )
    p = _command(commands, "scatter", "Ask one question per row, and write the table with the answers.", example)
    p.add_argument("--prompt", metavar="TEMPLATE", required=True, help="text with {column} placeholders, or a column")
    p.add_argument("--n", metavar="N", type=_count, default=1, help="answers a row (1)")
    p.add_argument("--details", action="store_true", help="add columns: finish reason, endpoint, tokens, time, tries")
    p.add_argument("--only-missing", action="store_true", help="ask only rows without an answer, keep the others")
    _add_send_options(p, "answers")
    p.set_defaults(run=_scatter)


def _add_tree_reduce(commands: Any) -> None:
    example = (
        "example:\n  swarmkit tree-reduce answers.csv --column response --by organism --fanin 8 \\\n"
        "    --prompt $'Merge these findings into one:\\n{responses}' \\\n"
        "    --hostfile agents.hostfile -o findings.csv\n\n" + CODES
    )
    p = _command(commands, "tree-reduce", "Merge a column of texts into one answer a group, level by level.", example)
    p.add_argument("--column", metavar="C", required=True, help="the column of texts")
    p.add_argument("--prompt", metavar="TEMPLATE", required=True,
                   help="text with {responses}, and if you like {level} and the keys of --by")  # fmt: skip
    p.add_argument("--by", metavar="K", action="append", help="column that makes the groups; repeatable")
    p.add_argument("--fanin", metavar="N", type=_fanin, default="auto",
                   help="texts merged at once, 2 or more, or auto: as many as the context holds (auto)")  # fmt: skip
    p.add_argument("--trace", action="store_true", help="write the whole tree, a row per node")
    _add_send_options(p, "merged answers")
    p.set_defaults(run=_tree_reduce)


def _fanin(text: str) -> int | str:
    return text if text == "auto" else _count(text)


def _add_compare(commands: Any) -> None:
    example = (
        "example:\n  swarmkit compare papers.csv --hostfile agents.hostfile --max-tokens 100 --temperature 0 \\\n"
        '    --prompt "Summarise in one sentence: {abstract}" --batch-sizes 1,10,100 --plot batching.png\n\n' + CODES
    )
    p = _command(commands, "compare", "Measure what batching buys on your endpoints, on a sample of a table.", example)
    p.add_argument("--prompt", metavar="TEMPLATE", required=True, help="text with {column} placeholders, or a column")
    p.add_argument("--sample", metavar="N", type=_count, default=256, help="rows to measure on (256)")
    p.add_argument("--repeats", metavar="N", type=_count, default=3, help="runs of each mode; 3 or more tell (3)")
    p.add_argument("--batch-sizes", metavar="N,N", type=lambda t: [*map(_count, t.split(","))], help="sizes to try")
    p.add_argument("--plot", metavar="PICTURE", type=Path, help="draw it to a .png, .svg or .pdf file")
    _add_send_options(p, None)
    p.set_defaults(run=_compare, mode=None)


def _add_probe(commands: Any) -> None:
    example = (
        "example:\n  swarmkit probe --hostfile agents.hostfile\n\n"
        f"exit codes:\n  {ProbeExit.ALL_UP:<4} all endpoints are up\n  {ProbeExit.SOME_UP:<4} some are not\n"
        f"  {ProbeExit.NONE_UP:<4} none is, or wrong usage\n"
    )
    p = _command(commands, "probe", "Ask every endpoint what it is and what it can do.", example)
    p.add_argument("--timeout", metavar="S", type=float, default=10.0, help="seconds for an endpoint to answer (10)")
    p.add_argument("--json", action="store_true", help="print JSON")
    _add_endpoint_options(p)
    p.set_defaults(run=_probe)


def _add_serve(commands: Any) -> None:
    example = (
        "example, in two terminals:\n  swarmkit serve --engine echo\n"
        f"  swarmkit probe --url http://127.0.0.1:8000 --api-key-env {SERVE_KEY}\n\n"
        f"The key is that of ${SERVE_KEY}; where that is not set, a random one is kept in a file\n"
        "that only you can read, and a line says how to load it in the second terminal.\n"
        "Only this machine can reach the endpoint. Ctrl-C ends it.\n"
    )
    p = _command(commands, "serve", "Run an OpenAI-compatible endpoint on this machine, until Ctrl-C.", example)
    p.add_argument("--engine", choices=("auto", "echo", "openvino"), default="auto",
                   help="openvino: a small model on the CPU; echo: none; auto: openvino if it is there")  # fmt: skip
    p.add_argument("--port", metavar="P", type=int, default=8000, help="0 takes a free one (8000)")
    p.add_argument("--model", help="openvino: a GGUF file; echo: the name it is served under")
    p.add_argument("--fault", metavar="SPEC", action="append", default=[],
                   help="go wrong on purpose: --fault http_500:probability=0.1; repeatable")  # fmt: skip
    p.add_argument("--option", metavar="NAME=JSON", action="append", default=[],
                   help="another option of swarmkit.local: --option tokens_per_s=50; repeatable")  # fmt: skip
    p.set_defaults(run=_serve)


def _add_demo(commands: Any) -> None:
    example = (
        "example:\n  swarmkit demo\n\nThe first time, it fetches the model (93 MB). It takes one to three minutes.\n"
    )
    p = _command(commands, "demo", "See it work: two endpoints on this machine, a table of genes.", example)
    p.add_argument("--n", metavar="N", type=_count, default=2, help="endpoints to start (2)")
    p.add_argument("--engine", choices=("auto", "openvino", "echo"), default="auto", help="as for swarmkit serve")
    p.add_argument("--limit", metavar="ROWS", type=_count, default=64, help="rows of the table, of 397 (64)")
    p.set_defaults(run=_demo)


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
    from .options import _OURS, _SAMPLING

    for name in params:
        if name in _OURS:
            raise SettingError(f"--param {name}=...: swarmkit sets this field itself; see --help for its options")
        near = difflib.get_close_matches(name, _SAMPLING, n=1, cutoff=0.8)
        if near and near[0] != name:
            _say(f"warning: --param {name}=... is sent as it is; did you mean {near[0]}?")
    options: dict[str, Any] = {"extra_body": params, "progress": False if args.quiet else "auto"}
    for name in ("system", "max_tokens", "temperature", "mode"):
        if (value := getattr(args, name)) is not None:
            options[name] = value
    return options


def _connect(args: argparse.Namespace, api_key: str | None) -> VLLMPool:
    from .connect import connect

    chat = None if args.chat == "none" else "auto"
    return connect(_target(args), model=args.model, api_key=api_key, chat=chat, delivery=args.delivery)  # type: ignore[arg-type] # narrower Literals


@dataclass
class _Job:
    """A table on its way from INPUT to OUTPUT."""

    args: argparse.Namespace
    error_column: str
    again: bool | None = None
    """Whether ``--only-missing`` can complete the output; None where there is no such thing."""

    def __post_init__(self) -> None:
        from . import tables

        args = self.args
        files = tables.find_files(args.inputs)
        only_missing = getattr(args, "only_missing", False)
        self.output = tables.plan_output(
            args.output or "-", files, stdout=args.format, overwrite=args.overwrite, only_missing=only_missing
        )
        self.df, notes = tables.read(files, args.limit, args.na)
        tables.check_types(self.df, self.output)
        for note in notes:
            _say(f"warning: {note}")

    def finish(self, work: Any, restore: Sequence[str] = ()) -> Exit:
        """Do the work, and write what comes of it, however it ends."""
        from .run import last_run

        code, problem = Exit.OK, ""
        try:
            with warnings.catch_warnings():
                # The report below has the causes, with a hint for the command line.
                warnings.filterwarnings("ignore", message=r"[\d,]+ of [\d,]+ rows failed")
                frame = work()
        except ScatterInterrupted as exc:
            frame, code, problem = exc.frame, Exit.INTERRUPTED, "interrupted"
        except NoEndpointsError as exc:
            if exc.frame is None or not last_run().stats.answered:
                raise
            frame, code, problem = exc.frame, Exit.NO_ENDPOINT, str(exc)
        if self.output.path:  # whoever is impatient now would lose what all this was for
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for name in restore:
            frame[name] = self.df[name].loc[frame.index].to_numpy()
        return self._report(frame, last_run().stats, code, problem)

    def _report(self, frame: pd.DataFrame, stats: RunStats, code: Exit, problem: str) -> Exit:
        from . import tables

        where = tables.write(frame, self.output)
        errors = frame[self.error_column].dropna()
        if problem:
            _say(f"swarmkit {self.args.command}: {problem}")
        if not self.args.quiet or problem or where != str(self.output):
            requests = f"{stats.requests:,} request{'s' * (stats.requests != 1)}"
            speed = f"{stats.rows_per_s:.1f} rows/s" if self.again is not None else f"{stats.rows:,} merges"
            _say(
                f"{len(frame):,} rows, {len(errors):,} {'unfinished or failed' if problem else 'failed'}, "
                f"{stats.time_s:.1f} s, {speed}, {requests}\nwritten to {where}"
            )
        if len(errors) and not problem:
            code = Exit.ROWS_FAILED
            counts = errors.str.slice(0, 200).value_counts()
            _say("\n".join(f"  {count:,} x {tables.clean(e)}" for e, count in counts.head(_SHOWN_CAUSES).items()))
        if len(errors) and self.again and self.output.path:
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
    make_prompts(job.df.iloc[:0], args.prompt)  # a wrong name is told before anybody is asked
    typed = tables.numbers(job.df, args.prompt)
    from .frames import submit  # slow to import: what is wrong with the arguments is told before

    options = _sending(args, params)
    pool = _connect(args, api_key)

    def work() -> Any:
        details = {"n": args.n, "details": args.details, "only_missing": args.only_missing}
        return submit(typed, args.prompt, out=args.out, pool=pool, **details, **options).finish()

    return job.finish(work, [c for c in job.df.columns if typed[c].dtype != job.df[c].dtype and c != args.out])


def _tree_reduce(args: argparse.Namespace) -> int:
    params, api_key = _pairs(args.param, "--param"), _api_key(args)
    job = _Job(args, "error" if args.trace else f"{args.out}_error")
    from .frames import tree_reduce  # slow to import, as above

    options = _sending(args, params)
    pool = _connect(args, api_key)

    def work() -> Any:
        return tree_reduce(
            job.df, args.column, args.prompt, by=args.by, fanin=args.fanin, out=args.out, trace=args.trace,
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
    typed = tables.numbers(job.df, args.prompt)
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
