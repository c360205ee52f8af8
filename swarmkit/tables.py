"""Tables from files, to files and in a terminal, without changing what they hold.

The values of CSV and TSV files stay the text they are: a code such as ``007`` or the answer ``None`` comes out
as it went in, and only an empty field is missing. JSON lines keep Python's own numbers and texts.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import io
import itertools
import json
import math
import os
import secrets
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pandas as pd

from .errors import SettingError
from .prompts import placeholders

__all__ = ["Output", "Source", "Writer", "clean", "find_files", "numbers", "plan_output", "scan", "text_table", "write"]

_SCANNED = 10_000
"""Rows looked through at a time."""

_NULLABLE = [pd.Int8Dtype(), pd.Int16Dtype(), pd.Int32Dtype(), pd.Int64Dtype(), pd.UInt8Dtype(), pd.UInt16Dtype(),
             pd.UInt32Dtype(), pd.UInt64Dtype()]  # fmt: skip

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


@dataclass(slots=True)
class Source:
    """Tables that were looked through once, to be read in chunks; made by ``scan``.

    Attributes
    ----------
    rows : int
        Rows of all files.
    columns : list of str
        Columns of all files, in the order in which they come up.
    types : dict of str to pyarrow.DataType
        Their types in a Parquet file; empty where none is to be written.
    notes : list of str
        What a person should know: files whose columns differ.
    """

    files: Sequence[Path]
    limit: int | None
    na: Sequence[str]
    rows: int = 0
    columns: list[str] = field(default_factory=list)
    types: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def chunks(self, rows: int) -> Iterator[pd.DataFrame]:
        """The rows in frames of about as many as asked for, all with all columns and one index from 0 over all."""
        held: list[pd.DataFrame] = []
        done = count = 0
        for _, part in _parts(self, rows):
            for name in [c for c in self.columns if c not in part.columns]:
                part[name] = pd.Series([None] * len(part), part.index, dtype=object)
            held.append(part if list(part.columns) == self.columns else part[self.columns])
            count += len(part)
            if count >= rows or done + count == self.rows:
                # Frames without rows would have a say in the dtypes of the others.
                full = [p for p in held if len(p)] or held[:1]
                frame = full[0] if len(full) == 1 else pd.concat(full)
                frame.index = pd.RangeIndex(done, done + count)
                yield frame
                done, count, held = done + count, 0, []
                if done == self.rows:
                    return

    def read(self) -> pd.DataFrame:
        """All rows in one frame."""
        return next(self.chunks(self.rows))


def scan(files: Sequence[Path], output: Output, limit: int | None = None, na: Sequence[str] = ()) -> Source:
    """Look through files before anything is sent: whether they can be read, and their rows, columns and types.

    Parameters
    ----------
    files : sequence of Path
        From ``find_files``.
    output : Output
        Where their rows will go.
    limit : int, optional
        Rows to read at most.
    na : sequence of str
        Texts that stand for a missing value in CSV and TSV files, beside the empty one.

    Raises
    ------
    SettingError
        A file cannot be read, or not be written as Parquet afterwards; the message says which.
    """
    source = Source(files, limit, na)
    known: dict[Path, dict[str, None]] = {}
    for file, part in _parts(source, _SCANNED):
        source.rows += len(part)
        known.setdefault(file, {}).update(dict.fromkeys(part.columns))
        if output.format == "parquet":
            _add_types(source.types, part)
    source.columns = list(dict.fromkeys(name for names in known.values() for name in names))
    first, *others = known
    for file in others:
        if odd := sorted({*map(str, known[first])} ^ {*map(str, known[file])}):
            source.notes.append(f"{file} and {first} do not share the columns {', '.join(odd)}")
    return source


def _add_types(types: dict[str, Any], part: pd.DataFrame) -> None:
    import pyarrow as pa

    for name in part.columns:
        try:
            schemas = [pa.schema([("", pa.array(part[name], from_pandas=True).type)])]
            schemas += [pa.schema([("", types[name])])] if name in types else []
            types[name] = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
        except (pa.ArrowException, TypeError) as exc:
            raise SettingError(f"column {name!r} cannot be written as Parquet ({exc}); write .jsonl instead") from exc


def _parts(source: Source, rows: int) -> Iterator[tuple[Path, pd.DataFrame]]:
    """The files' rows as they come, in frames of ``rows`` at most, up to the limit."""
    left = math.inf if source.limit is None else source.limit
    for file in source.files:
        try:
            for part in _READERS[format_of(file)](file, rows, source.na):
                part = part if len(part) <= left else part.iloc[: int(left)]
                left -= len(part)
                yield file, part
                if left <= 0:
                    return
        except (OSError, ValueError, EOFError) as exc:  # pandas' parser errors are ValueErrors, pyarrow's are too
            raise SettingError(f"cannot read {file}: {exc}") from exc


def _parquet_parts(file: Path, rows: int, na: Sequence[str]) -> Iterator[pd.DataFrame]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Else a column of whole numbers would be floats in those parts that miss one.
    kinds: dict[Any, Any] = {getattr(pa, t.name.lower())(): t for t in _NULLABLE}
    with pq.ParquetFile(file) as opened:
        batches: Iterable[Any] = opened.iter_batches(rows)
        if not opened.metadata.num_rows:
            batches = [pa.RecordBatch.from_pylist([], opened.schema_arrow)]
        for batch in batches:
            frame = pa.Table.from_batches([batch]).to_pandas(types_mapper=kinds.get)
            # An index that says something becomes columns: other formats have none.
            yield frame if isinstance(frame.index, pd.RangeIndex) else frame.reset_index()


def _text_parts(file: Path, rows: int, na: Sequence[str]) -> Iterator[pd.DataFrame]:
    sep = "," if format_of(file) == "csv" else "\t"
    with pd.read_csv(
        file, sep=sep, dtype=str, keep_default_na=False, na_values=["", *na], encoding="utf-8-sig", chunksize=rows
    ) as parts:
        for part in parts:
            if not isinstance(part.index, pd.RangeIndex):
                raise ValueError("its rows have more fields than its header")
            yield part


def _jsonl_parts(file: Path, rows: int, na: Sequence[str]) -> Iterator[pd.DataFrame]:
    with _opened(file, "rt") as lines:
        records = _records(lines)
        while True:
            part = list(itertools.islice(records, rows))
            yield pd.DataFrame(part, dtype=object)
            if len(part) < rows:
                return


def _records(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as exc:
            raise ValueError(f"line {number} is not JSON ({exc})") from exc
        if not isinstance(record, dict):
            raise ValueError(f"line {number} is not a JSON object")
        yield record


_READERS = {"parquet": _parquet_parts, "csv": _text_parts, "tsv": _text_parts, "jsonl": _jsonl_parts}


def _opened(file: Path, mode: str, named: Path | None = None) -> IO[Any]:
    """Open a text, packed as its suffix says, or that of the name it will have."""
    import bz2
    import gzip
    import lzma

    encoding = "utf-8-sig" if mode == "rt" else "utf-8"
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get((named or file).suffix.lower(), open)
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

    @property
    def part(self) -> Path | None:
        """The name of the file while it is being written."""
        return self.path and self.path.with_name(self.path.name + ".part")

    def __str__(self) -> str:
        return "the standard output" if self.path is None else str(self.path)


def plan_output(
    target: str,
    files: Sequence[Path],
    *,
    stdout: str = "csv",
    overwrite: bool = False,
    only_missing: bool = False,
    stored: bool = False,
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
    stored : bool, default False
        Whether answers are in a store as well: then what a killed process left may be replaced.

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
    output = Output(path, form)
    if output.part and output.part.exists() and not overwrite and not stored:
        raise SettingError(
            f"{target}.part is there already: what a killed process left of {target}. Take its answers out of there "
            "and remove it, or --overwrite replaces it"
        )
    return output


class Writer:
    """Writes a table frame by frame, each as soon as it is there.

    A file is written under the name ``OUTPUT.part`` and takes OUTPUT's name, and its place, when it is complete.
    What a killed process leaves there can be read up to its last line; a Parquet file cannot, since it has its
    table of contents at its end.

    Parameters
    ----------
    output : Output
        Where it goes.
    types : dict of str to pyarrow.DataType
        Types in a Parquet file, of those columns where the first frame alone does not tell.
    """

    def __init__(self, output: Output, types: Mapping[str, Any] | None = None) -> None:
        self._output = output
        self._types = types or {}
        self._columns: list[str] = []
        self._path, self._format = output.part, output.format
        self._file: Any = None
        self._problem: Exception | None = None

    def add(self, frame: pd.DataFrame) -> None:
        """Append a frame. All have the columns of the first.

        If that fails, this frame and those after it go to a file of JSON lines among the temporary files: results
        are not to be lost to a full disk.
        """
        try:
            self._add(frame)
        except BrokenPipeError:
            raise
        except Exception as exc:  # whatever it is, the rows are worth more
            if self._problem or self._path is None:
                raise
            self._rescue(exc)
            self._add(frame)

    def _add(self, frame: pd.DataFrame) -> None:
        if self._file is None:
            self._columns = list(frame.columns)
            self._open(frame)
        if self._format == "parquet":
            import pyarrow as pa

            self._file.write_table(pa.Table.from_pandas(frame, self._file.schema, preserve_index=False))
        else:
            _write_text(frame, self._file, self._format, header=self._columns)
            self._columns = []
            self._file.flush()

    def _open(self, frame: pd.DataFrame) -> None:
        if self._path is None:
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(encoding="utf-8", errors="replace")
            self._file = sys.stdout
        elif self._format == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            schema = pa.Schema.from_pandas(frame, preserve_index=False)
            for i, name in enumerate(schema.names):
                found = pa.string() if schema.types[i] == pa.null() else schema.types[i]
                schema = schema.set(i, pa.field(name, self._types.get(name, found)))
            self._file = pq.ParquetWriter(self._path, schema)
        else:
            self._file = _opened(self._path, "wt", self._output.path)

    def _rescue(self, exc: Exception) -> None:
        self._problem = exc
        with contextlib.suppress(Exception):  # a Parquet file's end, so that what is there can be read
            self._file.close()
        self._path, self._format = Path(tempfile.gettempdir(), f"swarmkit-{secrets.token_hex(4)}.jsonl"), "jsonl"
        self._file = None

    def close(self) -> str:
        """End it, and give it its name.

        Returns
        -------
        str
            Where it went.
        """
        if self._path is None or self._file is None:
            return str(self._output)
        try:
            self._file.close()
            with self._path.open("rb+") as file:
                os.fsync(file.fileno())
            if self._problem is None and self._output.path:
                self._path.replace(self._output.path)
        except OSError as exc:
            self._problem = self._problem or exc
        if self._problem is None:
            return str(self._output)
        left = (
            f" (what came before is in {self._output.part})" if self._output.part and self._output.part.exists() else ""
        )
        return f"{self._path}, since {self._output.path} could not be written ({self._problem}){left}"


def write(frame: pd.DataFrame, output: Output) -> str:
    """Write a frame; an existing file is replaced at once or not at all. Returns where it went."""
    writer = Writer(output)
    writer.add(frame)
    return writer.close()


def _write_text(frame: pd.DataFrame, file: IO[str], form: str, header: Sequence[str]) -> None:
    if form == "jsonl":
        columns = [_values(frame.iloc[:, i]) for i in range(frame.shape[1])]
        names = [str(name) for name in frame.columns]
        for row in zip(*columns, strict=True):
            line = json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False, default=_plain)
            file.write(line + "\n")
        return
    flat = {c: frame[c].map(_flat) for c in frame.columns if frame[c].dtype == object}
    sep = "," if form == "csv" else "\t"
    frame.assign(**flat).to_csv(file, sep=sep, index=False, header=bool(header), lineterminator="\n")


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
