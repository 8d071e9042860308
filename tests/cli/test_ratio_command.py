"""``cdm ratio``: what it writes agrees with the Python call, and its mistakes are one line."""

import csv
import json

import numpy as np
import pytest

from torchcdm import DensityRatio
from torchcdm.cli import main

FAST = ("--device", "cpu", "--quiet", "--steps", "5")


def write_table(path, x, header="height,mass"):
    np.savetxt(path, x, delimiter=",", header=header, comments="")
    return path


@pytest.fixture
def files(tmp_path):
    draw = np.random.RandomState(0)
    numerator = write_table(tmp_path / "new.csv", draw.normal([1, 0], 1, (150, 2)))
    denominator = write_table(tmp_path / "old.csv", draw.normal([0, 0], 1, (200, 2)))
    # The columns in another order, and a row that is like neither.
    query = write_table(tmp_path / "query.csv", [[0, 3], [0, -3], [90, 90]], "mass,height")
    return numerator, denominator, query


def run(capsys, *words):
    capsys.readouterr()
    assert main(["ratio", *FAST, *map(str, words)]) == 0
    return capsys.readouterr().out


def refuse(capsys, *words):
    capsys.readouterr()
    assert main(["ratio", *FAST, *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("cdm: "), error
    return error


def test_the_table_and_the_numbers_are_those_of_the_python_call(capsys, tmp_path, files):
    numerator, denominator, query = files
    written = ("--csv", tmp_path / "w.csv", "--json", tmp_path / "w.json", "--save", tmp_path / "ratio")
    out = run(capsys, *files, *written, "--clip", "0.9")
    ratio = DensityRatio(0, device="cpu", steps=5).fit(str(numerator), str(denominator))
    truth = ratio.scores(str(query))

    rows = list(csv.DictReader((tmp_path / "w.csv").open()))
    assert [row["input"] for row in rows] == ["line 2", "line 3", "line 4"]
    np.testing.assert_allclose([float(row["log_ratio"]) for row in rows], truth.log_ratio, rtol=1e-4)
    weights = ratio.importance_weights(str(query), clip=0.9)
    np.testing.assert_allclose([float(row["weight"]) for row in rows], weights, rtol=1e-4)
    assert [row["outside"] for row in rows] == ["0", "0", "1"]
    # The new rows are taller, so a tall row speaks for the numerator.
    assert float(rows[0]["log_ratio"]) > 1 > -1 > float(rows[1]["log_ratio"])

    numbers = json.loads((tmp_path / "w.json").read_text())
    assert numbers["counts"] == {"numerator": 150, "denominator": 200} and numbers["blend"] == ratio.blend
    assert numbers["query"]["count"] == 3 and numbers["query"]["outside"] == 1
    assert numbers["query"]["effective_sample_size"] == pytest.approx(ratio.effective_sample_size(weights), rel=1e-4)
    assert numbers["query"]["log_ratio"]["max"] == pytest.approx(truth.log_ratio.max(), rel=1e-4)
    assert numbers["held_out"]["log_loss"] == pytest.approx(ratio.held_out.log_loss, rel=1e-4)
    assert "150 rows over 200 rows." in out and "2 columns: height, mass." in out and "log loss of the sources" in out
    assert "1 samples lie outside both data sets" in out

    again = DensityRatio.load(tmp_path / "ratio", device="cpu")
    np.testing.assert_allclose(again.log_ratio(str(query)), truth.log_ratio, rtol=1e-6)


def test_arrays(capsys, tmp_path, files):
    draw = np.random.RandomState(0)
    for name, mean in (("a.npy", 2.0), ("b.npy", 0.0)):
        np.save(tmp_path / name, draw.normal(mean, 1, (60, 3)))
    a, b = tmp_path / "a.npy", tmp_path / "b.npy"
    numbers = json.loads(run(capsys, a, b, a, "--json", "-"))
    assert numbers["query"]["log_ratio"]["median"] > 2


def test_mistakes_are_told_before_the_training(capsys, monkeypatch, tmp_path, files):
    monkeypatch.setattr(DensityRatio, "_learn", lambda *_: pytest.fail("trained"))
    numerator, denominator, query = files
    other = write_table(tmp_path / "other.csv", np.random.RandomState(0).normal(size=(50, 2)), "height,age")
    assert "new.csv: no column 'age', which " in refuse(capsys, numerator, other, query)
    assert "no column 'mass'" in refuse(capsys, numerator, denominator, other)
    few = write_table(tmp_path / "few.csv", np.random.RandomState(0).normal(size=(12, 2)))
    assert "few.csv: too few samples, 12; at least 20" in refuse(capsys, few, denominator, query)
    holes = tmp_path / "holes.csv"
    holes.write_text(numerator.read_text() + "1.0,x\n")
    for sides in ((holes, denominator), (denominator, holes)):
        assert "holes.csv: column 'mass', line 152 holds 'x'" in refuse(capsys, *sides, query), "not of both tables"
    assert "line 152 holds 'x'" in refuse(capsys, numerator, denominator, holes)
    assert "missing.csv" in refuse(capsys, tmp_path / "missing.csv", denominator, query)
    assert "missing.csv" in refuse(capsys, numerator, denominator, tmp_path / "missing.csv")
    assert "discrete is 'drop'" in refuse(capsys, *files, "--discrete", "drop")
    assert "--clip is 2.0; it must be at most 1" in refuse(capsys, *files, "--clip", "2")
    assert "steps is 0" in refuse(capsys, *files, "--steps", "0")


def test_rows_that_cannot_be_read_are_left_out_of_both_sides(capsys, tmp_path, files):
    numerator, denominator, query = files
    holes, gaps = tmp_path / "holes.csv", tmp_path / "gaps.csv"
    holes.write_text("height,mass\n1.0,x\n9.0,0.0\n" + numerator.read_text().partition("\n")[2])
    gaps.write_text(denominator.read_text() + "inf,1.0\nx,?\n")
    out = run(capsys, holes, gaps, query, "--skip-bad", "--test", "--json", tmp_path / "w.json")
    assert "151 rows over 200 rows." in out and "test on 151 and 200 samples" in out
    assert "holes.csv: 1 row(s) with cells that cannot be read" in out and "gaps.csv: 2 row(s)" in out
    found = json.loads((tmp_path / "w.json").read_text())
    assert found["counts"] == {"numerator": 151, "denominator": 200}
    new = np.loadtxt(numerator, delimiter=",", skiprows=1)
    tall = [new[int(row) - 2, 0] > 1 for row, _ in found["test"]["numerator_rows"] if int(row) > 1]
    assert len(tall) > 5 and all(tall), "places in the table, those left out among them"
    holes.write_text("height,mass\n" + "1.0,x\n2.0,y\n" * 2 + "\n".join(numerator.read_text().split("\n")[1:20]))
    assert "holes.csv: too few samples, 19; at least 20" in refuse(capsys, holes, gaps, query, "--skip-bad")


def test_the_test_of_two_samples_names_the_column(capsys, tmp_path, files):
    out = run(capsys, *files, "--test", "--json", tmp_path / "w.json")
    assert "two-sample test on 150 and 200 samples" in out and "columns that differ most: height" in out
    found = json.loads((tmp_path / "w.json").read_text())["test"]
    assert found["p_value"] < 0.01 and found["columns"][0][0] == "height"


def test_balanced_weights_give_the_query_the_means_of_the_numerator(capsys, tmp_path, files):
    numerator, denominator, _ = files
    run(capsys, numerator, denominator, denominator, "--balance", "--csv", tmp_path / "w.csv")
    weights = [float(row["weight"]) for row in csv.DictReader((tmp_path / "w.csv").open())]
    new, old = (np.loadtxt(path, delimiter=",", skiprows=1) for path in (numerator, denominator))
    assert np.abs(np.average(old, axis=0, weights=weights) - new.mean(axis=0)).max() < 0.05


def test_mutual_information_of_two_tables(capsys, tmp_path):
    draw = np.random.RandomState(0)
    x = draw.normal(size=(400, 2))
    write_table(tmp_path / "x.csv", x)
    write_table(tmp_path / "y.csv", x[:, :1] + 0.1 * draw.normal(size=(400, 1)), "length")
    words = [str(tmp_path / "x.csv"), str(tmp_path / "y.csv"), "--steps", "5", "--json", str(tmp_path / "mi.json")]
    assert main(["mi", *words]) == 0
    assert capsys.readouterr().out.startswith("mutual information: ")
    assert json.loads((tmp_path / "mi.json").read_text())["value"] > 1
    write_table(tmp_path / "y.csv", x[:30])
    assert main(["mi", *words]) == 2
    assert "x has 400 rows and y 30" in capsys.readouterr().err
