"""Two data sets side by side for a density ratio: splits, columns, grids, bent columns, and data that do not fit."""

import numpy as np
import pytest
import torch
from PIL import Image

from torchcdm.apps.ratio.coordinates import Curves
from torchcdm.data import DataOptions
from torchcdm.data.pairs import pair_up, read_pair, read_query
from torchcdm.errors import UserError
from torchcdm.units.warp import fit_warp

pd = pytest.importorskip("pandas")


def normal(rows, columns, seed=0):
    return np.random.RandomState(seed).normal(size=(rows, columns))


def test_both_sources_are_as_frequent_and_nothing_of_the_held_out_share_is_trained_on():
    # The first column tells every row apart: 0 ... 99 for the denominator, 1000 ... 1039 for the numerator.
    denominator, numerator = normal(100, 2), normal(40, 2, seed=1)
    denominator[:, 0] += 10 * np.arange(100)
    numerator[:, 0] += 10 * np.arange(40) + 5000
    pair = pair_up(numerator, denominator, DataOptions(validation_fraction=0.2))
    assert pair.counts == (100, 40) and pair.held_out == (20, 8)
    ids = {}
    for split in ("train", "validation"):
        x, y = getattr(pair.source, split).tensors()
        assert int((y == 0).sum()) == int((y == 1).sum())
        assert x[y == 1, 0].min() > x[y == 0, 0].max()
        ids[split] = [set(x[y == label, 0].tolist()) for label in range(2)]
        first = [x[y == label, 0][: len(ids[split][label])] for label in range(2)]
        assert [set(part.tolist()) for part in first] == ids[split], "each once before any comes back"
    assert [len(found) for found in ids["train"]] == [80, 32]
    assert [len(found) for found in ids["validation"]] == [20, 8]
    assert all(train.isdisjoint(held) for train, held in zip(ids["train"], ids["validation"], strict=True))


def test_larger_pictures_are_no_query(tmp_path):
    images = np.random.RandomState(0).randint(0, 256, (40, 8, 8), dtype=np.uint8)
    pair = pair_up(images, images[::-1].copy())
    for side in (8, 16):
        Image.fromarray(np.full((side, side), 7, np.uint8)).save(tmp_path / f"{side}.png")
    assert len(read_query(tmp_path / "8.png", pair.source.transform, None, DataOptions()).x) == 1
    with pytest.raises(UserError, match="16 x 16 pixels.*the model takes images of 8 x 8"):
        read_query(tmp_path / "16.png", pair.source.transform, None, DataOptions())


@pytest.mark.parametrize("copies", [1, 4])
def test_copies_of_a_row_are_all_held_out_or_all_trained_on(copies):
    x = np.column_stack([normal(80, 1), np.arange(80) % 3])
    pair = pair_up(np.tile(x + [1, 0], (copies, 1)), np.tile(x, (copies, 1)))
    train, held_out = (set(split.tensors()[0][:, 0].tolist()) for split in (pair.source.train, pair.source.validation))
    assert train.isdisjoint(held_out)
    assert all(abs(held - 0.15 * 80 * copies) < copies for held in pair.held_out)


def test_rows_of_a_few_values_are_no_copies():
    x = np.random.RandomState(0).randint(0, 2, (200, 2))
    pair = pair_up(x, x)
    assert pair.held_out == (30, 30)
    for split in (pair.source.train, pair.source.validation):
        assert len((split.tensors()[0] > 0).unique(dim=0)) == 4, "all combinations on both sides"


def test_nothing_but_copies_is_refused():
    images = normal(1200, 1).reshape(40, 1, 5, 6)
    with pytest.raises(UserError, match="leaves nothing to train on"):
        pair_up(np.tile(images[:1], (20, 1, 1, 1)), images)


def test_columns_of_frames_go_by_name_in_any_order():
    frame = pd.DataFrame(normal(60, 2), columns=["height", "mass"])
    frame["mass"] += 100
    shifted = frame[["mass", "height"]] + 1
    pair = pair_up(shifted, frame)
    assert pair.warp.table.names == ("height", "mass")
    layout = (pair.source.transform, pair.warp, DataOptions())
    x, names, *_ = read_query(frame, *layout)
    assert len(names) == 60
    extra = frame.assign(age=1.0)[["age", "mass", "height"]]
    assert torch.equal(read_query(extra, *layout)[0], x)
    assert torch.equal(read_query(frame.to_numpy(), *layout)[0], x)
    with pytest.raises(UserError, match="'mass'"):
        read_query(frame[["height"]], *layout)
    with pytest.raises(UserError, match="3 column.s.; 2 are needed"):
        read_query(normal(4, 3), *layout)


def test_columns_without_names_go_by_place():
    x, y = normal(60, 3), normal(60, 3) + 1
    named, numbered = (pd.DataFrame(y, columns=columns) for columns in (["b", "c", "a"], range(3)))
    for sides in ((x, named), (named, torch.from_numpy(x)), (pd.DataFrame(x), named)):
        pair = pair_up(*sides)
        assert pair.warp.table.names == ("b", "c", "a")
        layout = (pair.source.transform, pair.warp, DataOptions())
        assert torch.equal(read_query(numbered, *layout)[0], read_query(named, *layout)[0])
    pair = pair_up(x, pd.DataFrame(y))
    layout = (pair.source.transform, pair.warp, DataOptions())
    for same in (numbered, named, numbered[[2, 0, 1]], numbered.assign(more=0)):
        assert torch.equal(read_query(same, *layout)[0], read_query(y, *layout)[0])
    with pytest.raises(UserError, match="query: 2 column.s.; 3 are needed"):
        read_query(named[["a", "b"]], *layout)
    with pytest.raises(UserError, match="numerator: no column 'a', which denominator has"):
        pair_up(named.rename(columns={"a": "d"}), named)


def test_both_sides_and_a_query_are_read_alike():
    denominator = pd.DataFrame({"day": [f"{d:02d}/{m:02d}/2024" for m in range(1, 13) for d in range(1, 29)]})
    numerator = pd.DataFrame({"day": [f"{d:02d}/06/2024" for d in range(1, 13)] * 10})
    denominator["price"], numerator["price"] = ["1,234", "950", "1,500.5"] * 112, ["1,234", "1,010"] * 60
    values, table, _, notes, _ = read_pair(numerator, denominator, DataOptions())
    days, prices = (values[1] + torch.tensor([column.offset for column in table.columns])).T
    assert days.unique().tolist() == [19875.0 + k for k in range(12)] and prices.unique().tolist() == [1010, 1234]
    assert "reads '1,234' as 1234" in " ".join(notes)
    pair = pair_up(numerator, denominator)
    alone, both = (read_query(denominator[k:], pair.source.transform, pair.warp, DataOptions()).x for k in (335, 300))
    assert torch.equal(alone[0], both[-1])


def test_constant_columns_are_left_out_with_a_note():
    x = normal(60, 3)
    x[:, 1] = 7
    pair = pair_up(x + [1, 0, 0], x)
    assert pair.warp.table.names == ("c0", "c2") and pair.source.shape == (2,)
    assert any("constant" in note and "c1" in note for note in pair.source.notes)
    layout = (pair.source.transform, pair.warp, DataOptions())
    values, _, differs, _ = read_query(np.concatenate([x, x[:1] + [0, 0.5, 0]]), *layout)
    assert values.shape == (61, 2) and differs == 60 * [""] + ["c1"]


@pytest.mark.parametrize("start", [0, 250, 1000])
def test_ids_are_noted_whether_or_not_they_begin_anew_on_each_side(start):
    sides = [pd.DataFrame({"id": np.arange(300) + k * start, "x": normal(300, 1, k)[:, 0]}) for k in range(2)]
    notes = read_pair(*sides, DataOptions())[3]
    assert sum("'id' holds a different whole number in every row: if it is an id" in note for note in notes) == 1
    assert not any("'x' holds a different" in note for note in notes)


def test_columns_of_few_values_are_dequantised_or_refused():
    x = normal(200, 2)
    x[:, 1] = np.random.RandomState(3).randint(0, 4, 200) / 2
    pair = pair_up(x, x)
    assert any("'c1'" in note and "dequantised with cells of 0.5" in note for note in pair.source.notes)
    values = pair.source.train.tensors()[0][:, 1]
    assert len(values.unique()) > 100
    with pytest.raises(UserError, match="few distinct values in the columns c1.*discrete='dequantize'"):
        pair_up(x, x, discrete="error")


def test_images_go_by_shape_and_by_kind():
    grey = np.random.RandomState(0).randint(0, 17, (30, 8, 8)).astype(np.uint8)
    pair = pair_up(grey, grey)
    assert pair.source.shape == (1, 8, 8) and pair.warp is None and pair.source.class_names is not None
    with pytest.raises(UserError, match=r"shapes \(1, 6, 6\) and \(1, 8, 8\); give size and channels"):
        pair_up(grey[:, :6, :6], grey)
    with pytest.raises(UserError, match="grey levels, the other fractions"):
        pair_up(grey / 16.3, grey)
    with pytest.raises(UserError, match="the denominator holds images, the numerator rows of numbers"):
        pair_up(normal(30, 64), grey)
    with pytest.raises(UserError, match=r"denominator has grey levels 0 \.\.\. 255, numerator 0 \.\.\. 65535;"):
        pair_up(grey.astype(np.uint16) * 4000, grey * 15)
    assert pair_up(grey * 15, grey).source.transform.high == 255, "dark images are no other depth"
    options, levels = DataOptions(), pair.source.transform
    assert read_query(grey[:3], levels, None, options).x.shape == (3, 1, 8, 8)
    for other in (grey / 16, grey.astype(np.uint16) * 4000):
        with pytest.raises(UserError, match="sample 0: .*the model's grey levels are 0 ... 16"):
            read_query(other, levels, None, options)
    deep = pair_up(grey.astype(np.uint16) * 4000, grey.astype(np.uint16) * 4000).source.transform
    with pytest.raises(UserError, match=r"query: grey levels 0 \.\.\. 255; .* 0 \.\.\. 65535: convert"):
        read_query(grey * 15, deep, None, options)
    fractions = pair_up(grey / 16.3, grey / 16.3).source.transform
    with pytest.raises(UserError, match="query: grey levels; the fitted samples are continuous"):
        read_query(grey, fractions, None, options)


@pytest.mark.parametrize(
    ("numerator", "message"),
    [
        (normal(60, 3), "numerator: 3 column.s.; 2 are needed"),
        (pd.DataFrame(normal(60, 3), columns=["a", "b", "c"]), "denominator: 2 column.s.; 3 are needed"),
        (normal(19, 2), "numerator: too few samples, 19; at least 20"),
        (np.where(np.arange(120).reshape(60, 2) == 51, np.nan, 1.0), "numerator: sample 25 holds a value that is not"),
        (np.array([["a", "b"]] * 60), "are not numbers|holds no values"),
        (np.zeros((60, 0)), "are not numbers|holds no values"),
        ("no-such-file.csv", "no-such-file.csv"),
    ],
)
def test_data_that_do_not_go_together_are_refused(numerator, message):
    with pytest.raises(UserError, match=message) as caught:
        pair_up(numerator, normal(60, 2))
    assert "\n" not in str(caught.value)


def test_options_are_checked():
    x = normal(60, 2)
    with pytest.raises(UserError, match="validation_fraction is 0"):
        pair_up(x, x, DataOptions(validation_fraction=0))
    with pytest.raises(UserError, match="size and channels are for images"):
        pair_up(x, x, DataOptions(size=(3, 3)))
    with pytest.raises(UserError, match="every column is constant"):
        pair_up(np.ones((60, 2)), np.ones((60, 2)))


def test_quantiles_of_wide_tables_are_not_those_of_torch(monkeypatch):
    def refused(*_, **__):
        raise RuntimeError("quantile() input tensor is too large")  # as torch 2.8 says beyond 16 million numbers

    monkeypatch.setattr(torch.Tensor, "quantile", refused)
    x, sources = torch.from_numpy(normal(100, 3)).exp(), torch.arange(100) % 2
    assert Curves.fit(fit_warp(x)["location"] + x, sources).knots.isfinite().all()
