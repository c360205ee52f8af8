"""The command line, as a person uses it: real child processes against real echo endpoints."""

import contextlib
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from command import command

import swarmkit as sk

pytestmark = pytest.mark.slow

KEY = "a-key-nobody-may-see"
DEAD = "http://127.0.0.1:9"
ASK = "What does {gene} do?"
GENES = pd.DataFrame(
    {
        "id": ["007", "1e5", "NA", "None"],
        "gene": ["lacZ", "recA", "ftsZ", "rpoS"],
        "start": ["362455", "2822708", "105305", "2866559"],
        "group": ["b", "a", "a", "b"],
    }
)


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(sk.__file__).parents[1]), "NO_COLOR": "1", "TEST_KEY": KEY, **extra}


def run(
    *words: object, env: dict[str, str] | None = None, stdin: str | Path = os.devnull
) -> subprocess.CompletedProcess[str]:
    """Run ``swarmkit WORDS``, and see to it that nothing a person or a log sees has the key or a traceback."""
    done = command(*words, env=env or environment(), stdin=str(stdin))
    assert KEY not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "Unclosed" not in done.stderr
    return done


@pytest.fixture(scope="module")
def swarm():
    with sk.local(1, engine="echo", addresses=2, token=KEY) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def host(swarm, tmp_path_factory):
    """A hostfile of two endpoints that are up; the key comes from the environment."""
    return hostfile(tmp_path_factory.mktemp("hosts") / "up.hostfile", swarm)


def hostfile(path: Path, swarm: sk.LocalSwarm) -> Path:
    path.write_text("".join(f"{e.name}\n" for e in swarm.endpoints))
    return path


@pytest.fixture
def genes(tmp_path):
    path = tmp_path / "genes.csv"
    GENES.to_csv(path, index=False)
    return path


def to(host: Path) -> tuple[object, ...]:
    return "--hostfile", host, "--api-key-env", "TEST_KEY"


def at_once(do: Any, things: Sequence[Any]) -> list[Any]:
    """Start-up is most of a child's time, and there is more than one core."""
    with ThreadPoolExecutor(3) as threads:
        return list(threads.map(do, things))


def table(text: str | Path) -> pd.DataFrame:
    """A CSV file or text with its values as they stand there."""
    return pd.read_csv(text if isinstance(text, Path) else io.StringIO(text), dtype=str, keep_default_na=False)


# ---- help ------------------------------


def test_every_command_has_help_with_an_example():
    commands = ["scatter", "tree-reduce", "embed", "compare", "probe", "launch", "serve", "demo"]
    bare, *helps = at_once(lambda words: run(*words), [["--help"], *([c, "--help"] for c in commands)])
    texts = dict(zip(commands, helps, strict=True))
    assert bare.returncode == 0
    for name, done in texts.items():
        assert name in bare.stdout
        assert done.returncode == 0
        assert re.search(rf"^example.*:\n  swarmkit {name}", done.stdout, re.MULTILINE), name
    for name in ("scatter", "tree-reduce", "embed", "compare"):
        assert all(f"\n  {code} " in texts[name].stdout for code in (0, 1, 2, 3, 4, 130))


# ---- scatter ------------------------------


def test_scatter_adds_answers_and_leaves_everything_else_as_it_was(genes, host, tmp_path):
    out = tmp_path / "out.csv"
    done = run("scatter", genes, "--prompt", "{id}: {gene} at {start:,}", "-o", out, *to(host))
    assert (done.returncode, done.stdout) == (0, "")
    got = table(out)
    assert got[list(GENES.columns)].equals(table(genes))
    assert got["response"].tolist()[:3] == [
        "echo: 007: lacZ at 362,455",
        "echo: 1e5: recA at 2,822,708",
        "echo: NA: ftsZ at 105,305",
    ]
    assert re.search(r"4 rows, 0 failed, (?:less than )?[\d.]+ s, [\d.]+ rows/s, \d+ request", done.stderr)
    assert str(out) in done.stderr
    assert KEY not in out.read_text()


def test_a_failed_row_is_reported_and_can_be_asked_again(genes, host, tmp_path):
    out = tmp_path / "out.csv"
    GENES.assign(gene=["lacZ", "", "ftsZ", "rpoS"]).to_csv(genes, index=False)
    done = run("scatter", genes, "--prompt", ASK, "--out", "answer", "-o", out, *to(host))
    assert done.returncode == 1
    assert "4 rows, 1 failed" in done.stderr
    assert "1 row: missing value in column 'gene'" in done.stderr
    assert "--only-missing" in done.stderr
    mended = table(out)
    assert mended["answer_error"].tolist() == ["", "missing value in column 'gene'", "", ""]
    mended["gene"] = ["other", "recA", "other", "other"]
    mended.to_csv(out, index=False)
    done = run("scatter", out, "--only-missing", "--in-place", "--prompt", ASK, "--out", "answer", *to(host))
    assert done.returncode == 0
    got = table(out)
    assert got["answer"].tolist() == [f"echo: What does {g} do?" for g in GENES["gene"]]
    assert got["answer_error"].tolist() == [""] * 4


def test_formats_folders_and_globs_go_round(host, tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    GENES[:2].to_csv(folder / "a.csv", index=False)
    GENES[2:].to_csv(folder / "b.tsv.gz", index=False, sep="\t")
    (folder / "notes.md").write_text("not a table")
    steps = [
        (folder, tmp_path / "1.jsonl"),
        (tmp_path / "*.jsonl", tmp_path / "2.parquet"),
        (tmp_path / "2.parquet", "-"),
    ]
    for number, (source, target) in enumerate(steps, 1):
        done = run("scatter", source, "--prompt", ASK, "--out", f"r{number}", "-o", target, *to(host))
        assert done.returncode == 0, done.stderr
    got = table(done.stdout)
    assert got[list(GENES.columns)].equals(GENES.astype(got["id"].dtype))
    for number in range(1, 4):
        assert got[f"r{number}"].tolist() == [f"echo: What does {g} do?" for g in GENES["gene"]]
    assert len(pd.read_parquet(tmp_path / "2.parquet")) == 4


def test_json_lines_keep_their_types_and_rows_can_be_sampled(host, tmp_path):
    source = tmp_path / "in.jsonl"
    rows = [{"n": 2**60 + 1, "tags": ["a", {"b": 1}], "text": "ä\n"}, {"n": None, "x": 0.1, "text": "\u2028"}]
    source.write_text("\n".join(map(json.dumps, rows)))
    done = run(
        "scatter", source, "--prompt", "{text}?", "-o", "-", "--format", "jsonl", "--n", 2, "--details", "--quiet",
        "--limit", 5, "--temperature", 0.5, "--param", "seed=7", "--max-tokens", 9, "--mode", "single", *to(host),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    got = [json.loads(line) for line in done.stdout.split("\n")[:-1]]
    assert [(r["n"], r["tags"], r["x"]) for r in got[1:3]] == [(2**60 + 1, ["a", {"b": 1}], None), (None, None, 0.1)]
    assert [r["response_sample"] for r in got] == [0, 1, 0, 1]
    assert got[0]["response"].startswith("echo 7: ")
    assert got[0]["response_attempts"] == 1
    assert got[0]["response_endpoint"].startswith("127.0.0.")


def test_without_pyarrow_parquet_says_what_to_install_and_the_rest_works(genes, host, tmp_path):
    without = (
        "import sys; sys.modules['pyarrow'] = None; from swarmkit.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )

    def scatter(target: str) -> subprocess.CompletedProcess[str]:
        words = ["scatter", str(genes), "--prompt", ASK, "-o", str(tmp_path / target), *map(str, to(host))]
        return subprocess.run(
            [sys.executable, "-c", without, *words], capture_output=True, text=True, env=environment()
        )

    parquet, csv = at_once(scatter, ["out.parquet", "out.csv"])
    assert parquet.returncode == 2
    assert 'pip install "swarmkit-frames[parquet]"' in parquet.stderr
    assert csv.returncode == 0
    assert len(table(tmp_path / "out.csv")) == 4


# ---- what can be wrong ------------------------------

WRONG = {
    "a column that is not there": (["--prompt", "{gen}"], "Did you mean 'gene'?"),
    "no endpoints": (["--prompt", ASK], "--hostfile"),
    "inputs apart from one another": (["--prompt", ASK, "other.csv"], "other.csv"),
    "the input as output": (["--prompt", ASK, "-o", "genes.csv"], "--in-place"),
    "the input as output, overwritten": (["--prompt", ASK, "-o", "genes.csv", "--overwrite"], "--in-place"),
    "the input as output, completed": (["--prompt", ASK, "-o", "./genes.csv", "--only-missing"], "--in-place"),
    "another file in place": (["--prompt", ASK, "-o", "out.csv", "--in-place"], "-o names another file"),
    "an unknown suffix": (["--prompt", ASK, "-o", "out.xlsx"], ".parquet"),
    "no folder to write to": (["--prompt", ASK, "-o", "nowhere/out.csv"], "nowhere"),
    "text where JSON belongs": (["--prompt", ASK, "--param", "stop=END"], """--param 'stop="END"'"""),
    "a field that has its own option": (["--prompt", ASK, "--param", "max_tokens=5"], "--help"),
    "a key in place of its variable's name": (["--prompt", ASK, "--url", DEAD, "--api-key-env", KEY], "environment"),
    "a word argparse refuses": (["--prompt", ASK, "--chat", "maybe"], "auto"),
}


def test_wrong_usage_is_one_clear_message_and_nothing_is_sent(genes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = genes.read_text()
    words = [["scatter", "genes.csv", *([] if "-o" in w else ["-o", "out.csv"]), *w] for w, _ in WRONG.values()]
    for (case, (_, expected)), done in zip(WRONG.items(), at_once(lambda w: run(*w), words), strict=True):
        assert (done.returncode, done.stdout) == (2, ""), case
        assert expected in done.stderr, case
    assert list(tmp_path.iterdir()) == [genes]
    assert genes.read_text() == before


def test_a_file_that_is_there_is_replaced_only_when_asked_to(genes, host, tmp_path):
    out = tmp_path / "out.csv"
    out.write_text("precious")
    done = run("scatter", genes, "--prompt", ASK, "-o", out, *to(host))
    assert done.returncode == 2
    assert "--overwrite" in done.stderr
    assert out.read_text() == "precious"
    assert run("scatter", genes, "--prompt", ASK, "-o", out, "--overwrite", *to(host)).returncode == 0
    assert len(table(out)) == 4


def test_no_endpoint_is_a_code_of_its_own(genes, tmp_path):
    done = run("scatter", genes, "--prompt", ASK, "-o", tmp_path / "out.csv", "--url", DEAD)
    assert done.returncode == 3
    assert "127.0.0.1:9" in done.stderr
    assert not (tmp_path / "out.csv").exists()


def test_rows_that_finished_before_the_last_endpoint_went_are_written(tmp_path):
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    pd.DataFrame({"x": range(900)}).assign(x=lambda d: "row" + d["x"].astype(str)).to_csv(source, index=False)
    with sk.local(1, engine="echo", token=KEY, faults=["http_401:after=6"]) as swarm:
        host = hostfile(tmp_path / "h", swarm)
        done = run("scatter", source, "--prompt", "{x} ?", "-o", out, "--give-up", 1.5, *to(host))
    assert done.returncode == 3
    assert "no endpoint is left" in done.stderr
    assert "--only-missing" in done.stderr
    got = table(out)
    assert len(got) == 900
    answered = got["response"] != ""
    assert 100 <= answered.sum() < 900
    assert (got["response"][answered] == "echo: " + got["x"][answered] + " ?").all()
    assert (got["response_error"][~answered] != "").all()


# ---- an interrupt ------------------------------


def generated(swarm: sk.LocalSwarm) -> int:
    request = urllib.request.Request(swarm.urls[0] + "/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request) as reply:
        found = re.search(r"^vllm:generation_tokens_total\S* (\d+)", reply.read().decode(), re.MULTILINE)
    assert found
    return int(found[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_an_interrupt_keeps_finished_rows_and_says_how_to_go_on(number, host, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(json.dumps({"i": i}) for i in range(400)))
    with sk.local(1, engine="echo", token=KEY, latency_s=0.05, max_num_seqs=4) as slow:
        command = [
            sys.executable,
            "-m",
            "swarmkit",
            "scatter",
            source,
            "--prompt",
            "{i}",
            "-o",
            out,
            "--chunk-rows",
            60,
        ]
        child = subprocess.Popen(
            [*map(str, [*command, *to(hostfile(tmp_path / "h", slow))])],
            stderr=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while generated(slow) < 200 and time.monotonic() < deadline:  # a hundred rows
            time.sleep(0.05)
        child.send_signal(number)
        _, told = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "interrupted" in told
    assert f"swarmkit scatter {out} --only-missing --in-place" in told
    assert "Traceback" not in told
    before = pd.read_json(out, lines=True)
    finished = before["response"].notna()
    assert len(before) == 400
    assert 20 <= finished.sum() < 400
    assert set(before["response_error"][~finished]) == {"interrupted"}
    if number == signal.SIGTERM:
        return  # going on is the same
    done = run("scatter", out, "--only-missing", "--in-place", "--prompt", "{i}", *to(host))
    assert done.returncode == 0
    assert pd.read_json(out, lines=True)["response"].tolist() == [f"echo: {i}" for i in range(400)]


def test_numbers_are_written_as_the_input_shows_them(host, tmp_path):
    table, out = tmp_path / "in.parquet", tmp_path / "out.jsonl"
    pd.DataFrame({"v": pd.Series([0.1, None], dtype="float32"), "w": pd.Series([1, None], dtype="Int8")}).to_parquet(
        table
    )
    run("scatter", table, "--prompt", "{v}", "-o", out, *to(host))
    first, second = map(json.loads, out.read_text().splitlines())
    assert (first["v"], first["w"], first["response"]) == (0.1, 1, "echo: 0.1")
    assert (second["v"], second["w"], second["response"]) == (None, None, None)


# ---- tree-reduce ------------------------------


def test_tree_reduce_merges_each_group(genes, host, tmp_path):
    merge = "All of {group}: {responses}"
    out = tmp_path / "top.csv"
    words = ["tree-reduce", genes, "--column", "gene", "--by", "group", "--prompt", merge, "--fanin", 2]
    done = run(*words, "-o", out, *to(host))
    assert (done.returncode, done.stdout) == (0, "")
    got = table(out)
    assert got["group"].tolist() == ["a", "b"]
    assert got["response"][0] == "echo: All of a: recA\n---\nftsZ"
    assert "2 rows, 0 failed" in done.stderr
    done = run(*words, "--trace", "-o", "-", "--format", "jsonl", *to(host))
    assert done.returncode == 2
    assert "--by group: the result has a column of this name" in done.stderr
    GENES.rename(columns={"group": "family"}).to_csv(genes, index=False)
    words = ["tree-reduce", genes, "--column", "gene", "--by", "family", "--prompt", "{responses}", "--fanin", 2]
    done = run(*words, "--trace", "-o", "-", "--format", "jsonl", *to(host))
    assert [json.loads(line)["level"] for line in done.stdout.splitlines()] == [0, 0, 0, 0, 1, 1]


def test_tree_reduce_reports_which_groups_failed(genes, host):
    GENES.assign(gene=["lacZ", "", "", "rpoS"]).to_csv(genes, index=False)
    done = run(
        "tree-reduce", genes, "--column", "gene", "--by", "group", "--prompt", "{responses}", "-o", "-", *to(host)
    )
    assert done.returncode == 1
    assert table(done.stdout)["response"][1] == "echo: lacZ\n---\nrpoS"
    assert "1 row: there was no text to merge" in done.stderr


# ---- compare ------------------------------


def test_compare_prints_a_verdict_and_writes_the_frame_and_the_picture(genes, host, tmp_path):
    frame, picture = tmp_path / "modes.csv", tmp_path / "modes.png"
    words = ["--batch-sizes", "1,3", "--repeats", 1, "--sample", 3, *to(host)]
    done = run("compare", genes, "--prompt", ASK, "-o", frame, "--plot", picture, *words)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    assert [line.split(":")[0] for line in shown[:3]] == ["batch of 3", "batch of 1", "single"]
    assert "too few repeats" in shown[3]
    got = table(frame)
    assert got[["mode", "batch_size", "completion_rate"]].to_numpy().tolist() == [
        ["batch", "3", "1.0"], ["batch", "1", "1.0"], ["single", "1", "1.0"],
    ]  # fmt: skip
    assert got["requests"].tolist()[1:] == ["3", "3"]
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_compare_writes_its_frame_to_a_pipe_and_reports_failed_rows(genes, host):
    GENES.assign(gene=["lacZ", "", "ftsZ", "rpoS"]).to_csv(genes, index=False)
    done = run("compare", genes, "--prompt", ASK, "-o", "-", "--repeats", 1, *to(host))
    assert done.returncode == 1
    assert table(done.stdout)["completion_rate"].tolist() == ["0.75", "0.75"]
    assert "prompts/s" in done.stderr


def test_compare_looks_at_its_arguments_before_it_measures(genes, host, tmp_path):
    old = tmp_path / "old.png"
    old.write_text("precious")
    wrong = {
        "--overwrite replaces one": ["--plot", old],
        "no picture": ["--plot", tmp_path / "modes.csv"],
        "no folder": ["--plot", tmp_path / "nowhere" / "modes.png"],
        "no number": ["--batch-sizes", "10,many"],
        "too large": ["--batch-sizes", "2000"],
    }
    runs = at_once(lambda words: run("compare", genes, "--prompt", ASK, *words, *to(host)), list(wrong.values()))
    for case, (words, done) in zip(wrong, zip(wrong.values(), runs, strict=True), strict=True):
        assert (done.returncode, done.stdout) == (2, ""), case
        assert str(words[1]).rpartition(",")[2].replace("2000", "1,024") in done.stderr, case
    assert old.read_text() == "precious"


# ---- probe ------------------------------


def test_probe_shows_each_endpoint(host, tmp_path):
    mixed = tmp_path / "mixed"
    mixed.write_text(host.read_text() + "127.0.0.1:9\n")
    up, some, none = at_once(
        lambda words: run("probe", *words), [to(host), ["--json", *to(mixed)], ["--hostfile", host, "--model", "llama"]]
    )
    assert up.returncode == 0
    assert re.search(r"^127\.0\.0\.1:\d+ +up +\d+ ms +4096 +swarmkit \S+ +echo$", up.stdout, re.MULTILINE)
    assert re.search(r"chat template +learned", up.stdout)
    assert some.returncode == 1
    found = json.loads(some.stdout)
    assert [e["status"] for e in found["endpoints"]] == ["up", "up", "down"]
    assert "refused" in found["endpoints"][2]["reason"].lower()
    assert found["families"][0]["endpoints"] == 2
    assert found["families"][0]["rows"] is True
    assert none.returncode == 2
    assert "rejects the key" in none.stdout


def test_probe_deep_shows_what_each_route_does(host):
    deep, csv = at_once(lambda words: run("probe", "--deep", *words), [to(host), ["--format", "csv", *to(host)]])
    assert (deep.returncode, csv.returncode) == (0, 0)
    assert re.search(r"^ +completions +chat-batch +chat$", deep.stdout, re.MULTILINE)
    assert re.search(r"^json +structured_outputs +structured_outputs +structured_outputs$", deep.stdout, re.MULTILINE)
    assert re.search(r"^used +yes +no +no$", deep.stdout, re.MULTILINE)
    found = table(csv.stdout)
    assert found["route"].tolist() == ["completions", "chat-batch", "chat"]
    assert set(found["endpoints"]) == {"2"}
    assert found["max_list"].tolist() == ["1024", "", "1"]


# ---- serve ------------------------------


@contextlib.contextmanager
def served(*words: str, **extra: str):
    """``swarmkit serve`` until the end of the block; gives its URL and what it tells about its key."""
    command = [sys.executable, "-m", "swarmkit", "serve", "--engine", "echo", "--port", "0", *words]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**extra)
    )
    try:
        assert child.stdout
        assert child.stderr
        first = child.stdout.readline()
        url = re.search(r"http://\S+", first)
        assert url, first + child.stderr.read()
        yield url[0], child.stderr.readline()
    finally:
        child.send_signal(signal.SIGINT)
        rest = "".join(child.communicate(timeout=30))
    assert child.returncode == 0
    assert "Traceback" not in rest
    assert KEY not in rest


def test_serve_makes_an_endpoint_that_the_other_commands_use(genes, tmp_path):
    with served("--model", "parrot", "--fault", "bad_row:marker=recA") as (url, key):
        load = re.search(r'export (\w+)="\$\(cat (\S+)\)"', key)
        assert load
        file = Path(load[2])
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert file.read_text() not in key
        env = environment(**{load[1]: file.read_text()})
        where = ["--url", url, "--api-key-env", load[1]]
        out = tmp_path / "out.csv"
        done = run("scatter", genes, "--prompt", ASK, "-o", out, "--details", *where, env=env)
        assert done.returncode == 1
        assert table(out)["response"].tolist().count("") == 1
        assert "parrot" in run("probe", "--timeout", 30, *where, env=env).stdout
        taken = run("serve", "--engine", "echo", "--port", url.rpartition(":")[2])
        assert taken.returncode == 2
        assert "--port 0" in taken.stderr
    assert not file.exists()


def test_serve_takes_its_key_from_the_environment():
    with served("--option", "addresses=2", SWARMKIT_LOCAL_KEY=KEY) as (_, key):
        assert key == "its key: the value of $SWARMKIT_LOCAL_KEY\n"


def test_serve_refuses_what_it_does_not_know():
    done = run("serve", "--engine", "echo", "--fault", "gremlins")
    assert done.returncode == 2
    assert "http_500" in done.stderr


# ---- demo ------------------------------


def test_the_demo_goes_all_the_way():
    done = run("demo", "--engine", "echo", "--limit", "12", env=environment(COLUMNS="80"))
    assert done.returncode == 0, done.stderr
    for expected in (
        "capital of France?",
        "12 answered, 0 failed, of 12",
        "tree_reduce",
        "not a model",
        "df.swarm.scatter",
    ):
        assert expected in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_conversations_examples_and_first_words(host, genes, tmp_path):
    chats, shown, asked, wide = (tmp_path / name for name in ("chats.jsonl", "shown.csv", "out.jsonl", "wide.csv"))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    lines = [{"chat": [*turns, {"role": "user", "content": gene}]} for gene in GENES["gene"]] + [{"chat": turns}]
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    GENES.assign(response="It cuts.")[:2].to_csv(shown, index=False)
    some, every = at_once(
        lambda words: run("scatter", *words, *to(host)),
        [
            (chats, "--messages", "chat", "-o", asked),
            (genes, "--prompt", ASK, "--examples", shown, "--assistant-prefix", "It is ", "-o", wide),
        ],
    )
    assert (some.returncode, every.returncode) == (1, 0), some.stderr + every.stderr
    answers = [json.loads(line) for line in asked.read_text().splitlines()]
    assert [a["response"] for a in answers[:4]] == [f"echo: {gene}" for gene in GENES["gene"]]
    assert "so there is nothing to answer" in answers[4]["response_error"]
    assert [a["chat"] for a in answers] == [line["chat"] for line in lines]
    assert table(wide)["response"].tolist() == [f"It is echo: What does {gene} do?" for gene in GENES["gene"]]
    neither = run("scatter", genes, "-o", tmp_path / "no.csv", *to(host))
    assert neither.returncode == 2
    assert "one of the arguments --prompt --messages is required" in neither.stderr


def test_prompts_that_are_too_long_are_cut_where_that_is_asked_for(tmp_path):
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    pd.DataFrame({"t": ["short", "long " * 1000]}).to_csv(source, index=False)
    with sk.local(1, engine="echo", token=KEY, max_model_len=400) as small:
        words = ["scatter", source, "--prompt", "t", "--max-tokens", 40, *to(hostfile(tmp_path / "h", small))]
        whole, cut = at_once(lambda more: run(*words, *more), [["-o", "-"], ["-o", out, "--too-long", "truncate"]])
    assert (whole.returncode, cut.returncode) == (1, 0), whole.stderr + cut.stderr
    assert "1 of 2 prompts was cut to fit the context of 400 tokens" in cut.stderr
    assert table(out)["response"].str.startswith(("echo: short", "echo: long long")).all()
