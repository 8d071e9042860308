"""Thresholds and percentiles of a score, calibrated on held-out normal data."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from torchcdm.apps.anomaly.profile import as_samples
from torchcdm.apps.anomaly.scores import AnomalyScore
from torchcdm.data import MemorySplit
from torchcdm.errors import UserError
from torchcdm.models.denoiser import Denoiser
from torchcdm.random import stream
from torchcdm.runtime.artefact import damaged, read_artefact, write_artefact

FILE, TENSORS = "detector.json", "detector.safetensors"


@final
class AnomalyDetector:
    """A fitted score, and the scores of normal data that neither it nor the model has learned from.

    Args:
        score: The fitted score.
        calibration: Scores of held-out normal data, sorted, float64 (n,).

    Example:
        >>> detector = AnomalyDetector.fit(AnomalyScore("levels", model), normal)
        >>> flags = detector.flags(detector.score(x), fpr=0.05)
    """

    def __init__(self, score: AnomalyScore, calibration: Tensor) -> None:
        self.score, self.calibration = score, calibration
        # Now, not when it is saved: the model may be trained in between.
        self._values = _digest(score)

    @classmethod
    def fit(cls, score: AnomalyScore, reference: Tensor) -> AnomalyDetector:
        """One half of the reference, drawn at random, fits the score, the other is what it is compared with.

        Args:
            score: Not yet fitted.
            reference: Normal data that the model was not trained on, data units, (N, *shape).

        Raises:
            UserError: A reference that is too small, or as in :meth:`AnomalyScore.fit`.
        """
        if not isinstance(score, AnomalyScore):
            raise UserError(f"score is {score!r}; give an AnomalyScore")
        reference = as_samples(score.models[0], reference, 2)
        order = torch.randperm(len(reference), generator=stream(0, "halves"))
        half = len(reference) // 2
        score.fit(reference[order[:half]])
        return cls(score, score(reference[order[half:]]).sort().values)

    def percentile(self, scores: Tensor) -> Tensor:
        """Share of normal data that would score lower, in percent, float64 (N,): 100 (1 - conformal p-value).

        The p-value is (1 + number of calibration scores at or above) / (n + 1), so that among normal inputs it is
        below any alpha with a probability of at most alpha, whatever the distribution of the scores.
        """
        scores = torch.as_tensor(scores).double().contiguous()
        return 100 * torch.searchsorted(self.calibration, scores) / (len(self.calibration) + 1)

    def threshold(self, fpr: float) -> float:
        """The score above which an input is flagged, for a false-positive rate of at most ``fpr``.

        The conformal quantile: the ceil((n+1)(1 - fpr))-th smallest calibration score.

        Raises:
            UserError: A rate outside (0, 1), or one that the calibration is too small for.
        """
        check_fpr(fpr)
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
        """Which scores are not at or below :meth:`threshold`, bool (N,)."""
        return ~(torch.as_tensor(scores) <= self.threshold(fpr))

    def save(self, folder: str | Path) -> None:
        """Writes what was learned, without the models: ``detector.json`` and ``detector.safetensors``."""
        content, tensors = {"score": self.score.name, "values": self._values}, {"calibration": self.calibration}
        tensors |= {f"fitted.{key}": value for key, value in (self.score.fitted or {}).items()}
        write_artefact(Path(folder) / FILE, "detector", content, {TENSORS: tensors})

    @classmethod
    def load(cls, folder: str | Path, model: Denoiser, background: Denoiser | None = None) -> AnomalyDetector:
        """A saved detector, with the model it was fitted on.

        Raises:
            UserError: No detector there, damaged files, or one of a model of other weights or constants.
        """
        path = Path(folder) / FILE
        content, (tensors,) = read_artefact(path, "detector", [TENSORS])
        score = AnomalyScore(str(content.get("score")), model, background)
        if content.get("values") != _digest(score):
            what = "the model has been trained since, or is another"
            raise UserError(f"{path}: {what}; fit the detector again")
        calibration, prefix = tensors.get("calibration", torch.empty(0)), "fitted."
        if calibration.dtype != torch.float64 or calibration.ndim != 1 or not len(calibration):
            damaged(path.with_name(TENSORS), "'calibration' is missing or wrong")
        score.fitted = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
        return cls(score, calibration)


def check_fpr(fpr: float) -> None:
    """Refuses a false-positive rate outside (0, 1)."""
    if not 0 < fpr < 1:
        raise UserError(f"fpr is {fpr:g}; a false-positive rate lies between 0 and 1")


def _digest(score: AnomalyScore) -> str:
    """A digest of the tensors that the models' densities are made of, in single precision."""
    digest = hashlib.sha256()
    for model in score.models:
        for name, value in sorted(model.state_dict().items()):
            digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def normal_data(
    model: Denoiser, paths: Sequence[str | Path] | None = None, skip_bad: bool = False, limit: int = 5000
) -> tuple[Tensor, str]:
    """Normal data that did not train a model of known data, data units (N, *shape), and what they are called.

    From the files ``paths``, without what cannot be read where ``skip_bad`` says so; the validation split of the
    model's own data when None. At most ``limit`` samples, evenly spaced.

    Raises:
        UserError: Files that do not fit the model; no validation split.
    """
    if paths is not None:
        x = model.info.read_inputs(paths, skip_bad).x
        return MemorySplit(x).tensors(limit)[0], ", ".join(map(str, paths))
    try:
        source = model.info.read_source(model)
        split = source.split("validation")
    except UserError as error:
        raise UserError(f"{error}; or give normal data by --reference PATH") from None
    return split.tensors(limit)[0].float(), f"validation split of {source.name}"
