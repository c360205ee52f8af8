"""The verbs on dask DataFrames: ``import swarmkit.dask`` registers ``ddf.swarm``.

Each partition is a run of its own, on the worker that holds it. Concurrent runs share the endpoints: each gets a part
of the requests in flight that an endpoint may have (``BatchPolicy``), down to one, and beyond that a part of the
endpoints. Together they put no more load on a server than one run would, in batches of the same size.

The graph holds a pool's recipe: endpoints, settings and what is known of the servers, and no key. A worker process
makes one pool of it, and reads keys from its own environment, by the names that ``key_env`` gives.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Unpack

import cloudpickle
import dask
import distributed
import pandas as pd
from dask.dataframe import DataFrame
from dask.dataframe.extensions import register_dataframe_accessor

from .accessor import overview
from .errors import SettingError
from .frames import verbs
from .frames.call import arguments, is_whole, read_options
from .frames.deadline import moment_of
from .frames.embed import VectorFrame, embed
from .frames.options import PartitionEmbedOptions, PartitionScatterOptions, PartitionTreeOptions
from .frames.scatter import ScatterFrame
from .frames.signatures import takes
from .frames.store import Store, open_store
from .frames.tree_reduce import ReductionTrees
from .pool.vllm_pool import VLLMPool
from .store.writer import Durability
from .text import plural

__all__ = ["DaskSwarm"]

_NO_PARTITIONS = "a pandas Series has no partitions: give the prompts as a column or a dask Series"
_FEWEST = 4  # endpoints of a run, where there are so many: it must survive the loss of one, and of a few
_STORES = 4  # that a process keeps open: the index of each is in memory, 16 bytes an answer
_REFUSED = {
    "progress": "workers show nothing; use dask's own ProgressBar or dashboard",
    "monitor": "workers show nothing; use dask's own ProgressBar or dashboard",
    "as_array": "the vectors of a frame that memory does not hold are no array",
    "trace": "the parts of a tree are reduced by many workers, and none has all of it",
}
_pools: dict[bytes, VLLMPool] = {}
_lock = threading.Lock()


def _recipe(pool: VLLMPool) -> bytes:
    here_only = [e.name for e in pool.endpoints if not e.key_travels()]
    if here_only:
        raise SettingError(
            f"the key of {here_only[0]} is known to this process only, and keys do not travel to workers: name the "
            "variable that holds it (key_env=NAME in the hostfile or the AgentEndpoint), and set it for the workers "
            "too; or give the path of a file that they can read (api_key=Path(...))"
        )
    known = pool._core.infos
    infos = {e.url: known[e.url] for e in pool.endpoints if e.url in known}
    return bytes(cloudpickle.dumps((pool._with(), infos)))


def _pool(recipe: bytes, runs: int) -> VLLMPool:
    """This process's pool of a recipe, with its connections and its part of the rates of ``runs`` concurrent runs."""
    with _lock:
        if recipe not in _pools:
            pool, infos = pickle.loads(recipe)
            pool._core.infos.update(infos)
            with contextlib.suppress(ValueError):  # no worker: all runs are in this process
                pool._core.rates.share = min(1.0, distributed.get_worker().state.nthreads / runs)
            _pools[recipe] = pool
        return _pools[recipe]


def _share(pool: VLLMPool, number: int, runs: int) -> VLLMPool:
    """The part of a pool that run ``number`` gets, of so many concurrent runs."""
    batch, size = pool.batch, pool.size
    window = size * batch.max_in_flight
    count = max(min(size, _FEWEST), min(size, window // runs))
    requests = max(1, window // (runs * count))
    most = max(1, window * batch.first_size // (runs * count * requests))
    own = replace(
        batch,
        max_in_flight=min(batch.max_in_flight, requests),
        max_size=most if most < batch.first_size else batch.max_size,  # "auto" may grow as in one process
        single_in_flight=max(1, size * batch.single_in_flight // (runs * count)),
    )
    chosen = pool.select([(number * count + i) % size for i in range(count)])
    return chosen._with(_batch=own, _concurrency=pool._concurrency and max(1, pool._concurrency // runs))


@functools.lru_cache(_STORES)
def _store(path: str, durability: Durability, store_prompts: bool) -> Store:
    """This process's store in a folder: each partition reads on what was written since, and not all of it again."""
    return open_store(path, durability=durability, store_prompts=store_prompts)


def _options(
    options: dict[str, Any], recipe: bytes, runs: int, partition_info: dict[str, Any] | None
) -> dict[str, Any]:
    """The keywords of one partition's call."""
    store = {"store": _store(*options["store"])} if options.get("store") else {}
    number = partition_info["number"] if partition_info else 0
    return {**options, **store, "pool": _share(_pool(recipe, runs), number, runs), "progress": False}


def _ask(
    part: pd.DataFrame, prompt: Any, verb: Callable[..., pd.DataFrame], out: str, dtypes: dict[Any, Any], recipe: bytes,
    runs: int, options: dict[str, Any], partition_info: dict[str, Any] | None = None,
) -> pd.DataFrame:  # fmt: skip
    found = verb(part, prompt, **_options(options, recipe, runs, partition_info))[list(dtypes)]
    if out in found and found[out].dtype != dtypes[out] and found[out].isna().all():
        found[out] = pd.Series([None] * len(found), found.index, dtype=dtypes[out])  # no vector says how long they are
    return found


def _reduce(
    part: pd.DataFrame, tree: dict[str, Any], meta: pd.DataFrame, recipe: bytes, runs: int, options: dict[str, Any],
    partition_info: dict[str, Any] | None = None,
) -> pd.DataFrame:  # fmt: skip
    own = _options(options, recipe, runs, partition_info)
    call = read_options(arguments(verbs.tree_reduce, own), aggregation=True)
    frame = ReductionTrees(part, **tree).start(call).finish()
    return frame if len(frame) else meta  # a frame without rows has no dtypes of its own


@register_dataframe_accessor("swarm")
class DaskSwarm:
    """The verbs on a dask DataFrame: lazy, a run for each partition.

    Computing twice sends the prompts twice: keep the result (``persist``, ``to_parquet``), or give ``store=``, from
    which the partitions of a lost worker are read, too. Identical prompts are found within a partition only; with a
    store, a prompt that is in two partitions has one stored answer, also when it is sampled.

    Examples
    --------
    Workers read the key themselves, here from a file.

    >>> import dask.dataframe, swarmkit.dask
    >>> from pathlib import Path
    >>> _ = Path("key.txt").write_text("a-key")
    >>> pool = sk.connect(swarm.urls, api_key=Path("key.txt"))
    >>> ddf = dask.dataframe.from_pandas(df, npartitions=1)
    >>> ddf.swarm.scatter("What does {gene} do?").compute()["response"].tolist()
    ['echo: What does lacZ do?', 'echo: What does recA do?']
    >>> ddf.swarm.tree_reduce("gene", "Merge: {responses}").compute()["n_leaves"].tolist()
    [2]
    >>> ddf.swarm.embed("gene").compute()["embedding"].map(len).tolist()
    [64, 64]
    """

    def __init__(self, ddf: DataFrame) -> None:
        self._ddf = ddf

    def __repr__(self) -> str:
        return overview(self, f"a dask DataFrame of {plural(self._ddf.npartitions, 'partition')}")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"dask frames have no swarm.{name}: they have scatter, embed and tree_reduce. Use the other verbs on "
            f"pandas rows: ddf.head(100).swarm.{name}(...)"
        )

    @takes(PartitionScatterOptions, like=verbs.scatter)
    def scatter(
        self, prompt: Any = None, *, workers: int | None = None, **options: Unpack[PartitionScatterOptions]
    ) -> DataFrame:
        """Send one prompt per row, when it is computed.

        There is no ``<out>_reasoning`` column, and ``model`` is a model's name, not a column of names: the endpoints of
        a partition may not have all models. dask makes texts of lists, so a column for ``messages`` has JSON, or the
        frame was made under ``dask.config.set({"dataframe.convert-string": False})``.

        Parameters
        ----------
        prompt : str, callable or dask Series, optional
            As for ``swarmkit.scatter``; a Series must have the frame's partitions.
        workers : int, optional
            Partitions that are run at once, over the whole cluster, each of which gets its part of the endpoints. By
            default the threads of the current client's workers; without a client, those of this machine.

        Returns
        -------
        dask.dataframe.DataFrame
            With the columns and dtypes of ``swarmkit.scatter``, the frame's index and divisions.

        Raises
        ------
        UnknownColumnError, PromptError, SettingError, TypeError
            At once, as by ``swarmkit.scatter``.

        Notes
        -----
        ``deadline=`` holds for all partitions together, and its seconds begin here, not with ``compute``.
        """
        prepared = self._prepare(self.scatter, options, workers, prompt=prompt)
        return self._ask(verbs.scatter, ScatterFrame, prompt, *prepared)

    @takes(PartitionEmbedOptions, like=embed)
    def embed(self, prompt: Any, *, workers: int | None = None, **options: Unpack[PartitionEmbedOptions]) -> DataFrame:
        """Give each row the vector of its text, when it is computed.

        One short text is embedded at once, since the column's dtype has the length of the vectors.

        Parameters
        ----------
        prompt : str, callable or dask Series
            As for ``swarmkit.embed``; a Series must have the frame's partitions.
        workers : int, optional
            As for ``scatter``.

        Returns
        -------
        dask.dataframe.DataFrame
            With the columns and dtypes of ``swarmkit.embed``, the frame's index and divisions.

        Raises
        ------
        UnknownColumnError, PromptError, SettingError, TypeError
            At once, as by ``swarmkit.embed``.
        """
        given, own, recipe, runs = self._prepare(self.embed, options, workers, prompt=prompt)
        asked = {name: given[name] for name in ("pool", "model", "dimensions", "extra_body")}
        length = embed(pd.DataFrame({"text": ["Hi"]}), "text", as_array=True, progress=False, **asked).shape[1]
        return self._ask(embed, VectorFrame, prompt, {**given, "dimensions": length}, own, recipe, runs)

    @takes(PartitionTreeOptions, like=verbs.tree_reduce)
    def tree_reduce(
        self, column: str, prompt: str, *, workers: int | None = None, **options: Unpack[PartitionTreeOptions]
    ) -> DataFrame:
        """Merge a column of texts into one answer a group, when it is computed.

        Each partition reduces its part of every group; then one task merges the parts, with the whole swarm. It
        holds a text for each group of each partition.

        Parameters
        ----------
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

        Notes
        -----
        ``deadline=`` holds for all partitions and the merge of their parts together, and its seconds begin here, not
        with ``compute``. A group of which a part was not reduced by then has no answer.
        """
        if typed := [name for name in ("schema", "regex", "grammar") if options.get(name) is not None]:
            raise SettingError(
                f"{typed[0]}= is not possible for tree_reduce on dask frames: scatter its result with it"
            )
        given, own, recipe, runs = self._prepare(self.tree_reduce, options, workers, aggregation=True)
        tree = {"column": column, "prompt": prompt, **{name: given[name] for name in ("by", "dropna", "fanin", "out")}}
        meta = ReductionTrees(self._ddf._meta_nonempty, **tree).frame("").iloc[:0]
        common = {"meta": meta, "clear_divisions": True, "recipe": recipe, "options": own}
        parts = self._ddf.map_partitions(_reduce, tree, meta, runs=runs, **common)
        if self._ddf.npartitions == 1:
            return parts
        tree = {**tree, "column": tree["out"], "partial": True}
        return parts.repartition(npartitions=1).map_partitions(_reduce, tree, meta, runs=1, **common)

    def _ask(
        self,
        verb: Callable[..., Any],
        frame: type[ScatterFrame],
        prompt: Any,
        given: dict[str, Any],
        own: dict[str, Any],
        recipe: bytes,
        runs: int,
    ) -> DataFrame:
        """Ask the rows of each partition; for what ``_prepare`` returns."""
        meta = frame(self._ddf._meta, getattr(prompt, "_meta", prompt), given).frame("")
        how = {"dtypes": dict(meta.dtypes.items()), "recipe": recipe, "runs": runs, "options": own}
        return self._ddf.map_partitions(_ask, prompt, verb=verb, out=given["out"], meta=meta, **how)

    def _prepare(
        self,
        verb: Callable[..., Any],
        options: Mapping[str, object],
        workers: int | None,
        aggregation: bool = False,
        prompt: Any = None,
    ) -> tuple[dict[str, Any], dict[str, Any], bytes, int]:
        """All keywords; those that each partition's call is given; the pool's recipe; and the runs that share it."""
        for name in options:
            if name in _REFUSED:
                raise SettingError(f"{name}= is not possible on dask frames: {_REFUSED[name]}")
        given = arguments(verb, options, prompt)
        if isinstance(prompt, pd.Series):
            raise SettingError(_NO_PARTITIONS)
        runs = min(_at_once(workers), self._ddf.npartitions)
        own = {name: value for name, value in options.items() if name != "pool"}
        with contextlib.closing(read_options({**given, "progress": False}, aggregation)) as call:
            if call.store is not None:
                own["store"] = str(call.store.path.absolute()), call.store.durability, call.store.store_prompts
            if call.deadline is not None:  # that of all partitions
                own["deadline"] = moment_of(call.deadline)
            return given, own, _recipe(call.pool), runs


def _at_once(workers: int | None) -> int:
    if workers is None:
        try:
            workers = sum(distributed.default_client().nthreads().values())
        except ValueError:  # no client: dask's own threads
            return int(dask.config.get("num_workers", None) or dask.system.CPU_COUNT)
        if not workers:
            raise SettingError("the cluster has no workers yet: client.wait_for_workers(1), or give workers=")
    if not is_whole(workers, 1):
        raise SettingError(f"workers={workers!r}: must be a whole number of concurrent partitions, 1 or more")
    return workers
