"""Where an input is odd: the pixels of an image, or the columns of a row, at which the denoiser errs more than usual.

The ELBO is a sum of these squared errors over levels and places. Each is compared with that of normal data at its
place. Errors of single pixels show what is rough; errors of small areas show what is smooth but out of place.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from torchcdm.apps.anomaly.scores import as_samples, by_batches
from torchcdm.data.outputs import save_images, sheet, to_bytes
from torchcdm.errors import UserError
from torchcdm.models.denoiser import Denoiser
from torchcdm.random import evenly_spaced, normal, stream
from torchcdm.units import DataTransform

FLOOR = 0.1  # share of the mean deviation that is added to that of every place: some never vary in the reference
AT_ONCE = 256  # inputs whose errors are in memory together: levels and areas take many times as much as maps
LARGEST = 500  # reference samples that are used at most
USUAL = 0.95  # share of normal inputs whose map stays below the limit everywhere


@final
@dataclass(eq=False, repr=False)
class AnomalyMap:
    """For each place of an input, by how many deviations of normal data the denoiser errs there beyond their mean.

    The largest value of a map stays below its ``limit`` for 19 of 20 normal inputs. Defaults were chosen on validation
    images with spoiled patches (``studies.benchmarks.anomaly_maps``).

    Args:
        model: The model of the normal data; put into evaluation mode while it is used.
        ratios: Noise-to-signal ratios at which inputs are denoised: to hide what is odd, not what is around it.
        areas: Deviations of the Gaussians that average an image's errors before they are squared, over its shorter
            side; 0 for those of single pixels. The largest of these maps counts at each place.
        blur: Deviation of the Gaussian that smooths a map, over the shorter side of the image.

    Example:
        >>> maps = AnomalyMap(model).fit(normal)
        >>> odd = maps(x) > maps.limit
    """

    model: Denoiser
    ratios: Sequence[float] = (0.5, 1.0, 2.0)
    areas: Sequence[float] = (0.0, 1 / 18)
    blur: float = 1 / 12
    limit: float = field(init=False)
    _mean: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not len(self.ratios) or min(self.ratios) <= 0:
            raise UserError(f"ratios is {self.ratios}; give noise-to-signal ratios, above 0")

    def fit(self, reference: Tensor) -> "AnomalyMap":
        """Learns what errors are normal, of at most 500 samples of a ``reference`` that the model was not trained on,
        data units, (N, *shape); UserError as of :func:`torchcdm.apps.anomaly.scores.as_samples`."""
        reference = as_samples(self.model, reference, 2)
        return self.learn(self.errors(reference[evenly_spaced(len(reference), LARGEST)]))

    def __call__(self, x: Tensor) -> Tensor:
        """Maps of ``x`` (N, *shape), data units: float64 (N, H, W) of images, smoothed, and (N, d) of vectors."""
        parts = as_samples(self.model, x).split(AT_ONCE)
        return torch.cat([self.apply(self.errors(part)) for part in parts])

    def errors(self, x: Tensor) -> Tensor:
        """Errors of E[x_0 | x_t], model units, the mean over draws of x_t: float64 (N, levels, *shape).

        Draws, the same for every input, come in pairs of opposite noise, in whose mean what is odd in it cancels.
        """
        model, schedule = self.model, self.model.schedule
        levels = [int((schedule.ratio[1:-1] - ratio).abs().argmin()) + 1 for ratio in self.ratios]

        def of(z: Tensor) -> Tensor:
            z = z if model.transform is None else model.transform(z)
            pairs, found = 2 if z.ndim == 4 else 4, []
            half = normal((pairs, *z.shape[1:]), stream(0, "maps"), z.device).to(z.dtype)
            for t in levels:
                x_0 = [model.denoise(schedule.perturb(z, t, eps), t).x0 for eps in (*half, *-half)]
                found.append((torch.stack(x_0).mean(0) - z).double())
            return torch.stack(found, 1).cpu()

        return by_batches(model, of, x)

    def learn(self, normal: Tensor) -> "AnomalyMap":
        """As :meth:`fit`, of :meth:`errors` of the reference."""
        squares = self._squares(normal)
        deviation = squares.std(0)
        average = deviation.flatten(2).mean(2)
        deviation = deviation + FLOOR * average.reshape(*average.shape, *[1] * (deviation.ndim - 2))
        self._mean, self._deviation = squares.mean(0), deviation.clamp_min(1e-12)
        self.limit = float(self.apply(normal).flatten(1).amax(1).quantile(USUAL))
        return self

    def apply(self, errors: Tensor) -> Tensor:
        """Maps of :meth:`errors`."""
        if self._mean is None:
            raise UserError("the map is not fitted; call fit with normal data first")
        largest = torch.finfo(torch.float32).max
        z = ((self._squares(errors) - self._mean) / self._deviation).mean(2).nan_to_num(largest, largest)
        return z[:, 0] if z.ndim == 3 else _smooth(z, self.blur).amax(1)

    def _squares(self, errors: Tensor) -> Tensor:
        """Squared errors by area, those of an image's channels added up: (N, areas, levels, *places)."""
        if errors.ndim == 3:
            return errors.square()[:, None]
        return torch.stack([_smooth(errors, area).square().sum(2) for area in self.areas], 1)


def _smooth(maps: Tensor, share: float) -> Tensor:
    """(..., H, W) under a Gaussian, its deviation a share of the shorter side; edges are repeated."""
    deviation = share * min(maps.shape[-2:])
    sigma = (0.0,) * (maps.ndim - 2) + (deviation, deviation)
    return torch.from_numpy(gaussian_filter(maps.numpy(), sigma, mode="nearest", radius=math.ceil(2 * deviation)))


def top_columns(maps: Tensor, names: Sequence[str] | None = None, most: int = 3) -> list[str]:
    """The columns that contribute ``most`` to maps of rows (N, d), with values, such as ``flow 6.2, volt 3.1``."""
    names = names or [f"c{k}" for k in range(maps.shape[1])]
    found = maps.topk(min(most, maps.shape[1]))
    pairs = (zip(*row, strict=True) for row in zip(found.indices.tolist(), found.values.tolist(), strict=True))
    return [", ".join(f"{names[k]} {value:.1f}" for k, value in row) for row in pairs]


def overlay(maps: Tensor, x: Tensor, limit: float, transform: DataTransform | None = None) -> Tensor:
    """Images ``x`` (N, C, H, W), data units, with their maps (N, H, W) in red, from half the ``limit`` on: uint8
    (N, 3, H, W). The ``transform`` is the model's: range and grid."""
    colours = to_bytes(x, transform).double()
    colours = colours if x.shape[1] == 3 else colours.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    red = torch.tensor([255.0, 0.0, 0.0]).double().reshape(3, 1, 1)
    strength = (maps.double() / limit - 0.5).clamp(0, 0.9)[:, None]
    return torch.lerp(colours, red.expand_as(colours), strength).round().byte()


def save_maps(maps: Tensor, x: Tensor, limit: float, folder: Path, transform: DataTransform) -> list[Path]:
    """One PNG for each image, 000000.png and so on: the image, and beside it its map as in :func:`overlay`."""
    pairs = torch.stack([overlay(torch.zeros_like(maps), x, limit, transform), overlay(maps, x, limit, transform)], 1)
    sheets = torch.from_numpy(np.stack([sheet(pair, 2) for pair in pairs]))
    return save_images(sheets, folder, DataTransform.images(sheets.shape[1:]))
