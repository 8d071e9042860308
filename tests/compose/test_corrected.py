"""Samples with accept-reject, particles and replicas, against exact densities."""

import math
import warnings

import pytest
import torch
from oracles import ZeroBackbone, labelled_mixture
from test_combinations import SCHEDULE, exact, gaussian

from studies.exact import GaussianMixture
from torchcdm import compose
from torchcdm.compose import sample
from torchcdm.compose.tilted import Tilted
from torchcdm.diffusion.schedules import LogSNRSchedule
from torchcdm.errors import UserError
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.units import DataTransform

FAR = GaussianMixture(
    torch.tensor([0.8, 0.2]), torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), torch.tensor([0.3, 0.3]), torch.tensor([0, 1])
)
FAR.double()


def test_accepted_moves_mend_what_few_steps_miss():
    """Five steps of DDIM make the modes too narrow."""
    model = exact(FAR)
    plain = sample(model, 600, "ddim", steps=4).double()
    found = compose.sample(model, 600, "ddim", steps=4, corrector=12, details=True)
    truth = torch.stack([x[x[:, 0] < 0].var(0).mean() for x in (FAR.sample(20000), plain, found.x.double())])
    assert abs(truth[2] - truth[0]) < 0.06 < abs(truth[1] - truth[0])
    assert 0.4 < found.acceptance < 0.8
    assert found.ess == 600


def test_corrected_samples_do_not_depend_on_their_batch():
    model = exact(labelled_mixture(), joint=True)
    options = {"sampler": "ddpm", "steps": 4, "corrector": 2, "y": torch.arange(20) % 2, "guidance": 0.5}
    whole = compose.sample(model, 20, **options)
    assert torch.allclose(whole, compose.sample(model, 20, batch_size=7, **options), atol=1e-9)
    separate = exact(labelled_mixture())  # two passes where the joint head takes one
    assert torch.allclose(whole, compose.sample(separate, 20, **options), atol=1e-5)


def test_a_move_leaves_a_multistep_rule_without_history():
    """Predictions from before a move belong to another trajectory: extrapolated, they make narrow modes four times as
    wide."""
    means = torch.tensor([[-1.0], [1.0]])
    narrow = GaussianMixture(torch.ones(2), means, torch.full((2,), 0.01)).double()
    model = exact(narrow, schedule=LogSNRSchedule(100))
    for sampler in ("deis3", "unipc2"):
        x = compose.sample(model, 500, sampler, steps=8, corrector=1)
        assert float((x - x.sign()).std()) == pytest.approx(0.1, abs=0.03), sampler


@pytest.mark.parametrize("options", [{"corrector": 1, "steps": 6}, {"sampler": "sa2", "steps": 6}])
def test_a_sample_of_a_joint_model_does_not_depend_on_which_classes_the_others_have(options):
    model = exact(labelled_mixture(), joint=True)
    many = compose.sample(model, 12, **options)
    for n in (1, 2):
        assert torch.allclose(compose.sample(model, n, **options), many[:n], atol=1e-9)


def test_a_move_leaves_an_evaluation_for_the_next_step():
    model, calls = exact(FAR), []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    compose.sample(model, 8, "ddim", steps=4, corrector=2)
    # A pilot and the samples, each one evaluation at T and 1 + 2 at the three levels below.
    assert len(calls) == 2 * (1 + 3 * 3)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_particles_have_the_weights_of_modes_and_log_z(beta):
    target = compose.tempered(exact(FAR), beta)
    found = compose.sample(target, 400, particles=800, details=True, seed=1)
    # The modes hardly overlap: the integral of the power is the sum of those of its parts.
    parts = beta * torch.tensor([0.8, 0.2]).log() + (1 - beta) * math.log(2 * math.pi * 0.3) - math.log(beta)
    left = found.log_weights.exp()[found.particles[:, 0] < 0].sum()
    assert float(left) == pytest.approx(float(parts.softmax(0)[0]), abs=0.06)
    assert found.log_z.value == pytest.approx(float(parts.logsumexp(0)), abs=0.1)
    assert found.x.shape == (400, 2) and 400 < found.ess <= 800
    assert f"of {len(found.particles)} particles" in found.summary()
    assert ", 0 moves" in compose.sample(target, 8, corrector=0, particles=800, details=True).log_z.estimator


def test_replica_exchange_has_them_too():
    found = compose.sample(compose.tempered(exact(FAR), 2.0), 200, particles=24, sweeps=60, details=True)
    left = (found.particles[:, 0] < 0).double().mean()
    assert float(left) == pytest.approx(0.64 / 0.68, abs=0.05)
    assert found.x.shape == (200, 2)


def test_one_sweep_is_four_whose_samples_are_there():
    model = exact(FAR)
    assert compose.sample(model, 30, particles=8, sweeps=1).shape == (30, 2)
    with pytest.raises(UserError, match="33 samples of 8 particles"):
        compose.sample(model, 33, particles=8, sweeps=1)


def test_columns_of_replica_exchange_do_not_share_ancestors():
    """The share of a mode deviates by no more than that of so many independent draws."""
    means = torch.zeros(2, 16)
    means[:, 0] = torch.tensor([-2.0, 2.0])
    even = GaussianMixture(torch.ones(2), means, torch.tensor([0.3, 0.3])).double()
    target, shares, columns = compose.tempered(exact(even), 2.0), [], 16
    for seed in range(12):
        found = compose.sample(target, 8, particles=columns, sweeps=4, seed=seed, details=True)
        shares.append((found.particles[:, 0] < 0).double().mean() - 0.5)
    assert float(torch.stack(shares).square().mean()) < 1.5 * 0.25 / columns


def test_a_collapse_of_the_weights_is_said():
    model, _ = gaussian()
    absurd = compose.tilted(model, lambda x: -1e5 * (x.detach()[:, 0] - 2).square())
    with pytest.warns(UserWarning, match="weights have collapsed") as said:
        compose.sample(absurd, 8, particles=512)
    assert {warning.filename for warning in said} == {__file__}, "it points at the caller's line"
    with pytest.raises(UserError, match="-inf at all of 64 draws"):
        compose.tilted(model, lambda x: torch.full((len(x),), -math.inf, dtype=torch.float64))
    for value in (-math.inf, math.inf, math.nan):
        absurd = Tilted(model, lambda x, t, value=value: torch.full((len(x),), value).double())
        with pytest.raises(UserError, match="contradicts itself"):
            compose.sample(absurd, 8, particles=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compose.sample(model, 8, particles=64)


def test_tilted_densities_have_no_ends():
    tilted = compose.tilted(gaussian()[0], lambda x: x[:, 0])
    last = tilted.schedule.T
    for t in (0, last + 1, torch.tensor([0, 1])):
        with pytest.raises(UserError, match=f"levels 1 ... {last} alone"):
            tilted.denoise(torch.zeros(2, 2, dtype=torch.float64), t)
    assert tilted.denoise(torch.zeros(2, 2, dtype=torch.float64), torch.tensor([1, last])).eps.shape == (2, 2)


def test_a_linear_reward_moves_a_gaussian():
    model, base = gaussian()
    push = torch.tensor([1.0, 0.5], dtype=torch.float64)
    found = compose.sample(compose.tilted(model, lambda x: x.double() @ push), 8, particles=512, details=True)
    mean, variances = base.moments(1)
    moved = mean + base.rotation.inverse(base.rotation(push[None]) * variances)[0]
    weighted = found.log_weights.exp() @ found.particles.double()
    assert torch.allclose(weighted, moved, atol=0.15)


def test_a_reward_without_derivative_weighs():
    right = compose.tilted(exact(FAR), lambda x: torch.where(x[:, 0] > 0, math.log(4.0), 0.0))
    found = compose.sample(right, 8, particles=800, details=True)
    left = found.log_weights.exp()[found.particles[:, 0] < 0].sum()
    assert float(left) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("edge", [-2.2, 0.0, 1.5])
def test_bounds_by_a_reward_of_minus_infinity_have_the_normaliser_of_what_is_within(edge):
    model = ClassificationDiffusion(ZeroBackbone(102), LogSNRSchedule(100), DataTransform((2,))).double()
    bounded = compose.tilted(model, lambda x: torch.where(x[:, 0] > edge, 5.0, -math.inf))
    normal, values = torch.distributions.Normal(0.0, 1.0), []
    for seed in range(3):
        found = compose.sample(bounded, 64, particles=512, details=True, seed=seed)
        assert (found.x[:, 0] > edge - 0.02).all() and len(found.x.unique(dim=0)) > 16
        values.append(found.log_z.value)
    truth = 5 + math.log(1 - float(normal.cdf(torch.tensor(edge))))
    assert sum(values) / 3 == pytest.approx(truth, abs=0.2)
    assert (compose.sample(bounded, 64, particles=32, sweeps=8)[:, 0] > edge - 0.02).all()


def test_replicas_start_within_a_bound_that_few_particles_reach():
    model = ClassificationDiffusion(ZeroBackbone(102), LogSNRSchedule(100), DataTransform((2,))).double()
    bounded = compose.tilted(model, lambda x: torch.where(x[:, 0] > 2.0, 5.0, -math.inf))
    found = compose.sample(bounded, 64, particles=16, sweeps=16, details=True)
    assert (found.log_weights > -math.inf).all()
    # 1.2, roughly; without such columns it was below -30.
    assert abs(found.log_z.value - 5 - math.log(0.0228)) < 4


def test_particles_take_as_long_steps_as_their_weights_allow():
    model, rows = exact(FAR), []
    model.backbone.register_forward_hook(lambda _, x, __: rows.append(len(x[0])))
    target = compose.tempered(model, 2.0)
    compose.sample(target, 400, particles=800, seed=1)
    every = sum(rows)
    found = compose.sample(target, 400, particles=800, details=True, seed=1, spacing="adaptive")
    assert sum(rows) < 2 * every  # steps that were tried included
    parts = 2 * torch.tensor([0.8, 0.2]).log() - math.log(2 * math.pi * 0.3) - math.log(2.0)
    left = found.log_weights.exp()[found.particles[:, 0] < 0].sum()
    assert float(left) == pytest.approx(float(parts.softmax(0)[0]), abs=0.06)
    assert found.log_z.value == pytest.approx(float(parts.logsumexp(0)), abs=0.1)


@pytest.mark.parametrize("options, message", [
    ({"particles": 64, "spacing": "even"}, "leave sampler, steps, guidance and spacing out"),
    ({"particles": 4}, "at least as many particles"),
    ({"sweeps": 9}, "give particles too"),
    ({"particles": 8, "shape": (3,)}, r"the shape is \(3,\); this model's samples are \(2,\)"),
    ({"particles": 64, "sampler": "dpm++"}, "leave sampler"),
    ({"corrector": -1}, "corrector is -1"),
    ({"corrector": 2, "guidance": 1.0}, "guidance needs"),
    ({"particles": 64, "steps": 9}, "leave sampler, steps"),
])  # fmt: skip
def test_requests_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        compose.sample(exact(FAR), 8, **options)


def test_a_reward_of_another_shape_is_refused():
    with pytest.raises(UserError, match="one number a sample"):
        compose.sample(compose.tilted(gaussian()[0], lambda x: x), 8, corrector=1, steps=3)


def test_a_plain_diffusion_model_has_nothing_to_accept_by():
    from torchcdm.models.denoiser import DenoisingDiffusion

    with pytest.raises(UserError, match="needs a density"):
        compose.sample(DenoisingDiffusion(torch.nn.Identity(), SCHEDULE), 4, corrector=1, steps=2, shape=(2,))


def test_by_default_moves_follow_the_steps_of_composed_densities_and_a_sample_depends_on_its_number_alone():
    model, steps = exact(FAR), min(25, SCHEDULE.T)
    for target, evaluations in ((model, steps), (compose.tempered(model, 2), 2 * steps - 1)):
        many = compose.sample(target, 20, details=True)
        assert many.evaluations == evaluations
        assert many.acceptance is None if target is model else 0.3 < many.acceptance < 1
        assert torch.allclose(compose.sample(target, 3), many.x[:3], atol=1e-9)
    moved = compose.sample(model, 20, corrector=1, details=True)
    assert torch.equal(moved.x, compose.sample(model, 20, "ddpm", corrector=1)) and 0.3 < moved.acceptance < 1
    assert compose.sample(compose.any_of([model, model]), 2, details=True).acceptance is None  # exact at every level
    plain = compose.sample(compose.tempered(model, 2), 2, "ddim", details=True)
    assert plain.evaluations == steps and plain.acceptance is None
