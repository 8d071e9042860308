"""The one way in which files of data are opened: regular files only, and one line for whatever is wrong with them."""

from __future__ import annotations

import io
import os
import stat
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

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


def printable(path: Path | str) -> str:
    """A path as text that every file can hold: bytes that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_arrays(path: Path, wanted: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Arrays of an .npy file, called ``""``, or of an .npz file by name: those ``wanted``, all if it has none."""
    with reading(path, "a numpy array without pickled objects") as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            return {"": np.lib.format.read_array(file, allow_pickle=False)}
        with zipfile.ZipFile(file) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            names = [name for name in members if name in wanted] or list(members)
            # Whole, as a checksum is compared at the end of a member.
            parts = ((name, io.BytesIO(archive.read(members[name]))) for name in names)
            return {name: np.lib.format.read_array(part, allow_pickle=False) for name, part in parts}
