"""Bounds for every input against what is known: mixtures and lattices, class by class, and what lies on the disk."""

import math

import pytest
import torch
from lattices import LatticeClassifier
from oracles import MixtureClassifier, labelled_mixture, normal, rng

from studies.exact import GaussianMixture
from torchcdm.annealing.target import DISTANCE, Fence
from torchcdm.diffusion.schedules import CosineSchedule, UniformSigmaSchedule
from torchcdm.errors import UserError
from torchcdm.likelihood import Scoring, log_normalizer, report, single_pass
from torchcdm.likelihood.log_z import read_log_z, weights_of, write_log_z
from torchcdm.likelihood.restricted import COVER, MeasuredStep, evaluated, measured_steps, restricted_pass
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.runtime.artefact import write_artefact
from torchcdm.units import DataTransform


class Lifted(torch.nn.Module):
    """A joint backbone, of a part for each class, that adds a constant to log p of each at the levels 0 ... T."""

    joint, classes = True, 2

    def __init__(self, parts, constants):
        super().__init__()
        self.parts, self.constants = parts, constants

    def forward(self, x, y=None):
        one = not isinstance(self.parts, torch.nn.ModuleList)
        found = self.parts(x).unbind(1) if one else [part(x) for part in self.parts]
        lifted = [h[:, :-1] + c for h, c in zip(found, self.constants, strict=True)]
        return torch.stack([torch.cat([h, part[:, -1:]], 1) for h, part in zip(lifted, found, strict=True)], 1)


def plane(constants):
    mixture, schedule = labelled_mixture(), CosineSchedule(25)
    backbone = Lifted(MixtureClassifier(mixture, schedule, joint=True), constants)
    model = ClassificationDiffusion(backbone, schedule, DataTransform((2,)), class_prior=torch.ones(2))
    return model, mixture.sample(600, rng(2))


def test_a_fence_holds_as_many_as_the_chi_square_distribution_says_and_nothing_at_other_levels():
    profiles = [normal(4000, 12, seed=t) @ normal(12, 12, seed=9) for t in range(4)]
    fence = Fence.of([2, 5, 7, 9], [profiles])
    found = fence.restricted(profiles[1])
    # Three numbers are compared at level 5, those of the levels 5, 7 and 9.
    off = profiles[1][:, [5, 7, 9]] - profiles[1][:, [5, 7, 9]].mean(0)
    inside = torch.einsum("ni,ij,nj->n", off, torch.linalg.inv(torch.cov(off.T)), off) <= DISTANCE**2
    assert torch.equal(found[:, 5].isfinite(), inside) and torch.equal(found[inside, 5], profiles[1][inside, 5])
    assert bool(found[:, [0, 1, 3, 4, 6, 8, 10, 11]].isinf().all())
    assert not bool(fence.restricted(profiles[1] + 100)[:, 5].isfinite().any())


def test_log_z_of_each_class_and_a_density_that_integrates_to_one():
    model, x = plane((1.3, -0.4))
    z = log_normalizer(model, x[:100], None, Scoring(level=3), 24, 24, restricted=True, training=x[100:])
    per_bit = 2 * math.log(2)
    for (value, se), constant in zip(z.convergence["classes"], (1.3, -0.4), strict=True):
        assert abs(value * per_bit - constant) < 4 * se * per_bit + 0.02 < 0.3
    assert z.value == pytest.approx(0.45, abs=4 * z.se + 0.02) and z.level == 3
    assert " x 48 columns, 24 sweeps" in z.estimator
    assert set(z.convergence["starts"]) == {"samples", "data"}
    side = torch.linspace(-9, 9, 301, dtype=torch.float64)
    grid, cell = torch.cartesian_prod(side, side), float(side[1] - side[0]) ** 2
    _, log_p = evaluated(model, grid, 3)
    total = float(z.restricted.log_prob(model, grid, log_p).exp().sum()) * cell
    # log Z is taken at the upper ends of the intervals of both classes.
    slack = sum(0.5 * math.exp(-1.96 * se * per_bit) for _, se in z.convergence["classes"])
    assert total == pytest.approx(COVER + (1 - COVER) * slack, abs=0.05)
    far = torch.full((3, 2), 50.0)
    assert restricted_pass(model, far, z.restricted).nats.isfinite().all()


def test_a_class_without_data_has_those_of_the_other():
    model, x = plane((0.0, 0.0))
    one = x[x[:, 0] < -0.7]
    found = log_normalizer(model, one, None, Scoring(level=5), 8, 4, restricted=True)
    assert len(found.restricted.log_z) == 2 and math.isfinite(found.value)


def test_all_classes_of_sorted_data_are_usual():
    # A narrow and a wide class, whose profiles differ, in a model that does not tell them apart.
    mixture, schedule = GaussianMixture(torch.ones(2), normal(2, 8), torch.tensor([1e-3, 4.0])), CosineSchedule(25)
    model = ClassificationDiffusion(MixtureClassifier(mixture, schedule), schedule, DataTransform((8,)))
    x = mixture.sample(1000, rng(2))
    x = x[(x - mixture.means[0]).norm(dim=1).argsort()]
    found = log_normalizer(model, x[::5], None, Scoring(level=5), 8, 4, restricted=True, training=x)
    # Without the wide class among what is usual it was ten times as many nats.
    assert float(restricted_pass(model, x[::5], found.restricted).nats.mean()) > -15


def test_what_is_needed():
    model, _ = plane((0.0, 0.0))
    with pytest.raises(UserError, match="one like data: give some"):
        log_normalizer(model, restricted=True)
    # What is usual of all classes says nothing of one.
    with pytest.raises(UserError, match="y is given, but a restricted density is one of all classes; leave y out"):
        log_normalizer(model, torch.zeros(20, 2), 0, restricted=True)


class Pixels(torch.nn.Module):
    """An exact classifier of independent pixels of one distribution over grey levels."""

    def __init__(self, log_probs, schedule, transform):
        super().__init__()
        self.one = LatticeClassifier(torch.arange(float(len(log_probs)))[:, None], log_probs, schedule, transform)

    def forward(self, x):
        return self.one(x.reshape(-1, 1)).view(len(x), x[0].numel(), -1).sum(1)


@pytest.fixture(scope="module")
def pixels():
    """A joint model of dark and of bright images, exact but for a constant; grey levels, and their code lengths."""
    schedule, transform = UniformSigmaSchedule(20), DataTransform.images((16,), 10, dequantize=False)
    dark = torch.tensor([60.0, 2, 1, 1, 4, 1, 2, 1, 5, 3], dtype=torch.float64)
    log_probs = [(part / part.sum()).log() for part in (dark, dark.flip(0))]
    parts = [Pixels(part, schedule, transform) for part in log_probs]
    model = ClassificationDiffusion(Lifted(torch.nn.ModuleList(parts), (0.5, -0.3)), schedule, transform)
    x = torch.multinomial(torch.stack(log_probs).exp(), 16 * 600, True, generator=rng()).view(-1, 16)
    x = x[torch.randperm(len(x), generator=rng(1))]
    log_p = torch.stack([part[x].sum(1) for part in log_probs]).logsumexp(0) - math.log(2)
    return model, x.float(), -log_p / (16 * math.log(2))


@pytest.mark.slow
def test_one_pass_and_few_bound_the_code_length(pixels):
    model, x, truth = pixels
    z = log_normalizer(model, x[:200], None, Scoring(level=14), 12, 8, restricted=True, training=x[:600])
    levels = [step.level for step in z.restricted.steps]
    assert 1 < len(levels) <= 9 and levels[-1] == 14 and z.restricted.steps[-1].table is not None
    one, few = (restricted_pass(model, x[600:], z.restricted, chain=chain) for chain in (False, True))
    assert (one.nfe, one.level, few.nfe, few.level) == (1, 14, len(levels), levels[0])
    excess = [part.values() - truth[600:] for part in (one, few)]
    assert all(-3 * float(part.std()) / 600**0.5 < float(part.mean()) < 0.2 for part in excess)
    # Against the decoder that knows no table, through the same level.
    tilted = single_pass(model, x[600:], None, Scoring(14)).mean_and_error()[0] + z.to_json()["value"]
    assert one.mean_and_error()[0] < tilted - 0.05
    off = x[600:602].clone()
    off[0, 0] += 0.5
    assert restricted_pass(model, off, z.restricted).nats.isinf().tolist() == [True, False]


def test_steps_rise_at_equal_ratios_from_the_level_that_decodes(pixels, monkeypatch):
    model, x, _ = pixels
    decoded, length = [], MeasuredStep.code_length
    monkeypatch.setattr(MeasuredStep, "code_length", lambda step, *a: decoded.append(step.level) or length(step, *a))
    steps = measured_steps(model, x[:200], 18)
    levels = [step.level for step in steps]
    # The first and the last are those that decode, by a table where that is better.
    assert decoded == [levels[0]] * 2 + [levels[-1]] * 2 and steps[-1].table is not None
    assert all(step.table is None for step in steps[1:-1])
    ratio = model.schedule.ratio / model.transform.model_bin
    assert levels[-1] == 18 and len(levels) <= 9 and ratio[levels[0]] >= 2.5 > ratio[levels[0] - 1]
    assert [step.level for step in measured_steps(model, x[:200], 1)] == [1]


def test_what_was_measured_is_kept_beside_its_weights(pixels, tmp_path):
    model, x, _ = pixels
    measured = report(model, x[:100], None, Scoring(level=14), ["single", "logz"], sweeps=4, training=x[:400])
    folder = tmp_path / "run"
    write_artefact(folder / "config.json", "run", {}, {"model.safetensors": {"w": torch.zeros(1)}})
    assert read_log_z(folder) is None
    with pytest.warns(UserWarning, match="log Z is not kept: other weights"):
        write_log_z(folder, measured.log_z, "of weights that were replaced meanwhile")
    assert read_log_z(folder) is None
    write_log_z(folder, measured.log_z, weights_of(folder))
    known = read_log_z(folder)
    assert known.to_json() == measured.log_z.to_json() and known.check.value == measured.log_z.check.value
    again = report(model, x[:100], None, Scoring(level=4), ["single"], log_z=known)
    for name in ("one-pass-restricted", "few-pass-restricted"):
        assert again.row(name) == measured.row(name) is not None
    assert again.believe == measured.believe == (not known.lacking) and "few-pass-restricted" in again.table()
    write_artefact(folder / "config.json", "run", {}, {"model.safetensors": {"w": torch.ones(1)}})
    assert read_log_z(folder) is None
