"""Writes the tables of README.md and docs/*.md from the result files beside this script.

    python docs/results/write_tables.py            # writes them
    python docs/results/write_tables.py --check    # exit code 1 where a page and its results differ

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is a function of :data:`TABLES`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent
ROOT = RESULTS.parent.parent
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

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


def likelihood_rows(nll: dict[str, Any]) -> list[tuple[float, list[str]]]:
    """The rows of a likelihood report that have a value, with what they are sorted by."""
    rows = []
    for row in nll["rows"]:
        if row["name"] in TITLES and row["value"] is not None:
            loose = "" if row["name"] in ("one-pass-normalized", "elbo", "flow") else "~"
            title = f"this model, {TITLES[row['name']]}"
            rows.append((row["value"], [title, f"{loose}{row['value']:.3f}", f"{row['se']:.3f}", str(passes(row))]))
    return rows


def passes(row: dict[str, Any]) -> int:
    """Network evaluations of one draw: averages over several draws are no other likelihood."""
    return 1 if row["name"].startswith("one-pass") else row["nfe"]


def demo() -> str:
    """What ``make demo`` reports, best first."""
    report = read("digits")
    rows = likelihood_rows(report["nll"])
    for row in report["baselines"]:
        rows.append((row["value"], [row["name"], f"{row['value']:.3f}", f"{row['se']:.3f}", ""]))
    images = f"handwritten digits, {report['data']['count']} test images"
    head = [images, report["nll"]["unit"], "s.e.", "network passes"]
    return markdown(head, (cells for _, cells in sorted(rows)))


def step_cost(network: str) -> str:
    """Seconds and ratios of the steps of a network and of its DDM."""
    rows = {row["name"]: row for row in read("step_cost")["rows"]}
    steps = {
        "denoising-step": "denoising",
        "training-step": "training",
        "guided-step": "guided",
        "one-pass-likelihood": "one-pass likelihood",
    }
    rivals = [key for key in rows[f"{network}/denoising-step"] if key.startswith("ratio_to_")]
    head = ["step", "CDM, ms", "DDM, ms", *(f"ratio to {key[9:].replace('ddm', 'the DDM')}" for key in rivals)]
    lines = []
    for step, title in steps.items():
        own, other = rows[f"{network}/{step}"], rows.get(f"{network}-ddm/{step}")
        baseline = "1 evaluation" if other is None else f"{1e3 * other['seconds']:.0f}"
        ratios = [f"{own[key]:.2f}" if key in own else "" for key in rivals]
        lines.append([title, f"{1e3 * own['seconds']:.0f}", baseline, *ratios])
    return markdown(head, lines)


def training_memory() -> str:
    """What training adds to the memory."""
    rows = read("training_memory")["rows"]
    cells = ([row["name"].split("/")[0], f"{row['bytes'] / 2**20:.0f}", f"{row['ratio_to_ddm']:.2f}"] for row in rows)
    return markdown(["network", "MiB", "ratio to the DDM"], cells)


def digits_seeds() -> str:
    """The likelihoods of the digits preset, a row for each seed."""
    reports = {0: read("digits")["nll"], 1: read("digits_seed1")["nll"]}
    names = ("one-pass", "one-pass-level", "one-pass-normalized", "elbo", "flow")
    head = ["seed", "one pass, level 0", "one pass, level 5", "one pass, normalised", "ELBO", "flow",
            "log2 Z / d", "ESS", "one pass − flow: mean, spread"]  # fmt: skip
    lines = []
    for seed, nll in reports.items():
        values = {row["name"]: row["value"] for row in nll["rows"]}
        z, gap = nll["log2_z_per_dim"], nll["gap_to_flow"]
        lines.append([
            str(seed), *(f"{values[name]:.3f}" for name in names),
            f"{z['value']:.3f} [{z['low']:.3f}, {z['high']:.3f}]", f"{z['ess']:.0f}",
            f"{gap['mean']:+.3f}, {gap['sd']:.3f}",
        ])  # fmt: skip
    return markdown(head, lines)


def fashion() -> str:
    """The likelihood report of the Fashion-MNIST preset."""
    nll = read("fashion")
    lines = [cells for _, cells in sorted(likelihood_rows(nll))]
    head = [f"Fashion-MNIST, {nll['data']['count']} test images", nll["unit"], "s.e.", "network passes"]
    return markdown(head, lines)


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "digits-seeds": digits_seeds,
    "fashion": fashion,
    "step-cost-encoder": lambda: step_cost("encoder"),
    "step-cost-paper": lambda: step_cost("paper"),
    "training-memory": training_memory,
}


def rewritten(text: str) -> str:
    """A page with its tables made anew.

    Raises:
        KeyError: A table that no function makes.
    """
    return BLOCK.sub(lambda block: block[1] + TABLES[block[2]]() + block[3], text)


def pages() -> list[Path]:
    """The pages that have tables."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [path for path in found if BLOCK.search(path.read_text(encoding="utf-8"))]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page is stale")
    options = parser.parse_args(arguments)
    stale = False
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if rewritten(text) != text:
            stale = True
            print(f"{path.relative_to(ROOT)}: differs from docs/results")
            if not options.check:
                path.write_text(rewritten(text), encoding="utf-8")
    return int(options.check and stale)


if __name__ == "__main__":
    sys.exit(main())
