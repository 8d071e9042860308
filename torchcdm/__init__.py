"""Classification diffusion models in PyTorch.

One network that classifies noise levels gives a density at every level in one pass, a score, and a denoiser.

Example:
    >>> model = torchcdm.load("zoo:digits")
    >>> x = model.sample(16)
    >>> log_p = model.log_prob(x)
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from torchcdm import compose as compose, estimators as estimators, likelihood as likelihood, samplers as samplers
    from torchcdm.apps.ratio import (
        DensityRatio as DensityRatio,
        mutual_information as mutual_information,
        two_sample_test as two_sample_test,
    )
    from torchcdm.bridges.hub import push as push
    from torchcdm.compose import sample as sample
    from torchcdm.errors import UserError as UserError
    from torchcdm.models.cdm import ClassificationDiffusion as ClassificationDiffusion
    from torchcdm.models.denoiser import Denoiser as Denoiser, DenoisingDiffusion as DenoisingDiffusion
    from torchcdm.models.density import DensityModel as DensityModel
    from torchcdm.training.checkpoint import load as load, save as save
    from torchcdm.training.fit import fit as fit, train as train

_HOMES = {
    "ClassificationDiffusion": "models.cdm", "Denoiser": "models.denoiser", "DenoisingDiffusion": "models.denoiser",
    "DensityModel": "models.density", "DensityRatio": "apps.ratio", "UserError": "errors", "compose": "compose",
    "estimators": "estimators", "fit": "training.fit", "likelihood": "likelihood", "load": "training.checkpoint",
    "mutual_information": "apps.ratio", "push": "bridges.hub", "sample": "compose", "samplers": "samplers",
    "save": "training.checkpoint", "train": "training.fit", "two_sample_test": "apps.ratio",
}  # fmt: skip
"""The module that each public name is, or is of."""

__all__ = ["__version__", *_HOMES]

if not TYPE_CHECKING:  # a type checker knows the names from above

    def __getattr__(name: str) -> Any:
        # Lazy, so that ``import torchcdm`` stays fast whatever a later name needs.
        if name not in _HOMES:
            raise AttributeError(f"module 'torchcdm' has no attribute '{name}'")
        home = importlib.import_module(f"torchcdm.{_HOMES[name]}")
        return home if name == _HOMES[name] else getattr(home, name)


def __dir__() -> list[str]:
    return __all__
