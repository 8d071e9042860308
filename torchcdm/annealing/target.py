r"""What the engine anneals: unnormalised densities gamma_t, with their gradients, at the levels of a schedule.

A CDM is one (:class:`ModelTarget`), and so is a function of several: a subclass of :class:`Target` gives ``evaluate``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Generator, Tensor

from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.schedules import Level, NoiseSchedule
from torchcdm.errors import UserError
from torchcdm.models.denoiser import Denoiser, evaluation_mode, working_dtype
from torchcdm.models.density import require_density
from torchcdm.models.inputs import as_labels
from torchcdm.random import evenly_spaced, normal
from torchcdm.runtime.precision import reduced_precision
from torchcdm.runtime.processes import Rows, map_rows


class Evaluated(NamedTuple):
    """What a target says of x_t, all float64."""

    log_gamma: Tensor  # log gamma_t(x_t), nats in model units, (B,); -inf where the target has no mass
    eps: Tensor  # -sigma_t times its gradient, (B, *shape): a drift for proposals, mended by accept-reject and weights
    levels: Tensor | None = None  # log gamma at every level, (B, T+2), where the same pass tells; None elsewhere


class Target(ABC):
    """A path of unnormalised densities gamma_T ... gamma_1 of events of a ``shape``, from noise to what is wanted.

    The ``reference`` is a Gaussian with about the spread of the data at every level: the start at level T, and the
    eigenbasis in which proposals are scaled. That of standard normal data when None.
    """

    def __init__(
        self, schedule: NoiseSchedule, shape: Sequence[int], reference: GaussianMarginals | None = None
    ) -> None:
        self.schedule, self.shape = schedule, tuple(shape)
        self.reference = round_gaussian(schedule, self.shape) if reference is None else reference
        self.dtype = torch.float64

    @abstractmethod
    def evaluate(self, x_t: Tensor, t: Level) -> Evaluated:
        """The target at ``x_t`` (B, *shape), from one pass of a network, in evaluation mode.

        Levels ``t`` are 1 ... T, an int, or long (B,): replicas of all levels are one batch.
        """

    @final
    def eps(self, x_t: Tensor, t: Level) -> Tensor:
        """-sigma_t times the gradient at ``x_t``, in the precision of the network, (B, *shape)."""
        return self.evaluate(x_t, t).eps.to(self.dtype)

    @final
    def start(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """``n`` draws x_T of the reference at level T, float64 (n, *shape), and its log density, nats (n,)."""
        x_T = self.reference.start(normal((n, *self.shape), generator, self.reference.mean.device))
        return x_T, self.log_start(x_T)

    @final
    def log_start(self, x_T: Tensor) -> Tensor:
        """Log density of :meth:`start`, nats (B,)."""
        return self.reference.log_prob(x_T, self.schedule.T)


@final
class ModelTarget(Target):
    """The density of a ``model`` at every level, given a class or a context (context,) ``y``, or, None, of all.

    With a weight w of ``guidance`` it is (1 + w) log p_t(x|y) - w log p_t(x) (identity 8). The network runs in its own
    precision, on ``batch_size`` inputs at a time; by their size, and what memory holds, when None. As an attribute
    ``y`` may be set to one label for each row of all calls that follow. Where no ``density`` is asked for any denoiser
    will do, in any precision. UserError for one without a density, of unknown shape, or in half precision, which
    leaves nothing of differences of log p, and for a class that it does not have.
    """

    def __init__(
        self, model: Denoiser, y: Tensor | int | None = None, batch_size: int | None = None, guidance: float = 0.0,
        density: bool = True,
    ) -> None:  # fmt: skip
        self.proposes = not hasattr(model, "at_level")
        if density and self.proposes:
            require_density(model, "a sample by moves or particles")
        reference = reference_gaussian(model)
        super().__init__(model.schedule, tuple(reference.mean.shape), reference)
        self.model, self.batch_size, self.guidance = model, batch_size, guidance
        self.dtype = working_dtype(model, torch.float64)
        self.y = as_labels(y, model, 1, one_for_all=True)
        if density and self.dtype.itemsize < 4:
            raise UserError("log p in half precision decides nothing: annealing needs float32, model.float()")

    def evaluate(self, x_t: Tensor, t: Level) -> Evaluated:
        levels = torch.as_tensor(t, device=x_t.device).expand(len(x_t))

        def part(rows: slice) -> tuple[Tensor, ...]:
            x, at, y = x_t[rows].to(self.dtype), levels[rows], self.y
            if y is not None:
                y = y.expand(len(x), *y.shape[1:]) if len(y) == 1 else y[rows]
            if self.proposes:
                return x_t.new_full((len(x),), math.nan), self.model.denoise(x, at, y).eps.double()
            return self.model.at_level(x, at, y, self.guidance)

        return Evaluated(*in_batches(self.model, x_t, part, self.batch_size))


COMPARED = 11  # rungs whose log gamma a fence looks at, at most
DISTANCE = 6.0  # the largest Mahalanobis distance of it that the fence lets in


@dataclass(frozen=True)
class Fence:
    """Where densities have mass: where the profile of log gamma, at a level and above it, is usual for the level."""

    levels: list[int]  # rising, and none but these
    middle: Tensor  # mean log gamma, at some of them, of points of each class and level, (classes, levels, some)
    whiten: Tensor  # gives deviations from it unit covariance, (classes, levels, some, some)

    @classmethod
    def of(cls, levels: Sequence[int], profiles: Sequence[Sequence[Tensor]]) -> "Fence":
        """From log gamma at every level of the schedule, (n, T+2), of usual points of each class and level."""
        some = _compared(levels)
        middle = torch.stack([torch.stack([part[:, some].mean(0) for part in parts]) for parts in profiles])
        whiten = middle.new_zeros(*middle.shape, len(some))
        for y, parts in enumerate(profiles):
            for k, (t, part) in enumerate(zip(levels, parts, strict=True)):
                above = (torch.tensor(some) >= t).nonzero()
                covariance = torch.cov(part[:, some][:, above[:, 0]].T).reshape(len(above), -1)
                # Neighbouring levels of much noise hardly differ.
                floor = 1e-4 * covariance.diag().mean() + 1e-9
                rounded = covariance + floor * torch.eye(len(above)).to(covariance)
                whiten[y, k, above, above.T] = torch.linalg.inv(torch.linalg.cholesky(rounded))
        return cls(list(levels), middle, whiten)

    def restricted(self, log_gamma: Tensor, y: Tensor | int = 0) -> Tensor:
        """log gamma of a class, or one each, at every level (B, T+2) where it has mass there, -inf elsewhere."""
        off = log_gamma[:, _compared(self.levels)][:, None] - self.middle[y]
        whiten = self.whiten[y].expand(len(off), *self.whiten.shape[1:])
        distance = torch.einsum("btij,btj->bti", whiten, off).square().sum(2)
        kept = log_gamma[:, self.levels].masked_fill(~(distance <= DISTANCE**2), -math.inf)
        at = torch.tensor(self.levels, device=log_gamma.device)
        return torch.full_like(log_gamma, -math.inf).index_copy(1, at, kept)


def _compared(levels: Sequence[int]) -> list[int]:
    """The lowest and the highest of the levels, and some between."""
    return [levels[k] for k in evenly_spaced(len(levels), COMPARED)]


@final
class Fenced(Target):
    """A model's target without mass beyond a fence: of one class in each column, where batches have columns.

    The numbers of points are multiples of that of the ``columns``, which are their classes, long, or none.
    """

    def __init__(self, inner: ModelTarget, fence: Fence, columns: Tensor | None = None) -> None:
        super().__init__(inner.schedule, inner.shape, inner.reference)
        self.inner, self.fence, self.columns = inner, fence, columns

    def evaluate(self, x_t: Tensor, t: Level) -> Evaluated:
        y = torch.zeros(len(x_t), dtype=torch.long, device=x_t.device)
        if self.columns is not None:
            self.inner.y = y = self.columns.repeat(len(x_t) // len(self.columns))
        found, at = self.inner.evaluate(x_t, t), torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        levels = self.fence.restricted(found.levels, y)
        return Evaluated(levels.gather(1, at[:, None])[:, 0], found.eps, levels)


def reference_gaussian(denoiser: Denoiser) -> GaussianMarginals:
    """The denoiser's own Gaussian marginals, or those of standard normal data; UserError for an unknown shape."""
    fitted = None if denoiser.base is None else denoiser.base.gaussian
    if fitted is not None:
        return fitted
    if denoiser.shape is None:
        raise UserError("the event shape is not known: give the model a DataTransform")
    return round_gaussian(denoiser.schedule, denoiser.shape)


def round_gaussian(schedule: NoiseSchedule, shape: Sequence[int]) -> GaussianMarginals:
    """Marginals of standard normal data: isotropic, so that the cosine form needs no matrix."""
    return GaussianMarginals.blank(schedule, shape, "cosine").to(schedule.alpha.device)


def in_batches(model: Denoiser, x: Tensor, function: Callable[[slice], Rows], batch_size: int | None = None) -> Rows:
    """``function`` of the rows of each batch of ``x`` (N, ...), joined; in evaluation mode, without gradients.

    Without reduced precision and autocast: differences of log p are a few nats of thousands.
    """
    device = model.schedule.alpha.device
    settings = reduced_precision(device.type)
    for set_to, _, full in settings:
        set_to(full)
    try:
        with evaluation_mode(model), torch.no_grad(), torch.autocast(device.type, enabled=False):
            return map_rows(function, len(x), batch_size, dim=x.shape[1:].numel(), device=device)
    finally:
        for set_to, before, _ in settings:
            set_to(before)
