"""Likelihoods: from one pass, as bounds, by the probability flow of the same network, and how they compare."""

from torchcdm.likelihood.flow import FlowResult, probability_flow
from torchcdm.likelihood.single_pass import published_convention, single_pass

__all__ = ["FlowResult", "probability_flow", "published_convention", "single_pass"]
