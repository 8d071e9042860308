"""Files that are damaged, hostile or no files: one line, never a traceback, never a hang."""

import gzip
import io
import os
import socket
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from published_data import idx, write_celeba, write_cifar, write_fashion

from torchcdm.data import DataOptions, from_object, load_data, read_inputs
from torchcdm.data.pairs import pair_up
from torchcdm.errors import UserError
from torchcdm.training.batches import Batches
from torchcdm.units import DataTransform

MODEL = DataTransform.images((1, 6, 5))
ROWS = DataTransform((2,))
FUZZ = settings(
    max_examples=60, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def picture(k=0, shape=(6, 5)):
    return np.random.default_rng(k).integers(0, 256, shape, dtype=np.uint8)


def folder(root, count=12, where="{}.png"):
    for k in range(count):
        path = root / where.format(k)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(k)).save(path)
    return root


def refusal(spec, **options):
    with pytest.raises(UserError) as caught:
        load_data(spec, **options)
    text = str(caught.value)
    assert text.isprintable()
    return text


def size(source):
    return sum(map(len, (source.train, source.validation, source.test)))


# --- any bytes -------------------------------------------------------------------------------------------------


def valid_files():
    """The bytes of one small valid file of every format, by suffix."""
    files = {}
    for suffix, form in {".png": "PNG", ".jpg": "JPEG", ".gif": "GIF", ".bmp": "BMP", ".webp": "WEBP", ".tif": "TIFF",
                         ".ppm": "PPM", ".jp2": "JPEG2000"}.items():  # fmt: skip
        buffer = io.BytesIO()
        Image.fromarray(picture()).save(buffer, form)
        files[suffix] = buffer.getvalue()
    images = picture(0, (20, 6, 5))
    for suffix, save in {
        ".npy": lambda file: np.save(file, images),
        ".npz": lambda file: np.savez(file, x=images),
        "-packed.npz": lambda file: np.savez_compressed(file, x=images, y=np.arange(20)),
    }.items():
        buffer = io.BytesIO()
        save(buffer)
        files[suffix] = buffer.getvalue()
    rows = np.random.default_rng(0).normal(size=(20, 3))
    files[".csv"] = ("a,b,c\n" + "\n".join(",".join(map(repr, row)) for row in rows.tolist())).encode()
    try:
        import pandas as pd

        files[".parquet"] = pd.DataFrame(rows, columns=list("abc")).to_parquet()
    except ImportError:
        pass
    return files


VALID = valid_files()


@st.composite
def damaged(draw, content):
    """The bytes with some replaced, cut off or put in; or any bytes at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        # Headers are where the damage is worst.
        at = draw(st.integers(0, min(len(content), draw(st.sampled_from([40, 200, len(content)])))))
        kind, piece = draw(st.sampled_from(["replace", "cut", "insert"])), draw(st.binary(min_size=1, max_size=4))
        if kind == "cut":
            del content[at : at + draw(st.integers(1, 30))]
        else:
            content[at : at + len(piece) * (kind == "replace")] = piece
    return bytes(content)


@pytest.mark.parametrize("suffix", VALID)
def test_damage_of_any_file_is_one_line(tmp_path, suffix):
    @FUZZ
    @given(damaged(VALID[suffix]))
    def check(content):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(content)
        kind = "table" if suffix in (".csv", ".parquet") else "array" if suffix[-4:] in (".npy", ".npz") else "folder"
        spec = f"{kind}:{tmp_path if kind == 'folder' else path}"
        for read in (lambda: load_data(spec), lambda: read_inputs(path, MODEL)):
            try:
                read()
            except UserError as error:
                assert str(error).isprintable()

    check()


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "celeba"])
def test_damage_of_published_files_is_one_line(tmp_path, name):
    {"fashion-mnist": write_fashion, "cifar10": write_cifar, "celeba": write_celeba}[name](tmp_path)
    if name == "fashion-mnist":
        for path in tmp_path.glob("*.gz"):  # unpacked: a checksum would find every damage
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())[:8]

    @FUZZ
    @given(st.data())
    def check(data):
        path = data.draw(st.sampled_from(files))
        whole = path.read_bytes()
        path.write_bytes(data.draw(damaged(whole[:50_000])) + whole[50_000:])
        try:
            load_data(f"{name}:{tmp_path}")
        except UserError as error:
            assert str(error).isprintable()
        finally:
            path.write_bytes(whole)

    check()


# --- headers that promise too much -----------------------------------------------------------------------------


def npy(shape, descr="'<f8'", body=b"", fortran=False):
    header = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


@pytest.mark.parametrize(
    "content",
    [
        npy((0, 10**12)), npy((10**12,)), npy((10**12,), "'<U0'"), npy((-1, 5)), npy((2**40, 2**40)),
        npy((20, 2), "'|O'"), npy((20,), "[('a', '<f8'), ('b', '<f8')]", bytes(320)),
        npy((20, 2), "'<c16'", bytes(640)), npy((10**6, 10)),
    ],
    ids=["empty", "large", "no bytes a value", "negative", "overflow", "objects", "records", "complex", "short"],
)  # fmt: skip
def test_headers_of_arrays_are_checked_before_memory_is_taken(tmp_path, content):
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    refusal(f"array:{path}")
    with pytest.raises(UserError):
        read_inputs(path, MODEL)
    with pytest.raises(UserError):
        pair_up(path, path)
    refusal(f"folder:{tmp_path}")


def test_members_of_npz_files_that_unpack_to_more_than_they_can(tmp_path):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", npy((10**11,)))
    length = struct.pack("<I", len(npy((10**11,))))
    path.write_bytes(path.read_bytes().replace(length, struct.pack("<I", 2**32 - 2)))
    assert "x.npz: cannot be read as a numpy array" in refusal(f"array:{path}")
    np.savez(path, x=np.random.default_rng(0).normal(size=(20, 2)), meta=np.array([{}], dtype=object))
    assert load_data(f"array:{path}").shape == (2,), "what is not asked for is not opened"


@pytest.mark.parametrize("packed", [False, True])
def test_idx_headers_of_absurd_sizes(tmp_path, packed):
    write_fashion(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    content = b"\0\0\x08\x03" + struct.pack(">III", 2**31, 2**31, 2**31)
    path.unlink()
    path = path if packed else path.with_suffix("")
    path.write_bytes(gzip.compress(content) if packed else content)
    assert "do not hold the shape" in refusal(f"fashion-mnist:{tmp_path}")
    content = idx(np.zeros((3, 0, 5), np.uint8))
    path.write_bytes(gzip.compress(content) if packed else content)
    refusal(f"fashion-mnist:{tmp_path}")


def test_fortran_order_half_precision_and_booleans_are_exact(tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float16)
    for k, array in enumerate((np.asfortranarray(x), x.astype(">f4"))):
        np.save(tmp_path / f"{k}.npy", array)
        found = load_data(f"array:{tmp_path / f'{k}.npy'}", validation_fraction=0, test_fraction=0).train.x
        assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, x.astype(np.float64).tolist()))
    np.save(tmp_path / "b.npy", x > 0)
    assert load_data(f"array:{tmp_path / 'b.npy'}").transform.high == 1


# --- images that are none --------------------------------------------------------------------------------------


def test_a_png_that_is_postscript_is_not_opened(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    folder(tmp_path)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 6\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "3.png").write_bytes(script)
    assert "3.png: cannot be read as an image" in refusal(f"folder:{tmp_path}")
    assert size(load_data(f"folder:{tmp_path}", skip_bad=True)) == 11


def test_images_of_absurd_sizes_and_warnings(tmp_path, recwarn):
    folder(tmp_path)
    content = bytearray((tmp_path / "0.png").read_bytes())
    for side, words in ((10_000, "images differ"), (60_000, "decompression bomb")):  # the first one is a warning
        content[16:24] = struct.pack(">II", side, side)
        content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
        (tmp_path / "0.png").write_bytes(content)
        assert words in refusal(f"folder:{tmp_path}")
    assert not recwarn.list


# --- what is no file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
@pytest.mark.parametrize("suffix", [".png", ".npy", ".csv", ".parquet"])
def test_only_files_are_opened(tmp_path, monkeypatch, kind, suffix):
    folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    path = Path(f"3{suffix}")
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    spec = "table" if suffix in (".csv", ".parquet") else "array"
    assert str(path) in refusal(f"{spec}:{path}")
    if kind != "folder":
        with pytest.raises(UserError, match="it is a pipe, a device or a socket"):
            read_inputs(path, MODEL)
    if kind != "folder" and suffix in (".png", ".npy"):
        assert "a pipe, a device or a socket" in refusal(f"folder:{tmp_path}")
        assert size(load_data(f"folder:{tmp_path}", skip_bad=True)) == 11 + (suffix != ".png")


@pytest.mark.parametrize("name", ["x" * 300 + ".npy", "a\0b.npy", "a/" * 3000 + "b.npy", "a\nb.npy", "\udcff.npy", ""])
def test_paths_that_are_none(tmp_path, name):
    for spec in ("array", "folder", "table", "celeba", "cifar10", "fashion-mnist"):
        refusal(f"{spec}:{tmp_path / name}")
    with pytest.raises(UserError):
        read_inputs(tmp_path / name, MODEL)
    with pytest.raises(UserError):
        pair_up(str(tmp_path / name), np.zeros((30, 2)))


def test_names_that_are_not_utf_8_can_be_written(tmp_path):
    folder(tmp_path, 2, "\udcff{}.png")
    names = read_inputs(tmp_path, MODEL).names
    assert [name.rpartition("/")[2] for name in names] == [r"\xff0.png", r"\xff1.png"]


# --- folders ---------------------------------------------------------------------------------------------------


def test_every_file_is_read_once_whatever_links_lead_to_it(tmp_path):
    folder(tmp_path / "b", 15)
    folder(tmp_path / "c", 15)
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "a").symlink_to(tmp_path / "c")
    (tmp_path / "c" / "copy.png").symlink_to(tmp_path / "b" / "0.png")
    os.link(tmp_path / "b" / "1.png", tmp_path / "c" / "hard.png")
    source = load_data(f"folder:{tmp_path}")
    assert size(source) == 30 and source.class_names == ("b", "c")
    assert len(read_inputs(tmp_path, MODEL).names) == 30
    # Nothing of training is in test either.
    folder(tmp_path / "s" / "train", 20)
    (tmp_path / "s" / "test").symlink_to("train")
    assert size(load_data(f"folder:{tmp_path / 's'}")) == 20


def test_images_that_only_links_name_are_found(tmp_path):
    folder(tmp_path / "c", 15)
    (tmp_path / "blobs").mkdir()  # as caches keep them, by hashes without an ending
    for k, path in enumerate(sorted((tmp_path / "c").iterdir())):
        path.symlink_to(path.rename(tmp_path / "blobs" / f"{k:x}"))
    assert len(read_inputs(tmp_path, MODEL).names) == 15


def test_unreadable_parts_are_named_or_said(tmp_path, monkeypatch):
    folder(tmp_path / "cat")
    folder(tmp_path / "dog")
    folder(tmp_path / "eel")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert f"{tmp_path / 'dog'}: cannot be read (Permission denied); skip-bad" in refusal(f"folder:{tmp_path}")
    with pytest.raises(UserError, match="dog: cannot be read"):
        read_inputs(tmp_path, MODEL)
    assert "dog: cannot be read" in read_inputs(tmp_path, MODEL, DataOptions(skip_bad=True)).notes[0]
    source = load_data(f"folder:{tmp_path}", skip_bad=True)
    assert source.class_names == ("cat", "eel") and any("dog: cannot be read" in note for note in source.notes)
    (tmp_path / "cat" / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="dog: cannot be read"):
        read_inputs(tmp_path, ROWS)
    found = read_inputs(tmp_path, ROWS, DataOptions(skip_bad=True))
    assert found.x.tolist() == [[1.0, 2.0]] and any("dog: cannot be read" in note for note in found.notes)
    monkeypatch.undo()
    (tmp_path / "fox").symlink_to(tmp_path / "gone")
    assert f"{tmp_path / 'fox'}: cannot be read" in refusal(f"folder:{tmp_path}")
    (tmp_path / "fox").unlink()
    (tmp_path / "fox").symlink_to("fox")
    assert f"{tmp_path / 'fox'}: cannot be read" in refusal(f"folder:{tmp_path}")


@pytest.mark.parametrize("change", ["larger", "gone", "cut", "deeper"])
def test_files_that_change_after_they_were_listed(tmp_path, monkeypatch, change):
    monkeypatch.setattr("torchcdm.data.source.MEMORY_LIMIT", 0)
    source = load_data(f"folder:{folder(tmp_path)}")
    split = source.train
    path = split.items[3]
    if change == "gone":
        path.unlink()
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:40])
    else:
        new = picture(0, (7, 5)) if change == "larger" else picture().astype(np.uint16)
        Image.fromarray(new).save(path)
    with pytest.raises(UserError, match=str(path)) as caught:
        split.tensors()
    assert str(caught.value).isprintable()
    # A worker's error is the same line.
    batches = Batches(source, 9, 0, labels=False, workers=1)
    with pytest.raises(UserError, match=f"^{path}: "):
        list(batches(0, 1, Levels(), torch.device("cpu")))


class Levels:
    model = torch.nn.Linear(1, 1)

    def draw_levels(self, n, generator):
        return torch.zeros(n, dtype=torch.long)


# --- tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n\xff,3\n", "spreadsheets save it so as 'CSV UTF-8'"),
        (b"a,b\n1,2\n3\n", "line 3 has 1 cells, the first line has 2"),
        (
            b"a,b\n1,2\n" + b"3,4\n" * 20 + b"5,x\ny,2,7\ny,2\n",
            "line 24 has 3 cells, the first line has 2; column 'a', line 25 holds 'y', not a finite number; "
            "column 'b', line 23 holds 'x'",
        ),
        (b"a,b\n1,2\n" + b"9" * 400 + b",3\n", "column 'a', line 3 holds '9999"),
        (b"a,b\n" + b"1,2\n" * 20 + b'"x\ny",3\n', r"column 'a', line 23 holds 'x\ny'"),
        (b"a,b\n1," + b"7" * 200_000 + b"\n", "field larger than field limit"),
        (b"\n\n", "the file is empty"),
        (b"1,2\n", "too few samples, 1"),
    ],
    ids=["bytes", "ragged", "two columns", "huge", "line end", "field", "blank", "one row"],
)
def test_tables_of_wrong_cells(tmp_path, content, message):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    assert message in refusal(f"table:{path}")


def test_columns_of_parquet_files_and_frames_that_are_no_numbers(tmp_path):
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    numbers = np.random.default_rng(0).normal(size=20)
    cells = {"lists": [[1.0]] * 20, "structs": [{"a": 1}] * 20, "bytes": [b"x"] * 20}
    for name, values in cells.items():
        frame = pd.DataFrame({"fine": numbers, name: values})
        frame.to_parquet(tmp_path / "t.parquet")
        assert f"column '{name}', row " in refusal(f"table:{tmp_path / 't.parquet'}")
    huge = pd.Series([10**400] * 20, dtype=object)  # pandas 3.0 would make numbers of a list
    for name, values in {"complex": numbers * 1j, "huge": huge}.items():
        with pytest.raises(UserError, match=f"column '{name}', row "):
            from_object(pd.DataFrame({"fine": numbers, name: values}))
    with pytest.raises(UserError, match="row 1 .* has no label"):
        from_object(pd.DataFrame({"fine": numbers, "kind": ["a", None] * 10}), labels="kind")


# --- Python objects --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.ma.masked_array(np.ones((20, 2)), np.eye(20, 2)), "some values are masked"),
        (np.ones((20, 2)) * 1j, "complex128 are not numbers"),
        (torch.ones(20, 2) * 1j, "complex64 are not numbers"),
        (torch.eye(20).to_sparse(), "not an array of numbers"),
        (torch.empty(20, 2, device="meta"), "not an array of numbers"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "not an array of numbers"),
        (np.random.default_rng(0).normal(size=(20, 1, 2, 2)) * 1e300, "beyond float32"),
        ([[10**400, 1]] * 20, "not an array of numbers"),
    ],
    ids=["masked", "complex", "complex tensor", "sparse", "meta", "nested", "large", "huge"],
)
def test_objects_that_hold_something_else(data, message, recwarn):
    with pytest.raises(UserError, match=message):
        from_object(data)
    with pytest.raises(UserError):
        pair_up(data, data)
    assert not recwarn.list


def test_options_are_checked():
    for fields in ({"sizes": 3}, {"size": (0, 3)}, {"seed": 2**32}, {"test_fraction": float("nan")}, {"limit": "x"}):
        with pytest.raises(UserError, match=next(iter(fields))):
            load_data("digits", **fields)
    assert DataOptions(size=[4, 3]).size == (4, 3)
