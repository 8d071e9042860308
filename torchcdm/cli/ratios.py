"""``cdm ratio``, ``cdm mi``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchcdm.cli.arguments import add_command, check_writable, tell
from torchcdm.runtime.files import check_output, write_rows

if TYPE_CHECKING:
    from torchcdm.apps.ratio import DensityRatio, Scores


def add_commands(commands: Any) -> None:
    """Adds the commands."""
    parser = add_command(
        commands, run_ratio, "ratio", "density ratio of two data sets: numerator over denominator, at the query",
        "cdm ratio customers-2026.csv customers-2020.csv customers-2020.csv --csv weights.csv",
        "skip-bad seed quiet json device",
    )  # fmt: skip
    kinds = "a table, an array, a folder of images, or a SPEC"
    for name, what in (("numerator", "samples of p"), ("denominator", "samples of q"), ("query", "where to take p/q")):
        parser.add_argument(name, metavar=name.upper(), help=f"{what}: {kinds}")
    parser.add_argument("--method", default="joint", help="joint or separate (joint)")
    parser.add_argument("--clip", type=float, metavar="P", help="weights above this quantile are set to it: 0.999")
    parser.add_argument(
        "--discrete", default="dequantize", help="columns of few values: dequantize or error (dequantize)"
    )
    parser.add_argument("--size", metavar="HxW", help="images are resized to this")
    parser.add_argument("--channels", type=int, metavar="N", help="images are converted to so many channels")
    parser.add_argument("--steps", type=int, metavar="N", help="most training steps")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="log ratio, weight and flag of every sample")
    parser.add_argument("--save", metavar="DIR", type=Path, help="keep the ratio, for torchcdm.DensityRatio.load")
    parser.add_argument("--test", action="store_true", help="also test whether the two sets differ, on halves of both")
    parser = add_command(
        commands, run_information, "mi", "mutual information of two tables, row by row",
        "cdm mi weather.csv sales.csv", "seed quiet json device",
    )  # fmt: skip
    for name in ("x", "y"):
        parser.add_argument(name, metavar=name.upper(), help="a table, an array, or a SPEC")
    parser.add_argument("--steps", type=int, metavar="N", help="most training steps")


def run_ratio(options: argparse.Namespace) -> int:
    """Fits, scores, and says how far to trust it."""
    from torchcdm.apps.ratio import DensityRatio, effective_sample_size, importance_weights
    from torchcdm.apps.ratio.checks import check_clip
    from torchcdm.data import check_spec, parse_size, spec_of
    from torchcdm.runtime.devices import chosen_device

    check_clip(options.clip)
    check_spec(spec_of(options.query))
    inputs = (options.numerator, options.denominator, options.query)
    check_writable(options.csv, inputs)
    check_writable(options.json, inputs)
    if options.save is not None:
        check_output(options.save / "ratio.json", kind="ratio")
    size = None if options.size is None else parse_size(options.size)
    ratio = DensityRatio(
        options.seed,
        options.method,
        options.discrete,
        device=str(chosen_device(options.device)),
        progress=not options.quiet,
        data={"size": size, "channels": options.channels, "skip_bad": options.skip_bad},
        **({} if options.steps is None else {"steps": options.steps}),
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
    values = _numbers(ratio, scores, effective_sample_size(weights))
    text = _text(ratio, values["query"])
    if options.test:
        test = ratio.two_sample_test(seed=options.seed)
        shown = ("p_value", "statistic", "numerator_rows", "denominator_rows", "columns")
        values["test"], text = {name: getattr(test, name) for name in shown}, f"{text}\n\n{test.text()}"
    tell(options.json, text, values)
    return 0


def run_information(options: argparse.Namespace) -> int:
    """Says what the rows of one table tell of those of the other, and how far to trust it."""
    from torchcdm.apps.ratio import mutual_information
    from torchcdm.runtime.devices import chosen_device

    check_writable(options.json, (options.x, options.y))
    settings = {} if options.steps is None else {"steps": options.steps}
    device, progress = str(chosen_device(options.device)), not options.quiet
    found = mutual_information(options.x, options.y, options.seed, device=device, progress=progress, **settings)
    tell(options.json, found.text("mutual information"), asdict(found))
    return 0


def _numbers(ratio: DensityRatio, scores: Scores, effective: float) -> dict[str, Any]:
    import numpy as np

    low, median, high = np.quantile(scores.log_ratio, [0, 0.5, 1]).tolist()
    log_ratio = {"mean": float(scores.log_ratio.mean()), "min": low, "median": median, "max": high}
    return {
        "method": ratio.method,
        "counts": {"numerator": ratio.counts[1], "denominator": ratio.counts[0]},
        "query": {
            "count": len(scores.names),
            "outside": int(scores.outside.sum()),
            "log_ratio": log_ratio,
            "effective_sample_size": effective,
        },
        "held_out": asdict(ratio.held_out),
        "notes": list(ratio.notes),
    }


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
