"""Models that servers do not list, names that are nearly right, and servers that answer no prompt."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from test_first_row import QUICK, Server, assert_answered, chat, lists

import swarmkit as sk

FRAME = pd.DataFrame({"q": [f"q{i}" for i in range(300)]})
NO_LISTING = {"GET /v1/models": lambda body: (404, {})}
MANY = [f"meta-llama/Llama-3.{i}-8B-Instruct" for i in range(58)] + ["gpt-4o", "gpt-4o-mini"]


def refuses(status: int, message: str) -> Any:
    return lambda body: (status, {"error": {"message": message, "code": status}})


# ---- no listing ------------------------------


@pytest.mark.filterwarnings("ignore:.*could not be asked for its models")
@pytest.mark.parametrize(
    ("routes", "asked"), [({"POST /v1/chat/completions": chat}, 1), ({"POST /v1/completions": lists}, 2)]
)
def test_one_short_request_proves_a_model_that_is_not_listed(routes: dict[str, Any], asked: int) -> None:
    server = Server({**NO_LISTING, **routes})
    with server.running() as url, sk.connect(url, model="m", retry=QUICK) as pool:
        assert len(server.of("/v1/chat/completions")) + len(server.of("/v1/completions")) == asked
        assert_answered(sk.scatter(FRAME, "{q}", pool=pool, chat=None if asked == 2 else "auto", progress=False))


def test_a_model_that_is_not_listed_and_not_known_is_refused_in_the_words_of_the_server() -> None:
    unknown = refuses(404, "The model `mm` does not exist.")
    server = Server({**NO_LISTING, "POST /v1/chat/completions": unknown, "POST /v1/completions": unknown})
    words = "it lists no models, and does not know model='mm': The model `mm` does not exist."
    with server.running() as url, pytest.raises(sk.NoEndpointsError, match=words):
        sk.connect(url, model="mm")


def test_a_key_that_is_refused_is_said_also_where_no_model_is_listed() -> None:
    denied = refuses(401, "Your token has expired, or is not valid.")
    server, words = Server({**NO_LISTING, "POST /v1/completions": denied}), r"HTTP 401.*Your token has expired.*the key"
    with server.running() as url, pytest.raises(sk.NoEndpointsError, match=words):
        sk.connect(url, model="m", api_key="sk-not-the-one")


# ---- names ------------------------------


@pytest.mark.parametrize("of_call", [False, True])
def test_a_name_without_its_tag_is_sent_as_it_is_listed(of_call: bool) -> None:
    """Ollama takes both, what stands before one may not."""

    def strict(body: Any) -> Any:
        return chat(body) if body["model"] == "llama3.2:latest" else (404, {"error": {"message": "no such model"}})

    listing = {"data": [{"id": "llama3.2:latest"}, {"id": "phi4:latest"}]}
    server = Server({"GET /v1/models": lambda body: listing, "POST /v1/chat/completions": strict})
    of_pool, of_row = ({}, {"model": "llama3.2"}) if of_call else ({"model": "llama3.2"}, {})
    with server.running() as url, sk.connect(url, retry=QUICK, **of_pool) as pool:
        assert_answered(sk.scatter(FRAME[:4], "{q}", pool=pool, progress=False, **of_row))
        rows = FRAME[:4].assign(who=["llama3.2", "llama3.2:latest"] * 2)
        assert_answered(sk.scatter(rows, "{q}", model="who", pool=pool, progress=False))


def test_a_mistyped_model_is_told_the_nearest_names() -> None:
    server = Server({"GET /v1/models": lambda body: {"data": [{"id": name} for name in MANY]}})
    nearest = r"; the nearest of 60: gpt-4o, gpt-4o-mini, meta-llama/Llama-3\.\d+-8B-Instruct$"
    with server.running() as url:
        with pytest.raises(sk.NoEndpointsError, match=f"(?s)it lists no gpt4o{nearest}"):
            sk.connect(url, model="gpt4o")
        with sk.connect(url) as pool, pytest.raises(sk.SettingError, match="no server lists it; the nearest of 60"):
            sk.broadcast("Hi", model="gpt4o", pool=pool)
        with pool, pytest.raises(sk.SettingError, match=r"nearest of 60: meta-llama/Llama-3\.7-8B-Instruct, "):
            pool.by_model("llama-3.7-8b")


# ---- no text ------------------------------


@pytest.mark.parametrize("refusal", [refuses(404, "Not Found"), refuses(400, "This model does not support generation")])
def test_a_server_of_embeddings_says_so_at_once(refusal: Any) -> None:
    def embeds(body: Any) -> Any:
        return {"data": [{"index": i, "embedding": [0.0]} for i in range(len(body["input"]))]}

    routes = {"POST /v1/chat/completions": refusal, "POST /v1/completions": refusal, "POST /v1/embeddings": embeds}
    assert_told_in_few_requests(Server(routes), "serves embeddings, no text")


def test_a_server_without_a_tokenizer_says_so_at_once() -> None:
    refusal = refuses(400, "Tokenizer not available when `skip_tokenizer_init=True`")
    server = Server({"POST /v1/chat/completions": refusal, "POST /v1/completions": refusal})
    words = "refuses every prompt, also the shortest one: Tokenizer not available when `skip_tokenizer_init=True`"
    assert_told_in_few_requests(server, words)


def test_one_broken_server_is_no_finding_about_its_family() -> None:
    refusal = refuses(400, "out of order")
    broken = Server({"POST /v1/chat/completions": refusal, "POST /v1/completions": refusal})
    good = Server({"POST /v1/chat/completions": chat})
    with broken.running() as one, good.running() as other, sk.connect([one, other], retry=QUICK) as pool:
        assert_answered(sk.scatter(FRAME[:20], "{q}", pool=pool, progress=False))


def assert_told_in_few_requests(server: Server, words: str) -> None:
    with server.running() as url, sk.connect(url, retry=QUICK) as pool:
        for options in ({}, {"chat": None}):
            with pytest.raises(sk.SettingError, match=words):
                sk.scatter(FRAME, "{q}", pool=pool, progress=False, **options)
    assert len(server.asked) < 24
