r"""Likelihood by the probability flow of a denoiser (identity 6), on the discrete levels.

With a reference Gaussian of mean mu and covariance eigenvalues lambda, :math:`w = (\lambda + r^2)^{-1/2} R (u - \mu)`
is standard normal at every r if the data are that Gaussian, and the flow stands still. So the flow is integrated in
w, where only what is not Gaussian moves, and only its divergence needs probes; the Gaussian's part is exact.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from torchcdm.annealing.target import in_batches, reference_gaussian
from torchcdm.likelihood.one_pass import score_noisy
from torchcdm.likelihood.scoring import ScoredBatch, Scoring, as_data, draw_rows
from torchcdm.models.denoiser import Denoiser, working_dtype
from torchcdm.runtime.processes import labels_of
from torchcdm.units import LogLikelihood, log_normal

EXACT_DIMENSIONS = 16  # up to here the divergence is the exact trace, above the mean over random probes


@dataclass(frozen=True)
class FlowResult:
    """Log densities by the probability flow, and how far they can be trusted."""

    levels: list[int]  # rising to T
    path: Tensor  # log density at each of these, nats in model units, (levels, B)
    one_pass: Tensor  # the same by one pass of the network, nan for a denoiser without density
    probe_gap: Tensor  # difference between the two independent halves of the probes, (B,); 0 with an exact divergence
    start_kl_bound: float  # upper bound on KL(p_T || start Gaussian), nats: the error that no steps or probes remove

    @property
    def log_prob(self) -> Tensor:
        """log density of each input at its level, (B,)."""
        return self.path[0]

    def gaps(self) -> dict[str, list[float]]:
        """NLL by one pass minus NLL by the flow, nats: above 0 one pass finds samples less likely.

        ``mean`` over samples at each of the visited ``levels``, and standard deviation ``sd``, with the probes' noise.
        """
        gaps = (self.path - self.one_pass).cpu()
        sd = gaps.std(1, correction=int(gaps.shape[1] > 1))
        return {"levels": self.levels, "mean": gaps.mean(1).tolist(), "sd": sd.tolist()}


@dataclass(frozen=True)
class FlowLikelihood(LogLikelihood):
    """A likelihood by the flow, the integration that it came from, and its inputs."""

    flow: FlowResult
    z: Tensor


def probability_flow(
    denoiser: Denoiser, x: Tensor, y: Tensor | None = None, scoring: Scoring = Scoring()
) -> FlowLikelihood:
    """log-likelihood of data through one draw of noise and the flow from there.

    A lower bound on that of data on a grid; for continuous data the density of the data with that noise. Exact up to
    the flow's steps, probes and start density, and normalised by construction. Data as in
    :func:`torchcdm.likelihood.single_pass`, of any denoiser with a transform; level 1 ... T - 1.
    """
    (x, y), transform, solver = as_data(denoiser, x, y, scoring), denoiser.transform, FlowSolver(denoiser, scoring)
    level = solver.levels[0]

    def noisy(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        return score_noisy(denoiser, ScoredBatch(denoiser, x, y, rows, scoring.seed), level)

    z, _, offset = in_batches(denoiser, x, noisy, scoring.batch_size)
    flow = solver.log_prob(z, labels_of(y, slice(None), z.device))
    nats = (flow.log_prob + offset).cpu()
    return FlowLikelihood(nats, transform.dim, level, transform.log_bin, solver.nfe, flow, z)


@final
class FlowSolver:
    """The probability flow of any denoiser between one level and the last, by Heun steps, in model units.

    The ``denoiser`` is put into evaluation mode meanwhile; of ``scoring`` level 1 ... T - 1, steps, probes, seed and
    batch size are used. Visited ``levels`` rise to T; ``nfe`` are evaluations of each sample.
    """

    def __init__(self, denoiser: Denoiser, scoring: Scoring = Scoring()) -> None:
        self.denoiser, self.scoring, self.schedule = denoiser, scoring, denoiser.schedule
        self.reference, self.dtype = reference_gaussian(denoiser), working_dtype(denoiser, torch.float64)
        level = scoring.level_of(denoiser)
        span = self.schedule.T - level
        steps = min(scoring.steps, span)
        self.levels = [level + (i * span + steps // 2) // steps for i in range(steps + 1)]
        self.nfe = 2 * steps + 1

    def log_prob(self, x_t: Tensor, y: Tensor | None = None, index: Sequence[int] | None = None) -> FlowResult:
        """log density of inputs ``x_t`` (N, *shape) at the first level, model units; ``y`` are classes, long (N,).

        The probes of a sample are those of its ``index``, 0 ... N - 1 when None.
        """
        y = self.denoiser.check_inputs(x_t, self.levels[0], y, data=True)
        index = range(len(x_t)) if index is None else index

        def follow(rows: slice) -> tuple[Tensor, ...]:
            return self._rise(x_t[rows], labels_of(y, rows, x_t.device), index[rows])

        path, one_pass, probe_gap = in_batches(self.denoiser, x_t, follow, self.scoring.batch_size)
        flat = x_t.double()
        a, b = self.schedule.forward_kernel(self.levels[0], self.schedule.T, flat)
        kl = float(self.reference.start_kl(a * flat, b).mean())
        return FlowResult(self.levels, path.T, one_pass.T, probe_gap, kl)

    def _rise(self, x_t: Tensor, y: Tensor | None, index: Sequence[int]) -> tuple[Tensor, ...]:
        """log density by flow and by one pass, (B, levels) each, and the gap of the probe halves, (B,)."""
        # Heun in the angle atan(r): finite at both ends, close to r where the noise is low. The divergence is
        # summed by the trapezoidal rule along the path itself, so that the predictor's end needs none.
        t, angle = self.levels[0], torch.atan(self.schedule.ratio)
        w = self.reference.rotation(x_t.double() / self.schedule.alpha[t] - self.reference.mean) / self._scale(t)
        slope, divergence, log_p = self._slope_and_divergence(w, t, y, index)
        # Of both halves of the probes, (2, B).
        totals, one_pass = [torch.zeros_like(divergence)], [log_p]
        for t, s in pairwise(self.levels):
            step = angle[s] - angle[t]
            x_s = self._x(w + step * slope, s).to(self.dtype)
            ahead = self._in_angle(self.denoiser.denoise(x_s, s, y).eps - self.reference.eps(x_s, s), s)
            w = w + step / 2 * (slope + ahead)
            before = divergence
            slope, divergence, log_p = self._slope_and_divergence(w, s, y, index)
            totals.append(totals[-1] + step / 2 * (before + divergence))
            one_pass.append(log_p)
        rest, start, d = (totals[-1] - torch.stack(totals)).mean(1), log_normal(w).sum(1), w.shape[1]
        # log p_u = log p_w - sum log scale, and log p_x = log p_u - d log alpha.
        log_prob = []
        for t, total in zip(self.levels, rest, strict=True):
            log_prob.append(start + total - self._scale(t).log().sum() - d * self.schedule.alpha[t].log())
        return torch.stack(log_prob, 1), torch.stack(one_pass, 1), totals[-1][0] - totals[-1][1]

    def _scale(self, t: int) -> Tensor:
        return (self.reference.variances + self.schedule.ratio[t] ** 2).sqrt()

    def _x(self, w: Tensor, t: int) -> Tensor:
        u = self.reference.mean + self.reference.rotation.inverse(w * self._scale(t))
        return self.schedule.alpha[t] * u

    def _slope_and_divergence(
        self, w: Tensor, t: int, y: Tensor | None, index: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dw/d(angle), (B, d), its divergence by either half of the probes, (2, B), and log p by one pass, (B,)."""
        density, log_p = self.denoiser.density, w.new_full((len(w),), math.nan)
        with torch.enable_grad():
            x = self._x(w, t).to(self.dtype).detach().requires_grad_()
            if density is None:
                eps = self.denoiser.differentiable_eps(x, t, y)
            else:
                found = density.evaluate(x, t, y, graph=True)
                eps, log_p = found.eps, found.log_prob_levels[:, t].detach()
            excess = eps - self.reference.eps(x, t)
            shape, seed = (self.scoring.probes, *x.shape[1:]), self.scoring.seed
            exact = w.shape[1] <= EXACT_DIMENSIONS
            if exact:
                units = torch.eye(w.shape[1], dtype=x.dtype, device=x.device)
                probes = [unit.reshape(1, *x.shape[1:]).expand_as(x) for unit in units]
            else:
                # Random signs, drawn anew for each sample and level.
                signs = draw_rows(seed, ("probes", t), index, lambda i, g: torch.randint(0, 2, shape, generator=g))
                probes = list((2.0 * signs - 1).to(x).movedim(1, 0))
            traces = []
            for i, probe in enumerate(probes):
                (product,) = torch.autograd.grad(excess, x, probe, retain_graph=i + 1 < len(probes))
                traces.append((product * probe).flatten(1).sum(1))
        halves = [torch.stack(traces).sum(0)] * 2 if exact else [torch.stack(traces[k::2]).mean(0) for k in (0, 1)]
        # The trace of a map does not depend on the basis: alpha * div_x of the excess.
        speed = (1 + self.schedule.ratio[t] ** 2) * self.schedule.alpha[t]
        return self._in_angle(excess.detach(), t), speed * torch.stack(halves).double(), log_p

    def _in_angle(self, excess: Tensor, t: int) -> Tensor:
        """dw/d(angle) of E[eps | x_t] less the reference's: dr = (1 + r²) d(angle)."""
        return (1 + self.schedule.ratio[t] ** 2) * self.reference.rotation(excess.double()) / self._scale(t)
