"""Densities made of densities, against sums of exact log densities at every level."""

import math

import numpy as np
import pytest
import torch
from oracles import MixtureClassifier, ZeroBackbone, labelled_mixture, normal

import torchcdm
from studies.exact import GaussianMixture
from torchcdm import compose
from torchcdm.compose import sample
from torchcdm.diffusion.gaussian import GaussianMarginals, MatrixRotation
from torchcdm.diffusion.schedules import LogSNRSchedule, UniformSigmaSchedule
from torchcdm.errors import UserError
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import DenoisingDiffusion
from torchcdm.units import DataTransform

SCHEDULE = LogSNRSchedule(12, 0.02, 40.0)
MIXTURE = labelled_mixture()


def exact(mixture=MIXTURE, joint=False, schedule=SCHEDULE, transform=None):
    """The Bayes classifier of a mixture as a model."""
    prior = mixture.class_prior if joint else None
    transform = DataTransform(mixture.shape) if transform is None else transform
    classifier = MixtureClassifier(mixture, schedule, None, joint)
    return ClassificationDiffusion(classifier, schedule, transform, class_prior=prior).double()


def other():
    """Another mixture in the plane, without classes."""
    means = torch.tensor([[0.0, 0.0], [2.0, -1.0]], dtype=torch.float64)
    return GaussianMixture(torch.ones(2), means, torch.tensor([0.3, 0.5], dtype=torch.float64))


def gaussian(schedule=SCHEDULE):
    """A model that is the Gaussian it starts as, and this Gaussian."""
    base = GaussianMarginals(schedule, torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0]),
                             MatrixRotation((2,), torch.linalg.qr(normal(2, 2))[0]))  # fmt: skip
    return ClassificationDiffusion(ZeroBackbone(schedule.T + 2), schedule, DataTransform((2,)), base), base


def test_classes_by_name_are_taken_out():
    model = torchcdm.load("zoo:digits-conditional")
    for name in ("1", 1):
        assert [y for _, y in compose.none_of(model, [name]).experts] == [0, *range(2, 10)]
    with pytest.raises(UserError, match="none of the classes .* leaves nothing"):
        compose.none_of(model, "0123456789")


@pytest.mark.parametrize("joint", [False, True])
def test_log_densities_and_scores_at_every_level(joint):
    one, two = exact(joint=joint), exact(other())
    x = 1.5 * normal(6, 2)
    p, q = MIXTURE.log_prob_levels(x, SCHEDULE), other().log_prob_levels(x, SCHEDULE)
    zero, first = MIXTURE.class_log_prob_levels(x, SCHEDULE).unbind(1)
    squares = [compose.tempered(model, 2.0) for model in (one, two)]
    cases = [
        (compose.all_of(one, [0, 1]), zero + first - p),
        (compose.all_of([one, two]), p + q),
        (compose.any_of(one, [0, 1], [1, 3]), torch.logaddexp(zero + math.log(0.25), first + math.log(0.75))),
        (compose.any_of([one, two]), torch.logaddexp(p, q) - math.log(2)),
        (compose.any_of([one, two], weights=[1 / math.e, 1.0]), torch.logaddexp(p - 1, q) - math.log(1 + 1 / math.e)),
        (compose.any_of(one, [1]), first),
        (compose.none_of(one, [1]), zero),
        (compose.none_of(one, [1], kappa=0.4), 1.4 * p - 0.4 * first),
        (compose.none_of(one, [two], kappa=0.2), 1.2 * p - 0.2 * q),
        (compose.tempered(one, 2.5), 2.5 * p),
        (compose.tempered(compose.any_of(one, [1]), 0.5), 0.5 * first),
        (compose.any_of(squares), torch.logaddexp(2 * p, 2 * q) - math.log(2)),
    ]  # fmt: skip
    for found, truth in cases:
        assert torch.allclose(found.log_prob_levels(x), truth, atol=1e-9)
        z = x.clone().requires_grad_()
        for t in (1, 7, SCHEDULE.T):
            (score,) = torch.autograd.grad(found.log_prob_levels(z)[:, t].sum(), z)
            assert torch.allclose(found.denoise(x, t).score, score, atol=1e-8)
    if joint:
        assert torch.allclose(compose.any_of(one, [0, 1]).log_prob_levels(x), p, atol=1e-9)  # by the class prior


@pytest.mark.parametrize("build, exponent", [
    (lambda model: compose.tempered(model, 4.0), 4.0),
    (lambda model: compose.tempered(model, 0.5), 0.5),
    (lambda model: compose.all_of([model, compose.tempered(model, 2.0)]), 3.0),
])  # fmt: skip
def test_the_path_of_a_gaussian_is_exact(build, exponent):
    """Every particle then has the same weight, the integral of the power, but for variances that were measured."""
    model, base = gaussian()
    found = compose.sample(build(model), 64, particles=64, details=True)
    variances = base.moments(1)[1]
    truth = 0.5 * ((1 - exponent) * (2 * math.pi * variances).log().sum() - 2 * math.log(exponent))
    assert found.log_z.value == pytest.approx(float(truth), abs=0.05)
    assert found.ess > 0.95 * 64
    start = build(model).start(normal(4000, 2))
    mean, variances = base.moments(SCHEDULE.T)
    assert torch.allclose(start.mean(0), mean, atol=0.1)
    assert torch.allclose(start.T.cov().trace(), variances.sum() / exponent, rtol=0.1)


def test_every_sampler_takes_them():
    model = compose.tempered(exact(), 2.0)
    for name in ("ddpm", "ddim", "heun", "dpm++"):
        x = sample(model, 5, name, steps=6)
        assert x.shape == (5, 2) and x.isfinite().all()
    assert torch.allclose(model.log_prob(x), 2 * MIXTURE.log_prob(x.double(), 0, SCHEDULE), atol=1e-3)


def test_bad_compositions_are_one_line():
    model, far = exact(), exact(schedule=UniformSigmaSchedule(12))
    scaled = exact(transform=DataTransform((2,), scale=3.0))
    wide = exact(GaussianMixture(torch.ones(1), torch.zeros(1, 3), torch.ones(1)))
    plain = DenoisingDiffusion(torch.nn.Identity(), SCHEDULE)
    bare = ClassificationDiffusion(ZeroBackbone(14), SCHEDULE)

    def line(shift, scale):
        return ClassificationDiffusion(ZeroBackbone(14), SCHEDULE, DataTransform((1,), shift, scale))

    for build, message in [
        (lambda: compose.all_of([model, far]), r"schedules differ \(LogSNR.*, T = 12 and Uniform.*, T = 12\)"),
        (lambda: compose.all_of([model, wide]), "shapes"),
        (lambda: compose.any_of([model, scaled]), "transforms differ"),
        (lambda: compose.any_of([line(0.0, 1.0), line(9.0, 10.0)]), "transforms differ"),  # which agree at -1
        (lambda: compose.any_of([model, bare]), r"shapes \(2,\) and None"),
        (lambda: compose.any_of([model, plain]), "needs a density"),
        (lambda: compose.all_of(model, [0, 2]), "label 2 is out of range"),
        (lambda: compose.all_of(model, [0, 0]), "name one twice"),
        (lambda: compose.all_of(model, torch.tensor([0, 0])), "name one twice"),
        (lambda: compose.any_of(torch.tensor([0, 1]), model), "one model and a list of classes"),
        (lambda: compose.all_of(model, model), "a list of models alone"),
        (lambda: compose.any_of(model, 1), "one model and a list of classes"),
        (lambda: compose.none_of(model, 1), "one model and a list of classes"),
        (lambda: compose.all_of(model, np.int64(1)), "one model and a list of classes"),
        (lambda: compose.none_of(model, np.int64(1)), "one model and a list of classes"),
        (lambda: compose.any_of(model, [0, 1], weights=["x", 1]), "weights: not an array of numbers"),
        (lambda: compose.any_of(model, [0, 1], weights=1.0), "give 2 numbers"),
        (lambda: compose.none_of(model, model), "a list of models alone"),
        (lambda: compose.all_of(model), "no classes"),
        (lambda: compose.all_of([]), "list of models"),
        (lambda: compose.all_of(exact(other()), [0, 1]), "without classes"),
        (lambda: compose.none_of(model, [0, 1]), "leaves nothing"),
        (lambda: compose.any_of(model, [0, 1], weights=[1, -1]), "weights are"),
        (lambda: compose.any_of(model, [0, 1], weights=[1]), "give 2 numbers"),
        (lambda: compose.any_of(model, [0, 1], weights=[1, math.inf]), "weights are"),
        (lambda: compose.tempered(model, 0.0), "beta"),
        (lambda: compose.none_of(model, [0], kappa=-1.0), "kappa"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            build()
        assert "\n" not in str(error.value)
