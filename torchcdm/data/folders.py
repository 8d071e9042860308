"""Folders of images: files that are checked when the data set is loaded and read when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from torchcdm.data.arrays import source_from_splits
from torchcdm.data.images import SUFFIXES, ImageInfo, ImageReader, describe
from torchcdm.data.options import DataOptions, Layout
from torchcdm.data.source import MEMORY_LIMIT, NO_LABEL, DataSource, LazySplit, Split, complete_splits
from torchcdm.errors import UserError

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class ImageFile:
    """An image file with its place: the folder names between the split's root and the file."""

    path: Path
    folders: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What a look at image files found.

    Attributes:
        info: What the first good file holds; the others give the same shape.
        good: The files that can be read.
        notes: On shape, depth and aspect ratio.
        left_out: The note on the files that cannot be read; empty where there are none.
    """

    info: ImageInfo
    good: set[Path]
    notes: tuple[str, ...]
    left_out: tuple[str, ...]


def find_images(root: Path) -> tuple[list[ImageFile], int]:
    """All image files below ``root`` in the order of their paths, and how many other files there are.

    Hidden files and folders are passed over.
    """
    found, others = [], 0
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(folder, name)
            if path.suffix.lower() in SUFFIXES:
                found.append(ImageFile(path, path.parent.relative_to(root).parts))
            else:
                others += 1
    return sorted(found, key=lambda file: file.path.relative_to(root).parts), others


def load(argument: str, options: DataOptions, layout: Layout | None = None) -> DataSource:
    """``folder:PATH``: all images below PATH.

    Sub-folders ``train``, ``validation`` and ``test`` are the splits where ``train`` is there; sub-folders of a
    split are classes when every image lies in one and there are at least two.
    """
    root = Path(argument)
    if not root.is_dir():
        raise UserError(f"{argument}: no such folder")
    parts, notes = _parts(root)
    files = [file for part in parts.values() for file in part]
    class_names = _class_names(parts)
    if class_names:
        notes.append(f"{len(class_names)} classes, from the names of the sub-folders.")
    found = inspect([file.path for file in files], options)
    reader = ImageReader(found.info.high, options.size, options.channels)
    splits = {}
    for split, part in parts.items():
        kept = [file for file in part if file.path in found.good]
        labels = [class_names.index(file.folders[0]) if class_names else NO_LABEL for file in kept]
        lazy = LazySplit(reader, [file.path for file in kept], torch.tensor(labels))
        splits[split] = read_if_small(lazy, len(found.good))
    name = f"folder:{argument}"
    complete, note = complete_splits(name, splits, options)
    notes += [*found.notes, *found.left_out, note]
    return source_from_splits(name, complete, found.info.grid, options, class_names, notes=notes, layout=layout)


def _parts(root: Path) -> tuple[dict[str, list[ImageFile]], list[str]]:
    """The image files of each split folder, all of them ``train`` where there are no such folders; and notes."""
    folders = {
        split: next((root / name for name in names if (root / name).is_dir()), None)
        for split, names in SPLIT_FOLDERS.items()
    }
    if folders["train"] is None:
        folders = {"train": root}
    parts, others = {}, 0
    for split, folder in folders.items():
        if folder is not None:
            parts[split], ignored = find_images(folder)
            others += ignored
    if not parts["train"]:
        suffixes = ", ".join(sorted(SUFFIXES))
        raise UserError(f"{folders['train']}: no image files in this folder or below it (looked for {suffixes})")
    return parts, [f"{others} file(s) that are no images are passed over."] if others else []


def _class_names(parts: dict[str, list[ImageFile]]) -> tuple[str, ...] | None:
    """Names of the class sub-folders; None where there are none.

    Raises:
        UserError: Validation or test have a class that training has not.
    """
    if not all(file.folders for file in parts["train"]):
        return None
    names = tuple(sorted({file.folders[0] for file in parts["train"]}))
    if len(names) < 2:
        return None
    for part in parts.values():
        for file in part:
            if not file.folders or file.folders[0] not in names:
                listing = ", ".join(names)
                raise UserError(f"{file.path}: not in one of the class folders of the training images ({listing})")
    return names


def inspect(paths: Sequence[Path], options: DataOptions) -> Inspection:
    """Checks that all files give one shape, by their headers; with ``skip_bad`` every file is decoded.

    Raises:
        UserError: A file that cannot be read, or two files that differ.
    """
    first: tuple[Path, ImageInfo] | None = None
    good: set[Path] = set()
    bad: list[Path] = []
    notes: list[str] = []
    squeezed = False
    for path in tqdm(paths, "checking images", disable=len(paths) < 5000, leave=False):
        try:
            info = describe(path)
            if options.skip_bad:
                ImageReader(info.high, options.size, options.channels)(path)
        except UserError:
            if not options.skip_bad:
                raise
            bad.append(path)
            continue
        first = first or (path, info)
        _refuse_mixture(first, (path, info), options)
        if info.reduced and not any("16-bit" in note for note in notes):
            notes.append(f"{path.name} has 16-bit colours, which Pillow reads as 8 bits.")
        if options.size is not None:
            squeezed |= abs(info.height * options.size[1] / (info.width * options.size[0]) - 1) > 0.02
        good.add(path)
    if first is None:
        raise UserError(f"{paths[0]}: neither this nor any other of the {len(paths)} image files can be read")
    left_out = (f"{len(bad)} file(s) that cannot be read are left out, {bad[0]} the first.",) if bad else ()
    if squeezed:
        notes.append("resizing changes the aspect ratio of some images.")
    info = first[1]
    (height, width), channels = options.size or info.size, options.channels or info.channels
    notes.insert(0, f"{len(good)} images of {channels} channel(s), {height} x {width} pixels.")
    return Inspection(info, good, tuple(notes), left_out)


def _refuse_mixture(first: tuple[Path, ImageInfo], second: tuple[Path, ImageInfo], options: DataOptions) -> None:
    (path, info), (other, found) = first, second
    if info.high != found.high:
        mend = "convert the files to one depth"
    elif options.channels is None and info.channels != found.channels:
        mend = "give --channels to convert"
    elif options.size is None and info.size != found.size:
        mend = "give --size HxW to resize"
    else:
        return
    raise UserError(f"images differ: {path} has {info}; {other} has {found}; {mend}")


def read_if_small(split: LazySplit, total: int) -> Split:
    """The split in memory where the whole data set of ``total`` images is small, else as it is."""
    if not split:
        return split
    x, _ = split[0]
    return split.in_memory() if total * x.nelement() * x.element_size() <= MEMORY_LIMIT else split
