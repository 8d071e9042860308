"""Telescoping density-ratio estimation (arXiv 2006.12204): logistic losses on adjacent pairs of levels."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from torchcdm.losses import Loss, Terms
from torchcdm.models.cdm import ClassificationDiffusion


@final
class TRELoss(Loss):
    r"""The mean over a sample's two pairs of the logistic loss of log p_t - log p_{t+1}.

    .. math:: \tfrac12 [\mathrm{softplus}(f_{t+1} - f_t) + \mathrm{softplus}(f_{t-1} - f_t)], \qquad f = \log p(x_t)

    Each pair of levels sees both of them equally often, so that its ratio is that of the two densities. Levels 0 and
    T+1 have one pair.

    Args:
        model: The model to train.
    """

    model: ClassificationDiffusion

    def terms(self, x_t: Tensor, t: Tensor, y: Tensor | None, eps: Tensor) -> Terms:
        """As :meth:`torchcdm.losses.Loss.terms`: ``loss``, ``mse`` (0), ``t``."""
        log_p = self.model.conditional_and_marginal(x_t, y)[0]
        last = self.model.schedule.T + 1
        here, above, below = (log_p.gather(1, (t + step).clamp(0, last)[:, None])[:, 0] for step in (0, 1, -1))
        up, down = (nn.functional.softplus(other - here) for other in (above, below))
        loss = 0.5 * (up.masked_fill(t == last, 0) + down.masked_fill(t == 0, 0)).to(x_t.dtype)
        return {"loss": loss, "mse": torch.zeros_like(loss), "t": t}
