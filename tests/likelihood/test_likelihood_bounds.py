"""Code lengths of data on a grid: against states whose probabilities are known."""

import math

import pytest
import torch
from lattices import draw, lattice_model
from oracles import MixtureClassifier, normal, rng

from studies.exact import GaussianMixture
from torchcdm.diffusion.schedules import CosineSchedule, LogSNRSchedule, UniformSigmaSchedule
from torchcdm.errors import UserError
from torchcdm.likelihood import FlowSolver, Scoring, elbo, single_pass
from torchcdm.likelihood.cells import REACH, noisy_cells
from torchcdm.likelihood.one_pass import score_noisy
from torchcdm.likelihood.scoring import ScoredBatch
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.units import DataTransform, GaussianizedTransform


def above(bits, true):
    """Mean excess over the true code length, and its standard error."""
    excess = bits - true
    return float(excess.mean()), float(excess.std() / math.sqrt(len(excess)))


def grid(kind: str, shape: tuple[int, ...], levels: int) -> DataTransform:
    """Grey levels as points, as boxes, or Gaussianised by uneven histograms."""
    transform = DataTransform.images(shape, levels, dequantize=kind != "points")
    if kind != "gaussianized":
        return transform
    chances = torch.rand(transform.dim, levels, generator=rng(7), dtype=torch.float64) ** 3
    x = torch.multinomial(chances, 2000, replacement=True, generator=rng(8)).T.reshape(2000, *shape)
    return GaussianizedTransform.fit(transform, [x])


every_grid = pytest.mark.parametrize("kind", ["points", "boxes", "gaussianized"])


@every_grid
@pytest.mark.parametrize("level", [1, 4, 12])
def test_decoder_sums_to_one_for_any_mean(kind, level):
    transform = grid(kind, (3,), 6)
    cells = noisy_cells(transform, UniformSigmaSchedule(40), level)
    z, x0 = normal(50, 3), 2 * normal(50, 3, seed=1)
    # Over the 6³ states, as the decoder is a product over the dimensions.
    states = torch.cartesian_prod(*[torch.arange(6.0)] * 3)
    log_p = torch.stack([cells.log_decoder(z, state.double().expand(50, 3), x0).sum(1) for state in states])
    assert torch.allclose(log_p.logsumexp(0), torch.zeros(50).double(), atol=1e-10)


@every_grid
def test_decoder_reaches_as_far_on_every_grid(kind):
    cells = noisy_cells(grid(kind, (1,), 256), LogSNRSchedule(20, 0.05, 80), 1)
    x = torch.full((1, 1), 100.0).double()
    middle = cells.transform(cells.transform.spread(x, torch.full((1, 1), 0.5)))
    z = cells.alpha * middle + (REACH - 0.5) * cells.sigma
    assert bool(cells.log_decoder(z, x, z / cells.alpha).isfinite())


@every_grid
@pytest.mark.parametrize("level", [1, 5])
def test_encoder_is_the_density_of_its_own_draws(kind, level):
    transform = grid(kind, (1,), 8)
    cells = noisy_cells(transform, CosineSchedule(30), level)
    z = torch.linspace(-3, 3, 200_001, dtype=torch.float64)[:, None]
    density = cells.log_q(z, torch.full_like(z, 5.0))[:, 0].exp()
    assert float(torch.trapezoid(density, z[:, 0])) == pytest.approx(1, abs=1e-6)
    x_0 = transform(transform.spread(torch.full((20_000, 1), 5.0).double(), torch.rand(20_000, 1, generator=rng())))
    drawn = CosineSchedule(30).perturb(x_0, level, normal(20_000, 1))
    mean, square = (float(torch.trapezoid(density * z[:, 0] ** k, z[:, 0])) for k in (1, 2))
    deviation = math.sqrt(square - mean**2)
    assert abs(float(drawn.mean()) - mean) < 4 * deviation / math.sqrt(20_000)
    assert float(drawn.std()) == pytest.approx(deviation, rel=0.03)


def test_decoder_is_the_posterior_where_two_levels_compete():
    # With two grey levels the mean determines the posterior, so the bound is an equality. (Where the noise is far
    # below a bin the decoder follows the mean less than that: networks don't know it so well.)
    model, cells, log_probs = lattice_model(UniformSigmaSchedule(30), dim=1, levels=2)
    x, true = draw(cells, log_probs, 40)
    for level in (12, 15, 20):
        assert torch.allclose(single_pass(model, x, None, Scoring(level)).values(), true, atol=1e-4)


@pytest.mark.parametrize("level", [0, 1, 7, 25])
def test_gaussianized_independent_pixels_cost_their_histogram_at_every_level(level):
    # All bounds are equalities: the model is exact, and the flat decoder is the posterior.
    transform = grid("gaussianized", (4,), 6)
    network = torch.nn.Module()
    network.forward = lambda x: 0 * x.sum(1, keepdim=True).expand(-1, 32)
    model = ClassificationDiffusion(network, UniformSigmaSchedule(30), transform)
    x = torch.randint(0, 6, (2000, 4), generator=rng()).double()
    histogram = transform.log_mass.expand(2000, -1, -1).gather(2, x.long()[..., None]).sum((1, 2))
    assert torch.allclose(single_pass(model, x, None, Scoring(level)).nats, histogram, atol=1e-8)
    if level:
        # The chain is exact too; its bound is an equality in the mean over its noise.
        mean, error = above(-elbo(model, x, None, Scoring(level)).nats, -histogram)
        assert abs(mean) < 3.5 * error < 0.5


def test_dequantised_density_of_the_exact_model_is_the_code_length():
    model, cells, log_probs = lattice_model(UniformSigmaSchedule(30))
    x, true = draw(cells, log_probs, 50)
    assert torch.allclose(single_pass(model, x, None, Scoring(0, draws=3)).values(), true, atol=1e-9)


@pytest.mark.parametrize("dequantize", [True, False])
@pytest.mark.parametrize("level", [1, 3, 8])
def test_bound_through_a_level_is_a_bound(dequantize, level):
    model, cells, log_probs = lattice_model(CosineSchedule(40), dequantize=dequantize)
    x, true = draw(cells, log_probs, 600)
    plain = single_pass(model, x, None, Scoring(level, draws=4))
    mean, error = above(plain.values(), true)
    assert mean > -3 * error
    assert mean < {1: 0.03, 3: 0.08, 8: 0.45}[level], "far from tight"
    assert plain.nfe == 4 and plain.level == level and len(plain.nats) == 600


def test_a_wrong_density_still_bounds_when_it_is_normalised():
    # The model of another lattice: worse than the truth by the divergence, never better.
    model, cells, log_probs = lattice_model(CosineSchedule(40))
    x, true = draw(cells, log_probs.flip(0), 400)
    for level in (0, 1, 5):
        mean, error = above(single_pass(model, x, None, Scoring(level)).values(), true)
        assert mean > 0.2 and mean > 3 * error


def test_elbo_and_flow_bound_too():
    model, cells, log_probs = lattice_model(LogSNRSchedule(24, 0.05, 80))
    x, true = draw(cells, log_probs, 100)
    bound = elbo(model, x, None, Scoring(level=1))
    mean, error = above(bound.values(), true)
    assert -3 * error < mean < 0.4 + 2 * error
    z, _, offset = score_noisy(model, ScoredBatch(model, x, None, slice(0, 100), 0), 1)
    flow = FlowSolver(model, Scoring(1)).log_prob(z).log_prob + offset
    mean, error = above(-flow / (2 * math.log(2)), true)
    assert -3 * error - 0.01 < mean < 0.1


def test_published_convention_falls_below_the_entropy_and_bounds_do_not():
    # 8-bit lattice, no training: the exact mixture at its first noisy level, 0.127 bins of noise.
    schedule = UniformSigmaSchedule(1000)
    model, cells, log_probs = lattice_model(schedule, dim=1, levels=256, dequantize=False)
    x, true = draw(cells, log_probs, 40)
    peak = model.schedule.alpha[1] * model.transform(x)
    first_level = model.log_prob(peak, t=1, units="model") + model.transform.log_det(peak)
    # The height of a Gaussian of 0.127 bins.
    assert above(-first_level / math.log(2), true)[0] == pytest.approx(-1.65, abs=0.01)
    # At level 0 the better the classifier the lower the number, without end: here peaks of a thousandth of a bin.
    width = float(model.transform.model_bin) / 1000
    peaks = GaussianMixture(log_probs.exp(), model.transform(cells.double()), torch.full((256,), width**2))
    perfect = ClassificationDiffusion(MixtureClassifier(peaks, schedule), schedule, model.transform)
    height = math.log2(1000 / math.sqrt(2 * math.pi))
    published = single_pass(perfect, x, None, Scoring(0), dither=False)
    assert above(published.values(), true)[0] == pytest.approx(-height, abs=0.01)
    mean, error = above(single_pass(model, x, None, Scoring(1, draws=2)).values(), true)
    assert -3 * error < mean < 0.1


@pytest.mark.parametrize("level", [0, 1, 7])
def test_scores_do_not_depend_on_batches(level):
    model, cells, log_probs = lattice_model(UniformSigmaSchedule(20))
    x, _ = draw(cells, log_probs, 23)
    for likelihood in (single_pass, elbo) if level else (single_pass,):
        whole, parts = (likelihood(model, x, None, Scoring(level, 2, 5, batch_size=size)).nats for size in (99, 4))
        assert torch.allclose(parts, whole, atol=1e-10)


def test_draws_of_neighbouring_seeds_are_independent():
    model, cells, log_probs = lattice_model(UniformSigmaSchedule(20))
    x, _ = draw(cells, log_probs, 500)
    signal = model.schedule.alpha[6] * model.transform(x)
    batches = (ScoredBatch(model, x, None, slice(0, 500), seed) for seed in (0, 1))
    one, two = (model.schedule.perturb(b.clean()[0], 6, b.noise("noise")) - signal for b in batches)
    correlation = torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1]
    assert abs(float(correlation)) < 4 / math.sqrt(1000)


def test_draws_of_neighbouring_seeds_are_other_draws():
    model, cells, log_probs = lattice_model(UniformSigmaSchedule(20))
    x, _ = draw(cells, log_probs, 5)
    mean, first, other = (single_pass(model, x, None, Scoring(6, *which)).nats for which in ((2, 0), (1, 0), (1, 1)))
    assert not torch.isclose(2 * mean - first, other).any()


def test_refusals():
    model, cells, log_probs = lattice_model(UniformSigmaSchedule(20))
    x, _ = draw(cells, log_probs, 5)
    for level in (-1, 21):
        with pytest.raises(UserError, match=f"level {level} cannot be scored|level is {level}"):
            single_pass(model, x, None, Scoring(level))
    with pytest.raises(UserError, match="takes 2 to 20"):
        elbo(model, x, None, Scoring(1), evaluations=21)
    model.transform = None
    with pytest.raises(UserError, match="DataTransform"):
        single_pass(model, x)
