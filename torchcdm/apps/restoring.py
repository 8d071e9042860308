"""Images from a part of them, a blurred or a smaller one: samples of the posterior, and what they agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from torchcdm.compose.sampling import sample
from torchcdm.compose.tilted import posterior
from torchcdm.models.denoiser import Denoiser

CREDIBLE = 0.9
"""Mass of the intervals whose width is given."""


class Restored(NamedTuple):
    """One input restored, data units on the CPU.

    Attributes:
        mean: Of the weighted particles, (*shape), not rounded.
        low: Lower ends of 90 % intervals, number by number, (*shape), between two draws in their order: another draw
            of the posterior lies within as often as that says.
        high: Their upper ends.
        draws: Equally weighted samples of the posterior, (n, *shape).
        ess: Effective number of particles that they are from.
    """

    mean: Tensor
    low: Tensor
    high: Tensor
    draws: Tensor
    ess: float


def restore(
    model: Denoiser, measurement: Callable[[Tensor], Tensor], y: Tensor, noise_std: float | None = None, n: int = 64,
    particles: int = 512, seed: int = 0, progress: bool = False,
) -> Restored:  # fmt: skip
    """``n`` draws from p(x | y), y = A(x) + noise, by :func:`torchcdm.compose.posterior` and particles.

    Arguments up to ``noise_std`` and errors are as of that function, the others as of :func:`torchcdm.sample`.
    """
    target = posterior(model, measurement, y, noise_std)
    found = sample(target, n, particles=particles, seed=seed, details=True, progress=progress)
    weights = found.log_weights.exp()
    mean = (weights @ found.particles.double().flatten(1)).reshape(found.particles.shape[1:])
    # The k-th of n draws in their order has k / (n + 1) of the mass below it.
    places = ((1 + sign * CREDIBLE) / 2 * (n + 1) - 1 for sign in (-1, 1))
    shares = (min(max(place / max(n - 1, 1), 0.0), 1.0) for place in places)
    low, high = (found.x.double().quantile(share, 0).float() for share in shares)
    return Restored(mean.float(), low, high, found.x, found.ess)
