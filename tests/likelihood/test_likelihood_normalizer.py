"""log Z that was put in by hand, and what withholds a headline."""

import json
import math
from dataclasses import replace

import pytest
import torch
from oracles import MixtureClassifier, labelled_mixture, normal, rng
from torch import distributions

from studies.exact import GaussianMixture
from torchcdm.annealing import replicas
from torchcdm.annealing.kernels import Kernels, kl_of_step
from torchcdm.annealing.particles import smc
from torchcdm.annealing.target import ModelTarget
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.schedules import CosineSchedule, UniformSigmaSchedule
from torchcdm.errors import UserError
from torchcdm.likelihood import (
    LogZ,
    Scoring,
    elbo,
    log_normalizer,
    single_pass,
)
from torchcdm.likelihood.report import NLLGap, Row, judge, report
from torchcdm.likelihood.restricted import restricted_pass
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.units import DataTransform

SLOPE = torch.tensor([0.4, -0.3], dtype=torch.float64)


class Tilted(torch.nn.Module):
    """An exact classifier made wrong: log p_t gains ``constant`` + slope . x at the levels 0 ... T."""

    def __init__(self, exact, constant=0.0, slope=None):
        super().__init__()
        self.exact, self.constant = exact, constant
        self.slope = torch.zeros(2).double() if slope is None else slope

    def forward(self, x):
        h = self.exact(x)
        inner = h[:, :-1] + self.constant + (x.double().flatten(1) @ self.slope)[:, None]
        return torch.cat([inner, h[:, -1:]], 1)


def tilted_model(schedule, constant=0.0, slope=None):
    mixture = labelled_mixture()
    base = GaussianMarginals.fit(mixture.sample(5000, rng()), schedule)
    backbone = Tilted(MixtureClassifier(mixture, schedule, base), constant, slope)
    return ClassificationDiffusion(backbone, schedule, DataTransform((2,)), base)


def log_z_above(model, x_s, level):
    """Mean log weight, and its standard error, of annealing on paths that lead up from exact samples ``x_s`` of the
    normalised density at a level: at least log Z in expectation (Grosse et al., 2015, arXiv 1511.02543)."""
    target, generator = ModelTarget(model), rng(4)
    kernels, at_s = Kernels(target.reference), target.evaluate(x_s, level)
    log_w = torch.zeros(len(x_s), dtype=torch.float64)
    for s in range(level, model.schedule.T):
        x_t = kernels.up(x_s, s, s + 1, torch.randn(x_s.shape, generator=generator, dtype=torch.float64))
        at_t = target.evaluate(x_t, s + 1)
        log_w += kernels.work(x_s, x_t, at_s, at_t, s, s + 1)
        x_s, at_s = x_t, at_t
    log_w += at_s.log_gamma - target.log_start(x_s)
    return float(log_w.mean()), float(log_w.std()) / len(x_s) ** 0.5


def log_integral(schedule, slope, level=1):
    """log of the integral of p_level(x) exp(slope . x): the cumulant of a mixture of Gaussians."""
    mixture, (alpha, sigma) = labelled_mixture(), (schedule.alpha[level], schedule.sigma[level])
    dense = mixture.vectors @ torch.diag_embed(mixture.variances) @ mixture.vectors.mT
    noisy = alpha**2 * dense + sigma**2 * torch.eye(2)
    terms = alpha * mixture.means @ slope + 0.5 * torch.einsum("i,kij,j->k", slope, noisy, slope)
    return float((mixture.log_weights + terms).logsumexp(0))


@pytest.mark.parametrize(("slope", "level"), [(None, 1), (SLOPE, 1), (SLOPE, 12)])
def test_paths_from_either_end_enclose_log_z(slope, level):
    schedule = CosineSchedule(25)
    model = tilted_model(schedule, 1.7, slope)
    truth, x = 1.7, schedule.perturb(labelled_mixture().sample(50_000, rng(2)), level, normal(50_000, 2))
    if slope is not None:
        truth += log_integral(schedule, slope, level)
        x = x[torch.multinomial((x @ slope).softmax(0), 2000, replacement=True, generator=rng(3))]
    target = ModelTarget(model)
    down = smc(target, Kernels(target.reference), level, 1, 8000, rng(5), moves=0, below=0)
    log_w = down.log_weights[0]
    above, error = log_z_above(model, x[:2000], level)
    assert float(log_w.mean()) - 3 * float(log_w.std()) / 8000**0.5 < truth < above - 3 * error
    # The same mean from the other end: of paths that lead down, weighted.
    assert above == pytest.approx(float(log_w.softmax(0) @ log_w), abs=0.1)


def test_resampling_keeps_the_mean_of_the_estimate():
    # Many small populations that resample often: the mean of Z, not of its logarithm, is right.
    schedule = CosineSchedule(15)
    target = ModelTarget(tilted_model(schedule, slope=2 * SLOPE))
    kernels, truth = Kernels.of_target(target), log_integral(schedule, 2 * SLOPE)
    found = torch.stack([smc(target, kernels, 1, 64, 8, rng(s), moves=s % 2).log_estimates for s in range(12)])
    ratio = (found - truth).exp().mean(1)
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / math.sqrt(12)
    assert float(ratio.std()) < 0.4


def test_intervals_of_few_populations_are_students():
    estimates = (1 + 0.1 * normal(2000, 3)).log()
    found = [LogZ.of_weights(three, "three populations", 1, 2) for three in estimates]
    assert sum(z.low < 0 < z.high for z in found) / 2000 == pytest.approx(0.95, abs=0.015)


def test_weighted_particles_are_those_of_the_normalised_density():
    schedule = CosineSchedule(30)
    target = ModelTarget(tilted_model(schedule, slope=SLOPE))
    x = smc(target, Kernels.of_target(target), 1, 4, 1000, rng(), below=math.inf).states.x
    drawn = schedule.perturb(labelled_mixture().sample(100_000, rng(2)), 1, normal(100_000, 2))
    weights = (drawn @ SLOPE).softmax(0)
    assert torch.allclose(x.mean(0), weights @ drawn, atol=0.12)
    assert torch.allclose(x.square().mean(0), weights @ drawn.square(), atol=0.15)


def by_replicas(model, x=None, **options):
    return log_normalizer(model, x, **{"sweeps": 40, "replicas": 10} | options)


@pytest.mark.parametrize("level", [None, 12])
def test_finds_log_z(level):
    schedule = CosineSchedule(25)
    found = by_replicas(tilted_model(schedule, 0.4, SLOPE), scoring=Scoring(level=level))
    truth = 0.4 + log_integral(schedule, SLOPE, level or 1)
    assert abs(found.value - truth) < 4 * found.se < 0.4 and set(found.convergence["starts"]) == {"samples", "far"}


def test_images_and_batches():
    schedule = CosineSchedule(10)
    mixture = GaussianMixture(torch.ones(2), normal(2, 1, 2, 2), torch.tensor([0.3, 0.5]))
    base = GaussianMarginals.fit(mixture.sample(1000, rng()), schedule)
    model = ClassificationDiffusion(
        MixtureClassifier(mixture, schedule, base), schedule, DataTransform((1, 2, 2)), base
    )
    whole, parts = (by_replicas(model, scoring=Scoring(batch_size=size), sweeps=4) for size in (None, 7))
    assert whole.x.shape[1:] == (1, 2, 2)
    assert whole.value == pytest.approx(parts.value, abs=1e-9)


def test_replicas_from_three_starts_agree_on_log_z():
    schedule = CosineSchedule(25)
    model = tilted_model(schedule, 1.7, SLOPE)
    found = by_replicas(model, labelled_mixture().sample(300, rng(2)))
    truth = 1.7 + log_integral(schedule, SLOPE)
    assert abs(found.value - truth) < 4 * found.se and found.se < 0.1
    assert found.ess == pytest.approx(1 / found.se**2) and found.level == 1 and found.x.shape[1:] == (2,)
    assert found.estimator.startswith("replica exchange") and found.check.estimator.startswith("MBAR")
    assert abs(found.check.value - truth) < 4 * found.check.se + 4 * found.se
    starts = found.convergence["starts"]
    assert set(starts) == {"samples", "data", "far"} and len(found.convergence["quarters"]) == 4
    assert sum(value for value, _ in starts.values()) / 3 == pytest.approx(found.to_json()["value"], abs=0.02)
    assert json.dumps(found.to_json()) and bool(found.doubt) == (
        found.convergence["disagreement"] > 2 or abs(found.convergence["trend"]) > 2
    )


def test_no_two_columns_that_start_from_samples_have_an_ancestor_in_common(monkeypatch):
    # Of one population, all that is left after some rungs is the offspring of a few of its first particles.
    descended = []

    def kept(*arguments, **options):
        descended.append(smc(*arguments, **options))
        return descended[-1]

    monkeypatch.setattr(replicas, "smc", kept)
    found = by_replicas(tilted_model(CosineSchedule(25), slope=2 * SLOPE), sweeps=4, replicas=6)
    assert " x 12 columns" in found.estimator
    families = descended[0].states.origin.view(6, -1)
    assert len(families.unique()) == sum(len(family.unique()) for family in families)
    for k, family in enumerate(families):
        assert bool((family // len(family) == k).all())


@pytest.mark.parametrize(("bound", "counted"), [(math.inf, 4), (-1, 8)], ids=["agreed", "doubted"])
def test_a_run_that_is_doubted_goes_on_and_what_counted_no_longer_does(bound, counted, monkeypatch):
    monkeypatch.setattr("torchcdm.likelihood.log_z.AGREEMENT", bound)
    found = by_replicas(tilted_model(CosineSchedule(10), 0.4, SLOPE), sweeps=4, replicas=2)
    # 4 and, where they are doubted, 4 more, and then 8: four times as many in all.
    assert found.estimator.endswith(f" {counted} sweeps") and bool(found.doubt) == (bound < 0)


class Island(torch.nn.Module):
    """An exact classifier with a mode far from all data at the low levels, which no path from the noise finds."""

    def __init__(self, exact, schedule):
        super().__init__()
        self.exact, self.schedule = exact, schedule

    def forward(self, x):
        h, depth = self.exact(x), torch.linspace(3, -60, self.schedule.T + 1, dtype=torch.float64)
        place = -0.5 * ((x.double() - 6) / 0.3).square().sum(1)
        base = self.exact.base.log_prob_levels(x)[:, :-1]
        inner = torch.logaddexp(h[:, :-1], place[:, None] + depth - base)
        return torch.cat([inner, h[:, -1:]], 1)


def island_model():
    schedule, mixture = CosineSchedule(25), labelled_mixture()
    base = GaussianMarginals.fit(mixture.sample(5000, rng()), schedule)
    backbone = Island(MixtureClassifier(mixture, schedule, base), schedule)
    model = ClassificationDiffusion(backbone, schedule, DataTransform([2], scale=1.0), base)
    # The far start is at four deviations; some of its replicas are at the island, none of the data's.
    model.transform.high = 6.0
    return model, mixture.sample(300, rng(2))


def test_mass_that_data_never_showed_is_found_and_said():
    model, x = island_model()
    found = by_replicas(model, x)
    starts = found.convergence["starts"]
    assert starts["white"][0] > starts["data"][0] + 0.5
    assert found.doubt and found.lacking and "differ" in found.doubt
    assert verdict_on(found).why == f"No normalised number can be given: {found.doubt}."


def test_a_restricted_density_has_none_of_it_and_bounds_every_input():
    model, x = island_model()
    found = by_replicas(model, x, restricted=True)
    side = torch.linspace(-8, 8, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    levels, cell = model.log_prob_levels(grid), float(side[1] - side[0]) ** 2
    truth = math.log(float(found.restricted.fence.restricted(levels)[:, 1].exp().sum()) * cell)
    # The island is outside, and hardly anything else is.
    assert abs(truth) < 0.02 and float(levels[:, 1].exp().sum()) * cell > 1.5
    assert not found.lacking and abs(found.value - truth) < 4 * found.se + 0.01
    one_pass, exact = (one.nats for one in (restricted_pass(model, x, found.restricted), single_pass(model, x)))
    assert float((one_pass - exact).abs().median()) < 0.1 and float((one_pass - exact).mean()) > -0.2
    island = torch.full((5, 2), 6.0)
    covered = restricted_pass(model, island, found.restricted).nats
    assert covered.isfinite().all() and float(covered.max()) < float(single_pass(model, island).nats.min())
    assert "most of the data lie outside" in by_replicas(model, island, restricted=True, training=x, sweeps=4).doubt


@pytest.mark.slow
def test_a_report_falls_back_to_the_restricted_density():
    model, x = island_model()
    found = report(model, x, methods=["single", "logz"], scoring=Scoring(level=1), sweeps=40)
    row = {row.name: row for row in found.rows}["one-pass-restricted"]
    assert found.believe and "for any input" in found.why
    assert row.value == pytest.approx(-float(single_pass(model, x, scoring=Scoring(1)).nats.mean()), abs=0.2)
    assert found.to_json()["log2_z_per_dim"] is not None


def test_of_a_class():
    mixture, schedule = labelled_mixture(), CosineSchedule(20)
    model = ClassificationDiffusion(MixtureClassifier(mixture, schedule, joint=True), schedule, DataTransform((2,)))
    found = by_replicas(model, y=1, sweeps=20, replicas=60)
    assert abs(found.value) < 4 * found.se + 0.01
    one = mixture.sample_labelled(50_000, rng())
    mean = schedule.alpha[1] * one[0][one[1] == 1].mean(0)
    assert torch.allclose(found.x.mean(0), mean, atol=0.2)


# --- the chain behind it ---------------------------------------------------------------------------------------


def test_kernel_divergence_is_that_of_the_gaussians():
    schedule = UniformSigmaSchedule(20)
    model = tilted_model(schedule)
    kernels = Kernels(model.base)
    error, t = normal(6, 2), torch.tensor([2, 5, 9, 13, 17, 20])
    found = kl_of_step(schedule, t, t - 1, kernels.reference.rotation(error), kernels.variances[t - 1]).sum(1)
    for row, level in enumerate(t.tolist()):
        x_t, x_0 = normal(1, 2, seed=row), normal(1, 2, seed=row + 50)
        a, b, c = schedule.reverse_kernel(level, level - 1, x_t)
        rotation = kernels.reference.rotation.matrix
        wide = c**2 * torch.eye(2) + b**2 * rotation @ kernels.variances[level - 1].diag() @ rotation.T
        q = distributions.MultivariateNormal(a * x_t[0] + b * x_0[0], c**2 * torch.eye(2).double())
        r = distributions.MultivariateNormal(a * x_t[0] + b * (x_0[0] - error[row]), wide)
        truth = distributions.kl_divergence(q, r)
        assert torch.allclose(found[row], truth, rtol=1e-6)


@pytest.mark.parametrize("schedule", [CosineSchedule(20), UniformSigmaSchedule(200)])
def test_calibration_measures_the_posterior_variance(schedule):
    # Gaussian data: the posterior is in closed form, as the uncalibrated chain assumes. Of 200 levels 50 are measured.
    mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.tensor([0.5]))
    base = GaussianMarginals.fit(mixture.sample(5000, rng()), schedule)
    model = ClassificationDiffusion(MixtureClassifier(mixture, schedule, base), schedule, DataTransform((2,)), base)
    measured, assumed = Kernels.of_target(ModelTarget(model), n=2000).variances, Kernels(base).variances
    most = 3 * schedule.T // 4
    assert torch.allclose(measured[:most], assumed[:most], rtol=0.15)


def test_elbo_approaches_the_density_of_a_gaussian():
    # The reverse chain of Gaussian data is exact in the limit of small steps, and a bound before it.
    gaps = []
    for T in (10, 40):
        schedule = CosineSchedule(T)
        mixture = GaussianMixture(torch.ones(1), normal(1, 2), torch.tensor([0.4]))
        base = GaussianMarginals.fit(mixture.sample(20_000, rng()), schedule)
        model = ClassificationDiffusion(
            MixtureClassifier(mixture, schedule, base), schedule, DataTransform((2,)), base
        )
        x = mixture.sample(2000, rng(1))
        bound = elbo(model, x)
        gaps.append(float((mixture.log_prob(x, 0, schedule) - bound.nats).mean()))
        total = bound.prior + bound.diffusion + bound.reconstruction
        assert torch.allclose(-total, bound.nats)
    assert all(gap > -0.05 for gap in gaps)
    assert max(map(abs, gaps)) < 0.1


def test_elbo_bounds_a_mixture_whatever_the_kernels():
    mixture, schedule = labelled_mixture(), CosineSchedule(40)
    model = tilted_model(schedule)
    x = mixture.sample(400, rng(1))
    true = mixture.log_prob(x, 0, schedule)
    narrow = Kernels(model.base, torch.full((40, 2), 1e-3, dtype=torch.float64))
    excess = {}
    for name, kernels in (("gaussian", None), ("measured", Kernels.of_target(ModelTarget(model))), ("narrow", narrow)):
        values = true - elbo(model, x, kernels=kernels).nats
        excess[name] = float(values.mean())
        assert excess[name] > -3 * float(values.std()) / 20
    assert excess["measured"] < excess["gaussian"] + 0.02 < excess["narrow"]


def test_strata_estimate_the_whole_sum():
    schedule = CosineSchedule(30)
    model = tilted_model(schedule)
    x = labelled_mixture().sample(1000, rng(1))
    whole = elbo(model, x).diffusion
    part = elbo(model, x, None, Scoring(seed=1), evaluations=8)
    difference = part.diffusion - whole
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / math.sqrt(1000)
    assert part.nfe == 8


# --- what is said about it -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def log_z():
    return LogZ(0.0, 0.005, "by hand", 1, 2)


def verdict_on(estimate, **changes):
    known = {
        "one_pass": Row("one-pass-level", 2.0, 0.01, 1, 1), "log_z": estimate,
        "gap": NLLGap(0.001, 0.05, 1, 0.001), "over_elbo": (-0.03, 0.001),
    }  # fmt: skip
    return judge(1 / (2 * math.log(2)), 1, **known | changes)


def test_a_consistent_model_is_believed(log_z):
    verdict = verdict_on(log_z)
    assert verdict.believe and verdict.headline.value == 2.0
    assert verdict_on(replace(log_z, check=replace(log_z, value=1.0, se=0.6))).believe
    # Of one sample no error is known.
    assert not verdict_on(log_z, over_elbo=(7.5, math.nan)).believe


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"log_z": None}, "not estimated"),
        ({"one_pass": None}, "not asked for"),
        ({"conditional": True}, "class-conditional"),
        ({"log_z": {"se": 12**-0.5}}, "effective sample size of log Z is 12.0, below 20"),
        ({"log_z": {"doubt": "runs from data, white differ"}}, "runs from data, white differ"),
        ({"check": {"value": 0.5, "se": 0.05}}, "disagree"),
    ],
)
def test_no_headline(log_z, changes, reason):
    for name, change in changes.items():
        if name == "check":
            changes = {"log_z": replace(log_z, check=replace(log_z, **change))}
        elif isinstance(change, dict):
            changes = {name: replace(log_z, **change)}
    verdict = verdict_on(log_z, **changes)
    assert verdict.headline.value is None and not verdict.believe
    assert reason in verdict.why and verdict.why.startswith("No normalised number can be given")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gap": NLLGap(0.05, 0.1, 1, 0.001)}, "0.0500 above the flow"),
        ({"gap": NLLGap(-0.05, 0.1, 1, 0.001)}, "0.0500 below the flow"),
        ({"over_elbo": (0.05, 0.001)}, "+0.0500 +- 0.0010 from the ELBO"),
        ({"gap": None, "over_elbo": None}, "compared with nothing"),
    ],
)
def test_a_headline_that_is_not_believed(log_z, changes, reason):
    verdict = verdict_on(log_z, **changes)
    assert verdict.headline.value == 2.0 and not verdict.believe
    assert reason in verdict.why


def test_refusals():
    model = tilted_model(CosineSchedule(10))
    with pytest.raises(UserError, match="level 0 cannot be scored"):
        log_normalizer(model, scoring=Scoring(level=0))
    for options in ({"sweeps": 3}, {"replicas": 1}):
        with pytest.raises(UserError, match=f"{next(iter(options))} is .*; it must be at least"):
            log_normalizer(model, **options)
