"""Posteriors of three small simulators, whose exact posterior is known, beside a conditional flow of zuko.

    python -m studies.benchmarks.conditional_density --budget 60 --json conditional.json
    python -m studies.benchmarks.conditional_density --simulators decay --contenders cdm --pairs 1000

Every contender sees the same pairs (theta, x). :class:`torchcdm.estimators.CDMConditional` has its default settings
and stops by its own rules; the flow (zuko's NSF, standardised) stops on the same validation pairs, and its budget is
in processor seconds. ``linear`` is the linear regression with a Gaussian residual, which the CDM starts as.

KL is the mean of log p(theta | x) - log q(theta | x) over new pairs, nats: the divergence of q from the exact
posterior, averaged over observations, with its standard error; 0 is best. One pass is not exactly normalised: log Z is
the mean over observations of the log of its integral on a grid, for parameters in the plane; a positive one flatters
KL by as much. C2ST is the accuracy of a classifier, five-fold, that tells draws from the exact ones, the mean over
observations: 0.5 is best and 1 worst.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from studies.benchmarks.flows import score_rows, train_flow
from studies.benchmarks.posterior_tasks import MOON_OFFSET, moon_arc, moon_place
from torchcdm.estimators import CDMConditional
from torchcdm.runtime.files import write_json

PAIRS_TESTED, FLOW_PAIRS = 1000, 200
"""New pairs for KL; the probability flow takes some hundred passes a pair."""

OBSERVATIONS, DRAWS = 5, 1000
"""For C2ST and log Z: observations, and draws for each."""


# --- simulators ----------------------------------------------------------------------------------------------------


class Simulator(Protocol):
    """A prior, a simulator, and the posterior in closed form or on a grid."""

    def pairs(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """theta (count, p) from the prior, and x (count, q) simulated with it."""

    def log_posterior(self, theta: np.ndarray, x: np.ndarray) -> np.ndarray:
        """log p(theta | x), nats, (N,)."""

    def draws(self, count: int, x: np.ndarray, seed: int) -> np.ndarray:
        """Exact draws given one observation (q,): (count, p)."""

    def box(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Lowest and highest theta that hold what a density has given x, for parameters in the plane."""


class LinearGaussian:
    """Five parameters N(0, I); x = A theta + noise, eight numbers with deviations from 0.2 to 2."""

    def __init__(self) -> None:
        draw = np.random.RandomState(0)
        self.matrix, self.deviation = draw.normal(size=(8, 5)), np.geomspace(0.2, 2.0, 8)
        precision = np.eye(5) + (self.matrix.T / self.deviation**2) @ self.matrix
        self.covariance = np.linalg.inv(precision)
        self.gain = self.covariance @ self.matrix.T / self.deviation**2

    def pairs(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        draw = np.random.RandomState(seed)
        theta = draw.normal(size=(count, 5))
        return theta, theta @ self.matrix.T + self.deviation * draw.normal(size=(count, 8))

    def log_posterior(self, theta: np.ndarray, x: np.ndarray) -> np.ndarray:
        return gaussian_log_prob(theta - x @ self.gain.T, self.covariance)

    def draws(self, count: int, x: np.ndarray, seed: int) -> np.ndarray:
        return np.random.RandomState(seed).multivariate_normal(self.gain @ x, self.covariance, count)

    def box(self, x: np.ndarray) -> None:
        return None


class Decay:
    """theta = (log amplitude, log rate) of a decay; x is five readings of it with noise of 0.1.

    Fast decays are over before the second reading, so that their posterior is skewed and long.
    """

    times = np.array([0.25, 0.5, 1.0, 2.0, 4.0])
    prior = np.array([0.5, 0.7])
    noise = 0.1
    side = 500

    def pairs(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        draw = np.random.RandomState(seed)
        theta = self.prior * draw.normal(size=(count, 2))
        return theta, self._curve(theta) + self.noise * draw.normal(size=(count, 5))

    def log_posterior(self, theta: np.ndarray, x: np.ndarray) -> np.ndarray:
        log_evidence = np.array([self._grid(row)[1] for row in x])
        return self._log_joint(theta, x) - log_evidence

    def draws(self, count: int, x: np.ndarray, seed: int) -> np.ndarray:
        draw = np.random.RandomState(seed)
        log_p, _ = self._grid(x)
        cells = draw.choice(len(log_p), count, p=np.exp(log_p))
        return self._points()[cells] + self._cell() * (draw.uniform(size=(count, 2)) - 0.5)

    def box(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return -5 * self.prior, 5 * self.prior

    def _curve(self, theta: np.ndarray) -> np.ndarray:
        return np.exp(theta[:, :1] - np.exp(theta[:, 1:]) * self.times)

    def _log_joint(self, theta: np.ndarray, x: np.ndarray) -> np.ndarray:
        parts = (theta / self.prior, (x - self._curve(theta)) / self.noise)
        scale = np.log(self.prior).sum() + 5 * math.log(self.noise) + 3.5 * math.log(2 * math.pi)
        return -0.5 * sum(np.square(part).sum(1) for part in parts) - scale

    def _points(self) -> np.ndarray:
        return grid(*self.box(np.empty(0)), self.side)[0]

    def _cell(self) -> np.ndarray:
        return 10 * self.prior / self.side

    def _grid(self, x: np.ndarray) -> tuple[np.ndarray, float]:
        """log-probabilities of the cells of the grid, and log p(x)."""
        log_joint = self._log_joint(self._points(), x)
        log_total = float(np.logaddexp.reduce(log_joint))
        return log_joint - log_total, log_total + float(np.log(self._cell()).sum())


class TwoMoons:
    """theta uniform on [-1, 1]²; x is a thin arc, moved by (-|theta_1 + theta_2|, theta_2 - theta_1) / √2.

    The map folds the plane without stretching it, so that the posterior is two arcs, with half of the likelihood each.
    Pairs whose arcs reach over the edge of the prior are left out, of the test and of the training alike.
    """

    radius, width = 0.1, 0.01

    def pairs(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        draw = np.random.RandomState(seed)
        theta = draw.uniform(-1, 1, (4 * count, 2))
        x = moon_arc(len(theta), draw, self.radius, self.width) + moon_place(theta)
        # What an arc around x can reach: the offset, the radius and six widths, along both diagonals.
        reach = MOON_OFFSET + self.radius + 6 * self.width
        inside = np.abs(x[:, 0]) + np.abs(x[:, 1]) + reach < math.sqrt(2)
        return theta[inside][:count], x[inside][:count]

    def log_posterior(self, theta: np.ndarray, x: np.ndarray) -> np.ndarray:
        arc = x - moon_place(theta) - [MOON_OFFSET, 0]
        radius = np.hypot(*arc.T)
        log_p = -0.5 * ((radius - self.radius) / self.width) ** 2 - math.log(self.width * math.sqrt(2 * math.pi))
        return np.where(arc[:, 0] > 0, log_p - np.log(math.pi * radius) - math.log(2), -np.inf)

    def draws(self, count: int, x: np.ndarray, seed: int) -> np.ndarray:
        draw = np.random.RandomState(seed)
        moved = x - moon_arc(count, draw, self.radius, self.width)
        total = -math.sqrt(2) * moved[:, 0] * draw.choice([-1, 1], count)
        difference = math.sqrt(2) * moved[:, 1]
        return np.c_[total - difference, total + difference] / 2

    def box(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.full(2, -1.3), np.full(2, 1.3)


SIMULATORS: dict[str, Callable[[], Simulator]] = {
    "linear-gaussian": LinearGaussian,
    "decay": Decay,
    "two-moons": TwoMoons,
}


def grid(low: np.ndarray, high: np.ndarray, side: int) -> tuple[np.ndarray, float]:
    """Midpoints of side² cells of a box in the plane, and the area of a cell."""
    axes = [lo + (hi - lo) * (np.arange(side) + 0.5) / side for lo, hi in zip(low, high, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2), float(np.prod((high - low) / side))


def gaussian_log_prob(residual: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """log N(residual; 0, covariance), nats, (N,)."""
    mahalanobis = (residual * np.linalg.solve(covariance, residual.T).T).sum(1)
    return -0.5 * (mahalanobis + np.linalg.slogdet(2 * math.pi * covariance)[1])


# --- contenders ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Posterior:
    """What a contender offers."""

    log_prob: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """(theta (N, p), x (N, q)) to (N,)."""
    sample: Callable[[int, np.ndarray], np.ndarray]
    """(count, x (N, q)) to (N, count, p)."""


@dataclass(frozen=True)
class Pairs:
    """What all learn from."""

    theta: np.ndarray
    x: np.ndarray
    held_out: np.ndarray

    def split(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """theta and x of training, and of validation."""
        rest = np.setdiff1d(np.arange(len(self.x)), self.held_out)
        return (self.theta[rest], self.x[rest]), (self.theta[self.held_out], self.x[self.held_out])


def linear(pairs: Pairs) -> Posterior:
    """Regression of theta on x with a Gaussian residual."""
    (theta, x), _ = pairs.split()
    design = np.c_[x, np.ones(len(x))]
    weights = np.linalg.lstsq(design, theta, rcond=None)[0]
    covariance = np.atleast_2d(np.cov((theta - design @ weights).T))

    def centre(x: np.ndarray) -> np.ndarray:
        return np.c_[x, np.ones(len(x))] @ weights

    def sample(count: int, x: np.ndarray) -> np.ndarray:
        residual = np.random.RandomState(0).multivariate_normal(np.zeros(len(covariance)), covariance, (len(x), count))
        return centre(x)[:, None] + residual

    return Posterior(lambda theta, x: gaussian_log_prob(theta - centre(x), covariance), sample)


def zuko_nsf(pairs: Pairs, budget: float, seed: int) -> Posterior:
    """zuko's conditional NSF, AdamW, the weights with the best validation likelihood."""
    import zuko

    scales = [(part.mean(0), part.std(0)) for part in pairs.split()[0]]

    def standard(part: np.ndarray, k: int) -> torch.Tensor:
        return torch.from_numpy((part - scales[k][0]) / scales[k][1]).float()

    train, validation = ([standard(part, k) for k, part in enumerate(rows)] for rows in pairs.split())
    torch.manual_seed(seed)
    flow = zuko.flows.NSF(train[0].shape[1], train[1].shape[1], transforms=5, hidden_features=(128, 128))
    train_flow(flow, train, validation, budget, seed)

    def log_prob(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
        return score_rows(flow, [standard(theta, 0), standard(x, 1)]) - np.log(scales[0][1]).sum()

    def sample(count: int, x: np.ndarray) -> np.ndarray:
        torch.manual_seed(0)
        with torch.no_grad():
            found = flow(standard(x, 1)).sample((count,)).transpose(0, 1)
        return found.double().numpy() * scales[0][1] + scales[0][0]

    return Posterior(log_prob, sample)


# --- measuring -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One contender on one simulator.

    Attributes:
        simulator: Its name.
        name: The contender.
        kl: Mean of log p - log q over new pairs, nats.
        se: Standard error of ``kl``.
        c2st: Mean accuracy over observations; None where draws are those of the row above.
        log_z: Mean over observations of the log integral; None where it is 0 by construction or not computed.
        seconds: Processor seconds of fitting.
    """

    simulator: str
    name: str
    kl: float
    se: float
    c2st: float | None
    log_z: float | None
    seconds: float


def c2st(draws: np.ndarray, exact: np.ndarray, passes: int = 1000) -> float:
    """Five-fold accuracy of a small network, at most so many passes, that tells two samples of equal size apart."""
    from sklearn.model_selection import cross_val_score
    from sklearn.neural_network import MLPClassifier

    x = np.concatenate([draws, exact])
    x = (x - exact.mean(0)) / exact.std(0)
    y = np.arange(len(x)) < len(draws)
    hidden = 10 * x.shape[1]
    network = MLPClassifier((hidden, hidden), max_iter=passes, random_state=0)
    order = np.random.RandomState(0).permutation(len(x))
    return float(cross_val_score(network, x[order], y[order], cv=5).mean())


def compare(name: str, contenders: Sequence[str], pairs: int, budget: float, seed: int) -> list[Row]:
    """All contenders on one simulator."""
    simulator = SIMULATORS[name]()
    theta, x = simulator.pairs(pairs, seed)
    theta_new, x_new = simulator.pairs(PAIRS_TESTED, seed + 1000)
    truth = simulator.log_posterior(theta_new, x_new)
    exact = [simulator.draws(DRAWS, row, k) for k, row in enumerate(x_new[:OBSERVATIONS])]
    rows = []

    def measure(who: str, posterior: Posterior, seconds: float, count: int = PAIRS_TESTED, drawn: bool = True) -> None:
        excess = truth[:count] - posterior.log_prob(theta_new[:count], x_new[:count])
        accuracy, mass = None, None
        if drawn:
            parts = zip(exact, x_new[:OBSERVATIONS], strict=True)
            accuracy = float(np.mean([c2st(posterior.sample(DRAWS, row[None])[0], part) for part, row in parts]))
        if who == "cdm" and simulator.box(x_new[0]) is not None:
            mass = float(np.mean([log_integral(posterior, simulator, row) for row in x_new[:OBSERVATIONS]]))
        error = float(excess.std() / math.sqrt(count))
        rows.append(Row(name, who, float(excess.mean()), error, accuracy, mass, seconds))

    began = time.process_time()
    # Without the CDM in the comparison it is only asked for the pairs that it holds out.
    options = {} if "cdm" in contenders else {"steps": 1}
    model = CDMConditional(random_state=seed, device="cpu", **options).fit(theta, x)
    seconds = time.process_time() - began
    if "cdm" in contenders:
        posterior = Posterior(model.log_prob, lambda count, x: model.sample(count, x, random_state=0))
        measure("cdm", posterior, seconds)
        model.set_params(likelihood="flow")
        measure("cdm-flow", posterior, seconds, FLOW_PAIRS, drawn=False)
    known = Pairs(theta, x, model.validation_indices_)
    if "nsf" in contenders:
        began = time.process_time()
        flow = zuko_nsf(known, budget, seed)
        measure("nsf", flow, time.process_time() - began)
    if "linear" in contenders:
        measure("linear", linear(known), 0.0)
    return rows


def log_integral(posterior: Posterior, simulator: Simulator, x: np.ndarray, side: int = 300) -> float:
    """log of the integral over theta of q(theta | x), by the midpoint rule."""
    points, area = grid(*simulator.box(x), side)
    return float(np.logaddexp.reduce(posterior.log_prob(points, np.tile(x, (len(points), 1))))) + math.log(area)


TITLES = {"cdm": "CDM, one pass", "cdm-flow": "CDM, probability flow", "nsf": "zuko NSF", "linear": "linear"}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description="Posteriors of simulators with a known one.",
        epilog="example: python -m studies.benchmarks.conditional_density --simulators decay --budget 20",
    )
    parser.add_argument("--simulators", nargs="+", choices=SIMULATORS, default=list(SIMULATORS))
    names = ["cdm", "nsf", "linear"]
    parser.add_argument("--contenders", nargs="+", choices=names, default=names)
    parser.add_argument("--pairs", type=int, default=10_000, help="for training and validation")
    parser.add_argument("--budget", type=float, default=60.0, help="processor seconds of the flow's training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for name in options.simulators:
        for row in compare(name, options.contenders, options.pairs, options.budget, options.seed):
            rows.append(row)
            accuracy = "" if row.c2st is None else f"  C2ST {row.c2st:.3f}"
            mass = "" if row.log_z is None else f"  log Z {row.log_z:.3f}"
            print(f"{name:16} {TITLES[row.name]:22} KL {row.kl:7.3f} +- {row.se:.3f}{accuracy}{mass}  "
                  f"{row.seconds:.1f} s", flush=True)  # fmt: skip
        if options.json is not None:
            settings = {key: getattr(options, key) for key in ("pairs", "budget", "seed", "threads")}
            write_json(options.json, settings | {"rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
