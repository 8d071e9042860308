r"""Where a model is inconsistent, level by level: checks that a perfect classifier passes exactly.

.. math:: E_{p_t}[p_{t-1}(x)/p_t(x)] = 1, \qquad E_{p_{t-1}}[p_t(x)/p_{t-1}(x)] = 1

with the ratios by the logits (identity 1). These are checks of neighbouring logits, not an estimate of log Z. And the
gap between one pass and the probability flow, accumulated from the noise end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchcdm.likelihood.flow import FlowSolver
from torchcdm.likelihood.scoring import Batch, Scoring, as_data
from torchcdm.models.denoiser import working_dtype
from torchcdm.models.density import DensityModel, require_density


class Consistency(NamedTuple):
    """One number for each pair of neighbouring levels, entry i for the pair (i, i + 1); all float64 (T+1,).

    Attributes:
        down: Mean of p_i / p_{i+1} on data noised to level i + 1; 1 for a perfect classifier.
        up: Mean of p_{i+1} / p_i on data noised to level i; 1 for a perfect classifier.
        down_se: Standard error of ``down``; no guide where a few samples dominate the mean.
        up_se: Standard error of ``up``.
    """

    down: Tensor
    up: Tensor
    down_se: Tensor
    up_se: Tensor

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        return {name: value.tolist() for name, value in self._asdict().items()}


class LevelGaps(NamedTuple):
    """NLL by one pass minus NLL by the flow, along the paths of noisy data; above 0 one pass finds them less likely.

    Attributes:
        levels: Visited levels, rising.
        mean: Mean over samples, nats, at each of them.
        sd: Standard deviation over samples; the probes' noise included.
    """

    levels: list[int]
    mean: Tensor
    sd: Tensor

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        return {"levels": self.levels, "mean": self.mean.tolist(), "sd": self.sd.tolist()}


def consistency(model: DensityModel, x: Tensor, y: Tensor | None = None, scoring: Scoring = Scoring()) -> Consistency:
    """Ratios of neighbouring levels on noised data, N at least 2; T + 2 forward passes.

    Arguments as in :func:`torchcdm.likelihood.single_pass`; of ``scoring`` seed and batch size are used.
    """
    model, (x, y) = require_density(model, "consistency"), as_data(model, x, y)
    dtype = working_dtype(model, torch.float64)

    def ratios(rows: slice) -> tuple[Tensor, Tensor]:
        batch, down, up = Batch(model, x, y, rows, scoring.seed), [], []
        x_0 = model.transform(batch.dithered())
        for t in range(model.schedule.T + 2):
            x_t = model.schedule.perturb(x_0, t, batch.normal("levels", t))
            log_p = model.log_prob_levels(x_t.to(dtype), batch.y).double().cpu()
            if t > 0:
                down.append((log_p[:, t - 1] - log_p[:, t]).exp())
            if t <= model.schedule.T:
                up.append((log_p[:, t + 1] - log_p[:, t]).exp())
        return torch.stack(down, 1), torch.stack(up, 1)

    down, up = scoring.by_batches(model, x, ratios)
    root = len(x) ** 0.5
    return Consistency(down.mean(0), up.mean(0), down.std(0) / root, up.std(0) / root)


def gap_by_level(model: DensityModel, x: Tensor, y: Tensor | None = None, scoring: Scoring = Scoring()) -> LevelGaps:
    """The accumulated gap of NLL between one pass and flow at every level that the flow visits; N at least 2.

    Arguments as in :func:`torchcdm.likelihood.probability_flow`, whose paths begin at the level of ``scoring``.
    """
    model, (x, y) = require_density(model, "a gap to the flow"), as_data(model, x, y)
    solver = FlowSolver(model, scoring)
    z = scoring.by_batches(model, x, lambda rows: Batch(model, x, y, rows, scoring.seed).noised(solver.levels[0]))
    log_prob, (own,) = solver.path(z, lambda x_t, t, labels: (model.log_prob_levels(x_t, labels)[:, t],), y)
    gaps = log_prob - own
    return LevelGaps(solver.levels, gaps.mean(1).cpu(), gaps.std(1).cpu())
