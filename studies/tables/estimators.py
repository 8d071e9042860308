"""Tables of estimators, anomaly scores and the exam."""

from __future__ import annotations

import re
from collections.abc import Iterator
from statistics import mean
from typing import Any

from studies.benchmarks.anomaly_sets import DEVELOPMENT, JUDGED
from studies.benchmarks.anomaly_tables import mean_ranks
from studies.tables.reading import markdown, rate, read

START, WEIGHTS = re.compile(r"its start has (-?[0-9.]+)"), re.compile(r"(\w+) (0\.\d+|1\.00)")
"""What the CDM of the exam notes of its network."""


def table_density() -> str:
    """Test log-likelihoods of tables."""
    titles = {"truth": "the density itself", "cdm": "CDM, one pass", "cdm-flow": "CDM, probability flow",
              "nsf": "zuko NSF", "maf": "zuko MAF", "gmm": "Gaussian mixture", "kde": "kernel density"}  # fmt: skip
    rows = read("table_density")["rows"]
    best: dict[str, float] = {}
    for r in rows:
        if r["name"] not in ("truth", "cdm"):
            best[r["table"]] = max(best.get(r["table"], r["nats"]), r["nats"])
    lines = []
    for r in rows:
        loose = r["name"] == "cdm" and not usable(r["setting"])
        value = f"{'~' if loose else ''}{r['nats']:.2f}"
        cell = f"**{value}**" if r["nats"] == best[r["table"]] else value
        lines.append([r["table"], titles[r["name"]], cell, f"{r['se']:.2f}", str(r["rows"]), f"{r['seconds']:.0f}"])
    return markdown(["table", "density", "nats a row", "s.e.", "test rows", "s of fitting"], lines)


def usable(setting: str) -> bool:
    """Whether the estimate of log Z that a row of ``table_density`` tells of was used."""
    return int(setting.rsplit(" ", 1)[1]) >= 20


def conditional_density() -> str:
    """Divergences from exact posteriors."""
    titles = {"cdm": "CDM, one pass", "cdm-flow": "CDM, probability flow", "nsf": "zuko NSF",
              "linear": "linear regression, Gaussian"}  # fmt: skip
    lines = [
        [r["simulator"], titles[r["name"]], f"{r['kl']:.3f}", f"{r['se']:.3f}",
         "" if r["c2st"] is None else f"{r['c2st']:.3f}", "" if r["log_z"] is None else f"{r['log_z']:+.3f}",
         f"{r['seconds']:.0f}"]
        for r in read("conditional_density")["rows"]
    ]  # fmt: skip
    return markdown(["simulator", "posterior", "KL, nats", "s.e.", "C2ST", "log Z", "s of fitting"], lines)


def exam_sets() -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any], float, float]]:
    """Kind, data, the marks of the CDM and of the best of the others, the lead of the CDM and its error."""
    sets: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for mark in read("exam")["marks"]:
        sets.setdefault((mark["kind"], mark["data"]), {})[mark["contender"]] = mark
    for (kind, data), marks in sets.items():
        own = marks.pop("cdm")
        other = max(marks.values(), key=lambda mark: mark["value"])
        # Marks say how far behind the best: the CDM where another is, else that other.
        lead, error = (-own["behind"], own["behind_se"]) if own["behind"] else (other["behind"], other["behind_se"])
        yield kind, data, own, other, lead, error


def exam() -> str:
    """A line a data set of the exam."""
    lines = []
    for kind, data, own, other, lead, error in exam_sets():
        said = f"**{lead:+.3f}** ± {error:.3f}" if lead >= -error else f"{lead:+.3f} ± {error:.3f}"
        start, weights = START.match(own["note"]), WEIGHTS.findall(own["note"]) if kind == "ratio" else ()
        shown = [(float(value), name) for name, value in weights if name != "offset"]
        said_of = ", ".join(f"{value:.0%} {name}" for value, name in shown if value)
        network = f"{own['value'] - float(start[1]):+.3f}" if start else said_of
        lines.append([kind, data, f"{own['value']:.3f}", f"{other['value']:.3f}, {other['contender']}", said, network,
                      f"{own['seconds']:.0f}"])  # fmt: skip
    return markdown(["asked", "data", "CDM", "best of the others", "lead", "of the network", "s"], lines)


def exam_summary() -> str:
    """Counts of data sets by kind."""
    counts: dict[str, list[int]] = {}
    for kind, _, _, _, lead, error in exam_sets():
        row = counts.setdefault(kind, [0] * 4)
        for k, yes in enumerate((True, lead >= -error, lead > max(2 * error, 5e-4), lead < -2 * error)):
            row[k] += yes
    counts["all"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    head = ["asked", "sets", "best, or within one s.e.", "ahead by more than two", "behind by more than two"]
    return markdown(head, ([kind, *map(str, row)] for kind, row in counts.items()))


def estimator_times() -> str:
    """Seconds of CDMDensity."""
    lines = [
        [str(r["rows"]), str(r["columns"]), f"{r['fit']:.0f}", f"{r['score']:.2f}", f"{r['sample']:.1f}"]
        for r in read("estimator_times")["rows"]
    ]
    return markdown(["rows", "columns", "fit, s", "score 1000 rows, s", "draw 1000 rows, s"], lines)


def estimator_waits() -> str:
    """Seconds of what people wait for."""
    lines = ([r["what"], f"{r['seconds']:.0f}"] for r in read("estimator_waits")["rows"])
    return markdown(["", "s"], lines)


def outliers(name: str, group: str) -> str:
    """AUROC of each score, the mean over each ``group``: ``setting`` or ``outliers``; last that of all."""
    rows = read(name)["rows"]
    groups, scores = (list(dict.fromkeys(row[key] for row in rows)) for key in (group, "score"))
    own = ("levels", "coarse", "complexity", "typicality", "log_prob")
    scores.sort(key=lambda score: own.index(score) if score in own else len(own))

    def average(score: str, key: str, value: str | None) -> float:
        found = [r[key] for r in rows if r["score"] == score and value in (None, r[group])]
        return sum(found) / len(found)

    lines = []
    for value in [*groups, None]:
        values = [average(score, "auroc", value) for score in scores]
        cells = [f"**{v:.3f}**" if v == max(values) else f"{v:.3f}" for v in values]
        lines.append([value or "mean", *cells, f"{average('levels', 'fpr95', value):.3f}"])
    titles = [f"`{score}`" if score in own else score.removeprefix("PyOD ") for score in scores]
    return markdown(["outliers", *titles, "FPR@95 of `levels`"], lines)


def anomaly_maps() -> str:
    """Pixel AUROC of the maps of replaced patches, beside the squared difference to the mean image."""
    patches = {"image": "a patch of another image", "flat": "one grey level", "noise": "random grey levels"}
    rows = []
    for row in read("anomaly_maps")["rows"]:
        values = (of[key] for key in ("pixel", "image-wise") for of in (row, row["baseline"]))
        rows.append([patches[row["patch"]], *(f"{value:.3f}" for value in values)])
    return markdown(["replaced by", "maps", "mean image", "maps, each image", "mean image, each image"], rows)


def own_network() -> str:
    """A plain CNN beside the encoder of the preset."""
    found, shown = read("own_network")["networks"], ("one-pass-level", "elbo", "flow")
    names = {"cnn": "the CNN of this page", "encoder": "the preset's encoder, `zoo:digits`"}
    rows = []
    for key, name in names.items():
        values = (found[key]["rows"][row] for row in shown)
        numbers = [f"{row['value']:.3f} ± {row['se']:.3f}" for row in values]
        rows.append([name, f"{found[key]['parameters']:,}", *numbers])
    return markdown(["network", "weights", "one pass", "ELBO", "flow"], rows)


def posteriors(name: str = "posteriors") -> str:
    """C2ST, mean over seeds, coverage on the most new pairs and speed of the posteriors of each task."""
    titles = {"cdm": "CDM", "npe": "NPE", "fmpe": "FMPE", "npse": "NPSE"}
    rows, grouped = read(name)["rows"], {}
    for r in rows:
        grouped.setdefault((r["task"], r["pairs"]), {}).setdefault(r["name"], []).append(r)
    lines = []
    for (task, pairs), contenders in grouped.items():
        values = {name: mean(mean(r["c2st"]) for r in found) for name, found in contenders.items()}
        for name, found in contenders.items():
            value, covered = values[name], max(r["covered"] for r in found)
            cell = f"**{value:.3f}**" if value <= min(values.values()) + 0.02 else f"{value:.3f}"
            most = [r for r in found if r["covered"] == covered]
            shares = (f"{100 * mean(r['coverage'][k] for r in most):.0f} %" for k in range(2))
            outside, seconds, scored = (mean(r[key] for r in found) for key in ("outside", "seconds", "scored"))
            lines.append([task, str(pairs), titles[name], str(len(found)), cell, *shares,
                          f"{mean(r['tarp'] for r in most):.2f}", str(covered * len(most)),
                          f"{100 * outside:.1f} %", f"{seconds:.0f}", rate(scored)])  # fmt: skip
    head = ["task", "pairs", "posterior", "seeds", "C2ST", "50 % holds", "90 % holds", "TARP", "of new pairs",
            "outside", "s", "log_prob a second"]  # fmt: skip
    return markdown(head, lines)


def posterior_together() -> str:
    """C2ST and errors of posteriors given several observations, by prior and without correction."""
    rows = {(r["simulator"], r["observations"], r["way"]): r for r in read("posterior_together")["rows"]}
    ways, lines = list(dict.fromkeys(way for *_, way in rows)), []
    for name, n in dict.fromkeys((name, n) for name, n, _ in rows):
        found = [rows[name, n, way] for way in ways]
        cells = [f"{mean(r['c2st']):.3f}" for r in found] + [f"{r['mean']:.2f}, {r['deviation']:.2f}" for r in found]
        lines.append([name, str(n), *cells, f"{found[0]['seconds']:.0f}"])
    head = [f"{what}{way}" for what in ("C2ST, ", "mean and width, ") for way in ways]
    return markdown(["simulator", "observations", *head, "s"], lines)


def posterior_rounds() -> str:
    """C2ST of one round and of two, the mean over observations and seeds."""
    rows, lines = read("posterior_rounds")["rows"], []
    for task in dict.fromkeys(r["task"] for r in rows):
        own = [r for r in rows if r["task"] == task]
        found = {way: [r for r in own if r["way"] == way] for way in dict.fromkeys(r["way"] for r in own)}
        cells = [f"{mean(r['c2st'] for r in of):.3f}" for of in found.values()]
        better = sum(a["c2st"] < b["c2st"] for a, b in zip(found["two rounds"], found["one round"], strict=True))
        inside, last = f"{100 * mean(r['accepted'] for r in own):.2g} %", found["two rounds"]
        lines.append([task, *cells, f"{better} of {len(last)}", inside, f"{mean(r['fitted'] for r in last):.0f}"])
    head = ["1000 simulations", "2000", "1000 + 1000 truncated", "better than 2000", "of the prior inside"]
    return markdown(["task", *head, "pairs of the second fit"], lines)


def anomaly_designs() -> str:
    """Mean ranks of the detector for tables with outliers and of ten others, on both halves of the tables and on all.
    """
    rows = read("anomaly_design")["rows"]
    halves = [list(DEVELOPMENT), list(JUDGED), [*DEVELOPMENT, *JUDGED]]
    ranks = [
        mean_ranks([row for row in rows if row["table"] in half], value)[0]
        for value in ("auroc", "precision")
        for half in halves
    ]
    lines = []
    for name in sorted(ranks[2], key=lambda name: ranks[2][name]):
        means = (mean(row[value] for row in rows if row["name"] == name) for value in ("auroc", "precision"))
        cells = (
            f"**{found[name]:.1f}**" if found[name] == min(found.values()) else f"{found[name]:.1f}" for found in ranks
        )
        both = f"{(ranks[2][name] + ranks[5][name]) / 2:.2f}"
        lines.append([{"cdm-contaminated": "CDM"}.get(name, name), *cells, both, *(f"{value:.3f}" for value in means)])
    parts = [f"{value}, {half}" for value in ("AUROC", "precision") for half in ("development", "judged", "all")]
    return markdown(["detector", *parts, "both, all", "mean AUROC", "mean precision"], lines)


def anomaly_tables(value: str) -> str:
    """``auroc`` or ``precision`` of each detector on each table, mean over seeds, and mean ranks."""
    rows = read("anomaly_tables")["rows"]
    names, tables = (list(dict.fromkeys(row[key] for row in rows)) for key in ("name", "table"))
    lines = []
    for table in tables:
        found = [mean(r[value] for r in rows if (r["table"], r["name"]) == (table, name)) for name in names]
        lines.append([table, *(f"**{v:.3f}**" if v == max(found) else f"{v:.3f}" for v in found)])
    ranks, _ = mean_ranks(rows, value)
    lines.append(["mean rank", *(f"{ranks[name]:.1f}" for name in names)])
    titles = {"cdm": "CDM (default)", "cdm-levels": "CDM, `levels`"}
    return markdown(["table", *(titles.get(name, name) for name in names)], lines)
