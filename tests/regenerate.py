"""Run tutorials and store their outputs: ``python tests/regenerate.py [NOTEBOOK...]``, all of them by default.

It is ``jupyter nbconvert --execute --inplace``, and then takes out what differs from run to run and tells a reader
nothing: times of execution, random ports, and the state of widgets, which neither GitHub nor JupyterLab shows before a
notebook is trusted.
"""

import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

VIEW = "application/vnd.jupyter.widget-view+json"


def regenerate(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=120, record_timing=False, coalesce_streams=True, resources={"metadata": {"path": path.parent}}
    )
    client.execute()
    tidy(notebook)
    path.write_text(with_plain_ports(nbformat.writes(notebook)) + "\n", encoding="utf-8")


def tidy(notebook: nbformat.NotebookNode) -> None:
    notebook.metadata.language_info = {"name": "python"}
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times that JupyterLab may have left
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(VIEW, None)


def with_plain_ports(text: str) -> str:
    """The local endpoints' ports, counted from 8000 in the order they appear."""
    ports: dict[str, int] = {}
    return re.sub(r"(?<=127\.0\.0\.)(\d+):(\d{5})\b",
                  lambda m: f"{m[1]}:{ports.setdefault(m[2], 8000 + len(ports))}", text)  # fmt: skip


if __name__ == "__main__":
    everything = (Path(__file__).parent.parent / "notebooks").glob("*.ipynb")
    for path in map(Path, sys.argv[1:]) if sys.argv[1:] else sorted(everything):
        print(path.name, flush=True)
        regenerate(path)
