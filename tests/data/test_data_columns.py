"""Columns of few values: how they are found, what becomes of them, and that their densities are probabilities."""

import math

import numpy as np
import pytest
import torch
from oracles import MixtureClassifier, rng

from studies.exact import GaussianMixture
from torchcdm.data import from_object
from torchcdm.data.loading import assemble, samples_of
from torchcdm.data.options import DataOptions
from torchcdm.diffusion.schedules import LogSNRSchedule
from torchcdm.errors import UserError
from torchcdm.likelihood import Scoring, elbo, probability_flow, single_pass
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.training.build import in_units
from torchcdm.units import ColumnTransform
from torchcdm.units.lattice import Cells, cell_width, discrete_values, frequent_values

VALUES, CHANCES = (0.0, 1.0, 2.0, 5.0), (0.4, 0.3, 0.1, 0.2)
CELLS = {0: Cells(VALUES, 1.0), 2: Cells((0.0, 1.0), 1.0)}


def table(rows=4000, seed=0):
    """A column of four values, a skewed continuous one, a flag."""
    draw = np.random.RandomState(seed)
    columns = draw.choice(VALUES, rows, p=CHANCES), draw.gamma(2.0, size=rows), draw.uniform(size=rows) < 0.3
    return np.stack(columns, 1).astype(np.float64)


@pytest.mark.parametrize(
    ("x", "width"),
    [
        (np.random.RandomState(0).normal(size=1000), None),
        (np.full(1000, 3.0), None),
        (np.random.RandomState(0).randint(0, 5, 1000) * 0.25, 0.25),
        # 0 ... 255 in 10 000 rows come back 39 times each; in 1000 rows they might as well be continuous.
        (np.random.RandomState(0).randint(0, 256, 10_000), 1),
        (np.random.RandomState(0).randint(0, 256, 1000), None),
        (np.round(np.random.RandomState(0).normal(size=100_000), 3), None),  # finer than the noise
        (np.arange(10), None),  # each value once
    ],
)
def test_which_columns_are_discrete(x, width):
    values = discrete_values(np.asarray(x, dtype=np.float64), "a")
    assert (None if values is None else cell_width(values)) == width


def test_values_that_nearly_coincide_are_refused():
    with pytest.raises(UserError, match="column 'a' has 3 distinct values in 100 rows.*e-12 apart; round the column"):
        discrete_values(np.random.RandomState(0).choice([0, 1, 1 + 1e-12], 100), "a")


def test_a_value_that_comes_back():
    x = np.random.RandomState(0).normal(size=1000)
    assert frequent_values(x) == {}
    assert frequent_values(np.r_[x, np.full(300, 7.0)]) == {7.0: 300 / 1300}


def test_a_table_spreads_discrete_columns_over_their_cells():
    source = from_object(table(), validation_fraction=0.1, test_fraction=0.1)
    text = " ".join(source.notes)
    assert "'c0' has 4 distinct values: dequantised with cells of 1" in text and "'c2' has 2 distinct values" in text
    assert isinstance(source.transform, ColumnTransform) and source.transform.cells == CELLS
    x, _ = source.train.tensors()
    noisy = source.transform.add_noise(x, rng())
    moved = (noisy - x).abs()
    assert not moved[:, 1].any() and 0.45 < float(moved[:, [0, 2]].max()) <= 0.5
    assert torch.equal(source.transform.quantize(noisy), x)
    assert not torch.equal(source.transform.add_noise(x, rng(1)), noisy)


@pytest.mark.parametrize("bend", [False, True])
def test_gaussianized_tables_bend_continuous_columns_alone(bend):
    source = from_object(table(), validation_fraction=0.1, test_fraction=0.1)
    source = in_units(source, DataOptions(gaussianize=bend))
    x, _ = source.train.tensors()
    z = source.transform.encode(x, rng()).double()
    skew = ((z - z.mean(0)) / z.std(0)).pow(3).mean(0).abs()
    assert skew[[0, 2]].max() < 0.1 and (float(skew[1]) < 0.2) == bend
    assert source.transform.cells == CELLS


def test_without_dequantisation_they_stay_as_they_are():
    options = DataOptions(dequantize=False)
    source = assemble(samples_of(table(), None, options), options)
    assert any("'c0' has 4 distinct values: its density has no upper bound" in note for note in source.notes)
    x, _ = source.train.tensors()
    assert not source.transform.dequantize and source.transform.add_noise(x, rng()) is x


@pytest.mark.slow
def test_likelihoods_of_discrete_columns_are_their_probabilities():
    """A standard normal in model units is the exact density: each row's likelihood is the product of its chances."""
    x = torch.from_numpy(table(20_000)[:, [0, 2]])
    source = from_object(x.numpy(), validation_fraction=0.0, test_fraction=0.0)
    chances = torch.tensor(CHANCES).double().log()[[VALUES.index(value) for value in x[:300, 0].tolist()]]
    true = chances + torch.where(x[:300, 1] == 1, math.log(0.3), math.log(0.7))
    normal = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    schedule = LogSNRSchedule(60, 0.01, 50.0)
    model = ClassificationDiffusion(
        MixtureClassifier(normal, schedule), schedule, transform=source.transform
    ).double()
    found = {
        "one pass": single_pass(model, x[:300], None, Scoring(level=0)),
        "through a level": single_pass(model, x[:300], None, Scoring(level=1)),
        "flow": probability_flow(model, x[:300]),
        "elbo": elbo(model, x[:300].repeat(10, 1)),
    }
    # The histogram's own noise, and 2e-4 of the mass beyond the known values.
    assert (found["one pass"].nats - true).abs().max() < 0.05
    for name, likelihood in found.items():
        assert abs(float((likelihood.nats.view(-1, 300) - true).mean())) < 0.05, name


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda x: x + 1e8, "column '.*' varies less than float32 resolves"), (lambda x: x * 1e39, "beyond float32")],
)
def test_what_float32_does_not_hold_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        from_object(change(np.random.RandomState(0).normal(size=(100, 2))))


def test_large_whole_numbers_are_exact():
    assert from_object(2.0**23 + np.random.RandomState(0).randint(0, 3, (100, 2))).shape == (2,)
