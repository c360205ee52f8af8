"""The promises about requests and time, over real sockets."""

import re
import socket
import threading
import time
import urllib.request

import pandas as pd

import swarmkit as sk


def requests_served(swarm, path="/v1/completions"):
    """Requests per address, as the servers themselves count them."""
    endpoint = swarm.endpoints[0]
    request = urllib.request.Request(
        f"{endpoint.url}/metrics?all=1", headers={"Authorization": f"Bearer {endpoint.key()}"}
    )
    text = urllib.request.urlopen(request, timeout=10).read().decode()
    found = re.findall(r'^swarmkit:requests_total\{address="([^"]+)",.*path="([^"]+)".*\} (\d+)', text, re.MULTILINE)
    return {address: int(count) for address, route, count in found if route == path}


def test_ten_thousand_prompts_over_a_hundred_endpoints_are_a_hundred_requests():
    df = pd.DataFrame({"i": range(10_000)})
    with sk.local(1, engine="echo", addresses=100) as swarm, sk.connect(swarm):
        df.iloc[:1].swarm.scatter("warm up {i}")  # probes and template learning are not counted
        before = requests_served(swarm)
        answers = df.swarm.scatter("number {i}")
        after = requests_served(swarm)
    assert (answers["response"] == "echo: number " + answers["i"].astype(str)).all()
    counts = {address: after[address] - before.get(address, 0) for address in after}
    assert len(counts) == 100
    assert set(counts.values()) == {1}


def test_the_prompts_of_a_slow_endpoint_are_stolen():
    # The same in virtual time, for 100,000 rows and both deliveries, is in test_scheduler.py; here the clock is
    # this machine's, so the fleet is slow enough for its speed and not for the client's to count.
    df = pd.DataFrame({"i": range(8_000)})
    speed = {"tokens_per_s": 20.0, "max_num_seqs": 64}
    slow = {"127.0.0.5": {"tokens_per_s": 2.0, "max_num_seqs": 64}}
    taken = {}
    for name, speeds in {"even": {}, "one slow": slow}.items():
        with sk.local(1, engine="echo", addresses=5, speeds=speeds, **speed) as swarm, sk.connect(swarm) as pool:
            began = time.monotonic()
            answers = df.swarm.scatter("n {i}", max_tokens=4, details=True)
            taken[name] = time.monotonic() - began
            assert answers["response_error"].isna().all()
            assert pool.size == 5
    slow_ones = (answers["response_endpoint"].str.startswith("127.0.0.5")).sum()
    assert 0 < slow_ones < 600, "a tenth of the speed is far less than a fifth of the rows"
    # Four healthy ones would need 5/4 of what five do.
    assert taken["one slow"] <= 1.3 * 1.25 * taken["even"]


class _GoesSilent(threading.Thread):
    """A server told to stop, as vLLM does it: its listening socket is gone, its clients' connections hang."""

    def __init__(self):
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.asked = []
        self.over = threading.Event()

    def run(self):
        connection, _ = self.listener.accept()
        self.asked.append(connection.recv(65536))
        self.listener.close()
        self.over.wait(30)
        connection.close()


def test_an_endpoint_that_goes_silent_for_good_is_given_up_long_before_its_timeout():
    silent = _GoesSilent()
    silent.start()
    df = pd.DataFrame({"i": range(10)})
    with sk.local(1, engine="echo") as swarm:
        (good,) = swarm.endpoints
        model = swarm.model
        pool = sk.VLLMPool([good, ("127.0.0.1", silent.port)], model=model, retry=sk.RetryPolicy(quiet_s=0.5))
        began = time.monotonic()
        answers = df.swarm.scatter("n {i}", pool=pool, mode="single", chat=None, details=True)
        taken = time.monotonic() - began
        with pool:
            pass
    silent.over.set()
    silent.join()
    assert answers["response"].notna().all()
    assert silent.asked
    assert taken < 20, "the timeout is 300 s"
    assert (answers["response_attempts"] > 1).any()
