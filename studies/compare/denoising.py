"""Systems that denoise: their likelihoods by one pass, ELBO and flow, and their samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from studies.budget import Budget
from studies.compare.peer import SCORING_SEED, Fitted, Samples, Score, Training
from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.target import ModelTarget
from torchcdm.compose import sample
from torchcdm.likelihood import (
    Scoring,
    elbo,
    log_normalizer,
    probability_flow,
    single_pass,
)
from torchcdm.likelihood.report import Row, judge
from torchcdm.models.denoiser import Denoiser
from torchcdm.models.density import DensityModel
from torchcdm.units import LogLikelihood

SCORING = Scoring(seed=SCORING_SEED)

ELBO_EVALUATIONS = 100
"""Of each sample; more levels than that are drawn at random, which leaves the bound unbiased."""

CALIBRATED_LEVELS = 100
"""Up to so many levels the reverse variances are measured on the model's own samples; a finer chain hardly needs them
and would take twice as many evaluations as it has levels."""


class FittedDenoiser(Fitted):
    """A trained denoiser.

    Args:
        denoiser: With a transform.
        training: How it was trained.
        with_elbo: Whether its reverse chain is a system of its own; flow matching has none.
        sampling: Options of :func:`torchcdm.sample`.
        log_z: Sweeps of the estimate of log Z of a classification diffusion model; None for no estimate.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        training: Training,
        with_elbo: bool = True,
        sampling: Mapping[str, Any] = MappingProxyType({"sampler": "ddim", "steps": 50}),
        log_z: int | None = None,
    ) -> None:
        self.denoiser, self.training, self.with_elbo, self.log_z = denoiser, training, with_elbo, log_z
        self.sampling = sampling
        self.parameters = sum(p.numel() for p in denoiser.parameters())

    def scores(self, x: Tensor, budget: Budget) -> list[Score]:
        denoiser, density = self.denoiser, self.denoiser.density
        methods = {}
        if density is not None:
            methods["one-pass"] = lambda: single_pass(density, x, None, replace(SCORING, level=0))
            methods["one-pass-level"] = lambda: single_pass(density, x, None, SCORING)
        if self.with_elbo:
            methods["elbo"] = lambda: self._elbo(x)
        methods["flow"] = lambda: probability_flow(denoiser, x, None, SCORING)
        scores = []
        for name, method in methods.items():
            clock = budget.restarted()
            likelihood = method()
            scores.append(Score(name, likelihood, not name.startswith("one-pass"), clock.elapsed))
        if density is not None and self.log_z is not None:
            one_pass = next(score for score in scores if score.name == "one-pass-level")
            scores += self._normalised(density, one_pass, self.log_z)
        return scores

    def _normalised(self, model: DensityModel, one_pass: Score, sweeps: int) -> list[Score]:
        """One pass less an estimate of log Z, which is made once and not for each sample; none where it cannot be."""
        likelihood, level = one_pass.likelihood, one_pass.likelihood.level
        z = log_normalizer(model, scoring=SCORING, sweeps=sweeps)
        row = Row(one_pass.name, *likelihood.mean_and_error(), likelihood.nfe, level)
        per_nat = 1.0 if likelihood.log_bin is None else 1 / (z.dim * math.log(2))
        verdict = judge(per_nat, level, row, z)
        if verdict.headline.value is None:
            self.note = verdict.why
            return []
        self.note = f"log Z {per_nat * z.value:+.3f}, effective sample size {z.ess:.0f}"
        normalised = replace(likelihood, nats=likelihood.nats - z.value)
        # What the verdict adds to the samples' own error.
        shared_se = math.sqrt(max(0.0, verdict.headline.se**2 - row.se**2))
        return [Score(verdict.headline.name, normalised, True, one_pass.seconds, shared_se)]

    def _elbo(self, x: Tensor) -> LogLikelihood:
        levels = self.denoiser.schedule.T - SCORING.level_of(self.denoiser) + 1
        fine = self.denoiser.schedule.T > CALIBRATED_LEVELS
        kernels = None if fine else Kernels.of_target(ModelTarget(self.denoiser, density=False), SCORING.seed)
        return elbo(self.denoiser, x, None, SCORING, kernels, min(levels, ELBO_EVALUATIONS))

    def sample(self, n: int, seed: int) -> Samples:
        drawn = sample(self.denoiser, n, seed=seed, units="codes", details=True, **self.sampling)
        return Samples(drawn.x, drawn.evaluations)
