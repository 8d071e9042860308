"""Columns of a table, each by a map of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from torchcdm.errors import UserError
from torchcdm.runtime.validation import Float, checked
from torchcdm.units.affine import DataTransform, floating
from torchcdm.units.checks import construct, numbers, rising
from torchcdm.units.lattice import cell_width, nearest_value
from torchcdm.units.normal import log_normal
from torchcdm.units.warp import ColumnWarp

OUTSIDE = 1e-4
"""Probability that a histogram leaves on either side of the known values: z = 3.7 at their ends."""


@final
class ColumnTransform(DataTransform):
    r"""Columns to model units, each more nearly normal: continuous ones bent, those of few values by histogram.

    A dequantised column of few values is a row of boxes, whose edges a smooth density would spend itself on. Its
    histogram takes it to a normal, as in :class:`GaussianizedTransform`; what is left to learn is how columns hang
    together. Beyond the known values the map goes on as a line of the column's deviation: what is far out stays so.

    Args:
        warp: Arguments of the :class:`ColumnWarp` of all columns; shifts and scales the columns with a histogram.
        histograms: By discrete column, its values, rising, data units, and the cumulative probability at the edges of
            their cells and of the gaps between them.
        dequantize: Whether training and scoring add uniform noise over the cells; not where the rows bring it along.

    Raises:
        UserError: A value of the wrong type, number or order, or one that is not finite.

    Attributes:
        columns: The discrete columns.
        cells: Width of the cell of each column, (d,), data units; 0 for continuous ones.
    """

    gaussianized = True

    @checked
    def __init__(
        self,
        warp: Mapping[str, Any],
        histograms: Mapping[str | int, tuple[Sequence[Float], Sequence[Float]]],
        dequantize: bool = True,
    ) -> None:
        warp = construct(ColumnWarp, warp, "data transform: warp")
        super().__init__(warp.scale.shape)
        if {str(k) for k in histograms} - {str(k) for k in range(self.dim)}:
            raise UserError(f"data transform: histograms of {list(histograms)!r:.60}; numbers of columns are needed")
        self.warp = warp
        self.columns = tuple(int(k) for k in histograms)
        self.dequantize = dequantize and bool(histograms)
        self.cells = torch.zeros(self.shape, dtype=torch.float64)
        for k, histogram in zip(self.columns, histograms.values(), strict=True):
            centres, cumulative = (rising(numbers(part, f"histogram {k}"), f"histogram {k}") for part in histogram)
            edges = rising(_edges(centres), f"the cells of histogram {k}")
            if len(cumulative) != len(edges) or cumulative[0] <= 0 or cumulative[-1] >= 1:
                raise UserError(f"data transform: histogram {k} needs {len(edges)} probabilities between 0 and 1")
            self.cells[k] = cell_width(centres)
            for name, value in (("values", centres), ("edges", edges), ("cumulative", cumulative)):
                self.register_buffer(f"{name}{k}", value, persistent=False)

    @classmethod
    def fit(
        cls,
        x: Tensor,
        values: Mapping[int, Sequence[float]] = MappingProxyType({}),
        bend: bool = True,
        dequantize: bool = True,
    ) -> ColumnTransform:
        """From the training rows; discrete columns dequantised, or as they are.

        Args:
            x: Rows (N, d), data units.
            values: Distinct values of the discrete columns, rising, by column; each has a cell as wide as the
                smallest distance between two of them.
            bend: Whether continuous columns are bent; they are shifted and scaled alone otherwise.
            dequantize: As for the class.
        """
        x = x.double()
        histograms = {k: (known, _cumulative(x[:, k], known)) for k, known in values.items()}
        straight = tuple(values) if bend else range(x.shape[1])
        return cls(ColumnWarp.fit(x, straight=straight).to_config(), histograms, dequantize)

    @property
    def values(self) -> dict[int, tuple[float, ...]]:
        """Distinct values of the discrete columns, rising, by column."""
        return {k: tuple(self.get_buffer(f"values{k}").tolist()) for k in self.columns}

    def quantize(self, x: Tensor) -> Tensor:
        """Discrete columns rounded to the nearest of their values, (N, d), data units."""
        x = x.clone()
        for k in self.columns:
            x[:, k] = nearest_value(x[:, k], self.get_buffer(f"values{k}"))
        return x

    def forward(self, x: Tensor) -> Tensor:
        z = self.warp(x)
        for k in self.columns:
            z[:, k] = self._by_histogram(k, x[:, k].double())[0]
        return z.to(floating(x))

    def inverse(self, z: Tensor) -> Tensor:
        x = self.warp.inverse(z)
        for k in self.columns:
            edges, cumulative = self._histogram(k)
            column = z[:, k].double()
            probability = torch.special.ndtr(column).clamp(cumulative[0], cumulative[-1])
            index = _cell_of(probability, cumulative)
            within = (probability - cumulative[index]) / cumulative.diff()[index]
            beyond = column - torch.special.ndtri(probability)
            x[:, k] = edges[index] + within * edges.diff()[index] + beyond * self.warp.scale[k]
        return x.to(z.dtype)

    def log_det(self, x: Tensor) -> Tensor:
        slopes = self.warp.log_slope(x)
        for k in self.columns:
            slopes[:, k] = self._by_histogram(k, x[:, k].double())[1]
        return slopes.sum(1)

    def to_config(self) -> dict[str, Any]:
        histograms = {
            str(k): [self.get_buffer(f"{part}{k}").tolist() for part in ("values", "cumulative")] for k in self.columns
        }
        warp = self.warp.to_config()
        return {"kind": "columns", "warp": warp, "histograms": histograms, "dequantize": self.dequantize}

    def _histogram(self, k: int) -> tuple[Tensor, Tensor]:
        return self.get_buffer(f"edges{k}"), self.get_buffer(f"cumulative{k}")

    def _by_histogram(self, k: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """z of column ``k`` and log dz/dx, each (N,)."""
        edges, cumulative = self._histogram(k)
        inside = x.clamp(edges[0], edges[-1])
        index = _cell_of(inside, edges)
        density = (cumulative.diff() / edges.diff())[index]
        z = torch.special.ndtri(cumulative[index] + density * (inside - edges[index]))
        log_slope = density.log() - log_normal(z)
        scale = self.warp.scale[k]
        return z + (x - inside) / scale, torch.where(x == inside, log_slope, -scale.log())


def _edges(centres: Tensor) -> Tensor:
    """Edges of the cells around the rising ``centres`` and of the gaps between them, rising."""
    half = cell_width(centres) / 2
    edges = torch.stack([centres - half, centres + half], 1).flatten()
    rising = edges.diff() > 1e-6 * half  # neighbouring cells share an edge, to rounding
    return edges[torch.cat([torch.ones(1, dtype=torch.bool), rising])]


def _cumulative(x: Tensor, values: Sequence[float]) -> list[float]:
    """Share of ``x`` (N,) below each of the edges of the cells of ``values`` and of the gaps between them."""
    edges = _edges(torch.tensor(values, dtype=torch.float64))
    # One more sample, spread over all cells: none is impossible.
    counts = torch.histogram(x.clamp(edges[0], edges[-1]).contiguous(), edges).hist + 1 / len(edges)
    share = torch.cat([torch.zeros(1, dtype=torch.float64), counts.cumsum(0) / counts.sum()])
    return (OUTSIDE + (1 - 2 * OUTSIDE) * share).tolist()


def _cell_of(values: Tensor, edges: Tensor) -> Tensor:
    """Index of the cell between two of the rising ``edges`` that holds each value, long."""
    return torch.searchsorted(edges, values, right=True).clamp(1, len(edges) - 1) - 1
