"""Tables of what is composed, rare or measured."""

from __future__ import annotations

from typing import Any

from studies.tables.reading import markdown, read


def rare_events() -> str:
    """Estimates of known small probabilities."""
    head = ["dimensions", "probability", "repeats", "mean / truth", "CV", "least possible CV", "95 % interval covers",
            "evaluations", "plain Monte Carlo, samples"]  # fmt: skip
    lines = [
        [str(r["d"]), f"{r['p']:.0e}", str(r["repeats"]), f"{r['mean_over_truth']:.3f}", f"{r['cv']:.3f}",
         f"{r['least_cv']:.3f}", f"{r['coverage']:.0%}", f"{r['evaluations']:,.0f}", f"{r['plain_samples']:.1e}"]
        for r in read("rare_events")["rows"]
    ]  # fmt: skip
    return markdown(head, lines)


def posterior_coverage() -> str:
    """How often credible intervals hold the truth."""
    head = ["model", "truths", "particles", "effective", "90 % intervals hold", "exact draws", "PSNR of the mean, dB"]
    lines = []
    for r in read("posterior_coverage").values():
        psnr = ", ".join(f"{name} {value:.1f}" for name, value in r["psnr"].items())
        lines.append([r["model"], str(r["truths"]), str(r["particles"]), f"{r['ess']:.0f}",
                      f"{r['coverage']:.1%} ± {r['se']:.1%}", f"{r['exact']:.1%}", psnr])  # fmt: skip
    return markdown(head, lines)


def composing() -> str:
    """Accuracy of a classifier, and errors of modes, by method."""
    found: dict[tuple[int, str], dict[str, dict[str, Any]]] = {}
    for r in read("composing")["rows"]:
        found.setdefault((r["d"], r["case"]), {})[r["method"]] = r
    ways = ("exact", "particles", "accepted", "unadjusted", "sum of scores")
    head = ["dimensions", "target", "effective", *ways]
    lines = [
        [str(d), case, f"{by['particles']['ess']:.0%}",
         *(f"{by[way]['c2st']:.3f} / {by[way]['modes']:.3f}" for way in ways)]
        for (d, case), by in found.items()
    ]  # fmt: skip
    return markdown(head, lines)
