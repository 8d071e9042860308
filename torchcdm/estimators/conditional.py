"""Conditional densities of a table given another: simulation-based inference in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, final

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from sklearn.utils import check_array, check_consistent_length
from sklearn.utils.validation import check_is_fitted

from torchcdm.apps.fitted import all_or_nothing
from torchcdm.errors import UserError
from torchcdm.estimators.base import SMALLEST_TABLE, DensityEstimator, TableEstimator, checked
from torchcdm.estimators.columns import Columns
from torchcdm.models.inputs import check_count
from torchcdm.runtime.validation import read_as

RIDGE = np.geomspace(1e-4, 1e4, 9)
"""Penalties that the regression chooses among by leaving one out."""


@final
@dataclass(kw_only=True, eq=False, repr=False)
class CDMConditional(DensityEstimator):
    """p(theta | x) from pairs (theta, x): the posterior, where theta was drawn from the prior and x simulated.

    theta = W x + b + a residual; the regression takes the linear part, and a classification diffusion model with x as
    its context the density of the residual given x. Before the first training step the model is the linear-Gaussian
    posterior. It is amortised: any x is conditioned on without further training.

    Args:
        likelihood: ``one-pass``, not exactly normalised, or ``flow``: see :class:`CDMDensity`.
        preset: This and all further parameters: see :class:`torchcdm.estimators.base.TableEstimator`.

    Attributes:
        model_: The trained :class:`torchcdm.ClassificationDiffusion`, of the residuals of theta.
        columns_: Which columns of theta were left out or dequantised, a :class:`Columns`.
        x_columns_: Which columns of x were left out; none is dequantised.
        notes_: This and all further attributes: see :class:`torchcdm.estimators.base.TableEstimator`.

    Example:
        >>> posterior = CDMConditional(random_state=0).fit(theta, x)
        >>> log_p = posterior.log_prob(theta, x)
        >>> draws = posterior.sample(1000, x_observed)
    """

    _saved: ClassVar = (
        TableEstimator._saved
        | {"x_columns_": partial(read_as, Columns)}
        | dict.fromkeys(("_x_mean", "_x_deviation", "_weights", "_intercept"), np.array)
    )

    def fit(self, theta: Any, x: Any) -> CDMConditional:
        """Trains the model. A fit that fails leaves the estimator as it was.

        Args:
            theta: Parameters (N, p) or (N,): array or data frame; at least ten rows.
            x: What was observed or simulated with them, (N, q) or (N,).

        Raises:
            ValueError: Values that are not finite numbers, tables of different lengths, fewer than ten rows.
            TypeError: A sparse matrix.
            UserError: Columns that :meth:`Columns.measure` refuses, or parameters that are not understood.
        """
        with all_or_nothing(self):
            self._check_parameters()
            names = [getattr(part, "columns", None) for part in (theta, x)]
            theta, x = (_table(part, name, SMALLEST_TABLE) for part, name in ((theta, "theta"), (x, "x")))
            check_consistent_length(theta, x)
            self.notes_, self.n_features_in_ = [], theta.shape[1]
            seed = self._seed()
            self.columns_ = self._measure_columns(theta, names[0], "theta: ")
            self.x_columns_ = self._measure_columns(x, names[1], "x: ", has_density=False)
            train, held_out = self._split_rows(len(theta), seed)
            self.validation_indices_ = held_out
            kept = x[train][:, self.x_columns_.kept]
            self._x_mean, self._x_deviation = kept.mean(0), kept.std(0)
            self._x_deviation[self._x_deviation == 0] = 1.0  # varies among the held-out rows alone
            parts, contexts = [], []
            for k, rows in enumerate((train, held_out)):
                noisy = self.columns_.noisy_copies(theta[rows], seed + k)
                parts.append(noisy)
                contexts.append(np.tile(self._context(x[rows]), (len(noisy) // len(rows), 1)))
            regression = RidgeCV(RIDGE).fit(contexts[0], parts[0])
            self._weights = np.reshape(regression.coef_, (parts[0].shape[1], -1))
            self._intercept = np.atleast_1d(regression.intercept_)
            residuals = [part - self._centre(context) for part, context in zip(parts, contexts, strict=True)]
            self._train(residuals[0], residuals[1], (contexts[0], contexts[1]), len(train), seed)
            self._noise = self.columns_.noise_draws(seed)
        return self

    def log_prob(self, theta: Any, x: Any) -> np.ndarray:
        """log p(theta | x), nats in the units of theta; of discrete columns as in :meth:`CDMDensity.score_samples`.

        Args:
            theta: (N, p).
            x: (N, q), or one row, (q,) or (1, q), for all.

        Returns:
            float64 (N,).
        """
        check_is_fitted(self)
        theta, x = _matching(theta, "theta", self.columns_), self._observations(x)
        if len(x) not in (1, len(theta)):
            raise UserError(f"x holds {len(x)} rows and theta {len(theta)}; give one x, or one for each theta")
        context = np.broadcast_to(self._context(x), (len(theta), len(self.x_columns_.kept)))
        return self._log_density(theta, self._centre(context), context)

    def score(self, theta: Any, x: Any) -> float:
        """Mean of :meth:`log_prob`, nats a row: what a grid search goes by."""
        return float(self.log_prob(theta, x).mean())

    def sample(self, n: int, x: Any, random_state: Any = None) -> np.ndarray:
        """Draws of theta given x.

        Args:
            n: Draws for each x.
            x: One observation (q,), or several (M, q).
            random_state: Seed; the estimator's own when None.

        Returns:
            float64 (n, p) for one observation, (M, n, p) for several.
        """
        check_is_fitted(self)
        check_count("n", n, 1, 10**6)
        one = np.ndim(x) == 1 and len(self.x_columns_.names) > 1 or np.ndim(x) == 0
        x = self._observations(x)
        context = np.repeat(self._context(x), n, axis=0)
        residuals = self._draws(len(context), random_state, torch.from_numpy(context))
        theta = self.columns_.restore(residuals + self._centre(context))
        return theta if one else theta.reshape(len(x), n, -1)

    # --- parts ---------------------------------------------------------------------------------------------------

    def _observations(self, x: Any) -> np.ndarray:
        """x as a table: a vector is one observation, unless x has one column."""
        single = len(self.x_columns_.names) == 1
        if np.ndim(x) < 2:
            x = np.reshape(x, (-1, 1) if single else (1, -1))
        return _matching(x, "x", self.x_columns_)

    def _context(self, x: np.ndarray) -> np.ndarray:
        """What the network sees of x (N, q): the columns that vary, standardised."""
        return (x[:, self.x_columns_.kept] - self._x_mean) / self._x_deviation

    def _centre(self, context: np.ndarray) -> np.ndarray:
        """The regression of theta, (N, kept)."""
        return context @ self._weights.T + self._intercept


def _table(values: Any, name: str, smallest: int = 1) -> np.ndarray:
    """A table of finite numbers as float64 (N, columns); a vector is one column."""
    values = np.reshape(values, (-1, 1)) if np.ndim(values) < 2 else values
    return checked(check_array, values, ensure_min_samples=smallest, input_name=name)


def _matching(values: Any, name: str, columns: Columns) -> np.ndarray:
    """A table to score, its columns those of the fit: by name where both have names, in any order.

    Raises:
        UserError: Another number of columns, or other names.
    """
    names = [str(column) for column in getattr(values, "columns", ())]
    table = _table(values, name)
    if table.shape[1] != len(columns.names):
        raise UserError(f"{name} has {table.shape[1]} columns; the fit had {len(columns.names)}")
    if not names or columns.names == tuple(map(str, range(len(columns.names)))):
        return table
    missing = next((column for column in columns.names if column not in names), None)
    if missing is not None:
        raise UserError(f"{name} has no column '{missing}', which the fit had (found: {', '.join(names)})")
    return table[:, [names.index(column) for column in columns.names]]
