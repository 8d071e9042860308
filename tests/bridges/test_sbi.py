"""sbi's own diagnostics and samplers, run on our estimators, where the posterior is known."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributions import MultivariateNormal

from torchcdm.apps.ratio import DensityRatio
from torchcdm.errors import UserError
from torchcdm.estimators import CDMConditional

sbi = pytest.importorskip("sbi")
from sbi.diagnostics import check_sbc, check_tarp, run_sbc, run_tarp  # noqa: E402
from sbi.inference import DirectPosterior, MCMCPosterior  # noqa: E402
from sbi.inference.potentials.ratio_based_potential import ratio_estimator_based_potential  # noqa: E402

from torchcdm.bridges.sbi import SbiDensity, SbiRatio, pairs_and_strangers  # noqa: E402

PRIOR = MultivariateNormal(torch.zeros(2), torch.eye(2))
MATRIX = torch.tensor([[1.0, 0.3], [-0.5, 2.0], [0.8, 0.8]])
NOISE = torch.tensor([0.5, 1.0, 0.3])


def simulate(n, seed):
    torch.manual_seed(seed)
    theta = PRIOR.sample((n,))
    return theta, theta @ MATRIX.T + NOISE * torch.randn(n, 3)


def exact(x):
    """The posterior of one x, or of a batch."""
    covariance = torch.linalg.inv(torch.eye(2) + MATRIX.T @ torch.diag(NOISE**-2) @ MATRIX)
    return MultivariateNormal(x / NOISE**2 @ MATRIX @ covariance, covariance)


@pytest.fixture(scope="module")
def estimator():
    """The posterior of a linear Gaussian simulator, which it is before the first step."""
    overrides = {"model": {"backbone": {"energy_maps": 2}, "schedule": {"T": 30}}}
    theta, x = simulate(5000, 0)
    return CDMConditional(steps=1, lr=1e-12, width=8, depth=1, device="cpu", random_state=0, overrides=overrides).fit(
        theta.numpy(), x.numpy()
    )


def test_log_p_and_draws_are_those_of_the_posterior(estimator):
    posterior = DirectPosterior(SbiDensity(estimator), PRIOR)
    theta, x = simulate(6, 1)
    found = posterior.log_prob_batched(theta[None].repeat(4, 1, 1), x, norm_posterior=False)
    assert found.shape == (4, 6)
    torch.testing.assert_close(found[0], exact(x).log_prob(theta), atol=0.1, rtol=0)
    draws = posterior.sample((500,), x=x[0], show_progress_bars=False)
    torch.testing.assert_close(draws.mean(0), exact(x[0]).mean, atol=0.1, rtol=0)
    assert not torch.equal(draws, posterior.sample((500,), x=x[0], show_progress_bars=False))
    torch.manual_seed(5)
    one = posterior.sample((3,), x=x[0], show_progress_bars=False)
    torch.manual_seed(5)
    assert torch.equal(one, posterior.sample((3,), x=x[0], show_progress_bars=False))
    assert torch.equal(posterior.posterior_estimator.loss(theta, x), -found[0])
    with pytest.raises(ValueError, match="condition"):
        posterior.posterior_estimator.log_prob(theta, x[:, :2])


def test_diagnostics_pass_what_is_calibrated_and_catch_what_is_not(estimator):
    posterior = DirectPosterior(SbiDensity(estimator), PRIOR)
    theta, x = simulate(200, 2)
    options = {"num_posterior_samples": 100, "show_progress_bar": False}
    ranks, draws = run_sbc(theta, x, posterior, **options)
    assert (check_sbc(ranks, theta, draws, 100)["ks_pvals"] > 0.01).all()
    assert check_tarp(*run_tarp(theta, x, posterior, **options))[1] > 0.01
    wrong, draws = run_sbc(theta + 0.5, x, posterior, **options)
    assert (check_sbc(wrong, theta, draws, 100)["ks_pvals"] < 1e-4).all()


@pytest.mark.parametrize("n", [2, 5, 40])
def test_no_stranger_keeps_its_own_x_and_all_are_there(n):
    theta, x = np.arange(n)[:, None], np.arange(n) + 0.5
    pairs, strangers = pairs_and_strangers(theta, x, seed=1)
    assert (pairs[:, 1] == pairs[:, 0] + 0.5).all() and (strangers[:, 1] != strangers[:, 0] + 0.5).all()
    assert (np.sort(strangers, 0) == pairs).all()
    with pytest.raises(UserError, match=f"{n} rows of theta, 1 of x; give as many, at least two"):
        pairs_and_strangers(theta, x[:1])


def test_slice_sampling_of_the_ratio_gives_the_posterior():
    theta, x = simulate(2000, 3)
    ratio = DensityRatio(random_state=0, steps=200, device="cpu").fit(*pairs_and_strangers(theta, x))
    network, x_new = SbiRatio(ratio, 2), simulate(1, 4)[1]
    found = network(theta[:300], x_new.expand(300, 3))
    expected = exact(x_new).log_prob(theta[:300]) - PRIOR.log_prob(theta[:300])
    near = expected > expected.max() - 8  # farther off the ratio is extrapolation
    assert np.corrcoef(found[near], expected[near])[0, 1] > 0.95
    potential, transform = ratio_estimator_based_potential(network, PRIOR, x_new)
    chains = {"method": "slice_np_vectorized", "num_chains": 20, "warmup_steps": 20}
    posterior = MCMCPosterior(potential, PRIOR, transform, **chains)
    draws = posterior.sample((200,), x=x_new, show_progress_bars=False)
    deviation = exact(x_new).covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()[0]
    assert ((draws.mean(0) - exact(x_new).mean[0]).abs() < deviation).all()


def test_columns_that_are_constant_and_data_frames_keep_their_places():
    overrides = {"model": {"backbone": {"energy_maps": 2}, "schedule": {"T": 30}}}
    theta, x = simulate(300, 5)
    theta, x = torch.cat([theta, torch.full((300, 1), 7.0)], 1), torch.cat([x, torch.ones(300, 1)], 1)
    tables = pd.DataFrame(theta.numpy(), columns=["a", "b", "c"]), pd.DataFrame(x.numpy(), columns=list("stuv"))
    of_arrays, of_frames = (
        SbiDensity(
            CDMConditional(steps=1, width=8, depth=1, device="cpu", random_state=0, overrides=overrides).fit(*pair)
        )
        for pair in ((theta.numpy(), x.numpy()), tables)
    )
    for density in (of_arrays, of_frames):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # arrays of data frames cannot be written to, of which torch warns
            draws = density.sample((4,), x[:2])
        assert draws.shape == (4, 2, 3) and (draws[..., 2] == 7).all() and draws[..., :2].std() > 0.1
        assert density.log_prob(theta[None, :2], x[:2]).shape == (1, 2)
    torch.testing.assert_close(of_frames.log_prob(theta[None], x), of_arrays.log_prob(theta[None], x))
    ratio = DensityRatio(random_state=0, max_seconds=5, device="cpu").fit(*pairs_and_strangers(theta, x))
    assert SbiRatio(ratio, 3).unnormalized_log_ratio(theta[:3], x[:3]).shape == (3,)
    for wrong, mend in ((0, "at least 1"), (7, "less than 7"), (["a", "b"], "a valid integer")):
        with pytest.raises(UserError, match=f"^parameters is .*; it must be {mend}"):
            SbiRatio(ratio, wrong)


def test_a_ratio_of_images_is_refused():
    images = torch.rand(2, 40, 1, 4, 4, generator=torch.Generator().manual_seed(6))
    ratio = DensityRatio(random_state=0, steps=2, device="cpu").fit(*images)
    with pytest.raises(UserError, match="the ratio is one of images"):
        SbiRatio(ratio, 1)


def test_what_is_not_fitted_says_so():
    with pytest.raises(ValueError, match="is not fitted yet"):
        SbiDensity(CDMConditional())
