"""What all tables share: result files, Markdown, names of likelihoods."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
ROOT = RESULTS.parent.parent

TITLES = {
    "one-pass": "one pass at level 0, dequantised",
    "one-pass-level": "one pass through a little noise",
    "one-pass-normalized": "**one pass, normalised**",
    "elbo": "**ELBO of its reverse chain**",
    "flow": "**probability flow**",
}


def read(name: str) -> Any:
    """A result file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def likelihood_rows(nll: dict[str, Any], model: str = "this model") -> list[tuple[float, list[str]]]:
    """The rows of a likelihood report that have a value, with what they are sorted by."""
    rows = []
    for row in nll["rows"]:
        if row["name"] in TITLES and row["value"] is not None:
            loose = "" if row["name"] in ("one-pass-normalized", "elbo", "flow") else "~"
            title = f"{model}, {TITLES[row['name']]}"
            rows.append((row["value"], [title, f"{loose}{row['value']:.3f}", f"{row['se']:.3f}", str(passes(row))]))
    return rows


def passes(row: dict[str, Any]) -> int:
    """Network evaluations of one draw: averages over several draws are no other likelihood."""
    return 1 if row["name"].startswith("one-pass") else row["nfe"]


def rate(per_second: float) -> str:
    """Samples a second in three digits."""
    return f"{float(f'{per_second:.3g}'):,.6g}" if per_second < 1000 else f"{float(f'{per_second:.3g}'):,.0f}"
