"""Tables of the quality of samples."""

from __future__ import annotations

from typing import Any

from studies.tables.reading import markdown, read


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


def quality_curves(name: str) -> str:
    """Fréchet distance and grain of both models, by evaluations, sampler and placement of the steps."""
    content = read(name)
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
