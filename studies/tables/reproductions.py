"""Tables of the paper's results, and of other systems."""

from __future__ import annotations

import textwrap
from statistics import mean
from typing import Any

from studies.reproduce.result import cell_text
from studies.tables.pictures import by_cell
from studies.tables.reading import markdown, rate, read

KINDS = ("cdm", "ddm")


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


def reproduction(name: str) -> str:
    """The tables of a report of ``python -m studies reproduce``, below its command."""
    report = read(name)
    parts = [f"    {report['command']}\n"]
    for table in report["tables"]:
        rows = ([cell_text(value) for value in row] for row in table["rows"])
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
    lines = [
        [f"time of a {name} step", f"{time[f'encoder/{name}-step']:.2f}", "1"]
        for name in ("denoising", "guided", "training")
    ]
    lines.append(["memory of training", f"{memory['encoder/training-step']:.2f}", "1"])
    lines.append(["likelihoods a second, 28x28", rate(speed["one-pass"]), f"{rate(speed['flow'])} (flow)"])
    pictures = {"without labels": "started", "with classes": "classes", "in groups": "groups"}
    for which, name in pictures.items():
        content = read(f"quality_curves_{name}")
        errors = (mean(row["mse"] for row in content["models"] if row["model"].startswith(kind)) for kind in KINDS)
        lines.append([f"{which}: squared error of eps", *(f"{error:.4f}" for error in errors)])
        for (evaluations, sampler, _), models in by_cell(content["rows"]).items():
            if evaluations == 10:
                distances = (f"{mean(row['frechet'] for row in models[kind]):.2f}" for kind in KINDS)
                lines.append([f"{which}: Fréchet distance, `{sampler}`", *distances])
    return markdown(["Fashion-MNIST", "CDM", "DDM"], lines)


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
