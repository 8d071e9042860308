"""Batches scored by themselves and by workers on Ray: the numbers of one process, whoever dies meanwhile."""

import csv
import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from torchcdm import load
from torchcdm.apps.anomaly import AnomalyDetector, AnomalyMap, normal_data
from torchcdm.cli import main
from torchcdm.cli.scoring import _written
from torchcdm.data import load_data, save_images
from torchcdm.data.inputs import parts_of
from torchcdm.errors import UserError
from torchcdm.scale import Scorer, score_on_ray


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


@pytest.fixture(scope="module")
def scorer():
    return Scorer("zoo:digits", device="cpu", fpr=0.1)


@pytest.fixture(scope="module")
def wines():
    """Wines, the table that the model was trained on, and a scorer that explains."""
    model = load("zoo:table-example")
    source = model.info.read_source(model)
    x = torch.cat([source.split(part).tensors()[0].float() for part in ("train", "validation", "test")])
    detector = AnomalyDetector("levels", model).fit(x)
    frame = model.transform.table.decode(x)
    return frame, Scorer(model, detector, AnomalyMap(model).fit(x), fpr=0.1, device="cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("pictures")
    save_images(digits.test.tensors(200)[0].float(), folder, digits.transform)
    return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory, wines):
    """Two files of several row groups, one row of which is odd."""
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("parquet")
    frame = pd.concat([wines[0]] * 3, ignore_index=True)
    frame.loc[250, "ash"] = 9.0
    frame[:300].to_parquet(folder / "a.parquet", row_group_size=100)
    frame[300:].to_parquet(folder / "b.parquet", row_group_size=100)
    return folder


def joined(batches):
    batches = list(batches)
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def test_a_batch_has_the_scores_of_the_detector(digits, scorer):
    x = digits.test.tensors(30)[0].float()
    x[7] = 16 - x[7]
    found = scorer({"x": x.numpy(), "id": np.arange(30)})
    truth = scorer.detector.score(x)
    assert np.array_equal(found["score"], truth) and np.array_equal(found["id"], np.arange(30))
    assert np.array_equal(found["flag"], scorer.detector.flags(truth, 0.1)) and found["flag"][7]
    np.testing.assert_array_equal(found["percentile"], scorer.detector.percentile(truth))
    # Pixels as image files have them: the whole range is that of the model's grey levels.
    levels = (x * 255 / 16).round().byte()
    np.testing.assert_array_equal(scorer({"image": levels.squeeze(1).numpy()})["score"], truth)
    parts = [scorer({"x": x[rows].numpy()})["score"] for rows in (slice(0, 7), slice(7, 30))]
    np.testing.assert_allclose(np.concatenate(parts), truth, rtol=1e-4, atol=2e-4)


def test_columns_in_any_order_and_the_ones_that_are_odd(wines):
    frame, scorer = wines
    batch = {name: frame[name].to_numpy().copy() for name in reversed(frame.columns)}
    batch["ash"][3] = 9.0
    found = scorer(batch | {"bottle": np.arange(len(frame))})
    assert found["flag"][3] and found["where"][3].startswith("ash ") and np.array_equal(found["bottle"], range(178))
    batch["ash"] = batch["ash"].astype(object)
    batch["ash"][5] = "much"
    with pytest.raises(UserError, match="column 'ash', row 5 holds 'much'"):
        scorer(batch)
    scorer.skip_bad = True
    try:
        left = scorer(batch | {"bottle": np.arange(len(frame))})
    finally:
        scorer.skip_bad = False
    assert left["bottle"].tolist() == [k for k in range(178) if k != 5]
    np.testing.assert_allclose(left["score"], np.delete(found["score"], 5), rtol=1e-4)


def test_names_of_the_users_own_columns_mean_nothing(wines):
    frame, scorer = wines
    batch = {name: frame[name].to_numpy()[:20] for name in frame.columns}
    others = {name: np.arange(20) for name in ("x", "image", "path")}
    assert np.array_equal(scorer(batch | others)["score"], scorer(batch)["score"])
    with pytest.raises(UserError, match="the batch has a column 'flag', which the result would replace"):
        scorer(batch | {"flag": np.arange(20)})


def test_rows_that_deviate_are_no_reference(tmp_path, wines):
    frame = wines[0].astype(object)
    frame.loc[:35, "ash"] = None
    frame.to_csv(tmp_path / "reference.csv", index=False)
    with pytest.warns(UserWarning, match="36 of 178 rows of the reference hold what training never had"):
        normal = normal_data(wines[1].model, [tmp_path / "reference.csv"]).x
    assert len(normal) == 178 - 36


def test_files_are_read_as_by_the_command(pictures, parquet, scorer, wines):
    for folder, one in ((pictures, scorer), (parquet, wines[1])):
        parts, _ = parts_of([folder], one.info.transform, one.info.data)
        found = joined(one({"path": np.array([path]), "part": np.array([part])}) for path, part in parts)
        whole = one.judge(one.info.read_inputs(folder))
        assert found["input"].tolist() == whole["input"].tolist()
        np.testing.assert_allclose(found["score"], whole["score"], rtol=1e-4, atol=2e-4)
    assert len(parts) == 6 and found["input"][250].endswith("a.parquet: row 250") and found["where"][250][:4] == "ash "


def test_what_cannot_be_read_is_left_out_when_asked(tmp_path, digits, scorer):
    save_images(digits.test.tensors(2)[0].float(), tmp_path, digits.transform)
    (tmp_path / "000001.png").write_bytes(b"no picture")
    batch = {"path": np.array([str(tmp_path / "000001.png")]), "part": np.array([0])}
    with pytest.raises(UserError, match="000001.png: cannot be read as an image"):
        scorer(batch)
    scorer.skip_bad = True
    try:
        found = scorer(batch)
    finally:
        scorer.skip_bad = False
    assert found["input"].tolist() == [""] and "1 file(s) that cannot be used are left out" in found["note"][0]


def test_a_copy_scores_alike(digits, scorer):
    x = digits.test.tensors(5)[0].numpy()
    copy = pickle.loads(pickle.dumps(scorer))
    assert np.array_equal(copy({"x": x})["score"], scorer({"x": x})["score"])


def test_normal_data_are_named(digits):
    x, name, changed = normal_data(load("zoo:digits"), limit=50)
    assert x.shape == (50, 1, 8, 8) and name == "validation split of digits" and not changed


def test_mistakes_are_named(digits, scorer, wines):
    with pytest.raises(UserError, match="fpr is 2"):
        Scorer("zoo:digits", fpr=2)
    with pytest.raises(UserError, match="which ndarray does not have: give a cdm as the model"):
        Scorer(np.zeros((20, 1, 8, 8)))
    with pytest.raises(UserError, match="the batch has the columns pixels; the model takes image, data, x or path"):
        scorer({"pixels": np.zeros(3)})
    with pytest.raises(UserError, match="no column 'ash'"):
        wines[1]({name: wines[0][name].to_numpy() for name in wines[0].columns if name != "ash"})
    with pytest.raises(UserError, match="9 x 9 pixels"):
        scorer({"x": np.zeros((2, 9, 9))})
    with pytest.raises(UserError, match="values from 0 to 99; the model's grey levels are 0 ... 16"):
        scorer({"x": 99 * digits.test.tensors(1)[0].gt(0).numpy()})


def test_mistakes_of_the_command(capsys, tmp_path, pictures):
    def refuse(*words):
        assert main(["score", "zoo:digits", *map(str, words), "--device", "cpu"]) == 2
        return capsys.readouterr().err

    assert "--workers are those of --engine ray" in refuse(pictures, "--workers", "2")
    assert "--maps: the local engine draws them" in refuse(pictures, "--engine", "ray", "--maps", tmp_path / "m")


class Dying(Scorer):
    """Kills its process in the middle of its second batch, once."""

    def __call__(self, batch):
        marker = Path(os.environ["DYING"])
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 2 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    """Ray on this machine, once for all tests."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    marker = tmp_path_factory.mktemp("dying") / "killed"
    os.environ["DYING"] = str(marker)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    before, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), os.pathsep.join(paths)
    ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield marker
    ray.shutdown()
    del os.environ["DYING"]
    os.environ["PYTHONPATH"] = before or ""


def test_a_killed_worker_loses_nothing(two_workers, pictures, scorer):
    """Images by two workers, one of which dies."""
    dying = Dying(scorer.model, scorer.detector, fpr=scorer.fpr, device="cpu")
    found = joined(score_on_ray(dying, [str(pictures)], 2))
    assert two_workers.exists()
    whole = scorer.judge(scorer.info.read_inputs(pictures))
    assert found["input"].tolist() == whole["input"].tolist()
    np.testing.assert_allclose(found["score"], whole["score"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["percentile"], whole["percentile"], atol=1.5)


def test_the_command_on_ray_writes_what_it_writes_alone(two_workers, capsys, tmp_path, parquet, wines):
    """Rows of Parquet files by two workers."""
    wines[0].to_csv(tmp_path / "good.csv", index=False)
    tables = []
    for engine in ("local", "ray"):
        words = ["score", "zoo:table-example", str(parquet), "--reference", str(tmp_path / "good.csv"), "--fpr", "0.1"]
        words += ["--engine", engine, "--csv", str(tmp_path / f"{engine}.csv"), "--device", "cpu"]
        assert main(words + ["--workers", "2"] * (engine == "ray")) == 0
        tables.append(list(csv.DictReader((tmp_path / f"{engine}.csv").open())))
    assert "2 workers: 100%" in capsys.readouterr().err
    for one, other in zip(*tables, strict=True):
        assert (one["row"], one["input"], one["flag"], one["where"]) == tuple(
            other[key] for key in ("row", "input", "flag", "where")
        )
        assert float(one["score"]) == pytest.approx(float(other["score"]), rel=1e-4, abs=1e-4)
    assert tables[1][250]["where"].startswith("ash ")


def test_what_a_worker_refuses_is_one_line(two_workers, tmp_path, scorer):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="a.png: cannot be read as an image") as found:
        list(score_on_ray(scorer, [str(tmp_path)], 1))
    assert "Traceback" not in str(found.value)


def test_a_batch_of_which_all_was_left_out_is_no_row_of_the_file(tmp_path):
    numbers = {"score": [1.0, np.nan], "percentile": [50.0, np.nan], "flag": [True, False], "deviating": [False] * 2}
    for order in ([0, 1], [1, 0]):
        batch = {name: np.array(values)[order] for name, values in numbers.items()}
        batch |= {name: np.array(values, object)[order]
                  for name, values in (("input", ["a", ""]), ("where", ["x", ""]), ("note", ["", ""]))}  # fmt: skip
        found, names = _written([batch], tmp_path / "scores.csv")
        assert found["score"].tolist() == [1.0] and names == {0: "a"}
        assert (tmp_path / "scores.csv").read_text().splitlines()[1:] == ["0,a,1,50.000,1,x"]
