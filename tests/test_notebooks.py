"""What a reader of the stored tutorials may rely on; that their outputs are still true is nbval's part."""

import re
from functools import cache
from pathlib import Path

import nbformat
import pandas as pd
import pytest

import swarmkit as sk

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST_BYTES = 600_000
PATHS = re.compile(r"(?<![\w:/.])/(?:home|root|tmp|Users|private|opt|usr|var|work|mnt|scratch)/[\w.-]+")
# Keys begin in well-known ways; the token of a local server is 32 characters of every kind.
SECRETS = re.compile(
    r"\b(?:sk-|hf_|ghp_|AKIA|Bearer )\w{8,}|api_key['\"]?[=:]\s*['\"][\w-]{20,}"
    r"|(?<![\w/+=-])(?=[\w-]*\d)(?=[\w-]*[a-z][A-Z])[\w-]{32}(?![\w/+=-])"
)
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])


@cache
def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def readable(path):
    """All that is written in a notebook, sources and outputs; pictures and widgets' inner names left out."""
    for cell in read(path).cells:
        yield cell.source
        for output in cell.get("outputs", []):
            yield output.get("text", "")
            yield from (text for kind, text in output.get("data", {}).items() if kind in ("text/plain", "text/html"))


def test_there_are_tutorials_numbered_without_a_gap():
    assert [p.stem[:2] for p in NOTEBOOKS] == [f"{i:02}" for i in range(len(NOTEBOOKS))]
    assert len(NOTEBOOKS) >= 8


@each
def test_it_was_run_from_top_to_bottom(path):
    # nbval compares nothing where no output is stored, and would pass.
    assert [cell.execution_count for cell in code_cells(path)] == list(range(1, len(code_cells(path)) + 1))
    assert any(cell.outputs for cell in code_cells(path))


@each
def test_it_stores_no_error(path):
    for cell in code_cells(path):
        if "raises-exception" not in cell.metadata.get("tags", []):
            assert [o.ename for o in cell.outputs if o.output_type == "error"] == []
        assert [o.text for o in cell.outputs if o.get("name") == "stderr"] == []


@each
def test_what_it_shows_needs_no_kernel(path):  # that it is seen: tests/browser/test_tutorials.py
    for cell in code_cells(path):
        for output in cell.outputs:
            assert [kind for kind in output.get("data", {}) if "widget" in kind] == []
    assert not re.search(r"\d%\|", "\n".join(readable(path))), "a bar of a terminal, which did not end"


@each
def test_it_holds_nothing_of_the_machine_it_was_made_on(path):
    for text in readable(path):
        assert PATHS.findall(text) == []
        assert SECRETS.findall(text) == []
    for cell in read(path).cells:
        assert not {"execution", "ExecuteTime"} & set(cell.metadata)


@each
def test_its_size_is_bounded(path):
    assert path.stat().st_size <= LARGEST_BYTES


@each
def test_it_begins_with_a_title_and_says_what_it_is_for(path):
    title, _, purpose = read(path).cells[0].source.partition("\n")
    assert re.fullmatch(r"# \S.*", title)
    assert len(purpose.split()) >= 20


@each
def test_it_stops_the_servers_it_started(path):
    source = "\n".join(cell.source for cell in code_cells(path))
    for name in re.findall(r"^(\w+) = (?:sk\.)?local\(", source, re.MULTILINE):
        assert f"{name}.stop()" in source or re.search(rf"for \w+ in \(.*\b{name}\b.*\):\n    \w+\.stop\(\)", source)


@each
def test_its_links_lead_somewhere(path):
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\((?!https?:)([^)#]+)", cell.source):
                assert (path.parent / target).exists(), target


def test_every_public_verb_is_shown():
    shown = "\n".join(cell.source for path in NOTEBOOKS for cell in code_cells(path))
    frame = pd.DataFrame({"a": []})
    methods = [name for name in dir(frame.swarm) if not name.startswith("_")]
    assert [name for name in methods if f".{name}(" not in shown] == []
    lists = {"broadcast_and_reduce", "map_gather", "plots", "scatter_gather"}  # for code of the design before
    functions = [name for name in sk.__all__ if name[0].islower() and name not in methods and name not in lists]
    assert [name for name in functions if f"sk.{name}(" not in shown] == []
    assert re.search(r'\["\w+"\]\.swarm\.', shown), "no Series.swarm"
    assert "sk.EndpointPicker(" in shown


def test_the_documentation_lists_them_in_reading_order():
    page = (ROOT / "docs/tutorials.md").read_text()
    assert re.findall(r"\(\.\./notebooks/(\w+\.ipynb)\)", page) == [p.name for p in NOTEBOOKS]
