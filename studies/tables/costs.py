"""Tables of what training and evaluation cost."""

from __future__ import annotations

from typing import Any

from studies.tables.reading import markdown, read


def step_cost(network: str) -> str:
    """Seconds and ratios of the steps of a network and of its DDM."""
    rows = {row["name"]: row for row in read("step_cost")["rows"]}
    steps = {
        "denoising-step": "denoising",
        "training-step": "training",
        "squared-error-step": "training, squared error alone",
        "guided-step": "guided",
        "one-pass-likelihood": "one-pass likelihood",
    }
    rivals = [key for key in rows[f"{network}/denoising-step"] if key.startswith("ratio_to_")]
    head = ["step", "CDM, ms", "DDM, ms", *(f"ratio to {key[9:].replace('ddm', 'the DDM')}" for key in rivals)]
    lines = []
    for step, title in steps.items():
        own = rows.get(f"{network}/{step}")
        if own is None:
            continue
        other = rows.get(f"{network}-ddm/{step.replace('squared-error', 'training')}")
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
