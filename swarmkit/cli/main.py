"""The command line: ``swarmkit scatter``, ``embed``, ``tree-reduce``, ``probe``, and what ``swarmkit --help`` lists.

Results go to OUTPUT or to standard output, messages to standard error. Keys and tokens are neither taken from the
command line nor printed, since both end up in logs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
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
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ..client.keys import Key
from ..errors import CallerError, NoEndpointsError, ScatterError, SettingError, StoreError, SwarmError
from ..text import plural, visible
from .parser import SERVE_KEY, Exit, ProbeExit, parser
from .terminal import as_options, say

if TYPE_CHECKING:
    import pandas as pd

    from ..frames.call import PreparedCall
    from ..frames.chunks import ChunkedScatter
    from ..frames.scatter import ScatterFrame
    from ..pool.vllm_pool import VLLMPool
    from .job import Job

__all__ = ["Exit", "main"]


_NAME = re.compile(r"[A-Za-z_]\w*")
_SUFFIX = re.compile(r"[\w.-]*")
_WALLTIME = re.compile(r"[0-9]{1,4}:[0-5][0-9]:[0-5][0-9]")


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
    warnings.showwarning = _no_warning if getattr(args, "quiet", False) else partial(_show_warning, vars(args))
    signal.signal(signal.SIGTERM, _terminated)
    try:
        with contextlib.ExitStack() as args.closing:  # of pools: connections, and ways by ssh
            code = _COMMANDS[args.command](args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        say("interrupted")
        return Exit.INTERRUPTED
    except BrokenPipeError:  # the reader of the pipe, such as `head`, has closed it
        _drop_stdout()
        return Exit.OK
    except CallerError as exc:
        say(f"swarmkit {args.command}: {as_options(str(exc), vars(args))}")
        return Exit.USAGE
    except SwarmError as exc:
        say(f"swarmkit {args.command}: {as_options(str(exc), vars(args))}")
        return Exit.NO_ENDPOINT
    except OSError as exc:
        _drop_stdout()
        say(f"swarmkit {args.command}: {exc}")
        return Exit.NOT_WRITTEN


def _drop_stdout() -> None:
    """What is still buffered for a standard output that takes nothing is dropped when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt  # when a batch system ends the job, finished rows are kept, as with Ctrl-C


def _no_warning(*_: Any, **__: Any) -> None:
    pass


def _show_warning(options: Container[str], message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"warning: {as_options(str(message), options)}")


# ---- what commands share ------------------------------


def _target(args: argparse.Namespace) -> Any:
    from ..pool.targets import default_hostfile

    if args.hostfile or args.url:
        return Path(args.hostfile) if args.hostfile else args.url
    if default_hostfile():
        return None
    raise SettingError("no endpoints were given: --hostfile FILE, --url URL, or the variable SWARMKIT_HOSTFILE")


def _api_key(args: argparse.Namespace) -> Key | None:
    if args.api_key_file is not None:
        key = Key(args.api_key_file)
        key.reveal("--api-key-file")  # what is wrong with it is said before anything else is done
        return key
    if args.api_key_env is None:
        return None
    # The value is not shown: it may be a key, given by mistake.
    if not _NAME.fullmatch(args.api_key_env):
        raise SettingError("--api-key-env takes the name of an environment variable, not the key itself")
    if not os.environ.get(args.api_key_env):
        raise SettingError("the environment variable named by --api-key-env is not set, or empty")
    return Key(args.api_key_env, "variable")


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


def _verb_options(args: argparse.Namespace, params: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a verb that sends prompts."""
    from ..frames.call import SET_BY_SWARMKIT
    from ..frames.options import Sampling

    for name in params:
        if name in SET_BY_SWARMKIT:
            raise SettingError(f"--param {name}=...: swarmkit sets this field itself; see --help for its options")
        near = difflib.get_close_matches(name, [*Sampling.__annotations__], n=1, cutoff=0.8)
        if near and near[0] != name and not args.quiet:
            say(f"warning: --param {name}=... is sent unchecked; did you mean {near[0]}?")
    options: dict[str, Any] = {"extra_body": params}
    if args.command not in ("compare", "preview"):  # which show no bar
        options["progress"] = False if args.quiet else "auto"
    if args.schema is not None:
        options["schema"] = _schema(args.schema)
    if getattr(args, "examples", None) is not None:
        options["examples"] = _examples(args)
    for name in ("system", "max_tokens", "temperature", "mode", "store", "messages", "assistant_prefix", "too_long",
                 "deadline", "priority"):  # fmt: skip
        if (value := getattr(args, name, None)) is not None:
            options[name] = value
    return options


def _examples(args: argparse.Namespace) -> pd.DataFrame:
    from .harmless import answers_of
    from .job import how_read
    from .output import Output
    from .source import find_files, numbers, scan

    how = how_read(args)._replace(form=None, answers=answers_of(getattr(args, "out", "response")))
    return numbers(scan(find_files([args.examples]), Output(None, "csv"), reading=how).read(), args.prompt)


def _schema(given: str) -> Any:
    """``--schema``: a JSON Schema from a file, or fields in short."""
    from ..schema import Schema

    if not given.endswith(".json"):
        return Schema.parse(given)
    try:
        return json.loads(Path(given).read_text(encoding="utf-8"))
    except OSError as exc:
        raise SettingError(f"--schema {given}: {exc.strerror}") from exc
    except ValueError as exc:
        raise SettingError(f"--schema {given} is not JSON: {exc}") from exc


def _connect(args: argparse.Namespace, api_key: Key | None) -> VLLMPool:
    from ..engine.policy import RetryPolicy
    from ..pool.connect import connect

    retry = None if args.give_up is None else RetryPolicy(give_up_s=args.give_up)
    pool = connect(
        _target(args), model=args.model, api_key=api_key, chat=None if args.chat == "none" else "auto",
        delivery=args.delivery, dialect=args.dialect, retry=retry, watch=args.watch, **_ways(args),
    )  # fmt: skip
    found: VLLMPool = args.closing.enter_context(pool)
    return found


def _ways(args: argparse.Namespace) -> dict[str, Any]:
    """How endpoints are reached, and what a gateway may be sent."""
    given = {name: getattr(args, name) for name in ("rpm", "tpm", "max_connections", "verify", "via")}
    found = {name: value for name, value in given.items() if value is not None}
    if args.cert_key is not None and args.cert is None:
        raise SettingError("--cert-key is the key of a certificate, which --cert FILE names")
    if args.cert is not None:
        found["cert"] = (args.cert, args.cert_key) if args.cert_key else args.cert
    if args.trust_env:
        found["trust_env"] = True
    if args.proxy_env is not None:
        if not os.environ.get(args.proxy_env):
            raise SettingError("the environment variable named by --proxy-env is not set, or empty")
        found["proxy"] = os.environ[args.proxy_env]
    elif args.proxy is not None:
        if "@" in args.proxy:  # not shown
            raise SettingError("--proxy takes no password, which logs would show: --proxy-env NAME reads the address "
                               "from an environment variable")  # fmt: skip
        found["proxy"] = args.proxy
    return found


# ---- scatter ------------------------------


def _scatter(args: argparse.Namespace) -> int:
    if args.prompt is None and args.messages is None:
        return _scatter_batch_files(args)
    from ..frames.conversations import row_prompts
    from .job import Job
    from .writer import list_types

    params, api_key = _pairs(args.param, "--param"), _api_key(args)
    job = Job(args, f"{args.out}_error", completable=args.n == 1)
    head = next(job.source.chunks(1)).iloc[:0]
    row_prompts(head, args.prompt, args.messages)  # an unknown column is reported before anything is sent
    from ..frames.call import arguments, read_options  # slow to import, so the arguments are checked first
    from ..frames.scatter import ScatterFrame
    from ..frames.verbs import scatter

    options = _verb_options(args, params)
    own = {name: getattr(args, name) for name in ("out", "n", "details", "only_missing")}
    options |= _model_column(args, head)
    given = arguments(scatter, {**options, **own, "pool": _connect(args, api_key)}, args.prompt)
    call, parquet = read_options(given, by_row=True), job.output.format == "parquet"
    lists = list_types(given["schema"], args.out) if parquet else None
    return _chunked(job, call, lambda typed: ScatterFrame(typed, args.prompt, given), lists)


def _chunked(
    job: Job,
    call: PreparedCall,
    frame_of: Callable[[pd.DataFrame], ScatterFrame],
    lists: Mapping[str, Any] | None,
    shown: Callable[[pd.DataFrame], pd.DataFrame] = lambda frame: frame,
) -> int:
    """Ask the rows of a table chunk by chunk. ``shown``: a frame of answers as it is written."""
    from ..frames.chunks import ChunkedScatter
    from .chunks import Chunks
    from .source import numbers

    args = job.args
    chunks = Chunks(args)

    def prepared(chunk: pd.DataFrame) -> ScatterFrame:
        typed = numbers(chunk, args.prompt)
        frame = frame_of(typed)
        chunks.prepared(chunk, typed, frame)
        return frame

    if args.dry_run:
        from .dry_run import dry_run

        return dry_run(job, map(prepared, job.source.chunks(args.chunk_rows)), call, chunks)
    rows = 0 if args.limit else job.source.rows  # with a limit the bar counts what is asked
    stream = ChunkedScatter(job.source.chunks(args.chunk_rows), prepared, call, rows)

    def finished(frames: Iterator[pd.DataFrame]) -> Iterator[tuple[pd.DataFrame, pd.Series]]:
        for frame, errors in map(chunks.finished, frames):
            yield shown(frame), errors

    code = _stream(job, stream, finished, job.source.rows * args.n, lists)
    if chunks.not_asked and not args.quiet:
        complete = args.command == "scatter" and job.output.path and code is Exit.OK
        again = f"; to ask them:\n  {job.again()}" if complete else ""
        say(f"{plural(chunks.not_asked, 'row')} not asked, because of --limit{again}")
    return code


# ---- embed ------------------------------


def _embed(args: argparse.Namespace) -> int:
    from ..frames.conversations import row_prompts
    from .job import Job

    params, api_key = _pairs(args.param, "--param"), _api_key(args)
    job = Job(args, f"{args.out}_error", completable=False)
    row_prompts(next(job.source.chunks(1)).iloc[:0], args.prompt, None)
    from ..frames.call import arguments  # slow to import, as above
    from ..frames.embed import VectorFrame, embed, embed_call

    own = {"out": args.out, "dimensions": args.dimensions, "pool": _connect(args, api_key)}
    given = arguments(embed, {**_verb_options(args, params), **own}, args.prompt)
    call, lists = embed_call(given), None
    if job.output.format == "parquet":
        import pyarrow as pa

        lists = {args.out: pa.list_(pa.float32())}  # the first frame may have none
    return _chunked(
        job, call, lambda typed: VectorFrame(typed, args.prompt, given), lists, lambda done: _as_lists(done, args.out)
    )


def _as_lists(frame: pd.DataFrame, out: str) -> pd.DataFrame:
    """The frame with vectors as lists of numbers that have no more digits than they need."""
    import numpy as np
    import pandas as pd

    vectors = [np.asarray(v, np.float32).astype(str).astype(float).tolist() if known else None
               for v, known in zip(frame[out].tolist(), frame[out].notna(), strict=True)]  # fmt: skip
    return frame.assign(**{out: pd.Series(vectors, frame.index, dtype=object)})


def _model_column(args: argparse.Namespace, head: pd.DataFrame) -> dict[str, str]:
    """``--model``, if it is a column: that of each row's model."""
    if args.model not in head.columns:
        return {}
    model, args.model = args.model, None
    return {"model": model}


def _stream(
    job: Job,
    stream: ChunkedScatter,
    finished: Callable[[Iterator[pd.DataFrame]], Iterable[tuple[pd.DataFrame, pd.Series]]],
    rows: int,
    lists: Mapping[str, Any] | None = None,
) -> Exit:
    """Write the frames of a stream as they come; also, after an early end, those that have not finished."""
    ended: list[BaseException] = []

    def stop(*_: object) -> None:
        ended.append(KeyboardInterrupt())
        stream.stop()

    def no_reader() -> None:
        ended.append(BrokenPipeError("nobody reads the output any more"))
        stream.stop()

    def frames() -> Iterator[pd.DataFrame]:
        try:
            yield from stream
        except Exception as exc:  # whatever it is: the rows that have finished are written
            if not stream.stats.answered:
                raise
            ended.append(exc)
        if ended:  # the output has every row of the input, also after an early end, if no part of it is refused
            refused = isinstance(ended[0], CallerError) and not isinstance(ended[0], StoreError)
            waiting = not (refused or isinstance(ended[0], BrokenPipeError))
            yield from stream.rest(_unfinished(ended[0]), waiting=waiting)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    code = job.write(
        finished(frames()), stream.stats, lambda: ended[0] if ended else None, rows=rows, stop=no_reader, lists=lists
    )
    if ended and not isinstance(ended[0], (KeyboardInterrupt, SwarmError, OSError)):
        raise ended[0]  # a bug: show it, now that the rows are written
    return code


_OF_TABLES = (
    *("examples", "assistant_prefix", "only_missing", "details", "in_place", "limit", "na", "sep", "schema", "system"),
    *("temperature", "param", "too_long", "n", "out", "chat"),
)
"""Options of ``scatter`` that have no meaning where each line of a batch file says what is asked."""


def _scatter_batch_files(args: argparse.Namespace) -> int:
    from .batch_file import SMALL_GROUPS, BatchFile, why_no_batch_file
    from .job import Job, inputs_of

    for file in inputs_of(args):
        if why := why_no_batch_file(file, args.input_format):
            raise SettingError(
                "one of the arguments --prompt --messages is required, unless all inputs are batch files, JSON lines "
                f"with custom_id, method, url and body, which {file} is not: {why}"
            )
    default = parser().parse_args(["scatter", "-", "--prompt", ""])
    if extra := [name for name in _OF_TABLES if getattr(args, name) != getattr(default, name)]:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in extra)
        raise SettingError(f"the lines of a batch file say what is asked; leave out {named}, or give a --prompt")
    if args.format not in (None, "jsonl"):
        raise SettingError(f"--format {args.format}: the answers to a batch file are JSON lines, --format jsonl")
    args.format, api_key = "jsonl", _api_key(args)
    job = Job(args, "error", completable=False, source=BatchFile)
    if job.output.format != "jsonl":
        raise SettingError(f"-o {args.output}: the answers to a batch file are JSON lines: name it .jsonl")
    from ..frames.call import arguments, read_options
    from ..frames.chunks import ChunkedScatter
    from ..frames.verbs import scatter

    pool, lines = _connect(args, api_key), job.source
    options = {"store": args.store, "progress": False if args.quiet else "auto", "pool": pool}
    options |= {"deadline": args.deadline, "priority": args.priority or 0}
    asked = lines.asked(pool, args.chunk_rows, model=args.model, max_tokens=args.max_tokens, mode=args.mode)
    call = read_options(arguments(scatter, options))
    if args.dry_run:
        from .dry_run import dry_run_of_lines

        return dry_run_of_lines(lines, asked, pool)
    stream = ChunkedScatter(asked, lambda group: group, call, lines.rows, SMALL_GROUPS)
    code = _stream(job, stream, lines.answers, lines.rows)
    if lines.unlimited and not args.quiet:
        say(f"{plural(lines.unlimited, 'line')} without max_tokens, and the servers do not report their context: "
            f"answers have {pool.max_tokens} tokens at most; --max-tokens N changes that")  # fmt: skip
    if args.store and not args.quiet and code in (Exit.ROWS_FAILED, Exit.INTERRUPTED, Exit.NO_ENDPOINT, Exit.DEADLINE):
        say("to ask only the others again, run the same command with --overwrite")
    return code


def _unfinished(ended: BaseException) -> str:
    """The error of rows that have not finished."""
    if isinstance(ended, NoEndpointsError):
        return "no endpoint was left"
    return "not finished: the store failed" if isinstance(ended, StoreError) else "interrupted"


# ---- preview, estimate ------------------------------


def _table(args: argparse.Namespace) -> pd.DataFrame:
    """The rows of the inputs, of a command that does not write them."""
    from ..frames.conversations import row_prompts
    from .job import how_read, inputs_of
    from .output import Output
    from .source import numbers, scan

    source = scan(inputs_of(args), Output(None, "csv"), args.limit, how_read(args))
    for note in () if args.quiet else source.notes:
        say(f"warning: {note}")
    df = source.read()
    row_prompts(df.iloc[:0], args.prompt, args.messages)
    return numbers(df, args.prompt)


def _preview(args: argparse.Namespace) -> int:
    params, api_key = _pairs(args.param, "--param"), _api_key(args)
    df = _table(args)
    import pandas as pd

    from ..frames.verbs import preview  # slow to import, as above

    options = {**_verb_options(args, params), **_model_column(args, df)}
    found = preview(df, args.prompt, len(df), pool=_connect(args, api_key), **options)
    for row, sent, tokens, error in found[["sent", "tokens", "error"]].itertuples(name=None):
        if isinstance(error, str):
            print(visible(f"--- row {row}: not sent, {error}"))
        else:
            print(visible(f"--- row {row}" + ("" if pd.isna(tokens) else f", {tokens:,} tokens")))
            print(visible(sent))
    return Exit.ROWS_FAILED if found["error"].notna().any() else Exit.OK


def _estimate(args: argparse.Namespace) -> int:
    params, api_key = _pairs(args.param, "--param"), _api_key(args)
    df = _table(args)
    from ..analysis.estimate import estimate  # slow to import, as above

    options = {**_verb_options(args, params), **_model_column(args, df)}
    own = {name: getattr(args, name) for name in ("n", "sample", "price", "slots")}
    own["overwrite"] = True  # it writes nothing
    try:
        found = estimate(df, args.prompt, pool=_connect(args, api_key), **own, **options)
    except ScatterError as exc:
        say(f"swarmkit estimate: {exc}")
        return Exit.ROWS_FAILED
    if args.json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        lines = [f"{label:<11}{value}" for label, value in found.summary()]
        print(as_options("\n".join(lines), vars(args)))
    return Exit.OK


# ---- tree-reduce ------------------------------


def _tree_reduce(args: argparse.Namespace) -> int:
    from .job import Job

    params, api_key = _pairs(args.param, "--param"), _api_key(args)
    job = Job(args, "error" if args.trace else f"{args.out}_error")
    from ..frames.call import arguments, read_options  # slow to import, as above
    from ..frames.verbs import tree_reduce, trees_of

    own = {name: getattr(args, name) for name in ("by", "fanin", "out", "trace")}
    options = {**own, "pool": _connect(args, api_key), **_verb_options(args, params)}
    df = job.source.read()
    if args.dry_run:
        from .dry_run import dry_run_of_trees

        given = arguments(tree_reduce, options)
        trees = trees_of(df, args.column, args.prompt, given)
        return dry_run_of_trees(job, trees, read_options(given, aggregation=True))
    return job.finish(lambda: tree_reduce(df, args.column, args.prompt, **options))


# ---- compare, probe ------------------------------


def _compare(args: argparse.Namespace) -> int:
    from .job import Job
    from .source import numbers
    from .writer import Writer

    params, api_key, plot = _pairs(args.param, "--param"), _api_key(args), args.plot
    bad = plot and (plot.suffix not in (".png", ".svg", ".pdf") or not plot.parent.is_dir())
    if bad or (plot and plot.exists() and not args.overwrite):
        raise SettingError(
            f"--plot {plot}: must be a .png, .svg or .pdf file in a folder that exists; --overwrite replaces one"
        )
    job = Job(args, "")
    typed = numbers(job.source.read(), args.prompt)
    from ..analysis.compare import compare  # slow to import, as above

    options = {"pool": _connect(args, api_key), "sample": args.sample, "repeats": args.repeats}
    found = compare(typed, args.prompt, batch_sizes=args.batch_sizes, **options, **_verb_options(args, params))
    if not args.quiet:
        print(found, file=sys.stderr if args.output == "-" else sys.stdout)
    code = Exit.OK if (found.frame["completion_rate"] == 1).all() else Exit.ROWS_FAILED
    if args.output:
        writer = Writer(job.output)
        writer.add(found.frame)
        where = writer.close()
        if writer.problem or not args.quiet:
            say(f"written to {where}")
        code = Exit.NOT_WRITTEN if writer.problem else code
    if plot:
        found.plot().savefig(plot, dpi=150)
    return code


def _probe(args: argparse.Namespace) -> int:
    from ..client import io_thread
    from ..pool.targets import resolve
    from ..pool.vllm_pool import VLLMPool
    from .inventory import take_inventory

    api_key = _api_key(args)
    endpoints = resolve(_target(args), api_key is not None)
    with VLLMPool(endpoints, model=args.model, api_key=api_key, **_ways(args)) as pool:
        found = io_thread.call(take_inventory(pool, args.timeout, args.deep))
    if args.format == "text":
        print(found.text(shutil.get_terminal_size((120, 24)).columns))
    else:
        print(found.csv() if args.format == "csv" else json.dumps(found.as_dict(), indent=1))
    up = found.count("up")
    return ProbeExit.ALL_UP if up == len(found.endpoints) else ProbeExit.SOME_UP if up else ProbeExit.NONE_UP


# ---- serve, demo ------------------------------


def _wait(args: argparse.Namespace) -> int:
    from ..pool.wait import wait_until_ready

    if args.url:
        raise SettingError("wait takes a --hostfile, not a --url")
    pool = wait_until_ready(
        args.hostfile, min_ready=args.min_ready, timeout_s=args.timeout, patience_s=args.patience, every_s=args.every,
        output=args.output, tell=None if args.quiet else say, model=args.model, api_key=_api_key(args), **_ways(args),
    )  # fmt: skip
    args.closing.enter_context(pool)
    if not args.quiet:
        say(f"ready: {plural(pool.size, 'endpoint')}" + (f", listed in {args.output}" if args.output else ""))
    return Exit.OK


def _launch(args: argparse.Namespace) -> int:
    from .job_script import KEY_ENV, SUBMIT, job_script

    script, hostfile = args.output or Path(args.template), args.hostfile.expanduser().absolute()
    if not _WALLTIME.fullmatch(args.walltime):
        raise SettingError(f"--walltime {args.walltime}: write hours, minutes and seconds, as 2:30:00")
    if not _SUFFIX.fullmatch(args.suffix):
        raise SettingError(f"--suffix {args.suffix!r}: write what follows the nodes' names, as .hpc.example.org")
    if args.model is not None and not args.model.strip():
        raise SettingError("--model is empty: name a model, or leave it out for the server's own")
    if args.port + args.per_node - 1 > 65535:
        raise SettingError(
            f"--port {args.port} and the {args.per_node - 1} after it: the last port that exists is 65535"
        )
    if script.exists() and not args.overwrite:
        raise SettingError(f"{script} exists already: --overwrite replaces it, --output names another")
    text = job_script(
        args.template, nodes=args.nodes, per_node=args.per_node, gpus=args.gpus, port=args.port,
        walltime=args.walltime, suffix=args.suffix, hostfile=hostfile, setup=args.setup,
        server=args.server + ([args.model] if args.model else []), options=args.options,
    )  # fmt: skip
    script.write_text(text, encoding="utf-8")
    say(
        f"written to {script}, for {plural(args.nodes * args.per_node, 'server')}; nothing is submitted yet:\n"
        f"  {SUBMIT[args.template]} {shlex.quote(str(script))}\n"
        f"Once they are up they are listed in {hostfile}. To use them:\n"
        f'  export {KEY_ENV}="$(cat {shlex.quote(str(hostfile))}.key)" SWARMKIT_HOSTFILE={shlex.quote(str(hostfile))}'
    )
    return Exit.OK


def _serve(args: argparse.Namespace) -> int:
    from ..server.serve import serve

    options = {"engine": args.engine, "model": args.model, "port": args.port, "faults": args.fault}
    options |= _pairs(args.option, "--option")
    token = os.environ.get(SERVE_KEY) or secrets.token_urlsafe(24)
    with _key_file(token) as file:
        source = f'export {SERVE_KEY}="$(cat {shlex.quote(str(file))})"' if file else f"the value of ${SERVE_KEY}"
        say(f"its key: {source}")
        try:
            serve(token=token, **options)
        except OSError as exc:
            raise SettingError(f"cannot listen on port {options['port']} ({exc}); --port 0 takes a free one") from exc
    return Exit.OK


@contextlib.contextmanager
def _key_file(token: str) -> Iterator[Path | None]:
    """A file with the token that only this user can read; None if the user has set the token."""
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
    "preview": _preview,
    "estimate": _estimate,
    "tree-reduce": _tree_reduce,
    "embed": _embed,
    "compare": _compare,
    "probe": _probe,
    "wait": _wait,
    "launch": _launch,
    "serve": _serve,
    "demo": _demo,
}
