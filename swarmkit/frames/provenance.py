"""What a frame knows of its answers: ``df.attrs["swarmkit"]``, a record for each column of answers.

pandas copies ``attrs`` at every step and compares them in ``concat``, so a record is a few texts and numbers, and no
key. Where it is lost, as by ``groupby``, between the partitions of dask, in files other than Parquet, or where frames
with different records are joined, the column of errors beside a column of answers says whose they are.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Hashable, Mapping
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from ..client.address import NAMES_A_SECRET
from ..client.keys import looks_like_key
from ..errors import SettingError
from ..store.keys import settings_of
from ..text import few, plural, printable
from ..version import __version__
from .call import PreparedCall
from .prompts import PromptLike, check_frame, missing_in

__all__ = ["answers_in", "circumstances", "is_made", "kept_from", "label_of", "methods", "noted", "question", "records"]

_NAME = "swarmkit"
_ELSEWHERE = ("conversations", "kind", "model", "params")
_OF_CALL = ("model", "server", "template_sha256", "parameters", "time")
_MOST_CALLS = 5
_LONGEST_TEMPLATE, _LONGEST_VALUE, _QUOTED = 10_000, 300, 600  # characters


def records(df: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """The records of a frame, by the name of the column of answers: of those that it still has."""
    known = df.attrs.get(_NAME)
    if not isinstance(known, Mapping):
        return {}
    found = {str(out): dict(one) for out, one in known.items() if isinstance(one, Mapping)}
    return {out: one for out, one in found.items() if label_of(df, out) in df.columns}


def label_of(df: pd.DataFrame, name: str) -> Any:
    """The label of a column of answers: with several levels of columns, the name on the first of them. Without the
    others pandas takes the name for all columns below it, and one there is overwritten."""
    levels = df.columns.nlevels
    return name if levels == 1 else (name, *[""] * (levels - 1))


def noted(result: pd.DataFrame, source: pd.DataFrame, out: str, record: Mapping[str, Any]) -> None:
    """Write the record of a column of answers to the result of a call on ``source``, whose records go on."""
    earlier = records(source)
    record = {**record, "swarmkit": __version__}
    there = {name for name in earlier.get(out, {}).get("columns", ()) if label_of(source, name) in source.columns}
    columns = [*record["columns"], *sorted(there.difference(record["columns"]))]
    earlier.pop(out, None)  # the newest call is the last
    result.attrs = {**source.attrs, _NAME: {**earlier, out: {**record, "columns": columns}}}


def is_made(df: pd.DataFrame, out: str, name: str) -> bool:
    """Whether the column of this name is one that an earlier call with this ``out`` has made: its record says so. Where
    the frame has none, ``<out>_error`` does, which holds texts or nothing, of names that begin with ``out``."""
    known = records(df)
    if any(name in one.get("columns", ()) for one in known.values()):
        return True
    errors = label_of(df, f"{out}_error")
    if out in known or label_of(df, out) not in df.columns or list(df.columns).count(errors) != 1:
        return False
    column = df[errors]
    texts = pd.api.types.infer_dtype(column, skipna=True) in ("string", "empty")
    texts = texts or (len(column) > 0 and bool(missing_in(column).all()))  # as files without types have it
    return texts and (name == out or name.startswith((f"{out}_", "p_")))


# ---- what is written down ------------------------------


def question(prompt: PromptLike | None, messages: Hashable = None) -> dict[str, Any]:
    """What a record says of the prompts: the template and its hash, or where else they come from."""
    if messages is not None:
        return {"prompt": f"conversations of the column {messages!r}"}
    if isinstance(prompt, str):
        kept = {"template": prompt} if len(prompt) <= _LONGEST_TEMPLATE else {}
        return {"prompt": "a template", **kept, "template_sha256": _hash(prompt)}
    name = getattr(prompt, "__name__", "")
    return {"prompt": "a Series" if isinstance(prompt, pd.Series) else f"the function {name}".rstrip()}


def circumstances(call: PreparedCall, model: str = "") -> dict[str, Any]:
    """What a record says of who was asked, how, and when.

    Parameters
    ----------
    call : PreparedCall
        The call.
    model : str, optional
        Who answers, where that is not one model.
    """
    spec, pool = call.spec, call.pool
    infos = [pool._core.infos.get(endpoint.url) for endpoint in pool.endpoints]
    servers = Counter(f"{i.kind} {i.version}".strip() for i in infos if i is not None and i.kind != "unknown")
    only = next(iter(pool.models)) if len(pool.models) == 1 else None
    settings = {**settings_of(spec), "thinking": spec.thinking, "n": spec.n if spec.n > 1 else None}
    how = {name: value for name, value in settings.items() if name not in _ELSEWHERE and value is not None}
    how |= spec.params
    return {
        "model": printable(model or spec.model or only or "", 200),
        "server": printable(few([name for name, _ in servers.most_common()], len(servers), 3), 200),
        "endpoints": pool.size,
        "parameters": {name: _plain(name, value) for name, value in how.items()},
        "store": None if call.store is None else str(call.store.path),
        "time": datetime.fromtimestamp(call.began, UTC).isoformat(timespec="seconds"),
    }


def kept_from(df: pd.DataFrame, out: str, rows: int | None) -> dict[str, Any]:
    """What a record says of answers that are kept: how many, and the calls that they are of, the newest first. Without
    a number of rows, as where other frames have their own, only the calls."""
    if rows == 0:
        return {}
    last = records(df).get(out, {})
    calls = [{name: last[name] for name in _OF_CALL if name in last}, *last.get("earlier", [])] if last else []
    different = [call for place, call in enumerate(calls) if call not in calls[:place]]
    return {**({} if rows is None else {"kept": rows}), "earlier": different[:_MOST_CALLS]}


def _plain(name: str, value: Any) -> Any:
    """A parameter as it is written down: not if it may be a key, and its hash if it is long."""
    if isinstance(value, str) and (NAMES_A_SECRET.fullmatch(name) or looks_like_key(value)):
        return "(hidden)"
    if isinstance(value, Mapping):
        value = {str(key): _plain(str(key), inner) for key, inner in value.items()}
    elif isinstance(value, list | tuple):
        value = [_plain(name, inner) for inner in value]
    text = json.dumps(value, default=str)
    return value if len(text) <= _LONGEST_VALUE else f"sha256:{_hash(text)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


# ---- what is read ------------------------------


def answers_in(df: pd.DataFrame, out: str | None = None) -> str:
    """The column of answers that is meant; without a name that of the newest call, or the only one.

    Raises
    ------
    SettingError
        The frame has no such column, or ``<out>_error`` does not stand beside it.
    """
    check_frame(df)
    names = [str(name[0] if isinstance(name, tuple) else name) for name in df.columns]
    beside = [name for name in dict.fromkeys(names) if f"{name}_error" in names]
    if out is None:
        known = [name for name in records(df) if name in beside]
        found = known[-1:] or [name for name in beside if name == "response" or len(beside) == 1]
        if found:
            return found[0]
    elif out in beside:
        return out
    has = f"it has those of {few(beside, len(beside))}" if beside else "it has no answers"
    asked = "say which answers are meant, out=..." if out is None else f"out={out!r}"
    raise SettingError(f"{asked}: a frame has its answers in <out> and why rows failed in <out>_error; {has}")


def methods(df: pd.DataFrame, out: str | None = None) -> str:
    """Write the paragraph for a paper: how the answers of a frame were made.

    Parameters
    ----------
    df : pandas.DataFrame
        What a verb has returned.
    out : str, optional
        The column of answers; otherwise all that the frame has a record of.

    Returns
    -------
    str
        Model, servers and their version, prompt, parameters, time, and how many rows have an answer. What is not known
        is left out.

    Raises
    ------
    SettingError
        The frame has no record: pandas loses ``df.attrs`` where it joins different frames, and in files other than
        Parquet.

    Examples
    --------
    >>> df = df.swarm.scatter("What does {gene} do?", max_tokens=32)
    >>> print(sk.methods(df).partition(" by the model")[0])
    The column "response" was made with swarmkit (version 0.1.0, scatter)
    """
    check_frame(df)
    known = records(df)
    if not known or (out is not None and out not in known):
        what = f"no record of out={out!r}" if known else "no record of answers"
        raise SettingError(
            f"the frame has {what}: df.attrs['swarmkit'] has it after a verb, and loses it where pandas joins "
            "different frames, and in files other than Parquet. Call this on what the verb returned"
        )
    return "\n\n".join(_paragraph(df, name, one) for name, one in known.items() if out in (None, name))


def _paragraph(df: pd.DataFrame, out: str, one: Mapping[str, Any]) -> str:
    said = [f'The column "{out}" was made with swarmkit (version {one.get("swarmkit", "unknown")}, {one.get("verb")})']
    if one.get("model"):
        servers = plural(one.get("endpoints", 0), "endpoint")
        served = f", served by {one['server']} on {servers}" if one.get("server") else f" on {servers}"
        said[0] += f" by the model {one['model']}{served}"
    if one.get("time"):
        said[0] += f", {one['time'][:10]} {one['time'][11:16]} UTC"
    if template := one.get("template"):
        words = f': "{template}"' if len(template) <= _QUOTED else ""
        said.append(f"The prompt of each row was made from a template (SHA-256 {one['template_sha256']}...){words}")
    elif one.get("prompt"):
        said.append(f"The prompt of each row was made from {one['prompt']}")
    if how := one.get("parameters"):
        listed = ", ".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in how.items())
        said.append(f"Parameters: {listed}; all others were the servers' defaults")
    if (label := label_of(df, out)) in df.columns:
        there = int((~df[label].isna()).sum())
        said.append(f"{there:,} of {plural(len(df), 'row')} {'has' if there == 1 else 'have'} an answer")
    if "earlier" in one:
        answers = plural(one["kept"], "answer") if "kept" in one else "Answers"
        said.append(f"{answers} of an earlier call {'was' if one.get('kept') == 1 else 'were'} kept")
        for call in one["earlier"]:
            how = json.dumps(call.get("parameters", {}), ensure_ascii=False)
            said.append(f"Earlier call: model {call.get('model')}, {call.get('time')}, {how}")
    if one.get("store"):
        said.append(f"The answers are stored in {one['store']}")
    return ". ".join(said) + "."
