"""The files of a run: where they are, whose they are, and the step log."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from torchcdm.errors import UserError
from torchcdm.runtime.artefact import parse_json, read_json, read_sealed, settle
from torchcdm.runtime.files import TEMPORARY, without_nan, write_file, writing
from torchcdm.runtime.reading import read_bytes


class RunFolder:
    """Paths in the folder of a run; who writes here holds ``lock``, which stays and says whose the folder is."""

    def __init__(self, root: str | Path) -> None:
        self.root = root = Path(root)
        self.config = root / "config.yaml"
        self.model = root / "model.safetensors"
        self.model_info = root / "config.json"
        self.curvatures = root / "curvatures.json"
        self.states = root / "state"
        self.metrics = root / "metrics.jsonl"
        self.samples = root / "samples"
        self.plots = root / "plots"
        self.report = root / "report.json"
        self.lock = root / ".torchcdm-lock"

    def holds_run(self) -> bool:
        """Whether there is a model or a state that a new run would overwrite."""
        return os.path.exists(self.model) or (os.path.isdir(self.states) and any(self.states.glob("step-*")))

    def _ours(self) -> bool:
        """Whether what is there was written here; a copy may lack the lock."""
        with suppress(UserError):
            return bool(read_sealed(self.model_info))
        return os.path.exists(self.lock) or any(self.states.glob("step-*"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder, clears what a crash left; UserError where another process writes, or others wrote."""
        with writing(self.root):
            for path in () if self._ours() else vars(self).values():
                if path != self.root and path.exists():
                    what = f"holds {path.name}, which no run wrote"
                    raise UserError(f"{self.root}: {what}; choose another folder, or remove it")
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.lock, timeout=0)
            try:
                lock.acquire()
            except Timeout:
                what = "another process is writing to it, such as a training"
                raise UserError(f"{self.root}: {what}; wait for its end, or choose another folder") from None
        try:
            with writing(self.root):
                for path in self.root.glob("*.json"):
                    settle(path)
                for path in (*self.root.glob(f"{TEMPORARY}*"), *self.states.glob(f"{TEMPORARY}*")):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            yield
        finally:
            lock.release()
            with suppress(OSError):
                self.lock.touch()  # some versions of filelock remove it


def read_report(path: Path) -> dict[str, Any]:
    """What ``report.json`` holds; nothing where there is none, or it is damaged: a report can be made again."""
    with suppress(UserError):
        return read_json(path)
    return {}


def append_metrics(path: Path, values: Mapping[str, Any]) -> None:
    """One more line of ``metrics.jsonl``."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(without_nan(values), allow_nan=False) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; those that a crash cut short or that hold something else are left out."""
    lines = []
    with suppress(UserError):
        lines += filter(None, map(_numbers, read_bytes(path).splitlines()))
    return lines


def cut_metrics(path: Path, step: int) -> None:
    """Removes the lines after ``step``, which a resumed run writes again, and one that a crash cut short. Others that
    cannot be read stay; UserError where the whole file cannot."""
    if path.exists():
        *lines, rest = read_bytes(path).split(b"\n")
        cut_short = rest.startswith(b"{") and not _numbers(rest)
        lines += [rest] if rest and not cut_short else []
        write_file(path, b"".join(line + b"\n" for line in lines if _numbers(line).get("step", step) <= step))


def _numbers(line: bytes) -> dict[str, Any]:
    """What a line of ``metrics.jsonl`` holds; nothing where it cannot be read."""
    with suppress(ValueError, RecursionError):
        values = parse_json(line.decode(errors="replace"))
        numbers = isinstance(values, dict) and all(isinstance(v, int | float | None) for v in values.values())
        if numbers and type(values.get("step")) is int:
            return values
    return {}
