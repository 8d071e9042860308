"""Writes the tables of README.md and docs/ from the result files beside this script.

    python studies/results/write_tables.py            # writes them
    python studies/results/write_tables.py --check    # exit code 1 where a page and its results differ

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is a function of :data:`TABLES`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
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


START, SHARES = re.compile(r"its start has (-?[0-9.]+)"), re.compile(r"shares \(([0-9.]+)")
"""What the CDM of the exam notes of its network."""


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


def second_order() -> str:
    """What the ways to the gradient of the squared error take of time and memory."""
    time, memory = ({row["name"]: row["ratio_to_ddm"] for row in read(name)["rows"]}
                    for name in ("step_cost", "training_memory"))  # fmt: skip
    lines = []
    ways = {"PyTorch's second derivatives": "-pytorch", "by hand": "-twice", "**a difference of densities**": ""}
    for title, suffix in ways.items():
        rows = [f"{network}{suffix}/training-step" for network in ("encoder", "paper")]
        lines.append([title, *(f"{time[row]:.2f}" for row in rows), *(f"{memory[row]:.2f}" for row in rows)])
    networks = ("default network", "paper's network")
    head = ["gradient of the squared error by", *(f"time, {n}" for n in networks), *(f"memory, {n}" for n in networks)]
    return markdown(head, lines)


def half_precision() -> str:
    """Training steps in both precisions."""
    found = {name: {row["name"]: row for row in rows} for name, rows in read("half_precision").items()}
    lines = []
    titles = {
        "encoder-twice": "CDM, second derivatives by hand",
        "encoder-pytorch": "CDM, PyTorch's second derivatives",
        "encoder-ddm": "DDM",
    }
    for name, title in titles.items():
        steps = [rows[f"{name}/training-step"] for rows in found.values()]
        lines.append([title, *(f"{1e3 * step['seconds']:.0f} ({step['ratio_to_ddm']:.2f})" for step in steps)])
    return markdown(["training step, ms (ratio to the DDM)", *found], lines)


def equal_time(name: str) -> str:
    """Denoising error after equal time."""
    lines = []
    for row in read(name)["rows"]:
        spread = "" if row["mse_sd"] is None else f" ± {row['mse_sd']:.4f}"
        steps = ", ".join(map(str, row["steps"]))
        ratio, parameters = f"{row['ratio_to_ddm']:.3f}", f"{row['parameters']:,}"
        lines.append([row["name"], f"{row['mse']:.4f}{spread}", ratio, steps, parameters])
    return markdown(["", "MSE of eps", "ratio to the DDM", "steps, a seed each", "parameters"], lines)


def step_scaling() -> str:
    """Steps against what they depend on: over the first value, and over the DDM."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in read("step_scaling")["rows"]:
        question, value, step = row["name"].split("/")
        found.setdefault((question, value), {})[step] = row
    steps = {"denoising": "cdm-denoising-step", "training": "cdm-training-step", "one pass": "cdm-one-pass-likelihood",
             "guided": "cdm-guided-step"}  # fmt: skip
    lines = []
    for (question, value), rows in found.items():
        cells = [
            f"{rows[name]['ratio_to_first']:.2f} ({rows[name]['ratio_to_ddm']:.2f})" if name in rows else ""
            for name in steps.values()
        ]
        lines.append([question, value, *cells])
    return markdown(["", "", *steps], lines)


def likelihood_throughput() -> str:
    """Images a second of one pass and of the flow, and their ratio."""
    titles = {"digits": "digits, 8x8, 50 levels", "fashion-mnist": "Fashion-MNIST, 28x28, 200 levels"}
    names = ("one-pass", "one-pass-level", "network-pass", "flow")
    lines = []
    for data, rows in read("likelihood_throughput").items():
        found = {row["name"]: row for row in rows}
        values = [found[name]["images_per_second"] for name in names]
        speeds = [f"{value:,.0f}" if value >= 100 else f"{value:.2f}" for value in values]
        lines.append([titles[data], *speeds, *(f"{found[name]['ratio_to_flow']:.0f}" for name in names[:2])])
    head = ["run", *(f"`{name}`" for name in names[:3]), "flow", "one pass / flow", "through a level / flow"]
    return markdown(head, lines)


def log_z() -> str:
    """log2 Z / d of trained models by replica exchange, a row for each."""
    head = ["model", "log2 Z / d", "MBAR", "from samples", "from data", "from white", "apart, s.e.", "quarters",
            "trend, s.e.", "swaps", "levels x columns, sweeps", "CPU minutes"]  # fmt: skip
    lines = []
    for name, row in read("log_z").items():
        z, check = row["log2_z_per_dim"], row["log2_z_per_dim_check"]
        found = z["convergence"]
        starts = [f"{value:.4f} ± {se:.4f}" for value, se in found["starts"].values()]
        swapped = found["swapped"]
        lines.append([
            name, f"{z['value']:.4f} ± {row['se']:.4f}",
            f"{check['value']:.4f} ± {(check['high'] - check['low']) / 3.92:.4f}", *starts,
            f"{found['disagreement']:.1f}", " ".join(f"{value:.4f}" for value in found["quarters"]),
            f"{found['trend']:+.1f}", f"{sum(swapped) / len(swapped):.0%}, least {min(swapped):.0%}",
            f"{len(found['levels'])} x {3 * row['replicas']}, {row['sweeps']}", f"{row['cpu_seconds'] / 60:.0f}",
        ])  # fmt: skip
    return markdown(head, lines)


def digits_seeds() -> str:
    """The likelihoods of the digits preset, a row for each seed."""
    reports = {seed: read(name)["nll"] for seed, name in enumerate(("digits", "digits_seed1", "digits_seed2"))}
    names = ("one-pass", "one-pass-level", "one-pass-normalized", "elbo", "flow")
    head = ["seed", "one pass, level 0", "one pass, level 5", "one pass, normalised", "ELBO", "flow",
            "log2 Z / d", "ESS", "one pass − flow: mean, spread"]  # fmt: skip
    lines = []
    for seed, nll in reports.items():
        values = {row["name"]: row["value"] for row in nll["rows"]}
        z, gap = nll["log2_z_per_dim"], nll["gap_to_flow"]
        lines.append([
            str(seed), *("–" if values[name] is None else f"{values[name]:.3f}" for name in names),
            f"{z['value']:.3f} [{z['low']:.3f}, {z['high']:.3f}]", f"{z['ess']:.0f}",
            f"{gap['mean']:+.3f}, {gap['sd']:.3f}",
        ])  # fmt: skip
    return markdown(head, lines)


def table2_seeds() -> str:
    """Distances of the two unconditional models, and the ratios of their errors, a row for each seed."""
    head = ["seed", "DDIM: DDM", "CDM", "2nd-order DPM-Solver: DDM", "CDM", "CDM / DDM, error at levels 1 ... 100",
            "701 ... 800", "all"]  # fmt: skip
    lines = []
    for seed in range(3):
        suffix = f"_seed{seed}" if seed else ""
        table, errors = (read(name + suffix)["tables"][0] for name in ("table2", "fig4"))
        rows = {row[0]: row for row in table["rows"]}
        places = [next(i for i, title in enumerate(table["columns"]) if title.startswith(name)) for name in
                  ("DDIM", "2nd-order")]  # fmt: skip
        ratios = {row[0]: row[3] for row in errors["rows"]}
        lines.append([
            str(seed), *(f"{rows[model][place]:.2f}" for place in places for model in ("DDM", "CDM")),
            *(f"{ratios[levels]:.3f}" for levels in ("1 ... 100", "701 ... 800", "all")),
        ])  # fmt: skip
    return markdown(head, lines)


def fashion() -> str:
    """The likelihood report of the Fashion-MNIST preset, and one pass after its calibration on paths."""
    nll, calibrated = read("fashion"), read("fashion_calibrated")
    one_pass = [row for row in calibrated["rows"] if row["name"].startswith("one-pass")]
    rows = likelihood_rows(nll) + likelihood_rows({"rows": one_pass}, "after `cdm calibrate`")
    lines = [cells for _, cells in sorted(rows)]
    head = [f"Fashion-MNIST, {nll['data']['count']} test images", nll["unit"], "s.e.", "network passes"]
    return markdown(head, lines)


def mutual_information() -> str:
    """The ladder, a row for each rung."""
    head = ["pairs", "Gaussian residual", "d", "steps", "exact, nats", "estimate", "error", "RMSE of a point",
            "two Gaussians", "network kept", "s"]  # fmt: skip
    lines = [
        [r["kind"], r["residual"], str(r["dim"]), str(r["steps"]), f"{r['exact']:.2f}", f"{r['estimate']:.2f}",
         f"{100 * r['error']:+.1f} %", f"{r['rmse']:.2f}", f"{r['gaussians']:.2f}", f"{100 * r['kept']:.0f} %",
         f"{r['seconds']:.0f}"]
        for r in read("mutual_information")["rows"]
    ]  # fmt: skip
    return markdown(head, lines)


def ratio_pairs() -> str:
    """A row for each case: means and RMSE of points of the numerator, by three estimators."""
    cases: dict[tuple[str, float, int], dict[str, dict[str, Any]]] = {}
    for r in read("ratio_pairs")["rows"]:
        cases.setdefault((r["kind"], r["nats"], r["rows"]), {})[r["estimator"]] = r
    names = ("ours", "gaussians", "classifier")
    head = ["pairs", "rows", "exact, nats", "torchcdm", "two Gaussians", "classifier", "RMSE, torchcdm",
            "two Gaussians", "classifier", "s"]  # fmt: skip
    lines = [
        [kind, str(rows), f"{by['ours']['exact']:.2f}",
         *(f"{by[name]['estimate']:.2f} ({100 * by[name]['error']:+.1f} %)" for name in names),
         *(f"{by[name]['rmse']:.2f}" for name in names), f"{by['ours']['seconds']:.0f}"]
        for (kind, _, rows), by in cases.items()
    ]  # fmt: skip
    return markdown(head, lines)


def two_sample_null() -> str:
    """How often the test rejects at 5 %."""
    found = read("two_sample_null")["results"]
    titles = {"ours": "torchcdm", "mmd": "MMD", "trees": "boosted trees (C2ST)"}
    head = ["shift of one column", "test", "repeats", "rejected at 5 %"]
    lines = [
        [f"{r['shift']:g}", titles[r["test"]], str(r["repeats"]), f"{100 * r['rejected']:.1f} %"] for r in found
    ]
    return markdown(head, lines)


def ratio_peers() -> str:
    """RMSE of the log ratio, dimensions across."""
    rows = read("ratio_peers")["rows"]
    dims, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("dim", "estimator"))
    values = {(row["estimator"], row["dim"]): row["rmse"] for row in rows}
    best = {dim: min(values[name, dim] for name in names) for dim in dims}
    titles = {
        "joint": "torchcdm, `joint`", "separate": "torchcdm, `separate`", "gaussians": "two Gaussians",
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


def ruler() -> str:
    """What the fixed networks see of test images: the floor of every measure."""
    rows = []
    for name in ("ruler_fashion28", "ruler_fashion16", "ruler_digits"):
        content = read(name)
        (row,) = content["rows"]
        title = f"{content['data']} {content['shape'][1]}x{content['shape'][2]}"
        rows.append([title, content["features"], str(row["count"]), f"{row['frechet']:.3g} ± {row['frechet_se']:.2g}",
                     f"{row['precision']:.3f}", f"{row['recall']:.3f}", f"{row['c2st']:.3f} ± {row['c2st_se']:.3f}",
                     f"{row['grain']:.3f} ± {row['grain_se']:.3f}"])  # fmt: skip
    head = ["test images", "features", "images", "Fréchet", "precision", "recall", "C2ST", "grain"]
    return markdown(head, rows)


def quality_curves() -> str:
    """Fréchet distance and grain of both models, by evaluations, sampler and placement of the steps."""
    content = read("quality_curves")
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in content["rows"]:
        cells.setdefault((row["evaluations"], row["sampler"], row["spacing"]), {})[row["model"].split("-")[0]] = row
    rows = []
    for (evaluations, sampler, spacing), models in sorted(cells.items()):
        found = [models.get(name) for name in ("cdm", "ddm")]
        distances = ["–" if r is None else f"{r['frechet']:.2f} ± {r['frechet_se']:.2f}" for r in found]
        grains = ["–" if r is None else f"{r['grain']:.2f}" for r in found]
        rows.append([str(evaluations), sampler, spacing, *distances, *grains])
    head = ["evaluations", "sampler", "steps", "Fréchet, CDM", "Fréchet, DDM", "grain, CDM", "grain, DDM"]
    return markdown(head, rows)


def mi_tasks() -> str:
    """Mutual information of the benchmark's tasks, and how many marks each estimator has."""
    content = read("mi_tasks")["marks"]
    names = list(dict.fromkeys(row["estimator"] for row in content))
    found = {(row["task"], row["estimator"]): row for row in content}
    rows = []
    for task, truth in dict.fromkeys((row["task"], row["truth"]) for row in content):
        cells = [f"**{r['mean']:.2f}**" if r["mark"] else f"{r['mean']:.2f}" for r in (found[task, n] for n in names)]
        rows.append([task, f"{truth:.2f}", *cells])
    own = [[row for row in content if row["estimator"] == name] for name in names]
    counts = [f"{sum(r['mark'] for r in of)} of {len(of)}" for of in own]
    return markdown(["task", "truth", *names], [*rows, ["marks", "", *counts]])


def quality_of_zoo() -> str:
    """Fréchet distance and grain of two models of the zoo, by evaluations, sampler and placement of the steps."""
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for name in ("digits", "fashion28"):
        for row in read(f"quality_{name}")["rows"]:
            key = row["evaluations"], row["sampler"], row["spacing"], row["steps"]
            cells.setdefault(key, {})[name] = f"{row['frechet']:.2f} ± {row['frechet_se']:.2f}, {row['grain']:.2f}"
    rows = [
        [str(evaluations), sampler, f"{steps}, {spacing}", found.get("digits", "–"), found.get("fashion28", "–")]
        for (evaluations, sampler, spacing, steps), found in sorted(cells.items())
    ]
    return markdown(["evaluations", "sampler", "steps", "zoo:digits", "zoo:fashion-mnist-conditional"], rows)


def time_to_quality() -> str:
    """Errors of the default network and of the paper's after their times."""
    titles = {"default": "default", "paper": "the paper's"}
    lines = [
        [titles[r["name"]], f"{r['seconds']:.0f}", str(r["steps"]), f"{r['mse']:.4f}",
         f"{r['flow']:.3f} ± {r['se']:.3f}", f"{r['parameters']:,}"]
        for r in read("time_to_quality")["rows"]
    ]  # fmt: skip
    columns = ["network", "seconds", "steps", "MSE of eps", "flow, bits/dim (64 images)", "parameters"]
    return markdown(columns, lines)


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
        start, shares = START.match(own["note"]), SHARES.match(own["note"])
        network = f"{own['value'] - float(start[1]):+.3f}" if start else f"{float(shares[1]):.0%}" if shares else ""
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


def cell(value: Any) -> str:
    """A value of a reproduction's table, numbers in four digits."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def reproduction(name: str) -> str:
    """The tables of a report of ``python -m studies reproduce``, below its command."""
    report = read(name)
    parts = [f"    {report['command']}\n"]
    for table in report["tables"]:
        rows = ([cell(value) for value in row] for row in table["rows"])
        title = textwrap.fill(f"{table['title']}:", 120, break_long_words=False, break_on_hyphens=False)
        parts.append(f"{title}\n\n{markdown(table['columns'], rows)}")
    return "\n" + "\n".join(parts)


def beside_others() -> str:
    """Likelihoods of systems trained for the same time, best first: both of the CDM, the best one of the others."""
    kept: list[list[Any]] = []
    for row in read("table3")["tables"][1]["rows"]:
        system, normalised = row[0], row[2]
        known = system in (other[0] for other in kept)
        if normalised == "yes" and not system.startswith("CDM,") and (system == "CDM" or not known):
            kept.append(row)
    rows = [[system, likelihood, f"{nll:.3f}", f"{error:.3f}", str(nfe)]
            for system, likelihood, _, nll, error, nfe, *_ in kept]  # fmt: skip
    head = ("Fashion-MNIST 16x16, five minutes of one core each", "likelihood", "bits/dim", "s.e.", "network passes")
    return markdown(head, rows)


def beside_ddm() -> str:
    """What a CDM costs and gives, beside the plain diffusion model."""
    time, memory = ({row["name"]: row["ratio_to_ddm"] for row in read(name)["rows"]}
                    for name in ("step_cost", "training_memory"))  # fmt: skip
    speed = {row["name"]: row["images_per_second"] for row in read("likelihood_throughput")["fashion-mnist"]}
    main = read("table2")["tables"][0]
    ddm, cdm = ([row[i] for i in (2, 4, 6)] for row in main["rows"][:2])
    (everywhere,) = (row for row in read("fig4")["tables"][0]["rows"] if row[0] == "all")
    lines = [
        [f"time of a {name} step", f"{time[f'encoder/{name}-step']:.2f}", "1"]
        for name in ("denoising", "guided", "training")
    ]
    lines.append(["memory of training", f"{memory['encoder/training-step']:.2f}", "1"])
    lines.append(["likelihoods a second, 28x28", rate(speed["one-pass"]), f"{rate(speed['flow'])} (flow)"])
    lines.append(["squared error of eps, same steps", f"{everywhere[2]:.4f}", f"{everywhere[1]:.4f}"])
    names = (name for name in main["columns"] if "steps" in name)
    lines += [[f"Fréchet distance, {name}", cell(a), cell(b)] for name, a, b in zip(names, cdm, ddm, strict=True)]
    return markdown(["Fashion-MNIST", "CDM", "DDM"], lines)


def rate(per_second: float) -> str:
    """Samples a second in three digits."""
    return f"{float(f'{per_second:.3g}'):,.6g}" if per_second < 1000 else f"{float(f'{per_second:.3g}'):,.0f}"


def compared(name: str) -> str:
    """A comparison, the best first; rows that need not be normalised last."""
    report = read(name)
    rows = []
    for system in report["systems"]:
        for row in system["rows"]:
            over = row["over_best"]
            title = system["title"] + ("" if row["name"] == "density" else f", {row['name']}")
            rows.append((not row["normalised"], row["value"], [
                title, f"{'' if row['normalised'] else '~'}{row['value']:.3f}", f"{row['se']:.3f}",
                f"{over['mean']:+.3f} ± {over['se']:.3f}", str(row["nfe"]), rate(row["per_second"]),
                rate(system["sampling"]["per_second"]), f"{system['parameters']:,}", str(system["steps"]),
            ]))  # fmt: skip
    head = "s.e.", "over best", "NFE", "scored/s", "drawn/s", "parameters", "steps"
    return markdown(["system", report["protocol"]["unit"], *head], (cells for _, _, cells in sorted(rows)))


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


def corrected_sampling() -> str:
    """Fréchet distances by steps and moves."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for r in read("corrected_sampling")["rows"]:
        budget = (r["steps"] - 1) * (1 + r["moves"]) + 1
        found.setdefault(r["sampler"], {})[r["steps"], r["moves"]] = r | {"evaluations": budget}
    head = ["sampler", "steps x moves", "evaluations", "Fréchet", "recall", "accepted"]
    lines = []
    for sampler, by in found.items():
        for (steps, moves), r in sorted(by.items(), key=lambda item: (item[1]["evaluations"] // 6, item[0][1])):
            accepted = "" if r["acceptance"] is None else f"{r['acceptance']:.0%}"
            lines.append([sampler, f"{steps} x {moves}", str(r["evaluations"]),
                          f"{r['frechet']:.2f} ± {r['frechet_se']:.2f}", f"{r['recall']:.3f}", accepted])  # fmt: skip
    return markdown(head, lines)


REPRODUCTIONS = ("known-truth", "table1", "table2", "table3", "fig3", "fig4", "fig5", "fig6", "fig7", "fig8", "fig9")

TABLES: dict[str, Callable[[], str]] = {
    **{name: partial(reproduction, name.replace("-", "_")) for name in REPRODUCTIONS},
    "beside-ddm": beside_ddm,
    "beside-others": beside_others,
    "compare-digits": partial(compared, "compare_digits"),
    "compare-fashion": partial(compared, "compare_fashion"),
    "composing": composing,
    "conditional-density": conditional_density,
    "corrected-sampling": corrected_sampling,
    "covariate-shift": covariate_shift,
    "demo": demo,
    "digits-seeds": digits_seeds,
    "equal-time": partial(equal_time, "equal_time"),
    "exam": exam,
    "exam-summary": exam_summary,
    "equal-time-gaussianized": partial(equal_time, "equal_time_gaussianized"),
    "estimator-times": estimator_times,
    "estimator-waits": estimator_waits,
    "fashion": fashion,
    "half-precision": half_precision,
    "likelihood-throughput": likelihood_throughput,
    "log-z": log_z,
    "mixture-weights": mixture_weights,
    "mutual-information": mutual_information,
    "outliers-corruptions": partial(outliers, "outliers_corruptions", "outliers"),
    "outliers-held-out": partial(outliers, "outliers_held_out", "outliers"),
    "outliers-tables": partial(outliers, "outliers_tables", "setting"),
    "mi-tasks": mi_tasks,
    "own-network": own_network,
    "posterior-coverage": posterior_coverage,
    "quality-curves": quality_curves,
    "rare-events": rare_events,
    "quality-of-zoo": quality_of_zoo,
    "ratio-pairs": ratio_pairs,
    "ratio-peers": ratio_peers,
    "ruler": ruler,
    "second-order": second_order,
    "step-cost-encoder": partial(step_cost, "encoder"),
    "step-cost-paper": partial(step_cost, "paper"),
    "step-scaling": step_scaling,
    "table-density": table_density,
    "table2-seeds": table2_seeds,
    "time-to-quality": time_to_quality,
    "training-memory": training_memory,
    "two-sample-null": two_sample_null,
}


def rewritten(text: str) -> str:
    """A page with its tables made anew.

    Raises:
        KeyError: A table that no function makes.
    """
    return BLOCK.sub(lambda block: block[1] + TABLES[block[2]]() + block[3], text)


def pages() -> list[Path]:
    """The pages that have tables."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
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
            print(f"{path.relative_to(ROOT)}: differs from studies/results")
            if not options.check:
                path.write_text(rewritten(text), encoding="utf-8")
    return int(options.check and stale)


if __name__ == "__main__":
    sys.exit(main())
