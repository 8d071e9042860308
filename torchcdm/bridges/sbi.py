"""Conditional densities and density ratios for sbi (github.com/sbi-dev/sbi), whose posteriors and diagnostics run.

``DirectPosterior(SbiDensity(posterior), prior)`` is what ``run_sbc``, ``run_tarp`` and the rest of sbi take.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, final

import numpy as np
import pandas as pd
import torch
from annotated_types import Lt
from sbi.neural_nets.estimators.base import ConditionalDensityEstimator
from sbi.neural_nets.ratio_estimators import RatioEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from torchcdm.errors import UserError
from torchcdm.random import permutation
from torchcdm.runtime.validation import Count, read_as

if TYPE_CHECKING:
    from torchcdm.apps.ratio import DensityRatio
    from torchcdm.estimators import CDMConditional
    from torchcdm.units import TableEncoding


@final
class SbiDensity(ConditionalDensityEstimator):
    """p(theta | x) of an ``estimator`` that was fitted on pairs of theta, drawn from the prior, and x."""

    def __init__(self, estimator: CDMConditional) -> None:
        check_is_fitted(estimator)
        shapes = ((len(columns.columns),) for columns in (estimator.columns_, estimator.x_columns_))
        super().__init__(estimator.model_, *map(torch.Size, shapes))
        self.estimator = estimator

    def log_prob(self, input: Tensor, condition: Tensor, **_: Any) -> Tensor:
        """log p(theta | x), nats (samples, batch), without a gradient. Theta is ``input``, (samples, batch, p) or
        (batch, p), and x ``condition``, (batch, q); both broadcast."""
        self._check_input_shape(input)
        self._check_condition_shape(condition)
        theta, x, _ = self._broadcast_and_align(input, condition)
        rows, given = _rows(theta, self.estimator.columns_), _rows(x, self.estimator.x_columns_)
        return torch.from_numpy(self.estimator.log_prob(rows, given)).to(input).reshape(theta.shape[:2])

    def sample(self, sample_shape: torch.Size, condition: Tensor, **_: Any) -> Tensor:
        """Draws of theta (*sample_shape, batch, p) given x (batch, q); torch's seed decides which."""
        self._check_condition_shape(condition)
        seed = int(torch.randint(2**31 - 1, ()))
        n = torch.Size(sample_shape).numel()
        x = _rows(condition, self.estimator.x_columns_)
        draws = np.array(self.estimator.sample(n, x, random_state=seed), np.float64)
        draws = torch.from_numpy(draws.reshape(-1, n, *self.input_shape)).to(condition)
        return draws.transpose(0, 1).reshape(*sample_shape, -1, *self.input_shape)

    def loss(self, input: Tensor, condition: Tensor, **_: Any) -> Tensor:
        """-log p(theta | x), (batch,), to validate by; the estimator trains itself."""
        return -self.log_prob(input, condition)[0]


@final
class SbiRatio(RatioEstimator):
    """log p(theta, x) / (p(theta) p(x)) of a fitted ratio, up to a constant: what ``RatioBasedPotential`` takes.

    The ``ratio`` was fitted on what :func:`pairs_and_strangers` gives. So many of its first columns as ``parameters``
    says are theta; UserError for no such number, or a ratio of images. It has no gradient in theta: sbi's slice
    samplers and importance sampling work, HMC and NUTS do not.
    """

    def __init__(self, ratio: DensityRatio, parameters: int) -> None:
        ratio._check_fitted()
        if ratio._warp is None:
            raise UserError("the ratio is one of images; fit it on what pairs_and_strangers gives")
        self.columns: TableEncoding = ratio._warp.table
        parameters = read_as(Annotated[Count, Lt(len(self.columns.columns))], parameters, "parameters")
        super().__init__(ratio._model, (parameters,), (len(self.columns.columns) - parameters,))
        self.ratio = ratio

    def unnormalized_log_ratio(self, theta: Tensor, x: Tensor) -> Tensor:
        """The log ratio, nats, (...), of theta (..., p) and x (..., q)."""
        rows = self.combine_theta_and_x(theta, x)
        return torch.from_numpy(self.ratio.log_ratio(_rows(rows, self.columns))).to(theta).reshape(rows.shape[:-1])


def pairs_and_strangers(theta: Any, x: Any, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows (theta, x) that belong together, and rows whose x is that of another theta: numerator and denominator."""
    theta, x = (np.asarray(part, np.float64).reshape(len(part), -1) for part in (theta, x))
    if not 1 < len(theta) == len(x):
        raise UserError(f"pairs_and_strangers: {len(theta)} rows of theta, {len(x)} of x; give as many, at least two")
    order = permutation(len(x), seed).numpy()  # each takes the x of the one before: none keeps its own
    return np.concatenate([theta, x], 1), np.concatenate([theta[order], x[np.roll(order, 1)]], 1)


def _rows(values: Tensor, table: TableEncoding) -> pd.DataFrame:
    """Numbers (..., columns) as rows of the table that was fitted, whose columns may have names."""
    numbers = values.detach().reshape(-1, values.shape[-1]).double().cpu().numpy()
    return pd.DataFrame(numbers, columns=[column.name for column in table.columns])
