"""The order of the wings, what each must never know, and what the package shows."""

import ast
import importlib
import os
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import swarmkit

PACKAGE = Path(swarmkit.__file__).parent
ROOT = PACKAGE.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# From the ground up, in the order in which docs/architecture.md describes them: imports run downward only.
WINGS = [
    "version",
    "text",
    "traces",
    "errors",
    "uq",
    "schema",
    "records",
    "aggregators",
    "engine",
    "client",
    "runs",
    "pool",
    "store",
    "patterns",
    "frames",
    "widgets",
    "analysis",
    "server",
    "accessor",
    "dask",
    "cli",
    "__main__",
]
# Beside the tower: endpoints on this machine are a product of their own, which the library never needs.
SERVER_MAY_USE = {"version", "text", "traces", "errors", "records", "client"}
PANDAS = {"pandas", "numpy"}
HTTP = {"openai", "aiohttp", "httpx2", "yarl"}
IO = {"time", "random", "asyncio", "threading", "datetime", "os", "pathlib", "socket", "ssl", *HTTP}
# What a wing must never know: packages, and wings that are below it all the same.
KNOWS_NOTHING_OF = {
    "errors": PANDAS | IO - {"os"},
    "records": PANDAS | IO,
    "text": PANDAS | IO,
    "traces": PANDAS | IO - {"os"},
    "uq": {"pandas"} | IO - {"os", "pathlib"},  # the files of probes
    "aggregators": PANDAS | IO,
    "schema": PANDAS | IO - {"datetime"},  # the types of dates, not the clock
    "engine": PANDAS | IO,
    "client": PANDAS | {"swarmkit.engine"},
    "runs": {"numpy"} | HTTP,
    "pool": PANDAS,
    "store": {"pandas"} | HTTP,
    "patterns": PANDAS | HTTP,
    "frames": HTTP | {"ipywidgets", "swarmkit.client.transport", "swarmkit.client.wire", "swarmkit.client.replies"},
    "widgets": HTTP,
    "analysis": HTTP | {"swarmkit.widgets"},
}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def wing(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, type_checking: bool = False):
    """``(module, line, at_top)`` of every import that runs; those for type checkers too, if asked for."""
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if not type_checking and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
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
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                is_module = module.startswith("swarmkit") and _exists(whole)
                yield (whole if is_module else module), node.lineno, id(node) in top


def _exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def test_every_module_stands_in_a_wing():
    assert {wing(p) for p in MODULES} <= set(WINGS)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_downward(path):
    here = wing(path)
    for module, line, _ in imports(path):
        if not module.startswith("swarmkit."):
            assert module != "swarmkit", f"{name_of(path)}:{line} imports the package, which imports everything"
            continue
        there = module.split(".")[1]
        where = f"{name_of(path)}:{line} imports {module}"
        assert WINGS.index(there) <= WINGS.index(here), f"{where}, which stands above it"
        if here == "server":
            assert there in SERVER_MAY_USE | {"server"}, f"{where}: the servers use what is below the pool only"


@pytest.mark.parametrize("path", [p for p in MODULES if wing(p) in KNOWS_NOTHING_OF], ids=name_of)
def test_wings_know_nothing_of_what_is_not_theirs(path):
    banned = KNOWS_NOTHING_OF[wing(path)]
    for module, line, at_top in imports(path):
        if module == "pandas" and not at_top:  # to_frame(), frame(): for those who ask for one
            continue
        names = {module.split(".")[0], ".".join(module.split(".")[:2]), ".".join(module.split(".")[:3])}
        assert not names & banned, f"{name_of(path)}:{line} imports {module}"


def test_folders_form_no_circle_between_wings():
    uses = {w: set() for w in WINGS}
    for path in MODULES:
        uses[wing(path)] |= {m.split(".")[1] for m, _, _ in imports(path) if m.startswith("swarmkit.")} - {wing(path)}
    left = set(WINGS)
    while free := {w for w in left if not uses[w] & left}:
        left -= free
    assert not left


@pytest.mark.parametrize("folder", sorted({p.parent for p in MODULES} - {PACKAGE}), ids=name_of)
def test_every_folder_says_what_it_is(folder):
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    assert len(docstring.split()) > 10, f"{name_of(folder)}/__init__.py says too little"


def declared(*extras: str) -> set[str]:
    lines = [*PROJECT["dependencies"], *(d for e in extras for d in PROJECT["optional-dependencies"][e])]
    return {
        line.split("[")[0].split(">")[0].split("<")[0].split("=")[0].strip().lower().replace("_", "-") for line in lines
    }


DISTRIBUTIONS = packages_distributions()  # reads the metadata of every installed package
OPTIONAL = {"server": ("local",), "frames": ("parquet",), "dask": ("dask",), "cli": ("parquet", "local")}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_what_is_imported_is_declared(path):
    allowed = declared(*OPTIONAL.get(wing(path), ())) | {"swarmkit-frames"}
    for module, line, _ in imports(path, type_checking=True):
        top = module.split(".")[0]
        if top in sys.stdlib_module_names or top in ("swarmkit", "__future__"):
            continue
        names = {d.lower().replace("_", "-") for d in DISTRIBUTIONS.get(top, [top])}
        assert names & allowed, f"{name_of(path)}:{line} imports {top}, and pyproject.toml does not name {names}"


def test_exports_are_what_type_checkers_see():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If))
    typed = {a.asname or a.name for node in block.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert sorted({*typed, "__version__"}) == swarmkit.__all__
    for name in swarmkit.__all__:
        assert getattr(swarmkit, name).__doc__, f"swarmkit.{name} has no docstring"


def test_importing_the_package_imports_little_more_than_pandas():
    code = (
        "import sys, pandas; before = {*sys.modules}; import swarmkit\n"
        "print(*sorted({name.split('.')[0] for name in {*sys.modules} - before if name[0] != '_'}))\n"
        "print(sum(name.startswith('swarmkit.') for name in sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    imported, modules = ran.stdout.splitlines()
    assert set(imported.split()) <= {"swarmkit", "html"}
    assert int(modules) <= 10


def test_dir_shows_public_names_only():
    assert dir(swarmkit) == swarmkit.__all__
    assert not [name for name in dir(swarmkit) if name.startswith("_") and name != "__version__"]


def test_no_public_name_is_a_module_of_the_package():
    modules = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in MODULES}
    assert not modules & set(swarmkit.__all__)
    code = (
        "import swarmkit as sk\n"
        "for name in sk.__all__: getattr(sk, name)\n"
        "assert sk.plots.timeline and callable(sk.local)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_say_what_they_export(path):
    if path.stem.startswith("__"):
        return
    name = ".".join(["swarmkit", *path.relative_to(PACKAGE).with_suffix("").parts])
    module = importlib.import_module(name)
    for exported in module.__all__:
        assert hasattr(module, exported), f"{name}.__all__ names {exported}, which is not there"
