"""scikit-learn estimators: densities, outliers, and densities that are conditional on other columns."""

from torchcdm.estimators.density import CDMDensity

__all__ = ["CDMDensity"]
