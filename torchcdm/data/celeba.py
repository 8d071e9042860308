"""CelebA with its own partition, cropped as in the published runs."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from torchcdm.data.arrays import source_from_splits
from torchcdm.data.folders import inspect, read_if_small
from torchcdm.data.images import ImageReader
from torchcdm.data.options import DataOptions, Layout
from torchcdm.data.published import candidates
from torchcdm.data.source import NO_LABEL, DataSource, LazySplit
from torchcdm.errors import UserError

CROP = (25, 57, 153, 185)
"""The 128 x 128 pixels around (89, 121): left, upper, right, lower."""

SIZE = (64, 64)
FILE_SIZE = (218, 178)
IMAGES = ("img_align_celeba", "Img/img_align_celeba")
PARTITION = ("list_eval_partition.txt", "Eval/list_eval_partition.txt")


def celeba(argument: str, options: DataOptions, layout: Layout | None = None) -> DataSource:
    """``celeba:PATH``: the aligned and cropped images; training, validation and test as published.

    PATH holds ``img_align_celeba`` and ``list_eval_partition.txt``, or ``Img`` and ``Eval``, which hold them.
    Images are cropped and resized to 64 x 64 unless another size is given. Files are read when they are asked for.
    """
    images, listing = _places(argument)
    paths, absent = _partition(listing, images)
    if absent and not options.skip_bad:
        raise UserError(f"{images}: {len(absent)} listed file(s) are missing, {absent[0]} first; --skip-bad goes on")
    everything = [path for part in paths for path in part]
    if not paths[0]:
        raise UserError(f"{listing}: no image of the training partition (0) is in {images}")
    # One header stands for all: the archive has one size, and the headers of 200 000 files take minutes.
    found = inspect(everything if options.skip_bad else everything[:1], options)
    info, notes = found.info, list(found.left_out)
    if info.size != FILE_SIZE:
        raise UserError(f"{everything[0]}: {info}; the aligned and cropped CelebA has 218 x 178 pixels")
    size = options.size or SIZE
    reader = ImageReader(info.high, size, options.channels, CROP)
    splits = []
    for part in paths:
        kept = [path for path in part if path in found.good] if options.skip_bad else part
        split = LazySplit(reader, kept, torch.full((len(kept),), NO_LABEL))
        splits.append(read_if_small(split, len(everything)))
    if absent:
        notes.append(f"{len(absent)} listed file(s) are missing, {absent[0]} the first.")
    notes.append("cropped to 128 x 128 pixels around (89, 121), resized to {} x {}.".format(*size))
    notes.append("split as published: {} for training, {} for validation, {} for test.".format(*map(len, splits)))
    train, validation, test = splits
    return source_from_splits("celeba", (train, validation, test), info.grid, options, notes=notes, layout=layout)


def _places(argument: str) -> tuple[Path, Path]:
    """The folder of images and the file of the partition."""
    roots = candidates(argument, "celeba")
    for root in roots:
        images = next((root / name for name in IMAGES if (root / name).is_dir()), None)
        listing = next((root / name for name in PARTITION if (root / name).is_file()), None)
        if images and listing:
            return images, listing
    places = " or ".join(map(str, roots)) or "celeba: (no path given)"
    raise UserError(
        f"CelebA not found in {places}: celeba:PATH needs img_align_celeba and list_eval_partition.txt of "
        "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html in PATH"
    )


def _partition(listing: Path, images: Path) -> tuple[list[list[Path]], list[str]]:
    """Paths of the three splits as the partition file lists them, and the names of listed files that are missing."""
    present = set(os.listdir(images))
    paths: list[list[Path]] = [[], [], []]
    absent = []
    for number, line in enumerate(listing.read_text(errors="replace").splitlines(), 1):
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
