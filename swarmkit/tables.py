"""Tables from files, to files and in a terminal, without changing what they hold.

The values of CSV and TSV files stay the text they are: a code such as ``007`` or the answer ``None`` comes out
as it went in, and only an empty field is missing. JSON lines keep Python's own numbers and texts.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import io
import json
import math
import os
import secrets
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pandas as pd

from .errors import SettingError
from .prompts import placeholders

__all__ = ["Output", "clean", "find_files", "numbers", "plan_output", "read", "text_table", "write"]

FORMATS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
_PACKED = (".gz", ".bz2", ".xz")
KNOWN = ".csv, .tsv, .jsonl, .ndjson (each also with .gz, .bz2 or .xz) and .parquet"
_NARROWEST = 6


def format_of(path: Path) -> str:
    """The format that a file's suffix stands for: "csv", "tsv", "jsonl" or "parquet".

    Raises
    ------
    SettingError
        No format has this suffix, or pyarrow is not there for Parquet.
    """
    packed = path.suffix.lower() in _PACKED
    found = FORMATS.get(Path(path.stem if packed else path.name).suffix.lower())
    if found is None or (packed and found == "parquet"):
        raise SettingError(f"{path}: the suffix says no format that is known; there are {KNOWN}")
    if found == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise SettingError(f'{path}: Parquet needs pyarrow: pip install "swarmkit-frames[parquet]"')
    return found


# ---- reading ------------------------------


def find_files(inputs: Iterable[str]) -> list[Path]:
    """The files that some files, folders and globs mean, each once.

    Parameters
    ----------
    inputs : iterable of str
        A folder stands for the tables directly in it, a glob for what it matches; both in the order of names.

    Raises
    ------
    SettingError
        One of them means no file, or a file of no known format.
    """
    found: dict[Path, Path] = {}
    for text in inputs:
        path = Path(text).expanduser()
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith(".") and _is_table(p))
            if not files:
                raise SettingError(f"there is no table in the folder {text}; tables end in {KNOWN}")
        elif path.is_file():
            files = [path]
        else:
            files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
            if not files:
                raise SettingError(f"there is no input {text!r} here ({Path.cwd()})")
        for file in files:
            format_of(file)
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _is_table(path: Path) -> bool:
    stem = path.stem if path.suffix.lower() in _PACKED else path.name
    return Path(stem).suffix.lower() in FORMATS


def read(files: Sequence[Path], limit: int | None = None, na: Sequence[str] = ()) -> tuple[pd.DataFrame, list[str]]:
    """Read files into one frame, row after row.

    Parameters
    ----------
    files : sequence of Path
        From ``find_files``.
    limit : int, optional
        Rows to read at most.
    na : sequence of str
        Texts that stand for a missing value in CSV and TSV files, beside the empty one.

    Returns
    -------
    frame : pandas.DataFrame
        With a plain index from 0.
    notes : list of str
        What a person should know: files whose columns differ.

    Raises
    ------
    SettingError
        A file cannot be read; the message has its name.
    """
    parts: list[pd.DataFrame] = []
    notes: list[str] = []
    left = math.inf if limit is None else limit
    for file in files:
        part = _read_one(file, na)
        part = part if len(part) <= left else part.iloc[: int(left)]
        if parts and (odd := sorted(set(map(str, parts[0].columns)) ^ set(map(str, part.columns)))):
            notes.append(f"{file} and {files[0]} do not share the columns {', '.join(odd)}")
        parts.append(part)
        left -= len(part)
        if left <= 0:
            break
    # Frames without rows would have a say in the dtypes of the others.
    full = [p for p in parts if len(p)] or parts[:1]
    return (full[0] if len(full) == 1 else pd.concat(full)).reset_index(drop=True), notes


def _read_one(file: Path, na: Sequence[str]) -> pd.DataFrame:
    form = format_of(file)
    try:
        if form == "parquet":
            frame = pd.read_parquet(file)
            # An index that says something becomes columns: other formats have none.
            return frame if isinstance(frame.index, pd.RangeIndex) else frame.reset_index()
        if form == "jsonl":
            return _read_jsonl(file)
        sep = "," if form == "csv" else "\t"
        missing = ["", *na]
        frame = pd.read_csv(file, sep=sep, dtype=str, keep_default_na=False, na_values=missing, encoding="utf-8-sig")
    except (OSError, ValueError, EOFError) as exc:  # pandas' parser errors are ValueErrors, pyarrow's are too
        raise SettingError(f"cannot read {file}: {exc}") from exc
    if not isinstance(frame.index, pd.RangeIndex):
        raise SettingError(f"cannot read {file}: its rows have more fields than its header")
    return frame


def _read_jsonl(file: Path) -> pd.DataFrame:
    records: list[dict[str, Any]] = []
    with _opened(file, "rt") as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as exc:
                raise ValueError(f"line {number} is not JSON ({exc})") from exc
            if not isinstance(record, dict):
                raise ValueError(f"line {number} is not a JSON object")
            records.append(record)
    return pd.DataFrame(records, dtype=object)


def _opened(file: Path, mode: str) -> IO[Any]:
    import bz2
    import gzip
    import lzma

    encoding = "utf-8-sig" if mode == "rt" else "utf-8"
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(file.suffix.lower(), open)
    # A lone surrogate in one answer must not cost all the others.
    errors = "strict" if mode == "rt" else "replace"
    opened: IO[Any] = opener(file, mode, encoding=encoding, errors=errors)
    return opened


def numbers(frame: pd.DataFrame, template: str) -> pd.DataFrame:
    """The frame with those text columns as numbers that the template formats as numbers (``{score:.2f}``).

    Examples
    --------
    >>> numbers(pd.DataFrame({"id": ["007"], "start": ["362455"]}), "{id}: {start:,}").values.tolist()
    [['007', 362455]]
    """
    if template in frame.columns:
        return frame
    changed = {}
    for _, name, spec in placeholders(template, frame.columns):
        if name is None or not spec or not pd.api.types.is_string_dtype(frame[name]):
            continue
        try:
            format("", spec)
        except ValueError:  # no format of a text: left to fail there where the column holds no numbers
            with contextlib.suppress(ValueError, TypeError):
                changed[name] = pd.to_numeric(frame[name], dtype_backend="numpy_nullable")
    return frame.assign(**changed)


# ---- writing ------------------------------


@dataclass(frozen=True, slots=True)
class Output:
    """Where a table goes.

    Attributes
    ----------
    path : Path or None
        None is the standard output.
    format : str
        "csv", "tsv", "jsonl" or "parquet".
    """

    path: Path | None
    format: str

    def __str__(self) -> str:
        return "the standard output" if self.path is None else str(self.path)


def plan_output(
    target: str, files: Sequence[Path], *, stdout: str = "csv", overwrite: bool = False, only_missing: bool = False
) -> Output:
    """Check where a table is to go, before anything is spent on making it.

    Parameters
    ----------
    target : str
        A file, or "-" for the standard output.
    files : sequence of Path
        The inputs.
    stdout : str, default "csv"
        Format for the standard output.
    overwrite : bool, default False
        Whether a file that is there may be replaced.
    only_missing : bool, default False
        Whether the one input is being completed: then it may be the output, too.

    Raises
    ------
    SettingError
        It cannot or must not be written there.
    """
    if target == "-":
        return Output(None, stdout)
    path = Path(target).expanduser().resolve()
    form = format_of(path)
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise SettingError(f"cannot write {target}: the folder {path.parent} is not there or not writable")
    if path.is_dir():
        raise SettingError(f"cannot write {target}: it is a folder")
    is_input = path in [f.resolve() for f in files]
    if is_input and len(files) > 1:
        raise SettingError(f"{target} is one of the {len(files)} inputs; write to another file")
    if path.exists() and not overwrite and not (is_input and only_missing):
        if is_input:
            raise SettingError(f"{target} is the input; --overwrite replaces it")
        raise SettingError(
            f"{target} is there already; --overwrite replaces it, and to complete it, give it as the input with "
            "--only-missing"
        )
    return Output(path, form)


def check_types(frame: pd.DataFrame, output: Output) -> None:
    """Raise SettingError now where the input could not be written afterwards."""
    if output.format != "parquet":
        return
    import pyarrow as pa

    for name in frame.columns:
        if frame[name].dtype == object:
            try:
                pa.array(frame[name], from_pandas=True)
            except pa.ArrowException as exc:
                raise SettingError(
                    f"column {name!r} cannot be written as Parquet ({exc}); write .jsonl instead"
                ) from exc


def write(frame: pd.DataFrame, output: Output) -> str:
    """Write a frame; an existing file is replaced at once or not at all.

    Returns
    -------
    str
        Where it went. If that failed, a file of JSON lines among the temporary files, with the reason: results
        are not to be lost to a full disk.
    """
    if output.path is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", errors="replace")
        _write_text(frame, sys.stdout, output.format)
        sys.stdout.flush()
        return str(output)
    try:
        _write_file(frame, output.path, output.format)
    except Exception as exc:  # noqa: BLE001 - whatever it is, the rows are worth more
        rescue = Path(tempfile.gettempdir(), f"swarmkit-{secrets.token_hex(4)}.jsonl")
        _write_file(frame, rescue, "jsonl")
        return f"{rescue}, since {output.path} could not be written ({exc})"
    return str(output)


def _write_file(frame: pd.DataFrame, path: Path, form: str) -> None:
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        if form == "parquet":
            frame.to_parquet(temporary, index=False)
        else:
            with _opened(temporary, "wt") as file:
                _write_text(frame, file, form)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_text(frame: pd.DataFrame, file: IO[str], form: str) -> None:
    if form == "jsonl":
        columns = [_values(frame.iloc[:, i]) for i in range(frame.shape[1])]
        names = [str(name) for name in frame.columns]
        for row in zip(*columns, strict=True):
            line = json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False, default=_plain)
            file.write(line + "\n")
        return
    flat = {c: frame[c].map(_flat) for c in frame.columns if frame[c].dtype == object}
    frame.assign(**flat).to_csv(file, sep="," if form == "csv" else "\t", index=False, lineterminator="\n")


def _values(column: pd.Series) -> list[Any]:
    return [None if gone else value for value, gone in zip(column.tolist(), column.isna().to_numpy(), strict=True)]


def _flat(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=_plain) if isinstance(value, (dict, list)) else value


def _plain(value: Any) -> Any:
    """What JSON has no form for: arrays become lists, dates and the rest text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


# ---- in a terminal ------------------------------


def clean(text: object) -> str:
    """One printable line of a text: models and servers must not move the cursor of a terminal.

    Examples
    --------
    >>> clean("a\\n b\\x1b[31m")
    'a b [31m'
    """
    shown = "".join(c if c.isprintable() else " " for c in str(text))
    return " ".join(shown.split())


def text_table(rows: Sequence[Sequence[object]], header: Sequence[str], width: int) -> str:
    """A table of text for a terminal; the widest columns are cut until the lines fit.

    Parameters
    ----------
    rows : sequence of sequence
        A row with fewer values than the header runs on from its last one to the end of the line.
    header : sequence of str
        Names of the columns.
    width : int
        Characters of a line.

    Examples
    --------
    >>> print(text_table([("thrA", "an enzyme of four steps")], ("gene", "product"), 20))
    gene  product
    thrA  an enzyme of…
    """
    cells = [list(header), *([clean(value) for value in row] for row in rows)]
    count = len(header)
    widths = [max((len(c[i]) for c in cells if len(c) > i and (len(c) == count or i < len(c) - 1)), default=0)
              for i in range(count)]  # fmt: skip
    while sum(widths) + 2 * (count - 1) > width and max(widths) > _NARROWEST:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for cell in cells:
        last = len(cell) - 1
        room = width - sum(widths[:last]) - 2 * last
        parts = [_cut(text, room if i == last else widths[i]).ljust(widths[i]) for i, text in enumerate(cell)]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)].rstrip() + "…"
