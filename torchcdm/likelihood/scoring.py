"""How data are scored: the choices that all likelihoods share, and the checks of what they are given."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le, MultipleOf
from torch import Generator, Tensor

from torchcdm.errors import UserError, warn
from torchcdm.models.denoiser import Denoiser
from torchcdm.models.inputs import LARGEST, as_numbers
from torchcdm.random import stream
from torchcdm.runtime.processes import labels_of
from torchcdm.runtime.validation import Count, CountOrZero, Int, validated
from torchcdm.units import DataTransform, GaussianizedTransform

SCORING_NOISE = 0.5  # at which data on a grid are scored, in bins: one pass on digits is lowest there
SCORING_NOISE_GAUSSIANIZED = 1 / 3  # without edges, in typical cells of the pixel whose cells are narrowest


@validated
class Scoring:
    """How data are scored; UserError for a value that is no whole number or out of range.

    Attributes:
        level: Noise level through which data are scored; :func:`scoring_level` of the model when None.
        draws: Noise draws of each sample for one-pass likelihoods.
        seed: Seed of all noise. The noise of a sample depends on the seed and the sample's index, not on batches.
        steps: Heun steps of the probability flow, two evaluations each; every level where there are fewer.
        probes: Random probes of the flow's divergence, an even number, as their halves are compared (UserError for an
            odd one); without use up to 16 dimensions.
        batch_size: Samples at a time; by their size, and what memory holds, when None.
    """

    level: CountOrZero | None = None
    draws: Annotated[Count, Le(10**6)] = 1
    seed: Annotated[Int, Ge(-(2**63)), Le(2**63 - 1)] = 0
    steps: Count = 40
    probes: Annotated[Count, MultipleOf(2)] = 2
    batch_size: Count | None = None

    def level_of(self, model: Denoiser, first: int = 1, last: int | None = None) -> int:
        """The level at which ``model`` is scored; UserError where it is not one of ``first`` ... ``last``.

        The last is T - 1 when None, as a flow and a chain go on above it.
        """
        level, last = scoring_level(model) if self.level is None else self.level, last or model.schedule.T - 1
        if not first <= level <= last:
            raise UserError(f"level {level} cannot be scored through; choose {first} ... {last}")
        return level


def as_data(model: Denoiser, x: Any, y: Any, scoring: Scoring) -> tuple[Tensor, Tensor | None]:
    """Samples (N, *shape), where they were, and labels as tensors that the model can score.

    UserError for a model without transform, samples that are empty, not finite or of another shape, and other labels.
    """
    if getattr(model, "transform", None) is None:
        raise UserError("likelihoods are in data units: give a model with a DataTransform (identity will do)")
    if not isinstance(scoring, Scoring):
        raise UserError(f"scoring is {type(scoring).__name__}; give a likelihood.Scoring(level=..., draws=...)")
    x = as_numbers(x, x.device if isinstance(x, Tensor) else torch.device("cpu"), model.transform)
    y = model.check_inputs(x, y=y, data=True)
    if model.transform.bin is not None and (x - model.transform.quantize(x)).abs().max() > model.transform.bin / 4:
        warn("samples with values between the grey levels have no code length: give model.transform.quantize(x)")
    return x, y


def scoring_level(model: Denoiser, times: float = 1.0) -> int:
    """The level through which data are scored: the first with noise of so much of a cell, ``SCORING_NOISE``.

    Or so many ``times`` as much. With less noise the density still has the edges of the cells, which no smooth network
    draws, and its mean says too little about which cell it is. Level 1 for continuous data.
    """
    transform, ratio = model.transform, model.schedule.ratio[1:-1]
    if transform is None or transform.bin is None:
        return 1
    if isinstance(transform, GaussianizedTransform):
        least = SCORING_NOISE_GAUSSIANIZED * float(transform.cell_width.min())
    else:
        least = SCORING_NOISE * float(transform.model_bin.max())
    # Below T, as a flow and a chain need somewhere to go.
    return min(int((ratio >= times * least).double().argmax()) + 1, max(1, model.schedule.T - 1))


def draw_rows(
    seed: int, purpose: tuple[Any, ...], rows: Sequence[int], draw: Callable[[int, Generator], Tensor]
) -> Tensor:
    """``draw(index, generator)`` for each sample, stacked (B, ...), by the generators of (seed, purpose, index)."""
    return torch.stack([draw(i, stream(seed, *purpose, i)) for i in rows])


def dithered(transform: DataTransform, x: Tensor, seed: int, first: int = 0) -> Tensor:
    """Samples ``x`` (B, *shape), numbered from ``first``, with noise over their cells where discrete; float64."""
    if not transform.dequantize:
        return x.double()
    rows = range(first, first + len(x))
    noisy = draw_rows(seed, ("dequantise",), rows, lambda i, g: transform.add_noise(x[i - first].cpu().double(), g))
    return noisy.to(x.device)


class ScoredBatch:
    """Those samples of ``x`` (N, *shape), data units, that ``rows`` says, on their way into a network: ``x`` in
    float64 and labels ``y``, or None, on the model's device, as all that follows."""

    def __init__(self, model: Denoiser, x: Tensor, y: Tensor | None, rows: slice, seed: int) -> None:
        self.transform, self.schedule, self.rows, self.seed = model.transform, model.schedule, rows, seed
        device = model.schedule.alpha.device
        self.x, self.y = x[rows].to(device).double(), labels_of(y, rows, device)

    def noise(self, *purpose: str | int, kind: Callable[..., Tensor] = torch.randn) -> Tensor:
        """Standard normal noise, or that of another ``kind``, float64 (B, *shape)."""
        shape, rows = self.x.shape[1:], range(self.rows.start, self.rows.stop)
        drawn = draw_rows(self.seed, purpose, rows, lambda i, g: kind(shape, generator=g, dtype=torch.float64))
        return drawn.to(self.x.device)

    def clean(self) -> tuple[Tensor, Tensor]:
        """x_0 as a noisy level sees it, and what makes its log density one in data units.

        Draws from the cells of data on a grid, dithered values else: model units, float64 (B, *shape). And nats to
        add, (B,): code lengths need no change of units, but as densities they are given less the log bin.
        """
        if self.transform.bin is None:
            noisy = dithered(self.transform, self.x, self.seed, self.rows.start)
            z = self.transform(noisy)
            far = (z.abs() > LARGEST).flatten(1).any(1)
            if far.any():
                first = self.rows.start + int(far.int().argmax())
                raise UserError(f"sample {first} is so far from the model's data that its square overflows; remove it")
            return z, self.transform.log_det(noisy)
        change = torch.full((len(self.x),), -self.transform.dim * self.transform.log_bin, dtype=torch.float64)
        x = self.transform.spread(self.x.double(), self.noise("cell", kind=torch.rand))
        return self.transform(x), change.to(self.x.device)
