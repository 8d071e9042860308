"""Tables: CSV and Parquet files and data frames."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchcdm.data.arrays import read_labels
from torchcdm.data.options import DataOptions
from torchcdm.data.source import MemorySplit, Samples
from torchcdm.errors import UserError, nearest, needed
from torchcdm.runtime.reading import reading
from torchcdm.units import DataTransform, TableEncoding
from torchcdm.units.frames import note_down, noted, without_counter

if TYPE_CHECKING:
    from pandas import DataFrame

TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")  # of table files


def is_table(path: Path | str) -> bool:
    """Whether a file is a table by its name."""
    return str(path).lower().endswith(SUFFIXES)


def load(argument: str, options: DataOptions, like: DataTransform | None = None) -> Samples:
    """``table:FILE.csv``, also packed by gzip, or ``table:FILE.parquet``, split at random."""
    return samples_of({"train": read(Path(argument), options)}, f"table:{argument}", options, like=like)


def read(path: Path, options: DataOptions, group: int | None = None) -> DataFrame:
    """A table file, by its suffix: cells of text files as texts, empty cells as missing ones.

    What is wrong with its lines is :func:`torchcdm.units.frames.noted`, for one message with what is wrong with its
    cells, and so is what was read off the file. The option ``skip_bad`` leaves out lines with another number of
    cells. Of a Parquet file the row group ``group`` is read, all when None. UserError for a file that cannot be read,
    or columns without a name of their own.
    """
    if not is_table(path):
        raise UserError(f"{path}: tables are read from {', '.join(SUFFIXES)} files")
    frame = _read_parquet(path, group) if path.suffix.lower() == ".parquet" else _read_csv(path, options.skip_bad)
    twice = frame.columns[frame.columns.duplicated() & (frame.columns != "")].unique()
    wrong = [f"column {k + 1} has no name" for k, column in enumerate(frame.columns) if column == ""]
    wrong += [f"two columns are called '{name}'" for name in twice]
    if wrong:
        wrong = "; ".join([*noted(frame, "problems"), *wrong])
        raise UserError(f"{path}: {wrong}; name it in the first line, each column by a name of its own")
    note_down(frame, name=str(path))
    return frame


def samples_of(
    parts: dict[str, DataFrame], name: str, options: DataOptions, labels: Any = None,
    like: DataTransform | None = None, hidden: bool = False,
) -> Samples:  # fmt: skip
    """The codes of the columns; of those of a model that scores the data, where its transform ``like`` is given.

    ``parts`` are ``train``, and ``validation`` and ``test`` where they are apart; ``labels`` classes (N,) of ``train``
    that are no column; with ``hidden``, -1 stands for none. UserError for columns that are not there, cells that
    cannot be read, or nothing that varies.
    """
    frames = list(parts.values())
    if options.label is not None and (like is None or all(options.label in frame.columns for frame in frames)):
        labels = np.concatenate([select(frame, [options.label], name).to_numpy() for frame in frames])[:, 0]
    frames = [chosen(frame, options, name) for frame in frames] if like is None else frames
    notes = [note for frame in frames for note in noted(frame, "notes")]
    whole = joined(frames)
    if not len(whole) or not len(whole.columns):
        what = "; ".join(noted(whole, "problems")) or "no columns of values, or no rows"
        raise UserError(f"{name}: {what}")
    if like is None:
        table, more = TableEncoding.fit(whole, name, options.skip_bad)
        notes += [f"{len(whole)} rows, {len(table.kept)} columns: {', '.join(table.names)}.", *more]
    else:
        table = like.table or TableEncoding.numbers(whole.columns)
    of_parts, class_names = read_labels(labels, list(map(len, frames)), name, by_value=True, hidden=hidden)
    pools, left_out = {}, 0
    for split, frame, y in zip(parts, frames, of_parts, strict=True):
        x, rows, _ = table.encode(frame, name, options.skip_bad)
        pools[split] = MemorySplit(x, None if y is None else y[rows])
        left_out += len(frame) - len(rows)
    if left_out:
        notes.append(f"{left_out} row(s) with cells that cannot be read are left out.")
    return Samples(name, pools, None, class_names, table, tuple(notes))


def joined(frames: Sequence[DataFrame]) -> DataFrame:
    """Tables of the same columns, one below the other, with all that is wrong with their lines."""
    import pandas as pd

    whole = pd.concat(frames)[list(frames[0].columns)]
    note_down(whole, problems=[problem for frame in frames for problem in noted(frame, "problems")])
    return whole


def chosen(frame: DataFrame, options: DataOptions, name: str) -> DataFrame:
    """The columns asked for; unless they are named, without that of the label and one that counts the rows."""
    select(frame, options.drop, name)
    left_out = [*options.drop, *([] if options.columns else [options.label])]
    frame = select(frame, frame.columns if options.columns is None else options.columns, name)
    frame = frame[[column for column in frame.columns if column not in left_out]]
    return without_counter(frame) if options.columns is None else frame


def select(frame: DataFrame, columns: Sequence[str], name: str) -> DataFrame:
    """Columns by their names; UserError names all that are not there, or one that is named twice."""
    absent = [column for column in columns if column not in frame.columns]
    if absent:
        what = ", ".join(f"'{column}'" for column in absent)
        raise UserError(f"{name}: no column {what}; {nearest(absent[0], frame.columns)}")
    if len(set(columns)) < len(columns):
        raise UserError(f"{name}: one of the columns {', '.join(map(str, columns))} is named twice; name it once")
    return frame[list(columns)]


def _read_csv(path: Path, skip_bad: bool) -> DataFrame:
    """Comma, semicolon or tab separated, or by spaces where the first line has numbers and spaces alone, as NumPy
    writes them; the first line names the columns unless it is all numbers."""
    import pandas as pd

    def numbers(cells: Sequence[str]) -> bool:
        return bool(pd.to_numeric(pd.Series(cells), errors="coerce").notna().all())

    with reading(path, "a table in UTF-8", "; spreadsheets save it so as 'CSV UTF-8'") as raw:
        binary = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
        text = io.TextIOWrapper(io.BufferedReader(binary), "utf-8-sig", newline="")
        first = text.readline()
        spaced = first.strip().split(" ")
        marks = ";,\t" if ";" in first else ",\t"  # as many commas as semicolons are decimal ones
        separator = " " if len(spaced) > 1 and numbers(spaced) else max(marks, key=first.count)
        text.seek(0)
        rows = csv.reader(text, delimiter=separator)
        lines = [(rows.line_num, row) for row in rows if row]
        # Python's reader takes all that follows a quote which is never closed for one cell.
        ends_quoted = any("\n" in cell for cell in lines[-1][1]) if lines else False
        if ends_quoted and not text.seek(0) and sum(line.count('"') for line in text) % 2:
            begun = lines[-2][0] + 1 if len(lines) > 1 else 1
            raise UserError(f"{path}: a quote in line {begun} is not closed; close it, or take it out")
    if not lines:
        raise UserError(f"{path}: the file is empty")
    header, notes, problems = [cell.strip() for cell in lines[0][1]], [], []
    if numbers([cell.replace(",", ".") for cell in header]):
        header = [f"c{k}" for k in range(len(header))]
        notes.append(f"no line of column names: columns are called c0 ... c{len(header) - 1}.")
    else:
        lines = lines[1:]
        if doubtful := [cell for cell in header if numbers([cell])]:
            mend = "put a line of names before it if it is a row of values"
            notes.append(f"the first line names the columns, one of them '{doubtful[0]}'; {mend}.")
    fitting = [(number, row) for number, row in lines if len(row) == len(header)]
    bad = [(number, row) for number, row in lines if len(row) != len(header)]
    if bad and skip_bad:
        notes.append(f"{len(bad)} line(s) with another number of cells than the first are left out.")
    elif bad:
        more = f" ({len(bad)} such lines)" if len(bad) > 1 else ""
        problems.append(f"line {bad[0][0]} has {len(bad[0][1])} cells, the first line has {len(header)}{more}")
    index = pd.Index([number for number, _ in fitting], name="line", dtype=int)
    frame = pd.DataFrame([row for _, row in fitting], index, header, dtype=str)
    note_down(frame, notes=notes, problems=problems)
    return without_counter(frame) if header[0] == "" and "" not in header[1:] else frame


def row_groups(path: Path) -> int:
    """Number of row groups of a Parquet file; errors as of :func:`read`."""
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
        frame = frame.set_axis(pd.RangeIndex(before, before + len(frame))).set_axis(map(str, names), axis=1)
    note_down(frame, notes=[f"the index of the data frame is left out: {', '.join(index)}."] if index else [])
    return frame


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """A Parquet file, open."""
    parquet = needed("pyarrow.parquet", "tables", f"{path}: Parquet")
    with reading(path, "Parquet") as file:
        yield parquet.ParquetFile(file)
