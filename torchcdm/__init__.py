"""Classification diffusion models in PyTorch.

One network that classifies noise levels gives a density at every level in one pass, a score, and a denoiser.

Example:
    >>> model = torchcdm.load("zoo:digits")
    >>> x = model.sample(16)
    >>> log_p = model.log_prob(x)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from torchcdm import compose, estimators, likelihood
    from torchcdm.apps.ratio import DensityRatio, mutual_information
    from torchcdm.bridges.hub import push
    from torchcdm.compose import sample
    from torchcdm.errors import UserError
    from torchcdm.models.cdm import ClassificationDiffusion
    from torchcdm.models.denoiser import Denoiser, DenoisingDiffusion
    from torchcdm.models.density import DensityModel
    from torchcdm.training.checkpoint import load, save
    from torchcdm.training.fit import fit, train

__all__ = [
    "ClassificationDiffusion",
    "Denoiser",
    "DenoisingDiffusion",
    "DensityModel",
    "DensityRatio",
    "UserError",
    "__version__",
    "compose",
    "estimators",
    "fit",
    "likelihood",
    "load",
    "mutual_information",
    "push",
    "sample",
    "save",
    "train",
]

_MODULES = ("compose", "estimators", "likelihood")

_HOMES = {
    "ClassificationDiffusion": "models.cdm",
    "Denoiser": "models.denoiser",
    "DenoisingDiffusion": "models.denoiser",
    "DensityModel": "models.density",
    "DensityRatio": "apps.ratio",
    "UserError": "errors",
    "fit": "training.fit",
    "load": "training.checkpoint",
    "mutual_information": "apps.ratio",
    "push": "bridges.hub",
    "sample": "compose",
    "save": "training.checkpoint",
    "train": "training.fit",
}


if not TYPE_CHECKING:  # a type checker knows the names from above

    def __getattr__(name: str) -> Any:
        # Lazy, so that ``import torchcdm`` stays fast whatever a later name needs.
        if name in _MODULES:
            return importlib.import_module(f"torchcdm.{name}")
        if name in _HOMES:
            return getattr(importlib.import_module(f"torchcdm.{_HOMES[name]}"), name)
        raise AttributeError(f"module 'torchcdm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
