"""What every likelihood takes: one set of choices, one check of data, five calls that compare."""

import math

import numpy as np
import pytest
import torch
from lattices import draw, lattice_model
from oracles import MixtureClassifier, labelled_mixture, normal

import torchcdm
from torchcdm.diffusion.schedules import LogSNRSchedule, UniformSigmaSchedule
from torchcdm.errors import UserError
from torchcdm.likelihood import Scoring
from torchcdm.likelihood.scoring import scoring_level
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import DenoisingDiffusion
from torchcdm.units import DataTransform, LogLikelihood

SINGLE = ("single_pass", "elbo", "probability_flow")
OTHERS = ("report", "log_normalizer")


@pytest.fixture(scope="module")
def lattice():
    model, cells, log_probs = lattice_model(UniformSigmaSchedule(6))
    return model, draw(cells, log_probs, 16)[0]


def test_all_calls_work_with_model_and_data_alone(lattice):
    model, x = lattice
    found = [getattr(torchcdm.likelihood, name)(model, x) for name in SINGLE]
    assert all(isinstance(one, LogLikelihood) and len(one.values()) == len(x) for one in found)
    result, z = torchcdm.likelihood.report(model, x, sweeps=4), torchcdm.likelihood.log_normalizer(model, x)
    # One level for all of them, and so the same numbers as in the report.
    assert {one.level for one in found} | {z.level, result.gap.level} == {scoring_level(model)}
    assert found[0].mean_and_error()[0] == result.row("one-pass-level").value
    assert found[2].mean_and_error()[0] == result.row("flow").value
    assert abs(z.value) < 0.2 and not z.lacking


def test_samples_off_the_grid_are_told(lattice):
    model, x = lattice
    shifted = x.double().clone()
    shifted[:3] += 0.5 * model.transform.bin
    for name in SINGLE:
        with pytest.warns(UserWarning, match="values between the grey levels have no code length"):
            getattr(torchcdm.likelihood, name)(model, shifted)


def test_gaps_have_one_sign(lattice):
    model, x = lattice
    one_pass, flow = (getattr(torchcdm.likelihood, name)(model, x) for name in ("single_pass", "probability_flow"))
    expected = float((flow.nats - one_pass.nats).mean())
    per_nat = 1 / (flow.dim * math.log(2))
    result = torchcdm.likelihood.report(model, x, methods=("single", "flow"))
    assert result.gap.mean == pytest.approx(per_nat * expected, abs=1e-6)
    assert result.gaps["mean"][0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"level": -1}, "level is -1"),
        ({"level": 2.5}, "level is 2.5"),
        ({"draws": 0}, "draws is 0"),
        ({"draws": math.nan}, "draws is nan"),
        ({"draws": 10**9}, "draws is 1000000000"),
        ({"seed": 2**70}, "seed is"),
        ({"seed": None}, "seed is None"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": "many"}, "steps is 'many'; it must be a valid integer"),
        ({"probes": 0}, "probes is 0"),
        ({"probes": 3}, "probes is 3; it must be a multiple of 2"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_choices_are_checked_in_one_place(choices, message):
    with pytest.raises(UserError, match=message):
        Scoring(**choices)


def test_whole_numbers_of_any_type_will_do():
    assert Scoring(np.int64(3), draws=np.int32(2)).draws == 2


def spoiled(x, value):
    x = x.double().clone()
    x[1] = value
    return x


@pytest.mark.parametrize("name", SINGLE + OTHERS)
@pytest.mark.parametrize(
    "bad",
    [
        lambda x: x[:0],
        lambda x: x[:, :1],
        lambda x: x[0],
        lambda x: spoiled(x, math.nan),
        lambda x: spoiled(x, math.inf),
        lambda x: x.to(torch.complex64),
        lambda x: np.array([["a", "b"]]),
        lambda x: "x",
    ],
)
def test_bad_data_are_refused(lattice, name, bad):
    model, x = lattice
    with pytest.raises((ValueError, TypeError)):
        getattr(torchcdm.likelihood, name)(model, bad(x))


@pytest.mark.parametrize("name", [*SINGLE, "report"])
def test_arrays_and_numbers_of_any_type(lattice, name):
    model, x = lattice
    scoring, call = Scoring(steps=2, batch_size=7), getattr(torchcdm.likelihood, name)
    options = {"methods": ("single", "elbo", "flow")} if name == "report" else {}
    found = [call(model, data, None, scoring, **options) for data in (x, x.numpy(), x.to(torch.uint8), x.half())]
    values = [one.row("flow").value if name == "report" else one.values().mean() for one in found]
    assert values == pytest.approx([float(values[0])] * 4, abs=1e-9)


@pytest.mark.parametrize("y", [[0], [0, 1, 5], [-1, 0, 1], [[0, 1, 0]], [0.5, 0, 1], ["a", "b", "c"]])
def test_bad_labels_are_refused(y):
    schedule, mixture = LogSNRSchedule(12, 0.05, 80), labelled_mixture()
    model = ClassificationDiffusion(
        MixtureClassifier(mixture, schedule, joint=True), schedule, DataTransform((2,))
    )
    for name in SINGLE:
        with pytest.raises((ValueError, TypeError)):
            getattr(torchcdm.likelihood, name)(model, normal(3, 2), y)


@pytest.mark.parametrize("name", [*SINGLE, "report"])
def test_a_sample_beyond_what_float32_squares_is_named_not_scored_as_nan(name):
    schedule = LogSNRSchedule(12, 0.05, 80)
    model = ClassificationDiffusion(MixtureClassifier(labelled_mixture(), schedule), schedule, DataTransform((2,)))
    x = normal(3, 2)
    x[1] = 1e300
    with pytest.raises(UserError, match="sample 1 is so far from the model's data"):
        getattr(torchcdm.likelihood, name)(model, x, scoring=Scoring(level=2))


@pytest.mark.parametrize("name", [*SINGLE, "report"])
def test_swapped_and_foreign_arguments_are_refused(lattice, name):
    model, x = lattice
    call = getattr(torchcdm.likelihood, name)
    for given in ((x, model), ("model", x), (model, x, None, "scoring"), (model, x, None, None)):
        with pytest.raises((UserError, TypeError)):
            call(*given)


def test_labels_of_a_model_without_classes_are_refused(lattice):
    model, x = lattice
    with pytest.raises(UserError, match="classes"):
        torchcdm.likelihood.elbo(model, x, torch.zeros(len(x), dtype=torch.long))


def test_a_model_without_density_says_so():
    ddm = DenoisingDiffusion(torch.nn.Module(), UniformSigmaSchedule(12), DataTransform((2,)))
    with pytest.raises(UserError, match="needs a density"):
        torchcdm.likelihood.single_pass(ddm, normal(3, 2))
    with pytest.raises(UserError, match="needs a density"):
        torchcdm.likelihood.log_normalizer(ddm)


@pytest.mark.parametrize(
    "options", [{"sweeps": 10**12}, {"sweeps": 3}, {"replicas": 1}, {"y": 7}, {"y": [0, 1]}]
)
def test_log_z_refuses_what_cannot_be(lattice, options):
    with pytest.raises((ValueError, TypeError)):
        torchcdm.likelihood.log_normalizer(lattice[0], **options)


def test_a_choice_that_is_given_twice_is_refused():
    with pytest.raises(TypeError, match="multiple values for keyword argument 'level'"):
        Scoring(0, level=3)
