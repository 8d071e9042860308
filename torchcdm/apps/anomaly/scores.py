"""Anomaly scores: a number for each input from its profile over the levels, higher for the more anomalous."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import softplus

from torchcdm.apps.anomaly.increments import DISTANCES, best_kind, deviation, fit_increments, log_distances
from torchcdm.apps.anomaly.profile import as_samples, coarse_level, level_profile, log_density
from torchcdm.errors import UserError, nearest
from torchcdm.models.denoiser import Denoiser
from torchcdm.models.density import DensityModel, require_density

HIGHEST = torch.finfo(torch.float64).max
"""Score of inputs for which numbers overflow."""

Fitted = Mapping[str, Tensor]
"""What a score learned from the reference, by name."""


class AnomalyScore(ABC):
    """A number for each input, higher for the more anomalous; learned from normal data that did not train the model.

    A subclass says what it learns from features of the reference and how it applies it.

    Args:
        model: The model of the normal data; put into evaluation mode while it is used.

    Example:
        >>> score = make_score("levels", model).fit(normal)
        >>> score(x).shape
        torch.Size([100])
    """

    name: ClassVar[str]
    smallest_reference: ClassVar[int] = 1

    def __init__(self, model: DensityModel) -> None:
        self.model = model
        self.fitted: Fitted | None = None

    @property
    def models(self) -> tuple[DensityModel, ...]:
        """All whose densities the score is made of."""
        return (self.model,)

    def fit(self, reference: Tensor) -> AnomalyScore:
        """Learns what is normal, and returns itself.

        Args:
            reference: Normal data that the model was not trained on, data units, (N, *shape).

        Raises:
            UserError: An empty or too small reference, another shape than the model's, values that are not finite.
        """
        reference = as_samples(self.model, reference, "the reference", self.smallest_reference)
        # As they are read from a file: rounding depends on the layout in memory.
        self.fitted = {name: value.contiguous() for name, value in self.learn(self.features(reference)).items()}
        return self

    def __call__(self, x: Tensor) -> Tensor:
        """Scores, finite, float64 (N,) on the CPU.

        Args:
            x: Data units, (N, *shape).

        Raises:
            UserError: Not fitted, nothing to score, another shape than the model's, values that are not finite.
        """
        if self.fitted is None:
            raise UserError(f"the score '{self.name}' is not fitted; call fit with normal data first")
        x = as_samples(self.model, x)
        scores = self.apply(self.features(x), self.fitted)
        # Far outside the data a density overflows; what it is then, inf or nan, must not pass for normal.
        return scores.nan_to_num(nan=HIGHEST, posinf=HIGHEST)

    def features(self, x: Tensor) -> Tensor:
        """What the score sees of each input, float64 (N, features)."""
        return level_profile(self.model, x)

    def learn(self, features: Tensor) -> Fitted:
        """From features of the reference, (N, features); nothing unless a subclass says more."""
        return {}

    @abstractmethod
    def apply(self, features: Tensor, fitted: Fitted) -> Tensor:
        """From features of inputs, (N, features), to scores (N,)."""


@final
class LogProb(AnomalyScore):
    """-log p_0(x) in data units, raw. It misses inputs that are simpler than the normal ones, flat or blurred."""

    name = "log_prob"

    def apply(self, features: Tensor, fitted: Fitted) -> Tensor:
        return -features[:, 0]


@final
class Typicality(AnomalyScore):
    """|log p_0(x) - its mean over normal data|: too likely is as suspicious as too unlikely (arXiv 1906.02994)."""

    name = "typicality"

    def learn(self, features: Tensor) -> Fitted:
        return {"mean": features[:, 0].mean()}

    def apply(self, features: Tensor, fitted: Fitted) -> Tensor:
        return (features[:, 0] - fitted["mean"]).abs()


@final
class Coarse(AnomalyScore):
    """-log p_c(x) at the first level c with noise of half a model unit: the density of what is left of the data there.

    It sees what a picture shows and not its pixels, as a kernel density of that bandwidth would.
    """

    name = "coarse"

    def apply(self, features: Tensor, fitted: Fitted) -> Tensor:
        return -features[:, coarse_level(self.model.schedule)]


@final
class Complexity(AnomalyScore):
    """log p_c(x) - log p_0(x), c as in :class:`Coarse`: how unlikely the detail is, whatever the coarse picture.

    ``complexity + coarse = log_prob``.
    """

    name = "complexity"

    def apply(self, features: Tensor, fitted: Fitted) -> Tensor:
        return features[:, coarse_level(self.model.schedule)] - features[:, 0]


@final
class Levels(AnomalyScore):
    """How far the whole profile is from those of normal data: the one-pass kin of multi-scale score matching analysis.

    The sum of two distances of all increments log p_t(x) - log p_{t+1}(x), which add up to log p_0(x), from those of
    normal data (:func:`torchcdm.apps.anomaly.increments.log_distances`), and of the mean of -log p_t(x) over the fine
    levels, as what is odd is more often too unlikely than too likely. All three are counted in deviations among normal
    data. Of the first distance and of the mean the softplus counts: nearer or likelier than usual earns nothing. The
    form was chosen on other outliers than those whose results are reported (docs/anomaly.md).

    Multi-scale score matching analysis (arXiv 2010.13132) fits a density to the norms of ten scores: ten passes.
    """

    name = "levels"
    smallest_reference = 10
    FOLDS = 5

    def learn(self, features: Tensor) -> Fitted:
        fine = features[:, : coarse_level(self.model.schedule) + 1]
        kind = best_kind(features)
        fitted = {"mean": fine.mean(0), "deviation": deviation(fine, 0)} | fit_increments(features, *kind)
        # Distances of the very data that gave the densities would be too small: each fold by the others.
        folds = torch.arange(len(features)) % self.FOLDS
        parts = [
            log_distances(features[folds == k], fit_increments(features[folds != k], *kind)) for k in range(self.FOLDS)
        ]
        values = {name: torch.cat([part[name] for part in parts]) for name in DISTANCES}
        values["unlikeliness"] = self._unlikeliness(features, fitted)
        for name, normal in values.items():
            fitted |= {f"{name}_mean": normal.mean(), f"{name}_deviation": deviation(normal, 0)}
        return fitted

    def apply(self, features: Tensor, fitted: Fitted) -> Tensor:
        values = log_distances(features, fitted) | {"unlikeliness": self._unlikeliness(features, fitted)}
        values = {
            name: (value - fitted[f"{name}_mean"]) / fitted[f"{name}_deviation"] for name, value in values.items()
        }
        return values["rarity"] + sum(softplus(values[name]) for name in ("distance", "unlikeliness"))

    @staticmethod
    def _unlikeliness(features: Tensor, fitted: Fitted) -> Tensor:
        fine = features[:, : len(fitted["mean"])]
        return ((fitted["mean"] - fine) / fitted["deviation"]).mean(1)


@final
class Ratio(AnomalyScore):
    """log p_background(x) - log p(x): what makes an input odd beyond being odd for the background (arXiv 1906.02845).

    Args:
        model: The model of the normal data.
        background: A model of broader data of the same shape.

    Raises:
        UserError: The two take inputs of different shapes.
    """

    name = "ratio"

    def __init__(self, model: DensityModel, background: DensityModel) -> None:
        super().__init__(model)
        if model.shape != background.shape:
            raise UserError(f"the background takes inputs of shape {background.shape}, the model {model.shape}")
        self.background = background

    @property
    def models(self) -> tuple[DensityModel, ...]:
        return self.model, self.background

    def features(self, x: Tensor) -> Tensor:
        """log p_0 of both in data units, (N, 2)."""
        return torch.stack([log_density(self.model, x), log_density(self.background, x)], 1)

    def apply(self, features: Tensor, fitted: Fitted) -> Tensor:
        return features[:, 1] - features[:, 0]


SCORES: dict[str, type[AnomalyScore]] = {
    kind.name: kind for kind in (LogProb, Typicality, Coarse, Complexity, Levels, Ratio)
}
"""Scores by name."""


def make_score(name: str, model: Denoiser, background: Denoiser | None = None) -> AnomalyScore:
    """The score called ``name``, not yet fitted.

    Args:
        name: Of :data:`SCORES`.
        model: The model of the normal data.
        background: The background model; for ``ratio`` alone.

    Raises:
        UserError: An unknown name, a model without density, ``ratio`` without background or a background without it.
    """
    if name not in SCORES:
        raise UserError(f"unknown anomaly score '{name}'; {nearest(name, SCORES)}")
    if (name == Ratio.name) != (background is not None):
        problem = "needs a background model" if background is None else "takes no background model"
        raise UserError(f"the score '{name}' {problem}; '{Ratio.name}' is the one that compares two models")
    density = require_density(model, "an anomaly score")
    if background is None:
        return SCORES[name](density)
    return Ratio(density, require_density(background, "the background"))
