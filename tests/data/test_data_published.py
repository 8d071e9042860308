"""Published data sets in the files in which they are distributed: small files written here, byte by byte."""

import gzip

import numpy as np
import pytest
import torch
from PIL import Image
from published_data import idx, write_celeba, write_cifar, write_fashion

from torchcdm.data import LazySplit, load_data
from torchcdm.data.named import CIFAR_CLASSES, SYSTEM_FOLDERS
from torchcdm.errors import UserError


@pytest.fixture(autouse=True)
def no_data_variable(monkeypatch):
    monkeypatch.delenv("TORCHCDM_DATA", raising=False)


def one_line(spec, **options):
    """The message with which the SPEC is refused."""
    with pytest.raises(UserError) as caught:
        load_data(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def as_rows(x):
    return [tuple(row) for row in torch.as_tensor(x).flatten(1).tolist()]


# --- Fashion-MNIST ---------------------------------------------------------------------------------------------


def test_fashion_mnist_reads_what_the_idx_files_hold(tmp_path):
    parts = write_fashion(tmp_path)
    source = load_data(f"fashion-mnist:{tmp_path}")
    assert [len(source.train), len(source.validation), len(source.test)] == [55, 5, 10]
    assert source.shape == (1, 28, 28) and source.class_names[9] == "Ankle boot"
    x, y = source.test.tensors()
    assert x.dtype == torch.uint8 and np.array_equal(x[:, 0], parts["t10k"][0]) and np.array_equal(y, parts["t10k"][1])
    labels = dict(zip(as_rows(parts["train"][0]), parts["train"][1].tolist(), strict=True))
    together = torch.cat([source.train.x, source.validation.x])
    assert sorted(as_rows(together)) == sorted(labels)
    assert all(labels[tuple(x.flatten().tolist())] == y for x, y in source.train)


def test_fashion_mnist_is_found_by_variable_and_unpacked(tmp_path, monkeypatch):
    parts = write_fashion(tmp_path / "fashion-mnist", pack=bytes, suffix="")
    monkeypatch.setenv("TORCHCDM_DATA", str(tmp_path))
    assert np.array_equal(load_data("fashion-mnist").test.x[:, 0], parts["t10k"][0])


def test_fashion_mnist_missing_files_say_where_to_get_them(tmp_path):
    message = one_line(f"fashion-mnist:{tmp_path}")
    assert str(tmp_path) in message and "dataset-fashion-mnist" in message and "TORCHCDM_DATA" in message
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    assert "t10k-labels-idx1-ubyte.gz: no such file" in one_line(f"fashion-mnist:{tmp_path}")


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[: len(packed) // 2],
        lambda packed: gzip.compress(gzip.decompress(packed)[:-1]),
        lambda packed: gzip.compress(gzip.decompress(packed) + b"\0"),
        lambda packed: gzip.compress(gzip.decompress(packed)[:7]),
    ],
    ids=["gzip", "short", "long", "header"],
)
def test_truncated_idx_file_is_named(tmp_path, damage):
    write_fashion(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    message = one_line(f"fashion-mnist:{tmp_path}")
    assert message.startswith(f"{path}: cannot be read as an idx file (")


def test_wrong_idx_content_is_named(tmp_path):
    write_fashion(tmp_path)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    good = path.read_bytes()
    path.write_bytes(gzip.compress(b"<html>not found</html>"))
    assert f"{path}: cannot be read as an idx file (not an idx file" in one_line(f"fashion-mnist:{tmp_path}")
    path.write_bytes(gzip.compress(idx(np.zeros(59, np.uint8))))
    assert "images and labels do not belong together" in one_line(f"fashion-mnist:{tmp_path}")
    labels = np.frombuffer(gzip.decompress(good), np.uint8, offset=8).copy()
    labels[7] = 10
    path.write_bytes(gzip.compress(idx(labels)))
    assert "label 10 of sample 7 is out of range; classes are numbered 0 ... 9" in one_line(
        f"fashion-mnist:{tmp_path}"
    )


def test_fashion_mnist_of_the_system():
    try:
        source = load_data("fashion-mnist")
    except UserError:
        pytest.skip(f"no Fashion-MNIST in {SYSTEM_FOLDERS}")
    assert [len(source.train), len(source.validation), len(source.test)] == [55000, 5000, 10000]
    # Published facts of the data set: every class 6000 times in training, 1000 times in test; mean 0.2860 of 255.
    assert torch.cat([source.train.labels, source.validation.labels]).bincount().tolist() == [6000] * 10
    assert source.test.labels.bincount().tolist() == [1000] * 10
    x = torch.cat([source.train.x, source.validation.x])
    mean = float(x.double().mean()) / 255
    assert mean == pytest.approx(0.2860, abs=5e-5)


# --- CIFAR-10 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["folder", "parent", "variable"])
def test_cifar10_reads_what_the_binary_batches_hold(tmp_path, monkeypatch, where):
    folder = tmp_path / "cifar-10-batches-bin"
    batches = write_cifar(folder)
    spec = {"folder": f"cifar10:{folder}", "parent": f"cifar10:{tmp_path}", "variable": "cifar10"}[where]
    if where == "variable":
        monkeypatch.setenv("TORCHCDM_DATA", str(tmp_path))
    source = load_data(spec)
    assert [len(source.train), len(source.validation), len(source.test)] == [90, 10, 20]
    images, labels = batches.pop("test_batch.bin")
    assert np.array_equal(source.test.x, images) and np.array_equal(source.test.labels, labels)
    labelled = {
        row: label for images, labels in batches.values() for row, label in zip(as_rows(images), labels, strict=True)
    }
    read = [*source.train, *source.validation]
    assert {tuple(x.flatten().tolist()): y for x, y in read} == labelled
    assert source.class_names == CIFAR_CLASSES and source.class_names[6] == "frog"


def test_cifar10_pickles_are_not_opened(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"\x80\x02}")
    for path in (tmp_path, folder):
        message = one_line(f"cifar10:{path}")
        assert "pickles" in message and "cifar-10-binary.tar.gz" in message
    assert "cifar-10-binary.tar.gz" in one_line("cifar10")


def test_damaged_cifar10_is_named(tmp_path):
    write_cifar(tmp_path)
    path = tmp_path / "data_batch_3.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert f"{path}: cannot be read as a batch of CIFAR-10 (" in one_line(f"cifar10:{tmp_path}")
    path.write_bytes(content[:3073] + b"\x0a" + content[3074:])
    assert f"{path}: label 10 of sample 1 is out of range" in one_line(f"cifar10:{tmp_path}")
    path.unlink()
    assert f"{path}: no such file" in one_line(f"cifar10:{tmp_path}")


# --- CelebA ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_celeba_crop_resize_and_partition(tmp_path, nested):
    write_celeba(tmp_path, nested=nested)
    source = load_data(f"celeba:{tmp_path}")
    assert source.shape == (3, 64, 64) and source.transform.bin == 1 and source.classes is None
    numbers = [
        [round(float(x[2].float().mean()) / 20) for x, _ in split]
        for split in (source.train, source.validation, source.test)
    ]
    assert numbers == [list(range(8)), [8, 9], [10, 11]]
    x, label = source.train[0]
    assert label == -1
    # 128 x 128 pixels around column 89, row 121, halved: pixel i averages the originals around 25 + 2 i + 1/2.
    inner = torch.arange(2, 62)
    assert torch.allclose(x[0].float()[:, inner].mean(0), 25.5 + 2 * inner, atol=1)
    assert torch.allclose(x[1].float()[inner].mean(1), 57.5 + 2 * inner, atol=1)


def test_celeba_at_the_size_of_the_crop_is_the_crop(tmp_path):
    images, _ = write_celeba(tmp_path)
    x = load_data(f"celeba:{tmp_path}", size=(128, 128)).train[3][0]
    original = np.asarray(Image.open(images / "000004.jpg"))
    assert np.array_equal(x.numpy(), np.moveaxis(original[121 - 64 : 121 + 64, 89 - 64 : 89 + 64], 2, 0))


def test_large_celeba_is_read_when_asked(tmp_path, monkeypatch):
    write_celeba(tmp_path)
    whole = load_data(f"celeba:{tmp_path}")
    monkeypatch.setattr("torchcdm.data.source.MEMORY_LIMIT", 0)
    lazy = load_data(f"celeba:{tmp_path}")
    assert isinstance(lazy.train, LazySplit)
    assert torch.equal(lazy.train.batch(torch.tensor([5, 0]))[0], whole.train.x[[5, 0]])


def test_celeba_damage_is_named(tmp_path):
    images, listing = write_celeba(tmp_path)
    spec = f"celeba:{tmp_path}"
    (images / "000002.jpg").write_bytes((images / "000002.jpg").read_bytes()[:4000])
    assert f"{images / '000002.jpg'}: cannot be read as an image" in one_line(spec)
    (images / "000003.jpg").unlink()
    assert "1 listed file(s) are missing, 000003.jpg" in one_line(spec)
    source = load_data(spec, skip_bad=True)
    assert len(source.train) == 6
    assert any("1 file(s) that cannot be used are left out" in note and "000002.jpg" in note for note in source.notes)
    assert any("missing, 000003.jpg" in note for note in source.notes)
    listing.write_text("000001.jpg 0\n000002.jpg train\n")
    assert f"{listing}: line 2 is not" in one_line(spec)
    listing.unlink()
    assert f"{listing}: no such file" in one_line(spec)


def test_celeba_that_is_not_aligned_is_refused(tmp_path):
    images, _ = write_celeba(tmp_path)
    Image.new("RGB", (409, 687)).save(images / "000001.jpg")
    assert "687 x 409 pixels" in one_line(f"celeba:{tmp_path}")
