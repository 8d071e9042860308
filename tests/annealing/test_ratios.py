"""Ratios of normalisers from works and from densities, against known ones and against pymbar."""

import math

import pytest
import torch
from oracles import normal, rng

from torchcdm.annealing.ratios import autocorrelation_time, bar, half_width, mbar

DELTA, SIGMA = torch.tensor([0.7, -1.5]), torch.tensor([0.5, 1.2])


def gaussian_works(sweeps, columns, seed=0):
    """Works whose exponentials have the means e^DELTA and e^-DELTA, (sweeps, pairs, columns)."""
    noise = SIGMA[:, None] * normal(2, sweeps, 2, columns, seed=seed)
    return [DELTA[:, None] + sign * SIGMA[:, None] ** 2 / 2 + part for sign, part in zip((-1, 1), noise, strict=True)]


def test_bar_finds_the_ratio_and_its_error():
    found = [bar(*gaussian_works(20, 10, seed)) for seed in range(100)]
    each = torch.stack([one.log_ratio for one in found])
    assert torch.allclose(each.mean(0), DELTA.double(), atol=4 * float(each.std(0).max()) / 10)
    totals = torch.tensor([one.total for one in found])
    assert sum(one.se for one in found) / 100 == pytest.approx(float(totals.std()), rel=0.2)
    # Better than either exponential mean, which the second pair's works make noisy.
    down = gaussian_works(20, 10)[0]
    assert abs(found[0].log_ratio[1] - DELTA[1]) < 0.3 and down.shape == (20, 2, 10)


def test_the_error_of_bar_knows_of_dependence_within_a_column():
    down, up = gaussian_works(5, 40)
    once = bar(down, up)
    repeated = bar(down.repeat(8, 1, 1), up.repeat(8, 1, 1))
    assert repeated.total == pytest.approx(once.total, abs=1e-9)
    assert repeated.se == pytest.approx(once.se, rel=1e-6)


@pytest.mark.parametrize(("groups", "columns", "least"), [(1, 4, 3.0), (10, 2, 2.1), (10, 4, 2.0), (3, 40, 1.96)])
def test_intervals_of_few_columns_cover(groups, columns, least):
    # As many means of Gaussians as groups, whose deviations differ by a factor of four: their sum is 0.
    draws = normal(4000, groups, columns) * torch.linspace(1, 4, groups)[:, None]
    off = draws.mean(2).sum(1)
    errors = (draws - draws.mean(2, keepdim=True)) / math.sqrt(columns * (columns - 1))
    width = torch.tensor([half_width(one) for one in errors])
    assert float((off.abs() < width * errors.flatten(1).norm(dim=1)).double().mean()) == pytest.approx(0.95, abs=0.02)
    assert float(width.median()) >= least
    assert half_width(torch.zeros(2, 3)) == 1.96


def test_bar_with_proposals_without_mass():
    # Of a uniform on [0, 1] from one on [0, 2] and back: half of the proposals are outside.
    x = 2 * torch.rand(4000, generator=rng())
    down = torch.where(x < 1, 0.0, -math.inf).view(400, 1, 10)
    found = bar(down, torch.zeros_like(down))
    assert found.total == pytest.approx(math.log(0.5), abs=4 * found.se)
    assert 0 < found.se < 0.05


def gaussian_rungs(n=600):
    """Points of four Gaussians of several widths, log densities of all without their constants, and the constants."""
    scales = torch.tensor([1.0, 1.6, 2.5, 4.0], dtype=torch.float64)
    rung = torch.arange(4).repeat_interleave(torch.tensor([n, n // 2, n, 2 * n]))
    x = scales[rung] * normal(len(rung))
    return -0.5 * (x[:, None] / scales) ** 2, rung, scales.log()


def test_mbar_finds_the_normalisers():
    log_gamma, rung, truth = gaussian_rungs(20_000)
    found = mbar(log_gamma, rung, torch.arange(len(rung)) % 20)
    assert torch.allclose(found.log_ratio, -truth.diff(), atol=0.02)
    assert abs(found.total - float(truth[0] - truth[-1])) < 4 * found.se < 0.05


def test_the_error_of_mbar_is_that_of_leaving_out_columns():
    # Points of a column have a shift in common, and so depend on each other.
    log_gamma, rung, _ = gaussian_rungs(600)
    column = torch.arange(len(rung)) % 30
    log_gamma = log_gamma + (normal(30, 1, seed=1) * torch.tensor([0.0, 0.1, 0.2, 0.3]))[column]
    found, kept = mbar(log_gamma, rung, column), [column != k for k in range(30)]
    without = torch.stack([mbar(log_gamma[rows], rung[rows], column[rows]).log_ratio for rows in kept])
    assert torch.allclose(found.log_ratio + found.without, without, atol=0.1 * float(found.without.std()))


def test_mbar_is_that_of_pymbar():
    pymbar = pytest.importorskip("pymbar")
    log_gamma, rung, _ = gaussian_rungs()
    found = mbar(log_gamma, rung, torch.arange(len(rung)) % 20)
    theirs = pymbar.MBAR(-log_gamma.T.numpy(), torch.bincount(rung).numpy()).compute_free_energy_differences()
    assert torch.allclose(found.log_ratio.cumsum(0), torch.from_numpy(theirs["Delta_f"][0, 1:]), atol=1e-6)


def test_bar_is_that_of_pymbar():
    pymbar = pytest.importorskip("pymbar")
    down, up = (work[:, 1] for work in gaussian_works(50, 10))
    # Their works are reduced energies of the step: -w downwards, w upwards; Delta f = -log ratio.
    theirs = pymbar.bar(-down.flatten().numpy(), up.flatten().numpy())["Delta_f"]
    assert bar(down[:, None], up[:, None]).total == pytest.approx(-theirs, abs=1e-6)


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9])
def test_autocorrelation_time_of_a_known_process(memory):
    noise, values = normal(4000, 8), torch.zeros(4000, 8)
    for k in range(1, 4000):
        values[k] = memory * values[k - 1] + noise[k]
    assert autocorrelation_time(values) == pytest.approx((1 + memory) / (1 - memory), rel=0.15)
    assert autocorrelation_time(torch.ones(10, 2)) == 1
