"""Unknown noise (identity 9): what is found against what was put in, and against the best that can be found."""

import math

import pytest
import torch
from oracles import SCHEDULES, MixtureClassifier, normal, rng

from studies.exact import GaussianMixture
from torchcdm.apps.denoising import denoise, denoise_all, estimate_noise, nearest_level
from torchcdm.diffusion.schedules import LogSNRSchedule, UniformSigmaSchedule
from torchcdm.errors import UserError
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import DenoisingDiffusion
from torchcdm.networks.mlp import DDMMLP, MLP
from torchcdm.units import DataTransform

T, DIM, N = 200, 48, 60
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def images() -> GaussianMixture:
    """Five components in 48 dimensions that vary in six directions and hardly in the others, as images do."""
    root = torch.linalg.qr(normal(DIM, DIM))[0]
    spread = torch.full((DIM,), 0.02**2).double()
    spread[:6] = 1.0
    dense = root @ torch.diag(spread) @ root.T
    return GaussianMixture(torch.arange(1, 6), normal(5, DIM, seed=3), dense.expand(5, DIM, DIM))


DATA = images()


def exact(schedule, transform=None, mixture=DATA, joint=False):
    prior = mixture.class_prior if joint else None
    return ClassificationDiffusion(MixtureClassifier(mixture, schedule, joint=joint), schedule, transform, None, prior)


@every_schedule
@pytest.mark.parametrize("s", [0.1, 0.7, 3.0])
def test_finds_the_noise_as_well_as_it_can_be_found(name, s):
    model = exact(SCHEDULES[name](T))
    passes = []
    model.backbone.register_forward_hook(lambda *_: passes.append(1))
    error = (estimate_noise(model, DATA.sample(N, rng(1)) + s * normal(N, DIM))[0] / s).log()
    # Cramér and Rao: no unbiased estimate of log s has less variance, for the component known.
    bound = 1 / math.sqrt(2 * ((s**2 / (DATA.variances[0] + s**2)) ** 2).sum())
    assert abs(error.mean()) < 0.3 * bound + 3 * bound / math.sqrt(N)
    assert error.square().mean().sqrt() < 1.35 * bound
    assert len(passes) <= 26


@every_schedule
def test_finds_the_best_of_all_levels(name):
    schedule = SCHEDULES[name](T)
    model = exact(schedule)
    noisy = DATA.sample(20, rng(1)) + torch.logspace(-1, 0.7, 20).double()[:, None] * normal(20, DIM)
    alpha = schedule.alpha
    every = [model.log_prob_levels(alpha[t] * noisy)[:, t] + DIM * alpha[t].log() for t in range(1, T + 1)]
    ratio, log_p = estimate_noise(model, noisy)
    assert torch.allclose(log_p, torch.stack(every, 1).amax(1), atol=1e-9)
    # Between the levels, within half a gap of the level that denoises.
    gap = (schedule.ratio[2 : T + 1] / schedule.ratio[1:T]).log().max()
    assert ((ratio / schedule.ratio[nearest_level(schedule, ratio)]).log().abs() <= gap / 2 + 1e-9).all()


def test_the_density_of_noisy_data_is_that_of_their_convolution():
    # log p(y | s) in closed form: y has the covariance of the data plus s² I.
    schedule = UniformSigmaSchedule(T)
    noisy = DATA.sample(8, rng(1)) + 0.5 * normal(8, DIM)
    _, log_p = estimate_noise(exact(schedule), noisy)
    r = schedule.ratio[1 : T + 1]
    broad = [
        GaussianMixture(
            DATA.log_weights.exp(),
            DATA.means,
            DATA.vectors @ torch.diag_embed(DATA.variances + s**2) @ DATA.vectors.mT,
        ).log_prob(noisy, 0, schedule)
        for s in r[::4]
    ]
    best = torch.stack(broad, 1).amax(1)
    assert (log_p >= best - 1e-9).all() and (log_p - best).max() < 0.5


@every_schedule
def test_denoises_nearly_as_well_as_with_the_noise_known(name):
    model, clean = exact(SCHEDULES[name](T)), DATA.sample(N, rng(2))
    for s in (0.1, 0.7, 3.0):
        noisy = clean + s * normal(N, DIM)
        blind, _ = denoise(model, noisy)
        oracle, _ = denoise(model, noisy, noise_std=s)
        error, best = ((x - clean).square().mean() for x in (blind, oracle))
        assert error < 1.05 * best < 1.05 * (noisy - clean).square().mean()


def test_units():
    transform = DataTransform((DIM,), shift=50.0, scale=20.0)
    schedule = LogSNRSchedule(T)
    model, plain = exact(schedule, transform), exact(schedule)
    clean = DATA.sample(10, rng(1))
    noisy = clean + 0.4 * normal(10, DIM)
    restored, ratio = denoise(model, transform.inverse(noisy))
    assert torch.allclose(ratio, estimate_noise(plain, noisy)[0])
    assert torch.allclose(restored, transform.inverse(denoise(plain, noisy)[0]), atol=1e-9)
    known, _ = denoise(model, transform.inverse(noisy), noise_std=8.0)
    assert torch.allclose(known, transform.inverse(denoise(plain, noisy, noise_std=0.4)[0]), atol=1e-9)


def test_columns_of_unequal_scale():
    scale = torch.linspace(1, 10, DIM).double()
    model = exact(LogSNRSchedule(T), DataTransform((DIM,), scale=scale))
    noisy = (DATA.sample(4, rng(1)) + 0.4 * normal(4, DIM)) * scale
    assert torch.allclose(denoise(model, noisy)[1], estimate_noise(model, noisy / scale)[0])
    with pytest.raises(UserError, match="differ in scale"):
        denoise(model, noisy, noise_std=1.0)


def test_inputs_of_any_precision():
    """The network's weights are float32."""
    schedule = LogSNRSchedule(T)
    model = ClassificationDiffusion(MLP(3, levels=T + 2, width=16), schedule, DataTransform((3,), 5.0, 2.0)).eval()
    noisy = 5 + 3 * normal(4, 3)
    single, double = (denoise(model, x) for x in (noisy.float(), noisy))
    assert torch.allclose(single[1], double[1], rtol=1e-3) and torch.allclose(single[0], double[0], atol=1e-4)
    single, double = (denoise(model, x, noise_std=1.0)[0] for x in (noisy.float(), noisy))
    assert torch.allclose(single, double, atol=1e-5) and double.isfinite().all()


@pytest.mark.parametrize("kind", [ClassificationDiffusion, DenoisingDiffusion])
def test_denoising_is_that_of_evaluation_mode_and_keeps_no_graph(kind):
    network = MLP(3, levels=T + 2, width=16, dropout=0.5) if kind is ClassificationDiffusion else DDMMLP(3, 16, 2, 0.5)
    model = kind(network, LogSNRSchedule(T), DataTransform((3,))).train()
    first, second = (denoise(model, normal(4, 3), level=5)[0] for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad and model.training


def test_a_level_is_the_noise_of_that_level():
    model = exact(LogSNRSchedule(T), DataTransform((DIM,), shift=50.0, scale=20.0))
    noisy = 50 + 20 * (DATA.sample(3, rng(1)) + 0.4 * normal(3, DIM))
    std = 20 * float(model.schedule.ratio[70])
    assert torch.equal(denoise(model, noisy, 70)[0], denoise(model, noisy, noise_std=std)[0])


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_few_levels_and_noise_beyond_both_ends(levels):
    model = exact(LogSNRSchedule(levels, r_min=0.1, r_max=1.0))
    clean = DATA.sample(3, rng(1))
    low, high = (estimate_noise(model, x)[0] for x in (clean, clean + 50 * normal(3, DIM)))
    r = model.schedule.ratio
    assert torch.allclose(low, r[1]) and torch.allclose(high, r[levels])


@every_schedule
def test_nearest_level(name):
    schedule = SCHEDULES[name](T)
    assert nearest_level(schedule, schedule.ratio[1 : T + 1] * 1.0001).tolist() == list(range(1, T + 1))
    assert nearest_level(schedule, torch.tensor([1e-9, 1e9])).tolist() == [1, T]


def spoiled(value):
    x = normal(2, DIM)
    x[1, 3] = value
    return x


MISTAKES = {
    "takes": {"noisy": normal(2, 3)},
    "are not finite": {"noisy": spoiled(math.nan)},
    "not finite": {"noisy": spoiled(math.inf)},
    "noise_std is 0": {"noise_std": 0.0},
    "noise_std is -1": {"noise_std": -1.0},
    "noise_std is nan": {"noise_std": math.nan},
    "noise_std is inf": {"noise_std": math.inf},
    "level is 0": {"level": 0},
    "level is 201": {"level": T + 1},
    "one of them": {"level": 3, "noise_std": 0.5},
    "sample": {"noisy": normal(2, DIM)[:0]},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message):
    model = exact(UniformSigmaSchedule(T), DataTransform((DIM,)))
    with pytest.raises(UserError, match=message):
        denoise(model, **{"noisy": normal(2, DIM)} | MISTAKES[message])
    with pytest.raises(UserError, match="no samples"):
        denoise_all(model, [])


def test_values_that_a_network_cannot_hold_are_refused():
    model = ClassificationDiffusion(MLP(3, levels=T + 2, width=16), LogSNRSchedule(T), DataTransform((3,))).eval()
    for choice in ({}, {"level": 3}, {"noise_std": 1.0}):
        with pytest.raises(UserError, match="not finite"):
            denoise(model, torch.full((2, 3), 1e38), **choice)
        with pytest.raises(UserError, match="finite"):
            denoise(model, torch.full((2, 3), 1e39, dtype=torch.float64), **choice)
