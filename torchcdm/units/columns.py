"""Columns of a table, each by a map of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from torchcdm.random import evenly_spaced
from torchcdm.units.affine import DataTransform, floating
from torchcdm.units.float64 import Float64Module
from torchcdm.units.lattice import NONE, cell_width, spread
from torchcdm.units.normal import log_normal
from torchcdm.units.warp import LEAST_GAIN, bend, bend_log_slope, fit_warp, floor_of, logarithm

WARP = ("least", "location", "scale", "skew", "tail", "bent")

OUTSIDE = 1e-4
"""Probability that a histogram leaves on either side of the known values: z = 3.7 at their ends."""

KNOTS, KNOT_ROWS = 50, 20
"""Cells of the histogram of the other numbers of a mixed column, at most, and training rows in each, at least."""

STEP_ROWS = 2000
"""Rows that the steps of a column are fitted to: the time grows with their square."""


@final
class ColumnTransform(DataTransform):
    r"""Columns to model units, each more nearly normal: continuous ones bent, those with values by histogram.

    The bent ones by the curve of :mod:`torchcdm.units.warp`, after their logarithm where that is more nearly normal.

    A dequantised column of few values is a row of boxes, whose edges a smooth density would spend itself on. Its
    histogram takes it to a normal, as in :class:`GaussianizedTransform`; what is left to learn is how columns hang
    together. So does that of a mixed column, where some values have a cell each and all other numbers are continuous,
    and that of a continuous column whose density has steps and gaps. Beyond the known values the map goes on as a line
    of the column's deviation: what is far out stays so.

    ``log_det`` counts the cells: a density in data units is the probability of a value that has one, and a density of
    all other numbers.

    Args:
        warp: A number for each column, (d,), by name. ``least``: value below which its logarithm goes on as a line; 0
            where none is taken. ``location`` and ``scale``: xi and eta, in the column's unit or that of its logarithm.
            ``bent``: whether the curve is taken, and its ``skew`` and ``tail``, epsilon and delta.
        histograms: By column that has one: its values, rising, data units, none where all numbers are continuous; and
            the cumulative probability at the edges.
        mixed: By column where other numbers are continuous: width of a value's cell, and the edges of the histogram.
            Elsewhere a cell is as wide as the least distance of two values, and edges are those of the cells and gaps.
        dequantize: Whether training and scoring add uniform noise over the cells; not where the rows bring it along.

    Attributes:
        values: Values that have a probability, rising, by column.
        mixed: Width of their cells, by column that has other numbers too.
        cells: Width of the cell of each column, (d,), data units; 0 for continuous ones.
    """

    gaussianized = True

    least: Tensor
    skew: Tensor
    tail: Tensor
    bent: Tensor

    def __init__(
        self,
        warp: Mapping[str, Any],
        histograms: Mapping[str | int, tuple[Sequence[float], Sequence[float]]],
        dequantize: bool = True,
        mixed: Mapping[str | int, tuple[float, Sequence[float]]] = NONE,
    ) -> None:
        least, location, scale, skew, tail, bent = (torch.as_tensor(warp[key], dtype=torch.float64) for key in WARP)
        super().__init__(tuple(scale.shape), location, scale)
        for name, value in (("least", least), ("skew", skew), ("tail", tail), ("bent", bent.bool())):
            self.register_buffer(name, value, persistent=False)
        self.histograms = nn.ModuleDict({str(k): Histogram(*h, mixed.get(k)) for k, h in histograms.items()})
        self.values = {int(k): tuple(values) for k, (values, _) in histograms.items() if len(values)}
        self.mixed = {int(k): cell for k, (cell, _) in mixed.items() if cell}
        self.dequantize = dequantize and bool(histograms)
        self.cells = torch.zeros(self.shape, dtype=torch.float64)
        for k, histogram in self._columns():
            self.cells[k] = histogram.cell

    @classmethod
    def fit(
        cls,
        x: Tensor,
        values: Mapping[int, Sequence[float]] = NONE,
        mixed: Mapping[int, float] = NONE,
        bent: bool = True,
        dequantize: bool = True,
        step: bool = False,
        sources: Tensor | None = None,
    ) -> ColumnTransform:
        """From the training rows; columns with values dequantised, or as they are.

        Args:
            x: Rows (N, d), data units.
            values: Values that have a probability, rising, by column.
            mixed: Those of these columns that have other numbers too: width of a value's cell.
            bent: Whether continuous columns are bent; they are shifted and scaled alone otherwise.
            dequantize: As for the class.
            step: Whether continuous columns get a histogram whose steps make the rows more probable than bending, by
                more than the logarithm of their number for each step (Schwarz 1978).
            sources: As of :func:`torchcdm.units.warp.fit_warp`.
        """
        x, edges = x.double(), {}
        for k, found in values.items():
            centres = torch.tensor(found, dtype=torch.float64)
            edges[k] = _knots(x[:, k], centres, mixed[k]) if k in mixed else _edges(centres)
        histograms = {k: (found, _cumulative(x[:, k], edges[k])) for k, found in values.items()}
        warp = fit_warp(x, sources, tuple(values) if bent else range(x.shape[1]))
        cells = {k: (cell, edges[k].tolist()) for k, cell in mixed.items()}
        if step:
            rows = x.sort(0).values[evenly_spaced(len(x), STEP_ROWS)]  # the least and largest of each column too
            plain = cls(warp, {})
            least = (log_normal(plain(rows)) + plain.log_slopes(rows)).mean(0) + LEAST_GAIN
            for k in set(range(x.shape[1])) - set(values):
                steps, value = _steps(rows[:, k])
                if value > least[k]:
                    histograms[k], cells[k] = ((), _cumulative(x[:, k], steps)), (0.0, steps.tolist())
        return cls(warp, histograms, dequantize, cells)

    def spread(self, x: Tensor, position: Tensor) -> Tensor:
        if not self.dequantize:
            return x
        mixed = {k: self.values[k] for k in self.mixed}
        return spread(x.to(floating(x)), self.cells.to(position), position, mixed)

    def quantize(self, x: Tensor) -> Tensor:
        """Columns of values alone rounded to the nearest one, and what is in a cell to its value, data units."""
        x = x.clone()
        for k in self.values:
            x[:, k] = self.histograms[str(k)].quantize(x[:, k])
        return x

    def forward(self, x: Tensor) -> Tensor:
        u = self._scaled(x)
        # sinh(arcsinh(u)) is u, but not to the last bit, and far out not even nearly.
        z = torch.where(self.bent, bend(u, self.skew, self.tail), u)
        for k, histogram in self._columns():
            z[:, k] = histogram(x[:, k].double(), self.scale[k])[0]
        return z.to(floating(x))

    def inverse(self, z: Tensor) -> Tensor:
        u, floor = z.double(), floor_of(self.least)
        u = torch.where(self.bent, ((u.asinh() + self.skew) / self.tail).sinh(), u)
        y = u * self.scale + self.shift
        below = (y - floor.log()).clamp_max(0) * floor
        x = torch.where(self.least > 0, torch.maximum(y, floor.log()).exp() + below, y)
        for k, histogram in self._columns():
            x[:, k] = histogram.inverse(z[:, k].double(), self.scale[k])
        return x.to(z.dtype)

    def log_slopes(self, x: Tensor) -> Tensor:
        """log dz/dx of each number of ``x`` (N, d), float64."""
        of_bend = torch.where(self.bent, bend_log_slope(self._scaled(x), self.skew, self.tail), 0.0)
        of_logarithm = torch.where(self.least > 0, -torch.maximum(x.double(), floor_of(self.least)).log(), 0.0)
        slopes = of_bend + of_logarithm - self.scale.log()
        for k, histogram in self._columns():
            slopes[:, k] = histogram(x[:, k].double(), self.scale[k])[1]
        return slopes

    def log_det(self, x: Tensor) -> Tensor:
        return self.log_slopes(x).sum(1)

    def arguments(self) -> dict[str, Any]:
        histograms = {k: [h.values.tolist(), h.cumulative.tolist()] for k, h in self.histograms.items()}
        mixed = {k: [h.cell, h.edges.tolist()] for k, h in self.histograms.items() if h.mixed}
        values = (self.least, self.shift, self.scale, self.skew, self.tail, self.bent)
        warp = {key: value.tolist() for key, value in zip(WARP, values, strict=True)}
        arguments = {"kind": "columns", "warp": warp, "histograms": histograms}
        return arguments | {"dequantize": self.dequantize} | ({"mixed": mixed} if mixed else {})

    def _scaled(self, x: Tensor) -> Tensor:
        return (logarithm(x.double(), self.least) - self.shift) / self.scale

    def _columns(self) -> list[tuple[int, Histogram]]:
        """The columns with a histogram."""
        return [(int(k), histogram) for k, histogram in self.histograms.items()]


@final
class Histogram(Float64Module):
    """One column of values, other numbers, or both, to a standard normal; arguments as of the transform."""

    values: Tensor
    edges: Tensor
    cumulative: Tensor
    log_unit: Tensor

    def __init__(
        self, values: Sequence[float], cumulative: Sequence[float], mixed: tuple[float, Sequence[float]] | None
    ) -> None:
        super().__init__()
        self.mixed = mixed is not None
        values, cumulative = (torch.tensor(found, dtype=torch.float64) for found in (values, cumulative))
        self.cell, edges = mixed or (cell_width(values), _edges(values))
        edges = torch.as_tensor(edges, dtype=torch.float64)
        # What the density of each bin is per: a cell, or a unit of the column.
        middles = (edges[1:] + edges[:-1]) / 2
        of_values = ((middles[:, None] - values).abs() < self.cell / 2).any(1) | (not self.mixed)
        log_unit = torch.where(of_values, torch.tensor(self.cell, dtype=torch.float64).log(), 0.0)
        buffers = {"values": values, "edges": edges, "cumulative": cumulative, "log_unit": log_unit}
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """z and log dz/dx per unit of its density, each (N,); beyond the edges a line of the ``scale``."""
        inside = x.clamp(self.edges[0], self.edges[-1])
        index = _cell_of(inside, self.edges)
        density = (self.cumulative.diff() / self.edges.diff())[index]
        z = torch.special.ndtri(self.cumulative[index] + density * (inside - self.edges[index]))
        log_slope = density.log() - log_normal(z) + self.log_unit[index]
        return z + (x - inside) / scale, torch.where(x == inside, log_slope, -scale.log())

    def inverse(self, z: Tensor, scale: Tensor) -> Tensor:
        """x (N,) of z."""
        probability = torch.special.ndtr(z).clamp(self.cumulative[0], self.cumulative[-1])
        index = _cell_of(probability, self.cumulative)
        within = (probability - self.cumulative[index]) / self.cumulative.diff()[index]
        beyond = z - torch.special.ndtri(probability)
        return self.edges[index] + within * self.edges.diff()[index] + beyond * scale

    def quantize(self, x: Tensor) -> Tensor:
        """The nearest value; other numbers of a mixed column as they are."""
        borders = (self.values[1:] + self.values[:-1]) / 2
        found = self.values[torch.searchsorted(borders, x.double().contiguous())].to(x)
        return torch.where((x - found).abs() < (self.cell / 2 if self.mixed else torch.inf), found, x)


def _edges(centres: Tensor) -> Tensor:
    """Edges of the cells around the rising ``centres`` and of the gaps between them, rising."""
    half = cell_width(centres) / 2
    edges = torch.stack([centres - half, centres + half], 1).flatten()
    return _apart(edges, 1e-6 * half)  # neighbouring cells share an edge, to rounding


def _knots(x: Tensor, centres: Tensor, cell: float) -> Tensor:
    """Edges of the cells of that width around ``centres``, and between them of bins of equally many rows."""
    near = (x[:, None] - centres).abs().amin(1) <= cell / 2 * (1 + 1e-6)
    edges, others = torch.cat([centres - cell / 2, centres + cell / 2]).sort().values, x[~near]
    if len(others):
        count = min(KNOTS, max(2, len(others) // KNOT_ROWS))
        knots = torch.from_numpy(np.quantile(others.numpy(), np.linspace(0, 1, count + 1)))  # of any number of rows
        apart = (knots[:, None] - centres).abs().amin(1) > cell / 2 * (1 + 1e-6)
        edges = torch.cat([edges, knots[apart]]).sort().values
    return _apart(edges, float(1e-9 * (edges[-1] - edges[0])))


def _apart(edges: Tensor, gap: float) -> Tensor:
    """Those of the rising ``edges`` that lie further than the gap above the one before."""
    return edges[edges.diff(prepend=edges.new_tensor([-torch.inf])) > gap]


def _steps(x: Tensor) -> tuple[Tensor, float]:
    """Edges of the steps of the density of ``x`` (N,), and its mean log density less the price of the steps.

    The most probable ones of any number at that price, by dynamic programming (Scargle et al. 2013).
    """
    values, counts = np.unique(x.numpy(), return_counts=True)
    if len(values) < 3:
        return x, -math.inf
    ends = np.concatenate([values[:1], values[1:] / 2 + values[:-1] / 2, values[-1:]])
    below = np.concatenate([[0], counts.cumsum()])
    best, first = np.zeros(len(values) + 1), np.zeros(len(values), int)
    for last in range(len(values)):
        count, width = below[last + 1] - below[: last + 1], ends[last + 1] - ends[: last + 1]
        value = best[: last + 1] + count * np.log(count / (len(x) * width)) - math.log(len(x))
        first[last] = value.argmax()
        best[last + 1] = value[first[last]]
    chosen = [len(values)]
    while chosen[-1]:
        chosen.append(first[chosen[-1] - 1])
    return torch.from_numpy(np.unique(ends[chosen])), float(best[-1] / len(x))


def _cumulative(x: Tensor, edges: Tensor) -> list[float]:
    """Share of ``x`` (N,) below each of the ``edges`` of a histogram."""
    # One more sample, spread over all cells: none is impossible.
    counts = torch.histogram(x.clamp(edges[0], edges[-1]).contiguous(), edges).hist + 1 / len(edges)
    share = torch.cat([torch.zeros(1, dtype=torch.float64), counts.cumsum(0) / counts.sum()])
    return (OUTSIDE + (1 - 2 * OUTSIDE) * share).tolist()


def _cell_of(values: Tensor, edges: Tensor) -> Tensor:
    """Index of the cell between two of the rising ``edges`` that holds each value, long."""
    return torch.searchsorted(edges, values, right=True).clamp(1, len(edges) - 1) - 1
