"""Splits, named data and arrays: values, disjointness, determinism and messages."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from torchcdm.data import (
    DataSource,
    MemorySplit,
    flip_horizontally,
    from_object,
    load_data,
    parse_size,
    renumbered,
)
from torchcdm.data.named import TOYS
from torchcdm.data.options import DataOptions
from torchcdm.data.pairs import read_side
from torchcdm.errors import UserError
from torchcdm.random import permutation
from torchcdm.units import DataTransform


def rows(*splits):
    """All samples of the splits as a sorted list of tuples."""
    return sorted(tuple(x.flatten().tolist()) for split in splits for x in split.tensors()[0])


# --- named data ------------------------------------------------------------------------------------------------


def test_digits_are_the_rows_of_scikit_learn():
    from sklearn.datasets import load_digits

    data = load_digits()
    source = load_data("digits")
    assert [len(source.train), len(source.validation), len(source.test)] == [1300, 200, 297]
    assert source.shape == (1, 8, 8) and source.classes == 10
    x, y = source.test.tensors()
    test = np.random.RandomState(0).permutation(1797)[1500:]
    assert np.array_equal(x[:, 0].numpy(), data.images[test]) and np.array_equal(y.numpy(), data.target[test])
    # Together the splits are all rows, each once.
    assert rows(source.train, source.validation, source.test) == sorted(map(tuple, data.data.tolist()))
    # Every label went with its image.
    by_image = dict(zip(map(tuple, data.data.tolist()), data.target.tolist(), strict=True))
    assert all(by_image[tuple(x.flatten().tolist())] == y for x, y in source.train)


def test_digits_fill_the_unit_cube_when_dequantised():
    source = load_data("digits")
    x, _ = source.train.tensors()
    z = source.transform.encode(x, torch.Generator().manual_seed(0))
    assert -1 <= float(z.min()) < -0.99 and 0.99 < float(z.max()) <= 1
    paper = load_data("digits", dequantize=False).transform
    assert torch.equal(paper.encode(x).unique(), torch.linspace(-1, 1, 17))


def test_fixed_splits_ignore_the_seed_and_fractions_count_from_the_training_rows():
    assert torch.equal(load_data("digits").train.x, load_data("digits", seed=5).train.x)
    whole = load_data("digits", validation_fraction=0)
    assert len(whole.train) == 1500 and not whole.validation and len(whole.test) == 297
    with pytest.raises(UserError, match="validation takes 1500 of 1500"):
        load_data("digits", validation_fraction=0.9999)
    with pytest.raises(UserError, match="validation split is empty; choose from: train, test"):
        whole.split("validation")


def test_permutation_is_the_documented_one():
    # The first entries of numpy's frozen RandomState(0) stream: the splits of published numbers hang on them.
    assert permutation(10, 0).tolist() == [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]


def test_resize_keeps_the_mean_and_the_grid():
    small, full = load_data("digits", size=(4, 4)), load_data("digits")
    assert small.shape == (1, 4, 4) and small.transform.high == 16
    x, reference = small.test.x.double(), full.test.x.double()
    assert abs(float(x.mean() - reference.mean())) < 0.3
    assert torch.equal(x, x.round())


def test_limit_takes_evenly_spaced_samples_of_each_split():
    source = load_data("digits", limit=3)
    full = load_data("digits").test.x
    assert torch.equal(source.test.x, full[[0, 148, 296]])


@pytest.mark.parametrize("name", TOYS)
def test_toys_have_the_mean_of_their_distribution(name):
    source = load_data(f"toy:{name}")
    mean, deviation = source.transform.shift, source.transform.scale
    exact = TOYS[name].sample(200_000, torch.Generator().manual_seed(9))[0].double().mean(0)
    assert bool(((mean - exact).abs() < 5 * deviation / 100).all())
    assert source.train.labels.max() + 1 == source.classes
    assert not set(rows(source.train)) & set(rows(source.test))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", "did you mean 'digits'"),
        ("digits:there", "'digits' takes nothing after the colon"),
        ("toy:two-moon", "did you mean 'two-moons'"),
        ("array:nowhere.npz", "nowhere.npz: no such file"),
        ("folder:nowhere", "nowhere: no such file or folder"),
        ("array:", "write array:FILE.npz"),
        ("toy", "write toy:NAME"),
        ("", "choose from: array, celeba"),
    ],
)
def test_wrong_specs(spec, message):
    with pytest.raises(UserError, match=message) as caught:
        load_data(spec)
    assert "\n" not in str(caught.value)


def test_a_class_that_no_training_sample_has_is_said():
    x, y = torch.rand(60, 2), 1 + torch.arange(60) % 2
    assert "no training sample has the class 0." in from_object(x, y).notes
    assert not [note for note in from_object(x, y - 1).notes if "no training sample" in note]


def labels_of(names, model_names):
    labels = torch.arange(len(names)).repeat(10)
    x = torch.rand(len(labels), 2)
    parts = MemorySplit(x, labels), MemorySplit(x[:1]), MemorySplit(x[:0])
    source = DataSource("data", *parts, DataTransform((2,)), tuple(names))
    result = renumbered(source, tuple(model_names))
    assert result.validation.labels.tolist() == [-1]
    return result.train.labels[: len(names)].tolist()


def test_classes_are_numbered_as_those_of_a_model():
    assert labels_of(["cat", "dog"], ["ape", "dog", "cat"]) == [2, 1]
    # Bare numbers count the names of the other side.
    assert labels_of(["0", "1"], ["ape", "cat", "dog"]) == labels_of(["ape", "cat"], ["0", "1"]) == [0, 1]
    # But not where the names are numbers themselves.
    for own, model in ((["0", "1"], ["1", "2"]), (["cat", "eel"], ["cat", "dog"]), (["0", "1", "2"], ["cat", "dog"])):
        with pytest.raises(UserError, match="is none of the model's"):
            labels_of(own, model)


def test_options_that_do_not_fit_the_data():
    with pytest.raises(UserError, match="'kind' names a column of a table; digits has no columns"):
        load_data("digits", label="kind")
    with pytest.raises(UserError, match="size and channels are for images; toy:rings holds vectors of 2"):
        load_data("toy:rings", size=(8, 8))
    with pytest.raises(UserError, match=r"size\[0\] is 0; it must be at least 1"):
        load_data("digits", size=(0, 8))
    with pytest.raises(UserError, match="limit is 0"):
        load_data("digits", limit=0)


def test_bare_path_is_told_its_prefix(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=np.zeros((20, 2)))
    with pytest.raises(UserError, match=f"write array:{path}"):
        load_data(str(path))
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=f"t.csv: a file, no array; write table:{tmp_path}"):
        load_data(f"array:{tmp_path / 't.csv'}")
    with pytest.raises(UserError, match=f"write folder:{tmp_path}"):
        load_data(str(tmp_path))


def test_parse_size():
    assert parse_size("96x80") == (96, 80) and parse_size("32") == (32, 32)
    for text in ("0x4", "4x", "a", "4x4x4"):
        with pytest.raises(UserError, match="height x width"):
            parse_size(text)


# --- arrays ----------------------------------------------------------------------------------------------------


def test_random_split_is_a_partition_and_follows_the_seed():
    x = torch.arange(300.0).reshape(100, 3)
    source = from_object(x)
    assert [len(source.train), len(source.validation), len(source.test)] == [80, 10, 10]
    assert rows(source.train, source.validation, source.test) == rows(MemorySplit(x))
    assert torch.equal(source.train.x, from_object(x).train.x)
    assert not torch.equal(source.train.x, from_object(x, seed=1).train.x)


@pytest.mark.parametrize(
    ("shape", "event", "moved"),
    [
        ((20, 6, 5), (1, 6, 5), False),
        ((20, 6, 6, 3), (3, 6, 6), True),
        ((20, 3, 6, 6), (3, 6, 6), False),
        ((20, 6, 5, 3), (3, 6, 5), True),
        ((20, 3, 6, 5), (3, 6, 5), False),
        ((20, 16, 4, 4), (16, 4, 4), False),
    ],
)
def test_layouts_of_images(tmp_path, shape, event, moved):
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "x.npy", x)
    source = load_data(f"array:{tmp_path / 'x.npy'}")
    assert source.shape == event
    expected = np.moveaxis(x, 3, 1) if moved else x.reshape(20, *event)
    assert rows(source.train, source.validation, source.test) == sorted(map(tuple, expected.reshape(20, -1).tolist()))
    assert ("(N, H, W, C)" in source.notes[0]) == moved


@pytest.mark.parametrize(
    ("shape", "event"),
    [((8, 8, 5), (8, 8, 5)), ((64, 8, 6), (64, 8, 6)), ((16, 4, 4), (16, 4, 4)), ((3, 8, 8), (3, 8, 8)),
     ((8, 8, 3), (3, 8, 8)), ((8, 6, 1), (1, 8, 6)), ((28, 28, 4), (4, 28, 28))],
)  # fmt: skip
def test_tensors_are_channels_first_unless_colours_come_last(shape, event):
    x = torch.rand(20, *shape)
    source, of_dataset = from_object(x), from_object(torch.utils.data.TensorDataset(x))
    expected = x if shape == event else x.movedim(3, 1)
    for found in (source, of_dataset):
        assert found.shape == event and rows(found.train, found.validation, found.test) == rows(MemorySplit(expected))
    assert ("read as (N, H, W, C)" in source.notes[0]) == (shape != event)


@pytest.mark.parametrize(
    ("values", "levels", "low"),
    [
        (np.arange(17), 17, 0),
        (np.array([0, 200]), 256, 0),
        (np.array([0, 4095], np.uint16), 65536, 0),
        (np.array([-3, 4]), 8, -3),
        (np.array([100_000, 100_300]), 301, 100_000),
        (np.array([False, True]), 2, 0),
    ],
)
def test_integers_lie_on_a_grid(values, levels, low):
    x = np.resize(values, (40, 2))
    transform = from_object(x).transform
    assert transform.bin == 1 and (transform.low, transform.high) == (low, low + levels - 1)
    # The cells of the lowest and highest level end at -1 and 1.
    edges = transform(torch.tensor([[low - 0.5] * 2, [low + levels - 0.5] * 2], dtype=torch.float64))
    assert torch.allclose(edges, torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=torch.float64))


def test_large_integers_stay_apart():
    low = 1_700_000_000
    side, grid = read_side(np.arange(low, low + 400)[:, None], "x", DataOptions())
    assert grid is None and side["c0"].tolist() == list(range(low, low + 400))
    images = from_object(np.random.RandomState(0).randint(100_000, 100_300, (50, 4, 4))).transform
    assert images.quantize(torch.tensor([100_123.4])) == 100_123


def test_floats_are_continuous_and_standardised():
    x = torch.randn(500, 2, dtype=torch.float64) * torch.tensor([1.0, 1000.0]) + 5
    source = from_object(x)
    z = source.transform(source.train.x.double())
    assert source.transform.bin is None and source.train.x.dtype == torch.float32
    assert torch.allclose(z.mean(0), torch.zeros(2).double(), atol=1e-6)
    assert torch.allclose(z.std(0, correction=0), torch.ones(2).double(), atol=1e-6)


def test_grey_levels_in_disguise_are_noted():
    whole = from_object(torch.randint(0, 9, (50, 1, 4, 4)).float())
    scaled = from_object(torch.randint(0, 256, (50, 1, 4, 4)).float() / 255)
    assert any("whole numbers" in note and "uint8" in note for note in whole.notes)
    assert any("1/255" in note for note in scaled.notes)
    assert not any("uint8" in note for note in from_object(torch.randn(50, 1, 4, 4) * 1e-4).notes)


def test_npz_with_labels_and_with_names(tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 4))
    np.savez(tmp_path / "n.npz", images=x, labels=np.arange(30) % 3)
    source = load_data(f"array:{tmp_path / 'n.npz'}")
    assert source.classes == 3 and source.shape == (4,)
    names = np.array(["cat", "ant", "bee"])[np.arange(30) % 3]
    np.savez(tmp_path / "t.npz", data=x, y=names)
    named = load_data(f"array:{tmp_path / 't.npz'}")
    assert named.class_names == ("ant", "bee", "cat")
    index = {tuple(np.float32(row).tolist()): name for row, name in zip(x, names, strict=True)}
    assert all(index[tuple(row.tolist())] == named.class_names[y] for row, y in named.train)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pixels": np.zeros((20, 2)), "more": np.zeros(3)}, r"no array called x or images or data \(found: more"),
        ({"x": np.array([[0.0, np.nan]] * 20)}, "sample 0 holds a value that is not a finite number"),
        ({"x": np.zeros((20, 2)), "y": np.arange(19)}, r"labels have shape \(19,\)"),
        ({"x": np.eye(20), "y": np.full(20, 70)}, "label 70 of sample 0 is out of range"),
        ({"x": np.eye(20), "y": np.full(20, -1)}, "label -1 of sample 0 is out of range"),
        ({"x": np.eye(20), "y": np.full(20, 0.5)}, "labels must be whole numbers"),
        ({"x": np.eye(3)}, "too few samples, 3"),
        ({"x": np.array(["a"] * 20)}, "are not numbers"),
        ({"x": np.zeros((20, 2, 2, 2, 2))}, "neither vectors"),
        ({"x": np.zeros((20, 0))}, "holds no values"),
        ({"x": np.stack([np.arange(20.0), np.ones(20)], 1)}, "column 'c1' is constant"),
        ({"x": np.ones((20, 4, 4))}, "all values are equal"),
    ],
)
def test_bad_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message) as caught:
        load_data(f"array:{tmp_path / 'bad.npz'}")
    assert "bad.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_pickled_and_broken_arrays_are_refused(tmp_path):
    np.save(tmp_path / "p.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 not a zip file")
    for name in ("p.npy", "b.npz"):
        with pytest.raises(UserError, match=f"{name}: cannot be read as a numpy array"):
            load_data(f"array:{tmp_path / name}")


# --- splits ----------------------------------------------------------------------------------------------------


def test_split_is_a_torch_dataset():
    source = load_data("digits")
    x, y = next(iter(DataLoader(source.test, batch_size=297)))
    whole, labels = source.test.tensors()
    assert torch.equal(x, whole) and torch.equal(y, labels)
    assert sum(1 for _ in source.test) == 297
    assert torch.equal(source.test[-1][0], whole[-1])


def test_unknown_split_is_told_the_nearest():
    with pytest.raises(UserError, match="did you mean 'validation'"):
        load_data("digits").split("validaton")


def test_fractions_that_are_none():
    for fraction in (-0.1, 1.0):
        with pytest.raises(UserError, match="validation_fraction is"):
            from_object(torch.randn(50, 2), validation_fraction=fraction)
    with pytest.raises(UserError, match="make them smaller"):
        from_object(torch.randn(50, 2), validation_fraction=0.6, test_fraction=0.5)
    everything: DataSource = from_object(torch.randn(5, 2), validation_fraction=0, test_fraction=0)
    assert len(everything.train) == 5 and not everything.test


def test_flip_mirrors_about_half_of_the_images_and_nothing_else():
    x = torch.rand(2000, 2, 3, 4)
    flipped = flip_horizontally(x, torch.Generator().manual_seed(0))
    mirrored = (flipped == x.flip(-1)).flatten(1).all(1)
    kept = (flipped == x).flatten(1).all(1)
    assert bool((mirrored ^ kept).all())
    assert abs(int(mirrored.sum()) - 1000) < 100
    assert torch.equal(flipped, flip_horizontally(x, torch.Generator().manual_seed(0)))


def test_fields_of_a_data_frame_count_and_others_are_refused():
    frame = pd.DataFrame({"a": np.arange(40.0) ** 1.5, "b": np.arange(40.0) % 7.1, "y": ["u", "v"] * 20})
    for source in (from_object(frame, label="y", limit=9), from_object(frame, "y", limit=9)):
        assert source.class_names == ("u", "v") and source.shape == (2,) and len(source.train) == 9
    with pytest.raises(UserError, match="'a' names a column of a table; an array or a Dataset has no columns"):
        from_object(frame[["a", "b"]].to_numpy(), drop=("a",))


def test_a_file_of_another_kind_is_there(tmp_path):
    (tmp_path / "a photo.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a photo.png: no table, array or folder of images; give"):
        load_data(str(tmp_path / "a photo.png"))
