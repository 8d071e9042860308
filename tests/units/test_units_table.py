"""Tables as they come: every kind of cell to a code and back, and that what a model says of codes is a density."""

import gzip
import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
from awkward_tables import ROWS, PolarsFrame, awkward
from oracles import MixtureClassifier

from studies.exact import GaussianMixture
from torchcdm.data import DataOptions, from_object, load_data
from torchcdm.data.pairs import read_side
from torchcdm.diffusion.schedules import LogSNRSchedule
from torchcdm.errors import UserError
from torchcdm.estimators.base import data_frame
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.inputs import as_numbers
from torchcdm.runtime.validation import encode, read_as
from torchcdm.units import TableEncoding, transform_from_config

KINDS = {
    "origin": "category", "rain": "number", "power": "number", "day": "date", "open": "boolean", "doors": "number",
    "price": "number", "wheels": "number", "clock": "number",
}  # fmt: skip


def test_every_kind_of_cell_is_read_and_written_back():
    frame = awkward()
    table, notes = TableEncoding.fit(frame)
    assert {column.name: column.kind for column in table.columns} == KINDS
    assert table.constants == {"wheels": 4.0} and "'name' holds 200 texts" in " ".join(notes)
    x, rows, deviating = table.encode(frame)
    assert rows.tolist() == list(range(ROWS)) and not any(deviating)
    back = table.decode(x)
    assert (back["origin"].fillna("") == frame["origin"]).all()
    assert (back["rain"] == frame["rain"].astype(float)).all() and (back["rain"] == 0).mean() > 0.3
    assert np.allclose(back["power"], pd.to_numeric(frame["power"]), equal_nan=True)
    assert (back["day"].dt.strftime("%Y/%m/%d") == frame["day"]).all()
    assert (back["open"] == frame["open"].isin(["True", "yes"])).all() and back["open"].dtype == bool
    assert (back["doors"].astype(str) == frame["doors"]).all() and back["doors"].dtype == np.int64
    german = frame["price"].str.replace(".", "").str.replace(",", ".").astype(float)
    assert np.allclose(back["price"], german) and (back["wheels"] == 4).all()
    assert (back["clock"] == frame["clock"].astype(float)).all() and x[:, -1].abs().max() < 10
    # What was decoded is read as the same table: typed cells count as texts do.
    again = table.encode(back)
    assert torch.equal(again.x, x) and not any(again.deviating)
    assert read_as(TableEncoding, json.loads(json.dumps(encode(table)))) == table


@pytest.mark.parametrize(
    ("values", "noted"),
    [
        (range(7000, 7060), True), (np.random.RandomState(0).permutation(200)[:90], True), (range(0, 600, 5), True),
        (np.random.RandomState(0).choice(100_000, 60, replace=False), False),  # prices in cents
        ([*range(59), 7], False), (np.arange(60) + 0.5, False), (range(12), False),
    ],
)  # fmt: skip
def test_whole_numbers_that_number_the_rows_are_noted(values, noted):
    table, notes = TableEncoding.fit(pd.DataFrame({"serial": values}))
    assert table.names == ("serial",)
    assert ("column 'serial' holds a different whole number in every row: if it is an id, drop it." in notes) == noted


@pytest.mark.parametrize("texts", [False, True])
def test_whole_numbers_that_float64_does_not_tell_apart_are_refused(texts):
    """Identifiers of messages: of a thousand nine were left, as if the data had so few values."""
    large = pd.Series(10**18 + np.arange(200), dtype="int64")
    frame = pd.DataFrame({"id": large.astype(str) if texts else large, "x": np.arange(200.0)})
    with pytest.raises(UserError, match="column 'id' holds larger whole numbers than float64 tells apart"):
        TableEncoding.fit(frame)
    even = frame.assign(id=(10**18 + 1024 * np.arange(200)))
    assert TableEncoding.fit(even)[0].encode(even).x[:, 0].diff().tolist() == [1024] * 199
    TableEncoding.fit(frame.assign(id=["1e20", "1.0e20", "2e20", "2.5e20"] * 50))  # two spellings of a number


@pytest.mark.parametrize(
    ("cells", "back"),
    [
        (["yes", "no"], ["yes", "no"]), (["OFF", None, "on"], ["OFF", None, "on"]), (["n"], ["n"]),
        (["True", "False"], [True, False]), (["yes", "y", "no"], [True, True, False]), ([True, None], [True, None]),
    ],
)  # fmt: skip
def test_booleans_come_back_as_they_were_spelled(cells, back):
    frame = pd.DataFrame({"smoker": cells * 10, "x": np.random.RandomState(0).normal(size=10 * len(cells))})
    table, _ = TableEncoding.fit(frame)
    assert table.columns[0].kind == "boolean"
    found = table.decode(table.encode(frame).x)["smoker"]
    assert found.astype(object).where(found.notna(), None).tolist() == back * 10
    # Other spellings mean the same.
    again = table.encode(frame.assign(smoker=frame["smoker"].replace({"yes": "TRUE", "no": "f", "on": "t"})))
    assert torch.equal(again.x, table.encode(frame).x)
    assert table.columns[0].encode(pd.Series(["maybe"]))[2].all()


def test_a_row_of_a_frame_with_booleans_is_a_row():
    """As a series it holds them as numpy's, among objects."""
    frame = pd.DataFrame({"open": np.arange(40) % 3 == 0, "power": np.arange(40.0)})
    table, _ = TableEncoding.fit(frame)
    row = frame.iloc[3].to_frame().T
    assert isinstance(row["open"].iloc[0], np.bool_) and row["open"].dtype == object
    assert torch.equal(table.encode(row).x, table.encode(frame).x[3:4])


def test_thousands_are_no_decimals():
    frame = pd.DataFrame({"a": [f"{x:,.1f}" for x in np.random.RandomState(0).normal(5000, 900, 60)]})
    found = TableEncoding.fit(frame)[0].encode(frame).x[:, 0]
    assert np.allclose(found, frame["a"].str.replace(",", "").astype(float))


@pytest.mark.parametrize(
    ("texts", "ambiguous", "value"),
    [
        (["950", "1,234", "12,000"], "1,234", 1234), (["1,250.50", "999"], "1,234", 1234),
        (["999.5", "1.234"], "1.234", 1.234), (["1.234", "1.234,5"], "1.234", 1234),
        (["1.234", "12,5"], "1.234", 1234), (["1.234.567", "950"], "1.234", 1234),
        (["0,512", "12,5"], "1,234", 1.234), (["0,512", "12,5"], "1.234", 1.234),
    ],
)  # fmt: skip
def test_a_number_is_read_as_its_column_writes_them_and_not_as_its_neighbours(texts, ambiguous, value):
    frame = pd.DataFrame({"a": texts * 20, "b": np.arange(20 * len(texts))})
    table, notes = TableEncoding.fit(frame)
    assert (f"reads '{ambiguous}' as {value}" in " ".join(notes)) == (ambiguous in texts and ambiguous != str(value))
    table = read_as(TableEncoding, json.loads(json.dumps(encode(table))))
    evident = {"12,5": 12.5, "12.5": 12.5, "1.234,5": 1234.5, "1,234.5": 1234.5, "1,234,567": 1234567}
    for text, number in {ambiguous: value, **evident}.items():
        for neighbours in ([], ["1,250.50", "1.250,50", "7"]):
            codes, bad, _ = table.columns[0].encode(pd.Series([text, *neighbours]))
            assert codes[0] == number and not bad.any()
    assert table.columns[0].encode(pd.Series([1.234], dtype=object))[0] == 1.234, "a number is no text"


@pytest.mark.parametrize(
    ("training", "doubtful", "tells", "kind"),
    [
        (["0.512", "1.250"], "1,234", "0,7", "number"), (["1.234", "12,5"], "1.234", "7.5", "number"),
        (["0,512", "9"], "1.234", "1.234,5", "number"), (["0,512", "1,250"], "1.234", "7.5", ""),
        (["25/04/2024", "5/6/2024"], "5/6/2024", "04/25/2024", "date"),
        (["04/25/2024", "5/6/2024"], "5/6/2024", "25/04/2024", "date"),
        (["2024-04-25", "2024-04-26"], "2024-06-05", "25/04/2024", ""),
    ],
)  # fmt: skip
def test_a_file_that_is_written_otherwise_is_refused_where_it_would_be_misread(training, doubtful, tells, kind):
    """Half of its column would be read as other numbers, without a word: here 1,234 as 1234, beside 0,7 as 0.7."""
    table, _ = TableEncoding.fit(pd.DataFrame({"a": training * 20, "b": np.arange(40)}))
    frame = pd.DataFrame({"a": [doubtful, *[tells] * 4], "b": 1.0})
    assert len(table.encode(frame[:1]).x) == 1 and len(table.encode(frame[1:]).x) == 4, "each alone can be read"
    if kind:
        what = rf"column 'a': '{tells}' \(row 1\) is written .* '{doubtful}' \(row 0\) would be another {kind}; write"
        for skip_bad in (False, True):
            with pytest.raises(UserError, match=what):
                table.encode(frame, skip_bad=skip_bad)
    else:
        assert len(table.encode(frame).x) == 5
    mostly = pd.DataFrame({"a": [doubtful] * 100 + [tells] * 3, "b": 1.0})
    assert len(table.encode(mostly).x) == 103, "slips of the pen are read as well as they can be"


def test_categories_of_numbers_are_the_same_where_pandas_made_them_floats():
    frame = pd.DataFrame({"house": [*"123", "12a"] * 10, "x": np.arange(40) ** 1.5})
    table, _ = TableEncoding.fit(frame)
    read = pd.read_csv(io.StringIO("house,x\n1,0.5\n,0.5\n3,0.5\n"))
    assert read["house"].dtype == float
    assert table.encode(read, deviating=True).deviating == ["", "house", ""]
    assert table.encode(read[::2]).x[:, 0].tolist() == table.encode(frame.iloc[[0, 2]]).x[:, 0].tolist()
    decimal = frame.assign(house=frame["house"].replace({"1": "1.0", "2": "2.0"}))
    codes = TableEncoding.fit(decimal)[0].encode(pd.DataFrame({"house": [1.0, 2.0, 3.0], "x": 0.5})).x[:, 0]
    assert codes.tolist() == TableEncoding.fit(decimal)[0].encode(decimal[:3]).x[:, 0].tolist()


@pytest.mark.parametrize(
    ("texts", "april"),
    [(["25/04/2024", "5/6/2024"], "03/04/2024"), (["04/25/2024", "5/6/2024"], "04/03/2024"), (["25.4.24"], "3.4.24")],
)
def test_a_date_is_read_as_its_column_writes_them(texts, april):
    frame = pd.DataFrame({"day": [*texts, april] * 20, "b": np.arange(20 * len(texts) + 20)})
    table, notes = TableEncoding.fit(frame)
    assert f"reads '{texts[1] if len(texts) > 1 else april}' as 2024-" in notes[0]
    table = read_as(TableEncoding, json.loads(json.dumps(encode(table))))
    for neighbours in ([], ["25/04/2024"], ["04/25/2024"]):
        day, *_ = table.columns[0].encode(pd.Series([april, *neighbours]))[0] + table.columns[0].offset
        assert np.datetime64(int(day), "D") == np.datetime64("2024-04-03")
    iso = table.columns[0].encode(pd.Series(["2024-04-03", "2024/04/03"]))[0] + table.columns[0].offset
    assert iso.tolist() == [day, day], "a year in front leaves no doubt"


def test_numbers_of_any_size_keep_their_decimals():
    draw = np.random.RandomState(0)
    frame = pd.DataFrame({
        "energy": draw.gamma(2, 1e-19, 200), "constant": 1e-19, "money": draw.gamma(2, 900, 200).round(2),
        "large": 1e13 + draw.uniform(0, 100, 200), "clock": 1.7e9 + draw.normal(size=200).round(3),
    })  # fmt: skip
    table, _ = TableEncoding.fit(frame)
    assert [column.decimals for column in table.columns] == [None, None, 2, 3, 3]
    pd.testing.assert_frame_equal(table.decode(table.encode(frame).x), frame, rtol=1e-14, atol=0)


def test_cells_that_training_never_had():
    table, _ = TableEncoding.fit(awkward())
    new = awkward(5, seed=1).assign(origin=["USA", "Mars", "", "Japan", "Venus"], wheels=["4", "4", "3", "4", "4"])
    new.loc[3, "doors"] = ""
    _, rows, deviating = table.encode(new, deviating=True)
    assert deviating == ["", "origin", "wheels", "doors", "origin"] and len(rows) == 5
    message = r"t.csv: column 'origin', row 1 holds 'Mars', none of the 4 levels of training \(2 such cells\); "
    with pytest.raises(UserError, match=message + "column 'doors', row 3 is empty") as caught:
        table.encode(new, "t.csv")
    assert "\n" not in str(caught.value)
    assert table.encode(new, skip_bad=True).rows.tolist() == [0, 2]
    with pytest.raises(UserError, match=r"or leave out their rows or columns \(--skip-bad, --drop where"):
        table.encode(new)
    with pytest.raises(UserError, match="no column 'power', 'day'"):
        table.encode(new.drop(columns=["power", "day"]))


def test_a_column_that_cannot_be_learned_is_not_left_out_without_a_word():
    huge = pd.DataFrame({"a": [1e200, 2e200, 3e200], "b": [1.0, 2.0, 4.0]})
    table, notes = TableEncoding.fit(huge, skip_bad=True)
    assert table.names == ("b",) and any("'a' has values too large" in note and "left out" in note for note in notes)


def test_frames_of_polars_are_read_as_those_of_pandas():
    frame, polars = awkward(), PolarsFrame(awkward())
    source = from_object(polars)
    assert source.transform.table == from_object(frame).transform.table
    found = (as_numbers(some, torch.device("cpu"), source.transform) for some in (polars, frame))
    assert torch.equal(*found)
    pd.testing.assert_frame_equal(read_side(polars, "x", DataOptions())[0], frame)
    pd.testing.assert_frame_equal(data_frame(polars, "x"), frame)


def test_rare_levels_are_one_and_new_ones_belong_to_them():
    levels = ["a"] * 30 + ["b"] * 30 + [f"rare {i}" for i in range(8)]
    table, notes = TableEncoding.fit(pd.DataFrame({"x": levels}))
    assert table.columns[0].levels == ("a", "b", "other") and "8 rare ones as 'other'" in notes[0]
    assert table.encode(pd.DataFrame({"x": ["b", "never seen"]})).x.tolist() == [[1], [2]]


def test_equal_numbers_are_one_value_beside_missing_cells_and_another_one_deviates():
    frame = pd.DataFrame({"a": [0.1, np.nan] * 50, "b": 1_700_000_000, "c": 0.1, "d": np.arange(100)})
    table, notes = TableEncoding.fit(frame)
    assert table.constants.keys() == {"b", "c"} and not any("offset" in note for note in notes)
    pd.testing.assert_frame_equal(table.decode(table.encode(frame).x), frame)
    source = from_object(frame.assign(e=[1.5] * 99 + [2.5]), validation_fraction=0.0, test_fraction=0.1)
    table = source.transform.table
    new = frame.assign(b=[1_700_000_001] * 50 + [1_700_000_000] * 50, e=1.5)
    assert table.encode(new, deviating=True).deviating == ["b"] * 50 + [""] * 50


def test_a_density_of_a_mixed_column_is_one():
    """A standard normal in model units: probabilities of missing cells and of zeros, and a density that integrates."""
    draw = np.random.RandomState(0)
    x = np.where(draw.uniform(size=20_000) < 0.5, draw.gamma(2, 3, 20_000), 0)
    x = np.where(draw.uniform(size=20_000) < 0.2, np.nan, x)
    frame = pd.DataFrame({"x": x, "k": draw.choice(["a", "b"], 20_000)})
    source = from_object(frame, validation_fraction=0.0, test_fraction=0.0)
    normal = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    schedule = LogSNRSchedule(60, 0.01, 50.0)
    model = ClassificationDiffusion(MixtureClassifier(normal, schedule), schedule, source.transform).double()
    grid = np.linspace(-5, 60, 4000)
    rows = pd.DataFrame({"k": "a", "x": [np.nan, 0.0, *grid]})
    density = 2 * model.log_prob(rows).exp()  # 2: the other column's probability is one half
    assert abs(float(density[0]) - 0.2) < 0.01 and abs(float(density[1]) - 0.4) < 0.01
    assert abs(float(density[2:].sum() * (grid[1] - grid[0])) - 0.4) < 0.01
    # Noise stays within the cells of what has a probability, and the inverse finds what was there.
    codes = source.train.tensors()[0][:2000].double()
    noisy = source.transform.add_noise(codes, torch.Generator().manual_seed(0))
    z = source.transform(noisy)
    assert float(z.mean(0).abs().max()) < 0.1 and float((z.std(0) - 1).abs().max()) < 0.1
    table = source.transform.table
    pd.testing.assert_frame_equal(table.decode(source.transform.inverse(z)), table.decode(codes), atol=1e-5)
    copy = transform_from_config(json.loads(json.dumps(source.transform.to_config())))
    assert torch.equal(copy(noisy), z) and copy.table == table


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".tsv"])
def test_files_choose_columns_and_tell_all_problems_at_once(tmp_path, suffix):
    path, frame = tmp_path / f"t{suffix}", awkward()
    text = frame.to_csv(index=False, sep="\t" if suffix == ".tsv" else ";")
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    source = load_data(f"table:{path}", drop=["day"])
    assert source.transform.table.names == ("origin", "rain", "power", "open", "doors", "price", "clock")
    assert load_data(f"table:{path}", columns=["price", "rain"]).transform.table.names == ("price", "rain")
    with pytest.raises(UserError, match="no column 'prize'; did you mean 'price'"):
        load_data(f"table:{path}", columns=["prize"])
    frame.loc[7, "rain"], frame.loc[[8, 9], "day"] = "inf", "soon"
    bad = tmp_path / "bad.csv"
    bad.write_text(frame.to_csv(index=False) + "1,2\n")
    with pytest.raises(UserError) as caught:
        load_data(f"table:{bad}")
    for problem in ("line 202 has 2 cells, the first line has 10", "column 'rain', line 9 holds 'inf'",
                    "column 'day', line 10 holds 'soon', not a date (2 such cells)"):  # fmt: skip
        assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    source = load_data(f"table:{bad}", skip_bad=True)
    assert sum(map(len, source.splits.values())) == 197
    assert "3 row(s) with cells that cannot be read" in " ".join(source.notes)


def test_attributes_and_time_zones_of_a_frame_are_the_users():
    hours = pd.date_range("2024-01-01 13:00", periods=40, freq="7h", tz="Europe/Berlin")
    frame = pd.DataFrame({"when": hours, "x": np.arange(40) ** 1.5})
    frame.attrs |= {"problems": "two sensors failed", "notes": "in May", "name": "mine"}
    table, notes = TableEncoding.fit(frame)
    assert not any("May" in note or note == "i" for note in notes)
    back = table.decode(table.encode(frame).x)
    assert back["when"].dt.tz is not None and (back["when"].dt.hour == frame["when"].dt.hour).all()
    assert read_as(TableEncoding, json.loads(json.dumps(encode(table)))) == table


@pytest.mark.parametrize("days", [
    ["9999-12-31" if k % 3 else f"2020-01-{k % 28 + 1:02d}" for k in range(60)],
    [f"1500-01-{k % 28 + 1:02d} {k % 24:02d}:30" for k in range(60)],
])  # fmt: skip
def test_dates_before_1677_and_after_2262_are_dates_too(days):
    pd = pytest.importorskip("pandas", minversion="3")
    frame = pd.DataFrame({"day": days, "x": np.random.RandomState(0).normal(size=60)})
    table, notes = TableEncoding.fit(frame)
    assert ("9999-12-31 in 67 % of the rows" in notes[0]) == ("9999-12-31" in days)
    found = table.decode(table.encode(frame).x)["day"]
    assert (found.astype(str).str[:16] == pd.to_datetime(frame["day"]).astype(str).str[:16]).all()


def test_a_column_of_booleans_that_are_all_missing_is_left_out():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"x": np.random.RandomState(0).normal(size=20), "seen": pd.array([None] * 20, "boolean")})
    table, notes = TableEncoding.fit(frame)
    assert table.names == ("x",) and notes == ["column 'seen' is empty: left out."]
