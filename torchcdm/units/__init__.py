r"""Data units, model units, and what a log-likelihood is measured in.

Data units are the values as they are stored: 0 ... 255 for 8-bit images, 0 ... 16 for the digits, a column's
own unit in a table. The network sees model units, :math:`z = (x - \text{shift}) / \text{scale}` or a bent map of
each dimension, and :math:`\log p(x) = \log p(z) + \log|dz/dx|`. Grey level k owns the cell from k - ½ to k + ½
(times the bin), so that rounding is the inverse of dequantisation.
"""

from __future__ import annotations

from typing import Any

from torchcdm.errors import UserError
from torchcdm.runtime.validation import read_as
from torchcdm.units.affine import DataTransform
from torchcdm.units.checks import construct
from torchcdm.units.columns import ColumnTransform
from torchcdm.units.gaussianized import GaussianizedTransform
from torchcdm.units.lattice import cell_width, discrete_values, frequent_values
from torchcdm.units.log_likelihood import LogLikelihood, standard_error
from torchcdm.units.table import TableEncoding
from torchcdm.units.warp import ColumnWarp

__all__ = [
    "ColumnTransform",
    "ColumnWarp",
    "DataTransform",
    "GaussianizedTransform",
    "LogLikelihood",
    "TableEncoding",
    "cell_width",
    "discrete_values",
    "frequent_values",
    "standard_error",
    "transform_from_config",
]

KINDS = {"affine": DataTransform, "gaussianized": GaussianizedTransform, "columns": ColumnTransform}


def transform_from_config(config: Any) -> DataTransform:
    """The transform that wrote ``config``; histograms of grey levels are blank, to load a saved state into.

    Raises:
        UserError: Anything that no transform writes.
    """
    if not isinstance(config, dict):
        raise UserError(f"data transform is {config!r:.60}; named values are needed")
    arguments = {"kind": "affine", "table": None} | config
    name, table = arguments.pop("kind"), arguments.pop("table")
    if not isinstance(name, str) or name not in KINDS:
        raise UserError(f"data transform: unknown kind {name!r:.60}; choose from: {', '.join(KINDS)}")
    transform = construct(KINDS[name], arguments, "data transform")
    if table is not None:
        transform.table = read_as(TableEncoding, table, "table")
        if len(transform.table.kept) != transform.dim:
            raise UserError(f"table: {len(transform.table.kept)} columns; the data have {transform.dim}")
    return transform
