"""Credible intervals of posteriors of measurements: how often they hold the truth; and the mean, beside azula's.

    python -m studies.benchmarks.posterior_coverage mixture --truths 200 --noise-std 0.5
    python -m studies.benchmarks.posterior_coverage zoo:digits --truths 200 --parts runs/coverage
    python -m studies.benchmarks.posterior_coverage zoo:digits --truths 40 --parts runs/coverage --methods dps mmps tds

Truths are drawn from the model itself, measured with noise, and restored by 64 draws of each method. 90 % intervals
should hold 90 % of what was not measured. ``mixture`` is exact at every level: four Gaussians in four dimensions, of
which two are measured. Images are measured in the ``upper`` half, or as a ``small`` one of half the width. Errors are
over truths, whose numbers depend on each other. ``--test`` takes test images of the digits instead, with uniform noise
over the cell of a grey level, as the model sees them.

With azula installed (``torchcdm[azula]``), its DPS, MMPS and TDS restore the same images on the same model through its
adapter, in T - 1 steps. Evaluations are passes of the network for one sample; azula's have second derivatives, which
take about three times the time. More draws at equal evaluations lessen the error of a mean by the variance of the
draws: PSNR of endless draws has it all subtracted.

A row of each truth and method is written to ``--parts`` when it is done; the next run goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import torchcdm
from studies.benchmarks.files import write_named
from studies.exact import GaussianMixture
from torchcdm import compose
from torchcdm.compose.sampling import Draws
from torchcdm.data import load_data
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.mixture import MixtureMarginals
from torchcdm.diffusion.schedules import LogSNRSchedule
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.density import DensityModel
from torchcdm.random import stream
from torchcdm.units import DataTransform

DRAWS, CREDIBLE, TRUTHS, TDS_DRAWS = 64, 0.9, 400, 512
"""Draws of each restoration, the mass of intervals, truths that are drawn, and particles of azula's TDS."""

ZETA = 0.25
"""Guidance of DPS: the best of 0.25, 1 and 4 on two other truths."""

NUMBERS = ("covered", "ess", "mse", "variance", "evaluations", "cpu_seconds")

Measurement = Callable[[Tensor], Tensor]


class Task(NamedTuple):
    """A measurement, its noise in data units, and the numbers of a sample that intervals are counted on."""

    measure: Measurement
    std: float
    counted: Tensor


class Nothing(nn.Module):
    """No correction to the base density."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.levels) + 0 * x.flatten(1).sum(1, keepdim=True)


def exact_mixture(d: int = 4, components: int = 4, seed: int = 0) -> DensityModel:
    """A mixture of Gaussians as a model: means from N(0, I), variances 0.1 to 0.4."""
    generator, schedule = torch.Generator().manual_seed(seed), LogSNRSchedule(24, 0.02, 40.0)
    means = torch.randn(components, d, generator=generator, dtype=torch.float64)
    weights, spread = torch.rand(2, components, generator=generator, dtype=torch.float64)
    mixture = GaussianMixture(weights + 0.3, means, 0.1 + 0.3 * spread)
    common = GaussianMarginals.fit(mixture.sample(20000, generator), schedule)
    covariances = (0.1 + 0.3 * spread)[:, None, None] * torch.eye(d, dtype=torch.float64)
    base = MixtureMarginals(schedule, weights + 0.3, means, covariances, common)
    return ClassificationDiffusion(Nothing(schedule.T + 2), schedule, DataTransform((d,)), base).double()


def by_azula(method: str, model: DensityModel, measure: Measurement, y: Tensor, std: float, n: int) -> Tensor:
    """``n`` draws of DPS, MMPS or TDS, data units."""
    from azula.guidance.dps import DPSSampler
    from azula.guidance.mmps import MMPSDenoiser
    from azula.guidance.tds import TDSSampler
    from azula.linalg.covariance import IsotropicCovariance
    from azula.sample import DDPMSampler

    from torchcdm.bridges.azula import AzulaDenoiser

    denoiser, steps, y = AzulaDenoiser(model), model.schedule.T - 1, y.float()

    def of(z: Tensor) -> Tensor:
        return measure(model.transform.inverse(z)).to(z.dtype)

    def twist(z: Tensor, ratio: Tensor) -> Tensor:
        """Of standard normal model units, each worth as much as the data's own deviation."""
        variance = std**2 + spread * ratio**2 / (1 + ratio**2)
        return -0.5 * (y - of(z)).flatten(1).square() / variance - 0.5 * variance.log()

    spread = of(torch.randn(256, *model.shape, generator=stream(0, "spread"))).var(0).flatten()
    covariance = IsotropicCovariance(torch.tensor(std**2, dtype=torch.float32))
    sampler = {
        # azula divides by the norm of the errors of all draws.
        "dps": lambda: DPSSampler(denoiser, y=y, A=of, zeta=ZETA * math.sqrt(n), steps=steps),
        "mmps": lambda: DDPMSampler(MMPSDenoiser(denoiser, y=y, A=of, cov_y=covariance), steps=steps),
        "tds": lambda: TDSSampler(denoiser, twist, steps=steps),
    }[method]()
    z = sampler(sampler.init((n, *model.shape)))
    with torch.no_grad():
        z = denoiser(z, torch.tensor(0.0)).mean
    return model.transform.inverse(z)


def restore(method: str, model: DensityModel, task: Task, y: Tensor, seed: int, particles: int) -> tuple[Draws, int]:
    """:data:`DRAWS` draws, data units, and the evaluations that they took."""
    passed: list[int] = []
    hook = model.backbone.register_forward_hook(lambda _, inputs, __: passed.append(len(inputs[0])))
    try:
        if method == "particles":
            target = compose.posterior(model, task.measure, y, task.std)
            found = torchcdm.sample(target, DRAWS, particles=particles, seed=seed, units="codes", details=True)
        else:
            torch.manual_seed(seed)
            x = by_azula(method, model, task.measure, y, task.std, TDS_DRAWS if method == "tds" else DRAWS)
            found = Draws(x[torch.randperm(len(x))[:DRAWS]], 0.0)
    finally:
        hook.remove()
    return found, sum(passed)


def task_of(name: str, model: DensityModel, std: float) -> Task:
    """A measurement by its name, with noise of ``std`` data units."""
    if name == "small":
        return Task(compose.downsampling(2), std, torch.ones(model.shape, dtype=torch.bool))
    known = torch.zeros(model.shape, dtype=torch.bool)
    known[..., : model.shape[-1] // 2] = True
    known = known if len(model.shape) == 1 else known.mT
    return Task(compose.mask(known), std, ~known)


def truths_of(model: DensityModel, n: int, test: bool, parts: Path | None) -> Tensor:
    """The same first ``n`` whatever n is, (n, *shape), data units: kept beside the ``parts``."""
    if test:
        x = load_data("digits").test.tensors()[0][:n].double()
        return x + torch.rand(x.shape, generator=stream(0, "cells"), dtype=torch.float64) - 0.5
    path = None if parts is None else parts / "truths.npy"
    if path is not None and path.exists():
        return torch.from_numpy(np.load(path)).flip(0)[:n]
    x = torchcdm.sample(model, TRUTHS, particles=4 * TRUTHS, seed=1, units="codes").double()
    if path is not None:
        np.save(path, x.numpy())
    return x.flip(0)[:n]  # the first one was looked at when the measurement's density was designed


def measure(
    name: str, measurement: str, truths: int, particles: int, std: float, methods: Sequence[str], test: bool = False,
    parts: Path | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row each truth and method; those that ``parts`` has are not made again."""
    model = exact_mixture() if name == "mixture" else torchcdm.load(name)
    task = task_of(measurement, model, std)
    if parts is not None:
        parts.mkdir(parents=True, exist_ok=True)
    x = truths_of(model, truths, test, parts)
    y = task.measure(x)
    y = y + std * torch.randn(y.shape, generator=stream(0, "measured"), dtype=torch.float64)
    log = None if parts is None else parts / "rows.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log is not None and log.exists() else []
    for k, method in product(range(truths), methods):
        key = {"model": name, "measurement": measurement, "test": test, "method": method, "truth": k,
               "particles": particles if method == "particles" else 0}  # fmt: skip
        if any(key.items() <= row.items() for row in rows):
            continue
        before = time.process_time()
        found, evaluations = restore(method, model, task, y[k], k, particles)
        low, high = found.interval(CREDIBLE)
        inside, drawn = (low <= x[k]) & (x[k] <= high), found.x.double()
        row = key | {
            "covered": float(inside[task.counted].double().mean()), "ess": found.ess,
            "mse": float((drawn.mean(0) - x[k]).square().mean()), "variance": float(drawn.var(0).mean()),
            "evaluations": evaluations, "cpu_seconds": time.process_time() - before,
        }  # fmt: skip
        rows.append(row)
        if log is not None:
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        print({key: row[key] for key in ("truth", "method", "covered", "ess")}, flush=True)
    asked = {"model": name, "measurement": measurement, "test": test}
    return [row for row in rows if asked.items() <= row.items() and row["truth"] < truths]


def summary(rows: Sequence[dict[str, Any]], peak: float) -> dict[str, Any]:
    """Of the rows of one method: coverage and its standard error over truths, PSNR averaged over truths, cost."""
    n, of = len(rows), {key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in NUMBERS}
    endless = of["mse"] - of["variance"] / DRAWS
    psnr = {key: float((10 * (peak**2 / value).log10()).mean()) for key, value in
            (("psnr", of["mse"]), ("psnr_endless", endless.clamp_min(1e-9)))}  # fmt: skip
    return {
        **{key: rows[0][key] for key in ("model", "measurement", "test", "method", "particles")}, "truths": n,
        "coverage": float(of["covered"].mean()), "se": float(of["covered"].std()) / math.sqrt(n), **psnr,
        **{key: float(of[key].median()) for key in ("ess", "evaluations", "cpu_seconds")},
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses, measures and writes."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.benchmarks.posterior_coverage", description=__doc__.splitlines()[0]
    )
    parser.add_argument("model", help="mixture, or a model of images")
    parser.add_argument("--measurement", choices=("upper", "small"), default="upper")
    parser.add_argument("--truths", type=int, default=100)
    parser.add_argument("--particles", type=int, default=512)
    parser.add_argument("--noise-std", type=float, default=1.0, help="data units")
    parser.add_argument("--methods", nargs="+", default=["particles"], help="particles, dps, mmps, tds")
    parser.add_argument("--test", action="store_true", help="test images of the digits, not draws of the model")
    parser.add_argument("--parts", type=Path, help="a folder of what is done")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of collapsed weights: they are counted
        rows = measure(options.model, options.measurement, options.truths, options.particles, options.noise_std,
                       options.methods, options.test, options.parts)  # fmt: skip
    for key in sorted({(row["method"], row["particles"]) for row in rows}):
        found = summary([row for row in rows if (row["method"], row["particles"]) == key], _peak(options.model))
        print(json.dumps(found))
        kind = ("test " if options.test else "") + options.measurement
        write_named(f"{options.model} {kind} {key[0]} {key[1]}", found, options.json)


def _peak(name: str) -> float:
    """The highest grey level, or 1."""
    return 1.0 if name == "mixture" else torchcdm.load(name).transform.high or 1.0


if __name__ == "__main__":
    main()
