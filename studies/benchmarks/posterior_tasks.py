"""The tasks of the benchmark of simulation-based inference (Lueckmann et al. 2021), from their description.

Priors and simulators are written here; observations and draws from the reference posteriors, ten a task, are files of
the package ``sbibm``, which is found but not imported (its own simulators need Julia and old versions of others)::

    pip install --no-deps sbibm

The distractors of ``slcp-distractors`` are drawn here from the distribution that the paper describes, those of the
observations too: they say nothing about theta, so the reference posterior of ``slcp`` is theirs.

Settings are chosen on ``DEVELOPMENT``: the same simulators with other constants, which have no reference posterior.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from torchcdm.errors import UserError

OBSERVATIONS = 10
"""Observations of each task."""

Draw = np.random.RandomState


@dataclass(frozen=True)
class Task:
    """A prior, a simulator, and where the reference posterior is.

    Attributes:
        folder: The task in ``sbibm``.
        prior: From a count, theta (count, p).
        simulate: From theta (N, p), x (N, q).
        support: Lowest and highest theta, for every parameter; infinite where there is no bound.
        file: Name of the observations.
    """

    folder: str
    prior: Callable[[int, Draw], np.ndarray]
    simulate: Callable[[np.ndarray, Draw], np.ndarray]
    support: tuple[float, float] = (-math.inf, math.inf)
    file: str = "observation.csv"

    def pairs(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """theta (count, p) from the prior, and x (count, q) simulated with it."""
        draw = Draw(seed)
        theta = self.prior(count, draw)
        return theta, self.simulate(theta, draw)

    def observation(self, number: int) -> np.ndarray:
        """The observation 1 ... 10, (q,)."""
        x = _table(self._files(number) / self.file)[0]
        return _with_distractors(x[None], Draw(number))[0] if self is TASKS["slcp-distractors"] else x

    def reference(self, number: int) -> np.ndarray:
        """10 000 draws from its posterior, (10 000, p)."""
        return _table(self._files(number) / "reference_posterior_samples.csv.bz2")

    def _files(self, number: int) -> Path:
        return _package() / "tasks" / self.folder / "files" / f"num_observation_{number}"


@cache
def _package() -> Path:
    found = find_spec("sbibm")
    if found is None or found.origin is None:
        raise UserError("observations and reference posteriors are those of sbibm; pip install --no-deps sbibm")
    return Path(found.origin).parent


def _table(path: Path) -> np.ndarray:
    import pandas as pd

    return pd.read_csv(path).to_numpy(np.float64)


# --- Gaussians ----------------------------------------------------------------------------------------------------


def _uniform(bound: float, parameters: int) -> Callable[[int, Draw], np.ndarray]:
    return lambda count, draw: draw.uniform(-bound, bound, (count, parameters))


def _noisy(theta: np.ndarray, draw: Draw, variance: float = 0.1) -> np.ndarray:
    return theta + math.sqrt(variance) * draw.normal(size=theta.shape)


def _two_widths(theta: np.ndarray, draw: Draw, narrow: float = 0.1) -> np.ndarray:
    """Noise of deviation 1 or ``narrow``, the same for both numbers."""
    return theta + draw.choice([1.0, narrow], (len(theta), 1)) * draw.normal(size=theta.shape)


# --- simple likelihood, complex posterior -------------------------------------------------------------------------

POINTS, DISTRACTORS, COMPONENTS = 4, 92, 20


def _points(theta: np.ndarray, draw: Draw, count: int = POINTS) -> np.ndarray:
    """Points from a Gaussian in the plane whose mean and covariance are theta."""
    first, second, rho = theta[:, 2:3] ** 2, theta[:, 3:4] ** 2, np.tanh(theta[:, 4:5])
    a, b = draw.normal(size=(2, len(theta), count))
    points = np.stack([first * a, second * (rho * a + np.sqrt(1 - rho**2) * b)], -1)
    return (theta[:, None, :2] + points).reshape(len(theta), -1)


@cache
def _distractors() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres and scales of twenty Student distributions with two degrees of freedom, and the order of all columns."""
    draw = Draw(42)
    centres = 15 * draw.normal(size=(COMPONENTS, DISTRACTORS))
    scales = [
        3 * (np.tril(draw.normal(size=2 * [DISTRACTORS])) + np.diag(np.exp(draw.normal(size=DISTRACTORS))))
        for _ in range(COMPONENTS)
    ]
    return centres, np.stack(scales), draw.permutation(DISTRACTORS + 2 * POINTS)


def _with_distractors(x: np.ndarray, draw: Draw) -> np.ndarray:
    centres, scales, order = _distractors()
    chosen = draw.randint(COMPONENTS, size=len(x))
    normal = draw.normal(size=(len(x), DISTRACTORS)) / np.sqrt(draw.chisquare(2, (len(x), 1)) / 2)
    noise = np.empty_like(normal)
    for k in range(COMPONENTS):
        noise[chosen == k] = centres[k] + normal[chosen == k] @ scales[k].T
    return np.concatenate([x, noise], 1)[:, order]


# --- two moons ----------------------------------------------------------------------------------------------------


MOON_OFFSET = 0.25
"""Of the middle of the arc, along the first axis."""


def moon_arc(count: int, draw: Draw, middle: float, width: float) -> np.ndarray:
    """Points of a thin half circle whose radius varies by ``width`` around ``middle``."""
    angle = draw.uniform(-math.pi / 2, math.pi / 2, count)
    radius = draw.normal(middle, width, count)
    return np.c_[radius * np.cos(angle) + MOON_OFFSET, radius * np.sin(angle)]


def moon_place(theta: np.ndarray) -> np.ndarray:
    """Where theta moves the arc: two theta give the same place."""
    return np.c_[-np.abs(theta.sum(1)), theta[:, 1] - theta[:, 0]] / math.sqrt(2)


def _moon(theta: np.ndarray, draw: Draw, middle: float = 0.1, width: float = 0.01) -> np.ndarray:
    return moon_arc(len(theta), draw, middle, width) + moon_place(theta)


# --- spikes of a neuron -------------------------------------------------------------------------------------------

STEPS, LAGS = 100, 9


@cache
def _design(seed: int) -> np.ndarray:
    """An offset, and the white noise that the neuron sees now and eight steps before, (100, 10)."""
    stimulus = Draw(seed).normal(size=STEPS)
    lagged = [np.r_[np.zeros(k), stimulus[: STEPS - k]] for k in range(LAGS)]
    return np.stack([np.ones(STEPS), *lagged], 1)


def _smooth_filter(count: int, draw: Draw) -> np.ndarray:
    """An offset of variance 2 and a filter whose second differences are penalised."""
    difference = np.eye(LAGS) - np.eye(LAGS, k=-1)
    factor = difference @ difference + np.diag(np.sqrt(np.arange(LAGS) / LAGS))
    filters = np.linalg.solve(factor, draw.normal(size=(LAGS, count))).T
    return np.c_[math.sqrt(2) * draw.normal(size=count), filters]


def _spikes(theta: np.ndarray, draw: Draw, seed: int = 42) -> np.ndarray:
    chance = 1 / (1 + np.exp(-theta @ _design(seed).T))
    return (draw.uniform(size=chance.shape) < chance).astype(np.float64)


def _spike_summaries(theta: np.ndarray, draw: Draw, seed: int = 42) -> np.ndarray:
    """Sufficient statistics: the number of spikes, and the stimulus before them, summed for each lag."""
    return _spikes(theta, draw, seed) @ _design(seed)


# --- differential equations ---------------------------------------------------------------------------------------


def _log_normal(centres: list[float], deviations: list[float]) -> Callable[[int, Draw], np.ndarray]:
    return lambda count, draw: np.exp(centres + np.array(deviations) * draw.normal(size=(count, len(centres))))


def _runge_kutta(slope: Callable[[np.ndarray], np.ndarray], u: np.ndarray, step: float, steps: int) -> np.ndarray:
    """States after ``steps`` steps of the classical fourth order, and before each, (steps + 1, *u.shape)."""
    path = [u]
    for _ in range(steps):
        a = slope(u)
        b = slope(u + step / 2 * a)
        c = slope(u + step / 2 * b)
        u = u + step / 6 * (a + 2 * b + 2 * c + slope(u + step * c))
        path.append(u)
    return np.stack(path)


PEOPLE = 1e6


def _epidemic(theta: np.ndarray, draw: Draw, asked: int = 1000) -> np.ndarray:
    """Infected among those who are asked, at ten times of 160 days."""
    rate, recovery = theta.T

    def slope(u: np.ndarray) -> np.ndarray:
        new = rate * u[0] * u[1] / PEOPLE
        return np.stack([-new, new - recovery * u[1]])

    start = np.stack([np.full(len(theta), PEOPLE - 1), np.ones(len(theta))])
    infected = _runge_kutta(slope, start, 0.25, 4 * 160)[::4][::17, 1].T
    return draw.binomial(asked, np.clip(infected / PEOPLE, 0, 1)).astype(np.float64)


def _hares_and_lynxes(theta: np.ndarray, draw: Draw, noise: float = 0.1) -> np.ndarray:
    """Prey and predators at ten times of 20 years, with log-normal noise."""
    growth, hunted, death, fed = theta.T

    def slope(log_u: np.ndarray) -> np.ndarray:
        # Of the logarithms, which keep their sign.
        prey, predators = np.exp(log_u)
        return np.stack([growth - hunted * predators, -death + fed * prey])

    start = np.log([[30.0], [1.0]]) * np.ones(len(theta))
    path = _runge_kutta(slope, start, 0.01, 2000)[::10][::21]
    log_u = np.clip(path.transpose(2, 1, 0).reshape(len(theta), -1), math.log(1e-10), math.log(1e4))
    return np.exp(log_u + noise * draw.normal(size=log_u.shape))


def _distracted(theta: np.ndarray, draw: Draw) -> np.ndarray:
    return _with_distractors(_points(theta, draw), draw)


def _normal(deviation: float, parameters: int) -> Callable[[int, Draw], np.ndarray]:
    return lambda count, draw: deviation * draw.normal(size=(count, parameters))


_rates = _log_normal([math.log(0.4), math.log(0.125)], [0.5, 0.2])
_growth = _log_normal([-0.125, -3.0, -0.125, -3.0], 4 * [0.5])

TASKS = {
    "gaussian-linear": Task("gaussian_linear", _normal(math.sqrt(0.1), 10), _noisy),
    "gaussian-linear-uniform": Task("gaussian_linear_uniform", _uniform(1, 10), _noisy, (-1, 1)),
    "gaussian-mixture": Task("gaussian_mixture", _uniform(10, 2), _two_widths, (-10, 10)),
    "two-moons": Task("two_moons", _uniform(1, 2), _moon, (-1, 1)),
    "slcp": Task("slcp", _uniform(3, 5), _points, (-3, 3)),
    "slcp-distractors": Task("slcp", _uniform(3, 5), _distracted, (-3, 3)),
    "bernoulli-glm": Task("bernoulli_glm", _smooth_filter, _spike_summaries),
    "bernoulli-glm-raw": Task("bernoulli_glm", _smooth_filter, _spikes, file="observation_raw.csv"),
    "sir": Task("sir", _rates, _epidemic, (0, math.inf)),
    "lotka-volterra": Task("lotka_volterra", _growth, _hares_and_lynxes, (0, math.inf)),
}
"""What is reported."""

DEVELOPMENT = {
    "linear": Task("", _normal(1.0, 6), partial(_noisy, variance=0.5)),
    "uniform": Task("", _uniform(2, 6), partial(_noisy, variance=0.5), (-2, 2)),
    "mixture": Task("", _uniform(6, 2), partial(_two_widths, narrow=0.2), (-6, 6)),
    "moons": Task("", _uniform(1, 2), partial(_moon, middle=0.2, width=0.015), (-1, 1)),
    "points": Task("", _uniform(2, 5), partial(_points, count=5), (-2, 2)),
    "distracted": Task("", _uniform(2, 5), _distracted, (-2, 2)),
    "glm": Task("", _smooth_filter, partial(_spike_summaries, seed=7)),
    "glm-raw": Task("", _smooth_filter, partial(_spikes, seed=7)),
    "epidemic": Task("", _log_normal([-0.7, -2.0], [0.4, 0.3]), partial(_epidemic, asked=300), (0, math.inf)),
    "hares": Task("", _log_normal([0.0, -2.9, 0.0, -3.2], 4 * [0.4]), partial(_hares_and_lynxes, noise=0.2),
                  (0, math.inf)),
}  # fmt: skip
