"""The integral of a one-pass density: known, whatever the number of draws."""

import pytest
import torch

from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.schedules import UniformSigmaSchedule
from torchcdm.estimators.density import WIDE, importance_normalizers


class Normal:
    """A density that integrates to 1, with the mass where the blurred half of the proposal has it."""

    def __init__(self):
        self.schedule = UniformSigmaSchedule(20)
        train = 0.05 * torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.base = GaussianMarginals.fit(train, self.schedule, 1e-6, "full")
        self.transform = type("Transform", (), {"dim": 1})

    def log_prob(self, z, units):
        return torch.distributions.Normal(0.0, WIDE).log_prob(z)[:, 0].double()


@pytest.mark.parametrize("draws", [20_000, 3000, 1500])
def test_log_z_is_unbiased_whatever_the_number_of_draws(draws):
    (found,) = importance_normalizers(Normal(), draws=draws, shares=(1.0,))
    assert abs(found.value) < 4 * found.se < 0.15 and found.usable
