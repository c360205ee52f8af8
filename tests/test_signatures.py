"""Signatures, docstrings, completion and refusals of the verbs; what type checkers see is in typing_sample.py."""

from __future__ import annotations

import asyncio
import inspect
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell

import swarmkit as sk
import swarmkit.dask
from swarmkit.accessor import FrameSwarm, SeriesSwarm
from swarmkit.pool.settings import PoolSettings, VLLMSettings

ROOT = Path(__file__).parent.parent
FUNCTIONS = ["ascatter", "atree_reduce", "broadcast", "compare", "iter_scatter", "preview", "scatter", "submit"]
FUNCTIONS += ["aembed", "estimate", "tree_reduce"]
OF_ANSWERS = ["dedupe", "filter", "semantic_entropy", "similar", "vote"]
METHODS = [name for name in FUNCTIONS if name != "broadcast"]
VERBS = {
    **{f"sk.{name}": getattr(sk, name) for name in FUNCTIONS},
    **{f"df.swarm.{name}": getattr(pd.DataFrame().swarm, name) for name in METHODS},
    **{f"series.swarm.{name}": getattr(pd.Series(dtype=object).swarm, name) for name in METHODS},
    "sk.classify": sk.classify,
    "sk.pipeline": sk.pipeline,
    "df.swarm.pipeline": pd.DataFrame().swarm.pipeline,
    "sk.Step": sk.Step.__init__,
    "df.swarm.classify": pd.DataFrame().swarm.classify,
    **{f"df.swarm.{name}": getattr(pd.DataFrame().swarm, name) for name in OF_ANSWERS},
    **{f"series.swarm.{name}": getattr(pd.Series(dtype=object).swarm, name) for name in OF_ANSWERS},
    "sk.embed": sk.embed,
    "df.swarm.embed": pd.DataFrame().swarm.embed,
    "series.swarm.embed": pd.Series(dtype=object).swarm.embed,
    "ddf.swarm.embed": swarmkit.dask.DaskSwarm.embed,
    "ddf.swarm.scatter": swarmkit.dask.DaskSwarm.scatter,
    "ddf.swarm.tree_reduce": swarmkit.dask.DaskSwarm.tree_reduce,
}
EVERY = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
OF_SCATTER = {"out", "n", "details", "logprobs", "only_missing"}
OF_TREE = {"by", "fanin", "out", "trace"}
OF_RUNS = {"mode", "delivery", "store", "dedup", "on_error", "progress", "monitor"}
OF_REQUESTS = {"pool", "system", "max_tokens", "chat", "extra_body", "temperature", "stop", "user"}


@pytest.fixture
def genes() -> pd.DataFrame:
    return pd.DataFrame({"gene": ["lacZ", "recA"]})


def keywords(verb: Any) -> set[str]:
    return {p.name for p in inspect.signature(verb).parameters.values() if p.kind is p.KEYWORD_ONLY}


def described(verb: Any) -> list[str]:
    """The parameters that a docstring describes, in its order."""
    section = re.search(r"^Parameters\n-+\n(.*?)(\n\n\S|\Z)", inspect.getdoc(verb) or "", re.DOTALL | re.MULTILINE)
    assert section
    entries = re.findall(r"^(\w+) : .+\n    \S", section[1], re.MULTILINE)
    assert len(entries) == len(re.findall(r"^\S", section[1], re.MULTILINE)), "every entry has a type and a text"
    return entries


# ---- signatures and docstrings ------------------------------


@EVERY
def test_every_parameter_is_described_once_in_the_order_of_the_signature(verb: Any) -> None:
    parameters = inspect.signature(verb).parameters
    assert described(verb) == [name for name in parameters if name != "self"]
    assert "options" not in parameters


@EVERY
def test_the_docstring_shows_the_default_of_every_keyword(verb: Any) -> None:
    doc = inspect.getdoc(verb) or ""
    for p in inspect.signature(verb).parameters.values():
        if p.kind is p.KEYWORD_ONLY and p.default not in (None, p.empty):
            shown = f'"{p.default}"' if isinstance(p.default, str) else re.escape(repr(p.default))
            entry = re.search(rf"^{p.name} : (.*)", doc, re.MULTILINE)
            assert entry, p.name
            assert re.search(rf"{shown}|default", entry[1])


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "sk.scatter": OF_SCATTER | OF_RUNS,
        "sk.ascatter": OF_SCATTER | OF_RUNS,
        "sk.submit": OF_SCATTER | OF_RUNS,
        "sk.iter_scatter": OF_SCATTER | OF_RUNS,
        "df.swarm.scatter": OF_SCATTER | OF_RUNS,
        "series.swarm.scatter": OF_SCATTER | OF_RUNS,
        "ddf.swarm.scatter": OF_SCATTER | OF_RUNS - {"progress", "monitor"} | {"workers"},
        "sk.tree_reduce": OF_TREE | OF_RUNS,
        "sk.atree_reduce": OF_TREE | OF_RUNS,
        "ddf.swarm.tree_reduce": OF_TREE - {"trace"} | OF_RUNS - {"progress", "monitor"} | {"workers"},
        "sk.pipeline": OF_RUNS,
        "sk.Step": {"details", "logprobs", "mode", "delivery", "dedup"},
        "sk.broadcast": set(),
        "sk.preview": {"mode"},
        "df.swarm.compare": {"delivery", "progress", "modes", "batch_sizes", "sample", "repeats"},
    }.items(),
)
def test_each_verb_names_exactly_what_it_takes(name: str, expected: set[str]) -> None:
    found = keywords(VERBS[name])
    assert found >= OF_REQUESTS
    of_all = OF_SCATTER | OF_TREE | OF_RUNS | {"workers", "modes", "batch_sizes", "sample", "repeats"}
    assert found & of_all == expected


def test_methods_have_the_signature_of_the_function_without_the_frame() -> None:
    for name in METHODS:
        function = inspect.signature(getattr(sk, name))
        method = inspect.signature(VERBS[f"df.swarm.{name}"])
        assert [*method.parameters.values()] == [*function.parameters.values()][1:]
        assert method.return_annotation == function.return_annotation


def test_a_series_is_its_own_prompt() -> None:
    for name in METHODS:
        parameters = inspect.signature(VERBS[f"series.swarm.{name}"]).parameters
        assert "column" not in parameters
        usual = inspect.Parameter.empty if "tree" in name else "value"
        assert parameters["prompt"].default == usual


def test_defaults_in_the_signature_are_what_holds_without_them(
    pool: sk.VLLMPool, genes: pd.DataFrame, tmp_path: Path
) -> None:
    scatter = inspect.signature(genes.swarm.scatter).parameters.values()
    defaults = {p.name: p.default for p in scatter if p.kind is p.KEYWORD_ONLY}
    shown = genes.swarm.scatter("{gene}")
    pd.testing.assert_frame_equal(genes.swarm.scatter("{gene}", **defaults), shown)
    genes.swarm.scatter("{gene}", store=tmp_path)
    genes.swarm.scatter("{gene}", **{**defaults, "store": tmp_path})
    assert sk.last_run().stats.stored == 2, "to the store it is the same request"
    tree = inspect.signature(genes.swarm.tree_reduce).parameters.values()
    defaults = {p.name: p.default for p in tree if p.kind is p.KEYWORD_ONLY}
    merged = genes.swarm.tree_reduce("gene", "{responses}")
    pd.testing.assert_frame_equal(genes.swarm.tree_reduce("gene", "{responses}", **defaults), merged)


def test_async_verbs_are_coroutine_functions() -> None:
    for name, verb in VERBS.items():
        assert inspect.iscoroutinefunction(verb) == (".a" in name), name


def test_verbs_can_be_pickled(genes: pd.DataFrame) -> None:
    for name in FUNCTIONS:
        assert pickle.loads(pickle.dumps(getattr(sk, name))) is getattr(sk, name)
    again = pickle.loads(pickle.dumps(genes.swarm.scatter))
    pd.testing.assert_frame_equal(again.__self__._df, genes)


def test_methods_work_by_name_and_by_position(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    expected = sk.scatter(genes, "{gene}")
    pd.testing.assert_frame_equal(genes.swarm.scatter(prompt="{gene}"), expected)
    pd.testing.assert_frame_equal(FrameSwarm.scatter(genes.swarm, "{gene}"), expected)
    values = genes["gene"].swarm
    for answers in (values.scatter(), values.scatter("{value}"), values.scatter(prompt="{value}")):
        assert answers["response"].tolist() == expected["response"].tolist()
    assert asyncio.run(values.ascatter())["response"].tolist() == expected["response"].tolist()


# ---- keywords that are handed on ------------------------------


def test_type_checkers_see_all_that_is_handed_on() -> None:
    assert set(PoolSettings.__annotations__) == keywords(sk.AgentPool)
    assert set(VLLMSettings.__annotations__) == set(inspect.signature(sk.VLLMPool).parameters) - {"endpoints"}


@pytest.mark.parametrize(
    ("function", "to"),
    [(sk.VLLMPool, sk.AgentPool), (sk.connect, sk.VLLMPool), (sk.wait_until_ready, sk.VLLMPool)],
    ids=["VLLMPool", "connect", "wait_until_ready"],
)
def test_people_see_what_is_handed_on_with_its_default(function: Any, to: Any) -> None:
    shown, taken = inspect.signature(function).parameters, inspect.signature(to).parameters
    assert not [p for p in shown.values() if p.kind is p.VAR_KEYWORD]
    expected = {name: p.default for name, p in taken.items() if name != "endpoints"}
    changed = {"chat": "auto"} if to is sk.VLLMPool else {"timeout": 300.0}
    assert {name: shown[name].default for name in expected} == {**expected, **changed}


def test_a_keyword_that_no_pool_takes_is_refused() -> None:
    for call in (sk.AgentPool, sk.VLLMPool, sk.connect):
        with pytest.raises(TypeError, match="unexpected keyword argument 'modle'"):
            call(["127.0.0.1:9"], modle="m")


# ---- completion and help ------------------------------


@pytest.fixture(params=["jedi", "no jedi"])
def shell(request: pytest.FixtureRequest, genes: pd.DataFrame) -> InteractiveShell:
    shell = InteractiveShell()
    shell.user_ns.update(df=genes, texts=genes["gene"], sk=sk)
    shell.Completer.use_jedi = request.param == "jedi"
    return shell


def completed(shell: InteractiveShell, code: str) -> set[str]:
    with provisionalcompleter():
        return {c.text.strip(".=") for c in shell.Completer.completions(code, len(code))}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # jedi's own
@pytest.mark.parametrize(
    ("code", "offered"),
    [
        ("df.swarm.scatter('{gene}', temp", {"temperature"}),
        ("df.swarm.scatter('{gene}', st", {"store", "stop", "stop_token_ids"}),
        ("df.swarm.scatter('{gene}', out='a', max", {"max_tokens"}),
        ("df.swarm.ascatter('{gene}', max", {"max_tokens"}),
        ("df.swarm.compare('{gene}', batch", {"batch_sizes"}),
        ("texts.swarm.tree_reduce('{responses}', fan", {"fanin"}),
        ("sk.scatter(df, '{gene}', only", {"only_missing"}),
        ("sk.broadcast('Who?', sys", {"system"}),
        ("sk.connect('agents.hostfile', trust", {"trust_env"}),
        ("sk.VLLMPool(['node1:8000'], trust", {"trust_env"}),
    ],
)
def test_tab_offers_keywords(shell: InteractiveShell, code: str, offered: set[str]) -> None:
    assert completed(shell, code) >= offered


@pytest.mark.filterwarnings("ignore")
def test_tab_lists_the_verbs(shell: InteractiveShell) -> None:
    assert completed(shell, "df.swarm.") == {*METHODS, *OF_ANSWERS, "classify", "embed", "failed", "pipeline", "show"}
    assert completed(shell, "texts.swarm.") == {*METHODS, *OF_ANSWERS, "classify", "embed", "pipeline"}


@pytest.mark.parametrize("name", ["df.swarm.scatter", "sk.scatter", "texts.swarm.scatter"])
def test_a_question_mark_shows_signature_and_docstring(genes: pd.DataFrame, name: str) -> None:
    shell = InteractiveShell()
    shell.user_ns.update(df=genes, texts=genes["gene"], sk=sk)
    found = re.sub(r"\x1b\[[\d;]*m", "", shell.object_inspect_mime(name)["text/plain"])
    for words in ("temperature: float | None = None", "out: str = 'response'", "Folder of finished rows", "verbs.py"):
        assert words in found


# ---- the accessor's own repr ------------------------------


def test_the_repr_lists_the_verbs_and_the_pool(pool: sk.VLLMPool, echo: sk.LocalSwarm, genes: pd.DataFrame) -> None:
    for accessor, what in ((genes.swarm, "a DataFrame of 2 rows"), (genes["gene"].swarm, "a Series of 2 values")):
        text = repr(accessor)
        assert what in text
        assert repr(pool) in text
        for name in METHODS:
            summary = (inspect.getdoc(getattr(sk, name)) or "").splitlines()[0].replace("`", "")
            assert re.search(rf"^  \.{name} +{re.escape(summary)}", text, re.MULTILINE)
        assert echo.endpoints[0].key() not in text


def test_the_repr_connects_to_nothing() -> None:
    code = "import pandas as pd, swarmkit; print(pd.DataFrame({'a': [1]}).swarm)"
    nobody = {"SWARMKIT_HOSTFILE": "/nonexistent", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **nobody}
    )
    assert "none yet" in ran.stdout
    assert "sk.connect" in ran.stdout
    assert ".tree_reduce" in ran.stdout


def test_the_classes_are_documented() -> None:
    for accessor in (FrameSwarm, SeriesSwarm):
        assert described(accessor.scatter)[0] == "prompt"


# ---- keywords that a verb does not take ------------------------------


def test_a_refusal_reaches_other_processes(genes: pd.DataFrame) -> None:
    with pytest.raises(TypeError) as error:
        genes.swarm.scatter("{gene}", tempreature=0)  # type: ignore[call-arg]
    there = pickle.loads(pickle.dumps(error.value))
    assert type(there) is TypeError
    assert str(there) == str(error.value)
    assert "Did you mean temperature=?" in str(there)


def refused(call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(TypeError) as error:
        call(*args, **options)
    return str(error.value)


def test_a_keyword_of_another_verb_is_refused_by_name(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    for name in ("store", "progress", "on_error", "mode", "n", "out"):
        said = refused(sk.broadcast, "Who?", **{name: 1})
        assert f"broadcast takes no {name}=" in said
        assert "scatter" in said
        assert "system=" in said, "what it takes is listed"
    said = refused(genes.swarm.compare, "{gene}", mode="batch")
    assert "compare takes no mode=" in said
    assert "Did you mean modes=?" in said
    assert "preview takes no store=" in refused(genes.swarm.preview, "{gene}", store="a")
    assert "tree_reduce takes no n=" in refused(genes.swarm.tree_reduce, "gene", "{responses}", n=2)
    assert "scatter takes no fanin=" in refused(genes.swarm.scatter, "{gene}", fanin=2)
    assert "iter_scatter takes no trace=" in refused(lambda: list(genes.swarm.iter_scatter("{gene}", trace=True)))
    assert "ascatter takes no by=" in refused(lambda: asyncio.run(genes.swarm.ascatter("{gene}", by="gene")))


def test_a_message_suggests_only_what_the_verb_takes(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    calls = {
        "scatter": lambda **o: genes.swarm.scatter("{gene}", **o),
        "tree_reduce": lambda **o: genes.swarm.tree_reduce("gene", "{responses}", **o),
        "broadcast": lambda **o: sk.broadcast("Who?", **o),
        "preview": lambda **o: genes.swarm.preview("{gene}", **o),
        "compare": lambda **o: genes.swarm.compare("{gene}", **o),
    }
    asking = [names for names in map(keywords, VERBS.values()) if "pool" in names]
    every = {name for names in asking for name in names} - {"workers"}
    for verb, call in calls.items():
        taken = set(inspect.signature(getattr(sk, verb)).parameters)
        for name in {*(every - taken), *(f"{name}s" for name in every), "model", "stream", "messages", "xyz"} - taken:
            said = refused(call, **{name: 1})
            assert f"{name}=" in said
            for suggestion in re.findall(r"mean (\w+)=", said):
                assert suggestion in taken
                assert suggestion != name
            if "extra_body={" in said:
                assert name not in {"model", "stream", "messages"} | every


def test_fields_that_swarmkit_sets_have_a_place_elsewhere(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    said = refused(genes.swarm.scatter, "{gene}", stream=True)
    assert "swarmkit sets this field of the request itself" in said
    assert "extra_body" not in said


def test_a_monitor_of_several_frames_is_refused(pool: sk.VLLMPool, genes: pd.DataFrame) -> None:
    with pytest.raises(sk.SettingError, match="progress=True"):
        list(sk.iter_scatter([genes], "{gene}", monitor=True))


# ---- type checkers ------------------------------


def test_type_checkers_find_the_types_and_the_sample() -> None:
    assert (ROOT / "swarmkit" / "py.typed").exists()
    assert "tests/typing_sample.py" in (ROOT / "pyproject.toml").read_text()
