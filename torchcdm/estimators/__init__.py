"""scikit-learn estimators: densities, outliers, and densities that are conditional on other columns."""

from torchcdm.estimators.conditional import CDMConditional
from torchcdm.estimators.density import CDMDensity
from torchcdm.estimators.outliers import CDMOutlierDetector

__all__ = ["CDMConditional", "CDMDensity", "CDMOutlierDetector"]
