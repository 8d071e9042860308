"""Columns of a table, each brought near a normal: increasing, inverted exactly, with the slope that densities need."""

import json

import pytest
import torch
from scipy.stats import kstest

from torchcdm.apps.denoising import require_additive_noise
from torchcdm.errors import UserError
from torchcdm.units import ColumnTransform, transform_from_config
from torchcdm.units.lattice import Cells

FAR = [[0.0, 0.0, 0.0, -9.0], [-5.0, -5.0, -5.0, 3.3], [1e4, 1e4, 1e4, 40.0]]
"""Zero and below in a column of positive numbers; beyond, in a gap between, and above the known values."""


def draws(generator):
    """Skewed, heavy-tailed, normal, and the values 0, 1, 2 and 5, dequantised: (4000, 4)."""
    normal = torch.randn(4000, 4, generator=generator, dtype=torch.float64)
    values = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    few = values[torch.tensor([4.0, 2.0, 1.0, 1.0]).multinomial(4000, True, generator=generator)]
    noise = torch.rand(4000, generator=generator, dtype=torch.float64) - 0.5
    heavy = normal[:, 1] * normal[:, 3].abs().exp()
    return torch.stack([normal[:, 0].exp(), heavy, 2 * normal[:, 2] + 5, few + noise], 1)


@pytest.fixture(scope="module")
def x():
    return draws(torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def transform(x):
    return ColumnTransform.fit(x, {3: Cells((0.0, 1.0, 2.0, 5.0), 1.0)})


def distance(column):
    """Of standardised numbers from a normal."""
    return kstest(((column - column.mean()) / column.std()).numpy(), "norm").statistic


def test_every_column_comes_near_a_normal(x, transform):
    z = transform(x)
    assert [round(distance(x[:, k]), 2) > 0.1 for k in range(4)] == [True, True, False, True]
    assert max(distance(z[:, k]) for k in range(4)) < 0.03
    standardised = (x - x.mean(0)) / x.std(0)
    assert standardised[:, :2].abs().amax(0).min() > 10 and z.abs().max() < 6
    assert abs(float(z[:, 3].mean())) < 0.03 and abs(float(z[:, 3].std()) - 1) < 0.03
    # A skewed column of positive numbers becomes its logarithm; a normal one keeps its shape.
    pairs = torch.stack([x[:, 0].log(), z[:, 0]]), torch.stack([x[:, 2], z[:, 2]])
    assert all(float(pair.corrcoef()[0, 1]) > 0.9999 for pair in pairs)
    assert transform.bent.tolist() == [False, True, False, False]


def test_the_map_is_increasing_and_inverted_far_out_too(x, transform):
    everywhere = torch.cat([x, torch.tensor(FAR, dtype=torch.float64)])
    z = transform(everywhere)
    assert z.isfinite().all()
    for k in range(4):
        order = everywhere[:, k].argsort()
        assert (z[order, k].diff() >= 0).all()
    torch.testing.assert_close(transform.inverse(z), everywhere, rtol=1e-9, atol=1e-9)


def test_log_det_is_the_log_of_the_slopes(x, transform):
    everywhere = torch.cat([x[:200], torch.tensor(FAR, dtype=torch.float64)]).requires_grad_()
    slopes = torch.autograd.grad(transform(everywhere).sum(), everywhere)[0]
    torch.testing.assert_close(transform.log_det(everywhere.detach()), slopes.log().sum(1))


def test_a_density_in_data_units_integrates_to_one(x):
    """Of each column by itself, a standard normal in model units: over the cells, the gap and what is beyond."""
    for k, values in ((0, {}), (1, {}), (3, {0: Cells((0.0, 1.0, 2.0, 5.0), 1.0)})):
        transform = ColumnTransform.fit(x[:, [k]], values)
        z = torch.linspace(-9, 9, 200_001, dtype=torch.float64)[:, None]
        grid = transform.inverse(z)
        middle, widths = (grid[1:] + grid[:-1]) / 2, grid.diff(dim=0)[:, 0]
        normal = torch.distributions.Normal(0, 1)
        density = (normal.log_prob(transform(middle).double()).sum(1) + transform.log_det(middle)).exp()
        assert float((density * widths).sum()) == pytest.approx(1, abs=2e-3)


def test_it_survives_json_and_single_precision(x, transform):
    copy = transform_from_config(json.loads(json.dumps(transform.to_config())))
    assert torch.equal(copy(x), transform(x)) and torch.equal(copy.float()(x), transform(x))
    assert transform(x.float()).dtype == torch.float32 and copy.shape == (4,)


@pytest.mark.parametrize("change", [
    {"histograms": None}, {"histograms": 2}, {"histograms": "x"}, {"histograms": [1]}, {"warp": None}, {"warp": {}},
    *({"warp": {name: value}} for name in ("least", "scale", "tail", "bent") for value in ([""] * 4, [1.0], 1.0)),
])  # fmt: skip
def test_a_damaged_file_of_it_is_one_line(transform, change):
    config = json.loads(json.dumps(transform.to_config()))
    if change.get("warp"):
        change = {"warp": config["warp"] | change["warp"]}
    with pytest.raises(UserError, match="data transform: "):
        transform_from_config(config | change)


@pytest.mark.parametrize("dequantize", [False, True])
def test_rows_that_come_dequantised_get_no_second_noise(x, dequantize):
    transform = ColumnTransform.fit(x, {3: Cells((0.0, 1.0, 2.0, 5.0), 1.0)}, dequantize=dequantize)
    for one in (transform, transform_from_config(json.loads(json.dumps(transform.to_config())))):
        moved = one.add_noise(x, torch.Generator().manual_seed(1)) - x
        assert bool(moved[:, 3].any()) == dequantize and not moved[:, :3].any()


def test_a_column_of_few_values_is_not_bent_however_skewed_it_is():
    x = (2.0 ** torch.arange(8, dtype=torch.float64)).repeat(50)[:, None]
    transform = ColumnTransform.fit(x, {0: Cells(tuple((2.0 ** torch.arange(8)).tolist()), 1.0)})
    assert not transform.bent.any() and not transform.least.any()


def test_two_normals_side_by_side_are_not_bent():
    """Together they look skewed and of other than normal tails; their ratio is simple as they are."""
    sources = torch.arange(4000) % 2
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * torch.tensor([1.0, 2.0]) ** sources[:, None] + torch.tensor([1.0, 5.0]) * sources[:, None]
    warp = ColumnTransform.fit(x, sources=sources)
    assert not warp.bent.any()
    torch.testing.assert_close(warp(x), (x - x.mean(0)) / x.std(0, correction=0))
    torch.testing.assert_close(ColumnTransform.fit(x.exp(), sources=sources)(x.exp()), warp(x))


def test_noise_on_bent_columns_is_refused(transform):
    with pytest.raises(UserError, match="Gaussianised data, where noise on grey levels or columns is not additive"):
        require_additive_noise(transform)


@pytest.mark.parametrize("bent", [True, False])
def test_numbers_whose_exponential_overflows_have_a_gradient(bent):
    x = 2000 - 100 * torch.rand(500, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log()
    transform = ColumnTransform.fit(x, bent=bent)
    z = transform(x[:5]).requires_grad_()
    (slope,) = torch.autograd.grad(transform.inverse(z).sum(), z)
    torch.testing.assert_close(slope[:, 0].log(), -transform.log_det(x[:5]))
