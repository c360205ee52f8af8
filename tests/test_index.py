"""The index of a store: whatever becomes of it or of the segments, it finds the lines that are there, and no others."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarmkit.store.index import FILE, Index
from swarmkit.store.keys import keys_of

HEADER = b'{"swarmkit_store":1,"written_by":"0"}\n'
KEYS = keys_of("ask", [str(i) for i in range(8)])
SEGMENTS = ("1.jsonl", "2.jsonl", "3.jsonl")


def answer(key: int, text: str) -> bytes:
    return b'{"key":"%s","ask":"a","sample":0,"text":"%s"}\n' % (KEYS[key].encode(), text.encode())


def sound(raw: bytes) -> dict[str, str] | None:
    """The line, if it is that of an answer."""
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) and {"key", "text"} <= line.keys() else None


def look_up(index: Index) -> dict[int, str]:
    """The text of each key, as the index finds it: that of the last sound line that has it."""
    index.refresh()
    found = {}
    for path, offsets, positions in index.find(KEYS.digests()):
        data = path.read_bytes()
        for offset, position in zip(offsets.tolist(), positions.tolist(), strict=True):
            raw = data[offset : data.index(b"\n", offset)]
            assert raw.startswith(b'{"key":"' + KEYS[position].encode())
            if line := sound(raw):  # only what is asked for is parsed
                found[position] = line["text"]
    return found


def plain(folder: Path) -> dict[int, str]:
    """The same, by reading everything."""
    numbers = {key: i for i, key in enumerate(KEYS)}
    lines = [raw for path in sorted(folder.glob("*.jsonl")) for raw in path.read_bytes().split(b"\n")[:-1]]
    return {numbers[line["key"]]: line["text"] for line in map(sound, lines) if line}


GARBAGE = (b"\xff\n", b'{"key":"\n', b"\n", b"[]\n")
STEP = st.one_of(
    st.tuples(st.just("write"), st.sampled_from(SEGMENTS), st.lists(st.integers(0, 7), max_size=5)),
    st.tuples(st.just("begin a line"), st.sampled_from(SEGMENTS), st.integers(0, 7)),
    st.tuples(st.just("garbage"), st.sampled_from(SEGMENTS), st.sampled_from(GARBAGE)),
    st.tuples(st.sampled_from(["delete", "replace", "cut"]), st.sampled_from(SEGMENTS), st.integers(0, 40)),
    st.tuples(st.just("index"), st.sampled_from(["lost", "torn", "flipped", "earlier"]), st.integers(0, 10**6)),
    st.tuples(st.just("another process"), st.integers(0, 1), st.none()),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEP, max_size=25))
def test_it_finds_what_a_plain_dict_has(tmp_path_factory: pytest.TempPathFactory, steps: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("store")
    file = folder / FILE
    indexes = [Index(folder, save_after=0), Index(folder, save_after=0)]
    earlier = b""
    for number, (what, where, detail) in enumerate(steps):
        path = folder / where if where in SEGMENTS else file
        there = path.read_bytes() if path.exists() else b""
        match what:
            case "write":
                lines = b"".join(answer(key, f"{number} {key}") for key in detail)
                torn = b"" if not there or there.endswith(b"\n") else b"\n"
                path.write_bytes((there or HEADER) + torn + lines)
            case "begin a line":
                with path.open("ab") as out:
                    out.write(b"" if there else HEADER)
                    out.write(answer(detail, f"{number}")[: 10 + 20 * (number % 3)])
            case "garbage":
                path.write_bytes((there or HEADER) + detail)
            case "delete":
                path.unlink(missing_ok=True)
            case "replace":
                path.write_bytes(HEADER + answer(detail % 8, f"another {number}"))
            case "cut" if there:
                path.write_bytes(there[: max(len(HEADER), len(there) - detail)])
            case "index" if there:
                match where:
                    case "lost":
                        file.unlink()
                    case "torn":
                        file.write_bytes(there[: detail % len(there)])
                    case "flipped":
                        place = detail % len(there)
                        file.write_bytes(there[:place] + bytes([there[place] ^ 1]) + there[place + 1 :])
                    case "earlier":
                        file.write_bytes(earlier or there)
                earlier = there
            case "another process":
                indexes[where] = Index(folder, save_after=0)
        assert look_up(indexes[number % 2]) == plain(folder)
    assert look_up(Index(folder, save_after=0)) == plain(folder)
    assert look_up(Index(folder, load=False)) == plain(folder)


def test_it_is_read_back_and_reads_on(tmp_path: Path) -> None:
    segment = tmp_path / "1.jsonl"
    segment.write_bytes(HEADER + answer(0, "first") + answer(1, "second"))
    Index(tmp_path, save_after=0).refresh()
    with segment.open("r+b") as file:  # whoever read this line again would not find its key
        file.seek(len(HEADER))
        file.write(b'{"key":"0000000000')
    with segment.open("ab") as file:
        file.write(answer(2, "third"))
    index = Index(tmp_path)
    index.refresh()
    ((_, offsets, positions),) = index.find(KEYS.digests())
    assert positions.tolist() == [0, 1, 2]
    assert offsets[0] == len(HEADER)
