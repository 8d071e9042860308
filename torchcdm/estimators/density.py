"""Density of a table as a scikit-learn estimator."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, final

import numpy as np
import torch
from sklearn.base import DensityMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from typing_extensions import Self

from torchcdm.annealing.target import in_batches
from torchcdm.apps.fitted import all_or_nothing
from torchcdm.estimators.base import DensityEstimator, TableEstimator, data_frame, noisy_copies
from torchcdm.likelihood import LogZ
from torchcdm.models.density import DensityModel
from torchcdm.random import stream
from torchcdm.runtime.processes import labels_of
from torchcdm.runtime.validation import Count, read_as
from torchcdm.units.frames import is_frame
from torchcdm.units.table import Encoded

SHARES = (1.0, 0.5, 0.25, 0.0)  # of what the network adds to the log density of its start, so much is tried
DRAWS = 20_000  # draws that Z is estimated from
ESTIMATES = 200  # independent estimates of Z from all draws, from whose spread the error comes
# Half of the draws come from the base density blurred by so much noise, beside the data's scale: the model may have
# mass where the base has little, and draws from there alone would never see it.
WIDE = 0.3


class TableDensity(TableEstimator):
    """A model of the rows of one table; what :class:`CDMDensity` and the outlier detector share."""

    _saved: ClassVar = TableEstimator._saved | {"feature_names_in_": partial(np.array, dtype=object)}

    def fit(self, X: Any, y: Any = None) -> Self:
        """Trains the model on a table (N, columns) of at least ten rows; ``y`` is ignored.

        A data frame as it comes, with texts, dates, booleans and missing cells; of an array finite numbers. ValueError
        for others or fewer rows, TypeError for a sparse matrix, UserError for wrong parameters, or columns that
        :class:`torchcdm.units.TableEncoding` refuses. A fit that fails leaves the estimator as it was.
        """
        with all_or_nothing(self):
            self._check()
            self._framed = is_frame(X)
            frame = data_frame(X, "the table", check=partial(validate_data, self))
            if self._framed:
                validate_data(self, frame, skip_check_array=True)
            self.notes_ = []
            seed = self._seed()
            self.columns_ = self._describe(frame, "the table")
            codes = self.columns_.encode(frame, "the table").x
            train, self.validation_indices_ = self._split_rows(codes, seed)
            held_out = codes[self.validation_indices_]
            parts = [noisy_copies(self.columns_, part, seed, k) for k, part in enumerate((codes[train], held_out))]
            self._train(parts, None, len(train), seed, self.clock())
            self._after_training(codes, held_out, seed)
        return self

    def _after_training(self, codes: Tensor, held_out: Tensor, seed: int) -> None:
        """What else a subclass learns, from all rows and those that training did not see."""

    def _encoded(self, X: Any, deviating: bool = False) -> Encoded:
        """The codes of a table to score; ``deviating`` cells are marked, and no error."""
        check_is_fitted(self)
        frame = data_frame(X, "the table", self.columns_, partial(validate_data, self, reset=False))
        return self.columns_.encode(frame, "the table", deviating=deviating)


@final
@dataclass(kw_only=True, eq=False, repr=False)
class CDMDensity(DensityMixin, DensityEstimator, TableDensity):
    """Density estimation by a classification diffusion model: ``KernelDensity`` for correlated columns.

    Args:
        likelihood: How rows are scored; may be changed after fitting (``set_params``). ``one-pass``: one network pass
            a row, less the estimate of log Z. ``flow``: the probability flow of the same network, normalised by
            construction, some hundred passes a row.
        preset: This and all further parameters: see :class:`torchcdm.estimators.base.TableEstimator`.

    Attributes:
        share_: Of what the network adds to its start, the share, 0 to 1, under which held-out rows are likeliest.
        normalizer_: The estimated integral of that density, a :class:`torchcdm.likelihood.LogZ`.
        model_: This and all further attributes: see :class:`torchcdm.estimators.base.TableEstimator`.

    Example:
        >>> density = CDMDensity(random_state=0).fit(X)
        >>> log_p = density.score_samples(X)
        >>> new_rows = density.sample(100, random_state=1)
    """

    _saved: ClassVar = TableDensity._saved | {"normalizer_": lambda fields: LogZ(**fields), "share_": float}

    def score_samples(self, X: Any) -> np.ndarray:
        """log p of each row of a table (N, columns), nats in its units, float64 (N,); columns with names go by these.

        Where values have cells it is the mean over draws of the dequantisation noise: a probability of texts, missing
        cells and values that come back, a density of all other numbers. Constant columns have no part in it.
        """
        found = self._encoded(X)
        log_p = self._log_density(found, found.x, lambda rows: rows)
        return log_p - self.normalizer_.value if self.likelihood == "one-pass" else log_p

    def _after_training(self, codes: Tensor, held_out: Tensor, seed: int) -> None:
        """Finds the share of what the network adds under which held-out rows are most probable, normalised."""
        model, shares = self.model_, torch.tensor(SHARES, dtype=torch.float64)
        z = model.transform(next(self._noisy(held_out)).to(model.schedule.alpha.device))
        found = importance_normalizers(model, seed)
        added = in_batches(model, z, lambda rows: _base_and_network(model, z[rows])[1])
        log_z = torch.tensor([torch.inf if one.lacking else one.value for one in found])
        best = int((shares * float(added.mean()) - log_z).argmax())
        self.normalizer_, self.share_ = found[best], SHARES[best]
        if self.share_ < 1:
            self._say(f"one pass counts {self.share_:.0%} of what the network adds, as held-out rows have it")

    def score(self, X: Any, y: Any = None) -> float:
        """Mean of :meth:`score_samples`, nats a row, as of ``GaussianMixture``; ``KernelDensity`` has the sum."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1, random_state: Any = None) -> Any:
        """New rows: a data frame where one was fitted, float64 (n_samples, columns) else.

        Columns of few values are rounded to these, constant columns filled in. The seed is the estimator's own where
        ``random_state`` is None.
        """
        check_is_fitted(self)
        read_as(Count, n_samples, "n_samples")
        return self._decoded(self._draws(n_samples, random_state))


def importance_normalizers(model: DensityModel, seed: int = 0, draws: int = DRAWS) -> list[LogZ]:
    """Z = E_q[p(x) / q(x)] of an unconditional model of vectors, q half the base density and half its blurred copy.

    One for each of ``SHARES``, from ``draws``, rounded up so that each estimate has as many from either half of q.
    """
    of_base, added = log_importance_weights(model, ESTIMATES * math.ceil(draws / (2 * ESTIMATES)), seed).T
    weights = [(of_base + share * added).view(-1, ESTIMATES) for share in SHARES]
    estimates = [one.logsumexp(0) - math.log(len(one)) for one in weights]
    return [LogZ.of_weights(one, "importance sampling from the base", 0, model.transform.dim) for one in estimates]


def log_importance_weights(model: DensityModel, half: int, seed: int, y: Tensor | None = None) -> Tensor:
    """log(base / q) and what the network adds at ``half`` draws of base, as many blurred, given ``y``: (2 half, 2)."""
    schedule, generator, dim = model.schedule, stream(seed, "normaliser"), model.transform.dim
    wide = int((schedule.ratio[:-1] - WIDE).abs().argmin())
    log_alpha = float(schedule.alpha[wide].log())
    x = model.base.draw((2 * half, dim), generator)
    x[half:] += schedule.ratio[wide] * torch.randn(half, dim, generator=generator, dtype=x.dtype).to(x.device)

    def log_weights(rows: slice) -> Tensor:
        base, added = _base_and_network(model, x[rows], labels_of(y, rows, x.device))
        blurred = model.base.log_prob_levels(schedule.alpha[wide] * x[rows])[:, wide] + dim * log_alpha
        return torch.stack([base - torch.logaddexp(base, blurred) + math.log(2), added], 1).cpu()

    return in_batches(model, x, log_weights)


def _base_and_network(model: DensityModel, z: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """log density of the base and what the network adds to it, at level 0, of ``z`` (N, d), each (N,)."""
    base = model.base.log_prob_levels(z)[:, 0]
    return base, model.log_prob(z, y=y, units="model") - base
