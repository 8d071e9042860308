"""Folders of images: values of every format, classes, splits, conversions, and messages that name the file."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from torchcdm.data import LazySplit, MemorySplit, load_data
from torchcdm.data.images import decode, describe, resize, to_channels
from torchcdm.errors import UserError


def picture(number, shape=(5, 7, 3), dtype=np.uint8):
    return np.random.default_rng(number).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def write_folder(root, count, shape=(5, 7, 3), where="{:03d}.png"):
    """``count`` images below ``root``; gives their pixels, channels first, by path."""
    return {
        str(write(root / where.format(k), picture(k, shape))): np.moveaxis(np.atleast_3d(picture(k, shape)), 2, 0)
        for k in range(count)
    }


def splits_of(source):
    return source.train, source.validation, source.test


def keys(*splits):
    """Every sample as bytes, with its label."""
    return [(x.numpy().tobytes(), y) for split in splits for x, y in split]


def one_line(spec, **options):
    """The message with which the SPEC is refused."""
    with pytest.raises(UserError) as caught:
        load_data(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- splits and classes ----------------------------------------------------------------------------------------


def test_every_image_is_in_one_split_and_the_split_does_not_depend_on_the_order_of_writing(tmp_path):
    images = write_folder(tmp_path / "a", 30)
    for k in reversed(range(30)):
        write(tmp_path / "b" / f"{k:03d}.png", picture(k))
    source, again = load_data(f"folder:{tmp_path / 'a'}"), load_data(f"folder:{tmp_path / 'b'}")
    assert list(map(len, splits_of(source))) == [24, 3, 3] and source.shape == (3, 5, 7) and source.classes is None
    assert sorted(keys(*splits_of(source))) == sorted((image.tobytes(), -1) for image in images.values())
    assert [keys(split) for split in splits_of(source)] == [keys(split) for split in splits_of(again)]
    other = load_data(f"folder:{tmp_path / 'a'}", seed=1)
    assert keys(source.test) != keys(other.test)


def test_what_lies_beside_the_folders_of_splits_is_said_or_refused(tmp_path):
    """A class may be called train, and the splits otherwise."""
    for name in ("bus", "car", "Train"):
        write_folder(tmp_path / "vehicles" / name, 12)
    write(tmp_path / "vehicles" / "one.png", picture(50))
    source = load_data(f"folder:{tmp_path / 'vehicles'}")
    assert sum(map(len, splits_of(source))) == 12
    first = tmp_path / "vehicles" / "one.png"
    assert f"25 image(s) beside the folders of the splits are passed over, {first} the first." in source.notes
    write_folder(tmp_path / "rest", 12)
    assert sum(map(len, splits_of(load_data(f"folder:{tmp_path / 'rest'}")))) == 12
    write_folder(tmp_path / "rest" / "test", 12)
    assert "put the others into a folder 'train'" in one_line(f"folder:{tmp_path / 'rest'}")
    write_folder(tmp_path / "alone" / "test", 12)  # as somebody keeps what is to be scored
    (tmp_path / "alone" / "notes").mkdir()
    assert sum(map(len, splits_of(load_data(f"folder:{tmp_path / 'alone'}")))) == 12


def test_links_to_images_beside_them_are_no_other_images(tmp_path):
    (tmp_path / "train").mkdir()
    for path in write_folder(tmp_path / "all", 12):
        (tmp_path / "train" / path.rpartition("/")[2]).symlink_to(path)
    source = load_data(f"folder:{tmp_path}")
    assert sum(map(len, splits_of(source))) == 12 and not any("passed over" in note for note in source.notes)


def test_a_picture_beside_class_folders_is_named(tmp_path):
    for name in ("cat", "dog"):
        write_folder(tmp_path / name, 6)
    stray = write(tmp_path / "stray.png", picture(50))
    source = load_data(f"folder:{tmp_path}")
    assert source.classes is None and f"no classes, as {stray} lies beside the sub-folders." in source.notes


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_a_transparent_colour_is_white_in_every_mode(tmp_path, mode):
    image = Image.new("RGB", (4, 4), (200, 0, 0))
    image.paste((0, 0, 0), (0, 0, 2, 2))
    image = image.convert(mode, palette=Image.Palette.ADAPTIVE) if mode == "P" else image.convert(mode)
    transparent = image.getpixel((0, 0))
    image.save(tmp_path / "x.png", transparency=transparent)
    pixels, _ = decode(tmp_path / "x.png")
    assert len(pixels) == describe(tmp_path / "x.png").channels == {"L": 1, "RGB": 3, "P": 4}[mode]
    assert to_channels(pixels, 3, 255)[:, 0, 0].tolist() == [255, 255, 255]
    assert to_channels(pixels, 3, 255)[:, 3, 3].tolist() == ([60] * 3 if mode == "L" else [200, 0, 0])


def test_recursive_sub_folders_are_classes(tmp_path):
    cats = write_folder(tmp_path, 12, where="cat/deep/{}.png")
    dogs = {str(write(tmp_path / f"dog/{k}.png", picture(100 + k))): k for k in range(8)}
    source = load_data(f"folder:{tmp_path}")
    assert source.class_names == ("cat", "dog")
    found = dict(keys(*splits_of(source)))
    assert all(found[image.tobytes()] == 0 for image in cats.values()) and len(found) == 20
    assert sum(found.values()) == len(dogs)


def test_images_beside_class_folders_mean_no_classes(tmp_path):
    write_folder(tmp_path, 6, where="cat/{}.png")
    write_folder(tmp_path, 6, where="{}.png")
    assert load_data(f"folder:{tmp_path}").classes is None


@pytest.mark.parametrize("validation", ["val", "valid", "validation", None])
def test_folders_of_splits_are_kept(tmp_path, validation):
    write_folder(tmp_path / "train", 20, where="x/{}.png")
    train = [(tmp_path / "train/y" / f"{k}.png", picture(200 + k)) for k in range(20)]
    for path, array in train:
        write(path, array)
    test = write_folder(tmp_path / "test", 5, where="y/{}.png")
    if validation:
        held = write_folder(tmp_path / validation, 3, where="x/{}.png")
    source = load_data(f"folder:{tmp_path}")
    assert keys(source.test) == [(image.tobytes(), 1) for image in test.values()]
    if validation:
        assert len(source.train) == 40 and keys(source.validation) == [(i.tobytes(), 0) for i in held.values()]
    else:
        assert [len(source.train), len(source.validation)] == [36, 4]
        assert not set(keys(source.train)) & set(keys(source.validation))


def test_class_that_training_has_not_is_named(tmp_path):
    write_folder(tmp_path / "train", 12, where="x/{}.png")
    write_folder(tmp_path / "train", 12, where="y/{}.png")
    path = write(tmp_path / "test/z/0.png", picture(0))
    assert f"{path}: not in one of the class folders" in one_line(f"folder:{tmp_path}")


def test_other_files_are_counted_and_hidden_ones_passed_over(tmp_path):
    write_folder(tmp_path, 12)
    write(tmp_path / ".cache/0.png", picture(0))
    (tmp_path / "._000.png").write_bytes(b"no image")
    (tmp_path / "readme.txt").write_text("words")
    source = load_data(f"folder:{tmp_path}")
    assert sum(map(len, splits_of(source))) == 12
    assert any(note.startswith("1 file(s) of other kinds") for note in source.notes)


def test_large_folders_are_read_when_asked_and_survive_a_worker(tmp_path, monkeypatch):
    write_folder(tmp_path, 20)
    whole = load_data(f"folder:{tmp_path}")
    monkeypatch.setattr("torchcdm.data.source.MEMORY_LIMIT", 0)
    lazy = load_data(f"folder:{tmp_path}")
    assert isinstance(whole.train, MemorySplit) and isinstance(lazy.train, LazySplit)
    indices = torch.tensor([7, 0, 7])
    for split in (lazy.train, pickle.loads(pickle.dumps(lazy.train))):
        assert torch.equal(split.batch(indices)[0], whole.train.x[indices])
    limited = load_data(f"folder:{tmp_path}", limit=2)
    assert torch.equal(limited.train.tensors()[0], whole.train.x[[0, 15]])


# --- formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "array", "high"),
    [
        ("grey.png", picture(0, (5, 7)), 255),
        ("grey-alpha.png", picture(0, (5, 7, 2)), 255),
        ("colour.png", picture(0, (5, 7, 3)), 255),
        ("alpha.png", picture(0, (5, 7, 4)), 255),
        ("deep.png", picture(0, (5, 7), np.uint16), 65535),
        ("deep.tif", picture(0, (5, 7), np.uint16), 65535),
        ("float.tiff", np.linspace(-3, 1e4, 35, dtype=np.float32).reshape(5, 7), None),
        ("colour.bmp", picture(0, (5, 7, 3)), 255),
        ("colour.webp", picture(0, (5, 7, 3)), 255),
        ("grey.pgm", picture(0, (5, 7)), 255),
    ],
)
def test_pixels_of_every_format_are_those_that_were_stored(tmp_path, name, array, high):
    path = write(tmp_path / name, array, **({"lossless": True} if name.endswith("webp") else {}))
    info, pixels = describe(path), decode(path)[0]
    channels_last = array.reshape(5, 7, -1)
    assert (info.channels, info.size, info.high) == (channels_last.shape[2], (5, 7), high)
    assert pixels.dtype == (torch.uint8 if high == 255 else torch.float32)
    assert np.array_equal(pixels.numpy(), np.moveaxis(channels_last, 2, 0))


@pytest.mark.parametrize(
    ("array", "stored", "high"),
    [
        (picture(0, (7, 9, 5)), "last", 255),
        (picture(0, (5, 7, 9), np.uint16), "first", 65535),
        (np.random.default_rng(0).normal(size=(6, 8, 8)), "first", None),
        (picture(0, (7, 9)), "plain", 255),
    ],
)
def test_arrays_are_images_of_any_number_of_channels(tmp_path, array, stored, high):
    np.save(tmp_path / "x.npy", array)
    expected = {"last": np.moveaxis(array, -1, 0), "first": array, "plain": array[None]}[stored]
    assert np.array_equal(decode(tmp_path / "x.npy")[0], expected.astype(np.float32))
    info = describe(tmp_path / "x.npy")
    assert ((info.channels, *info.size), info.high) == (expected.shape, high)


def test_palettes_and_bitmaps_are_seen_as_their_colours(tmp_path):
    palette = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2)).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    palette.save(tmp_path / "p.png")
    assert decode(tmp_path / "p.png")[0].flatten(1).T.tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]]
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(tmp_path / "b.png")
    assert decode(tmp_path / "b.png")[0].tolist() == [[[0, 255]]]


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    array = np.repeat(np.linspace(0, 255, 16).astype(np.uint8)[:, None], 8, 1)
    path = write(tmp_path / "x.jpg", array, quality=100, exif=exif)
    assert describe(path).size == (8, 16) == tuple(decode(path)[0].shape[1:])
    assert np.abs(decode(path)[0][0].numpy().astype(int) - np.rot90(array, -1)).max() <= 3


def test_sixteen_bit_folders_have_65536_levels_and_float_folders_are_continuous(tmp_path):
    for k in range(12):
        write(tmp_path / "deep" / f"{k}.png", picture(k, (4, 4), np.uint16))
        write(tmp_path / "float" / f"{k}.tif", np.random.default_rng(k).normal(7, 2, (4, 4)).astype(np.float32))
    deep = load_data(f"folder:{tmp_path / 'deep'}").transform
    assert (deep.bin, deep.low, deep.high) == (1.0, 0.0, 65535.0)
    source = load_data(f"folder:{tmp_path / 'float'}")
    z = source.transform(source.train.x)
    assert source.transform.bin is None
    assert abs(float(z.mean())) < 1e-5 and float(z.std(correction=0)) == pytest.approx(1, abs=1e-5)


# --- conversions -----------------------------------------------------------------------------------------------


def test_size_and_channels_are_brought_together(tmp_path):
    flat = np.full((10, 14), 90, np.uint8)
    for k in range(6):
        write(tmp_path / f"{k}.png", flat)
        write(tmp_path / f"{k}.jpg", np.full((20, 30, 3), 90, np.uint8), quality=100)
    source = load_data(f"folder:{tmp_path}", size=(6, 8), channels=3)
    assert source.shape == (3, 6, 8)
    assert all(bool(((x.int() - 90).abs() <= 1).all()) for x, _ in source.train)
    assert any("aspect ratio" in note for note in source.notes)


def test_channels_convert_as_light_does():
    rgba = torch.tensor([[[200.0]], [[100.0]], [[0.0]], [[51.0]]])  # 20 % opaque
    assert to_channels(rgba, 3, 255.0).flatten().tolist() == pytest.approx([244, 224, 204])
    red, green, blue = (255 * row for row in torch.eye(3))
    assert [round(float(to_channels(c[:, None, None], 1, 255.0))) for c in (red, green, blue)] == [76, 150, 29]
    grey = torch.tensor([[[7]]], dtype=torch.uint8)
    assert to_channels(grey, 3, 255.0).flatten().tolist() == [7, 7, 7]
    assert to_channels(grey, 4, 255.0).flatten().tolist() == [7, 7, 7, 255]
    assert to_channels(to_channels(grey, 3, 255.0), 1, 255.0).flatten().tolist() == [7]
    with pytest.raises(UserError, match="cannot convert 5 channels to 3"):
        to_channels(torch.zeros(5, 1, 1), 3, 255.0)


def test_resize_averages_and_does_not_mix_channels():
    x = torch.zeros(5, 16, 16)
    x[2] = torch.arange(16.0)[:, None] * 1000
    small = resize(x, (4, 8))
    assert small.shape == (5, 4, 8) and not small[[0, 1, 3, 4]].any()
    # A ramp stays a ramp away from the border: block i of four rows averages rows 4 i ... 4 i + 3.
    assert torch.allclose(small[2, 1:3], torch.tensor([[5500.0], [9500.0]]).expand(2, 8))


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "mend"),
    [
        (picture(1, (5, 8, 3)), "8 bit; give size or crop (HxW)"),
        (picture(1, (5, 7)), "8 bit; give channels, 1 or 3, to convert"),
        (picture(1, (5, 8)), "give channels, 1 or 3, to convert; give size or crop (HxW)"),
        (None, "one depth"),
    ],
    ids=["size", "channels", "both", "depth"],
)
def test_mixed_images_name_two_files_and_the_option(tmp_path, other, mend):
    shape = (5, 7) if other is None else (5, 7, 3)
    first = next(iter(write_folder(tmp_path, 12, shape)))
    second = write(tmp_path / "zz.png", picture(1, (5, 7), np.uint16) if other is None else other)
    message = one_line(f"folder:{tmp_path}")
    assert first in message and str(second) in message and mend in message


@pytest.mark.parametrize(
    "content", [b"", b"these are words", None, "header"], ids=["empty", "words", "truncated", "header only"]
)
def test_corrupt_image_is_named_and_skip_bad_goes_on(tmp_path, content):
    good = write_folder(tmp_path, 20, (40, 40, 3))
    path = tmp_path / "007.png"
    original = path.read_bytes()
    path.write_bytes({None: original[: len(original) // 2], "header": original[:60]}.get(content, content))
    assert one_line(f"folder:{tmp_path}").startswith(f"{path}: cannot be read as an image")
    source = load_data(f"folder:{tmp_path}", skip_bad=True)
    del good[str(path)]
    assert sorted(keys(*splits_of(source))) == sorted((image.tobytes(), -1) for image in good.values())
    assert any("1 file(s)" in note and str(path) in note for note in source.notes)


def test_files_of_several_images_are_refused(tmp_path):
    write_folder(tmp_path, 20)
    pages = [Image.fromarray(picture(k, (5, 7, 3))) for k in range(3)]
    for name in ("pages.tif", "film.gif"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        said = f"{name}: cannot be read as an image (holds 3 images; save each in a file of"
        assert said in one_line(f"folder:{tmp_path}")
        assert sum(map(len, splits_of(load_data(f"folder:{tmp_path}", skip_bad=True)))) == 20
        (tmp_path / name).unlink()
    pages[0].save(tmp_path / "telephone.jpg", format="MPO", save_all=True, append_images=pages[1:])
    assert sum(map(len, splits_of(load_data(f"folder:{tmp_path}")))) == 21


def test_corrupt_image_of_a_lazy_folder_is_named_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("torchcdm.data.source.MEMORY_LIMIT", 0)
    write_folder(tmp_path, 12, (40, 40, 3))
    path = tmp_path / "003.png"
    path.write_bytes(path.read_bytes()[:2000])
    source = load_data(f"folder:{tmp_path}")
    with pytest.raises(UserError, match="003.png: cannot be read as an image"):
        for split in splits_of(source):
            split.tensors()


def test_folders_that_are_missing_empty_or_too_small(tmp_path):
    assert "nowhere: no such file or folder" in one_line(f"folder:{tmp_path}/nowhere")
    assert "write folder:PATH" in one_line("folder:")
    assert f"{tmp_path}: no image files" in one_line(f"folder:{tmp_path}")
    write_folder(tmp_path, 3)
    assert "too few samples, 3" in one_line(f"folder:{tmp_path}")
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    assert "neither this nor any other of the 3 image files" in one_line(f"folder:{tmp_path}", skip_bad=True)


def test_what_is_wrong_with_all_images_is_said(tmp_path):
    write_folder(tmp_path, 12, (5, 7, 3))
    told = one_line(f"folder:{tmp_path}", skip_bad=True, crop=(8, 8))
    assert "011.png: has 5 x 7 pixels, 3 channel(s), 8 bit, smaller than the crop" in told and "skip-bad" not in told
    for words in ({}, {"skip_bad": True}, {"crop": (4, 4)}):
        told = one_line(f"folder:{tmp_path}", channels=2, **words)
        assert "png: has 5 x 7 pixels, 3 channel(s), 8 bit, and cannot have 2 channels; grey, colour" in told
