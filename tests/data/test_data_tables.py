"""Tables: CSV, Parquet and data frames, with every message that a bad cell deserves."""

import math

import numpy as np
import pytest
import torch

from torchcdm.data import from_object, load_data, read_inputs, save_table
from torchcdm.errors import UserError
from torchcdm.units import DataTransform


def write(path, header, values, separator=","):
    lines = [separator.join(header)] if header else []
    lines += [separator.join(map(str, row)) for row in values]
    path.write_text("\n".join(lines) + "\n")
    return path


def everything(source):
    """All rows of the three splits, sorted."""
    x = torch.cat([split.tensors()[0] for split in (source.train, source.validation, source.test)])
    return x[x[:, 0].argsort()]


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(size=(60, 3)).round(4) * [1, 10, 100]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_keeps_values_names_and_units(tmp_path, values, separator):
    path = write(tmp_path / "t.csv", ["a", "b", "c"], values, separator)
    source = load_data(f"table:{path}")
    assert source.transform.table.names == ("a", "b", "c") and source.transform.bin is None
    expected = torch.from_numpy(values[values[:, 0].argsort()]).float()
    assert torch.equal(everything(source), expected)
    z = source.transform(source.train.tensors()[0].double())
    assert torch.allclose(z.std(0, correction=0), torch.ones(3).double(), atol=1e-6)


def test_csv_without_names_quoted_and_with_byte_order_mark(tmp_path, values):
    bare = load_data(f"table:{write(tmp_path / 'bare.csv', None, values)}")
    assert bare.transform.table.names == ("c0", "c1", "c2") and len(everything(bare)) == 60
    assert any("no line of column names" in note for note in bare.notes)
    path = tmp_path / "q.csv"
    path.write_text("\ufeff\"x, mm\",y\n" + "\n".join(f'"{a}",{b}' for a, b, _ in values))
    assert load_data(f"table:{path}").transform.table.names == ("x, mm", "y")


def test_a_first_line_of_numbers_and_texts_names_the_columns_and_a_note_says_so(tmp_path, values):
    rows = [[f"{a}", f"{b}", "ab"[k % 2]] for k, (a, b, _) in enumerate(values)]
    source = load_data(f"table:{write(tmp_path / 'bare.csv', None, rows)}")
    assert source.transform.table.names == tuple(rows[0])
    (note,) = (note for note in source.notes if "first line" in note)
    assert f"one of them '{rows[0][0]}'" in note and "put a line of names before it" in note
    named = load_data(f"table:{write(tmp_path / 'named.csv', ['a', 'b', 'c'], rows)}")
    assert not any("first line" in note for note in named.notes)


def test_label_column_of_texts_and_of_numbers(tmp_path, values):
    kinds = np.array(["setosa", "virginica"])[np.arange(60) % 2]
    path = write(tmp_path / "t.csv", ["a", "b", "c", "kind"], np.column_stack([values.astype(str), kinds]))
    source = load_data(f"table:{path}", label="kind")
    assert source.transform.table.names == ("a", "b", "c") and source.class_names == ("setosa", "virginica")
    kind = {float(np.float32(a)): k for a, k in zip(values[:, 0], kinds, strict=True)}
    assert all(kind[float(x[0])] == source.class_names[y] for x, y in source.train)
    # Classes that do not count from 0, in the order of the numbers.
    numbers = write(tmp_path / "n.csv", ["a", "k"], [[a, [10, 2, 3][i % 3]] for i, a in enumerate(values[:, 0])])
    source = load_data(f"table:{numbers}", label="k")
    assert source.class_names == ("2", "3", "10")
    assert sorted(source.train.labels.unique().tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["01", "1", "02"], ("01", "02", "1")), (["01", "02", "10"], ("01", "02", "10")),
        (["2", " 10", "-1"], ("-1", "2", "10")), (["1", "a", "0"], ("0", "1", "a")),
    ],
)  # fmt: skip
def test_labels_are_numbers_where_they_are_written_so(values, labels, names):
    source = from_object(values, labels * 20)
    assert source.class_names == names and source.train.labels.unique().tolist() == [0, 1, 2]


def test_label_columns_that_are_none(tmp_path, values):
    path = write(tmp_path / "t.csv", ["a", "b", "id"], np.column_stack([values[:, :2], np.arange(60)]))
    with pytest.raises(UserError, match="60 classes in 60 rows; is the label an identifier"):
        load_data(f"table:{path}", label="id")
    with pytest.raises(UserError, match="60 classes in 60 rows"):
        load_data(f"table:{path}", label="b")
    pd = pytest.importorskip("pandas")
    with pytest.raises(UserError, match="labels must be whole numbers"):
        from_object(pd.DataFrame(values, columns=["a", "b", "c"]), labels="b")


def test_constant_columns_are_left_out_of_every_split(tmp_path, values):
    with_constant = np.column_stack([values[:, 0], np.full(60, 7.0), values[:, 1:]])
    source = load_data(f"table:{write(tmp_path / 't.csv', list('abcd'), with_constant)}")
    assert source.transform.table.names == ("a", "c", "d")
    assert torch.equal(everything(source), torch.from_numpy(values[values[:, 0].argsort()]).float())
    assert any("left out because they are constant in training: b." in note for note in source.notes)


def test_notes_on_values_without_a_bounded_density(tmp_path):
    rng = np.random.default_rng(0)
    zero_inflated = np.where(rng.random(400) < 0.3, 0.0, rng.normal(size=400))
    columns = [rng.normal(size=400), rng.integers(0, 4, 400), zero_inflated, 1.7e9 + 1e4 * rng.normal(size=400)]
    path = write(tmp_path / "t.csv", ["fine", "few", "zeros", "time"], np.column_stack(columns))
    source = load_data(f"table:{path}")
    text = " ".join(source.notes)
    assert "'few' has 4 distinct values: dequantised" in text and "'time' varies little" in text
    assert "'zeros' holds 0 in" in text and "'fine'" not in text
    seconds = 1.7e9 + rng.normal(size=(400, 1)).round(3)
    source = load_data(f"table:{write(tmp_path / 's.csv', ['time'], seconds)}")
    codes = torch.cat([split.tensors()[0] for split in source.splits.values()])
    found = source.transform.table.decode(codes)["time"]
    assert sorted(found) == sorted(seconds[:, 0]) and abs(float(codes.mean())) < 1


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("inf", "line 4 holds 'inf'"),
        ("12 kg", "line 4 holds '12 kg'"),
        ("1,2", "line 4 has 3 cells, the first line has 2"),
    ],
)
def test_bad_cells_name_column_and_line(tmp_path, cell, message):
    rows = [[k, k * k] for k in range(20)]
    rows[2][1] = cell
    path = write(tmp_path / "bad.csv", ["a", "b"], rows)
    with pytest.raises(UserError, match=message) as caught:
        load_data(f"table:{path}")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "the file is empty"),
        ("t.csv", "a,b\n", "no columns of values, or no rows"),
        ("t.csv", "# a comment\na,b\n1,2\n", "line 2 has 2 cells, the first line has 1"),
        ("t.csv", "a,a\n1,2\n", "two columns are called 'a'"),
        ("t.csv", "a\n" + "1\n" * 20, "every column is constant"),
        ("t.csv", "a|b\n" + "".join(f"{k}|{k}.5\n" for k in range(20)), r"no column is left .* 'a\|b' holds 20 texts"),
        ("t.csv", "a\n1\n2\n3\n", "too few samples, 3"),
        ("t.xlsx", "PK", "tables are read from .csv"),
    ],
)
def test_bad_tables(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_data(f"table:{tmp_path / name}")


@pytest.mark.parametrize(("header", "names"), [("", ("c0", "c1")), ("size, cm;weight\n", ("size, cm", "weight"))])
def test_semicolons_and_decimal_commas(tmp_path, header, names):
    (tmp_path / "t.csv").write_text(header + "".join(f"{k},5;{k % 7}\n" for k in range(20)))
    source = load_data(f"table:{tmp_path / 't.csv'}")
    assert source.transform.table.names == names and sum(map(len, source.splits.values())) == 20


def test_unknown_label_column_lists_those_found(tmp_path, values):
    path = write(tmp_path / "t.csv", ["a", "b", "c"], values)
    with pytest.raises(UserError, match=r"no column 'species'; choose from: a, b, c"):
        load_data(f"table:{path}", label="species")
    with pytest.raises(UserError, match="one of the columns a, a is named twice"):
        load_data(f"table:{path}", columns=("a", "a"))
    with pytest.raises(UserError, match="no such file"):
        load_data("table:absent.csv")


def test_parquet_equals_csv(tmp_path, values):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({name: values[:, k] for k, name in enumerate("abc")}), tmp_path / "t.parquet")
    ours = load_data(f"table:{tmp_path / 't.parquet'}")
    csv = load_data(f"table:{write(tmp_path / 't.csv', list('abc'), values)}")
    assert torch.equal(ours.train.tensors()[0], csv.train.tensors()[0])
    assert ours.transform.table.names == csv.transform.table.names


def test_parquet_messages(tmp_path, values):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    numbers = pa.array([1.0, math.inf, *range(20)], pa.float64())
    parquet.write_table(pa.table({"a": numbers}), tmp_path / "inf.parquet")
    with pytest.raises(UserError, match="column 'a', row 1 holds 'inf', not a finite number"):
        load_data(f"table:{tmp_path / 'inf.parquet'}")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        load_data(f"table:{tmp_path / 'broken.parquet'}")


def test_data_frames(values):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(values, columns=["a", "b", "c"], index=[f"id{k}" for k in range(60)])
    frame["kind"] = ["x", "y"] * 30
    source = from_object(frame, labels="kind")
    assert source.transform.table.names == ("a", "b", "c") and source.class_names == ("x", "y")
    assert torch.equal(everything(source), torch.from_numpy(values[values[:, 0].argsort()]).float())
    apart = from_object(frame[["a", "b", "c"]], labels=frame["kind"])
    assert torch.equal(apart.train.labels, source.train.labels)
    frame.loc["id7", "b"] = np.inf
    with pytest.raises(UserError, match="column 'b', row id7 holds 'inf'"):
        from_object(frame, labels="kind")


def test_read_inputs_finds_the_columns_by_name(tmp_path, values):
    source = load_data(f"table:{write(tmp_path / 't.csv', ['a', 'b', 'c'], values)}")
    shuffled = np.column_stack([np.full(60, 3), values[:, 2], values[:, 0], values[:, 1]])
    path = write(tmp_path / "new.csv", ["id", "c", "a", "b"], shuffled)
    x, names, *_ = read_inputs(path, source.transform)
    assert torch.equal(x, torch.from_numpy(values).float())
    assert names[0] == f"{path}: line 2"
    with pytest.raises(UserError, match="vectors of 4; the model takes vectors of 3"):
        read_inputs(path, DataTransform((3,)))
    with pytest.raises(UserError, match=r"no column 'b', 'c' \(found: a\)"):
        read_inputs(write(tmp_path / "less.csv", ["a"], values[:, :1]), source.transform)


def test_saved_tables_read_back_exactly(tmp_path):
    x = torch.randn(30, 3) * torch.tensor([1e-6, 1.0, 1e6])
    path = save_table(x, tmp_path / "out" / "samples.csv")
    source = load_data(f"table:{path}")
    assert source.transform.table.names == ("c0", "c1", "c2")
    assert torch.equal(everything(source), x[x[:, 0].argsort()])


def test_the_index_of_a_data_frame_is_no_column(tmp_path, values):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(values, columns=["a", "b", "c"])
    frame = frame[frame.a > frame.a.quantile(0.2)]
    frame.to_csv(tmp_path / "t.csv")
    source = load_data(f"table:{tmp_path}/t.csv")
    assert source.transform.table.names == ("a", "b", "c")
    assert any("first column has no name and counts the rows: left out" in note for note in source.notes)
    pytest.importorskip("pyarrow")
    frame.to_parquet(tmp_path / "t.parquet")
    source = load_data(f"table:{tmp_path}/t.parquet")
    assert source.transform.table.names == ("a", "b", "c")
    assert any("index of the data frame is left out" in note for note in source.notes)


@pytest.mark.parametrize("header", [["", "b"], ["a", ""]])
def test_other_columns_without_a_name_are_refused(tmp_path, header):
    rows = np.random.RandomState(0).normal(size=(20, 2))
    with pytest.raises(UserError, match="has no name; name it in the first line"):
        load_data(f"table:{write(tmp_path / 't.csv', header, rows)}")
    pytest.importorskip("pyarrow")
    pytest.importorskip("pandas").DataFrame(rows, columns=header).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t.parquet: column \d has no name; name it in the first line"):
        load_data(f"table:{tmp_path / 't.parquet'}")


def test_a_text_file_of_numpy_is_read(tmp_path):
    x = np.random.RandomState(0).normal(size=(60, 3))
    np.savetxt(tmp_path / "x.txt", x)
    source = load_data(f"table:{tmp_path / 'x.txt'}")
    assert source.shape == (3,) and source.transform.table.names == ("c0", "c1", "c2")
    found = torch.cat([split.tensors()[0] for split in source.splits.values()])
    assert np.allclose(np.sort(found.numpy(), 0), np.sort(x, 0), atol=1e-6)
