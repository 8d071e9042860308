"""How far log ratios go: the largest that samples of both sides bear out."""

import math

import numpy as np
import pytest

from torchcdm.apps.ratio.blending import most


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
