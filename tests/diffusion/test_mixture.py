"""A mixture as base density: the model before training, its change over the levels, and its integral."""

import numpy as np
import pytest
import torch
from oracles import normal, rng
from pretended_device import pretended_device

from studies.exact import GaussianMixture
from torchcdm.annealing.target import reference_gaussian
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.mixture import FIT_ROWS, MixtureMarginals, _groups, _some, _starts, best_mixture
from torchcdm.diffusion.schedules import LogSNRSchedule
from torchcdm.errors import UserError
from torchcdm.estimators.density import importance_normalizers
from torchcdm.likelihood import FlowSolver, Scoring
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.networks.mlp import MLP
from torchcdm.training.fit import fit
from torchcdm.units import DataTransform

SCHEDULE = LogSNRSchedule(40, 0.02, 10.0)


def three_clouds(n=3000):
    means = torch.tensor([[-1.5, 0.0], [1.0, 1.0], [0.5, -1.5]], dtype=torch.float64)
    mixture = GaussianMixture(torch.tensor([0.5, 0.2, 0.3]), means, torch.full((3,), 0.05, dtype=torch.float64))
    return mixture, mixture.sample(n, rng(0))


def model_of(base):
    backbone = MLP(2, SCHEDULE.T + 2, width=16, depth=1, energy_maps=2)
    return ClassificationDiffusion(backbone, SCHEDULE, DataTransform((2,)), base).double()


def test_the_untrained_model_is_the_fitted_mixture_at_every_level():
    mixture, x = three_clouds()
    base = MixtureMarginals.fit(x, SCHEDULE, 3)
    truth = mixture.log_prob_levels(x, SCHEDULE)
    with torch.no_grad():
        assert abs(float((model_of(base).log_prob_levels(x) - truth).mean())) < 0.01
    at_noise = base.log_prob_levels(x)[:, -1]
    assert torch.allclose(at_noise, torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1))
    x_1 = SCHEDULE.alpha[1] * x[:20]
    flow = FlowSolver(model_of(base), Scoring(level=1)).log_prob(x_1).log_prob
    assert torch.allclose(flow, base.log_prob_levels(x_1)[:, 1], atol=0.05)


def test_many_rows_of_many_components_are_handled_a_few_at_a_time(monkeypatch):
    schedule, x, seen, levels = LogSNRSchedule(20), normal(3000, 2), [], GaussianMarginals.log_prob_levels
    spreads = torch.eye(2).expand(40, 2, 2)
    base = MixtureMarginals(schedule, torch.ones(40), normal(40, 2), spreads, GaussianMarginals.blank(schedule, (2,)))
    base = base.with_classes(x, torch.arange(3000) % 2, 2)
    some = base.log_prob_levels(x[::500]), base.class_effects(x[::500])

    def recorded(gaussians, z):
        seen.append(levels(gaussians, z))
        return seen[-1]

    monkeypatch.setattr(GaussianMarginals, "log_prob_levels", recorded)
    torch.testing.assert_close((base.log_prob_levels(x)[::500], base.class_effects(x)[::500]), some)
    assert max(part.numel() for part in seen) <= 2**20


def test_draws_are_those_of_the_mixture_and_samplers_start_from_one_gaussian():
    mixture, x = three_clouds()
    base = MixtureMarginals.fit(x, SCHEDULE, 3)
    for density in (base, base.with_classes(x[:100], torch.arange(100) % 2, 2)):
        drawn = density.draw((20_000, 2), rng(1))
        assert drawn.dtype == torch.float64 and drawn.shape == (20_000, 2)
        # Draws of one Gaussian with the same moments lie between the clouds: 11 nats less probable.
        values = mixture.log_prob_levels(drawn, SCHEDULE)[:, 0]
        assert abs(float(values.mean() - mixture.log_prob_levels(x, SCHEDULE)[:, 0].mean())) < 0.05
        noise = normal(5, 2)
        assert torch.equal(density.start(noise), base.common.sample(noise, SCHEDULE.T))


def test_draws_come_to_the_device_of_the_density():
    base = MixtureMarginals.fit(three_clouds(50)[1], LogSNRSchedule(40, 0.02, 10.0), 3)
    with pretended_device() as device:
        base.to(device)
        for density in (base, base.common):
            assert density.draw((5, 2), rng()).device == device


def test_the_change_over_the_levels_is_the_slope_of_the_density():
    _, x = three_clouds(50)
    base = MixtureMarginals.fit(x, LogSNRSchedule(4000, 0.02, 10.0), 3)
    t = torch.linspace(2, 3999, 50).long()
    levels = base.log_prob_levels(x)
    rows = torch.arange(50)
    difference = levels[rows, t + 1] - levels[rows, t - 1]
    assert torch.allclose(base.log_prob_change(x, t), difference, rtol=1e-3, atol=1e-4)


def test_validation_finds_the_number_of_components_and_the_shrinkage():
    _, x = three_clouds()
    components, shrinkage, log_prob = best_mixture(x[:2000], x[2000:], (1, 2, 3, 5, 8))
    assert components == 3 and shrinkage <= 0.1 and len(log_prob) == len(x) - 2000
    assert best_mixture(normal(60, 3), normal(2000, 3, seed=1), (1, 8, 12))[0] == 1
    # The truth is round, and the covariance of 40 samples in 30 dimensions is anything but.
    assert best_mixture(normal(40, 30), normal(2000, 30, seed=1), (1,))[:2] == (1, 0.7)
    assert best_mixture(normal(40, 30), normal(2000, 30, seed=1), (2,), (0.0,))[:2] == (2, 0.0)


def test_every_far_mode_gets_a_component():
    # Scikit-learn's own start leaves out some of these and gives others two components.
    generator = rng(4)
    means = 3 * torch.randn(20, 8, generator=generator, dtype=torch.float64)
    mixture = GaussianMixture(torch.linspace(1, 4, 20), means, torch.full((20,), 0.05, dtype=torch.float64))
    x = mixture.sample(8000, generator)
    fitted = MixtureMarginals.fit(x, SCHEDULE, 20)
    nearest = torch.cdist(means, fitted.parts.mean[:, 0]).min(1)
    assert nearest.values.max() < 0.2 and len(nearest.indices.unique()) == 20
    assert torch.allclose(fitted.log_weights.exp()[nearest.indices], mixture.log_weights.exp(), atol=0.01)


def test_far_modes_of_few_rows_get_a_component_each():
    # Too few rows for the covariance of a piece; scikit-learn's own start leaves out one of these.
    generator = rng(0)
    centres = 6 * torch.rand(30, 24, dtype=torch.float64, generator=generator)
    modes = torch.arange(30).repeat_interleave(torch.linspace(10, 70, 30).long())
    x = centres[modes] + 0.2 * torch.randn(len(modes), 24, dtype=torch.float64, generator=generator)
    fitted = MixtureMarginals.fit(x, SCHEDULE, 30, shrinkage=0.1)
    nearest = torch.cdist(centres, fitted.parts.mean[:, 0]).min(1)
    assert nearest.values.max() < 0.5 and len(nearest.indices.unique()) == 30


def test_classes_have_their_own_weights_of_common_components_at_every_level():
    mixture, x = three_clouds(9000)
    other = GaussianMixture(torch.tensor([0.1, 0.6, 0.3]), mixture.means, torch.full((3,), 0.05, dtype=torch.float64))
    x, y = torch.cat([x, other.sample(9000, rng(1))]), torch.arange(2).repeat_interleave(9000)
    base = MixtureMarginals.fit(x, SCHEDULE, 3).with_classes(x, y, 2)
    query = x[::1800]
    log_p = base.log_prob_levels(query)[:, None] + base.class_effects(query)
    truth = torch.stack([exact.log_prob_levels(query, SCHEDULE) for exact in (mixture, other)], 1)
    assert torch.allclose(log_p[:, 1] - log_p[:, 0], truth[:, 1] - truth[:, 0], atol=0.1)
    assert torch.allclose(log_p, truth, atol=0.3)
    assert base.class_effects(query)[..., -1].abs().max() < 1e-9
    # The flow of such a model starts from the Gaussian of all data.
    backbone = MLP(2, SCHEDULE.T + 2, width=4, depth=1, energy_maps=1, classes=2, joint=True)
    model = ClassificationDiffusion(backbone, SCHEDULE, DataTransform((2,)), base)
    assert reference_gaussian(model) is base.common


@pytest.mark.parametrize("components", [1, 3])
def test_shrinkage_moves_covariances_towards_a_round_one(components):
    # Twice the deviation along one axis; all of the shrinkage is the mean variance along both.
    x = normal(4000, 2) * torch.tensor([2.0, 1.0])
    x = x - x.mean(0)
    variances = x.var(0, correction=0)
    for share in (0.0, 0.5, 1.0):
        options = {"shrinkage": share}
        base = GaussianMarginals.fit(x, SCHEDULE, **options)
        if components > 1:
            mixture = MixtureMarginals.fit(x, SCHEDULE, components, **options)
            assert torch.allclose(mixture.common.variances, base.variances)
            if share == 1:
                assert torch.allclose(mixture.parts.variances, variances.mean().double().expand(3, 1, 2))
            continue
        expected = (1 - share) * variances + share * variances.mean()
        assert torch.allclose(base.variances.sort().values, expected.sort().values, rtol=0.01)


def test_few_samples_of_many_numbers_get_a_density_that_new_samples_have_too():
    x, new = normal(100, 300), normal(50, 300, seed=1)
    _, share, _ = best_mixture(x[:80], x[80:], (1,))
    plain, moved = (GaussianMarginals.fit(x[:80], SCHEDULE, shrinkage=s).log_prob_levels(new)[:, 0].mean()
                    for s in (0.0, share))  # fmt: skip
    truth = torch.distributions.Normal(0.0, 1.0).log_prob(new).sum(1).mean()
    assert plain < truth - 1e4 and moved > truth - 60


def test_of_many_rows_as_many_are_fitted_to_as_are_meant_to_be():
    rows = _some(torch.arange(1.5 * FIT_ROWS)[:, None], 1, FIT_ROWS)
    assert len(rows) == FIT_ROWS and rows[0] == 0 and rows[-1] == 1.5 * FIT_ROWS - 1


def test_shrinkage_needs_a_gaussian_and_a_share():
    for model in ({"shrinkage": 1.5}, {"shrinkage": 0.1, "gaussian": False}):
        with pytest.raises(UserError, match="shrinkage is .*; (it must be at most 1|above 0 it needs gaussian)"):
            fit(normal(40, 3), steps=1, progress=False, model=model)


@pytest.mark.parametrize("components", [1, 3])
def test_the_integral_of_one_pass_agrees_with_quadrature(components):
    _, x = three_clouds()
    base = MixtureMarginals.fit(x, SCHEDULE, components)
    model = model_of(base)
    assert importance_normalizers(model)[0].value == pytest.approx(0, abs=0.02)
    torch.manual_seed(0)
    for parameter in model.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    found = importance_normalizers(model, seed=1)[0]
    axis = torch.linspace(-8, 8, 321, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    assert components == 1 or not found.lacking
    with torch.no_grad():
        mass = model.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(float(mass.log())) > 0.05  # there is something to find
    assert found.value == pytest.approx(float(mass.log()), abs=4 * found.se + 1e-3)


def test_the_integral_of_a_model_without_fitted_base():
    assert importance_normalizers(model_of(None))[0].value == pytest.approx(0, abs=0.02)


def test_an_estimate_that_few_draws_carry_is_not_used():
    _, x = three_clouds()
    model = model_of(MixtureMarginals.fit(x, SCHEDULE, 3))
    for parameter in model.backbone.head.parameters():
        torch.nn.init.normal_(parameter, std=30.0)
    few = importance_normalizers(model, draws=100)[0]
    assert few.lacking and np.isfinite(few.value)


def test_precisions_that_em_starts_from_are_symmetric_where_columns_repeat_each_other():
    """scikit-learn refuses others: of a group of heavy-tailed columns the inverse was symmetric to 1e-8 only."""
    draw = np.random.RandomState(0)
    groups = [scale * draw.normal(size=(400, 2)) @ draw.normal(size=(2, 6)) for scale in (10, 10)]
    x = np.concatenate([groups[0], 200 + groups[1]])
    (start,) = _starts(x, 2, 1e-5, _groups(x, 2))
    for precision in start["precisions_init"]:
        assert abs(precision - precision.T).max() < 1e-12 * precision.max()
