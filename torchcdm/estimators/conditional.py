"""Conditional densities of a table given another: simulation-based inference in one pass."""

from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, final

import numpy as np
import pandas as pd
import torch
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import GammaRegressor
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.nn.functional import one_hot

from torchcdm.annealing.target import in_batches
from torchcdm.apps.fitted import all_or_nothing
from torchcdm.compose import sample
from torchcdm.compose.combinations import AllGiven
from torchcdm.compose.tilted import TRIED, floored, one_each
from torchcdm.data.arrays import as_array
from torchcdm.errors import UserError, reason, warn
from torchcdm.estimators.base import DensityEstimator, TableEstimator, data_frame, noisy_copies
from torchcdm.estimators.density import log_importance_weights
from torchcdm.estimators.smooth import SmoothRegression, fit_smooth
from torchcdm.runtime.validation import Count, ProperShare, read_as, shown
from torchcdm.units import ColumnTransform, TableEncoding, transform_from_config
from torchcdm.units.frames import is_frame
from torchcdm.units.lattice import Cells, cell_width

REPEATED = 5  # rows for each distinct value of a column of x, at least, for it to go by the ranks of its values
PARTICLES, MOVES = 1000, 2  # of draws given several x together: least number, moves a step
REGION = 10_000  # draws that say what a region is
ROUNDS = 20  # so often draws are made again where the prior has mass at none of them

FEW = 3  # columns of theta up to which the integral of one pass is learned
OBSERVED, DRAWN = 1000, 64  # rows of x that it is learned of, at most, and draws of the start for each
PENALTY = 0.1
FLOOR = 1e-6  # of a column's variance, added to its squared residuals
FAR = 5.0  # deviations within which summaries of x are kept


@final
@dataclass(kw_only=True, eq=False, repr=False)
class CDMConditional(DensityEstimator):
    """p(theta | x) from pairs (theta, x): the posterior, where theta was drawn from the prior and x simulated.

    Columns of x are brought near a normal, and those of theta where the linear-Gaussian model then finds held-out rows
    more probable: bounds of a prior become tails. theta = f(x) + a residual: a line, and a curve where it finds rows
    that are left out better (:mod:`torchcdm.estimators.smooth`). A classification diffusion model learns the density
    of the residual given x, f(x) and its own size by another such regression. It is amortised: any x is conditioned on
    without training.

    Args:
        likelihood: ``one-pass``, less its integral as a regression on what the network makes of x knows it (of theta
            in up to three columns; beyond, not normalised), or ``flow``: see :class:`CDMDensity`.
        preset: This and all further parameters: see :class:`torchcdm.estimators.base.TableEstimator`.

    Attributes:
        model_: The trained :class:`torchcdm.ClassificationDiffusion`, of the residuals of theta.
        columns_: The columns of theta and their codes, a :class:`torchcdm.units.TableEncoding`.
        x_columns_: Those of x.
        notes_: This and all further attributes: see :class:`torchcdm.estimators.base.TableEstimator`.

    Example:
        >>> posterior = CDMConditional(random_state=0).fit(theta, x)
        >>> log_p = posterior.log_prob(theta, x)
        >>> draws = posterior.sample(1000, x_observed)
    """

    _conditional = True
    _saved: ClassVar = TableEstimator._saved | {"x_columns_": partial(read_as, TableEncoding)}
    _saved |= dict.fromkeys(("_units", "_x_units"), transform_from_config)
    _saved |= dict.fromkeys(("_centre", "_log_size"), lambda parts: SmoothRegression(*map(np.array, parts)))
    _saved |= dict.fromkeys(("_scales", "_normalizer"), np.array)

    def fit(self, theta: Any, x: Any) -> "CDMConditional":
        """Trains the model on parameters ``theta`` (N, p) or (N,) and what was observed or simulated with them, ``x``
        (N, q) or (N,), of which the network sees a number for each level of a text.

        Tables and errors as of :meth:`CDMDensity.fit`, and ValueError for parts of other lengths.
        """
        with all_or_nothing(self):
            self._check()
            self._framed = is_frame(theta)
            frames = [data_frame(part, name) for part, name in ((theta, "theta"), (x, "x"))]
            check_consistent_length(*frames)
            self.notes_, self.n_features_in_ = [], frames[0].shape[1]
            seed = self._seed()
            self.columns_ = self._describe(frames[0], "theta")
            self.x_columns_ = self._describe(frames[1], "x", has_density=False)
            theta, x = self.columns_.encode(frames[0], "theta").x, self.x_columns_.encode(frames[1], "x").x
            split = train, self.validation_indices_ = self._split_rows(theta, seed, x)
            copies = [noisy_copies(self.columns_, theta[rows], seed, k) for k, rows in enumerate(split)]
            values, most = enumerate(np.unique(column) for column in x[train].T), len(train) / REPEATED
            repeated = {k: Cells(tuple(found), cell_width(found)) for k, found in values if 1 < len(found) <= most}
            self._x_units = ColumnTransform.fit(x[train], repeated, dequantize=False)
            times = len(copies[0]) // len(train), len(copies[1]) // len(self.validation_indices_)
            given = [self._numbers(x[rows]) for rows in split]

            def regress(parts: list[np.ndarray], smooth: bool) -> tuple[SmoothRegression, list[Tensor]]:
                # A row's own value has no part in what it is compared with, else errors of few rows were too small.
                mean = parts[0].mean(0)
                found, errors = fit_smooth(given[0], mean, smooth)
                left = parts[0] - mean + errors, parts[1] - found(given[1])
                return found, [torch.from_numpy(part).flatten(0, 1) for part in left]

            def candidate(near: bool) -> tuple[float, list[np.ndarray], ColumnTransform]:
                # Near a normal whatever x says: wrong where it is x that gives theta its shape.
                units = ColumnTransform.fit(copies[0], self.columns_.cells, near, dequantize=False, step=near)
                parts = [units(copy).view(n, -1, copy.shape[1]).numpy() for copy, n in zip(copies, times, strict=True)]
                learned, held_out = regress(parts, smooth=False)[1]
                value = LedoitWolf().fit(learned).score(held_out) + float(units.log_det(copies[1]).mean())
                return value, parts, units

            _, parts, self._units = max(map(candidate, (False, True)), key=lambda trial: trial[0])
            began = self.clock()
            self._centre, residuals = regress(parts, smooth=True)
            seen = self._summarised(given, parts[0], residuals[0].view(parts[0].shape).numpy())
            contexts = [np.tile(part, (n, 1)) for part, n in zip(seen, times, strict=True)]
            self._train(residuals, contexts, len(train), seed, began)
            # Weights of the features, and a constant; the rows are in random order.
            low = residuals[0].shape[1] <= FEW
            self._normalizer = self._learned_normalizer(contexts[0][:OBSERVED], seed) if low else np.empty(0)
        return self

    def log_prob(self, theta: Any, x: Any, together: bool = False, prior: Any = None) -> np.ndarray:
        """log p(theta | x), nats in the units of theta, float64 (N,); discrete columns as in :class:`CDMDensity`.

        Args:
            theta: (N, p).
            x: (N, q), or one row, (q,) or (1, q), for all.
            together: Whether all M rows of x are observations of one theta, independent given it: log p(theta | x_1
                ... x_M) = sum_m log p(theta | x_m) - (M - 1) log p(theta), less a constant that is not known.
            prior: p(theta), needed for several together: what has ``log_prob``, as distributions of torch and sbi, of
                tensors (N, p); or ``score_samples``, such as a :class:`CDMDensity` of training's theta. Where it has
                no mass the result is -inf; of single observations it is unchanged elsewhere: its integral is the
                share of draws inside.
        """
        check_is_fitted(self)
        found = self.columns_.encode(data_frame(theta, "theta", like=self.columns_), "theta")
        theta, x = found.x, self._observations(x)
        rows, times = len(theta), len(x) if together else 1
        less = self._log_prior(prior, theta, 1 - times).numpy() if times > 1 or prior is not None else 0.0
        if together:
            theta, x = theta.repeat(times, 1), x.repeat_interleave(rows, 0)
        if len(x) not in (1, len(theta)):
            raise UserError(f"x holds {len(x)} rows and theta {rows}; give one x, or one for each theta")
        given = self._numbers(x)
        context, centre = self._context(given), torch.from_numpy(self._centre(given))
        known = self._normalizer.size and self.likelihood == "one-pass"
        log_z = self._features(context) @ self._normalizer[:-1] + self._normalizer[-1] if known else 0.0
        context = np.broadcast_to(context, (len(theta), context.shape[1]))
        log_p = self._log_density(found, theta, lambda rows: self._units(rows) - centre, context)
        log_p += self._over_draws(self._units.log_det, theta) - log_z
        return log_p.reshape(times, rows).sum(0) + less

    def score(self, theta: Any, x: Any) -> float:
        """Mean of :meth:`log_prob`, nats a row: what a grid search goes by."""
        return float(self.log_prob(theta, x).mean())

    def sample(self, n: int, x: Any, random_state: Any = None, together: bool = False, prior: Any = None) -> Any:
        """Draws of theta given x: float64 (n, p) for one observation, and for all together, (M, n, p) for several.
        Where theta was a data frame, a data frame: of several with rows (observation, draw).

        Args:
            n: Draws for each x.
            x: One observation (q,), or several (M, q).
            random_state: Seed; the estimator's own when None.
            together: Whether all rows of x are observations of one theta, as in :meth:`log_prob`: draws by particles,
                whose weights and moves correct what a sum of the denoisers gets wrong (:mod:`torchcdm.compose`).
            prior: p(theta), needed for several together. The gradient of a ``log_prob`` is used where there is one.
                Given single observations those where it has no mass are drawn again, as by sbi's ``DirectPosterior``.
        """
        check_is_fitted(self)
        read_as(Count, n, "n")
        one = np.ndim(x) == 1 and len(self.x_columns_.columns) > 1 or np.ndim(x) == 0
        given = self._numbers(self._observations(x))
        context, centre = self._context(given), torch.from_numpy(self._centre(given))
        if together and len(context) > 1:
            return self._drawn_together(n, context, centre, prior, self._seed(random_state))
        centre, y = (part.repeat_interleave(n, 0) for part in (centre, torch.from_numpy(context)))
        theta = self._decoded(self._codes_given(y, centre, prior, self._state(random_state), n))
        if one or together:
            return theta
        if not self._framed:
            return theta.reshape(len(theta) // n, n, -1)
        return theta.set_index(pd.MultiIndex.from_product([range(len(theta) // n), range(n)]))

    def inside(self, theta: Any, x: Any, mass: ProperShare = 0.9999, random_state: Any = None) -> np.ndarray:
        """Whether theta (N, p) lie where p(theta | x) is highest, in the region that holds so much ``mass``, (N,).

        Of one x (q,). A prior cut to this region is a proposal for more simulations, which needs no correction:
        truncated sequential estimation (Deistler et al. 2022, arXiv 2210.04815). The least density inside is a
        quantile of those of 10 000 draws. UserError for several x, or a mass that is not between 0 and 1.
        """
        read_as(ProperShare, mass, "mass")
        if len(self._observations(x)) != 1:
            raise UserError("inside: x holds several observations; a region is that of one")
        draws = self.sample(REGION, x, random_state)
        draws = draws if self._framed else draws.reshape(REGION, -1)
        return self.log_prob(theta, x) >= np.quantile(self.log_prob(draws, x), 1 - mass)

    def _codes_given(self, y: Tensor, centre: Tensor, prior: Any, state: np.random.RandomState, n: int) -> Tensor:
        """A draw for each context (B, q) off its ``centre``, ``n`` of each x; where a ``prior`` has mass."""
        codes, barren = y.new_empty(len(y), len(self.columns_.kept)), 0
        rows = left = torch.arange(len(y))
        while len(left):
            drawn = self._units.inverse(self._draws(len(rows), state, y[rows]) + centre[rows])
            if prior is None:
                return drawn
            inside = self._log_prior(prior, drawn, 0) > -torch.inf
            codes[rows[inside]] = drawn[inside]
            left = left[~torch.isin(left, rows[inside])]
            barren = 0 if inside.any() else barren + 1
            if barren == ROUNDS:
                raise UserError(f"prior: no mass in any draw given x number {left[0] // n}; fit more pairs near it")
            rows = left.repeat(max(len(y), TRIED) // max(1, len(left)))  # many tries for the last ones
        return codes

    def _drawn_together(self, n: int, context: np.ndarray, centre: Tensor, prior: Any, seed: int) -> Any:
        """Draws (n, p) given all contexts (M, q); residuals are off the curves' ``centre``, (M, kept)."""
        model, middle = deepcopy(self.model_).float(), centre.mean(0)  # in float32, as in _draws
        device, y = model.schedule.alpha.device, torch.from_numpy(context)

        def log_prior(residual: Tensor, t: Tensor) -> Tensor:
            # The power is that of a density in model units, as those of the product are.
            codes = self._units.inverse(residual.cpu() + middle)
            log_det = self._units.log_det(codes) + model.transform.log_det(residual).cpu()
            return self._log_prior(prior, codes, 1 - len(centre), log_det).to(device)

        some = torch.arange(max(len(y), TRIED)) % len(y)
        tried = (self._draws(len(some), seed, y[some]) + (centre - middle)[some]).to(device)
        or_else = "prior: none of some draws given the single observations has any density; fit more pairs near it"
        known = floored(log_prior, tried, model.schedule, or_else)
        both = AllGiven(model, y.float().to(device), (centre - middle).to(device), known)
        z = sample(both, n, particles=max(n, PARTICLES), corrector=MOVES, spacing="adaptive", units="model", seed=seed)
        return self._decoded(self._units.inverse(self.model_.transform.inverse(z.double().to(device)).cpu() + middle))

    def _log_prior(self, prior: Any, codes: Tensor, power: int, log_det: Tensor | float = 0.0) -> Tensor:
        """``power`` times log p(theta) - log_det, (N,), of codes (N, kept); -inf where the prior has no mass."""
        rows = self._decoded(codes)
        if not hasattr(prior, "score_samples") and not hasattr(prior, "log_prob"):
            raise UserError(f"prior is {shown(prior)}; give one of all columns, with log_prob or score_samples")
        if getattr(prior, "event_shape", ()) not in ((), rows.shape[1:]):  # torch would repeat a single column
            raise UserError(f"prior: its vectors are {tuple(prior.event_shape)}, those of theta {rows.shape[1:]}")
        try:
            if hasattr(prior, "score_samples"):
                log_p = torch.from_numpy(prior.score_samples(rows))
            else:
                for column in self.columns_.columns:
                    if column.kind in ("date", "category"):
                        mend = "give a prior with score_samples, such as a CDMDensity of theta"
                        raise UserError(f"log_prob takes numbers, and '{column.name}' is a {column.kind}; {mend}")
                theta = torch.from_numpy(np.asarray(rows, np.float64).copy())
                varies = [column.name not in self.columns_.constants for column in self.columns_.columns]
                theta[:, varies] += codes - codes.detach()  # nothing but their gradient
                log_p = theta.new_full((len(theta),), -torch.inf)
                inside = prior.support.check(theta) if hasattr(prior, "support") else log_p < 0
                if inside.any():
                    known = inside.reshape(len(theta), -1).all(1).nonzero()[:, 0]
                    found = prior.log_prob(theta[known])
                    if getattr(found, "shape", ()) == theta[known].shape:
                        mend = f"torch.distributions.Independent(prior, 1), with prior.batch_shape {rows.shape[1:]}"
                        raise UserError(f"log_prob gives a number for each column; give {mend}")
                    log_p = log_p.index_put((known,), one_each(found, theta[known], "log_prob").double())
        except (ValueError, RuntimeError, TypeError) as error:
            raise UserError(f"prior: {reason(error)}") from None
        weighted = (power * (log_p - log_det)).nan_to_num(0.0, torch.inf, -torch.inf)  # 0 times inf is nothing, too
        return torch.where(log_p > -torch.inf, weighted, -torch.inf)

    @torch.no_grad()
    def _learned_normalizer(self, context: np.ndarray, seed: int) -> np.ndarray:
        """Weights of log Z by contexts (N, q); the gamma likelihood asks for the mean: noisy draws do not bias it."""
        y = torch.from_numpy(np.tile(context, (DRAWN, 1)))
        integrals = log_importance_weights(self.model_, len(y) // 2, seed, y).sum(1).exp().view(DRAWN, -1).mean(0)
        features = self._features(context)
        mean, scale = features.mean(0), features.std(0).clip(1e-9)
        found = GammaRegressor(alpha=PENALTY, max_iter=1000)
        slope = found.fit((features - mean) / scale, integrals.clamp_min(1e-12).numpy()).coef_ / scale
        return np.append(slope, found.intercept_ - slope @ mean)

    def _features(self, context: np.ndarray) -> np.ndarray:
        """What the head of the network sees at the mean of all residuals, given contexts (N, q), (N, features)."""
        y = torch.tensor(context, device=self.model_.schedule.alpha.device)
        z = y.new_zeros(len(y), self.model_.transform.dim)
        return in_batches(self.model_, z, lambda rows: self.model_.backbone.features(z[rows], y[rows]).cpu()).numpy()

    def _observations(self, x: Any) -> Tensor:
        """The codes of x: a vector is one observation, unless x has one column."""
        if np.ndim(x) < 2 and len(self.x_columns_.columns) > 1:
            # A series of pandas has names, that of polars has none.
            x = x.to_frame().T if hasattr(x, "set_axis") else as_array(x, "x").reshape(1, -1)
        elif hasattr(x, "to_frame"):
            x = x.to_frame(name=self.x_columns_.columns[0].name)
        found = self.x_columns_.encode(data_frame(x, "x", like=self.x_columns_), "x")
        if any(found.deviating):
            warn("x differs in a column that was constant in training, where this density knows nothing")
        return found.x

    def _summarised(self, given: list[np.ndarray], theta: np.ndarray, residuals: np.ndarray) -> list[np.ndarray]:
        """Contexts (N, q + 2 p) of ``given`` numbers, of training and validation, with a regression of the log size of
        ``residuals`` (copies, N, p) of ``theta``. A training row's are what regressions say without it, as they do of
        new rows: so the network learns how far these are to be trusted.
        """
        squares = np.square(residuals).mean(0)
        log_size = np.log(squares + FLOOR * squares.mean(0))
        self._log_size, errors = fit_smooth(given[0], log_size)
        left_out = np.concatenate([(theta - residuals).mean(0), log_size - errors], 1)
        self._scales = np.stack([left_out.mean(0), left_out.std(0).clip(1e-3)])
        return [self._context(given[0], left_out), self._context(given[1])]

    def _context(self, given: np.ndarray, summaries: np.ndarray | None = None) -> np.ndarray:
        """What the network sees: numbers (N, q), and as ``summaries`` what regressions say of theta, which it is slow
        to find: its mean, and the log of its squared residual."""
        if summaries is None:
            summaries = np.concatenate([self._centre(given), self._log_size(given)], 1)
        mean, deviation = self._scales
        return np.concatenate([given, ((summaries - mean) / deviation).clip(-FAR, FAR)], 1)

    def _numbers(self, x: Tensor) -> np.ndarray:
        """Codes of x (N, kept) near a normal, one number for each level of a text."""
        levels = [len(column.levels) for column in self.x_columns_.kept]
        columns = zip(levels, x.T, self._x_units(x).T, strict=True)
        parts = [one_hot(code.long(), n).double() if n > 2 else z[:, None] for n, code, z in columns]
        return torch.cat(parts, 1).numpy()
