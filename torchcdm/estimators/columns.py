"""What becomes of the columns of a table before a model sees them, and how it is undone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from torchcdm.errors import UserError
from torchcdm.random import stream
from torchcdm.units import cell_width, discrete_values, frequent_values, nearest_value, spread

COPIES, COPIED_ROWS = 20, 200_000
"""A table with discrete columns is trained on so many noisy copies, or so many rows in all, whichever is less."""

LARGEST = 1e150
"""Deviation of a column, at most, and one over it, at least: beyond, squares leave float64."""

DRAWS = 8
"""Draws of the dequantisation noise that a score is averaged over."""


@dataclass(frozen=True)
class Columns:
    """The columns of a table as they were in training.

    A constant column is left out: its density is a point, infinite at one value and zero elsewhere, so the density is
    that of the other columns. A discrete column gets uniform noise over its cell, the smallest distance between two
    of its values: the density of the sum, times the cell, bounds the probability of the value from below in the mean.

    Attributes:
        names: All columns, for messages.
        constants: Values of the columns that are left out, by position.
        values: Distinct values of the discrete columns, sorted, by position.
    """

    names: tuple[str, ...]
    constants: Mapping[int, float]
    values: Mapping[int, tuple[float, ...]]

    @classmethod
    def measure(
        cls, x: np.ndarray, names: Sequence[str], discrete: str | None, what: str = ""
    ) -> tuple[Columns, list[str]]:
        """The columns of a training table, and what is to be said of them: first those that are left out.

        Args:
            x: float64 (N, columns), finite.
            names: Names of the columns.
            discrete: ``dequantize`` or ``error``; None for columns whose density is not asked for.
            what: Name of the table, for messages.

        Raises:
            UserError: Nothing but constant columns; one whose squares float64 does not hold; a discrete column under
                ``error``, or one whose values nearly coincide.
        """
        constants, values, notes = {}, {}, []
        for k, name in enumerate(names):
            column = x[:, k]
            if (column == column[0]).all():
                constants[k] = float(column[0])
                continue
            with np.errstate(over="ignore", invalid="ignore"):
                deviation = column.std()
            if not 1 / LARGEST < deviation < LARGEST:
                raise UserError(f"column '{name}' has values too large or too small for float64; scale it")
            if discrete is None:
                continue
            found, frequent = discrete_values(column, name), frequent_values(column)
            if found is not None:
                values[k] = found
                kind = f"has {len(found)} distinct values in {len(x)} rows"
                notes.append(f"column '{name}' {kind}: dequantised with cells of {cell_width(found):g}")
            elif frequent:
                often = max(frequent, key=frequent.get)
                kind = f"holds {often:g} in {100 * frequent[often]:.0f} % of the rows"
                notes.append(f"column '{name}' {kind}: its density has no upper bound there")
            if discrete == "error" and (found or frequent):
                raise UserError(
                    f"column '{name}' {kind}, so that its density has no upper bound; leave it out, or where it has "
                    "few values give discrete='dequantize'"
                )
        if len(constants) == len(names):
            raise UserError(f"{what}every column is constant; there is nothing to learn")
        if constants:
            left_out = ", ".join(names[k] for k in constants)
            then = "" if discrete is None else "; the density is that of the others"
            notes.insert(0, f"{what}columns left out because they are constant: {left_out}{then}")
        return cls(tuple(names), constants, values), notes

    @property
    def kept(self) -> list[int]:
        """Positions of the columns that the model sees."""
        return [k for k in range(len(self.names)) if k not in self.constants]

    @property
    def kept_values(self) -> dict[int, tuple[float, ...]]:
        """Distinct values of the discrete columns by their position among the kept ones."""
        return {at: self.values[k] for at, k in enumerate(self.kept) if k in self.values}

    @property
    def cells(self) -> np.ndarray:
        """Width of the cell of each kept column, 0 where it is continuous: (kept,)."""
        widths = [cell_width(self.values[k]) if k in self.values else 0.0 for k in self.kept]
        return np.array(widths)

    @property
    def log_cell(self) -> float:
        """log of the volume of a cell, nats: turns a density of discrete columns into a probability."""
        return sum(math.log(width) for width in self.cells.tolist() if width)

    def deviating(self, x: np.ndarray) -> np.ndarray:
        """Rows that hold another value in a column that was constant in training, bool (N,)."""
        differs = [x[:, k] != value for k, value in self.constants.items()]
        return np.logical_or.reduce(differs, axis=0) if differs else np.zeros(len(x), bool)

    def noisy(self, x: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """The kept columns, dequantised.

        Args:
            x: All columns, (N, columns).
            noise: Uniform on [0, 1), broadcastable to (N, kept).
        """
        return spread(x[:, self.kept], self.cells, noise)

    def noisy_copies(self, x: np.ndarray, seed: int) -> np.ndarray:
        """What to train on: the kept columns, in several dequantised copies one after the other where some are
        discrete; fewer of a large table."""
        copies = max(1, min(COPIES, COPIED_ROWS // len(x))) if self.values else 1
        repeated = np.tile(x, (copies, 1))
        size, generator = (len(repeated), len(self.kept)), stream(seed, "dequantise")
        return self.noisy(repeated, torch.rand(size, generator=generator, dtype=torch.float64).numpy())

    def noise_draws(self, seed: int) -> np.ndarray:
        """Noise of scores, (DRAWS, kept), evenly spread: the same for every row, so that a row's score is its own."""
        if not self.values:
            return np.full((1, 1), 0.5)
        from scipy.stats import qmc

        return qmc.Sobol(len(self.kept), seed=seed).random(DRAWS)

    def restore(self, kept: np.ndarray) -> np.ndarray:
        """All columns from the kept ones (N, kept): discrete ones rounded to the nearest value, constants put back."""
        x = np.empty((len(kept), len(self.names)))
        x[:, self.kept] = kept
        for k, value in self.constants.items():
            x[:, k] = value
        for k, values in self.values.items():
            x[:, k] = nearest_value(torch.from_numpy(x[:, k]), torch.tensor(values, dtype=torch.float64)).numpy()
        return x
