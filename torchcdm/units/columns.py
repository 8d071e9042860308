"""Columns of a table, each by a map of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from torchcdm.errors import UserError
from torchcdm.runtime.validation import Float, Positive, checked
from torchcdm.units.affine import DataTransform, floating
from torchcdm.units.checks import construct, numbers, rising
from torchcdm.units.lattice import cell_width, nearest_value, spread_columns
from torchcdm.units.normal import log_normal
from torchcdm.units.table import TableEncoding
from torchcdm.units.warp import ColumnWarp

OUTSIDE = 1e-4
"""Probability that a histogram leaves on either side of the known values: z = 3.7 at their ends."""

KNOTS, KNOT_ROWS = 50, 20
"""Cells of the histogram of the other numbers of a mixed column, at most, and training rows in each, at least."""

NONE: Mapping[int, Any] = MappingProxyType({})


@final
class ColumnTransform(DataTransform):
    r"""Columns to model units, each more nearly normal: continuous ones bent, those with values by histogram.

    A dequantised column of few values is a row of boxes, whose edges a smooth density would spend itself on. Its
    histogram takes it to a normal, as in :class:`GaussianizedTransform`; what is left to learn is how columns hang
    together. So does that of a mixed column, where some values have a cell each and all other numbers are continuous.
    Beyond the known values the map goes on as a line of the column's deviation: what is far out stays so.

    ``log_det`` counts the cells: a density in data units is the probability of a value that has one, and a density of
    all other numbers.

    Args:
        warp: Arguments of the :class:`ColumnWarp` of all columns; shifts and scales the columns with a histogram.
        histograms: By column with values: these, rising, data units, and the cumulative probability at the edges.
        mixed: By column where other numbers are continuous: width of a value's cell, and the edges of the histogram.
            Elsewhere a cell is as wide as the least distance of two values, and edges are those of the cells and gaps.
        dequantize: Whether training and scoring add uniform noise over the cells; not where the rows bring it along.

    Raises:
        UserError: A value of the wrong type, number or order, or one that is not finite.

    Attributes:
        columns: The columns with values.
        cells: Width of the cell of each column, (d,), data units; 0 for continuous ones.
    """

    gaussianized = True

    @checked
    def __init__(
        self,
        warp: Mapping[str, Any],
        histograms: Mapping[str | int, tuple[Sequence[Float], Sequence[Float]]],
        dequantize: bool = True,
        mixed: Mapping[str | int, tuple[Positive, Sequence[Float]]] = NONE,
    ) -> None:
        warp = construct(ColumnWarp, warp, "data transform: warp")
        super().__init__(warp.scale.shape)
        if ({str(k) for k in histograms} - {str(k) for k in range(self.dim)}) or set(mixed) - set(histograms):
            raise UserError(f"data transform: histograms of {list(histograms)!r:.60}; numbers of columns are needed")
        self.warp = warp
        self.columns, self.mixed = tuple(int(k) for k in histograms), {int(k): cell for k, (cell, _) in mixed.items()}
        self.dequantize = dequantize and bool(histograms)
        self.cells = torch.zeros(self.shape, dtype=torch.float64)
        for k, (key, (centres, cumulative)) in zip(self.columns, histograms.items(), strict=True):
            what = f"histogram {k}"
            centres = numbers(centres, what) if k in self.mixed else rising(numbers(centres, what), what)
            self.cells[k] = self.mixed[k] if k in self.mixed else cell_width(centres)
            edges = rising(numbers(mixed[key][1], what) if k in self.mixed else _edges(centres), f"cells of {what}")
            cumulative = rising(numbers(cumulative, what), what)
            if len(cumulative) != len(edges) or cumulative[0] <= 0 or cumulative[-1] >= 1:
                raise UserError(f"data transform: {what} needs {len(edges)} probabilities between 0 and 1")
            # What the density of each bin is per: a cell, or a unit of the column.
            middles = (edges[1:] + edges[:-1]) / 2
            of_values = ((middles[:, None] - centres).abs().amin(1) < self.cells[k] / 2) | (k not in self.mixed)
            log_unit = of_values.double() * self.cells[k].log()
            buffers = {"values": centres, "edges": edges, "cumulative": cumulative, "log_unit": log_unit}
            for name, value in buffers.items():
                self.register_buffer(f"{name}{k}", value, persistent=False)

    @classmethod
    def fit(
        cls,
        x: Tensor,
        values: Mapping[int, Sequence[float]] = NONE,
        bend: bool = True,
        dequantize: bool = True,
        mixed: Mapping[int, float] = NONE,
        table: TableEncoding | None = None,
    ) -> ColumnTransform:
        """From the training rows; columns with values dequantised, or as they are.

        Args:
            x: Rows (N, d), data units.
            values: Values that have a probability, rising, by column.
            bend: Whether continuous columns are bent; they are shifted and scaled alone otherwise.
            dequantize: As for the class.
            mixed: Those of these columns that have other numbers too: width of a value's cell.
            table: What becomes of the cells of a table.
        """
        x = x.double()
        known = {k: torch.tensor(found, dtype=torch.float64) for k, found in values.items()}
        edges = {k: _knots(x[:, k], c, mixed[k]) if k in mixed else _edges(c) for k, c in known.items()}
        histograms = {k: (found, _cumulative(x[:, k], edges[k])) for k, found in values.items()}
        straight = tuple(values) if bend else range(x.shape[1])
        warp = ColumnWarp.fit(x, straight=straight).to_config()
        cells = {k: (cell, edges[k].tolist()) for k, cell in mixed.items()}
        result = cls(warp, histograms, dequantize, cells)
        result.table = table
        return result

    @classmethod
    def of_codes(cls, x: Tensor, table: TableEncoding, bend: bool = True, dequantize: bool = True) -> ColumnTransform:
        """From codes (N, d) of training rows, those with a cell dequantised; the rest as in :meth:`fit`."""
        values = {k: column.codes for k, column in enumerate(table.kept) if column.codes}
        return cls.fit(x, values, bend, dequantize, {k: table.kept[k].cell for k in table.mixed_codes})

    def refitted(self, x: Tensor) -> ColumnTransform:
        """The same values, with continuous columns bent as the rows ``x`` (N, d) have it."""
        return ColumnTransform.fit(x, self.values, dequantize=self.dequantize, mixed=self.mixed, table=self.table)

    @property
    def values(self) -> dict[int, tuple[float, ...]]:
        """Values that have a probability, rising, by column."""
        return {k: tuple(self.get_buffer(f"values{k}").tolist()) for k in self.columns}

    def spread(self, x: Tensor, position: Tensor) -> Tensor:
        if not self.dequantize:
            return x
        mixed = {k: self.get_buffer(f"values{k}") for k in self.mixed}
        return spread_columns(x.to(floating(x)), self.cells.to(position), mixed, position)

    def quantize(self, x: Tensor) -> Tensor:
        """Columns of values alone rounded to the nearest one, and what is in a cell to its value, data units."""
        x = x.clone()
        for k in self.columns:
            found = nearest_value(x[:, k], self.get_buffer(f"values{k}")).to(x)
            near = (x[:, k] - found).abs() < self.mixed.get(k, math.inf) / 2
            x[:, k] = torch.where(near, found, x[:, k])
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

    def arguments(self) -> dict[str, Any]:
        histograms = {
            str(k): [self.get_buffer(f"{part}{k}").tolist() for part in ("values", "cumulative")] for k in self.columns
        }
        mixed = {str(k): [cell, self.get_buffer(f"edges{k}").tolist()] for k, cell in self.mixed.items()}
        warp = self.warp.to_config()
        arguments = {"kind": "columns", "warp": warp, "histograms": histograms, "dequantize": self.dequantize}
        return arguments | ({"mixed": mixed} if mixed else {})

    def _histogram(self, k: int) -> tuple[Tensor, Tensor]:
        return self.get_buffer(f"edges{k}"), self.get_buffer(f"cumulative{k}")

    def _by_histogram(self, k: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """z of column ``k`` and log dz/dx per unit of its density, each (N,)."""
        edges, cumulative = self._histogram(k)
        inside = x.clamp(edges[0], edges[-1])
        index = _cell_of(inside, edges)
        density = (cumulative.diff() / edges.diff())[index]
        z = torch.special.ndtri(cumulative[index] + density * (inside - edges[index]))
        log_slope = density.log() - log_normal(z) + self.get_buffer(f"log_unit{k}")[index]
        scale = self.warp.scale[k]
        return z + (x - inside) / scale, torch.where(x == inside, log_slope, -scale.log())


def _edges(centres: Tensor) -> Tensor:
    """Edges of the cells around the rising ``centres`` and of the gaps between them, rising."""
    half = cell_width(centres) / 2
    edges = torch.stack([centres - half, centres + half], 1).flatten()
    rising = edges.diff() > 1e-6 * half  # neighbouring cells share an edge, to rounding
    return edges[torch.cat([torch.ones(1, dtype=torch.bool), rising])]


def _knots(x: Tensor, centres: Tensor, cell: float) -> Tensor:
    """Edges of the cells of that width around ``centres``, and between them of bins of equally many rows."""
    near = (x[:, None] - centres).abs().amin(1) <= cell / 2 * (1 + 1e-6)
    edges, others = torch.cat([centres - cell / 2, centres + cell / 2]).sort().values, x[~near]
    if len(others):
        count = min(KNOTS, max(2, len(others) // KNOT_ROWS))
        knots = torch.from_numpy(np.quantile(others.numpy(), np.linspace(0, 1, count + 1)))  # of any number of rows
        apart = (knots[:, None] - centres).abs().amin(1) > cell / 2 * (1 + 1e-6)
        edges = torch.cat([edges, knots[apart]]).sort().values
    rising = edges.diff() > 1e-9 * (edges[-1] - edges[0])
    return edges[torch.cat([torch.ones(1, dtype=torch.bool), rising])]


def _cumulative(x: Tensor, edges: Tensor) -> list[float]:
    """Share of ``x`` (N,) below each of the ``edges`` of a histogram."""
    # One more sample, spread over all cells: none is impossible.
    counts = torch.histogram(x.clamp(edges[0], edges[-1]).contiguous(), edges).hist + 1 / len(edges)
    share = torch.cat([torch.zeros(1, dtype=torch.float64), counts.cumsum(0) / counts.sum()])
    return (OUTSIDE + (1 - 2 * OUTSIDE) * share).tolist()


def _cell_of(values: Tensor, edges: Tensor) -> Tensor:
    """Index of the cell between two of the rising ``edges`` that holds each value, long."""
    return torch.searchsorted(edges, values, right=True).clamp(1, len(edges) - 1) - 1
