"""Any model as a denoiser of azula (github.com/probabilists/azula), whose samplers and guidance methods then run.

azula's time runs from 0, our level 1, to 1, our level T. In between it stands for the nearest level, so that scales
and denoiser always belong together.
"""

from typing import Any, final

import torch
from azula.denoise import Denoiser as Azula, DiracPosterior
from azula.noise import Schedule
from torch import Tensor

from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import NoiseSchedule
from torchcdm.errors import UserError
from torchcdm.models.denoiser import Denoiser, evaluation_mode, working_dtype


@final
class AzulaSchedule(Schedule):
    """The levels 1 ... T of our ``schedule`` as the times 0 ... 1. Samplers take at most T - 1 steps: with more, two
    of their times are the same level."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule

    def level(self, t: Tensor) -> Tensor:
        """The level nearest to each time, long, shape of ``t``."""
        return 1 + (t.clamp(0, 1) * (self.schedule.T - 1)).round().long()

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at times ``t``, of the shape and type of ``t``."""
        level = self.level(t).to(self.schedule.alpha.device)
        return self.schedule.alpha[level].to(t), self.schedule.sigma[level].to(t)


@final
class AzulaDenoiser(Azula):
    """A model as azula's ``Denoiser``; inputs and results are in model units.

    The mean has a derivative in ``x_t``, which DPS and MMPS ask for: on a CDM it is symmetric, as a posterior
    covariance is. A measurement of data in their own units is ``lambda z: A(model.transform.inverse(z))``; results
    come back to data units by ``model.transform.inverse``.
    """

    def __init__(self, model: Denoiser) -> None:
        super().__init__()
        self.model, self.schedule = model, AzulaSchedule(model.schedule)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None, **others: Any) -> DiracPosterior:
        """E[x_0 | x_t] as a posterior without spread.

        From ``x_t`` (B, *shape), model units, at times ``t`` in [0, 1], () or (B,); the ``label`` is a class of each,
        long (B,), or a context. UserError for what the model does not take.
        """
        for name in others:
            raise UserError(f"AzulaDenoiser takes no '{name}'; classes and contexts are its label")
        x = x_t.to(working_dtype(self.model, x_t.dtype))
        level = self.schedule.level(t).to(x.device).expand(len(x))
        with evaluation_mode(self.model):
            if torch.is_grad_enabled() and x.requires_grad:
                eps = self.model.differentiable_eps(x, level, label)
                x_0 = Prediction(x, *self.model.schedule.at(level, x), eps).x0
            else:
                x_0 = self.model.denoise(x, level, label).x0
        return DiracPosterior(mean=x_0.to(x_t))
