"""Bounds on larger images by a checked log Z, beside the flow and the ELBO of the same network.

    cp -r torchcdm/zoo/fashion-mnist-conditional runs/clothes          # and once more, for another seed
    cdm nll runs/clothes --methods logz --level 64 --sweeps 20 --limit 200
    cdm nll runs/clothes-1 --methods logz --level 64 --sweeps 20 --limit 200 --seed 1
    python -m studies.benchmarks.log_z_images runs/clothes runs/clothes-1 --name fashion-mnist-conditional \\
        --json studies/results/log_z_images.json

The estimates of log Z are those that the command leaves in the folders, of one model by several seeds; the first
normalises. All likelihoods are of the same test images; flow and ELBO through the level that decodes in the chain of
few passes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from studies.benchmarks.files import write_named
from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.target import ModelTarget
from torchcdm.data.source import DataSource
from torchcdm.errors import UserError
from torchcdm.likelihood import LogZ, Scoring, elbo, probability_flow
from torchcdm.likelihood.log_z import read_log_z
from torchcdm.likelihood.restricted import restricted_pass
from torchcdm.models.density import DensityModel
from torchcdm.training.build import load_source
from torchcdm.training.checkpoint import load, read_info
from torchcdm.units import standard_error


def measured(
    model: DensityModel, source: DataSource, found: Sequence[LogZ], count: int, images: int, steps: int
) -> dict[str, Any]:
    """What each of the ``found`` says, and likelihoods of test images, bits/dim.

    One pass of ``count`` images; all of ``images`` of them. ``minus`` has what those by few passes are above the flow
    and above the ELBO: mean, standard error, deviation. The flow takes ``steps``.
    """
    density = found[0].restricted
    test = source.split("test").tensors(None)[0]
    x, scoring = test[:images], Scoring(density.steps[0].level, steps=steps)
    kernels = Kernels.of_target(ModelTarget(model, density=False))
    rows = {
        "one-pass-restricted": restricted_pass(model, x, density),
        "few-pass-restricted": restricted_pass(model, x, density, chain=True),
        "elbo": elbo(model, x, None, scoring, kernels), "flow": probability_flow(model, x, None, scoring),
    }  # fmt: skip
    minus = {}
    for name in ("one-pass-restricted", "few-pass-restricted"):
        for other in ("flow", "elbo"):
            off = rows[name].values() - rows[other].values()
            minus[f"{name} - {other}"] = [float(off.mean()), standard_error(off), float(off.std())]
    more = restricted_pass(model, test[:count], density)
    return {
        "data": source.name, "dim": found[0].dim, "level": density.level,
        "levels": [step.level for step in density.steps], "classes": source.class_names,
        "log_z": [z.to_json() | {"usable": not z.lacking, "check": z.check and z.check.to_json()["value"]}
                  for z in found],
        "images": len(x), "count": len(test[:count]), "one-pass": more.mean_and_error(),
        "rows": {name: [*one.mean_and_error(), one.nfe] for name, one in rows.items()}, "minus": minus,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses, measures and writes."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.benchmarks.log_z_images", description=__doc__.splitlines()[0]
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folders of one model, with log_z.json")
    parser.add_argument("--name", required=True, help="key of the result in the file")
    parser.add_argument("--count", type=int, default=1000, help="test images of one pass")
    parser.add_argument("--images", type=int, default=64, help="those of all likelihoods")
    parser.add_argument("--flow-steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, source = load(options.runs[0]), load_source(read_info(options.runs[0]).data)
    found = [read_log_z(run) for run in options.runs]
    if None in found or found[0].restricted is None:
        raise UserError("a RUN has no log Z of a restricted density: cdm nll RUN --methods logz")
    result = measured(model, source, found, options.count, options.images, options.flow_steps)
    print(json.dumps(result, indent=1))
    write_named(options.name, result, options.json)


if __name__ == "__main__":
    main()
