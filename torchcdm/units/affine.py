"""The affine map from data units to model units."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Len
from torch import Tensor

from torchcdm.errors import UserError
from torchcdm.runtime.precision import Float64Module
from torchcdm.runtime.validation import Count, Float, Positive, checked, encode
from torchcdm.units.lattice import NONE, Cells
from torchcdm.units.table import TableEncoding


class DataTransform(Float64Module):
    """The affine map from data units to model units, the identity by default, with the grid that the data lie on.

    UserError for values of the wrong type or shape, that are not finite, or a scale or bin that is not positive.

    Args:
        shape: Event shape, (C, H, W) for images, (d,) for tables.
        shift: Data value at model value 0; a number, or a tensor that broadcasts to ``shape``.
        scale: Data units per model unit, positive; a number, or a tensor that broadcasts to ``shape``.
        bin: Spacing of the grey levels in data units; None for continuous data.
        dequantize: Whether training and scoring add uniform noise over the cell. Ignored without a bin.
        low: Smallest grey level, where rounding clips; None does not clip.
        high: Largest grey level.

    Attributes:
        cells: Values of columns that have a probability, by the place of the column; none in other data.
        table: What becomes of the cells of a table, whose codes are the data; None elsewhere.

    Example:
        >>> transform = DataTransform.images((1, 28, 28))
        >>> transform.log_det(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5])
    """

    gaussianized: ClassVar[bool] = False
    """Whether dimensions are bent towards normals, so that noise on the data is no additive noise in model units."""

    cells: Mapping[int, Cells] = NONE
    table: TableEncoding | None = None

    shift: Tensor
    scale: Tensor

    @checked
    def __init__(
        self, shape: Annotated[tuple[Count, ...], Len(1, 16)], shift: float | Tensor = 0.0,
        scale: float | Tensor = 1.0, bin: Positive | None = None, dequantize: bool = True, low: Float | None = None,
        high: Float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.shape = shape
        for name, value in (("shift", shift), ("scale", scale)):
            try:
                found = torch.as_tensor(value, dtype=torch.float64)
                found.expand(shape)
            except (TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"data transform: {name} must be numbers for the shape {shape}; {error}") from None
            if not bool(found.isfinite().all()):
                raise UserError(f"data transform: {name} is not finite")
            self.register_buffer(name, found, persistent=False)
        if not bool((self.scale > 0).all()):
            raise UserError("data transform: every scale must be positive; is a column constant?")
        if low is not None and high is not None and low > high:
            raise UserError(f"data transform: low is {low:g} and high {high:g}; low must not be above it")
        self.bin, self.low, self.high = bin, low, high
        self.dequantize = dequantize and bin is not None

    @classmethod
    def images(
        cls, shape: Sequence[int], levels: int = 256, dequantize: bool = True, low: float = 0
    ) -> "DataTransform":
        """Grey levels low ... low + levels - 1 to [-1, 1]; with ``dequantize`` it is their cells that fill it."""
        scale = levels / 2 if dequantize else (levels - 1) / 2
        return cls(shape, low + (levels - 1) / 2, scale, 1.0, dequantize, low, low + levels - 1)

    @classmethod
    def standardize(cls, x: Tensor) -> "DataTransform":
        """Zero mean and unit deviation for each column of ``x`` (N, d); over all pixels of images (N, C, H, W)."""
        values, over = x.double(), 0 if x.ndim == 2 else None
        return cls(x.shape[1:], values.mean(over), values.std(over, correction=0))

    @property
    def dim(self) -> int:
        """Dimensions d of one sample."""
        return math.prod(self.shape)

    def log_det(self, x: Tensor) -> Tensor:
        """log p(data) - log p(model) at ``x`` (B, *shape), data units: log of the Jacobian, nats, float64 (B,)."""
        return -self.scale.log().expand(self.shape).sum().expand(x.shape[0])

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
        return ((x.double() - self.shift) / self.scale).to(floating(x))

    def inverse(self, z: Tensor) -> Tensor:
        """Model units to data units, (B, *shape)."""
        return (z.double() * self.scale + self.shift).to(z.dtype)

    def spread(self, x: Tensor, position: Tensor) -> Tensor:
        """Dequantise ``x`` (..., *shape), data units: each number at its ``position`` in its cell, on [0, 1]."""
        return x.to(floating(x)) + self.bin * (position - 0.5) if self.dequantize else x

    def add_noise(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """:meth:`spread` to random places; ``x`` itself where there is nothing to do."""
        if not self.dequantize:
            return x
        return self.spread(x, torch.rand(x.shape, generator=generator, device=x.device, dtype=floating(x)))

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What the network trains on: dequantised, in model units."""
        return self(self.add_noise(x, generator))

    def quantize(self, x: Tensor) -> Tensor:
        """Data units rounded to the nearest grey level and clipped to the range; continuous data unchanged."""
        if self.bin is None:
            return x
        start = self.low or 0.0
        x = ((x - start) / self.bin).round() * self.bin + start
        return x if self.low is None and self.high is None else x.clamp(self.low, self.high)

    def to_config(self) -> dict[str, Any]:
        """Plain Python values, exact: floats survive JSON to the last bit."""
        return self.arguments() | ({} if self.table is None else {"table": encode(self.table)})

    def arguments(self) -> dict[str, Any]:
        """Those of the constructor, and ``kind`` for subclasses."""
        units = {"shape": list(self.shape), "shift": self.shift.tolist(), "scale": self.scale.tolist()}
        return units | {"bin": self.bin, "dequantize": self.dequantize, "low": self.low, "high": self.high}


def floating(x: Tensor) -> torch.dtype:
    """The type of number in which ``x`` is transformed: its own, float32 for integers."""
    return x.dtype if x.is_floating_point() else torch.float32
