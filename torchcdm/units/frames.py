"""Data frames of any library as those of pandas: names of columns, their order, and what was read off them."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from torchcdm.errors import UserError
from torchcdm.units.cells import kind_of, numbers_of

if TYPE_CHECKING:
    from pandas import DataFrame

SHOWN = 5  # names, or problems, that a message holds


def note_down(frame: DataFrame, **facts: Any) -> None:
    """Keeps what was read off a table with it: its ``name``, ``notes``, and ``problems`` of its lines and cells."""
    frame.attrs["torchcdm"] = frame.attrs.get("torchcdm", {}) | facts


def noted(frame: Any, fact: str, default: Any = ()) -> Any:
    """What :func:`note_down` kept; other ``attrs`` are the user's own."""
    return getattr(frame, "attrs", {}).get("torchcdm", {}).get(fact, default)


def is_frame(data: Any) -> bool:
    """Whether these are columns of a data frame, or one of them, a series; :func:`as_frame` refuses lazy ones."""
    return hasattr(data, "collect") or hasattr(data, "columns") and hasattr(data, "shape") or hasattr(data, "to_frame")


def as_frame(data: Any) -> DataFrame:
    """A data frame or Series of pandas, polars or pyarrow as a frame of pandas with texts as names, or UserError."""
    import pandas as pd

    if hasattr(data, "collect"):
        raise UserError(f"a {type(data).__name__} holds no rows yet; call its .collect(), and give what that returns")
    data = data if hasattr(data, "to_numpy") else data.to_pandas()
    if not hasattr(data, "columns"):
        data = data.to_frame(name="value" if data.name is None else data.name)
    if not hasattr(data, "set_axis"):
        data = pd.DataFrame({label: data[label].to_numpy() for label in data.columns})
    numbered = all(isinstance(label, Integral) for label in data.columns)
    data = data.set_axis([str(label) for label in data.columns], axis=1)
    if numbered:
        note_down(data, numbered=True)
    if not data.columns.is_unique:
        double = data.columns[data.columns.duplicated()].unique()
        raise UserError(f"two columns are called {listed(double)}; column names must differ")
    return data


def without_counter(frame: DataFrame) -> DataFrame:
    """A table to learn from without a first column that has no name, or the one that pandas gives such a column, and
    another whole number in each row: what ``to_csv`` writes as the index. It is :func:`noted`."""
    counter = frame.columns[:1].isin(("", "Unnamed: 0")).any() and kind_of(cells := frame.iloc[:, 0]) == "number"
    if counter and numbers_rows(numbers_of(cells)[0]):
        note = "the first column has no name and counts the rows: left out."
        frame = frame.iloc[:, 1:]
        note_down(frame, notes=[*noted(frame, "notes"), note])
    return frame


def unnamed(columns: Sequence[str]) -> bool:
    """Whether columns have the names of those that have none: 0, 1, ... of arrays, c0, c1, ... of files."""
    return list(columns) in [[f"{letter}{k}" for k in range(len(columns))] for letter in ("", "c")]


def check_only_numbers(frame: DataFrame, name: str) -> None:
    """UserError, with its ``name``, for a table that cannot go by place, as it holds more than plain numbers."""
    if frame.isna().any(axis=None) or any(dtype.kind not in "iuf" for dtype in frame.dtypes):
        raise UserError(f"{name}: cells that are no numbers cannot go by place; give the columns of both sides names")


def by_place(frame: DataFrame, columns: Sequence[str], name: str) -> DataFrame:
    """The table with ``columns`` as its names, where these or its own are :func:`unnamed`; as it is else. UserError,
    with its ``name``, for another number of columns; its own names need :func:`check_only_numbers`."""
    if not unnamed(frame.columns) and not unnamed(columns):
        return frame
    if not unnamed(frame.columns):
        check_only_numbers(frame, name)
    if len(frame.columns) != len(columns):
        raise UserError(f"{name}: {len(frame.columns)} column(s); {len(columns)} are needed where they go by place")
    return frame.set_axis(list(columns), axis=1)


def numbers_rows(x: np.ndarray) -> bool:
    """Whether numbers (N,) are whole, and another one in each row."""
    return bool((x % 1 == 0).all()) and len(np.unique(x)) == len(x)


def listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")
