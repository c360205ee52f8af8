"""Frames and files larger than memory: in pieces, without a gap, and each piece only once."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from test_cli import environment, generated, hostfile, run, to

import swarmkit as sk

pytestmark = pytest.mark.slow

KEY = "a-key-nobody-may-see"
SOME = 1500


@pytest.fixture(scope="module")
def swarm():
    """Eight rows at a time, a tenth of a second a row."""
    with sk.local(1, engine="echo", token=KEY, tokens_per_s=20, max_num_seqs=8) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def fast():
    with sk.local(1, engine="echo", token=KEY) as swarm:
        yield swarm


class Frames:
    """Gives frames, and counts those it has given."""

    def __init__(self, frames: list[pd.DataFrame]) -> None:
        self.frames = frames
        self.given = 0

    def __iter__(self) -> Iterator[pd.DataFrame]:
        for frame in self.frames:
            self.given += 1
            yield frame


def pieces(df: pd.DataFrame, rows: int) -> list[pd.DataFrame]:
    return [df.iloc[i : i + rows] for i in range(0, len(df), rows)]


def answers_written(store: Path) -> int:
    return sum(line.startswith('{"key"') for part in store.glob("*.jsonl") for line in part.read_text().splitlines())


# ---- iter_scatter ------------------------------


def test_pieces_come_back_one_for_one_as_the_whole_frame_would(fast):
    df = pd.DataFrame({"t": [f"row {i}" for i in range(SOME)]}, index=[i % 7 for i in range(SOME)])
    df.iloc[[3, 700], 0] = None
    options = {"pool": fast, "n": 2, "temperature": 0.5, "seed": 7}
    with pytest.warns(sk.SwarmWarning, match="2 of 1,500 rows failed"):
        whole = df.swarm.scatter("{t}", **options)
    with pytest.warns(sk.SwarmWarning, match="2 of 1,500 rows failed") as warned:
        parts = list(sk.iter_scatter(iter(pieces(df, 100)), "{t}", **options))
    assert len([w for w in warned if w.category is sk.SwarmWarning]) == 1
    assert [len(p) for p in parts] == [200] * 15
    pd.testing.assert_frame_equal(pd.concat(parts), whole)


@pytest.mark.long
def test_reading_ahead_is_bounded_and_no_endpoint_waits_for_the_last_row_of_a_chunk(swarm):
    df = pd.DataFrame({"t": [" ".join(["word"] * 40), *(f"row {i}" for i in range(1, 400))]})
    frames = Frames(pieces(df, 20))
    parts = []
    with sk.connect(swarm) as pool:
        for part in sk.iter_scatter(frames, "{t}", pool=pool, max_tokens=64):
            if not parts:
                # While one row held the first frame back two others were answered, and no more were read.
                assert frames.given == 4
                assert pool.last_run.answered in range(1, 21)
            parts.append(part)
            assert frames.given <= len(parts) + 4
    assert pd.concat(parts)["response"].str[6:].tolist() == df["t"].tolist()


def test_leaving_the_loop_stops_what_is_under_way(swarm):
    frames = Frames(pieces(pd.DataFrame({"i": range(2000)}), 20))
    with sk.connect(swarm) as pool:
        for part in sk.iter_scatter(frames, "{i}", pool=pool):
            assert len(part) == 20
            break
        before = generated(swarm)
        time.sleep(1)
        assert generated(swarm) - before <= 16
    assert frames.given <= 5


def test_when_no_endpoint_is_left_the_frame_has_what_was_under_way():
    df = pd.DataFrame({"i": range(200)})
    with sk.local(1, engine="echo", faults=["http_401:after=12"]) as gone:
        parts = []
        with pytest.raises(sk.NoEndpointsError) as caught:
            parts += sk.iter_scatter(pieces(df, 20), "row {i}", pool=sk.connect(gone, batch=sk.BatchPolicy(max_size=4)))
    frame = caught.value.frame
    assert frame is not None
    assert len(frame) <= 80
    assert frame["response"].notna().sum() + frame["response_error"].notna().sum() == len(frame)


def test_failed_rows_raise_when_asked_to(fast):
    df = pd.DataFrame({"t": ["a", "b", None, "d"]})
    parts = sk.iter_scatter(pieces(df, 2), "{t}", pool=fast, on_error="raise")
    assert next(parts)["response"].tolist() == ["echo: a", "echo: b"]
    with pytest.raises(sk.ScatterError, match="1 of 4 rows") as caught:
        next(parts)
    assert caught.value.frame["response"].tolist()[1] == "echo: d"


def test_a_store_counts_repeated_prompts_over_all_frames(fast, tmp_path):
    df = pd.DataFrame({"t": ["same", "same", "same", "same"]})
    options = {"temperature": 1.0, "pool": fast, "store": tmp_path}
    for part in sk.iter_scatter(pieces(df, 1), "{t}", **options):
        assert len(part) == 1
    assert len(sk.open_store(tmp_path)) == 4
    list(sk.iter_scatter(pieces(df, 2), "{t}", **options))
    df.swarm.scatter("{t}", **options)
    assert answers_written(tmp_path) == 4, "all are there, however the rows are cut"


# ---- swarmkit scatter ------------------------------


def table() -> pd.DataFrame:
    rows = range(40)
    return pd.DataFrame(
        {
            "i": pd.array([i if i > 10 else None for i in rows], dtype="Int64"),
            "t": [f"row {i}" for i in rows],
            "late": [None] * 30 + ["x"] * 10,
            "tags": [[i] if i % 3 else [] for i in rows],
        }
    )


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_chunks_leave_no_trace_in_the_output(suffix, fast, tmp_path):
    source = tmp_path / f"in.{suffix}"
    df = table()
    if suffix == "parquet":
        df.to_parquet(source)
    elif suffix == "jsonl":
        lines = [{k: v for k, v in row.items() if k != "late" or v} for row in json.loads(df.to_json(orient="records"))]
        source.write_text("\n".join(map(json.dumps, lines)))
    else:
        df.drop(columns="tags").to_csv(source, index=False)
    host = to(hostfile(tmp_path / "h", fast))
    wanted = [f"echo: row {i}: {i}" if i > 10 else None for i in range(40)]
    for target in ("parquet", "jsonl"):
        outs = []
        for rows in (3, 1000):
            out = tmp_path / f"out{rows}.{target}"
            done = run("scatter", source, "--prompt", "{t}: {i}", "-o", out, "--chunk-rows", rows, "--overwrite", *host)
            assert done.returncode == 1, done.stderr
            assert "40 rows, 11 failed" in done.stderr
            assert done.stderr.count("missing value in column 'i'") == 1
            assert not Path(f"{out}.part").exists()
            outs.append(pd.read_parquet(out) if target == "parquet" else pd.read_json(out, lines=True))
        pd.testing.assert_frame_equal(*outs)
        got = outs[0]
        assert got["response"].astype(object).where(got["response"].notna(), None).tolist() == wanted
        assert got["late"].tolist()[30:] == ["x"] * 10
        if (suffix, target) == ("parquet", "parquet"):
            before = pd.read_parquet(source)
            pd.testing.assert_frame_equal(got[df.columns], before, check_dtype=False)
            assert str(got["i"].dtype) == "Int64"


def test_after_a_kill_the_same_command_asks_only_the_rest(fast, swarm, tmp_path):
    source, out, store = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "store"
    source.write_text("\n".join(json.dumps({"i": i}) for i in range(300)))
    words = ["scatter", source, "--prompt", "{i}", "-o", out, "--chunk-rows", 20, "--store", store]
    child = subprocess.Popen(
        [sys.executable, "-m", "swarmkit", *map(str, [*words, *to(hostfile(tmp_path / "slow", swarm))])],
        stderr=subprocess.DEVNULL, env=environment(),
    )  # fmt: skip
    part = tmp_path / "out.jsonl.part"
    deadline = time.monotonic() + 30
    while not (part.exists() and part.read_text().count("\n") >= 40) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not out.exists()
    left = pd.read_json(part, lines=True)
    assert left["response"].tolist() == [f"echo: {i}" for i in range(len(left))]
    stored = len(sk.open_store(store))
    assert len(left) <= stored < 300
    refused = run(*words[:-2], *to(hostfile(tmp_path / "fast", fast)))
    assert refused.returncode == 2, "without the store, what is left is all there is"
    assert "out.jsonl.part" in refused.stderr
    done = run(*words, *to(tmp_path / "fast"))
    assert done.returncode == 0, done.stderr
    assert answers_written(store) == 300, "none was asked twice"
    assert pd.read_json(out, lines=True)["response"].tolist() == [f"echo: {i}" for i in range(300)]
    assert not part.exists()


# Not ru_maxrss, which a child takes over from the process that starts it.
PEAK = """
import re, sys
from swarmkit.cli.main import main
code = main(sys.argv[1:])
print("peak", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
sys.exit(code)
"""


@pytest.mark.long
@pytest.mark.timeout(580)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_the_file(suffix, fast, tmp_path):
    host = to(hostfile(tmp_path / "h", fast))
    peaks = []
    for rows in (30_000, 300_000):
        df = pd.DataFrame({"i": range(rows)})
        df["t"] = "some text of a usual length, to be asked about: " + df["i"].astype(str) + " " + "x" * 400
        source, out = tmp_path / f"in{rows}.{suffix}", tmp_path / f"out{rows}.{suffix}"
        df.to_parquet(source) if suffix == "parquet" else df.to_json(source, orient="records", lines=True)
        words = ["scatter", source, "--prompt", "{t}", "-o", out, "--chunk-rows", 2000, "--max-tokens", 4, *host]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *map(str, words)], capture_output=True, text=True, env=environment()
        )
        assert done.returncode == 0, done.stderr
        found = re.search(r"peak (\d+)", done.stdout)
        assert found
        peaks.append(int(found[1]) / 1024)
        assert f"{rows:,} rows, 0 failed" in done.stderr
        print(f"\n{suffix}, {rows:,} rows: {peaks[-1]:.0f} MiB at most; {done.stderr.splitlines()[0]}")
    # Ten times the rows; Arrow's allocator keeps some of what is given back to it.
    assert peaks[1] <= (1.5 if suffix == "parquet" else 1.15) * peaks[0]
