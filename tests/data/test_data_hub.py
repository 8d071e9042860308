"""Hugging Face data sets, saved and read through their own library; nothing is downloaded."""

import sys
import types

import numpy as np
import pandas as pd
import pytest
import torch

from torchcdm.data import MemorySplit, load_data
from torchcdm.data.outputs import png
from torchcdm.errors import UserError


def test_absent_library_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"hf:some/name needs datasets; pip install 'torchcdm\[hub\]'"):
        load_data("hf:some/name")


class Rows:
    """What is read of one split of the library: features, rows, columns."""

    def __init__(self, **columns):
        image = type("Image", (), {})
        self.columns = columns
        self.features = {name: image() if name == "image" else object() for name in columns}

    def __len__(self):
        return len(self.columns["image"])

    def __getitem__(self, key):
        return self.columns[key] if isinstance(key, str) else {name: rows[key] for name, rows in self.columns.items()}

    def cast_column(self, name, kind):
        return self


def test_a_class_that_is_a_text_has_one_number_in_all_splits(monkeypatch):
    def rows(names, count):
        pictures = [{"bytes": png(np.full((1, 4, 4), k, np.uint8)), "path": None} for k in range(count)]
        return Rows(image=pictures, label=(names * count)[:count])

    parts = {"train": rows(["cat", "dog", "zebra"], 12), "test": rows(["dog", "zebra"], 4)}
    library = {"load_dataset": lambda name, config: parts, "Image": lambda decode: None}
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(**library))
    source = load_data("hf:some/name")
    assert source.class_names == ("cat", "dog", "zebra") and source.test.labels.tolist() == [1, 2, 1, 2]
    names = {"cat": 0, "dog": 1, "zebra": 2}
    for split in (source.train, source.validation):
        x, y = split.tensors()
        assert y.tolist() == [names[parts["train"].columns["label"][k]] for k in x[:, 0, 0, 0].tolist()]


@pytest.mark.parametrize("names", [None, ["cat", "dog"]])
def test_hidden_labels_of_a_test_split_are_none(monkeypatch, names):
    def rows(labels):
        pictures = [{"bytes": png(np.full((1, 4, 4), k, np.uint8)), "path": None} for k in range(len(labels))]
        found = Rows(image=pictures, label=labels)
        found.features["label"] = types.SimpleNamespace(**({} if names is None else {"names": names}))
        return found

    parts = {"train": rows([0, 1] * 6), "validation": rows([1, 0]), "test": rows([-1] * 4)}
    library = {"load_dataset": lambda name, config: parts, "Image": lambda decode: None}
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(**library))
    source = load_data("hf:some/name")
    assert source.class_names == tuple(names or ("0", "1")) and source.train.labels.tolist() == [0, 1] * 6
    assert source.validation.labels.tolist() == [1, 0] and source.test.labels.tolist() == [-1] * 4
    parts["test"] = rows([-2] * 4)
    with pytest.raises(UserError, match="label -2 of sample 14 is out of range"):
        load_data("hf:some/name")
    parts = {"train": rows([-1] * 12)}
    assert load_data("hf:some/name").class_names == (None if names is None else tuple(names))


def test_hidden_labels_of_a_table_are_none(monkeypatch):
    class Table(Rows):
        def __len__(self):
            return len(self.columns["a"])

        def to_pandas(self):
            return pd.DataFrame(self.columns)

    def rows(labels, **features):
        found = Table(a=np.arange(len(labels)) ** 0.5, kind=labels)
        found.features |= features
        return found

    known = types.SimpleNamespace(names=["cat", "dog"])
    parts = {"train": rows([0, 1] * 10, kind=known), "validation": rows([0, 1]), "test": rows([-1, -1, -1])}
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda name, config: parts))
    source = load_data("hf:some/name", label="kind")
    assert source.class_names == ("0", "1") and source.train.labels.tolist() == [0, 1] * 10
    assert source.validation.labels.tolist() == [0, 1] and source.test.labels.tolist() == [-1] * 3
    parts = {"train": rows([-1, 1] * 10)}  # numbers that are no classes of the library
    assert load_data("hf:some/name", label="kind").class_names == ("-1", "1")


@pytest.fixture
def datasets(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("datasets")


@pytest.fixture
def pictures(datasets):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (30, 6, 5, 3), dtype=np.uint8)
    kinds = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"picture": datasets.Image(), "kind": kinds, "note": datasets.Value("string")})
    rows = {
        "picture": [Image.fromarray(p) for p in pixels],
        "kind": [k % 2 for k in range(30)],
        "note": ["text"] * 30,
    }
    return pixels, datasets.Dataset.from_dict(rows, features)


def test_images_with_their_own_splits(datasets, pictures, tmp_path, monkeypatch):
    pixels, rows = pictures
    parts = {"train": rows.select(range(20)), "valid": rows.select(range(20, 24)), "test": rows.select(range(24, 30))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path)
    source = load_data(f"hf:{tmp_path}")
    expected = torch.from_numpy(np.moveaxis(pixels, 3, 1).copy())
    assert torch.equal(source.train.tensors()[0], expected[:20])
    assert torch.equal(source.validation.tensors()[0], expected[20:24])
    assert torch.equal(source.test.tensors()[0], expected[24:])
    assert source.class_names == ("cat", "dog") and source.test.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert source.transform.high == 255
    monkeypatch.setattr("torchcdm.data.source.MEMORY_LIMIT", 0)
    lazy = load_data(f"hf:{tmp_path}")
    assert not isinstance(lazy.train, MemorySplit)
    assert torch.equal(lazy.train.tensors()[0], expected[:20])


def test_images_without_splits_converted(datasets, pictures, tmp_path):
    _, rows = pictures
    rows.save_to_disk(tmp_path)
    source = load_data(f"hf:{tmp_path}", size=(4, 4), channels=1)
    assert source.shape == (1, 4, 4) and [len(source.train), len(source.validation), len(source.test)] == [24, 3, 3]


def test_mixed_sizes_name_the_row(datasets, tmp_path):
    from PIL import Image

    images = [Image.new("L", (5, 6 + (k == 3))) for k in range(12)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": images}, features).save_to_disk(tmp_path)
    with pytest.raises(UserError, match=r"row 3: has shape \(1, 7, 5\).*give size and channels"):
        load_data(f"hf:{tmp_path}")


def test_tables_of_numbers(datasets, tmp_path):
    values = np.random.default_rng(0).normal(size=(40, 2))
    rows = {"a": values[:, 0], "b": values[:, 1], "label": ["x", "y"] * 20}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path)
    source = load_data(f"hf:{tmp_path}", label="label")
    assert source.transform.table.names == ("a", "b") and source.class_names == ("x", "y")
    first = torch.cat([split.tensors()[0] for split in (source.train, source.validation, source.test)])[:, 0]
    assert torch.equal(first.sort().values, torch.from_numpy(values[:, 0]).float().sort().values)
    names = load_data(f"hf:{tmp_path}").transform.table.names
    assert names == ("a", "b", "label"), "a column of texts is one of categories"


def test_pictures_of_formats_that_start_programs_are_not_opened(datasets, tmp_path):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EOF\n"
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": [{"bytes": eps, "path": None}] * 12}, features).save_to_disk(tmp_path)
    with pytest.raises(UserError, match="row 0 cannot be read as an image .*cannot identify image file"):
        load_data(f"hf:{tmp_path}")


def test_messages(datasets, pictures, tmp_path):
    _, rows = pictures
    datasets.DatasetDict({"all": rows}).save_to_disk(tmp_path)
    with pytest.raises(UserError, match=r"no split called train \(found: all\)"):
        load_data(f"hf:{tmp_path}")
    with pytest.raises(UserError, match="hf:not/there: cannot be loaded"):
        load_data("hf:not/there")
    with pytest.raises(UserError, match="write hf:NAME"):
        load_data("hf:")
