"""The keywords of the verbs.

Each verb takes the keywords of one option class. A field of these classes is the only place that knows a keyword's
type, default and description: ``signatures`` makes signatures and docstrings of them.
"""

from __future__ import annotations

import os
from datetime import datetime
from typing import Annotated, Any, Literal, TypedDict

from ..records import Chat
from ..runs.run import OnError
from ..store.reuse import Dedup
from .signatures import Keyword, keywords
from .store import Store

__all__ = [
    "NOT_OF_LABELS",
    "NOT_OF_PIPELINE",
    "NOT_OF_STEP",
    "BroadcastOptions",
    "ClassifyOptions",
    "CompareOptions",
    "EmbedOptions",
    "FilterOptions",
    "MeaningOptions",
    "ModelsOptions",
    "PartitionEmbedOptions",
    "PartitionScatterOptions",
    "PartitionTreeOptions",
    "PipelineOptions",
    "PreviewOptions",
    "Sampling",
    "ScatterOptions",
    "StepOptions",
    "TreeOptions",
]


def _sampling(text: str) -> Keyword:
    return Keyword(None, text, sampling=True)


class Sampling(TypedDict, total=False):
    """What shapes the choice of tokens. None is not sent: the server's own default holds."""

    temperature: Annotated[
        float | None,
        _sampling(
            "Randomness of the choice of tokens; 0 always takes the likeliest. This and the following are sent only "
            "where given: otherwise the server's defaults hold."
        ),
    ]
    top_p: Annotated[float | None, _sampling("Choose among the likeliest tokens of this probability together, 0 to 1.")]
    top_k: Annotated[int | None, _sampling("Choose among this many of the likeliest tokens.")]
    min_p: Annotated[
        float | None, _sampling("Leave out tokens below this share of the likeliest token's probability, 0 to 1.")
    ]
    stop: Annotated[str | list[str] | None, _sampling("Texts that end the answer, and are not part of it.")]
    seed: Annotated[int | None, _sampling("Seed of the choice of tokens.")]
    presence_penalty: Annotated[
        float | None, _sampling("Above 0, tokens that have occurred in the answer become less likely, -2 to 2.")
    ]
    frequency_penalty: Annotated[
        float | None, _sampling("As presence_penalty, in proportion to how often the token has occurred.")
    ]
    repetition_penalty: Annotated[
        float | None, _sampling("Above 1, tokens that have occurred in prompt or answer become less likely.")
    ]
    logit_bias: Annotated[dict[str, float] | None, _sampling("Added to the scores of tokens, by token id.")]
    min_tokens: Annotated[int | None, _sampling("Tokens an answer has at least.")]
    ignore_eos: Annotated[bool | None, _sampling("Whether to generate on after the model ends its answer.")]
    stop_token_ids: Annotated[list[int] | None, _sampling("Tokens that end the answer.")]
    user: Annotated[str | None, _sampling("Name of the end user, for the server's records.")]


class _Pool(TypedDict, total=False):
    """Who is asked."""

    pool: Annotated[
        Any, Keyword(None, "A pool, or what ``connect`` takes: a hostfile, a URL, a list. Otherwise the default pool.")
    ]


class RequestOptions(Sampling, _Pool, total=False):
    """The pool and the fields of a request: keywords of every verb."""

    system: Annotated[str | None, Keyword(None, "System prompt.")]
    max_tokens: Annotated[
        int | None,
        Keyword(
            None,
            "Tokens an answer may have; otherwise the pool's ``max_tokens``, and ``max_tokens_aggregation`` for "
            "``tree_reduce``.",
        ),
    ]
    chat: Annotated[
        Chat | Literal["pool"],
        Keyword(
            "pool",
            'How a prompt becomes a chat: by the model\'s own template ("auto"), by a (prefix, suffix) pair or a '
            'function around it, or not at all (None); "pool" is the pool\'s setting.',
        ),
    ]
    thinking: Annotated[
        bool | Literal["low", "medium", "high"] | None,
        Keyword(
            None,
            "Whether, or how much, the model thinks before it answers: by the switch of its chat template, which is "
            "found out. Otherwise the template's own default. Thoughts are no part of the answer.",
        ),
    ]
    thinking_tokens: Annotated[int | None, Keyword(None, "Tokens it may think (``thinking_token_budget`` of vLLM).")]
    extra_body: Annotated[
        dict[str, Any] | None, Keyword(None, "Further fields of the request, as the server knows them.")
    ]


class _Model(TypedDict, total=False):
    """Who answers."""

    model: Annotated[
        str | None,
        Keyword(
            None,
            "The model, where the servers list several; otherwise the pool's. The rows go to the endpoints that have "
            "it. For ``scatter`` it may be a column that names the model of each row, if no model has that name.",
        ),
    ]


class BroadcastOptions(RequestOptions, _Model, total=False):
    """Keywords of ``broadcast``."""


class _Schema(TypedDict, total=False):
    """What an answer must be."""

    schema: Annotated[
        Any,
        Keyword(
            None,
            "What an answer must be: a pydantic model, a JSON Schema, a dict of fields and their types, a list of "
            "labels, or int, float or bool. The servers hold the model to it where they can; every answer is checked "
            "here. See ``Schema.of``.",
        ),
    ]
    regex: Annotated[str | None, Keyword(None, "A regular expression that the whole answer must match.")]
    grammar: Annotated[str | None, Keyword(None, "A grammar for the answer, in the words of the servers' backend.")]
    schema_retries: Annotated[
        int,
        Keyword(
            2,
            "How often a row is asked again whose answer is not valid: alone, and from the second time on (at "
            "temperature 0 from the first on) with what was wrong.",
        ),
    ]


class _Turns(TypedDict, total=False):
    """The turns of a chat beside a row's prompt."""

    messages: Annotated[
        Any,
        Keyword(
            None,
            'A column of conversations, in place of the prompt: lists of {"role", "content"}, or their JSON; the last '
            "turn is the user's. A cell that is none is an error of its row. ``system`` stands before conversations "
            "that do not begin with a system prompt of their own.",
        ),
    ]
    examples: Annotated[
        Any,
        Keyword(
            None,
            "Answers to learn from, as turns before each row's own: a list of (prompt, answer) pairs; or a DataFrame, "
            "for whose rows the same prompt is made, with the answers in the column ``out``.",
        ),
    ]
    assistant_prefix: Annotated[
        str | None,
        Keyword(
            None,
            "The first words of every answer, with which ``out`` begins: the model goes on after them. Tokens, "
            "``schema`` and ``store`` know only what the model wrote.",
        ),
    ]


class _Mode(RequestOptions, total=False):
    """How rows are packed."""

    mode: Annotated[
        Literal["batch", "single"] | None,
        Keyword(None, "Many prompts a request, or one; otherwise batch, unless the pool has ``use_batch=False``."),
    ]


class PreviewOptions(_Turns, _Mode, _Model, total=False):
    """Keywords of ``preview``."""


class _Delivery(RequestOptions, total=False):
    """How answers arrive."""

    delivery: Annotated[
        Literal["auto", "rows", "batch"] | None,
        Keyword(
            None,
            'Whether the answers of a batch arrive as they finish ("rows"), together ("batch"), or as suits the server '
            'and the answers: together where batches are quick ("auto"); otherwise the pool\'s setting.',
        ),
    ]


class CompareOptions(_Turns, _Delivery, _Schema, _Model, total=False):
    """Keywords of ``compare``."""

    progress: Annotated[
        bool | Literal["auto"],
        Keyword(False, "Whether each measured run shows a progress bar, which takes a little of its time."),
    ]


class _Kept(TypedDict, total=False):
    """What becomes of rows, on any machine."""

    store: Annotated[
        str | os.PathLike[str] | Store | None,
        Keyword(
            None,
            "Folder of finished rows: the same call again, after a crash or an interrupt, asks only what is missing. "
            "See ``open_store``.",
        ),
    ]
    too_long: Annotated[
        Literal["error", "truncate", "truncate_left"],
        Keyword(
            "error",
            "What becomes of a prompt that does not fit the model's context beside ``max_tokens``: the row fails with "
            "what the server says of it, or the end (or the beginning) of the prompt is cut, as the server counts its "
            "tokens. How many were cut is said at the end; ``<out>_truncated`` under ``details`` says which.",
        ),
    ]
    dedup: Annotated[
        Dedup,
        Keyword("auto", 'Whether identical prompts are sent once; "auto": at temperature 0 with one sample a row.'),
    ]
    on_error: Annotated[
        OnError,
        Keyword("column", 'Whether failed rows only carry their error ("column"), or also raise at the end ("raise").'),
    ]


class _Running(_Mode, _Delivery, _Schema, _Kept, total=False):
    """How rows are run, on any machine."""


class _Deadline(TypedDict, total=False):
    """When a call must be over."""

    deadline: Annotated[
        float | datetime | Literal["slurm", "pbs"] | None,
        Keyword(
            None,
            "When the call must be over: seconds from its start; a datetime, in local time if it has no time zone; or "
            '"slurm" or "pbs", shortly before the end of the job that this process runs in. It stops sending early '
            "enough for what is out to finish. Rows that are left have no answer, and a warning says how many: the "
            "same call again goes on.",
        ),
    ]


class _Priority(TypedDict, total=False):
    """How runs share endpoints."""

    priority: Annotated[
        int,
        Keyword(
            0,
            "Which of the runs on one pool (and its sub-pools) goes first at an endpoint: as in vLLM that with the "
            "lower number. While it has rows to send, the others send only to places that it leaves free, and a tenth "
            "of what a gateway's rates allow; what is out already stays out. vLLM servers are told, and order the "
            "requests of all their clients by it if they were started with ``--scheduling-policy priority``.",
        ),
    ]


class _Showing(TypedDict, total=False):
    """What is shown of a run."""

    progress: Annotated[
        bool | Literal["auto"],
        Keyword(
            "auto",
            'Whether a bar is shown; "auto": in notebooks and terminals, unless ``$SWARMKIT_PROGRESS`` is 0 or '
            "``monitor`` shows the run.",
        ),
    ]
    monitor: Annotated[
        bool, Keyword(False, "Whether a notebook shows the run in full, as ``RunMonitor`` does, in place of the bar.")
    ]


class _Columns(TypedDict, total=False):
    """The columns of answers."""

    out: Annotated[
        str,
        Keyword(
            "response",
            "Name of the column of answers; ``<out>_error`` stands beside it. Those of an earlier call are replaced.",
        ),
    ]
    prefix: Annotated[
        bool,
        Keyword(
            True,
            "Whether the columns of a schema's fields are named ``<out>_<field>``, or by the field alone. A lone label "
            "or number is ``out`` itself.",
        ),
    ]
    dtype_backend: Annotated[
        Literal["numpy_nullable", "pyarrow"],
        Keyword("numpy_nullable", "The dtypes of these columns, as in ``pandas.read_csv``."),
    ]


class _Overwrite(TypedDict, total=False):
    """What becomes of columns that are there already."""

    overwrite: Annotated[
        bool,
        Keyword(
            False,
            "Whether columns of the new names are replaced that the prompt reads, or that swarmkit did not make. "
            "Columns of an earlier call are replaced in any case.",
        ),
    ]


class _Rows(_Turns, _Columns, _Overwrite, total=False):
    """What a scatter does with every row."""

    n: Annotated[
        int,
        Keyword(
            1,
            "Samples a row. With more than one each row appears ``n`` times, one after another, under its own index "
            "label; ``<out>_sample`` numbers them, 0 to n-1.",
        ),
    ]
    details: Annotated[
        bool,
        Keyword(
            False,
            "Adds ``<out>_finish_reason``, ``_endpoint``, ``_prompt_tokens``, ``_completion_tokens``, ``_latency_s`` "
            "(seconds from sending the request to the row's last token) and ``_attempts`` (requests the row was part "
            "of); ``_reasoning`` where the server separates it from the answer; ``_token_logprobs`` with ``logprobs``.",
        ),
    ]
    logprobs: Annotated[
        int | None,
        Keyword(
            None,
            "Adds ``<out>_logprob``, the sum of the log-probabilities of the answer's tokens (its end is one). With "
            "``details`` also ``<out>_token_logprobs``, a list for each answer: a dict of ``token``, ``logprob`` and "
            "``top`` (token to log-probability of this many of the likeliest, 0 to 20) for each token. Missing where a "
            "server gives none.",
        ),
    ]
    only_missing: Annotated[
        bool, Keyword(False, "Ask only the rows whose ``out`` is missing, and keep the other answers.")
    ]


class _Tree(_Columns, total=False):
    """The shape of a tree."""

    by: Annotated[
        Any, Keyword(None, "A column or a list of columns, as for ``groupby``: keys come back as columns, sorted.")
    ]
    dropna: Annotated[
        bool,
        Keyword(
            True,
            "Whether rows with a missing key are in no group, as for ``groupby``: a warning counts them. With False a "
            "missing key is a key like the others, the last.",
        ),
    ]
    fanin: Annotated[
        int | Literal["auto"],
        Keyword(
            "auto", 'Texts a node merges: a number of 2 or more, or as many as the model\'s context holds ("auto").'
        ),
    ]


class ScatterOptions(_Rows, _Running, _Model, _Deadline, _Priority, _Showing, total=False):
    """Keywords of ``scatter``, ``ascatter``, ``submit`` and ``iter_scatter``."""


class StepOptions(_Rows, _Running, _Model, total=False):
    """Keywords of ``Step``, but for ``NOT_OF_STEP``."""


class PipelineOptions(_Running, _Model, _Deadline, _Showing, total=False):
    """Keywords of ``pipeline``, but for ``NOT_OF_PIPELINE``."""


class ModelsOptions(_Overwrite, _Running, _Deadline, _Showing, total=False):
    """Keywords of ``compare_models``."""


class _WholeTree(_Tree, total=False):
    """A tree in one process."""

    trace: Annotated[bool, Keyword(False, "Return the whole tree, a row per node.")]


class TreeOptions(_WholeTree, _Running, _Model, _Deadline, _Priority, _Showing, total=False):
    """Keywords of ``tree_reduce`` and ``atree_reduce``."""


class _Asking(TypedDict, total=False):
    """How labels are asked for."""

    debias: Annotated[
        bool,
        Keyword(
            False,
            "Whether each row is asked twice, with the labels in both orders, and the probabilities are averaged: "
            "models prefer what is named first, or last.",
        ),
    ]
    instruction: Annotated[
        str | None,
        Keyword(
            "\n\nAnswer with exactly one of the following, and nothing else: {labels}",
            "What is appended to each prompt; ``{labels}`` is where the labels are listed. None appends nothing.",
        ),
    ]


class _Labels(_Overwrite, total=False):
    """What a classify does with every row."""

    out: Annotated[str, Keyword("label", "Name of the column of labels. Those of an earlier call are replaced.")]
    details: Annotated[
        bool,
        Keyword(
            False,
            "Adds ``p_<label>`` for each label, ``<out>_mass``, and the columns of ``scatter(..., details=True)``.",
        ),
    ]
    only_missing: Annotated[
        bool, Keyword(False, "Ask only the rows whose ``out`` is missing, and keep the other labels.")
    ]


class ClassifyOptions(_Labels, _Asking, _Running, _Model, _Deadline, _Showing, total=False):
    """Keywords of ``classify``, but for ``NOT_OF_LABELS``."""


class FilterOptions(_Overwrite, _Asking, _Running, _Model, _Deadline, _Showing, total=False):
    """Keywords of ``filter``, but for ``NOT_OF_LABELS``."""


class MeaningOptions(_Asking, _Running, _Showing, _Model, total=False):
    """Keywords of ``semantic_entropy``, but for ``NOT_OF_LABELS``."""


class _Vectors(_Overwrite, total=False):
    """What an embed does with every row."""

    out: Annotated[
        str,
        Keyword(
            "embedding",
            "Name of the column of vectors; ``<out>_error`` stands beside it. Those of an earlier call are replaced.",
        ),
    ]
    dimensions: Annotated[
        int | None,
        Keyword(
            None, "Numbers a vector has, where the model can give fewer than it has by itself; otherwise all of them."
        ),
    ]
    details: Annotated[
        bool, Keyword(False, "Adds the columns that ``scatter(..., details=True)`` adds, as far as vectors have them.")
    ]
    only_missing: Annotated[
        bool, Keyword(False, "Embed only the rows whose ``out`` is missing, and keep the other vectors.")
    ]
    extra_body: Annotated[
        dict[str, Any] | None, Keyword(None, "Further fields of the request, as the server knows them.")
    ]


class EmbedOptions(_Vectors, _Pool, _Model, _Kept, _Deadline, _Showing, total=False):
    """Keywords of ``embed``."""


class PartitionEmbedOptions(_Vectors, _Pool, _Model, _Kept, _Deadline, total=False):
    """Keywords of ``embed`` where each partition of a frame is a run on a worker."""


class PartitionScatterOptions(_Rows, _Running, _Model, _Deadline, _Priority, total=False):
    """Keywords of ``scatter`` where each partition of a frame is a run on a worker, which shows nothing."""


class PartitionTreeOptions(_Tree, _Running, _Model, _Deadline, _Priority, total=False):
    """Keywords of ``tree_reduce`` where each partition of a frame is a run on a worker."""


NOT_OF_LABELS = {*keywords(Sampling), *keywords(_Schema), "max_tokens", "thinking_tokens"}
"""An answer of one token, or of one label, is shaped by none of these."""
NOT_OF_STEP = {"out", "n", "only_missing", "messages", "store", "on_error"}
"""What the name of a step says, what is the whole pipeline's, and what a step has only one of."""
NOT_OF_PIPELINE = {*keywords(_Schema)}
"""What is different for each step."""
