"""Vectors of texts: what comes is what the server itself says, to the last bit, and nothing is asked twice."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from needs import need
from test_first_row import Server

import swarmkit as sk
from swarmkit.patterns.embedding import scatter_gather_embeddings
from swarmkit.server.engines.echo import DIMENSIONS, hash_vectors

QUICK = sk.RetryPolicy(base_s=0.02, cap_s=0.2, give_up_s=3.0)
SMALL = sk.BatchPolicy(max_size=8)
FRAME = pd.DataFrame({"text": [f"text {i} über λ-phages" for i in range(120)]}, index=range(1000, 1120))
ODD = FRAME["text"].iloc[5]


def expected(texts: Any, dimensions: int = DIMENSIONS) -> np.ndarray:
    return np.frombuffer(b"".join(hash_vectors(list(texts), dimensions)), "<f4").reshape(-1, dimensions)


def array_of(column: pd.Series) -> np.ndarray:
    return np.array(column.tolist(), np.float32)


def post(pool: sk.VLLMPool, **body: Any) -> Any:
    """What a plain client gets."""
    endpoint = pool.endpoints[0]
    headers = {"Authorization": f"Bearer {endpoint.key()}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{endpoint.url}/v1/embeddings", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


# ---- the vectors ------------------------------


def test_a_column_of_vectors_bit_for_bit(pool: sk.VLLMPool) -> None:
    df = FRAME.copy()
    df.loc[1003, "text"] = None
    before = df.copy(deep=True)
    with pytest.warns(sk.SwarmWarning, match="1 of 120 rows failed"):
        found = df.swarm.embed("text")
    pd.testing.assert_frame_equal(df, before)
    pd.testing.assert_index_equal(found.index, df.index)
    assert list(found.columns) == ["text", "embedding", "embedding_error"]
    assert found["embedding"].dtype == pd.ArrowDtype(pa.list_(pa.float32(), DIMENSIONS))
    assert found["embedding"].isna().tolist() == [i == 3 for i in range(120)]
    assert found["embedding_error"].loc[1003] == "missing value in column 'text'"
    known = df["text"].drop(1003)
    assert array_of(found["embedding"].dropna()).tobytes() == expected(known).tobytes()
    plain = post(pool, model="echo", input=known.iloc[7])["data"][0]["embedding"]
    assert np.array(plain, np.float32).tobytes() == expected(known)[7].tobytes(), "the same as a plain client gets"


@pytest.mark.parametrize("option", [{"base64": "ignore"}, {"base64": "refuse"}, {"lists": False}], ids=str)
def test_servers_that_can_do_less_give_the_same_vectors(option: dict[str, Any]) -> None:
    with sk.local(1, engine="echo", addresses=2, **option) as swarm, sk.connect(swarm, batch=SMALL) as pool:
        found = FRAME[:30].swarm.embed("text", pool=pool, as_array=True)
    assert found.tobytes() == expected(FRAME["text"][:30]).tobytes()


def test_base64_is_asked_for_until_it_is_refused() -> None:
    asked: list[bool] = []

    def strict(body: Any) -> Any:
        asked.append("encoding_format" in body)
        if asked[-1]:
            return 422, {"detail": "a field that is not known"}  # it does not say which
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        return {"data": [{"index": i, "embedding": [0.5, len(t)]} for i, t in enumerate(texts)][::-1]}

    with Server({"POST /v1/embeddings": strict}).running() as url, sk.connect(url, batch=SMALL) as pool:
        found = FRAME.swarm.embed("text", pool=pool, as_array=True)
    assert found.tolist() == [[0.5, len(text)] for text in FRAME["text"]]
    assert 1 <= sum(asked) <= 4, "only while it is found out"


def test_as_array_dimensions_and_missing_rows(pool: sk.VLLMPool) -> None:
    texts = pd.Series(["a", None, "c"])
    with pytest.warns(sk.SwarmWarning):
        found = texts.swarm.embed(as_array=True, dimensions=16)
    assert (found.shape, found.dtype) == ((3, 16), np.float32)
    assert np.isnan(found[1]).all(), "missing, and not zeros"
    assert found[[0, 2]].tobytes() == expected(["a", "c"], 16).tobytes()
    assert FRAME[:0].swarm.embed("text", as_array=True).shape[0] == 0
    assert len(FRAME[:0].swarm.embed("text")) == 0


@pytest.mark.slow
def test_without_pyarrow_vectors_are_float32_arrays(pool: sk.VLLMPool) -> None:
    code = """
    import sys
    sys.modules["pyarrow"] = None  # as if it were not installed
    import numpy as np, pandas as pd, swarmkit as sk
    pool = sk.connect(sk.AgentEndpoint(sys.argv[1], int(sys.argv[2]), api_key=sys.argv[3]))
    found = pd.DataFrame({"t": ["a", "b"]}).swarm.embed("t")
    assert found["embedding"].dtype == object and found["embedding"].iloc[0].dtype == np.float32
    found = found.assign(t=["z", None], embedding=[found["embedding"].iloc[0], None])
    again = found.swarm.embed("t", only_missing=True, out="embedding")
    assert again["embedding"].isna().tolist() == [False, True]
    print(again["embedding"].iloc[0].tobytes().hex())
    """
    endpoint = pool.endpoints[0]
    asked = [endpoint.host, str(endpoint.port), endpoint.key()]
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code), *asked], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert bytes.fromhex(ran.stdout) == expected(["a"]).tobytes()


def test_requests_have_no_more_tokens_than_the_servers_take() -> None:
    """Estimated at four characters a token; a text that has more by itself goes alone."""
    texts = ["x" * 40] * 30 + ["y" * 4000] + ["z" * 200] * 20
    frame = pd.DataFrame({"text": [f"{text} {i}" for i, text in enumerate(texts)]})

    def little(body: Any) -> Any:
        asked = [body["input"]] if isinstance(body["input"], str) else body["input"]
        if len(asked) > 1 and sum(map(len, asked)) > 4 * 200:
            return 413, {"error": {"message": "too much at once"}}
        return {"data": [{"index": i, "embedding": expected([text])[0].tolist()} for i, text in enumerate(asked)]}

    server = Server({"POST /v1/embeddings": little})
    with connected(server, server, batch=sk.BatchPolicy(max_batch_tokens=200)) as pool:
        found = frame.swarm.embed("text", pool=pool, as_array=True)
    assert found.tobytes() == expected(frame["text"]).tobytes()
    assert sk.last_run().stats.failed_requests == 0
    assert max(len(body["input"]) for body in server.of("/v1/embeddings")) > 8
    with pytest.raises(sk.SettingError, match=r"BatchPolicy\(max_batch_tokens=0\): must be a whole number, 1 or more"):
        sk.BatchPolicy(max_batch_tokens=0)


@pytest.mark.parametrize("a_char", [0.125, 1.0])
def test_how_many_tokens_a_text_has_is_taken_from_what_the_server_has_counted(a_char: float) -> None:
    frame = pd.DataFrame({"text": [f"{'x' * 38}{i:02d}" for i in range(100)]})

    def counting(body: Any) -> Any:
        tokens = int(a_char * sum(map(len, body["input"])))
        if len(body["input"]) > 1 and tokens > 200:
            return 413, {"error": {"message": "too much at once"}}
        data = [{"index": i, "embedding": expected([text])[0].tolist()} for i, text in enumerate(body["input"])]
        return {"data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}

    server = Server({"POST /v1/embeddings": counting})
    with connected(server, server, batch=sk.BatchPolicy(max_batch_tokens=200, max_in_flight=1)) as pool:
        found = frame.swarm.embed("text", pool=pool, as_array=True)
    assert found.tobytes() == expected(frame["text"]).tobytes()
    assert sk.last_run().stats.failed_requests <= 4, "those that went out before the first answer"
    sizes = [len(body["input"]) for body in server.of("/v1/embeddings")]
    assert max(sizes[-4:]) <= 200 / (40 * a_char)
    assert max(sizes) > 20 or a_char == 1.0


def test_vectors_are_awaited(pool: sk.VLLMPool) -> None:
    frame = FRAME[:9]
    pd.testing.assert_frame_equal(asyncio.run(sk.aembed(frame, "text")), sk.embed(frame, "text"))
    array = asyncio.run(frame["text"].swarm.aembed(as_array=True, dimensions=16))
    assert array.tobytes() == frame.swarm.embed("text", as_array=True, dimensions=16).tobytes()
    with pytest.raises(sk.SettingError, match="dimensions=0"):
        asyncio.run(frame.swarm.aembed("text", dimensions=0))


def test_templates_functions_and_details(pool: sk.VLLMPool) -> None:
    found = FRAME[:9].swarm.embed("query: {text}", out="v", details=True)
    assert array_of(found["v"]).tobytes() == expected("query: " + FRAME["text"][:9]).tobytes()
    assert {"v_error", "v_endpoint", "v_latency_s", "v_attempts"} <= set(found.columns)
    assert found["v_attempts"].tolist() == [1] * 9
    by_row = FRAME[:9].swarm.embed(lambda row: row.text.upper(), as_array=True)
    assert by_row.tobytes() == expected(FRAME["text"][:9].str.upper()).tobytes()


def test_it_survives_parquet_and_only_missing_rows_are_asked(pool: sk.VLLMPool, tmp_path: Path) -> None:
    FRAME.swarm.embed("text").to_parquet(tmp_path / "v.parquet")
    read = pd.read_parquet(tmp_path / "v.parquet", dtype_backend="pyarrow")
    read.loc[1010:1019, "embedding"] = None
    found = read.swarm.embed("text", only_missing=True)
    assert sk.last_run().stats.answered == 10
    assert array_of(found["embedding"]).tobytes() == expected(FRAME["text"]).tobytes()


def test_rows_of_nan_are_missing(pool: sk.VLLMPool) -> None:
    texts = pd.DataFrame({"text": ["a", "b", None]})
    with pytest.warns(sk.SwarmWarning):
        array = texts.swarm.embed("text", as_array=True)
    array[1] = np.nan
    with pytest.warns(sk.SwarmWarning):
        found = texts.assign(embedding=list(array)).swarm.embed("text", only_missing=True)
    assert sk.last_run().stats.answered == 1
    assert found["embedding"].isna().tolist() == [False, False, True]


@pytest.mark.parametrize("field", ["input", "endianness", "embed_dtype", "encoding_format"])
def test_fields_that_say_how_vectors_are_read_are_refused(pool: sk.VLLMPool, field: str) -> None:
    with pytest.raises(sk.SettingError, match=f"{field} in extra_body"):
        pd.DataFrame({"text": ["a"]}).swarm.embed("text", extra_body={field: "float16"})


def test_identical_texts_are_sent_once_and_the_counts_are_true(pool: sk.VLLMPool) -> None:
    df = pd.DataFrame({"t": ["a" * 8, "b" * 4] * 30})
    found = df.swarm.embed("t", as_array=True)
    stats = sk.last_run().stats
    assert (stats.answered, stats.reused, stats.prompt_tokens, stats.completion_tokens) == (2, 58, 3, 0)
    assert found.tobytes() == expected(df["t"]).tobytes()
    df.swarm.embed("t", dedup=False)
    assert sk.last_run().stats.answered == 60


def test_a_run_shows_its_newest_vectors_in_short(pool: sk.VLLMPool) -> None:
    FRAME.swarm.embed("text")
    label, shown = sk.last_run().newest()[0]
    assert shown.startswith(f"[{expected([FRAME['text'].loc[label]])[0][0]:.3g}, ")
    assert shown.endswith(f"({DIMENSIONS} numbers)")


# ---- faults ------------------------------

FAULTS = ["http_500", "http_503", "reset", "garbage", "half_json", "cut:rows=0", "shuffle", "missing_index",
          "repeated_index", "unknown_index", "wrong_type", f"bad_row:marker={ODD}"]  # fmt: skip


@pytest.fixture(scope="module")
def faulty() -> Iterator[list[sk.AgentEndpoint]]:
    """Two healthy endpoints, and one for each fault."""
    hosts = [f"127.0.0.{i + 1}" for i in range(len(FAULTS) + 2)]
    faults = [
        f"{fault}{',' if ':' in fault else ':'}address={host}" for fault, host in zip(FAULTS, hosts[2:], strict=True)
    ]
    with sk.local(1, engine="echo", addresses=hosts, faults=faults) as swarm:
        yield swarm.endpoints


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_an_endpoint_does_every_row_has_its_own_vector(faulty: list[sk.AgentEndpoint], fault: str) -> None:
    odd = faulty[2 + FAULTS.index(fault)]
    with sk.connect([*faulty[:2], odd], retry=QUICK, batch=SMALL) as pool:
        found = FRAME.swarm.embed("text", as_array=True, pool=pool)
    assert found.tobytes() == expected(FRAME["text"]).tobytes()


def test_a_row_that_is_refused_fails_alone(faulty: list[sk.AgentEndpoint]) -> None:
    with sk.connect(faulty[-1:], retry=QUICK) as pool, pytest.warns(sk.SwarmWarning, match="1 of 120 rows failed"):
        found = FRAME.swarm.embed("text", pool=pool)
    assert found["embedding_error"].notna().tolist() == [text == ODD for text in FRAME["text"]]
    assert "maximum context length" in found["embedding_error"].loc[1005]
    assert found["embedding"].isna().tolist() == [text == ODD for text in FRAME["text"]]


@contextlib.contextmanager
def connected(*servers: Server, **settings: Any) -> Iterator[sk.VLLMPool]:
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(server.running()) for server in servers]
        yield stack.enter_context(sk.connect(urls, **settings))


def embeds(vector: Callable[[str], Any]) -> Callable[[Any], Any]:
    def answer(body: Any) -> Any:
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        return {"data": [{"index": i, "embedding": vector(text)} for i, text in enumerate(texts)]}

    return answer


@pytest.mark.filterwarnings("ignore:.*could not be asked for its models")
def test_a_server_that_has_nothing_but_embeddings() -> None:
    """Such as text-embeddings-inference."""
    nothing = {"GET /v1/models": lambda body: (404, {})}
    server = Server({**nothing, "POST /v1/embeddings": embeds(lambda text: expected([text], 3)[0].tolist())})
    with connected(server, model="m") as pool:
        found = FRAME.swarm.embed("text", pool=pool, as_array=True)
    assert found.tobytes() == expected(FRAME["text"], 3).tobytes()


@pytest.mark.parametrize("odd", [base64.b64encode(np.array([1, np.nan], "<f4")).decode(), [1.0, None]], ids=type)
def test_what_is_no_number_is_an_error_of_its_row(odd: Any) -> None:
    server = Server({"POST /v1/embeddings": embeds(lambda text: odd if text == ODD else [1.0, 2.0])})
    with connected(server) as pool, pytest.warns(sk.SwarmWarning, match="1 of 20 rows"):
        found = FRAME[:20].swarm.embed("text", pool=pool)
    assert found["embedding_error"].dropna().index.tolist() == [1005]
    assert "not finite" in found["embedding_error"].loc[1005]
    assert found["embedding"].dropna().tolist() == [[1.0, 2.0]] * 19


def test_large_numbers_are_numbers() -> None:
    large = [3e38, -3e38, 1e-30]
    server = Server({"POST /v1/embeddings": embeds(lambda text: large)})
    with connected(server) as pool:
        found = FRAME[:3].swarm.embed("text", pool=pool, as_array=True)
    assert found.tobytes() == np.array([large] * 3, np.float32).tobytes()


def test_vectors_of_another_length_are_errors() -> None:
    """Two servers with different models under one name."""
    good = Server({"POST /v1/embeddings": embeds(lambda text: expected([text], 2)[0].tolist())})
    other = Server({"POST /v1/embeddings": embeds(lambda text: expected([text], 3)[0].tolist())})
    told = pytest.warns(sk.SwarmWarning, match="has 3 numbers, and most have 2")
    with connected(good, good, other, batch=SMALL) as pool, told:
        found = FRAME.swarm.embed("text", pool=pool, details=True)
    wrong = found["embedding_endpoint"] == pool.endpoints[2].name
    assert 0 < wrong.sum() < 60
    assert (found["embedding"].isna() == wrong).all()
    assert array_of(found["embedding"][~wrong]).tobytes() == expected(FRAME["text"][~wrong], 2).tobytes()


def test_an_endpoint_that_gives_every_text_one_vector_is_not_believed(echo: sk.LocalSwarm) -> None:
    broken = Server({"GET /v1/models": lambda body: {"data": [{"id": "echo"}]},
                     "POST /v1/embeddings": embeds(lambda text: [0.0] * DIMENSIONS)})  # fmt: skip
    told = pytest.warns(sk.SwarmWarning, match="for every prompt")
    with broken.running() as url, sk.connect([url, *echo.endpoints[:2]], batch=SMALL, retry=QUICK) as pool, told:
        found = FRAME.swarm.embed("text", pool=pool, as_array=True)
    assert found.tobytes() == expected(FRAME["text"]).tobytes()


# ---- the store ------------------------------


def test_what_is_stored_is_not_asked_again(pool: sk.VLLMPool, tmp_path: Path) -> None:
    FRAME[:50].swarm.embed("text", store=tmp_path)
    found = FRAME.swarm.embed("text", store=tmp_path, as_array=True)
    assert (sk.last_run().stats.answered, sk.last_run().stats.stored) == (70, 50)
    assert found.tobytes() == expected(FRAME["text"]).tobytes()
    FRAME.swarm.embed("text", store=tmp_path, dimensions=8)
    assert sk.last_run().stats.answered == 120, "other vectors are another question"
    FRAME[:3].swarm.scatter("text", chat=None, store=tmp_path)
    assert sk.last_run().stats.answered == 3, "and so is a prompt"


def test_a_store_puts_vectors_back_beside_their_rows(pool: sk.VLLMPool, tmp_path: Path) -> None:
    first = FRAME.swarm.embed("text", store=tmp_path)
    back = sk.open_store(tmp_path).join(FRAME, "text", out="embedding")
    pd.testing.assert_frame_equal(back, first)
    text = sk.open_store(tmp_path).to_frame()["text"].iloc[0]
    assert base64.b64decode(text) in {vector.tobytes() for vector in expected(FRAME["text"])}


@pytest.mark.slow
def test_killed_and_resumed_it_asks_nothing_twice(tmp_path: Path) -> None:
    df = pd.DataFrame({"text": [f"row {i}" for i in range(400)]})
    asked: Counter[str] = Counter()
    child: subprocess.Popen[bytes] | None = None

    async def answer(body: Any) -> Any:
        asked.update(body["input"])
        await asyncio.sleep(0.02)
        if child is not None and asked.total() > 150:
            os.kill(child.pid, signal.SIGKILL)
        return embeds(lambda text: expected([text])[0].tolist())(body)

    code = """
    import sys, pandas as pd, swarmkit as sk
    df = pd.DataFrame({"text": [f"row {i}" for i in range(400)]})
    pool = sk.connect(sys.argv[1], batch=sk.BatchPolicy(max_size=8, max_in_flight=2))
    df.swarm.embed("text", pool=pool, store=sys.argv[2])
    """
    with Server({"POST /v1/embeddings": answer}).running() as url:
        command = [sys.executable, "-c", textwrap.dedent(code), url, str(tmp_path / "s")]
        child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
        assert child.wait(60) == -signal.SIGKILL
        child = None
        stored = sk.open_store(tmp_path / "s").to_frame()["prompt"].dropna()
        before, kept = Counter(asked), len(sk.open_store(tmp_path / "s"))
        with sk.connect(url) as pool:
            found = df.swarm.embed("text", pool=pool, store=tmp_path / "s", as_array=True)
        assert (sk.last_run().stats.stored, sk.last_run().stats.answered) == (kept, 400 - kept)
        assert 100 < kept < 400
        assert all(asked[text] == before[text] for text in stored)
    assert found.tobytes() == expected(df["text"]).tobytes()


# ---- what is refused, and what is too long ------------------------------


def test_texts_that_are_too_long_fail_or_are_cut() -> None:
    df = pd.DataFrame({"t": ["short", "word " * 60, "x" * 128]})
    with sk.local(1, engine="echo", max_model_len=32) as swarm, sk.connect(swarm) as pool:
        with pytest.warns(sk.SwarmWarning, match="maximum context length is 32 tokens"):
            found = df.swarm.embed("t", pool=pool)
        assert found["embedding_error"].isna().tolist() == [True, False, True]
        with pytest.warns(sk.SwarmWarning, match="1 of 3 prompts was cut to fit the context of 32 tokens"):
            cut = df.swarm.embed("t", pool=pool, too_long="truncate", details=True)
        with pytest.warns(sk.SwarmWarning, match="was cut"):
            left = df.swarm.embed("t", pool=pool, too_long="truncate_left", as_array=True)
    assert array_of(cut["embedding"]).tobytes() == expected(df["t"].str[:128]).tobytes()
    assert cut["embedding_truncated"].tolist() == [False, True, False]
    assert left[1].tobytes() == expected([df["t"][1][-128:]])[0].tobytes()


def test_dimensions_that_the_model_does_not_have(pool: sk.VLLMPool) -> None:
    with pytest.raises(sk.SettingError, match=r'does not embed .*"dimensions": 999.*must be 64 or less, got 999'):
        FRAME.swarm.embed("text", dimensions=999)
    with pytest.raises(sk.SettingError, match="dimensions=0: must be a whole number, 1 or more"):
        FRAME.swarm.embed("text", dimensions=0)
    server = Server({"POST /v1/embeddings": embeds(lambda text: [1.0, 2.0])})
    told = pytest.raises(sk.SettingError, match="its vectors have 2 numbers whatever is asked for")
    with connected(server) as other, told:
        FRAME.swarm.embed("text", dimensions=8, pool=other)


def test_dimensions_hold_also_where_they_could_not_be_tried(tmp_path: Path) -> None:
    """The first requests, which find that out, meet a server that is starting."""

    def starting(body: Any) -> Any:
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        if texts[0] in ("Hi", "Ho"):
            return 503, {"error": {"message": "starting"}}
        return {"data": [{"index": i, "embedding": expected([text], 2)[0].tolist()} for i, text in enumerate(texts)]}

    frame, how = FRAME[:20], {"dimensions": 8, "store": tmp_path / "s"}
    with connected(Server({"POST /v1/embeddings": starting}), retry=QUICK) as pool:
        with pytest.warns(sk.SwarmWarning, match="20 of 20 rows failed(.|\n)*has 2 numbers, not dimensions=8"):
            found = frame.swarm.embed("text", pool=pool, **how)
        assert found["embedding"].isna().all()
        assert len(sk.open_store(tmp_path / "s")) == 0, "nothing that would be taken for an answer"
    kept = frame.assign(embedding=list(expected(frame["text"], 2)))
    with connected(Server({"POST /v1/embeddings": starting}), retry=QUICK) as pool, pytest.warns(sk.SwarmWarning):
        found = kept.swarm.embed("text", pool=pool, dimensions=8, only_missing=True)
    assert found["embedding_error"].str.contains("has 2 numbers, and dimensions= asks for 8").all()


@pytest.mark.parametrize(
    ("route", "words"),
    [
        ({}, "no such route"),
        ({"POST /v1/embeddings": lambda body: (400, {"error": {"message": "does not support Embeddings API"}})},
         "does not support Embeddings API"),
    ],
    ids=["404", "400"],
)  # fmt: skip
def test_a_server_without_embeddings_says_so_at_once(route: dict[str, Any], words: str) -> None:
    server = Server(route)
    told = pytest.raises(sk.SettingError, match=f"does not embed texts with the model m: {words}.*--runner pooling")
    with connected(server) as pool, told:
        FRAME.swarm.embed("text", pool=pool)
    assert len(server.of("/v1/embeddings")) <= 8


def test_keywords_of_answers_are_refused(pool: sk.VLLMPool) -> None:
    assert sk.scatter  # verbs that are not imported yet are not named
    for name in ("temperature", "max_tokens", "system", "schema", "n"):
        with pytest.raises(TypeError, match=f"embed takes no {name}="):
            FRAME.swarm.embed("text", **{name: 1})
    with pytest.raises(sk.UnknownColumnError):
        FRAME.swarm.embed("txet")
    with pytest.raises(sk.SettingError, match=r"'\[0.5, 1\]' at row 1000 is none: embed into another column"):
        FRAME.assign(embedding="[0.5, 1]").swarm.embed("text", only_missing=True)


# ---- the old names ------------------------------


def test_the_old_names_have_their_signatures() -> None:
    assert list(inspect.signature(sk.EmbeddingPool).parameters) == ["endpoints", "model", "concurrency", "timeout"]
    defaults = {n: p.default for n, p in inspect.signature(sk.EmbeddingPool).parameters.items()}
    assert (defaults["concurrency"], defaults["timeout"]) == (512, 60.0)
    assert list(inspect.signature(scatter_gather_embeddings).parameters) == ["embed_pool", "texts"]
    fields = inspect.signature(sk.EmbeddingResponse).parameters
    assert [(n, p.default) for n, p in fields.items()][2:] == [("error", None), ("agent_index", -1)]
    assert sk.EmbeddingResponse(False, None, "why") == sk.EmbeddingResponse(False, None, error="why", agent_index=-1)


def test_code_of_the_old_design_runs_after_changing_the_import(echo: sk.LocalSwarm) -> None:
    texts = FRAME["text"].tolist()
    endpoints = [sk.AgentEndpoint(e.host, e.port, {"half": str(i % 2)}, api_key=e.key()) for i, e in
                 enumerate(echo.endpoints)]  # fmt: skip

    async def main() -> None:
        async with sk.EmbeddingPool(endpoints, model="echo", concurrency=16, timeout=30.0) as pool:
            assert (pool.size, pool.timeout, pool.endpoints) == (4, 30.0, endpoints)
            assert pool.by_tag("half", "1").size == pool.sample(2).size == pool.slice(1, 3).size == 2
            one = await pool.select([2, 3]).embed_one(1, "Hello")
            assert (one.success, one.error, one.agent_index) == (True, None, 1)
            assert np.array(one.embedding, np.float32).tobytes() == expected(["Hello"]).tobytes()
            for all_of in (await pool.embed_all(texts), await scatter_gather_embeddings(pool, texts)):
                assert np.array([r.embedding for r in all_of], np.float32).tobytes() == expected(texts).tobytes()
                assert [r.agent_index for r in all_of[:5]] == [0, 1, 2, 3, 0]
            assert await pool.embed_all([]) == []
            assert FRAME.swarm.embed("text", pool=pool, as_array=True).tobytes() == expected(texts).tobytes()

    asyncio.run(main())


def test_an_endpoint_that_is_down_is_an_error_of_the_response() -> None:
    async def main() -> list[sk.EmbeddingResponse]:
        async with sk.EmbeddingPool(["127.0.0.1:9"], model="m") as pool:
            return [await pool.embed_one(0, "a"), *await pool._with(_retry=QUICK).embed_all(["b"])]

    for response in asyncio.run(main()):
        assert (response.success, response.embedding) == (False, None)
        assert response.error


# ---- a real model ------------------------------


def test_the_local_model_gives_the_mean_of_its_token_vectors() -> None:
    need(find_spec("wordllama") and find_spec("tokenizers") and find_spec("safetensors"), "the extra local: wordllama")
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    folder = Path(find_spec("wordllama").origin).parent
    (table,) = load_file(folder / "weights/l2_supercat_256.safetensors").values()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizers/l2_supercat_tokenizer_config.json"))
    tokenizer.no_padding()
    texts = ["A cat sat on the mat.", "A kitten sits on a rug.", "Stocks fell on Monday.", "λ-Phagen in *E. coli*"]
    with sk.local(1, engine="wordllama") as swarm, sk.connect(swarm) as pool:
        found = pd.Series(texts).swarm.embed(pool=pool, as_array=True)
        with pytest.raises(sk.SettingError, match=r"serves embeddings, no text: ask for those by df\.swarm\.embed"):
            pd.Series(texts).swarm.scatter(pool=pool)
    means = np.array([table[tokenizer.encode(t, add_special_tokens=False).ids].astype(float).mean(0) for t in texts])
    assert found == pytest.approx(means / np.linalg.norm(means, axis=1, keepdims=True), abs=1e-5)
    assert found[0] @ found[1] > 5 * abs(found[0] @ found[2]), "cats are nearer to kittens than to stocks"
