"""Anomaly scores: a number for each input from its profile over the levels, higher for the more anomalous."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, final

import torch
from torch import Tensor

from torchcdm.apps.anomaly.levels import deviation_from_normal, learn_levels
from torchcdm.apps.anomaly.profile import as_samples, coarse_level, level_profile
from torchcdm.errors import UserError, nearest
from torchcdm.models.denoiser import Denoiser
from torchcdm.models.density import require_density

HIGHEST = torch.finfo(torch.float64).max
"""Score of inputs for which numbers overflow."""

Fitted = Mapping[str, Tensor]
"""What a score learned from the reference, by name."""


class Kind(NamedTuple):
    """How a score is made of profiles, log p_t(x) in nats, float64 (N, T+2), and of the coarse level.

    Attributes:
        apply: From profiles, the coarse level and what was learned to scores (N,).
        learn: From profiles of the reference and the coarse level to what :attr:`apply` needs.
        smallest_reference: Samples that it takes to learn.
    """

    apply: Callable[[Tensor, int, Fitted], Tensor]
    learn: Callable[[Tensor, int], Fitted] = lambda log_p, coarse: {}
    smallest_reference: int = 1


SCORES = {
    # How far the whole profile is from those of normal data.
    "levels": Kind(deviation_from_normal, learn_levels, smallest_reference=10),
    # What is left of the data with noise of half a model unit: what a picture shows and not its pixels.
    "coarse": Kind(lambda log_p, coarse, _: -log_p[:, coarse]),
    # How unlikely the detail is, whatever the coarse picture: complexity + coarse = log_prob.
    "complexity": Kind(lambda log_p, coarse, _: log_p[:, coarse] - log_p[:, 0]),
    # Too likely is as suspicious as too unlikely (arXiv 1906.02994).
    "typicality": Kind(
        lambda log_p, coarse, fitted: (log_p[:, 0] - fitted["mean"]).abs(),
        lambda log_p, coarse: {"mean": log_p[:, 0].mean()},
    ),
    # Raw: misses inputs that are simpler than the normal ones, flat or blurred.
    "log_prob": Kind(lambda log_p, coarse, _: -log_p[:, 0]),
    # Odd beyond being odd for the background (arXiv 1906.02845); of log p_0 of the model and of the background.
    "ratio": Kind(lambda log_p, coarse, _: log_p[:, 1] - log_p[:, 0]),
}
"""Scores by name."""


@final
class AnomalyScore:
    """A number for each input, higher for the more anomalous; learned from normal data that did not train the model.

    Args:
        name: Of :data:`SCORES`.
        model: The model of the normal data; put into evaluation mode while it is used.
        background: A model of broader data of the same shape; for ``ratio`` alone.

    Attributes:
        models: All whose densities the score is made of.
        fitted: What was learned; None before.

    Raises:
        UserError: An unknown name, a model without density, ``ratio`` without background or a background without it,
            models of inputs of different shapes.

    Example:
        >>> score = AnomalyScore("levels", model).fit(normal)
        >>> score(x).shape
        torch.Size([100])
    """

    def __init__(self, name: str, model: Denoiser, background: Denoiser | None = None) -> None:
        if name not in SCORES:
            raise UserError(f"unknown anomaly score '{name}'; {nearest(name, SCORES)}")
        if (name == "ratio") != (background is not None):
            problem = "needs a background model" if background is None else "takes no background model"
            raise UserError(f"the score '{name}' {problem}; 'ratio' is the one that compares two models")
        given = (model,) if background is None else (model, background)
        self.name, self.models = name, tuple(require_density(one, "an anomaly score") for one in given)
        if self.models[-1].shape != model.shape:
            raise UserError(f"the background takes inputs of shape {background.shape}, the model {model.shape}")
        self.fitted: Fitted | None = None
        self._coarse = coarse_level(model.schedule)

    def fit(self, reference: Tensor) -> AnomalyScore:
        """Learns what is normal, and returns itself.

        Args:
            reference: Normal data that the model was not trained on, data units, (N, *shape).

        Raises:
            UserError: An empty or too small reference, another shape than the model's, values that are not finite.
        """
        return self.learn(self.features(as_samples(self.models[0], reference, SCORES[self.name].smallest_reference)))

    def __call__(self, x: Tensor) -> Tensor:
        """Scores, finite, float64 (N,) on the CPU.

        Args:
            x: Data units, (N, *shape).

        Raises:
            UserError: Not fitted, nothing to score, another shape than the model's, values that are not finite.
        """
        if self.fitted is None:
            raise UserError(f"the score '{self.name}' is not fitted; call fit with normal data first")
        return self.apply(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """The profile of each input, float64 (N, T+2); of two models log p_0 of both, (N, 2)."""
        profiles = [level_profile(model, x) for model in self.models]
        return profiles[0] if len(profiles) == 1 else torch.stack([profile[:, 0] for profile in profiles], 1)

    def learn(self, features: Tensor) -> AnomalyScore:
        """As :meth:`fit`, of :meth:`features` of the reference."""
        # Contiguous as they are read from a file: rounding depends on the layout in memory.
        learned = SCORES[self.name].learn(features, self._coarse).items()
        self.fitted = {name: value.contiguous() for name, value in learned}
        return self

    def apply(self, features: Tensor) -> Tensor:
        """Scores of :meth:`features`."""
        # Far outside the data a density overflows; what it is then, inf or nan, must not pass for normal.
        scores = SCORES[self.name].apply(features, self._coarse, self.fitted or {})
        return scores.nan_to_num(nan=HIGHEST, posinf=HIGHEST)
