"""Files that fail: full disks, folders that go away, damaged stores; no row that was paid for is lost."""

import contextlib
import gc
import itertools
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from needs import need
from test_cli import KEY, environment, run

import swarmkit as sk
from swarmkit.runs.events import RunEnded, RunEvent

pytestmark = pytest.mark.slow

ROWS = pd.DataFrame({"i": range(200)})


def mounted(path: Path, size: str) -> bool:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True)
    return done.returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 64 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    need(mounted(path, "64k"), "the right to mount a tmpfs, as a small disk")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def fill(disk: Path, leave: int = 0) -> None:
    """Fill a disk but for some pages of 4 KiB."""
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while file.write(b"x" * 4096) == 4096:
            pass
    with (disk / "filler").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - leave * 4096)


def rows_sent(pool: sk.VLLMPool, swarm: sk.LocalSwarm) -> int:
    from test_swarm import requests_served

    return sum(requests_served(swarm).values())


# ---- a store that cannot be written ------------------------------


@pytest.mark.parametrize("kind", ["full", "full folder", "read-only", "a link to nowhere", "below a file"])
def test_a_store_that_cannot_be_written_is_noticed_before_a_row_is_sent(
    small_disk: Path, tmp_path: Path, kind: str
) -> None:
    store = small_disk / "store"
    if kind == "full folder":
        store.mkdir()
    if kind.startswith("full"):
        fill(small_disk)
    elif kind == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    elif kind == "a link to nowhere":
        store.symlink_to(tmp_path / "nowhere" / "store")
    else:
        store.write_text("")
        store = store / "below"
    with sk.local(1, engine="echo") as swarm, sk.connect(swarm, chat=None, delivery="batch") as pool:
        ROWS.swarm.scatter("warm up {i}")
        before = rows_sent(pool, swarm)
        with pytest.raises(sk.StoreError, match=str(store)):
            ROWS.swarm.scatter("n {i}", store=store)
        with pytest.raises(sk.StoreError, match=str(store)):
            ROWS.swarm.tree_reduce("i", "{responses}", store=store)
        assert rows_sent(pool, swarm) == before
    left = [*store.iterdir()] if store.is_dir() else []
    assert left == [], "half a segment is no segment"


def test_a_disk_that_fills_up_ends_the_run_with_the_rows_so_far(small_disk: Path) -> None:
    df = pd.DataFrame({"i": range(3000)})
    with sk.local(1, engine="echo") as swarm, sk.connect(swarm) as pool:
        with pytest.raises(sk.StoreError, match="No space left") as caught:
            df.swarm.scatter("n {i}", store=small_disk / "store")
        frame = caught.value.frame
        answered = frame["response"].notna()
        assert len(frame) == 3000
        assert 50 < answered.sum() < 3000
        assert (frame["response"][answered] == "echo: n " + df["i"].astype(str)[answered]).all()
        assert set(frame["response_error"][~answered]) == {"not finished: the store failed"}
        kept = len(sk.open_store(small_disk / "store"))
        assert 50 < kept <= answered.sum()
        subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
        again = df.swarm.scatter("n {i}", store=small_disk / "store", pool=pool)
        assert again["response"].notna().all()
        assert sk.last_run().stats.stored == kept


def test_a_run_that_is_cancelled_while_its_store_fails_is_not_reported_by_asyncio(
    small_disk: Path, echo: sk.LocalSwarm, caplog: pytest.LogCaptureFixture
) -> None:
    from test_faults import drive

    def stop(event: RunEvent) -> None:
        if isinstance(event, RunEnded):
            sk.last_run().cancel()

    with sk.connect(echo) as pool, contextlib.suppress(sk.CancelledError, sk.StoreError):
        drive(pool, [f"n {i}" for i in range(3000)], stop, delivery="rows", store=small_disk / "store")
    assert sk.last_run().state in ("cancelled", "failed")
    with sk.connect(echo) as pool:
        drive(pool, ["another"], delivery="rows")  # nothing refers to the first run any more
    gc.collect()
    assert [r.getMessage() for r in caplog.records if r.name == "asyncio"] == []


def test_a_stream_of_frames_ends_with_its_store_and_the_rows_so_far(small_disk: Path, echo: sk.LocalSwarm) -> None:
    frames = (pd.DataFrame({"i": range(k * 500, k * 500 + 500)}) for k in range(20))
    with sk.connect(echo) as pool, pytest.raises(sk.StoreError, match="No space left") as caught:
        for _ in sk.iter_scatter(frames, "n {i}", store=small_disk / "store", pool=pool):
            pass
    assert caught.value.frame["response"].notna().any()


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced", "emptied"])
def test_a_store_that_goes_away_ends_the_run_within_a_second_or_so(tmp_path: Path, how: str) -> None:
    store = tmp_path / "store"
    gone = []

    def take_away() -> None:
        if how == "moved" or how == "replaced":
            store.rename(tmp_path / "elsewhere")
            if how == "replaced":
                store.mkdir()
        elif how == "deleted":
            shutil.rmtree(store)
        else:
            next(store.iterdir()).unlink()
        gone.append(time.monotonic())

    with sk.local(1, engine="echo", latency_s=0.3, max_num_seqs=1) as swarm, sk.connect(swarm, chat=None):
        run = ROWS.swarm.submit("n {i}", store=store)
        while run.stats.answered < 2:
            time.sleep(0.02)
        take_away()
        with pytest.raises(sk.StoreError, match="deleted, moved or replaced") as caught:
            run.result(30)
        assert time.monotonic() - gone[0] < 2.0
        assert 2 <= caught.value.frame["response"].notna().sum() < 200
        assert run.state == "failed"


def test_a_store_is_only_written_where_rows_are_sent(tmp_path: Path, pool: sk.VLLMPool) -> None:
    ROWS.swarm.scatter("n {i}", store=tmp_path / "store")
    ROWS.swarm.scatter("n {i}", store=tmp_path / "store")
    ROWS[:0].swarm.scatter("n {i}", store=tmp_path / "empty")
    assert len([*(tmp_path / "store").iterdir()]) == 1
    assert not (tmp_path / "empty").exists()


def test_a_run_without_an_answer_leaves_no_segment(tmp_path: Path) -> None:
    with (
        sk.local(1, engine="echo", faults=["bad_row:marker=POISON"]) as swarm,
        sk.connect(swarm),
        pytest.warns(sk.SwarmWarning, match="3 of 3 rows failed"),
    ):
        ROWS[:3].swarm.scatter("POISON {i}", store=tmp_path / "store")
    assert [*(tmp_path / "store").iterdir()] == []


# ---- a store that is damaged ------------------------------


def stored(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


HEADER = b'{"swarmkit_store":1,"written_by":"0"}\n'
DAMAGE = {
    "no header": b'{"a": 1}\n',
    "no JSON": b"\x00\xff\xfe garbage\n" * 3,
    "a list for a header": b"[1]\n",
    "a version that is no number": b'{"swarmkit_store":"1"}\n',
    "nested lines": HEADER + b"[" * 200_000 + b"]" * 200_000 + b"\n",
    "nested objects": HEADER + b'{"ask":' * 100_000 + b"1" + b"}" * 100_000 + b"\n",
    "numbers without end": HEADER + b'{"ask":"a","key":"k","sample":' + b"9" * 100_000 + b"}\n",
    "a key that is a list": HEADER + b'{"ask":"a","key":["k"],"sample":0,"text":"t"}\n',
    "an ask that is a list": HEADER + b'{"ask":["a"],"key":"k","sample":0,"text":"t"}\n',
    "settings that are a list": HEADER + b'{"ask":["a"],"model":"m"}\n',
    "a model that is a list": HEADER + b'{"ask":"a","model":["m"]}\n',
    "a null line": HEADER + b"null\n",
    "an empty line": HEADER + b"\n",
}
FIELDS: dict[str, list[Any]] = {
    "sample": [None, "0", -1, 0.0, True, [0]],
    "text": [None, 5, ["t"], {"t": 1}],
    "finish_reason": [5, ["stop"]],
    "endpoint": [5, {}],
    "reasoning": [5],
    "prompt_tokens": ["5", -1, 2**40, 1.5, True, 10**400],
    "completion_tokens": ["5", {}],
    "latency_s": ["1", float("nan"), float("inf"), -1, []],
    "written_at": ["yesterday", 1e300, 10**400, {}],
}


@pytest.fixture
def full_store(tmp_path: Path, pool: sk.VLLMPool) -> Path:
    ROWS.swarm.scatter("n {i}", store=tmp_path / "store")
    return tmp_path / "store"


def all_stored(store: Path, pool: sk.VLLMPool, sent: int = 0) -> str:
    """Scatter again: the answers are right, ``sent`` rows were sent, and there was one warning, which is returned."""
    with pytest.warns(sk.SwarmWarning) as warned:
        frame = ROWS.swarm.scatter("n {i}", store=store, pool=pool)
    assert (frame["response"] == "echo: n " + ROWS["i"].astype(str)).all()
    assert sk.last_run().stats.answered == sent
    (warning,) = warned
    assert str(store) in str(warning.message)
    return str(warning.message)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_segment_is_skipped_with_one_warning(full_store: Path, pool: sk.VLLMPool, damage: str) -> None:
    (full_store / "0.jsonl").write_bytes(DAMAGE[damage])
    (full_store / "zzz.jsonl").write_bytes(DAMAGE[damage])
    assert "0.jsonl" in all_stored(full_store, pool)
    with pytest.warns(sk.SwarmWarning, match=r"zzz\.jsonl"):
        assert len(sk.open_store(full_store).to_frame()) == 200


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_a_wrong_type_is_a_damaged_line(full_store: Path, pool: sk.VLLMPool, field: str) -> None:
    (path,) = full_store.glob("*.jsonl")
    lines = path.read_text().splitlines()
    rows = [n for n, line in enumerate(lines) if '"key"' in line]
    for value, number in zip(FIELDS[field], rows, strict=False):
        lines[number] = json.dumps({**json.loads(lines[number]), field: value})
    path.write_text("\n".join(lines) + "\n")
    count = len(FIELDS[field])
    assert f"{count} line" in all_stored(full_store, pool, sent=count)
    with pytest.warns(sk.SwarmWarning, match=f"{count} line"):
        frame = sk.open_store(full_store).to_frame()
    assert len(frame) == 200


def test_what_is_no_file_is_skipped_and_blocks_nothing(full_store: Path, pool: sk.VLLMPool, tmp_path: Path) -> None:
    (full_store / "a.jsonl").mkdir()
    os.mkfifo(full_store / "b.jsonl")
    (full_store / "c.jsonl").symlink_to(tmp_path / "nowhere")
    (full_store / "d.jsonl").symlink_to("/dev/zero")
    (full_store / "e.jsonl").symlink_to("e.jsonl")
    began = time.monotonic()
    words = all_stored(full_store, pool)
    assert time.monotonic() - began < 10
    assert all(f"{name}.jsonl cannot be read" in words for name in "abcde")
    opened = sk.open_store(full_store)
    assert len(opened.segments()) == 1
    assert "1 file" in opened._repr_html_()
    assert "row" in repr(opened)


def test_a_line_without_end_does_not_fill_the_memory(full_store: Path, pool: sk.VLLMPool) -> None:
    (path,) = full_store.glob("*.jsonl")
    content = path.read_bytes()
    with (full_store / "0.jsonl").open("wb") as file:
        file.write(HEADER + b'{"key":"')
        file.truncate(3 << 30)  # three GiB of zeros, which take no place on the disk
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + content.split(b"\n", 1)[1])
    path.unlink()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "1 line of 0.jsonl" in all_stored(full_store, pool)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_compaction_keeps_what_it_cannot_read(full_store: Path, pool: sk.VLLMPool) -> None:
    (full_store / "0.jsonl").write_bytes(HEADER + b"garbage\n")
    (full_store / "1.jsonl").write_bytes(b"garbage\n")
    (full_store / "2.jsonl").mkdir()
    opened = sk.open_store(full_store)
    with pytest.warns(sk.SwarmWarning, match=r"0\.jsonl.*1\.jsonl.*2\.jsonl"):
        opened.compact()
    assert (full_store / "0.jsonl").read_bytes() == HEADER + b"garbage\n"
    assert (full_store / "1.jsonl").exists()
    assert len(opened.segments()) == 3
    all_stored(full_store, pool)


def test_compaction_on_a_full_disk_leaves_the_store_as_it_was(small_disk: Path, pool: sk.VLLMPool) -> None:
    ROWS[:100].swarm.scatter("n {i}", store=small_disk)
    before = stored(small_disk)
    fill(small_disk)
    with pytest.raises(sk.StoreError, match="No space left"):
        sk.open_store(small_disk).compact()
    assert stored(small_disk) == before
    assert [path for path in small_disk.iterdir() if path.suffix == ".tmp"] == []


def test_a_lone_surrogate_of_a_model_is_stored_and_found(tmp_path: Path) -> None:
    from scripted import Call, Scripted

    def script(call: Call) -> None:
        if "GET" in call.headers:
            call.reply(b'{"data": [{"id": "m"}]}')
        else:
            choices = ",".join(
                f'{{"index": {i}, "text": "half \\\\ud83d", "finish_reason": "stop"}}' for i in range(len(call.prompts))
            )
            call.reply(f'{{"choices": [{choices}]}}'.encode())

    with Scripted(script) as server, sk.connect(server.address, chat=None, delivery="batch") as pool:
        first = ROWS[:2].swarm.scatter("{i}", store=tmp_path, pool=pool)
        again = ROWS[:2].swarm.scatter("{i}", store=tmp_path, pool=pool)
    assert first["response"].tolist() == again["response"].tolist()
    assert sk.last_run().stats.answered == 0


# ---- the command line: the rows of the input ------------------------------

PARQUET = [pytest.param("csv", id="csv"), pytest.param("jsonl", id="jsonl"), pytest.param("parquet", id="parquet")]


def write_table(frame: pd.DataFrame, path: Path) -> Path:
    match path.suffix:
        case ".csv":
            frame.to_csv(path, index=False)
        case ".jsonl":
            frame.to_json(path, orient="records", lines=True)
        case _:
            frame.to_parquet(path, index=False)
    return path


def read_table(path: Path) -> pd.DataFrame:
    match path.suffix:
        case ".csv":
            return pd.read_csv(path, dtype=str)
        case ".jsonl":
            return pd.read_json(path, lines=True, dtype=False)
        case _:
            return pd.read_parquet(path)


@pytest.fixture(scope="module")
def to() -> Iterator[tuple[object, ...]]:
    with sk.local(1, engine="echo", token=KEY) as swarm:
        yield "--url", swarm.urls[0], "--api-key-env", "TEST_KEY"


@pytest.mark.parametrize("suffix", PARQUET)
def test_a_limit_asks_fewer_rows_and_keeps_all(tmp_path: Path, to: tuple[object, ...], suffix: str) -> None:
    file = tmp_path / f"ans.{suffix}"
    frame = pd.DataFrame({"id": [f"{i:03}" for i in range(102)], "q": [f"q{i}" for i in range(102)]})
    frame["response"] = [f"old {i}" if i % 2 else None for i in range(102)]
    frame["response_error"] = [None if i % 2 else f"failed before {i}" for i in range(102)]
    frame["response_endpoint"] = [f"node{i}" for i in range(102)]
    frame.loc[20, "q"] = None
    write_table(frame, file)
    os.chmod(file, 0o640)
    before = file.read_bytes()
    words = ["scatter", file, "--prompt", "{q}", "--only-missing", "--limit", 10, *to]
    for output in (["-o", file], ["-o", file, "--overwrite"], []):
        assert run(*words, *output).returncode == 2
        assert file.read_bytes() == before
    done = run(*words, "--in-place", "--chunk-rows", 7)
    assert done.returncode == 0, done.stderr
    assert "41 rows not asked, because of --limit" in done.stderr
    assert "--only-missing --in-place" in done.stderr
    got = read_table(file)
    assert got["id"].tolist() == frame["id"].tolist()
    assert got["response_endpoint"].tolist() == frame["response_endpoint"].tolist()
    expected = [f"old {i}" if i % 2 else f"echo: q{i}" if i < 20 else None for i in range(102)]
    assert got["response"].astype(object).where(got["response"].notna(), None).tolist() == expected
    assert got["response_error"][22:][::2].tolist() == [f"failed before {i}" for i in range(22, 102, 2)]
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert [*tmp_path.glob("*.part")] == []
    done = run("scatter", file, "--prompt", "{q}", "--only-missing", "-o", tmp_path / f"all.{suffix}", *to)
    assert done.returncode == 1, "one row has no prompt"
    assert len(read_table(tmp_path / f"all.{suffix}")) == 102


def test_a_limit_on_a_first_run_leaves_the_rest_without_an_answer(tmp_path: Path, to: tuple[object, ...]) -> None:
    write_table(ROWS, tmp_path / "in.csv")
    out = tmp_path / "out.csv"
    done = run("scatter", tmp_path / "in.csv", "--prompt", "{i}", "--n", 2, "--details", "--limit", 3, "-o", out, *to)
    assert done.returncode == 0
    assert "400 rows, 0 failed" in done.stderr
    assert "197 rows not asked" in done.stderr
    got = read_table(out)
    assert got["i"].tolist() == [str(i) for i in range(200) for _ in range(2)]
    assert got["response"].notna().tolist() == [True] * 6 + [False] * 394
    assert got["response_error"].isna().all()


def test_inputs_are_not_overwritten_by_any_name(tmp_path: Path, to: tuple[object, ...]) -> None:
    file = write_table(ROWS, tmp_path / "in.csv")
    (tmp_path / "hard.csv").hardlink_to(file)
    (tmp_path / "soft.csv").symlink_to(file)
    (tmp_path / "sub").mkdir()
    write_table(ROWS, tmp_path / "sub" / "a.csv")
    before = file.read_bytes()
    scatter = ["scatter", "--prompt", "{i}", "--overwrite", *to]
    reduce = ["tree-reduce", "--column", "i", "--prompt", "{responses}", "--overwrite", *to]
    for words in (
        [*scatter, file, "-o", tmp_path / "hard.csv"],
        [*scatter, file, "-o", tmp_path / "soft.csv"],
        [*scatter, file, tmp_path / "sub" / "a.csv", "-o", tmp_path / "sub" / "a.csv"],
        [*scatter, tmp_path / "sub", "-o", tmp_path / "sub" / "a.csv"],
        [*scatter, file, tmp_path / "sub" / "a.csv", "--in-place"],
        [*reduce, file, "-o", file],
        ["compare", file, "--prompt", "{i}", "--overwrite", "-o", file, *to],
        [*reduce, file, "-o", file, "--in-place"],
    ):
        done = run(*words)
        assert done.returncode == 2, words
        assert "in" in done.stderr
    assert run(*scatter, file).returncode == 2
    assert file.read_bytes() == before
    assert (tmp_path / "sub" / "a.csv").read_bytes() == before


def test_a_file_that_changes_in_the_meantime_is_not_replaced(tmp_path: Path) -> None:
    file = write_table(ROWS, tmp_path / "in.csv")
    with sk.local(1, engine="echo", token=KEY, latency_s=2.0) as slow:
        child = start("scatter", file, "--prompt", "{i}", "--in-place", "--url", slow.urls[0])
        while slow_requests(slow) == 0 and child.poll() is None:
            time.sleep(0.05)
        with file.open("a") as more:
            more.write("a new row\n")
        _, said = child.communicate(timeout=60)
    assert child.returncode == 4
    assert "in.csv.part, and not to" in said
    assert "changed" in said
    assert len(read_table(file)) == 201
    assert len(read_table(Path(f"{file}.part").rename(tmp_path / "part.csv"))) == 200


def test_an_input_that_goes_away_in_the_meantime_loses_no_answer(tmp_path: Path) -> None:
    file, out = tmp_path / "in.csv", tmp_path / "out.csv"
    write_table(pd.DataFrame({"i": range(2000)}).assign(more="long text " * 200), file)  # readers read ahead
    with sk.local(1, engine="echo", token=KEY, latency_s=1.0) as slow:
        words = ["scatter", file, "--prompt", "{i}", "-o", out, "--chunk-rows", 100, "--url", slow.urls[0]]
        child = start(*words)
        while not (tmp_path / "out.csv.part").exists() and child.poll() is None:
            time.sleep(0.05)
        file.write_text('i\n"')
        _, said = child.communicate(timeout=60)
    assert child.returncode == 4, said
    assert not out.exists()
    assert "out.csv.part, and not to" in said
    left = read_table(Path(f"{out}.part").rename(tmp_path / "part.csv"))
    assert 100 <= left["response"].notna().sum() < 2000


def start(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "swarmkit", *map(str, words), "--api-key-env", "TEST_KEY"],
        stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip


def slow_requests(swarm: sk.LocalSwarm) -> int:
    from test_swarm import requests_served

    return sum(requests_served(swarm).values())


# ---- the command line: outputs that cannot be written ------------------------------


def rescued(said: str) -> Path:
    """The file that the message names; only its user can read it."""
    found = re.search(r"written to (\S*/swarmkit-\S+?),? ", said + " ")
    assert found, said
    path = Path(found[1])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    return path


@pytest.mark.parametrize("chunk_rows", [200, 2000])
@pytest.mark.parametrize("suffix", ["csv", "tsv.gz", "jsonl", "jsonl.xz", "csv.bz2", "parquet"])
def test_on_a_full_disk_all_rows_are_in_a_file_that_is_named(
    small_disk: Path, tmp_path: Path, to: tuple[object, ...], suffix: str, chunk_rows: int
) -> None:
    words = np.random.default_rng(1).integers(0, 1 << 60, (2000, 4)).astype(str)  # they do not compress well
    frame = pd.DataFrame({"i": [" ".join(row) for row in words]})
    frame.to_json(tmp_path / "in.jsonl", orient="records", lines=True)
    out = small_disk / f"out.{suffix}"
    (tmp_path / "tmp").mkdir()
    done = run(
        "scatter", tmp_path / "in.jsonl", "--prompt", "{i}", "-o", out, "--chunk-rows", chunk_rows, *to,
        env=environment(TMPDIR=str(tmp_path / "tmp")),
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "No space left on device" in done.stderr
    path = rescued(done.stderr)
    assert path.name.endswith(f".{suffix}")
    read = pd.read_parquet if suffix == "parquet" else pd.read_json if "jsonl" in suffix else pd.read_csv
    options: dict[str, Any] = {"lines": True} if "jsonl" in suffix else {"sep": "\t"} if "tsv" in suffix else {}
    got = read(path, **options)
    assert got["response"].tolist() == [f"echo: {i}" for i in frame["i"]]
    assert [*small_disk.iterdir()] == [], "what the other file has, too, is removed"


@pytest.mark.parametrize("suffix", PARQUET)
def test_in_place_on_a_full_disk_leaves_the_input_as_it_was(
    small_disk: Path, tmp_path: Path, to: tuple[object, ...], suffix: str
) -> None:
    file = write_table(pd.DataFrame({"i": [f"row {i}" for i in range(800)]}), small_disk / f"in.{suffix}")
    before = file.read_bytes()
    fill(small_disk, leave=1)
    done = run("scatter", file, "--prompt", "{i} " * 9, "--in-place", *to, env=environment(TMPDIR=str(tmp_path)))
    assert done.returncode == 4, done.stderr
    assert file.read_bytes() == before
    assert len(read_table(rescued(done.stderr))) == 800


def test_where_there_is_no_room_for_all_both_files_together_have_the_rows(
    tmp_path: Path, to: tuple[object, ...]
) -> None:
    """A limit on the size of files: that of the rescue file, too."""
    file, out = write_table(pd.DataFrame({"i": range(3000)}), tmp_path / "in.csv"), tmp_path / "out.csv"
    limited = f"ulimit -f 30; exec {sys.executable} -m swarmkit"  # blocks of 1 KiB
    words = ["scatter", file, "--prompt", "{i}", "-o", out, "--chunk-rows", "500", *to]
    done = subprocess.run(
        ["bash", "-c", f'{limited} "$@"', "swarmkit", *map(str, words)],
        capture_output=True, text=True, env=environment(TMPDIR=str(tmp_path), PYTHONDONTWRITEBYTECODE="1"),
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "File too large" in done.stderr
    rest = rescued(done.stderr)
    assert f"It continues {out}.part: cat {out}.part {rest} > OUTPUT" in done.stderr
    whole = tmp_path / "whole.csv"
    whole.write_bytes(Path(f"{out}.part").read_bytes() + rest.read_bytes())
    assert read_table(whole)["response"].tolist() == [f"echo: {i}" for i in range(3000)]


def test_rows_that_no_file_takes_are_an_error(tmp_path: Path, to: tuple[object, ...]) -> None:
    file, out = write_table(pd.DataFrame({"i": range(3000)}), tmp_path / "in.csv"), tmp_path / "out.csv"
    words = ["scatter", file, "--prompt", "{i}", "-o", out, "--chunk-rows", "500", *to]
    done = subprocess.run(
        ["bash", "-c", f'ulimit -f 16; exec {sys.executable} -m swarmkit "$@"', "swarmkit", *map(str, words)],
        capture_output=True, text=True, env=environment(TMPDIR=str(tmp_path), PYTHONDONTWRITEBYTECODE="1"),
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "the rows from here on are lost" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_standard_output_that_takes_nothing_is_noticed(tmp_path: Path, to: tuple[object, ...]) -> None:
    file = write_table(ROWS, tmp_path / "in.csv")
    words = ["scatter", file, "--prompt", "{i}", "-o", "-", *to]
    for redirect in ("> /dev/full", "| true"):
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", f'{sys.executable} -m swarmkit "$@" {redirect}', "s", *map(str, words)],
            capture_output=True, text=True, env=environment(TMPDIR=str(tmp_path)),
        )  # fmt: skip
        assert done.returncode == 4, done.stderr
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        assert read_table(rescued(done.stderr))["response"].tolist() == [f"echo: {i}" for i in range(200)]
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -m swarmkit "$@" > /dev/full', "swarmkit", "probe", *map(str, to)],
        capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert done.returncode == 4
    assert "No space left on device" in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("command", ["scatter", "tree-reduce"])
def test_a_store_on_a_full_disk_loses_no_row_of_the_output(
    small_disk: Path, tmp_path: Path, to: tuple[object, ...], command: str
) -> None:
    frame = pd.DataFrame({"i": range(3000), "g": [i // 2 for i in range(3000)]})
    file, out = write_table(frame, tmp_path / "in.csv"), tmp_path / "out.csv"
    words = [command, file, "-o", out, "--store", small_disk / "store", *to]
    if command == "scatter":
        words += ["--prompt", "{i}", "--chunk-rows", 400]
    else:
        words += ["--column", "i", "--by", "g", "--prompt", "Merge {responses}"]
    done = run(*words)
    assert done.returncode == 4, done.stderr
    assert "cannot write to the store" in done.stderr
    got = read_table(out)
    assert len(got) == (3000 if command == "scatter" else 1500)
    answered = got["response"].notna()
    assert 50 < answered.sum() < len(got)
    assert set(got["response_error"][~answered]) == {"not finished: the store failed"}


# ---- values ------------------------------

ODD = ["one\rtwo", "\r", "a\r\nb", "a\nb", "\n", '"', '""', "a,b", "a\tb", " a ", "'", "#", "\\", "NA", "None", "null",
       "007", "1e5", "=1+1", "\x0b", "\x1a", "\x85", "\u2028", "é", "\ufeff", "-", "True", "\x7f"]  # fmt: skip


@pytest.mark.parametrize("suffix", ["csv", "tsv", "csv.gz", "jsonl", "parquet"])
def test_values_come_out_as_they_went_in(tmp_path: Path, to: tuple[object, ...], suffix: str) -> None:
    frame = pd.DataFrame({"id": range(len(ODD)), "text\rof a row": ODD})
    first = tmp_path / "in.jsonl"
    frame.to_json(first, orient="records", lines=True)
    names = [first, tmp_path / f"one.{suffix}", tmp_path / f"two.{suffix}", tmp_path / "end.jsonl"]
    for number, (source, target) in enumerate(itertools.pairwise(names)):
        done = run("scatter", source, "--prompt", "{text\rof a row}", "--out", f"r{number}", "--raw", "-o", target, *to)
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in names[-1].read_text().split("\n")[:-1]]
    assert [row["text\rof a row"] for row in rows] == ODD
    for name in ("r0", "r1", "r2"):
        assert [row[name] for row in rows] == [f"echo: {text}" for text in ODD]


def test_a_lone_carriage_return_is_quoted_and_nothing_else_changes(tmp_path: Path, to: tuple[object, ...]) -> None:
    (tmp_path / "in.csv").write_bytes(b'id,text\n1,"one\rtwo"\n2,plain\n3,\n')
    done = run("scatter", tmp_path / "in.csv", "--prompt", "{id}", "-o", tmp_path / "out.csv", *to)
    assert done.returncode == 0
    assert (tmp_path / "out.csv").read_bytes() == (
        b'id,text,response,response_error\n1,"one\rtwo",echo: 1,\n2,plain,echo: 2,\n3,,echo: 3,\n'
    )
