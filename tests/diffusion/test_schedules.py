"""Noise schedules: what must hold for all of them, and the published numbers of each."""

import math

import pytest
import torch
from oracles import SCHEDULES, normal
from torch.distributions import Normal

from torchcdm.diffusion.schedules import (
    CosineSchedule,
    LinearSchedule,
    LogSNRSchedule,
    NoiseSchedule,
    UniformSigmaSchedule,
)
from torchcdm.errors import UserError

T = 40
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def pairs(s_from=0, t_to=T + 1):
    return [(s, t) for t in range(1, t_to + 1, 3) for s in range(s_from, t, 4)]


@every_schedule
@pytest.mark.parametrize("levels", [25, 200, 1000])
def test_from_data_to_noise_and_monotone(name, levels):
    schedule = SCHEDULES[name](levels)
    alpha, sigma = schedule.alpha, schedule.sigma
    assert alpha.dtype == sigma.dtype == torch.float64
    assert alpha.shape == sigma.shape == (levels + 2,)
    assert (alpha[0], sigma[0], alpha[-1], sigma[-1]) == (1, 0, 0, 1)
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all()
    assert (schedule.ratio.diff() > 0).all()
    assert schedule.ratio[0] == 0 and schedule.ratio[-1] == math.inf


@every_schedule
def test_variance_preserving_or_a_straight_line(name):
    schedule = SCHEDULES[name](T)
    total = schedule.alpha + schedule.sigma if name == "ot" else schedule.alpha**2 + schedule.sigma**2
    assert torch.allclose(total, torch.ones_like(total), atol=1e-15, rtol=0)


@pytest.mark.parametrize("levels", [25, 100, 1000])
def test_little_signal_is_left_at_level_T(levels):
    # With betas that are not scaled by 1000 / T, alpha_T is 0.6 at T = 100.
    assert LinearSchedule(levels).alpha[-2] < 0.01
    assert CosineSchedule(levels).alpha[-2] < 2 / levels


def test_linear_schedule_has_the_published_end():
    assert LinearSchedule(1000).alpha[1000] ** 2 == pytest.approx(4.0358e-5, rel=1e-4)


def test_log_snr_ladder_is_even_between_its_ends():
    r = LogSNRSchedule(T, r_min=0.01, r_max=50).ratio[1:-1]
    assert r[0] == pytest.approx(0.01) and r[-1] == pytest.approx(50)
    assert torch.allclose(r[1:] / r[:-1], (r[1] / r[0]).expand(T - 1))


@every_schedule
def test_forward_kernels_compose(name):
    schedule, x = SCHEDULES[name](T), torch.zeros(1, dtype=torch.float64)
    for s, t in pairs():
        a, b = schedule.forward_kernel(s, t, x)
        # x_0 -> x_s -> x_t has the mean and variance of x_0 -> x_t.
        assert a * schedule.alpha[s] == pytest.approx(float(schedule.alpha[t]), abs=1e-14)
        variance = (a * schedule.sigma[s]) ** 2 + b**2
        assert variance == pytest.approx(float(schedule.sigma[t] ** 2), abs=1e-14)
        # and stops on the way change nothing
        middle = (s + t) // 2
        a_1, b_1 = schedule.forward_kernel(s, middle, x)
        a_2, b_2 = schedule.forward_kernel(middle, t, x)
        assert a_1 * a_2 == pytest.approx(float(a), abs=1e-14)
        assert (a_2 * b_1) ** 2 + b_2**2 == pytest.approx(float(b**2), abs=1e-14)


@every_schedule
def test_reverse_kernel_is_bayes_rule(name):
    schedule = SCHEDULES[name](T)
    x_0, x_s, x_t = normal(3, 1)
    for s, t in pairs(s_from=1):
        a, b, deviation = schedule.reverse_kernel(t, s, x_t)
        step, spread = schedule.forward_kernel(s, t, x_t)
        at = lambda level, x_0=x_0: Normal(schedule.alpha[level] * x_0, schedule.sigma[level])  # noqa: E731
        # Where x_s lies within its own spread, or every term is astronomically large.
        point = a * x_t + b * x_0 + deviation * x_s
        bayes = (
            at(s).log_prob(point) + Normal(step * point, spread).log_prob(x_t) - at(t).log_prob(x_t)
        )
        assert torch.allclose(Normal(a * x_t + b * x_0, deviation).log_prob(point), bayes, rtol=1e-9)


@every_schedule
def test_reverse_kernel_to_the_data_returns_them(name):
    x = torch.zeros(1, dtype=torch.float64)
    for t in range(1, T + 2):
        assert SCHEDULES[name](T).reverse_kernel(t, 0, x) == (0, 1, 0)


@every_schedule
def test_time_grid_for_every_number_of_steps(name):
    schedule = SCHEDULES[name](T)
    for steps in range(2, T + 1):
        grid = schedule.time_grid(steps)
        gaps = [t - s for t, s in zip(grid, grid[1:], strict=False)]
        assert len(grid) == steps and grid[0] == T and grid[-1] == 1
        assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1
    assert schedule.time_grid(1) == [T]
    for steps in (0, -3, T + 1):
        with pytest.raises(UserError, match=f"1 to {T}"):
            schedule.time_grid(steps)


@every_schedule
def test_a_level_for_each_sample_is_that_level_for_the_sample(name):
    schedule = SCHEDULES[name](T)
    x_0, eps = normal(6, 3, 2, 2), normal(6, 3, 2, 2, seed=1)
    t = torch.tensor([0, 1, 7, 20, T, T + 1])
    together = schedule.perturb(x_0, t, eps)
    for row, level in enumerate(t.tolist()):
        assert torch.equal(together[row], schedule.perturb(x_0[row : row + 1], level, eps[row : row + 1])[0])
    assert torch.equal(together[0], x_0[0]) and torch.equal(together[-1], eps[-1])


@every_schedule
def test_constants_stay_float64_in_a_half_precision_model(name):
    schedule = SCHEDULES[name](T)
    exact = schedule.alpha.clone()
    schedule.half()
    assert schedule.alpha.dtype == torch.float64 and torch.equal(schedule.alpha, exact)
    alpha_t, _ = schedule.at(5, torch.zeros(2, 3, dtype=torch.bfloat16))
    assert alpha_t.dtype == torch.bfloat16


def test_settings_that_make_no_schedule():
    with pytest.raises(UserError, match="needs more than 20"):
        LinearSchedule(20)
    with pytest.raises(UserError, match="CosineSchedule: T is 0; it must be at least 2"):
        CosineSchedule(0)
    with pytest.raises(UserError, match="T is 100000000000; it must be at most 100000"):
        UniformSigmaSchedule(10**11)
    with pytest.raises(UserError, match="offset is -1; it must be at least 0"):
        CosineSchedule(50, -1)
    with pytest.raises(UserError, match="r_max is inf; it must be a finite number"):
        LogSNRSchedule(10, 0.1, float("inf"))
    with pytest.raises(UserError, match="r_min"):
        LogSNRSchedule(10, r_min=3, r_max=2)


@pytest.mark.parametrize(
    ("alpha", "sigma", "message"),
    [
        ([0.9, 0.8], [0.1, 0.2], r"of shape \(3,\)"),
        ([0.9, 0.8, 0.7], [0.3, 0.2, 0.1], "rising from level to level"),
        ([0.9, 0.8, -0.7], [0.1, 0.2, 0.3], "both positive"),
        ([0.9, 0.8, 0.7], [0.1, 0.2, float("nan")], "rising from level to level"),
    ],
)
def test_schedules_that_are_none_are_refused(alpha, sigma, message):
    class Own(NoiseSchedule):
        def inner_levels(self, t):
            return torch.tensor(alpha).double(), torch.tensor(sigma).double()

    with pytest.raises(UserError, match=message):
        Own(3)


def test_levels_that_do_not_exist_are_refused():
    schedule = UniformSigmaSchedule(5)
    for t in (-1, 7):
        with pytest.raises(UserError, match=f"level {t} does not exist; levels are 0 ... 6"):
            schedule.at(t, torch.zeros(1))
