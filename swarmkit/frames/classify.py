"""Labels with probabilities: one token a row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from string import ascii_uppercase
from typing import Any, Unpack

import numpy as np
import pandas as pd

from ..client import io_thread
from ..engine.columns import Columns
from ..errors import SettingError, warn
from ..pool.telling import LabelTokens
from ..records import MOST_LOGPROBS, Prompts
from ..runs.run import Run, finished
from ..schema import Schema
from ..schema.fields import checked_labels
from ..text import plural
from .call import PreparedCall, arguments, read_options
from .deadline import before
from .options import NOT_OF_LABELS, ClassifyOptions
from .prompts import PromptLike
from .scatter import ScatterFrame
from .signatures import takes
from .typed import text_column

__all__ = ["LabelFrame", "classify", "labelled"]

_LISTED = "{labels}"
_LITTLE = 0.05  # of the probability


@takes(ClassifyOptions, without=NOT_OF_LABELS)
def classify(
    df: pd.DataFrame, prompt: PromptLike, labels: Sequence[str], **options: Unpack[ClassifyOptions]
) -> pd.DataFrame:
    """Give each row one of some labels, with its probability.

    The model is asked for one token a row, and the probabilities of the labels are read from the log-probabilities of
    the tokens that stand for them there: of a label as it is and with a space before it. Where a label is no single
    token, or two share one, the labels are listed with letters, and the model is asked for a letter. Where no server
    gives log-probabilities (or the letters could not be listed), the answers are held to the labels, as with
    ``scatter(..., schema=labels)``, and have no probability. A warning says so.

    Parameters
    ----------
    df : pandas.DataFrame
        The rows. Never changed.
    prompt : str, callable or Series
        As for ``scatter``.
    labels : sequence of str
        Two or more.

    Returns
    -------
    pandas.DataFrame
        A copy of ``df``, same index, same order, with ``out`` (Categorical, with all labels as categories in their
        order), ``<out>_error`` and ``<out>_p``: the probability of the label among the labels. With ``details`` also
        ``p_<label>``, the same for each, and ``<out>_mass``, the probability of all labels together among all that the
        model might say: where it is small, the model would rather say something else.

    Raises
    ------
    SettingError, TypeError
        Labels that repeat, that are empty, no texts, or fewer than two; a keyword that ``classify`` does not take.
    UnknownColumnError, PromptError, NoEndpointsError, ScatterInterrupted, ScatterError
        As for ``scatter``.

    Examples
    --------
    >>> answers = df.swarm.classify("Is {gene} a gene of E. coli?", ["yes", "no"])
    >>> list(answers.columns), list(answers["label"].cat.categories)
    (['gene', 'label', 'label_error', 'label_p'], ['yes', 'no'])
    """
    given = arguments(classify, options)
    return labelled(LabelFrame(df, prompt, labels, given), given)


def labelled(frame: LabelFrame, given: Mapping[str, Any]) -> pd.DataFrame:
    """Ask for the labels of a frame with the keywords of a call, and wait for them."""
    result = finished(lambda: frame.begin(read_options({**given, "max_tokens": 1, "temperature": 0})))
    if 0 <= frame.mean_mass < _LITTLE:
        warn(
            f"the labels have {frame.mean_mass:.1%} of the probability, on average: the model would rather say "
            "something else. Ask for the labels in the prompt, with thinking=False if the model thinks first"
        )
    return result


class LabelFrame(ScatterFrame):
    """A frame whose rows get labels.

    Parameters
    ----------
    df, prompt, given
        As for ``ScatterFrame``.
    labels : sequence of str
        As ``classify`` takes them.

    Attributes
    ----------
    mean_mass : float
        Of the rows that were read last; -1 where there are none.
    """

    def __init__(self, df: pd.DataFrame, prompt: PromptLike, labels: Sequence[str], given: Mapping[str, Any]) -> None:
        instruction = given["instruction"]
        if not isinstance(instruction, str | None):
            raise SettingError(f"instruction={instruction!r}: must be a text, with {_LISTED} in it, or None")
        self._instruction = instruction or ""
        if given["debias"] and _LISTED not in self._instruction:
            raise SettingError(f"debias=True needs {_LISTED} in instruction=: without it the labels have no order")
        if isinstance(labels, str | Mapping | Set) or not isinstance(labels, Iterable):
            raise SettingError(f"labels={labels!r}: must be a list of texts, such as ['yes', 'no']")
        self.labels = list(checked_labels(list(labels), "labels"))
        self._schema = Schema.of(self.labels)
        self._codes = {label: code for code, label in enumerate(self.labels)}
        self._orders = 2 if given["debias"] else 1
        self._names: list[Sequence[Sequence[str]]] = []  # by order: by label what its tokens are called
        self.mean_mass = -1.0
        self._unreadable: dict[int, str] = {}  # what only the reading of the answers shows, as ``frame`` did it last
        super().__init__(df, prompt, {**given, "schema": self._schema})
        self.label = "classify"

    def _cause(self, name: str) -> str:
        return super()._cause(name) if name.startswith(self.out) else "details=True"

    def _remedy(self, name: str, drop: str) -> str:
        return super()._remedy(name, drop) if name.startswith(self.out) else "rename or drop that column"

    def begin(self, call: PreparedCall) -> Run:
        """Find out how the labels can be asked for, and start the run that does it."""
        texts = self.prompts.texts
        pending = range(len(texts)) if self.pending is None else self.pending
        sample = next((text for row in pending if (text := texts[row]) is not None), None)
        letters = list(ascii_uppercase[: len(self.labels)])
        choices = [self.labels]
        if _LISTED in self._instruction and len(letters) == len(self.labels):
            choices.append(letters)
        told, pool = LabelTokens([]), call.pool._still()
        if sample is not None:
            try:
                looking = pool.label_tokens(call.spec, sample + self._asked(self.labels), choices)
                told = io_thread.call(before(call.deadline, looking, told))
            except BaseException:
                call.close()
                raise
        if told.choice is None:
            return self._begin_held(call, told.why if sample is not None else "")
        if told.choice:
            warn(f"the labels are asked for as letters, {letters[0]} to {letters[-1]} ({told.why})")
        if (size := pool.size) > len(told.endpoints):
            warn(f"{len(told.endpoints):,} of {plural(size, 'endpoint')} give log-probabilities; only these are asked")
            call = replace(call, pool=pool.select(told.endpoints))
        listed = self.labels
        if told.choice:
            listed = [f"\n{letter}. {label}" for letter, label in zip(letters, self.labels, strict=True)]
            other = [f"\n{letter}. {label}" for letter, label in zip(letters, self.labels[::-1], strict=True)]
        else:
            other = self.labels[::-1]
        self._names = [told.names, told.names[::-1] if told.choice else told.names]
        self._ask([listed, other], tokens=True)
        return self.start(replace(call, spec=replace(call.spec, logprobs=told.ids or MOST_LOGPROBS)))

    def _begin_held(self, call: PreparedCall, why: str) -> Run:
        """Start a run whose answers are held to the labels."""
        if why:
            more = "; debias=True has no effect" if self._orders > 1 else ""
            warn(f"{self.out}_p is missing, and the answers are held to the labels: {why}{more}")
        self._orders = 1
        self._ask([self.labels], tokens=False)
        most = max(len(label.encode()) for label in self.labels) + 8  # also where nothing holds the model to them
        return self.start(replace(call, spec=replace(call.spec, schema=self._schema, max_tokens=most)))

    def _asked(self, listed: Sequence[str]) -> str:
        together = "".join(listed) if listed[0].startswith("\n") else ", ".join(listed)
        return self._instruction.replace(_LISTED, together)

    def _ask(self, orders: Sequence[Sequence[str]], tokens: bool) -> None:
        """Make the prompts of all orders, one column after the other, and the columns of their answers."""
        size, before, texts = len(self.df), self.columns, self.prompts.texts
        self.columns = Columns(size * self._orders, tokens=tokens, one_token=tokens)
        self.index = self.df.index if self._orders == 1 else self.df.index.append(self.df.index)
        errors, asked = self.prompts.errors, orders[: self._orders]
        self.prompts = Prompts(
            [None if text is None else text + end for end in map(self._asked, asked) for text in texts],
            {row + size * order: error for order in range(self._orders) for row, error in errors.items()},
        )
        for order in range(self._orders):
            self.columns.text[size * order : size * (order + 1)] = before.text
        for row, error in self.prompts.errors.items():
            self.columns.fail(row, error)
        if self.pending is not None:
            self.pending = [row + size * order for order in range(self._orders) for row in self.pending]

    def errors(self) -> list[tuple[object, str]]:
        """The failed rows' labels and errors, also of those that failed in one order only."""
        size = len(self.df)
        found = {row % size: error for row, error in sorted(self.columns.errors.items(), reverse=True)}
        found = {**self._unreadable, **found}
        return [(self.df.index[row], found[row]) for row in sorted(found)]

    def frame(self, unfinished: str, rows: Sequence[int] | None = None) -> pd.DataFrame:
        """The frame with the labels so far; rows that have neither label nor error get ``unfinished``."""
        positions = np.arange(len(self.df)) if rows is None else np.asarray(rows, dtype=np.intp)
        base, out = self.df if rows is None else self.df.iloc[positions], self.out
        codes, errors, shares, masses = self._read(positions, unfinished)
        read = zip(positions.tolist(), errors, strict=True)
        left = (unfinished, self.columns.late)
        self._unreadable = {row: error for row, error in read if error and error not in left}
        label = pd.Categorical.from_codes(codes, pd.Index(self.labels))
        new: dict[str, Any] = {out: pd.Series(label, base.index), f"{out}_error": text_column(errors, base.index)}
        numbers = {f"{out}_p": shares.max(axis=1)}
        if self.details:
            numbers |= {f"p_{name}": shares[:, code] for code, name in enumerate(self.labels)}
            numbers[f"{out}_mass"] = masses
        known = masses[~np.isnan(masses)]
        self.mean_mass = float(known.mean()) if len(known) else -1.0
        new |= self._or_kept(
            {name: pd.Series(values, base.index, dtype="Float64") for name, values in numbers.items()}, positions
        )
        if self._details:
            new |= self._detail_columns(base.index, positions, positions)
        return self._with(base, new)

    def _read(self, rows: np.ndarray, unfinished: str) -> tuple[np.ndarray, list[str | None], np.ndarray, np.ndarray]:
        """By row: the label's code, the error, the probabilities among the labels, and that of all labels together."""
        columns, size = self.columns, len(self.df)
        errors: list[str | None] = [None] * len(rows)
        codes = np.full(len(rows), -1)
        found = np.full((self._orders, len(rows), len(self.labels)), np.nan)  # probabilities of the labels
        for place, row in enumerate(rows.tolist()):
            for order in range(self._orders):
                slot = row + size * order
                text, tokens = columns.text[slot], columns.token_logprobs.get(slot)
                if text is None or slot in columns.errors:
                    errors[place] = columns.error(slot, unfinished)
                elif not self._names or self._kept[row]:
                    codes[place] = self._codes[self._schema.values(text)[0]]
                elif not tokens:
                    errors[place] = f"no log-probabilities came with the answer {text!r}"
                else:
                    found[order, place] = _probabilities(tokens[0], self._names[order])
                    continue
                found[:, place] = np.nan
                break
        mass = found.sum(axis=2)
        with np.errstate(invalid="ignore"):
            shares = (found / mass[:, :, None]).mean(axis=0)
        masses, unsure = mass.mean(axis=0), np.isnan(shares[:, 0])
        for place in np.flatnonzero(unsure & ~np.isnan(masses)).tolist():
            text = columns.text[rows[place]]
            errors[place] = f"no label is among the likeliest tokens; the answer begins with {text!r}"
        codes[~unsure] = shares[~unsure].argmax(axis=1)
        return codes, errors, shares, masses


def _probabilities(token: Mapping[str, Any], names: Sequence[Sequence[str]]) -> list[float]:
    """The probability of each label at the place of a token, by the names of the tokens that stand for it."""
    known = {token["token"]: token["logprob"], **token["top"]}
    return [sum(math.exp(known[name]) for name in of_label if name in known) for of_label in names]
