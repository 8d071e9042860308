"""Samples to files: images, one grid of images, arrays, tables, and what is known of each."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from torchcdm.errors import UserError
from torchcdm.runtime.files import write_file, write_rows, written
from torchcdm.units import DataTransform

GRID_GAP = 2  # pixels between the images of a grid
GRID_SIDE = 64  # screen pixels up to which a grid enlarges small images, by a whole factor


def to_bytes(x: Tensor, transform: DataTransform | None = None, limits: tuple[float, float] | None = None) -> Tensor:
    """Images (N, C, H, W), data units, as uint8, black to white over the range of grey levels; rounded, not truncated.

    Where the ``transform`` has no range (continuous data), or there is none, ``limits`` are black and white, by
    default the smallest and largest value of ``x``; what is beyond is clipped.
    """
    if x.ndim != 4:
        shape = tuple(x.shape[1:])
        raise UserError(f"samples of shape {shape} are no images; save them with save_array or save_table")
    if transform is not None:
        x = transform.quantize(x)
        if transform.low is not None and transform.high is not None:
            limits = (transform.low, transform.high)
    low, high = limits or ((float(x.min()), float(x.max())) if x.numel() else (0.0, 1.0))
    return ((x.double() - low) * (255 / (high - low or 1.0))).round().clamp(0, 255).to(torch.uint8).cpu()


def save_images(
    x: Tensor, folder: str | Path, transform: DataTransform | None = None, names: Sequence[str] | None = None
) -> list[Path]:
    """Each image (N, C, H, W), data units, in its own file below ``folder``, which is made; gives their paths.

    PNG, scaled as by :func:`to_bytes`; grey images with more than 256 levels become 16-bit PNG with their own values,
    images of more than four channels .npy files (C, H, W) with their own values. They are called by ``names``, without
    suffix, or 000000, 000001, ... UserError for what are no images, or a folder that cannot be written.
    """
    many = x.ndim == 4 and x.shape[1] > 4
    grey = x.ndim == 4 and x.shape[1] == 1
    deep = grey and transform is not None and transform.low == 0 and 255 < (transform.high or 0) <= 65535
    values = _stored(x, transform) if many or deep else to_bytes(x, transform).numpy()
    names = [f"{i:06d}" for i in range(len(x))] if names is None else names
    if len(names) != len(x):
        raise UserError(f"{folder}: {len(names)} names for {len(x)} images; give one each")
    paths = [Path(folder) / f"{name}{'.npy' if many else '.png'}" for name in names]
    for path, image in zip(paths, values, strict=True):
        with written(path, flush=False) as file:
            np.save(file, image) if many else file.write(png(image))
    return paths


def check_no_more(folder: Path, n: int) -> None:
    """Refuses a folder that holds images of an earlier call, beyond the ``n`` that :func:`save_images` will number."""
    if any(folder.glob(f"{n:06d}[.-]*")):
        raise UserError(f"{folder}: holds more images, of an earlier call; choose another folder, or remove them")


def save_grid(x: Tensor, path: str | Path, transform: DataTransform | None = None, columns: int | None = None) -> Path:
    """All images (N, C, H, W), data units, in one PNG, to look at; grey levels as by :func:`to_bytes`.

    They stand in so many ``columns``, as square as possible when None; small ones are enlarged to ``GRID_SIDE``.
    Those that are neither grey nor colour show their channels side by side.
    """
    if not len(x):
        raise UserError(f"{path}: there are no images to show")
    if Path(path).suffix.lower() != ".png":
        raise UserError(f"{path}: a grid is a PNG; end its name with .png")
    write_file(Path(path), png(sheet(to_bytes(x, transform), columns)))
    return Path(path)


def sheet(images: Tensor, columns: int | None = None, side: int = GRID_SIDE) -> np.ndarray:
    """Images, uint8 (N, C, H, W), as one (C', H', W'): as of :func:`save_grid`, enlarged up to so many pixels."""
    zoom = max(1, side // max(images.shape[2:]))
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    if images.shape[1] not in (1, 3):
        images = images.movedim(1, 2).flatten(2)[:, None]  # (N, 1, H, C W)
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    tiles = pad(images, (0, GRID_GAP, 0, GRID_GAP), value=255)
    tiles = torch.cat([tiles, torch.full_like(tiles[:1], 255).expand(-len(tiles) % columns, -1, -1, -1)])
    rows = [torch.cat(list(row), 2) for row in tiles.split(columns)]
    return torch.cat(rows, 1)[:, :-GRID_GAP, :-GRID_GAP].numpy()


def save_array(x: Tensor, path: str | Path, transform: DataTransform | None = None, y: Tensor | None = None) -> Path:
    """Samples (N, *shape), data units, as .npy, or with their labels as .npz with x and y; ``array:FILE`` reads both.

    Grey levels are rounded and stored as the smallest integer type that holds them; continuous data as float32.
    UserError for another suffix, labels for .npy, or a file that cannot be written.
    """
    path, values, labels = Path(path), _stored(x, transform), {} if y is None else {"y": y.cpu().numpy()}
    if path.suffix != ".npz" and (labels or path.suffix != ".npy"):
        raise UserError(f"{path}: arrays are written as .npy, or with labels as .npz")
    with written(path) as file:
        np.savez(file, x=values, **labels) if path.suffix == ".npz" else np.save(file, values)
    return path


def save_table(
    x: Tensor, path: str | Path, transform: DataTransform | None = None, label: str | None = None,
    classes: Sequence[Any] = (),
) -> Path:  # fmt: skip
    """Vectors (N, d), data units, as CSV with column names, which ``table:FILE`` reads back exactly. The ``transform``
    has the names, and values to round to; c0, c1, ... where it has none. ``classes``, if any, are a column ``label``.
    """
    import pandas as pd

    if x.ndim != 2:
        raise UserError(f"{path}: samples of shape {tuple(x.shape[1:])} are no rows; save them with save_images")
    x = x if transform is None else transform.quantize(x)
    table = None if transform is None else transform.table
    frame = pd.DataFrame(x.cpu().numpy()).add_prefix("c") if table is None else table.decode(x)
    if label is not None and classes:
        frame[label] = classes
    write_file(Path(path), frame.to_csv(index=False))
    return Path(path)


def save_sheet(
    x: Tensor, stem: Path, transform: DataTransform | None, label: str | None = None, classes: Sequence[Any] = ()
) -> Path:
    """All samples of a model with this ``transform`` in one file: ``stem`` as a PNG grid, or as a CSV table, which
    has their ``classes``, too, as :func:`save_table` writes them."""
    if x.ndim == 4:
        return save_grid(x, stem.with_suffix(".png"), transform)
    return save_table(x, stem.with_suffix(".csv"), transform, label, classes)


def in_words(y: Tensor | None, names: Sequence[str] | None) -> list[Any]:
    """Classes (N,) by their ``names``, as numbers where they have none; nothing for None."""
    return [] if y is None else [names[label] if names else label for label in y.tolist()]


def save_manifest(
    path: Path, seed: int, classes: Sequence[Any], log_p: Tensor | None, n: int, files: Sequence[Path] = ()
) -> None:
    """``manifest.csv``: index, seed, class if known, log p (nats, data units) and file of ``n`` samples."""
    values = [""] * n if log_p is None else [f"{value:.4f}" for value in log_p.tolist()]
    columns = {"index": range(n), "seed": [seed] * n, "label": classes or [""] * n, "log_p": values}
    columns |= {"file": [file.name for file in files]} if files else {}
    write_rows(path, list(columns), zip(*columns.values(), strict=True))


def _stored(x: Tensor, transform: DataTransform | None) -> np.ndarray:
    """Values as they are stored: rounded integers of the smallest type on a grid of whole numbers, else float32."""
    if transform is None or transform.bin != 1.0:
        return (x.float() if x.is_floating_point() else x).detach().cpu().numpy()
    values = transform.quantize(x.double()).cpu().numpy()
    low, high = values.min(initial=transform.low or 0), values.max(initial=transform.high or 0)
    types = (np.uint8, np.uint16, np.int16, np.int32)
    return values.astype(next(t for t in types if np.iinfo(t).min <= low and high <= np.iinfo(t).max))


def png(image: np.ndarray) -> bytes:
    """One image (C, H, W), uint8 of 1 to 4 channels, or uint16 grey."""
    content = io.BytesIO()
    pixels = image[0] if len(image) == 1 else np.ascontiguousarray(np.moveaxis(image, 0, 2))
    Image.fromarray(pixels).save(content, format="png")
    return content.getvalue()
