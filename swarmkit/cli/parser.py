"""The arguments of the command line, and the texts of ``--help``."""

from __future__ import annotations

import argparse
import shlex
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any

from .job_script import SUBMIT

__all__ = ["SERVE_KEY", "Exit", "ProbeExit", "parser"]


class Exit(IntEnum):
    """The exit codes of the commands."""

    OK = 0
    ROWS_FAILED = 1
    USAGE = 2
    NO_ENDPOINT = 3
    NOT_WRITTEN = 4
    DEADLINE = 75  # EX_TEMPFAIL: the same again may succeed
    INTERRUPTED = 130


class ProbeExit(IntEnum):
    """The exit codes of ``swarmkit probe``."""

    ALL_UP = 0
    SOME_UP = 1
    NONE_UP = 2


CODES = f"""\
exit codes; finished rows are written with each but {Exit.USAGE}:
  {Exit.OK:<4} all rows were answered
  {Exit.ROWS_FAILED:<4} some rows failed; the error column of the output says why
  {Exit.USAGE:<4} wrong usage or input; nothing was sent
  {Exit.NO_ENDPOINT:<4} no endpoint was usable, or none was left
  {Exit.NOT_WRITTEN:<4} OUTPUT or the store could not be written; a message says where rows are
  {Exit.DEADLINE:<4} the --deadline was reached; the same command again goes on
  {Exit.INTERRUPTED:<4} interrupted by Ctrl-C or SIGTERM
"""
SERVE_KEY = "SWARMKIT_LOCAL_KEY"
CHUNK_ROWS = 20_000
FORMATS = ("csv", "tsv", "jsonl", "json", "parquet")


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; ``args.command`` is the name of the command."""
    from ..version import __version__

    top = argparse.ArgumentParser(
        prog="swarmkit", description="Push a table's column of prompts through a swarm of LLM endpoints.",
        epilog="swarmkit COMMAND --help has an example of each. New here? swarmkit demo",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=17),
    )  # fmt: skip
    top.add_argument("--version", action="version", version=f"swarmkit {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_scatter,
        _add_preview,
        _add_estimate,
        _add_tree_reduce,
        _add_embed,
        _add_compare,
        _add_probe,
        _add_wait,
        _add_launch,
        _add_serve,
        _add_demo,
    ):
        add(commands)
    return top


def _command(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, allow_abbrev=False,
        epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    return parser


def _add_endpoint_options(parser: argparse.ArgumentParser, rates: bool = True) -> None:
    """``rates``: whether prompts are sent, in runs that keep to rates."""
    group = parser.add_argument_group("endpoints")
    target = group.add_mutually_exclusive_group()
    target.add_argument(
        "--hostfile", metavar="H", help="file with one endpoint per line; $SWARMKIT_HOSTFILE by default"
    )
    target.add_argument("--url", metavar="URL", action="append", help="address of an endpoint; repeatable")
    key = group.add_mutually_exclusive_group()
    key.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the endpoints' key")
    key.add_argument("--api-key-file", metavar="FILE", type=Path,
                     help="file that holds it, which is read again for each request")  # fmt: skip
    group.add_argument("--model", metavar="M", help="the model, where the servers list several; scatter: or its column")
    group.add_argument("--via", metavar="ssh:HOST", help="reach the endpoints from that host, as the command ssh does")
    proxy = group.add_mutually_exclusive_group()
    proxy.add_argument("--proxy", metavar="URL", help="HTTP proxy of the endpoints that name none")
    proxy.add_argument("--proxy-env", metavar="NAME",
                       help="environment variable that holds it, where it has a password")  # fmt: skip
    group.add_argument("--trust-env", action="store_true", help="use the proxies of the environment ($HTTPS_PROXY...)")
    group.add_argument("--verify", metavar="FILE", help="CA certificates that https endpoints are trusted by (PEM)")
    group.add_argument("--cert", metavar="FILE", help="the client's certificate, where https endpoints ask for one")
    group.add_argument("--cert-key", metavar="FILE", help="its key, if FILE does not have it")
    if rates:
        for name, what in (("rpm", "requests a minute"), ("tpm", "tokens a minute"),
                           ("max-connections", "requests in flight")):  # fmt: skip
            group.add_argument(f"--{name}", metavar="N", type=_count, help=f"{what} at each gateway, at most")
    else:
        parser.set_defaults(rpm=None, tpm=None, max_connections=None)


def _add_input_options(parser: argparse.ArgumentParser) -> Any:
    """How tables are read; returns the group, for how they are written."""
    parser.add_argument(
        "inputs", metavar="INPUT", nargs="+",
        help="files, folders or globs of .csv, .tsv, .jsonl, .json (an array), each also .gz, .bz2, .xz or .zst, or "
        "of .parquet; .json files in a folder are left out; - is the standard input",
    )  # fmt: skip
    group = parser.add_argument_group("tables")
    group.add_argument("--input-format", metavar="F", choices=FORMATS,
                       help=f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}, where the names of files do not tell; "
                       "- is known by how it begins")  # fmt: skip
    group.add_argument("--sep", metavar="C", type=_sep, default=",",
                       help="what separates the columns of CSV files, also of OUTPUT: ';' or '\\t' (,)")  # fmt: skip
    group.add_argument("--na", metavar="TEXT", action="append", default=[],
                       help="CSV and TSV: a text that means missing, besides the empty one; repeatable")  # fmt: skip
    group.add_argument("--raw", action="store_true",
                       help="read and write answers as they are: without it, formulas for spreadsheets get a ' in "
                       "front in CSV and TSV, and control characters are escaped there and on terminals")  # fmt: skip
    return group


def _sep(text: str) -> str:
    sep = {"\\t": "\t", "tab": "\t"}.get(text, text)
    if len(sep) != 1 or sep in '"\r\n':
        raise argparse.ArgumentTypeError(f"{text!r} is not one character, such as ';' or '\\t'")
    return sep


def _add_prompt_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """What is asked of each row; ``required`` is false where the inputs may be batch files."""
    asked = parser.add_mutually_exclusive_group(required=required)
    asked.add_argument("--prompt", metavar="TEMPLATE", help="text with {column} placeholders, or a column")
    asked.add_argument("--messages", metavar="COLUMN", help="a column of conversations, lists of messages")
    parser.add_argument("--examples", metavar="FILE",
                        help="table of the prompt's columns and of answers, shown to the model first")  # fmt: skip
    parser.add_argument("--assistant-prefix", metavar="TEXT", help="the first words of every answer")


def _add_request_options(parser: argparse.ArgumentParser) -> Any:
    """What a request says; returns the group."""
    group = parser.add_argument_group("requests")
    group.add_argument("--system", metavar="TEXT", help="system prompt")
    group.add_argument("--max-tokens", metavar="N", type=_count, help="maximum number of tokens per answer")
    group.add_argument("--temperature", metavar="T", type=float, help="sampling temperature; 0 is greedy")
    _add_param(group)
    group.add_argument("--chat", choices=("auto", "none"), default="auto",
                       help="wrap prompts in the model's chat template (auto), or send them unchanged")  # fmt: skip
    group.add_argument("--dialect", choices=("openai", "vllm", "first"),
                       help="what the servers are like, where that is not to be learned")  # fmt: skip
    parser.set_defaults(delivery="auto", give_up=None, watch=False, quiet=False)
    return group


def _add_param(group: Any) -> None:
    group.add_argument("--param", metavar="NAME=JSON", action="append", default=[],
                       help="another field of the request: --param top_p=0.9 --param 'stop=[\"END\"]'")  # fmt: skip


def _add_deadline(group: Any) -> None:
    group.add_argument("--deadline", metavar="WHEN", type=_deadline,
                       help="end by then: seconds from now, a time (2026-11-28T18:00), or slurm or pbs: with "
                       "the job that this runs in")  # fmt: skip


def _add_mode(group: Any) -> None:
    group.add_argument("--mode", choices=("batch", "single"), help="many prompts per request (batch), or one")


def _add_schema(group: Any) -> None:
    group.add_argument("--schema", metavar="SPEC",
                       help="what an answer must be: 'tone=pos|neg,n=int', or a .json file with a schema")  # fmt: skip


def _add_store(group: Any) -> None:
    group.add_argument(
        "--store", metavar="FOLDER", help="keep finished rows there; the same call again asks only the others"
    )


def _add_too_long(group: Any) -> None:
    group.add_argument("--too-long", choices=("error", "truncate", "truncate_left"),
                       help="prompts beyond the context fail (error), or lose their end or beginning")  # fmt: skip


def _add_table_options(
    parser: argparse.ArgumentParser, out: str | None, keeps_rows: bool = False, name: str = "response"
) -> None:
    """``out``: the content of the column of answers, ``name`` its name; None for a command that does not write answers.

    ``keeps_rows``: whether the output has the rows of the input.
    """
    group = _add_input_options(parser)
    group.add_argument("-o", "--output", metavar="OUTPUT", required=bool(out) and not keeps_rows,
                       help="where the table goes, its format by suffix; - is the standard output")  # fmt: skip
    if keeps_rows:
        group.add_argument("--in-place", action="store_true",
                           help="write the answers into INPUT itself, which is replaced when all is done")  # fmt: skip
    if out:
        group.add_argument("--dry-run", action="store_true",
                           help="check all this, and say what would be asked; nothing is sent or written")  # fmt: skip
    group.add_argument("--format", choices=FORMATS[:-1],
                       help="format for -o - (csv; for INPUT -, that of INPUT)")  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    if out:
        group.add_argument("--out", metavar="NAME", default=name, help=f"column of {out} ({name})")
    group.add_argument("--limit", metavar="N", type=_count,
                       help="ask N rows at most; the others are written as they are" if keeps_rows
                       else "use the first N rows only")  # fmt: skip


def _add_send_options(parser: argparse.ArgumentParser, out: str | None, keeps_rows: bool = False) -> None:
    """Those of the table, as in ``_add_table_options``, and of the requests for answers."""
    _add_table_options(parser, out, keeps_rows)
    group = _add_request_options(parser)
    _add_schema(group)
    if out:
        _add_store(group)
        _add_deadline(group)
        group.add_argument("--priority", metavar="N", type=int,
                           help="lower numbers go first at vLLM servers with --scheduling-policy priority")  # fmt: skip
        _add_mode(group)
        _add_too_long(group)
    group.add_argument("--delivery", choices=("auto", "rows", "batch"), default="auto",
                       help="answers as they finish (rows), a request at a time (batch), or as suits them")  # fmt: skip
    _add_run_options(group)
    _add_endpoint_options(parser)


def _add_run_options(group: Any) -> None:
    group.add_argument("--give-up", metavar="S", type=float,
                       help="seconds without an answer of any endpoint after which the run ends (600)")  # fmt: skip
    group.add_argument("--watch", action="store_true", help="follow the hostfile while it changes")
    group.add_argument("--quiet", action="store_true",
                       help="no progress bar, summary, warnings or hints; only what ends it early")  # fmt: skip


def _deadline(text: str) -> datetime | str:
    """A deadline; its seconds begin now."""
    if text in ("slurm", "pbs"):
        return text
    try:
        if text.replace(".", "", 1).isdecimal():
            return datetime.now(UTC) + timedelta(seconds=float(text))
        return datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of: seconds from now, a time such as 2026-11-28T18:00, slurm, pbs"
        ) from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def _add_scatter(commands: Any) -> None:
    example = (
        "example:\n  swarmkit scatter papers.csv --hostfile agents.hostfile -o answers.csv \\\n"
        '    --prompt "Summarise in one sentence: {abstract}" --max-tokens 100\n\n'
        "In a pipe, JSON lines in and out:\n"
        "  head -n 100 papers.jsonl | swarmkit scatter - --prompt ... > answers.jsonl\n\n"
        "Only failed or unanswered rows, after an interrupt or a failure:\n"
        "  swarmkit scatter answers.csv --only-missing --in-place --prompt ...\n\n"
        "Files are read, sent and written in chunks, so they may be larger than memory\n"
        "(but not .json). Until it is complete, OUTPUT is named OUTPUT.part. The .part\n"
        "file of a killed process can be read up to its last line (but not Parquet and\n"
        ".json), and with --store the same command asks only the unfinished rows.\n"
        "OUTPUT always has all rows of the inputs. If it cannot be written, as on a full\n"
        "disk, the rows go to a file in the folder for temporary files.\n\n"
        "Values of CSV and TSV files are text, and are written unchanged. In TSV files\n"
        "quotes are part of a value, unless they enclose one that needs it.\n\n"
        "Batch files, lines of the OpenAI Batch API and of vllm run-batch, take no\n"
        "--prompt: each line has its own request. The answers are lines of the same API;\n"
        "failed lines have their error in it:\n"
        "  swarmkit scatter requests.jsonl -o answers.jsonl --store runs/a\n\n" + CODES
    )
    p = _command(commands, "scatter", "Ask one question per row; write the table with the answers.", example)
    _add_prompt_options(p, required=False)
    p.add_argument("--n", metavar="N", type=_count, default=1, help="answers per row (1)")
    p.add_argument(
        "--details", action="store_true", help="add columns: finish reason, endpoint, tokens, time, attempts..."
    )
    p.add_argument("--only-missing", action="store_true", help="ask only rows without an answer, keep the others")
    _add_chunk_rows(p)
    _add_send_options(p, "answers", keeps_rows=True)


def _add_chunk_rows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chunk-rows", metavar="N", type=_count, default=CHUNK_ROWS,
                        help=f"rows sent and written at a time, three chunks at most ({CHUNK_ROWS})")  # fmt: skip


def _add_embed(commands: Any) -> None:
    example = (
        "example:\n  swarmkit embed papers.csv --hostfile agents.hostfile -o vectors.parquet \\\n"
        '    --prompt "{title}: {abstract}" --model my-embedder --store runs/vectors\n\n'
        "Vectors are lists of numbers, in CSV and TSV files as JSON.\n\n" + CODES
    )
    p = _command(commands, "embed", "Give each row the vector of its text; write the table with it.", example)
    p.add_argument("--prompt", metavar="TEMPLATE", required=True, help="text with {column} placeholders, or a column")
    p.add_argument("--dimensions", metavar="N", type=_count, help="numbers a vector has, where the model can do so")
    _add_chunk_rows(p)
    _add_table_options(p, "vectors", keeps_rows=True, name="embedding")
    group = p.add_argument_group("requests")
    for add in (_add_param, _add_store, _add_deadline, _add_too_long, _add_run_options):
        add(group)
    p.set_defaults(messages=None, schema=None, chat="none", dialect=None, delivery="auto", n=1, details=False)
    _add_endpoint_options(p)


def _add_preview(commands: Any) -> None:
    example = (
        'example:\n  swarmkit preview papers.csv --prompt "Summarise: {abstract}" \\\n'
        "    --hostfile agents.hostfile\n\n"
        "One server is asked for its chat template, and for the tokens of these prompts.\n\n"
        f"exit codes:\n  {Exit.OK:<4} these rows would be sent\n"
        f"  {Exit.ROWS_FAILED:<4} some would not\n  {Exit.USAGE:<4} wrong usage or input\n"
        f"  {Exit.NO_ENDPOINT:<4} no endpoint was usable\n"
    )
    p = _command(commands, "preview", "Show what would be sent for the first rows; send none of them.", example)
    _add_prompt_options(p)
    p.add_argument("--rows", metavar="N", type=_count, default=3, dest="limit", help="rows to show (3)")
    _add_input_options(p)
    _add_mode(_add_request_options(p))
    p.set_defaults(schema=None)
    _add_endpoint_options(p, rates=False)


def _add_estimate(commands: Any) -> None:
    example = (
        'example:\n  swarmkit estimate papers.csv --prompt "Summarise: {abstract}" \\\n'
        "    --hostfile agents.hostfile --max-tokens 100 --price 0.15,0.60\n\n"
        "It asks a sample of the rows; with --store, a scatter does not ask them again.\n\n"
        f"exit codes:\n  {Exit.OK:<4} the estimate was made\n"
        f"  {Exit.ROWS_FAILED:<4} no row of the sample was answered\n"
        f"  {Exit.USAGE:<4} wrong usage or input\n  {Exit.NO_ENDPOINT:<4} no endpoint was usable\n"
    )
    p = _command(commands, "estimate", "Say how long a scatter will take, and what it will cost.", example)
    _add_prompt_options(p)
    p.add_argument("--n", metavar="N", type=_count, default=1, help="answers per row (1)")
    p.add_argument("--sample", metavar="N", type=_count, default=64, help="rows to ask (64)")
    p.add_argument("--price", metavar="IN,OUT", type=_price,
                   help="what a million tokens cost, of prompts and of answers: 0.15,0.60")  # fmt: skip
    p.add_argument("--slots", metavar="N", type=_count,
                   help="rows an endpoint works on at once, vLLM's --max-num-seqs, where it does not show")  # fmt: skip
    p.add_argument("--json", action="store_true", help="print JSON")
    _add_input_options(p)
    group = _add_request_options(p)
    for add in (_add_schema, _add_store, _add_mode, _add_too_long):
        add(group)
    group.add_argument("--quiet", action="store_true", help="no progress bar and no warnings")
    p.set_defaults(limit=None)
    _add_endpoint_options(p)


def _price(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers, as 0.15,0.60") from None


def _add_tree_reduce(commands: Any) -> None:
    example = (
        "example:\n  swarmkit tree-reduce answers.csv --column response --by organism \\\n"
        "    --prompt $'Merge these findings into one:\\n{responses}' \\\n"
        "    --hostfile agents.hostfile -o findings.csv\n\n" + CODES
    )
    p = _command(commands, "tree-reduce", "Merge a column of texts into one answer per group.", example)
    p.add_argument("--column", metavar="C", required=True, help="the column of texts")
    p.add_argument("--prompt", metavar="TEMPLATE", required=True,
                   help="text with {responses}; {level} and the columns of --by are optional")  # fmt: skip
    p.add_argument("--by", metavar="K", action="append", help="column to group by; repeatable")
    p.add_argument("--fanin", metavar="N", type=_fanin, default="auto",
                   help="texts per merge, 2 or more, or auto: as many as fit the context (auto)")  # fmt: skip
    p.add_argument("--trace", action="store_true", help="write the whole tree, one row per node")
    _add_send_options(p, "merged answers")


def _fanin(text: str) -> int | str:
    return text if text == "auto" else _count(text)


def _add_compare(commands: Any) -> None:
    example = (
        "example:\n  swarmkit compare papers.csv --hostfile agents.hostfile --max-tokens 100 \\\n"
        '    --prompt "Summarise: {abstract}" --batch-sizes 1,10,100 --plot batching.png\n\n' + CODES
    )
    p = _command(commands, "compare", "Measure batch against single requests on your endpoints.", example)
    p.add_argument("--prompt", metavar="TEMPLATE", required=True, help="text with {column} placeholders, or a column")
    p.add_argument("--sample", metavar="N", type=_count, default=256, help="rows to measure on (256)")
    p.add_argument("--repeats", metavar="N", type=_count, default=3, help="runs of each mode; a verdict needs 3 (3)")
    p.add_argument(
        "--batch-sizes", metavar="N,N", type=lambda t: [*map(_count, t.split(","))], help="batch sizes to compare"
    )
    p.add_argument("--plot", metavar="PICTURE", type=Path, help="write a plot to a .png, .svg or .pdf file")
    _add_send_options(p, None)
    p.set_defaults(mode=None)


def _add_probe(commands: Any) -> None:
    example = (
        "example:\n  swarmkit probe --hostfile agents.hostfile\n\n"
        f"exit codes:\n  {ProbeExit.ALL_UP:<4} all endpoints are up\n  {ProbeExit.SOME_UP:<4} some are not up\n"
        f"  {ProbeExit.NONE_UP:<4} none is up, or wrong usage\n"
    )
    p = _command(commands, "probe", "Show the state and the capabilities of every endpoint.", example)
    p.add_argument("--timeout", metavar="S", type=float, default=10.0, help="seconds an endpoint has to answer (10)")
    p.add_argument("--deep", action="store_true",
                   help="try what each route of every endpoint really does: 50 to 100 short requests each")  # fmt: skip
    p.add_argument("--format", choices=("text", "json", "csv"), default="text", help="what is printed (text)")
    p.add_argument("--json", action="store_const", const="json", dest="format", help="the same as --format json")
    _add_endpoint_options(p, rates=False)


def _add_wait(commands: Any) -> None:
    example = (
        "example, in a batch job that starts its own servers:\n"
        "  swarmkit wait --hostfile agents.hostfile --output ready.hostfile --min 0.9 &&\n"
        "    swarmkit scatter papers.csv --hostfile ready.hostfile --prompt ... \\\n"
        "      -o answers.csv\n\n"
        f"exit codes:\n  {Exit.OK:<4} enough endpoints are up\n  {Exit.USAGE:<4} wrong usage\n"
        f"  {Exit.NO_ENDPOINT:<4} the time ran out before enough were up\n"
    )
    p = _command(commands, "wait", "Wait until a cluster's servers are up; write their hostfile.", example)
    p.add_argument("--output", metavar="READY", type=Path, help="file to write the healthy endpoints to")
    p.add_argument("--min", metavar="N", type=_share, default=1.0, dest="min_ready",
                   help="endpoints to wait for: a number (90) or a share (0.9); all by default")  # fmt: skip
    p.add_argument("--timeout", metavar="S", type=float, default=3600.0, help="seconds to wait for the first (3600)")
    p.add_argument("--patience", metavar="S", type=float, default=300.0,
                   help="seconds to wait for the others after the first (300)")  # fmt: skip
    p.add_argument("--every", metavar="S", type=float, default=5.0, help="seconds between two health checks (5)")
    p.add_argument("--quiet", action="store_true", help="no messages while waiting")
    _add_endpoint_options(p, rates=False)


def _share(text: str) -> float | int:
    try:
        return float(text) if "." in text else _count(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of endpoints nor a share such as 0.9") from None


def _add_launch(commands: Any) -> None:
    example = (
        "example:\n  swarmkit launch --template job.slurm --nodes 16 --per-node 4 \\\n"
        "    --model Qwen/Qwen3-8B\n"
        "  sbatch -A ACCOUNT -p PARTITION job.slurm\n\n"
        "It writes the script and submits nothing. Words after -- go to the server:\n"
        "  swarmkit launch ... -- --max-model-len 8192\n"
    )
    p = _command(commands, "launch", "Write a job script that starts servers on a cluster's nodes.", example)
    p.add_argument("--template", choices=tuple(SUBMIT), required=True, help="the script of which batch system")
    p.add_argument("--model", metavar="M", help="the model to serve, a name or a path; the server's own by default")
    p.add_argument("--nodes", metavar="N", type=_count, required=True, help="nodes of the job")
    p.add_argument("--per-node", metavar="K", type=_count, default=1, help="servers of each node (1)")
    p.add_argument("--gpus", metavar="G", type=_count, default=1, help="GPUs, or tiles, of each server (1)")
    p.add_argument("--port", metavar="P", type=_count, default=8000, help="port of each node's first server (8000)")
    p.add_argument("--walltime", metavar="H:MM:SS", default="1:00:00", help="(1:00:00)")
    p.add_argument("--suffix", metavar="TEXT", default="",
                   help="what follows the nodes' names, in place of a domain: .hsn.example.org")  # fmt: skip
    p.add_argument("--hostfile", metavar="H", type=Path, default=Path("agents.hostfile"),
                   help="where the job lists its servers once they are up (agents.hostfile)")  # fmt: skip
    p.add_argument("--engine", choices=("vllm",), default="vllm", help="what serves (vllm)")
    p.add_argument("--command", metavar="WORDS", default="vllm serve", type=shlex.split, dest="server",
                   help="how it is called: 'apptainer exec --nv vllm.sif vllm serve' (vllm serve)")  # fmt: skip
    p.add_argument("--setup", metavar="LINE", action="append", default=[],
                   help="a line of shell before that, on each node: 'module load frameworks'; repeatable")  # fmt: skip
    p.add_argument("-o", "--output", metavar="SCRIPT", type=Path, help="the script; named as its template by default")
    p.add_argument("--overwrite", action="store_true", help="replace SCRIPT if it exists")
    p.add_argument("options", metavar="OPTION", nargs="*", help="options of the server, after --")


def _add_serve(commands: Any) -> None:
    example = (
        "example, in two terminals:\n  swarmkit serve --engine echo\n"
        f"  swarmkit probe --url http://127.0.0.1:8000 --api-key-env {SERVE_KEY}\n\n"
        f"The key is the value of ${SERVE_KEY}. If that is not set, a random key is\n"
        "written to a file that only you can read, and a message shows how to load it in\n"
        "the second terminal. Only this machine can reach the endpoint. Ctrl-C stops it.\n"
    )
    p = _command(commands, "serve", "Run an OpenAI-compatible endpoint on this machine.", example)
    p.add_argument("--engine", choices=("auto", "echo", "openvino", "wordllama"), default="auto",
                   help="openvino: a small model on the CPU; echo: no model; wordllama: embeddings, no text; auto: "
                   "openvino if installed")  # fmt: skip
    p.add_argument("--port", metavar="P", type=int, default=8000, help="0 takes a free one (8000)")
    p.add_argument("--model", help="openvino: a GGUF file; echo: the model's name")
    p.add_argument("--fault", metavar="SPEC", action="append", default=[],
                   help="inject a fault: --fault http_500:probability=0.1; repeatable")  # fmt: skip
    p.add_argument("--option", metavar="NAME=JSON", action="append", default=[],
                   help="another option of swarmkit.local: --option tokens_per_s=50; repeatable")  # fmt: skip


def _add_demo(commands: Any) -> None:
    example = (
        "example:\n  swarmkit demo\n\nIt takes one to three minutes. The first time, it downloads the model (93 MB).\n"
    )
    p = _command(commands, "demo", "Run a demonstration: two endpoints here, a table of genes.", example)
    p.add_argument("--n", metavar="N", type=_count, default=2, help="endpoints to start (2)")
    p.add_argument("--engine", choices=("auto", "openvino", "echo"), default="auto", help="as for swarmkit serve")
    p.add_argument("--limit", metavar="ROWS", type=_count, default=64, help="rows of the table, of 397 (64)")
