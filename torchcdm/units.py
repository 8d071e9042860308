r"""Data units, model units, and what a log-likelihood is measured in.

Data units are the values as they are stored: 0 ... 255 for 8-bit images, 0 ... 16 for the digits, a column's
own unit in a table. The network sees model units, :math:`z = (x - \text{shift}) / \text{scale}` or a bent map of
each dimension, and :math:`\log p(x) = \log p(z) + \log|dz/dx|`. Grey level k owns the cell from k - ½ to k + ½
(times the bin), so that rounding is the inverse of dequantisation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from torchcdm.errors import UserError
from torchcdm.float64 import Float64Module


class DataTransform(Float64Module):
    """The affine map from data units to model units, with the grid that the data lie on.

    Args:
        shape: Event shape, (C, H, W) for images, (d,) for tables.
        shift: Data value at model value 0; a number, or a tensor that broadcasts to ``shape``.
        scale: Data units per model unit; likewise, positive.
        bin: Spacing of the grey levels in data units; None for continuous data.
        dequantize: Whether training and scoring add uniform noise over the cell. Ignored without a bin.
        low: Smallest grey level, where rounding clips; None does not clip.
        high: Largest grey level.

    Example:
        >>> transform = DataTransform.images((1, 28, 28))
        >>> transform.log_det(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5])
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        shift: float | Tensor = 0.0,
        scale: float | Tensor = 1.0,
        bin: float | None = None,
        dequantize: bool = True,
        low: float | None = None,
        high: float | None = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(int(size) for size in shape)
        self.register_buffer("shift", torch.as_tensor(shift, dtype=torch.float64), persistent=False)
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float64), persistent=False)
        if not bool((self.scale > 0).all() and self.scale.isfinite().all()):
            raise UserError("data transform: every scale must be positive and finite; is a column constant?")
        self.bin = bin
        self.dequantize = dequantize and bin is not None
        self.low, self.high = low, high

    @classmethod
    def images(
        cls, shape: Sequence[int], levels: int = 256, dequantize: bool = True
    ) -> DataTransform:
        """Grey levels 0 ... levels - 1 to [-1, 1].

        With ``dequantize`` the cells fill [-1, 1], a bin of 2 / levels; without, the grey levels do, as in the
        paper, a bin of 2 / (levels - 1).
        """
        scale = levels / 2 if dequantize else (levels - 1) / 2
        return cls(shape, (levels - 1) / 2, scale, 1.0, dequantize, 0.0, levels - 1.0)

    @classmethod
    def standardize(cls, x: Tensor) -> DataTransform:
        """Zero mean and unit deviation for each column of ``x`` (N, d); over all pixels of images (N, C, H, W)."""
        values = x.double()
        over = 0 if x.ndim == 2 else None
        mean, deviation = values.mean(over), values.std(over, correction=0)
        return cls(x.shape[1:], mean, deviation)

    @classmethod
    def identity(cls, shape: Sequence[int]) -> DataTransform:
        """Model units are data units."""
        return cls(shape)

    @property
    def dim(self) -> int:
        """Dimensions d of one sample."""
        return math.prod(self.shape)

    def log_det(self, x: Tensor) -> Tensor:
        """log |d model / d data| at ``x`` (B, *shape), data units: float64 (B,), nats.

        log p(data) = log p(model) + log_det.
        """
        return -self.scale.log().expand(self.shape).sum().expand(len(x))

    @property
    def model_bin(self) -> Tensor | None:
        """Spacing of the grey levels in model units, broadcastable to the event; None where there is no such one."""
        return None if self.bin is None else self.bin / self.scale

    @property
    def log_bin(self) -> float | None:
        """log of the bin in data units; None for continuous data."""
        return None if self.bin is None else math.log(self.bin)

    def forward(self, x: Tensor) -> Tensor:
        """Data units to model units, (B, *shape); integers become float32."""
        dtype = x.dtype if x.is_floating_point() else torch.float32
        return ((x.double() - self.shift) / self.scale).to(dtype)

    def inverse(self, z: Tensor) -> Tensor:
        """Model units to data units, (B, *shape)."""
        return (z.double() * self.scale + self.shift).to(z.dtype)

    def add_noise(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Dequantise: x plus uniform noise over its cell, data units; ``x`` itself where there is nothing to do."""
        if not self.dequantize or self.bin is None:
            return x
        x = x if x.is_floating_point() else x.float()
        noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return x + self.bin * (noise - 0.5)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What the network trains on: dequantised, in model units."""
        return self(self.add_noise(x, generator))

    def place(self, x: Tensor, cell: Tensor) -> Tensor:
        """Grey levels, each at the position ``cell`` on [0, 1] of its cell where the model sees cells: model units."""
        return self(x.double() + self.bin * (cell - 0.5)) if self.dequantize else self(x.double())

    def quantize(self, x: Tensor) -> Tensor:
        """Data units rounded to the nearest grey level and clipped to the range; continuous data unchanged."""
        if self.bin is None:
            return x
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        return ((x / self.bin).round() * self.bin).clamp(low, high)

    def to_config(self) -> dict[str, Any]:
        """Plain Python values, exact: floats survive JSON to the last bit."""
        return {
            "shape": list(self.shape),
            "shift": self.shift.tolist(),
            "scale": self.scale.tolist(),
            "bin": self.bin,
            "dequantize": self.dequantize,
            "low": self.low,
            "high": self.high,
        }

    @staticmethod
    def from_config(config: dict[str, Any]) -> DataTransform:
        """The inverse of :meth:`to_config`; histograms are blank, to load a saved state into."""
        config = dict(config)
        kind = {"affine": DataTransform, "gaussianized": GaussianizedTransform}[config.pop("kind", "affine")]
        return kind(**config)


PSEUDO_COUNT = 10.0
"""Samples' worth of the histogram of all dimensions together, added to that of each: no grey level is impossible."""

TAIL = 1e-12
"""Probabilities are kept so far from 0 and 1: 7 standard deviations."""


@final
class GaussianizedTransform(DataTransform):
    r"""Grey levels to standard normals, each dimension by its own histogram: a Gaussian copula's map.

    .. math:: z = \Phi^{-1}(F(x)), \qquad \log|dz/dx| = \log F'(x) - \log\varphi(z)

    with F piecewise linear over the cells. Every dequantised dimension becomes exactly normal, so that the edges
    of the cells and the many pixels that hardly ever change leave nothing to learn: a Gaussian in model units is a
    copula. Noise is added in model units; it is no additive noise on the grey levels.

    Args:
        shape: Event shape.
        bin: Spacing of the grey levels.
        low: Smallest grey level.
        high: Largest grey level.

    Raises:
        UserError: Grey levels without end.

    Attributes:
        cumulative: F at the edges of the cells, (*shape, levels + 1), from 0 to 1.
    """

    cumulative: Tensor

    def __init__(self, shape: Sequence[int], bin: float | None, low: float | None, high: float | None) -> None:
        super().__init__(shape, bin=bin, low=low, high=high)
        if bin is None or low is None or high is None:
            raise UserError("gaussianized data need grey levels from a lowest to a highest; these are continuous")
        levels = round((high - low) / bin) + 1
        uniform = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
        self.register_buffer("cumulative", uniform.expand(*self.shape, -1).contiguous())

    @classmethod
    def fit(cls, transform: DataTransform, batches: Iterable[Tensor], flip: bool = False) -> GaussianizedTransform:
        """From histograms of the training data.

        Args:
            transform: Tells shape and grid.
            batches: Training data, data units, each (B, *shape).
            flip: Count each image and its mirror image.
        """
        if transform.bin is not None and not transform.dequantize:
            raise UserError("gaussianized data must be dequantised; set data.dequantize to true")
        result = cls(transform.shape, transform.bin, transform.low, transform.high)
        levels = result.cumulative.shape[-1] - 1
        counts = torch.zeros(transform.dim, levels, dtype=torch.float64)
        for x in batches:
            index = result._nearest(x.double()).flatten(1)
            counts.scatter_add_(1, index.T, torch.ones(index.T.shape, dtype=torch.float64))
        counts = counts.reshape(*transform.shape, levels)
        if flip:
            counts = counts + counts.flip(-2)
        overall = counts.reshape(-1, levels).sum(0) + 1
        counts = counts + PSEUDO_COUNT * overall / overall.sum()
        mass = counts / counts.sum(-1, keepdim=True)
        result.cumulative[..., 1:] = mass.cumsum(-1).clamp_max(1)
        result.cumulative[..., -1] = 1
        return result

    @property
    def model_bin(self) -> Tensor | None:
        return None

    @property
    def affine(self) -> DataTransform:
        """The plain transform of the same grid: the cells fill [-1, 1]."""
        half = self.bin * (self.cumulative.shape[-1] - 1) / 2
        return DataTransform(self.shape, (self.low + self.high) / 2, half, self.bin, True, self.low, self.high)

    @property
    def cell_edges(self) -> Tensor:
        """Edges of the cells in model units, (*shape, levels + 1), from -inf to inf."""
        return torch.special.ndtri(self.cumulative)

    @property
    def log_mass(self) -> Tensor:
        """log probability of each grey level, (*shape, levels)."""
        return self.cumulative.diff(dim=-1).log()

    @property
    def cell_width(self) -> Tensor:
        """Typical width of a cell in model units, (*shape): sqrt(2 pi e) exp(-H), with the histogram's entropy H.

        A normal cut into cells of this width has about that entropy; above 4 where one grey level has all the mass.
        """
        entropy = torch.special.entr(self.cumulative.diff(dim=-1)).sum(-1)
        return (0.5 * math.log(2 * math.pi * math.e) - entropy).exp()

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype if x.is_floating_point() else torch.float32
        x = x.double()
        index = self._nearest(x)
        start, mass = self._at(self.cumulative, index), self._at(self.cumulative.diff(dim=-1), index)
        within = ((x - self.low) / self.bin - index + 0.5).clamp(0, 1)
        return torch.special.ndtri((start + mass * within).clamp(TAIL, 1 - TAIL)).to(dtype)

    def inverse(self, z: Tensor) -> Tensor:
        probability = torch.special.ndtr(z.double())
        edges = self.cumulative.flatten(0, -2)
        index = torch.searchsorted(edges, probability.flatten(1).T.contiguous(), right=True) - 1
        index = index.clamp(0, edges.shape[1] - 2).T.reshape(z.shape)
        start, mass = self._at(self.cumulative, index), self._at(self.cumulative.diff(dim=-1), index)
        within = ((probability - start) / mass).clamp(0, 1)
        return (self.low + self.bin * (index - 0.5 + within)).to(z.dtype)

    def log_det(self, x: Tensor) -> Tensor:
        z = self(x.double())
        log_mass = self._at(self.log_mass, self._nearest(x.double()))
        log_normal = -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
        return (log_mass - math.log(self.bin) - log_normal).flatten(1).sum(1)

    def to_config(self) -> dict[str, Any]:
        return {
            "kind": "gaussianized",
            "shape": list(self.shape),
            "bin": self.bin,
            "low": self.low,
            "high": self.high,
        }

    def _nearest(self, x: Tensor) -> Tensor:
        """Index of the grey level whose cell holds ``x``, long."""
        return ((x - self.low) / self.bin).round().clamp(0, self.cumulative.shape[-1] - 2).long()

    @staticmethod
    def _at(table: Tensor, index: Tensor) -> Tensor:
        """The entries (B, *shape) of ``table`` (*shape, n) at ``index`` (B, *shape)."""
        flat = table.flatten(0, -2)
        return flat[torch.arange(len(flat), device=flat.device), index.flatten(1)].reshape(index.shape)


@dataclass(frozen=True)
class LogLikelihood:
    """Log-likelihoods that carry their unit.

    Attributes:
        nats: log-likelihood of each sample, in data units (densities) or absolute (code lengths), shape (B,).
        dim: Dimensions d of one sample.
        level: Noise level at which the density was taken.
        convention: One phrase: how the number was obtained.
        log_bin: log of the grey-level spacing in data units; None for continuous data.
        nfe: Network evaluations for each sample.
    """

    nats: Tensor
    dim: int
    level: int
    convention: str
    log_bin: float | None
    nfe: int

    @property
    def unit(self) -> str:
        """``bits/dim`` for data on a grid, ``nats`` (negative log density of a sample) for continuous data."""
        return "nats" if self.log_bin is None else "bits/dim"

    def bits_per_dim(self) -> Tensor:
        """-(log p + d log bin) / (d log 2), shape (B,): a code length for data on a grid.

        Raises:
            UserError: The data are continuous; bits would depend on the unit of measurement.
        """
        if self.log_bin is None:
            raise UserError("bits/dim needs data on a grid; continuous data are reported in nats")
        return -(self.nats.double() + self.dim * self.log_bin) / (self.dim * math.log(2))

    def values(self) -> Tensor:
        """Negative log-likelihood of each sample in :attr:`unit`, float64 (B,)."""
        return -self.nats.double() if self.log_bin is None else self.bits_per_dim()

    def mean_and_error(self) -> tuple[float, float]:
        """Mean of :meth:`values` and its standard error over samples (nan for one sample)."""
        values = self.values()
        return float(values.mean()), float(values.std() / math.sqrt(len(values)))
