"""Named data sets with fixed splits, in the formats in which they are published."""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchcdm.data import tables
from torchcdm.data.arrays import convert_images, read_labels
from torchcdm.data.assembly import Grid, Samples
from torchcdm.data.folders import inspect
from torchcdm.data.images import describe, read_image
from torchcdm.data.options import DataOptions
from torchcdm.data.reading import reading
from torchcdm.data.source import LazySplit, MemorySplit, Split
from torchcdm.data.toys import TOYS
from torchcdm.errors import UserError, nearest
from torchcdm.random import permutation, stream
from torchcdm.units import DataTransform

POOL_SEED = 0
"""Seed of the permutation that parts training from validation. Fixed, so that published numbers compare."""

TOY_SIZES = {"train": 10_000, "validation": 2_000, "test": 2_000}
"""Samples of a toy distribution."""

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

CELEBA_BOX = (25, 57, 153, 185)
"""The 128 x 128 pixels around (89, 121): left, upper, right, lower."""
CELEBA_SIZE, CELEBA_FILE_SIZE = (64, 64), (218, 178)
CELEBA_IMAGES = ("img_align_celeba", "Img/img_align_celeba")
CELEBA_PARTITION = ("list_eval_partition.txt", "Eval/list_eval_partition.txt")


def digits(argument: str, options: DataOptions, _: Any = None) -> Samples:
    """scikit-learn's handwritten digits, 8x8, grey levels 0 ... 16.

    All rows are permuted with a fixed seed: 1300 for training, 200 for validation, 297 for test.
    """
    from sklearn.datasets import load_digits

    if argument:
        raise UserError("'digits' takes nothing after the colon; write: digits")
    data = load_digits()
    pool = MemorySplit(torch.from_numpy(data.images).to(torch.uint8)[:, None], torch.from_numpy(data.target))
    # The rows are ordered by writer: taken as they come, the test split is by other hands than the training split.
    pool = pool.select(permutation(len(pool), POOL_SEED))
    return fixed("digits", pool, 1500, 200, (0, 16), options, tuple(str(k) for k in range(10)))


def wine(argument: str, options: DataOptions, like: DataTransform | None = None) -> Samples:
    """scikit-learn's wine: 178 rows of 13 measured columns, three classes, split at random."""
    from pandas import DataFrame
    from sklearn.datasets import load_wine

    if argument:
        raise UserError("'wine' takes nothing after the colon; write: wine")
    data = load_wine()
    frame = DataFrame(data.data, columns=data.feature_names)
    return tables.samples_of({"train": frame}, "wine", options, data.target, like)


def toy(argument: str, options: DataOptions, _: Any = None) -> Samples:
    """A two-dimensional toy distribution: fresh samples, each split from its own stream of the seed."""
    if argument not in TOYS:
        raise UserError(f"unknown toy '{argument}'; {nearest(argument, TOYS)}")
    chosen = TOYS[argument]
    parts: dict[str, Split] = {
        split: MemorySplit(*chosen.sample(count, stream(options.seed, split))) for split, count in TOY_SIZES.items()
    }
    return Samples(f"toy:{argument}", parts, class_names=tuple(str(k) for k in range(len(chosen.classes))))


def fashion_mnist(argument: str, options: DataOptions, _: Any = None) -> Samples:
    """``fashion-mnist`` or ``fashion-mnist:PATH``: 28x28, 55000 / 5000 / 10000.

    PATH holds the four idx files, packed or not; without it they are looked for in TORCHCDM_DATA and where Debian
    puts them.
    """
    folders = _candidates(argument, "fashion-mnist", (FASHION_SYSTEM_FOLDER,))
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


def cifar10(argument: str, options: DataOptions, _: Any = None) -> Samples:
    """``cifar10`` or ``cifar10:PATH``: 3x32x32, 45000 / 5000 / 10000, from the archive's binary version.

    The Python version of the archive consists of pickles, which can run any code when they are opened: not read.
    """
    folders = _candidates(argument, CIFAR_FOLDER)
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


def celeba(argument: str, options: DataOptions, _: Any = None) -> Samples:
    """``celeba:PATH``: the aligned and cropped images, with the published partition and crop.

    PATH holds ``img_align_celeba`` and ``list_eval_partition.txt``, or ``Img`` and ``Eval``, which hold them.
    Images are cropped and resized to 64 x 64 unless another size is given. Files are read when they are asked for.
    """
    images, listing = _celeba_places(argument)
    paths, absent = _celeba_partition(listing, images)
    if absent and not options.skip_bad:
        raise UserError(f"{images}: {len(absent)} listed file(s) are missing, {absent[0]} first; --skip-bad goes on")
    everything = [path for part in paths for path in part]
    if not paths[0]:
        raise UserError(f"{listing}: no image of the training partition (0) is in {images}")
    if options.skip_bad:
        info, good, notes = inspect(everything, replace(options, size=None))
        paths = [[path for path in part if path in good] for part in paths]
    else:
        # One header stands for all: the archive has one size, and the headers of 200 000 files take minutes.
        info, notes = describe(everything[0]), []
    if info.size != CELEBA_FILE_SIZE:
        raise UserError(f"{everything[0]}: {info}; the aligned and cropped CelebA has 218 x 178 pixels")
    size = options.size or CELEBA_SIZE
    read = partial(read_image, high=info.high, size=size, channels=options.channels, box=CELEBA_BOX)
    parts: dict[str, Split] = {
        split: LazySplit(read, part).in_memory_if_small(len(everything))
        for split, part in zip(("train", "validation", "test"), paths, strict=True)
    }
    if absent:
        notes.append(f"{len(absent)} listed file(s) are missing, {absent[0]} the first.")
    notes.append("cropped to 128 x 128 pixels around (89, 121), resized to {} x {}.".format(*size))
    return Samples("celeba", parts, info.grid, notes=tuple(notes))


def fixed(
    name: str,
    pool: MemorySplit,
    trainable: int,
    validation: int,
    grid: Grid,
    options: DataOptions,
    class_names: tuple[str, ...],
) -> Samples:
    """Samples whose splits are part of the data set, whatever seed and test fraction the options give.

    The ``pool`` holds ``trainable`` samples, of which ``validation`` in number are taken unless the options give a
    fraction, then those of test.
    """
    if options.validation_fraction is not None:
        validation = round(options.validation_fraction * trainable)
    if trainable - validation < 2:
        raise UserError(f"{name}: validation takes {validation} of {trainable} samples; make it smaller")
    pool = MemorySplit(convert_images(pool.x, grid, options), pool.labels)
    order = permutation(trainable, POOL_SEED)
    rows = {"train": order[validation:], "validation": order[:validation], "test": torch.arange(trainable, len(pool))}
    return Samples(name, {split: pool.select(part) for split, part in rows.items()}, grid, class_names)


def read_idx(path: Path) -> np.ndarray:
    """An idx file of bytes, packed with gzip or not, in the shape that its header gives; UserError for any other."""
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


def _candidates(argument: str, folder: str, system: Sequence[str] = ()) -> list[Path]:
    """Where a data set may lie: PATH or its sub-folder ``folder``; without PATH, TORCHCDM_DATA and the system's."""
    root = argument or os.environ.get(DATA_VARIABLE, "")
    found = [Path(root) / folder, Path(root)] if root else []
    return found if argument else [*found, *map(Path, system)]


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


def _celeba_places(argument: str) -> tuple[Path, Path]:
    """The folder of images and the file of the partition."""
    roots = _candidates(argument, "celeba")
    for root in roots:
        images = next((root / name for name in CELEBA_IMAGES if os.path.isdir(root / name)), None)
        listing = next((root / name for name in CELEBA_PARTITION if os.path.isfile(root / name)), None)
        if images and listing:
            return images, listing
    places = " or ".join(map(str, roots)) or "celeba: (no path given)"
    raise UserError(
        f"CelebA not found in {places}: celeba:PATH needs img_align_celeba and list_eval_partition.txt of "
        "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html in PATH"
    )


def _celeba_partition(listing: Path, images: Path) -> tuple[list[list[Path]], list[str]]:
    """Paths of the three splits as the partition file lists them, and the names of listed files that are missing."""
    with reading(listing, "a list of files") as file:
        lines = file.read().decode(errors="replace").splitlines()
    try:
        present = set(os.listdir(images))
    except OSError as error:
        raise UserError(f"{images}: cannot be read ({error.strerror})") from None
    paths: list[list[Path]] = [[], [], []]
    absent, seen = [], set()
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise UserError(f"{listing}: line {number} is not 'FILE.jpg 0|1|2': {line[:60]}")
        if words[0] in seen:
            raise UserError(f"{listing}: line {number} lists {words[0]} a second time")
        seen.add(words[0])
        if words[0] in present:
            paths[int(words[1])].append(images / words[0])
        else:
            absent.append(words[0])
    return paths, absent
