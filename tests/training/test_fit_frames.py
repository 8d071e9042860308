"""A model of a table takes and gives data frames."""

import numpy as np
import pandas as pd
import pytest
from awkward_tables import awkward

import torchcdm
from torchcdm.cli import main
from torchcdm.data import from_object, load_data
from torchcdm.data.pairs import pair_up
from torchcdm.errors import UserError
from torchcdm.estimators import CDMDensity
from torchcdm.estimators.base import data_frame
from torchcdm.likelihood import report
from torchcdm.models.cdm import ClassificationDiffusion


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frames")
    awkward().to_csv(folder / "t.csv", index=False)
    arguments = ["--drop", "price,clock", "--out", str(folder / "run"), "--steps", "3", "--quiet", "--no-report"]
    assert main(["train", "table", "--data", f"table:{folder / 't.csv'}", "--device", "cpu", *arguments]) == 0
    return folder / "run"


def test_frames_in_and_out(run):
    model, frame = torchcdm.load(run), awkward(60, seed=1)
    assert isinstance(model, ClassificationDiffusion)
    log_p = model.log_prob(frame)
    assert log_p.shape == (60,) and bool(log_p.isfinite().all())
    typed = frame.assign(doors=frame["doors"].astype(int), day=pd.to_datetime(frame["day"]))
    assert bool((model.log_prob(typed[typed.columns[::-1]]) == log_p).all())
    with pytest.raises(UserError, match="no column 'rain', 'power'"):
        model.log_prob(frame.drop(columns=["rain", "power"]))
    drawn = torchcdm.sample(model, 40)
    assert list(drawn.columns) == ["origin", "rain", "power", "day", "open", "doors", "wheels"]
    assert set(drawn["doors"]) <= {2, 3, 5} and (drawn["wheels"] == 4).all() and drawn["open"].dtype == bool
    assert (drawn["rain"] == 0).mean() > 0.1 and np.issubdtype(drawn["day"].dtype, np.datetime64)
    assert drawn["power"].isna().mean() < 0.6 and bool(model.log_prob(drawn).isfinite().all())
    assert "one-pass" in str(report(model, frame, methods=["single"]))


def test_a_frame_has_the_preset_of_tables_and_an_array_that_of_vectors():
    x, small = np.random.RandomState(0).normal(size=(60, 2)), {"steps": 1, "progress": False, "device": "cpu"}
    assert torchcdm.fit(pd.DataFrame(x, columns=["a", "b"]), **small).info.preset == "table"
    assert torchcdm.fit(x, **small).info.preset == "mlp"


def test_the_row_counter_of_a_file_is_no_column(tmp_path):
    frame = pd.DataFrame(np.random.RandomState(0).normal(size=(40, 2)), columns=["a", "b"]).sample(frac=1)
    frame.to_csv(tmp_path / "idx.csv")
    read = pd.read_csv(tmp_path / "idx.csv")
    note = "the first column has no name and counts the rows: left out."
    sources = [from_object(read), from_object(read, drop=["Unnamed: 0"]), load_data(f"table:{tmp_path / 'idx.csv'}")]
    sources += [pair_up(read, frame).source, from_object(read, columns=["Unnamed: 0", "a"])]
    assert [note in source.notes for source in sources] == [True, False, True, True, False]
    names = [source.transform.table.names for source in sources if source.transform.table is not None]
    assert names == [("a", "b")] * 3 + [("Unnamed: 0", "a")]
    density = CDMDensity()
    density.notes_ = []
    assert density._describe(data_frame(read, "the table"), "the table").names == ("a", "b")
    assert density.notes_ == [f"the table: {note}"]
    density = CDMDensity(steps=1, device="cpu", random_state=0).fit(read)
    assert density.n_features_in_ == 2 and list(density.feature_names_in_) == ["a", "b"]
    np.testing.assert_array_equal(density.score_samples(frame.to_numpy()), density.score_samples(frame))
    # Neither other names nor other numbers are those of a counter.
    for other in (read.rename(columns={"Unnamed: 0": "year"}), read.assign(**{"Unnamed: 0": read["a"]})):
        assert len(from_object(other).transform.table.names) == 3


def test_commands_take_the_same_tables(run, tmp_path, capsys):
    new = awkward(30, seed=2)
    new.loc[4, "origin"] = "Mars"
    new[new.columns[::-1]].to_csv(tmp_path / "new.csv", index=False, sep=";")
    flags = ["--csv", str(tmp_path / "scores.csv"), "--fpr", "0.2"]
    assert main(["score", str(run), str(tmp_path / "new.csv"), *flags]) == 0
    scores = pd.read_csv(tmp_path / "scores.csv")
    assert len(scores) == 30 and scores["flag"][4] == 1 and "origin (unlike any in training)" in scores["where"][4]
    assert main(["sample", str(run), "--n", "6", "--out", str(tmp_path / "drawn"), "--quiet"]) == 0
    drawn = pd.read_csv(tmp_path / "drawn" / "samples.csv")
    assert len(drawn) == 6 and set(drawn["doors"]) <= {2, 3, 5}
    capsys.readouterr()


def test_a_label_needs_a_model_that_takes_classes(run, tmp_path, capsys):
    arguments = ["train", "table", "--data", f"table:{run.parent / 't.csv'}", "--out", str(tmp_path / "x"), "--quiet"]
    assert main([*arguments, "--label", "open"]) == 2
    assert "label 'open' names a column of classes, but this model takes none" in capsys.readouterr().err
    assert main([*arguments, "--label", "opne"]) == 2
    assert "no column 'opne'; did you mean 'open'" in capsys.readouterr().err
    with pytest.raises(UserError, match="names a column of classes"):
        torchcdm.fit(awkward(), "open", progress=False, steps=1)


def test_a_model_that_was_fitted_to_a_table_knows_its_column_of_classes(run):
    settings = {"model": {"labels": "joint", "backbone": {"width": 8}}, "data": {"drop": ["price", "clock"]}}
    model = torchcdm.fit(run.parent / "t.csv", "open", steps=1, progress=False, device="cpu", **settings)
    assert model.info.read_source(model, labelled=True).class_names == model.info.class_names


def same_splits(one, other):
    return all(np.array_equal(one.split(name).tensors()[0], other.split(name).tensors()[0]) for name in one.splits)


def test_what_was_trained_on_is_found_again_with_its_splits(tmp_path):
    path = tmp_path / "t.csv"
    awkward(100).to_csv(path, index=False)
    options = {"seed": 5, "test_fraction": 0.2, "limit": 60, "columns": ("rain", "doors")}
    small = {"model": {"backbone": {"width": 8}}, "steps": 1, "progress": False, "device": "cpu"}
    source = load_data(f"table:{path}", **options)
    for model in (torchcdm.fit(source, **small), torchcdm.fit(path, data=options, **small)):
        assert same_splits(model.info.read_source(model), source)
    assert torchcdm.fit(from_object(awkward(100)), **small).info.data.spec is None
    awkward(101).to_csv(path, index=False)
    with pytest.warns(UserWarning, match="not the data of the training any more"):
        model.info.read_source(model)
