"""Peers of a comparison: units, normalisation, and that none of them beats the truth."""

import math

import numpy as np
import pytest
import torch
from oracles import MixtureClassifier, covariance, normal, rng
from torch import nn

from studies.budget import CLOCKS, Budget
from studies.compare import comparison, gradient
from studies.compare.comparison import compare
from studies.compare.denoising import FittedDenoiser
from studies.compare.flows import FittedFlow, FlowModule, calls_of
from studies.compare.gradient import Recipe, Trainable, seeded
from studies.compare.peer import Fitted, Samples, Task, Training
from studies.compare.peers import PEERS
from studies.compare.results import paired
from studies.compare.torchcfm_peers import FlowMatching, Matching
from studies.exact import ring_mixture
from torchcdm.apps.baselines import baselines
from torchcdm.data import DataOptions, from_object
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.schedules import UniformSigmaSchedule
from torchcdm.errors import UserError
from torchcdm.likelihood.scoring import dithered
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.units import DataTransform

pytestmark = pytest.mark.filterwarnings("ignore")

FLOWS = ("nsf", "maf", "ffjord", "realnvp", "residual-flow", "i-resnet")
VECTORS = (*FLOWS, "flow-matching", "gaussian", "kde", "gmm", "cdm", "ddm")
IMAGES = ("nsf", "realnvp", "glow", "residual-flow", "gaussian", "kde", "gmm")
SLOW_IMAGES = ("cdm", "ddm", "flow-matching")
"""Those that run through a hundred levels."""
LIBRARIES = {"zuko", "normflows", "torchcfm"}


def peer(name):
    """The peer, where its library is installed."""
    if PEERS[name].library in LIBRARIES:
        pytest.importorskip(PEERS[name].library)
    return PEERS[name]


def task_of(source, folder, seed=0):
    return Task(source, DataOptions(), torch.device("cpu"), seed, folder)


MEAN, SPREAD = torch.tensor([3.0, -40.0, 0.1], dtype=torch.float64), torch.tensor([2.0, 30.0, 0.05]).double()


def gaussian_vectors(count=2000):
    """Correlated columns of unlike scales, and their exact log density."""
    root = torch.linalg.cholesky(covariance(3))
    truth = torch.distributions.MultivariateNormal(MEAN, scale_tril=SPREAD[:, None] * root)
    return from_object((MEAN + SPREAD * (normal(count, 3, seed=5) @ root.T)).float()), truth


def independent_pixels(count=1500):
    """Images of 4 x 4 independent pixels with five grey levels of known probabilities, (16, 5)."""
    p = torch.linspace(0.05, 0.95, 16).double()
    choose = torch.tensor([math.comb(4, k) for k in range(5)]).double()
    k = torch.arange(5)
    table = choose * p[:, None] ** k * (1 - p[:, None]) ** (4 - k)
    x = torch.stack([torch.multinomial(row, count, True, generator=rng(9)) for row in table], 1)
    # One generator state for all pixels would make them dependent: roll each column by its own amount.
    x = torch.stack([x[:, i].roll(37 * i) for i in range(16)], 1)
    return from_object(x.reshape(-1, 1, 4, 4).to(torch.uint8).numpy()), table


# --- truth -------------------------------------------------------------------------------------------------------


def assert_not_better_than(exact, result):
    """No normalised row lies below the truth by more than three paired standard errors."""
    assert any(row.normalised for row in result.rows)
    for row in result.rows:
        gap = torch.tensor(row.values, dtype=torch.float64) - exact
        assert row.normalised == (not row.name.startswith("one-pass"))
        if row.normalised:
            assert gap.mean() > -3 * gap.std() / math.sqrt(len(gap)), (result.name, row.name, float(gap.mean()))
            assert gap.mean() < 3.0, (result.name, row.name, float(gap.mean()))


@pytest.mark.parametrize("name", VECTORS)
def test_no_peer_beats_a_gaussian(name, tmp_path):
    peer(name)
    source, truth = gaussian_vectors()
    (result,) = compare(source, 0.3, tmp_path, [name], clock="processor", limit=100).results
    x, _ = source.test.tensors(100)
    assert_not_better_than(-truth.log_prob(x.double()), result)


@pytest.mark.parametrize("name", [*IMAGES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_IMAGES)])
def test_no_peer_beats_independent_pixels(name, tmp_path):
    peer(name)
    source, table = independent_pixels()
    made = compare(source, 0.3, tmp_path, [name], clock="processor")
    x, _ = source.test.tensors()
    exact = -table.log2()[torch.arange(16), x.flatten(1).long()].mean(1)
    assert made.protocol.unit == "bits/dim"
    assert_not_better_than(exact, made.results[0])


def test_the_check_would_find_a_forgotten_log_determinant(tmp_path, monkeypatch):
    """Fault injection: the truth guard is not vacuous."""
    forgetful = FlowModule.log_prob
    monkeypatch.setattr(FlowModule, "log_prob", lambda self, z: forgetful(self, z) + 1.0)
    peer("realnvp")
    source, truth = gaussian_vectors()
    (result,) = compare(source, 1.0, tmp_path, ["realnvp"], clock="processor").results
    x, _ = source.test.tensors()
    with pytest.raises(AssertionError, match="realnvp"):
        assert_not_better_than(-truth.log_prob(x.double()), result)


class Heavier(nn.Module):
    """The exact classifier of a mixture, with ``mass`` nats too much below the highest level."""

    def __init__(self, backbone, mass):
        super().__init__()
        self.backbone, self.mass = backbone, mass

    def forward(self, x, y=None):
        h = self.backbone(x)
        return h + self.mass * (torch.arange(h.shape[1]) < h.shape[1] - 1)


@pytest.mark.slow
def test_one_pass_of_a_density_with_too_much_mass_is_normalised():
    mixture, schedule, mass = ring_mixture(4), UniformSigmaSchedule(12), 0.7
    backbone = Heavier(MixtureClassifier(mixture, schedule), mass)
    model = ClassificationDiffusion(backbone, schedule, DataTransform((2,))).eval()
    fitted = FittedDenoiser(model, Training(0, 0.0, None, 0, ""), with_elbo=False, log_z=512)
    x = mixture.sample(200, rng())
    scores = {score.name: score for score in fitted.scores(x, Budget(1.0))}
    raw, normalised = (scores[name].likelihood.values() for name in ("one-pass-level", "one-pass-normalized"))
    assert scores["one-pass-normalized"].normalised and not scores["one-pass-level"].normalised
    assert float((normalised - raw).mean()) == pytest.approx(mass, abs=0.1)
    error = scores["one-pass-normalized"].shared_se
    assert 0 < error < 0.1 and fitted.note.startswith("log Z +0.")
    # All samples share the error of log Z, which therefore is in the row's own and in its differences.
    row = comparison._row(scores["one-pass-normalized"])
    assert row.se > scores["one-pass-level"].likelihood.mean_and_error()[1]
    assert paired(row, comparison._row(scores["flow"]))["se"] >= error


@pytest.mark.parametrize("name", FLOWS)
def test_flows_integrate_to_one(name):
    z = normal(500, 2, seed=1) * torch.tensor([0.3, 2.0]) + torch.tensor([1.0, -4.0])
    with seeded(3):
        module = peer(name).build(z)
        module.train()
        module.loss(z.float())  # a first batch, from which ActNorm takes its scale
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        module.after_step()
        module.eval()
        spans = [torch.linspace(-7, 7, 57) * scale + mean for scale, mean in ((0.3, 1.0), (2.0, -4.0))]
        grid = torch.cartesian_prod(*spans)
        with torch.no_grad():
            density = torch.cat([module.log_prob(part).double() for part in grid.split(5000)]).exp()
    area = float((spans[0][1] - spans[0][0]) * (spans[1][1] - spans[1][0]))
    assert float(density.sum()) * area == pytest.approx(1, abs=0.01)


def test_glow_counts_its_jacobian():
    z = normal(200, 1, 4, 4, seed=1)
    with seeded(3):
        module = peer("glow").build(z)
        module.loss(z.float())
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    module = module.double().eval()

    def latent(flat):
        w = (flat.reshape(1, 1, 4, 4) - module.mean) / module.deviation
        return torch.cat([part.flatten() for part in module.flow.inverse_and_log_det(w)[0]])

    jacobian = torch.autograd.functional.jacobian(latent, z[0].flatten())
    w = (z[:1] - module.mean) / module.deviation
    parts = module.flow.inverse_and_log_det(w)[0]
    base = sum(q.log_prob(part) for q, part in zip(module.flow.q0, parts, strict=True))
    expected = base + torch.linalg.slogdet(jacobian).logabsdet
    assert torch.allclose(module.log_prob(z[:1]), expected, atol=1e-6)


# --- units -------------------------------------------------------------------------------------------------------


def test_classical_peers_are_the_reports_baselines(tmp_path):
    source, _ = independent_pixels(400)
    results = compare(source, 60, tmp_path, ["gaussian", "kde", "gmm"]).results
    x, transform = source.test.tensors()[0], source.transform
    noisy = dithered(transform, x, 0)
    for result, baseline in zip(results, baselines(source, noisy), strict=True):
        row, tighter = result.rows
        # Jensen: averaged inside the logarithm the bound is tighter, and its first draw is the other row's.
        assert tighter.name == "importance" and tighter.value < row.value and tighter.nfe == 16 * row.nfe
        assert row.value == pytest.approx(baseline.value, abs=1e-9) and row.se == pytest.approx(baseline.se, abs=1e-9)
        assert baseline.name in result.setting


class StandardFlow(FlowModule):
    """A flow that does nothing: its density is that of independent normals with the data's means and deviations."""

    def __init__(self, z, flat):
        super().__init__(nn.Identity(), z, flat)
        self.network = self.flow

    def density(self, w):
        return torch.distributions.Normal(0, 1).log_prob(self.flow(w)).flatten(1).sum(1)

    def draw(self, n):
        return self.flow(torch.randn(n, *((math.prod(self.shape),) if self.flat else self.shape)))


@pytest.mark.parametrize("flat", [True, False])
def test_a_flow_is_scored_in_data_units(flat, tmp_path):
    source, _ = independent_pixels(400)
    x = source.test.tensors()[0]
    noisy = dithered(source.transform, x, 0)
    train = source.transform.add_noise(source.train.tensors()[0].double(), rng(1))
    over = 0 if flat else (0, 1, 2, 3)
    truth = torch.distributions.Normal(train.mean(over), train.std(over, correction=0))
    bits = -truth.log_prob(noisy).flatten(1).mean(1) / math.log(2)

    module = StandardFlow(source.transform(train), flat).eval()
    fitted = FittedFlow(task_of(source, tmp_path), Training(1, 1.0, None, 1, ""), module)
    score, tighter = fitted.scores(x, Budget(1))
    assert tighter.likelihood.nfe == 16
    assert torch.allclose(score.likelihood.values(), bits, atol=1e-5) and score.likelihood.nfe == 1
    drawn = fitted.sample(4000, seed=0).x
    assert drawn.shape[1:] == x.shape[1:]
    assert torch.allclose(drawn.double().mean(0 if flat else None), train.mean(over), atol=0.1)


class Told(nn.Module):
    """A velocity that knows the answer, and checks the time that it is asked at."""

    def __init__(self, time, target):
        super().__init__()
        self.time, self.target = time, target

    def forward(self, time, x):
        assert torch.equal(time, self.time)
        return self.target


def test_velocity_of_torchcfm_is_read_the_right_way_round():
    """Its time, its pairs and its sign, from its own matcher: x_0 and eps come back exactly."""
    matching = pytest.importorskip("torchcfm.conditional_flow_matching")
    data, noise = normal(20, 2, seed=1), normal(20, 2, seed=2)
    transform = from_object(data.float()).transform
    denoiser = FlowMatching(nn.Identity(), transform, levels=9)
    for t in (1, 4, 9):
        time = denoiser.schedule.alpha[t].expand(20)
        _, x_t, target = matching.ConditionalFlowMatcher(sigma=0.0).sample_location_and_conditional_flow(
            noise, data, time
        )
        denoiser.velocity = Told(time, target)
        found = denoiser.denoise(x_t, t)
        assert torch.allclose(found.x0, data) and torch.allclose(found.eps, noise)


def test_flow_matching_with_the_exact_velocity_has_the_exact_likelihood():
    from torchcdm.likelihood import Scoring, probability_flow

    source, _ = gaussian_vectors(400)
    z = source.transform(source.train.tensors()[0].double())
    denoiser = FlowMatching(nn.Identity(), source.transform, levels=199)
    gaussian = GaussianMarginals.fit(z, denoiser.schedule)
    T = denoiser.schedule.T

    class Exact(nn.Module):
        def forward(self, time, x):
            t = round((1 - float(time[0])) * (T + 1))
            alpha, sigma = denoiser.schedule.at(t, x)
            return -(gaussian.eps(x, t) - (x - sigma * gaussian.eps(x, t)) / alpha)

    denoiser.velocity = Exact()
    x = source.test.tensors()[0]
    found = probability_flow(denoiser, x, None, Scoring(steps=198))
    exact = gaussian.log_prob_levels(found.z)[:, 1] + found.nats - found.flow.log_prob
    assert float((found.nats - exact).abs().max()) < 0.01


def test_validation_of_flow_matching_is_its_loss():
    pytest.importorskip("torchcfm")

    class Zero(nn.Module):
        def forward(self, time, x):
            return 0 * x

    # E|x_0 - eps|² for a network that says nothing: the variances add.
    z = 2 * normal(4000, 3, seed=1).float()
    with seeded(0):
        assert Matching(Zero()).validation_loss(z) == pytest.approx(5, rel=0.05)


# --- the loop ------------------------------------------------------------------------------------------------------


class Walk(Trainable):
    """A number that training pulls to where the batch says, and a validation that likes 1 best."""

    def __init__(self, start=0.0):
        super().__init__()
        self.place = nn.Parameter(torch.tensor(start))

    def loss(self, z):
        return (self.place - 3).square()

    def validation_loss(self, z):
        return abs(float(self.place) - 1)


@pytest.fixture
def ticking(monkeypatch):
    """A wall clock on which every look takes a hundredth of a second."""
    ticks = iter(range(10**6))
    monkeypatch.setitem(CLOCKS, "wall", lambda: next(ticks) / 100)


def train_walk(tmp_path, walk, recipe=None, seconds=20.0):
    source, _ = gaussian_vectors(100)
    recipe = recipe or Recipe(lr=0.003, batch_size=8, optimizer=torch.optim.SGD)
    return gradient.train(walk, task_of(source, tmp_path), recipe, Budget(seconds), 1.0, "walk", "a number")


def test_the_best_weights_are_kept_and_a_plateau_goes_back_to_them(tmp_path, ticking):
    module, training = train_walk(tmp_path, Walk())
    # Without the way back the number would end at 3.
    assert abs(float(module.place) - 1) < 0.2 and training.validation == pytest.approx(abs(float(module.place) - 1))
    assert 0 < training.best_step <= training.steps
    assert not module.training and not module.place.requires_grad


def test_the_budget_ends_training(tmp_path, ticking):
    _, training = train_walk(tmp_path, Walk(), seconds=5.0)
    assert 5.0 <= training.seconds < 6.0
    _, longer = train_walk(tmp_path, Walk(), seconds=10.0)
    assert longer.steps > 1.5 * training.steps


def test_a_training_that_stays_infinite_diverges(tmp_path, ticking):
    class Lost(Walk):
        def loss(self, z):
            return self.place * math.nan

    with pytest.raises(gradient.Diverged, match="10 steps in a row up to step 10"):
        train_walk(tmp_path, Lost())


def test_single_bad_steps_are_left_out(tmp_path, ticking):
    class Shaky(Walk):
        calls = 0

        def loss(self, z):
            self.calls += 1
            return super().loss(z) * (math.inf if self.calls % 3 == 0 else 1)

    module, _ = train_walk(tmp_path, Shaky())
    assert abs(float(module.place) - 1) < 0.2


def test_averaged_weights_are_what_is_kept(tmp_path, ticking):
    class End(Walk):
        def validation_loss(self, z):
            return abs(float(self.place) - 3)

    recipe = Recipe(lr=0.003, batch_size=8, optimizer=torch.optim.SGD, ema_decay=0.9)
    walk = End()
    module, training = train_walk(tmp_path, walk, recipe)
    assert module is not walk and training.validation == pytest.approx(abs(float(module.place) - 3))


def test_seeds_leave_the_callers_generators_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(1)
    np.random.seed(1)
    with seeded(5):
        inside = torch.rand(1), np.random.rand()
    assert (torch.rand(1), np.random.rand()) == expected
    with seeded(5):
        assert (torch.rand(1), np.random.rand()) == inside


def test_calls_are_counted():
    net = nn.Linear(1, 1)
    with calls_of(net) as count:
        net(torch.zeros(1))
        net(torch.zeros(1))
    net(torch.zeros(1))
    assert count == [2]


@pytest.mark.parametrize(("seconds", "clock", "message"), [
    (0, "wall", "budget is 0 seconds"), (-1, "wall", "budget is -1"), (math.nan, "wall", "must be positive"),
    (1, "sun", "unknown clock 'sun'"),
])  # fmt: skip
def test_budgets_that_make_no_sense(seconds, clock, message):
    with pytest.raises(UserError, match=message):
        Budget(seconds, clock)


def test_processor_time_does_not_pass_while_asleep():
    import time

    wall, processor = Budget(10), Budget(10, "processor")
    time.sleep(0.2)
    assert wall.elapsed > 0.19 and processor.elapsed < 0.1
    assert 0 < wall.share < 1 and not wall.spent


def test_samples_of_two_seeds_share_no_chunk():
    seeds = {}

    class Recorded(Fitted):
        scores = None

        def sample(self, n, seed):
            seeds.setdefault(current, []).append(seed)
            return Samples(torch.zeros(n, 1), 1)

    for current in (0, 1):
        comparison._sampling(Recorded(), Budget(1), current, count=4 * comparison.CHUNK)
    assert len(seeds[0]) == 4 and len({*seeds[0], *seeds[1]}) == 8
