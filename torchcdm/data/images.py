"""One image file: what its header says, and its pixels in data units."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

from torchcdm.data import pixels
from torchcdm.data.arrays import channels_first
from torchcdm.data.assembly import Grid
from torchcdm.data.reading import read_array, reading

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm", ".pnm", ".jp2", ".npy")
)
"""Files that count as images; an .npy file holds one image, of any number of channels."""

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000")
"""What Pillow may take a file for, whatever its name says: others, PostScript for one, start programs."""

WIDE_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")
SWAPPED_ORIENTATIONS = (5, 6, 7, 8)
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ImageInfo:
    """What an image file holds, read from its header.

    Attributes:
        channels: Grey 1, grey and alpha 2, colour 3, colour and alpha 4; anything in .npy files.
        height: Pixels, as the image is meant to be seen (EXIF orientation applied).
        width: Pixels, in the same sense.
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

    with _open(path) as file:
        if path.suffix.lower() == ".npy":
            array = np.lib.format.open_memmap(path, "r")
            high = {"u1": 255, "u2": 65535}.get(array.dtype.str[1:])
            return ImageInfo(*_image_shape(array.shape, array.dtype), high)
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            # Not image.getexif(): for PNG files that decodes the pixels.
            if Image.Image.getexif(image).get(EXIF_ORIENTATION) in SWAPPED_ORIENTATIONS:
                width, height = height, width
            mode, high = _plain_mode(image), pillow_high(image)
            reduced = mode in ("RGB", "RGBA") and any("16" in str(tile[3]) for tile in image.tile)
    return ImageInfo({"LA": 2, "RGB": 3, "RGBA": 4}.get(mode, 1), height, width, high, reduced)


def decode(path: Path) -> Tensor:
    """The pixels of an image file: (C, H, W), uint8, or float32 where the file has 16 bits or floats.

    Raises:
        UserError: The file is missing or corrupt.
    """
    from PIL import Image

    with _open(path) as file:
        if path.suffix.lower() != ".npy":
            with Image.open(file, formats=FORMATS) as image:
                return from_pillow(image)
        array = read_array(file)
        shape = _image_shape(array.shape, array.dtype)
        if array.ndim == 3 and shape != array.shape:
            array = np.moveaxis(array, 2, 0)
        array = array.reshape(shape).astype(np.uint8 if array.dtype == np.uint8 else np.float32, order="C")
        if not np.isfinite(array).all():
            raise ValueError("values that are not finite numbers of float32")
        return torch.from_numpy(array)


def from_pillow(image: Image) -> Tensor:
    """The pixels of a Pillow image, as :func:`decode` gives them. Orientation from EXIF is applied."""
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    mode = _plain_mode(upright)
    array = np.asarray(upright if upright.mode == mode else upright.convert(mode))
    if mode in WIDE_MODES and (array.min() < 0 or array.max() > 65535):
        raise ValueError("32-bit integers beyond 0 ... 65535")
    array = array.astype(np.uint8 if array.dtype == np.uint8 else np.float32)
    if not np.isfinite(array).all():
        raise ValueError("values that are not finite numbers")
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


def _image_shape(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """(C, H, W) of an array that holds one image."""
    plain = (1, *shape) if len(shape) == 2 else shape
    if len(plain) != 3 or 0 in shape or dtype.str[1:] not in ("u1", "u2", "f2", "f4", "f8"):
        mend = "write (H, W), (H, W, C) or (C, H, W) as uint8, uint16 or floats"
        raise ValueError(f"an array of shape {shape}, type {dtype} is not one image; {mend}")
    return plain if len(shape) == 2 or channels_first(plain) else (plain[2], *plain[:2])


def _open(path: Path) -> AbstractContextManager[BinaryIO]:
    from PIL import Image

    return reading(path, "an image", "; --skip-bad leaves such files out", (Image.DecompressionBombError,))
