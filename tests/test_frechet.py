"""Fréchet distances against closed forms and an independent library; features that see what matters."""

import sys
import types

import pytest
import torch
from oracles import covariance, rng

from torchcdm.data import load_data
from torchcdm.errors import UserError
from torchcdm.frechet import extractor_for, frechet_distance, kernel_distance, precision_and_recall


def test_distance_of_gaussians_with_commuting_covariances():
    # Diagonal Gaussians: sum of (difference of means)² + (difference of deviations)².
    deviations = torch.tensor([[1.0, 2.0, 0.5], [1.5, 1.0, 0.5]], dtype=torch.float64)
    means = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.0]], dtype=torch.float64)
    noise = torch.randn(2, 400_000, 3, dtype=torch.float64, generator=rng())
    a, b = means[:, None] + deviations[:, None] * noise
    expected = float((means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, abs=0.02)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_agrees_with_torch_fidelity():
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    a = torch.randn(300, 12, dtype=torch.float64, generator=rng()) @ covariance(12)
    b = torch.randn(200, 12, dtype=torch.float64, generator=rng(1)) + 0.3
    statistics = [fid.fid_features_to_statistics(x) for x in (a, b)]
    theirs = fid.fid_statistics_to_metric(*statistics, verbose=False)
    theirs = next(iter(theirs.values())) if isinstance(theirs, dict) else theirs
    assert frechet_distance(a, b) == pytest.approx(float(theirs), rel=1e-5)


def test_fewer_samples_than_features():
    a, b = (torch.randn(5, 20, generator=rng(seed)) for seed in (0, 1))
    assert frechet_distance(a, b) > 0
    with pytest.raises(UserError, match="do not compare"):
        frechet_distance(a, b[:, :3])


def test_kernel_distance_is_the_mean_over_all_pairs():
    a, b = (torch.randn(n, 3, dtype=torch.float64, generator=rng(n)) for n in (4, 5))

    def kernel(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    within = [mean(kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j) for x in (a, b)]
    between = mean(kernel(x, y) for x in a for y in b)
    assert kernel_distance(a, b) == pytest.approx(sum(within) - 2 * between, rel=1e-12)
    # Without bias: of one distribution it is 0 on average, of another above.
    draws = torch.randn(200, 2, 10, 3, generator=rng())
    same = torch.tensor([kernel_distance(*pair) for pair in draws])
    assert abs(same.mean()) < 3 * same.std() / 200**0.5
    assert torch.tensor([kernel_distance(x, y + 1) for x, y in draws]).mean() > 10 * same.std() / 200**0.5


def test_precision_and_recall_tell_what_is_wrong_from_what_is_missing():
    left, right = (torch.randn(300, 2, generator=rng(seed)) + centre for seed, centre in ((0, 0.0), (1, 50.0)))
    real = torch.cat([left, right])
    precision, recall = precision_and_recall(torch.randn(300, 2, generator=rng(2)), real)
    assert precision > 0.9 and 0.4 < recall < 0.55, "half of the data are missing"
    precision, recall = precision_and_recall(real, left)
    assert 0.45 < precision < 0.6 and recall > 0.9, "half of the samples are wrong"
    assert precision_and_recall(real, real) == (1.0, 1.0) and precision_and_recall(left, right) == (0.0, 0.0)
    with pytest.raises(UserError, match="more than 3 samples"):
        precision_and_recall(real[:3], real)


def test_classifier_features_tell_noise_and_a_missing_class_from_digits():
    source = load_data("digits")
    extractor = extractor_for(source, steps=150)
    assert "classifier trained here on digits" in extractor.name
    accuracy = float(extractor.name.split("accuracy ")[1].split(" ")[0])
    assert accuracy > 90
    train, (x, y) = extractor.features(source.train.tensors()[0]), source.test.tensors()
    same = frechet_distance(extractor.features(x), train)
    missing = frechet_distance(extractor.features(x[y != 3]), train)
    noisy = frechet_distance(extractor.features(x + 4 * torch.randn(x.shape, generator=rng())), train)
    assert same < missing < noisy


@pytest.mark.parametrize("scale", [1, 255])
def test_inception_sees_bytes_over_the_range_of_the_training_images(monkeypatch, scale):
    from torchcdm.data import from_object

    class Network(torch.nn.Module):
        """Stands for Inception; its features are the bytes."""

        def __init__(self, name, features):
            super().__init__()

        def forward(self, x):
            assert x.dtype == torch.uint8
            return (x.flatten(1),)

    fake = types.SimpleNamespace(FeatureExtractorInceptionV3=Network)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", fake)
    monkeypatch.setattr("torchcdm.frechet.inception_features", lambda source: True)
    grey = torch.arange(256).repeat(3).reshape(-1, 3, 2, 2)
    data = grey.to(torch.uint8) if scale == 255 else grey / 255
    source = from_object(data, validation_fraction=0.0, test_fraction=0.0)
    features = extractor_for(source).features
    for x in (grey, grey * 0.5 + 1, grey * 2.0 - 100):
        expected = x.double().flatten(1).clamp(0, 255)
        assert (features(x * scale / 255.0) - expected).abs().max() <= 0.51


def test_data_without_classes_need_inception():
    from torchcdm.data import from_object

    source = from_object(torch.zeros(50, 3, 8, 8, dtype=torch.uint8) + torch.arange(8, dtype=torch.uint8))
    with pytest.raises(UserError, match="need images with classes"):
        extractor_for(source)
