"""The files of a run: where they are, how they are written so that a crash leaves no half of one, the step log."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchcdm.errors import UserError

TEMPORARY = ".writing-"
"""Prefix of what is being written; left behind by a crash, it is cleaned up and never read."""


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run.

    Attributes:
        root: The folder.
    """

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def model(self) -> Path:
        """EMA weights at the best validation value."""
        return self.root / "model.safetensors"

    @property
    def model_info(self) -> Path:
        """What the weights are of."""
        return self.root / "config.json"

    @property
    def states(self) -> Path:
        """What a resumed run starts from."""
        return self.root / "state"

    @property
    def metrics(self) -> Path:
        """One JSON object a logging step."""
        return self.root / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Grids of samples and their manifest."""
        return self.root / "samples"

    @property
    def plots(self) -> Path:
        """Figures."""
        return self.root / "plots"

    @property
    def report(self) -> Path:
        """Numbers at the end."""
        return self.root / "report.json"

    def holds_run(self) -> bool:
        """Whether there is a model or a state that a new run would overwrite."""
        return self.model.exists() or any(self.states.glob("step-*"))

    def make(self) -> None:
        """Creates the folder and removes what a crash left half written.

        Raises:
            UserError: It cannot be made or written to.
        """
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            for folder in (self.root, self.states):
                for path in folder.glob(f"{TEMPORARY}*"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


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


def append_metrics(path: Path, values: Mapping[str, Any]) -> None:
    """One more line of ``metrics.jsonl``."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(without_nan(values), allow_nan=False) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; one that a crash cut short is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def cut_metrics(path: Path, step: int) -> None:
    """Removes the lines after ``step``, which a resumed run writes again."""
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        write_file(path, "".join(json.dumps(line) + "\n" for line in kept))
