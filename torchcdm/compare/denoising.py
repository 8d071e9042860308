"""Systems that denoise: their likelihoods by one pass, ELBO and flow, and their samples."""

from __future__ import annotations

from torch import Tensor

from torchcdm.cdm import ClassificationDiffusion
from torchcdm.compare.budget import Budget
from torchcdm.compare.peer import SCORING_SEED, Fitted, Samples, Score, Training
from torchcdm.denoisers import Denoiser
from torchcdm.likelihood import FlowOptions, ReverseChain, elbo, flow_likelihood, single_pass
from torchcdm.likelihood.common import scoring_level
from torchcdm.samplers import make_sampler, sample
from torchcdm.units import LogLikelihood

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
        sampler: Name of the sampler.
        steps: Of the sampler.
    """

    def __init__(
        self, denoiser: Denoiser, training: Training, with_elbo: bool = True, sampler: str = "ddim", steps: int = 50
    ) -> None:
        self.denoiser, self.training, self.with_elbo = denoiser, training, with_elbo
        self.sampler, self.steps = sampler, min(steps, denoiser.schedule.T)
        self.parameters = sum(p.numel() for p in denoiser.parameters())

    def scores(self, x: Tensor, budget: Budget) -> list[Score]:
        denoiser, level = self.denoiser, scoring_level(self.denoiser)
        methods = {}
        if isinstance(denoiser, ClassificationDiffusion):
            methods["one-pass"] = lambda: single_pass(denoiser, x, level=0, seed=SCORING_SEED)
            methods["one-pass-level"] = lambda: single_pass(denoiser, x, level=level, seed=SCORING_SEED)
        if self.with_elbo:
            methods["elbo"] = lambda: self._elbo(x, level)
        methods["flow"] = lambda: flow_likelihood(
            denoiser, x, level=level, options=FlowOptions(), seed=SCORING_SEED
        ).likelihood
        scores = []
        for name, method in methods.items():
            clock = budget.restarted()
            likelihood = method()
            scores.append(Score(name, likelihood, not name.startswith("one-pass"), clock.elapsed))
        return scores

    def _elbo(self, x: Tensor, level: int) -> LogLikelihood:
        levels = self.denoiser.schedule.T - level + 1
        fine = self.denoiser.schedule.T > CALIBRATED_LEVELS
        chain = ReverseChain(self.denoiser) if fine else ReverseChain.calibrated(self.denoiser, seed=SCORING_SEED)
        evaluations = min(levels, ELBO_EVALUATIONS)
        return elbo(self.denoiser, x, None, level, evaluations, chain, SCORING_SEED).likelihood

    def sample(self, n: int, seed: int) -> Samples:
        drawn = sample(self.denoiser, n, self.sampler, self.steps, seed=seed)
        # The step to level 0 always takes one evaluation.
        evaluations = make_sampler(self.sampler).evaluations * (self.steps - 1) + 1
        return Samples(drawn, evaluations)
