"""A Gaussian for each class: exact ratios at every level, and what their covariances have in common."""

import numpy as np
import torch
from oracles import rng
from scipy.stats import multivariate_normal

import torchcdm
from torchcdm.diffusion.gaussian import fit_class_gaussians
from torchcdm.diffusion.mixture import MixtureMarginals
from torchcdm.diffusion.schedules import LogSNRSchedule
from torchcdm.random import permutation

P = multivariate_normal([1.0, 0.5], [[0.8, 0.3], [0.3, 0.5]], seed=0)
Q = multivariate_normal([0.0, 0.0], [[1.0, -0.2], [-0.2, 1.5]], seed=1)


def samples(n, seed=0):
    return P.rvs(n, random_state=seed), Q.rvs(n, random_state=seed + 1)


def test_class_gaussians_have_the_exact_ratio_at_every_level():
    schedule = LogSNRSchedule(10, 0.02, 10.0)
    x, y = torch.from_numpy(np.concatenate(samples(20_000))), torch.arange(2).repeat_interleave(20_000)
    base = fit_class_gaussians(x, 1 - y, schedule)
    query = x[::4000]
    effects = base.class_effects(query)
    for t in (0, 4, 11):
        alpha, sigma = (float(values[t]) for values in (schedule.alpha, schedule.sigma))
        noisy = [
            multivariate_normal(alpha * g.mean, alpha**2 * g.cov + sigma**2 * np.eye(2)).logpdf(query.numpy())
            for g in (Q, P)
        ]
        log_p = base.log_prob_levels(query)[:, t, None] + effects[:, :, t]
        np.testing.assert_allclose(log_p.numpy(), np.stack(noisy, 1), rtol=0.03, atol=0.02)
    assert float(effects[:, :, -1].abs().max()) < 1e-9


def test_class_gaussians_share_a_covariance_where_only_the_means_differ():
    """A ratio of 20-dimensional Gaussians with equal covariance is linear; its 210 squares are not worth fitting."""
    schedule = LogSNRSchedule(10, 0.02, 10.0)
    y = torch.arange(2).repeat(150)
    noise = torch.randn(300, 20, generator=rng(0), dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(20, 20, generator=rng(1), dtype=torch.float64))[0]

    def curvature(x):
        """Share of the log ratio at +-v that is even in v."""
        base = fit_class_gaussians(x, y, schedule)
        middle = torch.stack([x[y == k].mean(0) for k in range(2)]).mean(0)
        effects = [base.class_effects(middle + sign * noise[:50])[:, :, 0] for sign in (1, -1)]
        up, down = (e[:, 1] - e[:, 0] for e in effects)
        return float((up + down).abs().mean() / (up - down).abs().mean())

    assert curvature(noise @ turn + y[:, None]) < 0.05
    assert curvature(noise * torch.where(y[:, None] == 1, 2.0, 1.0) + y[:, None]) > 0.5


def test_gaussians_of_few_samples_of_many_columns_are_shrunk():
    """80 samples of 60 columns a class: unshrunk, the ratio is less than no ratio at all."""
    y, moved = torch.arange(2000) % 2, torch.arange(2000)[:, None] % 2 * torch.eye(60, dtype=torch.float64)[0]
    x, new = (torch.randn(2000, 60, generator=rng(seed), dtype=torch.float64) + 1.5 * moved for seed in (0, 1))
    held_out = x[160:240], y[160:240]
    base = fit_class_gaussians(x[:160], y[:160], LogSNRSchedule(50, 0.05, 10.0), held_out=held_out)
    loss = torch.nn.functional.cross_entropy(base.class_effects(new)[:, :, 0], y)
    assert loss < 0.65 < np.log(2)


def test_copies_of_a_sample_do_not_choose_the_covariances():
    """A class repeated to the size of the other: its own copies would always bear out its own covariance."""
    schedule = LogSNRSchedule(10, 0.02, 10.0)
    x, held_out = (torch.randn(n, 20, generator=rng(n), dtype=torch.float64) for n in (340, 100))
    samples = torch.cat([x[:40].repeat(8, 1)[:300], x[40:]])
    y, held_out_y = torch.tensor([1, 0]).repeat_interleave(300), torch.arange(2).repeat(50)
    order = torch.randperm(600, generator=rng(0))
    shared = fit_class_gaussians(samples[order], y[order], schedule, held_out=(held_out, held_out_y))
    alone = fit_class_gaussians(samples[order], y[order], schedule)
    apart = [float(base.class_effects(held_out)[:, :, 0].diff(dim=1).abs().mean()) for base in (shared, alone)]
    assert apart[0] < 2 < apart[1]


def test_a_class_without_samples_has_the_gaussian_of_all():
    """Whichever it is: the last, or one in between."""
    schedule = LogSNRSchedule(10, 0.02, 10.0)
    x, y = torch.from_numpy(np.concatenate(samples(200))), torch.arange(2).repeat_interleave(200)
    both = fit_class_gaussians(x, y, schedule).class_effects(x)
    for labels, absent in ((y, 2), (2 * y, 1)):
        effects = fit_class_gaussians(x, labels, schedule, classes=3).class_effects(x)
        present = [k for k in range(3) if k != absent]
        assert torch.equal(effects[:, present], both) and not effects[:, absent].any()
    mixture = MixtureMarginals.fit(x, schedule, 2).with_classes(x, y, 3)
    assert torch.allclose(mixture.class_log_weights[2], mixture.log_weights)


def test_a_class_that_is_missing_in_the_training_split():
    order, y = permutation(120, 0), torch.arange(120) % 2 * 2
    y[order[0]] = 1  # of the validation split
    model = {"labels": "joint", "class_gaussians": True, "backbone": {"width": 8, "depth": 1}, "schedule": {"T": 10}}
    x = torch.randn(120, 2, generator=rng(0))
    found = torchcdm.fit(x, y, model=model, steps=2, batch_size=32, device="cpu", progress=False)
    assert found.log_prob(x[:3], y=torch.arange(3)).isfinite().all()
