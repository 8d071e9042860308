"""Measurements on held-out data, in total and level by level, and which weights of a training they name the best."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from torchcdm.annealing.target import in_batches
from torchcdm.data import DataSource, Split
from torchcdm.diffusion.schedules import Level
from torchcdm.likelihood import Scoring, single_pass
from torchcdm.losses import stratified_levels
from torchcdm.models.denoiser import Denoiser, working_dtype
from torchcdm.random import stream
from torchcdm.runtime.files import without_nan
from torchcdm.runtime.processes import progress_bar
from torchcdm.runtime.validation import CountOrZero, Float, encode, validated
from torchcdm.training.settings import Config
from torchcdm.units import DataTransform

Labels = Tensor | None  # classes, long (N,), or contexts (N, q)
BATCH = 256  # noisy copies at a time; their noise is drawn by batch, so that this is part of every seed


class NoisyBatch(NamedTuple):
    """Noisy copies ``x_t`` of the samples ``rows`` (on the CPU) with their noise ``eps``, on the model's device."""

    rows: Tensor
    x_t: Tensor
    t: Tensor
    eps: Tensor
    y: Tensor | None

    def by_parts(self, model: Denoiser, function: "Callable[[NoisyBatch], Tensor]") -> Tensor:
        """``function`` of parts of the batch, (B, ...), on the CPU: all processes share the network, not the noise."""

        def one(rows: slice) -> Tensor:
            return function(NoisyBatch(*(None if value is None else value[rows] for value in self)))

        return in_batches(model, self.x_t, one).cpu()


def noisy_batches(model: Denoiser, x: Tensor, t: Level, seed: int = 0, y: Labels = None) -> Iterator[NoisyBatch]:
    """Noisy copies of samples ``x`` (N, *shape), batch by batch: data units, or model units without a transform.

    Noise and dequantisation are functions of (seed, copy), whatever the levels, the device and the number of samples.
    ``t`` is the level of one copy of each sample, or the levels of k copies of each, long (k N,), in which copy j of
    sample i is entry j N + i.
    """
    device, dtype = model.schedule.alpha.device, working_dtype(model, torch.float64)
    transform = DataTransform(x.shape[1:]) if model.transform is None else model.transform
    levels = torch.full((len(x),), t) if isinstance(t, int) else t
    for first in range(0, len(levels), BATCH):
        part = levels[first : first + BATCH]
        rows = torch.arange(first, first + len(part)) % len(x)
        generator = stream(seed, "copies", first)
        # Of a whole batch, also where the last one is not: how many rows follow has no influence.
        eps = torch.randn(BATCH, *x.shape[1:], generator=generator, dtype=dtype)[: len(part)].to(device)
        x_0, part = transform.add_noise(x[rows].to("cpu", dtype), generator), part.to(device)
        x_t = model.schedule.perturb(transform(x_0.to(device)), part, eps)
        yield NoisyBatch(rows, x_t, part, eps, None if y is None else y[rows].to(device))


def at_all_levels(model: Denoiser, x: Tensor, draws: int = 1, seed: int = 0, y: Labels = None) -> Iterator[NoisyBatch]:
    """:func:`noisy_batches` with ``draws`` copies of each sample, the levels 0 ... T+1 stratified over all of them."""
    t = stratified_levels(len(x) * draws, model.schedule.T + 2, stream(seed, "levels"))
    return noisy_batches(model, x, t, seed, y)


@torch.no_grad()
def level_sums(
    model: Denoiser, x: Tensor, y: Labels = None, draws: int = 1, seed: int = 0, progress: bool = False
) -> dict[str, Tensor]:
    """Errors with fixed noise; arguments as of :func:`at_all_levels`.

    Sums over samples at each level, each (T+2,), float64: ``count``; ``mse``, squared error of eps (mean over d); with
    a density ``ce``, cross-entropy of the level in nats, and ``accuracy``, samples of which it is the most probable.
    """
    names = ("count", "mse") if model.density is None else ("count", "mse", "ce", "accuracy")
    sums = torch.zeros(len(names), model.schedule.T + 2, dtype=torch.float64)

    def errors(batch: NoisyBatch) -> Tensor:
        if model.density is None:
            eps, rest = model.denoise(batch.x_t, batch.t, batch.y).eps, []
        else:
            result = model.density.evaluate(batch.x_t, batch.t, batch.y)
            eps, log_p = result.eps, result.unconditional
            rest = [cross_entropy(log_p, batch.t, reduction="none"), log_p.argmax(1) == batch.t]
        mse = (batch.eps - eps).square().flatten(1).mean(1)
        return torch.stack([value.double() for value in (torch.ones_like(mse), mse, *rest)], 1)

    batches, total = at_all_levels(model, x, draws, seed, y), -(-len(x) * draws // BATCH)
    for batch in progress_bar(batches, "levels", progress, total=total, delay=1):
        sums.index_add_(1, batch.t.cpu(), batch.by_parts(model, errors).T)
    return dict(zip(names, sums, strict=True))


def means(sums: dict[str, Tensor]) -> dict[str, float]:
    """Means of :func:`level_sums`: ``mse`` without the levels 0 and T+1, where it is constant and zero."""
    inner = {"mse": float(sums["mse"][1:-1].sum() / sums["count"][1:-1].sum())}
    return inner | {key: float(sums[key].sum() / sums["count"].sum()) for key in ("ce", "accuracy") if key in sums}


def validate(model: Denoiser, x: Tensor, y: Labels, ce_weight: float = 0, mse_weight: float = 1) -> dict[str, float]:
    """``mse`` and ``loss``, weighted as in training, and for a cdm ``ce``, ``accuracy`` and one-pass ``nll``: bits/dim
    for data on a grid, else nats. ``loss`` has the cross-entropy of the level, also for joint models, no time term."""
    values = means(level_sums(model, x, y))
    if model.density is None:
        return values | {"loss": values["mse"]}
    values["loss"] = mse_weight * values["mse"] + ce_weight / x[0].numel() * values["ce"]
    values["nll"] = single_pass(model.density, x, y, Scoring(level=0)).mean_and_error()[0]
    return values


def evaluate(
    model: Denoiser, split: Split, limit: int | None = None, draws: int = 4, seed: int = 0, progress: bool = False
) -> dict[str, Any]:
    """Denoising error, cross-entropy and accuracy of the level on a split: ``limit`` samples, ``draws`` copies each.

    ``count``, ``draws``, ``levels`` (T+2); ``mean`` with ``mse`` (levels 0 and T+1 left out), and of a cdm ``ce`` and
    ``accuracy``; ``per_level`` with a list for each, null where no sample fell on a level.
    """
    x, labels = split.tensors(limit)
    sums = level_sums(model, x, labels_for(model, labels), draws, seed, progress)
    mean, counts = means(sums), sums.pop("count")
    per_level = {name: without_nan((values / counts).tolist()) for name, values in sums.items()}
    return {"count": len(x), "draws": draws, "levels": len(counts), "mean": mean, "per_level": per_level}


def labels_for(model: Denoiser, labels: Tensor) -> Tensor | None:
    """The labels, or contexts, of a split where the model is conditional and all samples have one."""
    if model.context is not None:
        return labels
    return labels if model.classes is not None and len(labels) and bool((labels >= 0).all()) else None


@validated
class Best:
    """The validation value, after so many steps, that named the kept weights the best."""

    value: str
    unit: str
    best: Float
    step: CountOrZero


@final
class Selection:
    """The ``best`` model of a training has the least validation value, called ``value``; ``stale`` counts those since.
    The last weights are kept where there is no validation split."""

    def __init__(self, config: Config, source: DataSource, model: Denoiser) -> None:
        self.value = config.train.select if config.model.kind == "cdm" else "mse"
        self.unit = "" if self.value != "nll" else "nats" if source.transform.bin is None else "bits/dim"
        self.loss, self.patience = config.loss, config.train.patience
        self.data: tuple[Tensor, Tensor | None] | None = None
        if source.validation:
            x, labels = source.validation.tensors(config.train.validation_samples)
            self.data = x, labels_for(model, labels)
        self.best: Best | None = None
        self.stale = 0

    def compare(self, model: Denoiser, step: int, settled: bool) -> tuple[dict[str, float], bool]:
        """Validation values of a model in eval mode after ``step`` steps, and whether it is to be kept: unless all
        terms of the loss count in full, ``settled``, for want of a better one, but as no best one."""
        if self.data is None:
            return {}, True
        values = validate(model, *self.data, self.loss.ce_weight, self.loss.mse_weight)
        value, keep = values[self.value], not settled
        if settled and math.isfinite(value) and (self.best is None or value < self.best.best):
            self.best, self.stale, keep = Best(self.value, self.unit, value, step), 0, True
        elif settled:
            self.stale += 1
        return {f"val_{key}": item for key, item in values.items()}, keep

    def selected(self, step: int) -> dict[str, Any]:
        """What ``config.json`` says of the kept weights, after ``step`` steps."""
        return {"value": "last", "step": step} if self.best is None else encode(self.best)

    @property
    def out_of_patience(self) -> bool:
        """Whether there were too many validations without a new best."""
        return self.patience is not None and self.stale >= self.patience
