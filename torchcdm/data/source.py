"""What every kind of data becomes: three splits, in data units, and the transform measured on the first.

Nothing here augments, so a likelihood can never be taken on augmented data: the trainer flips its own batches.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from torchcdm.data.options import DataOptions
from torchcdm.errors import UserError, nearest
from torchcdm.random import evenly_spaced, permutation
from torchcdm.units import DataTransform, TableEncoding

MEMORY_LIMIT = 512 * 2**20  # bytes up to which a data set that lies in files is read into memory when it is loaded
FINGERPRINT = 100  # samples of each split that a fingerprint is of
NO_LABEL = -1
Size = tuple[int, int]  # height and width, pixels
Grid = tuple[int, int]  # smallest and largest grey level of integer data; None stands for continuous data


class Split(Dataset, ABC):
    """One split: a map-style data set of ``(x, label)``.

    ``x`` is in data units with the event shape, uint8 or float32; the label is an int, -1 where there is none: they
    are ``labels``, long (N,), or the numbers that each sample is conditional on, float32 (N, q). Empty ones are false.
    """

    def __init__(self, count: int, labels: Tensor | None) -> None:
        labels = torch.full((count,), NO_LABEL) if labels is None else labels
        self.labels = labels if labels.is_floating_point() else labels.long()

    @abstractmethod
    def values(self, indices: Tensor) -> Tensor:
        """The samples at ``indices`` (B,), stacked: (B, *shape)."""

    @abstractmethod
    def select(self, indices: Tensor) -> Split:
        """The split that holds the samples at ``indices``, in that order."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        index = range(len(self))[index]  # IndexError ends iteration over the split
        return self.values(torch.tensor([index]))[0], self.labels[index].tolist()

    def batch(self, indices: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Samples (B, *shape) and labels (B,) at ``indices``: faster than collating single samples. Of crops those at
        random ``places`` in the same images, uniform on [0, 1), (B, 2), where these are given."""
        return self.values(indices), self.labels[indices]

    def tensors(self, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """All samples and labels, or ``limit`` of them evenly spaced through the split."""
        return self.batch(evenly_spaced(len(self), limit))

    def relabelled(self, labels: Tensor) -> Split:
        """The same samples with other labels, long (N,)."""
        result = copy.copy(self)
        result.labels = labels
        return result


@final
class MemorySplit(Split):
    """Samples ``x`` held in memory, data units, (N, *shape), uint8 or float32; ``labels`` as of :class:`Split`."""

    def __init__(self, x: Tensor, labels: Tensor | None = None) -> None:
        super().__init__(len(x), labels)
        self.x = x

    def values(self, indices: Tensor) -> Tensor:
        return self.x[indices]

    def select(self, indices: Tensor) -> MemorySplit:
        return MemorySplit(self.x[indices], self.labels[indices])


class LazySplit(Split):
    """Samples read when they are asked for.

    Args:
        read: Gives the sample of one item, data units, the event shape.
        items: What ``read`` takes, one for each sample: paths, or row numbers.
        labels: Long (N,); none when None.
        name: What the items are of, for messages.
        like: A sample; all others must have its shape and type. The first one when None.
    """

    def __init__(
        self, read: Callable[[Any], Tensor], items: Sequence, labels: Tensor | None = None, name: str = "",
        like: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(len(items), labels)
        self.read, self.items, self.name = read, items, name
        self.like = read(items[0]) if like is None and len(items) else like

    def values(self, indices: Tensor) -> Tensor:
        samples = [self._sample(self.items[i]) for i in indices.tolist()]
        return torch.stack(samples) if samples else torch.empty(0)

    def select(self, indices: Tensor) -> LazySplit:
        result = self.relabelled(self.labels[indices])
        result.items = [self.items[i] for i in indices.tolist()]
        return result

    def in_memory_if_small(self, total: int) -> Split:
        """The samples in memory where ``total`` of them are small, else as they are."""
        return MemorySplit(*self.tensors()) if len(self) and self.is_small(total) else self

    def is_small(self, total: int) -> bool:
        """Whether ``total`` of the samples fit into memory (``MEMORY_LIMIT``)."""
        return total * self.like.nbytes <= MEMORY_LIMIT

    def _sample(self, item: Any) -> Tensor:
        x, like = self.read(item), self.like
        if (x.shape, x.dtype) != (like.shape, like.dtype):
            shapes = f"{tuple(x.shape)}, {x.dtype}; others have {tuple(like.shape)}, {like.dtype}"
            raise UserError(f"{self.name}{item}: has shape {shapes}; give size and channels that all are converted to")
        return x


@final
class CropSplit(LazySplit):
    """Crops of images of any size: as many of each image as fit side by side, evenly spread over it.

    Args:
        read: Gives the image of one path, data units, (C, H, W).
        images: Size of the image of each path.
        crop: Height and width of the crops.
        labels: Class of each image.
    """

    def __init__(self, read: Callable[[Any], Tensor], images: dict[Any, Size], crop: Size, labels: Tensor) -> None:
        places = {path: places_of(size, crop) for path, size in images.items()}
        counts = torch.tensor([len(found) for found in places.values()], dtype=torch.long)
        items = [(path, *place) for path, found in places.items() for place in found]
        super().__init__(read, items, labels.repeat_interleave(counts), like=torch.empty(0))
        # Crops of each image, which overlap, belong into one split.
        self.crop, self.wholes = crop, torch.arange(len(items)).split(counts.tolist())

    def batch(self, indices: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if places is None:
            return super().batch(indices)
        pairs = zip(indices.tolist(), places, strict=True)
        return torch.stack([self._sample(self.items[i], place) for i, place in pairs]), self.labels[indices]

    def _sample(self, item: Any, place: Tensor | None = None) -> Tensor:
        (path, top, left), (height, width) = item, self.crop
        image = self.read(path)
        if place is not None:
            free = torch.tensor([image.shape[1] - height + 1, image.shape[2] - width + 1])
            top, left = (place * free).long().tolist()
        return image[:, top : top + height, left : left + width]


def places_of(size: Size, crop: Size, share: float | None = None) -> list[tuple[int, int]]:
    """Top and left edges of crops evenly spread over an image: as many as fit side by side. With a ``share`` enough to
    cover the image, neighbours at most that of a crop apart."""
    sides = []
    for whole, part in zip(size, crop, strict=True):
        count = whole // part if share is None else 1 + math.ceil((whole - part) / max(1, int(share * part)))
        sides.append(evenly_spaced(whole - part + 1, count).tolist() if count > 1 else [(whole - part) // 2])
    return [(top, left) for top in sides[0] for left in sides[1]]


@dataclass(frozen=True)
class DataSource:
    """A data set ready for training and scoring; ``validation`` and ``test`` may be empty.

    Attributes:
        name: The SPEC it came from, or what kind of object.
        transform: Data units to model units, measured on the training split.
        class_names: Names of the classes 0, 1, ...; None without labels.
        notes: What was read off the data, one sentence each.
        options: How it was read from files, to read it again; None of Python objects.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    transform: DataTransform
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    options: DataOptions | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Event shape: (C, H, W), or (d,)."""
        return self.transform.shape

    @property
    def splits(self) -> dict[str, Split]:
        """Training, validation and test by their names."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def classes(self) -> int | None:
        """Number of classes; None without labels."""
        return None if self.class_names is None else len(self.class_names)

    def split(self, name: str) -> Split:
        """The split called ``train``, ``validation`` or ``test``; UserError for another, or an empty one."""
        if name not in self.splits:
            raise UserError(f"unknown split '{name}'; {nearest(name, self.splits)}")
        if not self.splits[name]:
            full = ", ".join(key for key, split in self.splits.items() if split)
            raise UserError(f"{self.name}: the {name} split is empty; choose from: {full}")
        return self.splits[name]

    def mapped(self, change: Callable[[Split], Split]) -> DataSource:
        """The same source with changed splits, which its options do not know; the transform stays."""
        return replace(self, options=None, **{name: change(split) for name, split in self.splits.items()})


@dataclass(frozen=True)
class Samples:
    """What a reader gives. Fields without a comment are as of :class:`DataSource`."""

    name: str
    parts: dict[str, Split]  # the split ``train``, and ``validation`` and ``test`` where the data have them
    grid: Grid | None = None  # grey levels; None for continuous data
    class_names: tuple[str, ...] | None = None
    table: TableEncoding | None = None  # what the codes of a table are; None elsewhere
    notes: tuple[str, ...] = ()


def split_rows(x: Tensor, alone: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of ``x`` (N, ...) that are held out, two at least, and those to train on, in a random order. Copies of one
    are on one side, unless they are ``alone``, bool (N,). UserError where fewer than two are left."""
    order, seen = permutation(len(x), seed), dict[int, int]()
    rows = x[order] + 0.0  # no -0.0
    first = torch.tensor([seen.setdefault(hash(row.tobytes()), k) for k, row in enumerate(rows.numpy())])
    first = torch.where(alone[order], torch.arange(len(x)), first)
    last = first.sort().values[max(2, round(fraction * len(x))) - 1]
    held_out, kept = order[first <= last], order[first > last]
    if len(kept) < 2:
        raise UserError(f"validation_fraction is {fraction}, which leaves nothing to train on; lower it")
    return held_out, kept


def renumbered(source: DataSource, names: Sequence[str]) -> DataSource:
    """The same source with its classes numbered as those of a model of these ``names``; UserError for any other class.
    Where one side has names and the other bare numbers 0 ... K - 1, as labels of arrays are, these count the names."""
    own = source.class_names
    present = torch.cat([split.labels for split in source.splits.values()]).unique()
    strange = [own[k] for k in present.tolist() if k != NO_LABEL and own[k] not in names]
    if strange:
        if len(own) <= len(names) and (_count(own, names) or _count(names, own)):
            return source
        what = f"class '{strange[0]}' is none of the model's"
        raise UserError(f"{source.name}: {what} ({', '.join(names)}); rename or leave out its samples")
    # Without a label, -1, is the last entry.
    numbers = torch.tensor([names.index(name) if name in names else NO_LABEL for name in own] + [NO_LABEL])
    source = source.mapped(lambda split: split.relabelled(numbers[split.labels]))
    return replace(source, class_names=tuple(names))


def _count(numbers: Sequence[str], names: Sequence[str]) -> bool:
    """Whether ``numbers`` are bare 0 ... K - 1, and ``names`` no numbers at all."""
    bare = list(numbers) == [str(k) for k in range(len(numbers))]
    return bare and not any(name.lstrip("-").isdigit() for name in names)


def fingerprint(source: DataSource) -> str:
    """A hash that tells data apart: units, counts, and ``FINGERPRINT`` evenly spaced samples of every split."""
    digest = hashlib.sha256(json.dumps(source.transform.to_config()).encode())
    for split in source.splits.values():
        x, y = split.tensors(FINGERPRINT)
        digest.update(f"{len(split)} {tuple(x.shape)}".encode())
        digest.update(x.double().contiguous().numpy().tobytes() + y.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def single(x: np.ndarray, name: str) -> Tensor:
    """Finite numbers as float32; UserError where one is beyond."""
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(x, np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"{name}: holds values beyond float32 (3e38); divide them by a constant")
    return shared(values)


def shared(x: np.ndarray) -> Tensor:
    """The same numbers as a tensor, which is never written to: so torch need not warn of arrays that are read only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(x)
