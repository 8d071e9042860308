"""Likelihoods: from one pass, as bounds, by the probability flow of the same network, and how they compare.

Every likelihood takes ``(model, x, y=None, scoring=Scoring())``, so that their numbers compare.
"""

from torchcdm.likelihood.elbo import elbo
from torchcdm.likelihood.flow import FlowSolver, LevelGaps, gap_by_level, probability_flow
from torchcdm.likelihood.log_z import LogZ, log_normalizer
from torchcdm.likelihood.one_pass import Consistency, consistency, single_pass
from torchcdm.likelihood.report import NLLReport, check_methods, methods_of, report
from torchcdm.likelihood.scoring import Scoring, scoring_level

__all__ = [
    "Consistency",
    "FlowSolver",
    "LevelGaps",
    "LogZ",
    "NLLReport",
    "Scoring",
    "check_methods",
    "consistency",
    "elbo",
    "gap_by_level",
    "log_normalizer",
    "methods_of",
    "probability_flow",
    "report",
    "scoring_level",
    "single_pass",
]
