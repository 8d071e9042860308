r"""Likelihood by the probability flow of a denoiser (identity 6), on the discrete levels, and draws from it.

With a reference Gaussian of mean mu and covariance eigenvalues lambda, :math:`w = (\lambda + r^2)^{-1/2} R (u - \mu)`
is standard normal at every r if the data are that Gaussian, and the flow stands still. So the flow is integrated in
w, where only what is not Gaussian moves, and only its divergence needs probes; the Gaussian's part is exact.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.errors import UserError
from torchcdm.likelihood.common import PROBES, START, draw_rows, labels_of
from torchcdm.models.denoiser import Denoiser, evaluation_mode, working_dtype
from torchcdm.runtime.batching import map_rows

EXACT_DIMENSIONS = 16
"""Up to here the divergence is the exact trace, above the mean over random probes."""


@dataclass(frozen=True)
class FlowResult:
    """Log-densities by the probability flow, and how far they can be trusted.

    Attributes:
        log_prob: log density of each input at its level, nats in model units, (B,).
        probe_gap: Difference between the two independent halves of the probes, (B,); 0 with an exact divergence.
        step_gap: Difference to half the number of steps on the same probes, (B,); None where not asked for.
        x_T: Where the path ended, at the last level, model units, (B, *shape).
        nfe: Network evaluations for each sample (a denoiser by gradient counts once).
        start_kl_bound: Upper bound on KL(p_T || start Gaussian), nats, from the inputs; the one error that neither
            more steps nor more probes remove.
    """

    log_prob: Tensor
    probe_gap: Tensor
    step_gap: Tensor | None
    x_T: Tensor
    nfe: int
    start_kl_bound: float


def reference_gaussian(denoiser: Denoiser) -> GaussianMarginals:
    """The denoiser's own Gaussian marginals, or those of standard normal data."""
    if denoiser.gaussian is not None:
        return denoiser.gaussian
    if denoiser.shape is None:
        raise UserError("the flow needs the event shape: give the model a DataTransform")
    # Isotropic: the cosine form needs no matrix.
    blank = GaussianMarginals.blank(denoiser.schedule, denoiser.shape, "cosine")
    return blank.to(denoiser.schedule.alpha.device)


def probability_flow(
    denoiser: Denoiser,
    x_t: Tensor,
    y: Tensor | None = None,
    level: int = 1,
    steps: int | None = None,
    probes: int = 2,
    seed: int = 0,
    halve: bool = False,
    batch_size: int | None = None,
) -> FlowResult:
    """log density of noisy inputs under the flow from their level to the last (Heun, second order).

    Args:
        denoiser: Any denoiser; put into evaluation mode meanwhile.
        x_t: Inputs at ``level``, model units, (N, *shape).
        y: Classes, long (N,), or None.
        level: Level of the inputs, 1 ... T - 1.
        steps: Steps from ``level`` to T; all levels when None.
        probes: Random probes of the divergence at every evaluation, an even number; unused up to
            :data:`EXACT_DIMENSIONS` dimensions.
        seed: Seed of the probes; independent of ``batch_size``.
        halve: Also integrate with half the steps, for :attr:`FlowResult.step_gap`.
        batch_size: Samples at a time; by their size, and what memory holds, when None.

    Raises:
        UserError: A level or a number of steps that the schedule does not have, or an odd number of probes.
    """
    check_probes(probes)
    grid = rising_levels(level, denoiser.schedule.T, steps)
    reference = reference_gaussian(denoiser)

    def integrate(rows: slice) -> tuple[Tensor, ...]:
        flow = _Flow(denoiser, reference, labels_of(y, rows, x_t.device), probes, seed, rows)
        fine = flow.log_prob(x_t[rows], grid)
        return (*fine, *flow.log_prob(x_t[rows], halved(grid))) if halve else fine

    with evaluation_mode(denoiser):
        log_prob, probe_gap, x_T, *coarse = map_rows(
            integrate, len(x_t), batch_size, dim=x_t.shape[1:].numel(), device=x_t.device
        )
    return FlowResult(
        log_prob,
        probe_gap,
        log_prob - coarse[0] if coarse else None,
        x_T,
        2 * len(grid) - 1,
        start_kl_bound(denoiser, reference, x_t, level),
    )


@dataclass(frozen=True)
class FlowSamples:
    """Draws from the flow's own density, which is normalised by construction.

    Attributes:
        x_t: At the level asked for, model units, float64 (n, *shape).
        log_prob: The flow's log density there, nats in model units, (n,).
        probe_gap: As in :class:`FlowResult`.
        nfe: Network evaluations for each sample.
    """

    x_t: Tensor
    log_prob: Tensor
    probe_gap: Tensor
    nfe: int


def flow_sample(
    denoiser: Denoiser,
    n: int,
    y: Tensor | None = None,
    level: int = 1,
    steps: int | None = None,
    probes: int = 2,
    seed: int = 0,
    batch_size: int | None = None,
) -> FlowSamples:
    """Draws at ``level`` by the flow backwards from its start density at T, with their log density.

    Arguments as in :func:`probability_flow`; ``n`` is the number of draws, ``y`` their classes (n,).
    """
    check_probes(probes)
    grid = rising_levels(level, denoiser.schedule.T, steps)
    reference = reference_gaussian(denoiser)
    dim, device = reference.variances.numel(), denoiser.schedule.alpha.device

    def draw(rows: slice) -> tuple[Tensor, ...]:
        w = draw_rows(seed, START, rows, lambda i, g: torch.randn(dim, generator=g, dtype=torch.float64))
        flow = _Flow(denoiser, reference, labels_of(y, rows, device), probes, seed, rows)
        return flow.sample(w.to(device), grid)

    with evaluation_mode(denoiser):
        x_t, log_prob, probe_gap = map_rows(draw, n, batch_size, dim=dim, device=device)
    return FlowSamples(x_t, log_prob, probe_gap, 2 * len(grid) - 1)


Look = Callable[[Tensor, int, Tensor | None], tuple[Tensor, ...]]
"""What is wanted of x_t (B, *shape), in the precision of the network, at level t, of classes y: tensors (B, ...)."""


@dataclass(frozen=True)
class FlowPath:
    """Levels that the flow visits on the way up, and its log density there.

    Attributes:
        levels: From that of the inputs to T.
        seen: What was asked for at each of them, (levels, N, ...).
        log_prob: The flow's log density, nats in model units, (levels, N).
    """

    levels: list[int]
    seen: tuple[Tensor, ...]
    log_prob: Tensor


def flow_path(
    denoiser: Denoiser,
    x_t: Tensor,
    look: Look,
    y: Tensor | None = None,
    level: int = 1,
    steps: int | None = None,
    probes: int = 2,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> FlowPath:
    """What :func:`probability_flow` integrates, level by level; arguments as there, but for two.

    ``look`` is asked at each level, as whole paths of images are more than memory may hold; ``progress`` shows a
    progress bar.
    """
    from tqdm.auto import tqdm

    check_probes(probes)
    grid = rising_levels(level, denoiser.schedule.T, steps)
    reference = reference_gaussian(denoiser)

    def follow(rows: slice) -> tuple[Tensor, ...]:
        flow = _Flow(denoiser, reference, labels_of(y, rows, x_t.device), probes, seed, rows)
        log_prob, seen = flow.along(x_t[rows], grid, look)
        bar.update(len(log_prob))
        return log_prob, *seen

    with (
        evaluation_mode(denoiser),
        tqdm(total=len(x_t), desc="flow", unit="sample", disable=not progress, leave=False) as bar,
    ):
        log_prob, *seen = map_rows(follow, len(x_t), batch_size, dim=x_t.shape[1:].numel(), device=x_t.device)
    return FlowPath(grid, tuple(column.transpose(0, 1) for column in seen), log_prob.T)


def check_probes(probes: int) -> None:
    """Refuses a number of probes that has no two halves."""
    if probes < 2 or probes % 2:
        raise UserError(f"probes is {probes}; give an even number, so that two halves can be compared")


def rising_levels(level: int, T: int, steps: int | None) -> list[int]:
    """``steps`` + 1 levels from ``level`` to T, evenly spaced; all of them when None."""
    if not 1 <= level < T:
        raise UserError(f"level {level} cannot start a flow; choose 1 ... {T - 1}")
    span = T - level
    if steps is None:
        return list(range(level, T + 1))
    if not 1 <= steps <= span:
        raise UserError(f"flow: steps is {steps}; from level {level} this schedule takes 1 to {span}")
    return [level + (i * span + steps // 2) // steps for i in range(steps + 1)]


def halved(grid: Sequence[int]) -> list[int]:
    """Every second level, both ends kept."""
    return [*grid[:-1:2], grid[-1]]


@torch.no_grad()
def start_kl_bound(denoiser: Denoiser, reference: GaussianMarginals, x_t: Tensor, level: int) -> float:
    """Upper bound on KL(p_T || G_T): the mean over data of KL(N(a x, b² I) || G_T), nats."""
    schedule = denoiser.schedule
    flat = x_t.double()
    a, b = (float(value) for value in schedule.forward_kernel(level, schedule.T, flat))
    mean, variances = reference.moments(schedule.T)
    offset = reference.rotation(a * flat - mean).square().mean(0)
    return float(0.5 * ((b**2 + offset) / variances - 1 + (variances / b**2).log()).sum())


class _Flow:
    """One batch on its way: state w (B, d) and the accumulated divergence of both probe halves (2, B)."""

    def __init__(
        self,
        denoiser: Denoiser,
        reference: GaussianMarginals,
        y: Tensor | None,
        probes: int,
        seed: int,
        rows: slice,
    ) -> None:
        self.denoiser, self.reference, self.y = denoiser, reference, y
        self.schedule = denoiser.schedule
        self.dtype = working_dtype(denoiser, torch.float64)
        self.probes, self.seed, self.rows = probes, seed, rows

    def log_prob(self, x_t: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """log density of x at the first level of the rising ``grid``, gap of the probe halves, x at its last."""
        (end,) = deque(self._rise(x_t, grid), maxlen=1)
        _, w, total = end
        return self._log_density(w, total.mean(0), grid[0]), total[0] - total[1], self._x(w, grid[-1])

    def along(self, x_t: Tensor, grid: Sequence[int], look: Look) -> tuple[Tensor, list[Tensor]]:
        """log density at each level of the grid, (B, levels), and what ``look`` says there, (B, levels, ...)."""
        seen, totals = [], []
        for t, w, total in self._rise(x_t, grid):
            seen.append(look(self._x(w, t).to(self.dtype), t, self.y))
            totals.append(total)
        rest = (totals[-1] - torch.stack(totals)).mean(1)
        log_prob = [self._log_density(w, from_t, t) for t, from_t in zip(grid, rest, strict=True)]
        return torch.stack(log_prob, 1), [torch.stack(column, 1) for column in zip(*seen, strict=True)]

    def sample(self, w: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """x at the first level from w at the last, its log density there, gap of the probe halves."""
        (end,) = deque(self._travel(w, grid[::-1]), maxlen=1)
        start, w_start, total = end
        log_density = self._log_density(w, -total.mean(0), start)
        return self._x(w_start, start), log_density, total[1] - total[0]

    def _rise(self, x_t: Tensor, grid: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """:meth:`_travel` from x at the first level of the grid."""
        start = grid[0]
        w = self.reference.rotation(x_t.double() / self.schedule.alpha[start] - self.reference.mean)
        return self._travel(w / self._scale(start), grid)

    def _travel(self, w: Tensor, levels: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each level, w there (B, d), and the divergence integrated up to it by either half of the probes, (2, B)."""
        # Heun in the angle atan(r): finite at both ends, close to r where the noise is low. The divergence is
        # summed by the trapezoidal rule along the path itself, so that the predictor's end needs none.
        angle = torch.atan(self.schedule.ratio)
        slope, divergence = self._slope_and_divergence(w, levels[0])
        total = torch.zeros_like(divergence)
        yield levels[0], w, total
        for t, s in pairwise(levels):
            step = angle[s] - angle[t]
            ahead = self._slope(w + step * slope, s)
            w = w + step / 2 * (slope + ahead)
            before = divergence
            slope, divergence = self._slope_and_divergence(w, s)
            total = total + step / 2 * (before + divergence)
            yield s, w, total

    def _log_density(self, w_T: Tensor, total: Tensor, t: int) -> Tensor:
        """log p_t from where the path is at T and its divergence from t to T."""
        d = w_T.shape[1]
        log_normal = -0.5 * w_T.square().sum(1) - 0.5 * d * math.log(2 * math.pi)
        # log p_u = log p_w - sum log scale, and log p_x = log p_u - d log alpha.
        return log_normal + total - self._scale(t).log().sum() - d * self.schedule.alpha[t].log()

    def _scale(self, t: int) -> Tensor:
        return (self.reference.variances + self.schedule.ratio[t] ** 2).sqrt()

    def _x(self, w: Tensor, t: int) -> Tensor:
        u = self.reference.mean + self.reference.rotation.inverse(w * self._scale(t))
        return self.schedule.alpha[t] * u

    def _slope(self, w: Tensor, t: int) -> Tensor:
        """dw/d(angle), (B, d): dr = (1 + r²) d(angle)."""
        x_t = self._x(w, t).to(self.dtype)
        excess = self.denoiser.denoise(x_t, t, self.y).eps - self.reference.eps(x_t, t)
        return self._in_angle(excess, t)

    def _slope_and_divergence(self, w: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """The same, with its divergence by either half of the probes, (2, B)."""
        excess, divergence = self._excess(self._x(w, t).to(self.dtype), t)
        # The trace of a map does not depend on the basis: alpha * div_x of the excess.
        speed = (1 + self.schedule.ratio[t] ** 2) * self.schedule.alpha[t]
        return self._in_angle(excess, t), speed * divergence.double()

    def _in_angle(self, excess: Tensor, t: int) -> Tensor:
        return (1 + self.schedule.ratio[t] ** 2) * self.reference.rotation(excess.double()) / self._scale(t)

    def _excess(self, x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """E[eps | x_t] less the reference's, and its divergence in x_t: the one place that takes one."""
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            excess = self.denoiser.differentiable_eps(x, t, self.y) - self.reference.eps(x, t)
            vectors = self._probe_vectors(x, t)
            traces = []
            for i, probe in enumerate(vectors):
                (product,) = torch.autograd.grad(excess, x, probe, retain_graph=i + 1 < len(vectors))
                traces.append((product * probe).flatten(1).sum(1))
        if x[0].numel() <= EXACT_DIMENSIONS:
            return excess.detach(), torch.stack(traces).sum(0).expand(2, -1)
        halves = torch.stack([torch.stack(traces[half::2]).mean(0) for half in (0, 1)])
        return excess.detach(), halves

    def _probe_vectors(self, x: Tensor, t: int) -> list[Tensor]:
        """Unit vectors (exact trace) or fresh random signs, drawn anew for each sample and level."""
        d = x[0].numel()
        if d <= EXACT_DIMENSIONS:
            units = torch.eye(d, dtype=x.dtype, device=x.device)
            return [unit.reshape(1, *x.shape[1:]).expand_as(x) for unit in units]
        shape = (self.probes, *x.shape[1:])
        signs = draw_rows(self.seed, (PROBES, t), self.rows, lambda i, g: torch.randint(0, 2, shape, generator=g))
        return list((2.0 * signs - 1).to(x).movedim(1, 0))
