"""Ratios and anomaly scores answer bad input by ValueError or TypeError, and keep what was fitted."""

import pytest
import torch
from bad_tables import ALWAYS, GOOD, NUMBERS, OTHERS
from hypothesis import given, settings, strategies as st
from oracles import ZeroBackbone

from torchcdm import ClassificationDiffusion, DensityRatio
from torchcdm.apps.anomaly import SCORES, AnomalyDetector, level_profile
from torchcdm.apps.ratio import Calibration, effective_sample_size, importance_weights
from torchcdm.diffusion.schedules import UniformSigmaSchedule
from torchcdm.units import DataTransform

TENSOR = torch.from_numpy(GOOD)
MODEL = ClassificationDiffusion(ZeroBackbone(22), UniformSigmaSchedule(20), DataTransform((3,)))
many = settings(max_examples=200, deadline=None)


def score(name):
    return AnomalyDetector(name, MODEL, MODEL if name == "ratio" else None)


@pytest.fixture(scope="module")
def ratio():
    return DensityRatio(0, device="cpu", steps=2).fit(GOOD + 1, GOOD)


RATIO_CALLS = {
    "log_ratio": lambda ratio, bad: ratio.log_ratio(bad),
    "importance_weights": lambda ratio, bad: ratio.importance_weights(bad),
    "outside_support": lambda ratio, bad: ratio.outside_support(bad),
    "numerator": lambda ratio, bad: ratio.calibration(bad, GOOD),
    "denominator": lambda ratio, bad: ratio.calibration(GOOD, bad),
    "effective_sample_size": lambda ratio, bad: ratio.effective_sample_size(bad),
    "weights": lambda ratio, bad: importance_weights(bad),
    "log ratios": lambda ratio, bad: Calibration.of(GOOD[:, 0], bad),
}


@given(st.sampled_from(sorted(RATIO_CALLS)), st.sampled_from(sorted(ALWAYS | OTHERS)))
@many
def test_a_ratio_refuses(ratio, call, name):
    with pytest.raises((ValueError, TypeError)):
        RATIO_CALLS[call](ratio, (ALWAYS | OTHERS)[name])


@given(st.sampled_from(sorted(ALWAYS)), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_fit_that_fails_leaves_the_ratio(ratio, name, first):
    before = dict(vars(ratio))
    with pytest.raises((ValueError, TypeError)):
        ratio.fit(*((ALWAYS[name], GOOD) if first else (GOOD, ALWAYS[name])))
    assert vars(ratio) == before


@pytest.mark.parametrize("bad", NUMBERS.values(), ids=NUMBERS)
def test_bad_numbers_are_refused(ratio, bad):
    detector = score("log_prob").fit(TENSOR)
    for call in (
        lambda: DensityRatio(random_state=bad),
        lambda: DensityRatio(data={"validation_fraction": bad}).fit(GOOD, GOOD + 1),
        lambda: ratio.importance_weights(GOOD, clip=bad),
        lambda: detector.threshold(bad),
        lambda: detector.flags(torch.zeros(3), bad),
        lambda: effective_sample_size(bad),
    ):
        with pytest.raises((ValueError, TypeError)):
            call()


SCORE_CALLS = {
    "score": lambda name, bad: score(name).fit(TENSOR).score(bad),
    "fit": lambda name, bad: score(name).fit(bad),
    "profile": lambda name, bad: level_profile(MODEL, bad),
    "no name": lambda name, bad: AnomalyDetector(bad, MODEL),
    "no model": lambda name, bad: AnomalyDetector("levels", bad),
}


@given(st.sampled_from(sorted(SCORE_CALLS)), st.sampled_from(sorted(SCORES)), st.sampled_from(sorted(ALWAYS | OTHERS)))
@many
def test_an_anomaly_score_refuses(call, kind, name):
    with pytest.raises((ValueError, TypeError)):
        SCORE_CALLS[call](kind, (ALWAYS | OTHERS)[name])


def test_a_score_that_is_nan_is_no_normal_one():
    detector = score("log_prob").fit(TENSOR)
    assert detector.flags([0.0, float("nan")], 0.1)[1]


def test_grey_levels_of_another_range_are_refused_as_they_are_of_files():
    model = ClassificationDiffusion(
        ZeroBackbone(22), UniformSigmaSchedule(20), DataTransform.images((1, 2, 2), 17, dequantize=False)
    )
    x = torch.arange(40.0).reshape(10, 1, 2, 2)
    detector = AnomalyDetector("log_prob", model).fit(x % 17)
    for wrong, message in ((6 * x, "values from 0 to 234; the model's grey levels are 0 ... 16"),
                           ((x % 17) / 16, "fractions of .-1, 1.; the model's grey levels")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            detector.score(wrong)


def test_percentiles_keep_the_precision_of_scores():
    detector = score("log_prob").fit(TENSOR)
    scores = detector.calibration
    assert torch.equal(detector.percentile(scores.tolist()), detector.percentile(scores))


@pytest.mark.parametrize("kind", SCORES)
def test_arrays_and_lists_are_scored_as_tensors(kind):
    fitted = score(kind).fit(GOOD).score
    assert torch.equal(fitted(GOOD), fitted(TENSOR))
    torch.testing.assert_close(fitted(GOOD.tolist()), fitted(TENSOR), rtol=1e-3, atol=1e-3)  # lists are float32
