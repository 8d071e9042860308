"""Where an input is odd: the pixels of an image, or the columns of a row, at which the denoiser errs more than usual.

log p falls short where E[x_0 | x_t] is not x_0: the ELBO is a sum of these squared errors over levels and places. Each
is compared with that of normal data at its place. Errors of single pixels show what is rough; errors of small areas,
in which those of pixels cancel, show what is smooth but out of place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from torchcdm.apps.anomaly.profile import as_samples, by_batches
from torchcdm.data.outputs import png, to_bytes
from torchcdm.models.denoiser import Denoiser
from torchcdm.random import stream
from torchcdm.runtime.files import write_file
from torchcdm.units import DataTransform

FLOOR = 0.1
"""Share of the mean deviation that is added to that of every place: some never vary in the reference."""

LARGEST = 500
"""Reference samples that are used at most."""

SIDE = 128
"""Screen pixels up to which pictures of maps enlarge small images, by a whole factor."""

USUAL = 0.95
"""Share of normal inputs whose map stays below the limit everywhere."""


@final
@dataclass(frozen=True)
class MapSettings:
    """How maps are made; chosen on validation images with spoiled patches (``studies.benchmarks.anomaly_maps``).

    Attributes:
        ratios: Noise-to-signal ratios at which inputs are denoised: enough noise to hide what is odd, not what is
            around it.
        pairs: Pairs of opposite draws of noise, in whose mean error what is odd in the noise cancels; the same ones
            for every input. 2 for images and 4 for vectors when None.
        areas: Deviations of the Gaussians that average an image's errors before they are squared, over its shorter
            side; 0 for those of single pixels. The largest of these maps counts at each place.
        blur: Deviation of the Gaussian that smooths a map, over the shorter side of the image.
    """

    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    pairs: int | None = None
    areas: tuple[float, ...] = (0.0, 1 / 18)
    blur: float = 1 / 12


@final
@dataclass(frozen=True)
class AnomalyMap:
    """For each place of an input, by how many deviations of normal data the denoiser errs there beyond their mean.

    Attributes:
        model: The model of the normal data.
        settings: How maps are made.
        mean: Mean squared error among normal data by area, level and place, float64 (areas, levels, *places).
        deviation: Its deviation, of the same shape.
        limit: The largest value of a map stays below it for 19 of 20 normal inputs.

    Example:
        >>> maps = AnomalyMap.fit(model, normal)
        >>> odd = maps(x) > maps.limit
    """

    model: Denoiser
    settings: MapSettings
    mean: Tensor
    deviation: Tensor
    limit: float = math.inf

    @classmethod
    def fit(cls, model: Denoiser, reference: Tensor, settings: MapSettings = MapSettings()) -> AnomalyMap:
        """Learns what errors are normal.

        Args:
            model: The model; put into evaluation mode while it is used.
            reference: Normal data that the model was not trained on, data units, (N, *shape); at most 500 are used.
            settings: How maps are made.

        Raises:
            UserError: Fewer than two samples, another shape than the model's, values that are not finite.
        """
        reference = as_samples(model, reference, "the reference", 2)
        reference = reference[torch.linspace(0, len(reference) - 1, LARGEST).long().unique()]
        return cls.of_errors(model, errors(model, reference, settings), settings)

    @classmethod
    def of_errors(cls, model: Denoiser, normal: Tensor, settings: MapSettings) -> AnomalyMap:
        """The same of :func:`errors` of normal data."""
        squares = _squares(normal, settings)
        deviation = squares.std(0)
        average = deviation.flatten(2).mean(2)
        deviation = deviation + FLOOR * average.reshape(*average.shape, *[1] * (deviation.ndim - 2))
        found = cls(model, settings, squares.mean(0), deviation.clamp_min(1e-12))
        limit = float(found.of(normal).flatten(1).amax(1).quantile(USUAL))
        return cls(model, settings, found.mean, found.deviation, limit)

    def __call__(self, x: Tensor) -> Tensor:
        """Maps of ``x`` (N, *shape), data units: float64 (N, H, W) of images, smoothed, and (N, d) of vectors.

        Raises:
            UserError: Nothing to look at, another shape than the model's, values that are not finite.
        """
        return self.of(errors(self.model, as_samples(self.model, x), self.settings))

    def of(self, found: Tensor) -> Tensor:
        """Maps of :func:`errors`."""
        largest = torch.finfo(torch.float32).max
        z = ((_squares(found, self.settings) - self.mean) / self.deviation).mean(2).nan_to_num(largest, largest)
        return z[:, 0] if z.ndim == 3 else _smooth(z, self.settings.blur).amax(1)


def errors(model: Denoiser, x: Tensor, settings: MapSettings) -> Tensor:
    """Errors of E[x_0 | x_t], model units, the mean over draws of x_t: float64 (N, levels, *shape).

    Args:
        model: The model.
        x: Data units, (N, *shape).
        settings: Levels and draws.
    """
    schedule = model.schedule
    levels = [int((schedule.ratio[1:-1] - ratio).abs().argmin()) + 1 for ratio in settings.ratios]
    pairs = settings.pairs or (2 if x.ndim == 4 else 4)
    half = torch.randn(pairs, *x.shape[1:], generator=stream(0, "maps"), dtype=torch.float64)
    noise = torch.cat([half, -half])

    def of(z: Tensor) -> Tensor:
        z = z if model.transform is None else model.transform(z)
        found = []
        for t in levels:
            x_0 = [model.denoise(schedule.perturb(z, t, eps), t).x0 for eps in noise.to(z)]
            found.append((torch.stack(x_0).mean(0) - z).double())
        return torch.stack(found, 1).cpu()

    return by_batches(model, of, x)


def _squares(found: Tensor, settings: MapSettings) -> Tensor:
    """Squared errors by area, those of an image's channels added up: (N, areas, levels, *places)."""
    if found.ndim == 3:
        return found.square()[:, None]
    return torch.stack([_smooth(found, area).square().sum(2) for area in settings.areas], 1)


def top_columns(maps: Tensor, names: Sequence[str] | None = None, most: int = 3) -> list[str]:
    """The columns that contribute most to each row and by how many deviations, such as ``flow 6.2, volt 3.1``.

    Args:
        maps: Maps of rows, (N, d).
        names: Names of the columns; c0, c1, ... when None.
        most: Number of columns named.
    """
    names = names or [f"c{k}" for k in range(maps.shape[1])]
    found = maps.topk(min(most, maps.shape[1]))
    pairs = (zip(*row, strict=True) for row in zip(found.indices.tolist(), found.values.tolist(), strict=True))
    return [", ".join(f"{names[k]} {value:.1f}" for k, value in row) for row in pairs]


def overlay(maps: Tensor, x: Tensor, limit: float, transform: DataTransform | None = None) -> Tensor:
    """Images with their maps in red, from half the limit on: uint8 (N, 3, H, W).

    Args:
        maps: Maps of images, (N, H, W).
        x: The images, data units, (N, C, H, W).
        limit: :attr:`AnomalyMap.limit`.
        transform: The model's: range and grid.
    """
    colours = to_bytes(x, transform).double()
    colours = colours if x.shape[1] == 3 else colours.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    red = torch.tensor([255.0, 0.0, 0.0]).double().reshape(3, 1, 1)
    strength = (maps.double() / limit - 0.5).clamp(0, 0.9)[:, None]
    return torch.lerp(colours, red.expand_as(colours), strength).round().byte()


def save_maps(
    maps: Tensor, x: Tensor, limit: float, folder: Path, transform: DataTransform | None = None
) -> list[Path]:
    """One PNG for each image, 000000.png and so on: the image, and beside it its map as in :func:`overlay`.

    Raises:
        UserError: The folder cannot be written.
    """
    plain = overlay(torch.zeros_like(maps), x, limit, transform)
    pairs = torch.cat([plain, overlay(maps, x, limit, transform)], 3)
    zoom = max(1, SIDE // min(x.shape[2:]))
    paths = [folder / f"{k:06d}.png" for k in range(len(x))]
    for path, pair in zip(paths, pairs, strict=True):
        write_file(path, png(pair.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2).numpy()), flush=False)
    return paths


def _smooth(maps: Tensor, share: float) -> Tensor:
    """(..., H, W) under a Gaussian, its deviation a share of the shorter side; edges are repeated."""
    deviation = share * min(maps.shape[-2:])
    if deviation == 0:
        return maps
    reach = math.ceil(2 * deviation)
    kernel = (-0.5 * (torch.arange(-reach, reach + 1) / deviation) ** 2).exp().double()
    padded = pad(maps.reshape(-1, 1, *maps.shape[-2:]), [reach] * 4, "replicate")
    return conv2d(padded, (kernel[:, None] * kernel / kernel.sum() ** 2)[None, None]).reshape(maps.shape)
