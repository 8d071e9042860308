"""What a reproduction leaves: tables with published and measured values side by side, figures, and what was shrunk."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchcdm import __version__
from torchcdm.runtime.files import write_file, write_json

Cell = str | float | int | None
"""One value of a table; None is printed as a dash."""


@dataclass(frozen=True)
class Table:
    """Rows under named columns.

    Attributes:
        title: What it shows, with the data and the unit where all columns share them.
        columns: Names.
        rows: Values, one for each column.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def markdown(self) -> str:
        """As Markdown: numbers right-aligned with four significant digits."""
        texts = [[cell_text(cell) for cell in row] for row in self.rows]
        numeric = [all(not isinstance(row[i], str) for row in self.rows) for i in range(len(self.columns))]
        rule = ["---:" if right else "---" for right in numeric]
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, rule, *texts)]
        return "\n".join([f"**{self.title}**", "", *lines])


@dataclass(frozen=True)
class Figure:
    """A file with its caption."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Result:
    """Everything that one reproduction found.

    Attributes:
        tables: At least one.
        figures: Drawn files.
        scaled_down: How this run is smaller than the published one, one sentence each; empty where it is not.
        notes: What was found, and how numbers are to be read, one sentence each.
    """

    tables: tuple[Table, ...]
    figures: tuple[Figure, ...] = ()
    scaled_down: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def write_result(
    result: Result, folder: Path, name: str, title: str, scale: str, options: str = ""
) -> Path:
    """``NAME-SCALE.md`` and ``NAME-SCALE.json`` in ``folder``; the path of the first."""
    stem = f"{name}-{scale}"
    command = f"python -m studies reproduce {name} --scale {scale}{options} --out DIR"
    versions = {"torchcdm": __version__, "torch": torch.__version__, "python": platform.python_version()}
    content: dict[str, Any] = {
        "name": name,
        "title": title,
        "scale": scale,
        "command": command,
        "versions": versions,
        "scaled_down": list(result.scaled_down),
        "tables": [vars(table) for table in result.tables],
        "notes": list(result.notes),
        "figures": [{"file": figure.path.name, "caption": figure.caption} for figure in result.figures],
    }
    write_json(folder / f"{stem}.json", content)
    parts = [f"# {title}", f"    {command}"]
    parts += [table.markdown() for table in result.tables]
    for figure in result.figures:
        parts.append(f"![{figure.caption}]({_relative(figure.path, folder)})\n\n*{figure.caption}*")
    if result.notes:
        parts.append("\n".join(f"- {note}" for note in result.notes))
    if result.scaled_down:
        parts.append("## Scaled down\n\n" + "\n".join(f"- {line}" for line in result.scaled_down))
    path = folder / f"{stem}.md"
    write_file(path, "\n\n".join(parts) + "\n")
    return path


def cell_text(cell: Cell) -> str:
    """A value for a reader."""
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return str(cell)


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()
