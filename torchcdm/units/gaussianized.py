"""Grey levels to standard normals, each dimension by its own histogram."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from torchcdm.errors import UserError
from torchcdm.units.affine import DataTransform, floating
from torchcdm.units.log_likelihood import log_normal

MOST_NUMBERS = 2**28  # numbers of the histograms of all dimensions: 2 GiB of float64
# Samples' worth of the histogram of all dimensions together, added to that of each: no grey level is impossible.
PSEUDO_COUNT = 10.0
TAIL = 1e-12  # probabilities are kept so far from 0 and 1: 7 standard deviations


@final
class GaussianizedTransform(DataTransform):
    r"""Grey levels to standard normals, each dimension by its own histogram: a Gaussian copula's map.

    .. math:: z = \Phi^{-1}(F(x)), \qquad \log|dz/dx| = \log F'(x) - \log\varphi(z)

    with F piecewise linear over the cells. Every dequantised dimension becomes exactly normal, so that the edges
    of the cells and the many pixels that hardly ever change leave nothing to learn: a Gaussian in model units is a
    copula. Noise is added in model units; it is no additive noise on the grey levels.

    The arguments are those of :class:`DataTransform`; UserError for grey levels without end, or too many.

    Attributes:
        cumulative: F at the edges of the cells, ``(*shape, levels + 1)``, from 0 to 1.
    """

    gaussianized = True

    def __init__(self, shape: Sequence[int], bin: float | None, low: float | None, high: float | None) -> None:
        super().__init__(shape, bin=bin, low=low, high=high)
        if bin is None or low is None or high is None:
            raise UserError("gaussianized data need grey levels from a lowest to a highest; these are continuous")
        steps = (self.high - self.low) / self.bin
        if steps * self.dim > MOST_NUMBERS:
            raise UserError(f"gaussianized data: grey levels from {low:g} to {high:g} by {bin:g} are too many")
        levels = round(steps) + 1
        uniform = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
        self.cumulative = nn.Buffer(uniform.expand(*self.shape, -1).contiguous())

    @classmethod
    def fit(cls, transform: DataTransform, batches: Iterable[Tensor], flip: bool = False) -> "GaussianizedTransform":
        """From histograms of the training data, ``batches`` (B, *shape), on the grid of a ``transform``.

        With ``flip`` the mirror image of each image counts, too.
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
        counts = counts + counts.flip(-2) if flip else counts
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
    def log_mass(self) -> Tensor:
        """log probability of each grey level, (*shape, levels)."""
        return self.cumulative.diff(dim=-1).log()

    @property
    def cell_width(self) -> Tensor:
        """Typical width of a cell in model units, (*shape): a normal cut into such cells has the histogram's entropy.

        sqrt(2 pi e) exp(-H), above 4 where one grey level has all the mass.
        """
        entropy = torch.special.entr(self.cumulative.diff(dim=-1)).sum(-1)
        return (0.5 * math.log(2 * math.pi * math.e) - entropy).exp()

    def forward(self, x: Tensor) -> Tensor:
        dtype, x = floating(x), x.double()
        index = self._nearest(x)
        start, mass = self._cell(index)
        within = ((x - self.low) / self.bin - index + 0.5).clamp(0, 1)
        return torch.special.ndtri((start + mass * within).clamp(TAIL, 1 - TAIL)).to(dtype)

    def inverse(self, z: Tensor) -> Tensor:
        probability = torch.special.ndtr(z.double())
        edges = self.cumulative.flatten(0, -2)
        index = torch.searchsorted(edges, probability.flatten(1).T.contiguous(), right=True) - 1
        index = index.clamp(0, edges.shape[1] - 2).T.reshape(z.shape)
        start, mass = self._cell(index)
        within = ((probability - start) / mass).clamp(0, 1)
        return (self.low + self.bin * (index - 0.5 + within)).to(z.dtype)

    def log_det(self, x: Tensor) -> Tensor:
        """As of :class:`DataTransform`; -inf beyond the cells, where there is no density."""
        beyond = (x < self.low - self.bin / 2) | (x > self.high + self.bin / 2)
        _, mass = self._cell(self._nearest(x.double()))
        log_slope = mass.log() - math.log(self.bin) - log_normal(self(x.double()))
        return log_slope.masked_fill(beyond, -math.inf).flatten(1).sum(1)

    def arguments(self) -> dict[str, Any]:
        return {"kind": "gaussianized", "shape": list(self.shape), "bin": self.bin, "low": self.low, "high": self.high}

    def _nearest(self, x: Tensor) -> Tensor:
        """Index of the grey level whose cell holds ``x``, long; 0 for NaN."""
        return ((x - self.low) / self.bin).round().nan_to_num().clamp(0, self.cumulative.shape[-1] - 2).long()

    def _cell(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """F where the cells at ``index`` begin, and the probability of each, (B, *shape)."""
        edges, cell = self.cumulative.flatten(0, -2), index.flatten(1)
        dimension = torch.arange(len(edges), device=edges.device)
        low, high = edges[dimension, cell], edges[dimension, cell + 1]
        return low.reshape(index.shape), (high - low).reshape(index.shape)
