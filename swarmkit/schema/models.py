"""pydantic models: made here, or described as a JSON Schema."""

from __future__ import annotations

import datetime
import re
import types
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from ..errors import SettingError
from ..text import printable

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = ["date_types", "describe", "is_model", "is_own", "own_model"]


def is_model(given: Any) -> TypeGuard[type[BaseModel]]:
    """Whether it is the class of a pydantic model."""
    from pydantic import BaseModel

    return isinstance(given, type) and issubclass(given, BaseModel)


def is_own(model: type[BaseModel]) -> bool:
    """Whether a model was made by ``own_model``."""
    return model.__module__ == __name__


def own_model(members: Mapping[str, Any], extra: Literal["ignore", "allow"] = "ignore") -> type[BaseModel]:
    """A model with the given fields. Its own names are f0, f1, ..., since any text may be the name of a field."""
    from pydantic import ConfigDict, Field, create_model

    config = ConfigDict(strict=True, extra=extra, allow_inf_nan=False, regex_engine="python-re")
    definitions: dict[str, Any] = {}
    for i, (name, annotation) in enumerate(members.items()):
        optional = get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation)
        definitions[f"f{i}"] = (annotation, Field(default=None if optional else ..., alias=name))
    try:
        return create_model("Answer", __config__=config, __module__=__name__, **definitions)
    except Exception as exc:
        raise SettingError(f"schema: pydantic cannot make a model of it: {printable(str(exc))}") from exc


def describe(model: type[BaseModel]) -> dict[str, Any]:
    """A model as a JSON Schema, as pydantic writes it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about defaults that JSON cannot express: they are not sent
            return model.model_json_schema()
    except RecursionError:
        raise
    except Exception as exc:
        raise SettingError(
            f"schema={model.__name__}: pydantic cannot describe it as a JSON Schema: {printable(str(exc))}"
        ) from exc


def date_types() -> dict[type, Any]:
    """Dates as pydantic reads them, but for numbers written as text: "2024" is no second after 1970."""
    from pydantic import BeforeValidator, Strict
    from pydantic_core import PydanticCustomError

    def only(pattern: str, error: Any) -> BeforeValidator:
        matches = re.compile(pattern, re.ASCII).fullmatch

        def check(value: Any) -> Any:
            if isinstance(value, str) and matches(value):
                return value
            raise PydanticCustomError(error, "no date")

        return BeforeValidator(check)

    date = r"\d{4}-\d\d-\d\d"
    time = r"[Tt ]\d\d:\d\d(:\d\d(\.\d+)?)?([Zz]|[+-]\d\d:?\d\d)?"
    return {
        datetime.date: Annotated[datetime.date, Strict(False), only(date, "date_type")],
        datetime.datetime: Annotated[datetime.datetime, Strict(False), only(date + time, "datetime_type")],
    }
