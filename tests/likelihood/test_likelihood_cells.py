"""Decoders, which weigh a few grey levels of a pixel, against the sum over all of them."""

import math

import pytest
import torch
from oracles import normal, rng
from torch import Tensor

from torchcdm.diffusion.schedules import LogSNRSchedule
from torchcdm.likelihood.cells import (
    EqualCells,
    NormalCells,
    grey_levels,
    log_masses,
    noisy_cells,
    truncated_normal_means,
)
from torchcdm.units import DataTransform, GaussianizedTransform

DIM, LEVELS = 6, 256
SCHEDULE = LogSNRSchedule(21, 1e-3, 1e2)


def uneven() -> GaussianizedTransform:
    """Histograms from even to a pixel that hardly ever changes, and one with grey levels that have no cell at all."""
    masses = torch.rand(DIM, LEVELS, generator=rng(3), dtype=torch.float64)
    masses = masses ** torch.tensor([0.0, 1, 4, 20, 4, 4])[:, None]
    masses[4] *= 1e-6
    masses[4, 40] = 1.0
    masses[5, 10:90] = masses[5, 91::3] = 0.0
    transform = GaussianizedTransform((DIM,), 1.0, 0.0, LEVELS - 1.0)
    transform.cumulative[:, 1:] = (masses / masses.sum(1, keepdim=True)).cumsum(1)
    transform.cumulative[:, -1] = 1
    return transform


def at_level(t: int) -> NormalCells:
    cells = noisy_cells(uneven(), SCHEDULE, t)
    assert isinstance(cells, NormalCells)
    return cells


def over_all_cells(cells: NormalCells, z: Tensor, x0: Tensor) -> Tensor:
    """log P(k|z) for every k, (B, DIM, LEVELS), as defined: all cells, the tilt by Newton, nothing left out."""
    edges = torch.special.ndtri(cells.transform.cumulative)
    middle = (cells.mean_weight * z)[..., None]
    lower, upper = ((edge - middle) / cells.deviation for edge in (edges[:, :-1], edges[:, 1:]))
    # By symmetry to the left tail, where log_ndtr is accurate.
    right = lower + upper > 0
    top = torch.special.log_ndtr(torch.where(right, -lower, upper))
    bottom = torch.special.log_ndtr(torch.where(right, -upper, lower))
    flat = top + torch.log(-torch.expm1((bottom - top).clamp_max(-1e-300)))
    low, high = ((-0.5 * end.square() - flat).exp() / math.sqrt(2 * math.pi) for end in (lower, upper))
    means = middle + cells.deviation * (low - high).nan_to_num().clamp(lower, upper)
    centre = (flat.softmax(-1) * means).sum(-1)
    steps, goal = (means - centre[..., None]) / cells.unit[:, None], (x0 - centre) / cells.unit
    tilt = torch.zeros_like(goal)
    for _ in range(12):
        weights = (flat + tilt[..., None] * steps).softmax(-1)
        mean = (weights * steps).sum(-1)
        variance = (weights * (steps - mean[..., None]).square()).sum(-1)
        tilt = tilt + ((goal - mean) / variance.clamp_min(1e-3)).clamp(-2, 2)
        tilt = goal.sign() * (goal.sign() * tilt).clamp(0, 20)
    return (flat + tilt[..., None] * steps).log_softmax(-1)


def seen(cells: NormalCells, n: int) -> tuple[Tensor, Tensor]:
    """Grey levels (n, DIM) from all over the range that have a cell, and their noise."""
    x = torch.randint(0, LEVELS, (n, DIM), generator=rng(1)).double()
    empty = cells.transform.log_mass.expand(n, -1, -1).gather(2, x.long()[..., None])[..., 0].isinf()
    x = torch.where(empty, torch.tensor(0.0), x)
    noise = torch.rand(n, DIM, generator=rng(2), dtype=torch.float64)
    x_0 = cells.transform(cells.transform.spread(x.double(), noise))
    return x, cells.alpha * x_0 + cells.sigma * normal(n, DIM)


@pytest.mark.parametrize("off", [0.0, 0.3, 3.0, 30.0])
@pytest.mark.parametrize("level", [1, 4, 8, 12, 16, 21])
def test_a_window_of_cells_is_as_good_as_all(level, off):
    # Noise from a thousandth of the data's deviation to a hundred of them; means up to far outside of the range.
    cells = at_level(level)
    x, z = seen(cells, 60)
    x0 = cells.mean_weight * z + off * cells.deviation * normal(60, DIM, seed=4)
    dense = over_all_cells(cells, z, x0).gather(2, x.long()[..., None])[..., 0]
    found = cells.log_decoder(z, x, x0)
    assert torch.allclose(found, dense, atol=1e-6, rtol=1e-9)


@pytest.mark.parametrize("level", [1, 8, 16])
def test_noisy_inputs_that_nobody_drew(level):
    # The input far outside of the range, the grey level anywhere: log P down to what only logarithms can hold.
    cells = at_level(level)
    x, _ = seen(cells, 60)
    z, x0 = 15 * normal(60, DIM, seed=5), 15 * normal(60, DIM, seed=6)
    dense = over_all_cells(cells, z, x0).gather(2, x.long()[..., None])[..., 0]
    assert float(dense.min()) < -700 or level > 8
    assert torch.allclose(cells.log_decoder(z, x, x0), dense, atol=1e-6, rtol=1e-9)


@pytest.mark.parametrize("level", [1, 8, 16])
def test_probabilities_of_all_grey_levels_sum_to_one(level):
    cells = at_level(level)
    _, z = seen(cells, 8)
    x0 = z + normal(8, DIM, seed=4)
    grey = torch.arange(float(LEVELS), dtype=torch.float64)[:, None, None].expand(-1, *z.shape).flatten(0, 1)
    log_p = cells.log_decoder(z.repeat(LEVELS, 1), grey, x0.repeat(LEVELS, 1)).unflatten(0, (LEVELS, len(z)))
    assert torch.allclose(log_p.logsumexp(0), torch.zeros_like(z), atol=1e-10)
    assert bool((log_p[10:90, :, 5] < -600).all()), "grey levels without a cell"
    # What is no grey level has no probability.
    for k in (-1.0, 0.5, LEVELS):
        assert bool(cells.log_decoder(z, torch.full_like(z, k), x0).isinf().all())


def test_few_cells_are_weighed():
    cells = at_level(5)
    x, z = seen(cells, 500)
    _, count = cells._window(z, grey_levels(cells.transform, x)[0].flatten(), z)
    assert float(count.double().mean()) < LEVELS / 4
    assert int(count.min()) == 1


@pytest.mark.parametrize("dequantize", [True, False])
@pytest.mark.parametrize("level", [1, 12, 21])
def test_equal_cells_weigh_no_more_grey_levels_than_there_are(level, dequantize, monkeypatch):
    # With much noise those within 9 deviations of it are many times as many as exist.
    cells = noisy_cells(DataTransform.images((4,), LEVELS, dequantize), SCHEDULE, level)
    assert isinstance(cells, EqualCells)
    x = torch.randint(0, LEVELS, (5, 4), generator=rng(1)).double()
    z = SCHEDULE.perturb(cells.transform(x), level, 2 * normal(5, 4))
    x0, decoded, weighed = cells.transform(x) + 0.1 * normal(5, 4, seed=2), EqualCells._decoded, []

    def counted(cells, z, x, x0, offsets):
        weighed.append(len(offsets))
        return decoded(cells, z, x, x0, offsets)

    monkeypatch.setattr(EqualCells, "_decoded", counted)
    found = cells.log_decoder(z, x, x0)
    reach = math.ceil(9 * float(cells.sigma / cells.alpha / cells.transform.model_bin)) + 1
    unclipped = decoded(cells, z, x, x0, torch.arange(-reach, reach + 1, dtype=torch.float64))
    torch.testing.assert_close(found, unclipped, rtol=1e-12, atol=1e-12)
    assert max(weighed) == 2 * min(reach, LEVELS - 1) + 1


def test_masses_and_means_of_cells_in_every_place():
    mpmath = pytest.importorskip("mpmath")
    ends = [-math.inf, -60.0, -59.999, -9.0, -8.0, -1e-9, 1e-12, 1e-3, 0.5, 6.0, 6.0000001, 40.0, math.inf]
    edges = torch.tensor(ends, dtype=torch.float64)
    log_mass = log_masses(edges)
    means = truncated_normal_means(edges, log_mass)
    with mpmath.workdps(900):
        cumulative = [mpmath.ncdf(end) for end in ends]
        density = [mpmath.npdf(end) if math.isfinite(end) else 0 for end in ends]
        for i in range(len(ends) - 1):
            mass = cumulative[i + 1] - cumulative[i]
            assert float(log_mass[i]) == pytest.approx(float(mpmath.log(mass)), rel=1e-8), ends[i]
            assert float(means[i]) == pytest.approx(float((density[i] - density[i + 1]) / mass), abs=1e-7), ends[i]
    assert float(log_mass.logsumexp(0)) == pytest.approx(0, abs=1e-15)


def test_cells_without_width_leave_the_others_alone():
    edges = torch.tensor([-math.inf, -math.inf, 0.0, 0.0, 1.0, 1.0, math.inf, math.inf], dtype=torch.float64)
    log_mass = log_masses(edges)
    kept = log_masses(torch.tensor([-math.inf, 0.0, 1.0, math.inf], dtype=torch.float64))
    assert torch.equal(log_mass[1::2], kept)
    assert bool((log_mass[::2] < -600).all())
    assert bool(truncated_normal_means(edges, log_mass).isfinite().all())
