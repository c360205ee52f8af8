"""What the README and docs/ say is there, is there."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import swarmkit
from swarmkit.accessor import FrameSwarm

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/README.md"])
each = pytest.mark.parametrize("path", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
# Modules all of whose names are public. Those of patterns.tree_reduce but one are for frames.tree_reduce.
MODULES = [
    "swarmkit",
    "swarmkit.analysis.plots",
    "swarmkit.dask",
    "swarmkit.server",
    "swarmkit.aggregators",
    "swarmkit.uq",
    "swarmkit.uq.kle",
    "swarmkit.patterns.blackboard",
    "swarmkit.patterns.broadcast",
    "swarmkit.patterns.embedding",
    "swarmkit.patterns.pipeline",
    "swarmkit.patterns.scatter_gather",
]
EXAMPLES = doctest.DocTestParser()
NOT_LISTED = {"__version__", "plots", "Figure"}  # a text; the functions of the module are listed; of matplotlib


def blocks(path, language):
    """The code of a page in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def listed():
    """The objects that the reference has pages for, by their names there."""
    names = {}
    for block in blocks(ROOT / "docs/reference.md", r"\{eval-rst\}"):
        (module,) = re.findall(r"currentmodule:: (\S+)", block)
        for name in re.findall(r"^   (\w[\w.]*)$", block, re.MULTILINE):
            names[f"{module}.{name}"] = resolve(module, name)
    return names


def resolve(module, name):
    """What sphinx.ext.autosummary finds under that name."""
    inner, _, last = name.rpartition(".")
    return getattr(importlib.import_module(f"{module}.{inner}" if inner else module), last)


def test_every_public_name_is_in_the_reference():
    there = [id(value) for value in listed().values()]
    missing = []
    for module in map(importlib.import_module, MODULES):
        names = [name for name in module.__all__ if name not in NOT_LISTED]
        missing += [f"{module.__name__}.{name}" for name in names if id(getattr(module, name)) not in there]
    assert missing == []
    assert id(FrameSwarm) in there
    assert id(importlib.import_module("swarmkit.patterns.tree_reduce").tree_reduce) in there


def test_the_reference_has_no_name_twice():
    there = [id(value) for value in listed().values()]
    assert len(there) == len(set(there))


# What no example can show: the stop button, and a call from within swarmkit's own thread.
WITHOUT_EXAMPLE = {"ScatterInterrupted", "LoopThreadError"}


def members(page):
    """The methods that the page of a class shows, by name."""
    template = (ROOT / "docs/templates/autosummary/class.rst").read_text()
    left_out = re.findall(rf'"{page.__name__}": "(.*)"', template)
    names = [name for name in vars(page) if not name.startswith("_") and name not in ", ".join(left_out).split(", ")]
    found = {name: getattr(page, name) for name in names}
    return {name: m for name, m in found.items() if callable(m) or isinstance(m, property)}


def test_every_page_of_the_reference_has_examples_of_all_it_shows():
    lacking = []
    for name, page in listed().items():
        methods = members(page) if isinstance(page, type) else {}
        shown = [e.source for doc in (page, *methods.values()) for e in EXAMPLES.get_examples(doc.__doc__ or "")]
        if not shown and page.__name__ not in WITHOUT_EXAMPLE:
            lacking.append(name)
        for method, does in methods.items():
            used = re.compile(rf"\.{method}\b")
            if ">>> " not in (does.__doc__ or "") and not any(map(used.search, shown)):
                lacking.append(f"{name}.{method}")
    assert lacking == []


@each
def test_names_in_the_text_exist(path):
    text = path.read_text()
    for name in set(re.findall(r"\bsk\.(\w+)", text)):
        assert hasattr(swarmkit, name), f"it uses sk.{name}"
    for name in set(re.findall(r"\bsk\.plots\.(\w+)", text)):
        assert hasattr(swarmkit.plots, name), f"it uses sk.plots.{name}"
    for name in set(re.findall(r"\bd?df\.swarm\.(\w+)", text)):
        assert hasattr(pd.DataFrame({"a": []}).swarm, name), f"it uses df.swarm.{name}"


@each
def test_examples_are_python(path):
    for code in blocks(path, "python"):
        compile(code, str(path), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def anchors(path):
    """The anchors of a page's headings, as forges and MyST make them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@each
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        there = path.parent / name if name else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_the_readme_is_short_and_has_its_commands():
    lines = README.splitlines()
    assert len(lines) <= 105
    assert 'python3 -m venv .venv && .venv/bin/pip install -e ".[local]" && .venv/bin/swarmkit demo' in lines
    assert 'python3 -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/pytest' in lines
    docs = 'pip install -e ".[docs]" && .venv/bin/sphinx-build -q -W -c docs . build/docs'
    assert f"python3 -m venv .venv && .venv/bin/{docs}" in lines


def test_a_hostfile_is_shown_that_parses(tmp_path):
    block = next(b for b in blocks(ROOT / "docs/connect.md", "text") if "rack=a" in b)
    path = tmp_path / "agents.hostfile"
    path.write_text(block)
    assert len(swarmkit.parse_hostfile(path)) == 4


@pytest.mark.slow
@pytest.mark.timeout(300)  # a real model is loaded twice
def test_the_first_example_prints_what_the_readme_says():
    code, output = blocks(ROOT / "README.md", "python")[0], blocks(ROOT / "README.md", "text")[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == output, done.stderr
