"""The outlier detector for PyOD (github.com/yzhao062/pyod): its pipelines, combinations and thresholds run on it."""

from numbers import Real
from typing import TYPE_CHECKING, Any, final

import numpy as np
from pyod.models.base import BaseDetector
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted

if TYPE_CHECKING:
    from torchcdm.estimators import CDMOutlierDetector


@final
class PyodDetector(BaseDetector):
    """An outlier detector with PyOD's conventions: higher scores and label 1 are outliers.

    Args:
        detector: Settings of the model and the score; it is cloned, not fitted.
        contamination: Share of outliers in the training table, which the detector is given too, or a thresholder of
            PyThresh: then the detector has its own. The fitted one is ``detector_``.
    """

    def __init__(self, detector: "CDMOutlierDetector", contamination: float = 0.1) -> None:
        super().__init__(float(contamination) if isinstance(contamination, Real) else contamination)
        self.detector = detector

    def fit(self, X: Any, y: Any = None) -> "PyodDetector":
        """Trains the model on a table (N, columns); ``y`` is ignored. Errors are those of ``CDMOutlierDetector``."""
        self._set_n_classes(y)
        known = {"contamination": self.contamination} if isinstance(self.contamination, float) else {}
        self.detector_ = clone(self.detector).set_params(**known).fit(X)
        self.decision_scores_ = self.decision_function(X)
        self._process_decision_scores()
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """How anomalous each row of a table (N, columns) is, float64 (N,)."""
        check_is_fitted(self, "detector_")
        return -self.detector_.score_samples(X)
