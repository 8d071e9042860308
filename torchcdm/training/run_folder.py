"""The files of a run: where they are, and the step log."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchcdm.runtime.files import TEMPORARY, without_nan, write_file, writing


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
