"""Tables of likelihoods and of what is known of the truth."""

from __future__ import annotations

import math
from typing import Any

from studies.tables.reading import likelihood_rows, markdown, read


def demo() -> str:
    """What ``make demo`` reports, best first."""
    report = read("digits")
    rows = likelihood_rows(report["nll"])
    for row in report["baselines"]:
        rows.append((row["value"], [row["name"], f"{row['value']:.3f}", f"{row['se']:.3f}", ""]))
    images = f"handwritten digits, {report['data']['count']} test images"
    head = [images, report["nll"]["unit"], "s.e.", "network passes"]
    return markdown(head, (cells for _, cells in sorted(rows)))


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
            f"{check['value']:.4f} ± {_error(check, row['dim']):.4f}", *starts,
            f"{found['disagreement']:.1f}", " ".join(f"{value:.4f}" for value in found["quarters"]),
            f"{found['trend']:+.1f}", f"{sum(swapped) / len(swapped):.0%}, least {min(swapped):.0%}",
            f"{len(found['levels'])} x {3 * row['replicas']}, {row['sweeps']}", f"{row['cpu_seconds'] / 60:.0f}",
        ])  # fmt: skip
    return markdown(head, lines)


def _error(z: dict[str, Any], dim: int) -> float:
    """Standard error of log2 Z / d; an interval may be wider than 1.96 of it."""
    return 1 / (math.sqrt(z["ess"]) * dim * math.log(2))


def log_z_images(model: str, by_class: bool = True) -> str:
    """log2 Z / d of a model's images by several seeds: of the classes, a row for each, and their mean."""
    row = read("log_z_images")[model]
    head = ["class" if by_class else "", *(f"seed {k}" for k in range(len(row["log_z"])))]
    found = [z["convergence"] for z in row["log_z"]]
    lines = [
        [name, *("{:.4f} ± {:.4f}".format(*one["classes"][k]) for one in found)]
        for k, name in enumerate(row["classes"] if by_class else ())
    ]
    lines.append(["**mean**", *(f"**{z['value']:.4f} ± {_error(z, row['dim']):.4f}**" for z in row["log_z"])])
    lines.append(["95 %, Student's t", *(f"{z['low']:.4f} to {z['high']:.4f}" for z in row["log_z"])])
    for name in found[0]["starts"]:
        lines.append([f"from {name}", *("{:.4f} ± {:.4f}".format(*one["starts"][name]) for one in found)])
    lines += [
        ["starts apart, s.e.", *(f"{one['disagreement']:.1f}" for one in found)],
        ["quarters", *(" ".join(f"{value:.4f}" for value in one["quarters"]) for one in found)],
        ["trend, s.e.", *(f"{one['trend']:+.1f}" for one in found)],
        ["MBAR", *(f"{z['check']:.4f}" for z in row["log_z"])],
        ["swaps", *(
            f"{sum(one['swapped']) / len(one['swapped']):.0%}, least {min(one['swapped']):.0%}" for one in found
        )],
        ["replicas all the way down", *(str(one["arrivals"]) for one in found)],
    ]  # fmt: skip
    return markdown(head, lines)


def log_z_images_rows(model: str) -> str:
    """Likelihoods of the same images by few passes, normalised by those constants, by the ELBO and by the flow."""
    row, lines = read("log_z_images")[model], []
    head = [f"{row['images']} test images", "network passes", "bits/dim", "less the flow", "less the ELBO"]
    for name, (value, se, passes) in row["rows"].items():
        off = [row["minus"].get(f"{name} - {other}") for other in ("flow", "elbo")]
        lines.append([
            f"`{name}`", str(passes), f"{value:.3f} ± {se:.3f}",
            *("–" if pair is None else "{:+.3f} ± {:.3f}".format(*pair) for pair in off),
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


def fashion() -> str:
    """The likelihood report of the Fashion-MNIST preset."""
    nll = read("fashion")
    lines = [cells for _, cells in sorted(likelihood_rows(nll))]
    head = [f"Fashion-MNIST, {nll['data']['count']} test images", nll["unit"], "s.e.", "network passes"]
    return markdown(head, lines)
