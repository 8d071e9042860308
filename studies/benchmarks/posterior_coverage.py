"""Credible intervals of posteriors of measurements: how often they hold the truth; and the mean, beside azula's.

    python -m studies.benchmarks.posterior_coverage mixture --truths 200
    python -m studies.benchmarks.posterior_coverage zoo:digits --truths 100

Truths are drawn from the model itself, measured with noise, and restored by particles: 64 draws each. 90 % intervals
should hold 90 % of what was not measured. ``mixture`` is exact at every level: four Gaussians in four dimensions, of
which two are measured. Images are measured in the upper half. Errors are over truths, whose numbers depend on each
other. With azula installed (``torchcdm[azula]``), DPS and MMPS restore the same images by as many draws, on the same
model through its adapter: with gradients through the denoiser, in at most T - 1 steps.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchcdm
from studies.benchmarks.files import write_named
from studies.exact import GaussianMixture
from torchcdm import compose
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.mixture import MixtureMarginals
from torchcdm.diffusion.schedules import LogSNRSchedule
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.density import DensityModel
from torchcdm.random import stream
from torchcdm.units import DataTransform

DRAWS, CREDIBLE = 64, 0.9


class _Nothing(nn.Module):
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
    return ClassificationDiffusion(_Nothing(schedule.T + 2), schedule, DataTransform((d,)), base).double()


def by_azula(model: DensityModel, measure: Callable[[Tensor], Tensor], y: Tensor, std: float) -> dict[str, Tensor]:
    """Means of the draws of DPS and of MMPS, data units."""
    from azula.guidance.dps import DPSSampler
    from azula.guidance.mmps import MMPSDenoiser
    from azula.linalg.covariance import IsotropicCovariance
    from azula.sample import DDPMSampler

    from torchcdm.bridges.azula import AzulaDenoiser

    denoiser, steps = AzulaDenoiser(model), model.schedule.T - 1

    def of(z: Tensor) -> Tensor:
        return measure(model.transform.inverse(z)).to(z.dtype)

    y = y.float()
    covariance = IsotropicCovariance(torch.tensor(std**2, dtype=torch.float32))
    samplers = {
        "azula DPS": DPSSampler(denoiser, y=y, A=of, steps=steps),
        "azula MMPS": DDPMSampler(MMPSDenoiser(denoiser, y=y, A=of, cov_y=covariance), steps=steps),
    }
    found = {}
    for name, sampler in samplers.items():
        torch.manual_seed(0)
        z = sampler(sampler.init((DRAWS, *model.shape)))
        with torch.no_grad():
            z = denoiser(z, torch.tensor(0.0)).mean
        found[name] = model.transform.inverse(z).double().mean(0)
    return found


def measure(name: str, truths: int, particles: int, std: float, azula: bool) -> dict[str, Any]:
    """Coverage, effective sample sizes, and errors of the means."""
    model = exact_mixture() if name == "mixture" else torchcdm.load(name)
    known = torch.zeros(model.shape, dtype=torch.bool)
    known[..., : model.shape[-1] // 2] = True
    known = known if len(model.shape) == 1 else known.mT
    part = compose.mask(known)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of collapsed weights: they are counted
        x = torchcdm.sample(model, truths, particles=max(256, 4 * truths), seed=1)
        y = part(x.double())
        y = y + std * torch.randn(y.shape, generator=stream(0, "measured"), dtype=torch.float64)
        covered, sizes, errors, before = [], [], {}, time.process_time()
        for k in range(truths):
            target = compose.posterior(model, part, y[k], std)
            found = torchcdm.sample(target, DRAWS, particles=particles, seed=k, details=True)
            low, high = found.interval(CREDIBLE)
            inside = (low <= x[k]) & (x[k] <= high)
            covered.append(float(inside[~known].double().mean()))
            sizes.append(found.ess)
            errors.setdefault("particles", []).append(_psnr(found.mean(), x[k], model))
            if azula:
                for rival, mean in by_azula(model, part, y[k], std).items():
                    errors.setdefault(rival, []).append(_psnr(mean, x[k], model))
            print(f"{k}: {covered[-1]:.2f}, ess {sizes[-1]:.0f}", flush=True)
    share, ess = torch.tensor(covered), torch.tensor(sizes)
    return {
        "model": name, "truths": truths, "draws": DRAWS, "particles": particles, "noise_std": std,
        "coverage": float(share.mean()), "exact": CREDIBLE,
        "se": float(share.std()) / math.sqrt(truths), "ess": float(ess.median()),
        "psnr": {key: sum(values) / truths for key, values in errors.items()},
        "cpu_seconds_each": (time.process_time() - before) / truths,
    }  # fmt: skip


def _psnr(mean: Tensor, x: Tensor, model: DensityModel) -> float:
    """Of one mean, dB; the peak is the highest grey level, or 1."""
    peak = model.transform.high or 1.0
    return float(10 * (peak**2 / (mean.double() - x.double()).square().mean()).log10())


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses, measures and writes."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.benchmarks.posterior_coverage", description=__doc__.splitlines()[0]
    )
    parser.add_argument("model", help="mixture, or a model of images")
    parser.add_argument("--truths", type=int, default=100)
    parser.add_argument("--particles", type=int, default=512)
    parser.add_argument("--noise-std", type=float, default=0.5, help="data units")
    parser.add_argument("--no-azula", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    azula = options.model != "mixture" and find_spec("azula") is not None and not options.no_azula
    found = measure(options.model, options.truths, options.particles, options.noise_std, azula)
    print(json.dumps(found))
    write_named(options.model, found, options.json)


if __name__ == "__main__":
    main()
