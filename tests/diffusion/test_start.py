"""The density in closed form that a training starts from: chosen by data that it was not fitted to."""

import math

import pytest
import torch
from oracles import normal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.schedules import UniformSigmaSchedule
from torchcdm.diffusion.start import best_shrunk, best_start
from torchcdm.errors import UserError


def correlated(n: int, d: int, factors: int, seed: int = 0) -> Tensor:
    """Rows (n, d) with few common factors; the same loadings for every seed."""
    return normal(n, factors, seed=seed) @ normal(factors, d, seed=99) + 0.5 * normal(n, d, seed=seed + 1)


@pytest.mark.parametrize("form", ["full", "cosine", "diagonal"])
def test_what_is_chosen_is_what_the_fitted_gaussian_gives(form):
    train, held_out = normal(30, 1, 4, 4), normal(50, 1, 4, 4, seed=5)
    start = best_shrunk(train, held_out, 1, form, shares=(0.2,))
    fitted = GaussianMarginals.fit(train, UniformSigmaSchedule(5), form=form, shrinkage=0.2)
    assert torch.allclose(start.log_prob, fitted.log_prob_levels(held_out)[:, 0])


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that is made meanwhile."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, made.numel() if isinstance(made, Tensor) else 0)
        return made


def test_images_are_judged_by_one_of_many_gaussians_after_the_other():
    train, held_out = normal(40, 1, 6, 6), normal(300, 1, 6, 6, seed=5)
    with Largest() as largest:
        best_shrunk(train, held_out, 8, "cosine")
    assert largest.numbers == held_out.numel()


def test_few_rows_of_many_correlated_columns_are_not_overfitted():
    train, held_out = correlated(128, 150, 20), correlated(200, 150, 20, seed=7)
    start = best_start(train, held_out)
    truth = torch.distributions.MultivariateNormal(
        torch.zeros(150).double(), normal(20, 150, seed=99).T @ normal(20, 150, seed=99) + 0.25 * torch.eye(150)
    )
    assert start.fields["form"] == "full" and start.fields["shrinkage"] > 0
    # The covariance without shrinkage is a hundred thousand times worse; the truth is some 30 nats better.
    assert start.value > float(truth.log_prob(held_out).mean()) - 60


def test_few_images_take_the_cosine_form_and_mixtures_their_modes():
    grid = torch.linspace(0, 3, 16).double()
    wave = torch.stack([torch.cos(k * grid)[None] * torch.cos(j * grid)[:, None] for k in range(4) for j in range(4)])
    images = (normal(60, 16) @ wave.flatten(1)).reshape(60, 1, 16, 16) + 0.05 * normal(60, 1, 16, 16)
    start = best_start(images[:40], images[40:])
    assert start.fields["form"] == "cosine" and math.isfinite(start.value)
    modes = torch.cat([normal(300, 2) - 8, normal(300, 2, seed=1) + 8])
    assert best_start(modes[::2], modes[1::2]).fields["components"] == 2


def test_independent_columns_of_other_scales_have_no_correlations():
    scales = torch.logspace(-2, 2, 120).double()
    start = best_start(normal(40, 120) * scales, normal(200, 120, seed=3) * scales)
    assert start.fields["form"] == "diagonal" and start.fields["shrinkage"] == 0


def test_a_very_wide_table_takes_no_covariance():
    x = normal(30, 20_000)
    start = best_start(x[:20], x[20:])
    assert start.fields["form"] in ("diagonal", None)


def test_more_held_out_rows_than_are_scored():
    # Sorted, as rows without copies are: the first ten thousand of them would be another density's.
    x = normal(21_000, 2)[normal(21_000, 2)[:, 0].argsort()]
    start = best_start(normal(400, 2, seed=1), x, given={"components": 1})
    assert start.fields["components"] == 1 and start.value == pytest.approx(-1 - math.log(2 * math.pi), abs=0.05)


def test_what_is_given_is_not_chosen():
    x = normal(100, 3)
    assert best_start(x[:50], x[50:], given={"gaussian": False}).fields["gaussian"] is False
    found = best_start(x[:50], x[50:], given={"gaussian": True, "components": 2, "shrinkage": 0.3, "form": None})
    assert found.fields == {"gaussian": True, "components": 2, "shrinkage": 0.3, "form": "full"}
    assert best_start(x[:50], x[50:], given={"form": "diagonal"}).fields["form"] == "diagonal"


@pytest.mark.parametrize(("shape", "form"), [((3,), "diagonal"), ((1, 4, 4), None), ((1, 4, 4), "full")])
def test_what_no_density_has_is_refused(shape, form):
    x, given = normal(40, *shape), {"components": 3, "form": form}
    with pytest.raises(UserError, match="no base density of 20 samples .* has components 3"):
        best_start(x[:20], x[20:], given=given)
