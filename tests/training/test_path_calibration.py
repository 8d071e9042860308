"""Readouts fitted on paths, against an exact classifier whose values were bent and whose gradients were not."""

import pytest
import torch
from oracles import MixtureClassifier, labelled_mixture, rng
from torch import nn

from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.particles import smc
from torchcdm.annealing.target import ModelTarget
from torchcdm.diffusion.schedules import UniformSigmaSchedule
from torchcdm.errors import UserError
from torchcdm.likelihood import FlowSolver, LogZ
from torchcdm.losses import CDMLoss
from torchcdm.models.calibrated import LIMIT, Calibrated, Readout
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.training.path_calibration import calibrate_paths
from torchcdm.units import DataTransform

T = 60


class Bent(nn.Module):
    """An exact classifier with too much in the values of the levels below T+1, and nothing of it in the gradient.

    ``bend`` * |x|, and ``step`` nats beyond |x| = 4, where there are hardly any data: the difference of two features
    that are one on data.
    """

    def __init__(self, exact, bend, step):
        super().__init__()
        self.exact, self.classes, self.joint = exact, None, False
        self.head = nn.Linear(T + 4, T + 2, bias=False)
        fade = torch.linspace(1, 0, T + 2)[:, None]
        self.head.weight.data = torch.cat([torch.eye(T + 2), (bend - step) * fade, step * fade], 1)

    def features(self, x, y=None):
        size = x.flatten(1).norm(dim=1, keepdim=True).detach()
        return torch.cat([self.exact(x, y), size, size + (10 * (size - 4)).sigmoid()], 1)

    def forward(self, x, y=None):
        return self.head(self.features(x, y))


def bent_by(bend, step=0.0):
    schedule, mixture = UniformSigmaSchedule(T), labelled_mixture()
    backbone = Bent(MixtureClassifier(mixture, schedule), bend, step)
    transform = DataTransform((2,))
    return ClassificationDiffusion(backbone, schedule, transform).double().eval(), mixture


def test_what_was_added_to_the_values_is_taken_out_again():
    model, mixture = bent_by(3.0)
    x, fresh = mixture.sample(600, rng(1)), mixture.sample(200, rng(2))
    eps, exact = model.denoise(fresh, 5).eps, mixture.log_prob_levels(fresh, model.schedule)
    bent = model.log_prob_levels(fresh)
    found = calibrate_paths(model, x, rounds=0)
    mended = found.model.log_prob_levels(fresh)
    assert torch.equal(model.log_prob_levels(fresh), bent)  # the model itself stays as it is
    assert found.level == 1 and found.after < found.before / 3
    # Below the lowest level of the paths too, where the values stay those of levels apart.
    for t in (0, 1, 10, 30):
        assert (bent - exact)[:, t].std() > 5 * (mended - exact)[:, t].std()
        assert (mended - exact)[:, t].mean().abs() < 0.1 < (bent - exact)[:, t].mean().abs()
    assert torch.allclose(mended[:, -1], exact[:, -1], atol=1e-12)
    assert torch.equal(found.model.denoise(fresh, 5).eps, eps)  # values alone have changed
    evaluation = found.model.evaluate(fresh, 5)
    assert torch.equal(evaluation.eps, eps) and torch.allclose(evaluation.log_prob_levels, mended)


def test_offsets_are_taken_out_where_nothing_else_can_be():
    model, mixture = bent_by(0.0)
    fresh = mixture.sample(50, rng(2))
    exact = model.log_prob_levels(fresh)
    model.level_constants += 5 * torch.linspace(1, 0, T + 2)
    assert (model.log_prob_levels(fresh) - exact)[:, 1].mean() > 4.5
    model = calibrate_paths(model, mixture.sample(300, rng(1)), rounds=0).model
    assert (model.log_prob_levels(fresh) - exact)[:, 1].mean().abs() < 0.1


def particles(model, islands=16, size=64, moves=1):
    target, generator = ModelTarget(model), rng(9)
    return smc(target, Kernels.of_target(target), 1, islands, size, generator, moves), generator


def log_z_of(model):
    return LogZ.of_weights(particles(model)[0].log_estimates, "smc", 1, 2)


def test_particles_find_what_no_data_show():
    model, mixture = bent_by(0.0, step=12.0)
    x = mixture.sample(400, rng(1))
    assert (x.norm(dim=1) < 4).all()
    unfound = calibrate_paths(model, x, rounds=0).model
    unseen = log_z_of(unfound).value
    found = calibrate_paths(model, x, rounds=1, particles=256)
    seen = log_z_of(found.model).value
    assert len(found.log_z) == 1 and found.log_z[0].value > 0.5 and unseen > 0.5
    assert abs(seen) < 0.2


def test_what_is_not_finite_is_left_out_of_particles_and_refused_of_data(monkeypatch):
    model, mixture = bent_by(3.0)
    x, follow = mixture.sample(100, rng(1)), FlowSolver.log_prob
    samples = []

    def with_a_hole(solver, x_t, *arguments, **choices):
        found = follow(solver, x_t, *arguments, **choices)
        samples.append(len(x_t))
        if len(x_t) == spoiled:
            found.path[3, 5] = torch.inf
        return found

    monkeypatch.setattr(FlowSolver, "log_prob", with_a_hole)
    spoiled = 32
    found = calibrate_paths(model, x, rounds=1, particles=32)
    assert samples == [100, 32] and found.model.log_prob_levels(x).isfinite().all()
    spoiled = 100
    with pytest.raises(UserError, match="is not finite"):
        calibrate_paths(model, x, rounds=0)


def test_calibrated_values_are_not_differentiated():
    model, mixture = bent_by(3.0)
    x = mixture.sample(100, rng(1)).requires_grad_()
    calibrated = calibrate_paths(model, x.detach(), rounds=0).model
    for differentiate in (
        lambda: calibrated.log_prob(x).sum().backward(),
        lambda: torch.autograd.grad(calibrated.log_prob_levels(x).sum(), x),
        lambda: torch.func.grad(lambda z: calibrated.log_prob(z).sum())(x),
    ):
        with pytest.raises(UserError, match="not the potential of the denoiser.*differentiate `.model`"):
            differentiate()
    with torch.no_grad():
        assert torch.equal(calibrated.log_prob(x), calibrated.log_prob(x.detach()))
    (gradient,) = torch.autograd.grad(calibrated.model.log_prob(x).sum(), x)
    assert gradient.isfinite().all()
    with pytest.raises(UserError, match="train `.model`"):
        CDMLoss(calibrated)


def test_moves_on_calibrated_values_leave_them_invariant():
    # The drift of a Langevin move is only a proposal: the values alone decide, however wrong the drift.
    model, mixture = bent_by(0.0)
    levels, width = T + 2, T + 4
    weight = torch.zeros(levels, width).double()
    weight[:-1, :levels] = torch.eye(levels).double()[:-1]
    weight[:-1, -2] = -0.7  # exp(-0.7 |x|) times the mixture: a density that the denoiser knows nothing of
    readout = Readout(torch.zeros(levels, width), torch.full((levels, width), 1e6), 1e6 * weight, torch.zeros(levels))
    calibrated = Calibrated(model, readout)
    x = mixture.sample(200_000, rng(1))
    tilt = (-0.7 * x.norm(dim=1)).exp()
    drawn, generator = particles(calibrated, 16, 256, moves=3)
    assert float(drawn.log_estimates.exp().mean().log()) == pytest.approx(float(tilt.mean().log()), abs=0.1)
    expected = float((tilt * x.norm(dim=1)).mean() / tilt.mean())
    assert float(drawn.draws(generator).norm(dim=1).mean()) == pytest.approx(expected, abs=0.1)


def test_features_count_within_the_limit_alone():
    mean, scale = torch.randn(4, 3, generator=rng(1)), 1 + torch.rand(4, 3, generator=rng(2))
    weight, offset = torch.randn(4, 3, generator=rng(3)), torch.randn(4, generator=rng(4))
    readout = Readout(mean, scale, weight, offset)
    features = 20 * torch.randn(50, 3, generator=rng(5))
    z = ((features[:, None] - mean) / scale).clamp(-LIMIT, LIMIT)
    assert (z.abs() == LIMIT).any() and (z.abs() < LIMIT).any()
    torch.testing.assert_close(readout(features), ((z * weight).sum(2) + offset).double(), rtol=1e-4, atol=1e-4)


def joint_model():
    schedule, mixture = UniformSigmaSchedule(T), labelled_mixture()
    return ClassificationDiffusion(MixtureClassifier(mixture, schedule, joint=True), schedule, DataTransform((2,)))


def bent_head():
    model, _ = bent_by(1.0)
    model.backbone.head = nn.Sequential(model.backbone.head, nn.Tanh())
    return model


def without_features():
    schedule, mixture = UniformSigmaSchedule(T), labelled_mixture()
    backbone = MixtureClassifier(mixture, schedule)
    backbone.classes = None
    return ClassificationDiffusion(backbone, schedule, DataTransform((2,)))


@pytest.mark.parametrize(
    ("model", "n", "options", "reason"),
    [
        (joint_model, 100, {}, "models of one density"),
        (without_features, 100, {}, "a linear `head`"),
        (bent_head, 100, {}, "is not linear"),
        (lambda: bent_by(0)[0], 15, {}, "at least 16 are needed"),
        (lambda: bent_by(0)[0], 100, {"rounds": -1}, "rounds is -1.*at least 0"),
        (lambda: bent_by(0)[0], 100, {"particles": 8}, "particles is 8.*at least 16"),
        (lambda: bent_by(0)[0], 100, {"level": T}, f"choose 1 ... {T - 1}"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(model, n, options, reason):
    with pytest.raises(UserError, match=reason):
        calibrate_paths(model(), torch.zeros(n, 2), **options)


def test_levels_below_the_paths_keep_their_own_values():
    model, mixture = bent_by(3.0)
    x, fresh = mixture.sample(600, rng(1)), mixture.sample(200, rng(2))
    exact = mixture.log_prob_levels(fresh, model.schedule)
    bent = model.log_prob_levels(fresh)
    mended = calibrate_paths(model, x, rounds=0, level=20).model.log_prob_levels(fresh)
    assert (exact[:, 0] - exact[:, 20]).std() > 0.5
    assert 5 * (mended - exact)[:, 20].std() < (bent - exact)[:, 20].std()
    assert 2 * (mended - exact)[:, 0].std() < (bent - exact)[:, 0].std()
