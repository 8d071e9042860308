"""One writer for every file: a crash leaves no half of one, and what is not ours is not replaced."""

import csv
import errno
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pydantic_core import to_jsonable_python

from torchcdm.errors import UserError, reason

TEMPORARY = ".writing-"  # prefix of what is being written; left behind by a crash, it is cleaned up and never read
# How texts are written: names of files that are not UTF-8 as the system has them.
TEXT = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write, a full disk or a name that is too long, into one line."""
    name = str(path)
    if "\0" in name:
        raise UserError(f"{name!r}: a path cannot hold a NUL character")
    try:
        yield
    except (OSError, UnicodeEncodeError) as error:
        what = f"cannot be written ({reason(error)}); nothing that was there before is lost"
        raise UserError(f"{path}: {what}") from error


def write_file(path: Path, content: bytes | str) -> None:
    """As :func:`written`, for all of the content at once."""
    with written(path, isinstance(content, str)) as file:
        file.write(content)


@contextmanager
def written(path: Path, text: bool = False, flush: bool = True) -> Iterator[IO[Any]]:
    """A file that is written beside, flushed to the disk, then renamed: a reader sees the old file or the new one.

    Its folder is made. A link is followed. Devices and pipes are written to, never replaced. Without ``flush``, for
    one of many files, a power failure can cut it short. UserError where it cannot be written; the old file stays.
    """
    with writing(path):
        target = _replaced(path)
        if target is None:
            with open(path, "w", **TEXT, opener=_opened) if text else open(path, "wb", opener=_opened) as file:
                yield file
            return
        temporary = beside(target)
        try:
            with new_file(temporary, text, flush) as file:
                yield file
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        if flush:
            flush_folder(target.parent)


@contextmanager
def new_file(path: Path, text: bool = False, flush: bool = True) -> Iterator[IO[Any]]:
    """A new file, in place of what a crash left there, flushed to the disk at the end. No link is followed."""
    path.unlink(missing_ok=True)
    with path.open("x", **TEXT) if text else path.open("xb") as file:
        yield file
        if flush:
            file.flush()
            os.fsync(file.fileno())


def _opened(path: str, flags: int) -> int:
    """A pipe that nobody reads is refused, not waited for."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    os.set_blocking(descriptor, True)
    return descriptor


def beside(path: Path) -> Path:
    """Where a file is written before it is renamed: in the folder of what it replaces, under a name that fits."""
    path = Path(os.path.realpath(path))
    return path.with_name(TEMPORARY + path.name[-60:])


def flush_folder(path: Path) -> None:
    """Makes renames in a folder survive a power failure, where the system lets folders be flushed."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def without_nan(value: Any) -> Any:
    """Plain values with null in place of numbers that are not finite, which JSON does not have."""
    return to_jsonable_python(value, inf_nan_mode="null")


def write_json(path: Path, value: Any) -> None:
    """As :func:`write_file`, indented; null in place of numbers that are not finite."""
    write_file(path, json.dumps(without_nan(value), indent=1, allow_nan=False) + "\n")


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A CSV file."""
    with written(path, text=True) as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def check_output(path: Path, inputs: Iterable[str | Path] = (), kind: str | None = None) -> None:
    """Refuses, before the long work, a file that cannot be written after it, one of the ``inputs`` (paths, or data as
    on the command line) or in a folder of them, and what :func:`check_replaced` refuses; its folder is made."""
    with writing(path):
        target = Path(os.path.realpath(path))
        for held in (given.resolve() for given in _given(inputs) if given.is_dir() or given.is_file()):
            if target.is_relative_to(held) or (target.exists() and target.samefile(held)):
                raise UserError(f"{path}: is one of the inputs, or among them; choose another file")
        if _replaced(path) is not None:
            check_replaced(target, kind)


def check_replaced(path: Path, kind: str | None = None) -> None:
    """Refuses to replace an artefact of another ``kind``, or what is none; where ``kind`` is None, any artefact."""
    with writing(path):
        head = path.read_bytes()[:200] if path.is_file() else b""
    found = re.match(rb'{\s*"format": \d+,\s*"kind": "([^"]+)"', head)
    held = None if found is None else found[1].decode(errors="replace")
    if head and held != kind:
        what = "was written by something else" if held is None else f"holds a {held}"
        raise UserError(f"{path}: {what}, which this would replace; choose another place, or remove it")


def check_output_folder(folder: Path, inputs: Iterable[str | Path]) -> None:
    """Refuses a folder in which outputs could replace inputs, as it holds one or is in one, or that is read-only."""
    with writing(folder):
        inside = folder.resolve()
        for held in (given.resolve() for given in _given(inputs)):
            if inside.is_relative_to(held) if held.is_dir() else inside == held.parent:
                raise UserError(f"{folder}: holds inputs, which the outputs could replace; choose another folder")
        _replaced(folder / TEMPORARY)


def _given(inputs: Iterable[str | Path]) -> list[Path]:
    """Those inputs that are files or folders, with or without a kind before a colon."""
    texts = (text for given in map(str, inputs) for text in (given, given.partition(":")[2]))
    return [Path(text) for text in texts if os.path.exists(text)]


def _replaced(path: Path) -> Path | None:
    """The file to write, through links, in a folder that is made; None for a device, OSError where it cannot be."""
    with suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "a folder lies there")
        if not stat.S_ISREG(mode):
            return None
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    for part in (target, target.parent):
        if part.exists() and not os.access(part, os.W_OK):
            raise PermissionError(errno.EACCES, f"{part} is read-only")
    return target
