"""Density ratios of two data sets, and what a ratio is worth."""

from torchcdm.apps.ratio.checks import Calibration, effective_sample_size, importance_weights
from torchcdm.apps.ratio.correction import best_share
from torchcdm.apps.ratio.density_ratio import DensityRatio, Scores

__all__ = ["Calibration", "DensityRatio", "Scores", "best_share", "effective_sample_size", "importance_weights"]
