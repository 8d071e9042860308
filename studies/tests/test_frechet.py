"""Fréchet distances against closed forms and an independent library; features that see what matters."""

import json
import sys
import types
from dataclasses import replace

import pytest
import torch
from oracles import covariance, rng

from studies.quality import extractor, features, frechet
from studies.quality.features import Extractor, extractor_for
from studies.quality.frechet import Moments, Reference, kernel_distance, precision_and_recall
from torchcdm.data import from_object, load_data
from torchcdm.errors import UserError


def frechet_distance(a, b):
    return Moments.of([a]).distance(Moments.of([b]))


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
    with pytest.raises(UserError, match="of 1 samples; at least 2 are needed"):
        frechet_distance(a, b[:1])


def test_moments_of_parts_are_those_of_the_whole():
    x = 1000 + torch.randn(500, 6, dtype=torch.float64, generator=rng()) @ covariance(6)
    found = Moments.of(x.split([1, 0, 255, 243, 1]))
    assert found.count == 500 and torch.allclose(found.mean, x.mean(0), rtol=1e-12)
    assert torch.allclose(found.covariance, torch.cov(x.T), rtol=1e-9)


def test_all_training_images_stand_for_the_data(monkeypatch):
    grey = torch.randint(0, 256, (12_000, 1, 2, 2), generator=rng()).to(torch.uint8)
    source = from_object(grey, validation_fraction=0.0, test_fraction=0.0)
    pixels = Extractor("pixels", lambda x: x.double().flatten(1), "pixels")
    monkeypatch.setattr(frechet, "extractor_for", lambda *_: pixels)
    reference = Reference(source)
    assert reference.header(7) == "Fréchet distance of 7 samples to 12000 training images in pixels"
    assert reference.distance(grey) == pytest.approx(0, abs=1e-6) and reference.distance(grey + 2.0) > 15
    # Where all pairs are looked at some of them do, from all over the split.
    assert torch.equal(reference.real, source.train.tensors(frechet.COMPARED)[0].flatten(1).float())


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


def test_fixed_features_tell_noise_and_a_missing_class_from_digits():
    source = load_data("digits")
    fixed = extractor_for(source)
    train, (x, y) = fixed.features(source.train.tensors()[0]), source.test.tensors()
    same = frechet_distance(fixed.features(x), train)
    missing = frechet_distance(fixed.features(x[y != 3]), train)
    noisy = frechet_distance(fixed.features(x + 4 * torch.randn(x.shape, generator=rng())), train)
    assert same < missing < noisy


@pytest.mark.parametrize(("name", "least"), [("digits", 0.98), ("fashion-mnist", 0.92)])
def test_the_fixed_networks_are_small_and_as_accurate_as_their_files_say(name, least):
    path = extractor.FOLDER / f"{name}.safetensors"
    network, facts = extractor.load_network(name)
    assert path.stat().st_size < 10**6 and facts["accuracy"] >= least and facts["data"] == name
    if name == "digits":  # Fashion-MNIST is not on every machine
        assert extractor.accuracy(network, load_data(name)) == pytest.approx(facts["accuracy"], abs=1e-9)


def test_the_command_that_made_the_fixed_networks(tmp_path, monkeypatch):
    short = {"digits": replace(extractor.RECIPES["digits"], cycles=((5, 5e-3), (1, 1e-3)))}
    monkeypatch.setattr(extractor, "RECIPES", short)
    monkeypatch.setattr("sys.argv", ["extractor", "digits", "--out", str(tmp_path)])
    assert extractor.main() == 0
    monkeypatch.setattr(extractor, "FOLDER", tmp_path)
    network, facts = extractor.load_network("digits")
    assert facts["accuracy"] > 0.8 and facts["accuracy by side"] == {"8": facts["accuracy"]}
    assert extractor.accuracy(network, load_data("digits")) == pytest.approx(facts["accuracy"], abs=1e-9)


def test_colour_and_other_sizes_have_features_too():
    x = torch.randint(0, 256, (60, 3, 20, 24), generator=rng()).to(torch.uint8)
    features = extractor_for(from_object(x)).features
    grey = extractor_for(from_object(x[:, :1])).features
    assert features(x).shape == (60, 3 * 128) and torch.allclose(features(x)[:, :128], grey(x[:, :1]))
    with pytest.raises(UserError, match="need images"):
        extractor_for(from_object(torch.randn(50, 3)))


def test_a_folder_keeps_what_is_measured_of_training_images(tmp_path, monkeypatch):
    source = load_data("digits")
    first = Reference(source, folder=tmp_path)
    x = source.test.tensors()[0]
    distance, header = first.distance(x), first.header(9)
    assert len(list(tmp_path.glob("*.json"))) == len(list(tmp_path.glob("*.safetensors"))) == 1
    (path,) = tmp_path.glob("reference-*.json")
    kept = json.loads(path.read_text())["settings"]
    assert (kept["data"], kept["split"], kept["count"]) == ("digits", "train", len(source.train))
    assert kept["extractor"] == first.extractor.name and kept["key"] == first.extractor.key
    monkeypatch.setattr(frechet, "in_batches", lambda *_: pytest.fail("measured again"))
    again = Reference(source, folder=tmp_path)
    assert (again.distance(x), again.header(9)) == (distance, header)
    assert torch.equal(again.real, first.real)


@pytest.mark.parametrize("scale", [1, 255])
def test_inception_sees_bytes_over_the_range_of_the_training_images(monkeypatch, tmp_path, scale):
    class Network(torch.nn.Module):
        """Stands for Inception; its features are the bytes."""

        def __init__(self, name, features):
            super().__init__()

        def forward(self, x):
            assert x.dtype == torch.uint8
            return (x.flatten(1),)

    fake = types.SimpleNamespace(FeatureExtractorInceptionV3=Network)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", fake)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / features.INCEPTION_WEIGHTS).touch()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(features, "find_spec", lambda name: True)
    grey = torch.arange(256).repeat(3).reshape(-1, 3, 2, 2)
    data = grey.to(torch.uint8) if scale == 255 else grey / 255
    source = from_object(data, validation_fraction=0.0, test_fraction=0.0)
    seen = extractor_for(source).features
    for x in (grey, grey * 0.5 + 1, grey * 2.0 - 100):
        expected = x.double().flatten(1).clamp(0, 255)
        assert (seen(x * scale / 255.0) - expected).abs().max() <= 0.51
