"""One writer for every file: a crash leaves no half of one, and what is not ours is not replaced."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from torchcdm.errors import UserError, reason

TEMPORARY = ".writing-"
"""Prefix of what is being written; left behind by a crash, it is cleaned up and never read."""


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


def write_file(path: Path, content: bytes | str, flush: bool = True) -> None:
    """Written beside, flushed to the disk, then renamed: a reader sees the old file or the new one.

    Its folder is made. A link is followed. Devices, pipes and the standard streams are written to, never replaced.
    Without ``flush``, for one of many files, a power failure can cut it short.

    Raises:
        UserError: The disk is full, the folder or the file read-only, or a folder lies there; the old file stays.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        status = _status(path)
        if status is not None and (not stat.S_ISREG(status.st_mode) or _stream(status) is not None):
            return _write_into(path, status, content)
        path = _target(path)
        if status is not None and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "the file is read-only")
        temporary = beside(path)
        try:
            write_through(temporary, content, flush)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        if flush:
            flush_folder(path.parent)


@contextmanager
def written_in_pieces(path: Path) -> Iterator[IO[str]]:
    """As :func:`write_file`, for a text that comes in pieces and may be long: what fails leaves the old file."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        regular = (status := _status(path)) is None or (stat.S_ISREG(status.st_mode) and _stream(status) is None)
        if regular and status is not None and not os.access(_target(path), os.W_OK):
            raise PermissionError(errno.EACCES, "the file is read-only")
        temporary = beside(path)
        if regular:
            write_through(temporary, "", flush=False)
    with open(temporary, "w", encoding="utf-8", errors="surrogateescape") if regular else io.StringIO() as file:
        try:
            yield file
            with writing(path):
                if regular:
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(temporary, _target(path))
                else:
                    write_file(path, file.getvalue())
        except BaseException:
            if regular:
                temporary.unlink(missing_ok=True)
            raise


def beside(path: Path) -> Path:
    """Where a file is written before it is renamed: in the folder of what it replaces, under a name that fits."""
    path = _target(path)
    return path.with_name(TEMPORARY + path.name[-60:])


def write_through(path: Path, content: bytes | str, flush: bool = True) -> None:
    """Writes a new file, in place of what a crash left there, and flushes it to the disk. No link is followed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except FileExistsError:
        path.unlink()
        descriptor = os.open(path, flags, 0o666)
    with open(descriptor, "wb") as file:
        file.write(_encoded(content))
        if flush:
            file.flush()
            os.fsync(file.fileno())


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
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """As :func:`write_file`, indented; null in place of numbers that are not finite."""
    write_file(path, json.dumps(without_nan(value), indent=1, allow_nan=False) + "\n")


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_file(path, text.getvalue())


# --- before the work ---------------------------------------------------------------------------------------------


def check_output(path: Path, inputs: Iterable[str | Path] = (), kind: str | None = None) -> None:
    """Refuses, before the long work, a file that cannot be written after it; its folder is made.

    Nor may it replace ``inputs``, paths or data as on the command line; ``kind`` as in :func:`check_replaced`.

    Raises:
        UserError: The folder cannot be made or written, a folder or an artefact lies in place of the file, or it is an
            input.
    """
    with writing(path):
        status = _status(path)
        if status is not None and stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "a folder lies there")
        if status is not None and not stat.S_ISREG(status.st_mode):
            return
        target = _target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        for part in (target.parent,) if status is None else (target.parent, target):
            if not os.access(part, os.W_OK):
                raise PermissionError(errno.EACCES, f"{part} is read-only")
    if status is not None and any(os.path.samestat(status, given) for _, given in _given(inputs)):
        raise UserError(f"{path}: is one of the inputs; choose another file")
    check_replaced(path, kind)


def check_replaced(path: Path, kind: str | None = None) -> None:
    """Refuses to replace an artefact, by the beginning of the file: its rest may be damaged.

    Only one of this ``kind`` may be replaced, and then nothing else may; no artefact where that is None.

    Raises:
        UserError: It holds something else.
    """
    with writing(path):
        head = path.read_bytes()[:200] if path.is_file() else b""
    found = re.match(rb'{\s*"format": \d+,\s*"kind": "([^"]+)"', head)
    held = None if found is None else found[1].decode(errors="replace")
    if head and held != kind:
        what = "was written by something else" if held is None else f"holds a {held}"
        raise UserError(f"{path}: {what}, which this would replace; choose another place, or remove it")


def check_output_folder(folder: Path, inputs: Iterable[str | Path]) -> None:
    """Refuses a folder for outputs in which they could replace inputs: one that holds an input, or is in one.

    Raises:
        UserError: As above, or a folder that cannot be made or written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "the folder is read-only")
    inside = folder.resolve()
    for path, status in _given(inputs):
        held = path.resolve()
        if inside.is_relative_to(held) if stat.S_ISDIR(status.st_mode) else inside == held.parent:
            raise UserError(f"{folder}: holds inputs, which the outputs could replace; choose another folder")


def _given(inputs: Iterable[str | Path]) -> Iterator[tuple[Path, os.stat_result]]:
    """Those inputs that are files or folders, with or without a kind before a colon."""
    for given in inputs:
        for text in {str(given), str(given).partition(":")[2]} - {""}:
            with suppress(OSError, ValueError):
                yield Path(text), os.stat(text)


# --- parts -------------------------------------------------------------------------------------------------------


def _status(path: Path) -> os.stat_result | None:
    """What is at the path, through links; None where there is nothing."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _target(path: Path) -> Path:
    """Where a link leads to."""
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return target


def _stream(status: os.stat_result) -> int | None:
    """The standard stream that writes to the same file, if any: replaced, it would lose what is printed."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.path.samestat(status, os.fstat(descriptor)):
                return descriptor
    return None


def _write_into(path: Path, status: os.stat_result, content: bytes | str) -> None:
    """Writes to a device, a pipe or a standard stream; one that nobody reads is refused, not waited for."""
    descriptor = _stream(status)
    if descriptor is None:
        descriptor = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
        os.set_blocking(descriptor, True)
    else:
        sys.stdout.flush()
        descriptor = os.dup(descriptor)
    with open(descriptor, "wb") as file:
        file.write(_encoded(content))


def _encoded(content: bytes | str) -> bytes:
    """Names of files that are not UTF-8 are written as the system has them."""
    return content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
