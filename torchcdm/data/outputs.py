"""Samples to files: images, one grid of images, arrays, tables."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from torchcdm.errors import UserError
from torchcdm.runtime.files import write_file
from torchcdm.units import DataTransform

if TYPE_CHECKING:
    from pandas import DataFrame

PNG_CHANNELS = (1, 2, 3, 4)
GRID_GAP = 2
"""Pixels between the images of a grid."""
GRID_SIDE = 64
"""Screen pixels up to which a grid enlarges small images, by a whole factor."""


def to_bytes(x: Tensor, transform: DataTransform | None = None, limits: tuple[float, float] | None = None) -> Tensor:
    """Images (N, C, H, W), data units, as uint8, black to white over the range of grey levels; rounded, not truncated.

    Where the ``transform`` has no range (continuous data), or there is none, ``limits`` are black and white, by
    default the smallest and largest value of ``x``; what is beyond is clipped.
    """
    low, high = _range(x, transform, limits)
    x = x if transform is None else transform.quantize(x)
    return ((x.double() - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8).cpu()


def save_images(
    x: Tensor, folder: str | Path, transform: DataTransform | None = None, names: Sequence[str] | None = None
) -> list[Path]:
    """Each image (N, C, H, W), data units, in its own file below ``folder``, which is made; gives their paths.

    PNG, scaled as by :func:`to_bytes`; grey images with more than 256 levels become 16-bit PNG with their own values,
    images of more than four channels .npy files (C, H, W) with their own values. They are called by ``names``, without
    suffix, or 000000, 000001, ...

    Raises:
        UserError: Not images, or the folder cannot be written.
    """
    _refuse_vectors(x)
    folder = Path(folder)
    names = [f"{i:06d}" for i in range(len(x))] if names is None else names
    deep = transform is not None and transform.low == 0 and 255 < (transform.high or 0) <= 65535 and x.shape[1] == 1
    if x.shape[1] not in PNG_CHANNELS:
        values, suffix, packed = _stored(x, transform), ".npy", _npy
    elif deep:
        values, suffix, packed = _stored(x, transform), ".png", png
    else:
        values, suffix, packed = to_bytes(x, transform).numpy(), ".png", png
    paths = [folder / f"{name}{suffix}" for name in names]
    for path, image in zip(paths, values, strict=True):
        write_file(path, packed(image), flush=False)
    return paths


def save_grid(
    x: Tensor,
    path: str | Path,
    transform: DataTransform | None = None,
    columns: int | None = None,
    zoom: int | None = None,
) -> Path:
    """All images (N, C, H, W), data units, in one PNG, to look at; grey levels as by :func:`to_bytes`.

    They stand in so many ``columns``, as square as possible when None, ``zoom`` screen pixels for each of theirs, by
    default as many as bring small ones to :data:`GRID_SIDE`. Those that are neither grey nor colour show their
    channels side by side.
    """
    _refuse_vectors(x)
    path = Path(path)
    write_file(path, png(sheet(to_bytes(x, transform), columns, zoom)))
    return path


def sheet(images: Tensor, columns: int | None = None, zoom: int | None = None) -> np.ndarray:
    """Images, uint8 (N, C, H, W), as one (C', H', W'): with columns and enlargement as of :func:`save_grid`."""
    zoom = zoom or max(1, GRID_SIDE // max(images.shape[2:]))
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    if images.shape[1] not in (1, 3):
        images = images.movedim(1, 2).flatten(2)[:, None]  # (N, 1, H, C W)
    count, channels, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    sheet = torch.full((channels, rows * (height + GRID_GAP), columns * (width + GRID_GAP)), 255, dtype=torch.uint8)
    for k, image in enumerate(images):
        top, left = k // columns * (height + GRID_GAP), k % columns * (width + GRID_GAP)
        sheet[:, top : top + height, left : left + width] = image
    return sheet[:, :-GRID_GAP, :-GRID_GAP].numpy()


def save_array(x: Tensor, path: str | Path, transform: DataTransform | None = None, y: Tensor | None = None) -> Path:
    """Samples (N, *shape), data units, as .npy, or with their labels as .npz with x and y; ``array:FILE`` reads both.

    Grey levels are rounded and stored as the smallest integer type that holds them; continuous data as float32.

    Raises:
        UserError: Another suffix, labels for .npy, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".npy", ".npz"):
        raise UserError(f"{path}: arrays are written as .npy or .npz")
    values = _stored(x, transform)
    if path.suffix == ".npz":
        content = io.BytesIO()
        np.savez(content, x=values, **({} if y is None else {"y": y.cpu().numpy()}))
        write_file(path, content.getvalue())
    elif y is not None:
        raise UserError(f"{path}: labels need an .npz file")
    else:
        write_file(path, _npy(values))
    return path


def save_table(x: Tensor | DataFrame, path: str | Path, transform: DataTransform | None = None) -> Path:
    """A data frame, or vectors (N, d) in data units, as CSV with column names; ``table:FILE`` reads it back exactly.

    The ``transform`` has the names, and values to round to; c0, c1, ... where it has none.
    """
    import pandas as pd

    if isinstance(x, Tensor):
        x = x if transform is None else transform.quantize(x)
        known = transform is not None and transform.table is not None
        names = [f"c{k}" for k in range(x.shape[1])]
        x = transform.table.decode(x) if known else pd.DataFrame(x.cpu().numpy(), columns=names)
    write_file(Path(path), x.to_csv(index=False))
    return Path(path)


def _range(x: Tensor, transform: DataTransform | None, limits: tuple[float, float] | None) -> tuple[float, float]:
    """What becomes black and white."""
    if transform is not None and transform.low is not None and transform.high is not None:
        return transform.low, transform.high
    low, high = limits or ((float(x.min()), float(x.max())) if x.numel() else (0.0, 1.0))
    return low, high if high > low else low + 1.0


def _stored(x: Tensor, transform: DataTransform | None) -> np.ndarray:
    """Values as they are stored: rounded integers of the smallest type on a grid of whole numbers, else float32."""
    if transform is None or transform.bin != 1.0:
        return x.detach().cpu().numpy() if not x.is_floating_point() else x.detach().float().cpu().numpy()
    values = transform.quantize(x.double()).cpu().numpy()
    low, high = values.min(initial=transform.low or 0), values.max(initial=transform.high or 0)
    types = (np.uint8, np.uint16, np.int16, np.int32)
    return values.astype(next(t for t in types if np.iinfo(t).min <= low and high <= np.iinfo(t).max))


def png(image: np.ndarray) -> bytes:
    """One image (C, H, W), uint8 of 1 to 4 channels, or uint16 grey."""
    from PIL import Image

    content = io.BytesIO()
    pixels = image[0] if len(image) == 1 else np.ascontiguousarray(np.moveaxis(image, 0, 2))
    Image.fromarray(pixels).save(content, format="png")
    return content.getvalue()


def _npy(values: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, values)
    return content.getvalue()


def _refuse_vectors(x: Tensor) -> None:
    if x.ndim != 4:
        shape = tuple(x.shape[1:])
        raise UserError(f"samples of shape {shape} are no images; save them with save_array or save_table")
