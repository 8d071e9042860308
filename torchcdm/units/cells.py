"""Cells as people write them: whether a column holds numbers, texts, booleans or dates, and what a cell says."""

from __future__ import annotations

import re
import warnings
from datetime import date
from decimal import Decimal
from numbers import Real
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from pandas import Series

Kind = Literal["number", "category", "boolean", "date"]

EMPTY = frozenset(("", "na", "n/a", "nan", "null", "none", "nat", "<na>", "?", "-"))
"""Cells that are missing, in any case."""

FALSE, TRUE = frozenset(("false", "f", "no", "n", "off")), frozenset(("true", "t", "yes", "y", "on"))
"""Spellings of booleans, in any case."""

DATE = re.compile(
    r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.](\d{4}|\d{2})([ T]|$)|\d{4}-\d{1,2}$"
    r"|[A-Za-z]{3,9}\.? (\d{1,2},? )?\d{4}|\d{1,2} [A-Za-z]{3,9}\.? \d{4}"
)
"""How the text of a date begins."""

MOSTLY = 0.9
"""Share of the filled cells that are numbers, or dates, from which on the others are mistakes and no categories."""


def kind_of(cells: Series) -> Kind | Literal[""]:
    """What a column holds; the empty text where all cells are missing."""
    from pandas.api import types

    if types.is_bool_dtype(cells.dtype):
        return "boolean"
    if types.is_datetime64_any_dtype(cells.dtype):
        return "date" if cells.notna().any() else ""
    if types.is_numeric_dtype(cells.dtype) and not types.is_complex_dtype(cells.dtype):
        return "number" if cells.notna().any() else ""
    texts = texts_of(cells, "category")
    filled = texts != ""
    if not filled.any():
        return ""
    numbers = float((~np.isnan(numbers_of(cells)[0][filled])).mean())
    if numbers == 1:
        return "number"
    if all(text.lower() in TRUE | FALSE for text in np.unique(texts[filled])):
        return "boolean"
    dates = float(np.isfinite(dates_of(cells)[0][filled]).mean())
    return "number" if numbers >= MOSTLY else "date" if dates >= MOSTLY else "category"


def texts_of(cells: Series, kind: Kind) -> np.ndarray:
    """Cells as texts, object (N,): the empty text where they are missing, False and True of booleans."""
    texts = cells.astype(object).where(cells.notna(), "").astype(str).str.strip().to_numpy(object)
    lower = np.array([text.lower() for text in texts], dtype=object)
    texts[np.isin(lower, list(EMPTY))] = ""
    if kind == "boolean":
        texts[np.isin(lower, list(TRUE))], texts[np.isin(lower, list(FALSE))] = "True", "False"
    return texts


def numbers_of(cells: Series) -> tuple[np.ndarray, np.ndarray]:
    """Cells as float64, nan where they are none, and which are missing; decimal commas and thousands are read."""
    import pandas as pd
    from pandas.api import types

    if types.is_numeric_dtype(cells.dtype) and not types.is_complex_dtype(cells.dtype):
        return cells.to_numpy(np.float64, na_value=np.nan), cells.isna().to_numpy()
    texts = pd.Series(texts_of(cells, "number"))
    x = pd.to_numeric(texts, errors="coerce").to_numpy(np.float64, copy=True)
    if (commas := (np.isnan(x) & texts.str.contains(",", regex=False)).to_numpy()).any():
        rest = texts[commas]
        thousands = rest.str.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")
        if thousands.all() and (rest.str.contains(r"\.|,.*,").any() or texts.str.contains(".", regex=False).any()):
            rest = rest.str.replace(",", "")
        else:
            rest = rest.str.replace(".", "").str.replace(",", ".")
        x[commas] = pd.to_numeric(rest, errors="coerce")
    return x, (texts == "").to_numpy()


def dates_of(cells: Series) -> tuple[np.ndarray, np.ndarray]:
    """Cells as days since 1970, float64, nan where they are no dates, and which are missing."""
    import pandas as pd
    from pandas.api import types

    if types.is_datetime64_any_dtype(cells.dtype):
        found, empty = pd.to_datetime(cells, utc=True), cells.isna()
    else:
        texts = pd.Series(texts_of(cells, "date"))
        empty, texts = texts == "", texts.where(texts.str.match(DATE), None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tried = [pd.to_datetime(texts, utc=True, errors="coerce", dayfirst=first) for first in (False, True)]
            found = min(tried, key=lambda stamps: int(stamps.isna().sum()))
            if (found.isna() & texts.notna()).any():
                found = pd.to_datetime(texts, utc=True, errors="coerce", format="mixed")
    days = (found - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(days=1)
    return days.to_numpy(np.float64), empty.to_numpy()


def unreadable(cells: Series) -> np.ndarray:
    """Cells that hold no single value, bool (N,)."""
    from pandas.api import types

    if cells.dtype != object:
        return np.full(len(cells), types.is_complex_dtype(cells.dtype) or types.is_timedelta64_dtype(cells.dtype))
    plain = (str, Real, Decimal, date, np.datetime64)
    missing = cells.isna().to_numpy()
    return np.array([not isinstance(cell, plain) for cell in cells], bool) & ~missing
