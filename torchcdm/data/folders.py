"""Folders of images: files that are checked when the data set is loaded and read when they are asked for."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from torchcdm.data.assembly import Samples
from torchcdm.data.images import SUFFIXES, ImageInfo, ImageReader, describe
from torchcdm.data.options import DataOptions, Layout
from torchcdm.data.reading import reason
from torchcdm.data.source import NO_LABEL, LazySplit
from torchcdm.errors import UserError

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val"),
    "test": ("test", "testing"),
}


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


@dataclass
class Search:
    """A search for image files, each of which is found once, by whatever links it can be reached.

    Attributes:
        skip_bad: Pass over folders that cannot be listed.
        seen: Device and number of every file and folder that was found.
        others: Number of files that are no images.
        links: Number of further links to files and folders that were found already.
        unreadable: What cannot be reached or listed.
    """

    skip_bad: bool = False
    seen: set[tuple[int, int]] = field(default_factory=set)
    others: int = 0
    links: int = 0
    unreadable: list[str] = field(default_factory=list)

    def below(self, root: Path) -> list[Path]:
        """All image files below ``root`` in the order of their paths; hidden files and folders are passed over.

        Raises:
            UserError: A folder that cannot be listed, or a link that leads nowhere.
        """
        files, todo, links = [], [root], []
        while todo or links:
            # Links come last: a file has the class of the folder that it lies in.
            path = todo.pop() if todo else links.pop()
            try:
                status = os.stat(path)
                identity, is_folder = (status.st_dev, status.st_ino), stat.S_ISDIR(status.st_mode)
                if path.suffix.lower() not in SUFFIXES and not is_folder:
                    self.others += 1
                elif identity in self.seen:
                    self.links += 1
                elif is_folder:
                    with os.scandir(path) as entries:
                        found = [entry for entry in entries if not entry.name.startswith(".")]
                    found.sort(key=lambda entry: entry.name, reverse=True)
                    todo += [path / entry.name for entry in found if not entry.is_symlink()]
                    links = sorted(links + [path / entry.name for entry in found if entry.is_symlink()], reverse=True)
                    self.seen.add(identity)
                else:
                    files.append(path)
                    self.seen.add(identity)
            except OSError as error:
                problem = f"{path}: cannot be read ({reason(error)})"
                if not self.skip_bad:
                    raise UserError(f"{problem}; --skip-bad goes on without it") from None
                self.unreadable.append(problem)
        return sorted(files, key=lambda path: path.relative_to(root).parts)

    def notes(self) -> list[str]:
        """What is to be said, one sentence each."""
        notes = [f"{self.others} file(s) that are no images are passed over."] * bool(self.others)
        notes += [f"{self.links} further link(s) to the same files and folders are passed over."] * bool(self.links)
        return notes + [f"{problem}: left out." for problem in self.unreadable]


def load(argument: str, options: DataOptions, _: Layout | None = None) -> Samples:
    """``folder:PATH``: all images below PATH.

    Sub-folders ``train``, ``validation`` and ``test`` are the splits where ``train`` is there; sub-folders of a
    split are classes when every image lies in one and there are at least two.
    """
    root = Path(argument)
    folders = {
        split: next((root / name for name in names if os.path.isdir(root / name)), None)
        for split, names in SPLIT_FOLDERS.items()
    }
    folders = folders if folders["train"] else {"train": root}
    search = Search(options.skip_bad)
    files = {split: search.below(folder) for split, folder in folders.items() if folder}
    if not files["train"]:
        suffixes = ", ".join(sorted(SUFFIXES))
        raise UserError(f"{folders['train']}: no image files in this folder or below it (looked for {suffixes})")
    above = {path: path.relative_to(folders[split]).parts[:-1] for split, part in files.items() for path in part}
    class_names = _class_names(files["train"], above)
    found = inspect(list(above), options)
    reader = ImageReader(found.info.high, options.size, options.channels)
    splits = {}
    for split, part in files.items():
        kept = [path for path in part if path in found.good]
        labels = torch.tensor([class_names.index(above[path][0]) if class_names else NO_LABEL for path in kept])
        if kept or split == "train":
            splits[split] = LazySplit(reader, kept, labels).in_memory_if_small(len(found.good))
    notes = search.notes()
    if class_names:
        notes.append(f"{len(class_names)} classes, from the names of the sub-folders.")
    notes += [*found.notes, *found.left_out]
    return Samples(f"folder:{argument}", splits, found.info.grid, class_names, notes=tuple(notes))


def _class_names(train: Sequence[Path], above: dict[Path, tuple[str, ...]]) -> tuple[str, ...] | None:
    """Names of the class sub-folders, the first of those above each file; None where there are none.

    Raises:
        UserError: Validation or test have a class that training has not.
    """
    if not all(above[path] for path in train):
        return None
    names = tuple(sorted({above[path][0] for path in train}))
    if len(names) < 2:
        return None
    for path, folders in above.items():
        if not folders or folders[0] not in names:
            raise UserError(f"{path}: not in one of the class folders of the training images ({', '.join(names)})")
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
    if squeezed:
        notes.append("resizing changes the aspect ratio of some images.")
    info = first[1]
    (height, width), channels = options.size or info.size, options.channels or info.channels
    notes.insert(0, f"{len(good)} images of {channels} channel(s), {height} x {width} pixels.")
    return Inspection(info, good, tuple(notes), left_out(bad))


def left_out(bad: Sequence[Path]) -> tuple[str, ...]:
    """The note on files that cannot be read; none where there are none."""
    return (f"{len(bad)} file(s) that cannot be read are left out, {bad[0]} the first.",) if bad else ()


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
