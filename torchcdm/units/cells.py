"""Cells as people write them: whether a column holds numbers, texts, booleans or dates, and what a cell says."""

from __future__ import annotations

import re
import warnings
from datetime import date
from decimal import Decimal
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from pandas import Series

Kind = Literal["number", "category", "boolean", "date"]
KINDS: dict[str, Kind] = {"b": "boolean", "M": "date", "i": "number", "u": "number", "f": "number"}

# The mark between thousands; the decimal mark is the other one, and either where there is none.
Thousands = Literal["", ",", "."]
# Cells that are missing, in any case.
EMPTY = frozenset(("", "na", "n/a", "nan", "null", "none", "nat", "<na>", "?", "-"))
# Spellings of booleans, in any case.
FALSE, TRUE = frozenset(("false", "f", "no", "n", "off")), frozenset(("true", "t", "yes", "y", "on"))

# How the text of a date begins.
DATE = re.compile(
    r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.](\d{4}|\d{2})([ T]|$)|\d{4}-\d{1,2}$"
    r"|[A-Za-z]{3,9}\.? (\d{1,2},? )?\d{4}|\d{1,2} [A-Za-z]{3,9}\.? \d{4}"
)

# Day and month, or month and day, at the beginning of a date.
DAY_AND_MONTH = re.compile(r"^(\d{1,2})([-/.])(\d{1,2})(?=[-/.])")
# Share of the filled cells that are numbers, or dates, from which on the others are mistakes and no categories.
MOSTLY = 0.9
# Texts that tell of another spelling, and their share of those that could, from which on a column is misspelled.
TELLING = 3, 0.1


def kind_of(cells: Series) -> Kind | Literal[""]:
    """What a column holds; the empty text where all cells are missing."""
    if not cells.notna().any():
        return ""
    if cells.dtype.kind in KINDS:
        return KINDS[cells.dtype.kind]
    texts = texts_of(cells, "category")
    filled = texts != ""
    if not filled.any():
        return ""
    numbers = float((~np.isnan(numbers_of(cells)[0][filled])).mean())
    if numbers == 1:
        return "number"
    if all(text.lower() in TRUE | FALSE for text in np.unique(texts[filled])):
        return "boolean"
    dates = float(np.isfinite(days_of(cells)[0][filled]).mean())
    return "number" if numbers >= MOSTLY else "date" if dates >= MOSTLY else "category"


def texts_of(cells: Series, kind: Kind) -> np.ndarray:
    """Cells as texts, object (N,): the empty text where they are missing, False and True of booleans."""
    def text(cell: Any) -> str:
        # Of whole numbers pandas makes floats where a cell is empty.
        return f"{cell:.0f}" if isinstance(cell, float) and cell.is_integer() else str(cell)

    texts = cells.astype(object).where(cells.notna(), "").map(text).astype(str).str.strip()
    lower = texts.str.lower()
    texts = texts.mask(lower.isin(EMPTY), "")
    if kind == "boolean":
        texts = texts.mask(lower.isin(TRUE), "True").mask(lower.isin(FALSE), "False")
    return texts.to_numpy(object)


def spelling(cells: Series, kind: Kind) -> dict[str, Any]:
    """How the texts of a column of numbers or dates are written: arguments of :func:`numbers_of` or :func:`days_of`.

    The mark between ``thousands`` is that by which most of them are numbers, the comma before the point; none where
    the comma is the decimal mark and no number has a point. Dates are ``day_first`` where more of them have a number
    above 12 before the month than behind it.
    """
    texts = texts_of(cells[_are_texts(cells)], kind)
    if kind == "date":
        first, second = (np.isnan(_alone(texts, kind, day_first)).sum() for day_first in (False, True))
        return {"day_first": bool(first > second)}
    commas, points = (np.isfinite(_alone(texts, kind, mark)) for mark in (",", "."))
    if commas.sum() >= points.sum():
        return {"thousands": ","}
    return {"thousands": "." if any("." in text for text in texts[points]) else ""}


def misspelled(cells: Series, kind: Kind, way: Thousands | bool) -> tuple[int, int] | None:
    """Where a column is plainly not written in the ``way`` of another, ``thousands`` or ``day_first``: the places of a
    text that would be taken for something else, and of one that tells, as it can be read in another way alone.

    ``TELLING`` texts tell, and as a share of those that could, and none of them for the way; else there is None.
    """
    written, mark = _are_texts(cells), "," if way == "," else "."
    # What is written in another country has its decimal mark.
    if not written.any() or (kind != "date" and not any(mark in text for text in cells[written])):
        return None
    texts = np.where(written, texts_of(cells, kind), "")
    read = _alone(texts, kind, way)
    for other in (not way,) if kind == "date" else {",", ".", ""} - {way}:
        there = _alone(texts, kind, other)
        tells, against = np.isfinite(there) & np.isnan(read), np.isnan(there) & np.isfinite(read)
        taken = np.isfinite(there) & np.isfinite(read) & (there != read)
        least, share = TELLING
        if taken.any() and not against.any() and tells.sum() >= max(least, share * (tells | taken).sum()):
            return int(taken.argmax()), int(tells.argmax())
    return None


def _alone(texts: np.ndarray, kind: Kind, way: Thousands | bool) -> np.ndarray:
    """What texts (N,) are in one way alone: numbers; of dates month and day, 0 where all know them; nan where none."""
    if kind != "date":
        return _parsed(texts, way)
    found = (DAY_AND_MONTH.match(text) for text in texts)
    pairs = [(0, 0) if at is None else (int(at[3 if way else 1]), int(at[1 if way else 3])) for at in found]
    return np.array([100.0 * month + day if month <= 12 else np.nan for month, day in pairs])


def numbers_of(cells: Series, thousands: Thousands = ",") -> tuple[np.ndarray, np.ndarray]:
    """Cells as numbers, float64, nan where they are none; and which are missing. ``thousands`` says what the texts
    ``1,234`` and ``1.234`` are; one that can be read in one way alone, such as ``1.234,5``, is read so."""
    if cells.dtype.kind in "biuf":
        return cells.to_numpy(np.float64, na_value=np.nan), cells.isna().to_numpy()
    texts, written = texts_of(cells, "number"), _are_texts(cells)
    x = np.full(len(texts), np.nan)
    for mark, part in ((",", ~written), (thousands, written), (",", written), (".", written)):
        rest = part & np.isnan(x)
        x[rest] = _parsed(texts[rest], mark)
    return x, texts == ""


def days_of(cells: Series, day_first: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Cells as dates, days since 1970, float64, nan where they are none; and which are missing. ``day_first`` says
    what ``3/4/2024`` is; ``25/4/2024`` is in April."""
    import pandas as pd

    if cells.dtype.kind == "M":
        found, empty = pd.to_datetime(cells, utc=True), cells.isna()
    else:
        texts = pd.Series(texts_of(cells, "date"))
        empty, texts = texts == "", texts.where(texts.str.match(DATE), None)
        if day_first:  # the option of pandas would turn 2024-04-03, too
            texts = texts.str.replace(DAY_AND_MONTH, r"\3\2\1", regex=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = pd.to_datetime(texts, utc=True, errors="coerce", format="mixed")
    # By numpy: pandas would count from 1970 in nanoseconds, which end in 2262.
    days = (found.dt.tz_localize(None).to_numpy() - np.datetime64(0, "D")) / np.timedelta64(1, "D")
    return days, empty.to_numpy()


def _are_texts(cells: Series) -> np.ndarray:
    """Which cells are texts, bool (N,)."""
    plain = cells.dtype.kind in KINDS
    return np.zeros(len(cells), bool) if plain else np.array([isinstance(cell, str) for cell in cells], bool)


def _parsed(texts: np.ndarray, thousands: Thousands) -> np.ndarray:
    """Texts (N,) as float64, nan where they are no numbers with this mark between thousands."""
    import pandas as pd

    marks = {",": {}, ".": {".": ",", ",": "."}, "": {",": "."}}[thousands]
    cells = pd.Series(texts, dtype=str).str.translate(str.maketrans(marks))
    grouped = cells.str.fullmatch(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d*)?")
    cells = cells.mask(grouped, cells.str.replace(",", "", regex=False))
    return pd.to_numeric(cells, errors="coerce").to_numpy(np.float64)


def unreadable(cells: Series) -> np.ndarray:
    """Cells that hold no single value, such as lists, complex numbers and spans of time: bool (N,)."""
    if cells.dtype != object:
        return np.full(len(cells), cells.dtype.kind in "cm")
    plain = (str, Real, np.bool_, Decimal, date, np.datetime64)
    return np.array([not isinstance(cell, plain) for cell in cells], bool) & cells.notna().to_numpy()
