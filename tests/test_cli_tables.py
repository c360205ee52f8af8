"""The command line and the tables of others: pipes, arrays, separators, quotes; what is shown before a run."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_cli import ASK, GENES, KEY, environment, hostfile, run, table, to

import swarmkit as sk
from swarmkit.cli.formats import has_quoted_fields
from swarmkit.cli.harmless import TerminalFile, answers_of, cell, restored, secured
from swarmkit.cli.parser import parser

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def swarm():
    with sk.local(1, engine="echo", token=KEY) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def host(swarm, tmp_path_factory):
    return hostfile(tmp_path_factory.mktemp("hosts") / "h", swarm)


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


# ---- pipes and formats ------------------------------


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "json", "parquet", "csv.gz", "jsonl.zst"])
def test_a_pipe_is_known_by_how_it_begins(form, host, tmp_path):
    piped = tmp_path / "piped"
    if form in ("csv", "tsv", "csv.gz"):
        packing = "gzip" if form.endswith("gz") else None
        GENES.to_csv(piped, index=False, sep="\t" if form == "tsv" else ",", compression=packing)
    elif form == "parquet":
        GENES.to_parquet(piped)
    elif form == "json":
        GENES.to_json(piped, orient="records", indent=2)
    else:
        import pyarrow as pa

        rows = "".join(json.dumps(row) + "\n" for row in GENES.to_dict("records"))
        with pa.output_stream(str(piped), compression="zstd" if form.endswith("zst") else None) as file:
            file.write(rows.encode())
    done = run("scatter", "-", "--prompt", ASK, *to(host), stdin=piped)
    assert done.returncode == 0, done.stderr
    inner = form.partition(".")[0]
    if inner in ("json", "jsonl"):
        got = json.loads(done.stdout) if inner == "json" else lines(done.stdout)
        assert [row["response"] for row in got] == [f"echo: {ASK.format(gene=g)}" for g in GENES["gene"]]
        return
    sep = "\t" if inner == "tsv" else ","
    got = pd.read_csv(io.StringIO(done.stdout), sep=sep, dtype=str, keep_default_na=False)
    assert got[list(GENES.columns)].to_numpy().tolist() == GENES.to_numpy().tolist()
    assert got["response"].tolist() == [f"echo: {ASK.format(gene=g)}" for g in GENES["gene"]]


def test_what_is_wrong_with_a_pipe_is_said(host, tmp_path):
    source = tmp_path / "t.csv"
    GENES.to_csv(source, index=False)
    empty = run("scatter", "-", "--prompt", ASK, *to(host))
    assert (empty.returncode, empty.stdout) == (2, "")
    assert "the standard input is empty" in empty.stderr
    done = run("scatter", "-", "--prompt", ASK, "--in-place", *to(host), stdin=source)
    assert done.returncode == 2
    assert "the standard input cannot be replaced" in done.stderr


def test_json_arrays_are_read_and_written(host, tmp_path):
    source, out, none = tmp_path / "in.json", tmp_path / "out.json", tmp_path / "none.json"
    rows = [{"i": i, "t": f"row {i}", "deep": {"a": [i]}} for i in range(7)]
    source.write_text(json.dumps(rows, indent=1))
    done = run("scatter", source, "--prompt", "{t}", "-o", out, "--chunk-rows", 3, *to(host))
    assert done.returncode == 0, done.stderr
    got = json.loads(out.read_text())
    assert [{k: row[k] for k in rows[0]} for row in got] == rows
    assert [row["response"] for row in got] == [f"echo: row {i}" for i in range(7)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("scatter", source, "--prompt", "{t}", "-o", out, "--overwrite", *to(host))
    assert len(json.loads(out.read_text())) == 7, "lines often have this suffix, too"
    source.write_text('[{"t": "a"}, 3]')
    done = run("scatter", source, "--prompt", "{t}", "-o", none, *to(host))
    assert done.returncode == 2
    assert "element 2 of its array is not a JSON object" in done.stderr
    named = tmp_path / "in.jsonl"
    named.write_text('[{"t": "a"}]')
    done = run("scatter", named, "--prompt", "{t}", "-o", none, *to(host))
    assert "--input-format json" in done.stderr
    done = run("scatter", named, "--prompt", "{t}", "-o", none, "--input-format", "json", *to(host))
    assert json.loads(none.read_text()) == [{"t": "a", "response": "echo: a", "response_error": None}], done.stderr


def test_json_in_a_folder_is_no_table_of_it(host, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "meta.json").write_text('[{"licence": "CC0"}]')
    (folder / "schema.json").write_text('{"type": "object"}')
    words = ["--prompt", "{t}", "-o", "-", *to(host)]
    done = run("scatter", folder, *words)
    assert done.returncode == 2
    assert ".json files are read where they are named themselves" in done.stderr
    (folder / "a.csv").write_text("t\nx\n")
    done = run("scatter", folder, *words)
    assert (done.returncode, table(done.stdout)["t"].tolist()) == (0, ["x"])
    assert "do not share" not in done.stderr
    (folder / "b.json").write_text('[{"t": "y"}]')
    done = run("scatter", folder, folder / "b.json", *words)
    assert (done.returncode, table(done.stdout)["t"].tolist()) == (0, ["x", "y"])


def test_a_compressed_file_that_is_cut_is_an_error(host, tmp_path):
    import pyarrow as pa

    source = tmp_path / "in.csv.zst"
    with pa.output_stream(str(source), compression="zstd") as file:
        file.write(("t\n" + "".join(f"row {i * i}\n" for i in range(50_000))).encode())
    whole = source.read_bytes()
    source.write_bytes(whole + whole)  # two frames, as parallel programs write them
    done = run("scatter", source, "--prompt", "{t}", "-o", "-", "--limit", 1, "--dry-run", *to(host))
    assert "of 100,001 rows 1 would be asked" in done.stderr, done.stderr
    source.write_bytes(whole[: len(whole) // 2])
    done = run("scatter", source, "--prompt", "{t}", "-o", "-", "--dry-run", *to(host))
    assert done.returncode == 2
    assert f"cannot read {source}" in done.stderr


def test_zst_without_what_reads_it_says_so():
    if sys.version_info >= (3, 14):
        pytest.skip("Python reads it")
    code = "import sys; sys.modules['pyarrow'] = None; from swarmkit.cli.main import main; sys.exit(main(sys.argv[1:]))"
    words = ["scatter", "-", "--prompt", "a", "-o", "out.csv.zst", "--url", "http://127.0.0.1:9"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], input="a\n1\n", capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 2
    assert '.zst needs Python 3.14 or pyarrow: pip install "swarmkit-frames[parquet]"' in done.stderr


def test_columns_that_are_separated_by_something_else(host, tmp_path):
    source = tmp_path / "in.csv"
    GENES.to_csv(source, index=False, sep=";")
    before = source.read_text()
    done = run("scatter", source, "--prompt", ASK, "-o", "-", *to(host))
    assert done.returncode == 2
    assert "give --sep ';'" in done.stderr
    done = run("scatter", source, "--prompt", ASK, "--in-place", "--sep", ";", *to(host))
    assert done.returncode == 0, done.stderr
    after = source.read_text().splitlines()
    assert [line.rpartition(";echo")[0] for line in after[1:]] == before.splitlines()[1:]
    assert after[0] == before.splitlines()[0] + ";response;response_error"
    done = run("scatter", source, "--prompt", ASK, "-o", "-", "--sep", ";;", *to(host))
    assert done.returncode == 2
    assert "is not one character" in done.stderr


def test_quotes_of_a_tsv_file_are_part_of_its_values(host, tmp_path):
    source, out = tmp_path / "in.tsv", tmp_path / "out.tsv"
    values = ['say "hi" there', '"quoted', '"Hello"', 'a "" b', "plain", '12"']
    source.write_text("i\tt\n" + "".join(f"{i}\t{value}\n" for i, value in enumerate(values)))
    done = run("scatter", source, "--prompt", "{t}", "-o", out, *to(host))
    assert done.returncode == 0, done.stderr
    done = run("scatter", out, "--prompt", "{i}\n{t}", "--out", "again", "-o", "-", "--format", "jsonl", *to(host))
    got = lines(done.stdout)
    assert [row["t"] for row in got] == values
    assert [row["response"] for row in got] == [f"echo: {value}" for value in values]


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ('a\tb\n1\t"x"\n', False),
        ('"a"\t"b"\n1\t"x"\n', True),  # as R writes it
        ('a\tb\n1\t"x\ty"\n', True),
        ('a\tb\n1\t"x ""y"""\n', True),
        ('a\tb\n"Smith, J."\t5\n', True),  # as Excel writes it
        ('a\tb\n"Smith, J." said\t5\n', False),
        ('a\tb\nx, y\t"z"\n', False),
        ('a\tb\n1\t"two\nlines"\n', True),
        ('a\tb\n1\t"two\nli"nes"\n', False),
        ('a\tb\n1\t"never closed\n2\tx\n', False),
        ('a\tb\n1\t"x" and y\n', False),
        ("a\tb\n1\tx\n", False),
    ],
)
def test_which_quotes_enclose_a_field(text, quoted, tmp_path):
    (tmp_path / "t.tsv").write_text(text)
    assert has_quoted_fields(tmp_path / "t.tsv") is quoted


# ---- what servers say ------------------------------

HOSTILE = ["=cmd|' /C calc'!A0", "@SUM(1)", "- a list", "+1-1", "\t=1", "\n=1+1", "'=1", "'", "it's", "-1.5", "+3e5",
           "", "red \x1b[31m", "bell \x07", "a\nb", "caf\u00e9 \U0001f469\u200d\U0001f52c", None]  # fmt: skip


def test_what_servers_say_is_no_formula_and_comes_back_as_it_was():
    frame = pd.DataFrame({"t": ["=mine"] * len(HOSTILE), "response": HOSTILE, "response_error": None})
    safe, count = secured(frame, answers_of("response"))
    assert safe["t"].tolist() == ["=mine"] * len(HOSTILE), "what is the user's own stays"
    texts = [value for value in safe["response"] if isinstance(value, str)]
    for text in texts:
        assert "\x1b" not in text
        number = text.replace("-", "+", 1).removeprefix("+").replace("e", "").replace(".", "").isdigit()
        assert number or not text.strip().startswith(("=", "+", "-", "@")), text
    assert count == 9
    back = restored(safe, answers_of("response"))["response"].tolist()
    same = [a == b for a, b in zip(back, HOSTILE, strict=True) if b is not None and not {"\x1b", "\x07"} & {*b}]
    assert all(same)
    assert cell("=1") == "'=1"


def test_answers_are_secured_in_csv_and_read_back_by_the_next_command(host, tmp_path):
    source, out, raw, top = (tmp_path / name for name in ("in.jsonl", "out.csv", "raw.csv", "top.jsonl"))
    source.write_text("".join(json.dumps({"t": t}) + "\n" for t in ("=1+1", "b\x1b[2J", "plain")))
    words = ["scatter", source, "--messages", "m", *to(host)]
    chats = [{"m": [{"role": "user", "content": "x"}], "response": a, "response_error": None} for a in HOSTILE[:3]]
    source.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    done = run(*words, "--only-missing", "-o", out, *[])
    assert done.returncode == 0, done.stderr
    assert "3 values of servers begin like a formula" in done.stderr
    assert "--raw" in done.stderr
    assert pd.read_csv(out)["response"].tolist() == [f"'{text}" for text in HOSTILE[:3]]
    done = run(*words, "--only-missing", "-o", raw, "--raw")
    assert pd.read_csv(raw)["response"].tolist() == HOSTILE[:3]
    assert "formula" not in done.stderr
    done = run("tree-reduce", out, "--column", "response", "--prompt", "{responses}", "-o", top, *to(host))
    assert lines(top.read_text())[0]["response"] == "echo: " + "\n---\n".join(map(str, HOSTILE[:3]))


def test_columns_of_the_user_pass_unchanged(host, tmp_path):
    source, out, tree, merged = (tmp_path / name for name in ("in.csv", "out.csv", "tree.csv", "merged.csv"))
    own = [["k", "pKa", "pKa_error", "pKa_method", "response", "error"], ["'-a", "-x", "+/-0.2", "- none", "'=1", "-e"],
           ["'-a", "'-x", "@home", "'=2", "=3", "'+e"]]  # fmt: skip
    source.write_text("".join(",".join(row) + "\n" for row in own))
    ask = ["scatter", source, "--prompt", "{pKa} {response}", "--assistant-prefix", "=", "--out", "new", *to(host)]
    done = run(*ask, "-o", out)
    assert done.returncode == 0, done.stderr
    got = table(out)
    assert got[own[0]].to_numpy().tolist() == own[1:]
    assert got["new"].str.startswith("'=").all(), "the answers of the call are secured"
    assert [text.endswith(asked) for text, asked in zip(got["new"], ("-x '=1", "'-x =3"), strict=True)] == [True, True]
    done = run("tree-reduce", source, "--column", "pKa", "--by", "k", "--by", "pKa_method", "--trace",
               "--prompt", "{responses}", "-o", tree, *to(host))  # fmt: skip
    assert done.returncode == 0, done.stderr
    nodes = table(tree)
    assert nodes[["k", "pKa_method"]].to_numpy().tolist() == [["'-a", "'=2"], ["'-a", "- none"]]
    assert nodes["response"].tolist() == ["''-x", "'-x"], "the nodes of a tree are secured"
    done = run(
        "tree-reduce", source, "--column", "pKa", "--by", "k", "--prompt", "{responses}", "-o", merged, *to(host)
    )
    assert done.returncode == 0, done.stderr
    assert table(merged)["k"].tolist() == ["'-a"]


def test_a_terminal_is_not_controlled_by_what_is_printed():
    sink = io.BytesIO()
    file = TerminalFile(sink, encoding="utf-8", newline="")
    file.write("a\tb\x1b]0;title\x07\r\u202e\n\U0001f469\u200d\U0001f52c")
    file.flush()
    assert sink.getvalue().decode() == "a\tb\\x1b]0;title\\x07\\r\\u202e\n\U0001f469\u200d\U0001f52c"


# ---- before a run ------------------------------


def test_a_dry_run_says_what_would_be_asked_and_writes_nothing(swarm, host, tmp_path):
    source, out, store = tmp_path / "in.csv", tmp_path / "out.csv", tmp_path / "store"
    pd.DataFrame({"i": range(6), "t": ["a", "b", "b", None, "c", "d"]}).to_csv(source, index=False)
    words = ["scatter", source, "--prompt", "ask {t}", "--temperature", 0, "-o", out, "--store", store, *to(host)]
    run(*words, "--limit", 1)
    out.unlink()
    done = run(*words, "--dry-run")
    assert done.returncode == 1
    told = "of 6 rows 3 would be asked, 1 without a prompt, 2 answered already, or asked once with others"
    assert told in done.stderr, done.stderr
    assert "the first prompt: ask b" in done.stderr
    assert "missing value in column 't'" in done.stderr
    done = run(*words, "--dry-run", "--limit", 2)
    assert "of 6 rows 1 would be asked, 4 beyond --limit" in done.stderr, done.stderr
    assert not out.exists()
    assert not Path(f"{out}.part").exists()
    done = run(*words, "--store", tmp_path / "new", "--dry-run")
    assert "4 would be asked" in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_dry_run_of_trees_says_how_many_merges_there_would_be(host, tmp_path):
    source, out, store = tmp_path / "in.csv", tmp_path / "out.csv", tmp_path / "store"
    texts = ["a", "b", "c", "d", "e", "x", None, "y"]
    pd.DataFrame({"k": [*"1111122", None], "t": texts}).to_csv(source, index=False)
    words = ["tree-reduce", source, "--column", "t", "--by", "k", "--prompt", "Merge {k}: {responses}", "-o", out]
    words += ["--fanin", 2, *to(host)]
    done = run(*words, "--dry-run")
    assert done.returncode == 0, done.stderr
    told = "of 8 rows 6 in 2 groups: 4 merges on 3 levels would be asked, 1 without a text, 1 without a key; of"
    assert told in done.stderr, done.stderr
    assert "the first prompt: Merge 1: a" in done.stderr
    assert not out.exists()
    words += ["--store", store]
    assert run(*words).returncode == 0
    done = run(*words, "--overwrite", "--dry-run")
    assert "0 merges on 3 levels would be asked, 4 stored" in done.stderr, done.stderr
    wrong = run(*words, "--overwrite", "--dry-run", "--prompt", "no place")
    assert (wrong.returncode, "must hold {responses}" in wrong.stderr) == (2, True)


def test_a_preview_shows_whole_prompts_and_those_that_are_not_sent(host, tmp_path):
    source = tmp_path / "in.jsonl"
    texts = ["first\nline \x1b[31m", None, "w " * 300, "not shown"]
    source.write_text("".join(json.dumps({"t": t}) + "\n" for t in texts))
    done = run("preview", source, "--prompt", "Ask: {t}", "--system", "Be brief.", *to(host))
    assert done.returncode == 1
    assert "--- row 0, " in done.stdout
    assert "Be brief." in done.stdout
    assert "Ask: first\nline \\x1b[31m" in done.stdout
    assert "--- row 1: not sent, missing value in column 't'" in done.stdout
    assert "Ask: " + "w " * 300 in done.stdout
    assert "not shown" not in done.stdout


def test_a_preview_of_a_server_that_does_not_count_tokens(tmp_path):
    (tmp_path / "in.csv").write_text("t\na\n")
    with sk.local(1, engine="echo", tokenize=False, token=KEY) as swarm:
        done = run("preview", tmp_path / "in.csv", "--prompt", "Ask {t}", *to(hostfile(tmp_path / "h", swarm)))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("--- row 0\n")
    assert "Ask a" in done.stdout


def test_an_estimate_is_text_or_json(host, tmp_path):
    source = tmp_path / "in.csv"
    pd.DataFrame({"t": range(200)}).to_csv(source, index=False)
    words = ["estimate", source, "--prompt", "{t}", "--max-tokens", 8, "--price", "1,2", *to(host)]
    text, parsed = run(*words, "--quiet"), run(*words, "--json", "--sample", 16, "--quiet")
    assert (text.returncode, text.stderr) == (0, "")
    assert [line.split()[0] for line in text.stdout.splitlines()][:2] == ["rows", "time"]
    assert "to pay" in text.stdout
    found = json.loads(parsed.stdout)
    assert (found["rows"], found["sampled"]) == (200, 16)
    assert found["money"] > 0


# ---- ways and words ------------------------------


def test_advice_is_what_the_command_line_has(host, tmp_path):
    own, keys = tmp_path / "own.csv", tmp_path / "keys.csv"
    own.write_text("gene,response\nlacZ,mine\n")
    keys.write_text("k,t\n,a\nb,c\nb,d\n")
    for prompt in ("{gene}", "{response}"):
        done = run("scatter", own, "--prompt", prompt, "-o", tmp_path / "o.csv", *to(host))
        assert done.returncode == 2
        assert "give the answers another name, --out ..." in done.stderr
        assert "overwrite=" not in done.stderr
        done = run("estimate", own, "--prompt", prompt, "--max-tokens", 9, "--quiet", *to(host))
        assert (done.returncode, done.stderr) == (0, "")
    done = run("tree-reduce", keys, "--column", "t", "--by", "k", "--prompt", "M {responses}", "-o", "-", *to(host))
    assert done.returncode == 0, done.stderr
    assert "warning: 1 row without the key 'k', in no group\n" in done.stderr
    done = run("scatter", own, "--prompt", "{gene}", "--out", "new", "--max-tokens", 2, "-o", "-", *to(host))
    assert "1 of 1 answer was cut off at --max-tokens 2: raise --max-tokens\n" in done.stderr
    done = run("scatter", own, "--prompt", "{gene}", "--system", "Hi", "--chat", "none", "-o", "-", *to(host))
    assert "--system needs --chat auto: " in done.stderr


def test_what_is_refused_in_a_later_chunk_is_said_in_options_too(host, tmp_path):
    source = tmp_path / "in.jsonl"
    rows = [{"t": t, "response": None, "response_error": "lost"} for t in "abcdefgh"]
    rows[-1]["response_error"] = 5  # no error of ours, so that column is the user's
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("scatter", source, "--prompt", "{t}", "-o", tmp_path / "o.jsonl", "--chunk-rows", 1, *to(host))
    assert done.returncode == 4
    assert "--out response would overwrite 'response' of the frame" in done.stderr
    assert "it has 7 of 8 rows: the next ones are refused" in done.stderr
    kept = [row["response"] for row in lines((tmp_path / "o.jsonl.part").read_text())]
    assert kept[:4] == [f"echo: {t}" for t in "abcd"], "what was answered is kept"
    assert len(kept) == 7


def test_quiet_is_quiet(host, tmp_path):
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text("t;u\na\n")
    second.write_text("t;u,v\nb,\n")  # its columns are others, a value is missing, and one looks like several
    mixed = tmp_path / "mixed"
    mixed.write_text(host.read_text() + "127.0.0.1:9\n")
    words = ["scatter", first, second, "--prompt", "{v}", "-o", "-", *to(mixed)]
    loud, quiet = run(*words), run(*words, "--quiet")
    assert (loud.returncode, quiet.returncode) == (1, 1)
    for said in ("do not share the columns", "1 cannot be used", "2 failed"):
        assert said in loud.stderr
    assert quiet.stderr == ""
    assert quiet.stdout == loud.stdout


def test_how_endpoints_are_reached(host, tmp_path, swarm):
    source = tmp_path / "in.csv"
    GENES.to_csv(source, index=False)
    words = ["scatter", source, "--prompt", ASK, "-o", "-", *to(host)]
    done = run(*words, "--rpm", 600, "--tpm", 100_000, "--max-connections", 1)
    assert done.returncode == 0, done.stderr
    wrong = {
        "must be 'ssh:HOST'": ["--via", "login-node"],
        "--proxy takes no password": ["--proxy", f"http://me:{KEY}@squid:3128"],
        "named by --proxy-env is not set": ["--proxy-env", "NO_SUCH"],
        "nowhere.pem": ["--cert", "nowhere.pem"],
        "which --cert FILE names": ["--cert-key", "nowhere.pem"],
        "--verify nowhere.pem cannot be read": ["--verify", "nowhere.pem"],
    }
    for said, more in wrong.items():
        done = run(*words, *more)
        assert (done.returncode, done.stdout) == (2, ""), said
        assert said in done.stderr
    by_proxy = run("probe", "--proxy-env", "P", *to(host), env=environment(P=f"http://me:{KEY}@127.0.0.1:9"))
    assert by_proxy.returncode == 2
    assert "the proxy http://127.0.0.1:9" in run("probe", "--json", "--proxy", "127.0.0.1:9", *to(host)).stdout


def test_a_batch_file_that_is_none_says_why(host, tmp_path):
    source = tmp_path / "in.jsonl"
    body = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}
    source.write_text(json.dumps({"method": "POST", "url": "/v1/chat/completions", "body": body}) + "\n")
    done = run("scatter", source, "-o", "-", *to(host))
    assert done.returncode == 2
    assert "custom_id is missing" in done.stderr
    good = {"custom_id": "a", "url": "/v1/chat/completions", "body": body}
    source.write_text("".join(json.dumps(line) + "\n" for line in (good, {**good, "url": "/v1/embeddings"})))
    done = run("scatter", source, "-o", "-", *to(host))
    assert done.returncode == 1
    assert '1 line: its url is "/v1/embeddings"' in done.stderr
    assert "line 2" in done.stderr
    dry = run("scatter", source, "-o", "-", "--dry-run", *to(host))
    assert (dry.returncode, dry.stdout) == (1, "")
    assert "of 2 lines 1 would be asked, in 1 group" in dry.stderr
    done = run("scatter", source, "-o", "-", "--format", "csv", *to(host))
    assert "the answers to a batch file are JSON lines" in done.stderr


def test_help_fits_a_terminal_of_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    top = parser()
    commands = next(action for action in top._actions if isinstance(action.choices, dict)).choices
    assert isinstance(commands, dict)
    for help_text in [top.format_help(), *(command.format_help() for command in commands.values())]:
        assert max(map(len, help_text.splitlines())) <= 80, max(help_text.splitlines(), key=len)


# ---- embed ------------------------------


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_embed_writes_the_vectors_that_the_verb_gives(form, host, swarm, tmp_path):
    source, out = tmp_path / "texts.csv", tmp_path / f"out.{form}"
    source.write_text("k,t\n1,\n2,lacZ\n3,recA\n4,dnaA\n")
    words = ["embed", source, "--prompt", "gene: {t}", "-o", out, "--chunk-rows", 1, *to(host)]
    done = run(*words, "--limit", 2, "--store", tmp_path / "s")
    assert done.returncode == 1, done.stderr
    assert "4 rows, 1 failed" in done.stderr
    assert "1 row not asked, because of --limit" in done.stderr
    assert "swarmkit scatter" not in done.stderr
    done = run(*words, "--overwrite", "--store", tmp_path / "s")
    assert "2 stored" in done.stderr
    if form == "csv":
        vectors = [json.loads(text) if text else None for text in table(out)["embedding"]]
    elif form == "jsonl":
        vectors = [row["embedding"] for row in lines(out.read_text())]
    else:
        vectors = pd.read_parquet(out)["embedding"].tolist()
    assert vectors[0] is None
    with sk.connect(swarm) as pool:
        expected = sk.embed(pd.DataFrame({"t": ["lacZ", "recA", "dnaA"]}), "gene: {t}", pool=pool, as_array=True)
    assert np.array(vectors[1:], np.float32).tobytes() == expected.tobytes()


def test_embed_takes_no_options_of_answers(host, tmp_path):
    (tmp_path / "t.csv").write_text("t\nlacZ\n")
    done = run("embed", tmp_path / "t.csv", "--prompt", "{t}", "--temperature", 0, "-o", "-", *to(host))
    assert done.returncode == 2
    assert "--temperature" in done.stderr
