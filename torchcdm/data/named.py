"""Named data sets with fixed splits, in the formats in which they are published."""

import gzip
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchcdm.data import tables
from torchcdm.data.arrays import convert_images, read_labels
from torchcdm.data.folders import inspect
from torchcdm.data.images import describe, read_image
from torchcdm.data.options import DataOptions
from torchcdm.data.source import LazySplit, MemorySplit, Samples, Split
from torchcdm.errors import UserError, nearest
from torchcdm.random import permutation, stream
from torchcdm.runtime.reading import reading
from torchcdm.units import DataTransform

POOL_SEED = 0  # seed of the permutation that parts training from validation, fixed so that published numbers compare
TOY_SIZES = {"train": 10_000, "validation": 2_000, "test": 2_000}  # samples of a toy distribution
DATA_VARIABLE = "TORCHCDM_DATA"  # environment variable that names a folder with data sets
SYSTEM_FOLDERS = {"fashion-mnist": "/usr/share/datasets/fashion-mnist"}

_IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
FASHION_FILES = [(f"{name}-ubyte.gz", f"{name}-ubyte") for name in _IDX]
_CLASSES = "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"
FASHION_CLASSES = tuple(_CLASSES.split(", "))

CIFAR_FOLDER = "cifar-10-batches-bin"
CIFAR_FILES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

CELEBA_BOX = (25, 57, 153, 185)  # the 128 x 128 pixels around (89, 121): left, upper, right, lower
CELEBA_SIZE, CELEBA_FILE_SIZE = (64, 64), (218, 178)
CELEBA_IMAGES = ("img_align_celeba", "Img/img_align_celeba")
CELEBA_PARTITION = ("list_eval_partition.txt", "Eval/list_eval_partition.txt")


def digits(argument: str, options: DataOptions, _: Any = None) -> Samples:
    """scikit-learn's handwritten digits, 8x8, grey levels 0 ... 16, in a fixed random order: 1300 / 200 / 297."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pool = MemorySplit(torch.from_numpy(data.images).to(torch.uint8)[:, None], torch.from_numpy(data.target))
    # The rows are ordered by writer: taken as they come, the test split is by other hands than the training split.
    pool = pool.select(permutation(len(pool), POOL_SEED))
    return fixed("digits", pool, (1500, 200), 16, options, [str(k) for k in range(10)])


def wine(argument: str, options: DataOptions, like: DataTransform | None = None) -> Samples:
    """scikit-learn's wine: 178 rows of 13 measured columns, three classes, split at random."""
    from sklearn.datasets import load_wine

    frame, classes = load_wine(return_X_y=True, as_frame=True)
    return tables.samples_of({"train": frame}, "wine", options, classes, like)


def toy(argument: str, options: DataOptions, _: Any = None) -> Samples:
    """A two-dimensional toy distribution: fresh samples, each split from its own stream of the seed."""
    if argument not in TOYS:
        raise UserError(f"unknown toy '{argument}'; {nearest(argument, TOYS)}")
    chosen = TOYS[argument]
    drawn = {split: chosen.sample(count, stream(options.seed, split)) for split, count in TOY_SIZES.items()}
    parts: dict[str, Split] = {split: MemorySplit(*pair) for split, pair in drawn.items()}
    return Samples(f"toy:{argument}", parts, class_names=tuple(str(k) for k in range(len(chosen.classes))))


def fashion_mnist(argument: str, options: DataOptions, _: Any = None) -> Samples:
    """``fashion-mnist`` or ``fashion-mnist:PATH`` of its idx files, packed or not: 28x28, 55000 / 5000 / 10000."""
    mend = "install Debian's dataset-fashion-mnist, or name the folder of its four idx files"
    paths = _located(argument, "fashion-mnist", FASHION_FILES, mend)
    images, labels = [read_idx(path) for path in paths[::2]], [read_idx(path) for path in paths[1::2]]
    for path, x, y in zip(paths[1::2], images, labels, strict=True):
        if x.ndim != 3 or y.shape != x.shape[:1]:
            raise UserError(f"{path}: images and labels do not belong together ({x.shape} and {y.shape})")
        read_labels(y, [len(y)], str(path), FASHION_CLASSES)
    pool = MemorySplit(torch.from_numpy(np.concatenate(images))[:, None], torch.from_numpy(np.concatenate(labels)))
    trainable = len(images[0])
    return fixed("fashion-mnist", pool, (trainable, trainable // 12), 255, options, FASHION_CLASSES)


def cifar10(argument: str, options: DataOptions, _: Any = None) -> Samples:
    """``cifar10`` or ``cifar10:PATH``: 3x32x32, 45000 / 5000 / 10000, from the archive's binary version. The Python
    version of the archive consists of pickles, which can run any code when they are opened: not read."""
    archive = "cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html"
    mend = f"unpack {archive} (the pickles of the Python version are not opened), and name its folder"
    paths = _located(argument, CIFAR_FOLDER, [(name,) for name in CIFAR_FILES], mend)
    batches = []
    for path in paths:
        with reading(path, "a batch of CIFAR-10", f"; the binary version has {', '.join(CIFAR_FILES)}") as file:
            # A record is a label, then 1024 bytes each of red, green and blue.
            batches.append(np.frombuffer(bytearray(file.read()), np.uint8).reshape(-1, 1 + 3 * 32 * 32))
        read_labels(batches[-1][:, 0], [len(batches[-1])], str(path), CIFAR_CLASSES)
    records = np.concatenate(batches)
    pool = MemorySplit(torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32)), torch.from_numpy(records[:, 0]))
    trainable = len(records) - len(batches[-1])
    return fixed("cifar10", pool, (trainable, trainable // 10), 255, options, CIFAR_CLASSES)


def celeba(argument: str, options: DataOptions, _: Any = None) -> Samples:
    """``celeba:PATH``: the aligned and cropped images, with the published partition and crop, 64 x 64 by default. PATH
    holds ``img_align_celeba`` and ``list_eval_partition.txt``, or ``Img`` and ``Eval``, which hold them."""
    address = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
    mend = f"name the folder of img_align_celeba and list_eval_partition.txt of {address}"
    images, listing = _located(argument, "celeba", [CELEBA_IMAGES, CELEBA_PARTITION], mend)
    paths, absent = _celeba_partition(listing, images)
    if absent and not options.skip_bad:
        raise UserError(f"{images}: {len(absent)} listed file(s) are missing, {absent[0]} first; skip-bad goes on")
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
    splits = [LazySplit(read, part).in_memory_if_small(len(everything)) for part in paths]
    parts = dict(zip(("train", "validation", "test"), splits, strict=True))
    notes += [f"{len(absent)} listed file(s) are missing, {absent[0]} the first."] if absent else []
    notes.append("cropped to 128 x 128 pixels around (89, 121), resized to {} x {}.".format(*size))
    return Samples("celeba", parts, info.grid, notes=tuple(notes))


def fixed(
    name: str, pool: MemorySplit, counts: tuple[int, int], high: int, options: DataOptions, names: Sequence[str]
) -> Samples:
    """Samples whose splits are part of the data set, whatever seed and test fraction the options give. ``counts``: the
    first samples of the ``pool``, for training, and how many of them validate unless options say it."""
    (trainable, validation), grid = counts, (0, high)
    if options.validation_fraction is not None:
        validation = round(options.validation_fraction * trainable)
    if trainable - validation < 2:
        raise UserError(f"{name}: validation takes {validation} of {trainable} samples; make it smaller")
    pool = MemorySplit(convert_images(pool.x, grid, options), pool.labels)
    order = permutation(trainable, POOL_SEED)
    rows = {"train": order[validation:], "validation": order[:validation], "test": torch.arange(trainable, len(pool))}
    return Samples(name, {split: pool.select(part) for split, part in rows.items()}, grid, tuple(names))


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


def _located(argument: str, name: str, files: Sequence[Sequence[str]], mend: str) -> list[Path]:
    """The files of a data set in PATH or its sub-folder ``name``; without PATH, in TORCHCDM_DATA or a system's folder.
    Each by the first of its names that is there, or its first name."""
    root = argument or os.environ.get(DATA_VARIABLE, "")
    places = [Path(root) / name, Path(root)] if root else []
    places += [Path(SYSTEM_FOLDERS[name])] if not argument and name in SYSTEM_FOLDERS else []
    for place in places:
        found = [[place / name for name in names if os.path.exists(place / name)] for names in files]
        if found[0]:
            return [there[0] if there else place / names[0] for there, names in zip(found, files, strict=True)]
    looked = " or ".join(map(str, places)) or f"{DATA_VARIABLE} (not set)"
    raise UserError(f"{name} not found in {looked}: {mend} by {name}:PATH or by the variable {DATA_VARIABLE}")


def _celeba_partition(listing: Path, images: Path) -> tuple[list[list[Path]], list[str]]:
    """Paths of the three splits as the partition file lists them, and the names of listed files that are missing."""
    with reading(listing, "a list of files") as file:
        lines, present = file.read().decode(errors="replace").splitlines(), set(os.listdir(images))
    paths: list[list[Path]] = [[], [], []]
    absent = []
    for number, line in enumerate(lines, 1):
        match line.split():
            case [name, ("0" | "1" | "2") as split] if name in present:
                paths[int(split)].append(images / name)
            case [name, "0" | "1" | "2"]:
                absent.append(name)
            case [_, *_]:
                raise UserError(f"{listing}: line {number} is not 'FILE.jpg 0|1|2': {line[:60]}")
    return paths, absent


@dataclass(frozen=True)
class Toy:
    """A toy distribution in the plane, as likely in each class: Gaussians along curves."""

    classes: list[Tensor]  # their middles, float64 (K, 2) each; closer than 1.3 deviations the sum is smooth to 1e-4
    deviation: float

    @property
    def labels(self) -> Tensor:
        """The class of each point, long (K,)."""
        return torch.arange(len(self.classes)).repeat_interleave(torch.tensor([len(part) for part in self.classes]))

    @property
    def weights(self) -> Tensor:
        """Weights of the points, (K,); they sum to one."""
        return torch.cat([torch.full((len(part),), 1 / len(part)) for part in self.classes]) / len(self.classes)

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draws x, float32 (n, 2), and their classes, long (n,)."""
        chosen = torch.multinomial(self.weights.double(), n, replacement=True, generator=generator)
        noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        return (torch.cat(self.classes)[chosen] + self.deviation * noise).float(), self.labels[chosen]


def _polar(radius: float, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def _fractions(n: int) -> Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


_MOON = _polar(1.0, math.pi * _fractions(32)) - torch.tensor([0.5, 0.25], dtype=torch.float64)
_MODES = _polar(2.0, 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8)

TOYS = {
    "two-moons": Toy([_MOON, -_MOON], 0.08),
    "rings": Toy([_polar(0.7 * k, 2 * math.pi * _fractions(50 * k)) for k in (1, 2, 3)], 0.07),
    "eight-gaussians": Toy(list(_MODES[:, None]), 0.2),
}
