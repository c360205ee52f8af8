"""Child processes: they start, they say why not, and they never outlive their parent."""

from __future__ import annotations

import gc
import http.client
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import psutil
import pytest
from test_server_http import Client, eventually

import swarmkit
from swarmkit.errors import SettingError
from swarmkit.server import LocalServerError, local
from swarmkit.server.listen import bind, loopback_addresses

pytestmark = pytest.mark.slow

# The package without its __init__, which imports pandas: a dozen parents start here, and none needs it.
PRELUDE = f"""
import sys, os, time, signal, types
package = sys.modules["swarmkit"] = types.ModuleType("swarmkit")
package.__path__, package.__version__ = {list(swarmkit.__path__)!r}, "0"
from swarmkit.server import local
"""


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def in_a_parent(code: str, **options: Any) -> subprocess.Popen[str]:
    """A Python process of its own that runs the code and then prints the pids of its servers."""
    return subprocess.Popen([sys.executable, "-c", PRELUDE + code], stdout=subprocess.PIPE, text=True, **options)


START = "s = local(2, engine='echo'); print(*(p.pid for p in s.processes), flush=True)\n"


def pids_of(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    return [int(pid) for pid in process.stdout.readline().split()]


def test_each_process_and_address_is_an_endpoint() -> None:
    with local(2, engine="echo", addresses=3) as swarm:
        assert [e.host for e in swarm.endpoints] == ["127.0.0.1", "127.0.0.2", "127.0.0.3"] * 2
        assert len(set(swarm.urls)) == 6
        assert len(swarm.processes) == 2
        assert [e.tags["process"] for e in swarm.endpoints] == ["0"] * 3 + ["1"] * 3
        for endpoint in swarm.endpoints:
            assert Client(endpoint).texts(prompt="x") == ["echo: x"]


def test_the_token_shows_nowhere() -> None:
    with local(engine="echo") as swarm:
        token = swarm.endpoints[0].key()
        assert token
        assert len(token) > 20
        process = psutil.Process(swarm.processes[0].pid)
        places = [repr(swarm), repr(swarm.endpoints), *process.cmdline(), *process.environ().values()]
        assert not any(token in place for place in places)
        assert token.encode() not in pickle.dumps(swarm.endpoints)


def test_stop_is_idempotent_and_at_once() -> None:
    with local(2, engine="echo") as swarm:
        processes = swarm.processes
        begin = time.monotonic()
        swarm.stop()
        assert time.monotonic() - begin < 3
        assert all(process.returncode is not None for process in processes)
        assert "stopped" in repr(swarm)
        swarm.stop()
    assert swarm.processes == []


def test_a_hanging_request_does_not_hold_up_the_stop() -> None:
    with local(engine="echo", faults=["hang"]) as swarm:
        client = Client(swarm.endpoints[0])
        with pytest.raises(TimeoutError):
            client.send("POST", "/v1/completions", {"prompt": "x"}, timeout=0.2)
        connection = http.client.HTTPConnection(client.endpoint.host, client.endpoint.port)
        connection.request("POST", "/v1/completions", '{"prompt": "x"}', {"Authorization": f"Bearer {client.key}"})
        begin = time.monotonic()
        swarm.stop()
        assert time.monotonic() - begin < 5
        connection.close()


def test_what_runs_at_the_stop_ends_as_aborted() -> None:
    with local(engine="echo", tokens_per_s=20) as swarm:
        client = Client(swarm.endpoints[0])
        replies: list[dict[str, Any]] = []
        body = {"prompt": ["x" * 200, "y"], "max_tokens": 40, "stream": False}
        thread = threading.Thread(target=lambda: replies.append(client.complete(**body)))
        thread.start()
        eventually(lambda: client.metric("vllm:num_requests_running") == 1)
        swarm.processes[0].terminate()
        thread.join()
        assert [c["finish_reason"] for c in replies[0]["choices"]] == ["abort", "stop"]


ENDS = {
    "killed": "time.sleep(60)",
    "terminated": "time.sleep(60)",
    "end of the script": "",
    "SystemExit": "raise SystemExit(3)",
    "an exception": "1 / 0",
    "the name is gone": "del s",
    "os._exit": "os._exit(1)",
}


def test_servers_end_with_their_parent_however_it_ends() -> None:
    parents = {name: in_a_parent(START + last, stderr=subprocess.DEVNULL) for name, last in ENDS.items()}
    pids = {name: pids_of(parent) for name, parent in parents.items()}
    assert all(len(children) == 2 for children in pids.values())
    assert not any(map(gone, pids["killed"] + pids["terminated"]))
    parents["killed"].kill()
    parents["terminated"].terminate()
    for name, parent in parents.items():
        with parent:
            parent.wait()
        eventually(lambda name=name: all(map(gone, pids[name])))


def test_servers_that_are_let_go_of_run_on() -> None:
    before = psutil.Process().children()
    endpoint = local(engine="echo").endpoints[0]
    gc.collect()
    assert Client(endpoint).texts(prompt="x") == ["echo: x"]
    for process in set(psutil.Process().children()) - set(before):
        process.terminate()


def test_a_hung_fork_of_a_killed_parent_does_not_keep_them() -> None:
    code = "child = os.fork()\nif child == 0: time.sleep(60)\nprint(child, flush=True); time.sleep(60)"
    with in_a_parent(START + code) as parent:
        pids = pids_of(parent)
        (fork,) = pids_of(parent)
        parent.kill()
        parent.wait()
        eventually(lambda: all(map(gone, pids)))
        os.kill(fork, signal.SIGKILL)


def test_a_forked_child_leaves_the_servers_alone() -> None:
    code = (
        "child = os.fork()\n"
        "if child == 0: s.stop(); sys.exit()\n"
        "os.waitpid(child, 0); print(*(p.poll() for p in s.processes), flush=True); s.stop()"
    )
    with in_a_parent(START + code) as parent:
        pids_of(parent)
        assert parent.stdout is not None
        assert parent.stdout.readline().split() == ["None", "None"]


def test_an_interrupt_of_the_process_group_does_not_reach_them() -> None:
    heard = "signal.signal(signal.SIGINT, lambda *_: print('interrupted', flush=True))\n"
    with in_a_parent(heard + START + "while True: time.sleep(1)", start_new_session=True) as parent:
        pids = pids_of(parent)
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.stdout is not None
        assert parent.stdout.readline() == "interrupted\n"
        time.sleep(0.3)
        assert not any(map(gone, pids))
        parent.kill()


def test_a_server_that_does_not_start_says_why() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LocalServerError, match=f"cannot listen on 127.0.0.1 port {port}"):
            local(engine="echo", port=port)


def test_a_given_port_and_token_are_used() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with local(engine="echo", port=port, token="mine") as swarm:
        assert swarm.urls == [f"http://127.0.0.1:{port}"]
        assert Client(swarm.endpoints[0], "mine").texts(prompt="x") == ["echo: x"]


@pytest.mark.parametrize("address", ["0.0.0.0", "10.0.0.1", "::", "8.8.8.8", "localhost"])
def test_only_loopback_addresses_are_listened_on(address: str) -> None:
    with pytest.raises(SettingError, match=r"loopback|IP address"):
        local(engine="echo", addresses=[address])


def test_ipv6_loopback_works() -> None:
    with local(engine="echo", addresses=["::1", "127.0.0.9"]) as swarm:
        assert swarm.urls[0].startswith("http://[::1]:")
        for endpoint in swarm.endpoints:
            assert Client(endpoint).texts(prompt="x") == ["echo: x"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"engine": "gpt"}, "'auto', 'echo', 'openvino' or 'wordllama', not 'gpt'"),
        ({"engine": "echo", "tokens": 5}, "no option 'tokens'; its options are: latency_s"),
        ({"engine": "openvino", "latency_s": 5}, "no option 'latency_s'; its options are: max_model_len"),
        ({"engine": "openvino", "model": "/nowhere.gguf"}, "there is no file at '/nowhere.gguf'"),
        ({"engine": "echo", "n": 0}, "n must be 1 or more"),
        ({"engine": "echo", "n": 2, "port": 8000}, "1 if a port is given"),
        ({"engine": "echo", "addresses": 0}, "addresses must be 1 or more"),
        ({"engine": "echo", "addresses": []}, "at least one address"),
        ({"engine": "echo", "faults": ["boom"]}, "unknown fault 'boom'"),
        ({"engine": "echo", "constraints": "some"}, "one of obey, ignore, refuse, chat, old, not 'some'"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(options: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError, match=re.escape(says)):
        local(**options)


def test_many_addresses_share_a_port() -> None:
    addresses = loopback_addresses(4000)
    assert len(set(addresses)) == 4000
    sockets = bind(addresses)
    try:
        assert {sock.getsockname()[0] for sock in sockets} == set(addresses)
        assert len({sock.getsockname()[1] for sock in sockets}) == 1
    finally:
        for sock in sockets:
            sock.close()


def test_4000_endpoints_in_one_process() -> None:
    with local(engine="echo", addresses=4000) as swarm:
        assert len(swarm.endpoints) == 4000
        for endpoint in swarm.endpoints[::997]:
            assert Client(endpoint).texts(prompt="x") == ["echo: x"]


def test_the_package_is_the_function_too() -> None:
    with swarmkit.local(engine="echo") as swarm:
        assert swarm.engine == "echo"


def serve(code: str) -> subprocess.Popen[str]:
    return in_a_parent(f"from swarmkit.server.serve import serve\n{code}", stderr=subprocess.PIPE)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_serve_runs_in_the_foreground_and_says_where(end: signal.Signals) -> None:
    with serve("serve(engine='echo', port=0)") as process:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)$", process.stdout.readline().strip())
        assert found
        token = process.stdout.readline().split()[-1]
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]))
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {token}"})
        assert json.loads(connection.getresponse().read())["data"][0]["id"] == "echo"
        connection.close()
        process.send_signal(end)
        process.wait(10)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_serve_does_not_show_a_token_it_was_given() -> None:
    with serve("serve(engine='echo', port=0, addresses=3, token='hush')") as process:
        assert process.stdout is not None
        first, second = process.stdout.readline(), process.stdout.readline()
        assert "3 addresses" in first
        assert "hush" not in first + second
        process.kill()


def test_auto_without_openvino_warns_and_echoes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino_genai", None)  # as if it were not installed
    with pytest.warns(UserWarning, match="echo their prompts"), local() as swarm:
        assert swarm.engine == "echo"
