"""Density ratios of two data sets, what a ratio is worth, and what it tells of the two."""

from torchcdm.apps.ratio.checks import Calibration, effective_sample_size, importance_weights
from torchcdm.apps.ratio.density_ratio import DensityRatio, Scores
from torchcdm.apps.ratio.information import Estimate, TwoSampleTest, mutual_information, two_sample_test

__all__ = ["Calibration", "DensityRatio", "Estimate", "Scores", "TwoSampleTest"]
__all__ += ["effective_sample_size", "importance_weights", "mutual_information", "two_sample_test"]
