"""What type checkers see of the verbs' keywords: mypy checks this file, nobody runs it.

The lines with ``type: ignore`` are mistakes. mypy reports an unused ``ignore``, so it must find each of them.
"""

from __future__ import annotations

from typing import assert_type

import numpy as np
import numpy.typing as npt
import pandas as pd

import swarmkit as sk
from swarmkit.accessor import FrameSwarm, SeriesSwarm
from swarmkit.analysis.compare import Comparison
from swarmkit.analysis.estimate import Estimate


def functions(df: pd.DataFrame) -> None:
    assert_type(sk.scatter(df, "{gene}", out="answer", temperature=0, max_tokens=32, store="runs/a"), pd.DataFrame)
    assert_type(sk.submit(df, lambda row: str(row["gene"]), stop=["\n"], chat=None), sk.Run)
    sk.tree_reduce(df, "response", "Merge: {responses}", by=["organism"], fanin=8, trace=True)
    sk.broadcast("Who are you?", system="Be brief.")
    sk.scatter(df, "{gene}", deadline="slurm")
    sk.scatter(df, "{gene}", deadline="tomorrow")  # type: ignore[arg-type]
    sk.classify(df, "{gene}", ["yes", "no"], deadline=60)
    sk.compare_models(df, "{gene}", ["a", "b"], deadline="pbs")
    sk.scatter(df, "{gene}", priority=-1)
    sk.scatter(df, "{gene}", priority="high")  # type: ignore[arg-type]
    sk.scatter(df, "{gene}", temprature=0)  # type: ignore[call-arg]
    sk.scatter(df, "{gene}", temperature="hot")  # type: ignore[arg-type]
    sk.broadcast("Who are you?", store="runs/a")  # type: ignore[call-arg]
    sk.tree_reduce(df, "response", "Merge: {responses}", n=2)  # type: ignore[call-arg]
    sk.compare(df, "{gene}", mode="batch")  # type: ignore[call-arg]
    sk.similar(df, "embedding", k="all")  # type: ignore[arg-type]
    sk.semantic_entropy(df)  # type: ignore[call-arg]
    steps = [sk.Step("a", "{gene}", when="{n} > 3", temperature=0), sk.Step("b", lambda row: row["a"], schema=int)]
    assert_type(sk.pipeline(df, steps, store="runs/a", max_tokens=32), pd.DataFrame)
    sk.Step("a", "{gene}", temprature=0)  # type: ignore[call-arg]
    sk.pipeline(df, ["{gene}"])  # type: ignore[list-item]
    sk.pipeline(df, steps, deadline="tomorrow")  # type: ignore[arg-type]


def frames(swarm: FrameSwarm) -> None:
    assert_type(swarm.vote("response", normalize=str.lower), pd.DataFrame)
    assert_type(swarm.semantic_entropy(by="nli", prompt="{gene}", store="runs/a"), pd.DataFrame)
    assert_type(swarm.dedupe("embedding", threshold=0.9), pd.DataFrame)
    assert_type(swarm.filter("Is {gene} a gene?", return_all=True, debias=True), pd.DataFrame)
    swarm.semantic_entropy(by="words")  # type: ignore[arg-type]
    assert_type(swarm.scatter("{gene}", n=2, details=True, temperature=0.5), pd.DataFrame)
    assert_type(swarm.submit(prompt="{gene}", mode="single"), sk.Run)
    assert_type(swarm.estimate("{gene}", sample=16, price=(0.1, 0.2), store="runs/a"), Estimate)
    assert_type(swarm.compare("{gene}", modes=["batch"], delivery="rows"), Comparison)
    assert_type(swarm.preview("{gene}", 2, system="Be brief."), pd.DataFrame)
    swarm.tree_reduce("response", "Merge: {responses}", by="organism")
    swarm.scatter("{gene}", temprature=0)  # type: ignore[call-arg]
    swarm.scatter("{gene}", mode="both")  # type: ignore[arg-type]
    assert_type(swarm.scatter(messages="chat", examples=[("a", "b")], assistant_prefix="It"), pd.DataFrame)


def vectors(df: pd.DataFrame, swarm: FrameSwarm, values: SeriesSwarm) -> None:
    assert_type(sk.embed(df, "{gene}", dimensions=64, store="runs/a"), pd.DataFrame)
    assert_type(swarm.embed("{gene}", as_array=True), npt.NDArray[np.float32])
    assert_type(values.embed(), pd.DataFrame)
    swarm.embed("{gene}", temperature=0)  # type: ignore[call-overload]


async def awaited(swarm: FrameSwarm, values: SeriesSwarm) -> None:
    assert_type(await swarm.ascatter("{gene}", temperature=0), pd.DataFrame)
    assert_type(await values.atree_reduce("Merge: {responses}", fanin=2), pd.DataFrame)
    assert_type(await swarm.aembed("{gene}", as_array=True), npt.NDArray[np.float32])
    assert_type(await values.aembed(), pd.DataFrame)
    await swarm.ascatter("{gene}", temprature=0)  # type: ignore[call-arg]


def series(values: SeriesSwarm) -> None:
    assert_type(values.scatter(temperature=0), pd.DataFrame)
    values.scatter("What is {value}?", max_tokens=8)
    values.preview(rows=1)
    values.tree_reduce("Merge: {responses}", fanin=2)
    values.scatter(temprature=0)  # type: ignore[call-arg]


def pools() -> None:
    assert_type(sk.connect("agents.hostfile", model="m", rpm=60, via="ssh:login"), sk.VLLMPool)
    assert_type(sk.wait_until_ready("agents.hostfile", min_ready=2, headers={"X-Team": "a"}), sk.VLLMPool)
    sk.VLLMPool(["node1:8000"], "m", chat="auto", max_connections=8, retry=sk.RetryPolicy())
    sk.connect("agents.hostfile", modle="m")  # type: ignore[call-arg]
    sk.connect("agents.hostfile", rpm="many")  # type: ignore[arg-type]
    sk.VLLMPool(["node1:8000"], trust="env")  # type: ignore[call-arg]
