"""Measurements on held-out data: the training terms with fixed noise, and the same level by level."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchcdm.data import Split
from torchcdm.diffusion.schedules import Level
from torchcdm.likelihood import Scoring, single_pass
from torchcdm.losses import stratified_levels
from torchcdm.models.denoiser import Denoiser, working_dtype
from torchcdm.models.density import DensityModel
from torchcdm.random import stream
from torchcdm.runtime.batching import map_rows

BATCH = 256
"""Noisy copies at a time. Their noise is drawn by batch, so that this is part of every seed."""


class NoisyBatch(NamedTuple):
    """Noisy copies ``x_t`` of the samples ``rows`` (on the CPU) with their noise ``eps``, on the model's device."""

    rows: Tensor
    x_t: Tensor
    t: Tensor
    eps: Tensor
    y: Tensor | None

    def by_parts(self, function: Callable[[NoisyBatch], Tensor]) -> Tensor:
        """``function`` of parts of the batch, (B, ...), on the CPU: all processes share the network, not the noise."""

        def one(rows: slice) -> Tensor:
            return function(NoisyBatch(*(None if value is None else value[rows] for value in self)))

        return map_rows(one, len(self.t), dim=self.x_t.shape[1:].numel(), device=self.t.device).cpu()


def noisy_batches(
    model: Denoiser, x: Tensor, t: Level, seed: int = 0, y: Tensor | None = None
) -> Iterator[NoisyBatch]:
    """Noisy copies of samples ``x`` (N, *shape), batch by batch: data units, or model units without a transform.

    Noise and dequantisation are functions of (seed, copy), whatever the levels, the device and the number of samples;
    no more of them is held than a batch needs. ``t`` is the level of one copy of each sample, or the levels of k
    copies of each, long (k N,), in which copy j of sample i is entry j N + i. Labels ``y`` are (N, ...), or None.
    """
    device, dtype = model.schedule.alpha.device, working_dtype(model, torch.float64)
    levels = torch.full((len(x),), t) if isinstance(t, int) else t
    for first in range(0, len(levels), BATCH):
        part = levels[first : first + BATCH]
        rows = torch.arange(first, first + len(part)) % len(x)
        generator = stream(seed, "copies", first)
        # Of a whole batch, also where the last one is not: how many rows follow has no influence.
        eps = torch.randn(BATCH, *x.shape[1:], generator=generator, dtype=dtype)[: len(part)].to(device)
        x_0 = x[rows].to("cpu", dtype)
        if model.transform is None:
            x_0 = x_0.to(device)
        else:
            # Noise comes from the CPU, the constants of the transform are where the model is.
            x_0 = model.transform(model.transform.add_noise(x_0, generator).to(device))
        part, label = part.to(device), None if y is None else y[rows].to(device)
        yield NoisyBatch(rows, model.schedule.perturb(x_0, part, eps), part, eps, label)


def at_all_levels(
    model: Denoiser, x: Tensor, draws: int = 1, seed: int = 0, y: Tensor | None = None
) -> Iterator[NoisyBatch]:
    """:func:`noisy_batches` with ``draws`` copies of each sample, the levels 0 ... T+1 stratified over all of them."""
    t = stratified_levels(len(x) * draws, model.schedule.T + 2, stream(seed, "levels"))
    return noisy_batches(model, x, t, seed, y)


class LevelSums(NamedTuple):
    """Sums over samples at each level, each (T+2,), float64; without a classifier of the first two alone.

    Squared error of eps (mean over d), cross-entropy of the level in nats, and samples whose most probable level is
    the true one.
    """

    count: Tensor
    mse: Tensor
    ce: Tensor | None = None
    accuracy: Tensor | None = None

    def means(self) -> dict[str, float]:
        """``mse`` without the levels 0 and T+1, where it is constant and zero; ``ce`` and ``accuracy`` with them."""
        means = {name: float(sums.sum() / self.count.sum()) for name, sums in self._columns().items()}
        return means | {"mse": float(self.mse[1:-1].sum() / self.count[1:-1].sum())}

    def per_level(self) -> dict[str, list[float | None]]:
        """The same at each level 0 ... T+1; None where no sample fell on a level."""
        return {
            name: [float(s / n) if n else None for s, n in zip(sums, self.count, strict=True)]
            for name, sums in self._columns().items()
        }

    def _columns(self) -> dict[str, Tensor]:
        return {name: sums for name, sums in self._asdict().items() if name != "count" and sums is not None}


@torch.no_grad()
def level_sums(model: Denoiser, x: Tensor, y: Tensor | None = None, draws: int = 1, seed: int = 0) -> LevelSums:
    """Denoising error, cross-entropy and accuracy by level with fixed noise; arguments as of :func:`at_all_levels`."""
    sums = torch.zeros(2 if model.density is None else 4, model.schedule.T + 2, dtype=torch.float64)
    for batch in at_all_levels(model, x, draws, seed, y):
        sums.index_add_(1, batch.t.cpu(), batch.by_parts(partial(_errors, model)).T)
    return LevelSums(*sums)


def _errors(model: Denoiser, batch: NoisyBatch) -> Tensor:
    """What each copy adds to :class:`LevelSums`, float64 (B, 2 or 4)."""
    if model.density is None:
        eps, rest = model.denoise(batch.x_t, batch.t, batch.y).eps, []
    else:
        result = model.density.evaluate(batch.x_t, batch.t, batch.y)
        eps, log_p = result.eps, result.unconditional
        rest = [torch.nn.functional.cross_entropy(log_p, batch.t, reduction="none"), log_p.argmax(1) == batch.t]
    mse = (batch.eps - eps).square().flatten(1).mean(1)
    return torch.stack([value.double() for value in (torch.ones_like(mse), mse, *rest)], 1)


class PosteriorCurves(NamedTuple):
    """For inputs noised to some true ``levels`` the means of p(t | x_t) and of its log at every t, each (T+2,)."""

    levels: list[int]
    p: list[Tensor]
    log_p: list[Tensor]


@torch.no_grad()
def posterior_curves(model: DensityModel, x: Tensor, seed: int = 0) -> PosteriorCurves:
    """What the level classifier of a model in eval mode says of ``x`` (N, *shape), data units, at six true levels."""
    true = sorted({round(share * (model.schedule.T + 1)) for share in (0, 0.1, 0.25, 0.5, 0.75, 1)})
    batches = (noisy_batches(model, x, t, seed) for t in true)
    log_p = [torch.cat([model.log_prob_levels(b.x_t).log_softmax(1).cpu() for b in each]) for each in batches]
    return PosteriorCurves(true, [curve.exp().mean(0) for curve in log_p], [curve.mean(0) for curve in log_p])


def validate(
    model: Denoiser, x: Tensor, y: Tensor | None, ce_weight: float = 0.0, mse_weight: float = 1.0
) -> dict[str, float]:
    """Training terms, weighted as in the loss, and one-pass NLL with fixed noise.

    ``mse`` and ``loss``, and for a cdm ``ce``, ``accuracy`` and ``nll``, in bits/dim for data on a grid and nats for
    continuous data. ``loss`` has the cross-entropy of the level, also for joint models, and no time term.
    """
    values = level_sums(model, x, y).means()
    if model.density is None:
        return values | {"loss": values["mse"]}
    values["loss"] = mse_weight * values["mse"] + ce_weight / x[0].numel() * values["ce"]
    values["nll"] = single_pass(model.density, x, y, Scoring(level=0)).mean_and_error()[0]
    return values


def evaluate(model: Denoiser, split: Split, limit: int | None = None, draws: int = 4, seed: int = 0) -> dict[str, Any]:
    """Level accuracy, cross-entropy and denoising error on a split, in total and by level.

    Of at most ``limit`` samples with ``draws`` copies each: ``count``, ``draws``, ``levels`` (T+2), ``mean`` with
    ``mse`` (levels 0 and T+1 left out), ``ce`` and ``accuracy``, and ``per_level`` with a list for each. A ddm has
    ``mse`` alone.
    """
    x, labels = split.tensors(limit)
    sums = level_sums(model, x, labels_for(model, labels), draws, seed)
    numbers = {"count": len(x), "draws": draws, "levels": model.schedule.T + 2}
    return numbers | {"mean": sums.means(), "per_level": sums.per_level()}


def labels_for(model: Denoiser, labels: Tensor) -> Tensor | None:
    """The labels, or contexts, of a split where the model is conditional and all samples have one."""
    if model.context is not None:
        return labels
    return labels if model.classes is not None and len(labels) and bool((labels >= 0).all()) else None
