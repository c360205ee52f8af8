"""The verbs on dask DataFrames: ``import swarmkit.dask`` registers ``ddf.swarm``.

Every partition is a run of its own, on the worker that holds it. Runs that go on at once share the endpoints: each
gets a part of what an endpoint may hold (``BatchPolicy``), down to one request, and beyond that a part of the
endpoints, so that together they ask no more of a server than one run would, and in batches as large.

The graph holds a pool's recipe: endpoints, settings and what was found out about the servers, and no key. A worker
process makes one pool of it, and reads keys from its own environment, by the names that ``key_env`` gives.
"""

from __future__ import annotations

import pickle
import threading
from dataclasses import replace
from typing import Any, Literal

import cloudpickle
import dask
import distributed
import pandas as pd
from dask.dataframe import DataFrame
from dask.dataframe.extensions import register_dataframe_accessor

from . import bridge, frames
from .errors import SettingError
from .forest import Forest
from .options import read_options
from .sheet import Sheet
from .vllm_pool import VLLMPool

__all__ = ["DaskSwarm"]

_FEWEST = 4  # endpoints of a run, where there are so many: it must outlive the death of one, and of a few
_pools: dict[bytes, VLLMPool] = {}
_making = threading.Lock()


def _recipe(pool: VLLMPool) -> bytes:
    here_only = [e.name for e in pool.endpoints if e.api_key]
    if here_only:
        raise SettingError(
            f"the key of {here_only[0]} is known to this process only, and keys do not travel to workers: name the "
            "variable that holds it (key_env=NAME in the hostfile or the AgentEndpoint), and set it for the workers too"
        )
    known = pool._core.infos
    infos = {e.url: known[e.url] for e in pool.endpoints if e.url in known}
    return bytes(cloudpickle.dumps((pool._with(), infos)))


def _pool(recipe: bytes) -> VLLMPool:
    """This process's pool of a recipe, with its connections."""
    with _making:
        if recipe not in _pools:
            pool, infos = pickle.loads(recipe)
            pool._core.infos.update(infos)
            _pools[recipe] = pool
        return _pools[recipe]


def _share(pool: VLLMPool, number: int, runs: int) -> VLLMPool:
    """The part of a pool that run ``number`` gets, where so many go on at once."""
    batch, size = pool.batch, pool.size
    window = size * batch.max_in_flight
    count = max(min(size, _FEWEST), min(size, window // runs))
    requests = max(1, window // (runs * count))
    own = replace(
        batch,
        max_in_flight=min(batch.max_in_flight, requests),
        max_size=min(batch.max_size, max(1, window * batch.max_size // (runs * count * requests))),
        single_in_flight=max(1, size * batch.single_in_flight // (runs * count)),
    )
    chosen = pool.select([(number * count + i) % size for i in range(count)])
    return chosen._with(_batch=own, _concurrency=pool._concurrency and max(1, pool._concurrency // runs))


def _options(options: dict[str, Any], recipe: bytes, runs: int, number: int) -> dict[str, Any]:
    """The keywords of one partition's call."""
    return {**options, "pool": _share(_pool(recipe), number, runs), "progress": False}


def _scatter(
    part: pd.DataFrame, prompt: Any, names: list[str], recipe: bytes, runs: int, options: dict[str, Any],
    partition_info: dict[str, Any] | None = None,
) -> pd.DataFrame:  # fmt: skip
    number = partition_info["number"] if partition_info else 0
    return frames.scatter(part, prompt, **_options(options, recipe, runs, number))[names]


def _reduce(
    part: pd.DataFrame, tree: dict[str, Any], meta: pd.DataFrame, recipe: bytes, runs: int, options: dict[str, Any],
    partition_info: dict[str, Any] | None = None,
) -> pd.DataFrame:  # fmt: skip
    number = partition_info["number"] if partition_info else 0
    own = _options(options, recipe, runs, number)
    call = read_options(own, aggregation=True)  # type: ignore[arg-type] # a plain dict; checked when the call was made
    frame = Forest(part, **tree).start(call).finish()
    return frame if len(frame) else meta  # no rows say nothing of dtypes


@register_dataframe_accessor("swarm")
class DaskSwarm:
    """The verbs on a dask DataFrame: lazy, a run for each partition.

    Computing twice asks twice: keep the result (``persist``, ``to_parquet``), or give ``store=``, by which also
    the partitions of a worker that was lost are read and not asked again. Partitions do not know of each other's
    repeated prompts: with a store, a prompt that stands in two of them has one stored answer, sampled or not.
    """

    def __init__(self, ddf: DataFrame) -> None:
        self._ddf = ddf

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"dask frames have no swarm.{name}: they have scatter and tree_reduce. For the other verbs take pandas "
            f"rows: ddf.head(100).swarm.{name}(...)"
        )

    def scatter(
        self, prompt: Any, *, out: str = "response", n: int = 1, details: bool = False, only_missing: bool = False,
        workers: int | None = None, **options: Any,
    ) -> DataFrame:  # fmt: skip
        """Send one prompt per row, when it is computed.

        Parameters
        ----------
        prompt : str, callable or dask Series
            As for ``swarmkit.scatter``; a Series must have the frame's partitions.
        out, n, details, only_missing, **options
            As for ``swarmkit.scatter``. There is no ``<out>_reasoning`` column.
        workers : int, optional
            Partitions that go on at once, over the whole cluster, each of which gets its part of the endpoints. By
            default the threads of the current client's workers; without a client, those of this machine.

        Returns
        -------
        dask.dataframe.DataFrame
            With the columns and dtypes of ``swarmkit.scatter``, the frame's index and divisions.

        Raises
        ------
        UnknownColumnError, PromptError, SettingError, TypeError
            At once, as by ``swarmkit.scatter``.
        """
        recipe, runs = self._prepare(options, workers, n=n, details=details)
        given = getattr(prompt, "_meta", prompt)
        if isinstance(prompt, pd.Series):
            raise SettingError("a pandas Series has no partitions: give the prompts as a column or a dask Series")
        meta = Sheet(self._ddf._meta, given, out, n, details, only_missing).frame("")
        verb = {"out": out, "n": n, "details": details, "only_missing": only_missing}
        return self._ddf.map_partitions(
            _scatter, prompt, names=list(meta.columns), recipe=recipe, runs=runs, options={**options, **verb}, meta=meta
        )

    def tree_reduce(
        self, column: str, prompt: str, *, by: Any = None, fanin: int | Literal["auto"] = "auto",
        out: str = "response", workers: int | None = None, **options: Any,
    ) -> DataFrame:  # fmt: skip
        """Merge a column of texts into one answer a group, when it is computed.

        Each partition reduces its part of every group; then one task merges the parts, with the whole swarm. It
        holds a text for each group of each partition.

        Parameters
        ----------
        column, prompt, by, fanin, out, **options
            As for ``swarmkit.tree_reduce``, without ``trace``.
        workers : int, optional
            As for ``scatter``.

        Returns
        -------
        dask.dataframe.DataFrame
            One partition, with the columns and dtypes of ``swarmkit.tree_reduce``.

        Raises
        ------
        UnknownColumnError, PromptError, SettingError, TypeError
            At once, as by ``swarmkit.tree_reduce``.
        """
        if "trace" in options:
            raise SettingError("trace= is not possible on dask frames: the tree grows in parts, on many workers")
        recipe, runs = self._prepare(options, workers, aggregation=True)
        tree = {"column": column, "prompt": prompt, "by": by, "fanin": fanin, "out": out}
        meta = Forest(self._ddf._meta_nonempty, **tree).frame("").iloc[:0]
        common = {"meta": meta, "clear_divisions": True, "recipe": recipe, "options": options}
        parts = self._ddf.map_partitions(_reduce, tree, meta, runs=runs, **common)
        if self._ddf.npartitions == 1:
            return parts
        tree = {**tree, "column": out, "partial": True}
        return parts.repartition(npartitions=1).map_partitions(_reduce, tree, meta, runs=1, **common)

    def _prepare(self, options: dict[str, Any], workers: int | None, **how: Any) -> tuple[bytes, int]:
        """Check the keywords; take the pool out of them, as its recipe; count who shares it."""
        for name in ("progress", "monitor"):
            if options.get(name) is True:
                raise SettingError(f"{name}=True: workers show nothing; use dask's own ProgressBar or dashboard")
        runs = min(_at_once(workers), self._ddf.npartitions)
        call = read_options({**options, "progress": False}, **how)  # type: ignore[typeddict-item] # checked there
        options.pop("pool", None)
        if call.store is not None:
            options["store"] = str(call.store.path.absolute())
        try:
            return _recipe(call.pool), runs
        finally:
            if call.owned:
                bridge.call(call.pool.close())


def _at_once(workers: int | None) -> int:
    if workers is None:
        try:
            workers = sum(distributed.default_client().nthreads().values())
        except ValueError:  # no client: dask's own threads
            return int(dask.config.get("num_workers", None) or dask.system.CPU_COUNT)
        if not workers:
            raise SettingError("the cluster has no workers yet: client.wait_for_workers(1), or say workers=")
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise SettingError(f"workers={workers!r}: must be a whole number of partitions at once, 1 or more")
    return workers
