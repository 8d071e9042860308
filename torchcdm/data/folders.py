"""Folders of images: files that are checked when the data set is loaded and read when they are asked for."""

import math
import os
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, TypeVar

import torch

from torchcdm.data.images import IMAGE, SUFFIXES, ImageInfo, convertible, describe, read_image
from torchcdm.data.options import DataOptions
from torchcdm.data.source import MEMORY_LIMIT, NO_LABEL, CropSplit, LazySplit, Samples
from torchcdm.errors import UserError, reason
from torchcdm.runtime.processes import progress_bar

# What splits are called, here and on the Hub.
SPLIT_NAMES = {
    "train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test", "testing"),
}  # fmt: skip

T = TypeVar("T")


def named_splits(find: Callable[[str], T | None]) -> dict[str, T]:
    """What ``find`` gives for the first name of each split that it knows."""
    found = {split: [part for part in map(find, names) if part is not None] for split, names in SPLIT_NAMES.items()}
    return {split: parts[0] for split, parts in found.items() if parts}


def find_files(
    roots: Sequence[Path], skip_bad: bool, suffixes: Collection[str] = SUFFIXES, hidden: str = "."
) -> tuple[list[list[Path]], list[str]]:
    """The files below each folder that end in ``suffixes``, in order of their paths, and what is to be said of others.

    Each is found once, by whatever links it can be reached; what begins with a ``hidden`` letter is passed over.
    UserError for a folder that cannot be listed, or a link that leads nowhere, unless ``skip_bad``.
    """
    seen: set[tuple[int, int]] = set()  # device and number
    found, notes, others = [], [], 0
    for root in roots:
        files, todo = [], [(False, root)]
        while todo:
            _, path = heappop(todo)  # links come last: a file has the class of the folder that it lies in
            try:
                status = os.stat(path)
                identity, is_folder = (status.st_dev, status.st_ino), stat.S_ISDIR(status.st_mode)
                if not path.name.lower().endswith(tuple(suffixes)) and not is_folder:
                    others += 1
                elif identity not in seen and is_folder:
                    with os.scandir(path) as listed:
                        for entry in (entry for entry in listed if entry.name[0] not in hidden):
                            heappush(todo, (entry.is_symlink(), path / entry.name))
                    seen.add(identity)
                elif identity not in seen:
                    files.append(path)
                    seen.add(identity)
            except OSError as error:
                problem = f"{path}: cannot be read ({reason(error)})"
                if not skip_bad:
                    raise UserError(f"{problem}; skip-bad goes on without it") from None
                notes.append(f"{problem}: left out.")
        found.append(sorted(files, key=lambda path: path.relative_to(root).parts))
    if others:
        notes.insert(0, f"{others} file(s) of other kinds are passed over.")
    return found, notes


def split_folders(root: Path) -> dict[str, Path]:
    """The folders of images below ``root``, by split: itself where it has none. UserError for others beside those of
    validation or test, none of which is for training."""
    listed = os.path.isdir(root) and os.access(root, os.R_OK)  # find_files says what is wrong with any other
    inside = sorted(path for path in root.iterdir() if path.name[0] != ".") if listed else []
    found = named_splits({path.name.lower(): path for path in inside if os.path.isdir(path)}.get)
    if found and "train" not in found and sum(bool(_images([path])) for path in inside) > 1:
        (first, *_), mend = found.values(), "put the others into a folder 'train', or rename this one"
        raise UserError(f"{first}: the name of a split, and there is none for training; {mend}")
    return found if "train" in found else {"train": root}


def _images(paths: Sequence[Path]) -> list[Path]:
    """The images among the paths, and in those of them that are folders."""
    within = find_files([path for path in paths if os.path.isdir(path)], skip_bad=True)[0]
    files = [path for path in paths if path.suffix.lower() in SUFFIXES and not os.path.isdir(path)]
    return files + [path for part in within for path in part]


def passed_over(root: Path, files: Mapping[str, Sequence[Path]], folders: Collection[Path]) -> list[str]:
    """What is to be said of images below ``root`` that are none of the ``files`` of its splits, in ``folders``."""
    known = {os.path.realpath(path) for part in files.values() for path in part}
    beside = sorted(path for path in root.iterdir() if path.name[0] != "." and path not in folders)
    images = [path for path in _images(beside) if os.path.realpath(path) not in known]
    said = "{} image(s) beside the folders of the splits are passed over, {} the first."
    return [said.format(len(images), images[0])] if images else []


def check_apart(run: Path, spec: str) -> None:
    """Refuses the folder of a ``run`` where its samples would be among the images that it learns."""
    kind, _, root = spec.partition(":")
    for folder in split_folders(Path(root)).values() if kind == "folder" else ():
        if run.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{run}: lies among the images that are learned; choose another folder")


def load(argument: str, options: DataOptions, _: Any = None) -> Samples:
    """``folder:PATH``: all images below PATH.

    Sub-folders ``train``, ``validation`` and ``test`` are the splits where ``train`` is there; sub-folders of a
    split are classes when every image lies in one and there are at least two.
    """
    folders = split_folders(Path(argument))
    found, notes = find_files(list(folders.values()), options.skip_bad)
    files = dict(zip(folders, found, strict=True))
    notes += passed_over(Path(argument), files, folders.values()) if folders["train"] != Path(argument) else []
    if not files["train"]:
        suffixes = ", ".join(sorted(SUFFIXES))
        raise UserError(f"{folders['train']}: no image files in this folder or below it (looked for {suffixes})")
    # The first folder below that of the split; "" for images in that itself.
    inside = {path: path.relative_to(folders[split]).parts[:-1] for split, part in files.items() for path in part}
    above = {path: (*parts, "")[0] for path, parts in inside.items()}
    names = sorted({above[path] for path in files["train"]})
    class_names = tuple(names) if len(names) > 1 and "" not in names else None
    if len(names) > 2 and class_names is None:
        notes.append(f"no classes, as {next(path for path in above if not above[path])} lies beside the sub-folders.")
    strange = [path for path, name in above.items() if name not in names]
    if class_names and strange:
        raise UserError(f"{strange[0]}: not in one of the class folders of the training images ({', '.join(names)})")
    info, good, more = inspect(list(above), options)
    read = partial(read_image, size=options.size, channels=options.channels)
    if options.crop is not None:
        one = read(next(iter(good)))  # all have its channels and its type
        if sum(math.prod(image.size) for image in good.values()) * one[:, 0, 0].nbytes <= MEMORY_LIMIT:
            read = {path: read(path) for path in good}.__getitem__
    splits = {}
    for split, part in files.items():
        kept = [path for path in part if path in good]
        if not kept and split != "train":
            continue
        labels = torch.tensor([names.index(above[path]) if class_names else NO_LABEL for path in kept])
        if options.crop is not None:
            splits[split] = CropSplit(read, {path: good[path].size for path in kept}, options.crop, labels)
        else:
            splits[split] = LazySplit(read, kept, labels).in_memory_if_small(len(good))
    notes += [f"{len(names)} classes, from the names of the sub-folders."] if class_names else []
    return Samples(f"folder:{argument}", splits, info.grid, class_names, notes=(*notes, *more))


def inspect(paths: Sequence[Path], options: DataOptions) -> tuple[ImageInfo, dict[Path, ImageInfo], list[str]]:
    """What the first good file holds, all that can be read, and notes; their headers must tell of one shape. With
    ``skip_bad`` every file is decoded. UserError for one that cannot be read, or two that differ."""
    good: dict[Path, ImageInfo] = {}
    bad: list[Path] = []
    for path in progress_bar(paths, "checking images", len(paths) >= 5000):
        try:
            info = describe(path)
            if options.crop is not None and min(info.size[0] - options.crop[0], info.size[1] - options.crop[1]) < 0:
                raise UserError(f"{path}: has {info}, smaller than the crop{IMAGE[1]}")
            if options.channels is not None and not convertible(info.channels, options.channels):
                wanted = f"{options.channels} channels; grey, colour and alpha convert, to 1, 3 or 4 channels"
                raise UserError(f"{path}: has {info}, and cannot have {wanted}")
            if options.skip_bad:
                read_image(path, options.size, options.channels)
        except UserError as error:
            if not options.skip_bad:
                raise
            bad.append(path)
            problem = str(error).removesuffix(IMAGE[1])
            continue
        good[path] = info
        other, first = next(iter(good.items()))
        mends = {
            "convert the files to one depth": info.high != first.high,
            "give channels, 1 or 3, to convert": options.channels is None and info.channels != first.channels,
            "give size or crop (HxW)": options.size is None and options.crop is None and info.size != first.size,
        }
        if mend := "; ".join(mend for mend, needed in mends.items() if needed):
            raise UserError(f"images differ: {other} has {first}; {path} has {info}; {mend}")
    if not good:
        what = f"neither this nor any other of the {len(paths)} image files can be used"
        raise UserError(f"{paths[0]}: {what}; of the last: {problem}")
    info = next(iter(good.values()))
    (height, width), channels = options.size or info.size, options.channels or info.channels
    notes = [f"{len(good)} images of {channels} channel(s), {height} x {width} pixels."]
    if options.crop is not None:
        crop = "{} x {}".format(*options.crop)
        notes = [f"crops of {crop} pixels from {len(good)} images of {channels} channel(s), split by images."]
    turned = (abs(info.size[0] * width / (info.size[1] * height) - 1) > 0.02 for info in good.values())
    notes += ["resizing changes the aspect ratio of some images."] if options.size and any(turned) else []
    return info, good, [*notes, *left_out(bad)]


def left_out(bad: Sequence[Path | str]) -> tuple[str, ...]:
    """The note on files that cannot be read, or are too small; none where there are none."""
    return (f"{len(bad)} file(s) that cannot be used are left out, {bad[0]} the first.",) if bad else ()
