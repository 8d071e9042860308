"""The one way in which files are opened: regular files only, and one line for whatever is wrong with them."""

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from torchcdm.errors import UserError, reason


def file_status(path: Path) -> os.stat_result:
    """Status of a file or folder, links followed; UserError where it is not there or cannot be reached."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file or folder") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"{path}: cannot be opened ({reason(error)})") from None


@contextmanager
def reading(path: Path, kind: str, mend: str = "") -> Iterator[BinaryIO]:
    """Opens a regular file for a decoder; pipes, devices and sockets, which can block for ever, are never opened.

    ``kind`` is what it should be, ``an image``, and ``mend`` what to do about a damaged one, for the UserError where
    it is no regular file, or the decoder in the block failed.
    """
    mode = file_status(path).st_mode
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "a pipe, a device or a socket"
        raise UserError(f"{path}: cannot be read as {kind} (it is {found}, not a file){mend}")
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield file
    except Exception as error:  # decoders raise anything on damaged files
        text = reason(error).replace(str(path), path.name)
        raise UserError(f"{path}: cannot be read as {kind} ({text}){mend}") from error


def read_bytes(path: Path) -> bytes:
    """The content of a regular file; UserError for any other."""
    with reading(path, "a file") as file:
        return file.read()


def printable(path: Path | str) -> str:
    """A path as text that every file can hold: bytes that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
