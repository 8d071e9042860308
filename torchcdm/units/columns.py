"""Columns of a table, each by a map of its own."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from torchcdm.random import evenly_spaced
from torchcdm.runtime.precision import Float64Module
from torchcdm.units.affine import DataTransform, floating
from torchcdm.units.lattice import NONE, Cells, spread
from torchcdm.units.log_likelihood import log_normal
from torchcdm.units.warp import LEAST_GAIN, bend, bend_log_slope, fit_warp, floor_of, logarithm

WARP = ("least", "location", "scale", "skew", "tail", "bent")

OUTSIDE = 1e-4  # probability that a histogram leaves on either side of the known values: z = 3.7 at their ends
# Cells of the histogram of the other numbers of a mixed column, at most, and training rows in each, at least.
KNOTS, KNOT_ROWS = 50, 20
STEP_ROWS = 2000  # rows that the steps of a column are fitted to: the time grows with their square
# Shares of the rows near a value over which its rows are spread, and the most values of a column for which one is
# chosen: the time grows with their square.
NEIGHBOURS, SMOOTHED = (0.003, 0.01, 0.03, 0.1, 0.3), 2000


@final
class ColumnTransform(DataTransform):
    r"""Columns to model units, each more nearly normal: bent as in :mod:`torchcdm.units.warp`, or by a histogram.

    A dequantised column of few values is a row of boxes, whose edges a smooth density would spend itself on. Its
    histogram takes it to a normal, as in :class:`GaussianizedTransform`. So does that of a mixed column, where other
    numbers are continuous, and of a continuous one whose density has steps and gaps. Beyond the known values the map
    goes on as a line of the column's deviation. ``log_det`` counts the cells: a density in data units is the
    probability of a value that has one, and a density of all other numbers.

    Args:
        warp: A number for each column, (d,), by name. ``least``: value below which its logarithm goes on as a line; 0
            where none is taken. ``location`` and ``scale``: xi and eta, in the column's unit or that of its logarithm.
            ``bent``: whether the curve is taken, and its ``skew`` and ``tail``, epsilon and delta.
        histograms: Arguments of the :class:`Histogram` of each column that has one, by its place.
        dequantize: Whether training and scoring add uniform noise over the cells; not where the rows bring it along.
    """

    gaussianized = True

    def __init__(
        self, warp: Mapping[str, Any], histograms: Mapping[str | int, Sequence[Any]], dequantize: bool = True
    ) -> None:
        least, location, scale, skew, tail, bent = (torch.as_tensor(warp[key], dtype=torch.float64) for key in WARP)
        if any(value.shape != (len(scale),) for value in (least, location, scale, skew, tail, bent)):
            raise ValueError(f"warp: a number for each column is needed of {', '.join(WARP)}")
        super().__init__(tuple(scale.shape), location, scale)
        buffers = (nn.Buffer(value, persistent=False) for value in (least, skew, tail, bent.bool()))
        self.least, self.skew, self.tail, self.bent = buffers
        self.histograms = nn.ModuleDict({str(k): Histogram(*h) for k, h in dict(histograms).items()})
        self._columns = [(int(k), histogram) for k, histogram in self.histograms.items()]
        self.cells = {k: histogram.cells for k, histogram in self._columns if histogram.cells.values}
        self.dequantize = dequantize and bool(histograms)

    @classmethod
    def fit(
        cls, x: Tensor, cells: Mapping[int, Cells] = NONE, bent: bool = True, dequantize: bool = True,
        step: bool = False, sources: Tensor | None = None,
    ) -> "ColumnTransform":  # fmt: skip
        """From the training rows ``x`` (N, d), data units; columns with values dequantised, or as they are.

        ``cells`` are the values that have a probability, by the place of the column. Continuous columns are ``bent``,
        by ``sources`` as in :func:`torchcdm.units.warp.fit_warp`, or shifted and scaled alone. With ``step`` they get
        a histogram where its steps make the rows more probable than bending, by more than the logarithm of their
        number for each step (Schwarz 1978).
        """
        x = x.double()
        found = {k: (one, _edges(x[:, k], one)) for k, one in cells.items()}
        warp = fit_warp(x, sources, tuple(cells) if bent else range(x.shape[1]))
        if step:
            rows = x.sort(0).values[evenly_spaced(len(x), STEP_ROWS)]  # the least and largest of each column too
            z, slopes = cls(warp, {})._mapped(rows)
            least = (log_normal(z) + slopes).mean(0) + LEAST_GAIN
            for k in set(range(x.shape[1])) - set(cells):
                steps, value = _steps(rows[:, k])
                if value > least[k]:
                    found[k] = Cells((), 0.0, True), steps
        histograms = {}
        for k, (one, edges) in found.items():
            # All rows are inside, rounded to float32 too.
            (low, high), eps = x[:, k].aminmax(), torch.finfo(torch.float32).eps
            edges[0], edges[-1] = min(edges[0], low - eps * low.abs()), max(edges[-1], high + eps * high.abs())
            counts = torch.histogram(x[:, k].contiguous(), edges).hist
            if not one.mixed and len(one.values) <= SMOOTHED:
                counts = _smoothed(counts, edges, torch.tensor(one.values, dtype=torch.float64))
            counts = counts + 1 / len(edges)  # one more sample, spread over all cells: none is impossible
            share = torch.cat([torch.zeros(1, dtype=torch.float64), counts.cumsum(0) / counts.sum()])
            histograms[k] = one, edges.tolist(), (OUTSIDE + (1 - 2 * OUTSIDE) * share).tolist()
        return cls(warp, histograms, dequantize)

    def spread(self, x: Tensor, position: Tensor) -> Tensor:
        return spread(x.to(floating(x)), position, self.cells) if self.dequantize else x

    def quantize(self, x: Tensor) -> Tensor:
        """Columns of values alone rounded to the nearest one, and what is in a cell to its value, data units."""
        x = x.clone()
        for k in self.cells:
            x[:, k] = self.histograms[str(k)].quantize(x[:, k])
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self._mapped(x)[0].to(floating(x))

    def inverse(self, z: Tensor) -> Tensor:
        u, floor = z.double(), floor_of(self.least)
        u = torch.where(self.bent, ((u.asinh() + self.skew) / self.tail).sinh(), u)
        y = u * self.scale + self.shift
        log_x = torch.where(self.least > 0, y, 0.0)  # other columns must not overflow: 0 times infinity is no gradient
        below = (log_x - floor.log()).clamp_max(0) * floor
        x = torch.where(self.least > 0, torch.maximum(log_x, floor.log()).exp() + below, y)
        for k, histogram in self._columns:
            x[:, k] = histogram.inverse(z[:, k].double(), self.scale[k])
        return x.to(z.dtype)

    def log_det(self, x: Tensor) -> Tensor:
        return self._mapped(x)[1].sum(1)

    def arguments(self) -> dict[str, Any]:
        histograms = {k: [h.cells, h.edges.tolist(), h.cumulative.tolist()] for k, h in self.histograms.items()}
        values = (self.least, self.shift, self.scale, self.skew, self.tail, self.bent)
        warp = {key: value.tolist() for key, value in zip(WARP, values, strict=True)}
        return {"kind": "columns", "warp": warp, "histograms": histograms, "dequantize": self.dequantize}

    def _mapped(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and log dz/dx, each (N, d), float64."""
        x = x.double()
        u = (logarithm(x, self.least) - self.shift) / self.scale
        # sinh(arcsinh(u)) is u, but not to the last bit, and far out not even nearly.
        z = torch.where(self.bent, bend(u, self.skew, self.tail), u)
        of_bend = torch.where(self.bent, bend_log_slope(u, self.skew, self.tail), 0.0)
        of_logarithm = torch.where(self.least > 0, -torch.maximum(x, floor_of(self.least)).log(), 0.0)
        slopes = of_bend + of_logarithm - self.scale.log()
        for k, histogram in self._columns:
            z[:, k], slopes[:, k] = histogram(x[:, k], self.scale[k])
        return z, slopes


@final
class Histogram(Float64Module):
    """One column of values, other numbers, or both, to a standard normal.

    Args:
        cells: Arguments of its :class:`Cells`, without values where all numbers are continuous.
        edges: Edges of the cells, the gaps between them and the bins of other numbers, rising, data units.
        cumulative: Probability below each of the edges.
    """

    def __init__(self, cells: Sequence[Any], edges: Sequence[float], cumulative: Sequence[float]) -> None:
        super().__init__()
        of_cells, width, mixed = cells
        self.cells = Cells(tuple(of_cells), width, mixed)
        values, edges, cumulative = (torch.tensor(a, dtype=torch.float64) for a in (of_cells, edges, cumulative))
        # What the density of each bin is per: a cell, or a unit of the column.
        middles = (edges[1:] + edges[:-1]) / 2
        of_values = ((middles[:, None] - values).abs() < width / 2).any(1) | (not mixed)
        log_unit = torch.where(of_values, torch.tensor(width, dtype=torch.float64).log(), 0.0)
        buffers = (nn.Buffer(value, persistent=False) for value in (values, edges, cumulative, log_unit))
        self.values, self.edges, self.cumulative, self.log_unit = buffers

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
        return torch.where((x - found).abs() < (self.cells.width / 2 if self.cells.mixed else torch.inf), found, x)


def _edges(x: Tensor, cells: Cells) -> Tensor:
    """Edges of the cells, and of a mixed column between them of bins of equally many rows of ``x`` (N,); rising."""
    centres, half = torch.tensor(cells.values, dtype=torch.float64), cells.width / 2
    edges, gap = torch.cat([centres - half, centres + half]), 1e-6 * half
    others = x[(x[:, None] - centres).abs().amin(1) > half + gap] if cells.mixed else x[:0]
    if len(others):
        count = min(KNOTS, max(2, len(others) // KNOT_ROWS))
        knots = torch.from_numpy(np.quantile(others.numpy(), np.linspace(0, 1, count + 1)))  # of any number of rows
        edges = torch.cat([edges, knots[(knots[:, None] - centres).abs().amin(1) > half + gap]])
    edges = edges.sort().values
    # Neighbouring cells share an edge, to rounding.
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


def _cell_of(values: Tensor, edges: Tensor) -> Tensor:
    """Index of the cell between two of the rising ``edges`` that holds each value, long."""
    return torch.searchsorted(edges, values, right=True).clamp(1, len(edges) - 1) - 1


def _smoothed(counts: Tensor, edges: Tensor, values: Tensor) -> Tensor:
    """Rows in the bins between ``edges``, (B,), spread over the neighbours of their values, (V,), where these tell of
    them: a column of many values, such as an age, has few rows at each.

    Each value's as a normal, which is wider where rows are fewer, by that share of the rows for which each row is most
    probable by all others; as they are unless one gains more than the logarithm of their number. Shares of copies of
    rows are those of the rows.
    """
    bins = _cell_of(values, edges)
    copies = np.gcd.reduce(counts[bins].long().numpy())
    own = counts[bins] / max(copies, 1)
    below, rows = own.cumsum(0) - own / 2, float(own.sum())

    def trial(share: float) -> tuple[float, Tensor]:
        """Log p of the rows, each by all others, and the rows in the bins."""
        low, high = (np.interp(below + side * share * rows / 2, below, values) for side in (-1, 1))
        deviation = torch.from_numpy((high - low) / 4).clamp_min(1e-9 * float(edges[-1] - edges[0]))[:, None]
        mass = torch.special.ndtr((edges - values[:, None]) / deviation)
        mass = mass.diff(dim=1) / (mass[:, -1:] - mass[:, :1])
        found = own @ mass
        others = (found[bins] - mass[range(len(bins)), bins]).clamp_min(0)  # some values are of held-out rows alone
        return float(own @ ((others + 1 / len(edges)) / rows).log()), found

    plain, best = trial(0.0)[0], max((trial(share) for share in NEIGHBOURS), key=lambda one: one[0])
    return max(copies, 1) * best[1] if best[0] > plain + math.log(rows) else counts
