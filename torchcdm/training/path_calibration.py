r"""Values of log p that agree with the probability flow of the same network, fitted after a training.

The flow of the network's gradient (identity 6), a normalised density but for the errors of its steps and of its start
at T, says what log p_t(x_t) should be at each level that a path up from a sample visits. A readout, linear in the
network's features, is fitted to these targets by ridge regression at each of these levels and interpolated between
them: on paths from data, and on paths from images to which the density gave too much, found by particles of
:func:`torchcdm.annealing.particles.smc` and shown to it in turn. Gradients, and so samples, ELBO and flow, stay.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.particles import smc
from torchcdm.annealing.target import ModelTarget
from torchcdm.errors import UserError
from torchcdm.likelihood import FlowSolver, LogZ, Scoring
from torchcdm.likelihood.scoring import Batch, as_data
from torchcdm.models.calibrated import LIMIT, Calibrated, Readout, require_features
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import evaluation_mode
from torchcdm.models.inputs import check_count
from torchcdm.random import derive, stream

FEWEST_SAMPLES = 16

FLOW_STEPS, FLOW_PROBES = 25, 2
"""Of the flows: with more steps the error is below the noise of the probes."""

CHAIN_SAMPLES = 96
"""For the variances of the chain that particles go down by: each is then right within a seventh."""

ISLANDS = 8

FOLDS = 4
"""Every fourth sample is scored by a fit on the others, four times, to choose the ridge and to tell what it gains."""

RIDGES = (0.002, 0.006, 0.02, 0.06, 0.2, 0.6, 2.0, 6.0, 20.0, math.inf)
"""Per sample, for features of deviation one; with the last an offset is all that is fitted."""

PARTICLE_SHARE = 0.1
"""Of the particles of a round, all together, beside all data."""


class PathCalibration(NamedTuple):
    """What a calibration on paths found: the model, the lowest level of the paths, and errors at that level.

    ``before`` is the root mean square of log p less the flow's on data, nats, with the noise of the flow's probes;
    ``after`` the same by a readout fitted on other samples, without particles. ``log_z`` are the estimates of log Z
    before each round of particles.
    """

    model: Calibrated
    level: int
    before: float
    after: float
    log_z: tuple[LogZ, ...]


class _Paths(NamedTuple):
    """Where the flow takes some samples, as far as all is finite: rising levels, the head's features (levels, n, .),
    and targets of log p - base, nats, float64 (levels, n)."""

    levels: list[int]
    features: Tensor
    wanted: Tensor


@torch.no_grad()
def calibrate_paths(
    model: ClassificationDiffusion,
    x: Tensor,
    rounds: int = 2,
    particles: int = 128,
    level: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> PathCalibration:
    """Values of log p that agree with the flow of the same model.

    Costs a flow of :data:`FLOW_STEPS` steps for each sample and each particle, and evaluations of particles.

    Args:
        model: Without classes or context, and with ``features`` and a linear ``head``; left as it is.
        x: Data that the model was not trained on, data units, (N, *shape).
        rounds: Rounds of particles, which find what the density gives too much to.
        particles: Particles in each round.
        level: Lowest level; that through which data are scored when None. Values below it change by as much as its.
        seed: Seed of all noise.
        progress: Shows progress bars.

    Raises:
        UserError: A model with classes or context, or of a network without features and a linear head; too few
            samples; a level without one above it; values that are not finite.
    """
    require_features(model)
    for name, value, least in (("rounds", rounds, 0), ("particles", particles, 2 * ISLANDS)):
        check_count(f"calibration on paths: {name}", value, least)
    if len(x) < FEWEST_SAMPLES:
        raise UserError(f"calibration on paths: {len(x)} held-out samples; at least {FEWEST_SAMPLES} are needed")
    x, _ = as_data(model, x, None)
    level = Scoring(level).level_of(model)

    def look(x_t: Tensor, t: int, y: Tensor | None) -> tuple[Tensor, Tensor]:
        return model.backbone.features(x_t).float(), model.base.log_prob_levels(x_t)[:, t]

    def paths_of(x_t: Tensor, *purpose: str | int) -> _Paths:
        """One path from each ``x_t`` (n, *shape) at the lowest level, model units."""
        scoring = Scoring(level, seed=derive(seed, *purpose), steps=FLOW_STEPS, probes=FLOW_PROBES)
        solver = FlowSolver(model, scoring)
        found = solver.log_prob(x_t, None, look, progress)
        features, base = found.seen
        wanted = found.path - base
        finite = wanted.isfinite().all(0) & features.isfinite().all(2).all(0)
        return _Paths(solver.levels, features[:, finite], wanted[:, finite])

    with evaluation_mode(model):
        data = paths_of(Batch(model, x, None, slice(0, len(x)), seed).noised(level), "data-paths")
        if data.wanted.shape[1] < len(x):
            raise UserError("calibration on paths: log p or what the flow says of it is not finite")
        fit = _Fit(model, data)
        found, shown = [], []
        calibrated = Calibrated(model, fit.readout(shown))
        kernels = Kernels.of_target(ModelTarget(model), seed, CHAIN_SAMPLES) if rounds else None
        for k in range(rounds):
            generator, target = stream(derive(seed, "particles", k), "particles"), ModelTarget(calibrated)
            ended = smc(target, kernels, level, ISLANDS, particles // ISLANDS, generator, progress=progress)
            name = f"smc, {particles} particles"
            found.append(LogZ.of_weights(ended.log_estimates, name, level, model.transform.dim))
            shown.append(paths_of(ended.draws(generator), "particle-paths", k))
            calibrated = Calibrated(model, fit.readout(shown))
    calibrated.train(model.training)
    return PathCalibration(calibrated, level, fit.before, fit.after, tuple(found))


class _Fit:
    """Ridge regressions at the levels of paths from data.

    ``ridge`` has the least error at the lowest level on samples that were not fitted to: ``after``, root mean square;
    ``before`` without a regression.
    """

    def __init__(self, model: ClassificationDiffusion, data: _Paths) -> None:
        self.data = data
        head = copy.deepcopy(model.backbone.head).double()
        eye = torch.eye(data.features.shape[2], dtype=torch.float64, device=data.features.device)
        at_zero = head(torch.zeros_like(eye[:1]))
        slope, bias = head(eye) - at_zero, at_zero + model.level_constants.double()
        features = data.features[0].double()
        if not torch.allclose(head(features), features @ slope + at_zero, atol=1e-6):
            raise UserError("calibration on paths: the network's `head` is not linear")
        # Of h - h_{T+1} with its constants: (T+2, features) and (T+2,).
        self.slope, self.bias = (slope - slope[:, -1:]).T, (bias - bias[:, -1:])[0]
        scales, self.mean = data.features.std(1).double(), data.features.mean(1).double()
        self.scale = torch.maximum(scales, 1e-3 * scales.median(1, keepdim=True).values).clamp_min(1e-9)

        z, error = self._of(data, 0)
        folds, errors = torch.arange(len(z), device=z.device) % FOLDS, {}
        for ridge in RIDGES:
            left = error.clone()
            for k in range(FOLDS):
                scored = folds == k
                weight, offset = _ridge(z[~scored], error[~scored], torch.ones_like(error[~scored]), ridge)
                left[scored] -= z[scored] @ weight + offset
            errors[ridge] = float(left.square().mean().sqrt())
        self.ridge = min(errors, key=errors.__getitem__)
        self.before, self.after = float(error.square().mean().sqrt()), errors[self.ridge]

    def readout(self, shown: Sequence[_Paths]) -> Readout:
        """From all paths of the data, and those from particles."""
        fitted = []
        for k in range(len(self.mean)):
            parts = [self._of(paths, k) for paths in (self.data, *shown)]
            z, error = (torch.cat(column) for column in zip(*parts, strict=True))
            n = len(parts[0][1])
            share = [torch.full_like(e, PARTICLE_SHARE * n / max(1, len(e))) for _, e in parts[1:]]
            fitted.append(_ridge(z, error, torch.cat([error.new_ones(n), *share]), self.ridge))
        weight, offset = (torch.stack(column) for column in zip(*fitted, strict=True))
        # Linear between levels. What was fitted at the lowest one is added to the network's own values below it too;
        # nothing at T+1.
        every, levels = np.arange(len(self.bias)), self.data.levels
        between = torch.from_numpy(np.stack([np.interp(every, levels, unit) for unit in np.eye(len(levels))], 1))
        mean, scale, weight, offset = (between.to(weight) @ value for value in (self.mean, self.scale, weight, offset))
        weight[-1], offset[-1] = 0, 0
        own = self.bias + (mean * self.slope).sum(1)
        return Readout(mean, scale, scale * self.slope + weight, own + offset)

    def _of(self, paths: _Paths, k: int) -> tuple[Tensor, Tensor]:
        """Features in deviations, (n, features), and targets less what the network says, (n,), at the k-th level."""
        z = ((paths.features[k].double() - self.mean[k]) / self.scale[k]).clamp(-LIMIT, LIMIT)
        slope, bias = self.slope[paths.levels[k]], self.bias[paths.levels[k]]
        return z, paths.wanted[k] - (z @ (self.scale[k] * slope) + self.mean[k] @ slope + bias)


def _ridge(z: Tensor, y: Tensor, counts: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Weight (features,) and offset of the ridge regression of ``y`` (n,) on ``z`` (n, features)."""
    share = counts / counts.sum()
    z_mean, y_mean = share @ z, share @ y
    if ridge == math.inf:
        return torch.zeros_like(z_mean), y_mean
    centred = z - z_mean
    gram = centred.T @ (counts[:, None] * centred) + ridge * counts.sum() * torch.eye(z.shape[1]).to(z)
    weight = torch.linalg.solve(gram, centred.T @ (counts * (y - y_mean)))
    return weight, y_mean - z_mean @ weight
