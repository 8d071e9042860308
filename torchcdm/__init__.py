"""Classification diffusion models in PyTorch.

One network that classifies noise levels gives a density at every level in one pass, a score, and a denoiser.

Example:
    >>> model = torchcdm.load("runs/digits")
    >>> x = torchcdm.sample(model, 16)
    >>> log_p = model.log_prob(x)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchcdm.version import __version__

if TYPE_CHECKING:
    from torchcdm import estimators, likelihood
    from torchcdm.cdm import ClassificationDiffusion
    from torchcdm.checkpoint import load
    from torchcdm.denoisers import DenoisingDiffusion
    from torchcdm.errors import UserError
    from torchcdm.fitting import fit
    from torchcdm.ratio import DensityRatio
    from torchcdm.samplers import sample

__all__ = [
    "ClassificationDiffusion",
    "DenoisingDiffusion",
    "DensityRatio",
    "UserError",
    "__version__",
    "estimators",
    "fit",
    "likelihood",
    "load",
    "sample",
]

_MODULES = ("estimators", "likelihood")

_HOMES = {
    "ClassificationDiffusion": "cdm",
    "DenoisingDiffusion": "denoisers",
    "DensityRatio": "ratio",
    "UserError": "errors",
    "fit": "fitting",
    "load": "checkpoint",
    "sample": "samplers",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that ``import torchcdm`` stays fast whatever a later name needs.
    if name in _MODULES:
        return importlib.import_module(f"torchcdm.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"torchcdm.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'torchcdm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
