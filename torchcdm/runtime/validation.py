"""Dataclasses whose fields are checked against their annotations by pydantic."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

from torchcdm.errors import UserError, nearest

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def validated(kind: type[T]) -> type[T]:
    """Makes ``kind`` a frozen dataclass that raises :class:`UserError`, in one line, on a field that is wrong.

    As a part of a larger pydantic type it is validated by pydantic alone, which knows the path to the field.
    """
    checked: Any = dataclass(frozen=True, config=ConfigDict(extra="forbid"))(kind)
    init = checked.__init__

    @functools.wraps(init)
    def initialise(self: Any, *args: Any, **fields: Any) -> None:
        try:
            init(self, *args, **fields)
        except ValidationError as error:
            raise UserError(message(error, checked.__dataclass_fields__)) from None

    checked.__init__ = initialise
    return checked


def message(error: ValidationError, names: Any = ()) -> str:
    """What pydantic found, in one line.

    Args:
        error: One or more problems.
        names: The fields that there are, for the nearest one to a name that is unknown.
    """
    return "; ".join(_words(problem, names) for problem in error.errors(include_url=False))


def _words(problem: Any, names: Any) -> str:
    path, value = ".".join(map(str, problem["loc"])), problem["input"]
    if problem["type"] == "unexpected_keyword_argument":
        return f"unknown field '{path}'; {nearest(path, names)}"
    if problem["type"] == "missing":
        return f"{path} is missing"
    return f"{path} is {value!r:.60}; {problem['msg'].replace('Input should', 'it must')}"
