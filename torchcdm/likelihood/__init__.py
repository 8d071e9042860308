"""Likelihoods: from one pass, as bounds, by the probability flow of the same network, and how they compare.

Every likelihood takes ``(model, x, y=None, scoring=Scoring())``, so that their numbers compare: a model with a
transform, which is put into evaluation mode meanwhile; data ``x``, data units (N, *shape); their classes ``y``, long
(N,), for the conditional density. UserError for data, labels or a level that do not fit the model.
"""

from torchcdm.likelihood.elbo import elbo
from torchcdm.likelihood.flow import FlowSolver, probability_flow
from torchcdm.likelihood.log_z import LogZ, log_normalizer
from torchcdm.likelihood.one_pass import single_pass
from torchcdm.likelihood.report import Method, NLLReport, methods_of, report
from torchcdm.likelihood.scoring import Scoring

__all__ = ["FlowSolver", "LogZ", "Method", "NLLReport", "Scoring"]
__all__ += ["elbo", "log_normalizer", "methods_of", "probability_flow", "report", "single_pass"]
