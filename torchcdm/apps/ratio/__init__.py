"""Density ratios of two data sets, and what a ratio is worth."""

from torchcdm.apps.ratio.calibration import Calibration
from torchcdm.apps.ratio.correction import best_share
from torchcdm.apps.ratio.density_ratio import DensityRatio, Scores
from torchcdm.apps.ratio.importance import effective_sample_size, importance_weights

__all__ = ["Calibration", "DensityRatio", "Scores", "best_share", "effective_sample_size", "importance_weights"]
