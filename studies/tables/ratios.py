"""Tables of density ratios, information and tests."""

from __future__ import annotations

from typing import Any

from studies.tables.reading import markdown, read


def mutual_information() -> str:
    """The ladder, a row for each rung; a dash where the pairs were not asked for their information."""

    def told(r: dict[str, Any]) -> str:
        return "–" if r.get("information") is None else f"{r['information']:.2f}"

    head = ["pairs", "Gaussian residual", "d", "steps", "exact, nats", "estimate", "error", "RMSE of a point",
            "two Gaussians", "network's weight", "s", "information of x and y"]  # fmt: skip
    lines = [
        [r["kind"], r["residual"], str(r["dim"]), str(r["steps"]), f"{r['exact']:.2f}", f"{r['estimate']:.2f}",
         f"{100 * r['error']:+.1f} %", f"{r['rmse']:.2f}", f"{r['gaussians']:.2f}", f"{100 * r['weight']:.0f} %",
         f"{r['seconds']:.0f}", told(r)]
        for r in read("mutual_information")["rows"]
    ]  # fmt: skip
    return markdown(head, lines)


PUBLISHED = {
    "cFMMI": {40: 10.544, 80: 21.073, 160: 41.750, 320: 90.769},
    "jFMMI": {40: 10.590, 80: 20.581, 160: 44.007, 320: 80.012},
    "InfoBridge": {320: 81.167},
}
"""Nats of the unbent ladder, d/2 columns in x and in y: FMMI (arXiv 2511.08552) from github.com/VanessB/mutinfo,
source/evaluate/tables/highdim/TRE; InfoBridge (2502.01383) from the notebook in github.com/SKholkin/infobridge."""


def mutual_information_published() -> str:
    """The rotated ladder beside what others published; a dash where there is no estimate."""
    rows = {(r["residual"], r["dim"]): r for r in read("mutual_information")["rows"] if r["kind"] == "rotated"}
    lines = []
    for dim in PUBLISHED["jFMMI"]:
        on, off, others = rows.get(("on", dim), {}), rows["off", dim], (of.get(dim) for of in PUBLISHED.values())
        values = [off["exact"], on.get("information"), on.get("estimate"), off["estimate"], *others]
        lines.append([str(dim), *("–" if value is None else f"{value:.2f}" for value in values)])
    head = ["d", "exact, nats", "`mutual_information`", "`DensityRatio`", "without Gaussian residual", *PUBLISHED]
    return markdown(head, lines)


def ratio_pairs() -> str:
    """A row for each case: means and RMSE of points of the numerator, by three estimators; a dash without a blend."""

    def weights(note: str) -> str:
        parts = note.split()
        found = dict(zip(parts[::2], parts[1::2], strict=False))
        return ", ".join(f"{name} {w}" for name, w in found.items() if float(w)) if "gaussians" in found else "–"

    cases: dict[tuple[str, float, int], dict[str, dict[str, Any]]] = {}
    for r in read("ratio_pairs")["rows"]:
        cases.setdefault((r["kind"], r["nats"], r["rows"]), {})[r["estimator"]] = r
    names = ("ours", "gaussians", "classifier")
    head = ["pairs", "rows", "exact, nats", "torchcdm", "two Gaussians", "classifier", "RMSE, torchcdm",
            "two Gaussians", "classifier", "s", "blend"]  # fmt: skip
    lines = [
        [kind, str(rows), f"{by['ours']['exact']:.2f}",
         *(f"{by[name]['estimate']:.2f} ({100 * by[name]['error']:+.1f} %)" for name in names),
         *(f"{by[name]['rmse']:.2f}" for name in names), f"{by['ours']['seconds']:.0f}", weights(by["ours"]["note"])]
        for (kind, _, rows), by in cases.items()
    ]  # fmt: skip
    return markdown(head, lines)


def two_samples() -> str:
    """How often each test rejects at 5 %, a row for each difference; the best bold, where there is one."""
    names = {"torchcdm": "torchcdm", "mmd": "MMD", "energy": "energy distance", "c2st": "boosted trees (C2ST)"}
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for r in read("two_samples")["rows"]:
        cases.setdefault((r["difference"], r["columns"], r["rows"], r["strength"]), {})[r["test"]] = r
    lines = []
    # Nulls first, images last.
    for case in sorted(cases, key=lambda case: (case[0] != "null", case[1] == 0)):
        (kind, columns, rows, strength), by = case, cases[case]
        rates, repeats = {name: by[name]["rejected"] for name in names}, {by[name]["repeats"] for name in names}
        best = max(rates.values()) if kind != "null" else None
        cells = [f"**{100 * rate:.0f} %**" if rate == best else f"{100 * rate:.1f} %" if best is None else
                 f"{100 * rate:.0f} %" for rate in rates.values()]  # fmt: skip
        title = "none" if kind == "null" else f"{kind}, {strength:g}" if strength else kind
        shown = " and ".join(map(str, sorted(repeats, reverse=True)))
        lines.append([title, str(columns) if columns else "8x8", str(rows), shown, *cells])
    return markdown(["difference", "columns", "samples of each", "repeats", *names.values()], lines)


def ratio_peers() -> str:
    """RMSE of the log ratio, dimensions across."""
    rows = read("ratio_peers")["rows"]
    dims, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("dim", "estimator"))
    values = {(row["estimator"], row["dim"]): row["rmse"] for row in rows}
    best = {dim: min(values[name, dim] for name in names) for dim in dims}
    titles = {
        "joint": "torchcdm", "gaussians": "two Gaussians",
        "logistic": "logistic regression", "boosting": "gradient-boosted trees", "kliep": "KLIEP", "rulsif": "RuLSIF",
        "constant": "log ratio 0",
    }  # fmt: skip
    lines = []
    for name in names:
        cells = (f"**{v:.2f}**" if v == best[dim] else f"{v:.2f}" for dim in dims for v in [values[name, dim]])
        lines.append([titles[name], *cells])
    return markdown(["RMSE of the log ratio, nats", *(f"d = {dim}" for dim in dims)], lines)


def covariate_shift() -> str:
    """Errors and sample sizes of weighted regression."""
    titles = {"exact": "exact", "none": "none", "torchcdm": "torchcdm",
              "torchcdm, 0.999": "torchcdm, `clip=0.999`", "gaussians": "two Gaussians",
              "logistic": "logistic regression"}  # fmt: skip
    lines = [
        [str(r["columns"]), titles[r["weights"]], f"{r['error']:.2f}", f"{100 * r['relative']:+.1f} %",
         f"{100 * r['effective']:.0f} %", "" if r["rmse"] is None else f"{r['rmse']:.2f}"]
        for r in read("covariate_shift")["rows"]
    ]  # fmt: skip
    head = ["columns", "weights", "error on the target", "against exact weights", "effective sample size",
            "RMSE of the log ratio"]  # fmt: skip
    return markdown(head, lines)


def mixture_weights() -> str:
    """Errors of the weights of 40 modes."""
    lines = [
        [str(r["dim"]), r["contender"], f"{r['largest']:.4f}", f"{r['mean']:.4f}", f"{r['log_error']:.2f}",
         "–" if r["contender"] in ("start", "exact", "counts") else str(r["steps"]), f"{r['seconds']:.0f}"]
        for r in read("mixture_weights")["rows"]
    ]  # fmt: skip
    head = ["d", "from", "largest error", "mean error", "RMSE of log weight", "steps", "s"]
    return markdown(head, lines)


def mi_tasks() -> str:
    """Mutual information of the benchmark's tasks, and how many marks each estimator has."""
    rows, content = (read("mi_tasks")[part] for part in ("rows", "marks"))
    given = dict.fromkeys(row["estimator"] for row in content)
    names = sorted(given, key=lambda name: (name != "cdm", not name.startswith("cdm")))
    found = {(row["task"], row["estimator"]): row for row in content}
    lines = []
    for task, truth in dict.fromkeys((row["task"], row["truth"]) for row in content):
        own = [found.get((task, name)) for name in names]
        cells = ["–" if r is None else f"**{r['mean']:.2f}**" if r["mark"] else f"{r['mean']:.2f}" for r in own]
        lines.append([task, f"{truth:.2f}", *cells])
    own = [[row for row in content if row["estimator"] == name] for name in names]
    counts = [f"{sum(r['mark'] for r in of)} of {len(of)}" for of in own]
    spent = [[row["seconds"] for row in rows if row["estimator"] == name] for name in names]
    lines += [["marks", "", *counts], ["s a task", "", *(f"{sum(s) / len(s):.1f}" for s in spent)]]
    return markdown(["task", "truth", *names], lines)


def real_shift() -> str:
    """How much larger than with exact weights the error is, a row for each table and shift."""
    titles = {"none": "none", "torchcdm": "torchcdm", "balanced": "balanced", "trees": "boosted trees",
              "ulsif": "uLSIF", "kliep": "KLIEP"}  # fmt: skip
    means = ("exact", "torchcdm", "balanced")
    cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for r in read("real_shift")["rows"]:
        cases.setdefault((r["table"], r["shift"]), {})[r["weights"]] = r
    excess = {name: [100 * (by[name]["error"] / by["exact"]["error"] - 1) for by in cases.values()] for name in titles}
    off = {name: [abs(by[name]["mean_error"]) for by in cases.values()] for name in ("exact", *titles)}
    lines = [
        [table, shift, *(f"{excess[name][k]:+.1f} %" for name in titles),
         *(f"{off[name][k]:.3f}" for name in means)]
        for k, (table, shift) in enumerate(cases)
    ]  # fmt: skip
    within = (f"{sum(value <= 5 for value in excess[name])} of {len(cases)}" for name in titles)
    lines.append(["within 5 %", "", *within, *[""] * len(means)])
    middle = (f"{sum(off[name]) / len(cases):.3f}" for name in (*titles, *means))
    lines.append(["mean of the labels off by", "", *middle])
    return markdown(["table", "shift", *titles.values(), *(f"mean off, {name}" for name in means)], lines)
