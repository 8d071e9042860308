"""Columns whose density has steps and gaps."""

import pytest
import torch
from oracles import normal, rng

from torchcdm.units import ColumnTransform
from torchcdm.units.lattice import Cells


def stepped(n=1000):
    """Six boxes of width 2, ten apart, and a normal."""
    boxes = 10 * torch.randint(6, (n,), generator=rng(0)) + 2 * torch.rand(n, generator=rng(1), dtype=torch.float64)
    return torch.stack([boxes, normal(n, seed=2)], 1)


def test_a_column_of_boxes_goes_by_a_histogram_and_a_normal_does_not():
    x = stepped()
    transform = ColumnTransform.fit(x, step=True, dequantize=False)
    assert list(transform.histograms) == ["0"] and not transform.cells
    assert not ColumnTransform.fit(x, dequantize=False).histograms
    z, new = transform(x), stepped(2000)
    assert torch.allclose(transform.inverse(z), x, atol=1e-6) and float(z[:, 0].std()) < 1.1
    # log p of boxes of known height, -log 12, and of a standard normal, -1.42.
    nats = torch.distributions.Normal(0.0, 1.0).log_prob(transform(new)).sum(1) + transform.log_det(new)
    assert abs(float(nats.mean()) + 2.485 + 1.419) < 0.1


def test_steps_are_kept_with_the_transform_and_leave_numbers_as_they_are():
    x = stepped()
    transform = ColumnTransform.fit(x, step=True)
    again = ColumnTransform(**{key: value for key, value in transform.arguments().items() if key != "kind"})
    assert torch.equal(again(x), transform(x))
    assert torch.equal(transform.quantize(x), x) and torch.equal(transform.spread(x, torch.rand(1000, 2)), x)


@pytest.mark.parametrize("cells", [{}, {0: Cells((5.0,), 0.1, True)}])
def test_the_least_and_the_largest_row_are_inside_when_they_are_rounded(cells):
    x = 0.1 + 7.3 * torch.rand(1000, 1, generator=rng(0), dtype=torch.float64)
    x[::3] = 5.0 if cells else x[::3]
    transform = ColumnTransform.fit(x, cells, step=True)
    assert transform.histograms
    ends = torch.cat([x.amin(0, keepdim=True), x.amax(0, keepdim=True)])
    rounded = ends * torch.tensor([[1 - 2.0**-24], [1 + 2.0**-24]], dtype=torch.float64)
    normal_of = torch.distributions.Normal(0.0, 1.0).log_prob
    found = [normal_of(transform(rows))[:, 0] + transform.log_det(rows) for rows in (ends, rounded)]
    torch.testing.assert_close(*found)
