"""CelebA with its own partition, cropped as in the published runs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from torchcdm.data.assembly import Samples
from torchcdm.data.folders import inspect
from torchcdm.data.images import ImageReader, describe
from torchcdm.data.options import DataOptions, Layout
from torchcdm.data.published import candidates
from torchcdm.data.reading import reading
from torchcdm.data.source import LazySplit, Split
from torchcdm.errors import UserError

CROP = (25, 57, 153, 185)
"""The 128 x 128 pixels around (89, 121): left, upper, right, lower."""

SIZE = (64, 64)
FILE_SIZE = (218, 178)
IMAGES = ("img_align_celeba", "Img/img_align_celeba")
PARTITION = ("list_eval_partition.txt", "Eval/list_eval_partition.txt")


def celeba(argument: str, options: DataOptions, _: Layout | None = None) -> Samples:
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
    if options.skip_bad:
        info, good, notes = inspect(everything, replace(options, size=None))
        paths = [[path for path in part if path in good] for part in paths]
    else:
        # One header stands for all: the archive has one size, and the headers of 200 000 files take minutes.
        info, notes = describe(everything[0]), []
    if info.size != FILE_SIZE:
        raise UserError(f"{everything[0]}: {info}; the aligned and cropped CelebA has 218 x 178 pixels")
    size = options.size or SIZE
    reader = ImageReader(info.high, size, options.channels, CROP)
    parts: dict[str, Split] = {
        split: LazySplit(reader, part).in_memory_if_small(len(everything))
        for split, part in zip(("train", "validation", "test"), paths, strict=True)
    }
    if absent:
        notes.append(f"{len(absent)} listed file(s) are missing, {absent[0]} the first.")
    notes.append("cropped to 128 x 128 pixels around (89, 121), resized to {} x {}.".format(*size))
    return Samples("celeba", parts, info.grid, notes=tuple(notes))


def _places(argument: str) -> tuple[Path, Path]:
    """The folder of images and the file of the partition."""
    roots = candidates(argument, "celeba")
    for root in roots:
        images = next((root / name for name in IMAGES if os.path.isdir(root / name)), None)
        listing = next((root / name for name in PARTITION if os.path.isfile(root / name)), None)
        if images and listing:
            return images, listing
    places = " or ".join(map(str, roots)) or "celeba: (no path given)"
    raise UserError(
        f"CelebA not found in {places}: celeba:PATH needs img_align_celeba and list_eval_partition.txt of "
        "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html in PATH"
    )


def _partition(listing: Path, images: Path) -> tuple[list[list[Path]], list[str]]:
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
