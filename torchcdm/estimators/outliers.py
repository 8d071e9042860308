"""Outlier detection in a table as a scikit-learn estimator."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, final

import numpy as np
import torch
from annotated_types import Gt, Le
from sklearn.base import OutlierMixin
from sklearn.neighbors import KernelDensity
from torch import Tensor

from torchcdm.apps.anomaly import AnomalyDetector
from torchcdm.diffusion.start import Start
from torchcdm.estimators.density import TableDensity
from torchcdm.runtime.validation import Float
from torchcdm.training.config_files import merge
from torchcdm.units import ColumnTransform, TableEncoding

FALSE_ALARMS = 0.05  # share of held-out normal rows that ``contamination="auto"`` flags
LOWEST = float(np.finfo(np.float32).min)  # of a row unlike all in training: below all others, finite for curves

LONELY = 3  # times the outliers of a table, and at most half of its rows, are not learned: of least kernel density
BANDWIDTH, DENSITY_ROWS = 2.0, 2000  # wide in deviations of a column, as a group of outliers is dense in itself
ROUNDING = 1e-9  # share by which a score may differ between batches: the row at the threshold is normal in all


@final
@dataclass(kw_only=True, eq=False, repr=False)
class CDMOutlierDetector(OutlierMixin, TableDensity):
    """Outliers by the anomaly scores of a classification diffusion model, one network pass a row.

    A row that holds what training never had is an outlier, whatever the rest: another value in a column that was
    constant, a new text, a missing number.

    Args:
        anomaly_score: Name of a score in :data:`torchcdm.apps.anomaly.SCORES` that takes one model. By default
            ``log_prob``, and ``coarse`` where the training table holds outliers.
        contamination: Share of outliers in the training table, above 0 and at most ½: so many of its rows are
            flagged, and three times as many, those that lie apart, are not learned; columns are scaled alone, and the
            network takes one step by default. ``auto``: the table is taken as normal, and the threshold flags one in
            twenty of the normal rows that training did not see; the lowest of them where there are fewer than 19.
        preset: This and all further parameters: see :class:`torchcdm.estimators.base.TableEstimator`.

    Attributes:
        offset_: Threshold: ``decision_function`` is ``score_samples`` less this.
        detector_: The fitted score with its calibration, a :class:`torchcdm.apps.anomaly.AnomalyDetector`.
        model_: This and all further attributes: see :class:`torchcdm.estimators.base.TableEstimator`.

    Example:
        >>> detector = CDMOutlierDetector(random_state=0).fit(normal)
        >>> suspects = table[detector.predict(table) == -1]
    """

    _saved: ClassVar = TableDensity._saved | {"offset_": float}

    anomaly_score: Literal["log_prob", "typicality", "coarse", "complexity", "levels"] | None = None
    contamination: Annotated[Float, Gt(0), Le(0.5)] | Literal["auto"] = "auto"

    def score_samples(self, X: Any) -> np.ndarray:
        """How normal rows are: the anomaly score with its sign changed, higher for the more normal; float64 (N,)."""
        found = self._encoded(X, deviating=True)
        scores = self._scores(found.x).clip(LOWEST)  # of far rows the density may underflow
        scores[np.array(found.deviating, bool)] = LOWEST
        return scores

    def decision_function(self, X: Any) -> np.ndarray:
        """:meth:`score_samples` less the threshold: negative for outliers, float64 (N,)."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> np.ndarray:
        """+1 for a normal row, -1 for an outlier, (N,)."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def _describe(self, frame: Any, name: str, has_density: bool = True) -> TableEncoding:
        # Under the noise of the robust score values that come back need no cells.
        return super()._describe(frame, name, has_density and self.contamination == "auto")

    def _alone(self, codes: Tensor) -> Tensor:
        # Without cells no row is known to come back by chance; and one step learns none by heart.
        return super()._alone(codes) | (self.contamination != "auto")

    def _sized(self, rows: int) -> dict[str, Any]:
        fields = super()._sized(rows)
        # To a density with that much noise the network adds nothing.
        return fields if self.contamination == "auto" else merge(fields, {"train": {"steps": 1}})

    def _best_start(
        self, train: Tensor, validation: Tensor, given: dict[str, Any], bent: bool = True
    ) -> tuple[ColumnTransform, list[Tensor], Start]:
        if self.contamination == "auto":
            return super()._best_start(train, validation, given, bent)
        transform, parts, start = super()._best_start(train, validation, given, bent=False)
        density = KernelDensity(bandwidth=BANDWIDTH, rtol=1e-3).fit(parts[0][:DENSITY_ROWS])
        share = min(LONELY * self.contamination, 0.5)
        kept = (density.score_samples(part).argsort()[int(share * len(part)) :] for part in parts)
        return transform, [part[np.sort(rows)] for part, rows in zip(parts, kept, strict=True)], start

    def _after_training(self, codes: Tensor, held_out: Tensor, seed: int) -> None:
        # What learns of the held-out rows must not be calibrated on the same ones.
        half = max(2, len(held_out) // 2)
        score = self.anomaly_score or ("log_prob" if self.contamination == "auto" else "coarse")
        self.detector_ = detector = AnomalyDetector(score, self.model_)
        detector.learn(detector.features(torch.cat(list(self._noisy(held_out[:half])))))
        calibration = held_out[half:] if detector.fitted and len(held_out) > half else held_out
        detector.calibration = torch.from_numpy(-self._scores(calibration)).sort().values
        if self.contamination != "auto":
            self.offset_ = float(np.percentile(self._scores(codes), 100 * self.contamination))
        else:
            least = 1 / (1 + len(calibration))
            self.offset_ = -detector.threshold(max(FALSE_ALARMS, least))
            if least > FALSE_ALARMS:
                rows = f"{len(calibration)} held-out rows set the threshold"
                what = f"of new normal rows about {least:.0%} lie below, not {FALSE_ALARMS:.0%}"
                self._say(f"{rows}: {what}; give more rows, or a larger validation_fraction")
        self.offset_ -= ROUNDING * max(1.0, abs(self.offset_))

    def _scores(self, codes: Tensor) -> np.ndarray:
        return -self._over_draws(self.detector_.score, codes)

    def save(self, folder: str | Path) -> None:
        """Writes the estimator as :meth:`TableDensity.save` does, and what its score learned."""
        super().save(folder)
        self.detector_.save(folder)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "CDMOutlierDetector":
        """A saved estimator; errors as in :meth:`TableDensity.load`."""
        self = super().load(folder, device)
        self.detector_ = AnomalyDetector.load(folder, self.model_)
        return self
