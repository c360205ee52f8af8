"""Log-probabilities of answers, and labels with probabilities: what comes is what the server itself says."""

from __future__ import annotations

import json
import math
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scripted import Call, Scripted

import swarmkit as sk

QUICK = sk.RetryPolicy(base_s=0.02, cap_s=0.2)
FRAME = pd.DataFrame({"q": [f"is item {i} any good" for i in range(240)]}, index=range(1000, 1240))
LABELS = ["yes", "no", "some"]
ROUTES = [{"delivery": "rows"}, {"delivery": "batch"}, {"mode": "single"}]


def direct(pool: sk.VLLMPool, text: str, **fields: Any) -> dict[str, Any]:
    """What the server says of the tokens of an answer, asked without swarmkit's wire."""
    endpoint = pool.endpoints[0]
    body = {"model": "echo", "prompt": text, "add_special_tokens": False, "logprobs": 20, **fields}
    headers = {"Authorization": f"Bearer {endpoint.key()}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{endpoint.url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)["choices"][0]["logprobs"]


def sent(frame: pd.DataFrame, pool: sk.VLLMPool, row: int, end: str = "") -> str:
    return frame.iloc[[row]].swarm.preview("{q}" + end, pool=pool)["sent"].iloc[0]


# ---- logprobs= ------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", ROUTES, ids=str)
@pytest.mark.parametrize("server", [{}, {"tokenize": False}, {"tokenize": False, "batch_chat": False}], ids=str)
def test_the_sum_and_the_tokens_are_those_of_the_server(server: dict[str, Any], options: dict[str, Any]) -> None:
    with sk.local(1, engine="echo", addresses=2, **server) as swarm, sk.connect(swarm, retry=QUICK) as pool:
        answers = FRAME[:40].swarm.scatter("q", logprobs=2, details=True, pool=pool, **options)
        plain = FRAME[:40].swarm.scatter("q", pool=pool, **options)
    with sk.local(1, engine="echo") as swarm, sk.connect(swarm) as pool:
        told = [direct(pool, sent(FRAME, pool, row), max_tokens=64) for row in (0, 17, 39)]
    pd.testing.assert_series_equal(answers["response"], plain["response"])
    assert list(plain.columns) == ["q", "response", "response_error"]
    assert answers["response_logprob"].dtype == "Float64"
    for row, said in zip((0, 17, 39), told, strict=True):
        assert answers["response_logprob"].iloc[row] == pytest.approx(sum(said["token_logprobs"]), abs=1e-6)
        tokens = answers["response_token_logprobs"].iloc[row]
        assert [token["token"] for token in tokens] == said["tokens"]
        assert all(set(token) == {"token", "logprob", "top"} and len(token["top"]) == 2 for token in tokens)
        assert all(token["top"].items() <= top.items() for token, top in zip(tokens, said["top_logprobs"], strict=True))


def test_samples_and_chunks_keep_their_own(pool: sk.VLLMPool) -> None:
    answers = FRAME.swarm.scatter("q", n=2, temperature=1, logprobs=0, details=True, delivery="rows")
    for text, tokens in zip(answers["response"], answers["response_token_logprobs"], strict=True):
        assert "".join(token["token"] for token in tokens) == f"{text}<|im_end|>"
    sums = [sum(token["logprob"] for token in tokens) for tokens in answers["response_token_logprobs"]]
    assert answers["response_logprob"].to_numpy(float) == pytest.approx(sums)


def test_chunks_of_a_slow_stream_are_joined() -> None:
    with sk.local(1, engine="echo", tokens_per_s=400, stream_interval=False) as swarm, sk.connect(swarm) as pool:
        answers = FRAME[:20].swarm.scatter("q", logprobs=1, details=True, delivery="rows", pool=pool)
    for text, tokens in zip(answers["response"], answers["response_token_logprobs"], strict=True):
        assert "".join(token["token"] for token in tokens) == f"{text}<|im_end|>"


@pytest.mark.parametrize("parser", [False, True])
def test_thoughts_have_no_part_in_the_log_probability(parser: bool) -> None:
    with sk.local(1, engine="echo", thinking=True, reasoning_parser=parser) as swarm, sk.connect(swarm) as pool:
        answers = FRAME[:5].swarm.scatter("q", logprobs=0, details=True, pool=pool)
    for text, tokens in zip(answers["response"], answers["response_token_logprobs"], strict=True):
        assert "".join(token["token"] for token in tokens).strip() == f"{text}<|im_end|>"


@pytest.mark.parametrize(("logprobs", "why"), [("ignore", "none came"), ("refuse", "refused: 1 validation error")])
@pytest.mark.parametrize("mode", ["batch", "single"])
def test_a_server_without_them_is_said_once(logprobs: str, why: str, mode: Any) -> None:
    with sk.local(1, engine="echo", logprobs=logprobs) as swarm, sk.connect(swarm, retry=QUICK) as pool:
        with pytest.warns(sk.SwarmWarning, match="1 of 1 endpoint gave no log-probabilities") as warned:
            answers = FRAME[:5].swarm.scatter("q", logprobs=3, mode=mode, pool=pool)
        assert why in next(iter(sk.last_run().stats.routes))
    assert len(warned) == 1
    assert answers["response"].tolist() == ("echo: " + FRAME["q"][:5]).tolist()
    assert answers["response_logprob"].isna().all()
    assert answers["response_logprob"].dtype == "Float64"


def test_a_resumed_run_has_them_and_asks_nothing_twice(pool: sk.VLLMPool, tmp_path: Path) -> None:
    whole = FRAME.swarm.scatter("q", logprobs=2, details=True)
    FRAME[:100].swarm.scatter("q", logprobs=2, details=True, store=tmp_path)
    again = FRAME.swarm.scatter("q", logprobs=2, details=True, store=tmp_path)
    assert (sk.last_run().stats.stored, sk.last_run().stats.answered) == (100, 140)
    for name in ("response", "response_logprob", "response_token_logprobs"):
        pd.testing.assert_series_equal(again[name], whole[name])
    FRAME.swarm.scatter("q", store=tmp_path)
    assert sk.last_run().stats.stored == 0, "another call, which asks for none"


def test_a_store_of_the_version_before_is_read(pool: sk.VLLMPool, tmp_path: Path) -> None:
    ask = {"model": "echo", "system": None, "chat": "auto", "max_tokens": 512, "params": {"temperature": 0}}
    row = {"sample": 0, "text": "from then", "finish_reason": "stop", "prompt_tokens": 3, "completion_tokens": 2}
    lines = [
        {"swarmkit_store": 1, "written_by": "0.1.0"},
        {"ask": "33abbb228a86d572", **ask},
        {
            "key": "894480a308ab2e9b9cba3bee289c6c87",
            "ask": "33abbb228a86d572",
            **row,
            "endpoint": "a:1",
            "latency_s": 0.1,
            "written_at": 1.7e9,
        },
    ]
    (tmp_path / "00000000000000000001-a-1-a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = pd.DataFrame({"q": ["old"]}).swarm.scatter("q", temperature=0, store=tmp_path)
    assert answers["response"].tolist() == ["from then"]


def test_prompt_logprobs_are_asked_for_in_whole_replies(pool: sk.VLLMPool) -> None:
    FRAME.swarm.scatter("q", extra_body={"prompt_logprobs": 1})
    assert "rows" not in next(iter(sk.last_run().stats.routes))


# ---- classify ------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", ROUTES, ids=str)
@pytest.mark.parametrize("logprobs", ["obey", "old"])
def test_probabilities_and_mass_are_those_of_a_direct_request(logprobs: str, options: dict[str, Any]) -> None:
    faults = ["shuffle:seed=3"]
    with (
        sk.local(1, engine="echo", addresses=2, logprobs=logprobs, faults=faults) as swarm,
        sk.connect(swarm, retry=QUICK) as pool,
    ):
        answers = FRAME.swarm.classify("q", LABELS, details=True, pool=pool, **options)
        assert max(sk.last_run().stats.batch_sizes) == (1 if "mode" in options else 100)
        assert sk.last_run().stats.cut == 0
    assert answers.index.equals(FRAME.index)
    assert answers["label"].dtype == pd.CategoricalDtype(LABELS)
    assert {name: str(answers[name].dtype) for name in ("label_p", "p_yes", "p_no", "p_some", "label_mass")} == (
        dict.fromkeys(("label_p", "p_yes", "p_no", "p_some", "label_mass"), "Float64")
    )
    shares = answers[[f"p_{label}" for label in LABELS]].to_numpy(float)
    assert shares.sum(axis=1) == pytest.approx(np.ones(len(FRAME)))
    assert [LABELS[i] for i in shares.argmax(axis=1)] == answers["label"].tolist()
    assert shares.max(axis=1) == pytest.approx(answers["label_p"].to_numpy(float))
    assert answers["label"].nunique() == 3
    end = "\n\nAnswer with exactly one of the following, and nothing else: yes, no, some"
    with sk.local(1, engine="echo") as swarm, sk.connect(swarm) as pool:
        for row in (0, 101, 239):
            [top] = direct(pool, sent(FRAME, pool, row, end), max_tokens=1)["top_logprobs"]
            said = np.array([math.exp(top[label]) for label in LABELS])
            assert shares[row] * answers["label_mass"].iloc[row] == pytest.approx(said, abs=1e-3)


def test_both_orders_are_averaged(pool: sk.VLLMPool) -> None:
    both = FRAME.swarm.classify("q", ["yes", "no"], details=True, debias=True)
    one, other = (FRAME.swarm.classify("q", labels, details=True) for labels in (["yes", "no"], ["no", "yes"]))
    for name in ("p_yes", "p_no", "label_mass"):
        mean = (one[name] + other[name]) / 2
        assert both[name].to_numpy(float) == pytest.approx(mean.to_numpy(float), abs=1e-9)
    assert both["label"].dtype == pd.CategoricalDtype(["yes", "no"])
    assert both["label"].eq("yes").tolist() == (both["p_yes"] >= 0.5).tolist()


@pytest.mark.parametrize("server", [{}, {"tokenize": False}], ids=str)
def test_labels_of_several_tokens_are_asked_for_as_letters(server: dict[str, Any]) -> None:
    labels = ["very good", "rather bad"]
    with sk.local(1, engine="echo", **server) as swarm, sk.connect(swarm) as pool:
        with pytest.warns(sk.SwarmWarning, match=r"asked for as letters, A to B \((no server|'very good', 'rath)"):
            one = FRAME.swarm.classify("q", labels, details=True, pool=pool)
        with pytest.warns(sk.SwarmWarning, match="as letters"):
            both = FRAME.swarm.classify("q", labels, details=True, debias=True, pool=pool)
        with pytest.warns(sk.SwarmWarning, match="as letters"):
            other = FRAME.swarm.classify("q", labels[::-1], details=True, pool=pool)
    assert one["label"].nunique() == 2
    assert one["label"].dtype == pd.CategoricalDtype(labels)
    mean = (one["p_very good"] + other["p_very good"]) / 2
    assert both["p_very good"].to_numpy(float) == pytest.approx(mean.to_numpy(float), abs=1e-9)


@pytest.mark.parametrize("logprobs", ["ignore", "refuse"])
def test_without_log_probabilities_the_answers_are_held_to_the_labels(logprobs: str) -> None:
    frame = pd.DataFrame({"q": [f"row {i}: {'no' if i % 3 else 'some'}" for i in range(60)]})
    with (
        sk.local(1, engine="echo", logprobs=logprobs) as swarm,
        sk.connect(swarm, retry=QUICK) as pool,
        pytest.warns(sk.SwarmWarning, match="label_p is missing, and the answers are held to the labels: no log-"),
    ):
        answers = frame.swarm.classify("q", LABELS, instruction=None, details=True, pool=pool)
    assert answers["label"].tolist() == ["no" if i % 3 else "some" for i in range(60)]
    assert answers["label"].dtype == pd.CategoricalDtype(LABELS)
    assert answers["label_error"].isna().all()
    assert answers[["label_p", "p_yes", "label_mass"]].isna().all(axis=None)


def test_only_endpoints_that_give_them_are_asked() -> None:
    with (
        sk.local(1, engine="echo") as one,
        sk.local(1, engine="echo", logprobs="ignore") as other,
        sk.connect([*one.endpoints, *other.endpoints]) as pool,
        pytest.warns(sk.SwarmWarning, match="1 of 2 endpoints give log-probabilities; only these are asked"),
    ):
        answers = FRAME.swarm.classify("q", LABELS, details=True, pool=pool)
    assert answers["label_p"].notna().all()
    assert set(answers["label_endpoint"]) == {one.endpoints[0].name}


def test_rows_whose_label_cannot_be_told_are_counted_as_failed() -> None:
    def script(call: Call) -> None:
        if not call.prompts:
            return call.reply(b'{"detail": "Not Found"}', "404 Not Found")
        likely = [{"mm": -0.1} if "odd" in prompt else {"y": -0.1, "n": -3.0} for prompt in call.prompts]
        said = [{"tokens": [next(iter(top))], "token_logprobs": [-0.1], "top_logprobs": [top]} for top in likely]
        choices = [
            {"index": i, "text": told["tokens"][0], "finish_reason": "length", "logprobs": told}
            for i, told in enumerate(said)
        ]
        return call.reply(json.dumps({"choices": choices}).encode())

    frame = pd.DataFrame({"q": ["even 0", "odd 1", "even 2", "odd 3"]})
    with (
        Scripted(script) as server,
        sk.VLLMPool([server.address], model="m", delivery="batch", retry=QUICK) as pool,
        pytest.warns(sk.SwarmWarning, match="2 of 4 rows failed") as warned,
    ):
        answers = frame.swarm.classify("q", ["y", "n"], details=True, pool=pool)
    assert "no label is among the likeliest tokens" in str(warned[0].message)
    assert answers["label"].astype(object).where(answers["label"].notna(), None).tolist() == ["y", None, "y", None]
    assert answers["label_error"].isna().tolist() == [True, False, True, False]
    assert answers["p_y"].iloc[0] == pytest.approx(1 / (1 + math.exp(-2.9)))
    assert answers["p_y"].isna().tolist() == [False, True, False, True]


@pytest.mark.filterwarnings("ignore:1 of .. rows failed")
def test_a_resumed_classify_and_one_of_the_missing_rows_ask_nothing_twice(pool: sk.VLLMPool, tmp_path: Path) -> None:
    frame = FRAME[:30].assign(q=[None, *FRAME["q"][1:30]])
    whole = frame.swarm.classify("q", LABELS, details=True, debias=True)
    assert whole["label"].isna().tolist() == [True] + [False] * 29
    frame[:10].swarm.classify("q", LABELS, debias=True, store=tmp_path)
    again = frame.swarm.classify("q", LABELS, details=True, debias=True, store=tmp_path)
    assert (sk.last_run().stats.stored, sk.last_run().stats.answered) == (18, 40)
    names = ["label", "label_error", "label_p", "p_yes", "p_no", "p_some", "label_mass"]
    pd.testing.assert_frame_equal(again[names], whole[names])
    gaps = whole.assign(label=whole["label"].where(np.arange(30) % 2 == 0), q=FRAME["q"][:30])
    filled = gaps.swarm.classify("q", LABELS, details=True, debias=True, only_missing=True)
    assert sk.last_run().stats.answered == 2 * 16
    pd.testing.assert_frame_equal(filled[names][1:], whole[names][1:])


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["yes", "no", "yes"], {}, "labels: the label 'yes' is there twice"),
        (["yes"], {}, "labels: labels must be two or more"),
        (["yes", ""], {}, "labels: a label must not be empty"),
        ([1, 2], {}, "labels: labels must be texts; got 1"),
        ("yes", {}, r"labels='yes': must be a list of texts, such as \['yes', 'no'\]"),
        ({"yes", "no"}, {}, "must be a list of texts"),
        (LABELS, {"instruction": 7}, "instruction=7: must be a text, with {labels} in it, or None"),
        (LABELS, {"instruction": None, "debias": True}, "debias=True needs {labels} in instruction="),
        (LABELS, {"n": 2}, "classify takes no n=, which .*scatter.* take"),
        (LABELS, {"max_tokens": 2}, "classify takes no max_tokens="),
    ],
)
def test_what_classify_cannot_do_is_said(pool: sk.VLLMPool, labels: Any, options: Any, message: str) -> None:
    with pytest.raises((sk.SettingError, TypeError), match=message):
        FRAME.swarm.classify("q", labels, **options)


def test_a_column_that_is_not_of_an_earlier_call_is_not_overwritten(pool: sk.VLLMPool) -> None:
    with pytest.raises(sk.SettingError, match="details=True would overwrite 'p_yes' of the frame"):
        FRAME.assign(p_yes=0.05).swarm.classify("q", LABELS, details=True)
    with pytest.raises(sk.SettingError, match=r"out='label' would overwrite 'label'.*did not make"):
        FRAME.assign(label="yes").swarm.classify("q", LABELS)
    once = FRAME.assign(p_yes=0.05).swarm.classify("q", LABELS)
    assert (once["p_yes"] == 0.05).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logprobs": 21}, "logprobs=21: must be a whole number of likeliest tokens, 0 to 20"),
        ({"logprobs": True}, "logprobs=True: must be a whole number"),
        ({"logprobs": 1, "extra_body": {"top_logprobs": 3}}, "extra_body must not hold top_logprobs where logprobs="),
        ({"extra_body": {"prompt_logprobs": 1}, "delivery": "rows"}, "prompt_logprobs in extra_body needs delivery="),
    ],
)
def test_what_scatter_cannot_ask_for_is_said(pool: sk.VLLMPool, options: dict[str, Any], message: str) -> None:
    with pytest.raises(sk.SettingError, match=message):
        FRAME.swarm.scatter("q", **options)
