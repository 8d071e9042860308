"""Thresholds that keep their false-positive rate, percentiles that agree with them, and files."""

import copy
import math

import pytest
import torch
from oracles import MixtureClassifier, ZeroBackbone, labelled_mixture, normal, rng
from scipy.stats import betabinom

from studies.exact import GaussianMixture
from torchcdm import ClassificationDiffusion, UserError, load
from torchcdm.apps.anomaly import AnomalyDetector
from torchcdm.diffusion.schedules import UniformSigmaSchedule
from torchcdm.units import DataTransform

SCHEDULE = UniformSigmaSchedule(20)
NAMES = ["log_prob", "typicality", "coarse", "complexity", "levels"]


def model_of(mixture):
    transform = DataTransform(mixture.shape)
    return ClassificationDiffusion(MixtureClassifier(mixture, SCHEDULE), SCHEDULE, transform)


@pytest.fixture(scope="module")
def mixture():
    labelled = labelled_mixture()
    covariances = labelled.vectors @ torch.diag_embed(labelled.variances) @ labelled.vectors.mT
    return GaussianMixture(labelled.log_weights.exp(), labelled.means, covariances)


@pytest.fixture(scope="module")
def model(mixture):
    return model_of(mixture)


@pytest.fixture
def blank(model):
    """A detector of given calibration scores."""

    def of(scores):
        detector = AnomalyDetector("log_prob", model)
        detector.calibration = scores.double().sort().values
        return detector

    return of


# --- calibration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_fresh_normal_data_are_flagged_at_the_rate_asked_for(model, mixture, name):
    """Half of 2000 calibrates, so the count of 4000 fresh ones is beta-binomial; bounds of one in a million."""
    detector = AnomalyDetector(name, model).fit(mixture.sample(2000, rng(1)))
    fresh = detector.score(mixture.sample(4000, rng(2)))
    for fpr in (0.01, 0.05, 0.2):
        above = 1001 - math.ceil(1001 * (1 - fpr) - 1e-9)
        law = betabinom(4000, above, 1001 - above)
        assert law.ppf(1e-6) <= int(detector.flags(fresh, fpr).sum()) <= law.isf(1e-6)


@pytest.mark.parametrize(("n", "fpr"), [(19, 0.05), (20, 0.05), (99, 0.01), (9, 0.3), (1, 0.5)])
def test_the_rate_holds_for_small_calibrations_too(blank, n, fpr):
    """Over many calibrations: the quantile of n samples, without n + 1, would flag too many."""
    generator, trials = rng(3), 20_000
    draws = torch.rand(trials, n + 1, generator=generator, dtype=torch.float64)
    flagged = sum(bool(blank(row[1:]).flags(row[:1], fpr)) for row in draws)
    exact = math.floor(fpr * (n + 1) + 1e-9) / (n + 1)
    assert exact <= fpr
    assert abs(flagged / trials - exact) < 5 * math.sqrt(exact * (1 - exact) / trials)


def test_flags_and_percentiles_tell_the_same(blank):
    """Flagged exactly where 1 - percentile / 100, the conformal p-value, is at most the rate; with ties."""
    for n in (5, 19, 60, 99):
        detector = blank(torch.randint(0, 12, (n,), generator=rng(n)))
        scores = torch.arange(-1, 14, 0.5, dtype=torch.float64)
        p = 1 - detector.percentile(scores) / 100
        for fpr in (0.2, 0.25, 0.5, 0.9):
            assert torch.equal(detector.flags(scores, fpr), p <= fpr + 1e-9)


def test_percentiles_by_counting(blank):
    percentile = blank(torch.tensor([3.0, 1.0, 2.0])).percentile(torch.tensor([0.0, 1.0, 1.5, 9.0]).double())
    assert percentile.tolist() == [0.0, 0.0, 25.0, 75.0]


def test_the_score_is_fitted_on_other_samples_than_the_threshold(model, mixture):
    """Typicality: the mean is that of one half, the calibration that of the other, and all samples are used."""
    reference = mixture.sample(50, rng(1))
    detector = AnomalyDetector("typicality", model).fit(reference)
    raw = -AnomalyDetector("log_prob", model).fit(reference).score(reference)
    distance = (raw - detector.fitted["mean"]).abs()
    calibrated = torch.isclose(distance[:, None], detector.calibration).any(1)
    assert calibrated.sum() == len(detector.calibration) == 25
    torch.testing.assert_close(raw[~calibrated].mean(), detector.fitted["mean"])


def test_the_reference_is_divided_at_random_and_alike_each_time(model, mixture):
    """A reference that is sorted must not be halved in the middle."""
    reference = mixture.sample(400, rng(1))
    reference = reference[reference[:, 0].argsort()]
    first = AnomalyDetector("log_prob", model).fit(reference)
    low, high = first.score(reference).chunk(2)
    halves = [torch.isin(first.calibration, half).double().mean() for half in (low, high)]
    assert min(halves) > 0.35
    assert torch.equal(first.calibration, AnomalyDetector("log_prob", model).fit(reference).calibration)


@pytest.mark.parametrize(
    ("n", "fpr", "message"),
    [
        (18, 0.05, "18 held-out normal samples cannot calibrate a false-positive rate of 0.05; it takes 19"),
        (98, 0.01, "it takes 99"),
        (50, 0.0, "fpr is 0.0; it must be greater than 0"),
        (50, 1.0, "it must be less than 1"),
        (50, float("nan"), "it must be a finite number"),
    ],
)
def test_rates_that_cannot_be_kept_are_refused(blank, n, fpr, message):
    with pytest.raises(UserError, match=message):
        blank(torch.arange(n)).threshold(fpr)


def test_a_reference_without_two_parts_is_refused(model):
    with pytest.raises(UserError, match="unknown anomaly score"):
        AnomalyDetector(["levels"], model)
    with pytest.raises(UserError, match="the reference holds 1 samples"):
        AnomalyDetector("log_prob", model).fit(torch.zeros(1, 2))


@pytest.mark.parametrize("name", ["levels", "typicality"])
def test_a_reference_without_density_is_refused(name):
    """Samples that are not rounded have noise on their grey levels; a second draw of it leads beyond the cells."""
    model = load("zoo:digits")
    drawn = model.sample(30, steps=4, seed=1)
    with pytest.raises(UserError, match="samples of the reference is not finite; .* round noisy grey levels"):
        AnomalyDetector(name, model).fit(drawn)
    assert AnomalyDetector(name, model).fit(model.transform.quantize(drawn)).calibration.isfinite().all()


# --- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "ratio"])
def test_a_saved_detector_gives_the_same_scores_and_thresholds(tmp_path, model, mixture, name):
    broad = model_of(GaussianMixture(torch.ones(1), torch.zeros(1, 2), 4 * torch.eye(2)[None]))
    background = broad if name == "ratio" else None
    detector = AnomalyDetector(name, model, background).fit(mixture.sample(100, rng(1)))
    detector.save(tmp_path / "saved")
    again = AnomalyDetector.load(tmp_path / "saved", model, background)
    x = 2 * normal(20, 2)
    assert again.name == name
    assert torch.equal(again.score(x), detector.score(x))
    assert again.threshold(0.1) == detector.threshold(0.1)
    assert torch.equal(again.percentile(again.score(x)), detector.percentile(detector.score(x)))
    if background is not None:
        background.level_constants[3] += 0.1
        with pytest.raises(UserError, match="trained since"):
            AnomalyDetector.load(tmp_path / "saved", model, background)


def test_files_that_do_not_fit_are_refused(tmp_path, model, mixture):
    path = tmp_path / "saved"
    with pytest.raises(UserError, match="no such file"):
        AnomalyDetector.load(path, model)
    AnomalyDetector("levels", model).fit(mixture.sample(100, rng(1))).save(path)
    other = ClassificationDiffusion(ZeroBackbone(22), SCHEDULE, DataTransform((3,)))
    with pytest.raises(UserError, match="or is another"):
        AnomalyDetector.load(path, other)
    with pytest.raises(UserError, match="takes no background model"):
        AnomalyDetector.load(path, model, model)
    since = copy.deepcopy(model)
    since.level_constants[3] += 0.1
    with pytest.raises(UserError, match="trained since.* fit the detector again"):
        AnomalyDetector.load(path, since)
    AnomalyDetector.load(path, copy.deepcopy(model).double())
    changed = copy.deepcopy(model)
    detector = AnomalyDetector("levels", changed).fit(mixture.sample(100, rng(1)))
    changed.level_constants[3] += 0.1
    detector.save(tmp_path / "late")
    with pytest.raises(UserError, match="trained since"):
        AnomalyDetector.load(tmp_path / "late", changed)
    (path / "detector.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        AnomalyDetector.load(path, model)
