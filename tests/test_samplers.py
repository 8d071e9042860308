"""Rules of samplers: measured order on a known flow, closed-form chains, the same steps elsewhere, placed steps."""

import math
from itertools import pairwise

import pytest
import torch
from denoisers import GaussianDenoiser, placed_levels
from oracles import SCHEDULES, normal
from torch import nn

from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import (
    CosineSchedule,
    LinearSchedule,
    LogSNRSchedule,
    NoiseSchedule,
    OptimalTransportSchedule,
    UniformSigmaSchedule,
)
from torchcdm.errors import UserError
from torchcdm.models.denoiser import DenoisingDiffusion
from torchcdm.samplers import (
    DDIM,
    SAMPLERS,
    SASolver,
    Step,
    UniPC,
    make_sampler,
)
from torchcdm.training.checkpoint import load

every_sampler = pytest.mark.parametrize("name", SAMPLERS)
every_schedule = pytest.mark.parametrize("schedule_name", SCHEDULES)
DETERMINISTIC = [name for name in SAMPLERS if not make_sampler(name).stochastic]


class SameRatios(NoiseSchedule):
    """The variance-preserving schedule with the noise-to-signal ratios of another one."""

    def __init__(self, other):
        self.other = [other.ratio[1:-1]]
        super().__init__(other.T)

    def inner_levels(self, t):
        r = self.other[0]
        return (1 + r**2).rsqrt(), r * (1 + r**2).rsqrt()


class Rotating(nn.Module):
    """An arbitrary smooth network: (x, t, y) -> eps."""

    def forward(self, x, t, y=None):
        return torch.sin(1.3 * x.flip(-1) + 0.01 * t[:, None]) + 0.4 * x


def run(denoiser, sampler, path, x, noises=None, exact=False):
    """Step by step, with the noise of each step given: what every step arrived at.

    ``exact``: the first steps, which have no history and are of lower order, are replaced by the flow itself.
    """
    rule, previous, visited = make_sampler(sampler), (), []
    with torch.no_grad():
        for k, (t, s) in enumerate(zip(path, path[1:], strict=False)):
            reached, previous = rule.step(
                Step(denoiser, x, t, s, None, None if noises is None else noises[k], previous)
            )
            x = denoiser.flow(x, t, s) if exact and k < rule.memory else reached
            visited.append(x)
    return visited


# --- order ---------------------------------------------------------------------------------------------------------


class EvenRatios(NoiseSchedule):
    """Variance-preserving levels that are even in r, from 0.3 to 4."""

    def inner_levels(self, t):
        r = 0.3 + 3.7 * (t - 1) / (self.T - 1)
        return (1 + r**2).rsqrt(), r * (1 + r**2).rsqrt()


@pytest.mark.parametrize(("name", "order"), [
    ("ddim", 1), ("dpm2", 2), ("dpm++", 2), ("heun", 2), ("ipndm3", 3), ("ipndm4", 4), ("deis3", 3), ("deis4", 4),
    ("unipc2", 3), ("unipc3", 4),
])  # fmt: skip
def test_measured_order_of_convergence(name, order):
    # On the log-SNR ladder even steps in t are even steps in log r, and halving the grid halves every step. Under
    # the other schedules the first steps in r = sigma/alpha cover decades (optimal transport starts at r = T), and
    # are not small at any number of steps that T allows: an order would be measured on the first step alone.
    # iPNDM supposes steps that are even in r.
    schedule = EvenRatios(1921) if name.startswith("ipndm") else LogSNRSchedule(1921, r_min=0.02, r_max=20.0)
    denoiser = GaussianDenoiser(schedule, [0.7, -1.0, 0.2], [0.25, 2.0, 0.05])
    x = normal(16, 3)
    truth = denoiser.flow(x, schedule.T, 1)
    steps, errors = [60, 120, 240, 480] if order > 2 else [30, 60, 120, 240], []
    for n in steps:
        path = list(range(schedule.T, 0, -((schedule.T - 1) // n)))
        assert path[-1] == 1 and len(path) == n + 1
        errors.append(float((run(denoiser, name, path, x, exact=order > 2)[-1] - truth).abs().max()))
    logs = torch.tensor([[math.log(n), math.log(e)] for n, e in zip(steps, errors, strict=True)])
    centred = logs - logs.mean(0)
    slope = (centred[:, 0] * centred[:, 1]).sum() / centred[:, 0].square().sum()
    assert -slope == pytest.approx(order, abs=0.15 if order < 3 else 0.35), errors


@every_schedule
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_follows_the_flow_of_every_schedule(name, schedule_name):
    denoiser = GaussianDenoiser(SCHEDULES[schedule_name](1000), [0.7, -1.0], [0.25, 2.0])
    x = normal(16, 2)
    path = [*denoiser.schedule.time_grid(500), 0]
    error = (run(denoiser, name, path, x)[-1] - denoiser.flow(x, 1000, 0)).abs().max()
    # Uniform sigma leaves pure noise like (1 - sigma)^½, where no solver has its order in sigma.
    assert error < (2e-2 if name == "ddim" else 5e-3 if schedule_name == "uniform" else 5e-4)


@every_schedule
def test_ten_steps_of_heun_are_accurate_under_every_schedule(schedule_name):
    denoiser = GaussianDenoiser(SCHEDULES[schedule_name](1000), [0.7, -1.0], [0.25, 2.0])
    x, error = normal(256, 2), {}
    for name, steps in (("heun", 10), ("ddim", 20)):
        end = run(denoiser, name, [*denoiser.schedule.time_grid(steps), 0], x)[-1]
        error[name] = float((end - denoiser.flow(x, 1000, 0)).square().mean().sqrt())
    assert error["heun"] < 0.05
    assert error["heun"] < error["ddim"] / 2


def test_a_sampler_is_found_by_the_name_that_diffusers_gives_it():
    assert type(make_sampler("dpmpp")) is type(make_sampler("dpm++"))
    with pytest.raises(UserError, match=r"did you mean 'dpm\+\+'"):
        make_sampler("dpmppp")


@every_sampler
def test_a_sampler_sees_a_schedule_through_its_ratios_alone(name):
    # Optimal transport and the variance-preserving schedule with the same r are one process in u = x / alpha.
    straight = OptimalTransportSchedule(60)
    curved = SameRatios(straight)
    x, path = normal(8, 2), [*straight.time_grid(13), 0]
    noises = normal(len(path) - 1, 8, 2, seed=1)
    ends = []
    for schedule in (straight, curved):
        denoiser = GaussianDenoiser(schedule, [0.7, -1.0], [0.25, 2.0])
        ends.append(run(denoiser, name, path, schedule.alpha[60] * x, noises)[-1])
    assert torch.allclose(*ends, atol=1e-11)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_interpolates_between_the_flow_and_the_ancestral_chain(eta):
    # Song et al., eq. 12 and 16, in their letters for a variance-preserving schedule.
    schedule, x, noise = CosineSchedule(50), normal(6, 2), normal(6, 2, seed=1)
    denoiser = GaussianDenoiser(schedule, [0.7, -1.0], [0.25, 2.0])
    t, s = 40, 31
    abar_t, abar_s = schedule.alpha[t] ** 2, schedule.alpha[s] ** 2
    deviation = eta * ((1 - abar_s) / (1 - abar_t)).sqrt() * (1 - abar_t / abar_s).sqrt()
    eps = denoiser.denoise(x, t).eps
    truth = (
        abar_s.sqrt() * (x - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()
        + (1 - abar_s - deviation**2).sqrt() * eps
        + deviation * noise
    )
    assert torch.allclose(DDIM(eta).step(Step(denoiser, x, t, s, None, noise))[0], truth, atol=1e-12)
    if eta == 1:
        assert torch.allclose(make_sampler("ddpm").step(Step(denoiser, x, t, s, None, noise))[0], truth, atol=1e-12)
        a, b, deviation = schedule.reverse_kernel(t, s, x)
        ancestral = a * x + b * denoiser.denoise(x, t).x0 + deviation * noise
        assert torch.allclose(ancestral, truth, atol=1e-12)


@every_schedule
def test_dpm2_is_the_published_formula(schedule_name):
    """Lu et al., 2022, eps linear in lambda = -log r, integrated by hand."""
    schedule = SCHEDULES[schedule_name](40)
    denoiser, x, q, t, s = GaussianDenoiser(schedule, [0.7], [0.25]), normal(5, 1), 37, 30, 22
    before, now = denoiser.denoise(normal(5, 1, seed=1), q), denoiser.denoise(x, t)
    found, _ = make_sampler("dpm2").step(Step(denoiser, x, t, s, previous=((q, before),)))
    r = schedule.ratio
    curvature = r[t] - r[s] - r[s] * (r[t] / r[s]).log()
    u_s = x / schedule.alpha[t] - (r[t] - r[s]) * now.eps - curvature * (now.eps - before.eps) / (r[q] / r[t]).log()
    assert torch.allclose(found, schedule.alpha[s] * u_s, atol=1e-12)


def test_a_ddim_step_on_the_straight_path_is_an_euler_step_of_flow_matching():
    schedule, mean, variance = OptimalTransportSchedule(99), 0.7, 0.25
    denoiser, x = GaussianDenoiser(schedule, [mean], [variance]), normal(9, 1)
    for t, s in [(99, 80), (50, 49), (7, 0)]:
        time = t / 100
        # E[eps - x_0 | x_t], by regression in the joint Gaussian of (x_0, eps, x_t).
        gain = (time - (1 - time) * variance) / ((1 - time) ** 2 * variance + time**2)
        velocity = gain * (x - (1 - time) * mean) - mean
        euler = x + (s - t) / 100 * velocity
        assert torch.allclose(DDIM().step(Step(denoiser, x, t, s))[0], euler, atol=1e-12)


# --- the ancestral chain -------------------------------------------------------------------------------------------


def chain_moments(denoiser, path, sampler="ddpm"):
    """Exact mean and deviation of the sampler's output: it is affine in x_T and the noise of each step."""
    n = len(path)
    unit = torch.eye(n + 1, dtype=torch.float64)[:, :, None]  # row j: source j is 1; the last row: no source
    noises = [unit[:, k + 1] * (k + 1 < n) for k in range(n - 1)]
    end = run(denoiser, sampler, path, unit[:, 0], noises)[-1]
    return float(end[-1, 0]), float((end[:-1] - end[-1]).square().sum().sqrt())


def ho_moments(schedule, path, mean, variance):
    """The same from the formulas of Ho et al. (eq. 7 and 11) with the betas of the levels visited."""
    m, v = 0.0, 1.0
    for t, s in zip(path, path[1:], strict=False):
        abar_t, abar_s = float(schedule.alpha[t] ** 2), float(schedule.alpha[s] ** 2)
        beta = 1 - abar_t / abar_s
        # eps = gain (x - abar_t^½ mean) for Gaussian data
        gain = math.sqrt(1 - abar_t) / (abar_t * variance + 1 - abar_t)
        slope = (1 - beta / math.sqrt(1 - abar_t) * gain) / math.sqrt(1 - beta)
        shift = beta / math.sqrt(1 - abar_t) * gain * math.sqrt(abar_t) * mean / math.sqrt(1 - beta)
        m, v = slope * m + shift, slope**2 * v + beta * (1 - abar_s) / (1 - abar_t)
    return m, math.sqrt(v)


@pytest.mark.parametrize("make", [LinearSchedule, CosineSchedule, UniformSigmaSchedule])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 25, 50, 99, 100])
def test_ancestral_sampling_with_any_number_of_steps_is_its_own_chain(make, steps):
    denoiser = GaussianDenoiser(make(100), [0.2], [0.25**2])
    path = [*denoiser.schedule.time_grid(steps), 0]
    assert chain_moments(denoiser, path) == pytest.approx(ho_moments(denoiser.schedule, path, 0.2, 0.0625), abs=1e-9)


@pytest.mark.parametrize(("steps", "tolerance"), [(1000, 0.02), (100, 0.11)])
def test_ancestral_sampling_does_not_turn_grey(steps, tolerance):
    # The published sampler keeps the kernels of the full chain: mean .002 and deviation .005 after 100 steps.
    denoiser = GaussianDenoiser(LinearSchedule(1000), [0.2], [0.25**2])
    mean, deviation = chain_moments(denoiser, [*denoiser.schedule.time_grid(steps), 0])
    assert mean == pytest.approx(0.2, abs=0.002)
    assert deviation == pytest.approx(0.25, rel=tolerance)


@pytest.mark.parametrize(("sampler", "order"), [
    ("ddpm", 1), (SASolver(1, eta=4), 1), (SASolver(2, eta=1, variance=0), 2), ("sa2", 2),
])  # fmt: skip
def test_measured_order_of_the_moments_of_random_samplers(sampler, order):
    schedule = LogSNRSchedule(1921, r_min=0.02, r_max=20.0)
    denoiser, errors = GaussianDenoiser(schedule, [0.2], [0.25]), []
    truth = math.hypot(float(schedule.alpha[1]) * 0.5, float(schedule.sigma[1]))
    for n in (120, 240, 480):
        path = list(range(schedule.T, 0, -((schedule.T - 1) // n)))
        errors.append(abs(chain_moments(denoiser, path, sampler)[1] - truth))
    measured = [math.log2(a / b) for a, b in pairwise(errors)]
    assert measured == pytest.approx([order, order], abs=0.25), errors


@pytest.mark.parametrize(("sampler", "expected"), [("sa2", 1.045), (SASolver(variance=0), 1.074), ("ddpm", 0.919)])
def test_deviation_that_25_placed_steps_leave_of_a_gaussian(sampler, expected):
    # Numbers of docs/results/pictures.md: much noise keeps the deviation better where the line is not in log r.
    denoiser = GaussianDenoiser(CosineSchedule(200), [0.2], [1.0])
    levels = placed_levels(denoiser, 25, (1,), weight=make_sampler(sampler).weight)
    found = chain_moments(denoiser, levels, sampler)[1]
    assert found == pytest.approx(expected, abs=0.005)


def test_a_line_through_near_estimates_reaches_no_further_than_they_are_apart():
    # Weight of the estimate before in a step of ten levels that are even in log r, after one of q - 50 levels.
    schedule, zero = LogSNRSchedule(100, r_min=0.01, r_max=10.0), torch.zeros(1, 1)
    denoiser = GaussianDenoiser(schedule, [0.0], [1.0])

    def weight(q):
        now, before = (Prediction.of_x0(zero, *schedule.at(t, zero), x0) for t, x0 in ((50, zero), (q, zero + 1)))
        step = Step(denoiser, zero, 50, 40, noise=zero, previous=((q, before),))
        return float(SASolver(variance=0).rule(step, now))

    assert weight(60) < -0.1 and weight(70) == pytest.approx(weight(60) / 2, rel=1e-5)
    assert [weight(51), weight(55)] == pytest.approx([weight(60)] * 2, rel=1e-5)


# --- the same methods elsewhere ------------------------------------------------------------------------------------


def diffusers_path(scheduler, x, denoiser, **options):
    """What a diffusers scheduler arrives at, step by step; its index i is our level i + 1."""
    visited = []
    for index in scheduler.timesteps:
        eps = denoiser.denoise(x, int(index) + 1).eps
        x = scheduler.step(eps, index, x, **options).prev_sample
        visited.append(x)
    return visited


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [LinearSchedule, CosineSchedule])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "ddim-eta", "dpm2", "dpm++"])
def test_steps_agree_with_diffusers(name, make):
    diffusers = pytest.importorskip("diffusers")
    schedule = make(100)
    denoiser = DenoisingDiffusion(Rotating(), schedule)
    abar = schedule.alpha[:-1] ** 2
    common = {
        "num_train_timesteps": 100,
        "trained_betas": (1 - abar[1:] / abar[:-1]).tolist(),
        "timestep_spacing": "trailing",
    }
    path, last, options, steps = list(range(100, -1, -10)), 0, {}, 10
    sampler = DDIM(0.6) if name == "ddim-eta" else make_sampler(name)
    if name == "ddpm":
        scheduler = diffusers.DDPMScheduler(**common, clip_sample=False)
    elif name.startswith("ddim"):
        scheduler = diffusers.DDIMScheduler(**common, clip_sample=False)
        options = {"eta": 0.6 if sampler.stochastic else 0.0}
    elif name == "dpm2":
        # It refuses to end at level 0 in noise prediction.
        last = 1
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **common,
            algorithm_type="dpmsolver",
            solver_type="heun",
            lower_order_final=False,
            final_sigmas_type="sigma_min",
        )
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **common, algorithm_type="dpmsolver++", lower_order_final=False, final_sigmas_type="zero"
        )
    scheduler.set_timesteps(steps)
    path[-1] = last

    x = normal(5, 2, seed=3)
    seed = 7
    if sampler.stochastic:
        options["generator"] = torch.Generator().manual_seed(seed)
    ours = torch.Generator().manual_seed(seed)
    noises = [torch.randn(5, 2, generator=ours, dtype=torch.float64) for _ in path]
    theirs = diffusers_path(scheduler, x, denoiser, **options)
    mine = run(denoiser, sampler, path, x, noises)
    for here, there in zip(mine, theirs, strict=True):
        # Their betas and sigmas are float32.
        assert (here - there).abs().max() < 1e-5 * (1 + there.abs().max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("eta", [0.0, 1.0, 4.0])
def test_the_stochastic_adams_step_agrees_with_diffusers(eta):
    # Their predictor of third order is that of the paper; the second has weights of its own.
    diffusers = pytest.importorskip("diffusers")
    schedule, order = CosineSchedule(100), 3
    abar = schedule.alpha[:-1] ** 2
    scheduler = diffusers.SASolverScheduler(
        trained_betas=(1 - abar[1:] / abar[:-1]).tolist(), num_train_timesteps=100, timestep_spacing="trailing",
        predictor_order=order, prediction_type="sample",
    )  # fmt: skip
    scheduler.set_timesteps(10)
    path, x, noise = list(range(100, 60, -10)), normal(5, 2, seed=3), normal(5, 2, seed=7)
    data = [normal(5, 2, seed=10 + k) for k in range(order)]
    scheduler.model_outputs, scheduler.timestep_list = data, list(scheduler.timesteps[:order])
    scheduler._step_index = order - 1
    there = scheduler.stochastic_adams_bashforth_update(
        data[-1], sample=x, noise=noise, order=order, tau=torch.tensor(math.sqrt(eta))
    )
    known = [Prediction.of_x0(x, *schedule.at(t, x), x0) for t, x0 in zip(path, data, strict=False)]
    step = Step(GaussianDenoiser(schedule, [0.0, 0.0], [1.0, 1.0]), x, path[2], path[3], None, noise,
                ((path[1], known[1]), (path[0], known[0])))  # fmt: skip
    here = SASolver(order, eta, 0).rule(step, known[2])
    assert (here - there).abs().max() < 1e-4 * (1 + there.abs().max())


@pytest.mark.parametrize("make", [LinearSchedule, CosineSchedule, UniformSigmaSchedule])
def test_the_stochastic_adams_solver_of_first_order_is_ddpm_and_ddim(make):
    denoiser, path = DenoisingDiffusion(Rotating(), make(100)), list(range(100, -1, -10))
    x, noises = normal(5, 2, seed=3), [normal(5, 2, seed=k) for k in range(10)]
    for eta, same in ((1.0, DDIM(1.0)), (0.0, DDIM())):
        here, there = (run(denoiser, rule, path, x, noises)[-1] for rule in (SASolver(1, eta), same))
        assert torch.allclose(here, there, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_unipc_in_log_r_is_the_published_one():
    # Theirs simplifies the weights of the first two steps; from the fourth on both are exact.
    diffusers = pytest.importorskip("diffusers")
    schedule = CosineSchedule(100)
    abar = schedule.alpha[:-1] ** 2
    scheduler = diffusers.UniPCMultistepScheduler(
        trained_betas=(1 - abar[1:] / abar[:-1]).tolist(), num_train_timesteps=100, timestep_spacing="trailing",
        solver_order=3, lower_order_final=False, final_sigmas_type="zero",
    )  # fmt: skip
    scheduler.set_timesteps(10)
    denoiser, x, history = DenoisingDiffusion(Rotating(), schedule), normal(5, 2, seed=3), ()
    for index in scheduler.timesteps[:-1]:
        t, s = int(index) + 1, int(index) - 9
        now = denoiser.denoise(x, t)
        mine, _ = UniPC(3, torch.log).step(Step(denoiser, x, t, s, previous=history))
        x = scheduler.step(now.eps, index, x).prev_sample
        if len(history) == 3:
            assert (mine - x).abs().max() < 1e-5 * (1 + x.abs().max())
        # The sample that theirs has corrected, and its estimate of the data.
        alpha, sigma = schedule.at(t, x)
        corrected = scheduler.last_sample
        eps = (corrected - alpha * scheduler.model_outputs[-1]) / sigma
        history = ((t, Prediction(corrected, alpha, sigma, eps)), *history)[:3]
    assert len(history) == 3


def test_half_precision_holds_the_integrals_of_steps_at_little_noise():
    assert load("zoo:digits").half().sample(2, steps=10).isfinite().all()


# --- where the steps are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule_name", ["uniform", "cosine", "linear"])
def test_adaptive_steps_follow_the_flow_better(schedule_name):
    denoiser = GaussianDenoiser(SCHEDULES[schedule_name](200), [0.7, -1.0, 0.2], [0.25, 2.0, 0.01])
    x, errors = normal(256, 3), {}
    for spacing, path in {
        "even": [*denoiser.schedule.time_grid(8), 0],
        "adaptive": placed_levels(denoiser, 8, (3,)),
    }.items():
        assert len(path) == 9 and path[0] == 200 and path[-1] == 0
        errors[spacing] = (run(denoiser, "ddim", path, x)[-1] - denoiser.flow(x, 200, 0)).square().mean().sqrt()
    assert errors["adaptive"] < 0.95 * errors["even"]


def test_a_weight_places_more_steps_at_much_noise():
    denoiser = GaussianDenoiser(CosineSchedule(200), [0.7, -1.0, 0.2], [0.25, 2.0, 0.01])
    plain, weighted = (placed_levels(denoiser, 8, (3,), weight=weight) for weight in (0.0, 0.5))
    assert plain != weighted and all(a <= b for a, b in zip(plain, weighted, strict=True))
