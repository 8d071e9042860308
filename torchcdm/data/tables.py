"""Tables of numbers: CSV, Parquet and data frames, column by column."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchcdm.data.arrays import read_labels
from torchcdm.data.assembly import Samples
from torchcdm.data.options import DataOptions, Layout
from torchcdm.data.reading import reading
from torchcdm.data.source import MemorySplit, Split
from torchcdm.errors import UserError

TEXT_SUFFIXES = (".csv", ".tsv", ".txt")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
"""Of table files."""

SHOWN = 3
"""Columns that a message names."""


@dataclass(frozen=True)
class Table:
    """Named columns as they were read: numbers or texts.

    Attributes:
        name: The file or object, for messages.
        columns: Values of each column, all of one length.
        row: What to call row i in a message, ``line 17`` for a text file.
        notes: What was read off the file.
    """

    name: str
    columns: Mapping[str, Sequence[Any] | np.ndarray]
    row: Callable[[int], str]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def matrix(self, columns: Sequence[str]) -> np.ndarray:
        """The columns side by side, float64 (N, d).

        Raises:
            UserError: A column is missing, or a cell is empty, text, not finite or a date; names columns and rows.
        """
        found, problems = [], []
        for column in columns:
            raw = self.column(column)
            values = _floats(raw)
            if values is None:
                index = next((i for i, cell in enumerate(raw) if _floats(np.array([cell], object)) is None), 0)
                cell = raw[index]
                empty = cell is None or str(cell).strip() == ""
                shown = "is empty" if empty else f"holds '{str(cell):.60}', not a finite number"
                problems.append(f"column '{column}', {self.row(index)} {shown}")
            else:
                found.append(values)
        if problems:
            rest = f" ({len(problems)} columns in all)" if len(problems) > 1 else ""
            raise UserError(f"{self.name}: {', '.join(problems[:SHOWN])}{rest}; mend the cells, or leave columns out")
        return np.stack(found, 1)

    def column(self, name: str) -> Sequence[Any] | np.ndarray:
        """One column as it was read.

        Raises:
            UserError: There is none of that name.
        """
        if name not in self.columns:
            raise UserError(f"{self.name}: no column '{name}' (found: {', '.join(self.columns)})")
        return self.columns[name]


def load(argument: str, options: DataOptions, layout: Layout | None = None) -> Samples:
    """``table:FILE.csv`` or ``table:FILE.parquet``, split at random."""
    return samples_of({"train": read(Path(argument))}, f"table:{argument}", options, layout=layout)


def read(path: Path) -> Table:
    """A table file, by its suffix.

    Raises:
        UserError: Missing, unreadable, or of another kind.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix in TEXT_SUFFIXES:
        return _read_csv(path)
    raise UserError(f"{path}: tables are read from {', '.join(TEXT_SUFFIXES)} and .parquet files")


def is_frame(data: Any) -> bool:
    """Whether these are columns of a data frame, or one of them, a series."""
    return hasattr(data, "to_numpy") and (hasattr(data, "columns") or hasattr(data, "to_frame"))


def from_frame(frame: Any, name: str = "data frame") -> Table:
    """A pandas DataFrame as a table; a Series is one column."""
    if not hasattr(frame, "columns"):
        frame = frame.to_frame(name="value" if frame.name is None else frame.name)
    names = [str(column) for column in frame.columns]
    _refuse_duplicates(names, name)
    columns = {text: frame[column].to_numpy() for text, column in zip(names, frame.columns, strict=True)}
    return Table(name, columns, lambda i: f"row {frame.index[i]}")


def samples_of(
    parts: dict[str, Table], name: str, options: DataOptions, labels: Any = None, layout: Layout | None = None
) -> Samples:
    """The columns of numbers; for a model that is to score them its columns.

    Args:
        parts: ``train``, and ``validation`` and ``test`` where they are apart.
        name: Name of the source.
        options: ``label`` names the column of classes, which is no column of the data.
        labels: Classes (N,) that are no column of the table; for ``train`` alone.
        layout: That of the model that scores the data.

    Raises:
        UserError: An unknown label column, a cell that is no number, a column whose variation float32 does not hold.
    """
    table = parts["train"]
    columns = list((layout and layout.columns) or (column for column in table.columns if column != options.label))
    if not columns or not len(table):
        raise UserError(f"{table.name}: no columns of numbers, or no rows")
    if options.label is not None:
        labels = [label for part in parts.values() for label in part.column(options.label)]
    sizes = [len(part) for part in parts.values()]
    of_parts, class_names = read_labels(labels, sizes, table.name, by_value=True)
    pools: dict[str, Split] = {
        split: MemorySplit(torch.from_numpy(part.matrix(columns)), y)
        for (split, part), y in zip(parts.items(), of_parts, strict=True)
    }
    notes = (*table.notes, f"{sum(sizes)} rows, {len(columns)} columns: {', '.join(columns)}.")
    return Samples(name, pools, None, class_names, tuple(columns), notes, table.row)


def _floats(cells: Any) -> np.ndarray | None:
    """The cells as finite float64 (N,); None where they are texts, dates, lists or complex."""
    if getattr(getattr(cells, "dtype", None), "kind", "") in ("m", "M", "c"):
        return None
    try:
        values = np.asarray(cells, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    return values if values.ndim == 1 and np.isfinite(values).all() else None


def _read_csv(path: Path) -> Table:
    """Comma, semicolon or tab separated; the first line names the columns unless it is all numbers."""
    with reading(path, "a table in UTF-8", also=(csv.Error,)) as binary:
        text = io.TextIOWrapper(binary, "utf-8-sig", newline="")
        first = text.readline()
        separator = max(",;\t", key=first.count)
        text.seek(0)
        rows = csv.reader(text, delimiter=separator)
        lines = [(rows.line_num, row) for row in rows if row]
    if not lines:
        raise UserError(f"{path}: the file is empty")
    header = [cell.strip() for cell in lines[0][1]]
    notes: tuple[str, ...] = ()
    if _floats(header) is not None:
        header = [f"c{k}" for k in range(len(header))]
        notes = (f"no line of column names: columns are called c0 ... c{len(header) - 1}.",)
    else:
        lines = lines[1:]
    _refuse_duplicates(header, str(path))
    for number, row in lines:
        if len(row) != len(header):
            raise UserError(f"{path}: line {number} has {len(row)} cells; the first line has {len(header)}")
    columns = {name: [row[k] for _, row in lines] for k, name in enumerate(header)}
    if "" in columns:
        if header[0] or not _counts(columns.pop("")):
            raise UserError(f"{path}: column {header.index('') + 1} has no name; name it in the first line")
        notes = (*notes, "the first column has no name and counts the rows: left out.")
    return Table(str(path), columns, lambda i: f"line {lines[i][0]}", notes)


def _counts(cells: Sequence[str]) -> bool:
    """Whether the cells are rising whole numbers, as the index of a data frame that was written with its rows."""
    try:
        numbers = [int(cell) for cell in cells]
    except ValueError:
        return False
    return all(low < high for low, high in zip(numbers, numbers[1:], strict=False))


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path}: Parquet needs pyarrow; pip install 'torchcdm[tables]'") from error
    with reading(path, "Parquet", also=(pyarrow.ArrowException,)) as file:
        table = parquet.read_table(file)
        written = (table.schema.pandas_metadata or {}).get("index_columns", ())
        index = [name for name in written if isinstance(name, str)]  # others are ranges, which are no columns
        double = len(set(table.column_names)) < len(table.column_names)
        kept = [] if double else [name for name in table.column_names if name not in index]
        columns = {name: table[name].to_numpy() for name in kept}
    _refuse_duplicates(table.column_names, str(path))
    notes = (f"the index of the data frame is left out: {', '.join(index)}.",) if index else ()
    return Table(str(path), columns, lambda i: f"row {i} (counted from 0)", notes)


def _refuse_duplicates(names: Sequence[str], where: str) -> None:
    double = next((name for name, count in Counter(names).items() if count > 1), None)
    if double is not None:
        raise UserError(f"{where}: two columns are called '{double}'; column names must differ")
