"""Measurements on held-out data: the training terms with fixed noise, and the same level by level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchcdm.cdm import ClassificationDiffusion
from torchcdm.data import Split
from torchcdm.denoisers import Denoiser
from torchcdm.likelihood import single_pass
from torchcdm.losses import stratified_levels

BATCH = 256


@dataclass(frozen=True)
class LevelSums:
    """Sums over samples at each level, each (T+2,), float64.

    Attributes:
        count: Samples.
        mse: Squared error of eps, mean over d.
        ce: Cross-entropy of the level, nats; 0 for a ddm.
        correct: Samples whose most probable level is the true one; 0 for a ddm.
    """

    count: Tensor
    mse: Tensor
    ce: Tensor
    correct: Tensor

    def means(self) -> dict[str, float]:
        """``mse`` without the levels 0 and T+1, where it is constant and zero; ``ce`` and ``accuracy`` with them."""
        inner, total = slice(1, -1), self.count.sum()
        return {
            "mse": float(self.mse[inner].sum() / self.count[inner].sum()),
            "ce": float(self.ce.sum() / total),
            "accuracy": float(self.correct.sum() / total),
        }

    def per_level(self) -> dict[str, list[float | None]]:
        """The same at each level 0 ... T+1; None where no sample fell on a level."""
        columns = {"mse": self.mse, "ce": self.ce, "accuracy": self.correct}
        return {
            name: [float(s / n) if n else None for s, n in zip(sums, self.count, strict=True)]
            for name, sums in columns.items()
        }


def level_sums(
    model: Denoiser, x: Tensor, y: Tensor | None = None, draws: int = 1, seed: int = 0, batch_size: int = BATCH
) -> LevelSums:
    """Denoising error, cross-entropy and accuracy by level, with fixed noise.

    Args:
        model: In eval mode.
        x: Data units, (N, *shape).
        y: Classes, long (N,), for models that saw them; None else.
        draws: Noisy copies of each sample; the levels are stratified over all of them.
        seed: Seed of levels, noise and dequantisation.
        batch_size: Samples at a time; without influence on the draws.

    Returns:
        Sums by level.
    """
    device, T = model.schedule.alpha.device, model.schedule.T
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(len(x)).repeat(draws)
    t = stratified_levels(len(rows), T + 2, torch.device("cpu"), generator)
    z = _encode(model, x[rows], generator)
    eps = torch.randn(z.shape, generator=generator)
    sums = torch.zeros(4, T + 2, dtype=torch.float64)
    with torch.no_grad():
        for part in torch.arange(len(rows)).split(batch_size):
            levels, noise = t[part].to(device), eps[part].to(device)
            x_t = model.schedule.perturb(z[part].to(device), levels, noise)
            label = None if y is None else y[rows[part]].to(device)
            ce = correct = torch.zeros(len(part), device=device)
            if isinstance(model, ClassificationDiffusion):
                result = model.evaluate(x_t, levels, label)
                eps_hat, log_p = result.eps, result.unconditional
                ce = torch.nn.functional.cross_entropy(log_p, levels, reduction="none")
                correct = (log_p.argmax(1) == levels).float()
            else:
                eps_hat = model.denoise(x_t, levels, label).eps
            mse = (noise - eps_hat).square().flatten(1).mean(1)
            values = torch.stack([torch.ones_like(mse), mse, ce, correct]).double().cpu()
            sums.index_add_(1, t[part], values)
    return LevelSums(*sums)


def validate(
    model: Denoiser, x: Tensor, y: Tensor | None, ce_weight: float, mse_weight: float, draws: int = 1
) -> dict[str, float]:
    """Training terms and one-pass NLL with fixed noise.

    Args:
        model: In eval mode.
        x: Data units, (N, *shape).
        y: Classes, long (N,), or None.
        ce_weight: As in the loss.
        mse_weight: As in the loss.
        draws: Noisy copies of each sample.

    Returns:
        ``mse``, and for a cdm ``ce``, ``accuracy``, ``loss`` and ``nll``, in bits/dim for data on a grid and nats
        for continuous data.
    """
    values: dict[str, float] = level_sums(model, x, y, draws).means()
    if not isinstance(model, ClassificationDiffusion):
        return {"mse": values["mse"], "loss": values["mse"]}
    dim = x[0].numel()
    values["loss"] = mse_weight * values["mse"] + ce_weight / dim * values["ce"]
    values["nll"] = single_pass(model, x, y).mean_and_error()[0]
    return values


def evaluate(model: Denoiser, split: Split, limit: int | None = None, draws: int = 4, seed: int = 0) -> dict[str, Any]:
    """Level accuracy, cross-entropy and denoising error on a split, in total and by level.

    Args:
        model: In eval mode.
        split: The data.
        limit: At most so many samples.
        draws: Noisy copies of each sample.
        seed: Seed of the noise.

    Returns:
        ``count``, ``draws``, ``levels`` (T+2), ``mean`` with ``mse`` (levels 0 and T+1 left out), ``ce`` and
        ``accuracy``, and ``per_level`` with a list for each. A ddm has ``mse`` alone.
    """
    x, labels = split.tensors(limit)
    sums = level_sums(model, x, labels_for(model, labels), draws, seed)
    mean, per_level = sums.means(), sums.per_level()
    if not isinstance(model, ClassificationDiffusion):
        mean, per_level = {"mse": mean["mse"]}, {"mse": per_level["mse"]}
    return {
        "count": len(x),
        "draws": draws,
        "levels": model.schedule.T + 2,
        "mean": mean,
        "per_level": per_level,
    }


def labels_for(model: Denoiser, labels: Tensor) -> Tensor | None:
    """The labels, or contexts, of a split where the model is conditional and all samples have one."""
    if model.context is not None:
        return labels
    return labels if model.classes is not None and len(labels) and bool((labels >= 0).all()) else None


def _encode(model: Denoiser, x: Tensor, generator: torch.Generator) -> Tensor:
    return x.float() if model.transform is None else model.transform.encode(x, generator)
