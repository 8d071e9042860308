"""The likelihood report: its contract, and what it says of models whose faults are known."""

import json
import math
import re

import pytest
import torch
from lattices import draw, lattice_model
from oracles import MixtureClassifier, labelled_mixture, normal, rng

from studies.exact import GaussianMixture
from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.target import ModelTarget
from torchcdm.compose import tempered, tilted
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.schedules import LogSNRSchedule, UniformSigmaSchedule
from torchcdm.errors import UserError
from torchcdm.likelihood import FlowSolver, Scoring, elbo, report
from torchcdm.likelihood.report import _rows_seen
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.units import DataTransform

KEYS = {"data", "unit", "rows", "log2_z_per_dim", "log2_z_per_dim_check", "gap_to_flow", "believe", "why"}
NAMES = ["published-convention", "one-pass", "one-pass-level", "one-pass-normalized", "elbo", "flow"]


def at_levels(T):
    schedule, mixture = LogSNRSchedule(T, 0.01, 80), labelled_mixture()
    base = GaussianMarginals.fit(mixture.sample(5000, rng()), schedule)
    return ClassificationDiffusion(MixtureClassifier(mixture, schedule, base), schedule, DataTransform((2,)), base)


@pytest.fixture(scope="module")
def vectors():
    return at_levels(40), labelled_mixture().sample(60, rng(1))


def shifted(model, amount):
    """The same model with ``amount`` nats added to log p at all levels but the last."""
    exact = model.backbone

    class Shifted(torch.nn.Module):
        def forward(self, x):
            h = exact(x)
            return torch.cat([h[:, :-1] + amount, h[:, -1:]], 1)

    return ClassificationDiffusion(Shifted(), model.schedule, model.transform, model.base)


def test_an_exact_model_is_believed(vectors):
    model, x = vectors
    result = report(model, x, name="mixture", split="test", sweeps=150)
    content = json.loads(json.dumps(result.to_json()))
    assert set(content) == KEYS
    assert content["data"] == {"name": "mixture", "split": "test", "count": 60, "dim": 2}
    assert content["unit"] == "nats"
    assert [row["name"] for row in content["rows"]] == NAMES
    assert all(set(row) == {"name", "value", "se", "nfe", "level"} for row in content["rows"])
    assert [row["nfe"] for row in content["rows"]] == [1, 1, 1, 1, 40, 79]
    assert set(content["log2_z_per_dim_check"]) == {"value", "low", "high", "estimator", "ess"}
    z = content["log2_z_per_dim"]
    assert set(z) == {"value", "low", "high", "estimator", "ess", "convergence"}
    assert z["low"] < 0.01 and z["high"] > -0.01
    assert set(z["convergence"]["starts"]) == {"samples", "data", "far"}
    assert set(content["gap_to_flow"]) == {"mean", "sd", "level"} and content["gap_to_flow"]["level"] == 1
    assert abs(content["gap_to_flow"]["mean"]) < 0.02 and content["gap_to_flow"]["sd"] < 0.03
    assert result.believe, result.why
    normalized, level = result.row("one-pass-normalized"), result.row("one-pass-level")
    assert normalized.value == pytest.approx(level.value + 2 * math.log(2) * content["log2_z_per_dim"]["value"])
    text = result.table()
    said = "To be believed: yes", "log2 Z / d by start: samples", "the ELBO", "spread over samples", "KL of its start"
    for words in (*said, *NAMES):
        assert words in text


def test_the_bar_knows_how_many_rows_the_network_will_see(vectors, capsys):
    model, x = vectors
    seen = []
    hook = model.backbone.register_forward_hook(lambda network, inputs, output: seen.append(len(inputs[0])))
    scoring = Scoring(1)
    for stage in ("single", "elbo", "flow"):
        seen.clear()
        report(model, x, scoring=scoring, methods=[stage], progress=True)
        assert sum(seen) == _rows_seen(model, stage, len(x), scoring), stage
    hook.remove()
    finer = at_levels(60)  # more than the variances of its chain are measured at
    finer.backbone.register_forward_hook(lambda network, inputs, output: seen.append(len(inputs[0])))
    seen.clear()
    report(finer, x, scoring=scoring, methods=["elbo"])
    assert sum(seen) == _rows_seen(finer, "elbo", len(x), scoring)
    assert not model.backbone._forward_hooks
    shown = capsys.readouterr().err
    assert "likelihood, flow: 100%" in shown and re.search(r"\d\d:\d\d<\d\d:\d\d", shown)


def test_densities_without_a_network_of_their_own_have_a_report(vectors):
    model, x = vectors
    methods = ("single", "elbo", "flow")
    plain, found = (report(one, x[:20], methods=methods) for one in (model, tempered(model, 1.0)))
    for one, other in zip(plain.rows, found.rows, strict=True):
        assert one.name == other.name and one.value == pytest.approx(other.value, abs=1e-6)
    heavy = tilted(model, lambda x: 0 * x.sum(1))
    assert [row.name for row in report(heavy, x[:20], methods=("elbo",)).rows] == ["elbo"]
    with pytest.raises(UserError, match="flow: the noise of a tilted density has no derivative"):
        report(heavy, x[:20], methods=("flow",))


def test_a_constant_put_into_log_p_is_taken_out_again(vectors):
    model, x = vectors
    right, wrong = (report(m, x, methods=("single", "logz"), sweeps=20) for m in (model, shifted(model, 3.0)))
    assert wrong.row("one-pass").value == pytest.approx(right.row("one-pass").value - 3)
    assert wrong.row("one-pass-normalized").value == pytest.approx(right.row("one-pass-normalized").value)
    assert not right.believe and "compared with nothing" in right.why


def test_one_pass_and_flow_see_the_same_noise(vectors):
    model, x = vectors
    result = report(shifted(model, 0.25), x, methods=("single", "flow"))
    assert result.gap.mean == pytest.approx(-0.25, abs=0.02)
    difference = result.row("one-pass-level").value - result.row("flow").value
    assert difference == pytest.approx(result.gap.mean, abs=1e-9)
    assert not result.believe and "log Z was not estimated" in result.why
    assert result.to_json()["log2_z_per_dim"] is None
    assert [r.value for r in result.rows if r.name == "one-pass-normalized"] == [None]
    assert "\none-pass-level " in result.table() and "one-pass-normalized" not in result.table()


def test_the_spread_is_freed_of_the_probes(monkeypatch):
    # 18 dimensions: above the limit of the exact trace. The true gap is 0, so all spread is the probes'.
    schedule = UniformSigmaSchedule(12)
    mixture = labelled_mixture()

    class Nine(torch.nn.Module):
        """Nine independent copies of the mixture."""

        def forward(self, x):
            one = MixtureClassifier(mixture, schedule)
            return sum(one(x[:, 2 * i : 2 * i + 2]) for i in range(9))

    model = ClassificationDiffusion(Nine(), schedule, DataTransform((18,)))
    x = mixture.sample(9 * 60, rng(2)).reshape(60, 18)
    result = report(model, x, methods=("single", "flow"))
    z = torch.randn(60, 18, generator=rng(1), dtype=torch.float64)
    noise = FlowSolver(model).log_prob(z).probe_gap.std() / 2
    assert float(noise) > 0.02
    raw = result.gap.se * math.sqrt(60)
    assert result.gap.sd < raw


def test_the_error_of_the_steps_is_that_of_all_classes():
    # The path of a narrow class is bent, that of the wide one is nearly that of the base.
    means, schedule = torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), UniformSigmaSchedule(40)
    mixture = GaussianMixture(torch.ones(2), means, torch.tensor([1e-3, 1.0]), torch.arange(2))
    model = ClassificationDiffusion(MixtureClassifier(mixture, schedule), schedule, DataTransform((2,)))
    x, y = mixture.sample_labelled(400, rng(1))
    x = x[y.argsort()]
    notes = [report(model, part, None, Scoring(steps=8), ("flow",)).notes[0] for part in (x, x.flip(0))]
    first, last = (float(re.search(r"of its mean ([\d.]+) from the steps", note)[1]) for note in notes)
    assert first > 0.01 and 0.7 < first / last < 1.4


def test_probes_are_those_of_the_sample_wherever_it_stands():
    schedule = UniformSigmaSchedule(12)
    network = torch.nn.Sequential(torch.nn.Linear(18, 14), torch.nn.Tanh())
    model = ClassificationDiffusion(network, schedule, DataTransform((18,)))
    solver, z, some = FlowSolver(model), normal(9, 18).float(), [2, 5, 8]
    torch.testing.assert_close(solver.log_prob(z[some], index=some).log_prob, solver.log_prob(z).log_prob[some])


def test_data_on_a_grid_are_scored_where_the_noise_is_half_a_bin():
    schedule = UniformSigmaSchedule(20)
    model, cells, log_probs = lattice_model(schedule)
    x, _ = draw(cells, log_probs, 6)
    result = report(model, x, None, Scoring(steps=2), ("single", "elbo", "flow"))
    level = result.row("one-pass-level").level
    assert schedule.ratio[level - 1] < 0.5 * model.transform.model_bin <= schedule.ratio[level]
    assert {result.row(name).level for name in ("one-pass-normalized", "elbo", "flow")} == {level}
    assert result.gap.level == level
    assert report(model, x, None, Scoring(level=3), ("single",)).row("one-pass-level").level == 3


def test_code_lengths_of_a_lattice_are_not_beaten():
    model, cells, log_probs = lattice_model(LogSNRSchedule(20, 0.05, 80))
    x, true = draw(cells, log_probs, 100)
    result = report(model, x[:80], None, Scoring(draws=2), sweeps=8)
    assert result.count == 80 and result.unit == "bits/dim"
    assert [row.name for row in result.rows] == NAMES
    truth = float(true[:80].mean())
    z_error = (result.log_z.high - result.log_z.low) / 3.92 / (2 * math.log(2))
    assert result.row("one-pass-normalized").value > truth - 3 * z_error - 1e-6
    for name in ("one-pass", "one-pass-level", "elbo", "flow"):
        # Paired with the true code length; what is left is the noise of one draw.
        assert result.row(name).value > truth - 0.02, name
    assert result.row("one-pass").nfe == 2


def test_the_same_numbers_from_any_batches(vectors):
    model, x = vectors
    one, two = (report(model, x[:50], None, Scoring(None, 2, 0, 6, 2, size), sweeps=4) for size in (5000, 40))
    for a, b in zip(one.rows, two.rows, strict=True):
        assert (a.value is None and b.value is None) or a.value == pytest.approx(b.value, abs=1e-8), a.name
    assert one.gap.sd == pytest.approx(two.gap.sd, abs=1e-8)


def test_the_mode_of_the_model_is_left_alone(vectors):
    model, x = vectors
    model.train()
    report(model, x[:4], None, Scoring(steps=2), ("single", "elbo", "flow"))
    assert model.training
    model.eval()


def test_given_the_class():
    schedule, mixture = LogSNRSchedule(40, 0.05, 80), labelled_mixture()
    model = ClassificationDiffusion(
        MixtureClassifier(mixture, schedule, joint=True), schedule, DataTransform((2,))
    )
    x, y = mixture.sample_labelled(40, rng(1))
    result = report(model, x, y, methods=("single", "flow", "logz"))
    assert result.row("one-pass").value == pytest.approx(float(-mixture.log_prob(x, 0, schedule, y).mean()))
    assert result.log_z is None and "class-conditional" in result.why


def test_given_the_class_the_chain_is_that_of_the_classes():
    # Two classes far apart: without its class a noisy x says little of where it came from.
    schedule, means = LogSNRSchedule(20, 0.05, 80), torch.tensor([[-4.0, 0.0], [4.0, 0.0]])
    mixture = GaussianMixture(torch.ones(2), means, torch.tensor([0.2, 0.2]), torch.arange(2))
    model = ClassificationDiffusion(
        MixtureClassifier(mixture, schedule, joint=True), schedule, DataTransform((2,))
    )
    x, y = mixture.sample_labelled(300, rng(1))
    x, y = x[y.argsort()], y.sort().values
    # The same noise in both, so their difference is that of the variances alone.
    loose = elbo(model, x, y, kernels=Kernels.of_target(ModelTarget(model))).mean_and_error()[0]
    assert report(model, x, y, methods=("elbo",)).row("elbo").value < loose - 0.05


class AroundContext(torch.nn.Module):
    """x given its context c is N(c, 0.2 I): h_t(x, c) over the standard normal."""

    classes, joint, context = None, False, 3

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, x, c):
        alpha, sigma = self.schedule.alpha, self.schedule.sigma
        assert c is not None, "no context was given"
        given = torch.distributions.Normal(alpha * c[..., None], (0.2 * alpha**2 + sigma**2).sqrt())
        return (given.log_prob(x[..., None]) - torch.distributions.Normal(0.0, 1.0).log_prob(x)[..., None]).sum(1)


def test_given_a_context():
    schedule = LogSNRSchedule(60, 0.05, 80)
    model = ClassificationDiffusion(AroundContext(schedule), schedule, DataTransform((3,)))
    context = 2 * normal(300, 3)
    x = context + math.sqrt(0.2) * normal(300, 3, seed=1)
    result = report(model, x, context, methods=("single", "elbo"))
    truth = -torch.distributions.Normal(context, math.sqrt(0.2)).log_prob(x).sum(1).mean()
    assert result.row("one-pass").value == pytest.approx(float(truth))
    assert result.row("elbo").value == pytest.approx(float(truth), abs=0.2)


def test_unknown_methods_are_refused(vectors):
    model, x = vectors
    with pytest.raises(UserError, match="is 'flows'; did you mean 'flow'"):
        report(model, x, methods=("flows",))
