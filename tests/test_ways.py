"""Ways to endpoints through real programs: a login node (OpenSSH's ``sshd``) and a proxy (``squid``), on loopback."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from needs import need
from scripted import Scripted
from test_addresses import AtPath, model, program
from test_http import serve as serve_https
from test_http import tls_files

import swarmkit as sk

pytestmark = pytest.mark.long

SSHD, SQUID = "/usr/sbin/sshd", "/usr/sbin/squid"
NCSA = "/usr/lib/squid/basic_ncsa_auth"
PASSWORD = "pass-nobody-may-see"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as there:
        port: int = there.getsockname()[1]
    return port


def wait_until(true: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds:g} s"
        time.sleep(0.05)


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def children(pid: int) -> list[int]:
    """The processes below a process."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    below = [child for child, parent in parents.items() if parent == pid]
    return below + [each for child in below for each in children(child)]


@dataclass
class Login:
    """A login node: its process, its log, and the variables with which the command ``ssh`` finds it as ``login``."""

    folder: Path
    process: subprocess.Popen[bytes]

    def sockets(self) -> set[Path]:
        """The folders of forwards that are there."""
        return set((self.folder / "tmp").glob("swarmkit-ssh-*"))

    @property
    def logins(self) -> int:
        return (self.folder / "log").read_text().count("Accepted publickey")

    def cut(self) -> None:
        """End all its connections, as a restart of the machine would."""
        for pid in children(self.process.pid):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Login]:
    need(os.path.exists(SSHD) and shutil.which("ssh-keygen"), "OpenSSH's server: apt-get install openssh-server")
    folder = Path(tempfile.mkdtemp())  # a short path
    port = free_port()
    for name in ("host", "mine", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "mine.pub", folder / "authorized")
    (folder / "known").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    (folder / "sshd.conf").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
        "UsePAM no\nStrictModes no\nPidFile none\nPasswordAuthentication yes\nKbdInteractiveAuthentication no\n"
    )
    every = f"HostName 127.0.0.1\nPort {port}\nUser {getpass.getuser()}\nIdentitiesOnly yes\n"
    (folder / "ssh.conf").write_text(
        f"Host login\nIdentityFile {folder}/mine\nHost asks\nIdentityFile {folder}/other\n"
        f"Host stranger\nUserKnownHostsFile /dev/null\nHost *\n{every}UserKnownHostsFile {folder}/known\n"
        "LocalForward 9 localhost:9\nControlMaster auto\nControlPersist 60\n"  # as people have it for themselves
    )
    (folder / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    monkeypatch.setenv("TMPDIR", str(folder / "tmp"))
    (folder / "bin").mkdir()
    program(folder / "bin" / "ssh", f'exec {shutil.which("ssh")} -F {folder}/ssh.conf "$@"')
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    process = subprocess.Popen([SSHD, "-D", "-f", folder / "sshd.conf", "-E", folder / "log"])
    node = Login(folder, process)
    try:
        wait_until(lambda: listens(port))
        yield node
    finally:
        node.cut()
        process.kill()
        process.wait()
        shutil.rmtree(folder)


# ---- ssh ------------------------------


def test_endpoints_behind_a_login_node(login: Login, tmp_path: Path) -> None:
    df = pd.DataFrame({"i": range(400)})
    with (
        sk.local(1, engine="echo", addresses=40) as swarm,
        AtPath(model, tmp_path / "a.sock"),
        sk.connect(swarm, via="ssh:login") as pool,
    ):
        answers = df.swarm.scatter("n {i}", pool=pool, progress=False)
        assert answers["response"].tolist() == [f"echo: n {i}" for i in range(400)]
        names = sorted(endpoint.name for endpoint in sk.last_run().stats.endpoints)
        assert names == sorted(endpoint.name for endpoint in swarm.endpoints)
        (folder,) = login.sockets()
        assert folder.stat().st_mode & 0o77 == 0
        assert len([path for path in folder.iterdir() if path.name.isdecimal()]) == 40
        assert login.logins == 1
        address = f"unix:{tmp_path / 'a.sock'}"
        with sk.connect(address, via="ssh:login", chat=None) as there:  # a socket of the login node's
            assert df.head(2).swarm.scatter("n {i}", pool=there)["response"].tolist() == ["echo: n 0", "echo: n 1"]
    wait_until(lambda: not login.sockets())
    assert not [pid for pid in children(os.getpid()) if b"control" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_an_https_endpoint_behind_a_login_node_keeps_its_name(login: Login, tmp_path: Path) -> None:
    import ssl

    crt, key = tls_files(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(crt, key)
    for server in serve_https(context):
        with sk.connect(server.url, via="ssh:login", verify=crt) as pool:  # the certificate is that of localhost
            assert pool.model == "m"
        assert {h["host"] for h in server.seen} == {server.url.removeprefix("https://")}


def test_a_server_that_is_not_there(login: Login) -> None:
    with pytest.raises(sk.NoEndpointsError, match=r"127.0.0.1:9: .*or login cannot connect to it"):
        sk.connect("127.0.0.1:9", via="ssh:login")


@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
def test_a_server_that_dies_behind_a_login_node_costs_no_row(login: Login) -> None:
    df = pd.DataFrame({"i": range(80)})
    with (
        sk.local(2, engine="echo", tokens_per_s=20.0, max_num_seqs=4) as swarm,
        sk.connect(swarm, via="ssh:login") as pool,
    ):
        run = df.swarm.submit("n {i}", pool=pool, max_tokens=4)
        wait_until(lambda: run.partial()["response"].notna().sum() >= 8)
        swarm.processes[0].kill()
        answers = run.result()
    assert answers["response"].notna().all(), answers["response_error"].dropna().unique()


@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
def test_a_connection_that_is_lost_is_made_again_and_the_run_goes_on(login: Login) -> None:
    df = pd.DataFrame({"i": range(120)})
    slow = {"tokens_per_s": 20.0, "max_num_seqs": 4}
    with sk.local(1, engine="echo", addresses=4, **slow) as swarm, sk.connect(swarm, via="ssh:login") as pool:
        run = df.swarm.submit("n {i}", pool=pool, max_tokens=4)
        for _ in range(2):
            done = run.partial()["response"].notna().sum()
            wait_until(lambda done=done: run.partial()["response"].notna().sum() >= done + 4)
            login.cut()
        answers = run.result()
    assert answers["response_error"].isna().all()
    assert answers["response"].notna().all()
    assert login.logins == 3


@pytest.mark.parametrize(("host", "words"), [("asks", "Permission denied"), ("stranger", "verification failed")])
def test_a_host_that_asks_is_said_at_once(login: Login, host: str, words: str) -> None:
    began = time.monotonic()
    with pytest.raises(
        sk.NoEndpointsError, match=f"access denied: ssh to {host}: .*{words}.*`ssh {host}` once by hand"
    ):
        sk.connect("127.0.0.1:9", via=f"ssh:{host}")
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_nothing_is_left_of_a_process_that_ends(login: Login, how: str) -> None:
    with Scripted(model) as server:
        code = f"""
            import sys, swarmkit as sk
            sk.connect({server.address!r}, via="ssh:login", chat=None)
            print("connected", flush=True)
            sys.stdin.readline()
        """
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        with child:
            assert child.stdout
            assert child.stdout.readline() == "connected\n"
            left = children(child.pid)
            assert left
            assert login.sockets()
            child.kill() if how == "killed" else child.communicate("\n", timeout=20)
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}/exe") for pid in left))
    wait_until(lambda: not login.sockets())


# ---- squid ------------------------------


@pytest.fixture(scope="module")
def squid() -> Iterator[str]:
    need(os.path.exists(SQUID), "squid: apt-get install squid")
    folder, port = Path(tempfile.mkdtemp()), free_port()
    folder.chmod(0o755)  # it reads its passwords as a user of its own
    login = subprocess.run(["openssl", "passwd", "-apr1", PASSWORD], check=True, capture_output=True, text=True)
    (folder / "passwords").write_text(f"me:{login.stdout}")
    (folder / "squid.conf").write_text(
        f"http_port 127.0.0.1:{port}\nauth_param basic program {NCSA} {folder}/passwords\n"
        "acl known proxy_auth REQUIRED\nhttp_access allow known\nhttp_access deny all\ncache deny all\n"
        "access_log none\ncache_log /dev/null\npid_filename none\nshutdown_lifetime 0 seconds\n"
        "visible_hostname localhost\nnetdb_filename none\npinger_enable off\n"
    )
    process = subprocess.Popen([SQUID, "-N", "-f", folder / "squid.conf"], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: listens(port))
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


def test_http_and_https_through_squid(squid: str, tmp_path: Path) -> None:
    import ssl

    crt, key = tls_files(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(crt, key)
    df = pd.DataFrame({"i": range(50)})
    for server in serve_https(context):
        with sk.local(1, engine="echo", addresses=2) as swarm:
            login = f"http://me:{PASSWORD}@{squid}"
            with sk.connect(swarm, proxy=login) as pool:
                answers = df.swarm.scatter("n {i}", pool=pool, progress=False)
                assert answers["response"].tolist() == [f"echo: n {i}" for i in range(50)]
            with sk.connect(server.url, proxy=login, verify=crt) as pool:
                assert pool.model == "m"
            for target in (swarm, server.url):
                words = f"access denied: the proxy http://{squid} refused the request .HTTP 407"
                with pytest.raises(sk.NoEndpointsError, match=words) as caught:
                    sk.connect(target, proxy=f"http://me:not-{PASSWORD}@{squid}", verify=crt)
                assert "may-see" not in str(caught.value)
            for gone in ("https://127.0.0.1:9", "http://127.0.0.1:9"):
                with pytest.raises(sk.NoEndpointsError, match="HTTP 503"):
                    sk.connect(gone, proxy=login, verify=crt, probe_timeout=2)
