"""The one way in which files of data are opened: regular files only, and one line for whatever is wrong with them."""

from __future__ import annotations

import math
import os
import stat
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from torchcdm.errors import UserError

DAMAGE: tuple[type[Exception], ...] = (
    OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError,
    AssertionError, RuntimeError, MemoryError, struct.error, zlib.error, zipfile.BadZipFile, tokenize.TokenError,
)  # fmt: skip
"""What the decoders of numpy, Pillow and others raise on damaged files."""

PACKING = 1100
"""Most bytes that one packed byte stands for: DEFLATE reaches 1032."""


def file_status(path: Path) -> os.stat_result:
    """Status of a file or folder; links are followed.

    Raises:
        UserError: It is not there or cannot be reached.
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file or folder") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"{path}: cannot be opened ({reason(error)})") from None


@contextmanager
def reading(path: Path, kind: str, mend: str = "", also: Sequence[type[Exception]] = ()) -> Iterator[BinaryIO]:
    """Opens a regular file for a decoder; pipes, devices and sockets, which can block for ever, are never opened.

    Args:
        path: The file.
        kind: What it should be, for the message: ``an image``.
        mend: What to do about a damaged file, for the message.
        also: What the decoder raises beside :data:`DAMAGE`.

    Raises:
        UserError: No regular file, or the decoder in the block failed.
    """
    mode = file_status(path).st_mode
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "a pipe, a device or a socket"
        raise UserError(f"{path}: cannot be read as {kind} (it is {found}, not a file){mend}")
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield file
    except (*DAMAGE, *also) as error:
        text = reason(error).replace(str(path), path.name)
        raise UserError(f"{path}: cannot be read as {kind} ({text}){mend}") from error


def reason(error: Exception) -> str:
    """The first line of what an exception says."""
    text = getattr(error, "strerror", None) or str(error)
    return (text.splitlines() or [type(error).__name__])[0]


def printable(path: Path | str) -> str:
    """A path as text that every file can hold: bytes that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_array(file: BinaryIO, size: int) -> np.ndarray:
    """An array in the .npy format. Its header is checked against ``size``, the bytes there, before memory is taken.

    Raises:
        ValueError: A damaged header, pickled objects, records, no values, or fewer bytes than the header says.
    """
    shape, fortran, dtype = array_header(file)
    count = math.prod(shape)
    if dtype.hasobject or dtype.names or not dtype.itemsize:
        raise ValueError(f"values of type {dtype}; pickled objects and records are not read")
    if not count or min(shape, default=1) < 0:
        raise ValueError(f"an array of shape {shape} holds no values")
    if file.tell() + count * dtype.itemsize > size:
        raise ValueError(f"truncated: {size} bytes do not hold {dtype} of shape {shape}")
    content = bytearray(count * dtype.itemsize)
    if file.readinto(content) != len(content):
        raise ValueError("truncated")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def array_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the first axis varies fastest, and type of an array in the .npy format.

    Raises:
        ValueError: A damaged header.
    """
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the .npy format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def read_arrays(path: Path, wanted: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Arrays of an .npy file, called ``""``, or of an .npz file by their names.

    Args:
        path: The file.
        wanted: Names of the arrays to read where one of them is there; all are read where none is.

    Raises:
        UserError: Not a file of arrays, or a damaged one.
    """
    with reading(path, "a numpy array without pickled objects", also=(NotImplementedError,)) as file:
        size = os.fstat(file.fileno()).st_size
        if not zipfile.is_zipfile(file):
            file.seek(0)
            return {"": read_array(file, size)}
        with zipfile.ZipFile(file) as archive:
            members = {item.filename.removesuffix(".npy"): item for item in archive.infolist()}
            names = [name for name in members if name in wanted] or list(members)
            return {name: _read_member(archive, members[name]) for name in names}


def _read_member(archive: zipfile.ZipFile, item: zipfile.ZipInfo) -> np.ndarray:
    if item.file_size > PACKING * item.compress_size + 1024:
        raise ValueError(f"'{item.filename}' is damaged: {item.compress_size} bytes do not unpack to {item.file_size}")
    with archive.open(item) as file:
        x = read_array(file, item.file_size)
        file.read(1)  # at its end the checksum is compared
        return x
