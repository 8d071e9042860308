"""The integral of a one-pass density: known, whatever the number of draws."""

import pytest
import torch
from torch import nn

from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.schedules import UniformSigmaSchedule
from torchcdm.estimators.density import WIDE, CDMDensity, importance_normalizers


class Normal(nn.Module):
    """A density that integrates to 1, with the mass where the blurred half of the proposal has it."""

    def __init__(self):
        super().__init__()
        self.schedule = UniformSigmaSchedule(20)
        train = 0.05 * torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.base = GaussianMarginals.fit(train, self.schedule, 1e-6, "full")
        self.transform = type("Transform", (), {"dim": 1})

    def log_prob(self, z, y, units):
        return torch.distributions.Normal(0.0, WIDE).log_prob(z)[:, 0].double()


@pytest.mark.parametrize("draws", [20_000, 3000, 1500])
def test_log_z_is_unbiased_whatever_the_number_of_draws(draws):
    found = importance_normalizers(Normal(), draws=draws)[0]
    assert abs(found.value) < 4 * found.se < 0.15 and not found.lacking


def test_a_network_that_says_nothing_true_does_not_count():
    rows = torch.randn(60, 2, generator=torch.Generator().manual_seed(1)).numpy()
    density = CDMDensity(random_state=0, device="cpu", steps=1).fit(rows)
    model, codes = density.model_, torch.from_numpy(rows).double()
    start = model.base.log_prob_levels(model.transform(codes))[:, 0] + model.transform.log_det(codes)
    with torch.no_grad():
        for weight in model.backbone.head.parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    density._after_training(codes, codes, 0)
    assert density.share_ == 0 and not density.normalizer_.lacking and "counts 0%" in density.notes_[-1]
    assert density.score_samples(rows) == pytest.approx(start.detach().numpy(), abs=0.02)
