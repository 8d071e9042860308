"""Fréchet distances against closed forms and an independent library; features that see what matters."""

import pytest
import torch
from oracles import covariance, rng

from torchcdm.data import load_data
from torchcdm.errors import UserError
from torchcdm.frechet import extractor_for, frechet_distance


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


def test_data_without_classes_need_inception():
    from torchcdm.data import from_object

    source = from_object(torch.zeros(50, 3, 8, 8, dtype=torch.uint8) + torch.arange(8, dtype=torch.uint8))
    with pytest.raises(UserError, match="need images with classes"):
        extractor_for(source)
