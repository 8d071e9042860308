"""``sample``: distributions, levels visited, noise of each sample, classes and guidance, units, mistakes."""

import math

import pytest
import torch
from denoisers import GaussianDenoiser, mixture_model, placed_levels
from oracles import MixtureClassifier, ZeroBackbone, covariance, labelled_mixture, normal
from torch import nn

from torchcdm.compose import sample
from torchcdm.compose.sampling import OF_VECTORS, SAMPLER, STEPS, sample_noise, trajectories
from torchcdm.diffusion.gaussian import GaussianMarginals, MatrixRotation
from torchcdm.diffusion.mixture import MixtureMarginals
from torchcdm.diffusion.schedules import (
    CosineSchedule,
    LogSNRSchedule,
    UniformSigmaSchedule,
)
from torchcdm.errors import UserError
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import DenoisingDiffusion
from torchcdm.networks.mlp import MLP
from torchcdm.samplers import (
    DDIM,
    SAMPLERS,
    Curvature,
    Heun,
    SASolver,
    Step,
    make_sampler,
)
from torchcdm.units import DataTransform

every_sampler = pytest.mark.parametrize("name", SAMPLERS)


@every_sampler
def test_samples_have_the_distribution_of_the_data(name):
    model = mixture_model(CosineSchedule(300))
    x = sample(model, 4000, name, steps=300, shape=(2,))
    truth = model.mixture.sample(4000, torch.Generator().manual_seed(1))
    log_p = model.mixture.log_prob(x, 0, model.schedule)
    expected = model.mixture.log_prob(truth, 0, model.schedule)
    error = 3 * (log_p.var() / 4000 + expected.var() / 4000).sqrt()
    assert abs(log_p.mean() - expected.mean()) < error + 0.02
    share = lambda x: model.mixture.class_log_prob_levels(x, model.schedule)[:, :, 0].argmax(1).double().mean()  # noqa: E731
    assert abs(share(x) - share(truth)) < 3 * math.sqrt(0.5 / 4000)


@every_sampler
def test_visits_exactly_the_steps_asked_for_and_returns_x0(name):
    schedule = CosineSchedule(12)
    for steps in range(1, 13):
        denoiser = GaussianDenoiser(schedule, [0.7, -1.0], [0.25, 2.0])
        x = sample(denoiser, 3, name, steps, shape=(2,), spacing="even")
        grid, reached = schedule.time_grid(steps), []
        # Heun visits each level but the first twice: at the end of a step and at the start of the next.
        assert sorted(set(denoiser.visited), reverse=True) == grid
        assert len(denoiser.visited) == (2 * steps - 1 if name == "heun" else steps)
        again = trajectories(denoiser, 3, make_sampler(name), [*grid, 0], (2,), units="model",
                             moved=lambda x, s, *_: reached.append((s, x)))  # noqa: B023  # fmt: skip
        assert torch.equal(x, again) and [s for s, _ in reached] == grid[1:]
        if name == "ddim" and steps > 1:
            assert torch.equal(x, denoiser.denoise(reached[-1][1], 1).x0)


@every_sampler
def test_stops_where_the_levels_stop(name):
    denoiser = GaussianDenoiser(CosineSchedule(40), [0.7, -1.0], [0.25, 2.0])
    rule, seen = make_sampler(name), {}
    trajectories(denoiser, 4, rule, [40, 30, 11, 0], (2,), moved=lambda x, s, *_: seen.update({s: x}))
    assert torch.equal(trajectories(denoiser, 4, rule, [40, 30, 11], (2,)), seen[11])


@every_sampler
def test_a_step_depends_on_its_arguments_alone(name):
    rule, denoiser = make_sampler(name), GaussianDenoiser(CosineSchedule(40), [0.7, -1.0], [0.25, 2.0])
    x, noise = normal(4, 2), normal(4, 2, seed=1)
    before = dict(vars(rule))
    _, history = rule.step(Step(denoiser, x, 40, 30, None, noise))
    first, _ = rule.step(Step(denoiser, x, 30, 20, None, noise, history))
    rule.step(Step(denoiser, 2 * x, 12, 3, None, noise))
    again, _ = rule.step(Step(denoiser, x, 30, 20, None, noise, history))
    assert torch.equal(first, again) and vars(rule) == before


@every_sampler
def test_batch_size_and_number_of_samples_do_not_change_a_sample(name):
    model = mixture_model()
    options = {"sampler": name, "steps": 20, "shape": (2,), "seed": 5}
    y = (torch.arange(11) % 3 == 0).long()
    together = sample(model, 11, y=y, **options)
    assert torch.allclose(sample(model, 11, y=y, batch_size=4, **options), together, atol=1e-5)
    assert torch.allclose(sample(model, 3, y=y[:3], **options), together[:3], atol=1e-5)
    assert not torch.allclose(sample(model, 11, y=y, **options | {"seed": 6}), together, atol=1e-2)


def test_noise_of_one_sample_is_independent_of_every_other():
    draws = torch.stack([torch.stack(list(sample_noise(seed, range(50), (4, 5), 40)), 1) for seed in (0, 1)])
    flat = draws.reshape(100, -1).double()  # 100 streams of 800 numbers
    assert abs(flat.mean()) < 4 / math.sqrt(flat.numel()) and flat.var() == pytest.approx(1, abs=0.02)
    correlation = torch.corrcoef(flat) - torch.eye(100)
    assert correlation.abs().max() < 5 / math.sqrt(800)
    # One stream is the same in any company.
    alone = torch.stack(list(sample_noise(1, [17], (4, 5), 40)), 1)
    assert torch.equal(alone[0], draws[1, 17])


def gaussian_models(schedule):
    """N(mean, covariance) as a CDM, as a DDM and under guidance that changes nothing; far from N(0, I)."""
    mean, spread = 3 * normal(2), 9 * covariance(2)
    variances, vectors = torch.linalg.eigh(spread)
    base = GaussianMarginals(schedule, mean, variances, MatrixRotation((2,), vectors))

    class Labelled(ZeroBackbone):
        classes = 2

        def __init__(self, levels, joint=False):
            super().__init__(levels)
            self.joint, self.double_precision = joint, nn.Parameter(torch.zeros(1).double())

        def forward(self, x, y=None):
            h = super().forward(x)
            return h[:, None].expand(-1, 2, -1) if self.joint else h

    class NoCorrection(nn.Module):
        classes = 2

        def forward(self, x, t, y=None):
            return torch.zeros_like(x)

    models = {
        "cdm": ClassificationDiffusion(Labelled(schedule.T + 2), schedule, gaussian=base),
        "joint": ClassificationDiffusion(Labelled(schedule.T + 2, joint=True), schedule, gaussian=base),
        "ddm": DenoisingDiffusion(NoCorrection(), schedule, base=base),
    }
    models["ddm"].double_precision = nn.Parameter(torch.zeros(1).double())
    return models, mean, spread


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("kind", ["cdm", "joint", "ddm"])
def test_starts_from_what_level_T_is_of_the_data(kind, guidance):
    # Uniform sigma keeps 0.14 of the signal at T = 100: from N(0, I) the deviations would be wrong.
    models, mean, spread = gaussian_models(UniformSigmaSchedule(100))
    n = 1000
    x = sample(models[kind], n, "heun", steps=100, y=1, guidance=guidance, shape=(2,))
    assert torch.allclose(x.mean(0), mean, atol=4 * float(spread.diag().max().sqrt()) / math.sqrt(n))
    assert torch.allclose(torch.cov(x.T), spread, atol=4 * float(spread.diag().max()) * math.sqrt(2 / n))
    # Sharper than the moments: the flow keeps the standardised x, which is the noise itself.
    noise = next(sample_noise(0, range(n), (2,), 1, torch.float64))
    truth = models[kind].base.sample(noise, 0)
    assert torch.allclose(x, truth, atol=0.1)


def test_samples_come_in_data_units():
    transform = DataTransform((2,), shift=torch.tensor([100.0, -3.0]), scale=torch.tensor([5.0, 0.1]), bin=1.0)
    model = mixture_model(transform=transform)
    in_model = sample(model, 6, "ddpm", 10, units="model")
    assert torch.allclose(sample(model, 6, "ddpm", 10), transform.inverse(in_model))


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_guidance_in_one_pass_equals_guidance_in_two(weight):
    schedule, mixture = CosineSchedule(60), labelled_mixture()
    backbone = MixtureClassifier(mixture, schedule, joint=True)
    one = ClassificationDiffusion(backbone, schedule, class_prior=mixture.class_prior)
    one.double_precision = nn.Parameter(torch.zeros(1).double())
    two = mixture_model(schedule)
    y = torch.tensor([0, 1, 1, 0, 1])
    options = {"sampler": "ddpm", "steps": 15, "y": y, "guidance": weight, "shape": (2,)}
    samples = sample(two, 5, **options)
    assert torch.allclose(sample(one, 5, **options), samples, atol=1e-7)
    plain = sample(two, 5, **options | {"guidance": 0.0})
    assert torch.allclose(samples, plain) == (weight == 0)


def test_guidance_pushes_towards_the_class():
    model = mixture_model()
    shares = []
    for weight in (0.0, 1.0, 4.0):
        x = sample(model, 500, "ddpm", 30, y=0, guidance=weight, shape=(2,)).double()
        log_p = model.mixture.class_log_prob_levels(x, model.schedule)[:, :, 0] + model.mixture.class_prior.log()
        shares.append(float(log_p.softmax(1)[:, 0].log().mean()))
    assert shares[0] < shares[1] < shares[2]


def test_dropout_is_off_while_sampling_and_modes_come_back():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.active, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5).eval()

        def forward(self, x, t, y=None):
            return self.active(x)

    model = DenoisingDiffusion(Noisy(), CosineSchedule(10))
    model.train()
    model.backbone.frozen.eval()
    assert torch.equal(sample(model, 50, steps=3, shape=(2,)), sample(model, 50, steps=3, shape=(2,)))
    assert model.training and model.backbone.active.training and not model.backbone.frozen.training


def test_samples_carry_no_graph():
    backbone = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 12))
    model = ClassificationDiffusion(backbone, CosineSchedule(10))
    assert not sample(model, 3, "heun", steps=4, shape=(2,)).requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is 0; it must be at least 1"),
        ({"steps": 101}, "1 to 100"),
        ({"steps": 0}, "at least 1"),
        ({"sampler": "ddmp"}, "did you mean 'ddpm'"),
        ({"sampler": "euler"}, "choose from"),
        ({"shape": None}, "shape"),
        ({"y": 2}, "classes 0 to 1"),
        ({"y": -1}, "classes 0 to 1"),
        ({"y": torch.tensor([0, 1])}, "one for each sample"),
        ({"guidance": 1.0}, "labels"),
        ({"batch_size": 0}, "batch_size"),
        ({"spacing": "odd"}, "choose from: adaptive, even"),
        ({"spacing": "adaptive", "shape": None}, "shape"),
        ({"units": "pixels"}, "choose from: codes, data, model"),
        ({"seed": -1}, "seed"),
    ],
)
def test_mistakes_are_named_in_one_line(options, message):
    options = {"n": 3, "steps": 10, "shape": (2,)} | options
    with pytest.raises(UserError, match=message) as caught:
        sample(mixture_model(), options.pop("n"), **options)
    assert "\n" not in str(caught.value)


def test_a_name_is_no_model():
    with pytest.raises(UserError, match="'zoo:digits' is no model; torchcdm.load gives one"):
        sample("zoo:digits", 4)


def test_a_joint_model_draws_a_class_first_by_its_frequency():
    schedule, mixture = LogSNRSchedule(20), labelled_mixture()
    prior = torch.tensor([0.8, 0.2])
    model = ClassificationDiffusion(
        MixtureClassifier(mixture, schedule, joint=True), schedule, class_prior=prior
    )
    y = model.draw_classes(4000, seed=3)
    assert abs(float(y.double().mean()) - 0.2) < 0.03  # 4.7 standard errors
    assert torch.equal(model.draw_classes(50, seed=3), y[:50])
    drawn = [sample(model, 50, steps=5, shape=(2,), y=labels, seed=3) for labels in (None, y[:50])]
    assert torch.equal(*drawn)
    assert torch.equal(sample(model, 50, steps=5, shape=(2,), seed=3, details=True).y, y[:50])
    assert mixture_model().draw_classes(5) is None


def test_labels_and_guidance_need_a_conditional_model():
    denoiser = GaussianDenoiser(CosineSchedule(10), [0.7, -1.0], [0.25, 2.0])
    with pytest.raises(UserError, match="without classes"):
        sample(denoiser, 3, steps=2, y=0, shape=(2,))
    with pytest.raises(UserError, match="class-conditional"):
        sample(denoiser, 3, steps=2, guidance=1.0, shape=(2,))


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_eta_is_a_share(eta):
    with pytest.raises(UserError, match="eta is .*; it must be at"):
        DDIM(eta)


def test_stochastic_step_without_noise_is_a_mistake():
    denoiser = GaussianDenoiser(CosineSchedule(10), [0.7], [0.25])
    with pytest.raises(UserError, match="noise"):
        DDIM(1.0).step(Step(denoiser, normal(2, 1), 10, 5))
    assert Heun().step(Step(denoiser, normal(2, 1), 10, 5))[0].isfinite().all()


def test_adaptive_steps_are_those_of_model_and_classes():
    model = mixture_model()
    options = {"sampler": "ddpm", "steps": 7, "shape": (2,), "spacing": "adaptive"}
    levels = placed_levels(model, 7, (2,), torch.tensor([0, 1]))
    y = torch.arange(50) % 2
    samples = sample(model, 50, y=y, **options)
    assert torch.equal(samples, trajectories(model, 50, make_sampler("ddpm"), levels, (2,), y))
    assert torch.allclose(samples[:9], sample(model, 9, y=y[:9], **options), atol=1e-6)
    assert placed_levels(model, 100, (2,)) == list(range(100, -1, -1))
    assert torch.equal(sample(model, 3, **options | {"steps": 100}), sample(model, 3, "ddpm", 100, shape=(2,)))
    curvature = Curvature.of(model, (2,), torch.tensor([0, 1]))
    placed = curvature.levels(7, model.schedule, SASolver.weight)
    assert placed != levels
    there = trajectories(model, 50, SASolver(variance=curvature.variance), placed, (2,), y)
    assert torch.equal(sample(model, 50, "sa2", 7, y, shape=(2,)), there)
    # Other classes have trajectories of their own.
    one, other = (placed_levels(model, 7, (2,), torch.tensor([k])) for k in (0, 1))
    assert one != other


def test_trajectories_are_kept_until_the_weights_or_the_classes_are_others():
    model, seen = ClassificationDiffusion(MLP(2, 42, 8, 1, classes=2), CosineSchedule(40)), []
    model.backbone.register_forward_hook(lambda *_: seen.append(1))
    options = {"sampler": "ddpm", "steps": 7, "shape": (2,), "spacing": "adaptive"}

    def passes(**others):
        seen.clear()
        return sample(model, 5, **options | others), len(seen)

    (first, cost), (again, less) = passes(), passes()
    assert torch.equal(first, again) and (cost, less) == (7 + 40, 7)
    assert [passes(y=y)[1] for y in (0, 1, 0, 1)] == [47, 47, 7, 7]
    assert [passes(y=0, guidance=1.0)[1] for _ in range(2)] == [94, 14]
    # Any number of steps, and any sampler, from the same trajectories.
    assert [passes(steps=9)[1], passes(sampler="ddim")[1], passes()[1]] == [9, 7, 7]
    for weights in model.parameters():
        weights.data += 0.01
    assert [passes()[1], passes()[1]] == [47, 7]
    weights.data += torch.linspace(-1, 1, weights.numel()).view_as(weights)  # of the same sum
    assert [passes()[1], passes()[1]] == [47, 7]
    for k in range(20):
        passes(y=0, guidance=k / 10)
    assert len(model.curvatures) == 16


@pytest.mark.parametrize("deviation", [1e-3, 3e-3, 0.01])
def test_directions_that_the_base_density_knows_to_be_thin_keep_their_width(deviation):
    """The last level's noise has a deviation of 0.01: means alone would keep 10 to 70 % of these."""
    spread = deviation**2 * torch.eye(2) + torch.ones(2, 2)
    groups = torch.tensor([[0.0, 0.0], [9.0, 9.0]])
    schedule = UniformSigmaSchedule(100)
    one = GaussianMarginals.of_spread(schedule, groups[0], spread)
    two = MixtureMarginals(schedule, torch.ones(2), groups, spread.expand(2, 2, 2), one)
    for base in (one, two):
        x = sample(ClassificationDiffusion(ZeroBackbone(102), schedule, gaussian=base), 4000, shape=(2,))
        assert float((x[:, 0] - x[:, 1]).std()) == pytest.approx(2**0.5 * deviation, rel=0.07)


def test_by_default_columns_of_vectors_keep_their_deviations():
    """``sa2`` with its placed steps would give 1.02 and 0.73 of them."""
    denoiser = GaussianDenoiser(LogSNRSchedule(200), [0.0, 0.0], [1.0, 0.01])
    x = sample(denoiser, 2000, shape=(2,))
    assert (x.std(0) / torch.tensor([1.0, 0.1])).tolist() == pytest.approx([1.0, 1.0], abs=0.06)
    assert torch.equal(x, sample(denoiser, 2000, OF_VECTORS, STEPS, spacing="even", shape=(2,)))
    images = GaussianDenoiser(LogSNRSchedule(60), 0.0, 1.0)
    x = sample(images, 4, shape=(1, 2, 2))
    assert torch.equal(x, sample(images, 4, SAMPLER, STEPS, spacing="adaptive", shape=(1, 2, 2)))


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_the_default_sampler_of_images_follows_the_scale_of_data(scale):
    here, there = (
        trajectories(
            GaussianDenoiser(LogSNRSchedule(200, 0.01 * by, 1e4 * by), [0.0, 0.0], [by**2, 0.04 * by**2]), 20,
            make_sampler("sa2").suited(by**2), [200, 120, 90, 70, 40, 10, 0], (2,), units="model",
        ) / by
        for by in (1.0, scale)
    )  # fmt: skip
    assert torch.allclose(here, there, rtol=1e-4, atol=1e-5)
