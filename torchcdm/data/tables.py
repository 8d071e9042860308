"""Tables: CSV and Parquet files and data frames."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchcdm.data.arrays import read_labels
from torchcdm.data.assembly import Samples
from torchcdm.data.options import DataOptions
from torchcdm.data.reading import reading
from torchcdm.data.source import MemorySplit
from torchcdm.errors import UserError, nearest, needed
from torchcdm.units import DataTransform, TableEncoding

if TYPE_CHECKING:
    from pandas import DataFrame

TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
"""Of table files."""


def is_table(path: Path | str) -> bool:
    """Whether a file is a table by its name."""
    return str(path).lower().endswith(SUFFIXES)


def load(argument: str, options: DataOptions, like: DataTransform | None = None) -> Samples:
    """``table:FILE.csv``, also packed by gzip, or ``table:FILE.parquet``, split at random."""
    return samples_of({"train": read(Path(argument), options.skip_bad)}, f"table:{argument}", options, like=like)


def read(path: Path, skip_bad: bool = False, group: int | None = None) -> DataFrame:
    """A table file, by its suffix: cells of text files as texts, empty cells as missing ones.

    What is wrong with its lines stands in ``attrs["problems"]``, for one message with what is wrong with its cells;
    ``attrs["notes"]`` says what was read off the file. ``skip_bad`` leaves out lines with another number of cells.
    Of a Parquet file the row group number ``group`` is read, all where it is None.

    Raises:
        UserError: Missing, unreadable, or of another kind.
    """
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _read_parquet(path, group)
    if name.endswith(TEXT_SUFFIXES):
        return _read_csv(path, skip_bad)
    raise UserError(f"{path}: tables are read from {', '.join(SUFFIXES)} files")


def samples_of(
    parts: Mapping[str, DataFrame],
    name: str,
    options: DataOptions,
    labels: Any = None,
    like: DataTransform | None = None,
) -> Samples:
    """The codes of the columns; for a model that is to score them of its columns.

    Args:
        parts: ``train``, and ``validation`` and ``test`` where they are apart.
        name: Name of the source.
        options: ``label`` names the column of classes, which is no column of the data; others choose columns.
        labels: Classes (N,) that are no column of the table; for ``train`` alone.
        like: That of the model that scores the data.

    Raises:
        UserError: Columns that are not there, cells that cannot be read, all in one line; nothing that varies.
    """
    import pandas as pd

    notes = [note for part in parts.values() for note in part.attrs.get("notes", ())]
    labelled = all(options.label in part.columns for part in parts.values())
    if options.label is not None and (labelled or like is None):
        labels = np.concatenate([select(part, [options.label], name).to_numpy() for part in parts.values()])[:, 0]
    if like is None:
        parts = {split: chosen(part, options, name) for split, part in parts.items()}
    whole = pd.concat(list(parts.values()))
    whole.attrs["problems"] = [problem for part in parts.values() for problem in part.attrs.get("problems", ())]
    if not len(whole) or not len(whole.columns):
        raise UserError(f"{name}: no columns of values, or no rows")
    if like is None:
        table, more = TableEncoding.fit(whole, name, options.skip_bad)
        notes += [f"{len(whole)} rows, {len(table.kept)} columns: {', '.join(table.names)}.", *more]
    else:
        table = like.table or TableEncoding.numbers(whole.columns)
    sizes = [len(part) for part in parts.values()]
    of_parts, class_names = read_labels(labels, sizes, name, by_value=True)
    pools, left_out = {}, 0
    for (split, part), y in zip(parts.items(), of_parts, strict=True):
        x, rows, _ = table.encode(part, name, options.skip_bad, problems=part.attrs.get("problems", ()))
        pools[split] = MemorySplit(x, None if y is None else y[rows])
        left_out += len(part) - len(rows)
    if left_out:
        notes.append(f"{left_out} row(s) with cells that cannot be read are left out.")
    return Samples(name, pools, None, class_names, table, tuple(notes))


def chosen(frame: DataFrame, options: DataOptions, name: str) -> DataFrame:
    """The columns that the options ask for, without that of the label."""
    if options.columns is not None:
        frame = select(frame, options.columns, name)
    left_out = [*(options.drop or ()), *([] if options.label is None or options.columns else [options.label])]
    select(frame, options.drop or (), name)
    return frame[[column for column in frame.columns if column not in left_out]]


def select(frame: DataFrame, columns: Sequence[str], name: str) -> DataFrame:
    """Columns by their names; UserError names all that are not there."""
    absent = [column for column in columns if column not in frame.columns]
    if absent:
        what = ", ".join(f"'{column}'" for column in absent)
        raise UserError(f"{name}: no column {what}; {nearest(absent[0], frame.columns)}")
    return frame[list(columns)]


def _read_csv(path: Path, skip_bad: bool) -> DataFrame:
    """Comma, semicolon or tab separated; the first line names the columns unless it is all numbers."""
    import pandas as pd

    with reading(path, "a table in UTF-8", also=(csv.Error,)) as raw:
        binary = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
        text = io.TextIOWrapper(io.BufferedReader(binary), "utf-8-sig", newline="")
        first = text.readline()
        separator = max(",;\t", key=first.count)
        text.seek(0)
        rows = csv.reader(text, delimiter=separator)
        lines = [(rows.line_num, row) for row in rows if row]
    if not lines:
        raise UserError(f"{path}: the file is empty")
    header, notes, problems = [cell.strip() for cell in lines[0][1]], [], []
    if not any(np.isnan(_number(cell)) for cell in header):
        header = [f"c{k}" for k in range(len(header))]
        notes.append(f"no line of column names: columns are called c0 ... c{len(header) - 1}.")
    else:
        lines = lines[1:]
    fitting = [(number, row) for number, row in lines if len(row) == len(header)]
    if len(fitting) < len(lines) and not skip_bad:
        number, row = next(line for line in lines if len(line[1]) != len(header))
        more = f" ({len(lines) - len(fitting)} such lines)" if len(lines) - len(fitting) > 1 else ""
        problems.append(f"line {number} has {len(row)} cells, the first line has {len(header)}{more}")
    elif len(fitting) < len(lines):
        notes.append(f"{len(lines) - len(fitting)} line(s) with another number of cells than the first are left out.")
    index = pd.Index([number for number, _ in fitting], name="line", dtype=int)
    frame = pd.DataFrame([row for _, row in fitting], index, range(len(header)), dtype=str)
    if header and header[0] == "" and "" not in header[1:] and _counts(frame[0]):
        frame, header = frame.drop(columns=0), header[1:]
        notes.append("the first column has no name and counts the rows: left out.")
    problems += [f"column {k + 1} has no name" for k, column in enumerate(header) if column == ""]
    return _named(frame, header, notes, problems, path)


def _named(frame: DataFrame, names: Sequence[str], notes: list[str], problems: list[str], path: Path) -> DataFrame:
    """A frame with these names of columns, notes and problems; UserError where two are alike or one is empty."""
    names = [str(name) for name in names]
    twice = dict.fromkeys(name for k, name in enumerate(names) if name in names[:k] and name)
    problems += [f"two columns are called '{name}'" for name in twice]
    if twice or "" in names:
        raise UserError(f"{path}: {'; '.join(problems)}; name it in the first line, each column by a name of its own")
    frame = frame.set_axis(names, axis=1)
    frame.attrs.update(name=str(path), notes=notes, problems=problems)
    return frame


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _counts(cells: Sequence[str]) -> bool:
    """Whether the cells are rising whole numbers, as the index of a data frame that was written with its rows."""
    try:
        numbers = [int(cell) for cell in cells]
    except ValueError:
        return False
    return all(low < high for low, high in zip(numbers, numbers[1:], strict=False))


def row_groups(path: Path) -> int:
    """Number of row groups of a Parquet file.

    Raises:
        UserError: As :func:`read`.
    """
    with _parquet(path) as file:
        return file.num_row_groups


def _read_parquet(path: Path, group: int | None) -> DataFrame:
    import pandas as pd

    with _parquet(path) as file:
        table = file.read() if group is None else file.read_row_group(group)
        before = sum(file.metadata.row_group(k).num_rows for k in range(group or 0))
        written = (table.schema.pandas_metadata or {}).get("index_columns", ())
        index = [name for name in written if isinstance(name, str)]  # others are ranges, which are no columns
        kept = [k for k, name in enumerate(table.column_names) if name not in index]
        names = [table.column_names[k] for k in kept]
        frame = table.select(kept).rename_columns([str(k) for k in kept]).to_pandas(ignore_metadata=True)
        frame.index = pd.RangeIndex(before, before + len(frame))
    notes = [f"the index of the data frame is left out: {', '.join(index)}."] if index else []
    return _named(frame, names, notes, [], path)


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """A Parquet file, open."""
    parquet, pyarrow = (needed(name, "tables", f"{path}: Parquet") for name in ("pyarrow.parquet", "pyarrow"))
    with reading(path, "Parquet", also=(pyarrow.ArrowException,)) as file:
        yield parquet.ParquetFile(file)
