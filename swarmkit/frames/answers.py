"""The columns of a schema's fields beside a column of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..errors import SettingError
from ..schema import Schema
from .typed import DtypeBackend, typed_columns

__all__ = ["DETAILS", "OURS", "TypedAnswers"]

DETAILS = ("finish_reason", "endpoint", "prompt_tokens", "completion_tokens", "latency_s", "attempts")
"""Names after ``<out>_`` of the columns that ``details=True`` always adds."""
OURS = (*DETAILS, "error", "sample", "reasoning", "truncated", "logprob", "token_logprobs")
"""Names after ``<out>_`` that columns of every call have."""


@dataclass(frozen=True, slots=True)
class TypedAnswers:
    """How answers become typed columns.

    Parameters
    ----------
    schema : Schema or None
        What an answer is; None for any text, which has no columns of its own.
    out : str
        Name of the column of answers.
    prefix : bool
        Whether a field's column is ``<out>_<field>`` or has the bare name.
    backend : {"numpy_nullable", "pyarrow"}
        The dtypes.
    """

    schema: Schema | None
    out: str
    prefix: bool
    backend: DtypeBackend

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> TypedAnswers:
        """Those of a call with these keywords."""
        return cls(given["schema"], given["out"], given["prefix"], given["dtype_backend"])

    def __post_init__(self) -> None:
        if self.schema is not None:
            typed_columns(self.schema, (), pd.Index([]), dtype_backend=self.backend)  # an unknown backend is said now

    @property
    def is_lone(self) -> bool:
        """Whether the answer is one label or number, which takes the place of the text."""
        return self.schema is not None and self.schema.fields[0].name == ""

    @property
    def names(self) -> list[str]:
        """The columns."""
        fields = self.schema.fields if self.schema else ()
        return [self._name(field.name) for field in fields]

    def _name(self, field: str) -> str:
        if not field:
            return self.out
        return f"{self.out}_{field}" if self.prefix else field

    def check(self) -> None:
        """Refuse names that collide with those of the other columns of answers.

        Raises
        ------
        SettingError
            They collide; the message names them.
        """
        ours = {self.out, *(f"{self.out}_{name}" for name in OURS)}
        if clash := [name for name in self.names if name in ours and not self.is_lone]:
            raise SettingError(
                f"the schema's field would be the column {clash[0]!r}, which swarmkit fills itself: rename the field, "
                f"or use prefix={not self.prefix}"
            )

    def problem(self, text: str) -> str | None:
        """What keeps a text from being an answer; None where nothing does."""
        return self.schema.problem(text) if self.schema else None

    def columns(self, texts: Sequence[str | None], index: pd.Index) -> dict[str, pd.Series]:
        """The columns of these answers; missing where there is none, or where it is not valid."""
        schema = self.schema
        if schema is None:
            return {}
        values = [None if text is None or schema.problem(text) is not None else schema.values(text) for text in texts]
        found = typed_columns(schema, values, index, dtype_backend=self.backend)
        return {self._name(field): column for field, column in found.items()}
