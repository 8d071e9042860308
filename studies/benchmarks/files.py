"""The JSON files of benchmarks: rows, or one result a name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchcdm.runtime.files import write_json


def write_rows(rows: Sequence[Any], path: Path | None) -> None:
    """Dataclasses or mappings to ``{"rows": [...]}``; nothing without a path."""
    if path is not None:
        write_json(path, {"rows": [row if isinstance(row, Mapping) else asdict(row) for row in rows]})


def write_named(name: str, found: Mapping[str, Any], path: Path | None) -> None:
    """Puts a result under its name beside those that the file has; nothing without a path."""
    if path is not None:
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        write_json(path, kept | {name: found})
