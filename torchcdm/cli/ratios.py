"""``cdm ratio``, ``cdm mi``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import numpy as np

from torchcdm.apps.ratio import DensityRatio, effective_sample_size, importance_weights, mutual_information
from torchcdm.apps.ratio.checks import check_clip
from torchcdm.cli.arguments import given, tell
from torchcdm.data import check_spec, parse_size, spec_of
from torchcdm.runtime.files import check_output, write_rows
from torchcdm.runtime.processes import chosen_device


def ratio(options: argparse.Namespace) -> None:
    """Fits, scores, and says how far to trust it."""
    check_clip(options.clip)
    check_spec(spec_of(options.query))
    if options.save is not None:
        check_output(options.save / "ratio.json", kind="ratio")
    size = None if options.size is None else parse_size(options.size)
    ratio = DensityRatio(
        options.seed,
        options.discrete,
        device=str(chosen_device(options.device)),
        progress=not options.quiet,
        data={"size": size, "channels": options.channels, "skip_bad": options.skip_bad},
        **given(steps=options.steps),
    ).fit(options.numerator, options.denominator)
    scores = ratio.scores(options.query)
    weights = importance_weights(scores.log_ratio, options.clip)
    if options.save is not None:
        ratio.save(options.save)
    if options.csv is not None:
        rows = zip(scores.names, scores.log_ratio, weights, scores.outside, strict=True)
        write_rows(
            options.csv,
            ("row", "input", "log_ratio", "weight", "outside"),
            ((k, name, f"{log:.6g}", f"{weight:.6g}", int(out)) for k, (name, log, weight, out) in enumerate(rows)),
        )
    low, median, high = np.quantile(scores.log_ratio, [0, 0.5, 1]).tolist()
    values = {
        "blend": ratio.blend,
        "counts": {"numerator": ratio.counts[1], "denominator": ratio.counts[0]},
        "query": {
            "count": len(scores.names),
            "outside": int(scores.outside.sum()),
            "log_ratio": {"mean": float(scores.log_ratio.mean()), "min": low, "median": median, "max": high},
            "effective_sample_size": effective_sample_size(weights),
        },
        "held_out": asdict(ratio.held_out),
        "notes": list(ratio.notes),
    }
    text = _text(ratio, values["query"])
    if options.test:
        test = ratio.two_sample_test(seed=options.seed)
        shown = ("p_value", "statistic", "numerator_rows", "denominator_rows", "columns")
        values["test"], text = {name: getattr(test, name) for name in shown}, f"{text}\n\n{test.text()}"
    tell(options.json, text, values)


def mi(options: argparse.Namespace) -> None:
    """Says what the rows of one table tell of those of the other, and how far to trust it."""
    found = mutual_information(
        options.x, options.y, options.seed, device=str(chosen_device(options.device)), progress=not options.quiet,
        **given(steps=options.steps),
    )  # fmt: skip
    tell(options.json, found.text("mutual information"), asdict(found))


def _text(ratio: DensityRatio, query: dict[str, Any]) -> str:
    """The summary."""
    low, median, high = (query["log_ratio"][key] for key in ("min", "median", "max"))
    share = 100 * query["effective_sample_size"] / query["count"]
    lines = [*ratio.notes, "", "on held-out samples:", ratio.held_out.table(), "", f"query: {query['count']} samples"]
    lines.append(f"log p/q from {low:.3g} to {high:.3g} nats, median {median:.3g}")
    lines.append(f"weights: effective sample size {query['effective_sample_size']:.0f} ({share:.0f} %)")
    if query["outside"]:
        lines.append(f"{query['outside']} samples lie outside both data sets: their ratio is extrapolation")
    return "\n".join(lines)
