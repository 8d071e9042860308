"""Likelihoods: from one pass, as bounds, by the probability flow of the same network, and how they compare.

Every likelihood takes ``(model, x, y=None, scoring=Scoring())``, so that their numbers compare.
"""

from torchcdm.likelihood.diagnostics import Consistency, LevelGaps, consistency, gap_by_level
from torchcdm.likelihood.elbo import ELBO, elbo
from torchcdm.likelihood.flow import FlowLikelihood, FlowResult, FlowSolver, probability_flow
from torchcdm.likelihood.log_z import LogZ, log_normalizer
from torchcdm.likelihood.one_pass import published_convention, single_pass
from torchcdm.likelihood.report import METHODS, check_methods, methods_of, report
from torchcdm.likelihood.scoring import Scoring, scoring_level
from torchcdm.likelihood.summary import NLLGap, NLLReport, Row

__all__ = [
    "ELBO",
    "METHODS",
    "Consistency",
    "FlowLikelihood",
    "FlowResult",
    "FlowSolver",
    "LevelGaps",
    "LogZ",
    "NLLGap",
    "NLLReport",
    "Row",
    "Scoring",
    "check_methods",
    "consistency",
    "elbo",
    "gap_by_level",
    "log_normalizer",
    "methods_of",
    "probability_flow",
    "published_convention",
    "report",
    "scoring_level",
    "single_pass",
]
