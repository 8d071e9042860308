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


def rare_digits() -> str:
    """Estimates of a model's rare images, beside particles that no threshold has moved."""
    head = ["ink above", "10³ P, without a threshold", "particles", "10³ P, by splitting, mean", "CV",
            "95 % intervals that hold it", "evaluations"]  # fmt: skip
    lines = [
        [f"{r['threshold']:.1f}", f"{1000 * r['p']:.2f} ± {1000 * r['p_se']:.2f}", f"{r['draws']:,}",
         f"{1000 * r['p'] * r['mean_over_truth']:.2f}", f"{r['cv']:.2f}",
         f"{round(r['coverage'] * r['repeats'])} of {r['repeats']}", f"{r['evaluations']:,.0f}"]
        for r in read("rare_digits")["rows"]
    ]  # fmt: skip
    return markdown(head, lines)


def posterior_coverage() -> str:
    """How often credible intervals hold the truth."""
    head = ["model", "known", "truths", "method", "evaluations", "seconds", "effective", "90 % intervals hold",
            "PSNR of the mean, dB", "of endless draws"]  # fmt: skip
    lines = []
    for r in read("posterior_coverage").values():
        name = f"{r['particles']} particles" if r["particles"] else f"azula {r['method'].upper()}"
        lines.append([r["model"], ("test " if r["test"] else "") + r["measurement"], str(r["truths"]), name,
                      f"{r['evaluations']:,.0f}", f"{r['cpu_seconds']:.1f}",
                      f"{r['ess']:.0f}" if r["particles"] else "",
                      f"{r['coverage']:.1%} ± {r['se']:.1%}", f"{r['psnr']:.1f}",
                      f"{r['psnr_endless']:.1f}"])  # fmt: skip
    return markdown(head, lines)


def composing(name: str, *first: str) -> str:
    """Accuracy of a classifier, and errors of modes, by method."""
    found: dict[tuple[int, str], dict[str, dict[str, Any]]] = {}
    for r in read(name)["rows"]:
        found.setdefault((r["d"], r["case"]), {})[r["method"]] = r
    ways = (*first, "exact", "particles", "accepted", "unadjusted", "sum of scores")
    head = ["dimensions", "target", "effective", *ways]
    lines = [
        [str(d), case, f"{by['particles']['ess']:.0%}",
         *(f"{by[way]['c2st']:.3f} / {by[way]['modes']:.3f}" for way in ways)]
        for (d, case), by in found.items()
    ]  # fmt: skip
    return markdown(head, lines)


def composed_classes() -> str:
    """Shares of images that a classifier calls both of two classes, one of them, or none, by how they were drawn."""
    rows = [r for name in ("composed_classes_digits", "composed_classes_fashion") for r in read(name)["rows"]]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for r in rows:
        found.setdefault(" and ".join(r["pair"]), {})[r["way"]] = r
    ways = list(dict.fromkeys(r["way"] for r in rows))

    def cell(r: dict[str, Any] | None) -> str:
        return "–" if r is None else ", ".join(f"{r[name]:.0%}" for name in ("both", "either", "not"))

    lines = [[pair, *(cell(by.get(way)) for way in ways)] for pair, by in found.items()]
    return markdown(["classes", *ways], lines)
