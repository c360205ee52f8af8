"""Conditions on the columns of a row, as ``when=`` has them."""

from __future__ import annotations

import ast
from collections.abc import Hashable, Iterable

import numpy as np
import pandas as pd

from ..errors import SettingError
from .prompts import missing_in, placeholders, unique_column

__all__ = ["Condition"]

# Names of columns and constants, compared, counted with and combined: nothing that reaches for anything else.
_ALLOWED = (
    *(ast.Expression, ast.BoolOp, ast.boolop, ast.UnaryOp, ast.unaryop, ast.Compare, ast.cmpop, ast.Name, ast.Load),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.BitAnd, ast.BitOr),
    *(ast.Constant, ast.List, ast.Tuple),
)
_NOT_PANDAS = (ast.Is, ast.IsNot)


class Condition:
    """An expression over columns that is true of some rows.

    Parameters
    ----------
    text : str
        As pandas' ``query`` reads it, with columns as placeholders: comparisons, arithmetic, ``in``, ``and``, ``or``,
        ``not``.
    labels : iterable
        The columns that there are.

    Raises
    ------
    UnknownColumnError
        It names a column that there is none of.
    SettingError
        It is no such expression.

    Examples
    --------
    >>> df = pd.DataFrame({"kind": ["phage", "plasmid", None], "n": [5, 9, 7]})
    >>> Condition("{n} > 3 and {kind} == 'phage'", df.columns).holds(df).tolist()
    [True, False, False]
    """

    def __init__(self, text: str, labels: Iterable[Hashable]) -> None:
        by_name = {str(label): label for label in labels}
        if not isinstance(text, str):
            raise self._refusal(text, f"got a {type(text).__name__}")
        parts = placeholders(text, by_name)
        self._text = text
        names = list(dict.fromkeys(name for _, name, _ in parts if name is not None))
        self.labels = [by_name[name] for name in names]
        if any(spec for _, _, spec in parts):
            raise self._refusal(text, "a placeholder has a format")
        self._expression = "".join(
            literal + (f" _{names.index(name)} " if name is not None else "") for literal, name, _ in parts
        ).strip()
        try:
            tree = ast.parse(self._expression, mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as exc:
            raise self._refusal(text, f"it cannot be read ({exc})") from None
        nodes = list(ast.walk(tree))
        for node in nodes:
            if not isinstance(node, _ALLOWED) or isinstance(node, _NOT_PANDAS):
                raise self._refusal(text, f"it has a {type(node).__name__}")
        known = [f"_{place}" for place in range(len(names))]
        if other := [node.id for node in nodes if isinstance(node, ast.Name) and node.id not in known]:
            raise self._refusal(text, f"{other[0]} is no column in braces and no text in quotes")
        if not names or len([n for n in nodes if isinstance(n, ast.Name)]) < len(
            [p for p in parts if p[1] is not None]
        ):
            raise self._refusal(text, "columns stand in braces, without quotes")

    @staticmethod
    def _refusal(text: object, problem: str) -> SettingError:
        return SettingError(
            f'when={text!r}: {problem}. It is a pandas expression over columns, such as "{{n}} > 3 and {{kind}} == '
            "'phage'\": comparisons, arithmetic, in, and, or, not; no calls and no attributes"
        )

    def holds(self, df: pd.DataFrame) -> np.ndarray:
        """By row of a frame: whether the condition is true; it is not where one of the values is missing.

        Raises
        ------
        SettingError
            The columns' values do not fit it.
        """
        columns = [unique_column(df, label).reset_index(drop=True) for label in self.labels]
        values = {f"_{place}": column for place, column in enumerate(columns)}
        try:
            found = pd.eval(self._expression, local_dict=values, global_dict={}, engine="python", parser="pandas")
        except Exception as exc:
            raise self._refusal(self._text, f"{type(exc).__name__}: {exc}") from exc
        if not isinstance(found, pd.Series) or not pd.api.types.is_bool_dtype(found.dtype):
            raise self._refusal(self._text, "it is neither true nor false")
        missing = np.logical_or.reduce([missing_in(column) for column in columns])
        true: np.ndarray = np.asarray(found.fillna(False), dtype=bool) & ~missing
        return true
