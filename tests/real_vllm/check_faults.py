"""Real vLLM servers stopped, killed and paused in the middle of a batch.

Run by ``pytest tests/real_vllm/check_faults.py`` after ``python tests/real_vllm/serve.py setup``: it starts servers of
its own, two for each fault.
"""

import os
import re
import signal
import urllib.request

import pandas as pd
import pytest
from serve import Server, server

import swarmkit as sk

ROWS = 300
TOKENS = 150


def counter(url, name):
    text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    return sum(float(v) for v in re.findall(rf"^{re.escape(name)}\{{.*\}} (\S+)$", text, re.MULTILINE))


def prompts_finished(url):
    return int(counter(url, "vllm:request_params_n_count"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL", "SIGSTOP"])
def test_rows_delivered_before_a_server_died_are_kept_and_only_the_others_sent_again(how):
    df = pd.DataFrame({"i": range(ROWS)})
    with (
        server("tiny") as doomed,
        server("tiny") as other,
        # Duplicates of rows that are late would be counted, too.
        sk.connect([doomed.url, other.url], retry=sk.RetryPolicy(quiet_s=3.0), batch=sk.BatchPolicy(hedge=False)),
    ):
        options = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "details": True}
        df.iloc[:2].swarm.scatter("warm up {i}", **options)
        before = prompts_finished(other.url)
        answers = []
        for frame in df.swarm.iter_scatter("number {i}", **options):
            answers.append(frame)
            name = doomed.url.removeprefix("http://")
            if doomed_is_up(doomed) and sum((f["response_endpoint"] == name).sum() for f in answers) > 20:
                kill(doomed, how)
        if how == "SIGSTOP":
            os.killpg(doomed.pid, signal.SIGCONT)  # so that it can be stopped
        run = sk.last_run()
        served_by_other = prompts_finished(other.url) - before
    rows = pd.concat(answers)
    kept = int((rows["response_endpoint"] == name).sum())
    assert len(rows) == ROWS
    assert rows["response"].notna().all()
    assert kept > 20
    # The other server finished exactly the rows that the dead one had not delivered.
    assert served_by_other == ROWS - kept
    print(f"\n{how}: {kept} rows kept, {served_by_other} by the other server, {run.stats!r}")


def doomed_is_up(served: Server) -> bool:
    return served.pid not in _killed


_killed: set[int] = set()


def kill(served: Server, how: str) -> None:
    _killed.add(served.pid)
    os.killpg(served.pid, getattr(signal, how))
