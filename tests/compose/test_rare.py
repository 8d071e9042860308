"""Probabilities of rare events, against Gaussians and mixtures."""

import math

import pytest
import torch
from test_combinations import SCHEDULE, exact, gaussian
from test_corrected import FAR

from torchcdm import compose
from torchcdm.errors import UserError

FIRST_NOISE = float(SCHEDULE.ratio[1])


def beyond(threshold):
    """P(x_0 > threshold) of FAR plus the noise of level 1."""
    z = (threshold - FAR.means[:, 0]) / (FAR.variances[:, 0] + FIRST_NOISE**2).sqrt()
    return float((FAR.log_weights.exp() * 0.5 * torch.erfc(z / math.sqrt(2))).sum())


def first(x):
    return x[:, 0]


def test_a_tail_of_one_in_a_hundred_thousand():
    """Five standard errors: the coefficient of variation of 400 particles is 0.17 at best."""
    threshold = 4.05
    found = compose.probability(exact(FAR), first, threshold, 400, moves=2)
    assert 5e-6 < beyond(threshold) < 5e-5
    assert found.value == pytest.approx(beyond(threshold), rel=0.8)
    assert found.low < found.value < found.high < 3 * found.value
    assert (found.x[:, 0] > threshold).all() and len(found.x) > 100
    assert found.thresholds == sorted(found.thresholds) and found.thresholds[-1] == threshold
    assert found.believe and "evaluations" in str(found)


@pytest.mark.slow
def test_the_interval_covers():
    """Nearly always: 95 % of 12."""
    truth = beyond(3.0)
    found = [compose.probability(exact(FAR), first, 3.0, 200, moves=2, seed=seed) for seed in range(12)]
    assert sum(p.low < truth < p.high for p in found) >= 9
    assert sum(p.value for p in found) / 12 == pytest.approx(truth, rel=0.3)


def test_common_events_and_composed_densities():
    model, base = gaussian()
    mean, variance = float(base.mean[0]), base.moments(1)[1]
    assert compose.probability(model, first, mean, 400, moves=1).value == pytest.approx(0.5, abs=0.1)
    certain = compose.probability(model, first, -100.0, 100, moves=1)
    assert certain.value == pytest.approx(1.0) and certain.low < 0.99
    with pytest.raises(UserError, match="trained without classes"):
        compose.probability(compose.tilted(model, lambda x: x.sum(1)), first, mean, 100, y=1)
    push = torch.tensor([2.0, 0.0], dtype=torch.float64)
    pushed = compose.probability(compose.tilted(model, lambda x: x.double() @ push), first, mean, 400, moves=1)
    axes = base.rotation(torch.eye(2, dtype=torch.float64))[0]
    spread = float((axes.square() * variance).sum())
    assert pushed.value == pytest.approx(0.5 * math.erfc(-2 * spread / math.sqrt(2 * spread)), abs=0.1)


def test_an_event_of_another_shape_is_refused_before_the_work(monkeypatch):
    monkeypatch.setattr("torchcdm.compose.rare.climb", None)
    with pytest.raises(UserError, match="one number a sample"):
        compose.probability(exact(FAR), lambda x: x, 1.0)


@pytest.mark.parametrize("event, threshold, options, message", [
    (lambda x: x, 1.0, {}, "one number a sample"),
    (lambda x: torch.zeros(len(x)), 1.0, {}, "no particle is above 0"),
    (lambda x: x[:, 0] * math.nan, 1.0, {}, "not numbers"),
    (lambda x: x[:, 0].clamp(max=0.5), 1.0, {}, "no particle is above 0.5"),
    (first, math.nan, {}, "threshold is nan"),
    (first, 1.0, {"n": 3}, "n is 3"),
    (first, 1.0, {"moves": 0}, "moves is 0"),
])  # fmt: skip
def test_events_that_make_no_sense(event, threshold, options, message):
    with pytest.raises(UserError, match=message) as error:
        compose.probability(exact(FAR), event, threshold, **{"n": 50, "moves": 1} | options)
    assert "\n" not in str(error.value)
