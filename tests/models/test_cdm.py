"""The classifier of an exact mixture satisfies the identities of the method at every level of every schedule."""

import math

import pytest
import torch
from oracles import SCHEDULES, MixtureClassifier, ZeroBackbone, labelled_mixture, mixture_at_level, normal, rng
from torch import nn

from studies.exact import GaussianMixture
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import LogSNRSchedule, UniformSigmaSchedule
from torchcdm.errors import UserError
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import DenoisingDiffusion, GuidedDenoiser
from torchcdm.networks.mlp import MLP
from torchcdm.units import DataTransform

T = 30
MIXTURE = labelled_mixture()
every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_base = pytest.mark.parametrize("fitted", [False, True], ids=["identity 1", "gaussian residual"])


def exact_model(schedule, fitted=False, joint=False, transform=None):
    """The mixture's Bayes classifier; ``fitted`` writes it as a correction to a fitted Gaussian."""
    base = GaussianMarginals.fit(MIXTURE.sample(2000, rng()), schedule) if fitted else None
    classifier = MixtureClassifier(MIXTURE, schedule, base, joint)
    prior = MIXTURE.class_prior if joint else None
    return ClassificationDiffusion(classifier, schedule, transform, base, class_prior=prior)


def posterior_mean(x, t, schedule):
    """E[x_0 | x_t] by conditioning each component's joint Gaussian of (x_0, x_t)."""
    alpha, sigma = schedule.alpha[t], schedule.sigma[t]
    marginal = mixture_at_level(MIXTURE, schedule, t)
    parts = marginal.component_distribution
    share = (parts.log_prob(x[:, None]) + MIXTURE.log_weights).softmax(1)
    dense = MIXTURE.vectors @ torch.diag_embed(MIXTURE.variances) @ MIXTURE.vectors.mT
    gain = alpha * dense @ torch.linalg.inv(parts.covariance_matrix) if sigma > 0 else torch.eye(2).double()
    shift = torch.einsum("kij,bkj->bki", gain.expand(3, 2, 2), x[:, None] - alpha * MIXTURE.means)
    return (share[..., None] * (MIXTURE.means + shift)).sum(1)


# --- identities ----------------------------------------------------------------------------------------------


@every_schedule
@every_base
def test_identities_1_to_4_at_every_level(name, fitted):
    schedule = SCHEDULES[name](T)
    model = exact_model(schedule, fitted)
    x = (1.5 * normal(16, 2)).requires_grad_()
    levels = model.log_prob_levels(x)
    for t in range(T + 2):
        truth = mixture_at_level(MIXTURE, schedule, t).log_prob(x)
        (score,) = torch.autograd.grad(truth.sum(), x)
        prediction = model.denoise(x, t)
        assert torch.allclose(levels[:, t], truth, atol=1e-9)
        assert torch.allclose(prediction.eps, -schedule.sigma[t] * score, atol=1e-8)
        if t > 0:
            assert torch.allclose(prediction.score, score, atol=1e-7)
        if t <= T:
            assert torch.allclose(prediction.x0, posterior_mean(x.detach(), t, schedule), atol=1e-6)


@every_schedule
def test_identity_2_is_the_gradient_of_log_prob(name):
    model = exact_model(SCHEDULES[name](T), fitted=True)
    x = normal(8, 2).requires_grad_()
    for t in (1, 7, T):
        (score,) = torch.autograd.grad(model.log_prob(x, t).sum(), x)
        assert torch.allclose(model.denoise(x, t).score, score, atol=1e-8)


def flow_log_prob(model, x_1):
    """log p_1 by the probability flow from level 1 to level T, Heun on the levels, exact divergence.

    In v = x / (alpha² + sigma²)^½ and the angle atan(r), in which identity 6 reads dv / d angle =
    cos eps - sin x_0. In r itself the last levels of most schedules double r, however many levels there are.
    """
    schedule = model.schedule
    alpha, sigma, angle = schedule.alpha, schedule.sigma, schedule.ratio.atan()
    scale = (alpha**2 + sigma**2).sqrt()

    def slope(v, t):
        x = (scale[t] * v).requires_grad_()
        eps = model.evaluate(x, t, None, graph=True).eps
        rate = (alpha[t] * eps - sigma[t] * (x - sigma[t] * eps) / alpha[t]) / scale[t]
        rows = [torch.autograd.grad(rate[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2)]
        return rate.detach(), -scale[t] * sum(rows)

    v, change = x_1 / scale[1], 0
    for t in range(1, schedule.T):
        step = angle[t + 1] - angle[t]
        here, change_here = slope(v, t)
        there, change_there = slope(v + step * here, t + 1)
        v = v + step / 2 * (here + there)
        change = change + step / 2 * (change_here + change_there)
    end = mixture_at_level(MIXTURE, schedule, schedule.T).log_prob(scale[schedule.T] * v)
    return end + 2 * scale[schedule.T].log() - change - 2 * scale[1].log()


@every_schedule
def test_identity_6_probability_flow_gives_the_density(name):
    errors = []
    for levels in (50, 100):
        model = exact_model(SCHEDULES[name](levels))
        x_1 = model.schedule.perturb(MIXTURE.sample(6, rng(1)), 1, normal(6, 2))
        errors.append(float((flow_log_prob(model, x_1) - model.log_prob_levels(x_1)[:, 1]).abs().max()))
    # Of second order: what is left is the step, not the identity.
    assert errors[1] < 0.01 and errors[0] / errors[1] > 3


@every_schedule
def test_identity_9_density_of_data_under_noise_of_known_size(name):
    # y = x_0 + r_t n is x_t / alpha_t: the density of y is the model's at level t, in the unit of the data.
    schedule = SCHEDULES[name](T)
    model, y = exact_model(schedule, fitted=True), 2 * normal(9, 2)
    clean = mixture_at_level(MIXTURE, schedule, 0)
    for t in range(T + 1):
        wider = clean.component_distribution.covariance_matrix + schedule.ratio[t] ** 2 * torch.eye(2).double()
        parts = torch.distributions.MultivariateNormal(MIXTURE.means, wider)
        truth = torch.distributions.MixtureSameFamily(clean.mixture_distribution, parts).log_prob(y)
        alpha_t = schedule.alpha[t]
        assert torch.allclose(model.log_prob(alpha_t * y, t) + 2 * alpha_t.log(), truth, atol=1e-9)


@every_schedule
def test_identity_9_denoising_an_unknown_level_in_one_backward_pass(name):
    schedule = SCHEDULES[name](T)
    model, x = exact_model(schedule, fitted=True), normal(9, 2).requires_grad_()
    # Truth: the mean over all levels below pure noise of E[x_0 | x_t = x], by weight of their densities.
    densities = torch.stack([mixture_at_level(MIXTURE, schedule, t).log_prob(x) for t in range(T + 1)], 1)
    means = torch.stack([posterior_mean(x.detach(), t, schedule) for t in range(T + 1)], 1)
    truth = (densities.softmax(1)[..., None] * means).sum(1)
    log_p = model.log_prob_levels(x)[:, :-1]
    share = log_p.softmax(1).detach() / schedule.alpha[:-1]
    (gradient,) = torch.autograd.grad((share * schedule.sigma[:-1] ** 2 * log_p).sum(), x)
    assert torch.allclose(share.sum(1, keepdim=True) * x + gradient, truth, atol=1e-8)


@every_schedule
@pytest.mark.parametrize("fitted", [False, True])
def test_identity_10_joint_logits(name, fitted):
    schedule = SCHEDULES[name](T)
    model = exact_model(schedule, fitted, joint=True)
    x = normal(7, 2)
    by_class, prior = model.class_log_prob_levels(x), MIXTURE.class_prior
    assert prior.tolist() == pytest.approx([0.5, 0.5])
    y = torch.tensor([0, 1, 0, 1, 0, 1, 0])
    for t in range(T + 2):
        marginal = mixture_at_level(MIXTURE, schedule, t)
        parts = marginal.component_distribution.log_prob(x[:, None]) + MIXTURE.log_weights
        joint = torch.stack([parts[:, 0], parts[:, 1:].logsumexp(1)], 1)  # log p(y) + log p_t(x | y)
        assert torch.allclose(by_class[:, :, t], joint - prior.log(), atol=1e-9)
        assert torch.allclose(model.log_prob_levels(x)[:, t], marginal.log_prob(x), atol=1e-9)
        assert torch.allclose(model.log_prob_levels(x, y)[:, t], by_class[torch.arange(7), y, t], atol=1e-12)
        assert torch.allclose(model.class_posterior(x, t), joint.softmax(1), atol=1e-9)
    # At level T+1 the classes are one: all densities agree.
    assert torch.allclose(by_class[:, 0, -1], by_class[:, 1, -1], atol=1e-12)


@pytest.mark.parametrize("joint", [False, True])
def test_null_label_of_losses_is_no_label(joint):
    model = exact_model(LogSNRSchedule(T), joint=joint)
    x, null = normal(5, 2), torch.full((5,), 2)
    assert torch.allclose(model.conditional_and_marginal(x, null)[0], model.log_prob_levels(x), atol=1e-12)
    assert torch.allclose(model.evaluate(x, 9, null, check=False).eps, model.denoise(x, 9).eps, atol=1e-12)


def test_class_prior_of_unequal_classes():
    mixture = GaussianMixture(torch.tensor([0.8, 0.2]), normal(2, 2), torch.tensor([0.1, 0.2]), torch.tensor([0, 1]))
    schedule, x = UniformSigmaSchedule(T), normal(5, 2)
    classifier = MixtureClassifier(mixture, schedule, joint=True)
    right = ClassificationDiffusion(classifier, schedule, class_prior=mixture.class_prior)
    assert torch.allclose(right.log_prob_levels(x), mixture.log_prob_levels(x, schedule), atol=1e-6)


@every_schedule
def test_posterior_over_levels_is_calibrated(name):
    # logits are log p(t | x): among samples from all levels, the mean of p(t | x) is the share of level t, and the
    # classifier is right as often as it believes.
    schedule = SCHEDULES[name](T)
    model, n = exact_model(schedule), 20_000
    t = torch.arange(n) % (T + 2)
    x_t = schedule.perturb(MIXTURE.sample(n, rng(3)), t, normal(n, 2, seed=4))
    belief = model.log_prob_levels(x_t).softmax(1)
    assert torch.allclose(belief.mean(0), torch.full((T + 2,), 1 / (T + 2)).double(), atol=0.004)
    right = (belief.argmax(1) == t).double().mean()
    assert right == pytest.approx(float(belief.amax(1).mean()), abs=3 * 0.5 / math.sqrt(n))


# --- densities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ot", "log-snr"])
def test_density_integrates_to_one_in_data_units(name):
    scale = torch.tensor([30.0, 0.02], dtype=torch.float64)
    transform = DataTransform((2,), shift=torch.tensor([500.0, -3.0]), scale=scale)
    model = exact_model(SCHEDULES[name](T), fitted=True, joint=True, transform=transform)
    axis = torch.linspace(-6, 6, 121, dtype=torch.float64)
    x = transform.inverse(torch.cartesian_prod(axis, axis))
    cell = float(scale.prod()) * (axis[1] - axis[0]) ** 2
    with torch.no_grad():
        for t in (0, 1, T // 2, T + 1):
            assert model.log_prob(x, t).exp().sum() * cell == pytest.approx(1, abs=1e-4)
        y = torch.ones(len(x), dtype=torch.long)
        assert model.log_prob(x, 0, y).exp().sum() * cell == pytest.approx(1, abs=1e-4)


def test_log_prob_changes_units_by_the_log_determinant():
    transform = DataTransform((2,), shift=3.0, scale=torch.tensor([2.0, 10.0]))
    model = exact_model(UniformSigmaSchedule(T), transform=transform)
    x = 5 * normal(4, 2)
    in_model = model.log_prob(transform(x), 2, units="model")
    assert torch.allclose(model.log_prob(x, 2), in_model - math.log(20), atol=1e-12)


class Network(nn.Module):
    """A small network whose last layer starts at zero."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 16), nn.SiLU())
        self.head = nn.Linear(16, levels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        return self.head(self.body(x))


@every_schedule
def test_before_the_first_step_the_model_is_the_fitted_gaussian(name):
    schedule = SCHEDULES[name](T)
    data = MIXTURE.sample(500, rng())
    model = ClassificationDiffusion(Network(T + 2), schedule, gaussian=GaussianMarginals.fit(data, schedule))
    truth = torch.distributions.MultivariateNormal(data.mean(0), torch.cov(data.T, correction=0))
    x = data[:50].float()
    assert (model.log_prob(x) - truth.log_prob(x.double())).abs().max() < 1e-8
    noise = torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    assert (model.log_prob(x, T + 1) - noise.log_prob(x.double())).abs().max() < 1e-8


def test_a_term_that_all_levels_share_changes_nothing():
    class Shifted(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + 100 * x.square().sum(1, keepdim=True).sin()

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, T + 2)).double()
    plain, shifted = (ClassificationDiffusion(b, UniformSigmaSchedule(T)) for b in (network, Shifted(network)))
    x = normal(6, 2)
    assert torch.allclose(plain.log_prob_levels(x), shifted.log_prob_levels(x), atol=1e-10)
    assert torch.allclose(plain.denoise(x, 9).eps, shifted.denoise(x, 9).eps, atol=1e-10)


def test_level_for_each_sample():
    model = exact_model(LogSNRSchedule(T), fitted=True)
    x, t = normal(6, 2), torch.tensor([0, 1, 5, 20, T, T + 1])
    each = torch.cat([model.denoise(x[i : i + 1], int(t[i])).eps for i in range(6)])
    assert torch.allclose(model.denoise(x, t).eps, each, atol=1e-12)


# --- guidance ------------------------------------------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize("weight", [0.0, 0.7, 3.0])
def test_guidance_in_one_pass_equals_guidance_in_two(name, weight):
    schedule = SCHEDULES[name](T)
    one = exact_model(schedule, fitted=True, joint=True)
    two = exact_model(schedule, fitted=True)
    x, y, passes = normal(9, 2), torch.arange(9) % 2, []
    for model in (one, two):
        model.backbone.register_forward_hook(lambda *_: passes.append(1))
        GuidedDenoiser(model, weight).denoise(x, 3, y)
    assert len(passes) == 1 + (2 if weight else 1)
    for t in (1, 10, T):
        marginal = lambda x, t=t: mixture_at_level(MIXTURE, schedule, t).log_prob(x)  # noqa: E731
        eps = GuidedDenoiser(one, weight).denoise(x, t, y).eps
        assert torch.allclose(eps, GuidedDenoiser(two, weight).denoise(x, t, y).eps, atol=1e-9)
        # Identity 8 from the densities themselves.
        z = x.clone().requires_grad_()
        given = MIXTURE.log_prob(z, t, schedule, y)
        (score,) = torch.autograd.grad(((1 + weight) * given - weight * marginal(z)).sum(), z)
        assert torch.allclose(eps, -schedule.sigma[t] * score, atol=1e-8)


def test_guidance_without_labels_is_a_mistake():
    for joint in (False, True):
        with pytest.raises(UserError, match="give y"):
            GuidedDenoiser(exact_model(UniformSigmaSchedule(T), joint=joint), 1.0).denoise(normal(2, 2), 3)
    unconditional = ClassificationDiffusion(ZeroBackbone(T + 2), UniformSigmaSchedule(T))
    with pytest.raises(UserError, match="without labels"):
        GuidedDenoiser(unconditional, 1.0)


# --- gradients and precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("joint", [False, True])
def test_guided_denoising_keeps_no_graph(joint):
    # With one a step takes twice as long, and a sampler the memory of all its steps.
    model = exact_model(UniformSigmaSchedule(T), joint=joint)
    model.backbone.register_parameter("bias", nn.Parameter(torch.zeros(()).double()))
    model.backbone.register_forward_hook(lambda network, _, logits: logits + network.bias)
    eps = GuidedDenoiser(model, 1.0).denoise(normal(2, 2), 3, torch.tensor([0, 1])).eps
    assert not eps.requires_grad and eps.grad_fn is None


def test_denoising_keeps_no_graph_and_works_without_gradients():
    model = ClassificationDiffusion(Network(T + 2), UniformSigmaSchedule(T))
    nn.init.normal_(model.backbone.head.weight)
    x = normal(4, 2).float()
    free = model.denoise(x, 5).eps
    with torch.no_grad():
        assert torch.equal(model.denoise(x, 5).eps, free)
        assert not torch.is_grad_enabled()
    assert not free.requires_grad and all(p.grad is None for p in model.parameters())
    # Not even of the part that has a closed form: a derivative of half the formula is wrong without a word.
    seen = model.denoise(x.clone().requires_grad_(), 5)
    assert not seen.eps.requires_grad and not seen.x0.requires_grad
    with torch.inference_mode(), pytest.raises(UserError, match="no_grad"):
        model.denoise(x, 5)


@pytest.mark.parametrize("joint", [False, True])
def test_both_ways_to_the_gradient_agree(joint):
    model = exact_model(LogSNRSchedule(T), fitted=True, joint=joint)
    x, y = normal(5, 2), torch.tensor([0, 1, 1, 0, 1])
    kept, plain = model.evaluate(x, 7, y, graph=True), model.evaluate(x, 7, y)
    for name in ("eps", "log_prob_levels", "unconditional"):
        assert torch.allclose(getattr(kept, name), getattr(plain, name), atol=1e-10)
        assert not getattr(plain, name).requires_grad
    assert torch.allclose(plain.log_prob_levels, model.log_prob_levels(x, y), atol=1e-12)


def test_low_precision_networks_give_full_precision_logits():
    class Half(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), T + 2, dtype=torch.bfloat16) + x.sum(1, keepdim=True).bfloat16()

    model = ClassificationDiffusion(Half(), UniformSigmaSchedule(T))
    x = 20 + normal(4, 2).float()
    truth = torch.distributions.Normal(0, 1).log_prob(x.double()).sum(1)
    assert model.log_prob(x).dtype == torch.float64
    assert torch.allclose(model.log_prob(x), truth, atol=1e-9)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_constants_of_levels_and_classes_are_not_rounded(half):
    # In bfloat16 these were off by up to 0.06 nats, about as much as the network itself that draws digits.
    model = exact_model(UniformSigmaSchedule(T), joint=True)
    model.level_constants += torch.linspace(0, 30, T + 2)
    before = {key: value.clone() for key, value in model.named_buffers(recurse=False)}
    model.to(half)
    assert set(before) == {"level_constants", "log_class_prior"}
    for key, value in before.items():
        assert torch.equal(getattr(model, key), value)


def test_mistakes_are_named():
    model = exact_model(UniformSigmaSchedule(T), transform=DataTransform((2,)))
    with pytest.raises(UserError, match="data or model"):
        model.log_prob(normal(2, 2), units="bits")
    with pytest.raises(UserError, match=f"levels are 0 ... {T + 1}"):
        model.log_prob(normal(2, 2), t=T + 2)
    with pytest.raises(UserError, match="takes"):
        model.log_prob(normal(2, 3))
    with pytest.raises(UserError, match="joint head"):
        model.class_log_prob_levels(normal(2, 2))
    network = MLP(2, T + 2, width=4, depth=1, classes=2, joint=True)
    for prior in ([1.0], [1.0, 2.0, 3.0], [-1.0, 2.0], [0.0, 0.0]):
        with pytest.raises(UserError, match="class_prior: 2 numbers are needed, none negative"):
            ClassificationDiffusion(network, UniformSigmaSchedule(T), class_prior=torch.tensor(prior))
    with pytest.raises(UserError, match="distribution: no option 'seed'"):
        model.distribution(seed=3)
    for kind in (ClassificationDiffusion, DenoisingDiffusion):
        with pytest.raises(UserError, match="schedule is of type MLP; give the network, then a NoiseSchedule"):
            kind(UniformSigmaSchedule(T), MLP(2, T + 2))


def test_conversions_go_round():
    # Around the table and back, at a level where all four quantities exist (identities 3 to 5).
    schedule, x, eps = SCHEDULES["ot"](T), normal(4, 2), normal(4, 2, seed=1)
    at = schedule.at(7, x)
    truth = Prediction(x, *at, eps)
    assert torch.allclose(truth.velocity, eps - truth.x0, atol=1e-12)
    assert torch.allclose(-at[1] * truth.score, eps, atol=1e-12)
    assert torch.allclose(schedule.perturb(truth.x0, 7, eps), x, atol=1e-12)
    assert torch.allclose(Prediction.of_x0(x, *at, truth.x0).eps, eps, atol=1e-12)


@pytest.mark.parametrize("levels", [1, 7, 9])
def test_a_backbone_with_another_number_of_logits_is_refused(levels):
    model = ClassificationDiffusion(ZeroBackbone(levels), UniformSigmaSchedule(6))
    with pytest.raises(UserError, match=f"the backbone gives {levels} logits; the schedule has 8 levels"):
        model.log_prob(torch.zeros(2, 3))
