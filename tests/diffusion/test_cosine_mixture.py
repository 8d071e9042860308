"""The mixture of Gaussians for images, against its own definition and automatic derivatives."""

import pytest
import torch
from oracles import normal
from torch import Tensor

from torchcdm.diffusion.gaussian import CosineRotation
from torchcdm.diffusion.mixture import MixtureMarginals, fit_cosines
from torchcdm.diffusion.schedules import UniformSigmaSchedule
from torchcdm.diffusion.start import best_start
from torchcdm.errors import UserError

SCHEDULE = UniformSigmaSchedule(20)


def images(n: int, seed: int = 0) -> Tensor:
    """Smooth and busy ones, (n, 2, 4, 4): the second kind has ten times the deviation."""
    contrast = torch.where(torch.arange(n) % 2 == 0, 0.1, 1.0).double()
    return contrast[:, None, None, None] * normal(n, 2, 4, 4, seed=seed)


@pytest.fixture(scope="module")
def mixture() -> MixtureMarginals:
    return MixtureMarginals.fit(images(400), SCHEDULE, components=2)


def brute(mixture: MixtureMarginals, x: Tensor, t: int) -> Tensor:
    """log density at a level from the definition, (B,)."""
    alpha, sigma = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
    z, parts = CosineRotation(x.shape[1:])(x), []
    known = (mixture.log_weights, mixture.parts.mean, mixture.parts.variances)
    for log_weight, mean, variances in zip(*known, strict=True):
        deviation = (alpha**2 * variances + sigma**2).sqrt()
        parts.append(log_weight + torch.distributions.Normal(alpha * mean, deviation).log_prob(z).sum(1))
    return torch.stack(parts).logsumexp(0)


def test_density_and_noise_are_those_of_the_definition(mixture):
    x = images(7, seed=3).requires_grad_()
    levels = mixture.log_prob_levels(x)
    for t in (0, 1, 9, 20, 21):
        expected = brute(mixture, x, t)
        assert torch.allclose(levels[:, t], expected)
        (score,) = torch.autograd.grad(expected.sum(), x, retain_graph=True)
        assert torch.allclose(mixture.eps(x.detach(), t), -SCHEDULE.sigma[t] * score)
    mixed = torch.tensor([1, 5, 9, 13, 17, 20, 3])
    each = torch.stack([mixture.eps(x.detach()[i : i + 1], int(t))[0] for i, t in enumerate(mixed)])
    assert torch.allclose(mixture.eps(x.detach(), mixed), each)


def test_the_change_along_levels_is_the_slope():
    fine = UniformSigmaSchedule(2000)
    mixture, x = MixtureMarginals.fit(images(400), fine, components=2), 0.5 * normal(5, 2, 4, 4, seed=4)
    t = torch.tensor([300, 700, 1000, 1400, 1800])
    levels, rows = mixture.log_prob_levels(x), torch.arange(5)
    expected = levels[rows, t + 1] - levels[rows, t - 1]
    assert torch.allclose(mixture.log_prob_change(x, t), expected, rtol=1e-3, atol=1e-4)


def test_fitting_finds_the_two_kinds_and_drawing_gives_them_back(mixture):
    weights, _, variances = fit_cosines(images(400), 2)
    assert torch.allclose(weights, torch.tensor([0.5, 0.5]).double(), atol=0.02)
    assert sorted(variances.mean(1).tolist()) == pytest.approx([0.01, 1.0], rel=0.1)
    drawn = mixture.draw((4000, 2, 4, 4), torch.Generator().manual_seed(0))
    small = (drawn.flatten(1).std(1) < 0.3).double().mean()
    assert float(small) == pytest.approx(0.5, abs=0.03) and float(drawn.std()) == pytest.approx(0.5**0.5, rel=0.05)
    start = best_start(images(400), images(200, seed=9))
    assert start.fields["components"] >= 2 and start.fields["form"] == "cosine"


def test_a_saved_state_comes_back(mixture):
    again = MixtureMarginals.blank(SCHEDULE, (2, 4, 4), 2, 0)
    again.load_state_dict(mixture.state_dict())
    x = images(3, seed=5)
    assert torch.equal(again.log_prob_levels(x), mixture.log_prob_levels(x))


def test_more_components_than_images_are_refused():
    with pytest.raises(UserError, match="there are 3 samples"):
        fit_cosines(images(3), 4)
