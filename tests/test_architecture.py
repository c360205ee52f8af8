"""The module order of DESIGN section 2, and who may import what."""

import ast
import importlib
import io
import os
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import swarmkit

PACKAGE = Path(swarmkit.__file__).parent

# The order in which a row meets the modules. A module imports from those above it only.
ORDER = [
    "errors",
    "markup",
    "records",
    "hostfile",
    "policy",
    "prompts",
    "batches",
    "fleet",
    "orders",
    "scheduler",
    "wire",
    "transport",
    "probe",
    "chat",
    "results",
    "events",
    "stats",
    "dispatch",
    "bridge",
    "pool",
    "vllm_pool",
    "connect",
    "wait",
    "patterns",
    "store",
    "reuse",
    "progress",
    "run",
    "widgets",
    "options",
    "sheet",
    "forest",
    "stream",
    "frames",
    "plots",
    "compare",
    "simulate",
    "accessor",
    "dask",
    "local",
    "tables",
    "survey",
    "demo",
    "arguments",
    "cli",
    "__main__",
]
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")
MAX_LINES = 400
# The library is to stay thin. What stands beside it has a bound of its own: the servers of this machine, which are
# a product for tests and demos, the command line, what notebooks show, and what is for campaigns and tables larger
# than a machine.
BESIDE = {"local": 2100, "command line": 1020, "notebook": 950, "scale": 650}
PARTS = {
    "local": "local",
    **dict.fromkeys(["tables", "survey", "demo", "arguments", "cli", "__main__"], "command line"),
    **dict.fromkeys(["widgets", "plots"], "notebook"),
    **dict.fromkeys(["simulate", "stream", "dask"], "scale"),
}
MAX_LIBRARY = 5000


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path):
    """``(module, line, at_top)`` of every import that runs, type-checking blocks left out."""
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped |= {id(n) for part in node.body for n in ast.walk(part)}
    top = {id(n) for n in tree.body}
    package = ["swarmkit", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{a.name}" for a in node.names] if module == "swarmkit" else [module]
            for name in names:
                yield name, node.lineno, id(node) in top


def code_lines(path: Path) -> int:
    """Lines of code: no blank lines, comments or docstrings."""
    text = path.read_text()
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.ENDMARKER,
        ):
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                lines -= set(range(body[0].lineno, body[0].end_lineno + 1))
    return len(lines)


def test_every_module_has_its_place():
    assert {layer(p) for p in MODULES} <= set(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_up(path):
    here = ORDER.index(layer(path))
    for module, line, _ in imports(path):
        if module.startswith("swarmkit.") and module.split(".")[1] in ORDER:
            there = ORDER.index(module.split(".")[1])
            # The accessor brings frames in when a verb is used; whatever runs late may not make a cycle.
            assert there < here or (there == here and "/" in str(path.relative_to(PACKAGE))), (
                f"{path.name}:{line} imports {module}, which comes after it"
            )


@pytest.mark.parametrize(
    ("package", "only"),
    [
        ("openai", {"transport"}),
        ("httpx2", {"transport"}),
        ("aiohttp", {"transport"}),
        ("ipywidgets", {"widgets"}),
        ("matplotlib", {"plots", "compare"}),
        ("starlette", {"local"}),
        ("uvicorn", {"local"}),
        ("openvino_genai", {"local"}),
        ("dask", {"dask"}),
        ("distributed", {"dask"}),
    ],
)
def test_who_imports_what(package, only):
    found = {layer(p) for p in MODULES for module, _, _ in imports(p) if module.split(".")[0] == package}
    assert found <= only


def test_pandas_stays_out_of_the_engine():
    engine = ORDER[: ORDER.index("patterns")]
    knows = {layer(p) for p in MODULES for m, _, top in imports(p) if m.split(".")[0] in ("pandas", "numpy") and top}
    assert knows & set(engine) == {"prompts"}


def test_the_scheduler_knows_no_clock_and_no_io():
    names = {m.split(".")[0] for m, _, _ in imports(PACKAGE / "scheduler.py")}
    assert not names & {"time", "random", "asyncio", "socket", "threading", "datetime"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_small(path):
    assert code_lines(path) <= MAX_LINES


def test_the_library_stays_thin():
    sums = dict.fromkeys(["library", *BESIDE], 0)
    for path in MODULES:
        sums[PARTS.get(layer(path), "library")] += code_lines(path)
    assert sums["library"] <= MAX_LIBRARY
    for part, most in BESIDE.items():
        assert sums[part] <= most, f"{part}: {sums[part]} lines"


def test_exports_are_what_type_checkers_see():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If))
    typed = {a.asname or a.name for node in block.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert sorted(typed) == swarmkit.__all__
    for name in swarmkit.__all__:
        assert getattr(swarmkit, name).__doc__, f"swarmkit.{name} has no docstring"


def test_verbs_stay_verbs_whichever_module_is_imported_first():
    code = """
import swarmkit.local, swarmkit.compare, swarmkit.frames
import swarmkit as sk
assert all(callable(getattr(sk, name)) for name in ("connect", "compare", "local", "scatter"))
assert sk.connect.__name__ == "connect"
import swarmkit.connect
assert sk.connect.__name__ == "connect"
from swarmkit.connect import resolve
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)})


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_say_what_they_export(path):
    if path.stem.startswith("__"):
        return
    name = ".".join(["swarmkit", *path.relative_to(PACKAGE).with_suffix("").parts])
    module = importlib.import_module(name)
    for exported in module.__all__:
        assert hasattr(module, exported), f"{name}.__all__ names {exported}, which is not there"
