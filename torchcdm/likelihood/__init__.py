"""Likelihoods: from one pass, as bounds, by the probability flow of the same network, and how they compare."""

from torchcdm.likelihood.chain import ReverseChain
from torchcdm.likelihood.elbo import ELBO, elbo
from torchcdm.likelihood.flow import FlowResult, FlowSamples, flow_sample, probability_flow
from torchcdm.likelihood.normalizer import LogNormalizer, log_normalizer
from torchcdm.likelihood.report import METHODS, FlowOptions, report
from torchcdm.likelihood.single_pass import published_convention, single_pass
from torchcdm.likelihood.summary import NLLReport

__all__ = [
    "METHODS",
    "FlowOptions",
    "FlowResult",
    "FlowSamples",
    "LogNormalizer",
    "NLLReport",
    "flow_sample",
    "probability_flow",
    "published_convention",
    "report",
    "single_pass",
]
