"""Tables of numbers: CSV, Parquet and data frames, column by column."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchcdm.data.arrays import read_labels, source_from_splits
from torchcdm.data.columns import check_resolution, constants_note
from torchcdm.data.options import DataOptions, Layout
from torchcdm.data.source import NO_LABEL, DataSource, MemorySplit, Split, complete_splits
from torchcdm.errors import UserError

TEXT_SUFFIXES = (".csv", ".tsv", ".txt")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
"""Of table files."""


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

    def numbers(self, column: str) -> np.ndarray:
        """One column as float64.

        Raises:
            UserError: A cell that is empty, text, not finite or a date; names column and row.
        """
        raw = self.column(column)
        dated = isinstance(raw, np.ndarray) and raw.dtype.kind in "mM"
        try:
            values = None if dated else np.asarray(raw, dtype=np.float64)
        except (TypeError, ValueError):
            values = None
        if values is None or not np.isfinite(values).all():
            index, cell = next((i, cell) for i, cell in enumerate(raw) if dated or not _is_number(cell))
            shown = "is empty" if cell is None or str(cell).strip() == "" else f"holds '{cell}', not a finite number"
            raise UserError(
                f"{self.name}: column '{column}', {self.row(index)} {shown}; mend the cell, or leave the column out"
            )
        return values

    def matrix(self, columns: Sequence[str]) -> np.ndarray:
        """The columns side by side, float64 (N, d).

        Raises:
            UserError: A column is missing, or a cell is no number.
        """
        return np.stack([self.numbers(column) for column in columns], 1)

    def column(self, name: str) -> Sequence[Any] | np.ndarray:
        """One column as it was read.

        Raises:
            UserError: There is none of that name.
        """
        if name not in self.columns:
            raise UserError(f"{self.name}: no column '{name}' (found: {', '.join(self.columns)})")
        return self.columns[name]


def load(argument: str, options: DataOptions, layout: Layout | None = None) -> DataSource:
    """``table:FILE.csv`` or ``table:FILE.parquet``, split at random."""
    return source_from_tables({"train": read(Path(argument))}, f"table:{argument}", options, layout=layout)


def read(path: Path) -> Table:
    """A table file, by its suffix.

    Raises:
        UserError: Missing, unreadable, or of another kind.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
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


def source_from_tables(
    parts: dict[str, Table], name: str, options: DataOptions, labels: Any = None, layout: Layout | None = None
) -> DataSource:
    """The columns of numbers; columns that are constant in training are left out, discrete ones dequantised.

    For a model that is to score them: its columns, whatever they hold.

    Args:
        parts: ``train``, and ``validation`` and ``test`` where they are apart; what is missing is drawn at random.
        name: Name of the source.
        options: ``label`` names the column of classes, which is no column of the data; without ``dequantize``
            discrete columns are left as they are.
        labels: Classes (N,) that are no column of the table; for ``train`` alone.
        layout: That of the model that scores the data.

    Raises:
        UserError: An unknown label column, a cell that is no number, nothing but constant columns, a column whose
            variation float32 does not hold.
    """
    table = parts["train"]
    columns = list((layout and layout.columns) or (column for column in table.columns if column != options.label))
    if not columns or not len(table):
        raise UserError(f"{table.name}: no columns of numbers, or no rows")
    if options.label is not None:
        labels = [label for part in parts.values() for label in part.column(options.label)]
    values = {split: part.matrix(columns) for split, part in parts.items()}
    if layout is None:
        check_resolution(values["train"], columns, table.name)
    sizes = [len(part) for part in values.values()]
    y, class_names = _classes(labels, sum(sizes), table.name)
    y = torch.full((sum(sizes),), NO_LABEL) if y is None else y
    pools: dict[str, Split] = {
        split: MemorySplit(torch.from_numpy(x.astype(np.float32)), part)
        for (split, x), part in zip(values.items(), y.split(sizes), strict=True)
    }
    splits, note = complete_splits(table.name, pools, options)
    x, _ = splits[0].tensors()
    varying = (x != x[0]).any(0) if layout is None else torch.ones(len(columns), dtype=torch.bool)
    kept = [column for column, varies in zip(columns, varying.tolist(), strict=True) if varies]
    if not kept:
        raise UserError(f"{table.name}: every column is constant; there is nothing to learn")
    notes = [*table.notes, f"{sum(sizes)} rows, {len(kept)} columns: {', '.join(kept)}."]
    constants = {column: float(x[0, k]) for k, column in enumerate(columns) if column not in kept}
    if constants:
        notes.append(constants_note(constants))
        train, validation, test = (MemorySplit(split.tensors()[0][:, varying], split.labels) for split in splits)
        splits = (train, validation, test)
    source = source_from_splits(name, splits, None, options, class_names, tuple(kept), [*notes, note], layout)
    return replace(source, constants=constants)


def _classes(labels: Any, count: int, name: str) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """Labels as long (N,), and the classes: the values of the column, numbers in their order, else texts.

    Raises:
        UserError: Another number of labels than rows, fractions, or nearly as many classes as rows.
    """
    if labels is None:
        return None, None
    try:
        # Text files give every cell as text.
        values = np.array([int(label) if isinstance(label, str) else label for label in labels])
    except ValueError:
        values = np.asarray(labels)
    if values.dtype.kind not in "bui" and not (values.dtype.kind == "f" and np.array_equal(values, values.round())):
        if values.dtype.kind == "f":
            raise UserError(f"{name}: labels must be whole numbers or texts; the label column holds fractions")
        values = np.array([str(label) for label in labels])
    classes, numbers = np.unique(values, return_inverse=True)
    if len(classes) > max(2, count // 2):
        raise UserError(f"{name}: {len(classes)} classes in {count} rows; is the label column an identifier?")
    names = [f"{value:g}" if values.dtype.kind == "f" else str(value) for value in classes]
    return read_labels(numbers, count, name, names)


def _is_number(cell: Any) -> bool:
    try:
        return bool(np.isfinite(np.asarray([cell], dtype=np.float64)[0]))
    except (TypeError, ValueError):
        return False


def _read_csv(path: Path) -> Table:
    """Comma, semicolon or tab separated; the first line names the columns unless it is all numbers."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            separator = max(",;\t", key=first.count)
            file.seek(0)
            reader = csv.reader(file, delimiter=separator)
            lines = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table in UTF-8 ({error})") from error
    if not lines:
        raise UserError(f"{path}: the file is empty")
    header = [cell.strip() for cell in lines[0][1]]
    notes: tuple[str, ...] = ()
    if all(map(_is_number, header)):
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
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path}: Parquet needs pyarrow; pip install 'torchcdm[tables]'") from error
    try:
        table = parquet.read_table(path)
        _refuse_duplicates(table.column_names, str(path))
        written = (table.schema.pandas_metadata or {}).get("index_columns", ())
        index = [name for name in written if isinstance(name, str)]  # others are ranges, which are no columns
        columns = {name: table[name].to_numpy() for name in table.column_names if name not in index}
    except UserError:
        raise
    except Exception as error:  # pyarrow raises its own family of errors, which is not imported here
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read as Parquet ({reason})") from error
    notes = (f"the index of the data frame is left out: {', '.join(index)}.",) if index else ()
    return Table(str(path), columns, lambda i: f"row {i} (counted from 0)", notes)


def _refuse_duplicates(names: Sequence[str], where: str) -> None:
    double = next((name for name, count in Counter(names).items() if count > 1), None)
    if double is not None:
        raise UserError(f"{where}: two columns are called '{double}'; column names must differ")
