"""How far estimates of a log ratio are followed, and the largest that samples of both sides bear out."""

import math

import numpy as np
import pytest
from gaussian_pair import exact, samples

from torchcdm.apps.ratio.blending import blend, most


@pytest.mark.parametrize("counts", [(2000, 2000), (500, 4000), (4000, 500)])
def test_log_ratios_that_samples_bear_out_have_no_end(counts):
    """In both directions, of two normals: at most a tenth of the draws are called too large."""
    draw, called = np.random.RandomState(0), 0
    for width in np.repeat([0.5, 1, 2, 4], 10):
        up, down = (width * draw.normal(side * width / 2, 1, n) for n, side in zip(counts, (1, -1), strict=True))
        called += (most(up, down) < math.inf) + (most(-down, -up) < math.inf)
    assert called <= 8


def test_a_log_ratio_that_goes_on_rising_ends_where_the_samples_end():
    draw = np.random.RandomState(0)
    up, down = draw.normal(0.5, 1, 2000), draw.normal(-0.5, 1, 2000)
    # One of 2000 samples at 20 nats: then there should be 20 000 of the numerator for each.
    assert down.max() > most(up, np.append(down, 20)) > 1
    assert most(np.append(up, np.full(3, 20.0)), np.append(down, 20)) < 4
    # The densities at three samples of the denominator among the numerator's tell of a share of 3 in 2000.
    apart = most(up + 80, np.append(down - 80, [80.0, 81, 82]))
    assert 0 <= apart < math.log(2000 / 3) + 1
    assert most(up + 80, down - 80) == math.inf
    assert most(np.zeros(50), np.full(50, 9.0)) == 0


def blended(*estimates, **options):
    """Weights and offset for estimates of each side, (N,) and (M,)."""
    return blend(*(np.stack(side, 1) for side in zip(*estimates, strict=True)), **options)


def test_the_best_estimate_gets_the_weight_and_one_that_is_too_certain_is_scaled():
    right, draw = [exact(x) for x in samples(1000, seed=7)], np.random.RandomState(0)
    assert blended(right) == pytest.approx([1.0, 0.0], abs=0.05) and blended(right, errors=2.0) == [1.0, 0.0]
    scale, offset = blended([3 * side + 1 for side in right], errors=2.0)
    assert scale == pytest.approx(1 / 3, abs=0.05) and offset == pytest.approx(-scale, abs=0.1), "without a prior"
    assert blended([3 * side for side in right]) == pytest.approx([1 / 3, 0.0], abs=0.05)
    assert -0.9 < blended([side + 1 for side in right])[1] < -0.1, "an offset is unlikely, and hardly believed"
    assert blended([0.5 * side for side in right])[0] == 1.0, "never made more certain"
    noise = [draw.normal(size=1000) for _ in right]
    weights = blended(noise, right)
    assert weights[1] > 0.9 and weights[0] < 0.1
    assert blended(right, noise)[0] > 0.95 and blended(right, noise)[1] < 0.05
    # Two halves of the truth are worth more than either, and what adds nothing is left out.
    halves = [[2 * side * (k == (draw.uniform(size=1000) < 0.5)) for side in right] for k in (0, 1)]
    assert min(blended(*halves)[:2]) > 0.2


def test_few_samples_decide_less_than_many():
    """The second estimate is the exact one, the first says nothing; how far it is followed depends on the samples."""
    right = [exact(x) for x in samples(1000, seed=7)]
    found = {n: blended(*([part * side[:n] for side in right] for part in (0.0, 1.0))) for n in (4, 40, 1000)}
    assert found[4][1] < 0.5 < found[40][1] < found[1000][1] and found[1000][1] > 0.9
    # Four samples of each side that lie apart by chance cannot change the prior ratio of the sources.
    assert abs(blended([np.full(4, -1.0), np.full(4, -1.0)])[-1]) < 0.1


def test_a_gain_that_few_samples_cannot_prove_is_taken():
    """A tenth of the numerator is a peak, of which two Gaussians see little, the second estimate all."""
    draw = np.random.RandomState(0)

    def mixed(n, share):
        x = draw.normal(size=(n, 2))
        return np.where((draw.uniform(size=n) < share)[:, None], 1.5 + 0.5 * draw.normal(size=(n, 2)), x)

    many = mixed(100_000, 0.1)
    mean, covariance = many.mean(0), np.cov(many.T)

    def of_gaussians(x):
        distance = (((x - mean) @ np.linalg.inv(covariance)) * (x - mean)).sum(1)
        return (np.square(x).sum(1) - distance - np.linalg.slogdet(covariance)[1]) / 2

    def right(x):
        return np.log(0.9 + 0.4 * np.exp(np.square(x).sum(1) / 2 - 2 * np.square(x - 1.5).sum(1)))

    weights, stays = [], 0
    for _ in range(20):
        held_out = mixed(750, 0.1), mixed(750, 0)
        both = [[of(side) for side in held_out] for of in (of_gaussians, right)]
        weights.append(blended(*both)[1])
        stays += blended(*both, errors=2.0) == [1.0, 0.0, 0.0]
    assert stays > 0, "a test of significance keeps the Gaussians at times"
    assert np.mean(weights) > 0.5 and min(weights) > 0.1


def test_sources_that_hardly_overlap_keep_the_first_estimate():
    """A few samples would decide; and where a density overflows none can."""
    numerator, denominator = (exact(x) for x in samples(1000, seed=7))
    assert blended([numerator + 20, denominator - 20]) == [1.0, 0.0]
    # Two thirds of these have a smaller loss, but tell of a smaller divergence.
    noise = np.random.RandomState(0).normal(size=(2, 4000))
    assert blended([6 * noise[0] + 12, 6 * noise[1] - 12]) == [1.0, 0.0]
    assert blended([np.append(numerator, -np.inf), denominator]) == [1.0, 0.0]
