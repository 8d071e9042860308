"""One contest a kind of data set: what every contender scores on the same test rows, and in how many seconds."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from studies.cache import Made, kept
from studies.exam.sets import ExamSet, Kind

VALIDATION = 5
"""Of the training rows every fifth serves the contenders that must choose a setting."""

NSF_SECONDS = 120.0
"""Processor seconds that the neural spline flow may train; early stopping ends it before."""

FRAMES = 300
"""Test pictures that are scored."""

Scores = np.ndarray
"""One number a test row, higher is better, float64 (N,)."""

Contender = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], tuple[Scores, str]]
"""From training rows and classes, test rows and classes: scores and what was chosen, in words."""


@dataclass(frozen=True)
class Mark:
    """One contender on one data set.

    Attributes:
        data: The data set.
        kind: What was asked.
        contender: Who.
        value: Mean score: nats a row (density), less bits/dim (images), less nats of held-out cross-entropy (ratio),
            AUROC (anomaly).
        se: Standard error of ``value`` over test rows; of an AUROC by bootstrap.
        behind: Mean of the best contender's scores less this one's, over the same rows; 0 for the best.
        behind_se: Standard error of that paired difference.
        seconds: Processor seconds to fit and to score.
        note: What the contender chose.
    """

    data: str
    kind: Kind
    contender: str
    value: float
    se: float
    behind: float
    behind_se: float
    seconds: float
    note: str


def contest(item: ExamSet, contenders: Sequence[str] | None = None, folder: Path | None = None) -> list[Mark]:
    """All contenders on one data set, best first.

    Args:
        item: The data set.
        contenders: Names in :data:`CONTENDERS`; all when None.
        folder: Keeps the scores of each contender: what is there is not run again.
    """
    rows, classes = item.load()
    order = np.random.default_rng(0).permutation(len(rows))
    test, train = order[::5], np.setdiff1d(order, order[::5])
    if item.kind == "anomaly":
        train = train[classes[train] == 0]
    given = rows[train], classes[train], rows[test], classes[test]

    def run(name: str) -> Made:
        began = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scores, note = CONTENDERS[item.kind][name](*given)
        seconds = time.process_time() - began
        return {"note": note, "seconds": seconds}, {"scores": torch.from_numpy(np.array(scores, np.float64))}

    found: dict[str, tuple[Scores, str, float]] = {}
    for name in CONTENDERS[item.kind]:
        if contenders is None or name in contenders:
            file = f"{item.kind}-{item.name.replace('/', '-')}-{name}.json"
            settings = {"name": item.name, "kind": item.kind, "contender": name}
            values, tensors = kept(None if folder is None else folder / file, settings, partial(run, name))
            found[name] = tensors["scores"].numpy(), values["note"], values["seconds"]
    measure = _auroc if item.kind == "anomaly" else _mean
    values = {name: measure(scores, classes[test][: len(scores)]) for name, (scores, _, _) in found.items()}
    best = max(found, key=lambda name: values[name][0])
    marks = []
    for name, (_, note, seconds) in found.items():
        gaps = values[best][1] - values[name][1]
        value, se = values[name][0], _deviation(values[name][1], item.kind)
        marks.append(Mark(item.name, item.kind, name, value, se, values[best][0] - value,
                          _deviation(gaps, item.kind), seconds, note))  # fmt: skip
    return sorted(marks, key=lambda mark: -mark.value)


def _mean(scores: Scores, classes: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean, and what its error is computed from."""
    return float(scores.mean()), scores


def _auroc(scores: Scores, classes: np.ndarray) -> tuple[float, np.ndarray]:
    """AUROC of normality, and its values over 200 bootstrap samples of the rows, the same for all contenders."""
    from sklearn.metrics import roc_auc_score

    draw = np.random.default_rng(0)
    values = []
    while len(values) < 200:
        chosen = draw.integers(len(classes), size=len(classes))
        if 0 < classes[chosen].sum() < len(chosen):
            values.append(roc_auc_score(classes[chosen], -scores[chosen]))
    return float(roc_auc_score(classes, -scores)), np.array(values)


def _deviation(values: np.ndarray, kind: Kind) -> float:
    return float(values.std()) if kind == "anomaly" else float(values.std() / math.sqrt(len(values)))


# --- densities ----------------------------------------------------------------------------------------------------


def _cdm_density(train: np.ndarray, _: np.ndarray, test: np.ndarray, __: np.ndarray) -> tuple[Scores, str]:
    from torchcdm.estimators import CDMDensity

    model = CDMDensity(random_state=0, device="cpu").fit(train)
    notes, transform, rows = list(model.notes_), model.model_.transform, torch.from_numpy(test)
    if transform.dim == rows.shape[1]:
        start = model.model_.base.log_prob_levels(transform(rows))[:, 0] + transform.log_det(rows)
        notes.insert(0, f"its start has {float(start.mean()):.3f}")
    return model.score_samples(test), "; ".join(notes)


@dataclass
class Standard:
    """Columns of unit deviation, as every contender but ours sees them, split for the choice of settings."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    log_det: float

    @classmethod
    def of(cls, train: np.ndarray, test: np.ndarray) -> Standard:
        mean, deviation = train.mean(0), train.std(0) + 1e-12
        z = (train - mean) / deviation
        held_out = np.arange(len(z)) % VALIDATION == 0
        return cls(z[~held_out], z[held_out], (test - mean) / deviation, -float(np.log(deviation).sum()))


def _chosen(candidates: Callable[[np.ndarray], Iterator[tuple[str, Any]]]) -> Contender:
    """A family of scikit-learn models with ``score_samples``, of which the validation rows choose one."""

    def contender(train: np.ndarray, _: np.ndarray, test: np.ndarray, __: np.ndarray) -> tuple[Scores, str]:
        data = Standard.of(train, test)
        fitted = [(note, model.fit(data.train)) for note, model in candidates(data.train)]
        note, best = max(fitted, key=lambda item: item[1].score_samples(data.validation).mean())
        best.fit(np.concatenate([data.train, data.validation]))
        return best.score_samples(data.test) + data.log_det, note

    return contender


class LedoitWolfGaussian:
    """A Gaussian with the covariance of Ledoit and Wolf (2004)."""

    def fit(self, rows: np.ndarray) -> LedoitWolfGaussian:
        from scipy.stats import multivariate_normal
        from sklearn.covariance import LedoitWolf

        fitted = LedoitWolf().fit(rows)
        self.normal = multivariate_normal(fitted.location_, fitted.covariance_, allow_singular=True)
        return self

    def score_samples(self, rows: np.ndarray) -> Scores:
        return np.atleast_1d(self.normal.logpdf(rows))


def _gaussian(rows: np.ndarray) -> Iterator[tuple[str, Any]]:
    yield "Ledoit-Wolf", LedoitWolfGaussian()


def _mixtures(rows: np.ndarray) -> Iterator[tuple[str, Any]]:
    from sklearn.mixture import GaussianMixture

    for form, counts in {"full": (1, 2, 4, 8, 16, 32), "diag": (4, 16, 64)}.items():
        for count in counts:
            if count * (rows.shape[1] + 2) < len(rows):
                yield f"{count} {form}", GaussianMixture(count, covariance_type=form, reg_covar=1e-4, random_state=0)


def _kernels(rows: np.ndarray) -> Iterator[tuple[str, Any]]:
    from sklearn.neighbors import KernelDensity

    for width in np.geomspace(0.03, 1.0, 12):
        yield f"bandwidth {width:.2f}", KernelDensity(bandwidth=float(width))


def _nsf(train: np.ndarray, _: np.ndarray, test: np.ndarray, __: np.ndarray) -> tuple[Scores, str]:
    import zuko

    from studies.benchmarks.flows import score_rows, train_flow

    data = Standard.of(train, test)
    torch.manual_seed(0)
    flow = zuko.flows.NSF(train.shape[1], transforms=3, hidden_features=(128, 128))
    train_flow(flow, [_float(data.train)], [_float(data.validation)], NSF_SECONDS, 0)
    return score_rows(flow, [_float(data.test)]) + data.log_det, "3 transforms, (128, 128)"


def _float(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(rows).float()


# --- anomalies ----------------------------------------------------------------------------------------------------


def _cdm_outliers(train: np.ndarray, _: np.ndarray, test: np.ndarray, __: np.ndarray) -> tuple[Scores, str]:
    from torchcdm.estimators import CDMOutlierDetector

    model = CDMOutlierDetector(random_state=0, device="cpu").fit(train)
    return model.score_samples(test), "; ".join(model.notes_)


def _sklearn_outliers(build: Callable[[], Any]) -> Contender:
    def contender(train: np.ndarray, _: np.ndarray, test: np.ndarray, __: np.ndarray) -> tuple[Scores, str]:
        data = Standard.of(train, test)
        return build().fit(np.concatenate([data.train, data.validation])).score_samples(data.test), "defaults"

    return contender


def _isolation() -> Any:
    from sklearn.ensemble import IsolationForest

    return IsolationForest(random_state=0)


def _factor() -> Any:
    from sklearn.neighbors import LocalOutlierFactor

    return LocalOutlierFactor(novelty=True)


class NearestNeighbours:
    """Distance to the fifth neighbour, with its sign changed."""

    def fit(self, rows: np.ndarray) -> NearestNeighbours:
        from sklearn.neighbors import NearestNeighbors

        self.neighbours = NearestNeighbors(n_neighbors=5).fit(rows)
        return self

    def score_samples(self, rows: np.ndarray) -> Scores:
        return -self.neighbours.kneighbors(rows)[0][:, -1]


# --- ratios -------------------------------------------------------------------------------------------------------


def _cdm_ratio(train: np.ndarray, sides: np.ndarray, test: np.ndarray, asked: np.ndarray) -> tuple[Scores, str]:
    from torchcdm import DensityRatio

    ratio = DensityRatio(random_state=0, device="cpu").fit(train[sides == 1], train[sides == 0])
    prior = math.log(sides.mean() / (1 - sides.mean()))
    note = ", ".join(f"{name} {weight:.2f}" for name, weight in ratio.blend.items())
    return _log_loss(ratio.log_ratio(test) + prior, asked), note


def _classifier(build: Callable[[], Any]) -> Contender:
    def contender(
        train: np.ndarray, sides: np.ndarray, test: np.ndarray, asked: np.ndarray
    ) -> tuple[Scores, str]:
        chance = np.clip(build().fit(train, sides).predict_proba(test)[:, 1], 1e-12, 1 - 1e-12)
        return _log_loss(np.log(chance) - np.log1p(-chance), asked), "defaults"

    return contender


def _log_loss(logits: np.ndarray, sides: np.ndarray) -> Scores:
    """log probability of the true source, nats."""
    return -np.logaddexp(0.0, np.where(sides == 1, -logits, logits))


def _trees() -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(random_state=0)


def _logistic() -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


# --- pictures -----------------------------------------------------------------------------------------------------


def _cdm_images(train: np.ndarray, _: np.ndarray, test: np.ndarray, __: np.ndarray) -> tuple[Scores, str]:
    import torchcdm
    from torchcdm.likelihood import Scoring, elbo

    model = torchcdm.fit(torch.from_numpy(train), preset="encoder", budget="10m", device="cpu")
    found = elbo(model, torch.from_numpy(test[:FRAMES]), scoring=Scoring(seed=0))
    return -found.value.double().numpy(), "ELBO"


def _picture_peer(candidates: Callable[[np.ndarray], Iterator[tuple[str, Any]]]) -> Contender:
    """A closed form on dequantised pixels, in bits/dim."""

    def contender(train: np.ndarray, _: np.ndarray, test: np.ndarray, __: np.ndarray) -> tuple[Scores, str]:
        draw = np.random.default_rng(0)
        flat, asked = (x.reshape(len(x), -1) + draw.uniform(size=(len(x), x[0].size)) for x in (train, test[:FRAMES]))
        nats, note = _chosen(candidates)(flat, np.empty(0), asked, np.empty(0))
        return nats / (flat.shape[1] * math.log(2)), note

    return contender


def _uniform(train: np.ndarray, _: np.ndarray, test: np.ndarray, __: np.ndarray) -> tuple[Scores, str]:
    return np.full(min(len(test), FRAMES), -8.0), "all grey levels alike"


CONTENDERS: dict[Kind, dict[str, Contender]] = {
    "density": {"cdm": _cdm_density, "gaussian": _chosen(_gaussian), "mixture": _chosen(_mixtures),
                "kernels": _chosen(_kernels), "nsf": _nsf},
    "ratio": {"cdm": _cdm_ratio, "trees": _classifier(_trees), "logistic": _classifier(_logistic)},
    "anomaly": {"cdm": _cdm_outliers, "isolation-forest": _sklearn_outliers(_isolation),
                "lof": _sklearn_outliers(_factor), "knn": _sklearn_outliers(NearestNeighbours)},
    "images": {"cdm": _cdm_images, "gaussian": _picture_peer(_gaussian), "uniform": _uniform},
}  # fmt: skip
CLOSED_FORMS = ("gaussian", "mixture", "kernels", "uniform")


def as_rows(marks: Sequence[Mark]) -> list[dict[str, Any]]:
    """Marks as JSON."""
    return [asdict(mark) for mark in marks]
