"""The outlier benchmark: what it spoils is spoiled as said, and its measures are the usual ones."""

import json

import pytest
import torch
from sklearn.datasets import load_digits

from studies.benchmarks import outliers
from studies.benchmarks.anomaly_sets import DEVELOPMENT, JUDGED, TABLES
from torchcdm.data import from_object


@pytest.fixture(scope="module")
def images():
    digits = torch.from_numpy(load_digits().images[:40]).float()[:, None]
    return torch.nn.functional.interpolate(digits * 12, size=(28, 28), mode="bilinear").round().to(torch.uint8)


def test_corruptions_are_of_the_strength_that_is_written(images):
    corrupted, x = outliers.corrupted, images.double()
    results = {name: corrupted(images, name) for name in outliers.CORRUPTIONS}
    assert all(y.dtype == torch.uint8 and y.shape == images.shape for y in results.values())
    assert torch.equal(results["inverted"].int(), 255 - images.int())
    spread = (results["contrast"].double().std((1, 2, 3)) / x.std((1, 2, 3))).mean()
    assert spread == pytest.approx(0.5, abs=0.01)
    middle = (x > 80) & (x < 175)  # far from the clipping
    assert (results["noisy"].double() - x)[middle].std() == pytest.approx(20, rel=0.1)
    # A blurred point has the variance of the Gaussian, one squared pixel along each axis.
    point = torch.zeros(1, 1, 28, 28)
    point[0, 0, 14, 14] = 1
    weights, offsets = outliers.blur(point, 1.0)[0, 0], torch.arange(28.0) - 14
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    assert (weights.sum(1) * offsets**2).sum() == pytest.approx(1, abs=0.02)
    directions = [(4, 4), (4, -4), (-4, 4), (-4, -4)]
    for i, (down, right) in enumerate(directions):
        rolled = images[i].roll((down, right), (1, 2))
        rows = slice(4, None) if down > 0 else slice(None, -4)
        columns = slice(4, None) if right > 0 else slice(None, -4)
        assert torch.equal(results["shifted"][i][:, rows, columns], rolled[:, rows, columns])
        assert results["shifted"][i].sum() == rolled[:, rows, columns].sum()


def test_digits_are_resized_to_the_range_of_bytes():
    x = outliers.resized_digits((28, 28))
    assert x.shape == (1797, 1, 28, 28)
    assert x.dtype == torch.uint8 and x.min() == 0 and x.max() == 255


def test_every_turn_of_an_image_is_there_once_with_its_class(images):
    source = from_object(images, validation_fraction=0.25, test_fraction=0.0, seed=0)
    both = outliers.turned(source)
    assert both.classes == 4 and torch.equal(source.validation.tensors()[0], both.validation.tensors()[0][:10])
    for split, turns in ((source.train, both.train), (source.validation, both.validation)):
        x, labels = turns.tensors()
        upright = [torch.rot90(image, -int(turn), (1, 2)) for image, turn in zip(x, labels, strict=True)]
        assert torch.equal(torch.stack(upright), split.tensors()[0].repeat(4, 1, 1, 1))
        assert labels.bincount().tolist() == [len(split)] * 4


def test_measures_by_counting():
    """Four usual and four odd samples, one odd below two usual: 14 of 16 pairs in order, 2 of 4 for all."""
    odd = {"odd": torch.tensor([1.5, 9, 9, 9])}
    setting = outliers.Setting("s", None, None, torch.tensor([0.0, 1, 2, 3]), odd)
    (row,) = outliers.measure(setting, [lambda x: {"raw": x.double().numpy()}])
    assert (row["auroc"], row["fpr95"]) == (14 / 16, 0.5)
    assert (row["normal_count"], row["outlier_count"]) == (4, 4)


def test_rows_of_other_detectors_and_trained_models_are_kept(tmp_path, monkeypatch):
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    source = from_object(x, validation_fraction=0.25, test_fraction=0.0, seed=0)

    def blob(options):
        model = outliers.trained(options, "blob", source, preset="table")
        yield outliers.Setting("blob", source, model, x[:50], {"far": x[:50] + 10})

    monkeypatch.setitem(outliers.GROUPS, "tables", blob)
    file, found = tmp_path / "rows.json", []
    other = {"setting": "blob", "outliers": "far", "score": "PyOD KNN", "auroc": 0.5, "fpr95": 0.5}
    file.write_text(json.dumps({"rows": [other, other | {"score": "levels"}]}))
    words = ["tables", "--own", "--train-steps", "2", "--models", str(tmp_path / "models"), "--json", str(file)]
    for _ in range(2):
        outliers.main(words)
        found.append(json.loads(file.read_text())["rows"])
        monkeypatch.setattr(outliers.torchcdm, "fit", None)
    assert found[0] == found[1] and found[0][0] == other
    assert [row["score"] for row in found[0]] == ["PyOD KNN", *outliers.OWN_SCORES]
    assert found[0][1]["normal_count"] == 50


def test_tables_of_adbench_have_its_rows_and_outliers():
    assert not DEVELOPMENT.keys() & JUDGED.keys()
    shapes = {"wine": (129, 13, 10), "WDBC": (367, 30, 10), "Waveform": (3443, 21, 100), "optdigits": (1669, 64, 50)}
    for name, (rows, columns, few) in shapes.items():
        x, odd = TABLES[name]()
        assert x.shape == (rows, columns) and odd.sum() == few


@pytest.mark.slow
def test_a_group_reports_every_contender(tmp_path):
    pytest.importorskip("pyod")
    pytest.importorskip("zuko")
    words = ["--train-steps", "20", "--splits", "1", "--flow-seconds", "1", "--json", str(tmp_path / "rows.json")]
    outliers.main(["tables", *words])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    names = {*outliers.OWN_SCORES, "PyOD ECOD", "PyOD IForest", "PyOD KNN", "PyOD LOF", "flow log p"}
    assert {row["score"] for row in rows} == names
    assert len(rows) == len(names) * (1 + 3 + 10)
    assert all(0 <= row[value] <= 1 for row in rows for value in ("auroc", "fpr95"))
