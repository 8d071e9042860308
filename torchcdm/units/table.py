"""Tables as they come: the cells of each column as numbers that have a density, and numbers as cells again.

Every column is one number, its *code*:

- a number is itself (less an offset, where float32 would lose it), a date the days since some day;
- a category is the place 0, 1, ... of its level, a missing cell of a category a level of its own;
- a value that a continuous column takes again and again (zero rain) has a gap of the line to itself: larger values
  move up by the width of the gap. So has a missing number, below the least one. Nothing is imputed.

Levels, columns of few values and gaps are dequantised over their cells: what a model says of them is a probability,
and of all other numbers a density in the column's own unit.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchcdm.errors import UserError
from torchcdm.runtime.validation import CountOrZero, Float, Positive, validated
from torchcdm.units.cells import (
    MOSTLY,
    Kind,
    Thousands,
    days_of,
    kind_of,
    misspelled,
    numbers_of,
    spelling,
    texts_of,
    unreadable,
)
from torchcdm.units.frames import SHOWN, by_place, listed, note_down, noted, numbers_rows
from torchcdm.units.lattice import Cells, cell_width, discrete_values, frequent_values

if TYPE_CHECKING:
    from pandas import DataFrame, Series

# A level has LEAST_COUNT rows at least; what is rarer, or beyond the most frequent MOST_LEVELS, is OTHER.
OTHER, MOST_LEVELS, LEAST_COUNT = "other", 100, 3
ID = "holds a different whole number in every row: if it is an id, drop it"  # note of a column
MOST_DECIMALS = 6  # of numbers that are rounded to those of training
FLOAT32_STEPS = 1000  # least number of float32 steps in a standard deviation; with fewer a column needs an offset
WHOLE = 2.0**53  # from here on float64 holds no longer every whole number
LARGEST = 1e150  # deviation of a column, at most, and one over it, at least: beyond, squares leave float64


@validated
class Column:
    """One column: what its cells are, and their codes."""

    name: str  # as in the table
    kind: Kind  # a date is the number of days since 1970
    # Texts of a category or boolean by code, False and True of mixed spellings; the empty one is missing.
    levels: tuple[str, ...] = ()
    # Numbers that have a probability, rising: all of a column of few values, frequent ones of another.
    values: tuple[Float, ...] = ()
    mixed: bool = True  # whether there are other numbers beside them, or numbers beside missing cells
    missing: bool = False  # whether training has missing numbers
    cell: Positive = 1.0  # width of the cell of each value and of missing numbers
    least: Float = 0.0  # the least number in training
    offset: Float = 0.0  # subtracted from all numbers
    decimals: CountOrZero | None = None  # most decimals of a number; None where they are many
    thousands: Thousands = ","  # mark between thousands in texts: the comma, the point or none
    day_first: bool = False  # whether ``3/4/2024`` is in April
    zone: str | None = None  # time zone of dates that have one

    @property
    def codes(self) -> tuple[float, ...]:
        """The codes that have a probability, rising."""
        if self.levels:
            return tuple(float(k) for k in range(len(self.levels)))
        missing = [self.least - self.offset] if self.missing else []
        return (*missing, *self._code(np.array(self.values)).tolist())

    def encode(self, cells: Series) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes, which cells cannot be read, and which are unlike any in training, where the code means nothing."""
        import pandas as pd

        if self.levels:
            texts = texts_of(cells, self.kind)
            places = {level: k for k, level in enumerate(texts_of(pd.Series(self.levels), self.kind))}
            places = {level.removesuffix(".0"): k for level, k in places.items()} | places  # 1.0 as a number is 1
            found = np.array([places.get(text, places.get(OTHER, -1) if text else -1) for text in texts])
            return found.clip(0).astype(np.float64), unreadable(cells), found < 0
        x, empty = self.read(cells)
        bad = ~np.isfinite(x) & ~empty
        strange = empty & (not self.missing)
        codes = self._code(np.where(np.isfinite(x), x, self.least))
        return np.where(empty & self.missing, self.least - self.offset, codes), bad, strange

    def read(self, cells: Series) -> tuple[np.ndarray, np.ndarray]:
        """Cells as numbers or dates, float64, nan where they are none, and which are missing."""
        return days_of(cells, self.day_first) if self.kind == "date" else numbers_of(cells, self.thousands)

    def misread(self, cells: Series) -> str:
        """What is wrong where cells show that numbers or dates are written otherwise than in training."""
        way = self.day_first if self.kind == "date" else self.thousands
        if self.levels or not (found := misspelled(cells, self.kind, way)):
            return ""
        taken, tells = (f"'{cells.iloc[k]}' ({cells.index.name or 'row'} {cells.index[k]})" for k in found)
        what = f"{tells} is written otherwise than in training, where {taken} would be another {self.kind}"
        return f"column '{self.name}': {what}; write them alike"

    def decode(self, codes: np.ndarray) -> Any:
        """Cells of the column's own kind from codes (N,), those of values and levels rounded."""
        import pandas as pd

        if self.levels:
            texts = np.array(self.levels, dtype=object)[codes.round().clip(0, len(self.levels) - 1).astype(int)]
            texts[texts == ""] = None
            if self.kind == "category" or not {"", "False", "True"}.issuperset(self.levels):
                return texts
            truth = pd.array([None if text is None else text == "True" for text in texts], "boolean")
            return truth if "" in self.levels else truth.astype(bool)
        x, start = codes + self.offset, self.least - self.cell / 2
        empty = self.missing & (x >= start) & (x < start + self.cell)
        x = np.where(self.missing & (x >= start + self.cell), x - self.cell, x)
        if self.values and not self.mixed:
            known = np.array(self.values)
            x = known[np.searchsorted((known[1:] + known[:-1]) / 2, x)]
        for value in self.values if self.mixed else ():
            x = np.where(x > value, np.maximum(x - self.cell, value), x)
        x[empty] = np.nan
        if self.kind == "date":
            seconds = (86400 * (x.round() if self.decimals == 0 else x)).round()
            stamps = pd.DatetimeIndex(seconds.astype("datetime64[s]"))  # in nanoseconds they would end in 2262
            return stamps if self.zone is None else stamps.tz_localize("UTC").tz_convert(self.zone)
        x = x if self.decimals is None else x.round(self.decimals)
        if self.decimals != 0 or np.abs(np.nan_to_num(x)).max(initial=0) >= 2**63:
            return x
        return pd.array(x, "Float64").astype("Int64") if self.missing else x.astype(np.int64)

    def _code(self, x: np.ndarray) -> np.ndarray:
        """Codes of numbers."""
        shift = np.where(self.missing & (x >= self.least - self.cell / 2), self.cell, 0.0)
        for value in self.values if self.mixed else ():
            shift = shift + np.where(x > value, self.cell, np.where(x == value, self.cell / 2, 0.0))
        return x + shift - self.offset


class Encoded(NamedTuple):
    """Rows of a table as numbers."""

    x: Tensor  # codes of the columns that vary, float64 (N, d)
    rows: Tensor  # which rows of the table they are, (N,)
    # Columns in which a row holds what training never had, empty for most: another value in a constant column, a new
    # level, a missing number.
    deviating: list[str]


@validated
class TableEncoding:
    """What becomes of a table before a model sees it. Plain values, which are saved with the model."""

    columns: tuple[Column, ...]  # all columns of the table that are used
    # Codes of those that are constant in training, by name: the model does not see them.
    constants: Mapping[str, Float] = field(default_factory=dict)
    numbered: bool = False  # whether the names are whole numbers in the table

    @classmethod
    def fit(
        cls, frame: DataFrame, name: str = "data frame", skip_bad: bool = False, cells: bool = True
    ) -> tuple[TableEncoding, list[str]]:
        """The encoding of a table, and what is to be said of its columns.

        Cells of text are read as numbers, booleans, dates or categories; with ``skip_bad`` rows with cells that cannot
        be read do not count, and columns of such cells are left out. Numbers that come back get ``cells``, unless
        nobody asks for their density. UserError for all cells that cannot be read, in one line, or if nothing
        varies.
        """
        columns, notes, problems = [], [], []
        for label in frame.columns:
            try:
                column, note = _describe(label, frame[label], cells)
            except UserError as error:
                problems.append(str(error))
                continue
            notes += [note] if note else []
            columns += [column] if column else []
        if not (columns or problems):
            raise UserError(f"{name}: no column is left to learn from; {' '.join(notes[:SHOWN]) or 'give some'}")
        notes += [f"{problem}: left out." for problem in problems] if skip_bad else []
        result = cls(tuple(columns), numbered=noted(frame, "numbered", False))
        frame = frame.copy(deep=False)
        note_down(frame, problems=[*noted(frame, "problems"), *problems])
        x = result.encode(frame, name, skip_bad).x
        if len(x) < 2:
            return result, notes
        result, _, constant = result.varying(x, name)
        return result, notes + constant

    @classmethod
    def numbers(cls, names: Iterable[Any]) -> TableEncoding:
        """Columns of plain numbers, for a model of vectors."""
        return cls(tuple(Column(str(name), "number") for name in names))

    @property
    def kept(self) -> tuple[Column, ...]:
        """The columns that the model sees, in its order."""
        return tuple(column for column in self.columns if column.name not in self.constants)

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(column.name for column in self.kept)

    @property
    def cells(self) -> dict[int, Cells]:
        """Codes that have a probability, by the place of their column."""
        columns = enumerate(self.kept)
        return {k: Cells(codes, column.cell, column.mixed) for k, column in columns if (codes := column.codes)}

    def encode(self, frame: Any, name: str = "data frame", skip_bad: bool = False, deviating: bool = False) -> Encoded:
        """The rows of a table as numbers; columns go by name, others are passed over, or :func:`by_place`.

        ``skip_bad`` leaves out rows with cells that cannot be read, or that training never had. With ``deviating``
        these are marked, and no problem; constant columns may be missing. UserError tells in one line all that cannot
        be read, the problems that are :func:`noted` too.
        """
        problems, codes = [*noted(frame, "problems")], []
        if not set(self.names).issubset(frame.columns):
            frame = by_place(frame, [column.name for column in self.columns], name)
        absent = [column for column in self.names if column not in frame.columns]
        if absent:
            raise UserError(f"{name}: no column {listed(absent)} (found: {', '.join(frame.columns)})")
        out, odd = np.zeros(len(frame), bool), defaultdict(list)
        for column in self.columns:
            constant = self.constants.get(column.name)
            if constant is not None and column.name not in frame.columns:
                continue
            cells = frame[column.name]
            if wrong := column.misread(cells):
                raise UserError(f"{name}: {wrong}")
            code, bad, strange = column.encode(cells)
            for row in np.flatnonzero(strange | (constant is not None and code != constant)):
                odd[row].append(column.name)
            wrong = bad if deviating or constant is not None else bad | strange
            out |= wrong
            if wrong.any():
                problems.append(_problem(column, cells, wrong))
            if constant is None:
                codes.append(code)
        if problems and not skip_bad:
            rest = f" ({len(problems)} problems in all)" if len(problems) > SHOWN else ""
            mend = "mend the cells, or leave out their rows or columns (--skip-bad, --drop where a command has them)"
            raise UserError(f"{name}: {'; '.join(problems[:SHOWN])}{rest}; {mend}")
        rows = np.flatnonzero(~out)
        x = np.stack(codes, 1)[rows] if codes else np.empty((len(rows), 0))
        deviations = [", ".join(odd.get(row, ())) for row in rows.tolist()]
        return Encoded(torch.from_numpy(x), torch.from_numpy(rows), deviations)

    def decode(self, x: Tensor) -> DataFrame:
        """Rows of the model (N, d) as a table: all columns in the order and of the kinds of training."""
        import pandas as pd

        values, kept = x.detach().double().cpu().numpy(), self.names
        codes = {name: values[:, k] for k, name in enumerate(kept)}
        full = {name: np.full(len(values), code) for name, code in self.constants.items()} | codes
        frame = pd.DataFrame({column.name: column.decode(full[column.name]) for column in self.columns})
        return frame.set_axis([int(name) for name in frame.columns], axis=1) if self.numbered else frame

    def varying(self, x: Tensor, name: str) -> tuple[TableEncoding, Tensor, list[str]]:
        """The same without columns that are constant in the codes ``x`` (N, d), which of these vary, and a note.

        UserError, with the ``name`` of the table, where none varies.
        """
        varying = (x != x[:1]).any(0)
        found = {column.name: float(x[0, k]) for k, column in enumerate(self.kept) if not varying[k]}
        if not varying.any():
            raise UserError(f"{name}: every column is constant in training; there is nothing to learn")
        notes = [f"columns left out because they are constant in training: {', '.join(found)}."] if found else []
        return replace(self, constants={**self.constants, **found}), varying, notes


def beyond_float32(x: np.ndarray) -> bool:
    """Whether the numbers (N,) vary so little beside their size that float32 resolves them badly."""
    return bool(x.std() < FLOAT32_STEPS * np.finfo(np.float32).eps * np.abs(x).max())


def _describe(name: str, cells: Series, repeated: bool) -> tuple[Column | None, str]:
    """A column from the cells of training, None where it is left out, and what is to be said of it."""
    kind = kind_of(cells)
    if kind == "":
        return None, f"column '{name}' is empty: left out."
    if kind in ("category", "boolean"):
        column, notes = _levels(Column(name, kind), cells)
    else:
        column, notes = _numbers(Column(name, kind), cells, repeated)
    return column, f"column '{name}' {'; '.join(notes)}." if notes else ""


def _levels(column: Column, cells: Series) -> tuple[Column | None, list[str]]:
    """A category or a boolean."""
    bad = unreadable(cells)
    if bad.mean() > 1 - MOSTLY:
        raise UserError(_problem(column, cells, bad))
    texts = texts_of(cells[~bad], column.kind)
    counts = Counter(texts.tolist())
    if column.kind == "boolean":
        spelled = sorted(set(zip(texts, texts_of(cells[~bad], "category"), strict=True)))
        levels = sorted(counts) if len(spelled) > len(counts) else [text for _, text in spelled]
        return replace(column, levels=tuple(levels), mixed=False), []
    empty = counts.pop("", 0)
    common = [level for level, count in counts.most_common(MOST_LEVELS) if count >= LEAST_COUNT]
    rare = sum(counts.values()) - sum(counts[level] for level in common)
    if rare > len(texts) / 2:
        return None, [f"holds {len(counts)} texts, most of them rare, as names do: left out"]
    pooled = len(counts) - len(common)
    levels = (*([""] if empty else []), *sorted({*common, *([OTHER] if pooled else [])}))
    note = f"holds categories: {len(common)} levels"
    note += f", {pooled} rare ones as '{OTHER}'" if pooled else ""
    note += ", missing cells as one more" if empty else ""
    return replace(column, levels=levels, mixed=False), [note]


def _numbers(column: Column, cells: Series, repeated: bool) -> tuple[Column, list[str]]:
    """Numbers or dates; ``repeated`` ones get a cell."""
    def text(value: float, digits: int) -> str:
        return str(np.datetime64(int(np.floor(value)), "D")) if is_date else f"{value:.{digits}g}"

    is_date, zone = column.kind == "date", getattr(cells.dtype, "tz", None)
    column = replace(column, **spelling(cells, column.kind), zone=None if zone is None else str(zone))
    x, empty = column.read(cells)
    if not np.isfinite(x).any():
        raise UserError(_problem(column, cells, ~empty))
    notes = ["holds dates, in days"] if is_date else []
    other = replace(column, thousands="" if column.thousands else ",", day_first=not column.day_first).read(cells)[0]
    for k in np.flatnonzero(np.isfinite(x) & (x != other))[:1]:
        notes.append(f"reads '{cells.iloc[k]}' as {text(x[k], 15)}")
    known = np.isfinite(x)
    missing, x = bool(empty.any()), x[known]
    if np.abs(x).max() >= WHOLE and not is_date:
        whole = {int(text) for text in texts_of(cells[known], column.kind) if re.fullmatch(r"[+-]?\d+", text)}
        if len(whole) > len({float(number) for number in whole}):
            what = "holds larger whole numbers than float64 tells apart"
            raise UserError(f"column '{column.name}' {what}; subtract what they have in common, or drop it, if an id")
    varies = bool((x != x[0]).any())  # the deviation of equal numbers may be one of rounding
    with np.errstate(over="ignore", invalid="ignore"):
        deviation = float(x.std()) if varies else 1.0
    if not 1 / LARGEST < deviation < LARGEST:
        raise UserError(f"column '{column.name}' has values too large or too small for float64; scale it")
    few = (discrete_values(x, column.name) if repeated else None) if varies else (float(x[0]),)
    frequent = frequent_values(x) if repeated and not few else {}
    steep = varies and beyond_float32(x)
    offset = float(np.floor(np.median(x))) if is_date or steep else 0.0
    several = few is not None and len(few) > 1
    cell = cell_width(few) if several else float(f"{deviation:.2g}")
    if several:
        notes.append(f"has {len(few)} distinct values: dequantised with cells of {cell:g}; they have probabilities")
    if frequent:
        shares = (f"{text(value, 6)} in {100 * share:.0f} % of the rows" for value, share in frequent.items())
        notes.append(f"holds {', '.join(shares)}: such values have a probability, the others a density")
    if steep and not is_date:
        notes.append(f"varies little beside its size, beyond float32: an offset of {offset:g} is subtracted")
    if missing:
        notes.append(f"is empty in {100 * empty.mean():.3g} % of the rows, which has a probability")
    if not is_date and may_be_id(x):
        notes.append(ID)
    # Decimal texts are rounded to float64 twice: once as they were read, and once here.
    close, exact = 1e-12 * deviation * varies, 2 * np.finfo(float).eps
    decimals = next((k for k in range(MOST_DECIMALS + 1) if np.allclose(x.round(k), x, exact, close)), None)
    found = {"values": few or tuple(frequent), "mixed": not few, "missing": missing, "cell": cell}
    return replace(column, **found, least=float(x.min()), offset=offset, decimals=decimals), notes


def may_be_id(x: np.ndarray) -> bool:
    """Whether numbers (N,) are whole and all differ, where of as many at random ten pairs or more would be equal."""
    return len(x) ** 2 > 20 * (np.ptp(x) + 1) and numbers_rows(x)


def _problem(column: Column, cells: Series, wrong: np.ndarray) -> str:
    """The first wrong cell, and how many there are."""
    at = int(wrong.argmax())
    (text,), needed = texts_of(cells.iloc[[at]], "category"), {"number": "finite number", "date": "date"}
    if not text:
        what = "is empty, which no row of training was"
    elif column.levels:
        what = f"holds '{text:.60}', none of the {len(column.levels)} levels of training"
    else:
        what = f"holds '{text:.60}', not a {needed.get(column.kind, 'text or a number')}"
    more = f" ({int(wrong.sum())} such cells)" if wrong.sum() > 1 else ""
    return f"column '{column.name}', {cells.index.name or 'row'} {cells.index[at]} {what}{more}"
