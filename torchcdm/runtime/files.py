"""Files written so that a crash leaves no half of one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchcdm.errors import UserError

TEMPORARY = ".writing-"
"""Prefix of what is being written; left behind by a crash, it is cleaned up and never read."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write, a full disk for one, into one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be written ({reason}); nothing that was there before is lost") from error


def write_file(path: Path, content: bytes | str) -> None:
    """Written beside, flushed to the disk, then renamed: a reader sees the old file or the new one.

    Raises:
        UserError: The disk is full or the folder read-only; the old file is still there.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_through(temporary, content)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        flush_folder(path.parent)


def write_through(path: Path, content: bytes | str) -> None:
    """Writes and flushes to the disk."""
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Makes renames in a folder survive a power failure, where the system lets folders be flushed."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def without_nan(value: Any) -> Any:
    """Plain values with null in place of numbers that are not finite, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """As :func:`write_file`, indented; null in place of numbers that are not finite."""
    write_file(path, json.dumps(without_nan(value), indent=1, allow_nan=False) + "\n")
