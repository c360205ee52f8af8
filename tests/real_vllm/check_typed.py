"""Typed answers from a real vLLM, with and without ``--reasoning-parser``: every row is valid or carries its error.

Run by ``pytest -s tests/real_vllm/check_typed.py`` after ``python tests/real_vllm/serve.py setup``: it starts its own
servers, one after the other, and prints what it finds.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from serve import find_home, server

import swarmkit as sk

ROWS = 200
FIELDS = {"tone": ["good", "bad"], "n": int, "sure": bool}
PROMPT = "Judge this review and count its words. Review: {review}"
WORDS = ("great", "awful", "tasty", "slow", "kind", "dull", "fresh", "cold")
OPTIONS = {"max_tokens": 48, "temperature": 0, "schema_retries": 1}
SWITCH = r"{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"


def reviews(count: int) -> pd.DataFrame:
    texts = [f"{WORDS[i % 8]} and {WORDS[i // 8 % 8]}, visit {i}" for i in range(count)]
    return pd.DataFrame({"review": texts}, index=range(1000, 1000 + count))


def thinker(folder: Path) -> Path:
    """SmolLM2 with the marks of thoughts as tokens, which it has no use for otherwise, and Qwen3's switch."""
    source = find_home().model("smollm2")
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for token in tokenizer["added_tokens"]:
        if mark := {"<gh_stars>": "<think>", "<issue_start>": "</think>"}.get(token["content"]):
            vocabulary[mark] = vocabulary.pop(token["content"])
            token |= {"content": mark, "special": False}
    before, end, after = (source / "chat_template.jinja").read_text().rpartition("{% endif %}")
    for name, text in (
        ("tokenizer.json", json.dumps(tokenizer)),
        ("chat_template.jinja", f"{before}{SWITCH}{end}{after}"),
    ):
        (folder / name).unlink()
        (folder / name).write_text(text)
    return folder


def typed(frame: pd.DataFrame, **options: Any) -> pd.Series:
    """Ask with the schema, see that each row is valid or says why not, and print how it went; which rows are valid."""
    began = time.monotonic()
    answers = frame.swarm.scatter(PROMPT, schema=FIELDS, **OPTIONS, **options)
    seconds = time.monotonic() - began
    stats, valid = sk.last_run().stats, answers["response_error"].isna()
    print(f"\n{options}: {valid.sum()} of {len(frame)} rows valid in {seconds:.0f} s by {stats.routes}")
    print(f"  {stats.invalid} answers not valid, {stats.repaired} repaired, {stats.given_up} given up")
    print(answers["response_error"].value_counts().head(5).to_string())
    print(answers.head(3).to_string())
    assert answers.index.equals(frame.index)
    assert answers["response_tone"].dtype == pd.CategoricalDtype(["good", "bad"])
    assert (str(answers["response_n"].dtype), str(answers["response_sure"].dtype)) == ("Int64", "boolean")
    for name in FIELDS:
        assert (answers[f"response_{name}"].notna() == valid).all()
    assert answers["response_error"][~valid].str.contains("^not valid: |the reasoning has no answer after it").all()
    return valid


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
def test_without_a_parser_completions_hold_the_model_to_the_schema() -> None:
    with server("smollm2") as served, sk.connect(served.url) as pool:
        found = pool.capabilities()
        print(f"\n{found.set_index('route').T.to_string()}")
        valid = typed(reviews(ROWS))
        routes = sk.last_run().stats.routes
    assert found.set_index("route")["json"]["completions"] == "structured_outputs"
    assert all(route.startswith("completions") and "constrained by" in route for route in routes)
    assert valid.mean() > 0.8


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::swarmkit.SwarmWarning")
def test_with_a_parser_it_is_found_out_that_completions_ignore_the_schema(tmp_path: Path) -> None:
    extra = ["--model", str(thinker(tmp_path)), "--reasoning-parser", "qwen3"]
    with server("smollm2", extra=extra) as served, sk.connect(served.url) as pool:
        found = pool.capabilities()
        print(f"\n{found.set_index('route').T.to_string()}")
        valid = typed(reviews(ROWS), thinking=False)
        typed(reviews(20))  # it may think, and need not end
    assert found.set_index("route")["json"]["completions"] == "no"
    assert set(found["thinking"]) == {"enable_thinking"}
    assert valid.mean() > 0.8
