"""Clusters: lists of hosts, the nodes of a job, and job scripts, run with stand-ins for what a cluster has."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path

import hypothesis.strategies as st
import pandas as pd
import pytest
from command import command
from hypothesis import given, settings
from needs import need

import swarmkit as sk
from swarmkit.client.host_list import expand, expand_list
from swarmkit.pool.targets import resolve

pytestmark = pytest.mark.slow

ROOT = Path(sk.__file__).parents[1]
KEY = "SWARMKIT_JOB_KEY"

# ---- lists of hosts ------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[001-004,7]", ["n001", "n002", "n003", "n004", "n7"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("n[1-2],gpu-[1-2][a-b]x,login", ["n1", "n2", "gpu-1ax", "gpu-1bx", "gpu-2ax", "gpu-2bx", "login"]),
        ("rack[0-1]n[08-10].example.org", [f"rack{r}n{n}.example.org" for r in (0, 1) for n in ("08", "09", "10")]),
        ("[1-2]", ["1", "2"]),
    ],
)
def test_lists_as_slurm_writes_them(text: str, names: list[str]) -> None:
    assert expand_list(text) == names


NAMES = st.lists(
    st.tuples(st.sampled_from(["n", "gpu-", "x1y", ""]), st.integers(1, 4), st.integers(0, 12)).map(
        lambda t: (t[0], str(t[2]).zfill(t[1]))
    ),
    min_size=1,
)


def folded(names: list[tuple[str, str]]) -> str:
    """Neighbours with a common prefix become one name with ranges, as ``scontrol show hostlist`` does it."""
    groups = []
    for prefix, group in groupby(names, key=lambda name: name[0]):
        runs: list[list[str]] = []
        for _, digits in group:
            if runs and digits == str(int(runs[-1][-1]) + 1).zfill(len(runs[-1][0])):
                runs[-1].append(digits)
            else:
                runs.append([digits])
        groups.append(f"{prefix}[{','.join('-'.join(dict.fromkeys((run[0], run[-1]))) for run in runs)}]")
    return ",".join(groups)


@settings(max_examples=50, deadline=None)
@given(NAMES)
def test_what_is_folded_expands_to_the_same_names(names: list[tuple[str, str]]) -> None:
    assert expand_list(folded(names)) == ["".join(name) for name in names]


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="n01-9,[]a:.", max_size=12))
def test_any_text_is_names_or_an_error(text: str) -> None:
    with contextlib.suppress(sk.HostfileError):
        assert len(expand(text)) <= 100_000


# ---- hostfiles, connect ------------------------------


def test_ranges_in_a_hostfile(tmp_path: Path) -> None:
    file = tmp_path / "agents.hostfile"
    file.write_text(
        "node[001-128]:8000 rack=a\n"
        "gpu[1-2] 9000  # two fields\n"
        "tile:[8000-8011]\n"
        "https://gate[1-2].example.org/llm key_env=SWARMKIT_K\n"
        "[2001:db8::7]:8000\nhttp://[fe80::1]:80\n"
    )
    found = sk.parse_hostfile(file)
    assert len(found) == 128 + 2 + 12 + 2 + 2
    assert (found[0].name, found[127].name, found[127].tags) == ("node001:8000", "node128:8000", {"rack": "a"})
    assert [e.name for e in found[128:130]] == ["gpu1:9000", "gpu2:9000"]
    assert found[141].name == "tile:8011"
    assert (found[143].url, found[143].key_env) == ("https://gate2.example.org:443/llm", "SWARMKIT_K")
    assert [e.host for e in found[144:]] == ["2001:db8::7", "fe80::1"]


def test_what_editors_of_windows_write_is_a_hostfile(tmp_path: Path) -> None:
    """A byte order mark, and lines that end in CR LF."""
    file = tmp_path / "agents.hostfile"
    file.write_bytes(b"\xef\xbb\xbfnode1 8000 rack=a\r\nnode2\r\n")
    assert [(e.name, e.tags) for e in sk.parse_hostfile(file)] == [("node1:8000", {"rack": "a"}), ("node2:8000", {})]
    file.write_bytes(b"\xef\xbb\xbfnode1\r\nnode2\r\n")
    assert [e.host for e in sk.hosts_from_env(env={"PBS_NODEFILE": str(file)})] == ["node1", "node2"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("n[1-999999999]:8000", "more than 100,000 hosts"),
        ("n[1-1000][1-1000]:8000", "more than 100,000 hosts"),
        ("m[1-99999]:8000", "more than 100,000 hosts"),  # with the two of the first line
        ("n[4-1]:8000", r"'4-1' in brackets is no range.*node\[001-128\]"),
        ("n[]:8000", "'' in brackets is no range"),
        ("n[1-2-3]:8000", "no range"),
        ("n[-ab]:8000", "no range"),
        ("n[1-b]:8000", "no range"),
        ("n[١-٣]:8000", "no range"),
        ("n[1-3:8000", r"'\[' has no bracket"),
        ("n1-3]:8000", r"'\]' has no bracket"),
        ("n[1-2],m[1-2]:8000", "not a host name"),
        ("n[2-3]:8000", "n2:8000 is already on line 1"),
        ("n[1234567890123456]:8000", "a text of 16 characters in brackets is no range"),  # it may be a key
    ],
)
def test_a_range_that_cannot_be(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "agents.hostfile"
    file.write_text(f"n[1-2]:8000\n{line}\n")
    with pytest.raises(sk.HostfileError, match=f"agents.hostfile, line 2: .*{words}"):
        sk.parse_hostfile(file)


@pytest.fixture
def port(echo: sk.LocalSwarm) -> int:
    """The four echo endpoints are 127.0.0.1 to 127.0.0.4, all at this port."""
    return echo.endpoints[0].port


def test_connect_to_a_range_and_to_the_nodes_of_a_job(
    echo: sk.LocalSwarm, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = echo.endpoints[0].key()
    monkeypatch.setenv("SLURM_JOB_NODELIST", "127.0.0.[1-2,4]")
    nodes = tmp_path / "nodes"
    nodes.write_text("127.0.0.3\n127.0.0.3\n127.0.0.1\n")
    monkeypatch.setenv("PBS_NODEFILE", str(nodes))
    hosts = {f"127.0.0.[1-4]:{port}": "1234", f"slurm:{port}": "124", f"pbs:{port}": "31"}
    for target, found in hosts.items():
        with sk.connect(target, api_key=key) as pool:
            assert [e.name for e in pool.endpoints] == [f"127.0.0.{n}:{port}" for n in found]
            assert pd.DataFrame({"a": ["x"] * 8}).swarm.scatter("a")["response"].notna().all()
    assert [e.name for e in resolve("slurm:")] == [f"127.0.0.{n}:8000" for n in (1, 2, 4)]


def test_the_nodes_of_a_job(tmp_path: Path) -> None:
    nodes = tmp_path / "nodes"
    nodes.write_text("x4b0.mgmt.example.org\nx4b0.mgmt.example.org\n\nx2b0\n10.0.0.7\n")
    pbs = {"PBS_NODEFILE": str(nodes), "SLURM_JOB_NODELIST": ""}
    assert [e.name for e in sk.hosts_from_env(9000, env=pbs)] == [
        *("x4b0.mgmt.example.org:9000", "x2b0:9000", "10.0.0.7:9000")
    ]
    renamed = sk.hosts_from_env(per_node=2, suffix=".hsn.example.org", env=pbs)
    assert [e.name for e in renamed] == [
        *("x4b0.hsn.example.org:8000", "x4b0.hsn.example.org:8001", "x2b0.hsn.example.org:8000"),
        *("x2b0.hsn.example.org:8001", "10.0.0.7:8000", "10.0.0.7:8001"),
    ]
    slurm = {**pbs, "SLURM_JOB_NODELIST": "n[1-2]"}
    assert [e.name for e in sk.hosts_from_env(env=slurm, suffix="-ib0")] == ["n1-ib0:8000", "n2-ib0:8000"]


def test_a_job_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SLURM_JOB_NODELIST", "PBS_NODEFILE"):
        monkeypatch.delenv(variable, raising=False)
    empty = tmp_path / "empty"
    empty.touch()
    wrong = {
        r"neither \$SLURM_JOB_NODELIST nor \$PBS_NODEFILE is set.*node\[001-128\]": {},
        r"\$PBS_NODEFILE: cannot read the file '/no/where'": {"PBS_NODEFILE": "/no/where"},
        r"\$PBS_NODEFILE: the file .* holds no node": {"PBS_NODEFILE": str(empty)},
        r"\$SLURM_JOB_NODELIST: '3-1' in brackets is no range": {"SLURM_JOB_NODELIST": "n[3-1]"},
        r"\$SLURM_JOB_NODELIST: ' ,' names no node": {"SLURM_JOB_NODELIST": " ,"},
        r"\$SLURM_JOB_NODELIST: its ranges stand for more": {"SLURM_JOB_NODELIST": "a[1-60000],b[1-60000]"},
    }
    for words, env in wrong.items():
        with pytest.raises(sk.HostfileError, match=words):
            sk.hosts_from_env(env=env)
    with pytest.raises(sk.HostfileError, match=r"\$PBS_NODEFILE is not set"):
        sk.connect("pbs:")
    with pytest.raises(sk.SettingError, match="port=65535, per_node=2"):
        sk.hosts_from_env(65535, 2, env={"SLURM_JOB_NODELIST": "n1"})
    with pytest.raises(sk.SettingError, match="port='8000', per_node=1: both must be whole numbers"):
        sk.hosts_from_env("8000", env={"SLURM_JOB_NODELIST": "n1"})  # as os.environ has it
    with pytest.raises(sk.HostfileError, match="'abc' is not a port"):
        sk.connect("slurm:abc")


# ---- job scripts ------------------------------

NASTY = """it's "a" $(touch pwned) `touch pwned`; model\\"""
# What runs a command on every node of 127.0.0.[1-2], whatever its own options are, and ends it when it is told to.
ON_NODES = """#!/bin/bash
while [ "$1" != bash ]; do shift; done
trap 'kill "${running[@]}"' TERM
for NODE in 127.0.0.1 127.0.0.2; do NODE=$NODE "$@" & running+=($!); done
wait
wait
"""
SHOWS = """#!/bin/bash
printf '<%s>\\n' "$@" "$CUDA_VISIBLE_DEVICES" "$ZE_AFFINITY_MASK" "${#VLLM_API_KEY}" "$MARK"
"""
SERVES = f"""#!/bin/bash
export SWARMKIT_LOCAL_KEY=$VLLM_API_KEY
exec {sys.executable} -m swarmkit serve --engine echo --model "$2" --port "$4" --option addresses='["'"$(hostname)"'"]'
"""
TEMPLATES = ["job.slurm", "job.pbs"]


class Cluster:
    """A folder, and in its ``bin`` what a cluster's nodes have: the launchers, and a vLLM."""

    def __init__(self, folder: Path, vllm: str) -> None:
        self.folder = folder
        self.hostfile = folder / "the hosts"
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PBS"))},
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        (folder / "bin").mkdir()
        hostname = '#!/bin/bash\necho "$NODE"\n'
        for name, text in {"srun": ON_NODES, "mpiexec": ON_NODES, "hostname": hostname, "vllm": vllm}.items():
            file = folder / "bin" / name
            file.write_text(text)
            file.chmod(0o755)

    def launch(self, template: str, *words: object, server: tuple[str, ...] = ()) -> Path:
        """The script that ``swarmkit launch`` writes, for two servers on each of two nodes."""
        script = self.folder / "a script"
        words = ("--model", NASTY, "--nodes", 2, "--per-node", 2, "--hostfile", self.hostfile, *words, "-o", script)
        done = command("launch", "--template", template, *words, *(("--", *server) if server else ()), env=self.env)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert f"{'qsub' if 'pbs' in template else 'sbatch'} '{script}'" in done.stderr
        assert "4 servers; nothing is submitted" in done.stderr
        return script

    def run(self, template: str, script: Path) -> subprocess.Popen[str]:
        """The script as the batch system would run it on the job's first node."""
        nodes = self.folder / "nodes"
        nodes.write_text("127.0.0.1\n127.0.0.2\n")
        job = {"PBS_NODEFILE": str(nodes)} if "pbs" in template else {"SLURM_JOB_NODELIST": "127.0.0.[1-2]"}
        return subprocess.Popen(
            ["bash", script], cwd=self.folder, env={**self.env, **job}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize("template", ["job.slurm", pytest.param("job.pbs", marks=pytest.mark.long)])
def test_servers_that_end_at_once_end_the_job(tmp_path: Path, template: str) -> None:
    cluster = Cluster(tmp_path, SHOWS)
    script = cluster.launch(
        template, "--gpus", 3, "--port", 9000, "--setup", "export MARK='set up'", "--walltime", "2:30:00",
        server=("--max-model-len", "8192", "--x", "a b'c"),
    )  # fmt: skip
    text = script.read_text()
    assert "time=2:30:00" in text
    assert "select=2\n" in text or "--nodes=2\n" in text
    with cluster.run(template, script) as job:
        out, _ = job.communicate(timeout=240)
    assert job.returncode == 1
    assert f"see what they say in {cluster.hostfile}.logs" in out
    logs = {file.name: file.read_text() for file in Path(f"{cluster.hostfile}.logs").glob("*.log")}
    assert sorted(logs) == [f"127.0.0.{node}-{port}.log" for node in (1, 2) for port in (9000, 9001)]
    words = ["serve", NASTY, "--port", "9001", "--tensor-parallel-size", "3", "--max-model-len", "8192", "--x", "a b'c"]
    assert logs["127.0.0.2-9001.log"] == "".join(f"<{w}>\n" for w in [*words, "3,4,5", "3,4,5", "48", "set up"])
    assert not (tmp_path / "pwned").exists()
    left = {file.name for file in tmp_path.iterdir()} - {"nodes"}
    assert left == {"bin", "a script", "the hosts.logs"}  # no hostfile, and no key


def test_launch_refuses_what_cannot_be(tmp_path: Path) -> None:
    script = tmp_path / "job.pbs"
    script.write_text("precious")
    words = ["--template", "job.pbs", "--model", "m", "--nodes", 2]
    wrong = {
        "job.pbs exists already: --overwrite": ["-o", script],
        "--walltime 90: write hours": ["--walltime", "90"],
        "--port 65530 and the 11 after it": ["--port", 65530, "--per-node", 12],
        "'0' is not a whole number": ["--nodes", 0],
        "--suffix '.x y': write what follows": ["--suffix", ".x y"],
        "--model is empty: name a model": ["--model", " "],
        "invalid choice: 'job.lsf'": ["--template", "job.lsf"],
    }
    for says, more in wrong.items():
        done = command("launch", *words, "-o", tmp_path / "new", *more, env={**os.environ})
        assert (done.returncode, says in done.stderr) == (2, True), done.stderr
    assert script.read_text() == "precious"
    assert [*tmp_path.iterdir()] == [script]


def free_port() -> int:
    """A port that is free on both nodes, as is the one after it."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = first.getsockname()[1]
        try:
            for address in (("127.0.0.1", port + 1), ("127.0.0.2", port), ("127.0.0.2", port + 1)):
                socket.create_server(address).close()
        except OSError:
            continue
        return int(port)


@pytest.mark.long
@pytest.mark.timeout(500)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_job_from_its_script_to_the_end(tmp_path: Path, template: str) -> None:
    cluster, port = Cluster(tmp_path, SERVES), free_port()
    hostfile, key = cluster.hostfile, Path(f"{cluster.hostfile}.key")
    hostfile.write_text("old:1\n")
    with cluster.run(template, cluster.launch(template, "--port", port)) as job:
        try:
            deadline = time.monotonic() + 300
            while not (hostfile.exists() and "old" not in hostfile.read_text()) and time.monotonic() < deadline:
                assert job.poll() is None, job.communicate()[0]
                time.sleep(0.2)
            lines = hostfile.read_text().splitlines()
            assert lines == [f"127.0.0.{node}:{port + i}\tkey_env={KEY}" for node in (1, 2) for i in (0, 1)]
            assert stat.S_IMODE(key.stat().st_mode) == 0o600
            secret = key.read_text()
            assert re.fullmatch(r"[0-9a-f]{48}", secret)
            table = tmp_path / "in.csv"
            table.write_text("a\n" + "x\n" * 40)
            env = {**cluster.env, KEY: secret}
            words = ("scatter", table, "--prompt", "{a}", "-o", tmp_path / "out.csv", "--hostfile", hostfile)
            assert command(*words, env=env).returncode == 0
            assert pd.read_csv(tmp_path / "out.csv")["response"].notna().sum() == 40
            models = json.loads(command("probe", "--json", "--hostfile", hostfile, env=env).stdout)["endpoints"]
            assert [e["models"] for e in models] == [[NASTY]] * 4
        finally:
            job.send_signal(signal.SIGTERM)
            said = job.communicate(timeout=60)[0]
    assert job.returncode == 143
    assert f"ready: 4 endpoints, listed in {hostfile}" in said
    assert not hostfile.exists()
    assert not key.exists()
    assert not [p for p in [said, *(f.read_text() for f in tmp_path.rglob("*.log"))] if secret in p]
    for address in [(f"127.0.0.{node}", port + i) for node in (1, 2) for i in (0, 1)]:
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(address, timeout=5)


@pytest.mark.long
@pytest.mark.parametrize("template", TEMPLATES)
def test_job_scripts_pass_shellcheck(tmp_path: Path, template: str) -> None:
    need(shutil.which("shellcheck"), "shellcheck")
    script = Cluster(tmp_path, SHOWS).launch(template, "--model", "m", "--setup", "module load conda", server=("--x",))
    for words in (["bash", "-n"], ["shellcheck"]):
        done = subprocess.run([*words, script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
