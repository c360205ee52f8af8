"""Exits, interrupts, forks, pickles, and what must never leave this process."""

import gc
import http.server
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import pandas as pd
import pytest
from jupyter_client.manager import KernelManager

import swarmkit as sk

pytestmark = pytest.mark.slow

SLOW = {"tokens_per_s": 20.0, "max_num_seqs": 2}


def python(code, **env):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env},
    )


def test_the_interpreter_exits_at_once_with_a_run_in_flight():
    child = python(
        f"""
        import pandas as pd, swarmkit as sk
        if __name__ == "__main__":
            swarm = sk.local(1, engine="echo", **{SLOW!r})
            sk.connect(swarm, batch=sk.BatchPolicy(max_size=10, max_in_flight=2))
            run = pd.DataFrame({{"i": range(500)}}).swarm.submit("n {{i}}")
            for frame in pd.DataFrame({{"i": range(2)}}).swarm.iter_scatter("n {{i}}", max_tokens=1):
                pass
            assert not run.done()
            print("leaving", flush=True)
        """
    )
    assert child.stdout.readline() == "leaving\n", child.stderr.read()
    left = time.monotonic()
    _, errors = child.communicate(timeout=20)
    assert time.monotonic() - left < 5
    assert child.returncode == 0
    assert errors == ""


@pytest.fixture
def kernel():
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)
    del manager, client
    with warnings.catch_warnings():  # jupyter_client leaves its own loop unclosed
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def run_cell(client, code, after_start=None):
    """Run a cell; return its printed text and the name of the error it ended with, if any."""
    printed, error = [], None

    def output(message):
        nonlocal error
        if message["msg_type"] == "stream":
            printed.append(message["content"]["text"])
            if after_start and "started" in message["content"]["text"]:
                after_start()
        elif message["msg_type"] == "error":
            error = message["content"]["ename"]

    client.execute_interactive(textwrap.dedent(code), output_hook=output, timeout=60)
    return "".join(printed), error


@pytest.mark.long  # with nothing beside it: it says how long an interrupt takes
def test_a_kernel_interrupt_stops_the_run_and_spares_the_local_endpoints(kernel):
    manager, client = kernel
    text, error = run_cell(
        client,
        """
        import pandas as pd, swarmkit as sk
        swarm = sk.local(2, engine="echo", tokens_per_s=20.0, max_num_seqs=4)
        pool = sk.connect(swarm)
        df = pd.DataFrame({"i": range(400)})
        """,
    )
    assert error is None, text
    pressed = []

    def press():
        time.sleep(4.0)
        pressed.append(time.monotonic())
        manager.interrupt_kernel()

    text, error = run_cell(
        client,
        """
        print("started", flush=True)
        df.swarm.scatter("n {i}", max_tokens=4, progress=False)
        """,
        after_start=lambda: threading.Thread(target=press).start(),
    )
    taken = time.monotonic() - pressed[0]
    assert error == "ScatterInterrupted"
    assert taken < 1.0
    text, error = run_cell(
        client,
        """
        import re, time, urllib.request
        def busy(e):
            request = urllib.request.Request(e.url + "/metrics", headers={"Authorization": "Bearer " + e.key()})
            text = urllib.request.urlopen(request).read().decode()
            return sum(map(int, re.findall(r"^vllm:num_requests_(?:running|waiting){.*} ([0-9]+)", text, re.M)))
        deadline = time.monotonic() + 2
        while any(map(busy, swarm.endpoints)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(busy, swarm.endpoints))
        done = sk.last_run().partial()
        finished = done.response.notna()
        print(len(done), 0 < finished.sum() < 400, set(done.response_error[~finished]))
        assert (done.response[finished] == "echo: n " + done.i[finished].astype(str)).all()
        rest = done.swarm.scatter("n {i}", only_missing=True, max_tokens=4, progress=False)
        print(rest.response.notna().all(), [p.poll() for p in swarm.processes])
        """,
    )
    assert error is None, text
    assert text == "400 True {'not finished'}\nTrue [None, None]\n"


def test_a_forked_child_has_a_loop_and_connections_of_its_own(pool):
    df = pd.DataFrame({"i": range(20)})
    df.swarm.scatter("n {i}")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            answers = df.swarm.scatter("n {i}")
            status = 0 if (answers["response"] == "echo: n " + answers["i"].astype(str)).all() else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert df.swarm.scatter("n {i}")["response"].notna().all()


def test_a_forked_child_lets_go_of_a_pool_without_a_word():
    child = python(
        """
        import gc, os, pandas as pd, swarmkit as sk
        if __name__ == "__main__":
            with sk.local(1, engine="echo") as swarm:
                pool = sk.VLLMPool(swarm.endpoints)
                df = pd.DataFrame({"i": range(2)})
                df.swarm.scatter("n {i}", pool=pool)
                child = os.fork()
                if child == 0:
                    del pool
                    gc.collect()
                    os._exit(0)
                print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
                print(df.swarm.scatter("n {i}", pool=pool).response.to_list())
        """
    )
    assert child.communicate(timeout=60) == ("0\n['echo: n 0', 'echo: n 1']\n", "")


def test_a_pool_pickles_as_a_recipe_without_keys(echo):
    with sk.connect(echo) as pool:
        key = pool.endpoints[0].key()
        data = pickle.dumps(pool)
        assert key.encode() not in data
        twin = pickle.loads(data)
    assert twin.endpoints == pool.endpoints
    assert twin.max_tokens == pool.max_tokens
    assert twin.endpoints[0].key() is None


def test_no_key_in_any_repr_or_error(echo):
    key = echo.endpoints[0].key()
    with sk.connect(echo) as pool:
        frame = pd.DataFrame({"i": [1, 2]}).swarm.scatter("n {i}", details=True)
        run = sk.last_run()
        shown = [pool, pool.endpoints, echo, run, run.stats, run._repr_html_(), run.stats._repr_html_(), frame.to_csv()]
        assert not [s for s in shown if key in repr(s)]
    with pytest.raises(sk.PoolClosedError) as closed:
        pd.DataFrame({"i": [1]}).swarm.scatter("n {i}", pool=pool)
    assert key not in repr(closed.value)


class _Recorder(http.server.BaseHTTPRequestHandler):
    seen: list = []  # noqa: RUF012 - one recorder a test module

    def do_GET(self):
        self.seen.append({name.lower(): value for name, value in self.headers.items()})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "m", "max_model_len": 100}]}')

    def log_message(self, *args):
        pass


def test_nothing_of_the_openai_environment_reaches_an_endpoint(monkeypatch):
    secrets = {
        "OPENAI_API_KEY": "sk-secret",
        "OPENAI_ADMIN_KEY": "admin-secret",
        "OPENAI_ORG_ID": "org-secret",
        "OPENAI_PROJECT_ID": "project-secret",
        "OPENAI_BASE_URL": "http://base-secret.invalid",
        "OPENAI_CUSTOM_HEADERS": "X-Custom: header-secret",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    server = http.server.HTTPServer(("127.0.0.1", 0), _Recorder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        sk.connect(address)
        sk.connect(address, api_key="mine")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    sent = repr(_Recorder.seen)
    assert "secret" not in sent
    assert "Bearer mine" in sent
    assert not [h for h in _Recorder.seen[:1] if "authorization" in h]
