"""Anomaly scores from the whole logit vector: one network pass an input, calibrated on held-out normal data.

Higher is more anomalous everywhere. A score sees log p_t(x) at every level t at once (identity 1). Raw log p, level 0
alone, is known to rank simple inputs above the normal ones; the other scores look at what it throws away.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

import torch
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from torchcdm.cdm import ClassificationDiffusion
from torchcdm.checkpoint import read_tensors
from torchcdm.denoisers import Denoiser, evaluation_mode, working_dtype
from torchcdm.errors import UserError, nearest
from torchcdm.run_folder import write_file

FORMAT = "1"
"""Version of a saved detector."""

NOISE_SEED = 0
BATCH_SIZE = 500

Fitted = Mapping[str, Tensor]
"""What a score learned from the reference, by name."""


@torch.no_grad()
def level_profile(model: ClassificationDiffusion, x: Tensor, batch_size: int = BATCH_SIZE) -> Tensor:
    """log p_t(x) at every level, the input itself unchanged from level to level: one forward pass.

    Data on a grid are dequantised by one fixed draw of the noise for all inputs, so that the profile is a function of
    the input alone, not of its place in a batch.

    Args:
        model: The model; put into evaluation mode meanwhile.
        x: Data units, (N, *shape).
        batch_size: Inputs evaluated at once.

    Returns:
        Nats in model units, float64 (N, T+2) on the CPU.
    """
    device, dtype = model.schedule.alpha.device, working_dtype(model, torch.float64)
    with evaluation_mode(model):
        parts = [model.log_prob_levels(_encode(model, part.to(device)).to(dtype)) for part in x.split(batch_size)]
    return torch.cat(parts).cpu()


def _encode(model: ClassificationDiffusion, x: Tensor) -> Tensor:
    """Data units to model units, with the fixed dequantisation."""
    transform = model.transform
    if transform is None:
        return x
    nothing = torch.zeros(transform.shape, dtype=torch.float64)
    noise = transform.add_noise(nothing, torch.Generator().manual_seed(NOISE_SEED))
    return transform(x.double() + noise.to(x.device))


# --- scores --------------------------------------------------------------------------------------------------------


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

    def __init__(self, model: ClassificationDiffusion) -> None:
        self.model = model
        self.fitted: Fitted | None = None

    def fit(self, reference: Tensor) -> AnomalyScore:
        """Learns what is normal, and returns itself.

        Args:
            reference: Normal data that the model was not trained on, data units, (N, *shape).

        Raises:
            UserError: An empty or too small reference, another shape than the model's, values that are not finite.
        """
        if len(reference) < self.smallest_reference:
            raise UserError(
                f"the reference holds {len(reference)} samples; the score '{self.name}' needs at least "
                f"{self.smallest_reference} normal ones that the model was not trained on"
            )
        self._check(reference, "the reference")
        self.fitted = self.learn(self.features(reference))
        return self

    def __call__(self, x: Tensor) -> Tensor:
        """Scores, float64 (N,) on the CPU.

        Args:
            x: Data units, (N, *shape).

        Raises:
            UserError: Not fitted, nothing to score, another shape than the model's, values that are not finite.
        """
        if self.fitted is None:
            raise UserError(f"the score '{self.name}' is not fitted; call fit with normal data first")
        if len(x) == 0:
            raise UserError("there is nothing to score: the inputs are empty")
        self._check(x, "the inputs")
        return self.apply(self.features(x), self.fitted)

    def features(self, x: Tensor) -> Tensor:
        """What the score sees of each input, float64 (N, features)."""
        return level_profile(self.model, x)

    @abstractmethod
    def learn(self, features: Tensor) -> Fitted:
        """From features of the reference, (N, features)."""

    @abstractmethod
    def apply(self, features: Tensor, fitted: Fitted) -> Tensor:
        """From features of inputs, (N, features), to scores (N,)."""

    def _check(self, x: Tensor, what: str) -> None:
        shape = self.model.shape
        if shape is not None and tuple(x.shape[1:]) != shape:
            raise UserError(f"{what}: samples of shape {tuple(x.shape[1:])}; the model takes {shape}")
        bad = ~x.isfinite().flatten(1).all(1)
        if bad.any():
            raise UserError(f"{what}: sample {int(bad.int().argmax())} holds values that are not finite")


@final
class LogProb(AnomalyScore):
    """-log p_0(x), raw. It misses inputs that are simpler than the normal ones, such as flat or blurred images."""

    name = "log_prob"

    def learn(self, features: Tensor) -> Fitted:
        return {}

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
class Levels(AnomalyScore):
    """Squared Mahalanobis distance of the profile log p_t(x) - log p_{t+1}(x) under a shrunk Gaussian.

    The one-pass kin of multi-scale score matching analysis (arXiv 2010.13132).
    """

    name = "levels"
    smallest_reference = 2

    def learn(self, features: Tensor) -> Fitted:
        from sklearn.covariance import LedoitWolf

        steps = -features.diff(dim=1)
        mean, deviation = steps.mean(0), steps.std(0, correction=0)
        deviation = deviation.clamp_min(1e-6 * float(deviation.max()) + 1e-300)
        precision = LedoitWolf().fit(((steps - mean) / deviation).numpy()).precision_
        return {"mean": mean, "deviation": deviation, "precision": torch.from_numpy(precision)}

    def apply(self, features: Tensor, fitted: Fitted) -> Tensor:
        z = (-features.diff(dim=1) - fitted["mean"]) / fitted["deviation"]
        return ((z @ fitted["precision"]) * z).sum(1)


@final
class Complexity(AnomalyScore):
    """-[log p_0(x) - log p_c(x)] at a coarse level c: how unlikely the detail is, whatever the coarse picture."""

    name = "complexity"

    def learn(self, features: Tensor) -> Fitted:
        return {}

    def apply(self, features: Tensor, fitted: Fitted) -> Tensor:
        return features[:, features.shape[1] // 2] - features[:, 0]


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

    def __init__(self, model: ClassificationDiffusion, background: ClassificationDiffusion) -> None:
        super().__init__(model)
        if model.shape != background.shape:
            raise UserError(f"the background takes inputs of shape {background.shape}, the model {model.shape}")
        self.background = background

    def features(self, x: Tensor) -> Tensor:
        """log p_0 of both in data units, (N, 2)."""
        columns = []
        for model in (self.model, self.background):
            log_det = 0.0 if model.transform is None else model.transform.log_det
            columns.append(level_profile(model, x)[:, 0] + log_det)
        return torch.stack(columns, 1)

    def learn(self, features: Tensor) -> Fitted:
        return {}

    def apply(self, features: Tensor, fitted: Fitted) -> Tensor:
        return features[:, 1] - features[:, 0]


SCORES: dict[str, type[AnomalyScore]] = {
    kind.name: kind for kind in (LogProb, Typicality, Levels, Complexity, Ratio)
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
    for one in (model, background):
        if one is not None and not isinstance(one, ClassificationDiffusion):
            raise UserError("anomaly scores need a cdm: a plain diffusion model has no density in one pass")
    return SCORES[name](model) if background is None else Ratio(model, background)


# --- calibration ---------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class AnomalyDetector:
    """A fitted score, and the scores of normal data that neither it nor the model has learned from.

    Attributes:
        score: The fitted score.
        calibration: Scores of held-out normal data, sorted, float64 (n,).

    Example:
        >>> detector = AnomalyDetector.fit(make_score("levels", model), normal)
        >>> flags = detector.flags(detector.score(x), fpr=0.05)
    """

    score: AnomalyScore
    calibration: Tensor

    @classmethod
    def fit(cls, score: AnomalyScore, reference: Tensor, seed: int = 0) -> AnomalyDetector:
        """One half of the reference, drawn at random, fits the score, the other is what it is compared with.

        Args:
            score: Not yet fitted.
            reference: Normal data that the model was not trained on, data units, (N, *shape).
            seed: Of the draw.

        Raises:
            UserError: A reference that is too small, or as in :meth:`AnomalyScore.fit`.
        """
        if len(reference) < 2:
            raise UserError(f"the reference holds {len(reference)} samples; it must have two parts, give more")
        order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(seed))
        half = len(reference) // 2
        score.fit(reference[order[:half]])
        return cls(score, score(reference[order[half:]]).sort().values)

    def percentile(self, scores: Tensor) -> Tensor:
        """Share of normal data that would score lower, in percent, float64 (N,): 100 (1 - conformal p-value).

        The p-value is (1 + number of calibration scores at or above) / (n + 1), so that among normal inputs it is
        below any alpha with a probability of at most alpha, whatever the distribution of the scores.
        """
        n = len(self.calibration)
        below = torch.searchsorted(self.calibration, scores.contiguous(), right=False)
        return 100 * below / (n + 1)

    def threshold(self, fpr: float) -> float:
        """The score above which an input is flagged, for a false-positive rate of at most ``fpr``.

        The conformal quantile: the ceil((n+1)(1 - fpr))-th smallest calibration score.

        Raises:
            UserError: A rate outside (0, 1), or one that the calibration is too small for.
        """
        if not 0 < fpr < 1:
            raise UserError(f"fpr is {fpr:g}; a false-positive rate lies between 0 and 1")
        n = len(self.calibration)
        # Rounded first: 0.95 * 20 must not become 20 for its last bit.
        rank = math.ceil(round((n + 1) * (1 - fpr), 9))
        if rank > n:
            needed = math.ceil(round(1 / fpr, 9)) - 1
            raise UserError(
                f"{n} held-out normal samples cannot calibrate a false-positive rate of {fpr:g}; "
                f"it takes {needed}, or a larger rate"
            )
        return float(self.calibration[rank - 1])

    def flags(self, scores: Tensor, fpr: float) -> Tensor:
        """Which scores are above :meth:`threshold`, bool (N,)."""
        return scores > self.threshold(fpr)

    def save(self, path: str | Path) -> None:
        """Writes what was learned, without the models, as safetensors.

        Raises:
            UserError: It cannot be written.
        """
        meta = {"format": FORMAT, "score": self.score.name, "shape": json.dumps(self.score.model.shape)}
        tensors = {f"fitted.{key}": value.contiguous() for key, value in (self.score.fitted or {}).items()}
        write_file(Path(path), safetensors_bytes(tensors | {"calibration": self.calibration}, meta))

    @classmethod
    def load(cls, path: str | Path, model: Denoiser, background: Denoiser | None = None) -> AnomalyDetector:
        """A saved detector, with the model it was fitted on.

        Raises:
            UserError: No such file, a damaged one, one of another format, or one of a model of another shape.
        """
        tensors = read_tensors(Path(path))
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
        if meta.get("format") != FORMAT or "calibration" not in tensors:
            raise UserError(f"{path}: is no anomaly detector that this version reads")
        score = make_score(meta["score"], model, background)
        if meta["shape"] != json.dumps(score.model.shape):
            raise UserError(f"{path}: was fitted for inputs of shape {meta['shape']}; the model takes {model.shape}")
        prefix = "fitted."
        score.fitted = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
        return cls(score, tensors["calibration"])
