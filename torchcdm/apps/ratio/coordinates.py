"""Coordinates in which the two sources of a ratio are more nearly normal: no invertible map changes their ratio.

Between two Gaussians the ratio is known in closed form. Where columns were bent, bending them back gives Gaussians;
where bent columns were mixed, independent components (FastICA) undo the mixture first. Held-out likelihood decides:
that of a Gaussian for each source, in the units of the data whatever the coordinates.
"""

import time
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, final

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor
from torch.distributions import MultivariateNormal

from torchcdm.random import evenly_spaced
from torchcdm.units import ColumnTransform, transform_from_config
from torchcdm.units.warp import log_spread

KNOTS = 24
CURVE_ROWS = 8000  # rows that curves are fitted to
ITERATIONS = 30
ROUGHNESS = 3e-3  # price of the bends of a curve: of the sum of squared second differences of its log slopes

ROWS = 20_000  # rows that components are fitted to, and on which coordinates are compared
WIDEST = 128  # columns up to which components are looked for, as their time grows with the square
COMPONENT_ROWS = 20  # rows for each column, at least
COMPONENT_ITERATIONS = 200

COMMON = 0.01  # share of the common covariance in that of each source: a column may be constant in one of them
FARTHEST = 1e6  # model units beyond which a query counts as lying there: squares of more overflow in the network
ERRORS = 2.0  # paired standard errors by which held-out likelihood must rise for another step


def unmixing(x: np.ndarray) -> np.ndarray:
    """Matrix (d, d) that takes rows (N, d) to independent components, as far as FastICA gets."""
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    options = {"whiten": "unit-variance", "whiten_solver": "eigh", "max_iter": COMPONENT_ITERATIONS, "tol": 1e-3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return FastICA(random_state=0, **options).fit(x).components_


@final
class Unmixing:
    """Independent components: z -> matrix (x - centre), (d, d) and (d,), of x in the data's own units.

    The ``warp`` is the configuration of the :class:`ColumnTransform` that took x to z.
    """

    NOTE: ClassVar = "independent components"

    def __init__(self, matrix: Any, centre: Any, warp: Mapping[str, Any]) -> None:
        self.matrix, self.centre = (torch.as_tensor(value, dtype=torch.float64) for value in (matrix, centre))
        self.warp = transform_from_config(warp)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Values (N, d) and log of the volume's change (N,)."""
        x = self.warp.inverse(z)
        change = torch.linalg.slogdet(self.matrix)[1] - self.warp.log_det(x)
        return (x - self.centre) @ self.matrix.T, change

    def to_config(self) -> dict[str, Any]:
        """Arguments of the class."""
        return {"matrix": self.matrix.tolist(), "centre": self.centre.tolist(), "warp": self.warp.to_config()}

    @classmethod
    def fit(cls, z: Tensor, warp: ColumnTransform) -> "Unmixing":
        """The components of the rows that ``warp`` took to ``z`` (N, d)."""
        x = warp.inverse(z)
        centre, scale = x.mean(0), x.std(0).clamp_min(1e-12)
        return cls(torch.from_numpy(unmixing(((x - centre) / scale).numpy())) / scale, centre, warp.to_config())


@final
class Curves:
    """An increasing curve for each column, its log slope linear between knots and constant beyond.

    The ``knots`` rise in each column, (K, d), and have the ``log_slopes``, (K, d).
    """

    NOTE: ClassVar = "a curve for each column"

    def __init__(self, knots: Any, log_slopes: Any) -> None:
        self.knots, self.log_slopes = (torch.as_tensor(value, dtype=torch.float64) for value in (knots, log_slopes))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values (N, d) and log of the volume's change (N,)."""
        values, log_slopes = self._apply(*self._located(x.double()))
        return values, log_slopes.sum(1)

    def to_config(self) -> dict[str, Any]:
        """Arguments of the class."""
        return {"knots": self.knots.tolist(), "log_slopes": self.log_slopes.tolist()}

    @classmethod
    def fit(cls, x: Tensor, y: Tensor) -> "Curves":
        """The curves under which columns of rows (N, d), float64, are most nearly normal for each of the sources (N,):
        by penalised likelihood."""
        rows = evenly_spaced(len(x), CURVE_ROWS)
        x, y = x[rows], y[rows]
        # By numpy: torch 2.8 refuses more than 16 million numbers.
        knots = torch.from_numpy(np.quantile(x.numpy(), ndtr(np.linspace(-3, 3, KNOTS)), axis=0))
        # Equal quantiles are told apart by a little of the spread.
        knots = knots + 1e-6 * (x.std(0) + 1e-12) * torch.arange(KNOTS, dtype=torch.float64)[:, None]
        curves = cls(knots, torch.zeros(knots.shape, dtype=torch.float64).requires_grad_())
        located = curves._located(x)
        optimizer = torch.optim.LBFGS([curves.log_slopes], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            slopes = curves.log_slopes
            total = ROUGHNESS * slopes.diff(n=2, dim=0).square().sum() + 1e-4 * slopes.square().sum()
            z, log_slope = curves._apply(*located)
            total = total + (log_spread(z, y) - log_slope.mean(0)).sum()
            total.backward()
            return total

        with torch.enable_grad():
            optimizer.step(loss)
        return cls(knots, curves.log_slopes.detach())

    def _located(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The piece of each number, its place there from 0 to 1, and how far beyond the knots it lies, each (N, d)."""
        inside = x.clamp(self.knots[0], self.knots[-1])
        piece = torch.searchsorted(self.knots.T.contiguous(), inside.T.contiguous()).T.sub(1).clamp(0, KNOTS - 2)
        low, high = self.knots.gather(0, piece), self.knots.gather(0, piece + 1)
        return piece, (inside - low) / (high - low), x - inside

    def _apply(self, piece: Tensor, place: Tensor, beyond: Tensor) -> tuple[Tensor, Tensor]:
        """Values and log slopes, each (N, d)."""
        low, rise, width = self.log_slopes[:-1], self.log_slopes.diff(dim=0), self.knots.diff(dim=0)
        starts = torch.cat([torch.zeros_like(low[:1]), (width * _area(low, rise, torch.ones(()))).cumsum(0)])
        a, b = low.gather(0, piece), rise.gather(0, piece)
        edge = torch.where(beyond > 0, self.log_slopes[-1], self.log_slopes[0])
        value = starts.gather(0, piece) + width.gather(0, piece) * _area(a, b, place) + beyond * edge.exp()
        return value, torch.where(beyond == 0, a + b * place, edge)


def _area(low: Tensor, rise: Tensor, place: Tensor) -> Tensor:
    """Integral of exp(low + rise u) over u from 0 to ``place``."""
    x = rise * place
    small = x.abs() < 1e-5
    safe = torch.where(small, 1.0, x)
    return low.exp() * place * torch.where(small, 1 + x / 2, torch.expm1(safe) / safe)


STEPS = {"unmixing": Unmixing, "curves": Curves}
Steps = Mapping[str, Unmixing | Curves]  # by their names, in the order of their use


def through(steps: Steps, z: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates (N, d) of rows, float64, and log of the volume's change (N,); finite, however far out they lie."""
    z, change = z.double().clamp(-FARTHEST, FARTHEST), torch.zeros(len(z), dtype=torch.float64)
    for step in steps.values():
        z, more = step(z)
        change = change + more
    return z.nan_to_num(0.0, FARTHEST, -FARTHEST), change


def best_steps(
    train: Tensor, y: Tensor, held_out: Tensor, held_out_y: Tensor, warp: ColumnTransform, until: float = np.inf
) -> Steps:
    """The steps under which held-out rows (M, d) are most probable; none where no step is worth its noise.

    Training rows (N, d) are float64, of both sources in turn, and sources 0 or 1. The ``warp`` took the columns from
    the data's units to those of the rows. No further step is tried after the second ``until`` of ``time.monotonic``.
    """
    rows = evenly_spaced(len(train), ROWS)
    train, y = train[rows], y[rows]

    def log_prob(steps: Steps) -> Tensor:
        """Of the held-out rows, under a Gaussian for each source, (M,)."""
        (z, _), (points, change) = through(steps, train), through(steps, held_out)
        parts = [z[y == source] for source in (0, 1)]
        covariances = [torch.cov(part.T).reshape(z.shape[1], -1) for part in parts]
        common = (covariances[0] + covariances[1]) / 2 + 1e-6 * z.var(0).diag()
        for source, (part, covariance) in enumerate(zip(parts, covariances, strict=True)):
            normal = MultivariateNormal(part.mean(0), torch.lerp(covariance, common, COMMON))
            change = change + torch.where(held_out_y == source, normal.log_prob(points), 0.0)
        return change

    best: Steps = {}
    reached = log_prob(best)
    # A linear map alone is nothing to a Gaussian: components show their worth by the curves that they allow.
    parts = [part for part in (train[y == 0], train[y == 1], train) if _varies(part)]
    for part in (None, *parts):
        if time.monotonic() > until:
            break
        before = {} if part is None else {"unmixing": Unmixing.fit(part, warp)}
        steps = {**before, "curves": Curves.fit(through(before, train)[0], y)}
        gain = (value := log_prob(steps)) - reached
        if float(gain.mean()) > ERRORS * float(gain.std()) / len(gain) ** 0.5:
            best, reached = steps, value
    return best


def _varies(x: Tensor) -> bool:
    """Whether rows (N, d) have components to be found: several, not too many for their number, none of them fixed."""
    fitting = 1 < x.shape[1] <= WIDEST and len(x) >= COMPONENT_ROWS * x.shape[1]
    return fitting and bool(torch.linalg.eigvalsh(torch.cov(x.T))[0] > 1e-6 * x.var(0).max())
