"""Anomaly scores of models that are exact: every number has a truth, or a property that a wrong one would break."""

import numpy as np
import pytest
import torch
from oracles import MixtureClassifier, ZeroBackbone, labelled_mixture, mixture_at_level, normal, rng
from sklearn.metrics import roc_auc_score
from torch import nn

from studies.exact import GaussianMixture
from torchcdm import ClassificationDiffusion, DenoisingDiffusion, UserError
from torchcdm.apps.anomaly import SCORES, AnomalyDetector, level_profile
from torchcdm.apps.anomaly.scores import (
    MOST_POSTERIORS,
    best_kind,
    coarse_level,
    fit_increments,
    log_distances,
)
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.schedules import LogSNRSchedule, UniformSigmaSchedule
from torchcdm.random import stream
from torchcdm.units import DataTransform, GaussianizedTransform, TableEncoding

SCHEDULE = UniformSigmaSchedule(20)
SINGLE = [name for name in SCORES if name != "ratio"]
MIRROR = torch.tensor([-1.0, 1.0], dtype=torch.float64)


def exact_model(mixture, schedule=SCHEDULE, transform=None):
    transform = transform or DataTransform(mixture.shape)
    return ClassificationDiffusion(MixtureClassifier(mixture, schedule), schedule, transform)


@pytest.fixture(scope="module")
def mixture():
    return labelled_mixture()


@pytest.fixture(scope="module")
def model(mixture):
    unlabelled = GaussianMixture(mixture.log_weights.exp(), mixture.means, _covariances(mixture))
    return exact_model(unlabelled)


def joint_model(mixture):
    backbone = MixtureClassifier(mixture, SCHEDULE, joint=True)
    return ClassificationDiffusion(backbone, SCHEDULE, DataTransform(mixture.shape), None, mixture.class_prior)


@pytest.fixture(scope="module")
def joint(mixture):
    return joint_model(mixture)


def _covariances(mixture):
    return mixture.vectors @ torch.diag_embed(mixture.variances) @ mixture.vectors.mT


def scorer(name, model, reference, background=None):
    """The score alone, fitted to all of the reference."""
    detector = AnomalyDetector(name, model, background)
    return detector.learn(detector.features(reference)).score


def auroc(usual, odd):
    return roc_auc_score([0] * len(usual) + [1] * len(odd), torch.cat([usual, odd]).numpy())


# --- truth -----------------------------------------------------------------------------------------------------


def test_the_profile_is_the_density_of_the_clean_input_at_every_level(model, mixture):
    x = normal(7, 2)
    profile = level_profile(model, x)
    for t in (0, 1, 10, 20, 21):
        truth = mixture_at_level(mixture, SCHEDULE, t).log_prob(x)
        torch.testing.assert_close(profile[:, t], truth, rtol=1e-9, atol=1e-9)


def test_log_posteriors_of_the_classes_follow_the_profile_of_a_joint_model(joint, mixture):
    x = normal(7, 2)
    found = level_profile(joint, x, posteriors=True)
    assert found.shape == (7, SCHEDULE.T + 2 + MOST_POSTERIORS)
    torch.testing.assert_close(found[:, : SCHEDULE.T + 2], level_profile(joint, x), rtol=1e-9, atol=1e-9)
    posteriors = found[:, SCHEDULE.T + 2 :].unflatten(1, (2, -1))
    for number, t in ((0, 0), (-1, SCHEDULE.T)):
        truth = mixture.class_log_prob_levels(x, SCHEDULE)[:, :, t] + mixture.class_prior.log()
        torch.testing.assert_close(posteriors[:, :, number], truth.log_softmax(1))
    torch.testing.assert_close(AnomalyDetector("levels", joint).features(x), found)


@pytest.mark.parametrize(("classes", "columns"), [(10, 120), (100, 100), (200, 0)])
def test_posteriors_of_many_classes_are_those_of_few_levels(classes, columns):
    backbone = nn.Linear(2, classes * 22, bias=False)
    backbone.forward = lambda x, y=None: nn.Linear.forward(backbone, x).unflatten(1, (classes, 22))
    backbone.joint, backbone.classes = True, classes
    model = ClassificationDiffusion(backbone, SCHEDULE, DataTransform((2,)))
    assert level_profile(model, normal(3, 2).float(), posteriors=True).shape == (3, 22 + columns)


def test_the_profile_is_in_data_units_where_the_map_to_model_units_is_not_affine():
    grey = torch.randint(0, 5, (500, 1, 2, 2), generator=rng(0)).square().div(4, rounding_mode="floor")
    transform = GaussianizedTransform.fit(DataTransform.images((1, 2, 2), 5), grey.split(250))
    gaussian = GaussianMarginals.fit(transform.encode(grey.double(), rng(1)), SCHEDULE)
    model = ClassificationDiffusion(ZeroBackbone(SCHEDULE.T + 2), SCHEDULE, transform, gaussian)
    profile = level_profile(model, grey)
    noisy = transform.add_noise(torch.zeros(1, 2, 2, dtype=torch.float64), stream(0, "dequantise"))
    torch.testing.assert_close(profile[:, 0], model.log_prob(grey.double() + noisy))
    stretch = transform.log_det(grey.double() + noisy)
    assert stretch.std() > 0.1
    inside = model.log_prob_levels(transform(grey.double() + noisy))
    torch.testing.assert_close(profile, inside + stretch[:, None])


def test_typicality_is_the_distance_of_log_p_from_its_mean_over_normal_data(model, mixture):
    reference, x = mixture.sample(400, rng(1)), 3 * normal(50, 2)
    truth = mixture_at_level(mixture, SCHEDULE, 0)
    distance = (truth.log_prob(x) - truth.log_prob(reference).mean()).abs()
    torch.testing.assert_close(scorer("typicality", model, reference)(x), distance)


def test_log_p_is_split_into_the_coarse_picture_and_the_detail(model, mixture):
    reference, x = mixture.sample(20, rng(1)), normal(50, 2)
    scores = {name: scorer(name, model, reference)(x) for name in ("log_prob", "coarse", "complexity")}
    level = coarse_level(SCHEDULE)
    assert SCHEDULE.ratio[level - 1] < 0.5 <= SCHEDULE.ratio[level]
    torch.testing.assert_close(scores["coarse"], -mixture_at_level(mixture, SCHEDULE, level).log_prob(x))
    torch.testing.assert_close(scores["coarse"] + scores["complexity"], scores["log_prob"])
    torch.testing.assert_close(scores["log_prob"], -mixture_at_level(mixture, SCHEDULE, 0).log_prob(x))


def test_a_schedule_that_ends_before_the_coarse_level_uses_its_last():
    assert coarse_level(LogSNRSchedule(5, 0.01, 0.1)) == 5


def test_the_ratio_is_background_over_model_in_the_units_of_the_data(mixture):
    """Two models with different scalings and schedules: the units have to cancel."""
    broad = GaussianMixture(torch.ones(1), torch.zeros(1, 2), 4 * torch.eye(2)[None])
    scaled = DataTransform((2,), shift=1.0, scale=torch.tensor([2.0, 0.5]))
    background = exact_model(broad, UniformSigmaSchedule(7), scaled)
    unlabelled = GaussianMixture(mixture.log_weights.exp(), mixture.means, _covariances(mixture))
    x = normal(50, 2)
    score = scorer("ratio", exact_model(unlabelled), x, background)
    z = (x - 1.0) / scaled.scale
    wide = torch.distributions.MultivariateNormal(torch.zeros(2).double(), 4 * torch.eye(2).double())
    background_log_p = wide.log_prob(z) - scaled.scale.log().sum()
    torch.testing.assert_close(score(x), background_log_p - mixture_at_level(mixture, SCHEDULE, 0).log_prob(x))


def test_the_ratio_of_tables_goes_by_their_columns(mixture):
    """The background's table has them in another order: it sees the same cells, and refuses what it has not."""
    own, broad = (exact_model(mixture_, transform=DataTransform((2,))) for mixture_ in (
        GaussianMixture(mixture.log_weights.exp(), mixture.means, _covariances(mixture)),
        GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.diag(torch.tensor([4.0, 9.0]))[None])))  # fmt: skip
    own.transform.table, x = TableEncoding.numbers(["a", "b"]), normal(50, 2)
    broad.transform.table = TableEncoding.numbers(["b", "a"])
    difference = broad.log_prob(x.flip(1)) - own.log_prob(x)
    torch.testing.assert_close(scorer("ratio", own, x, broad)(x), difference)
    torch.testing.assert_close(scorer("ratio", own, x, broad)(own.transform.table.decode(x)), difference)
    broad.transform.table = TableEncoding.numbers(["b", "c"])
    with pytest.raises(UserError, match="the background: no column 'c'"):
        scorer("ratio", own, x, broad)
    broad.transform.table = None
    with pytest.raises(UserError, match="one of model and background was trained on a table"):
        AnomalyDetector("ratio", own, broad)


# --- what the scores are for -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ball():
    """A Gaussian in 40 dimensions, wide in some and narrow in others, and its exact model: data live on a shell."""
    dim = 40
    covariance = torch.diag(torch.logspace(-2, 0, dim))
    mixture = GaussianMixture(torch.ones(1), torch.zeros(1, dim), covariance[None])
    return mixture, exact_model(mixture)


def test_raw_log_p_misses_what_is_too_likely_and_the_others_do_not(ball):
    mixture, model = ball
    reference, usual = mixture.sample(500, rng(1)), mixture.sample(500, rng(2))
    too_likely = 0.3 * mixture.sample(100, rng(3))
    found = {name: scorer(name, model, reference) for name in ("log_prob", "typicality", "levels")}
    found = {name: auroc(score(usual), score(too_likely)) for name, score in found.items()}
    assert found["log_prob"] < 0.01
    assert found["typicality"] > 0.99
    assert found["levels"] > 0.8


@pytest.mark.parametrize("name", SINGLE)
def test_far_points_are_anomalous_for_every_score(model, mixture, name):
    score = scorer(name, model, mixture.sample(500, rng(1)))
    usual, far = score(mixture.sample(500, rng(2))), score(12 + normal(100, 2))
    assert far.min() > usual.max()


@pytest.mark.parametrize("kind", ["model", "joint"])
@pytest.mark.parametrize("name", SINGLE)
def test_inputs_so_far_out_that_numbers_overflow_are_the_most_anomalous(mixture, name, kind, request):
    score = scorer(name, request.getfixturevalue(kind), mixture.sample(100, rng(1)))
    values = score(torch.tensor([[0.0, 0.0], [1e200, 0.0], [30.0, 30.0]], dtype=torch.float64))
    assert values.isfinite().all()
    assert values.argmax() == 1


def test_levels_sees_a_gap_between_the_modes_that_typicality_takes_for_usual():
    """Two sharp modes: log p half way equals that of ordinary points further out, the profile does not."""
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    mixture = GaussianMixture(torch.ones(2), means, (0.3**2 * torch.eye(2)).expand(2, 2, 2))
    model = exact_model(mixture)
    reference, usual = mixture.sample(600, rng(1)), mixture.sample(600, rng(2))
    # On the far side of a mode, at the same log p as the middle.
    middle = torch.tensor([[0.0, 0.0]]) + 0.02 * normal(200, 2)
    scores = {name: scorer(name, model, reference) for name in ("typicality", "levels")}
    rank = {name: (score(usual)[:, None] < score(middle)).double().mean() for name, score in scores.items()}
    assert rank["levels"] > rank["typicality"]
    assert rank["levels"] > 0.97


def test_levels_of_a_joint_model_tells_classes_apart_whose_profiles_are_alike():
    """Two mirrored classes of which one is normal: log p_t(x) is the same function of both."""
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    mixture = GaussianMixture(torch.ones(2), means, (0.3**2 * torch.eye(2)).expand(2, 2, 2), torch.tensor([0, 1]))
    joint = joint_model(mixture)
    one = GaussianMixture(torch.ones(1), means[:1], 0.3**2 * torch.eye(2)[None])
    reference, usual, odd = one.sample(500, rng(1)), one.sample(500, rng(2)), one.sample(500, rng(3)) * MIRROR
    for model, low, high in ((exact_model(mixture), 0.45, 0.55), (joint, 0.99, 1.0)):
        score = scorer("levels", model, reference)
        assert low <= auroc(score(usual), score(odd)) <= high


def test_what_increments_hardly_do_is_seen_by_the_second_distance():
    """Increments of five factors and a little noise, which the covariance of the first distance shrinks away."""
    mixing = normal(5, 60, seed=9)

    def profiles(n, noise, seed):
        return (normal(n, 5, seed=seed) @ mixing + noise * normal(n, 60, seed=seed + 100)).cumsum(1)

    reference, usual, odd = profiles(1500, 0.03, 1), profiles(500, 0.03, 2), profiles(500, 0.045, 3)
    fitted = fit_increments(reference, *best_kind(reference))
    found = log_distances(usual, fitted), log_distances(odd, fitted)
    seen = {name: auroc(found[0][name], found[1][name]) for name in found[0]}
    assert seen["rarity"] > 0.98 and seen["distance"] < 0.9


def test_increments_of_fine_schedules_span_several_levels():
    reference = normal(100, 1002).cumsum(1)
    fitted = fit_increments(reference, 1, 0.1)
    assert len(fitted["centre"]) == 501  # of two levels each
    # What they add up to is log p_0, however many there are.
    assert torch.allclose(fitted["centre"].sum(), reference[:, 0].mean())
    assert all(values.isfinite().all() for values in log_distances(reference, fitted).values())


def test_groups_of_increments_have_a_gaussian_each():
    """Two groups; in the middle between them is nobody, where one Gaussian has its peak."""
    side = 3 * (2 * (torch.arange(2000) % 7 % 2) - 1)[:, None]
    reference = (normal(2000, 4, seed=1) + side).cumsum(1)
    components, shrinkage = best_kind(reference)
    assert components == 2
    fitted = fit_increments(reference, components, shrinkage)
    between, inside = (log_distances(normal(200, 4, seed=2).mul(0.3).add(x).cumsum(1), fitted) for x in (0, 3))
    assert between["rarity"].min() > inside["rarity"].max()


def test_levels_does_not_take_its_own_reference_for_more_normal_than_other_normal_data():
    """More levels than samples: the covariance fits the reference alone, whose distances are then too small."""
    levels = AnomalyDetector("levels", ClassificationDiffusion(ZeroBackbone(202), UniformSigmaSchedule(200)))
    mixing = normal(202, 202)
    fresh = levels.learn(normal(60, 202, seed=1) @ mixing).apply(normal(2000, 202, seed=2) @ mixing)
    # All in deviations: one distance 0 on average, and twice the softplus of a standard normal, 0.8. A little less, as
    # four fifths of the reference tell less of the rest than all of it does.
    assert abs(fresh.mean() - 1.6) < 1


# --- invariances -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images():
    """A Gaussian model of 4x4 images with 8 grey levels."""
    x = torch.randint(0, 8, (300, 1, 4, 4), generator=rng())
    transform = DataTransform.images((1, 4, 4), 8)
    gaussian = GaussianMarginals.fit(transform.encode(x, rng(1)), SCHEDULE, 1e-3)
    return ClassificationDiffusion(ZeroBackbone(22), SCHEDULE, transform, gaussian), x


@pytest.mark.parametrize("name", SINGLE)
def test_a_score_is_a_function_of_the_input_alone(images, name):
    """Not of its place, of the batch, of draws of the dequantisation, or of the type of the values."""
    model, x = images
    score = scorer(name, model, x[:200])
    values = score(x[200:])
    torch.testing.assert_close(score(x[200:].flip(0)).flip(0), values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(score(x[200:].float()), values, rtol=1e-5, atol=1e-5)
    single = torch.cat([score(one[None]) for one in x[200:205]])
    torch.testing.assert_close(single, values[:5], rtol=1e-5, atol=1e-5)


def test_grey_levels_are_scored_inside_their_cells(images):
    """Dequantised: not at the centres of all cells, where training never saw them, and nowhere else."""
    model, x = images
    seen = []
    handle = model.backbone.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    level_profile(model, x[:10])
    handle.remove()
    offset = model.transform.inverse(seen[0].double()) - x[:10]
    assert offset.abs().max() <= 0.5
    assert offset.std() > 0.2
    assert (offset - offset[0]).abs().max() < 1e-5


def test_dropout_is_off_while_scoring_and_the_mode_is_left_as_it_was(mixture):
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, x):
            return self.dropout(x).sum(1, keepdim=True) * torch.arange(22.0)

    model = ClassificationDiffusion(Dropping(), SCHEDULE, DataTransform((2,))).train()
    x = normal(30, 2).float()
    assert torch.equal(level_profile(model, x), level_profile(model, x))
    assert model.backbone.dropout.training


# --- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: AnomalyDetector("level", m), "unknown anomaly score 'level'; did you mean 'levels'"),
        (lambda m: AnomalyDetector(m, "levels"), r"unknown anomaly score [^\n]{1,90}; choose from: coarse"),
        (lambda m: AnomalyDetector("ratio", m), "the score 'ratio' needs a background model"),
        (lambda m: AnomalyDetector("levels", m, m), "the score 'levels' takes no background model"),
        (lambda m: AnomalyDetector("levels", m).fit(torch.zeros(0, 2)), "inputs have shape .0, 2.; give at least one"),
        (lambda m: AnomalyDetector("levels", m).fit(torch.zeros(18, 2)), "the reference holds 18 samples; .* 20"),
        (lambda m: AnomalyDetector("levels", m).fit(torch.zeros(20, 3)), r"shape \(3,\); the model takes \(2,\)"),
        (lambda m: AnomalyDetector("log_prob", m).fit(torch.full((5, 2), np.nan)), "inputs are not finite"),
        (lambda m: AnomalyDetector("log_prob", m).score(torch.zeros(5, 2)), "is not fitted; call fit"),
        (lambda m: AnomalyDetector("log_prob", m).threshold(0.1), "is not fitted; call fit"),
        (lambda m: AnomalyDetector("log_prob", m).percentile(torch.zeros(1)), "is not fitted; call fit"),
        (lambda m: AnomalyDetector("log_prob", m).save("nowhere"), "is not fitted; call fit"),
        (lambda m: scorer("log_prob", m, torch.zeros(5, 2))(torch.zeros(0, 2)), "inputs have shape .0, 2."),
        (lambda m: scorer("log_prob", m, torch.zeros(5, 2))(torch.zeros(5, 2, 1)), "inputs have shape .2, 1."),
    ],
)
def test_mistakes_are_named(model, act, message):
    with pytest.raises(UserError, match=message):
        act(model)


def test_a_background_of_another_shape_and_a_model_without_density_are_refused(model):
    other = ClassificationDiffusion(ZeroBackbone(22), SCHEDULE, DataTransform((3,)))
    with pytest.raises(UserError, match=r"background takes inputs of shape \(3,\), the model \(2,\)"):
        AnomalyDetector("ratio", model, other)
    ddm = DenoisingDiffusion(nn.Identity(), SCHEDULE)
    for arguments in ((ddm,), (model, ddm)):
        with pytest.raises(UserError, match="needs a density"):
            AnomalyDetector("levels" if len(arguments) == 1 else "ratio", *arguments)


@pytest.mark.parametrize("name", SINGLE)
def test_a_reference_of_equal_samples_gives_finite_scores(model, name):
    score = scorer(name, model, torch.zeros(20, 2))
    assert score(3 * normal(20, 2)).isfinite().all()
