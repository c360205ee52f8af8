"""Waiting for a cluster whose hostfile and servers are still to come."""

import os
import subprocess
import sys
import threading

import pytest

import swarmkit as sk
from swarmkit.client.hostfile import AgentEndpoint, write_hostfile

KEY = "SWARMKIT_TEST_KEY"


@pytest.fixture
def listed(echo, monkeypatch):
    """The echo endpoints as a hostfile can list them: the key is named, not written."""
    monkeypatch.setenv(KEY, echo.endpoints[0].key())
    return [AgentEndpoint(e.host, e.port, key_env=KEY) for e in echo.endpoints]


def dead(port=9):
    return AgentEndpoint("127.0.0.1", port)


def test_the_hostfile_comes_late_and_grows(listed, tmp_path):
    path, said = tmp_path / "agents.hostfile", []
    seen = threading.Condition()

    def tell(line):
        with seen:
            said.append(line)
            seen.notify()

    def until(text):
        with seen:
            assert seen.wait_for(lambda: any(text in line for line in said), timeout=30)

    def cluster():
        until("there is no hostfile")
        path.write_text("half a line that is no\n")
        until("cannot be read yet")
        write_hostfile(path, [listed[0], dead()])
        until("1 of 2 endpoints are up")
        write_hostfile(path, listed)

    thread = threading.Thread(target=cluster)
    thread.start()
    pool = sk.wait_until_ready(path, every_s=0.05, output=tmp_path / "ready", tell=tell)
    thread.join()
    assert pool.size == 4
    assert said[-1] == "4 of 4 endpoints are up"
    ready = sk.parse_hostfile(tmp_path / "ready")
    assert [e.name for e in ready] == [e.name for e in listed]
    assert listed[0].key() not in (tmp_path / "ready").read_text()


def test_nodes_that_never_come_are_named_and_left_out(listed, tmp_path):
    path = tmp_path / "agents.hostfile"
    write_hostfile(path, [*listed[:3], dead()])
    with pytest.warns(sk.SwarmWarning, match=r"1 cannot be used:\n  127.0.0.1:9: cannot connect"):
        pool = sk.wait_until_ready(path, min_ready=0.75, patience_s=0.3, every_s=0.05, output=tmp_path / "ready")
    assert pool.size == 3
    assert len(sk.parse_hostfile(tmp_path / "ready")) == 3


def test_too_few_is_an_error_that_names_them_and_writes_nothing(listed, tmp_path):
    path = tmp_path / "agents.hostfile"
    write_hostfile(path, [listed[0], dead(), dead(10)])
    with pytest.raises(sk.NoEndpointsError, match=r"1 of 3 endpoints are up, 2 are needed(.|\n)*127.0.0.1:10: cannot"):
        sk.wait_until_ready(path, min_ready=2, patience_s=0.2, every_s=0.05, output=tmp_path / "ready")
    assert not (tmp_path / "ready").exists()
    with pytest.raises(sk.NoEndpointsError, match=r"no hostfile .* after 0.1 s"):
        sk.wait_until_ready(tmp_path / "never", timeout_s=0.1, every_s=0.05)


@pytest.mark.parametrize("min_ready", [0, -1, 1.5, 0.0])
def test_how_many_are_enough_must_make_sense(tmp_path, min_ready):
    with pytest.raises(sk.SettingError, match="min_ready"):
        sk.wait_until_ready(tmp_path / "x", min_ready=min_ready)


def test_an_endpoint_of_another_model_is_not_ready(listed, tmp_path):
    path = tmp_path / "agents.hostfile"
    write_hostfile(path, listed)
    with pytest.raises(sk.NoEndpointsError, match=r"0 of 4 endpoints are up(.|\n)*it serves echo, not other"):
        sk.wait_until_ready(path, timeout_s=0.1, every_s=0.05, model="other", output=tmp_path / "ready")
    assert not (tmp_path / "ready").exists()
    assert sk.wait_until_ready(path, timeout_s=5, model="echo", probe_timeout=5).size == 4


def test_an_unknown_keyword_is_refused_before_the_wait(tmp_path):
    with pytest.raises(TypeError, match="wait_until_ready takes no modle="):
        sk.wait_until_ready(tmp_path / "never", timeout_s=60, modle="m")


def test_from_a_shell(listed, tmp_path):
    path, ready = tmp_path / "agents.hostfile", tmp_path / "ready.hostfile"
    write_hostfile(path, [*listed, dead()])
    command = [sys.executable, "-m", "swarmkit", "wait", "--hostfile", str(path), "--every", "0.1", "--patience", "0.5"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, "--output", str(ready), "--min", "0.8"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "ready: 4 endpoints" in done.stderr
    assert len(sk.parse_hostfile(ready)) == 4
    failed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert failed.returncode == 3
    assert "5 are needed" in failed.stderr
