"""One image file: what its header says, and its pixels in data units."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from torchcdm.data import pixels
from torchcdm.data.arrays import Grid, channels_first
from torchcdm.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm", ".pnm", ".jp2", ".npy")
)
"""Files that count as images; an .npy file holds one image, of any number of channels."""

WIDE_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")
SWAPPED_ORIENTATIONS = (5, 6, 7, 8)
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ImageInfo:
    """What an image file holds, read from its header.

    Attributes:
        channels: Grey 1, grey and alpha 2, colour 3, colour and alpha 4; anything in .npy files.
        height: Pixels, as the image is meant to be seen (EXIF orientation applied).
        width: Likewise.
        high: Largest value of an unsigned integer file, 255 or 65535; None for floats.
        reduced: Pillow reads the file's 16-bit colours as 8 bits.
    """

    channels: int
    height: int
    width: int
    high: int | None
    reduced: bool = False

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def grid(self) -> Grid | None:
        return None if self.high is None else (0, self.high)

    def __str__(self) -> str:
        depth = {255: "8 bit", 65535: "16 bit", None: "float"}[self.high]
        return f"{self.height} x {self.width} pixels, {self.channels} channel(s), {depth}"


def describe(path: Path) -> ImageInfo:
    """The header of an image file; the pixels are not decoded.

    Raises:
        UserError: Not an image that Pillow or numpy reads.
    """
    from PIL import Image

    if path.suffix.lower() == ".npy":
        array = _load_array(path)
        return ImageInfo(*array.shape, {"u1": 255, "u2": 65535}.get(array.dtype.str[1:]))
    try:
        with Image.open(path) as image:
            width, height = image.size
            # Not image.getexif(): for PNG files that decodes the pixels.
            if Image.Image.getexif(image).get(EXIF_ORIENTATION) in SWAPPED_ORIENTATIONS:
                width, height = height, width
            mode, high = _plain_mode(image), pillow_high(image)
            reduced = mode in ("RGB", "RGBA") and any("16" in str(tile[3]) for tile in image.tile)
    except Exception as error:  # Pillow's plug-ins raise many types for broken files
        raise _unreadable(path, error) from error
    return ImageInfo({"LA": 2, "RGB": 3, "RGBA": 4}.get(mode, 1), height, width, high, reduced)


def decode(path: Path) -> Tensor:
    """The pixels of an image file: (C, H, W), uint8, or float32 where the file has 16 bits or floats.

    Raises:
        UserError: The file is missing or corrupt.
    """
    from PIL import Image

    if path.suffix.lower() == ".npy":
        array = _load_array(path)
        return torch.from_numpy(np.array(array, np.uint8 if array.dtype == np.uint8 else np.float32))
    try:
        with Image.open(path) as image:
            return from_pillow(image)
    except Exception as error:
        raise _unreadable(path, error) from error


def from_pillow(image: Image) -> Tensor:
    """The pixels of a Pillow image, as :func:`decode` gives them. Orientation from EXIF is applied."""
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    mode = _plain_mode(upright)
    array = np.asarray(upright if upright.mode == mode else upright.convert(mode))
    if mode in WIDE_MODES and (array.min() < 0 or array.max() > 65535):
        raise ValueError("32-bit integers beyond 0 ... 65535")
    array = array.astype(np.uint8 if array.dtype == np.uint8 else np.float32)
    return torch.from_numpy(array)[None] if array.ndim == 2 else torch.from_numpy(array).movedim(-1, 0).contiguous()


def pillow_high(image: Image) -> int | None:
    """Largest value that the pixels of a Pillow image can have; None for floats."""
    mode = _plain_mode(image)
    return None if mode == "F" else 65535 if mode in WIDE_MODES else 255


@dataclass(frozen=True)
class ImageReader:
    """Reads image files into one shape; picklable, for worker processes.

    Attributes:
        high: Largest value of the file format; None for floats.
        size: (H, W) to resize to; None leaves the size.
        channels: Channels to convert to; None leaves them.
        crop: Box (left, upper, right, lower) in pixels, cut out first.
    """

    high: int | None
    size: tuple[int, int] | None = None
    channels: int | None = None
    crop: tuple[int, int, int, int] | None = None

    def __call__(self, path: Path) -> Tensor:
        return self.prepare(decode(path))

    def prepare(self, image: Tensor) -> Tensor:
        """A decoded image, (C, H, W), brought to the shape; stays on the grid."""
        if self.crop is not None:
            left, upper, right, lower = self.crop
            image = image[:, upper:lower, left:right]
        if self.channels is not None:
            image = pixels.to_channels(image, self.channels, self.high or 1.0)
        if self.size is not None:
            image = pixels.resize(image, self.size)
        return image.round() if self.high is not None and image.is_floating_point() else image


def _plain_mode(image: Image) -> str:
    """The Pillow mode in which the pixels are values: palettes, bitmaps and printers' colours converted."""
    if image.mode == "P":
        return "RGBA" if "transparency" in image.info else "RGB"
    if image.mode in ("L", "LA", "RGB", "RGBA", "F", *WIDE_MODES):
        return image.mode
    return {"1": "L", "PA": "RGBA", "La": "LA", "RGBa": "RGBA", "RGBX": "RGB"}.get(image.mode, "RGB")


def _load_array(path: Path) -> np.ndarray:
    """One image (C, H, W) of an .npy file, mapped and not read."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:
        raise _unreadable(path, error) from error
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or array.dtype.str[1:] not in ("u1", "u2", "f2", "f4", "f8"):
        raise UserError(
            f"{path}: an array of shape {array.shape}, type {array.dtype} is not one image; "
            "write (H, W), (H, W, C) or (C, H, W) as uint8, uint16 or floats"
        )
    return array if channels_first(array.shape) else np.moveaxis(array, 2, 0)


def _unreadable(path: Path, error: Exception) -> UserError:
    if not path.exists():
        return UserError(f"{path}: no such file")
    reason = str(error).replace(str(path), path.name) or type(error).__name__
    return UserError(f"{path}: cannot be read as an image ({reason}); --skip-bad leaves such files out")
