r"""Where a model is inconsistent, level by level: checks that a perfect classifier passes exactly.

.. math:: E_{p_t}[p_{t-1}(x)/p_t(x)] = 1, \qquad E_{p_{t-1}}[p_t(x)/p_{t-1}(x)] = 1

with the ratios by the logits (identity 1). These are checks of neighbouring logits, not an estimate of log Z. And the
gap between one pass and the probability flow, accumulated from the noise end.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from torchcdm.likelihood.common import CHAIN, dithered, draw_normal, labels_of, require_transform
from torchcdm.likelihood.flow import flow_path
from torchcdm.likelihood.single_pass import noised
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import evaluation_mode, working_dtype
from torchcdm.runtime.batching import map_rows


@dataclass(frozen=True)
class Consistency:
    """One number for each pair of neighbouring levels, entry i for the pair (i, i + 1); all float64 (T+1,).

    Attributes:
        down: Mean of p_i / p_{i+1} on data noised to level i + 1; 1 for a perfect classifier.
        up: Mean of p_{i+1} / p_i on data noised to level i; likewise.
        down_se: Standard error of ``down``; no guide where a few samples dominate the mean.
        up_se: Standard error of ``up``.
    """

    down: Tensor
    up: Tensor
    down_se: Tensor
    up_se: Tensor

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        return {name: value.tolist() for name, value in asdict(self).items()}


@dataclass(frozen=True)
class LogProbGaps:
    """log p by one pass less that by the flow, along the paths of noisy data.

    Above 0 one pass finds the data more likely; :class:`torchcdm.likelihood.NLLGap` has the opposite sign.

    Attributes:
        levels: Visited levels, rising.
        mean: Mean over samples of log p_t - log p_flow, nats, at each of them.
        sd: Standard deviation over samples; the probes' noise included.
    """

    levels: list[int]
    mean: Tensor
    sd: Tensor

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        return {"levels": self.levels, "mean": self.mean.tolist(), "sd": self.sd.tolist()}


@torch.no_grad()
def consistency(
    model: ClassificationDiffusion, x: Tensor, y: Tensor | None = None, seed: int = 0, batch_size: int | None = None
) -> Consistency:
    """Ratios of neighbouring levels on noised data; T + 2 forward passes.

    Args:
        model: The model; put into evaluation mode meanwhile.
        x: Data units, (N, *shape), N at least 2.
        y: Classes, long (N,), or None.
        seed: Seed of the noise; independent of ``batch_size``.
        batch_size: Samples at a time; by their size, and what memory holds, when None.
    """
    transform, schedule = require_transform(model), model.schedule
    dtype, device = working_dtype(model, torch.float64), schedule.alpha.device

    def ratios(rows: slice) -> tuple[Tensor, Tensor]:
        x_0 = transform(dithered(transform, x, rows, seed).to(device))
        labels, down, up = labels_of(y, rows, device), [], []
        for t in range(schedule.T + 2):
            x_t = schedule.perturb(x_0, t, draw_normal(seed, (CHAIN, t), rows, x_0))
            log_p = model.log_prob_levels(x_t.to(dtype), labels).double().cpu()
            if t > 0:
                down.append((log_p[:, t - 1] - log_p[:, t]).exp())
            if t <= schedule.T:
                up.append((log_p[:, t + 1] - log_p[:, t]).exp())
        return torch.stack(down, 1), torch.stack(up, 1)

    with evaluation_mode(model):
        down, up = map_rows(ratios, len(x), batch_size, dim=x.shape[1:].numel(), device=device)
    root = len(x) ** 0.5
    return Consistency(down.mean(0), up.mean(0), down.std(0) / root, up.std(0) / root)


def gap_by_level(
    model: ClassificationDiffusion,
    x: Tensor,
    y: Tensor | None = None,
    level: int = 1,
    steps: int | None = None,
    probes: int = 2,
    seed: int = 0,
    batch_size: int | None = None,
) -> LogProbGaps:
    """The accumulated gap of log p between one pass and flow at every level that the flow visits.

    Args:
        model: The model; put into evaluation mode meanwhile.
        x: Data units, (N, *shape).
        y: Classes, long (N,), or None.
        level: Where the paths begin.
        steps: Of the flow; all levels when None.
        probes: Of its divergence.
        seed: Seed of the noise; independent of ``batch_size``.
        batch_size: Samples at a time; by their size, and what memory holds, when None.
    """
    z = map_rows(
        lambda rows: noised(model, x, rows, level, seed), len(x), batch_size,
        dim=x.shape[1:].numel(), device=model.schedule.alpha.device,
    )  # fmt: skip

    def one_pass(x_t: Tensor, t: int, labels: Tensor | None) -> tuple[Tensor]:
        return (model.log_prob_levels(x_t, labels)[:, t],)

    path = flow_path(model, z, one_pass, y, level, steps, probes, seed, batch_size)
    gaps = path.seen[0] - path.log_prob
    return LogProbGaps(path.levels, gaps.mean(1).cpu(), gaps.std(1).cpu())
