"""The command line's arguments: what there is to say, and what ``--help`` tells of it."""

from __future__ import annotations

import argparse
from enum import IntEnum
from pathlib import Path
from typing import Any

__all__ = ["SERVE_KEY", "Exit", "ProbeExit", "parser"]


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
CHUNK_ROWS = 20_000


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; ``args.command`` says which command it read."""
    from . import __version__

    top = argparse.ArgumentParser(
        prog="swarmkit", description="Push a table's column of prompts through a swarm of LLM endpoints.",
        epilog="swarmkit COMMAND --help has an example of each. New here? swarmkit demo",
    )  # fmt: skip
    top.add_argument("--version", action="version", version=f"swarmkit {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_scatter, _add_tree_reduce, _add_compare, _add_probe, _add_wait, _add_serve, _add_demo):
        add(commands)
    return top


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
        group.add_argument(
            "--store", metavar="FOLDER", help="keep finished rows there; the same call again asks the rest"
        )
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
        "Files are read, asked and written in chunks, so they may be larger than memory. Until it is\n"
        "complete OUTPUT is called OUTPUT.part; what a killed process leaves there can be read up to its\n"
        "last line (Parquet cannot), and with --store the same command asks only the rest.\n\n"
        "Values of CSV and TSV files are text, and come out as they went in.\n\n" + CODES
    )
    p = _command(commands, "scatter", "Ask one question per row, and write the table with the answers.", example)
    p.add_argument("--prompt", metavar="TEMPLATE", required=True, help="text with {column} placeholders, or a column")
    p.add_argument("--n", metavar="N", type=_count, default=1, help="answers a row (1)")
    p.add_argument(
        "--details", action="store_true", help="add columns: finish reason, endpoint, tokens, time, tries..."
    )
    p.add_argument("--only-missing", action="store_true", help="ask only rows without an answer, keep the others")
    p.add_argument("--chunk-rows", metavar="N", type=_count, default=CHUNK_ROWS,
                   help=f"rows asked and written at a time; three times that are under way ({CHUNK_ROWS})")  # fmt: skip
    _add_send_options(p, "answers")


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
    p.set_defaults(mode=None)


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


def _add_wait(commands: Any) -> None:
    example = (
        "example, in a batch job that starts its own servers:\n"
        "  swarmkit wait --hostfile agents.hostfile --output ready.hostfile --min 0.9 && \\\n"
        "    swarmkit scatter papers.csv --hostfile ready.hostfile --prompt ... -o answers.csv\n\n"
        f"exit codes:\n  {Exit.OK:<4} enough endpoints are up\n  {Exit.USAGE:<4} wrong usage\n"
        f"  {Exit.NO_ENDPOINT:<4} the time was over before enough were up\n"
    )
    p = _command(commands, "wait", "Wait for a cluster's servers to come up; write a hostfile of those.", example)
    p.add_argument("--output", metavar="READY", type=Path, help="where the hostfile of the healthy ones goes")
    p.add_argument("--min", metavar="N", type=_share, default=1.0, dest="min_ready",
                   help="endpoints that are enough: a number (90) or a share (0.9); all by default")  # fmt: skip
    p.add_argument("--timeout", metavar="S", type=float, default=3600.0, help="seconds until one is up (3600)")
    p.add_argument("--patience", metavar="S", type=float, default=300.0,
                   help="seconds from the first healthy one until the others are left out (300)")  # fmt: skip
    p.add_argument("--every", metavar="S", type=float, default=5.0, help="seconds between two looks (5)")
    p.add_argument("--quiet", action="store_true", help="say nothing while waiting")
    _add_endpoint_options(p)


def _share(text: str) -> float | int:
    try:
        return float(text) if "." in text else _count(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of endpoints nor a share, as 0.9") from None


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


def _add_demo(commands: Any) -> None:
    example = (
        "example:\n  swarmkit demo\n\nThe first time, it fetches the model (93 MB). It takes one to three minutes.\n"
    )
    p = _command(commands, "demo", "See it work: two endpoints on this machine, a table of genes.", example)
    p.add_argument("--n", metavar="N", type=_count, default=2, help="endpoints to start (2)")
    p.add_argument("--engine", choices=("auto", "openvino", "echo"), default="auto", help="as for swarmkit serve")
    p.add_argument("--limit", metavar="ROWS", type=_count, default=64, help="rows of the table, of 397 (64)")
