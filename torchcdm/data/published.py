"""Fashion-MNIST and CIFAR-10 in the files in which they are distributed; splits are fixed."""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from torchcdm.data.arrays import read_labels
from torchcdm.data.assembly import Samples
from torchcdm.data.named import fixed
from torchcdm.data.options import DataOptions, Layout
from torchcdm.data.reading import reading
from torchcdm.data.source import MemorySplit
from torchcdm.errors import UserError

DATA_VARIABLE = "TORCHCDM_DATA"
"""Environment variable that names a folder with data sets."""

FASHION_SYSTEM_FOLDER = "/usr/share/datasets/fashion-mnist"
FASHION_FILES = {"train": "train", "test": "t10k"}
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

CIFAR_FOLDER = "cifar-10-batches-bin"
CIFAR_FILES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
CIFAR_RECORD = 1 + 3 * 32 * 32
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def fashion_mnist(argument: str, options: DataOptions, _: Layout | None = None) -> Samples:
    """``fashion-mnist`` or ``fashion-mnist:PATH``: 28x28, 55000 / 5000 / 10000.

    PATH holds the four idx files, packed or not; without it they are looked for in TORCHCDM_DATA and where Debian
    puts them.
    """
    folders = candidates(argument, "fashion-mnist", (FASHION_SYSTEM_FOLDER,))
    folder = next((f for f in folders if os.path.exists(_idx_path(f, "train-images-idx3-ubyte"))), None)
    if folder is None:
        raise UserError(
            f"Fashion-MNIST not found in {' or '.join(map(str, folders))}: install Debian's dataset-fashion-mnist, or "
            f"name the folder of its four idx files by fashion-mnist:PATH or by the variable {DATA_VARIABLE}"
        )
    images, labels = [], []
    for prefix in FASHION_FILES.values():
        images.append(read_idx(_idx_path(folder, f"{prefix}-images-idx3-ubyte")))
        labels.append(read_idx(_idx_path(folder, f"{prefix}-labels-idx1-ubyte")))
        if images[-1].ndim != 3 or labels[-1].shape != images[-1].shape[:1]:
            shapes = f"{images[-1].shape} and {labels[-1].shape}"
            raise UserError(f"{folder}: the {prefix} images and labels do not belong together ({shapes})")
        read_labels(labels[-1], [len(labels[-1])], f"{folder}, {prefix}", FASHION_CLASSES)
    pool = MemorySplit(torch.from_numpy(np.concatenate(images))[:, None], torch.from_numpy(np.concatenate(labels)))
    trainable = len(images[0])
    return fixed("fashion-mnist", pool, trainable, trainable // 12, (0, 255), options, FASHION_CLASSES)


def cifar10(argument: str, options: DataOptions, _: Layout | None = None) -> Samples:
    """``cifar10`` or ``cifar10:PATH``: 3x32x32, 45000 / 5000 / 10000, from the archive's binary version.

    The Python version of the archive consists of pickles, which can run any code when they are opened: not read.
    """
    folders = candidates(argument, CIFAR_FOLDER)
    folder = next((f for f in folders if os.path.isfile(f / CIFAR_FILES[0])), None)
    if folder is None:
        pickled = any(os.path.exists(f / name) for f in folders for name in ("data_batch_1", "cifar-10-batches-py"))
        found = "only the Python version is there, whose pickles are not opened" if pickled else "not found"
        places = " or ".join(map(str, folders)) or f"{DATA_VARIABLE} (not set)"
        raise UserError(
            f"CIFAR-10 in {places}: {found}; unpack cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html"
            " and name its folder by cifar10:PATH"
        )
    batches = [_read_cifar(folder / name) for name in CIFAR_FILES]
    records = np.concatenate(batches)
    pool = MemorySplit(torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32)), torch.from_numpy(records[:, 0]))
    trainable = len(records) - len(batches[-1])
    return fixed("cifar10", pool, trainable, trainable // 10, (0, 255), options, CIFAR_CLASSES)


def candidates(argument: str, folder: str, system: Sequence[str] = ()) -> list[Path]:
    """Where a data set may lie: PATH or its sub-folder ``folder``; without PATH, TORCHCDM_DATA and the system's."""
    root = argument or os.environ.get(DATA_VARIABLE, "")
    found = [Path(root) / folder, Path(root)] if root else []
    return found if argument else [*found, *map(Path, system)]


def read_idx(path: Path) -> np.ndarray:
    """An idx file of bytes, packed with gzip or not: the shape that its header gives.

    Raises:
        UserError: Not an idx file of unsigned bytes, or another length than the header says.
    """
    with reading(path, "an idx file", "; fetch the file again") as raw:
        size = os.fstat(raw.fileno()).st_size
        file = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        magic = file.read(4)
        if len(magic) < 4 or magic[:3] != b"\0\0\x08":
            raise ValueError("not an idx file of unsigned bytes")
        shape = tuple(np.frombuffer(file.read(4 * magic[3]), ">u4", magic[3]).tolist())
        content = file.read()
        if not shape or len(content) != math.prod(shape):
            raise ValueError(f"truncated: {size} bytes do not hold the shape {shape} of the header")
    return np.frombuffer(bytearray(content), np.uint8).reshape(shape)


def _idx_path(folder: Path, name: str) -> Path:
    """The packed file, or else the plain one where it is there."""
    packed, plain = folder / f"{name}.gz", folder / name
    return plain if os.path.exists(plain) and not os.path.exists(packed) else packed


def _read_cifar(path: Path) -> np.ndarray:
    """Records (N, 3073) of a binary batch: label, then 1024 bytes each of red, green and blue."""
    with reading(path, "a batch of CIFAR-10", f"; the binary version has {', '.join(CIFAR_FILES)}") as file:
        content = np.frombuffer(bytearray(file.read()), np.uint8)
    if len(content) == 0 or len(content) % CIFAR_RECORD:
        raise UserError(f"{path}: truncated: {len(content)} bytes are not whole records of {CIFAR_RECORD}")
    records = content.reshape(-1, CIFAR_RECORD)
    if records[:, 0].max() > 9:
        wrong = int(np.argmax(records[:, 0] > 9))
        raise UserError(f"{path}: label {records[wrong, 0]} of record {wrong} is out of range 0 ... 9")
    return records
