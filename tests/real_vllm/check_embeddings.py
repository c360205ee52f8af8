"""Vectors of a real vLLM: those of plain requests, in whatever company a text is sent.

Run by ``pytest tests/real_vllm/check_embeddings.py`` after ``python tests/real_vllm/serve.py setup``: it starts servers
of its own, whose model it fetches the first time.
"""

import json
import time
import urllib.request

import numpy as np
import pandas as pd
import pytest
from serve import server

import swarmkit as sk

TEXTS = [f"{what} {verb} {where}{'.' * (i % 3)}" for i in range(8)
         for what in ("A phage", "Der Wirt", "β-Galactosidase", "細菌") for verb in ("lyses", "is found in")
         for where in ("soil", "the gut of mice, " * (i + 1))]  # fmt: skip
FRAME = pd.DataFrame({"text": TEXTS})


@pytest.fixture(scope="module")
def swarm():
    with server("minilm") as one, server("minilm") as two:
        yield one, two


def plain(url, text, **fields):
    """What a client of a few lines gets for one text."""
    body = json.dumps({"model": "minilm", "input": text, **fields}).encode()
    request = urllib.request.Request(f"{url}/v1/embeddings", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["data"][0]["embedding"]


@pytest.mark.timeout(600)
def test_vectors_are_those_of_plain_requests(swarm, tmp_path):
    with sk.connect([one.url for one in swarm], batch=sk.BatchPolicy(max_size=32)) as pool:
        began = time.monotonic()
        found = FRAME.swarm.embed("text", as_array=True, store=tmp_path, pool=pool)
        seconds, stats = time.monotonic() - began, sk.last_run().stats
        again = FRAME.swarm.embed("text", as_array=True, store=tmp_path, pool=pool)
        assert sk.last_run().stats.answered == 0
    expected = np.array([plain(swarm[0].url, text) for text in TEXTS], np.float32)
    print(f"\n{found.shape[1]} numbers, {len(TEXTS)} texts in {seconds:.2f} s; {stats!r}; routes {stats.routes}")
    print(f"farthest from a plain request: {np.abs(found - expected).max():.1e}")
    assert stats.routes == {"embeddings": 2}
    assert found.shape == (len(TEXTS), 384)
    assert np.abs(found - expected).max() <= 1e-5
    assert again.tobytes() == found.tobytes()


@pytest.mark.timeout(300)
def test_long_texts_are_errors_or_cut_and_prompts_are_refused(swarm):
    df = pd.DataFrame({"text": ["short", "phage lambda " * 700]})
    with sk.connect(swarm[0].url) as pool:
        with pytest.warns(sk.SwarmWarning, match="1 of 2 rows failed"):
            found = df.swarm.embed("text", pool=pool)
        assert found["embedding"].isna().tolist() == [False, True]
        print(f"\n{found['embedding_error'].iloc[1]}")
        with pytest.warns(sk.SwarmWarning, match="1 of 2 prompts was cut"):
            cut = df.swarm.embed("text", too_long="truncate", pool=pool, as_array=True)
        assert np.linalg.norm(cut, axis=1) == pytest.approx(1, abs=1e-3)
        with pytest.raises(sk.SettingError, match="dimensions") as told:
            df.swarm.embed("text", dimensions=64, pool=pool)
        print(told.value)
        with pytest.raises(sk.SettingError, match="serves embeddings, no text"):
            df.swarm.scatter("text", pool=pool)
