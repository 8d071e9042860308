"""azula's own samplers and guidance methods, run on our models against exact answers."""

import pytest
import torch
from oracles import SCHEDULES, MixtureClassifier, ZeroBackbone, covariance, labelled_mixture, normal, rng

from torchcdm.diffusion.gaussian import GaussianMarginals, MatrixRotation
from torchcdm.diffusion.schedules import LogSNRSchedule
from torchcdm.errors import UserError
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.samplers import Step, make_sampler

azula = pytest.importorskip("azula")
from azula.guidance import cfg, dps, mmps  # noqa: E402
from azula.linalg.covariance import IsotropicCovariance  # noqa: E402
from azula.sample import DDIMSampler, HeunSampler, zEABSampler  # noqa: E402

from torchcdm.bridges.azula import AzulaDenoiser  # noqa: E402


def mixture_model(T: int = 40) -> ClassificationDiffusion:
    schedule = LogSNRSchedule(T)
    return ClassificationDiffusion(MixtureClassifier(labelled_mixture(), schedule), schedule).double()


def gaussian_model(d: int = 4, T: int = 100) -> ClassificationDiffusion:
    schedule = LogSNRSchedule(T, r_min=0.01)
    variances, vectors = torch.linalg.eigh(covariance(d))
    base = GaussianMarginals(schedule, normal(d, seed=3), variances, MatrixRotation((d,), vectors))
    return ClassificationDiffusion(ZeroBackbone(T + 2), schedule, gaussian=base).double()


@pytest.mark.parametrize("name", SCHEDULES)
def test_times_are_levels_from_the_first_to_the_last(name: str) -> None:
    schedule = SCHEDULES[name](60)
    alpha, sigma = AzulaDenoiser(ClassificationDiffusion(ZeroBackbone(62), schedule)).schedule(
        torch.linspace(0, 1, 60, dtype=torch.float64)
    )
    assert torch.equal(alpha, schedule.alpha[1:-1]) and torch.equal(sigma, schedule.sigma[1:-1])


def test_ddim_of_azula_is_ours() -> None:
    model = mixture_model()
    denoiser, x = AzulaDenoiser(model), normal(8, 2)
    at_level_one = DDIMSampler(denoiser, steps=39, silent=True, dtype=torch.float64)(x)
    theirs = denoiser(at_level_one, torch.tensor(0.0)).mean
    step = make_sampler("ddim")
    for t in range(40, 0, -1):
        x, _ = step.step(Step(model, x, t, t - 1))
    torch.testing.assert_close(theirs, x)


def test_dropout_is_off_with_and_without_a_gradient() -> None:
    layers = torch.nn.Linear(2, 8), torch.nn.SiLU(), torch.nn.Dropout(0.5), torch.nn.Linear(8, 22)
    model = ClassificationDiffusion(torch.nn.Sequential(*layers), LogSNRSchedule(20)).double().train()
    denoiser, x, t = AzulaDenoiser(model), normal(8, 2), torch.tensor(0.5)
    first, second = denoiser(x, t).mean, denoiser(x.requires_grad_(), t).mean
    torch.testing.assert_close(first, second)
    assert second.requires_grad and model.training and all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("sampler", [HeunSampler, zEABSampler])
def test_samplers_of_higher_order_draw_from_the_mixture(sampler: type) -> None:
    noise = torch.randn(1000, 2, generator=rng(), dtype=torch.float64)
    x = sampler(AzulaDenoiser(mixture_model()), steps=39, silent=True, dtype=torch.float64)(noise)
    truth = labelled_mixture().sample(10_000, rng(1))
    torch.testing.assert_close(x.mean(0), truth.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(x.T.cov(), truth.T.cov(), atol=0.15, rtol=0)


def test_guidance_without_a_classifier_takes_our_labels() -> None:
    model, x, y = mixture_model(), normal(6, 2), torch.tensor([0, 1, 0, 1, 0, 1])
    guided = cfg.CFGDenoiser(AzulaDenoiser(model))
    found = guided(x, torch.tensor(1.0), positive={"label": y}, guidance=2.0).mean
    expected = 3 * model.denoise(x, 40, y).x0 - 2 * model.denoise(x, 40).x0
    torch.testing.assert_close(found, expected)


def test_moment_matching_gives_the_exact_posterior_mean_of_a_gaussian() -> None:
    model, A = gaussian_model(), normal(2, 4, seed=5)
    y, noise, t = normal(2, seed=6), 0.1, torch.tensor(0.6, dtype=torch.float64)
    denoiser, x_t = AzulaDenoiser(model), normal(5, 4, seed=7)
    guided = mmps.MMPSDenoiser(denoiser, y, lambda x: x @ A.T, IsotropicCovariance(noise), iterations=4)
    # x_0 | x_t and then x_0 | x_t, y, by the formulas of Gaussians.
    (alpha, sigma), base = denoiser.schedule(t), model.base.gaussian
    prior = base.rotation.matrix * base.variances @ base.rotation.matrix.T
    cov = torch.linalg.inv(torch.linalg.inv(prior) + torch.eye(4) * alpha**2 / sigma**2)
    mean = (torch.linalg.solve(prior, base.mean) + alpha / sigma**2 * x_t) @ cov
    gain = cov @ A.T @ torch.linalg.inv(A @ cov @ A.T + noise * torch.eye(2))
    torch.testing.assert_close(guided(x_t, t).mean, mean + (y - mean @ A.T) @ gain.T)


def test_dps_keeps_to_the_measurement() -> None:
    model, A = gaussian_model(), torch.eye(4, dtype=torch.float64)[:2]
    y = torch.tensor([1.0, -0.5], dtype=torch.float64).expand(16, 2)
    torch.manual_seed(0)
    sampler = dps.DPSSampler(AzulaDenoiser(model), y, lambda x: x @ A.T, steps=99, silent=True, dtype=torch.float64)
    error, free = ((sampler(normal(16, 4)) @ A.T - y).abs().mean() for sampler in (
        sampler, DDIMSampler(sampler.denoiser, steps=99, silent=True, dtype=torch.float64)))
    assert error < 0.1 * free


def test_single_precision_stays() -> None:
    model = mixture_model().float()
    x = AzulaDenoiser(model)(normal(3, 2).float(), torch.tensor([0.0, 0.5, 1.0])).mean
    assert x.dtype == torch.float32 and x.shape == (3, 2)


def test_a_keyword_that_is_not_known_is_refused() -> None:
    with pytest.raises(UserError, match="takes no 'labels'; classes and contexts are its label"):
        AzulaDenoiser(mixture_model())(normal(2, 2), torch.tensor(0.5), labels=torch.tensor([0, 1]))
