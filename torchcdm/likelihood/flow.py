r"""Likelihood by the probability flow of a denoiser (identity 6), on the discrete levels.

With a reference Gaussian of mean mu and covariance eigenvalues lambda, :math:`w = (\lambda + r^2)^{-1/2} R (u - \mu)`
is standard normal at every r if the data are that Gaussian, and the flow stands still. So the flow is integrated in
w, where only what is not Gaussian moves, and only its divergence needs probes; the Gaussian's part is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from torchcdm.annealing.target import reference_gaussian
from torchcdm.likelihood.one_pass import ScoredNoise, score_noisy
from torchcdm.likelihood.scoring import Batch, Scoring, as_data, draw_rows
from torchcdm.models.denoiser import Denoiser, working_dtype
from torchcdm.runtime.batching import labels_of
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
        x_T: Where the path ended, at the last level, model units, (B, *shape).
        start_kl_bound: Upper bound on KL(p_T || start Gaussian), nats, from the inputs; the one error that neither
            more steps nor more probes remove.
    """

    log_prob: Tensor
    probe_gap: Tensor
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

    Data as in :func:`torchcdm.likelihood.single_pass`, of any denoiser with a transform. Of ``scoring`` level 1 ...
    T - 1, steps, probes, seed and batch size are used.
    """
    (x, y), transform, solver = as_data(denoiser, x, y), denoiser.transform, FlowSolver(denoiser, scoring)
    level = solver.levels[0]
    columns = scoring.by_batches(
        denoiser, x, lambda rows: score_noisy(denoiser, Batch(denoiser, x, y, rows, scoring.seed), level)
    )
    scored = ScoredNoise(*columns)
    flow = solver.log_prob(scored.z, labels_of(y, slice(None), scored.z.device))
    nats = (flow.log_prob + scored.offset).cpu()
    return FlowLikelihood(nats, transform.dim, level, transform.log_bin, solver.nfe, flow, scored)


Look = Callable[[Tensor, int, Tensor | None], tuple[Tensor, ...]]
"""What is wanted of x_t (B, *shape), in the precision of the network, at level t, of classes y: tensors (B, ...)."""


@final
class FlowSolver:
    """The probability flow of any denoiser between one level and the last, by Heun steps, in model units.

    The ``denoiser`` is put into evaluation mode meanwhile; of ``scoring`` level 1 ... T - 1, steps, probes, seed and
    batch size are used.

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

    def log_prob(self, x_t: Tensor, y: Tensor | None = None) -> FlowResult:
        """log density of inputs ``x_t`` (N, *shape) at the first level, model units; ``y`` are classes, long (N,)."""
        log_prob, probe_gap, x_T = self._rise(x_t, y)
        flat = x_t.double()
        a, b = self.schedule.forward_kernel(self.levels[0], self.schedule.T, flat)
        return FlowResult(log_prob[:, 0], probe_gap, x_T, float(self.reference.start_kl(a * flat, b).mean()))

    def path(
        self, x_t: Tensor, look: Look, y: Tensor | None = None, progress: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """What :meth:`log_prob` integrates, level by level.

        ``look`` is asked at each level, as whole paths of images are more than memory may hold.

        Returns:
            The flow's log density at each level, nats in model units, (levels, N), and what ``look`` said there,
            (levels, N, ...).
        """
        log_prob, _, _, *seen = self._rise(x_t, y, look, progress)
        return log_prob.T, [column.transpose(0, 1) for column in seen]

    def _rise(
        self, x_t: Tensor, y: Tensor | None, look: Look | None = None, progress: bool = False
    ) -> tuple[Tensor, ...]:
        """:meth:`_Flow.rise` of all inputs."""
        from tqdm.auto import tqdm

        def follow(rows: slice) -> tuple[Tensor, ...]:
            found = _Flow(self, labels_of(y, rows, x_t.device), rows).rise(x_t[rows], look)
            bar.update(len(found[0]))
            return found

        with tqdm(total=len(x_t), desc="flow", unit="sample", disable=not progress, leave=False) as bar:
            return self.scoring.by_batches(self.denoiser, x_t, follow)


class _Flow:
    """One batch on its way: state w (B, d) and the accumulated divergence of both probe halves (2, B)."""

    def __init__(self, solver: FlowSolver, y: Tensor | None, rows: slice) -> None:
        self.denoiser, self.reference, self.schedule = solver.denoiser, solver.reference, solver.schedule
        self.scoring, self.levels, self.dtype, self.y, self.rows = solver.scoring, solver.levels, solver.dtype, y, rows

    def rise(self, x_t: Tensor, look: Look | None = None) -> tuple[Tensor, ...]:
        """log density by level, (B, levels), gap of the probe halves, x_T, what ``look`` says, (B, levels, ...)."""
        start, totals, seen = self.levels[0], [], []
        u = self.reference.rotation(x_t.double() / self.schedule.alpha[start] - self.reference.mean)
        for t, w, total in self._travel(u / self._scale(start), self.levels):
            totals.append(total)
            if look is not None:
                seen.append(look(self._x(w, t).to(self.dtype), t, self.y))
        rest = (total - torch.stack(totals)).mean(1)
        log_prob = [self._log_density(w, from_t, t) for t, from_t in zip(self.levels, rest, strict=True)]
        columns = (torch.stack(column, 1) for column in zip(*seen, strict=True))
        return torch.stack(log_prob, 1), total[0] - total[1], self._x(w, t), *columns

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
        """dw/d(angle), (B, d)."""
        x_t = self._x(w, t).to(self.dtype)
        excess = self.denoiser.denoise(x_t, t, self.y).eps - self.reference.eps(x_t, t)
        return self._in_angle(excess, t)

    def _slope_and_divergence(self, w: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """The same, with its divergence by either half of the probes, (2, B): the one place that takes one."""
        with torch.enable_grad():
            x = self._x(w, t).to(self.dtype).detach().requires_grad_()
            excess = self.denoiser.differentiable_eps(x, t, self.y) - self.reference.eps(x, t)
            vectors = self._probe_vectors(x, t)
            traces = []
            for i, probe in enumerate(vectors):
                (product,) = torch.autograd.grad(excess, x, probe, retain_graph=i + 1 < len(vectors))
                traces.append((product * probe).flatten(1).sum(1))
        if x[0].numel() <= EXACT_DIMENSIONS:
            halves = torch.stack(traces).sum(0).expand(2, -1)
        else:
            halves = torch.stack([torch.stack(traces[half::2]).mean(0) for half in (0, 1)])
        # The trace of a map does not depend on the basis: alpha * div_x of the excess.
        speed = (1 + self.schedule.ratio[t] ** 2) * self.schedule.alpha[t]
        return self._in_angle(excess.detach(), t), speed * halves.double()

    def _in_angle(self, excess: Tensor, t: int) -> Tensor:
        """dw/d(angle) of E[eps | x_t] less the reference's: dr = (1 + r²) d(angle)."""
        return (1 + self.schedule.ratio[t] ** 2) * self.reference.rotation(excess.double()) / self._scale(t)

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
