"""Likelihoods: from one pass, as bounds, by the probability flow of the same network, and how they compare."""

from torchcdm.likelihood.chain import ReverseChain
from torchcdm.likelihood.diagnostics import Consistency, LogProbGaps, consistency, gap_by_level
from torchcdm.likelihood.elbo import ELBO, elbo
from torchcdm.likelihood.flow import FlowPath, FlowResult, FlowSamples, flow_path, flow_sample, probability_flow
from torchcdm.likelihood.flow_bound import FlowLikelihood, FlowOptions, flow_likelihood
from torchcdm.likelihood.normalizer import ESTIMATORS, LogNormalizer, log_normalizer, log_normalizer_above
from torchcdm.likelihood.report import METHODS, LogZOptions, check_methods, log_z_estimates, methods_of, report
from torchcdm.likelihood.single_pass import published_convention, single_pass
from torchcdm.likelihood.summary import NLLGap, NLLReport, Row

__all__ = [
    "ELBO",
    "ESTIMATORS",
    "METHODS",
    "Consistency",
    "FlowLikelihood",
    "FlowOptions",
    "FlowPath",
    "FlowResult",
    "FlowSamples",
    "LogNormalizer",
    "LogProbGaps",
    "LogZOptions",
    "NLLGap",
    "NLLReport",
    "ReverseChain",
    "Row",
    "consistency",
    "check_methods",
    "elbo",
    "flow_likelihood",
    "flow_path",
    "flow_sample",
    "gap_by_level",
    "log_normalizer",
    "log_normalizer_above",
    "log_z_estimates",
    "methods_of",
    "probability_flow",
    "published_convention",
    "report",
    "single_pass",
]
