"""``cdm score`` on small runs: what it writes, what it is calibrated on, and its mistakes."""

import csv
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from damage import resealed
from PIL import Image
from small_runs import small_flags

import torchcdm
from torchcdm import load
from torchcdm.apps.anomaly import SCORES, AnomalyDetector
from torchcdm.apps.anomaly.detector import trained_on
from torchcdm.cli import main
from torchcdm.data import DataOptions, load_data, save_images
from torchcdm.estimators import CDMOutlierDetector


def train(folder, preset, *words):
    flags = small_flags(report__methods="[]")
    if preset == "table":
        flags = ["--train.steps", "40", "--train.batch_size", "64", "--no-report", "--sampling.n", "0",
                 "--model.backbone.width", "32", "--model.schedule.T", "20"]  # fmt: skip
    assert main(["train", preset, "--out", str(folder), "--device", "cpu", "--quiet", *words, *flags]) == 0
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("score") / "run", "digits")


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


@pytest.fixture
def queries(tmp_path, digits):
    """Five test digits as they are, then two with black for white."""
    x = digits.test.tensors(7)[0].clone()
    x[5:] = 16 - x[5:]
    path = tmp_path / "queries.npy"
    np.save(path, x[:, 0].numpy())
    return path


def score(capsys, *words):
    capsys.readouterr()
    assert main(["score", "--device", "cpu", *map(str, words)]) == 0
    return capsys.readouterr().out


def refuse(capsys, *words):
    capsys.readouterr()
    assert main(["score", "--device", "cpu", *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("cdm: "), error
    return error


def test_a_small_reference_raises_the_rate_that_nobody_gave(capsys, run, queries):
    numbers = json.loads(score(capsys, run, queries, "--limit", "34", "--json", "-"))
    assert numbers["fpr"] == pytest.approx(1 / 18)
    assert "17 held-out normal samples cannot calibrate" in refuse(
        capsys, run, queries, "--limit", "34", "--fpr", "0.05"
    )


def test_rows_percentiles_and_flags_are_those_of_the_detector(capsys, tmp_path, monkeypatch, run, digits, queries):
    """Calibrated on the validation split of the run's own data where nothing else is given."""
    words = (run, queries, "--csv", tmp_path / "s.csv", "--json", tmp_path / "s.json", "--plot", tmp_path / "s.png")
    monkeypatch.setattr("torchcdm.cli.scoring.AT_ONCE", 3)
    capsys.readouterr()
    assert main(["score", "--device", "cpu", *map(str, words)]) == 0
    out, err = capsys.readouterr()
    assert "scoring: " in err and "/3 [" in err
    detector = AnomalyDetector("levels", load(run)).fit(digits.validation.tensors()[0].float())
    # In batches as the command's: float32 rounds others differently.
    truth = torch.cat([detector.score(x[:, None].float()) for x in torch.from_numpy(np.load(queries)).split(3)])

    rows = list(csv.DictReader((tmp_path / "s.csv").open()))
    assert [row["input"] for row in rows] == [f"{queries}[{i}]" for i in range(7)]
    np.testing.assert_allclose([float(row["score"]) for row in rows], truth, rtol=1e-5)
    np.testing.assert_allclose([float(row["percentile"]) for row in rows], detector.percentile(truth), atol=1e-3)
    flags = [bool(int(row["flag"])) for row in rows]
    assert flags == detector.flags(truth, 0.05).tolist()
    assert flags[5:] == [True, True]

    numbers = json.loads((tmp_path / "s.json").read_text())
    assert numbers["reference"] == {"name": "validation split of digits", "fitted": 100, "calibration": 100}
    assert numbers["threshold"] == pytest.approx(detector.threshold(0.05), rel=1e-4)
    assert (numbers["count"], numbers["flagged"]) == (7, sum(flags))
    assert f"flagged {sum(flags)} of 7" in out and "calibrated on 100 held-out samples" in out
    # The most anomalous input stands first.
    assert f"{queries}[{int(truth.argmax())}]" in out.splitlines()[1]
    assert Image.open(tmp_path / "s.png").size[0] > 100


def test_images_against_a_reference_in_files(capsys, tmp_path, run, digits):
    x = digits.test.tensors()[0]
    save_images(x[:60].float(), tmp_path / "good", digits.transform)
    save_images(16 - x[60:64].float(), tmp_path / "new", digits.transform)
    np.save(tmp_path / "more.npy", x[100:160, 0].numpy())
    reference = ("--reference", tmp_path / "good", tmp_path / "more.npy")
    out = score(capsys, run, tmp_path / "new", *reference, "--fpr", "0.1", "--json", "-")
    numbers = json.loads(out)
    assert numbers["reference"]["fitted"] + numbers["reference"]["calibration"] == 120
    assert numbers["flagged"] == 4
    out = score(capsys, run, tmp_path / "new", *reference, "--limit", "50", "--fpr", "0.1", "--json", "-")
    assert json.loads(out)["reference"]["calibration"] == 25


def test_rows_of_a_table_are_named_by_their_lines(capsys, tmp_path):
    draw = np.random.RandomState(0)
    good = draw.normal(size=(300, 2)) @ [[1.0, 2.0], [0.0, 0.5]]
    bad = np.array([[0.0, 0.0], [1.0, -2.0]])  # against the correlation
    header = dict(delimiter=",", header="volt,ampere", comments="")
    np.savetxt(tmp_path / "good.csv", good, **header)
    np.savetxt(tmp_path / "new.csv", bad[:, ::-1], delimiter=",", header="ampere,volt", comments="")
    run = train(tmp_path / "run", "table", "--data", f"table:{tmp_path / 'good.csv'}")
    fresh = draw.normal(size=(200, 2)) @ [[1.0, 2.0], [0.0, 0.5]]
    np.savetxt(tmp_path / "fresh.csv", fresh, **header)
    score(capsys, run, tmp_path / "new.csv", "--reference", tmp_path / "fresh.csv", "--csv", tmp_path / "s.csv")
    rows = list(csv.DictReader((tmp_path / "s.csv").open()))
    assert [row["input"].rpartition(": ")[2] for row in rows] == ["line 2", "line 3"]
    assert [row["flag"] for row in rows] == ["0", "1"]
    told = score(capsys, run, tmp_path / "new.csv", "--reference", tmp_path / "fresh.csv")
    assert "calibrated on 100 held-out samples" in told and "warning" not in told
    told = score(capsys, run, tmp_path / "new.csv", "--reference", tmp_path / "good.csv")
    assert "calibrated on 150 samples" in told and "warning: the model was trained on this reference" in told
    shutil.copy(tmp_path / "good.csv", tmp_path / "copy.csv")
    told = score(capsys, run, tmp_path / "new.csv", "--reference", tmp_path / "copy.csv")
    assert "warning: the model was trained on this reference" in told
    told = score(capsys, run, tmp_path / "new.csv")
    assert "calibrated on 15 held-out samples" in told and "warning" not in told
    with (tmp_path / "good.csv").open("a") as file:
        file.write("0.5,1.25\n" * 20)  # another split: what is held out now was trained on
    with pytest.warns(UserWarning, match="not the data of the training any more"):
        told = score(capsys, run, tmp_path / "new.csv")
    assert "calibrated on 16 samples" in told and "or may have been" in told


def test_splits_in_folders_of_their_own_are_held_out(tmp_path):
    photos, digits = (
        SimpleNamespace(info=SimpleNamespace(data=DataOptions(spec), is_training_data=lambda *_: False))
        for spec in (f"folder:{tmp_path}/photos", "digits")
    )
    for path in ("photos", "photos/train", "photos/a.png", "."):
        assert trained_on(photos, ["new", tmp_path / path]), path
    for path in ("photos/test/0.png", "photos/val", "else"):
        assert not trained_on(photos, ["new", tmp_path / path]), path
    assert not trained_on(digits, ["digits", "."])


def test_a_row_that_differs_in_a_constant_column_is_flagged(capsys, tmp_path):
    """A stuck sensor is no part of the model; one that moves is an anomaly all the same."""
    draw = np.random.RandomState(0)
    good = np.column_stack([draw.normal(size=(300, 2)), np.full(300, 0.1)])
    new = np.column_stack([0.1 * draw.normal(size=(4, 2)), [0.1, 0.2, 0.1, -7.0]])
    for name, rows in {"good": good, "fresh": good[:200], "new": new}.items():
        np.savetxt(tmp_path / f"{name}.csv", rows, delimiter=",", header="volt,ampere,state", comments="")
    np.savetxt(tmp_path / "without.csv", new[:, :2], delimiter=",", header="volt,ampere", comments="")
    run = train(tmp_path / "run", "table", "--data", f"table:{tmp_path / 'good.csv'}")
    assert load_data(f"table:{tmp_path / 'good.csv'}").transform.table.constants == {"state": 0.1}
    words = (run, tmp_path / "new.csv", "--reference", tmp_path / "fresh.csv", "--json", tmp_path / "s.json")
    out = score(capsys, *words)
    numbers = json.loads((tmp_path / "s.json").read_text())
    assert numbers["flags"] == [False, True, False, True] and numbers["flagged"] == numbers["deviating"] == 2
    assert None not in numbers["scores"], "the model does not see the column, so that the rest has its score"
    assert "2 of them whatever their score: they hold what training never had" in out
    out = score(capsys, run, tmp_path / "without.csv", *words[2:])
    assert json.loads((tmp_path / "s.json").read_text())["flagged"] == 0 and "whatever" not in out


def test_a_text_that_training_never_had_has_no_score_of_another_one(capsys, tmp_path):
    draw = np.random.RandomState(0)
    good = pd.DataFrame({"at, in": draw.choice(["east", "west"], 300, p=[0.9, 0.1]), "volt": draw.normal(size=300)})
    good.to_csv(tmp_path / "good.csv", index=False)
    pd.DataFrame({"at, in": ["east", "north", "east"], "volt": [0, 0, ""]}).to_csv(tmp_path / "new.csv", index=False)
    run = train(tmp_path / "run", "table", "--data", f"table:{tmp_path / 'good.csv'}")
    paths = (tmp_path / "good.csv", "--csv", tmp_path / "s.csv", "--plot", tmp_path / "s.png", "--json", "-")
    told = json.loads(score(capsys, run, tmp_path / "new.csv", "--reference", *paths))
    assert told["scores"][0] is not None and told["scores"][1:] == [None, None] and told["deviating"] == 2
    assert told["percentiles"][1:] == pytest.approx([100 * 150 / 151] * 2, rel=1e-6)
    assert told["flags"] == [False, True, True]
    rows = list(csv.DictReader((tmp_path / "s.csv").open()))
    assert [row["score"] for row in rows[1:]] == ["inf", "inf"]
    assert rows[1]["where"] == "at, in (unlike any in training)" and (tmp_path / "s.png").exists()


def test_the_ratio_needs_and_takes_a_background(capsys, tmp_path, run, queries):
    out = score(capsys, run, queries, "--score", "ratio", "--background", run, "--json", "-")
    assert np.abs(json.loads(out)["scores"]).max() == 0
    assert "the score 'ratio' needs a background model" in refuse(capsys, run, queries, "--score", "ratio")
    assert "takes no background model" in refuse(capsys, run, queries, "--background", run)


def test_raw_log_p_comes_with_a_warning(capsys, run, queries):
    assert "raw log p misses inputs that are simpler" in score(capsys, run, queries, "--score", "log_prob")
    assert "raw log p" not in score(capsys, run, queries)


def test_files_go_by_their_paths_or_by_specs(capsys, monkeypatch, tmp_path, run, digits, queries):
    np.save(tmp_path / "good.npy", digits.validation.tensors()[0].numpy())
    words = ["--reference", tmp_path / "good.npy", "--json", "-"]
    truth = json.loads(score(capsys, run, queries, *words))
    words[1] = f"array:{words[1]}"
    assert json.loads(score(capsys, run, f"array:{queries}", *words)) == truth
    assert "is one of the inputs" in refuse(capsys, run, f"array:{queries}", "--csv", queries)
    assert f"cdm: {tmp_path}/none: no such file" in refuse(capsys, run, f"folder:{tmp_path}/none")
    monkeypatch.chdir(tmp_path)
    queries.rename("array:queries.npy")  # a file of that very name
    assert json.loads(score(capsys, run, "array:queries.npy", *words)) == truth


def test_the_help_names_every_score(capsys):
    with pytest.raises(SystemExit):
        main(["score", "--help"])
    words = capsys.readouterr().out.split("--score NAME")[-1].split("--background")[0]
    assert [word for word in re.findall(r"\w+", words)[:-1] if word != "or"] == list(SCORES)


def test_mistakes(capsys, tmp_path, run, queries):
    assert "unknown anomaly score 'level'; did you mean 'levels'" in refuse(capsys, run, queries, "--score", "level")
    assert "fpr is 2.0; it must be less than 1" in refuse(capsys, run, queries, "--fpr", "2")
    assert "fpr is nan; it must be" in refuse(capsys, run, queries, "--fpr", "nan")
    assert "argument --csv: '' is no name of a file" in refuse(capsys, run, queries, "--csv", "")
    assert "is one of the inputs, or among them; choose another file" in refuse(capsys, run, queries, "--csv", queries)
    assert "100 held-out normal samples cannot calibrate" in refuse(capsys, run, queries, "--fpr", "0.001")
    assert "no such file or folder" in refuse(capsys, run, tmp_path / "none.npy")
    assert "no such file or folder" in refuse(capsys, run, queries, "--reference", tmp_path / "none")
    assert "argument --limit: '0' is no" in refuse(capsys, run, queries, "--limit", "0")
    assert "holds no trained model" in refuse(capsys, tmp_path, queries)
    np.save(tmp_path / "wide.npy", np.zeros((3, 9, 9)))
    assert "9 x 9 pixels" in refuse(capsys, run, tmp_path / "wide.npy")
    np.save(tmp_path / "few.npy", np.zeros((12, 8, 8)))
    refused = refuse(capsys, run, queries, "--reference", tmp_path / "few.npy")
    assert "the reference holds 12 samples; 'levels' takes at least 20" in refused


def test_a_run_whose_data_have_no_validation_split_asks_for_a_reference(capsys, tmp_path, run, queries):
    other = shutil.copytree(run, tmp_path / "run")
    resealed(other / "config.json", lambda info: info["data"].update(validation_fraction=0.0))
    assert "validation split is empty" in (error := refuse(capsys, other, queries)) and "--reference PATH" in error


def test_a_model_of_data_that_python_gave_says_so(capsys, tmp_path, queries):
    rows = np.random.RandomState(0).normal(size=(60, 2))
    np.save(tmp_path / "rows.npy", rows)
    torchcdm.fit(rows, out=tmp_path / "run", steps=2, progress=False)
    CDMOutlierDetector(steps=2, random_state=0).fit(rows).save(tmp_path / "kept")
    for name, by in (("run", "Python"), ("kept", r"CDMOutlierDetector (in Python CDMOutlierDetector.load reads it)")):
        error = refuse(capsys, tmp_path / name, tmp_path / "rows.npy")
        assert f"trained by {by}, on data that are not kept" in error and error.endswith("by --reference PATH\n")
        words = ("--reference", tmp_path / "rows.npy", "--json", "-")
        assert len(json.loads(score(capsys, tmp_path / name, tmp_path / "rows.npy", *words))["scores"]) == 60


def test_maps_stand_beside_the_scores(capsys, tmp_path, run, queries):
    words = (run, queries, "--limit", "40", "--fpr", "0.1", "--maps", tmp_path / "maps", "--csv", tmp_path / "s.csv")
    score(capsys, *words)
    rows = list(csv.DictReader((tmp_path / "s.csv").open()))
    assert [(row["row"], row["where"]) for row in rows] == [(str(i), f"{i:06d}.png") for i in range(7)]
    pictures = [np.asarray(Image.open(tmp_path / "maps" / row["where"])) for row in rows]
    side = pictures[0].shape[0]
    red = [float((p[:, side:, 0].astype(int) - p[:, side:, 1]).mean()) for p in pictures]
    assert pictures[0].shape == (side, 2 * side + 2, 3) and min(red[5:]) > max(red[:5])
    assert "holds" in refuse(capsys, run, queries, "--maps", tmp_path)


def test_flagged_rows_name_their_columns(capsys, tmp_path):
    draw = np.random.RandomState(0)
    good = np.column_stack([draw.normal(size=(300, 3)), np.full(300, 5.0)])
    bad = np.array([[0.0, 0.0, 0.0, 5.0], [0.0, 9.0, 0.0, 5.0], [0.0, 0.0, 0.0, 6.0]])
    for name, rows in (("good", good), ("new", bad)):
        np.savetxt(tmp_path / f"{name}.csv", rows, delimiter=",", header="volt,ampere,ohm,fuse", comments="")
    run = train(tmp_path / "run", "table", "--data", f"table:{tmp_path / 'good.csv'}")
    reference = ("--reference", tmp_path / "good.csv")
    score(capsys, run, tmp_path / "new.csv", *reference, "--csv", tmp_path / "s.csv")
    rows = list(csv.DictReader((tmp_path / "s.csv").open()))
    assert [(row["row"], row["flag"]) for row in rows] == [("0", "0"), ("1", "1"), ("2", "1")]
    assert rows[0]["where"] == "" and re.match(r"ampere \d+\.\d, ", rows[1]["where"])
    assert rows[2]["where"] == "fuse (unlike any in training)"
    assert "--csv names the columns" in refuse(capsys, run, tmp_path / "new.csv", "--maps", tmp_path / "maps")
