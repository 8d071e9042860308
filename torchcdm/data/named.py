"""Named data sets with fixed splits, in the formats in which they are published."""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Callable, Sequence
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

    data = load_digits()
    pool = MemorySplit(torch.from_numpy(data.images).to(torch.uint8)[:, None], torch.from_numpy(data.target))
    # The rows are ordered by writer: taken as they come, the test split is by other hands than the training split.
    pool = pool.select(permutation(len(pool), POOL_SEED))
    return fixed("digits", pool, 1500, 200, (0, 16), options, tuple(str(k) for k in range(10)))


def wine(argument: str, options: DataOptions, like: DataTransform | None = None) -> Samples:
    """scikit-learn's wine: 178 rows of 13 measured columns, three classes, split at random."""
    from pandas import DataFrame
    from sklearn.datasets import load_wine

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
    folder = _located(
        argument, "fashion-mnist", lambda place: os.path.exists(_idx_path(place, "train-images-idx3-ubyte")),
        "install Debian's dataset-fashion-mnist, or name the folder of its four idx files", (FASHION_SYSTEM_FOLDER,),
    )  # fmt: skip
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
    folder = _located(
        argument, CIFAR_FOLDER, lambda place: os.path.isfile(place / CIFAR_FILES[0]),
        "unpack cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html (the pickles of the Python "
        "version are not opened), and name its folder",
    )  # fmt: skip
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
    root = _located(
        argument, "celeba", lambda place: _first(place, CELEBA_IMAGES) and _first(place, CELEBA_PARTITION),
        "name the folder of img_align_celeba and list_eval_partition.txt of "
        "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    )  # fmt: skip
    images, listing = _first(root, CELEBA_IMAGES), _first(root, CELEBA_PARTITION)
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
    read = partial(read_image, size=size, channels=options.channels, box=CELEBA_BOX)
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


def _located(
    argument: str, name: str, is_there: Callable[[Path], Any], mend: str, system: Sequence[str] = ()
) -> Path:
    """Where a data set lies: PATH or its sub-folder ``name``; without PATH, in TORCHCDM_DATA or the system's."""
    root = argument or os.environ.get(DATA_VARIABLE, "")
    places = [Path(root) / name, Path(root)] if root else []
    places += [] if argument else map(Path, system)
    for place in places:
        if is_there(place):
            return place
    looked = " or ".join(map(str, places)) or f"{DATA_VARIABLE} (not set)"
    raise UserError(f"{name} not found in {looked}: {mend} by SPEC:PATH or by the variable {DATA_VARIABLE}")


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of the paths below a folder that is there."""
    return next((folder / name for name in names if os.path.exists(folder / name)), None)


def _idx_path(folder: Path, name: str) -> Path:
    """The packed file, or else the plain one where it is there."""
    return _first(folder, (f"{name}.gz", name)) or folder / f"{name}.gz"


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


def _celeba_partition(listing: Path, images: Path) -> tuple[list[list[Path]], list[str]]:
    """Paths of the three splits as the partition file lists them, and the names of listed files that are missing."""
    with reading(listing, "a list of files") as file:
        lines = file.read().decode(errors="replace").splitlines()
    try:
        present = set(os.listdir(images))
    except OSError as error:
        raise UserError(f"{images}: cannot be read ({error.strerror})") from None
    paths: list[list[Path]] = [[], [], []]
    absent = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise UserError(f"{listing}: line {number} is not 'FILE.jpg 0|1|2': {line[:60]}")
        if words[0] in present:
            paths[int(words[1])].append(images / words[0])
        else:
            absent.append(words[0])
    return paths, absent
