"""Losses against truth: the Bayes classifier, the Bayes error, and gradients that the terms add up to."""

import math

import pytest
import torch
from oracles import SCHEDULES, MixtureClassifier, ZeroBackbone, labelled_mixture, normal, rng
from torch import nn

from torchcdm.diffusion.gaussian import GaussianMarginals, MatrixRotation
from torchcdm.diffusion.schedules import CosineSchedule, OptimalTransportSchedule, UniformSigmaSchedule
from torchcdm.errors import UserError
from torchcdm.losses import CDMLoss, DDMLoss, stratified_levels
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import DenoisingDiffusion

T = 12
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def schedule_of(name):
    return SCHEDULES[name](25 if name == "linear" else T)


def exact(mixture, schedule, joint=False):
    backbone = MixtureClassifier(mixture, schedule, joint=joint)
    prior = mixture.class_prior if joint else None
    return ClassificationDiffusion(backbone, schedule, class_prior=prior)


class Nudged(nn.Module):
    """A backbone plus an arbitrary function of (x, level), times a parameter that is 0."""

    def __init__(self, exact, levels):
        super().__init__()
        self.exact, self.size = exact, nn.Parameter(torch.zeros(()).double())
        self.joint, self.classes = exact.joint, exact.classes
        self.phase = torch.linspace(0, 5, levels).double()

    def forward(self, x, y=None):
        direction = torch.sin(x[:, :1] + 2 * x[:, 1:] + self.phase)
        if self.joint:
            classes = torch.arange(self.classes).double()
            direction = direction[:, None] * torch.cos(2 * classes)[:, None]
        return self.exact(x, y) + self.size * direction


class Embedded(nn.Module):
    """A small conditional network, the last row of its embedding the null label."""

    classes = 3

    def __init__(self, levels, dim=4):
        super().__init__()
        generator = rng(2)
        self.first, self.last = nn.Linear(dim, 8).double(), nn.Linear(8, levels).double()
        self.embedding = nn.Embedding(4, 8).double()
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)

    def forward(self, x, y=None):
        y = torch.full((len(x),), 3) if y is None else y
        return self.last(nn.functional.silu(self.first(x) + self.embedding(y)))


def uninformative(schedule, classes=None):
    """Standard normal data under a variance-preserving schedule: every level looks the same."""
    backbone = ZeroBackbone(schedule.T + 2)
    if classes is not None:
        backbone.joint, backbone.classes = True, classes
        backbone.forward = lambda x, y=None: 0 * x.flatten(1).sum(1)[:, None, None].expand(-1, classes, schedule.T + 2)
    return ClassificationDiffusion(backbone, schedule)


# --- truth ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joint", [False, True])
@every_schedule
def test_cross_entropy_cannot_be_lowered_at_the_bayes_classifier(name, joint):
    schedule, mixture, n = schedule_of(name), labelled_mixture(), 6000
    model = exact(mixture, schedule, joint)
    model.backbone = Nudged(model.backbone, schedule.T + 2)
    x, y = mixture.sample_labelled(n, rng(1))
    # With labels under a joint backbone, the loss is the cross-entropy of (class, level).
    labels = y if joint else None

    def terms():
        return CDMLoss(model, mse_weight=0)(x, labels, generator=rng(2))["loss"] * 2

    def slope():
        rows = terms()
        # (d/ds) of each sample's term, by one backward pass: s enters every sample alone.
        weights = torch.ones(n, dtype=torch.float64, requires_grad=True)
        (total,) = torch.autograd.grad((weights * rows).sum(), model.backbone.size, create_graph=True)
        (each,) = torch.autograd.grad(total, weights)
        return each

    each = slope()
    assert abs(each.mean()) < 4 * each.std() / math.sqrt(n)
    best = terms().mean()
    for size in (-0.4, 0.4):
        model.backbone.size.data.fill_(size)
        assert terms().mean() > best + 1e-3


@pytest.mark.parametrize("name", ["cosine", "ot", "log-snr"])
def test_squared_error_is_the_bayes_error_of_a_gaussian(name):
    schedule, n = schedule_of(name), 20_000
    variance, mean = torch.tensor([0.25, 2.0, 0.01]).double(), torch.tensor([0.7, -1.0, 0.2]).double()
    rotation = MatrixRotation((3,), torch.eye(3))
    model = ClassificationDiffusion(
        ZeroBackbone(schedule.T + 2), schedule, gaussian=GaussianMarginals(schedule, mean, variance, rotation)
    )
    loss = CDMLoss(model)
    x_0 = mean + variance.sqrt() * normal(n, 3)
    for t in range(schedule.T + 2):
        mse = loss(x_0, t=torch.full((n,), t), generator=rng(t))["mse"]
        # Var(eps | x_t) for jointly Gaussian x_0 and eps; 1 at level 0, 0 at level T+1.
        signal = schedule.alpha[t] ** 2 * variance
        truth = (signal / (signal + schedule.sigma[t] ** 2)).mean()
        assert abs(mse.mean() - truth) <= 4 * mse.std() / math.sqrt(n) + 1e-12


def test_uninformative_levels_cost_the_logarithm_of_their_number():
    schedule = CosineSchedule(T)
    terms = CDMLoss(uninformative(schedule), ce_weight=3.0, mse_weight=0)(normal(50, 7))
    assert torch.allclose(terms["ce"], torch.full((50,), math.log(T + 2)).double())
    # The cross-entropy is for the whole sample, the squared error a mean over its d = 7 dimensions.
    assert torch.allclose(terms["loss"], 3 / 7 * terms["ce"])


def test_uninformative_classes_cost_their_logarithm_except_in_pure_noise():
    schedule, classes = CosineSchedule(T), 4
    loss = CDMLoss(uninformative(schedule, classes), label_dropout=0.0)
    t = torch.arange(T + 2)
    terms = loss(normal(T + 2, 3), torch.arange(T + 2) % classes, t=t)
    joint = torch.full((T + 2,), math.log(T + 2) + math.log(classes)).double()
    joint[-1] = math.log(T + 2)  # at level T+1 the classes are one outcome
    assert torch.allclose(terms["ce_joint"], joint)
    assert torch.allclose(terms["ce"], torch.full((T + 2,), math.log(T + 2)).double())
    null = loss(normal(T + 2, 3), torch.full((T + 2,), classes), t=t)
    assert torch.allclose(null["ce_joint"], null["ce"])


def test_probabilities_of_all_joint_outcomes_add_up_to_one():
    schedule, mixture = UniformSigmaSchedule(T), labelled_mixture()
    loss, x = CDMLoss(exact(mixture, schedule, joint=True), mse_weight=0, label_dropout=0.0), normal(1, 2)
    total = 0.0
    for t in range(T + 2):
        # The same x_t at every level, by the noise that leads there.
        x_0 = torch.zeros(1, 2).double()
        eps = x / schedule.sigma[t] if t else torch.zeros_like(x)
        for y in range(1 if t == T + 1 else mixture.classes):
            start = x if t == 0 else x_0
            terms = loss(start, torch.tensor([y]), torch.tensor([t]), eps)
            total += float((-terms["ce_joint"]).exp())
    assert total == pytest.approx(1, abs=1e-9)


def test_levels_told_apart_are_counted_as_correct():
    # Data that are all 0, beside noise of deviation 0.5 and 1: the first is certain, the others overlap.
    schedule, mixture = OptimalTransportSchedule(2), labelled_mixture()
    mixture.means.zero_()
    mixture.variances.fill_(1e-12)
    terms = CDMLoss(exact(mixture, schedule), mse_weight=0)(
        torch.zeros(300, 2).double(), t=torch.arange(300) % 3, generator=rng()
    )
    clean = terms["t"] == 0
    assert terms["correct"][clean].all() and terms["ce"][clean].max() < 1e-6
    assert 0.4 < terms["correct"][~clean].mean() < 1


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_training_finds_the_parameter_of_the_data(weights):
    # Either term alone identifies the mean of Gaussian data, through one and through two derivatives.
    schedule, truth = CosineSchedule(T), torch.tensor([0.7, -0.4]).double()

    class Located(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = nn.Parameter(torch.zeros(2).double())

        def forward(self, x):
            # log N(x; alpha mean, I) - log N(x; 0, I)
            centres = schedule.alpha[:, None] * self.mean
            return x @ centres.T - 0.5 * centres.square().sum(1)

    backbone = Located()
    loss = CDMLoss(ClassificationDiffusion(backbone, schedule), *weights)
    optimizer = torch.optim.Adam(backbone.parameters(), lr=0.05)
    generator, path = rng(3), []
    for _ in range(150):
        x_0 = truth + torch.randn(512, 2, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        loss(x_0, generator=generator)["loss"].mean().backward()
        optimizer.step()
        path.append(backbone.mean.detach().clone())
    assert torch.allclose(torch.stack(path[-50:]).mean(0), truth, atol=0.05)


# --- gradients -----------------------------------------------------------------------------------------------------


def gradient_of(ce_weight, mse_weight, x, y, t, eps):
    model = ClassificationDiffusion(Embedded(T + 2), CosineSchedule(T))
    loss = CDMLoss(model, ce_weight, mse_weight, label_dropout=0.0)
    terms = loss(x, y, t, eps)
    terms["loss"].mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), terms


def test_gradient_is_the_weighted_sum_of_its_terms():
    x, eps, y, t = normal(20, 4), normal(20, 4, seed=1), torch.arange(20) % 4, torch.arange(20) % (T + 2)
    ce, only_ce = gradient_of(1.0, 0.0, x, y, t, eps)
    mse, only_mse = gradient_of(0.0, 1.0, x, y, t, eps)
    both, terms = gradient_of(2.0, 3.0, x, y, t, eps)
    assert torch.allclose(both, 2 * ce + 3 * mse, atol=1e-12)
    # Cross-entropy alone takes no second derivative, and reports no error of the noise.
    assert not only_ce["mse"].any() and torch.allclose(only_ce["ce"], terms["ce"])
    assert torch.allclose(only_mse["loss"], terms["mse"])
    # d = 4: the mean over d stands beside the cross-entropy of the whole sample.
    assert torch.allclose(terms["loss"], 3 * terms["mse"] + 2 * terms["ce"] / 4)


def test_logits_are_trained_once_their_share_of_the_training_has_come():
    x, eps, t = normal(20, 4), normal(20, 4, seed=1), torch.arange(20) % (T + 2)
    model = ClassificationDiffusion(Embedded(T + 2), CosineSchedule(T))
    loss = CDMLoss(model, 2.0, 1.0, time_weight=0.5, logits_from=(0.5, 0.9))
    for done, share in ((0.0, 0.0), (0.5, 0.0), (0.7, 0.5), (0.9, 1.0), (1.0, 1.0)):
        loss.advance(done)
        terms = loss(x, None, t, eps)
        assert ("time" in terms) == (share > 0)  # not computed where they do not count
        logits = (2 * terms["ce"] + 0.5 * terms.get("time", 0.0)) / 4
        assert torch.allclose(terms["loss"], terms["mse"] + share * logits), done
    assert "logits_share" not in loss.state_dict()


@pytest.mark.parametrize("shares", [(0.5,), (0.9, 0.5), (-0.1, 0.5), (0.5, 1.1)])
def test_shares_of_the_training_that_are_none(shares):
    with pytest.raises(UserError, match="logits_from"):
        CDMLoss(uninformative(CosineSchedule(T)), logits_from=shares)


@pytest.mark.parametrize("weights", [(-1.0, 1.0), (1.0, -1.0), (0.0, 0.0)])
def test_weights_that_make_no_loss(weights):
    with pytest.raises(UserError, match="_weight"):
        CDMLoss(uninformative(CosineSchedule(T)), *weights)


def test_cross_entropy_alone_does_not_wait():
    with pytest.raises(UserError, match="mse_weight"):
        CDMLoss(uninformative(CosineSchedule(T)), mse_weight=0.0, logits_from=(0.5, 0.9))


def test_second_derivative_matches_finite_differences():
    x, eps, y, t = normal(6, 4), normal(6, 4, seed=1), torch.arange(6) % 4, torch.tensor([0, 1, 4, 8, T, T + 1])
    model = ClassificationDiffusion(Embedded(T + 2), CosineSchedule(T))
    loss = CDMLoss(model, 1.0, label_dropout=0.0)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss(x, y, t, eps)["loss"].sum(), parameters)
    for k, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        direction = normal(*parameter.shape, seed=k)
        values = []
        for step in (1e-5, -1e-5):
            parameter.data.add_(direction, alpha=step)
            values.append(loss(x, y, t, eps)["loss"].sum().item())
            parameter.data.sub_(direction, alpha=step)
        slope, size = (values[0] - values[1]) / 2e-5, (gradient.norm() * direction.norm()).item()
        assert (gradient * direction).sum().item() == pytest.approx(slope, abs=1e-5 * size + 1e-8)


def test_the_ends_teach_the_squared_error_nothing():
    # Level 0 has no noise to find, level T+1 nothing but: their errors are constants.
    x, eps = normal(10, 4), normal(10, 4, seed=1)
    for t, value in ((0, eps.square().mean(1)), (T + 1, torch.zeros(10).double())):
        gradient, terms = gradient_of(0.0, 1.0, x, torch.zeros(10).long(), torch.full((10,), t), eps)
        assert not gradient.any()
        assert torch.allclose(terms["mse"], value, atol=1e-24)


# --- labels and levels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "taught"), [(0.0, False), (0.3, True)])
@pytest.mark.parametrize("kind", ["cdm", "ddm"])
def test_label_dropout_teaches_the_null_label(kind, rate, taught):
    # The published code drops labels in validation only: its null label never gets a gradient.
    x, y = normal(60, 4), torch.arange(60) % 3
    if kind == "cdm":
        model = ClassificationDiffusion(Embedded(T + 2), CosineSchedule(T))
        loss = CDMLoss(model, label_dropout=rate)
    else:

        class Estimate(Embedded):
            def forward(self, x, t, y=None):
                return super().forward(x, y)

        model = DenoisingDiffusion(Estimate(4), CosineSchedule(T))
        loss = DDMLoss(model, label_dropout=rate)
    loss(x, y, generator=rng())["loss"].mean().backward()
    gradient = model.backbone.embedding.weight.grad
    assert bool(gradient[3].any()) == taught and gradient[:3].any(1).all()


def test_dropping_every_label_is_training_without_labels():
    x, eps, t = normal(20, 4), normal(20, 4, seed=1), torch.arange(20) % (T + 2)
    loss = CDMLoss(ClassificationDiffusion(Embedded(T + 2), CosineSchedule(T)), label_dropout=1.0)
    dropped, without = loss(x, torch.arange(20) % 3, t, eps), loss(x, None, t, eps)
    assert all(torch.equal(dropped[name], without[name]) for name in without)


def test_share_of_dropped_labels(monkeypatch):
    x, y = normal(20_000, 4), torch.arange(20_000) % 3
    loss = CDMLoss(ClassificationDiffusion(Embedded(T + 2), CosineSchedule(T)), label_dropout=0.1)
    monkeypatch.setattr(loss, "terms", lambda x_t, t, y, eps: y)
    dropped = loss(x, y, generator=rng())
    assert (dropped == 3).double().mean() == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / 20_000))
    assert torch.equal(dropped[dropped != 3], y[dropped != 3])
    assert y.max() == 2  # the caller's labels stay as they are


@pytest.mark.parametrize(("n", "count"), [(42, 14), (128, 1002), (100, 7)])
def test_levels_are_uniform_and_spread_over_the_batch(n, count):
    draws = torch.stack([stratified_levels(n, count, rng(seed)) for seed in range(400)])
    assert draws.min() >= 0 and draws.max() < count
    if n % count == 0:
        assert (torch.stack([row.bincount(minlength=count) for row in draws]) == n // count).all()
    # Each place in the batch has the uniform distribution: chi squared of ten parts of the range.
    for place in (0, n - 1):
        part = (draws[:, place] * 10 // count).bincount(minlength=10).double()
        share = torch.tensor([sum(k * 10 // count == j for k in range(count)) / count for j in range(10)])
        expected = 400 * share[share > 0]
        assert ((part[share > 0] - expected) ** 2 / expected).sum() < 30


def test_every_level_gets_its_share():
    # 1002 levels and a batch of 128: the boundaries of the strata must not favour a level.
    counts = torch.zeros(1002)
    generator = rng()
    for _ in range(4000):
        counts += stratified_levels(128, 1002, generator).bincount(minlength=1002)
    expected = 4000 * 128 / 1002
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)


def test_one_seed_gives_one_loss():
    loss = CDMLoss(ClassificationDiffusion(Embedded(T + 2), CosineSchedule(T)), label_dropout=0.5)
    x, y = normal(30, 4), torch.arange(30) % 3
    first, again, other = (loss(x, y, generator=rng(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["loss"], other["loss"])


def test_images_and_vectors_of_the_same_pixels_have_the_same_loss():
    schedule, x, eps, t = CosineSchedule(T), normal(8, 12), normal(8, 12, seed=1), torch.arange(8)

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Embedded(T + 2, 12)

        def forward(self, x):
            return self.inner(x.flatten(1))

    loss = CDMLoss(ClassificationDiffusion(Flat(), schedule))
    flat, image = loss(x, None, t, eps), loss(x.reshape(8, 3, 2, 2), None, t, eps.reshape(8, 3, 2, 2))
    assert all(torch.allclose(flat[name], image[name], atol=1e-12) for name in flat)
