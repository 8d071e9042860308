"""The probability flow against densities that are known exactly, and its own account of its errors."""


import pytest
import torch
from oracles import SCHEDULES, MixtureClassifier, covariance, labelled_mixture, normal, rng
from torch import nn

import torchcdm.likelihood.flow as flow_module
from studies.exact import GaussianMixture
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.schedules import CosineSchedule, LogSNRSchedule, UniformSigmaSchedule
from torchcdm.errors import UserError
from torchcdm.likelihood import FlowSolver, Scoring, probability_flow
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import DenoisingDiffusion, GuidedDenoiser
from torchcdm.training.checkpoint import load
from torchcdm.units import DataTransform


def exact_model(mixture, schedule, residual=True):
    base = GaussianMarginals.fit(mixture.sample(5000, rng()), schedule) if residual else None
    return ClassificationDiffusion(
        MixtureClassifier(mixture, schedule, base), schedule, DataTransform(mixture.shape), base
    )


def solver(model, level=1, steps=10**6, **choices):
    """All levels unless so many steps are asked for."""
    return FlowSolver(model, Scoring(level, steps=steps, **choices))


def noisy(mixture, schedule, level, n=40, y=None):
    x, labels = mixture.sample_labelled(n, rng(1))
    return schedule.perturb(x, level, normal(*x.shape, seed=2)), labels


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_log_density_of_a_mixture(name, residual):
    # The ladder spends its levels over nine e-folds of noise, so its steps are wider where the modes part.
    schedule, mixture = SCHEDULES[name](100), labelled_mixture()
    model = exact_model(mixture, schedule, residual)
    for level in (1, 30):
        z, _ = noisy(mixture, schedule, level)
        result = solver(model, level).log_prob(z)
        error = (result.log_prob - mixture.log_prob(z, level, schedule)).abs()
        # Where level T keeps signal the start is not quite Gaussian: the error that the result states.
        assert float(error.mean()) < 0.01 + 2 * result.start_kl_bound
        assert not result.probe_gap.any(), "two dimensions need no probes"


def test_a_gaussian_needs_no_steps():
    schedule = LogSNRSchedule(50, 0.01, 80)
    mean, spread = 2 * normal(5), covariance(5)
    mixture = GaussianMixture(torch.ones(1), mean[None], spread[None])
    base = GaussianMarginals.fit(mixture.sample(100, rng()), schedule)
    base.mean, (base.variances, base.rotation.matrix) = mean, torch.linalg.eigh(spread)
    backbone = MixtureClassifier(mixture, schedule, base)
    model = ClassificationDiffusion(backbone, schedule, DataTransform((5,)), base)
    z = schedule.perturb(mixture.sample(20, rng(1)), 1, normal(20, 5))
    one_step = solver(model, steps=1)
    assert torch.allclose(one_step.log_prob(z).log_prob, mixture.log_prob(z, 1, schedule), atol=1e-8)
    assert one_step.nfe == 3


def test_inputs_of_another_shape_are_named():
    model = load("zoo:two-moons")
    with pytest.raises(UserError, match=r"inputs have shape \(3,\); the model takes \(2,\)"):
        FlowSolver(model).log_prob(torch.zeros(4, 3))


def test_second_order_in_the_steps():
    mixture, errors = labelled_mixture(), []
    counts = torch.tensor([20, 40, 80], dtype=torch.float64)
    for T in counts.int().tolist():
        schedule = LogSNRSchedule(T, 0.05, 80)
        z, _ = noisy(mixture, schedule, 1)
        error = solver(exact_model(mixture, schedule)).log_prob(z).log_prob - mixture.log_prob(z, 1, schedule)
        errors.append(float(error.abs().mean()))
    slope = torch.linalg.lstsq(torch.stack([counts.log(), torch.ones(3)], 1).double(),
                               torch.tensor(errors).double().log()[:, None]).solution[0]  # fmt: skip
    assert -2.6 < float(slope) < -1.6, errors


def test_halving_the_steps_tells_the_error():
    mixture, schedule = labelled_mixture(), LogSNRSchedule(60, 0.05, 80)
    z, _ = noisy(mixture, schedule, 1)
    fine, coarse = (solver(exact_model(mixture, schedule), steps=steps).log_prob(z).log_prob for steps in (59, 30))
    error = (fine - mixture.log_prob(z, 1, schedule)).mean()
    assert float((coarse - fine).mean() / 3) == pytest.approx(float(error), rel=0.5)


def test_probes_are_unbiased_and_tell_their_own_error(monkeypatch):
    mixture, schedule = labelled_mixture(), UniformSigmaSchedule(20)
    model = exact_model(mixture, schedule)
    z, _ = noisy(mixture, schedule, 1, n=400)
    exact = solver(model).log_prob(z).log_prob
    monkeypatch.setattr(flow_module, "EXACT_DIMENSIONS", 0)
    result = solver(model, probes=4).log_prob(z)
    error = result.log_prob - exact
    # In two dimensions the noise is that of one off-diagonal element; it moves no path, only the divergence.
    assert float(error.std()) > 1e-3
    assert abs(float(error.mean())) < 4 * float(error.std()) / 20
    assert float(result.probe_gap.std()) / 2 == pytest.approx(float(error.std()), rel=0.2)
    batched = solver(model, probes=4, batch_size=7).log_prob(z[:50])
    assert torch.allclose(batched.log_prob, result.log_prob[:50], atol=1e-9)


def test_images_as_vectors():
    schedule = CosineSchedule(30)
    means, spread = normal(2, 4), torch.stack([covariance(4, 1), covariance(4, 2)])
    flat = GaussianMixture(torch.ones(2), means, spread)
    image = GaussianMixture(torch.ones(2), means.reshape(2, 1, 2, 2), spread)
    z = normal(15, 4, seed=3)
    values = [solver(exact_model(m, schedule)).log_prob(z.reshape(15, *m.shape)).log_prob for m in (flat, image)]
    assert torch.allclose(*values, atol=1e-9)


def test_given_the_class():
    mixture, schedule = labelled_mixture(), CosineSchedule(100)
    z, y = noisy(mixture, schedule, 1)
    result = solver(exact_model(mixture, schedule)).log_prob(z, y)
    assert float((result.log_prob - mixture.log_prob(z, 1, schedule, y)).abs().mean()) < 0.03


def test_any_denoiser_has_a_flow():
    mixture, schedule = labelled_mixture(), CosineSchedule(30)

    class Exact(nn.Module):
        def forward(self, x, t, y=None):
            return mixture.eps(x, t, schedule)

    ddm = DenoisingDiffusion(Exact(), schedule, DataTransform((2,)))
    z, _ = noisy(mixture, schedule, 1, n=10)
    cdm = exact_model(mixture, schedule, residual=False)
    assert torch.allclose(solver(ddm).log_prob(z).log_prob, solver(cdm).log_prob(z).log_prob, atol=1e-8)


def test_evaluations_are_counted():
    mixture, schedule = labelled_mixture(), CosineSchedule(30)
    model, calls = exact_model(mixture, schedule), []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    seven = solver(model, steps=7)
    seven.log_prob(noisy(mixture, schedule, 1, n=3)[0])
    assert seven.nfe == len(calls) == 15


def test_a_path_has_the_density_of_each_level_that_it_visits():
    mixture, schedule = labelled_mixture(), UniformSigmaSchedule(100)
    model, (z, _) = exact_model(mixture, schedule), noisy(mixture, schedule, 20)
    forty = solver(model, 20, 40, batch_size=7)
    found = forty.log_prob(z)
    whole = solver(model, 20, 40).log_prob(z)
    assert forty.levels[0] == 20 and forty.levels[-1] == schedule.T and len(forty.levels) == 41
    torch.testing.assert_close(found.path[0], whole.log_prob)
    torch.testing.assert_close(found.one_pass[0], mixture.log_prob(z, 20, schedule))
    # Of an exact model: one pass is the density where the path is.
    assert float((found.path - found.one_pass).abs().mean(1).max()) < 0.004


@pytest.mark.parametrize("joint", [True, False])
def test_guidance_of_weight_zero_has_the_flow_of_the_conditional_model(joint):
    """Its divergence needs a graph: without one the density would be that of the reference alone."""
    mixture, schedule = labelled_mixture(), UniformSigmaSchedule(40)
    backbone = MixtureClassifier(mixture, schedule, joint=joint)
    model = ClassificationDiffusion(backbone, schedule, DataTransform((2,))).double()
    x, y = normal(4, 2), torch.tensor([0, 1, 1, 0])
    plain, guided = (solver(one, 5, 10).log_prob(x, y).log_prob for one in (model, GuidedDenoiser(model, 0.0)))
    torch.testing.assert_close(guided, plain)


def test_gaps_by_level_show_where_a_model_is_inconsistent():
    mixture, schedule = labelled_mixture(), CosineSchedule(40)
    model = exact_model(mixture, schedule)
    x = mixture.sample(20, rng(3))
    right = probability_flow(model, x).flow.gaps()
    assert right["levels"] == list(range(1, 41))
    assert max(map(abs, right["mean"])) < 0.02
    backbone = model.backbone.forward
    lift = torch.zeros(42, dtype=torch.float64)
    lift[:11] = 0.7
    # A constant changes no gradient, so the flow stays and one pass moves: at the levels up to 10.
    model.backbone.forward = lambda x, y=None: backbone(x, y) + lift
    wrong = probability_flow(model, x).flow.gaps()
    lifted = [high - low for high, low in zip(wrong["mean"], right["mean"], strict=True)]
    assert lifted == pytest.approx((-lift[1:41]).tolist(), abs=1e-9)


def test_levels_and_steps():
    mixture, schedule = labelled_mixture(), CosineSchedule(20)
    model = exact_model(mixture, schedule)
    with pytest.raises(UserError, match="level 20 cannot be scored"):
        solver(model, 20)
    assert solver(model).levels == list(range(1, 21)), "more steps than levels"
    with pytest.raises(UserError, match="empty"):
        solver(model).log_prob(torch.zeros(0, 2))
