"""What goes to and comes from files of a trained model: read_inputs and the save functions."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from torchcdm.data import (
    DataOptions,
    load_data,
    read_inputs,
    save_array,
    save_grid,
    save_images,
    save_table,
    to_bytes,
)
from torchcdm.data.inputs import read_pictures
from torchcdm.errors import UserError
from torchcdm.units import DataTransform

GREY = DataTransform.images((1, 6, 5))
COLOUR = DataTransform.images((3, 6, 5))


def bytes_like(*shape, seed=0, high=256):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint16).astype(np.float32))


# --- saving ----------------------------------------------------------------------------------------------------


def test_bytes_round_and_clip():
    x = torch.tensor([-3.0, 0.4, 0.6, 127.49, 127.51, 254.6, 300.0]).reshape(1, 1, 1, 7)
    transform = DataTransform.images((1, 1, 7))
    assert to_bytes(x, transform).flatten().tolist() == [0, 0, 1, 127, 128, 255, 255]


def test_range_becomes_black_to_white():
    digits = DataTransform.images((1, 1, 3), levels=17)
    x = torch.tensor([0.0, 8.0, 16.0]).reshape(1, 1, 1, 3)
    assert to_bytes(x, digits).flatten().tolist() == [0, 128, 255]
    assert to_bytes(x / 16 - 3).flatten().tolist() == [0, 128, 255]  # no range: the smallest and largest value
    assert to_bytes(torch.zeros(1, 1, 1, 3)).flatten().tolist() == [0, 0, 0]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_survive_saving_and_reading(tmp_path, channels):
    transform = DataTransform.images((channels, 6, 5))
    x = bytes_like(4, channels, 6, 5)
    paths = save_images(x + 0.4, tmp_path / "new" / "folder", transform)
    assert [path.name for path in paths] == ["000000.png", "000001.png", "000002.png", "000003.png"]
    y, names, *_ = read_inputs(paths, transform)
    assert torch.equal(y, x) and names == list(map(str, paths))


def test_what_was_measured_is_not_rounded_to_grey_levels(tmp_path):
    digits = DataTransform.images((1, 4, 4), levels=17)
    measured = np.array([[64, 100], [255, 3]], np.uint8)
    Image.fromarray(measured).save(tmp_path / "small.png")
    (x,), *_ = read_pictures([tmp_path / "small.png"], digits, DataOptions(), (1, 2, 2))
    assert np.allclose(x[0].numpy(), measured * (16 / 255.0))
    Image.fromarray(measured.repeat(2, 0).repeat(2, 1)).save(tmp_path / "sample.png")
    assert read_inputs(tmp_path / "sample.png", digits).x[0, 0, ::2, ::2].tolist() == [[4, 6], [16, 0]]
    Image.fromarray(measured % 4).save(tmp_path / "dark.png")  # no fractions of [-1, 1]
    assert read_pictures([tmp_path / "dark.png"], digits, DataOptions(), (1, 2, 2))[0][0].max() < 1


def test_channels_have_a_mend(tmp_path):
    Image.fromarray(np.zeros((6, 5, 3), np.uint8)).save(tmp_path / "colour.png")
    with pytest.raises(UserError, match=r"convert them to 1 channel\(s\)"):
        read_inputs(tmp_path / "colour.png", GREY)


def test_float_pictures_hold_data_units(tmp_path):
    path = tmp_path / "x.tif"
    values = np.random.RandomState(0).uniform(3, 250, (6, 5)).astype(np.float32)
    Image.fromarray(values).save(path)
    assert np.array_equal(read_inputs(path, GREY).x[0, 0].numpy(), values)
    for wrong, message in ((values / 255, "fractions of"), (values * 3, "values from")):
        Image.fromarray(wrong).save(path)
        with pytest.raises(UserError, match=message):
            read_inputs(path, GREY)
    Image.fromarray(values / 255).save(path)
    with pytest.raises(UserError, match="fractions of"):
        read_pictures([path], GREY, DataOptions())


def test_digits_survive_saving_and_reading(tmp_path):
    source = load_data("digits")
    x = source.test.tensors(limit=20)[0].float()
    save_images(x, tmp_path, source.transform)
    assert torch.equal(read_inputs(tmp_path, source.transform)[0], x)


def test_sixteen_bits_and_many_channels_keep_their_values(tmp_path):
    deep = DataTransform.images((1, 6, 5), levels=65536)
    x = bytes_like(3, 1, 6, 5, high=65536)
    (first, *_) = paths = save_images(x, tmp_path / "deep", deep)
    assert np.array_equal(np.asarray(Image.open(first)), x[0, 0].numpy())
    assert torch.equal(read_inputs(paths, deep)[0], x)
    wide = DataTransform.images((7, 6, 6))
    x = bytes_like(3, 7, 6, 6)
    paths = save_images(x, tmp_path / "wide", wide)
    assert paths[0].suffix == ".npy" and np.load(paths[0]).dtype == np.uint8
    assert torch.equal(read_inputs(tmp_path / "wide", wide)[0], x)


def test_grid_holds_every_image_in_reading_order(tmp_path):
    x = bytes_like(5, 3, 40, 33)
    sheet = np.moveaxis(np.asarray(Image.open(save_grid(x, tmp_path / "grid.png", COLOUR, columns=3))), 2, 0)
    assert sheet.shape == (3, 2 * 40 + 2, 3 * 33 + 2 * 2)
    for k, image in enumerate(x.numpy()):
        top, left = k // 3 * 42, k % 3 * 35
        assert np.array_equal(sheet[:, top : top + 40, left : left + 33], image)
    side_by_side = np.asarray(Image.open(save_grid(bytes_like(1, 5, 40, 33), tmp_path / "five.png")))
    assert side_by_side.shape == (40, 165)
    with pytest.raises(UserError, match="no images"):
        save_grid(bytes_like(0, 1, 4, 4), tmp_path / "none.png")
    x = bytes_like(1, 3, 6, 5)
    enlarged = np.asarray(Image.open(save_grid(x, tmp_path / "large.png", COLOUR)))
    assert np.array_equal(enlarged[5::10, 5::10], np.moveaxis(x[0].numpy(), 0, 2))


@pytest.mark.parametrize(("levels", "dtype"), [(17, np.uint8), (256, np.uint8), (65536, np.uint16)])
def test_arrays_of_grey_levels_are_integers_again(tmp_path, levels, dtype):
    transform = DataTransform.images((1, 6, 6), levels=levels)
    x = bytes_like(20, 1, 6, 6, high=levels)
    x[0, 0, 0, :2] = torch.tensor([0.0, levels - 1])
    path = save_array(x + 0.3, tmp_path / "a.npz", transform, y=torch.arange(20) % 2)
    with np.load(path) as stored:
        assert stored["x"].dtype == dtype and np.array_equal(stored["x"], x.numpy())
    source = load_data(f"array:{path}")
    assert source.classes == 2 and source.transform.high == levels - 1
    assert torch.equal(read_inputs(path, transform)[0], x)


def test_arrays_of_continuous_data_are_floats(tmp_path):
    x = torch.randn(10, 4)
    path = save_array(x, tmp_path / "a.npy", DataTransform.standardize(x))
    assert torch.equal(torch.from_numpy(np.load(path)), x)
    with pytest.raises(UserError, match="with labels as .npz"):
        save_array(x, path, y=torch.zeros(10))
    with pytest.raises(UserError, match="written as .npy"):
        save_array(x, tmp_path / "a.pt")


def test_a_quote_that_is_never_closed_takes_no_rows_with_it(tmp_path):
    rows = [f"{k},red" for k in range(60)]
    rows[20] = '20,"red'
    (tmp_path / "t.csv").write_text("a,b\n" + "\n".join(rows) + "\n")
    with pytest.raises(UserError, match="a quote in line 22 is not closed"):
        load_data(f"table:{tmp_path / 't.csv'}")
    rows[20] = '20,"red\n"'
    (tmp_path / "t.csv").write_text("a,b\n" + "\n".join([*rows, rows[20]]) + "\n")
    assert sum(len(split) for split in load_data(f"table:{tmp_path / 't.csv'}").splits.values()) == 61


def test_saving_where_it_cannot_be(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file.*cannot be written"):
        save_images(bytes_like(1, 1, 6, 5), tmp_path / "file", GREY)
    with pytest.raises(UserError, match="are no images"):
        save_images(torch.zeros(3, 1), tmp_path, DataTransform.images((1,), 65536))
    with pytest.raises(UserError, match="are no rows; save them with save_images"):
        save_table(bytes_like(1, 1, 6, 5), tmp_path / "t.csv")
    with pytest.raises(UserError, match="cannot be written"):
        save_table(torch.zeros(3, 2), tmp_path / "file" / "t.csv")


# --- reading ---------------------------------------------------------------------------------------------------


def test_wrong_size_and_channels_name_file_and_both_shapes(tmp_path):
    Image.fromarray(np.zeros((28, 30), np.uint8)).save(tmp_path / "big.png")
    with pytest.raises(UserError) as caught:
        read_inputs(tmp_path / "big.png", COLOUR)
    message = str(caught.value)
    assert "big.png: images of 28 x 30 pixels, 1 channel(s); the model takes images of 6 x 5 pixels, 3" in message
    x, *_ = read_inputs(tmp_path / "big.png", COLOUR, DataOptions(size=(6, 5), channels=3))
    assert x.shape == (1, 3, 6, 5)


def test_arrays_in_either_layout_and_single_samples(tmp_path):
    x = bytes_like(4, 3, 6, 5)
    for k, array in enumerate([x, x.movedim(1, 3), x[0], x[0].movedim(0, 2)]):
        np.save(tmp_path / f"{k}.npy", array.numpy().astype(np.uint8))
        y, names, *_ = read_inputs(tmp_path / f"{k}.npy", COLOUR)
        assert torch.equal(y, x[:1] if k >= 2 else x)
        assert names[-1] == f"{tmp_path / f'{k}.npy'}[{len(y) - 1}]"
    np.save(tmp_path / "grey.npy", np.full((6, 5), 9, np.uint8))
    assert bool((read_inputs(tmp_path / "grey.npy", GREY)[0] == torch.full((1, 1, 6, 5), 9.0)).all())
    vector = DataTransform((4,))
    np.save(tmp_path / "one.npy", np.arange(4.0))
    assert read_inputs(tmp_path / "one.npy", vector)[0].tolist() == [[0, 1, 2, 3]]


def test_a_dark_array_is_not_rescaled(tmp_path):
    np.save(tmp_path / "dark.npy", np.full((4, 6, 5), 3, np.uint8))
    assert bool((read_inputs(tmp_path / "dark.npy", GREY)[0] == 3).all())


def test_several_paths_join_in_order(tmp_path):
    x = bytes_like(6, 1, 6, 5)
    save_images(x[:2], tmp_path / "a", GREY)
    save_images(x[2:4], tmp_path / "b" / "deeper", GREY)
    array = save_array(x[4:], tmp_path / "c.npy", GREY)
    y, names, *_ = read_inputs([tmp_path / "a", tmp_path / "b", array], GREY)
    assert torch.equal(y, x) and len(names) == 6


def test_corrupt_images_are_named_or_skipped(tmp_path):
    x = bytes_like(2, 1, 6, 5)
    paths = save_images(x, tmp_path, GREY)
    paths[0].write_bytes(paths[0].read_bytes()[:60])
    with pytest.raises(UserError, match="000000.png: cannot be read as an image"):
        read_inputs(tmp_path, GREY)
    y, names, _, notes = read_inputs(tmp_path, GREY, DataOptions(skip_bad=True))
    assert notes == (f"1 file(s) that cannot be used are left out, {paths[0]} the first.",)
    assert torch.equal(y, x[1:]) and names == [str(paths[1])]


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (DataTransform((1, 6, 5)), "grey levels 0 ... 255; the model's data are continuous: give an array"),
        (DataTransform((7,)), "1 channel.*; the model takes vectors of 7"),
    ],
)
def test_images_for_models_without_grey_levels(tmp_path, transform, message):
    (path,) = save_images(bytes_like(1, 1, 6, 5), tmp_path, GREY)
    with pytest.raises(UserError, match=message):
        read_inputs(path, transform)


def test_a_folder_of_images_has_no_tables(tmp_path):
    save_images(bytes_like(1, 1, 6, 5), tmp_path, GREY)
    with pytest.raises(UserError, match="nothing to read in .*: no tables"):
        read_inputs(tmp_path, DataTransform((7,)))


def test_values_beyond_the_range_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.full((3, 6, 5), 4095, np.uint16))
    with pytest.raises(UserError, match=r"values from 4095 to 4095; the model's grey levels are 0 \.\.\. 255"):
        read_inputs(tmp_path / "x.npy", GREY)


@pytest.mark.parametrize("low", [0, -1])
def test_images_of_zero_to_one_are_not_taken_for_black_ones(tmp_path, low):
    fractions = np.linspace(low, 1, 60, dtype=np.float32).reshape(2, 1, 6, 5)
    np.save(tmp_path / "x.npy", fractions)
    for read in (read_inputs, partial(read_inputs, noisy=True), lambda *given: read_pictures(*given, DataOptions())):
        with pytest.raises(UserError, match=r"x.npy\[0\]: fractions of \[-1, 1\]; the .* are 0 ... 255: rescale them"):
            read([tmp_path / "x.npy"], GREY)
    binary = DataTransform.images((1, 6, 5), 2, low=low)  # levels of which there is no such doubt
    assert len(read_inputs(tmp_path / "x.npy", binary, noisy=True).x) == 2
    np.save(tmp_path / "x.npy", fractions.round())
    assert len(read_pictures([tmp_path / "x.npy"], GREY, DataOptions())[0]) == 2


def test_nothing_to_read(tmp_path):
    (tmp_path / "notes.md").write_text("no data")
    for paths, message in [
        (tmp_path, "nothing to read in"),
        ([], "an empty list of paths"),
        (tmp_path / "absent.png", "absent.png: no such file or folder"),
        (tmp_path / "notes.md", "files ending in '.md' are not read"),
    ]:
        with pytest.raises(UserError, match=message):
            read_inputs(paths, GREY)


def test_labels_of_bytes_are_texts(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.random.RandomState(0).normal(size=(40, 2)), y=np.array([b"\xff", b"a"] * 20))
    assert load_data(f"array:{tmp_path / 'a.npz'}").class_names == ("\\xff", "a")
