r"""Data units, model units, and what a log-likelihood is measured in.

Data units are the values as they are stored: 0 ... 255 for 8-bit images, 0 ... 16 for the digits, a column's
own unit in a table. The network sees model units, :math:`z = (x - \text{shift}) / \text{scale}` or a bent map of
each dimension, and :math:`\log p(x) = \log p(z) + \log|dz/dx|`. Grey level k owns the cell from k - ½ to k + ½
(times the bin), so that rounding is the inverse of dequantisation.
"""

from typing import Any

from torchcdm.errors import UserError, reason
from torchcdm.runtime.validation import read_as
from torchcdm.units.affine import DataTransform
from torchcdm.units.columns import ColumnTransform
from torchcdm.units.gaussianized import GaussianizedTransform
from torchcdm.units.log_likelihood import LogLikelihood, log_normal, standard_error
from torchcdm.units.table import TableEncoding

__all__ = ["ColumnTransform", "DataTransform", "GaussianizedTransform", "LogLikelihood", "TableEncoding"]
__all__ += ["log_normal", "standard_error", "transform_from_config"]

KINDS = {"affine": DataTransform, "gaussianized": GaussianizedTransform, "columns": ColumnTransform}


def transform_from_config(config: Any) -> DataTransform:
    """The transform that wrote ``config``, or UserError; histograms of grey levels are blank, to load a state into."""
    try:
        arguments = {"kind": "affine", "table": None, **config}
        kind, table = KINDS[arguments.pop("kind")], arguments.pop("table")
        transform = kind(**arguments)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"data transform: {reason(error)}") from None
    transform.table = None if table is None else read_as(TableEncoding, table, "table")
    return transform
