r"""Values of log p that agree with the model's own reverse chain, fitted after a training.

A network's gradient is trained at every point, its values through the differences of neighbouring levels alone, whose
errors add up from T to 0. Along a path of the noise up from a sample, the reverse chain of the denoiser, a normalised
density, says what log p should be:

.. math:: \log p_T(x_T) + \sum_{u > t} [\log r(x_{u-1} | x_u) - \log q(x_u | x_{u-1})] \approx \log p_t(x_t)

(the terms of the log weight in :mod:`torchcdm.likelihood.normalizer`). A readout, linear in the network's features at
each level, is fitted to these targets by ridge regression: on paths from data, and on paths from images to which the
density gave too much, found by particles of :func:`torchcdm.likelihood.log_normalizer` and shown to it in turn.
Gradients, and so samples, ELBO and flow, stay as they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from torchcdm.cdm import ClassificationDiffusion
from torchcdm.denoisers import evaluation_mode
from torchcdm.errors import UserError
from torchcdm.likelihood import LogNormalizer, ReverseChain, log_normalizer
from torchcdm.likelihood.common import scoring_level
from torchcdm.likelihood.single_pass import noised
from torchcdm.readout import LIMIT, Readout
from torchcdm.rows import map_rows

FEWEST_SAMPLES = 16

CHAIN_SAMPLES = 96
"""For the variances of the chain: each is then right within a seventh."""

ISLANDS = 8

FOLDS = 4
"""Every fourth sample is scored by a fit on the others, four times, to choose the ridge and to tell what it gains."""

RIDGES = (0.02, 0.06, 0.2, 0.6, 2.0, 6.0, 20.0, math.inf)
"""Per sample, for features of deviation one; with the last an offset is all that is fitted."""

PARTICLE_WEIGHT = 0.3
"""Of a path from a particle beside one from data."""

DATA_PATHS, PARTICLES, PARTICLE_PATHS = range(3)
"""What noise is drawn for, in each round."""


@dataclass(frozen=True)
class PathCalibration:
    """What a calibration on paths did.

    Attributes:
        level: Lowest level of the paths.
        dim: Dimensions of a sample.
        before: Root mean square of log p at that level less the chain's targets, by the network without a readout, on
            paths from data, nats; the noise of the paths is in it.
        after: The same by a readout of the same ridge, each sample's fitted on other samples and without particles.
        log_z: Estimates of log Z at that level before each round of particles.
    """

    level: int
    dim: int
    before: float
    after: float
    log_z: tuple[LogNormalizer, ...]


@final
class Paths:
    """Paths of the noise up the levels, and what the chain says of them.

    Attributes:
        level: The first level.
        features: What the head saw, (levels, n, features).
        wanted: Targets of log p - base, nats, float64 (levels, n).
    """

    def __init__(
        self,
        model: ClassificationDiffusion,
        chain: ReverseChain,
        x: Tensor,
        level: int,
        seed: int = 0,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> None:
        """One path from each sample.

        Args:
            model: In evaluation mode; its head sees the features.
            chain: Of its denoiser.
            x: Samples at ``level``, model units, (n, *shape).
            level: 1 ... T - 1.
            seed: Seed of the noise.
            batch_size: Samples at a time; by their size, and what memory holds, when None.
            progress: Shows a progress bar over the levels.
        """
        from tqdm.auto import tqdm

        T, n = model.schedule.T, len(x)
        self.level = level
        self.features, base = None, []

        def means(x_t: Tensor, t: int) -> Tensor:
            """The denoiser's mean; what the head saw and the base density go aside."""

            def look(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
                x0 = chain.x0(x_t[rows], t)
                return x0, seen["features"].float(), model.base.log_prob_levels(x_t[rows])[:, t]

            x0, features, density = map_rows(look, n, batch_size, dim=x[0].numel(), device=x_t.device)
            if self.features is None:
                self.features = features.new_empty(T - level + 1, *features.shape)
            self.features[t - level] = features
            base.append(density)
            bar.update()
            return x0

        generator, steps = torch.Generator().manual_seed(seed), []
        with (
            _head_inputs(model.backbone.head) as seen,
            tqdm(total=T - level + 1, desc="paths", unit="level", disable=not progress, leave=False) as bar,
        ):
            last = x.double()
            means(last, level)
            for x_t, step in chain.rise(last, level, generator, means):
                steps.append(step)
                last = x_t
        targets = [chain.start(chain.start_noise_of(last))[1]]
        for step in reversed(steps):
            targets.append(targets[-1] - step)
        self.wanted = torch.stack(targets[::-1]) - torch.stack(base)


@torch.no_grad()
def calibrate_paths(
    model: ClassificationDiffusion,
    x: Tensor,
    rounds: int = 2,
    particles: int = 128,
    level: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> PathCalibration:
    """Sets ``model.readout``: values of log p that agree with the model's own reverse chain.

    Costs T evaluations of each sample, 2 T of the :data:`CHAIN_SAMPLES` for the chain, and 3 T of the particles in
    each round.

    Args:
        model: Without classes or context; its readout is set, in the place of the one that it may have.
        x: Data that the model was not trained on, data units, (N, *shape).
        rounds: Of particles, which find what the density gives too much to.
        particles: In each round.
        level: Lowest level; that through which data are scored when None. Values below it change by as much as its.
        seed: Seed of all noise.
        batch_size: Samples at a time; by their size, and what memory holds, when None.
        progress: Shows progress bars.

    Raises:
        UserError: A model with classes or context, or of a network without features and a linear head; too few
            samples; a level without one above it; values that are not finite.
    """
    _check(model, x, rounds, particles)
    level = scoring_level(model) if level is None else level
    if not 1 <= level < model.schedule.T:
        raise UserError(f"calibration: level {level} has no path above it; choose 1 ... {model.schedule.T - 1}")
    before = model.readout
    try:
        with evaluation_mode(model):
            return _calibrate(model, x, rounds, particles, level, seed, batch_size, progress)
    except BaseException:
        model.readout = before
        raise


def _calibrate(
    model: ClassificationDiffusion,
    x: Tensor,
    rounds: int,
    particles: int,
    level: int,
    seed: int,
    batch_size: int | None,
    progress: bool,
) -> PathCalibration:
    chain = ReverseChain.calibrated(model, n=CHAIN_SAMPLES, seed=seed, batch_size=batch_size)
    start = noised(model, x.to(model.schedule.alpha.device), slice(0, len(x)), level, seed)
    fit = _Fit(model, Paths(model, chain, start, level, hash((seed, DATA_PATHS)), batch_size, progress))
    found, shown = [], []
    model.readout = fit.readout(shown)
    for k in range(rounds):
        estimate = log_normalizer(
            model, particles, level, moves=1, chain=chain, islands=ISLANDS, seed=hash((seed, PARTICLES, k)),
            batch_size=batch_size, progress=progress,
        )  # fmt: skip
        found.append(estimate)
        noise = hash((seed, PARTICLE_PATHS, k))
        shown.append(Paths(model, chain, estimate.x, level, noise, batch_size, progress))
        model.readout = fit.readout(shown)
    return PathCalibration(level, x[0].numel(), fit.before, fit.after, tuple(found))


def _check(model: ClassificationDiffusion, x: Tensor, rounds: int, particles: int) -> None:
    if model.classes is not None or model.context is not None:
        raise UserError("calibration on paths: the model has classes or a context; it is for models of one density")
    if not hasattr(model.backbone, "features") or not hasattr(model.backbone, "head"):
        raise UserError("calibration on paths: the network must have `features` and a linear `head` on them")
    if len(x) < FEWEST_SAMPLES:
        raise UserError(f"calibration on paths: {len(x)} held-out samples; at least {FEWEST_SAMPLES} are needed")
    if rounds < 0:
        raise UserError(f"calibration on paths: rounds is {rounds}; it must not be negative")
    if particles < 2 * ISLANDS:
        raise UserError(f"calibration on paths: particles is {particles}; at least {2 * ISLANDS} are needed")


@contextmanager
def _head_inputs(head: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What ``head`` was given last, as ``features``."""
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen["features"] = inputs[0].detach()

    handle = head.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


@final
class _Fit:
    """Ridge regressions at the levels of paths from data.

    Attributes:
        ridge: The one with the least error at the lowest level, on samples that were not fitted to.
        before: That error, root mean square, without a regression.
        after: And with it.
    """

    def __init__(self, model: ClassificationDiffusion, data: Paths) -> None:
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
        scales = torch.stack([features.std(0) for features in data.features]).double()
        self.mean = torch.stack([features.mean(0) for features in data.features]).double()
        self.scale = torch.maximum(scales, 1e-3 * scales.median(1, keepdim=True).values).clamp_min(1e-9)

        z, error = self._of(data, 0)
        folds = torch.arange(len(z), device=z.device) % FOLDS
        errors = {}
        for ridge in RIDGES:
            left = error.clone()
            for k in range(FOLDS):
                scored = folds == k
                weight, offset = _ridge(z[~scored], error[~scored], torch.ones_like(error[~scored]), ridge)
                left[scored] -= z[scored] @ weight + offset
            errors[ridge] = float(left.square().mean().sqrt())
        self.ridge = min(errors, key=errors.__getitem__)
        self.before, self.after = float(error.square().mean().sqrt()), errors[self.ridge]
        if not self.after < math.inf:
            raise UserError("calibration on paths: log p or what the chain says of it is not finite")

    def readout(self, shown: Sequence[Paths]) -> Readout:
        """From all paths of the data, and those from particles."""
        fitted = []
        for k in range(len(self.mean)):
            parts = [self._of(paths, k) for paths in (self.data, *shown)]
            z, error = (torch.cat(column) for column in zip(*parts, strict=True))
            counts = torch.full_like(error, PARTICLE_WEIGHT)
            counts[: len(parts[0][1])] = 1
            fitted.append(_ridge(z, error, counts, self.ridge))
        level, levels = self.data.level, len(self.bias)
        # What was fitted at the lowest level is added to the network's own values below it too; nothing at T+1.
        rows = torch.arange(levels, device=self.bias.device).sub(level).clamp(0, len(self.mean) - 1)
        mean, scale = self.mean[rows], self.scale[rows]
        weight, offset = (torch.stack(column)[rows] for column in zip(*fitted, strict=True))
        weight[-1], offset[-1] = 0, 0
        own = self.bias + (mean * self.slope).sum(1)
        return Readout(mean, scale, scale * self.slope + weight, own + offset)

    def _of(self, paths: Paths, k: int) -> tuple[Tensor, Tensor]:
        """Features in deviations, (n, features), and targets less what the network says, (n,), at the k-th level."""
        z = ((paths.features[k].double() - self.mean[k]) / self.scale[k]).clamp(-LIMIT, LIMIT)
        slope, bias = self.slope[paths.level + k], self.bias[paths.level + k]
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
