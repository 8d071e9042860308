r"""Likelihood by the probability flow of a denoiser (identity 6), on the discrete levels, and draws from it.

With a reference Gaussian of mean mu and covariance eigenvalues lambda, :math:`w = (\lambda + r^2)^{-1/2} R (u - \mu)`
is standard normal at every r if the data are that Gaussian, and the flow stands still. So the flow is integrated in
w, where only what is not Gaussian moves, and only its divergence needs probes; the Gaussian's part is exact.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.errors import UserError
from torchcdm.likelihood.noise import draw_rows
from torchcdm.likelihood.one_pass import ScoredNoise, score_noisy
from torchcdm.likelihood.scoring import Scoring, as_data, require_transform
from torchcdm.models.denoiser import Denoiser, evaluation_mode, working_dtype
from torchcdm.runtime.batching import labels_of, map_rows
from torchcdm.units import LogLikelihood
from torchcdm.units.normal import log_normal

EXACT_DIMENSIONS = 16
"""Up to here the divergence is the exact trace, above the mean over random probes."""


@dataclass(frozen=True)
class FlowResult:
    """Log densities by the probability flow, and how far they can be trusted.

    Attributes:
        log_prob: log density of each input at its level, nats in model units, (B,).
        probe_gap: Difference between the two independent halves of the probes, (B,); 0 with an exact divergence.
        step_gap: Difference to half the number of steps on the same probes, (B,); None where not asked for.
        x_T: Where the path ended, at the last level, model units, (B, *shape).
        start_kl_bound: Upper bound on KL(p_T || start Gaussian), nats, from the inputs; the one error that neither
            more steps nor more probes remove.
    """

    log_prob: Tensor
    probe_gap: Tensor
    step_gap: Tensor | None
    x_T: Tensor
    start_kl_bound: float


@dataclass(frozen=True)
class FlowLikelihood(LogLikelihood):
    """A likelihood by the flow, and what it came from.

    Attributes:
        flow: The integration.
        scored: The noisy inputs, (N, *shape), the model's own density of them, and the offset.
    """

    flow: FlowResult
    scored: ScoredNoise


def probability_flow(
    denoiser: Denoiser, x: Tensor, y: Tensor | None = None, scoring: Scoring = Scoring()
) -> FlowLikelihood:
    """log-likelihood of data through one draw of noise and the flow from there.

    A lower bound on that of data on a grid; for continuous data the density of the data with that noise. Exact up to
    the flow's steps, probes and start density, and normalised by construction.

    Args:
        denoiser: Any denoiser with a transform; put into evaluation mode meanwhile.
        x: Data units, (N, *shape).
        y: Classes, long (N,), or None.
        scoring: Level 1 ... T - 1, steps, probes, seed and batch size.
    """
    (x, y), transform, solver = as_data(denoiser, x, y), require_transform(denoiser), FlowSolver(denoiser, scoring)
    level = solver.levels[0]

    def score(rows: slice) -> tuple[Tensor, ...]:
        one = score_noisy(denoiser, x, y, rows, level, scoring.seed)
        return (one.z, one.offset) if one.log_prob is None else (one.z, one.offset, one.log_prob)

    z, offset, *own = scoring.by_batches(denoiser, x, score)
    flow = solver.log_prob(z, labels_of(y, slice(None), z.device))
    return FlowLikelihood(
        (flow.log_prob + offset).cpu(), transform.dim, level, f"probability flow from level {level}",
        transform.log_bin, solver.nfe, flow, ScoredNoise(z, own[0] if own else None, offset),
    )  # fmt: skip


def reference_gaussian(denoiser: Denoiser) -> GaussianMarginals:
    """The denoiser's own Gaussian marginals, or those of standard normal data."""
    if denoiser.gaussian is not None:
        return denoiser.gaussian
    if denoiser.shape is None:
        raise UserError("the flow needs the event shape: give the model a DataTransform")
    # Isotropic: the cosine form needs no matrix.
    blank = GaussianMarginals.blank(denoiser.schedule, denoiser.shape, "cosine")
    return blank.to(denoiser.schedule.alpha.device)


Look = Callable[[Tensor, int, Tensor | None], tuple[Tensor, ...]]
"""What is wanted of x_t (B, *shape), in the precision of the network, at level t, of classes y: tensors (B, ...)."""


@final
class FlowSolver:
    """The probability flow of a denoiser between one level and the last, by Heun steps, in model units.

    Args:
        denoiser: Any denoiser; put into evaluation mode meanwhile.
        scoring: Level 1 ... T - 1, steps, probes, seed and batch size.

    Attributes:
        levels: Visited levels, rising to T.
        nfe: Network evaluations for each sample; a denoiser by gradient counts once.
    """

    def __init__(self, denoiser: Denoiser, scoring: Scoring = Scoring()) -> None:
        self.denoiser, self.scoring, self.schedule = denoiser, scoring, denoiser.schedule
        self.reference, self.dtype = reference_gaussian(denoiser), working_dtype(denoiser, torch.float64)
        level = scoring.level_of(denoiser)
        span = self.schedule.T - level
        steps = min(scoring.steps, span)
        self.levels = [level + (i * span + steps // 2) // steps for i in range(steps + 1)]
        self.nfe = 2 * steps + 1

    def log_prob(self, x_t: Tensor, y: Tensor | None = None, halve: bool = False) -> FlowResult:
        """log density of noisy inputs.

        Args:
            x_t: Inputs at the first level, (N, *shape).
            y: Classes, long (N,), or None.
            halve: Also integrate with half the steps, for :attr:`FlowResult.step_gap`.
        """
        coarse = [*self.levels[:-1:2], self.levels[-1]]

        def integrate(rows: slice) -> tuple[Tensor, ...]:
            flow = _Flow(self, labels_of(y, rows, x_t.device), rows)
            fine = flow.log_prob(x_t[rows], self.levels)
            return (*fine, flow.log_prob(x_t[rows], coarse)[0]) if halve else fine

        log_prob, probe_gap, x_T, *halved = self.scoring.by_batches(self.denoiser, x_t, integrate)
        return FlowResult(log_prob, probe_gap, log_prob - halved[0] if halve else None, x_T, self._start_kl_bound(x_t))

    def sample(self, n: int, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draws by the flow backwards from its start density at T, and the flow's log density of them.

        Args:
            n: Number of draws.
            y: Their classes, long (n,), or None.

        Returns:
            x at the first level, float64 (n, *shape), and nats in model units, (n,): a normalised density.
        """
        dim, device = self.reference.variances.numel(), self.schedule.alpha.device

        def draw(rows: slice) -> tuple[Tensor, ...]:
            noise = draw_rows(
                self.scoring.seed, ("start",), rows, lambda i, g: torch.randn(dim, generator=g, dtype=torch.float64)
            )
            return _Flow(self, labels_of(y, rows, device), rows).sample(noise.to(device), self.levels)

        with evaluation_mode(self.denoiser):
            return map_rows(draw, n, self.scoring.batch_size, dim=dim, device=device)

    def path(
        self, x_t: Tensor, look: Look, y: Tensor | None = None, progress: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """What :meth:`log_prob` integrates, level by level.

        Args:
            x_t: Inputs at the first level, (N, *shape).
            look: Asked at each level, as whole paths of images are more than memory may hold.
            y: Classes, long (N,), or None.
            progress: Shows a progress bar.

        Returns:
            The flow's log density at each level, nats in model units, (levels, N), and what ``look`` said there,
            (levels, N, ...).
        """
        from tqdm.auto import tqdm

        def follow(rows: slice) -> tuple[Tensor, ...]:
            log_prob, seen = _Flow(self, labels_of(y, rows, x_t.device), rows).along(x_t[rows], self.levels, look)
            bar.update(len(log_prob))
            return log_prob, *seen

        with tqdm(total=len(x_t), desc="flow", unit="sample", disable=not progress, leave=False) as bar:
            log_prob, *seen = self.scoring.by_batches(self.denoiser, x_t, follow)
        return log_prob.T, [column.transpose(0, 1) for column in seen]

    def _start_kl_bound(self, x_t: Tensor) -> float:
        """Upper bound on KL(p_T || G_T): the mean over data of KL(N(a x, b² I) || G_T), nats."""
        flat = x_t.double()
        a, b = (float(value) for value in self.schedule.forward_kernel(self.levels[0], self.schedule.T, flat))
        mean, variances = self.reference.moments(self.schedule.T)
        offset = self.reference.rotation(a * flat - mean).square().mean(0)
        return float(0.5 * ((b**2 + offset) / variances - 1 + (variances / b**2).log()).sum())


class _Flow:
    """One batch on its way: state w (B, d) and the accumulated divergence of both probe halves (2, B)."""

    def __init__(self, solver: FlowSolver, y: Tensor | None, rows: slice) -> None:
        self.denoiser, self.reference, self.schedule = solver.denoiser, solver.reference, solver.schedule
        self.scoring, self.dtype, self.y, self.rows = solver.scoring, solver.dtype, y, rows

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

    def sample(self, w: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """x at the first level from w at the last, and its log density there."""
        (end,) = deque(self._travel(w, grid[::-1]), maxlen=1)
        start, w_start, total = end
        return self._x(w_start, start), self._log_density(w, -total.mean(0), start)

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
        # log p_u = log p_w - sum log scale, and log p_x = log p_u - d log alpha.
        return log_normal(w_T).sum(1) + total - self._scale(t).log().sum() - d * self.schedule.alpha[t].log()

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
        shape = (self.scoring.probes, *x.shape[1:])
        seed = self.scoring.seed
        signs = draw_rows(seed, ("probes", t), self.rows, lambda i, g: torch.randint(0, 2, shape, generator=g))
        return list((2.0 * signs - 1).to(x).movedim(1, 0))
