"""Maps of anomalies: under densities that are known, what was spoiled is found at its place."""

import pytest
import torch
from oracles import ZeroBackbone, normal, rng
from PIL import Image
from sklearn.metrics import roc_auc_score

from torchcdm import ClassificationDiffusion, UserError
from torchcdm.apps.anomaly import AnomalyMap
from torchcdm.apps.anomaly.maps import overlay, save_maps, top_columns
from torchcdm.diffusion.gaussian import GaussianMarginals, MatrixRotation
from torchcdm.diffusion.schedules import LogSNRSchedule
from torchcdm.units import DataTransform

SIDE = 8


def gaussian(shape, covariance):
    schedule = LogSNRSchedule(60, r_min=0.01)
    variances, vectors = torch.linalg.eigh(covariance)
    base = GaussianMarginals(schedule, torch.zeros(shape), variances, MatrixRotation(shape, vectors))
    model = ClassificationDiffusion(ZeroBackbone(62), schedule, DataTransform(shape), base).double()

    def draw(n, seed):
        return base.draw((n, *shape), rng(seed))

    return model, draw


@pytest.fixture(scope="module")
def smooth_images():
    """Pixels that are alike where they are near, brighter to the right."""
    places = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).double()
    near = (-torch.cdist(places, places).square() / 18).exp() + 0.02 * torch.eye(SIDE**2)
    scale = 0.5 + places[:, 1] / SIDE
    return gaussian((1, SIDE, SIDE), near * scale[:, None] * scale)


@pytest.fixture(scope="module")
def maps(smooth_images):
    model, draw = smooth_images
    return AnomalyMap(model).fit(draw(400, 0))


def test_a_patch_of_another_image_is_found(smooth_images, maps):
    _, draw = smooth_images
    x, other = draw(100, 1), draw(100, 2)
    where = torch.zeros(100, SIDE, SIDE, dtype=torch.bool)
    for i in range(100):
        top, left = i % 6, i // 6 % 6
        where[i, top : top + 3, left : left + 3] = True
    found = maps(torch.where(where[:, None], other, x))
    assert roc_auc_score(where.flatten(), found.flatten()) > 0.75
    # No place stands out where nothing was spoiled, however much it varies.
    plain = maps(x)
    assert roc_auc_score(where.flatten(), plain.flatten()) == pytest.approx(0.5, abs=0.05)
    assert plain.mean(0).abs().max() < 0.5


def test_one_normal_image_in_twenty_exceeds_the_limit(smooth_images, maps):
    _, draw = smooth_images
    beyond = maps(draw(1000, 3)).flatten(1).amax(1) > maps.limit
    assert float(beyond.double().mean()) == pytest.approx(0.05, abs=0.03)


def test_a_map_depends_on_its_image_alone(smooth_images, maps, monkeypatch):
    x = smooth_images[1](30, 4)
    torch.testing.assert_close(maps(x)[7:9], maps(x[7:9]), rtol=1e-9, atol=1e-9)
    whole = maps(x)
    monkeypatch.setattr("torchcdm.apps.anomaly.maps.AT_ONCE", 8)
    torch.testing.assert_close(maps(x), whole, rtol=1e-9, atol=1e-9)


def test_the_spoiled_column_of_a_row_comes_first():
    correlated = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 4.0]]).double()
    model, draw = gaussian((3,), correlated)
    maps, x = AnomalyMap(model).fit(draw(500, 0)), draw(60, 1)
    for column in range(3):
        spoiled = x.clone()
        spoiled[:, column] += 6 * correlated[column, column].sqrt()
        assert float((maps(spoiled).argmax(1) == column).double().mean()) > 0.8
    named = top_columns(torch.tensor([[0.5, 7.25, 3.0], [9.0, 1.0, 2.0]]), ["rate", "dose", "age"], 2)
    assert named == ["dose 7.2, age 3.0", "rate 9.0, age 2.0"]
    assert top_columns(torch.tensor([[1.0]])) == ["c0 1.0"]


def test_numbers_that_overflow_are_the_largest(smooth_images, maps):
    x = smooth_images[1](2, 5)
    x[0, 0, 2, 2] = 1e200
    found = maps(x)
    assert found.isfinite().all() and found[0, 2, 2] > 1e30
    torch.testing.assert_close(found[1:], maps(x[1:]))


def test_pictures_show_the_image_and_its_map(tmp_path):
    transform = DataTransform.images((1, 2, 2), dequantize=False)
    x = torch.tensor([[[[0.0, 255.0], [100.0, 100.0]]]])
    maps = torch.tensor([[[0.0, 0.4], [1.0, 9.0]]]).double()
    picture = overlay(maps, x, 1.0, transform)[0]
    assert picture[:, 0].T.tolist() == [[0, 0, 0], [255, 255, 255]]
    assert picture[:, 1].T.tolist() == [[178, 50, 50], [240, 10, 10]]
    (path,) = save_maps(maps, x, 1.0, tmp_path, transform)
    assert path.name == "000000.png" and Image.open(path).size == (2 * 64 + 2, 64)


def test_mistakes_are_named(smooth_images, maps):
    for ratios in ((), (-1.0,)):
        with pytest.raises(UserError, match="give noise-to-signal ratios, above 0"):
            AnomalyMap(maps.model, ratios)
    model, draw = smooth_images
    with pytest.raises(UserError, match="the reference holds 1 samples"):
        AnomalyMap(model).fit(draw(1, 0))
    with pytest.raises(UserError, match="the map is not fitted"):
        AnomalyMap(model)(draw(1, 0))
    with pytest.raises(UserError, match=r"inputs have shape \(1, 4, 4\)"):
        maps(normal(3, 1, 4, 4))
